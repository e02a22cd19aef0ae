"""A Debian base image as dpkg leaves it between unpacking and configuring, and the layer that comes back."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from debian.deb822 import Deb822

from tests.unit.image.debs import file, folder, pack_tar, put_package
from tests.unit.listener import Listener
from vmbuild.errors import GuestError, GuestImageError
from vmbuild.image import base
from vmbuild.image.base import (
    BasePlan,
    digest_file,
    hash_plain,
    is_kept,
    keep_layer,
    known_layers,
    write_base,
    write_plan,
)
from vmbuild.image.catalog import BaseSpec
from vmbuild.image.fetch import NotFound
from vmbuild.image.packages import Package, PackageIndex, package_path
from vmbuild.model import Arch, Repository
from vmbuild.report import SilentReporter

INFO = "var/lib/dpkg/info"
SPEC = BaseSpec(
    name="debian-test-slim",
    repo_tag="debian:test-slim",
    description="",
    repositories=(),
    keyrings=(),
    packages=(),
    essential=True,
    exclude=("./usr/share/doc", "./usr/share/man"),
    keep=("./usr/share/doc/*/copyright",),
)


class Tree:
    """A written base image, read back."""

    def __init__(self, packages: Sequence[Package], downloads: Path, listener: Listener | None = None) -> None:
        out = io.BytesIO()
        write_base(SPEC, packages, downloads, "Types: deb\n", out, listener or SilentReporter())
        with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
            self.members = tar.getmembers()
            regular = [info for info in self.members if info.isreg()]
            self.files = {info.name: content.read() for info in regular if (content := tar.extractfile(info))}
        self.modes = {info.name: info.mode for info in self.members}

    def text(self, path: str) -> str:
        return self.files[path].decode()

    def status(self, package: str) -> Deb822:
        [stanza] = [
            one for one in Deb822.iter_paragraphs(self.text("var/lib/dpkg/status")) if one["Package"] == package
        ]
        return Deb822(stanza)


def put_libc(downloads: Path) -> Package:
    return put_package(
        downloads,
        "libc6",
        [folder("./"), folder("./lib/"), file("./lib/libc.so.6", b"elf"), file("./etc/ld.so.conf", b"include\n")],
        fields="Multi-Arch: same\n",
        control={
            "conffiles": b"/etc/ld.so.conf\nremove-on-upgrade /etc/gone\n",
            "postinst": b"#!/bin/sh\n",
            "md5sums": b"",
            "triggers": b"# a comment\nactivate-noawait ldconfig\ninterest-noawait /usr/lib/gconv # why\n",
        },
    )


def put_tool(downloads: Path) -> Package:
    return put_package(
        downloads,
        "tool",
        [
            folder("./"),
            folder("./usr/"),
            file("./usr/bin/tool", b"t", 0o4755),
            file("./usr/share/doc/tool/copyright", b"MIT"),
            file("./usr/share/doc/tool/README", b"read"),
            file("./usr/share/man/man1/tool.1", b"man"),
            file("./usr/share/docker/it", b"it"),
        ],
        fields="Multi-Arch: foreign\n",
        control={
            "triggers": b"interest ldconfig\ninterest-await /etc/tools\ninterest-noawait rebuild\n",
            "preinst": b"",
            "templates": b"Template: tool/x\n",
        },
    )


@pytest.fixture
def tree(tmp_path: Path, listener: Listener) -> Tree:
    """Return a base image of two packages."""
    made = Tree([put_libc(tmp_path), put_tool(tmp_path)], tmp_path, listener)
    assert (listener.meters, listener.advanced) == ([("unpack", 2)], 2)
    return made


def test_every_path_comes_once(tree: Tree) -> None:
    assert len(tree.modes) == len(tree.members)


def test_status_says_unpacked_and_keeps_the_packages_own_fields(tree: Tree) -> None:
    assert {name: tree.status(name)["Status"] for name in ("libc6", "tool")} == {
        "libc6": "install ok unpacked",
        "tool": "install ok unpacked",
    }
    assert (tree.status("libc6")["Version"], tree.status("libc6")["Multi-Arch"]) == ("1", "same")
    assert tree.text("var/lib/dpkg/status").count("\n\n") == 1  # nothing but a blank line between stanzas


def test_conffiles_are_listed_with_the_md5_of_what_was_unpacked(tree: Tree) -> None:
    md5 = hashlib.md5(b"include\n", usedforsecurity=False).hexdigest()
    assert f"\nConffiles:\n /etc/ld.so.conf {md5}\n" in tree.text("var/lib/dpkg/status")
    assert "gone" not in tree.text("var/lib/dpkg/status")
    assert "Conffiles" not in tree.status("tool")


def test_info_files_are_named_as_dpkg_names_them(tree: Tree) -> None:
    found = {path.removeprefix(f"{INFO}/") for path in tree.files if path.startswith(f"{INFO}/")}
    libc = {f"libc6:arm64.{part}" for part in ("list", "conffiles", "postinst", "md5sums", "triggers")}
    assert found == libc | {"tool.list", "tool.triggers", "tool.preinst", "tool.templates", "format"}
    assert tree.files[f"{INFO}/format"] == b"1\n"
    assert tree.files[f"{INFO}/tool.templates"] == b"Template: tool/x\n"


def test_maintainer_scripts_can_be_run_and_nothing_else_can(tree: Tree) -> None:
    runnable = {path for path, mode in tree.modes.items() if path.startswith(f"{INFO}/") and mode & 0o111}
    assert runnable == {f"{INFO}/libc6:arm64.postinst", f"{INFO}/tool.preinst"}


def test_list_has_the_paths_as_the_package_has_them(tree: Tree) -> None:
    assert tree.text(f"{INFO}/libc6:arm64.list") == "/.\n/lib\n/lib/libc.so.6\n/etc/ld.so.conf\n"
    assert tree.files["usr/lib/libc.so.6"] == b"elf"


def test_trigger_interests_are_noted_by_file_and_by_name(tree: Tree) -> None:
    triggers = {path: data.decode() for path, data in tree.files.items() if path.startswith("var/lib/dpkg/triggers/")}
    assert triggers == {
        "var/lib/dpkg/triggers/File": "/usr/lib/gconv libc6:arm64/noawait\n/etc/tools tool\n",
        "var/lib/dpkg/triggers/ldconfig": "tool\n",
        "var/lib/dpkg/triggers/rebuild": "tool/noawait\n",
    }


def test_documentation_is_left_out_and_licences_are_not(tree: Tree) -> None:
    shared = {path for path in tree.files if path.startswith("usr/share/")}
    assert shared == {"usr/share/doc/tool/copyright", "usr/share/docker/it"}
    assert "/usr/share/doc/tool/README\n" in tree.text(f"{INFO}/tool.list")  # as dpkg with path-exclude


def test_later_packages_stay_slim_too(tree: Tree) -> None:
    settings = tree.text("etc/dpkg/dpkg.cfg.d/docker").splitlines()
    filters = [line for line in settings if line.startswith("path-")]
    # the last matching filter wins (dpkg(1)), so what is kept comes after what is left out
    assert filters == [
        "path-exclude /usr/share/doc/*",
        "path-exclude /usr/share/man/*",
        "path-include /usr/share/doc/*/copyright",
    ]
    assert tree.text("etc/apt/sources.list.d/debian.sources") == "Types: deb\n"
    assert tree.modes["usr/sbin/policy-rc.d"] == 0o755
    assert tree.modes["usr/bin/tool"] == 0o4755


def test_package_without_a_control_part_is_refused(tmp_path: Path) -> None:
    package = put_tool(tmp_path)
    path = package_path(package, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"control.tar.xz", b"kontrol.tar.xz"))
    with pytest.raises(GuestImageError, match="cannot be read"):
        Tree([package], tmp_path)


# --- the layer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> BasePlan:
    """Return a plan for a base image of one package."""
    (tmp_path / "bases").mkdir()
    packages = (put_tool(tmp_path / "packages"),)
    return BasePlan(SPEC, packages, tmp_path / "packages", "Types: deb\n", tmp_path / "bases" / "debian-0.tar.gz")


LAYER = pack_tar([file("./etc/it", b"it" * 50_000)])


def take(plan: BasePlan) -> None:
    keep_layer(plan, io.BytesIO(LAYER).read)


def in_cache(plan: BasePlan) -> list[str]:
    return sorted(path.name for path in plan.layer.parent.iterdir())


def test_layer_is_kept_as_gzip_with_its_digest_beside_it(plan: BasePlan) -> None:
    take(plan)
    packed = plan.layer.read_bytes()
    assert gzip.decompress(packed) == LAYER
    assert digest_file(plan.layer).read_text() == hashlib.sha256(packed).hexdigest()
    assert in_cache(plan) == ["debian-0.tar.gz", "debian-0.tar.gz.sha256"]


def test_same_tree_gives_the_same_layer_at_any_time(plan: BasePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    take(plan)
    first = plan.layer.read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    tree = io.BytesIO(LAYER)
    keep_layer(plan, lambda _: tree.read(1000))
    assert plan.layer.read_bytes() == first


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GuestError("gone")])
def test_interrupted_stream_leaves_nothing(plan: BasePlan, error: BaseException) -> None:
    tree = io.BytesIO(LAYER)

    def read(size: int) -> bytes:
        if tree.tell():
            raise error
        return tree.read(1000)

    with pytest.raises((KeyboardInterrupt, GuestError)):
        keep_layer(plan, read)
    assert in_cache(plan) == []


def test_known_layers_finds_a_layer_by_its_digest(plan: BasePlan) -> None:
    take(plan)
    find = known_layers(plan.layer.parents[1])
    assert find(hashlib.sha256(plan.layer.read_bytes()).hexdigest()) == plan.layer
    assert find("0" * 64) is None


def test_known_layers_refuses_a_changed_file(plan: BasePlan) -> None:
    take(plan)
    packed = bytearray(plan.layer.read_bytes())
    digest = hashlib.sha256(packed).hexdigest()
    packed[len(packed) // 2] ^= 1
    plan.layer.write_bytes(packed)
    find = known_layers(plan.layer.parents[1])
    assert find(digest) is None
    assert find(hashlib.sha256(packed).hexdigest()) is None
    plan.layer.unlink()
    assert find(digest) is None


def test_no_layers_where_there_is_no_cache(tmp_path: Path) -> None:
    assert known_layers(tmp_path / "none")("0" * 64) is None


def test_a_layer_is_kept_while_it_is_as_it_was_written(plan: BasePlan) -> None:
    assert not is_kept(plan)
    take(plan)
    assert is_kept(plan)
    packed = bytearray(plan.layer.read_bytes())
    packed[len(packed) // 2] ^= 1
    plan.layer.write_bytes(packed)
    assert not is_kept(plan)
    take(plan)
    digest_file(plan.layer).unlink()
    assert not is_kept(plan)


def test_a_layer_is_known_by_what_it_was_before_it_was_compressed(plan: BasePlan) -> None:
    plan.layer.write_bytes(gzip.compress(b"0123456789"))
    assert hash_plain(plan.layer) == hashlib.sha256(b"0123456789").hexdigest()


def test_a_plans_tree_is_the_tree_of_its_packages(plan: BasePlan) -> None:
    one, other = io.BytesIO(), io.BytesIO()
    write_base(plan.spec, plan.packages, plan.downloads, plan.sources, one, SilentReporter())
    write_plan(plan, other, SilentReporter())
    assert one.getvalue() == other.getvalue() != b""


# --- the plan -------------------------------------------------------------------------------------------------------


def planned(monkeypatch: pytest.MonkeyPatch, cache: Path, sha256: str, opened: Sequence[PackageIndex] = ()) -> BasePlan:
    package = Package("tool", "1", "arm64", sha256, 1, "", "", "", "", False, "optional", "")
    monkeypatch.setattr(base, "open_indexes", lambda *_, **__: list(opened))
    monkeypatch.setattr(base, "resolve_closure", lambda *_, **__: (package,))
    monkeypatch.setattr(base, "fetch_all", lambda *_, **__: None)
    return base.plan(SPEC, Arch.ARM64, {}, cache, SilentReporter())


def test_layer_is_named_by_what_goes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = planned(monkeypatch, tmp_path, "1" * 64)
    assert planned(monkeypatch, tmp_path, "1" * 64).layer == one.layer
    assert planned(monkeypatch, tmp_path, "2" * 64).layer != one.layer
    assert one.layer.parent == tmp_path / "bases"
    assert one.layer.parent.is_dir()
    monkeypatch.setattr(base, "RECIPE", base.RECIPE + 1)
    assert planned(monkeypatch, tmp_path, "1" * 64).layer != one.layer


@pytest.mark.parametrize(
    ("alias", "missing", "opened"),
    [("stable", 1, [False, True]), ("stable", 2, [False, True]), (None, 1, [False])],
    ids=["the alias does", "the alias does not either", "no alias"],
)
def test_packages_that_the_mirror_lacks_are_taken_as_of_the_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alias: str | None, missing: int, opened: list[bool]
) -> None:
    asked: list[bool] = []
    left = [NotFound(f"cannot download tool_{number}.deb") for number in range(missing)]

    def fetch(*_: object, **__: object) -> None:
        if left:
            raise left.pop(0)

    def open_indexes(*_: object, by_alias: bool) -> list[PackageIndex]:
        asked.append(by_alias)
        return []

    monkeypatch.setattr(base, "open_indexes", open_indexes)
    monkeypatch.setattr(base, "resolve_closure", lambda *_, **__: ())
    monkeypatch.setattr(base, "fetch_all", fetch)
    spec = replace(SPEC, repositories=(Repository("trixie", "debian", "http://public.invalid/debian", alias=alias),))
    listener = Listener()
    if alias and missing == 1:
        base.plan(spec, "armel", {}, tmp_path, listener)
        assert listener.warnings == ["cannot download tool_0.deb: taking the packages as of stable"]
    else:
        with pytest.raises(NotFound, match="tool_0"):
            base.plan(spec, "armel", {}, tmp_path, listener)
    assert asked == opened


def test_apt_sources_list_what_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trixie = Repository("trixie", "debian", "http://public.invalid/debian", ("main", "contrib"))
    opened = [PackageIndex(b"", "http://mirror.invalid/debian", trixie)]
    assert planned(monkeypatch, tmp_path, "1" * 64, opened).sources == (
        "Types: deb\nURIs: http://mirror.invalid/debian\nSuites: trixie\nComponents: main contrib\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )
    updates = Repository("trixie-updates", "debian", "", alias="stable-updates")
    opened.append(PackageIndex(b"", "http://mirror.invalid/debian", updates, "stable-updates"))
    _, second = planned(monkeypatch, tmp_path, "1" * 64, opened).sources.split("\n\n")
    assert second.startswith("Types: deb\n")
    assert "\nSuites: stable-updates\n" in second


@pytest.mark.parametrize(
    ("url", "listed"),
    [
        ("http://localhost:3142/debian", "http://10.0.2.2:3142/debian"),
        ("http://127.0.0.1/debian", "http://10.0.2.2/debian"),
        ("https://user:s%40cret@mirror.invalid/debian", "https://mirror.invalid/debian"),
        ("http://user:p@ss@[::1]:80/debian", "http://10.0.2.2:80/debian"),
        ("http://token@localhost/debian", "http://10.0.2.2/debian"),
        ("http://mirror.invalid/a@b/debian", "http://mirror.invalid/a@b/debian"),
    ],
)
def test_apt_sources_are_right_in_a_guest_and_hold_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, listed: str
) -> None:
    opened = [PackageIndex(b"", url, Repository("trixie", "debian", ""))]
    assert f"\nURIs: {listed}\n" in planned(monkeypatch, tmp_path, "1" * 64, opened).sources
