"""A guest image given by a path or a URL: its row is made up, and nothing that cannot be verified is taken."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.unit.image.conftest import Site, redirect, status
from tests.unit.image.disks import content_of, qcow2_disk, raw_disk
from vmbuild.errors import GuestImageError, UsageError
from vmbuild.image import catalog, cloud, given, http, tries
from vmbuild.image.fetch import WrongDigest
from vmbuild.model import Arch, DiskSpec
from vmbuild.report import SilentReporter

PATH = "/disks/My%20Disk.qcow2"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache folder that is not there yet."""
    return tmp_path / "cache"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return a disk of the user's own, in a folder whose name needs quoting."""
    path = tmp_path / 'my "disks" 100% #1' / "Mine.qcow2"
    path.parent.mkdir()
    path.write_bytes(qcow2_disk(tmp_path / "make"))
    return path


def row(image: str, cache: Path, arch: Arch = Arch.ARM64) -> DiskSpec:
    found = given.find_row(image, cache, arch=arch)
    assert isinstance(found, DiskSpec)
    return found


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_path_is_a_disk_with_its_digest(disk: Path, cache: Path, tmp_path: Path) -> None:
    spec = row(str(disk), cache)
    digest = sha256(disk.read_bytes())
    assert (spec.name, spec.digest, spec.system) == (f"mine-{digest[:8]}", f"sha256:{digest}", "apt")
    assert (spec.arch, spec.machine_type, spec.cpu_model, spec.login) == ("arm64", "virt", "cortex-a76", None)
    fetched = cloud.ensure(spec, cache, SilentReporter())
    assert content_of(fetched.path, tmp_path) == raw_disk()
    assert row(str(disk), cache) == spec
    assert given.find_row(spec.name, cache) == spec, "its name is known from then on"
    assert spec in catalog.list_images(catalog.find_folders(cache))


def test_a_path_may_be_relative(disk: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(disk.parent)
    assert row("./Mine.qcow2", cache) == row(str(disk), cache)


def test_another_architecture_is_another_row(disk: Path, cache: Path) -> None:
    spec, other = row(str(disk), cache), row(str(disk), cache, Arch.ARMHF)
    assert (other.name, other.arch, other.cpu_model) == (f"{spec.name}-armhf", "armhf", "cortex-a15")


def test_a_file_that_changes_is_another_disk(disk: Path, cache: Path, tmp_path: Path) -> None:
    spec = row(str(disk), cache)
    assert not given.is_outdated(spec, cache)
    disk.write_bytes(qcow2_disk(tmp_path / "make", raw_disk(seed=2)))
    assert row(str(disk), cache).digest != spec.digest
    assert given.is_outdated(spec, cache)
    with pytest.raises(WrongDigest, match="not the disk"):
        cloud.ensure(spec, cache, SilentReporter())


def test_a_file_is_hashed_once(disk: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = row(str(disk), cache)
    monkeypatch.setattr(given, "hash_file", lambda *_: pytest.fail("hashed again"))
    assert row(str(disk), cache) == spec
    disk.unlink()
    assert given.is_outdated(spec, cache)


def test_a_damaged_memory_of_digests_is_made_anew(disk: Path, cache: Path) -> None:
    spec = row(str(disk), cache)
    for damage in (
        b"\xff",
        b"[]",
        b"null",
        b"[1]",
        json.dumps({str(disk): 1}).encode(),
        json.dumps({str(disk): []}).encode(),
    ):
        (cache / "given" / "digests.json").write_bytes(damage)
        assert row(str(disk), cache) == spec


@pytest.mark.parametrize("image", ["./none.qcow2", "/", "~/none/of/this.img"])
def test_a_path_without_a_disk_is_told(image: str, cache: Path) -> None:
    with pytest.raises(UsageError, match="that can be read"):
        given.find_row(image, cache)
    assert not cache.exists()


def test_a_name_is_the_catalogues(cache: Path) -> None:
    assert given.find_row("debian-13-arm64", cache).kind == "appliance"
    with pytest.raises(UsageError, match="no guest image named") as caught:
        given.find_row("mine.qcow2", cache)
    assert "./mine.qcow2" in caught.value.resolution


@pytest.mark.parametrize("separator", ["=", ":"])
def test_a_url_with_a_digest_is_verified_by_it(
    site: Site, cache: Path, disk: Path, tmp_path: Path, separator: str
) -> None:
    site.files[PATH] = disk.read_bytes()
    digest = hashlib.sha512(disk.read_bytes()).hexdigest()
    spec = row(f"{site.url}{PATH}#sha512{separator}{digest}", cache)
    assert (spec.name, spec.digest) == (f"my-disk-{digest[:8]}", f"sha512:{digest}")
    assert site.requests == [], "nothing is fetched before it is needed"
    assert content_of(cloud.ensure(spec, cache, SilentReporter()).path, tmp_path) == raw_disk()


def test_a_url_with_the_digest_of_another_is_refused(site: Site, cache: Path, disk: Path) -> None:
    site.files[PATH] = disk.read_bytes()
    spec = row(f"{site.url}{PATH}#sha256={sha256(b'another')}", cache)
    with pytest.raises(WrongDigest):
        cloud.ensure(spec, cache, SilentReporter())
    assert cloud.find(spec, cache) is None


@pytest.mark.parametrize("fragment", ["sha256=", "sha256=12", "md5=" + "0" * 32, "x", "sha512=" + "0" * 64])
def test_a_digest_that_is_none_is_refused(fragment: str, cache: Path) -> None:
    with pytest.raises(UsageError, match="is no digest") as caught:
        given.find_row(f"https://example.org/disk.img#{fragment}", cache)
    assert "#sha256=HEX" in caught.value.resolution


@pytest.mark.parametrize("url", ["ftp://example.org/disk.img", "https://example.org/", "https://example.org"])
def test_a_url_that_leads_to_no_file_is_refused(url: str, cache: Path) -> None:
    with pytest.raises(UsageError, match="is no disk"):
        given.find_row(url, cache)


@pytest.mark.parametrize(
    ("beside", "text"),
    [
        ("/disks/My%20Disk.qcow2.sha256", "{digest}\n"),
        ("/disks/SHA256SUMS", "{other}  another\n{digest} *My Disk.qcow2\n"),
        ("/disks/CHECKSUM", "SHA256 (My Disk.qcow2) = {digest}\n"),
    ],
)
def test_checksums_beside_a_disk_are_found(site: Site, cache: Path, disk: Path, beside: str, text: str) -> None:
    site.files[PATH] = disk.read_bytes()
    site.files[beside] = text.format(digest=sha256(disk.read_bytes()), other="0" * 64).encode()
    spec = row(site.url + PATH, cache)
    assert spec.checksums == site.url + beside
    assert cloud.ensure(spec, cache, SilentReporter()).source_digest == f"sha256:{sha256(disk.read_bytes())}"
    site.requests.clear()
    assert row(site.url + PATH, cache) == spec
    assert site.requests == [], "a disk in the cache needs no network"


def test_a_url_that_nothing_vouches_for_is_refused(site: Site, cache: Path, disk: Path) -> None:
    site.files[PATH] = disk.read_bytes()
    site.files["/disks/SHA256SUMS"] = b"0" * 64 + b"  Another Disk.qcow2\n"
    with pytest.raises(UsageError, match="no file of checksums beside it has one") as caught:
        given.find_row(site.url + PATH, cache)
    assert "URL#sha256=HEX" in caught.value.resolution
    assert site.asked(PATH) == []
    assert not cache.exists()


def test_checksums_over_plain_http_vouch_for_nothing(cache: Path) -> None:
    with pytest.raises(UsageError, match="does not come over https"):
        given.find_row("http://user:secret@example.org/disk.img", cache)


def test_refusals_do_not_tell_credentials(cache: Path) -> None:
    with pytest.raises(UsageError) as caught:
        given.find_row("http://user:secret@example.org/disk.img", cache)
    assert "secret" not in str(caught.value)


def test_checksums_by_a_detour_over_plain_http_are_refused(
    site: Site, cache: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "is_protected", lambda url: "/weak" not in url)
    site.files["/weak"] = f"{sha256(disk.read_bytes())}  My Disk.qcow2\n".encode()
    site.behaviours[f"{PATH}.sha256"] = [redirect("/weak")]
    with pytest.raises(GuestImageError, match="not protected by TLS"):
        given.find_row(site.url + PATH, cache)


def test_a_server_that_is_away_is_told_without_advice_on_debians_mirrors(site: Site, cache: Path) -> None:
    site.behaviours[f"{PATH}.sha256"] = [status(503)] * 9
    with pytest.raises(tries.Unreachable) as caught:
        given.find_row(site.url + PATH, cache)
    assert caught.value.resolution.startswith("Check the network")
    assert "MIRROR" not in caught.value.resolution


def test_rows_are_nobody_elses_to_read(disk: Path, cache: Path) -> None:
    spec = row(str(disk), cache)
    assert (cache / "given").stat().st_mode & 0o077 == 0
    assert (cache / "given" / f"{spec.name}.toml").stat().st_mode & 0o077 == 0
