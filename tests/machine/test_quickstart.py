"""From a fresh clone to an ARM container image, as an ordinary user with an empty home; as root, one without sudo."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import users
from tests.machine.users import User

pytestmark = pytest.mark.machine


@pytest.fixture
def fresh_user() -> Iterator[User]:
    """A user with an empty home, who is gone at the end."""
    with users.fresh_user() as user:
        yield user


def run_shown(user: User, argv: list[str], cwd: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a program, showing each line as it comes: it takes minutes. Return its exit code and what it said."""
    said = []
    with user.start(argv, cwd) as program, capfd.disabled():
        assert program.stdout is not None
        try:
            for line in program.stdout:
                said.append(line)
                sys.stderr.write(line)
                sys.stderr.flush()
        except BaseException:
            program.terminate()
            raise
    return program.returncode, "".join(said)


def test_quickstart_as_a_fresh_user(fresh_user: User, capfd: pytest.CaptureFixture[str]) -> None:
    clone = fresh_user.home / "vmbuild"
    users.clone_into(clone, fresh_user)
    vmbuild = str(clone / ".venv/bin/vmbuild")
    try:
        code, said = run_shown(fresh_user, ["./scripts/quickstart"], clone, capfd)
        assert code == 0, said
        check_hello(clone / "hello.tar")

        code, said = run_shown(fresh_user, ["./scripts/quickstart"], clone, capfd)
        assert code == 0, said
        assert "CACHED" in said
    finally:
        if Path(vmbuild).exists():  # else what went wrong before it is the error to see
            run_shown(fresh_user, [vmbuild, "destroy", "--yes"], clone, capfd)
    assert not list((fresh_user.home / ".local/state/vmbuild/machines").glob("default"))


def check_hello(archive: Path) -> None:
    facts = json.loads(subprocess.check_output(["skopeo", "inspect", f"docker-archive:{archive}"]))
    assert (facts["Os"], facts["Architecture"]) == ("linux", "arm64")
    program = archive.with_name("hello-program")
    program.write_bytes(last_layer_file(archive, "usr/local/bin/hello"))
    program.chmod(0o755)
    said = subprocess.check_output(["qemu-aarch64-static", str(program)]).decode()
    assert said == "Hello from aarch64, a program of 64 bits\n"


def last_layer_file(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as outer:
        manifest = json.load(outer.extractfile("manifest.json") or io.BytesIO())
        layer = outer.extractfile(manifest[0]["Layers"][-1])
        assert layer is not None
        with tarfile.open(fileobj=io.BytesIO(layer.read())) as inner:
            file = inner.extractfile(name)
            assert file is not None
            return file.read()
