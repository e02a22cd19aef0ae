"""The cache of guest images: whole, read-only, assembled once, and nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.listener import Listener
from vmbuild.errors import GuestImageError, HostError
from vmbuild.image import appliance, debian, fetch, packages, store
from vmbuild.image.packages import Package
from vmbuild.image.prune import prune
from vmbuild.image.store import Check, ensure, find, recipe_digest, verify
from vmbuild.model import ApplianceSpec, Arch, GuestImage, KernelBoot, Repository
from vmbuild.report import Reporter, SilentReporter

CONTENT = {"kernel": b"the kernel", "initrd": b"the initrd", "root.squashfs": b"the root file system"}
PACKAGE = Package("tool", "1.0", "arm64", "ab" * 32, 1, "", "", "", "", False, "optional", "")


class Assembler:
    """Stands in for `appliance.assemble`: writes small files, counts, and fails on demand."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.meanwhile: Callable[[Path], None] = lambda _: None
        self.failure: BaseException | None = None

    def __call__(
        self, spec: ApplianceSpec, packages: Sequence[Package], downloads: Path, folder: Path, report: Reporter
    ) -> dict[str, str]:
        with self.log.open("a") as log:
            log.write(f"{spec.name}\n")
        (folder / "kernel").write_bytes(CONTENT["kernel"])
        self.meanwhile(folder)
        if self.failure:
            raise self.failure
        for part, data in CONTENT.items():
            (folder / part).write_bytes(data)
        return {"kernel_release": "6.12-test"}

    @property
    def runs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def assembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Assembler:
    """Put the stand-in in the place of assembling and of fetching packages."""
    made = Assembler(tmp_path / "assembled.log")
    monkeypatch.setattr(appliance, "assemble", made)
    monkeypatch.setattr(store, "fetch_packages", lambda *_: (PACKAGE,))
    return made


@pytest.fixture
def spec(tmp_path: Path) -> ApplianceSpec:
    """Return a row of the catalogue with one guest file."""
    guest = tmp_path / "guest"
    (guest / "root").mkdir(parents=True)
    (guest / "root" / "boot").write_text("#!/bin/sh\n")
    return ApplianceSpec(
        name="test",
        arch=Arch.ARM64,
        description="a test",
        folder=tmp_path,
        repositories=(),
        keyrings=(),
        packages=("tool",),
        without=(),
        exclude=(),
        kernel="linux-image-test",
        kernel_repositories=(),
        modules=("ext4",),
        guest_files=guest,
        machine_type="virt",
        cpu_model="cortex-a76",
        kernel_args=("quiet",),
    )


DEBIAN = Repository("trixie", "debian", "http://ftp.debian.org/debian")
OLDER = Repository("bookworm", "debian", "http://ftp.debian.org/debian")


@pytest.mark.parametrize(
    ("kernel_from", "asked"),
    [
        ((), [("trixie", ["tool", "linux-image-test"])]),
        ((OLDER,), [("trixie", ["tool"]), ("bookworm", ["linux-image-test"])]),
    ],
)
def test_the_kernel_is_from_where_the_row_says(
    spec: ApplianceSpec,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel_from: tuple[Repository, ...],
    asked: list[tuple[str, list[str]]],
) -> None:
    found: list[tuple[str, list[str]]] = []

    def resolve(suites: list[str], wanted: Sequence[str], without: Sequence[str]) -> tuple[Package, ...]:
        assert tuple(without) == ("adduser",)
        found.append((" ".join(suites), list(wanted)))
        return (PACKAGE,)

    monkeypatch.setattr(debian, "open_indexes", lambda repositories, *_: [each.suite for each in repositories])
    monkeypatch.setattr(packages, "resolve_closure", resolve)
    monkeypatch.setattr(fetch, "fetch_all", lambda *_, **__: None)
    row = replace(spec, without=("adduser",), repositories=(DEBIAN,), kernel_repositories=kernel_from)
    assert store.fetch_packages(row, {}, cache, SilentReporter()) == (PACKAGE,) * len(asked)
    assert found == asked


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache folder that is not there yet."""
    return tmp_path / "cache"


def make(spec: ApplianceSpec, cache: Path) -> GuestImage:
    return ensure(spec, {}, cache, SilentReporter())


def boot_of(image: GuestImage) -> KernelBoot:
    assert isinstance(image.boot, KernelBoot)
    return image.boot


def folders(cache: Path) -> list[str]:
    """Return the names of all folders among the images, hidden ones too."""
    return sorted(path.name for path in (cache / "images").iterdir() if path.is_dir())


# --- ensure ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("assembler")
def test_guest_image_has_what_a_machine_needs(spec: ApplianceSpec, cache: Path) -> None:
    image = make(spec, cache)
    folder = cache / "images" / image.digest
    assert image == GuestImage(
        name="test",
        digest=hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        arch=Arch.ARM64,
        machine_type="virt",
        cpu_model="cortex-a76",
        boot=KernelBoot(folder / "kernel", folder / "initrd", folder / "root.squashfs", ("quiet",)),
        size_bytes=sum(map(len, CONTENT.values())),
    )
    assert {
        path.name: path.read_bytes() for path in (boot_of(image).kernel, boot_of(image).initrd, boot_of(image).root)
    } == CONTENT


@pytest.mark.usefixtures("assembler")
def test_manifest_says_what_went_in(spec: ApplianceSpec, cache: Path) -> None:
    manifest = json.loads((boot_of(make(spec, cache)).kernel.parent / "manifest.json").read_text())
    assert manifest == {
        "name": "test",
        "arch": "arm64",
        "recipe": recipe_digest(spec),
        "kernel_release": "6.12-test",
        "packages": [{"name": "tool", "version": "1.0", "sha256": "ab" * 32}],
        "files": {
            part: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for part, data in CONTENT.items()
        },
    }


def test_second_ensure_finds_the_first(spec: ApplianceSpec, cache: Path, assembler: Assembler) -> None:
    assert find(spec, cache) is None
    first = make(spec, cache)
    assert make(spec, cache) == first == find(spec, cache)
    assert assembler.runs == 1


@pytest.mark.usefixtures("assembler")
def test_published_files_are_read_only_and_nothing_else_is_left(spec: ApplianceSpec, cache: Path) -> None:
    image = make(spec, cache)
    modes = {path.name: path.stat().st_mode & 0o777 for path in boot_of(image).kernel.parent.iterdir()}
    assert modes == dict.fromkeys([*CONTENT, "manifest.json"], 0o444)
    assert boot_of(image).kernel.parent.stat().st_mode & 0o777 == 0o755
    assert folders(cache) == [image.digest]


@pytest.mark.usefixtures("assembler")
def test_nothing_is_found_before_the_last_file_is_there(spec: ApplianceSpec, cache: Path, assembler: Assembler) -> None:
    seen: list[GuestImage | None] = []
    assembler.meanwhile = lambda _: seen.append(find(spec, cache))
    make(spec, cache)
    assert seen == [None]


def test_two_threads_at_once_assemble_once(
    spec: ApplianceSpec, cache: Path, assembler: Assembler, listener: Listener
) -> None:
    inside, found = threading.Event(), list[GuestImage]()

    def wait_for_the_other(_: Path) -> None:
        inside.set()
        limit = time.monotonic() + 10
        while not listener.steps and time.monotonic() < limit:
            time.sleep(0.005)

    assembler.meanwhile = wait_for_the_other
    first = threading.Thread(target=lambda: found.append(make(spec, cache)))
    first.start()
    assert inside.wait(10)
    found.append(ensure(spec, {}, cache, listener))
    first.join()
    assert listener.steps == ["Waiting for another vmbuild that assembles test"]
    assert assembler.runs == 1
    assert len(found) == 2 and found[0] == found[1]


def test_many_processes_at_once_assemble_once(spec: ApplianceSpec, cache: Path, assembler: Assembler) -> None:
    assembler.meanwhile = lambda _: time.sleep(0.2)
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)

    def work() -> None:
        barrier.wait(10)
        make(spec, cache)

    workers = [fork.Process(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert assembler.runs == 1
    assert find(spec, cache) is not None


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GuestImageError("bad"), RuntimeError("a bug")], ids=repr)
def test_interrupted_assembly_leaves_nothing_and_the_next_one_works(
    spec: ApplianceSpec, cache: Path, assembler: Assembler, error: BaseException
) -> None:
    assembler.failure = error
    with pytest.raises(type(error)) as caught:
        make(spec, cache)
    assert caught.value is error
    assert find(spec, cache) is None
    assert folders(cache) == []
    assembler.failure = None
    assert boot_of(make(spec, cache)).kernel.read_bytes() == CONTENT["kernel"]


def leave_workspace(spec: ApplianceSpec, cache: Path, assembler: Assembler) -> Path:
    """Return the folder that a run leaves when it is killed: the one that it assembled in, with something in it."""
    used: list[Path] = []
    assembler.meanwhile, assembler.failure = used.append, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        make(spec, cache)
    assembler.meanwhile, assembler.failure = lambda _: None, None
    used[0].mkdir()
    (used[0] / "kernel").write_bytes(b"half")
    return used[0]


def test_remains_of_a_killed_run_are_cleared_away(spec: ApplianceSpec, cache: Path, assembler: Assembler) -> None:
    remains = leave_workspace(spec, cache, assembler)
    assert folders(cache) == [remains.name]
    assert find(spec, cache) is None
    image = make(spec, cache)
    assert folders(cache) == [image.digest]


def test_work_of_another_row_is_left_alone(spec: ApplianceSpec, cache: Path, assembler: Assembler) -> None:
    """Two rows may be assembled at once: each has a lock of its own."""
    other = replace(spec, name="test-armhf")

    def assemble_the_shorter_name(folder: Path) -> None:
        assembler.meanwhile = lambda _: None
        make(spec, cache)
        assert (folder / "kernel").exists()

    assembler.meanwhile = assemble_the_shorter_name
    assert make(other, cache).name == "test-armhf"
    assert assembler.runs == 2


def test_full_disk_is_the_hosts_fault(spec: ApplianceSpec, cache: Path, assembler: Assembler) -> None:
    assembler.failure = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(HostError, match="cannot write the guest image: No space left on device") as caught:
        make(spec, cache)
    assert str(cache / "images") in caught.value.resolution
    assert folders(cache) == []


@pytest.mark.usefixtures("assembler")
def test_folder_that_cannot_be_made_is_the_hosts_fault(
    spec: ApplianceSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(HostError, match="Permission denied"):
        make(spec, cache)


@pytest.mark.usefixtures("assembler")
def test_file_in_the_place_of_the_cache_is_the_hosts_fault(spec: ApplianceSpec, cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(HostError):
        make(spec, cache)


@pytest.mark.usefixtures("assembler")
def test_workspace_that_cannot_be_made_is_the_hosts_fault(
    spec: ApplianceSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(HostError, match="No space left"):
        make(spec, cache)


@pytest.mark.usefixtures("assembler")
def test_lock_is_free_after_a_failure(
    spec: ApplianceSpec, cache: Path, assembler: Assembler, listener: Listener
) -> None:
    assembler.failure = GuestImageError("bad")
    with pytest.raises(GuestImageError):
        make(spec, cache)
    assembler.failure = None
    ensure(spec, {}, cache, listener)
    assert listener.steps == []


# --- damage ---------------------------------------------------------------------------------------------------------


def damage(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.usefixtures("assembler")
def test_file_of_another_size_is_a_damaged_image(spec: ApplianceSpec, cache: Path) -> None:
    image = make(spec, cache)
    damage(boot_of(image).root, CONTENT["root.squashfs"][:-1])
    with pytest.raises(GuestImageError, match=r"damaged: root\.squashfs has another size") as caught:
        make(spec, cache)
    assert str(boot_of(image).root.parent) in caught.value.resolution


def test_image_that_the_user_deleted_is_made_again(spec: ApplianceSpec, cache: Path, assembler: Assembler) -> None:
    image = make(spec, cache)
    for path in boot_of(image).kernel.parent.iterdir():
        path.unlink()
    boot_of(image).kernel.parent.rmdir()
    assert find(spec, cache) is None
    assert make(spec, cache) == image
    assert assembler.runs == 2


@pytest.mark.parametrize("part", ["initrd", "manifest.json"])
@pytest.mark.usefixtures("assembler")
def test_image_that_lacks_a_file_is_made_again(spec: ApplianceSpec, cache: Path, part: str) -> None:
    image = make(spec, cache)
    (boot_of(image).kernel.parent / part).unlink()
    assert make(spec, cache) == image
    assert verify(cache) == [Check("test", image.digest, "")]


@pytest.mark.usefixtures("assembler")
def test_verify_finds_nothing_wrong_with_whole_images(spec: ApplianceSpec, cache: Path) -> None:
    assert verify(cache) == []
    images = [make(spec, cache), make(replace(spec, name="other"), cache)]
    assert verify(cache) == sorted((Check(one.name, one.digest, "") for one in images), key=lambda check: check.digest)


@pytest.mark.parametrize("part", CONTENT)
@pytest.mark.usefixtures("assembler")
def test_verify_finds_a_flipped_byte(spec: ApplianceSpec, cache: Path, part: str) -> None:
    image = make(spec, cache)
    data = bytearray(CONTENT[part])
    data[-1] ^= 1
    damage(boot_of(image).kernel.parent / part, bytes(data))
    assert verify(cache) == [Check("test", image.digest, f"{part} was changed")]


@pytest.mark.usefixtures("assembler")
def test_verify_finds_missing_files_and_names_each(spec: ApplianceSpec, cache: Path) -> None:
    image = make(spec, cache)
    boot_of(image).initrd.unlink()
    damage(boot_of(image).root, b"")
    assert verify(cache) == [Check("test", image.digest, "initrd is missing, root.squashfs was changed")]


@pytest.mark.usefixtures("assembler")
def test_verify_finds_a_changed_manifest(spec: ApplianceSpec, cache: Path) -> None:
    image = make(spec, cache)
    manifest = boot_of(image).kernel.parent / "manifest.json"
    damage(manifest, manifest.read_bytes().replace(b'"1.0"', b'"1.1"'))
    assert verify(cache) == [Check("unknown", image.digest, "the manifest was changed")]


@pytest.mark.parametrize("text", [b"", b"[]", b"{}"])
@pytest.mark.usefixtures("assembler")
def test_verify_finds_a_manifest_that_is_none(spec: ApplianceSpec, cache: Path, text: bytes) -> None:
    image = make(spec, cache)
    damage(boot_of(image).kernel.parent / "manifest.json", text)
    [check] = verify(cache)
    assert check.digest == image.digest
    assert "manifest" in check.problem


@pytest.mark.parametrize("text", [b"", b"[]", b"{}"])
@pytest.mark.usefixtures("assembler")
def test_manifest_that_is_none_is_a_damaged_image(spec: ApplianceSpec, cache: Path, text: bytes) -> None:
    damage(boot_of(make(spec, cache)).kernel.parent / "manifest.json", text)
    with pytest.raises(GuestImageError, match="damaged"):
        find(spec, cache)


def test_verify_does_not_judge_work_in_progress(spec: ApplianceSpec, cache: Path, assembler: Assembler) -> None:
    image = make(replace(spec, name="other"), cache)
    workspace = leave_workspace(spec, cache, assembler)
    (workspace / "manifest.json").write_bytes((boot_of(image).kernel.parent / "manifest.json").read_bytes())
    assert verify(cache) == [Check("other", image.digest, "")]


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_recipe_digest_is_the_same_for_the_same_row_in_another_folder(spec: ApplianceSpec, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "guest"
    (elsewhere / "root").mkdir(parents=True)
    (elsewhere / "root" / "boot").write_text("#!/bin/sh\n")
    moved = replace(spec, folder=elsewhere.parent, guest_files=elsewhere)
    assert recipe_digest(moved) == recipe_digest(spec)


def test_recipe_digest_does_not_depend_on_where_the_keys_lie(spec: ApplianceSpec, tmp_path: Path) -> None:
    here, there = tmp_path / "here" / "debian.gpg", tmp_path / "there" / "debian.gpg"
    for path in (here, there):
        path.parent.mkdir()
        path.write_bytes(b"key")
    assert recipe_digest(replace(spec, keyrings=(here,))) == recipe_digest(replace(spec, keyrings=(there,)))


def test_recipe_digest_changes_with_the_row(spec: ApplianceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [
        replace(spec, packages=("tool", "more")),
        replace(spec, without=("perl",)),
        replace(spec, exclude=("./usr/share/doc",)),
        replace(spec, modules=("ext4", "overlay")),
        replace(spec, kernel="linux-image-other"),
        replace(spec, arch=Arch.ARMHF),
    ]
    digests = {recipe_digest(spec), *map(recipe_digest, changed)}
    monkeypatch.setattr(store, "RECIPE", store.RECIPE + 1)
    assert len(digests | {recipe_digest(spec)}) == len(changed) + 2


def test_recipe_digest_changes_with_the_guest_files(spec: ApplianceSpec) -> None:
    boot, added = spec.guest_files / "root" / "boot", spec.guest_files / "root" / "etc"
    digests = [recipe_digest(spec)]
    boot.write_text("#!/bin/sh\n\n")
    digests.append(recipe_digest(spec))
    added.write_text("")
    digests.append(recipe_digest(spec))
    added.rename(added.with_name("etd"))
    digests.append(recipe_digest(spec))
    assert len(set(digests)) == 4


def test_changed_recipe_assembles_anew_and_keeps_the_old(
    spec: ApplianceSpec, cache: Path, assembler: Assembler
) -> None:
    old = make(spec, cache)
    (spec.guest_files / "root" / "boot").write_text("#!/bin/sh\n# new\n")
    assert find(spec, cache) is None
    new = make(spec, cache)
    assert new.digest != old.digest
    assert folders(cache) == sorted([old.digest, new.digest])
    assert assembler.runs == 2


# --- prune ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("assembler")
def test_prune_deletes_what_no_row_leads_to(spec: ApplianceSpec, cache: Path) -> None:
    old = make(replace(spec, kernel_args=("old",)), cache)
    now = make(spec, cache)
    assert old.digest != now.digest
    (cache / "images" / ".test~killed").mkdir()
    (cache / "packages").mkdir()
    (cache / "packages" / "tool.deb").write_bytes(bytes(100_000))
    (cache / "bases").mkdir()
    freed = prune([spec], cache, SilentReporter(), everything=False, needed={})
    assert {(each.what, each.name) for each in freed} == {
        ("guest image", old.digest),
        ("guest image", ".test~killed"),
        ("downloads", "packages"),
    }
    assert next(each.size_bytes for each in freed if each.name == "packages") >= 100_000
    assert folders(cache) == [now.digest]
    assert find(spec, cache) == now
    assert (cache / "bases").exists()
    assert prune([spec], cache, SilentReporter(), everything=False, needed={}) == []


@pytest.mark.usefixtures("assembler")
def test_prune_of_everything_leaves_nothing_and_harms_nothing(spec: ApplianceSpec, cache: Path) -> None:
    make(spec, cache)
    (cache / "bases").mkdir()
    prune([spec], cache, SilentReporter(), everything=True, needed={})
    assert folders(cache) == []
    assert find(spec, cache) is None
    assert not (cache / "bases").exists()
    assert make(spec, cache) == find(spec, cache)


@pytest.mark.usefixtures("assembler")
@pytest.mark.parametrize("everything", [True, False])
def test_prune_keeps_what_somebody_needs_and_says_so(spec: ApplianceSpec, cache: Path, everything: bool) -> None:
    other = make(replace(spec, kernel_args=("other",)), cache)
    old = replace(spec, kernel_args=("old",))
    image = make(old, cache)
    report = Listener()
    freed = prune([spec], cache, report, everything=everything, needed={image.digest: "the machine box"})
    assert [each.name for each in freed] == [other.digest]
    assert report.heard == [f"Keeping the guest image {image.digest[:12]}: the machine box needs it"]
    assert find(old, cache) == image


@pytest.mark.usefixtures("assembler")
def test_prune_has_nothing_to_say_of_what_it_keeps_anyway(spec: ApplianceSpec, cache: Path) -> None:
    report = Listener()
    prune([spec], cache, report, everything=False, needed={make(spec, cache).digest: "the machine box"})
    assert report.heard == []


def test_prune_of_an_empty_cache_frees_nothing(spec: ApplianceSpec, cache: Path) -> None:
    assert prune([spec], cache, SilentReporter(), everything=True, needed={}) == []
