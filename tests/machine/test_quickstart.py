"""From a fresh clone to an ARM container image, as an ordinary user with an empty home; as root, one without sudo."""

from __future__ import annotations

import io
import json
import os
import pwd
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")

pytestmark = pytest.mark.machine


@dataclass(frozen=True)
class User:
    """An ordinary user with an empty home; `account` is None where it is the one who runs the tests."""

    name: str
    home: Path
    account: pwd.struct_passwd | None = None

    def start(self, argv: list[str], cwd: Path) -> subprocess.Popen[str]:
        """Start a program as this user, all that it says in one pipe."""
        kept = {key: value for key, value in os.environ.items() if key in PASSED_ON or key.startswith("PIP_")}
        path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return subprocess.Popen(
            argv,
            cwd=cwd,
            # A snapshot is made in the background, by a process that would outlive the user.
            env={**kept, "HOME": str(self.home), "USER": self.name, "PATH": path, "VMBUILD_SNAPSHOTS": "off"},
            user=self.account and self.account.pw_uid,
            group=self.account and self.account.pw_gid,
            extra_groups=[] if self.account else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )


@pytest.fixture
def fresh_user() -> Iterator[User]:
    """A user with an empty home, who is gone at the end."""
    home = Path(tempfile.mkdtemp(prefix="vmbuild-fresh-", dir="/tmp"))  # a short path: there are sockets in it
    name = f"fresh{os.getpid()}"
    try:
        if os.geteuid() != 0:
            yield User(pwd.getpwuid(os.getuid()).pw_name, home)
            return
        subprocess.run(["useradd", "--no-create-home", "--home-dir", str(home), name], check=True)
        try:
            shutil.chown(home, name)
            yield User(name, home, pwd.getpwnam(name))
        finally:
            subprocess.run(["userdel", name], check=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)


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


@pytest.mark.timeout(1500)
def test_quickstart_as_a_fresh_user(fresh_user: User, capfd: pytest.CaptureFixture[str]) -> None:
    clone = fresh_user.home / "vmbuild"
    # What git has, as it now lies in the work tree: the same as a clone once it is committed.
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT).decode().split("\0")
    for name in filter(None, names):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    subprocess.run(["chown", "-R", fresh_user.name, str(clone)], check=True)
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
