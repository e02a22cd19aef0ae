from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard

from tests.unit.guest.drives import DriveSession, make_channel
from tests.unit.guest.images import Host, make_layer
from vmbuild.deadline import NEVER, Deadline
from vmbuild.errors import GuestError, HostError, UsageError, VmbuildError
from vmbuild.guest import oci
from vmbuild.guest.archive import check_output, open_output, write_archive
from vmbuild.guest.oci import full_reference
from vmbuild.guest.session import Feed, Output, Tick
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
        on_tick: Tick | None = None,
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

    def reopen(self, deadline: Deadline) -> None:
        pass

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


def test_by_way_of_the_drives_it_is_the_same_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ("application/vnd.oci.image.layer.v1.tar", b"other" * 500_000)
    store = BlobStore(LAYER, other)
    expected = write(BlobStore(LAYER, other))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name, data in store.blobs.items():
        (blobs / name).write_bytes(data)
    monkeypatch.setattr(oci, "BLOBS", str(blobs))
    local = tmp_path / "layer"
    local.write_bytes(other[1])
    for known in ({}, {digest(other[1]): local}):
        out = io.BytesIO()
        session, drives = DriveSession(tmp_path / "drives"), make_channel(tmp_path / "drives")
        find = dict[str, Path](known).get
        size = write_archive(session, f"sha256:{store.digest}", ["a:1"], out, find, SilentReporter(), drives)
        assert size == len(out.getvalue())
        assert out.getvalue() == expected
    blob = blobs / digest(LAYER[1])
    blob.write_bytes(bytes([LAYER[1][0] ^ 1]) + LAYER[1][1:])
    with pytest.raises(GuestError, match="other content"):
        write_archive(session, f"sha256:{store.digest}", [], io.BytesIO(), lambda _: None, SilentReporter(), drives)


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
        with pytest.raises((UsageError, HostError)):
            check_output(str(place))


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("docker.io/debian:x", "docker.io/library/debian:x"),
        ("docker.io/library/debian:x", "docker.io/library/debian:x"),
        ("index.docker.io/debian", "docker.io/library/debian:latest"),
        ("docker.io/me/it", "docker.io/me/it:latest"),
        ("localhost:5000/it", "localhost:5000/it:latest"),
        ("me/deep/it:v", "docker.io/me/deep/it:v"),
        ("localhost", "docker.io/library/localhost:latest"),
    ],
)
def test_names_with_a_registry_are_completed_as_docker_does(name: str, full: str) -> None:
    assert full_reference(name) == full


class Answers(BlobStore):
    """Answers for one blob with bytes as they are, packed or not."""

    def __init__(self, name: str, raw: bytes, *layers: tuple[str, bytes], code: int = 0) -> None:
        super().__init__(*layers)
        self.name = name
        self.raw = raw
        self.code = code

    def run(
        self,
        argv: Sequence[str],
        *,
        feed: Feed | None = None,
        on_stdout: Output | None = None,
        on_stderr: Output | None = None,
        terminal: tuple[int, int] | None = None,
        deadline: Deadline = NEVER,
        on_tick: Tick | None = None,
    ) -> int:
        if not argv[-1].endswith(self.name):
            return super().run(argv, on_stdout=on_stdout)
        assert on_stdout is not None
        on_stdout(self.raw)
        return self.code


def packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", 0),
        (b"this is no zstd", 0),
        (packed(LAYER[1])[:-5], 0),
        (packed(LAYER[1]), 1),
    ],
    ids=["nothing", "no zstd", "cut", "failed"],
)
def test_what_is_no_packed_layer_is_an_error_of_the_guest(tmp_path: Path, raw: bytes, code: int) -> None:
    path = tmp_path / "out.tar"
    store = Answers(digest(LAYER[1]), raw, LAYER, code=code)
    with pytest.raises(GuestError), open_output(str(path), io.BytesIO()) as out:
        write_archive(store, f"sha256:{store.digest}", (), out, lambda _: None, SilentReporter())
    assert list(tmp_path.iterdir()) == []


def test_a_little_stream_that_unpacks_to_much_is_refused_in_little_memory() -> None:
    """The guest is not trusted: a layer of 3000 bytes must not become 300 MB of the host's memory."""
    bomb = packed(bytes(300_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(GuestError):
            write(Answers(digest(LAYER[1]), bomb, LAYER))
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_a_gzipped_layer_travels_as_it_is() -> None:
    data = b"\x1f\x8b" + bytes(range(256)) * 9
    kind = "application/vnd.oci.image.layer.v1.tar+gzip"
    store = Answers(digest(data), data, (kind, data))
    assert members(write(store))[f"blobs/sha256/{digest(data)}"] == data


def relabel(store: BlobStore, change: Callable[[dict[str, object]], None]) -> BlobStore:
    """Change the manifest as a guest that lies, or another builder, would write it."""
    manifest = json.loads(store.blobs.pop(store.digest))
    change(manifest)
    data = json.dumps(manifest).encode()
    store.digest = digest(data)
    store.blobs[store.digest] = data
    return store


def resize(size: object) -> Callable[[dict[str, object]], None]:
    def change(manifest: dict[str, object]) -> None:
        layers = manifest["layers"]
        assert isinstance(layers, list)
        layers[0]["size"] = size

    return change


@pytest.mark.parametrize("size", [2999, 3001, 9 * 1024**3, -1], ids=["less", "more", "9 GiB", "negative"])
def test_a_layer_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(GuestError):
        write(relabel(BlobStore(LAYER), resize(size)))


def test_a_layer_of_more_than_8_gib_has_a_member_that_tar_can_read() -> None:
    """Plain ustar numbers end at 8 GiB; the layers are not compressed, so they can be larger."""
    out = io.BytesIO()
    with pytest.raises(GuestError, match="fewer bytes"):
        store = relabel(BlobStore(LAYER), resize(9 * 1024**3))
        write_archive(store, f"sha256:{store.digest}", (), out, lambda _: None, SilentReporter())
    headers = out.getvalue()
    start = headers.index(f"blobs/sha256/{digest(LAYER[1])}".encode())
    assert tarfile.TarInfo.frombuf(headers[start : start + 512], "utf-8", "strict").size == 9 * 1024**3


@pytest.mark.parametrize("text", [b"no json", b"[]", b"null", b'{"layers": []}', b'{"layers": [{}], "config": {}}'])
def test_a_manifest_that_makes_no_sense_is_an_error_of_the_guest(text: bytes) -> None:
    store = BlobStore()
    store.digest = digest(text)
    store.blobs[store.digest] = text
    with pytest.raises(GuestError):
        write(store)


def unite(*stores: BlobStore, change: Callable[[dict[str, object]], None] = lambda _: None) -> BlobStore:
    """Return a store whose container image is an index of the others'."""
    united = BlobStore()
    united.blobs = {name: data for store in stores for name, data in store.blobs.items()}
    entries = [
        {"mediaType": oci.MANIFEST, "digest": f"sha256:{store.digest}", "size": len(store.blobs[store.digest])}
        for store in stores
    ]
    index = {"schemaVersion": 2, "mediaType": oci.INDEX, "manifests": entries}
    change(index)
    data = json.dumps(index).encode()
    united.digest = digest(data)
    united.blobs[united.digest] = data
    return united


def test_an_index_makes_an_archive_of_all_that_it_names() -> None:
    """Each blob is there once, though the two have a layer and the config in common, and no manifest is preferred."""
    one, other = BlobStore(LAYER), BlobStore(GZIPPED, LAYER)
    store = unite(one, other)
    archive = write(store)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = tar.getnames()
    assert len(set(names)) == len(names)
    found = members(archive)
    assert set(found) == {f"blobs/sha256/{name}" for name in store.blobs} | {"index.json", "oci-layout"}
    assert all(digest(data) == name.rpartition("/")[2] for name, data in found.items() if name.startswith("blobs/"))
    (top,) = json.loads(found["index.json"])["manifests"]
    assert (top["digest"], top["mediaType"]) == (f"sha256:{store.digest}", oci.INDEX)
    assert top["annotations"]["io.containerd.image.name"] == "docker.io/library/a:1"


@pytest.mark.parametrize("which", ["one", "other"])
def test_a_manifest_of_an_index_with_other_content_is_refused(which: str) -> None:
    stores = {"one": BlobStore(LAYER), "other": BlobStore(GZIPPED)}
    store = unite(*stores.values())
    store.blobs[stores[which].digest] = store.blobs[stores[which].digest].replace(b"sha256", b"sha512")
    with pytest.raises(GuestError, match="other content"):
        write(store)


@pytest.mark.parametrize(
    "entries", [None, {}, [1], [{}], [{"digest": "sha256:../../etc", "size": 1, "mediaType": "m"}]]
)
def test_an_index_that_makes_no_sense_is_an_error_of_the_guest(entries: object) -> None:
    with pytest.raises(GuestError):
        write(unite(BlobStore(LAYER), change=lambda index: index.update(manifests=entries)))


def test_a_manifest_of_another_size_than_its_index_says_is_refused() -> None:
    def change(index: dict[str, object]) -> None:
        entries = index["manifests"]
        assert isinstance(entries, list)
        entries[0]["size"] += 1

    with pytest.raises(GuestError, match="another size"):
        write(unite(BlobStore(LAYER), change=change))


def test_a_blob_that_the_guest_has_not_is_told(tmp_path: Path) -> None:
    store = BlobStore(GZIPPED)
    del store.blobs[digest(GZIPPED[1])]
    with pytest.raises(GuestError, match="not in the guest"):
        write(store)


def test_a_local_blob_with_other_content_is_refused(tmp_path: Path) -> None:
    local = tmp_path / "layer"
    for lie in (b"rat" * 1000, b"tar" * 999, b"tar" * 1001):
        local.write_bytes(lie)
        with pytest.raises(VmbuildError):
            write(BlobStore(LAYER), {digest(LAYER[1]): local})


def test_no_name_and_several_names() -> None:
    def names(*tags: str) -> tuple[object, list[str]]:
        store, out = BlobStore(LAYER), io.BytesIO()
        write_archive(store, f"sha256:{store.digest}", tags, out, lambda _: None, SilentReporter())
        found = members(out.getvalue())
        entries = json.loads(found["index.json"])["manifests"]
        return json.loads(found["manifest.json"])[0]["RepoTags"], [
            entry.get("annotations", {}).get("org.opencontainers.image.ref.name", "") for entry in entries
        ]

    assert names() == (None, [""])
    assert names("a", "me/b:2", "host:5000/c") == (
        ["a:latest", "me/b:2", "host:5000/c:latest"],
        ["latest", "2", "latest"],
    )


def test_standard_output_gets_it_and_nothing_is_written_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stdout = io.BytesIO()
    with open_output("-", stdout) as out:
        out.write(b"archive")
    assert stdout.getvalue() == b"archive"
    with open_output(None, stdout) as out:
        out.write(b"dropped")
    assert stdout.getvalue() == b"archive"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_no_ordinary_file_is_not_replaced(tmp_path: Path) -> None:
    """`-o /dev/null` as root must not put a file in the place of the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with suppress(UsageError, HostError), open_output(str(pipe), io.BytesIO()) as out:
            out.write(b"x")
    finally:
        os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "gzipped"])
def test_skopeo_reads_the_archive(tmp_path: Path, wrapped: bool) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("file"), io.BytesIO())
    layer = inner.getvalue()
    config = {
        "architecture": "arm64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest(layer)}"]},
        "history": [{"created_by": "test"}],
    }
    sent = gzip.compress(layer) if wrapped else layer
    store = BlobStore((GZIPPED[0] if wrapped else PLAIN, sent))
    text = json.dumps(config).encode()
    store.blobs[digest(text)] = text

    def describe(manifest: dict[str, object]) -> None:
        manifest["config"] = {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": f"sha256:{digest(text)}",
            "size": len(text),
        }
        manifest["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json"
        manifest["schemaVersion"] = 2

    relabel(store, describe)
    path = tmp_path / "out.tar"
    with open_output(str(path), io.BytesIO()) as out:
        write_archive(store, f"sha256:{store.digest}", ("hello:1",), out, lambda _: None, SilentReporter())
    for command in (["inspect"], ["inspect", "--config"]):
        argv = ["skopeo", "--tmpdir", str(tmp_path), *command, f"docker-archive:{path}:hello:1"]
        found = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
        assert (found.get("Architecture") or found["architecture"], found.get("Os") or found["os"]) == (
            "arm64",
            "linux",
        )
    argv = ["skopeo", "--insecure-policy", "copy", f"docker-archive:{path}", f"dir:{tmp_path}/copy"]
    subprocess.run(argv, check=True, capture_output=True)


def test_what_attests_a_container_image_is_no_part_of_a_docker_archive(tmp_path: Path) -> None:
    host, session = Host(tmp_path / "blobs"), BlobStore()
    image = host.index({"arm64": [make_layer(("a", "1"))]}, attested=True)
    session.blobs = {path.name: path.read_bytes() for path in host.folder.iterdir()} | image.documents
    out = io.BytesIO()
    write_archive(session, image.digest, ["a:1"], out, lambda _: None, SilentReporter())
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        (entry,) = json.load(tar.extractfile("manifest.json") or io.BytesIO())
        assert len([name for name in tar.getnames() if name.startswith("blobs/")]) == 3
    assert (entry["RepoTags"], len(entry["Layers"])) == (["a:1"], 1)
