"""From a fresh clone to an ARM container image, as an ordinary user with an empty home and no sudo."""

from __future__ import annotations

import io
import json
import os
import pwd
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a fresh user"),
]


@pytest.fixture
def fresh_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pwd.struct_passwd]:
    """A user with an empty home, who is gone at the end."""
    home = Path("/tmp") / f"vmbuild-fresh-{os.getpid()}"
    name = f"fresh{os.getpid()}"
    subprocess.run(["useradd", "--create-home", "--home-dir", str(home), name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", name], check=True)
        shutil.rmtree(home, ignore_errors=True)


def as_user(user: pwd.struct_passwd, argv: list[str], cwd: Path) -> subprocess.CompletedProcess[bytes]:
    kept = {key: value for key, value in os.environ.items() if key in PASSED_ON or key.startswith("PIP_")}
    env = {**kept, "HOME": user.pw_dir, "USER": user.pw_name, "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    return subprocess.run(
        argv, cwd=cwd, env=env, user=user.pw_uid, group=user.pw_gid, extra_groups=[], capture_output=True, check=False
    )


def test_quickstart_as_a_fresh_user(fresh_user: pwd.struct_passwd) -> None:
    clone = Path(fresh_user.pw_dir) / "vmbuild"
    # What git has, as it now lies in the work tree: the same as a clone once it is committed.
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT).decode().split("\0")
    for name in filter(None, names):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    subprocess.run(["chown", "-R", fresh_user.pw_name, str(clone)], check=True)
    vmbuild = str(clone / ".venv/bin/vmbuild")
    try:
        done = as_user(fresh_user, ["./scripts/quickstart"], clone)
        assert done.returncode == 0, done.stderr.decode()
        check_hello(clone / "hello.tar")

        again = as_user(fresh_user, ["./scripts/quickstart"], clone)
        assert again.returncode == 0, again.stderr.decode()
        assert b"CACHED" in again.stderr
    finally:
        as_user(fresh_user, [vmbuild, "destroy", "--yes"], clone)
    assert not list((Path(fresh_user.pw_dir) / ".local/state/vmbuild/machines").glob("default"))


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
