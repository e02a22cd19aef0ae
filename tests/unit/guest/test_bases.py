from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.unit.guest.fakes import FakeSession, Reply
from vmbuild.errors import GuestError
from vmbuild.guest import bases, oci
from vmbuild.model import PLATFORMS

NAME = "debian:trixie-slim"
needs_skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_layer(tmp_path: Path, name: str) -> bases.Layer:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name.replace("/", "-")), io.BytesIO())
    path = tmp_path / name.replace("/", "-")
    path.write_bytes(gzip.compress(plain.getvalue(), mtime=0))
    return bases.Layer(path, digest(path.read_bytes()), digest(plain.getvalue()))


def write(layers: Mapping[str, bases.Layer], others: Mapping[str, oci.Descriptor]) -> dict[str, bytes]:
    out = io.BytesIO()
    bases.write_archive(out, NAME, layers, others)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        return {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}


def index_of(members: Mapping[str, bytes]) -> tuple[str, list[oci.Descriptor]]:
    """Return the digest of the archive's container image and the manifests of its index."""
    (top,) = json.loads(members["index.json"])["manifests"]
    name = top["digest"].removeprefix("sha256:")
    return name, json.loads(members[f"blobs/sha256/{name}"])["manifests"]


class Guest:
    """A guest that has what archives brought."""

    def __init__(self, members: Mapping[str, bytes]) -> None:
        self.blobs = {name.rpartition("/")[2]: data for name, data in members.items() if name.startswith("blobs/")}
        self.tag = index_of(members)[0]

    def session(self) -> FakeSession:
        cats = [
            (("cat", oci.blob_path(name)), Reply(stdout=data)) for name, data in self.blobs.items() if data[:1] == b"{"
        ]
        held = {oci.blob_path(name) for name in self.blobs}
        inspect = ("docker", "image", "inspect")
        return FakeSession(
            (inspect, Reply(stdout=f"sha256:{self.tag}\n".encode())),
            *cats,
            (("cat",), Reply(1)),
            *((("sh", "-c", HAVE, "have", path), Reply()) for path in sorted(held)),
            (("sh", "-c", HAVE), Reply(1)),
        )


HAVE = 'for f; do [ -e "$f" ] || exit 1; done'


def test_each_platform_has_its_manifest_in_the_order_of_the_table(tmp_path: Path) -> None:
    layers = {name: make_layer(tmp_path, name) for name in ("linux/arm/v6", "linux/arm64", "linux/arm/v7")}
    members = write(layers, {})
    _, manifests = index_of(members)
    assert [each["platform"] for each in manifests] == [
        {"os": "linux", "architecture": "arm64"},
        {"os": "linux", "architecture": "arm", "variant": "v7"},
        {"os": "linux", "architecture": "arm", "variant": "v6"},
    ]
    for name, each in zip(PLATFORMS, manifests, strict=True):
        manifest = json.loads(members[f"blobs/sha256/{str(each['digest'])[7:]}"])
        config = json.loads(members[f"blobs/sha256/{manifest['config']['digest'][7:]}"])
        assert manifest["layers"][0]["digest"] == f"sha256:{layers[name].digest}"
        assert config["rootfs"]["diff_ids"] == [f"sha256:{layers[name].plain_digest}"]
        assert (config["architecture"], config.get("variant", "")) == (
            PLATFORMS[name].architecture,
            PLATFORMS[name].variant,
        )
    for name, data in members.items():
        assert not name.startswith("blobs/") or digest(data) == name.rpartition("/")[2]


def test_what_the_guest_has_stays_when_another_platform_comes(tmp_path: Path) -> None:
    first = write({"linux/arm/v7": make_layer(tmp_path, "linux/arm/v7")}, {})
    found = bases.find(Guest(first).session(), NAME)
    assert found is not None
    assert (found.image_id, list(found.manifests)) == (f"sha256:{index_of(first)[0]}", ["linux/arm/v7"])
    second = write({"linux/arm64": make_layer(tmp_path, "linux/arm64")}, found.manifests)
    _, manifests = index_of(second)
    assert [each["digest"] for each in manifests[1:]] == [each["digest"] for each in index_of(first)[1]]
    assert len([name for name in second if name.startswith("blobs/")]) == 4  # the new one's three, and the index


def test_what_is_made_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    first = write({"linux/arm64": make_layer(tmp_path, "old")}, {})
    found = bases.find(Guest(first).session(), NAME)
    assert found is not None
    _, manifests = index_of(write({"linux/arm64": make_layer(tmp_path, "linux/arm64")}, found.manifests))
    assert len(manifests) == 1
    assert manifests[0]["digest"] != index_of(first)[1][0]["digest"]


@pytest.mark.parametrize("gone", ["layers", "config"])
def test_a_platform_that_is_not_whole_does_not_count(tmp_path: Path, gone: str) -> None:
    members = write({name: make_layer(tmp_path, name) for name in ("linux/arm64", "linux/arm/v7")}, {})
    guest = Guest(members)
    manifest = json.loads(guest.blobs[str(index_of(members)[1][0]["digest"])[7:]])
    blob = manifest["config"] if gone == "config" else manifest["layers"][0]
    del guest.blobs[blob["digest"][7:]]
    found = bases.find(guest.session(), NAME)
    assert found is not None
    assert list(found.manifests) == ["linux/arm/v7"]


def test_a_plain_manifest_is_an_index_of_one(tmp_path: Path) -> None:
    """As a registry's, or an older vmbuild's, container image may be."""
    guest = Guest(members := write({"linux/arm64": make_layer(tmp_path, "linux/arm64")}, {}))
    guest.tag = str(index_of(members)[1][0]["digest"])[7:]
    found = bases.find(guest.session(), NAME)
    assert found is not None
    assert found.manifests["linux/arm64"]["digest"] == f"sha256:{guest.tag}"


def test_a_name_that_the_guest_has_not_is_none() -> None:
    assert bases.find(FakeSession((("docker", "image", "inspect"), Reply(1))), NAME) is None


def test_an_index_with_other_content_is_refused(tmp_path: Path) -> None:
    guest = Guest(write({"linux/arm64": make_layer(tmp_path, "linux/arm64")}, {}))
    guest.blobs[guest.tag] += b" "
    with pytest.raises(GuestError, match="other content"):
        bases.find(guest.session(), NAME)


def test_an_index_of_nonsense_has_no_platform(tmp_path: Path) -> None:
    guest = Guest(write({"linux/arm64": make_layer(tmp_path, "linux/arm64")}, {}))
    text = json.dumps({"manifests": [1, {}, {"digest": "sha256:x", "size": "many", "mediaType": "m"}]}).encode()
    guest.tag = digest(text)
    guest.blobs[guest.tag] = text
    assert bases.find(guest.session(), NAME) == bases.Tagged(f"sha256:{guest.tag}", {})


@pytest.mark.parametrize("manifests", [None, {}, "m"])
def test_an_index_without_a_list_is_an_error_of_the_guest(tmp_path: Path, manifests: object) -> None:
    guest = Guest(write({"linux/arm64": make_layer(tmp_path, "linux/arm64")}, {}))
    text = json.dumps({"manifests": manifests}).encode()
    guest.tag = digest(text)
    guest.blobs[guest.tag] = text
    with pytest.raises(GuestError, match="makes no sense"):
        bases.find(guest.session(), NAME)


@needs_skopeo
def test_skopeo_reads_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "base.tar"
    with path.open("wb") as out:
        bases.write_archive(out, NAME, {name: make_layer(tmp_path, name) for name in PLATFORMS}, {})
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    copy = ["skopeo", "copy", "--all", "--insecure-policy", f"oci-archive:{path}", f"dir:{tmp_path}/copied"]
    subprocess.run(copy, check=True, capture_output=True, env=environment)
    assert len(json.loads((tmp_path / "copied/manifest.json").read_text())["manifests"]) == len(PLATFORMS)
