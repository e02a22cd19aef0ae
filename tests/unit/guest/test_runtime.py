"""What the guest's wrapper of runc sees in a container, and what it loads into the kernel, run here on this perl."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[3] / "images/guest/root/usr/lib/vmbuild"
V6, V7 = 0x01000000, 0x02000000
ARM, AARCH64 = 40, 183
pytestmark = pytest.mark.skipif(shutil.which("perl") is None, reason="needs perl, as the guest has it")

# As dockerd 26.1 and its BuildKit write them, without what comes after the root.
DOCKER_RUN = (
    r'{"ociVersion":"1.2.0","process":{"user":{"uid":0,"gid":0,"additionalGids":[0]},"args":[ARGS],"env":["PATH=/usr/'
    r'local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin","HOSTNAME=367b2df57e93"],"cwd":"/","capabilities":{},'
    r'"oomScoreAdj":0},"root":{"path":"ROOT"}}'
)
BUILDKIT = (
    r'{"ociVersion":"1.2.0","process":{"user":{"uid":0,"gid":0,"additionalGids":[0]},"args":[ARGS],"env":["PATH=/usr/'
    r'local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],"cwd":"/","capabilities":{}},"root":{"path":"ROOT"},'
    r'"hostname":"buildkitsandbox"}'
)


def perl(program: str, code: str, *arguments: str) -> str:
    """Return what a piece of perl prints that has a program's functions; a warning fails."""
    script = f'$SIG{{__WARN__}} = sub {{ die @_ }}; require "{PROGRAMS / program}"; {code}'
    done = subprocess.run(["perl", "-e", script, "--", *arguments], capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def choose(*argv: str) -> int:
    return int(perl("runtime", "print main::choose_mark(@ARGV)", *argv))


def elf(machine: int = ARM, cpu: int | None = None, *, bits: int = 32) -> bytes:
    """Return the start of a program; `cpu` is the Tag_CPU_arch of its attributes."""
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    tags = b"\x05ARM\x00\x06" + bytes([cpu or 0]) + b"\x08\x01\x09\x02"
    sub = b"\x01" + struct.pack("<I", 5 + len(tags)) + tags
    attributes = b"A" + struct.pack("<I", 10 + len(sub)) + b"aeabi\0" + sub
    rows = [bytes(40), struct.pack("<10I", 1, 0x70000003, 0, 0, 52, len(attributes), 0, 0, 1, 0)]
    rows = rows if cpu is not None else rows[:1]
    head = struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, 0, 0, 52 + len(attributes), 0, 52, 0, 0, 40, len(rows), 0)
    return ident + head + attributes + b"".join(rows)


def make_tree(tmp_path: Path, content: bytes) -> Path:
    """Make a merged root tree whose shell is a link to a program, absolute as some distributions have it."""
    (tmp_path / "root/usr/bin").mkdir(parents=True)
    (tmp_path / "root/bin").symlink_to("usr/bin")
    (tmp_path / "root/usr/bin/sh").symlink_to("/bin/dash")
    (tmp_path / "root/usr/bin/dash").write_bytes(content)
    return tmp_path / "root"


def write_config(
    tmp_path: Path, root: Path | str, args: str = '"/bin/sh","-c","uname -m"', form: str = BUILDKIT
) -> str:
    (tmp_path / "config.json").write_text(form.replace("ARGS", args).replace("ROOT", str(root)))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("content", "mark"),
    [
        (elf(cpu=4), V6),  # Debian's armel
        (elf(cpu=7), V6),  # Raspberry Pi OS of the first boards
        (elf(cpu=9), V6),
        (elf(cpu=10), V7),
        (elf(cpu=14), V7),
        (elf(cpu=None), V7),
        (elf(cpu=6)[:60], V7),  # cut off
        (elf(AARCH64, bits=64), 0),
        (elf(3), 0),
        (b"#!/bin/sh\n", 0),
    ],
)
def test_a_container_is_marked_by_the_cpu_of_its_programs(tmp_path: Path, content: bytes, mark: int) -> None:
    bundle = write_config(tmp_path, make_tree(tmp_path, content))
    assert choose("--log", "l.json", "--log-format", "json", "run", "--bundle", bundle, "--keep", "x") == mark


@pytest.mark.parametrize("form", [BUILDKIT, DOCKER_RUN])
def test_a_program_is_looked_for_on_the_path_of_its_container(tmp_path: Path, form: str) -> None:
    root = make_tree(tmp_path, elf(cpu=10))
    (root / "usr/local/bin").mkdir(parents=True)
    (root / "usr/local/bin/true").write_bytes(elf(cpu=6))
    bundle = write_config(tmp_path, root, '"true"', form)
    argv = ["--root", "/run/moby", "create", "--bundle", bundle, "--pid-file", f"{bundle}/init.pid", "367b"]
    assert choose(*argv) == V6


def test_a_script_is_of_the_system_of_its_shell(tmp_path: Path) -> None:
    root = make_tree(tmp_path, elf(cpu=4))
    (root / "usr/bin/run").write_text("#!/bin/sh\n")
    assert choose("run", "--bundle", write_config(tmp_path, root, '"/usr/bin/run"'), "x") == V6


def test_what_a_program_is_told_is_not_taken_for_the_configuration(tmp_path: Path) -> None:
    root = make_tree(tmp_path, elf(cpu=4))
    args = r'"/bin/sh","-c","echo \"root\":{\"path\":\"/nowhere\"} \"args\":[\"x\"] \u003e\u003e \"PATH=/none\""'
    assert choose("run", "--bundle", write_config(tmp_path, root, args), "x") == V6


def test_a_path_is_read_as_json_has_it(tmp_path: Path) -> None:
    made = make_tree(tmp_path, elf(cpu=4))
    made.rename(tmp_path / 'a "quoted" <é>')
    bundle = write_config(tmp_path, rf"{tmp_path}/a \"quoted\" \u003c\u00e9\u003e")
    assert choose("run", "--bundle", bundle, "x") == V6


@pytest.mark.parametrize("target", ["{outside}", "../../../../../../..{outside}", "/usr/bin/sh", "/proc/self/exe"])
def test_links_do_not_lead_out_of_the_tree(tmp_path: Path, target: str) -> None:
    root = make_tree(tmp_path, b"")
    (tmp_path / "outside").write_bytes(elf(cpu=4))
    (root / "usr/bin/sh").unlink()
    (root / "usr/bin/sh").symlink_to(target.format(outside=tmp_path / "outside"))
    assert choose("run", "--bundle", write_config(tmp_path, root), "x") == 0


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    root = make_tree(tmp_path, b"")
    (root / "usr/bin/dash").unlink()
    os.mkfifo(root / "usr/bin/dash")
    assert choose("run", "--bundle", write_config(tmp_path, root), "x") == 0


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("state.json", '{"id":"aa","init_process_pid":PID,"init_process_start":1}'),
        ("status", '{\n    "pid": PID,\n    "process-start-time": 12,\n    "cgroup-path": "aa"\n}'),
    ],
    ids=["runc", "crun"],
)
def test_what_comes_into_a_container_later_has_its_mark(tmp_path: Path, name: str, state: str) -> None:
    code = f"import ctypes; ctypes.CDLL(None).personality({V7 | 8}); print(flush=True); input()"
    folder = tmp_path / "aa"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as inside:
        assert inside.stdin is not None
        assert inside.stdout is not None
        inside.stdout.readline()
        (folder / name).write_text(state.replace("PID", str(inside.pid)))
        argv = ["--root", str(tmp_path), "exec", "--process", "/tmp/p", "--detach", "--pid-file", "/tmp/q", "aa"]
        assert choose(*argv) == V7
        inside.stdin.close()


@pytest.mark.parametrize(
    ("argv", "way"),
    [
        (["--root", "/r", "create", "--bundle", "/b", "x"], "runtime"),
        (["run", "x"], "runtime"),
        (["--log", "/l", "exec", "x", "a  b"], "runtime"),
        (["--version"], "crun"),
        (["--root", "/r", "start", "x"], "crun"),
        (["delete", "--force", "x"], "crun"),
    ],
)
def test_only_what_starts_a_program_goes_by_way_of_the_wrapper(tmp_path: Path, argv: list[str], way: str) -> None:
    script = (PROGRAMS / "bin/runc").read_text()
    for name in ("/usr/lib/vmbuild/runtime", "/usr/sbin/runc", "/usr/bin/crun"):
        fake = tmp_path / Path(name).name
        fake.write_text('#!/bin/sh\necho "${0##*/}"\nprintf "%s\\n" "$@"\n')
        fake.chmod(0o755)
        script = script.replace(name, str(fake))
    for expected in (way, way.replace("crun", "runc")):  # the second where there is no crun
        done = subprocess.run(["sh", "-c", script, "runc", *argv], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [expected, *argv]
        (tmp_path / "crun").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["dockerd", "containerd"])
def test_the_daemons_take_the_wrapper_for_runc(name: str) -> None:
    assert "\nexport PATH=/usr/lib/vmbuild/bin:$PATH" in (PROGRAMS / name).read_text()


def test_marks_are_the_same_on_both_sides() -> None:
    line = "my ($LINUX32, $IS_V6, $IS_V7) = (0x0008, 0x01000000, 0x02000000);"
    assert all(line in (PROGRAMS / name).read_text() for name in ("runtime", "machine-name"))
    assert "mount -t bpf bpf /sys/fs/bpf\n" in (PROGRAMS / "boot").read_text()


def test_jumps_of_the_kernel_program_land_where_they_should() -> None:
    code = bytes.fromhex(perl("machine-name", 'print unpack("H*", main::assemble(1234))'))
    rows = [struct.unpack("<BBhi", code[at : at + 8]) for at in range(0, len(code), 8)]
    (equal,) = (number for number, row in enumerate(rows) if row[0] == 0x15)
    (other,) = (number for number, row in enumerate(rows) if row[0] == 0x55)
    assert rows[2] == (0x61, 0x61, 1234, 0)
    assert rows[equal + 1 + rows[equal][2]][0] == 0x7B  # armv7l is there already
    assert rows[other + 1 + rows[other][2] :] == [(0xB7, 0, 0, 0), (0x95, 0, 0, 0)]


def test_a_members_place_is_read_from_the_types_of_the_kernel() -> None:
    strings = b"\0task_struct\0state\0personality\0other\0"
    names = {name: strings.index(b"\0" + name + b"\0") + 1 for name in (b"task_struct", b"state", b"personality")}
    forward = struct.pack("<3I", names[b"task_struct"], 7 << 24, 0)
    members = struct.pack("<6I", names[b"state"], 1, 0, names[b"personality"], 1, 1696 * 8)
    types = forward + struct.pack("<3I", names[b"task_struct"], 4 << 24 | 2, 4096) + members
    head = struct.pack("<HBB5I", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    code = 'print main::member_offset(pack("H*", $ARGV[0]), "task_struct", "personality")'
    assert perl("machine-name", code, (head + types + strings).hex()) == "1696"
