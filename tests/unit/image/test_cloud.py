"""Disks from elsewhere: fetched once, verified, converted, kept; whatever goes wrong leaves nothing that is used."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import zstandard

from tests.unit.image.conftest import Behaviour, Keys, Site, drop_after, redirect, send, status, without_ranges
from tests.unit.image.disks import content_of, disk_spec, qcow2_disk, raw_disk
from tests.unit.listener import Listener
from vmbuild.errors import GuestImageError, HostError, UsageError
from vmbuild.image import cloud, disk, http, store, tries
from vmbuild.image.catalog import find_catalog, list_images
from vmbuild.image.fetch import NotFound, WrongDigest
from vmbuild.image.prune import prune
from vmbuild.image.signature import BadSignature
from vmbuild.model import DiskBoot, DiskSpec
from vmbuild.report import SilentReporter

PATH = "/cloud/latest/disk.qcow2"
SUMS = "/cloud/latest/SHA256SUMS"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again at once."""
    monkeypatch.setattr(cloud, "RETRY_PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a disk as a distribution publishes it."""
    return qcow2_disk(tmp_path_factory.mktemp("make"), None, "-c")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache folder that is not there yet."""
    return tmp_path / "cache"


@pytest.fixture
def spec(site: Site, published: bytes) -> DiskSpec:
    """Return a row of a disk that the site has, by checksums without a signature, over loopback."""
    site.files[PATH] = published
    site.files[SUMS] = f"{sha256(published)}  disk.qcow2\n".encode()
    return disk_spec(site.url + PATH, checksums=site.url + SUMS)


def get(spec: DiskSpec, cache: Path, listener: Listener | None = None) -> cloud.Fetched:
    return cloud.ensure(spec, cache, listener or SilentReporter())


def left(cache: Path) -> list[str]:
    """Return the names of all that lies in the folders of disks."""
    return sorted(path.name for folder in (cache / "disks").glob("*/") for path in folder.iterdir())


def in_store(found: cloud.Fetched) -> list[str]:
    return sorted([found.path.name, "facts.json"])


# --- what is good ---------------------------------------------------------------------------------------------------


def test_a_disk_is_fetched_converted_and_kept(
    site: Site, spec: DiskSpec, cache: Path, tmp_path: Path, published: bytes
) -> None:
    listener = Listener()
    found = get(spec, cache, listener)
    assert content_of(found.path, tmp_path) == raw_disk()
    assert (found.source, found.source_digest) == (spec.url, f"sha256:{sha256(published)}")
    assert (found.sha256, found.size_bytes) == (sha256(found.path.read_bytes()), found.path.stat().st_size)
    assert found.path.stat().st_mode & 0o222 == 0
    assert listener.meters == [("download", len(published))]
    assert listener.advanced == len(published)
    assert left(cache) == in_store(found), "the download is gone"


def test_what_is_there_asks_no_network(site: Site, spec: DiskSpec, cache: Path) -> None:
    found = get(spec, cache)
    site.requests.clear()
    assert get(spec, cache) == found
    assert cloud.find(spec, cache) == found
    assert site.requests == []


def test_the_store_gives_what_a_machine_boots(spec: DiskSpec, cache: Path) -> None:
    image = store.ensure(spec, {}, cache, SilentReporter())
    found = get(spec, cache)
    assert (image.name, image.digest, image.boot) == ("test", found.sha256, DiskBoot(found.path))
    assert store.find(spec, cache) is None, "what is made ready for machines is another"


@pytest.mark.parametrize(
    "behaviours",
    [
        [drop_after(40_000), drop_after(40_000)],
        [drop_after(40_000), without_ranges],
        [drop_after(40_000), status(416)],
        [status(503), drop_after(0)],
        [send(b"wrong")],
    ],
)
def test_a_bad_line_costs_time_only(
    site: Site, spec: DiskSpec, cache: Path, tmp_path: Path, behaviours: list[Behaviour]
) -> None:
    ask = without_ranges  # the first request asks for the size
    site.behaviours[PATH] = [ask, *behaviours]
    assert content_of(get(spec, cache).path, tmp_path) == raw_disk()


def test_an_interrupted_download_is_resumed_by_the_next_run(
    site: Site, spec: DiskSpec, cache: Path, published: bytes
) -> None:
    site.behaviours[PATH] = [without_ranges, drop_after(100_000), *[status(503)] * 5]
    with pytest.raises(tries.Unreachable) as caught:
        get(spec, cache)
    assert "Debian" not in caught.value.resolution
    assert any(name.endswith(".part") for name in left(cache))
    site.requests.clear()
    found = get(spec, cache)
    assert site.asked(PATH)[1].startswith("bytes=")
    assert left(cache) == in_store(found)


def test_a_redirect_is_followed(site: Site, spec: DiskSpec, cache: Path, published: bytes) -> None:
    site.files["/mirror/disk.qcow2"] = published
    site.behaviours[PATH] = [redirect("/mirror/disk.qcow2")] * 2
    assert get(spec, cache).source_digest == f"sha256:{sha256(published)}"


def test_two_at_once_fetch_once(site: Site, spec: DiskSpec, cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        first, second = pool.starmap(cloud.ensure, [(spec, cache, SilentReporter())] * 2)
    assert first == second
    assert len(site.asked(PATH)) == 2, "one for the size, one for the disk"


PACKS: dict[str, Callable[[bytes], bytes]] = {
    "xz": lambda data: lzma.compress(data),
    "gz": lambda data: gzip.compress(data),
    "zst": lambda data: zstandard.compress(data),
    "raw": lambda data: data,
}


@pytest.mark.parametrize("form", PACKS)
def test_compressed_and_raw_disks_are_taken(site: Site, cache: Path, tmp_path: Path, form: str) -> None:
    site.files["/disk.img"] = PACKS[form](raw_disk())
    spec = disk_spec(site.url + "/disk.img", digest=f"sha512:{hashlib.sha512(site.files['/disk.img']).hexdigest()}")
    assert content_of(get(spec, cache).path, tmp_path) == raw_disk()


def test_a_local_disk_is_taken_as_it_is(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "my disk,1.img"
    path.write_bytes(raw_disk())
    found = get(disk_spec(path.as_uri()), cache)
    assert found.source_digest == f"sha256:{sha256(raw_disk())}"
    assert path.exists()
    path.write_bytes(raw_disk(seed=2))
    assert get(disk_spec(path.as_uri()), cache) == found
    newer = cloud.ensure(disk_spec(path.as_uri()), cache, SilentReporter(), refresh=True)
    assert content_of(newer.path, tmp_path) == raw_disk(seed=2)
    assert left(cache) == in_store(newer)


@pytest.mark.parametrize("digest", [f"sha256:{'0' * 64}", f"sha512:{'0' * 128}"])
def test_a_local_disk_that_is_another_is_refused(cache: Path, tmp_path: Path, digest: str) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(raw_disk())
    with pytest.raises(WrongDigest) as caught:
        get(disk_spec(path.as_uri(), digest=digest), cache)
    assert "correct `digest` in the row test" in caught.value.resolution
    with pytest.raises(UsageError, match="there is no disk"):
        get(disk_spec((tmp_path / "none.img").as_uri()), cache)
    assert left(cache) == []


# --- what is not verified is not used -------------------------------------------------------------------------------


def test_wrong_bytes_are_an_error_and_are_not_kept(site: Site, spec: DiskSpec, cache: Path) -> None:
    site.files[PATH] = b"something else"
    with pytest.raises(WrongDigest) as caught:
        get(spec, cache)
    assert "VMBUILD_MIRROR" not in caught.value.resolution
    assert "expected SHA-256" in caught.value.details
    assert [name for name in left(cache) if "lock" not in name] == []


def test_a_disk_that_changed_under_our_feet_is_asked_for_once_more(
    site: Site, spec: DiskSpec, cache: Path, published: bytes, tmp_path: Path
) -> None:
    newer = qcow2_disk(tmp_path / "make", raw_disk(seed=3))
    site.files[PATH] = newer
    site.behaviours[SUMS] = [send(f"{sha256(published)}  disk.qcow2\n".encode())]
    site.files[SUMS] = f"{sha256(newer)}  disk.qcow2\n".encode()
    listener = Listener()
    assert get(spec, cache, listener).source_digest == f"sha256:{sha256(newer)}"
    assert any("out of step" in step for step in listener.steps)


def test_a_disk_that_is_not_there_says_so(site: Site, spec: DiskSpec, cache: Path) -> None:
    del site.files[PATH]
    with pytest.raises(NotFound) as caught:
        get(spec, cache)
    assert "row test" in caught.value.resolution
    del site.files[SUMS]
    with pytest.raises(NotFound):
        get(spec, cache)


@pytest.fixture
def signed(site: Site, spec: DiskSpec, keys: Keys) -> DiskSpec:
    """Return a row whose checksums have a signature beside them."""
    site.files[SUMS + ".gpg"] = keys.gpg("--local-user", "archive@test.invalid", "-b", stdin=site.files[SUMS])
    return replace(spec, signature=site.url + SUMS + ".gpg", keyrings=(keys.export("archive"),))


def test_a_signature_beside_the_checksums_is_verified(signed: DiskSpec, cache: Path) -> None:
    assert get(signed, cache).path.exists()


def test_an_armoured_signature_is_one_too(site: Site, signed: DiskSpec, keys: Keys, cache: Path) -> None:
    argv = ("--armor", "--local-user", "archive@test.invalid", "-b")
    site.files[SUMS + ".gpg"] = keys.gpg(*argv, stdin=site.files[SUMS])
    assert get(signed, cache).path.exists()


def test_a_signature_within_the_checksums_is_verified(site: Site, signed: DiskSpec, keys: Keys, cache: Path) -> None:
    site.files[SUMS] = keys.sign(site.files[SUMS].decode(), "archive")
    within = replace(signed, signature=signed.checksums)
    assert get(within, cache).path.exists()
    site.files[SUMS] = site.files[SUMS].replace(b"disk.qcow2", b"disk.qcow3")
    with pytest.raises(BadSignature, match="altered"):
        get(replace(within, name="other"), cache)


def test_what_is_outside_a_signature_does_not_count(site: Site, signed: DiskSpec, keys: Keys, cache: Path) -> None:
    lines = site.files[SUMS]
    site.files[SUMS] = lines + keys.sign("nothing of interest\n", "archive")
    with pytest.raises(GuestImageError):
        get(replace(signed, signature=signed.checksums), cache)
    assert not site.asked(PATH)


def test_checksums_that_were_altered_or_signed_by_others_are_refused(
    site: Site, signed: DiskSpec, keys: Keys, cache: Path
) -> None:
    sums = site.files[SUMS]
    good = site.files[SUMS + ".gpg"]
    for content, signature, problem in (
        (b"# more\n" + sums, good, "altered"),
        (sums, keys.gpg("--local-user", "stranger@test.invalid", "-b", stdin=sums), "catalogue does not have"),
        (sums, b"", "not signed"),
        (sums, b"nonsense", "not signed"),
    ):
        site.files |= {SUMS: content, SUMS + ".gpg": signature}
        with pytest.raises(BadSignature, match=problem) as caught:
            get(signed, cache)
        assert "Debian" not in caught.value.resolution
    assert not site.asked(PATH), "nothing was downloaded"


@pytest.mark.parametrize("missing", [SUMS, SUMS + ".gpg"])
def test_what_cannot_be_verified_is_not_fetched(site: Site, signed: DiskSpec, cache: Path, missing: str) -> None:
    del site.files[missing]
    with pytest.raises(NotFound):
        get(signed, cache)
    assert not site.asked(PATH)


def test_unsigned_checksums_may_not_come_over_plain_http_by_a_detour(
    site: Site, spec: DiskSpec, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(http, "is_protected", lambda url: not url.endswith("/plain"))

    site.files["/plain"] = site.files[SUMS]
    site.behaviours[SUMS] = [redirect("/plain")]
    with pytest.raises(GuestImageError, match="not protected by TLS"):
        get(spec, cache)


def test_a_hostile_disk_is_refused_though_its_digest_is_right(site: Site, cache: Path, tmp_path: Path) -> None:
    hostile = bytearray(qcow2_disk(tmp_path / "make"))
    name = b"/etc/passwd"
    hostile[8:20] = (1024).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    hostile[1024 : 1024 + len(name)] = name
    site.files["/disk.img"] = bytes(hostile)
    spec = disk_spec(site.url + "/disk.img", digest=f"sha256:{sha256(bytes(hostile))}")
    with pytest.raises(GuestImageError, match="backing file"):
        get(spec, cache)
    assert not [name for name in left(cache) if name.endswith((".qcow2", ".json"))]


# --- the host -------------------------------------------------------------------------------------------------------


def test_no_room_for_the_download_is_told_before_it_begins(
    site: Site, spec: DiskSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(HostError, match="the disk is full"):
        get(spec, cache)
    assert left(cache) == []


def test_a_conversion_that_is_interrupted_leaves_the_download_only(
    site: Site, spec: DiskSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path, form: str, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk, "convert", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get(spec, cache)
    assert [name.partition("-")[0] for name in left(cache)] == ["download"]
    (cloud.folder_of(spec, cache) / ".convert~killed").mkdir()  # as a kill leaves it
    site.requests.clear()
    found = get(spec, cache)
    assert site.served_bytes and len(site.asked(PATH)) == 1, "asked for its size, not fetched again"
    assert left(cache) == in_store(found)


def test_a_disk_that_is_damaged_in_the_cache_is_found_and_fetched_again(spec: DiskSpec, cache: Path) -> None:
    found = get(spec, cache)
    assert cloud.is_whole(found)
    assert [check.problem for check in store.verify(cache)] == [""]
    found.path.chmod(0o644)
    data = bytearray(found.path.read_bytes())
    data[-1] ^= 1
    found.path.write_bytes(data)
    assert [(check.name, check.problem) for check in store.verify(cache)] == [
        ("test, as fetched", "the disk was changed")
    ]
    found.path.write_bytes(b"short")
    assert cloud.find(spec, cache) is None
    assert get(spec, cache) == found


# --- newer ones, and none -------------------------------------------------------------------------------------------


def test_refreshing_takes_a_newer_disk_and_leaves_an_old_one_when_there_is_none(
    site: Site, spec: DiskSpec, cache: Path, tmp_path: Path
) -> None:
    old = get(spec, cache)
    site.requests.clear()
    assert cloud.ensure(spec, cache, SilentReporter(), refresh=True) == old
    assert site.asked(PATH) == [], "the checksums tell that it is the same"
    newer = qcow2_disk(tmp_path / "make", raw_disk(seed=3))
    site.files |= {PATH: newer, SUMS: f"{sha256(newer)}  disk.qcow2\n".encode()}
    assert get(spec, cache) == old, "nobody asked for a newer one"
    site.behaviours[SUMS] = [status(404)]
    with pytest.raises(NotFound):
        cloud.ensure(spec, cache, SilentReporter(), refresh=True)
    assert cloud.find(spec, cache) == old
    found = cloud.ensure(spec, cache, SilentReporter(), refresh=True)
    assert content_of(found.path, tmp_path) == raw_disk(seed=3)
    assert left(cache) == in_store(found)


def test_a_guest_image_is_made_anew_of_a_newer_disk_only(
    site: Site, spec: DiskSpec, cache: Path, tmp_path: Path
) -> None:
    found = get(spec, cache)
    pointer = store.pointer_of(spec, cache)
    pointer.parent.mkdir(parents=True)
    with store.workspace(cache, spec.name) as folder:
        shutil.copyfile(found.path, folder / "disk.qcow2")
        image = store.publish(spec, cache, folder, {"source_digest": found.source_digest})
    assert pruned(cache, spec) == [("disk", True)], "it was needed on the way only"
    site.requests.clear()
    with store.renewing(spec, cache, SilentReporter()):
        assert store.find(spec, cache) == image
    assert site.asked(PATH) == [], "what it was made of is still the newest"
    newer = qcow2_disk(tmp_path / "make", raw_disk(seed=3))
    site.files |= {PATH: newer, SUMS: f"{sha256(newer)}  disk.qcow2\n".encode()}
    with pytest.raises(KeyboardInterrupt), store.renewing(spec, cache, SilentReporter()):
        assert not pointer.exists()
        raise KeyboardInterrupt
    assert store.find(spec, cache) == image


def pruned(cache: Path, *specs: DiskSpec, everything: bool = False, needed: str = "") -> list[tuple[str, bool]]:
    who = {needed: "the machine box"} if needed else {}
    freed = prune(specs, cache, SilentReporter(), everything=everything, needed=who)
    return [(each.what, each.size_bytes > 0) for each in freed]


def test_prune_frees_disks_and_partial_downloads(site: Site, spec: DiskSpec, cache: Path) -> None:
    found = get(spec, cache)
    assert pruned(cache, spec) == []
    part = cloud.folder_of(spec, cache) / "download-x.part"
    part.write_bytes(b"x" * 5000)
    assert pruned(cache, spec) == [("downloads", True)]
    assert left(cache) == in_store(found)
    assert pruned(cache, spec, everything=True, needed=found.sha256) == []
    assert pruned(cache, replace(spec, name="another")) == [("disk", True)]
    get(spec, cache)
    assert pruned(cache, spec, everything=True) == [("disk", True)]
    assert left(cache) == []


def test_prune_frees_what_came_of_a_row_that_is_gone(site: Site, spec: DiskSpec, cache: Path) -> None:
    site.behaviours[PATH] = [without_ranges, drop_after(100_000), *[status(503)] * 5]
    with pytest.raises(tries.Unreachable):
        get(spec, cache)
    assert pruned(cache) == [("downloads", True)]


# --- the shipped rows -----------------------------------------------------------------------------------------------

SHIPPED = [row for row in list_images([find_catalog()]) if isinstance(row, DiskSpec)]


def test_the_shipped_disks_are_these() -> None:
    assert {row.name: (str(row.arch), row.system) for row in SHIPPED} == {
        "alpine-3.22-arm64": ("arm64", "apk"),
        "debian-12-cloud-arm64": ("arm64", "apt"),
        "debian-13-cloud-arm64": ("arm64", "apt"),
        "ubuntu-24.04-arm64": ("arm64", "apt"),
        "ubuntu-24.04-armhf": ("armhf", "apt"),
    }
    for row in SHIPPED:
        assert {urlsplit(url).scheme for url in (row.url, row.checksums, row.signature) if url} == {"https"}


@pytest.mark.parametrize("row", SHIPPED, ids=lambda row: row.name)
def test_each_shipped_row_is_fetched_from_a_server_like_its_publishers(
    row: DiskSpec, site: Site, keys: Keys, cache: Path, published: bytes
) -> None:
    """The files are named as the publishers name them; only the host differs, and the key of a signature."""
    assert row.checksums is not None
    local = {url: f"{site.url}{urlsplit(url).path}" for url in (row.url, row.checksums, row.signature) if url}
    algorithm = "sha256" if "SHA256" in row.checksums else "sha512"
    digest = hashlib.new(algorithm, published).hexdigest()
    name = row.url.rpartition("/")[2]
    alone = row.checksums == f"{row.url}.sha512"
    text = f"{digest}\n" if alone else f"{'0' * len(digest)} *other-{name}\n{digest} *{name}\n"
    site.files |= {urlsplit(row.url).path: published, urlsplit(row.checksums).path: text.encode()}
    spec = replace(row, url=local[row.url], checksums=local[row.checksums])
    if row.signature:
        signature = keys.gpg("--local-user", "archive@test.invalid", "-b", stdin=text.encode())
        site.files[urlsplit(row.signature).path] = signature
        with pytest.raises(BadSignature, match="catalogue does not have"):  # the shipped key is Ubuntu's
            get(replace(spec, signature=local[row.signature]), cache)
        spec = replace(spec, signature=local[row.signature], keyrings=(keys.export("archive"),))
    assert get(spec, cache).source_digest == f"{algorithm}:{digest}"


def test_facts_in_the_cache_name_no_credentials(site: Site, spec: DiskSpec, cache: Path) -> None:
    secret = replace(spec, url=spec.url.replace("http://", "http://user:password@"))
    found = get(secret, cache)
    assert "password" not in json.dumps(str(found)) + (found.path.parent / "facts.json").read_text()
