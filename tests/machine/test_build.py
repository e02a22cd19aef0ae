"""Real builds on a real machine: what comes out, and what happens when they fail."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import tarfile
from pathlib import Path

import pexpect
import pytest

from tests.machine.conftest import BASE, Cli, interrupt, on_terminal, wait_until

pytestmark = pytest.mark.machine


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    folder.mkdir()
    return folder


def write(folder: Path, dockerfile: str) -> None:
    (folder / "Dockerfile").write_text(f"FROM {BASE}\n{dockerfile}")


def layer_files(archive: Path) -> dict[str, bytes]:
    """Return the regular files of an archive's last layer."""
    with tarfile.open(archive) as outer:
        manifest = json.load(outer.extractfile("manifest.json") or io.BytesIO())
        layer = outer.extractfile(manifest[0]["Layers"][-1])
        assert layer is not None
        with tarfile.open(fileobj=io.BytesIO(layer.read())) as inner:
            return {m.name: (inner.extractfile(m) or io.BytesIO()).read() for m in inner if m.isreg()}


def test_the_archive_is_what_skopeo_accepts(based: Cli, context: Path, tmp_path: Path) -> None:
    write(context, "COPY a.txt /a.txt\nRUN tr a-z A-Z </a.txt >/b.txt\nLABEL who=vmbuild\n")
    (context / "a.txt").write_text("hello\n")
    out, iid, meta = tmp_path / "out.tar", tmp_path / "iid", tmp_path / "meta.json"
    done = based.ok(
        *("build", str(context), "-t", "first:1", "-t", "first:2", "-o", str(out), "--label", "more=1"),
        *("--iidfile", str(iid), "--metadata-file", str(meta)),
    )
    assert "tr a-z A-Z" in done.err
    facts = json.loads(subprocess.check_output(["skopeo", "inspect", f"docker-archive:{out}"]))
    config = json.loads(subprocess.check_output(["skopeo", "inspect", "--config", f"docker-archive:{out}"]))
    assert (facts["Os"], facts["Architecture"]) == ("linux", "arm64")
    assert facts["Labels"] == {"who": "vmbuild", "more": "1"}
    assert len(config["rootfs"]["diff_ids"]) == 3
    assert layer_files(out)["b.txt"] == b"HELLO\n"
    # Podman loads with the same library, which compares every layer with the digest in the config.
    copy = ["skopeo", "copy", "--quiet", "--insecure-policy", f"docker-archive:{out}", f"oci:{tmp_path}/copy"]
    subprocess.run(copy, check=True)
    with tarfile.open(out) as archive:
        manifest = json.load(archive.extractfile("manifest.json") or io.BytesIO())
        assert manifest[0]["RepoTags"] == ["first:1", "first:2"]
        for member in archive:
            if member.name.startswith("blobs/sha256/"):
                data = (archive.extractfile(member) or io.BytesIO()).read()
                assert hashlib.sha256(data).hexdigest() == member.name.rpartition("/")[2]
    assert iid.read_text() == json.loads(meta.read_text())["containerimage.digest"]
    assert based.guest("docker run --rm first:1 cat /b.txt") == "HELLO\n"


def test_a_failing_step_is_told_with_its_exit_code(based: Cli, context: Path, tmp_path: Path) -> None:
    write(context, "RUN echo before && exit 23\n")
    out = tmp_path / "none.tar"
    done = based.run("build", str(context), "-o", str(out))
    assert done.code == 7
    assert "exit code 23" in done.err
    assert "Dockerfile:2" in done.err
    assert list(tmp_path.iterdir()) == [context]


def test_ctrl_c_ends_the_step_and_leaves_the_machine_well(based: Cli, context: Path) -> None:
    write(context, "RUN echo step-has-begun && sleep 987\n")
    running = based.start("build", str(context), "--progress", "plain")
    wait_until(lambda: "987" in based.guest("ps -o args | grep '[s]leep 987' || true"), "the step runs", 120)
    done = interrupt(running)
    assert done.code == 130
    wait_until(lambda: based.guest("ps -o args | grep '[s]leep 987' || true") == "", "the step is gone", 60)
    assert based.guest("ls /var/lib/vmbuild/work").strip() == ""
    write(context, "RUN true\n")
    based.ok("build", str(context))


def test_a_missing_dockerfile_costs_no_machine(cli: Cli, tmp_path: Path) -> None:
    other = cli.named("never")
    done = other.run("build", str(tmp_path))
    assert done.code == 2
    assert "Dockerfile" in done.err
    assert not (cli.state / "machines" / "never" / "disk.qcow2").exists()


def test_dockerignore_is_honoured_on_the_host(based: Cli, context: Path) -> None:
    write(context, "COPY . /c\nRUN ls -R /c >/list\n")
    (context / ".dockerignore").write_text("secret*\n*.big\n!keep.big\n")
    (context / "secret").write_text("s")
    (context / "a.big").write_bytes(os.urandom(1_000_000))
    (context / "keep.big").write_text("k")
    os.mkfifo(context / "secret-pipe")  # opening it would block for ever
    done = based.ok("build", str(context), "-t", "ignored:1", "--json")
    assert done.json()["context_bytes"] < 20_000
    listing = based.guest("docker run --rm ignored:1 cat /list")
    assert "keep.big" in listing
    assert "secret" not in listing
    assert "a.big" not in listing


def test_dockerfile_and_tar_on_standard_input(based: Cli) -> None:
    done = based.ok("build", "-q", "-t", "stdin:1", "-", stdin=f"FROM {BASE}\nRUN echo one >/one\n".encode())
    assert done.out.startswith(b"sha256:")
    assert len(done.out.split()) == 1
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("Dockerfile", f"FROM {BASE}\nCOPY two /two\n".encode()), ("two", b"2")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    based.ok("build", "-q", "-t", "stdin:2", "-", stdin=buffer.getvalue())
    assert based.guest("docker run --rm stdin:1 cat /one; docker run --rm stdin:2 cat /two") == "one\n2"


def test_arguments_targets_and_a_dockerfile_elsewhere(based: Cli, context: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "Other.Dockerfile"
    elsewhere.write_text(
        f"FROM {BASE} AS one\nARG WHO=nobody\nRUN echo $WHO >/who\nFROM one AS two\nRUN echo two >>/who\n"
    )
    based.ok("build", "-f", str(elsewhere), "--build-arg", "WHO=me", "--target", "one", "-t", "args:1", str(context))
    assert based.guest("docker run --rm args:1 cat /who") == "me\n"


def test_the_archive_on_standard_output(based: Cli, context: Path, tmp_path: Path) -> None:
    write(context, "RUN echo out >/out\n")
    out = tmp_path / "out.tar"
    out.write_bytes(based.ok("build", str(context), "-t", "out:1", "-o", "-").out)
    assert layer_files(out)["out"] == b"out\n"


def test_twenty_thousand_small_files(based: Cli, context: Path) -> None:
    # Mounted, not copied: BuildKit, emulated, takes milliseconds a file for each time that it touches it.
    write(context, "RUN --mount=type=bind,target=/c find /c -type f | wc -l >/count\n")
    for folder in range(100):
        (context / f"d{folder}").mkdir()
        for number in range(200):
            (context / f"d{folder}" / f"f{number}").write_text(f"{folder} {number}\n")
    based.ok("build", str(context), "-t", "many:1")
    assert based.guest("docker run --rm many:1 cat /count").strip() == "20001"


def test_a_file_of_300_mb(based: Cli, context: Path) -> None:
    write(context, "RUN --mount=type=bind,target=/c sha256sum /c/big >/sum\n")
    digest = hashlib.sha256()
    with (context / "big").open("wb") as big:
        for _ in range(300):
            block = os.urandom(1024 * 1024)
            digest.update(block)
            big.write(block)
    based.ok("build", str(context), "-t", "big:1")
    assert based.guest("docker run --rm big:1 cat /sum").split()[0] == digest.hexdigest()
    # The guest keeps what it was sent; so does BuildKit, which knows the folder again.
    (context / "small").write_text("new")
    done = based.ok("build", str(context), "-t", "big:2", "--no-cache", "--json")
    assert done.json()["context_bytes"] < 100_000
    assert re.search(r"transferring context: [0-9.]+k?B .*done", done.err), "it took over megabytes"
    assert based.guest("docker run --rm big:2 cat /sum").split()[0] == digest.hexdigest()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_full_disk_costs_the_archive_and_nothing_else(based: Cli, context: Path, tmp_path: Path) -> None:
    write(context, "RUN echo full >/full\n")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    try:
        done = based.run("build", str(context), "-t", "full:1", "-o", str(small / "out.tar"))
        assert done.code == 3, done.err
        assert "No space left" in done.err
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
    based.ok("build", str(context), "-t", "full:1", "-o", str(tmp_path / "out.tar"))


def test_a_git_repository_as_context(based: Cli, context: Path, tmp_path: Path) -> None:
    write(context, "COPY who /who\n")
    (context / "who").write_text("git\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C", str(context)]
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(context), str(tmp_path / "repo.git")], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = ["git", "daemon", "--export-all", "--listen=127.0.0.1", f"--port={port}", f"--base-path={tmp_path}"]
    daemon = subprocess.Popen([*serve, "--reuseaddr", str(tmp_path)])
    try:
        based.ok("build", f"git://10.0.2.2:{port}/repo.git#main", "-t", "git:1")
    finally:
        daemon.terminate()
        daemon.wait()
    assert based.guest("docker run --rm git:1 cat /who") == "git\n"


def test_buildkit_draws_on_a_terminal(based: Cli, context: Path) -> None:
    write(context, "RUN echo drawn\n")
    program = on_terminal(based, f"exec vmbuild build {context} -t drawn:1")
    program.expect(r"\[\+\] Building")
    program.expect("Built drawn:1")
    program.expect(pexpect.EOF)
    program.close()
    assert program.exitstatus == 0


def test_standard_input_and_a_terminal_at_once(based: Cli, context: Path) -> None:
    write(context, "COPY two /two\n")
    (context / "two").write_bytes(bytes(range(256)) * 1000)  # what a terminal would take for Ctrl-C and Ctrl-D
    program = on_terminal(based, f"tar -C {context} -c . | vmbuild build -t piped:1 -")
    program.expect(r"\[\+\] Building")
    program.expect("Built piped:1")
    program.expect(pexpect.EOF)
    digest = hashlib.sha256((context / "two").read_bytes()).hexdigest()
    assert based.guest("docker run --rm piped:1 sha256sum /two").split()[0] == digest


def test_ctrl_c_while_standard_input_is_awaited(based: Cli) -> None:
    program = based.start("build", "-", stdin=subprocess.PIPE)
    place = "ls -d /var/lib/vmbuild/work/*/context || true"
    wait_until(lambda: based.guest(place) != "", "input is awaited", 60)
    program.send_signal(signal.SIGINT)
    assert program.wait(60) == 130
    assert program.stderr is not None
    assert b"Fatal" not in program.stderr.read()
    assert based.guest(place) == ""
    for pipe in (program.stdin, program.stdout, program.stderr):
        assert pipe is not None
        pipe.close()


def test_the_archive_may_lie_in_the_context(based: Cli, context: Path) -> None:
    write(context, "COPY . /c\n")
    (context / ".dockerignore").write_text("*.tar\n")
    based.ok("build", str(context), "-o", str(context / "out.tar"))
    again = based.ok("build", str(context), "-o", f"type=docker,dest={context}/out.tar")
    assert "CACHED" in again.err
    names = subprocess.check_output(["skopeo", "inspect", "--raw", f"docker-archive:{context}/out.tar"])
    assert len(json.loads(names)["layers"]) == 2


def test_docker_loads_the_archive(based: Cli, context: Path, tmp_path: Path) -> None:
    write(context, "RUN echo loaded >/word\n")
    tagged, nameless = tmp_path / "tagged.tar", tmp_path / "nameless.tar"
    based.ok("build", str(context), "-t", "loaded:1", "-o", str(tagged))
    based.guest("docker image rm loaded:1")
    said = based.ok("ssh", "--", "docker", "load", stdin=tagged.read_bytes()).out.decode()
    assert "loaded:1" in said
    assert based.guest("docker run --rm loaded:1 cat /word") == "loaded\n"
    (context / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")  # a name is missed with any content
    based.ok("build", str(context), "-o", str(nameless))
    said = based.ok("ssh", "--", "docker", "load", stdin=nameless.read_bytes()).out.decode()
    assert "Loaded image ID: sha256:" in said


def test_json_is_all_that_rawjson_gives(based: Cli, context: Path) -> None:
    write(context, "RUN true\n")
    text = based.ok("build", str(context), "--progress", "rawjson").err.strip()
    found, decoder = list[dict[str, object]](), json.JSONDecoder()
    while text:
        value, end = decoder.raw_decode(text)  # fails on anything but JSON
        found.append(value)
        text = text[end:].lstrip()
    assert any("vertexes" in value for value in found)
