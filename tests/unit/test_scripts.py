"""The scripts, with fake programs on PATH: what they install, what they advise, and what they leave alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
REAL = ("bash", "env", "cat", "echo", "grep", "awk", "cksum", "dirname", "mkdir", "chmod", "cp")
"""What the scripts find of the real host."""


@dataclass
class Host:
    """A folder of programs, the only ones there are; each run of a fake one is a line of `log`."""

    folder: Path

    @property
    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def has(self, name: str, script: str = "") -> None:
        """Put a fake program on PATH that notes how it was called."""
        path = self.folder / "bin" / name
        path.unlink(missing_ok=True)
        path.write_text(f'#!{shutil.which("bash")}\necho "{name} $*" >>{self.folder}/log\n{script}\n')
        path.chmod(0o755)

    def run(self, script: Path, *args: str) -> subprocess.CompletedProcess[str]:
        """Run a script to its end."""
        env = {
            "PATH": str(self.folder / "bin"),
            "HOME": str(self.folder),
            "OS_RELEASE": str(self.folder / "os-release"),
            "LC_ALL": "C",
        }
        return subprocess.run(
            [str(script), *args], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    def install(self, *pairs: str) -> subprocess.CompletedProcess[str]:
        """Run scripts/packages."""
        return self.run(SCRIPTS / "packages", *pairs)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Return a Debian 13 host of an ordinary user with sudo, whose apt works and knows no backports."""
    made = Host(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in REAL:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")
    (tmp_path / "os-release").write_text("ID=debian\nVERSION_ID=13\n")
    made.has("id", "echo 1000")
    made.has("sudo", '[ "$1" = -n ] && exit; exec "$@"')
    made.has("apt-get")
    made.has("apt-cache", "echo 'release n=bookworm'")
    made.has("sleep")
    made.has("tee", f"cat >{tmp_path}/$(echo $1 | awk -F/ '{{ print $NF }}')")
    made.has("rm", f": >{tmp_path}/removed")
    return made


def no_sudo(host: Host) -> None:
    host.has("sudo", "exit 1")


def debian_12(host: Host, backports: str) -> None:
    """Make it a Debian 12; a shell condition says whether backports are known."""
    (host.folder / "os-release").write_text("ID=debian\nVERSION_ID=12\n")
    host.has("apt-cache", f"echo 'release n=bookworm'; if {backports}; then echo 'release n=bookworm-backports'; fi")


def apt_runs(host: Host) -> list[str]:
    return [line for line in host.log if line.startswith(("apt-get", "rm"))]


UPDATE = "apt-get -qq update"
INSTALL = "apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends"
QEMU = "no-qemu=qemu-system-arm"

# --- packages -------------------------------------------------------------------------------------------------------


def test_nothing_is_installed_where_nothing_is_missing(host: Host) -> None:
    host.has("there")
    done = host.install("there=it", "bash=bash")
    assert (done.returncode, done.stderr, host.log) == (0, "", [])


def test_without_root_and_sudo_exactly_what_is_missing_is_named(host: Host) -> None:
    no_sudo(host)
    host.has("there")
    done = host.install("there=it", "none=one", "gone=two")
    assert done.returncode == 3
    assert "    apt install one two\n" in done.stderr
    assert apt_runs(host) == []


def test_without_any_sudo_on_the_host_too(host: Host) -> None:
    (host.folder / "bin/sudo").unlink()
    assert host.install("none=one").returncode == 3


@pytest.mark.parametrize("root", [False, True])
def test_what_is_missing_is_installed(host: Host, root: bool) -> None:
    host.has("id", f"echo {0 if root else 1000}")
    host.has("apt-get", f'echo "$DEBIAN_FRONTEND" >>{host.folder}/frontends')
    host.has("sudo", '[ "$1" = -n ] && exit; exec env -i PATH="$PATH" "$@"')  # as env_reset does
    done = host.install("none=one", "gone=two")
    assert done.returncode == 0, done.stderr
    assert apt_runs(host) == [UPDATE, f"{INSTALL} one two"]
    assert (host.folder / "frontends").read_text() == "noninteractive\n" * 2
    assert any(line.startswith("sudo") for line in host.log) != root
    assert "one two" in done.stderr and done.stdout == ""


def test_lists_that_another_apt_holds_are_waited_for(host: Host) -> None:
    held = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 1 (apt-get)"
    tried = f'[ "$2" != update ] || [ "$(grep -c ^apt-get.*update {host.folder}/log)" -gt 2 ]'
    host.has("apt-get", f'{tried} || {{ echo "{held}" >&2; exit 100; }}')
    done = host.install("none=one")
    assert done.returncode == 0, done.stderr
    assert apt_runs(host) == [UPDATE] * 3 + [f"{INSTALL} one"]
    assert "Waiting" in done.stderr


def test_lists_that_cannot_be_read_end_it_at_once(host: Host) -> None:
    host.has("apt-get", "echo 'E: no network' >&2; exit 100")
    done = host.install("none=one")
    assert done.returncode != 0 and "E: no network" in done.stderr
    assert apt_runs(host) == [UPDATE]


def test_lists_that_stay_held_end_it(host: Host) -> None:
    host.has("apt-get", "echo 'E: Could not get lock' >&2; exit 100")
    assert host.install("none=one").returncode != 0
    assert len(apt_runs(host)) == 30


def test_debian_12_takes_qemu_from_backports(host: Host) -> None:
    listed = host.folder / "bookworm-backports.list"
    debian_12(host, f"[ -f {listed} ]")
    host.has("apt-get", "if [ $1 = indextargets ]; then echo http://m/debian; echo http://n/debian; fi")
    done = host.install(QEMU)
    assert done.returncode == 0, done.stderr
    assert listed.read_text() == "deb http://m/debian bookworm-backports main\n"
    assert apt_runs(host)[-2:] == [UPDATE, f"{INSTALL} -t bookworm-backports qemu-system-arm"]


def test_backports_that_are_known_are_not_added(host: Host) -> None:
    debian_12(host, "true")
    assert host.install(QEMU).returncode == 0
    assert apt_runs(host) == [UPDATE, f"{INSTALL} -t bookworm-backports qemu-system-arm"]
    assert not (host.folder / "bookworm-backports.list").exists()


def test_backports_are_for_qemu_alone(host: Host) -> None:
    debian_12(host, "false")
    assert host.install("none=one").returncode == 0
    assert apt_runs(host) == [UPDATE, f"{INSTALL} one"]


@pytest.mark.parametrize("code", [100, 0])  # 404, and a mirror that is only a warning to apt
def test_backports_that_cannot_be_had_are_taken_away_again(host: Host, code: int) -> None:
    listed = host.folder / "bookworm-backports.list"
    debian_12(host, "false")
    host.has("apt-get", f'if [ "$2" = update ] && [ -f {listed} ]; then exit {code}; fi')
    done = host.install(QEMU)
    assert done.returncode == 0, done.stderr
    assert "QEMU 7.2" in done.stderr
    removed = "rm -f /etc/apt/sources.list.d/bookworm-backports.list"
    assert apt_runs(host)[-3:] == [UPDATE, removed, f"{INSTALL} qemu-system-arm"]


def test_advice_on_debian_12_names_the_backports(host: Host) -> None:
    no_sudo(host)
    debian_12(host, "false")
    host.has("apt-get", "echo http://m/debian")
    done = host.install(QEMU, "none=one")
    assert done.returncode == 3
    assert "'deb http://m/debian bookworm-backports main' >/etc/apt/sources.list.d/" in done.stderr
    assert "    apt install -t bookworm-backports qemu-system-arm one\n" in done.stderr


ALL = ["no-qemu=qemu-system-arm", "no-img=qemu-utils", "no-sqfstar=squashfs-tools", "no-depmod=kmod"]


@pytest.mark.parametrize(
    ("manager", "installs"),
    [
        ("dnf", "dnf install -y qemu-system-aarch64-core qemu-system-arm-core qemu-img squashfs-tools kmod"),
        ("brew", "brew install qemu qemu squashfs"),
    ],
)
def test_other_package_managers_have_other_names(host: Host, manager: str, installs: str) -> None:
    (host.folder / "bin/apt-get").unlink()
    host.has(manager)
    assert host.install(*ALL).returncode == 0
    assert host.log[-1] == installs


@pytest.mark.parametrize(
    ("manager", "wanted"),
    [
        ("brew", "no-depmod=kmod"),
        ("brew", "no-cc=gcc-arm-linux-gnueabihf libc6-dev-armhf-cross"),
        ("dnf", "no-cc=gcc-arm-linux-gnueabihf libc6-dev-armhf-cross"),
    ],
)
def test_what_a_package_manager_does_not_have_is_passed_over(host: Host, manager: str, wanted: str) -> None:
    (host.folder / "bin/apt-get").unlink()
    host.has(manager)
    assert host.install(wanted).returncode == 0
    assert host.log == []


@pytest.mark.parametrize(
    ("release", "package"),
    [
        ("ID=debian\nVERSION_ID=12\n", "docker.io"),
        ("ID=debian\nVERSION_ID=13\n", "docker-cli"),
        ('ID=ubuntu\nVERSION_ID="24.04"\n', "docker.io"),
    ],
)
def test_dockers_client_is_where_the_distribution_has_it(host: Host, release: str, package: str) -> None:
    (host.folder / "os-release").write_text(release)
    host.has("apt-get")
    assert host.install("no-docker=docker-cli").returncode == 0
    assert host.log[-1].endswith(f" {package}")


def test_a_program_can_want_several_packages(host: Host) -> None:
    host.has("apt-get")
    assert host.install("no-cc=gcc-arm-linux-gnueabihf libc6-dev-armhf-cross").returncode == 0
    assert host.log[-1].endswith(" gcc-arm-linux-gnueabihf libc6-dev-armhf-cross")


def test_without_a_known_package_manager_all_are_named(host: Host) -> None:
    (host.folder / "bin/apt-get").unlink()
    done = host.install(*ALL)
    assert done.returncode == 3
    assert "qemu-system-arm qemu-utils squashfs-tools kmod" in done.stderr


# --- venv -----------------------------------------------------------------------------------------------------------

PYTHON = """
case $1 in
-c) exit ;;
--version) echo Python 3 ;;
-m) case $2 in
    venv) mkdir -p .venv/bin; cp $0 .venv/bin/python; : >.venv/stamp ;;
    pip) echo "#!$PWD/.venv/bin/python" >.venv/bin/vmbuild; chmod +x .venv/bin/vmbuild ;;
    esac ;;
esac
"""


@pytest.fixture
def clone(host: Host) -> Path:
    """Return a clone with the script and a pyproject.toml; the fake Python makes environments that work."""
    host.has("python3", PYTHON)
    folder = host.folder / "clone"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPTS / "venv", folder / "scripts")
    (folder / "pyproject.toml").write_text("[project]\n")
    return folder


def make_venv(host: Host, clone: Path, what: str) -> list[str]:
    """Run scripts/venv; return what it did."""
    before = len(host.log)
    done = host.run(clone / "scripts/venv", what)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("python3 -m ") for line in host.log[before:] if " -m " in line]


NEW = ["venv --clear .venv", "pip install --quiet --disable-pip-version-check -e ."]


def test_a_venv_is_made_once(host: Host, clone: Path) -> None:
    assert make_venv(host, clone, ".") == NEW
    assert make_venv(host, clone, ".") == []


def test_a_venv_with_more_serves_for_less_and_not_the_other_way(host: Host, clone: Path) -> None:
    make_venv(host, clone, ".")
    assert make_venv(host, clone, ".[dev]") == [f"{NEW[1]}[dev]"]
    assert make_venv(host, clone, ".") == []
    assert make_venv(host, clone, ".[dev]") == []


def test_a_venv_follows_pyproject(host: Host, clone: Path) -> None:
    make_venv(host, clone, ".")
    (clone / "pyproject.toml").write_text("[project]\nname='x'\n")
    assert make_venv(host, clone, ".") == NEW[1:]


def test_a_venv_that_does_not_work_is_made_anew(host: Host, clone: Path) -> None:
    make_venv(host, clone, ".")
    (clone / ".venv/bin/python").unlink()
    assert make_venv(host, clone, ".") == NEW
    assert make_venv(host, clone, ".") == []


def test_a_venv_of_another_clone_is_made_anew(host: Host, clone: Path) -> None:
    make_venv(host, clone, ".")
    copied = clone.with_name("copied")
    shutil.copytree(clone, copied)
    assert make_venv(host, copied, ".") == NEW


# --- quickstart -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inspect", "pull", "does"),
    [
        (0, 1, []),
        (1, 0, ["pull"]),
        (1, 1, ["pull", "base debian:trixie-slim"]),
        (1, 124, ["pull", "base debian:trixie-slim"]),
    ],
)
def test_the_guest_is_asked_whether_a_registry_answers(
    host: Host, tmp_path: Path, inspect: int, pull: int, does: list[str]
) -> None:
    clone = tmp_path / "clone"
    host.has("vmbuild", f"case $* in *inspect*) exit {inspect} ;; *pull*) exit {pull} ;; esac")
    host.has("nothing")
    (clone / "scripts").mkdir(parents=True)
    (clone / ".venv/bin").mkdir(parents=True)
    shutil.copy(SCRIPTS / "quickstart", clone / "scripts")
    (clone / ".venv/bin/vmbuild").symlink_to(tmp_path / "bin/vmbuild")
    for name in ("packages", "venv"):
        (clone / "scripts" / name).symlink_to(tmp_path / "bin/nothing")
    done = host.run(clone / "scripts/quickstart")
    assert done.returncode == 0, done.stderr
    pulled = "ssh -- timeout 90 docker pull -q debian:trixie-slim"
    expected = ["up", "ssh -- docker image inspect debian:trixie-slim"]
    expected += [pulled if step == "pull" else step for step in does]
    expected += ["build ./examples/hello -t hello:1 -o hello.tar"]
    assert [line.removeprefix("vmbuild ") for line in host.log if line.startswith("vmbuild")] == expected
    assert ("Pulling" in done.stderr) == ("pull" in does)
    assert "timeout" in (SCRIPTS.parent / "images/guest/applets").read_text().split()


# --- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["packages", "venv", "quickstart", "test"])
def test_scripts_need_no_more_than_bash_3_and_what_macos_has(name: str) -> None:
    text = (SCRIPTS / name).read_text()
    newer = r"declare -A|mapfile|readarray|coproc|&>>|\|&|\$\{\w+(,,|\^\^|@[A-Z])|sha256sum|readlink -f|\b\w+=\(\)"
    assert re.findall(newer, text) == []
    assert os.access(SCRIPTS / name, os.X_OK)
