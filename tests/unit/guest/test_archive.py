from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard

from vmbuild.deadline import NEVER, Deadline
from vmbuild.errors import GuestError, HostError, UsageError
from vmbuild.guest.archive import full_reference, open_output, write_archive
from vmbuild.guest.session import Feed, Output
from vmbuild.report import SilentReporter

PLAIN = "application/vnd.docker.image.rootfs.diff.tar"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class BlobStore:
    """A session to a guest that has nothing but blobs."""

    def __init__(self, *layers: tuple[str, bytes]) -> None:
        config = b'{"os":"linux"}'
        self.blobs = {digest(data): data for _, data in layers} | {digest(config): config}
        describe = [
            {"mediaType": kind, "digest": f"sha256:{digest(data)}", "size": len(data)}
            for kind, data in [("application/vnd.docker.container.image.v1+json", config), *layers]
        ]
        manifest = json.dumps({"mediaType": "m", "config": describe[0], "layers": describe[1:]}).encode()
        self.digest = digest(manifest)
        self.blobs[self.digest] = manifest
        self.read: list[str] = []

    def run(
        self,
        argv: Sequence[str],
        *,
        feed: Feed | None = None,
        on_stdout: Output | None = None,
        on_stderr: Output | None = None,
        terminal: tuple[int, int] | None = None,
        deadline: Deadline = NEVER,
    ) -> int:
        name = argv[-1].rpartition("/")[2]
        self.read.append(name)
        if name not in self.blobs:
            return 1
        data = self.blobs[name]
        if argv[0] == "zstd":
            data = zstandard.ZstdCompressor().compress(data)
        assert on_stdout is not None
        for start in range(0, len(data), 100):
            on_stdout(data[start : start + 100])
        return 0

    def close(self) -> None:
        pass


GZIPPED = ("application/vnd.docker.image.rootfs.diff.tar.gzip", b"gzip" * 300)
LAYER = (PLAIN, b"tar" * 1000)


def write(store: BlobStore, known: dict[str, Path] | None = None) -> bytes:
    out = io.BytesIO()
    size = write_archive(store, f"sha256:{store.digest}", ("a:1",), out, (known or {}).get, SilentReporter())
    assert size == len(out.getvalue())
    return out.getvalue()


def members(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}


def test_the_archive_holds_what_the_manifest_names() -> None:
    store = BlobStore(GZIPPED, LAYER)
    found = members(write(store))
    manifest = json.loads(found["manifest.json"])[0]
    assert manifest["RepoTags"] == ["a:1"]
    assert [digest(found[name]) for name in manifest["Layers"]] == [digest(GZIPPED[1]), digest(LAYER[1])]
    assert json.loads(found[manifest["Config"]]) == {"os": "linux"}
    index = json.loads(found["index.json"])["manifests"][0]
    assert digest(found[f"blobs/sha256/{store.digest}"]) == index["digest"].removeprefix("sha256:")
    assert index["annotations"]["io.containerd.image.name"] == "docker.io/library/a:1"


def test_a_layer_that_the_host_has_does_not_travel(tmp_path: Path) -> None:
    store = BlobStore(LAYER)
    local = tmp_path / "layer"
    local.write_bytes(LAYER[1])
    assert write(store, {digest(LAYER[1]): local}) == write(BlobStore(LAYER))
    assert digest(LAYER[1]) not in store.read


def test_a_layer_that_is_there_twice_travels_once() -> None:
    store = BlobStore(LAYER, LAYER)
    assert len(json.loads(members(write(store))["manifest.json"])[0]["Layers"]) == 2
    assert store.read.count(digest(LAYER[1])) == 1


@pytest.mark.parametrize("lie", [b"rat" * 1000, b"tar" * 999, b"tar" * 1001])
def test_other_content_is_refused(lie: bytes) -> None:
    store = BlobStore(LAYER)
    store.blobs[digest(LAYER[1])] = lie
    with pytest.raises(GuestError):
        write(store)


def test_another_manifest_is_refused() -> None:
    store = BlobStore(LAYER)
    store.blobs[store.digest] += b" "
    with pytest.raises(GuestError, match="other content"):
        write(store)


def test_a_digest_that_is_a_path_is_refused() -> None:
    store = BlobStore(LAYER)
    manifest = store.blobs[store.digest].replace(digest(LAYER[1]).encode(), b"../../../etc/passwd")
    store.digest = digest(manifest)
    store.blobs[store.digest] = manifest
    with pytest.raises(GuestError, match="no SHA-256"):
        write(store)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:x", "docker.io/library/debian:x"),
        ("me/it", "docker.io/me/it:latest"),
        ("localhost/it", "localhost/it:latest"),
        ("host:5000/it", "host:5000/it:latest"),
        ("ghcr.io/me/it:1", "ghcr.io/me/it:1"),
    ],
)
def test_names_are_completed_as_docker_does(name: str, full: str) -> None:
    assert full_reference(name) == full


def test_the_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.tar"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), open_output(str(path), io.BytesIO()) as out:
        out.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    with open_output(str(path), io.BytesIO()) as out:
        out.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_told_before_the_build(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none" / "out.tar"):
        with pytest.raises((UsageError, HostError)), open_output(str(place), io.BytesIO()):
            pytest.fail("the build began")
