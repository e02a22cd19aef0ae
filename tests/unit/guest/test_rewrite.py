"""A container image with other layers and other media types: every digest in it is right, its content the same."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.unit.guest.fakes import CountingMeter
from tests.unit.guest.images import DOCKER_MANIFEST, GZIP, Host, make_layer
from vmbuild.errors import GuestError
from vmbuild.guest import compress, oci
from vmbuild.guest.compress import open_plain
from vmbuild.guest.rewrite import Wish, rewrite

UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "uncompressed": lambda data: data,
    "gzip": gzip.decompress,
    "zstd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
}


def data_of(size: int) -> bytes:
    """Return bytes of which a part can be compressed."""
    source = random.Random(size)
    return b"".join(source.choice([b"words and words ", source.randbytes(16)]) for _ in range(size // 16 + 1))[:size]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "blobs")


@pytest.mark.parametrize("size", [0, 1, compress.PIECE_BYTES, 5 * compress.PIECE_BYTES + 77])
@pytest.mark.parametrize("compression", ["uncompressed", "gzip", "zstd"])
def test_what_is_compressed_comes_out_again(tmp_path: Path, compression: str, size: int) -> None:
    data, meter = data_of(size), CountingMeter()
    (tmp_path / "in").write_bytes(data)
    digest, written = compress.compress(tmp_path / "in", tmp_path / "out", compression, None, meter)
    packed = (tmp_path / "out").read_bytes()
    assert UNPACK[compression](packed) == data
    assert (hashlib.sha256(packed).hexdigest(), len(packed), meter.total) == (digest, written, size)
    with open_plain(tmp_path / "out") as plain:
        assert plain.read() == data


def test_programs_of_the_host_read_it(tmp_path: Path) -> None:
    data = data_of(3_000_000)
    (tmp_path / "in").write_bytes(data)
    compress.compress(tmp_path / "in", tmp_path / "out.gz", "gzip", 9, CountingMeter())
    assert subprocess.check_output(["gzip", "-dc", tmp_path / "out.gz"]) == data


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_the_same_layer_comes_out_the_same_on_any_host(
    tmp_path: Path, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").write_bytes(data_of(4_500_000))
    digests = set()
    for cpus in (1, 2, 7):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        digests.add(compress.compress(tmp_path / "in", tmp_path / str(cpus), compression, None, CountingMeter())[0])
    assert len(digests) == 1


@pytest.mark.parametrize(
    "data", [gzip.compress(b"x" * 9999)[:-9], zstandard.compress(b"x" * 9999)[:-3]], ids=["gzip", "zstd"]
)
def test_a_damaged_layer_is_said(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "layer").write_bytes(data[:20] + b"\xff" + data[21:])
    with pytest.raises(GuestError, match="is damaged"), open_plain(tmp_path / "layer") as plain:
        assert plain.read() != b"x" * 9999
        raise zlib.error("it was cut short")


def test_new_layers_are_compressed_and_others_stay(host: Host) -> None:
    one, two = make_layer(("a", "1")), make_layer(("b", "2" * 9999))
    image = host.image(one, two)
    made = rewrite(image, Wish("gzip"), host.blobs)
    manifest = host.document(made, made.digest)
    assert manifest["mediaType"] == DOCKER_MANIFEST
    assert [each["mediaType"] for each in manifest["layers"]] == [GZIP, GZIP]
    assert [gzip.decompress(host.blob(each)) for each in manifest["layers"]] == [one, two]
    assert manifest["config"] == image.top["config"]
    assert rewrite(made, Wish("gzip"), host.blobs).documents == made.documents
    assert rewrite(made, Wish("uncompressed"), host.blobs).documents == made.documents
    back = rewrite(made, Wish("uncompressed", force=True), host.blobs)
    assert back.top["layers"] == image.top["layers"]


def test_zstd_brings_the_media_types_that_it_has(host: Host) -> None:
    layer = make_layer(("a", "1"))
    made = rewrite(host.image(gzip.compress(layer), kind=GZIP), Wish("zstd", 19, force=True), host.blobs)
    manifest = host.document(made, made.digest)
    assert (manifest["mediaType"], manifest["config"]["mediaType"]) == (oci.MANIFEST, oci.CONFIG)
    (described,) = manifest["layers"]
    assert described["mediaType"] == "application/vnd.oci.image.layer.v1.tar+zstd"
    assert UNPACK["zstd"](host.blob(described)) == layer


@pytest.mark.parametrize(
    ("oci_types", "kind"), [(True, oci.MANIFEST), (False, DOCKER_MANIFEST), (None, DOCKER_MANIFEST)]
)
def test_media_types_change_alone(host: Host, oci_types: bool | None, kind: str) -> None:
    image = host.image(make_layer(("a", "1")))
    made = rewrite(image, Wish("uncompressed", oci_types=oci_types), host.blobs)
    assert made.media_type == kind
    assert [blob.digest for blob in made.blobs] == [blob.digest for blob in image.blobs]
    assert (made.documents == image.documents) is (kind == DOCKER_MANIFEST)  # to the byte


def entries(image: Any) -> list[Any]:
    found: list[Any] = json.loads(image.documents[image.digest])["manifests"]
    return found


def test_an_index_and_what_attests_its_manifests_name_the_new_ones(host: Host) -> None:
    image = host.index({"arm64": [make_layer(("a", "1"))], "arm/v7": [make_layer(("a", "2"))]}, attested=True)
    made = rewrite(image, Wish("gzip"), host.blobs)
    assert next(iter(made.documents)) == made.digest != image.digest
    for was, now in zip(entries(image), entries(made), strict=True):
        assert was["digest"] != now["digest"]
        assert {**was, "digest": 0, "size": 0, "annotations": 0} == {**now, "digest": 0, "size": 0, "annotations": 0}
        data = made.documents[now["digest"].removeprefix("sha256:")]
        assert (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}") == (now["size"], now["digest"])
    for manifest, attestation in (entries(made)[:2], entries(made)[2:]):
        assert attestation["annotations"]["vnd.docker.reference.digest"] == manifest["digest"]
        content = host.document(made, attestation["digest"])
        statement = json.loads(host.blob(content["layers"][0]))
        assert statement["subject"][0]["digest"]["sha256"] == manifest["digest"].removeprefix("sha256:")
        assert statement["predicate"] == {"a": 1}
        assert json.loads(host.blob(content["config"]))["rootfs"]["diff_ids"] == [content["layers"][0]["digest"]]
    assert {blob.digest for blob in made.blobs} == {
        each["digest"].removeprefix("sha256:")
        for entry in entries(made)
        for content in [host.document(made, entry["digest"])]
        for each in (content["config"], *content["layers"])
    }
    assert rewrite(image, Wish("uncompressed"), host.blobs).documents == image.documents


def test_a_container_image_with_one_platform_is_single_though_attested(host: Host) -> None:
    image = host.index({"arm64": [make_layer(("a", "1"))]}, attested=True)
    assert not image.single().is_index
    assert image.single().digest == entries(image)[0]["digest"].removeprefix("sha256:")
    both = host.index({"arm64": [], "arm/v7": []})
    assert both.single() is both
