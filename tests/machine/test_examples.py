"""The examples are built and do what they say: small ones each day, with less to do; large ones when asked."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.machine.conftest import BASE, Cli

pytestmark = pytest.mark.machine

EXAMPLES = Path(__file__).parents[2] / "examples"
IO_DIGEST = "eb7ebe1306aec8111528b6f719f7a35bca8ef918716ff483037893060e6dbfaf"
"""The SHA-256 of the tar that `io` makes of 200 files of 8 KiB: the same on every architecture."""


def files_in(archive: Path) -> dict[str, bytes]:
    """Return the files of a container image's last layer, by their names."""
    with tarfile.open(archive) as outer:
        manifest = json.load(outer.extractfile("manifest.json") or io.BytesIO())
        layer = (outer.extractfile(manifest[0]["Layers"][-1]) or io.BytesIO()).read()
    with tarfile.open(fileobj=io.BytesIO(layer)) as inner:
        return {each.name: (inner.extractfile(each) or io.BytesIO()).read() for each in inner if each.isreg()}


def build(program: Cli, name: str, archive: Path, *options: str) -> None:
    program.ok("build", str(EXAMPLES / name), "-t", f"{name}:test", "-o", str(archive), *options)


def test_many_small_counts_to_what_it_was_told(based: Cli, tmp_path: Path) -> None:
    build(based, "many-small", tmp_path / "out.tar", "--build-arg", "PROCESSES=30")
    assert files_in(tmp_path / "out.tar") == {"count": b"30\n"}


def test_io_makes_the_same_everywhere(based: Cli, tmp_path: Path) -> None:
    build(based, "io", tmp_path / "out.tar", "--build-arg", "FILES=200", "--build-arg", "KIBIBYTES=8")
    made = files_in(tmp_path / "out.tar")
    packed = gzip.decompress(made["files.tar.gz"])
    assert hashlib.sha256(packed).hexdigest() == IO_DIGEST
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        members = {each.name.removeprefix("./"): tar.extractfile(each) for each in tar if each.isreg()}
        digests = {name: hashlib.sha256((each or io.BytesIO()).read()).hexdigest() for name, each in members.items()}
    listed = [line.split("  ") for line in made["SHA256SUMS"].decode().splitlines()]
    assert {name.removeprefix("tree/"): digest for digest, name in listed} == digests
    assert len(digests) == 200


@pytest.mark.slow
def test_the_wheel_is_one_for_the_platform(based: Cli, tmp_path: Path) -> None:
    build(based, "python-wheel", tmp_path / "out.tar")
    assert based.guest("docker run --rm python-wheel:test").strip() == "0xcbf43926"
    assert "linux_aarch64.whl" in based.guest("docker run --rm python-wheel:test ls /wheels")


@pytest.mark.slow
def test_gos_compiler_is_the_platforms(based: Cli, tmp_path: Path) -> None:
    build(based, "go", tmp_path / "out.tar")
    assert json.loads(based.guest("docker run --rm go:test"))["arch"] == "arm64"
    assert list(files_in(tmp_path / "out.tar")) == ["hello"]


GET = 'exec 3<>/dev/tcp/127.0.0.1/80; printf "GET / HTTP/1.0\\r\\n\\r\\n" >&3; cat <&3'
"""A request without a client, which the image does not have."""


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(("platform", "debian"), [("linux/arm64", "arm64"), ("linux/arm/v7", "armhf")])
def test_nginx_serves_a_page(based: Cli, tmp_path: Path, platform: str, debian: str) -> None:
    based.ok("base", BASE, "--platform", platform)
    started = based.start("build", str(EXAMPLES / "nginx"), "-t", "nginx:test", "--platform", platform)
    _, said = started.communicate(timeout=5000)
    assert started.returncode == 0, said.decode()[-4000:]
    try:
        based.guest(f"docker run -d --name web --platform {platform} nginx:test")
        page = based.guest(f"sleep 2; docker exec web bash -c '{GET}'")
        assert "200 OK" in page
        assert "This page comes from an nginx" in page
        assert based.guest("docker exec web dpkg --print-architecture").strip() == debian
        assert "OpenSSL" in based.guest("docker exec web nginx -V 2>&1")
    finally:
        based.guest("docker rm -f web")
