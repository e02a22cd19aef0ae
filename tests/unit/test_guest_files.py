"""The files of images/guest that carry a promise, and its shell functions, which run on this host as well."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmbuild.guest.oci import BLOBS
from vmbuild.image.catalog import find_catalog, list_images
from vmbuild.model import SYSTEMS, ApplianceSpec

ROOT = Path(__file__).parents[2] / "images" / "guest" / "root"
PARTS = ROOT / "usr/share/vmbuild/parts"

DEAF = """
trap 'echo {name} >>{folder}/log' TERM
echo $$ >{folder}/{name}.pid
while :; do sleep 0.02; done
"""


def test_blobs_are_looked_for_where_containerd_keeps_them() -> None:
    config = tomllib.loads((ROOT / "etc/containerd/config.toml").read_text())
    assert f"{config['root']}/io.containerd.content.v1.content/blobs/sha256" == BLOBS


def test_dockerd_is_told_of_the_containerd_that_init_starts() -> None:
    address = json.loads((ROOT / "etc/docker/daemon.json").read_text())["containerd"]
    assert f"rm -f {address}\n" in (ROOT / "usr/lib/vmbuild/containerd").read_text()
    assert "::respawn:/usr/lib/vmbuild/containerd\n" in (ROOT / "etc/inittab").read_text()


def test_docker_is_asked_to_end_before_containerd_and_neither_is_waited_for_for_ever(tmp_path: Path) -> None:
    names = ["docker", "containerd"]
    script = PARTS.read_text().replace("/run/", f"{tmp_path}/") + "stop_docker 1"
    with ExitStack() as stack:
        for name in names:
            program = DEAF.format(name=name, folder=tmp_path)
            running = stack.enter_context(subprocess.Popen(["sh", "-c", program]))
            stack.callback(running.kill)
            while not (tmp_path / f"{name}.pid").is_file() or not (tmp_path / f"{name}.pid").read_text():
                time.sleep(0.01)
        subprocess.run(["sh", "-c", script], check=True, timeout=10)
        assert (tmp_path / "log").read_text().split() == names


DISK = ROOT.parent / "disk"
SCRIPTS = [
    *(
        path
        for path in (ROOT / "usr/lib/vmbuild").rglob("*")
        if path.is_file() and path.read_text().startswith("#!/bin/sh")
    ),
    *(DISK / "root/usr/lib/vmbuild").iterdir(),
    *(PARTS, DISK / "provision", DISK / "root/usr/share/vmbuild/own"),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True)


DOCKERS = ("docker.io", "docker-cli", "docker-buildx", "containerd")
"""What Debian 12 has from Debian 13."""


@pytest.mark.parametrize("system", SYSTEMS)
def test_docker_gets_into_a_disk_of_every_package_system(system: str) -> None:
    script = (DISK / "provision").read_text()
    assert f"\ninstall_{system}() {{\n" in script
    assert f"\nWANTED_{system}=" in script


SIGNED = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
ONE_LINE = "# deb http://old.example/debian bookworm main\ndeb http://disk.example/debian/ bookworm main\n"
OWN_MAIN = f"{SIGNED} http://disk.example/debian trixie main\n"
BOTH_OF_THE_HOST = f"{SIGNED} http://host.example/d trixie main\n{SIGNED} http://host.example/s trixie-security main\n"
OWN_BOTH = f"{OWN_MAIN}{SIGNED} https://disk.example/debian-security trixie-security main\n"
DEB822 = "URIs: http://disk.example/debian\n\nURIs: https://disk.example/debian-security/\n"


@pytest.mark.parametrize(
    ("release", "settings", "sources", "expected"),
    [
        ("ID=debian\nVERSION_CODENAME=bookworm", "", ONE_LINE, OWN_MAIN),
        ("ID=debian\nVERSION_CODENAME=bookworm", "", DEB822, OWN_BOTH),
        (
            "ID=debian\nVERSION_CODENAME=bookworm",
            "MIRROR=http://host.example/d\nSECURITY_MIRROR=http://host.example/s\n",
            DEB822,
            BOTH_OF_THE_HOST,
        ),
        ("ID=debian\nVERSION_CODENAME=trixie", "", ONE_LINE, None),
        ("ID=debian\n", "", ONE_LINE, None),
        ("ID=devuan\nVERSION_CODENAME=bookworm", "", ONE_LINE, None),
    ],
)
def test_docker_alone_is_taken_from_debian_13_where_debian_12s_will_not_do(
    tmp_path: Path, release: str, settings: str, sources: str, expected: str | None
) -> None:
    for folder in ("sources.list.d", "preferences.d", "mirrors"):
        (tmp_path / "etc/apt" / folder).mkdir(parents=True)
    (tmp_path / "etc/os-release").write_text(f"{release}\n")
    (tmp_path / "etc/apt/sources.list.d/debian.sources").write_text(sources)
    (tmp_path / "settings").write_text(f"SYSTEM=apt\n{settings}")
    functions, _, _ = (DISK / "provision").read_text().partition('\nif [ "$1" = clean ]')
    script = tmp_path / "provision"
    script.write_text(f"{functions.replace('/etc/', f'{tmp_path}/etc/')}\nuse_docker_of_trixie\n")
    env = {name: value for name, value in os.environ.items() if name not in ("MIRROR", "SECURITY_MIRROR")}
    subprocess.run(["sh", str(script)], check=True, env=env)
    written = tmp_path / "etc/apt/sources.list.d/vmbuild.list"
    assert (written.read_text() if written.exists() else None) == expected
    if expected:
        pins = (tmp_path / "etc/apt/preferences.d/vmbuild").read_text().split("\n\n")
        assert [dict(line.split(": ") for line in pin.splitlines()) for pin in pins] == [
            {"Package": "*", "Pin": "release n=trixie*", "Pin-Priority": "-1"},
            {"Package": " ".join(DOCKERS), "Pin": "release n=trixie*", "Pin-Priority": "990"},
        ]


def test_the_appliance_takes_the_same_packages_from_debian_13_as_the_disk() -> None:
    rows = [spec for spec in list_images([find_catalog()]) if spec.name in ("debian-12-arm64", "debian-12-armhf")]
    assert len(rows) == 2
    for row in rows:
        assert isinstance(row, ApplianceSpec)
        assert {one.suite: set(one.only) for one in row.repositories if one.only} == {
            "trixie": set(DOCKERS),
            "trixie-security": set(DOCKERS),
        }
        assert {one.suite for one in row.repositories if not one.only} == {
            "bookworm",
            "bookworm-updates",
            "bookworm-security",
        }


def test_a_disk_is_told_of_docker_what_the_appliance_is_but_for_containerd_and_the_firewall() -> None:
    """Where a distribution's own unit names containerd already, naming it twice keeps dockerd from starting.

    A distribution's firewall is its own affair; the appliance has the one rule that containers need.
    """
    appliance, disk = (json.loads((root / "etc/docker/daemon.json").read_text()) for root in (ROOT, DISK / "root"))
    assert appliance.pop("containerd")
    assert appliance.pop("iptables") is False and "-j MASQUERADE" in (ROOT / "usr/lib/vmbuild/boot").read_text()
    assert disk == appliance


def test_a_disk_restarts_the_ssh_server_that_it_has() -> None:
    own = (DISK / "root/usr/share/vmbuild/own").read_text().replace("/run/systemd/system", "/nonexistent")
    script = own.replace("rc-service", "rc_service") + 'rc_service() { echo "$@"; }; restart_sshd'
    assert subprocess.check_output(["sh", "-c", script]) == b"-q sshd restart\n"


WITH_SFDISK = ["sfdisk -q --no-reread --force -N 1 /dev/vda", "partx -u /dev/vda"]
WITH_GROWPART = ["growpart /dev/vda 1"]


@pytest.mark.parametrize(
    ("size", "there", "wanted"),
    [
        (2048 + 40_000 + 33, ("sfdisk", "growpart"), []),
        (100_000, ("sfdisk", "growpart"), WITH_SFDISK),
        (100_000, ("growpart",), WITH_GROWPART),
    ],
)
def test_a_partition_grows_when_there_is_room_behind_it(
    tmp_path: Path, size: int, there: tuple[str, ...], wanted: list[str]
) -> None:
    part = tmp_path / "devices" / "vda" / "vda1"
    part.mkdir(parents=True)
    for name, number in (("partition", 1), ("start", 2048), ("size", 40_000)):
        (part / name).write_text(f"{number}\n")
    (part.parent / "size").write_text(f"{size}\n")
    block = tmp_path / "class"
    block.mkdir()
    (block / "vda").symlink_to(part.parent)
    (block / "vda1").symlink_to(part)
    (tmp_path / "mounts").write_text("rootfs / rootfs rw 0 0\n/dev/vda1 / ext4 rw 0 0\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("partx", "resize2fs", *there):
        (tools / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >>"{tmp_path}/ran"\n')
        (tools / tool).chmod(0o755)
    script = (DISK / "root/usr/lib/vmbuild/grow").read_text()
    for tool in ("awk", "tail", "basename", "readlink", "cat"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    script = script.replace("PATH=/usr/sbin:/usr/bin:/sbin:/bin", f"PATH={tools}")
    script = script.replace("/proc/mounts", f"{tmp_path}/mounts")
    subprocess.run(["/bin/sh", "-c", script.replace("/sys/class/block", str(block))], check=True)
    ran = (tmp_path / "ran").read_text().splitlines()
    assert ran == [*wanted, "resize2fs /dev/vda1"]
