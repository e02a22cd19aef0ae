"""Rows of kind `disk`: what is read, and that none is taken whose disk nobody could verify."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmbuild.errors import GuestImageError
from vmbuild.image.catalog import find_shadowed, load_image
from vmbuild.model import Arch, ConsoleLogin, DiskSpec

HEX = "ab" * 32
ROW = f"""
name = "mine"
kind = "disk"
arch = "armhf"
description = "Mine"
url = "https://example.org/mine.img.xz"
digest = "sha256:{HEX}"
system = "apk"

[boot]
machine_type = "virt"
cpu_model = "cortex-a15"
"""
LOGIN = """
[login]
login_prompt = "login: $"
user = "root"
password_prompt = "Password: $"
password = "secret"
shell_prompt = "# $"
"""
SUMS = 'checksums = "https://example.org/SUMS"'
SIGNED = f'{SUMS}\nsignature = "https://example.org/SUMS.gpg"\nkeyrings = ["keys/ubuntu-cloudimage-keyring.gpg"]'
DIGEST = f'digest = "sha256:{HEX}"'


def read(folder: Path, text: str) -> DiskSpec:
    """Read a row."""
    folder.mkdir(exist_ok=True)
    (folder / "mine.toml").write_text(text)
    spec = load_image("mine", [folder])
    assert isinstance(spec, DiskSpec)
    return spec


def test_a_row_with_everything(tmp_path: Path) -> None:
    spec = read(tmp_path, ROW + LOGIN)
    assert (spec.name, spec.arch, spec.system) == ("mine", Arch.ARMHF, "apk")
    assert (spec.url, spec.digest) == ("https://example.org/mine.img.xz", f"sha256:{HEX}")
    assert (spec.machine_type, spec.cpu_model) == ("virt", "cortex-a15")
    assert spec.login == ConsoleLogin("login: $", "root", "Password: $", "secret", "# $")


@pytest.mark.parametrize("verified", [f'digest = "sha512:{HEX * 2}"', SUMS, SIGNED])
def test_each_way_of_verifying_is_enough(tmp_path: Path, verified: str) -> None:
    spec = read(tmp_path, ROW.replace(DIGEST, verified))
    assert spec.login is None, "it has cloud-init"
    assert len(spec.keyrings) == ("keyrings" in verified)


@pytest.mark.parametrize(
    ("url", "means"),
    [
        ("disks/my disk.img", "{folder}/disks/my%20disk.img"),
        ("/srv/disk.img", "/srv/disk.img"),
        ("file:///srv/disk.img", "/srv/disk.img"),
    ],
)
def test_a_file_of_this_host_needs_nobody_to_vouch_for_it(tmp_path: Path, url: str, means: str) -> None:
    spec = read(tmp_path, ROW.replace(DIGEST, "").replace("https://example.org/mine.img.xz", url))
    assert spec.url == f"file://{means.format(folder=tmp_path)}"
    assert (spec.digest, spec.checksums) == (None, None)


@pytest.mark.parametrize(
    ("old", "new", "key", "expected"),
    [
        (DIGEST, "", "digest", "is missing"),
        (DIGEST, 'digest = "sha256:12"', "digest", "sha256: or sha512:"),
        (DIGEST, f'digest = "md5:{"0" * 32}"', "digest", "sha256: or sha512:"),
        (DIGEST, f'digest = "{HEX}"', "digest", "sha256: or sha512:"),
        (DIGEST, f"{DIGEST}\n{SUMS}", "checksums", "says what digest says"),
        (DIGEST, 'checksums = "http://example.org/SUMS"', "checksums", "neither signed nor fetched over https"),
        (DIGEST, 'checksums = "ftp://example.org/SUMS"', "checksums", "an https or http URL"),
        (DIGEST, 'checksums = "file:///etc/sums"', "checksums", "an https or http URL"),
        (DIGEST, SIGNED.replace("https://example.org/SUMS.gpg", "SUMS.gpg"), "signature", "an https or http URL"),
        (DIGEST, f'{SUMS}\nsignature = "https://example.org/SUMS.gpg"', "keyrings", "whose is the signature"),
        (DIGEST, SIGNED.replace(SUMS, DIGEST), "signature", "checksums, which are missing"),
        (DIGEST, f'{SUMS}\nkeyrings = ["keys/ubuntu-cloudimage-keyring.gpg"]', "keyrings", "idle"),
        (DIGEST, SIGNED.replace("ubuntu-", "none-"), "keyrings", "not there"),
        (f'"https://example.org/mine.img.xz"\n{DIGEST}', f'"mine.img"\n{SUMS}', "checksums", "idle"),
        ("https://example.org/mine.img.xz", "ftp://example.org/mine.img", "url", "an https, http or file URL"),
        ("https://example.org/mine.img.xz", "https://example.org/", "url", "that of a file"),
        ('system = "apk"', 'system = "rpm"', "system", "'apt' or 'apk'"),
        ('system = "apk"', 'packages = []\nsystem = "apk"', "packages", "not a key"),
        ("[boot]", '[boot]\nkernel = "linux"', "boot.kernel", "not a key"),
        ('user = "root"', "", "login.user", "is missing"),
        ('"login: $"', '"login: ("', "login.login_prompt", "no regular expression"),
        ('user = "root"', 'user = "root"\nport = "1"', "login.port", "not a key"),
    ],
)
def test_a_wrong_row_says_which_key_and_what_is_expected(
    tmp_path: Path, old: str, new: str, key: str, expected: str
) -> None:
    assert old in ROW + LOGIN
    with pytest.raises(GuestImageError) as caught:
        read(tmp_path, (ROW + LOGIN).replace(old, new, 1))
    assert f"mine.toml is wrong: {key} " in caught.value.brief
    assert expected in caught.value.brief


def test_a_row_that_hides_others_knows_which(tmp_path: Path) -> None:
    read(tmp_path / "shipped", ROW)
    spec = read(tmp_path / "own", ROW)
    folders = [tmp_path / "own", tmp_path / "shipped"]
    assert load_image("mine", folders) == spec
    assert find_shadowed(spec, folders) == [tmp_path / "shipped" / "mine.toml"]
