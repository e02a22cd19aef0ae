"""The catalogue as a user meets it: rows of one's own, what the commands tell of them, what pruning frees."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.image.disks import disk_spec, qcow2_disk
from vmbuild import start, stock
from vmbuild.cli.program import run
from vmbuild.image import cloud, store
from vmbuild.image.catalog import load_image
from vmbuild.image.given import find_row
from vmbuild.model import ApplianceSpec, DiskSpec, GuestImage, Home, MachineRequest
from vmbuild.report import SilentReporter

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's own rows; cache and state are the test's, too."""
    for key in ("CACHE", "STATE"):
        monkeypatch.setenv(f"VMBUILD_{key}_DIR", str(tmp_path / key.lower()))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "config" / "vmbuild" / "images"
    folder.mkdir(parents=True)
    return folder


def readme_row(name: str) -> str:
    found = re.search(rf"<!-- row {name} -->\n```toml\n(.*?)```\n<!-- /row {name} -->", README.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return what `vmbuild images --json` says, by name."""
    assert run(["images", "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def write_local_row(own: Path, name: str) -> Path:
    """Write a row of a disk that lies beside it; return the disk."""
    disk = own / f"{name}.qcow2"
    disk.write_bytes(qcow2_disk(own.parent / "make"))
    text = readme_row("my-disk").replace('"my-disk"', f'"{name}"')
    text = re.sub(r"^(checksums|signature|keyrings) .*\n", "", text, flags=re.MULTILINE)
    (own / f"{name}.toml").write_text(re.sub(r"^url .*", f'url = "{disk.name}"', text, flags=re.MULTILINE))
    return disk


# --- the README -----------------------------------------------------------------------------------------------------


def test_the_readmes_disk_is_a_row(own: Path) -> None:
    (own / "keys").mkdir()
    (own / "keys" / "ours.gpg").touch()
    (own / "my-disk.toml").write_text(readme_row("my-disk"))
    spec = load_image("my-disk")
    assert isinstance(spec, DiskSpec)
    assert spec.keyrings == (own / "keys" / "ours.gpg",)
    assert spec.login is not None
    assert spec.signature is not None


def test_the_readmes_appliance_is_the_shipped_one_and_more(own: Path) -> None:
    (own / "my-appliance.toml").write_text(readme_row("my-appliance"))
    spec, shipped = load_image("my-appliance"), load_image("debian-13-arm64")
    assert isinstance(spec, ApplianceSpec)
    assert isinstance(shipped, ApplianceSpec)
    assert set(spec.packages) - set(shipped.packages) == {"gdb", "strace"}
    assert set(shipped.packages) <= set(spec.packages)
    for key in ("kernel", "kernel_args", "modules", "without", "exclude", "keyrings", "repositories", "cpu_model"):
        assert getattr(spec, key) == getattr(shipped, key), key


def test_the_documents_name_every_shipped_disk() -> None:
    text = (README.parent / "docs/catalogue.md").read_text()
    for file in (README.parent / "images").glob("*.toml"):
        assert 'kind = "disk"' not in file.read_text() or f"`{file.stem}`" in text, file


# --- what is listed -------------------------------------------------------------------------------------------------


def test_rows_tell_where_a_disk_is_from_and_how_it_is_verified(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_local_row(own, "local")
    found = rows(capsys)
    assert {name: row["verified"] for name, row in found.items() if row["kind"] == "disk"} == {
        "alpine-3.22-arm64": "checksum over https",
        "debian-12-cloud-arm64": "checksum over https",
        "debian-13-cloud-arm64": "checksum over https",
        "local": "not: a file of this host",
        "ubuntu-24.04-arm64": "signed by ubuntu-cloudimage-keyring",
        "ubuntu-24.04-armhf": "signed by ubuntu-cloudimage-keyring",
    }
    appliances = [row["verified"] for row in found.values() if row["kind"] == "appliance"]
    assert appliances
    assert all(each.startswith("signed by debian-archive-") for each in appliances)
    assert found["debian-13-arm64"]["source"].startswith("packages: http")
    assert found["ubuntu-24.04-armhf"]["source"].startswith("https://cloud-images.ubuntu.com/")
    assert (found["local"]["kind"], found["local"]["source"]) == ("disk", (own / "local.qcow2").as_uri())


def test_rows_tell_what_is_in_the_cache(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_local_row(own, "local")
    spec = load_image("local")
    assert isinstance(spec, DiskSpec)
    cache = Path.cwd() / "cache"
    assert rows(capsys)["local"]["fetched_digest"] is None
    fetched = cloud.ensure(spec, cache, SilentReporter())
    row = rows(capsys)["local"]
    assert (row["digest"], row["fetched_digest"]) == (None, fetched.source_digest)
    assert row["fetched_bytes"] == fetched.size_bytes
    assert run(["images"]) == 0
    assert f"{fetched.source_digest[7:19]} (as fetched)" in capsys.readouterr().out
    image = make_image(spec, cache, fetched)
    row = rows(capsys)["local"]
    assert (row["digest"], row["size_bytes"]) == (image.digest, image.size_bytes)


def make_image(spec: DiskSpec, cache: Path, fetched: cloud.Fetched) -> GuestImage:
    """Make a guest image of a disk without having booted it."""
    (cache / "images").mkdir(exist_ok=True)
    with store.workspace(cache, spec.name) as folder:
        shutil.copyfile(fetched.path, folder / "disk.qcow2")
        return store.publish(spec, cache, folder, {})


def test_a_row_that_hides_a_shipped_one_is_noted(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_local_row(own, "ubuntu-24.04-arm64")
    row = rows(capsys)["ubuntu-24.04-arm64"]
    assert (row["origin"], len(row["hides"])) == (str(own / "ubuntu-24.04-arm64.toml"), 1)
    assert run(["images"]) == 0
    said = capsys.readouterr()
    assert f"ubuntu-24.04-arm64 is your own ({own / 'ubuntu-24.04-arm64.toml'}); it hides " in said.out + said.err


def test_a_wrong_row_of_ones_own_is_told_with_its_place(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "mine.toml").write_text('name = "mine"\nkind = "disk"\n')
    assert run(["images"]) != 0
    assert str(own / "mine.toml") in capsys.readouterr().err


def test_credentials_are_not_listed() -> None:
    assert stock._source_of(disk_spec("https://me:secret@example.org/disk.img")) == "https://example.org/disk.img"


# --- what is verified and pruned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["images", "--json", "verify"], ["images", "verify", "--json"]])
def test_disks_are_hashed_again(own: Path, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    write_local_row(own, "local")
    spec = load_image("local")
    assert isinstance(spec, DiskSpec)
    fetched = cloud.ensure(spec, Path.cwd() / "cache", SilentReporter())
    assert run(argv) == 0
    whole = {"name": "local, as fetched", "digest": fetched.sha256, "problem": ""}
    assert json.loads(capsys.readouterr().out) == [whole]
    fetched.path.chmod(0o644)
    with fetched.path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert run(argv) != 0
    assert json.loads(capsys.readouterr().out) == [{**whole, "problem": "the disk was changed"}]


def test_a_flag_of_the_group_that_a_command_has_not_is_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["images", "--snapshots", "verify"]) == 2
    assert "--snapshots" in capsys.readouterr().err


def test_pruning_frees_disks_and_says_how_much(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_local_row(own, "local")
    spec = load_image("local")
    assert isinstance(spec, DiskSpec)
    cache = Path.cwd() / "cache"
    fetched = cloud.ensure(spec, cache, SilentReporter())
    assert run(["prune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [], "a guest image is still to be made of it"
    make_image(spec, cache, fetched)
    assert run(["prune", "--json"]) == 0
    freed = json.loads(capsys.readouterr().out)
    assert [each["what"] for each in freed] == ["disk"]
    assert freed[0]["size_bytes"] > 300_000, "what is no hole in it"
    (own / "local.toml").unlink()
    assert run(["prune", "--json"]) == 0
    assert [each["what"] for each in json.loads(capsys.readouterr().out)] == ["guest image"]


def test_a_row_of_a_place_goes_when_its_disk_does(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = write_local_row(own, "local")
    home = Home(Path.cwd() / "cache", Path.cwd() / "state")
    (own / "local.toml").unlink()
    spec = find_row(str(disk), home.cache)
    assert isinstance(spec, DiskSpec)
    cloud.ensure(spec, home.cache, SilentReporter())
    assert run(["prune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    disk.unlink()
    assert spec.name in rows(capsys), "its name can still be used"
    assert run(["prune", "--json"]) == 0
    assert [each["what"] for each in json.loads(capsys.readouterr().out)] == ["disk"]
    assert spec.name not in rows(capsys)


@pytest.mark.parametrize("refresh", [True, False])
def test_fetch_can_be_told_to_take_the_newest(own: Path, monkeypatch: pytest.MonkeyPatch, refresh: bool) -> None:
    asked = []

    def fake(request: MachineRequest, *_: object, refresh: bool) -> GuestImage:
        asked.append((request.image, refresh))
        return GuestImage("n", "d", load_image("debian-13-arm64").arch, "virt", "c", None, 1)  # type: ignore[arg-type]

    monkeypatch.setattr(start, "fetch_image", fake)
    assert run(["images", "fetch", "--image", "./x.qcow2", *(["--refresh"] if refresh else [])]) == 0
    assert asked == [(str(Path.cwd() / "x.qcow2"), refresh)]


# --- who may say it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["./disk.qcow2", "/etc/shadow", "~/x.img", "https://example.org/a#sha256=00"])
def test_a_project_may_not_give_a_place(own: Path, capsys: pytest.CaptureFixture[str], image: str) -> None:
    (Path.cwd() / "vmbuild.toml").write_text(f'image = "{image}"\n')
    assert run(["config"]) == 2
    assert "must not set 'image'" in capsys.readouterr().err


def test_a_project_may_give_a_name(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (Path.cwd() / "vmbuild.toml").write_text('image = "ubuntu-24.04-arm64"\n')
    assert run(["config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"]["value"] == "ubuntu-24.04-arm64"
