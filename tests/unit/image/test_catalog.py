"""The catalogue: what is shipped loads, what is wrong says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmbuild.errors import GuestImageError, UsageError
from vmbuild.image.catalog import find_catalog, list_bases, list_images, load_base, load_image
from vmbuild.model import ARCH_DEFAULTS, ApplianceSpec, Arch

SHIPPED = (find_catalog() / "debian-13-arm64.toml").read_text()


def write_image(folder: Path, text: str, name: str = "debian-13-arm64") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.toml").write_text(text)
    return folder


def test_the_default_image_loads() -> None:
    spec = load_image("debian-13-arm64")
    assert isinstance(spec, ApplianceSpec)
    assert (spec.arch, spec.kind, spec.folder) == (Arch.ARM64, "appliance", find_catalog())
    assert [repository.suite for repository in spec.repositories] == ["trixie", "trixie-updates", "trixie-security"]
    assert [repository.optional for repository in spec.repositories] == [False, True, True]
    assert all(keyring.is_file() for keyring in spec.keyrings)
    assert spec.guest_files.is_dir()


def test_the_image_of_32_bit_machines_loads() -> None:
    spec = load_image("debian-13-armhf")
    assert isinstance(spec, ApplianceSpec)
    assert (spec.arch, spec.cpu_model, spec.kernel) == (Arch.ARMHF, "cortex-a15", "linux-image-armmp-lpae")
    assert {repository.suite: repository.alias for repository in spec.repositories} == {
        "trixie": "stable",
        "trixie-updates": "stable-updates",
        "trixie-security": "stable-security",
    }
    assert [repository.suite for repository in spec.kernel_repositories] == ["bookworm", "bookworm-security"]


@pytest.mark.parametrize("arch", Arch)
def test_debian_12s_appliance_is_debian_13s_but_for_its_release_and_what_starts_containers(arch: Arch) -> None:
    older, newer = (load_image(f"debian-{release}-{arch}") for release in (12, 13))
    assert isinstance(older, ApplianceSpec) and isinstance(newer, ApplianceSpec)
    assert set(older.packages) ^ set(newer.packages) == {"crun", "runc"}
    assert set(newer.exclude) - set(older.exclude) == {"./usr/sbin/runc"}
    for key in ("arch", "kernel", "kernel_args", "without", "machine_type", "cpu_model", "guest_files"):
        assert getattr(older, key) == getattr(newer, key), key
    assert set(newer.modules) <= set(older.modules)
    assert (older.repositories[0].suite, older.repositories[0].only) == ("bookworm", ())
    assert {one.suite.partition("-")[0] for one in older.repositories if not one.only} == {"bookworm"}
    assert {one.suite.partition("-")[0] for one in older.repositories if one.only} == {"trixie"}
    assert {keyring.name for keyring in newer.keyrings} <= {keyring.name for keyring in older.keyrings}


def test_every_shipped_architecture_has_its_default_image() -> None:
    assert {arch: load_image(defaults.image).arch for arch, defaults in ARCH_DEFAULTS.items()} == {
        arch: arch for arch in Arch
    }


def test_a_kernel_comes_from_the_repositories_unless_it_has_its_own(tmp_path: Path) -> None:
    spec = load_image("debian-13-arm64")
    assert isinstance(spec, ApplianceSpec) and spec.kernel_repositories == ()
    with pytest.raises(GuestImageError, match=r"boot\.repositories is \[\]|boot\.repositories is empty"):
        text = SHIPPED.replace("[boot]\n", "[boot]\nrepositories = []\n")
        load_image("debian-13-arm64", [write_image(tmp_path / "own", text)])


def test_a_repository_may_be_there_for_some_packages_only(tmp_path: Path) -> None:
    text = SHIPPED.replace('suite = "trixie-updates"', 'suite = "trixie-updates"\nonly = ["docker.io", "crun"]')
    spec = load_image("debian-13-arm64", [write_image(tmp_path / "own", text)])
    assert isinstance(spec, ApplianceSpec)
    assert [repository.only for repository in spec.repositories] == [(), ("docker.io", "crun"), ()]


def test_every_shipped_row_is_sound() -> None:
    assert "debian-13-arm64" in [spec.name for spec in list_images()]
    appliances = [row for row in list_images() if isinstance(row, ApplianceSpec)]
    for repositories in [row.repositories for row in appliances] + [row.repositories for row in list_bases()]:
        assert not repositories[0].optional, "without its main repository nothing can be resolved"
        assert {repository.public_url.split("/")[2] for repository in repositories} <= {
            "ftp.debian.org",
            "security.debian.org",
        }


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        load_image("debian-12-mips")
    assert "debian-12-mips" in caught.value.brief
    assert "debian-13-arm64" in caught.value.resolution


def test_a_users_folder_comes_first_and_needs_no_keys_of_its_own(tmp_path: Path) -> None:
    own = write_image(tmp_path / "own", SHIPPED.replace("Debian 13 (trixie)", "Mine"))
    folders = [own, find_catalog()]
    spec = load_image("debian-13-arm64", folders)
    assert spec.description.startswith("Mine")
    assert spec.folder == own
    assert spec.guest_files == find_catalog() / "guest"
    assert [found.folder for found in list_images(folders) if found.name == spec.name] == [own]


def test_guest_files_and_keys_beside_a_users_file_win(tmp_path: Path) -> None:
    own = write_image(tmp_path / "own", SHIPPED)
    (own / "guest").mkdir()
    assert load_image("debian-13-arm64", [own]).guest_files == own / "guest"


@pytest.mark.parametrize(
    ("old", "new", "key", "expected"),
    [
        ('arch = "arm64"', 'arch = "mips"', "arch", "'arm64' or 'armhf'"),
        ('arch = "arm64"', "", "arch", "missing"),
        ('kind = "appliance"', 'kind = "floppy"', "kind", "appliance"),
        ('kind = "appliance"', "kind = 3", "kind", "text in quotes"),
        ('name = "debian-13-arm64"', 'name = "other"', "name", "'debian-13-arm64'"),
        ('name = "debian-13-arm64"', 'colour = "red"\nname = "debian-13-arm64"', "colour", "not a key"),
        ('"virtio_blk"', "7", "boot.modules", "list of texts"),
        ("optional = true", 'optional = "yes"', "repositories.optional", "true or false"),
        ('mirror = "debian"', 'mirror = "ubuntu"', "repositories.mirror", "'debian-security'"),
        ('suite = "trixie"', 'suit = "trixie"', "repositories.suite", "missing"),
        ('suite = "trixie"', 'suite = ""', "repositories.suite", "empty"),
        ('suite = "trixie"', 'suite = "trixie"\nonly = "docker.io"', "repositories.only", "list of texts"),
        ('suite = "trixie"', 'suite = "trixie"\nonly = [7]', "repositories.only", "list of texts"),
        ('suite = "trixie"', 'suite = "trixie"\nonly = []', "repositories.only", "one or more names of packages"),
        ('suite = "trixie"', 'suite = "trixie"\nonly = ["a1", ""]', "repositories.only", "is ['']"),
        ('suite = "trixie"', 'suite = "trixie"\nonly = ["Docker.io"]', "repositories.only", "is ['Docker.io']"),
        ('suite = "trixie"', 'suite = "trixie"\nonyl = ["docker.io"]', "repositories.onyl", "not a key"),
        ("[boot]", "[boots]", "boot", "missing"),
        ('cpu_model = "cortex-a76"', 'cpu_modell = "x"\ncpu_model = "cortex-a76"', "boot.cpu_modell", "not a key"),
        ("keys/debian-archive-trixie-stable.gpg", "keys/none.gpg", "keyrings", "not there"),
    ],
)
def test_a_wrong_file_says_which_key_and_what_is_expected(
    tmp_path: Path, old: str, new: str, key: str, expected: str
) -> None:
    assert old in SHIPPED
    folder = write_image(tmp_path / "own", SHIPPED.replace(old, new, 1))
    with pytest.raises(GuestImageError) as caught:
        load_image("debian-13-arm64", [folder])
    assert f"{folder / 'debian-13-arm64.toml'} is wrong: {key} " in caught.value.brief
    assert expected in caught.value.brief


def test_a_file_that_is_no_toml_is_told(tmp_path: Path) -> None:
    with pytest.raises(GuestImageError, match="cannot be read") as caught:
        load_image("debian-13-arm64", [write_image(tmp_path / "own", "name = \n")])
    assert "line 1" in caught.value.details


@pytest.mark.parametrize(
    "reference", ["debian:trixie-slim", "trixie-slim", "docker.io/library/debian:trixie-slim", "debian-trixie-slim"]
)
def test_a_base_image_has_several_names(reference: str) -> None:
    base = load_base(reference)
    assert base.repo_tag == "debian:trixie-slim"
    assert base.essential
    assert "apt" in base.packages


def test_an_unknown_base_image_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        load_base("alpine:3")
    assert "debian:bookworm-slim, debian:trixie-slim" in caught.value.resolution
