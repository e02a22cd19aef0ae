"""A real machine that is suspended in the middle of a build, and goes on: here, or on what might be another host."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from tests.machine.conftest import BASE, Cli, Done, interrupt, wait_until
from tests.machine.toolchain import write_toolchain
from vmbuild import process

pytestmark = pytest.mark.machine

SUSPENDED = 75


@pytest.fixture(scope="module")
def sleeper(cli: Cli) -> Iterator[Cli]:
    """A machine of its own: what is done to it must not cost the others theirs."""
    program = cli.named("sleeper")
    program.ok("base", BASE)
    yield program
    program.run("destroy", "--yes")


@pytest.fixture
def awake(sleeper: Cli) -> Cli:
    """The same, up whatever a test before did to it."""
    sleeper.ok("up")
    return sleeper


def folder_of(program: Cli) -> Path:
    return program.state / "machines" / program.name


def state_of(program: Cli) -> str:
    return str(program.ok("status", "--json").json()["state"])


def elsewhere(program: Cli, place: Path) -> Cli:
    """Return the program as on another host: nothing of it but the cache of guest images."""
    place.mkdir()
    return Cli(program.cache, place, program.name)


def slow_build(context: Path, steps: int) -> None:
    """Write a context whose build says how far it is, each second."""
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text(
        f"FROM {BASE}\nRUN for i in $(seq {steps}); do echo step-$i >>/steps; echo at-$i; sleep 1; done\n"
    )


COMPILE = f"""
FROM {BASE} AS tools
ADD tools.tar /
FROM tools AS made
COPY large.c /
RUN --mount=type=tmpfs,target=/tmp echo compiling && begun=$(date +%s%3N) && gcc -O2 -o /large /large.c && \\
    echo took=$(($(date +%s%3N) - begun)) && /large && touch -d @0 /large
FROM {BASE}
COPY --from=made /large /
"""  # a folder of its own would have the time of the build


def test_a_compilation_goes_on_elsewhere_to_the_same_bytes(awake: Cli, tmp_path: Path) -> None:
    context, bundles = tmp_path / "context", tmp_path / "bundles"
    for folder in (context, bundles):
        folder.mkdir()
    write_toolchain(awake.cache, context / "tools.tar")
    (context / "Dockerfile").write_text(COMPILE)
    build = ("build", str(context), "--no-cache", "--build-arg", "SOURCE_DATE_EPOCH=0", "--progress", "plain")
    (context / "large.c").write_text(large_program(FEW))
    took = re.search(r"took=(\d+)\n", awake.ok(*build).err)
    assert took is not None
    (context / "large.c").write_text(large_program(round(FEW * COMPILING_S * 1000 / int(took[1]))))
    begun = time.monotonic()
    whole = awake.ok(*build, "-o", str(tmp_path / "whole.tar"), "--json").json()
    took_s = time.monotonic() - begun
    assert took_s > 60, "the compilation is to take more than a minute"

    running = awake.start(*build, "-o", "cut.tar", cwd=tmp_path)
    wait_until(lambda: "compiling" in log_of(awake), "it compiles", 120)
    time.sleep(took_s / 4)
    awake.ok("suspend", "--to", f"{bundles}/")
    _, err = running.communicate(timeout=60)
    assert running.returncode == SUSPENDED, err.decode()
    assert b"compiling" in err
    assert not (tmp_path / "cut.tar").exists()
    assert state_of(awake) == "suspended"

    other = elsewhere(awake, tmp_path / "other")
    (tmp_path / "there").mkdir()
    try:
        done = other.ok("resume", str(bundles), "--json", cwd=tmp_path / "there")
        assert "compiling" in done.err  # seen before the cut
        assert done.json()["image_id"] == whole["image_id"]
        assert (tmp_path / "there" / "cut.tar").read_bytes() == (tmp_path / "whole.tar").read_bytes()
        assert other.guest("ls /var/lib/vmbuild/work") == ""
        keys = [hashlib.sha256((folder_of(each) / "id_ed25519").read_bytes()).digest() for each in (awake, other)]
        assert keys[0] != keys[1]
    finally:
        other.ok("destroy", "--yes")


def test_a_time_limit_ends_in_a_bundle_before_it_comes(awake: Cli, tmp_path: Path) -> None:
    slow_build(tmp_path / "context", 500)
    bundle = tmp_path / "kept.vmbundle"
    begun = time.monotonic()
    limits = ("--time-limit", "60s", "--reserve", "40s", "--suspend-to", str(bundle))
    done = awake.run("build", str(tmp_path / "context"), "-t", "never:1", *limits)
    assert done.code == SUSPENDED, done.err
    assert time.monotonic() - begun < 60
    assert f"vmbuild resume {bundle}" in done.err
    assert bundle.stat().st_mode & 0o777 == 0o600
    # The next job has as little time: it takes over, and hands over again.
    other = elsewhere(awake, tmp_path / "other")
    try:
        again = other.run("resume", str(bundle), *limits[:-1], str(tmp_path / "next.vmbundle"))
        assert again.code == SUSPENDED, again.err
        assert (tmp_path / "next.vmbundle").exists()
    finally:
        other.ok("destroy", "--yes")
    awake.ok("down")


FEW = 20
COMPILING_S = 80
"""How long the compilation is to take, by what it takes for few functions: more than a minute, whatever the host."""


def large_program(functions: int) -> str:
    """Return a C program that has an emulated compiler work the longer the more functions it has."""
    bodies = [
        f"__attribute__((noinline)) static unsigned f{n}(unsigned x) {{\n  unsigned a[16], i, j;\n"
        f"  for (i = 0; i < 16; i++) a[i] = x * {n}u + i;\n"
        + "".join(
            f"  for (i = {k}; i < 16; i++) for (j = 0; j < i; j++) a[i] = (a[j] ^ (a[i] << {k + 1})) + {n + k}u;\n"
            for k in range(8)
        )
        + "  for (x = i = 0; i < 16; i++) x ^= a[i];\n  return x;\n}\n"
        for n in range(functions)
    ]
    calls = "".join(f"  x = f{n}(x);\n" for n in range(functions))
    main = f'int main(void) {{ unsigned x = 1;\n{calls}  return !printf("%u\\n", x); }}\n'
    return f"#include <stdio.h>\n{''.join(bodies)}{main}"


def test_up_goes_on_with_the_build_and_the_clock_is_right(awake: Cli, tmp_path: Path) -> None:
    slow_build(tmp_path / "context", 25)
    awake.guest("echo said before >/dev/console")
    awake.guest("date -s @$(($(date +%s) - 3600))")  # as late as after an hour's sleep
    running = awake.start("build", str(tmp_path / "context"), "-o", str(tmp_path / "out.tar"), "--progress", "plain")
    wait_until(lambda: "at-" in log_of(awake), "the step runs", 120)
    saved = awake.ok("suspend", "--json").json()
    assert saved["size_bytes"] > 0
    _, err = running.communicate(timeout=60)
    assert running.returncode == SUSPENDED, err.decode()
    assert b"vmbuild up" in err
    assert state_of(awake) == "suspended"
    assert awake.ok("status", "--json").json()["pid"] is None
    assert awake.ok("suspend", "--json").json() == saved  # twice is harmless
    assert awake.run("up", "--cpus", "1").code == 2
    assert awake.run("ssh", "--", "true").code == SUSPENDED
    begun = time.time()
    awake.ok("up")
    assert "Restoring" not in awake.ok("up").err
    assert b"said before" in awake.ok("logs").out
    assert begun - 2 <= int(awake.guest("date +%s")) <= time.time() + 2
    done = awake.ok("attach")
    assert "at-1\n" in done.err
    assert "at-25\n" in done.err
    assert (tmp_path / "out.tar").exists()
    assert awake.run("attach").code == 2


def log_of(program: Cli) -> str:
    return program.guest("cat /var/lib/vmbuild/work/*/log 2>/dev/null || true")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP], ids=["killed", "hung up"])
def test_a_build_outlives_its_command(awake: Cli, tmp_path: Path, number: signal.Signals) -> None:
    slow_build(tmp_path / "context", 8)
    argv = ("build", str(tmp_path / "context"), "--no-cache", "-o", str(tmp_path / "out.tar"), "--progress", "plain")
    running = awake.start(*argv)
    wait_until(lambda: "at-2" in log_of(awake), "the step runs", 120)
    interrupt(running, number)
    done = awake.ok("attach", "--json")
    assert re.findall(r"at-(\d)\n", done.err) == list("12345678")
    assert done.json()["output_bytes"] == (tmp_path / "out.tar").stat().st_size
    assert awake.guest("ls /var/lib/vmbuild/work") == ""


def test_a_lost_connection_does_not_end_a_build(awake: Cli, tmp_path: Path) -> None:
    slow_build(tmp_path / "context", 12)
    running = awake.start("build", str(tmp_path / "context"), "--no-cache", "--progress", "plain")
    wait_until(lambda: "at-2" in log_of(awake), "the step runs", 120)
    awake.run("ssh", "--", "sh", "-c", "killall dropbear")
    _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err.decode()
    assert b"connecting again" in err
    assert re.findall(rb"at-(\d+)\n", err) == [b"%d" % number for number in range(1, 13)]


def test_a_build_that_stands_still_is_ended_with_what_its_guest_does(awake: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {BASE}\nRUN echo begun && sleep 4321\n")
    done = awake.run("build", str(tmp_path), "--stall-timeout", "20s", "--progress", "plain")
    assert done.code == 7
    assert "sleep 4321" in done.err.partition("error:")[2]
    assert awake.guest("ps -o args | grep '[s]leep 4321' || true") == ""


def test_out_of_memory_it_is_built_again_with_more(awake: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM {BASE}\nRUN perl -e 'push @x, \"x\" x (1 << 20) for 1 .. 1000' && echo enough >/word\n"
    )
    awake.guest("swapoff /dev/zram0")
    awake.ok("resize", "--memory", "600M")
    done = awake.ok("build", str(tmp_path), "--oom-retry", "--progress", "plain")
    assert "building again with 2.0 GiB" in done.err


@pytest.fixture(scope="module")
def bundle(sleeper: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the machine, with no build in it."""
    sleeper.ok("up")
    place = tmp_path_factory.mktemp("bundle") / "one.vmbundle"
    sleeper.ok("suspend", "--to", str(place))
    return place


def test_a_bundle_with_a_flipped_byte_is_refused(sleeper: Cli, bundle: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.vmbundle"
    shutil.copyfile(bundle, damaged)
    with damaged.open("r+b") as file:
        file.seek(bundle.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    other = elsewhere(sleeper, tmp_path / "other")
    done = other.run("resume", str(damaged))
    assert done.code == 5
    assert "damaged" in done.err
    assert other.ok("list", "--json").json() == []
    assert not [path for path in (tmp_path / "other").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_bundle_has_no_keys(sleeper: Cli, bundle: Path, tmp_path: Path) -> None:
    names = subprocess.run(f"zstd -dc {bundle} | tar -t", shell=True, capture_output=True, check=True).stdout.decode()  # noqa: S602
    assert {name.partition("/")[0] for name in names.split()} == {"bundle.json", "memory", "disk"}
    plain = subprocess.run(["zstd", "-dc", str(bundle)], capture_output=True, check=True).stdout
    assert not (folder_of(sleeper) / "ssh_host_ed25519_key").exists()  # what the guest's memory has opens nothing now
    sleeper.ok("up")
    for name in ("id_ed25519", "ssh_host_ed25519_key"):
        written = (folder_of(sleeper) / name).read_bytes()
        key = load_ssh_private_key(written, password=None)
        assert isinstance(key, Ed25519PrivateKey)
        assert key.private_bytes_raw() not in plain
        # The first lines of such a file are the same for all keys, and a line may be broken anywhere on its way.
        assert b"".join(written.splitlines()[-3:-1])[:60] not in plain.replace(b"\n", b"")


def kill_when(program: Cli, args: tuple[str, ...], is_time: Callable[[], bool]) -> bool:
    """Start the program and kill it when it is time; tell whether that came before its end."""
    running = program.start(*args)
    while not is_time() and running.poll() is None:
        time.sleep(0.005)
    was_in_time = running.poll() is None
    running.send_signal(signal.SIGKILL)
    running.communicate()
    return was_in_time


def test_killed_while_it_saves_the_machine_goes_on(awake: Cli) -> None:
    awake.guest("echo here >/run/here")
    memory = folder_of(awake) / "memory"
    assert kill_when(awake, ("suspend",), lambda: memory.exists() and memory.stat().st_blocks > 0)
    assert not (folder_of(awake) / "suspended.json").exists()
    awake.ok("up")
    assert awake.guest("cat /run/here") == "here\n"
    wait_until(lambda: not memory.exists(), "the half memory is gone", 30)
    time.sleep(3)
    assert awake.guest("cat /run/here") == "here\n"  # no saving that went on has stopped it


def test_killed_while_it_packs_the_older_bundle_and_the_machine_stay(awake: Cli, bundle: Path, tmp_path: Path) -> None:
    awake.guest("echo packed >/run/here")
    place = tmp_path / "again.vmbundle"
    shutil.copyfile(bundle, place)
    before = hashlib.sha256(place.read_bytes()).digest()
    assert kill_when(awake, ("suspend", "--to", str(place)), lambda: any(tmp_path.glob(".*.part")))
    assert hashlib.sha256(place.read_bytes()).digest() == before
    assert state_of(awake) == "suspended"
    awake.ok("up")
    assert awake.guest("cat /run/here") == "packed\n"


@pytest.mark.parametrize("victim", ["vmbuild", "qemu"])
def test_killed_while_it_is_restored_it_is_restored_again(awake: Cli, victim: str) -> None:
    awake.guest(f"echo {victim} >/run/here")
    awake.ok("suspend")
    pid = folder_of(awake) / "qemu.pid"
    running = awake.start("up")
    wait_until(pid.exists, "QEMU runs", 30)
    if victim == "vmbuild":
        running.send_signal(signal.SIGKILL)
    else:
        process.stop(int(pid.read_text()), grace_s=0)
    running.communicate()
    awake.ok("up")
    assert awake.guest("cat /run/here") == f"{victim}\n"


def test_a_memory_that_was_changed_is_refused_and_down_gives_it_up(awake: Cli) -> None:
    awake.guest("echo kept >/disk/kept; sync")
    awake.ok("suspend")
    memory = folder_of(awake) / "memory"
    with memory.open("r+b") as file:
        file.seek(memory.stat().st_size - 4096)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    done = awake.run("up")
    assert done.code == 5
    assert "vmbuild down" in done.err
    assert state_of(awake) == "suspended"  # it is not booted instead
    awake.ok("down")
    assert not memory.exists()
    awake.ok("up")
    assert awake.guest("cat /disk/kept") == "kept\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_full_disk_costs_the_saving_and_nothing_else(cli: Cli, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(small)], check=True)
    program = Cli(cli.cache, small, "small")
    try:
        program.ok("up")
        program.guest("echo here >/run/here")
        done = program.run("suspend")
        assert done.code == 3, done.err
        assert program.guest("cat /run/here") == "here\n"
        assert not (folder_of(program) / "memory").exists()
    finally:
        program.run("destroy", "--yes")
        subprocess.run(["umount", str(small)], check=True)


def test_the_bundle_of_this_very_machine_goes_on_here(sleeper: Cli, tmp_path: Path) -> None:
    sleeper.ok("up")
    sleeper.guest("echo here >/run/here")
    sleeper.ok("suspend", "--to", f"{tmp_path}/")
    assert list(tmp_path.iterdir()) == [tmp_path / "sleeper.vmbundle"]
    assert "Unpacking" not in sleeper.ok("resume", str(tmp_path)).err
    assert sleeper.guest("cat /run/here") == "here\n"
    done: Done = sleeper.run("resume", str(tmp_path))
    assert done.code == 2
    assert "already" in done.err
    assert json.loads(sleeper.ok("status", "--json").out)["state"] == "running"
