"""A true 32-bit machine: it boots, builds for itself, and runs what user-mode emulation on a 64-bit host cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.conftest import BASE, EXAMPLES, Cli, leave_out_updates
from tests.machine.readdir32 import LIST_FRESH_FOLDER, compile_readdir32, fill_folder

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed"),
]

EMULATOR = "qemu-arm-static"
EOVERFLOW = "errno 75 (Value too large for defined data type)"


@pytest.fixture(scope="module")
def arm(cli: Cli) -> Iterator[Cli]:
    """The program, with a 32-bit machine up; it goes at the end, as its memory is wanted by others."""
    program = cli.named("arm")
    program.ok("up", "--arch", "arm")
    yield program
    program.ok("destroy", "--yes")


@pytest.fixture(scope="module")
def readdir32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_readdir32(tmp_path_factory.mktemp("readdir32"))


def scratch_context(folder: Path, program: Path) -> Path:
    """Return a build context of one program and nothing else: no base image is needed."""
    context = folder / "context"
    context.mkdir()
    shutil.copy(program, context / "readdir32")
    (context / "Dockerfile").write_text('FROM scratch\nCOPY readdir32 /readdir32\nRUN ["/readdir32", "/"]\n')
    return context


def test_the_guest_is_a_32_bit_one_and_its_docker_too(arm: Cli) -> None:
    assert arm.guest("uname -m").strip() == "armv7l"
    facts = arm.guest("docker info --format '{{.Architecture}} {{.Driver}} {{.CgroupVersion}} {{.NCPU}}'").split()
    assert facts[:3] == ["armv7l", "overlayfs", "2"]
    status = arm.ok("status", "--json").json()
    assert (status["image"], status["cpus"]) == ("debian-13-armhf", int(facts[3]))
    assert "zram" in arm.guest("cat /proc/swaps")
    assert abs(int(arm.guest("date +%s")) - int(subprocess.check_output(["date", "+%s"]))) <= 5


def test_a_machine_at_work_stays_what_it_is(arm: Cli) -> None:
    done = arm.run("up", "--arch", "arm64")
    assert done.code == 2
    assert "the machine arm is running" in done.err and "vmbuild down arm" in done.err


def test_what_it_builds_is_for_32_bits(arm: Cli, readdir32: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tar"
    arm.ok("build", str(scratch_context(tmp_path, readdir32)), "-t", "readdir32:1", "-o", str(out))
    config = json.loads(subprocess.check_output(["skopeo", "inspect", "--config", f"docker-archive:{out}"]))
    assert (config["os"], config["architecture"], config["variant"]) == ("linux", "arm", "v7")
    with tarfile.open(out) as archive:
        assert "manifest.json" in archive.getnames()
    folder = "/var/lib/vmbuild/many"  # on the machine's disk: ext4
    arm.guest(f"mkdir -p {folder} && touch {folder}/1 {folder}/2")
    said = arm.guest(f"docker run --rm -v {folder}:/many readdir32:1 /readdir32 /many")
    assert said == "/many: 4 entries, errno 0 (no error)\n"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_example_is_compiled_in_it(arm: Cli, tmp_path: Path) -> None:
    arm.ok("base", BASE)
    leave_out_updates(arm, tmp_path, ("linux/arm/v7",))
    arm.ok("build", str(EXAMPLES / "hello"), "-t", "hello:1", timeout_s=1500)
    assert arm.guest("docker run --rm hello:1") == "Hello from armv7l, a program of 32 bits\n"


def test_a_platform_that_it_cannot_run_is_refused_before_anything_is_sent(
    arm: Cli, readdir32: Path, tmp_path: Path
) -> None:
    context = scratch_context(tmp_path, readdir32)
    done = arm.run("build", str(context), "--platform", "linux/arm64")
    assert done.code == 2
    assert "does not build for linux/arm64" in done.err
    assert "Sending" not in done.err


def test_it_is_resized_and_suspended_as_any_other(arm: Cli) -> None:
    most = arm.ok("status", "--json").json()["cpus"]
    arm.ok("resize", "--memory", "1G")
    assert arm.ok("status", "--json").json()["memory_now_mib"] < 1100
    arm.ok("resize", "--memory", "2G", "--cpus", "1")
    assert arm.guest("nproc").strip() == "1"
    arm.ok("resize", "--cpus", str(most))
    arm.guest("echo kept >/run/kept")
    arm.ok("suspend")
    arm.ok("up")  # it stays of 32 bits without being asked to
    assert arm.guest("cat /run/kept; uname -m").split() == ["kept", "armv7l"]
    assert abs(int(arm.guest("date +%s")) - int(subprocess.check_output(["date", "+%s"]))) <= 5


# --- 32-bit file offsets --------------------------------------------------------------------------------------------


def test_32_bit_offsets_hold_in_the_32_bit_machine(arm: Cli, readdir32: Path) -> None:
    check_listing(arm, readdir32)


def test_32_bit_offsets_hold_for_32_bit_programs_in_the_64_bit_machine(machine: Cli, readdir32: Path) -> None:
    check_listing(machine, readdir32)


def check_listing(program: Cli, readdir32: Path) -> None:
    said = program.ok("ssh", "--", "sh", "-c", LIST_FRESH_FOLDER, stdin=readdir32.read_bytes()).out.decode()
    file_system, listing = said.splitlines()
    assert file_system == "ext4"
    assert listing.endswith("many: 8 entries, errno 0 (no error)")


def test_the_same_program_fails_under_user_mode_emulation(readdir32: Path, ext4_folder: Path) -> None:
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"{EMULATOR} is not installed")
    done = subprocess.run(
        [EMULATOR, str(readdir32), str(fill_folder(ext4_folder))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert EOVERFLOW in done.stdout


@pytest.fixture
def ext4_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on an ext4 of this host: the test's own, else one that is made and mounted, as root."""
    if file_system_type(tmp_path) == "ext2/ext3":
        yield tmp_path
        return
    image, mounted = tmp_path / "ext4.img", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("xb") as file:
        file.truncate(16 << 20)
    made = ["mke2fs", "-q", "-t", "ext4", str(image)]
    mount = ["mount", "-o", "loop", str(image), str(mounted)]
    if os.geteuid() != 0 or not all(run_quietly(argv) for argv in (made, mount)):
        pytest.skip("no ext4 here, and none can be mounted: that takes root and a loop device")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def file_system_type(path: Path) -> str:
    """Return what statfs(2) says, in coreutils' words: one for ext2, ext3 and ext4, which have the same number."""
    return subprocess.check_output(["stat", "-f", "-c", "%T", str(path)], text=True).strip()


def run_quietly(argv: list[str]) -> bool:
    return shutil.which(argv[0]) is not None and subprocess.run(argv, capture_output=True, check=False).returncode == 0
