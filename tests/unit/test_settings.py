from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmbuild.errors import UsageError
from vmbuild.model import GIB, Arch, PassOn
from vmbuild.settings import BY_KEY, PASSED_ON, SETTINGS, Settings, resolve, settings_table, show


def resolved(tmp_path: Path, **flags: str) -> Settings:
    return resolve(flags, {}, tmp_path, tmp_path / "none.toml")


def test_the_nearest_place_wins(tmp_path: Path) -> None:
    user = tmp_path / "config.toml"
    user.write_text('cpus = 1\nmemory = "1G"\ndisk = "11G"\nname = "mine"\n')
    (tmp_path / "vmbuild.toml").write_text('cpus = 2\nmemory = "2G"\ndisk = "12G"\n')
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    found = resolve({"cpus": "4"}, {"VMBUILD_CPUS": "3", "VMBUILD_MEMORY": "3G"}, below, user)
    assert {key: (found[key], found.values[key].origin) for key in ("cpus", "memory", "disk", "name")} == {
        "cpus": (4, "--cpus"),
        "memory": (3 * GIB, "environment VMBUILD_MEMORY"),
        "disk": (12 * GIB, str(tmp_path / "vmbuild.toml")),
        "name": ("mine", str(user)),
    }
    assert found["image"] == "debian-13-arm64"
    assert found.values["image"].origin == "default"


@pytest.mark.parametrize(
    ("flags", "name", "image", "arch"),
    [
        ({}, "default", "debian-13-arm64", None),
        ({"arch": "arm64"}, "default", "debian-13-arm64", Arch.ARM64),
        ({"arch": "arm"}, "arm", "debian-13-armhf", Arch.ARMHF),
        ({"arch": "arm", "name": "mine"}, "mine", "debian-13-armhf", Arch.ARMHF),
        ({"arch": "arm", "image": "other"}, "arm", "other", Arch.ARMHF),
        ({"image": "debian-13-armhf"}, "default", "debian-13-armhf", None),
    ],
)
def test_the_architecture_chooses_what_else_nobody_chose(
    tmp_path: Path, flags: dict[str, str], name: str, image: str, arch: Arch | None
) -> None:
    found = resolved(tmp_path, **flags)
    request = found.as_request()
    assert (request.name, request.image, request.arch) == (name, image, arch)
    assert request.given == flags.keys()


def test_an_architecture_is_shown_as_it_is_written(tmp_path: Path) -> None:
    assert show(resolved(tmp_path, arch="arm").values["arch"], "arch") == "arm"
    assert resolve({}, {"VMBUILD_ARCH": "arm"}, tmp_path, tmp_path / "none.toml")["name"] == "arm"


def test_a_request_names_what_was_chosen(tmp_path: Path) -> None:
    request = resolved(tmp_path, cpus="3", memory="1500M", disk="5G").as_request()
    assert (request.cpus, request.memory_mib, request.disk_bytes) == (3, 1500, 5 * GIB)
    assert request.given == request.demanded == {"cpus", "memory", "disk"}


def test_only_the_command_line_demands(tmp_path: Path) -> None:
    (tmp_path / "vmbuild.toml").write_text('disk = "5G"\n')
    request = resolve({"cpus": "2"}, {"VMBUILD_MEMORY": "1G"}, tmp_path, tmp_path / "none.toml").as_request()
    assert request.given == {"cpus", "memory", "disk"}
    assert request.demanded == {"cpus"}


def test_the_defaults_fit_the_host(tmp_path: Path) -> None:
    request = resolved(tmp_path).as_request()
    assert request.cpus >= 1
    assert 512 <= request.memory_mib <= 4096
    assert request.given == frozenset()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("cpus", text) for text in ("0", "-1", "two", "1.5", "513", "")),
        *(("memory", text) for text in ("4", "100M", "much", "0", "9" * 5000)),
        ("cache_dir", "~nobody-by-this-name/x"),
        *(("disk", text) for text in ("10M", "-1G")),
        *(("timeout", text) for text in ("0", "-5s", "soon", "inf", "nan")),
        *(("mirror", text) for text in ("ftp://x", "debian")),
        *(("arch", text) for text in ("armhf", "x86", "", "ARM")),
        *(("snapshots", text) for text in ("maybe", "2", "")),
        *((key, "maybe") for key in ("proxy", "logins")),
        *(("registry_mirrors", text) for text in ("m.example", "ftp://m", "http://", "http://m/x", "https://a:b@m")),
        *(("insecure_registries", text) for text in ("http://m", "m/x", "10.0.0.0/99", "a b/c")),
        *(("host_ports", text) for text in ("0", "65536", "-1", "http", "5000-5001", "\u0665")),
        ("ca", "~nobody-by-this-name/x"),
    ],
)
def test_nonsense_is_refused_with_its_origin(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"from {BY_KEY[key].flag}"):
        resolved(tmp_path, **{key: text})


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_times_as_people_write_them(tmp_path: Path, text: str, seconds: float) -> None:
    assert resolved(tmp_path, timeout=text)["timeout"] == seconds


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("YES", True), ("1", True), ("Off", False), ("false", False), ("0", False)]
)
def test_a_switch_as_people_write_it(tmp_path: Path, text: str, value: bool) -> None:
    assert resolved(tmp_path, snapshots=text).as_request().snapshots is value


def test_a_switch_in_a_file_may_be_tomls_own(tmp_path: Path) -> None:
    (tmp_path / "vmbuild.toml").write_text("snapshots = false\n")
    assert resolved(tmp_path)["snapshots"] is False


@pytest.mark.parametrize(
    ("key", "text", "shown"),
    [("snapshots", "no", "off"), ("timeout", "2m", "120s"), ("memory", "1500M", "1.5 GiB"), ("cpus", "2", "2")],
)
def test_a_value_is_shown_as_people_write_it(tmp_path: Path, key: str, text: str, shown: str) -> None:
    assert show(resolved(tmp_path, **{key: text}).values[key], key) == shown


@pytest.mark.parametrize(
    ("key", "text", "value", "shown"),
    [
        ("registry_mirrors", "http://a:5000/, https://b,http://a:5000", ("http://a:5000", "https://b"), None),
        (
            "insecure_registries",
            "R.example localhost:5000,10.1.2.3/8",
            ("r.example", "localhost:5000", "10.0.0.0/8"),
            None,
        ),
        ("insecure_registries", "[::1]:5000", ("[::1]:5000",), None),
        ("host_ports", "5000,5001", (5000, 5001), "5000, 5001"),
        ("ca", "auto,/a/b.pem", ("auto", "/a/b.pem"), "auto, /a/b.pem"),
        *((key, "off", (), "off") for key in ("registry_mirrors", "insecure_registries", "host_ports", "ca")),
    ],
)
def test_a_list_as_people_write_it(tmp_path: Path, key: str, text: str, value: object, shown: str | None) -> None:
    found = resolved(tmp_path, **{key: text}).values[key]
    assert found.value == value
    assert show(found, key) == shown or shown is None


def test_a_list_in_a_file_is_tomls_own(tmp_path: Path) -> None:
    user = tmp_path / "config.toml"
    user.write_text('host_ports = [5000, 5001]\nregistry_mirrors = ["http://a", "http://b"]\nca = []\n')
    found = resolve({}, {}, tmp_path, user)
    assert (found["host_ports"], found["registry_mirrors"], found["ca"]) == ((5000, 5001), ("http://a", "http://b"), ())


def test_what_is_passed_on_is_part_of_the_request(tmp_path: Path) -> None:
    assert resolved(tmp_path).as_request().pass_on == PassOn(proxy=True, authorities=("auto",), logins=True)
    flags = {"proxy": "off", "ca": "/c", "registry_mirrors": "http://m", "insecure_registries": "r", "host_ports": "1"}
    found = resolved(tmp_path, **flags, logins="off").as_request().pass_on
    assert found == PassOn(False, ("/c",), ("http://m",), ("r",), (1,), False)


@pytest.mark.parametrize("key", PASSED_ON)
def test_a_project_may_pass_on_less_but_not_more(tmp_path: Path, key: str) -> None:
    """More would open the machine of all projects: another authority or mirror, or a login that its user keeps back."""
    (tmp_path / "vmbuild.toml").write_text(f'{key} = "off"\n')
    assert not resolved(tmp_path)[key]
    texts = {"ca": "auto", "registry_mirrors": "http://m", "insecure_registries": "r", "host_ports": "1"}
    (tmp_path / "vmbuild.toml").write_text(f'{key} = "{texts.get(key, "on")}"\n')
    with pytest.raises(UsageError, match="must not set"):
        resolved(tmp_path)


def test_an_unknown_key_is_told_with_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "vmbuild.toml").write_text("cpu = 2\n")
    with pytest.raises(UsageError, match="'cpu'") as caught:
        resolved(tmp_path)
    assert "'cpus'" in caught.value.resolution


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "vmbuild.toml").write_text("cpus = = 2\n")
    with pytest.raises(UsageError, match="cannot read"):
        resolved(tmp_path)


@pytest.mark.parametrize("key", sorted(setting.key for setting in SETTINGS if setting.trusted_only("http://x")))
def test_a_project_may_not_say_where_files_go(tmp_path: Path, key: str) -> None:
    (tmp_path / "vmbuild.toml").write_text(f'{key} = "http://x"\n')
    with pytest.raises(UsageError, match="must not set") as caught:
        resolved(tmp_path)
    assert BY_KEY[key].env in caught.value.resolution


def test_an_empty_variable_is_no_value(tmp_path: Path) -> None:
    assert resolve({}, {"VMBUILD_NAME": ""}, tmp_path, tmp_path / "none.toml")["name"] == "default"


def test_every_setting_is_in_the_table() -> None:
    table = settings_table()
    assert all(setting.env in table for setting in SETTINGS)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "vmbuild.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(UsageError, match="cannot read"):
        resolved(tmp_path)


def test_files_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "vmbuild.toml").write_text("# \u00e4\ncpus = 2\n", encoding="utf-8")
    script = (
        "from pathlib import Path; from vmbuild.settings import resolve; print(resolve({}, {}, Path.cwd())['cpus'])"
    )
    env = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, check=True)
    assert done.stdout == b"2\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_searched_is_passed_over(tmp_path: Path) -> None:
    """As after `su user` in a folder of root: the folder, and the old HOME, are closed."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        assert resolve({}, {}, locked, locked / "config.toml")["name"] == "default"
    finally:
        os.seteuid(0)
