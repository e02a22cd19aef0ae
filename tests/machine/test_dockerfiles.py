"""Dockerfiles of the kinds that people have: what the machine makes of them is what buildah makes of them."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.machine import user_mode
from tests.machine.conftest import BASE, Cli
from tests.machine.image_facts import Facts
from tests.machine.user_mode import Buildah
from vmbuild.bench.userspace import open_userspace

pytestmark = pytest.mark.machine

FILES = Path(__file__).parent / "dockerfiles"
WORDS = "what nobody must see"

QUICK = ("args", "child", "heredoc", "secret", "cache", "user", "health")
COMPILED = ("c", "wheel", "node", "go")
"""These need the compilers of the container image tools:1."""

OPTIONS = {
    "args": ("--build-arg", "NAME=you", "--label", "org.example.more=1"),
    "heredoc": ("--build-arg", "WHO=me"),
    "secret": ("--secret", "id=token,src={folder}/token"),
}

NOT_OURS = ("/proc", "/sys", "/dev", "/run", "/tmp", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf")
"""Places that a build lends to its steps: each tool leaves its own mount points behind there."""


@dataclass(frozen=True)
class Both:
    """The two that build, each with the same base image."""

    machine: Cli
    buildah: Buildah

    def share(self, reference: str, folder: Path) -> None:
        """Give buildah a container image that the machine has."""
        archive = folder / "shared.tar"
        self.machine.ok("build", "-", "-o", str(archive), stdin=f"FROM {reference}\n".encode())
        self.buildah.take(archive, reference)
        archive.unlink()


@pytest.fixture(scope="module")
def both(based: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    if not user_mode.can_emulate():
        pytest.skip("no buildah, no emulator, or no namespaces for it")
    folder = tmp_path_factory.mktemp("buildah")
    both = Both(based, Buildah(open_userspace(user_mode.PLATFORM, "auto", folder)))
    both.share(BASE, folder)
    both.machine.ok("build", str(FILES / "parent"), "-t", "parent:1")
    both.buildah.build(FILES / "parent", "parent:1")
    yield both
    both.buildah.space.run("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def with_tools(both: Both, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("tools")
    packages = "gcc make libc6-dev python3-dev python3-setuptools python3-wheel nodejs golang-go"
    install = f"apt-get update && apt-get install -y --no-install-recommends {packages}"
    (folder / "Dockerfile").write_text(f"FROM {BASE}\nRUN {install} && rm -rf /var/lib/apt/lists/*\n")
    both.machine.ok("build", str(folder), "-t", "tools:1", timeout_s=1500)
    both.share("tools:1", folder)
    return both


@pytest.mark.parametrize("kind", QUICK)
def test_it_is_the_container_image_that_buildah_makes(both: Both, kind: str, tmp_path: Path) -> None:
    compare(both, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", COMPILED)
def test_what_is_compiled_is_what_buildah_makes(with_tools: Both, kind: str, tmp_path: Path) -> None:
    compare(with_tools, kind, tmp_path)


def compare(both: Both, kind: str, folder: Path) -> None:
    """Build a context both ways, and see that nothing differs."""
    context = folder / "context"
    shutil.copytree(FILES / kind, context, symlinks=True)
    (folder / "token").write_text(WORDS)
    if kind == "args":
        pack(context / "data.tar.gz")
    options = [each.format(folder=folder) for each in OPTIONS.get(kind, ())]
    both.machine.ok("build", str(context), "--no-cache", *options, "-o", str(folder / "ours.tar"))
    plain = context / "Dockerfile.plain"  # the same in older words, which the buildah of Debian 12 needs
    both.buildah.build(context, f"{kind}:1", *options, *(("-f", str(plain)) if plain.exists() else ()))
    both.buildah.save(f"{kind}:1", folder / "theirs.tar")
    ours, theirs = Facts.read(folder / "ours.tar"), Facts.read(folder / "theirs.tar")
    theirs.config.get("Labels", {}).pop("io.buildah.version", None)
    if not theirs.config.get("Labels"):
        theirs.config.pop("Labels", None)
    assert ours.platform == theirs.platform
    assert ours.config == theirs.config
    assert lent_places_left_out(ours) == lent_places_left_out(theirs)
    assert WORDS.encode() not in (folder / "ours.tar").read_bytes()


def lent_places_left_out(facts: Facts) -> dict[str, tuple[object, ...]]:
    """Return the files of a container image but for those in NOT_OURS."""
    return {path: known for path, known in facts.files.items() if not path.startswith(NOT_OURS) and path != "/"}


def pack(path: Path) -> None:
    """Write an archive for ADD to unpack."""
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("inside/file")
        info.size, info.mode, info.uid = 3, 0o600, 7
        tar.addfile(info, io.BytesIO(b"abc"))
