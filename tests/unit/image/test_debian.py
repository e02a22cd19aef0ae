"""A signed repository made on the spot: what is good is taken, what is not says why."""

from __future__ import annotations

import hashlib
import lzma
import random
import shutil
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from tests.unit.image.conftest import Keys, Site, send, status
from tests.unit.listener import Listener
from vmbuild.errors import GuestImageError
from vmbuild.image import debian, mirrors
from vmbuild.image.debian import BadSignature, ExpiredRelease, NotInSuite, PackageIndex, open_index, open_indexes
from vmbuild.image.fetch import NotFound, Unreachable, WrongDigest
from vmbuild.image.mirrors import host_mirrors, mirror_urls
from vmbuild.image.packages import Relation, package_downloads, parse_relations, resolve_closure
from vmbuild.model import Repository
from vmbuild.report import SilentReporter

TRIXIE = Repository("trixie", "debian", "http://public.invalid/debian")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stanza(name: str, version: str = "1", **fields: str) -> str:
    given = {"Package": name, "Version": version, "Architecture": "arm64", "Priority": "optional"}
    given |= {"Filename": f"pool/{name}.deb", "Size": "4", "SHA256": sha256(f"{name}{version}".encode())}
    given |= {key.replace("_", "-"): value for key, value in fields.items()}
    return "".join(f"{key}: {value}\n" for key, value in given.items())


def index(*stanzas: str, only: tuple[str, ...] = ()) -> PackageIndex:
    repository = replace(TRIXIE, only=only)
    return PackageIndex("\n".join(stanzas).encode(), "http://mirror.invalid/debian", repository)


# --- signatures and digests -----------------------------------------------------------------------------------------


@dataclass
class Suite:
    """A suite on the site; `publish` signs it."""

    site: Site
    keys: Keys
    cache: Path
    packages: bytes = stanza("hello").encode()
    fields: dict[str, str] = field(default_factory=lambda: {"Suite": "stable", "Codename": "trixie"})
    by_hash: bool = False
    listener: Listener = field(default_factory=Listener)
    repository: Repository = TRIXIE
    wanted: str = "arm64"

    @property
    def folder(self) -> str:
        return f"/debian/dists/{self.repository.suite}"

    @property
    def index_path(self) -> str:
        return f"{self.folder}/main/binary-arm64/Packages.xz"

    @property
    def hashed_path(self) -> str:
        return f"{self.folder}/main/binary-arm64/by-hash/SHA256/{sha256(lzma.compress(self.packages))}"

    def release(self) -> str:
        packed = lzma.compress(self.packages)
        fields = {**self.fields, "Acquire-By-Hash": "yes"} if self.by_hash else self.fields
        head = "".join(f"{key}: {value}\n" for key, value in fields.items())
        return f"{head}SHA256:\n {sha256(packed)} {len(packed)} main/binary-arm64/Packages.xz\n"

    def publish(self, *signers: str) -> None:
        self.serve(self.keys.sign(self.release(), *(signers or ("archive",))))

    def serve(self, in_release: bytes) -> None:
        self.site.files[f"{self.folder}/InRelease"] = in_release
        self.site.files[self.hashed_path if self.by_hash else self.index_path] = lzma.compress(self.packages)

    @property
    def mirrors(self) -> dict[str, str]:
        return {"debian": f"{self.site.url}/debian/"}

    def open(self, *keyrings: str) -> PackageIndex:
        files = [self.keys.export(name) for name in keyrings or ("archive",)]
        return open_index(self.repository, self.wanted, self.mirrors, files, self.cache, self.listener)

    def open_all(self) -> list[PackageIndex]:
        files = [self.keys.export("archive")]
        return open_indexes([self.repository], self.wanted, self.mirrors, files, self.cache, self.listener)


@pytest.fixture
def suite(site: Site, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Return an unpublished suite."""
    monkeypatch.setattr(debian, "RETRY_PAUSES_S", (0.0, 0.0))
    return Suite(site, keys, tmp_path / "indexes")


def test_a_signed_suite_opens_and_its_index_is_cached(suite: Suite) -> None:
    suite.publish()
    for _ in range(2):
        package = suite.open().find("hello")
        assert package is not None and package.url == f"{suite.site.url}/debian/pool/hello.deb"
    assert len(suite.site.asked(f"{suite.folder}/InRelease")) == 2
    assert len(suite.site.asked(suite.index_path)) == 1


def test_one_known_key_of_several_signers_is_enough(suite: Suite) -> None:
    suite.publish("old", "archive")
    assert suite.open().find("hello")
    assert suite.open("stranger", "archive").find("hello")


def test_by_hash_is_used_and_the_plain_path_when_it_is_not_there(suite: Suite) -> None:
    suite.by_hash = True
    suite.publish()
    assert suite.open().find("hello")
    assert suite.site.asked(suite.index_path) == []
    shutil.rmtree(suite.cache)
    suite.site.files[suite.index_path] = suite.site.files.pop(suite.hashed_path)
    assert suite.open().find("hello")
    assert len(suite.site.asked(suite.index_path)) == 1


@pytest.mark.parametrize("optional", [False, True])
def test_what_cannot_be_trusted_is_refused_even_where_it_is_optional(suite: Suite, optional: bool) -> None:
    suite.repository = replace(TRIXIE, optional=optional)
    suite.publish("archive")
    good = suite.site.files[f"{suite.folder}/InRelease"]
    past = ("--faked-system-time", "20200101T010000!", "--local-user", "expired@test.invalid")
    for signed, problem in (
        (suite.release().encode(), "not signed"),
        (suite.keys.sign(suite.release(), "stranger"), "keys that the catalogue does not have"),
        (good.replace(b"Suite: stable", b"Suite: stabel"), "altered"),
        (suite.keys.sign("Suite: x\n", "stranger") + good, "altered"),
        (good + good.replace(b"Suite: stable", b"Suite: stabel"), "altered"),
        (b"", "not signed"),
        (suite.keys.gpg(*past, "--clearsign", stdin=suite.release().encode()), "catalogue does not have"),
    ):
        suite.serve(signed)
        with pytest.raises(BadSignature) as caught:
            suite.open_all()
        assert problem in caught.value.brief
    assert suite.listener.warnings == []
    assert suite.site.asked(suite.index_path) == []


def test_an_expired_key_is_refused(suite: Suite) -> None:
    past = ("--faked-system-time", "20200101T010000!", "--local-user", "expired@test.invalid")
    suite.serve(suite.keys.gpg(*past, "--clearsign", stdin=suite.release().encode()))
    with pytest.raises(BadSignature, match="key has expired"):
        suite.open("expired")
    suite.publish("archive")
    suite.open("expired", "archive")


def test_text_around_the_signed_part_is_never_read(suite: Suite) -> None:
    suite.publish()
    path = f"{suite.folder}/InRelease"
    suite.site.files[path] = b"Codename: evil\n\n" + suite.site.files[path] + b"\nValid-Until: never\n"
    assert suite.open().find("hello")


def test_a_swapped_suite_is_refused(suite: Suite) -> None:
    suite.fields = {"Suite": "oldstable", "Codename": "bookworm"}
    suite.publish()
    with pytest.raises(GuestImageError, match="another suite") as caught:
        suite.open_all()
    assert "bookworm" in caught.value.details


def test_an_expired_release_is_told_and_only_a_warning_where_it_is_optional(suite: Suite) -> None:
    now = datetime.now(UTC)
    for moment, expired in ((now + timedelta(hours=1), False), (now - timedelta(hours=1), True)):
        suite.fields["Valid-Until"] = format_datetime(moment, usegmt=True).replace("GMT", "UTC")
        suite.publish()
        if not expired:
            assert suite.open().find("hello")
    with pytest.raises(ExpiredRelease):
        suite.open_all()
    suite.repository = replace(TRIXIE, optional=True)
    assert suite.open_all() == []
    assert "going on without trixie" in suite.listener.warnings[0]


def test_a_server_that_does_not_serve_is_only_a_warning_where_it_is_optional(suite: Suite) -> None:
    with pytest.raises(NotFound):
        suite.open_all()
    suite.site.default = status(503)
    with pytest.raises(Unreachable):
        suite.open_all()
    suite.repository = replace(TRIXIE, optional=True)
    assert suite.open_all() == []
    assert "503" in suite.listener.warnings[0]


def test_a_suite_without_the_architecture_is_only_a_warning_where_it_is_optional(suite: Suite) -> None:
    suite.publish()
    suite.wanted = "armel"
    with pytest.raises(NotInSuite, match="binary-armel"):
        suite.open_all()
    suite.repository = replace(TRIXIE, optional=True)
    assert suite.open_all() == []
    assert "going on without trixie" in suite.listener.warnings[0]


def test_an_index_with_a_wrong_digest_is_refused_even_where_it_is_optional(suite: Suite) -> None:
    suite.repository = replace(TRIXIE, optional=True)
    suite.publish()
    suite.site.files[suite.index_path] = lzma.compress(stanza("evil").encode())
    with pytest.raises(WrongDigest, match="out of step"):
        suite.open_all()
    assert len(suite.site.asked(f"{suite.folder}/InRelease")) == 3
    assert not list(suite.cache.glob("*.xz"))


def publish_out_of_step(suite: Suite) -> None:
    """Publish a suite whose Release file is newer than its index, and the older one whole by its alias."""
    suite.publish()
    for name in ("InRelease", "main/binary-arm64/Packages.xz"):
        suite.site.files[f"/debian/dists/stable/{name}"] = suite.site.files[f"{suite.folder}/{name}"]
    suite.packages, old = stanza("hello", "2").encode(), suite.site.files[suite.index_path]
    suite.publish()
    suite.site.files[suite.index_path] = old


def test_a_suite_that_stays_out_of_step_is_opened_by_its_alias_and_that_is_said(suite: Suite) -> None:
    publish_out_of_step(suite)
    with pytest.raises(WrongDigest, match="out of step"):
        suite.open()
    assert suite.site.asked("/debian/dists/stable/InRelease") == []
    suite.repository = replace(TRIXIE, alias="stable")
    opened = suite.open()
    found = opened.find("hello")
    assert found is not None and found.version == "1"
    assert opened.suite == "stable"
    assert suite.listener.warnings == ["trixie is out of step on the mirror: taking its packages as of stable"]


def test_a_suite_is_opened_by_its_alias_where_that_is_asked_for(suite: Suite) -> None:
    publish_out_of_step(suite)
    suite.repository = replace(TRIXIE, alias="stable")
    (found,) = open_indexes(
        [suite.repository],
        *("arm64", suite.mirrors, [suite.keys.export("archive")], suite.cache, suite.listener),
        by_alias=True,
    )
    assert found.find("hello")
    assert found.suite == "stable"
    assert suite.site.asked(f"{suite.folder}/InRelease") == []


def test_an_alias_is_not_asked_for_while_the_suite_will_do(suite: Suite) -> None:
    suite.repository = replace(TRIXIE, alias="stable")
    suite.publish()
    assert suite.open().find("hello")
    assert suite.site.asked("/debian/dists/stable/InRelease") == []


@pytest.mark.parametrize("fault", ["missing", "forged", "other suite", "out of step"])
def test_an_alias_that_does_not_do_either_leaves_the_first_problem(suite: Suite, fault: str) -> None:
    publish_out_of_step(suite)
    suite.repository = replace(TRIXIE, alias="stable", optional=True)
    alias = "/debian/dists/stable/InRelease"
    release = suite.release()
    suite.site.files |= {
        "missing": {},
        "forged": {alias: suite.keys.sign(release, "stranger")},
        "other suite": {
            alias: suite.keys.sign(release.replace("trixie", "forky").replace("stable", "testing"), "archive")
        },
        "out of step": {alias: suite.keys.sign(release, "archive")},
    }[fault]
    if fault == "missing":
        del suite.site.files[alias]
    with pytest.raises(WrongDigest, match="dists/trixie are out of step"):
        suite.open_all()


def test_an_alias_that_has_expired_is_refused(suite: Suite) -> None:
    suite.fields["Valid-Until"] = format_datetime(datetime.now(UTC) - timedelta(days=1))
    publish_out_of_step(suite)
    del suite.fields["Valid-Until"]
    suite.site.files[f"{suite.folder}/InRelease"] = suite.keys.sign(suite.release(), "archive")
    suite.repository = replace(TRIXIE, alias="stable")
    with pytest.raises(ExpiredRelease):
        suite.open_all()
    suite.repository = replace(TRIXIE, alias="stable", optional=True)
    assert suite.open_all() == []


def test_a_mirror_in_the_middle_of_an_update_is_read_again(suite: Suite) -> None:
    suite.publish()
    release = f"{suite.folder}/InRelease"
    old = suite.site.files[release]
    suite.packages = stanza("hello", "2").encode()
    suite.publish()
    suite.site.behaviours[release] = [send(old)]
    found = suite.open().find("hello")
    assert found is not None and found.version == "2"
    assert "being updated" in suite.listener.steps[0]


def test_a_damaged_index_in_the_cache_is_fetched_again(suite: Suite) -> None:
    suite.publish()
    suite.open()
    (cached,) = suite.cache.glob("*.xz")
    cached.write_bytes(b"x" * cached.stat().st_size)
    assert suite.open().find("hello")
    assert len(suite.site.asked(suite.index_path)) == 2


def test_an_index_damaged_after_it_was_checked_is_told_and_removed(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.publish()
    suite.open()
    (cached,) = suite.cache.glob("*.xz")
    cached.write_bytes(b"x" * cached.stat().st_size)
    with monkeypatch.context() as patch, pytest.raises(GuestImageError, match="was damaged"):
        patch.setattr(debian, "fetch_all", lambda *_, **__: None)
        suite.open()
    assert not cached.exists()
    assert suite.open().find("hello")


def test_what_the_hosts_mirror_lacks_comes_from_the_public_one(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.publish()
    public = f"{suite.site.url}/debian"
    suite.repository = replace(TRIXIE, public_url=public)
    for mirror in (f"{suite.site.url}/none", "http://127.0.0.1:1/debian"):
        suite.listener.warnings.clear()
        monkeypatch.setattr(mirrors, "host_mirrors", lambda _, mirror=mirror: {"debian": mirror})
        files = [suite.keys.export("archive")]
        found = open_index(suite.repository, "arm64", {"debian": "auto"}, files, suite.cache, suite.listener)
        assert (found.url, found.repository) == (public, suite.repository)
        assert len(suite.listener.warnings) == 1
        assert mirror in suite.listener.warnings[0] and public in suite.listener.warnings[0]
        with pytest.raises((NotFound, Unreachable)):  # what the user has set is never replaced
            open_index(suite.repository, "arm64", {"debian": mirror}, files, suite.cache, suite.listener)


def test_a_hosts_mirror_without_this_architecture_is_replaced(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.publish()
    suite.site.files["/part/dists/trixie/InRelease"] = suite.site.files[f"{suite.folder}/InRelease"]
    suite.repository = replace(TRIXIE, public_url=f"{suite.site.url}/debian")
    monkeypatch.setattr(mirrors, "host_mirrors", lambda _: {"debian": f"{suite.site.url}/part"})
    files = [suite.keys.export("archive")]
    found = open_index(suite.repository, "arm64", {}, files, suite.cache, suite.listener)
    package = found.find("hello")
    assert package is not None and package.url == f"{suite.site.url}/debian/pool/hello.deb"


def test_a_hosts_mirror_that_is_not_to_be_trusted_is_refused(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.publish("stranger")
    suite.repository = replace(TRIXIE, public_url=f"{suite.site.url}/public")
    monkeypatch.setattr(mirrors, "host_mirrors", lambda _: {"debian": f"{suite.site.url}/debian"})
    with pytest.raises(BadSignature):
        open_index(suite.repository, "arm64", {}, [suite.keys.export("archive")], suite.cache, suite.listener)


def test_the_indexes_of_all_components_are_one(suite: Suite) -> None:
    suite.repository = replace(TRIXIE, components=("main", "main"))
    suite.publish()
    assert names([suite.open()], ["hello"]) == ["hello"]


def test_an_architecture_that_is_not_there_is_told(suite: Suite) -> None:
    suite.publish()
    with pytest.raises(GuestImageError, match="has no main/binary-armhf"):
        open_index(TRIXIE, "armhf", suite.mirrors, [suite.keys.export("archive")], suite.cache, SilentReporter())


def test_a_package_that_only_names_must_be_there(suite: Suite) -> None:
    suite.publish()
    suite.repository = replace(TRIXIE, only=("hello",))
    assert names(suite.open_all(), ["hello"]) == ["hello"]
    suite.repository = replace(TRIXIE, only=("hello", "helo", "hallo"))
    with pytest.raises(GuestImageError) as caught:
        suite.open_all()
    assert "trixie has no package helo, hallo, which `only`" in caught.value.brief
    assert f"{suite.site.url}/debian/dists/trixie" in caught.value.details
    suite.repository = replace(suite.repository, optional=True)
    assert names(suite.open_all(), ["hello"]) == ["hello"]


# --- packages and their closure -------------------------------------------------------------------------------------


def names(*arguments: object, **options: object) -> list[str]:
    return [package.name for package in resolve_closure(*arguments, **options)]  # type: ignore[arg-type]


def test_a_package_is_read_from_its_stanza() -> None:
    text = stanza("hello", "2:1-1", Pre_Depends="a", Depends="b (>= 1)", Essential="yes", Priority="required")
    package = index(stanza("first"), text, stanza("last")).find("hello")
    assert package is not None
    assert (package.version, package.depends, package.essential, package.size) == ("2:1-1", "a, b (>= 1)", True, 4)
    assert package.control == text
    assert index(text).find("hell") is None
    (download,) = package_downloads([package], Path("/cache"))
    assert download.path == Path("/cache") / package.sha256[:2] / package.sha256


def test_a_stanza_without_a_digest_is_told() -> None:
    with pytest.raises(GuestImageError, match="SHA256"):
        index(stanza("hello").replace("SHA256", "MD5sum")).find("hello")


def test_relations_are_parsed() -> None:
    assert parse_relations("a (>= 1:2~3) | b:any,\n c,") == [
        [Relation("a", ">=", "1:2~3"), Relation("b")],
        [Relation("c")],
    ]
    assert parse_relations("") == []


@pytest.mark.parametrize(
    ("operator", "accepted"),
    [("<<", "1"), ("<=", "12"), ("<", "12"), ("=", "2"), (">=", "23"), (">", "23"), (">>", "3")],
)
def test_versions_are_compared(operator: str, accepted: str) -> None:
    relation = Relation("x", operator, "2")
    assert "".join(version for version in "123" if relation.accepts(version)) == accepted


def test_the_closure_follows_depends_and_pre_depends_and_ends_at_what_is_left_out() -> None:
    roots = [stanza("a", Depends="b, c", Recommends="x"), stanza("b", Pre_Depends="d"), stanza("c", Depends="e")]
    found = index(*roots, stanza("d"), stanza("e"), stanza("x"))
    assert names([found], ["a"]) == ["a", "b", "c", "d", "e"]
    assert names([found], ["a"], without=["c"]) == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("depends", "wanted", "without", "expected"),
    [
        ("none | b | c", "a", "", "a b"),
        ("b | c", "a c", "", "a c"),
        ("b (>= 2) | c", "a", "", "a c"),
        ("virtual", "a", "", "a p1"),
        ("virtual", "a p2", "", "a p2"),
        ("virtual", "a", "p2", "a"),
        ("virtual", "a", "virtual", "a"),
        ("virtual (>= 2)", "a", "", "a p3"),
        ("b | c", "a", "b", "a"),
        ("b | c", "a c", "b", "a c"),
        ("a | none", "a", "", "a"),
    ],
)
def test_alternatives(depends: str, wanted: str, without: str, expected: str) -> None:
    found = index(
        stanza("a", Depends=depends), stanza("b"), stanza("c"), stanza("p2", Provides="virtual"),
        stanza("p1", Provides="other, virtual"), stanza("p3", Provides="virtual (= 3)", Priority="extra"),
    )  # fmt: skip
    assert names([found], wanted.split(), without=without.split()) == expected.split()


def test_a_required_provider_comes_before_an_optional_one() -> None:
    found = index(
        stanza("gawk", Provides="awk"), stanza("mawk", Provides="awk", Priority="required"), stanza("a", Depends="awk")
    )
    assert names([found], ["a"]) == ["a", "mawk"]


def test_the_newest_version_of_all_indexes_wins() -> None:
    main, security = index(stanza("a", "1-1+deb13u9", Depends="b"), stanza("b")), index(stanza("a", "1-1+deb13u10"))
    (package,) = resolve_closure([main, security], ["a"])
    assert package.version == "1-1+deb13u10"


def test_only_what_is_named_is_taken_from_a_repository_that_says_so() -> None:
    newer = index(
        stanza("a", "2", Depends="b, virtual"), stanza("b", "2"), stanza("c", "2", Provides="virtual"),
        stanza("d", "2", Essential="yes"), only=("a",),
    )  # fmt: skip
    older = index(stanza("a"), stanza("b"), stanza("e", Provides="virtual"), stanza("f", Essential="yes"))
    for indexes in ([older, newer], [newer, older]):
        found = resolve_closure(indexes, ["a"], essential=True)
        assert {package.name: package.version for package in found} == {"a": "2", "b": "1", "e": "1", "f": "1"}


def test_what_is_wanted_is_missing_where_only_other_packages_are_taken() -> None:
    with pytest.raises(GuestImageError, match="no package satisfies b"):
        resolve_closure([index(stanza("a", Depends="b"), stanza("b"), only=("a",))], ["a"])


def test_essential_takes_what_is_marked_in_any_index() -> None:
    main = index(stanza("a", Essential="yes", Depends="b"), stanza("b"), stanza("c", Priority="required"), stanza("d"))
    assert names([main, index(stanza("e", Essential="yes"))], ["d"], essential=True) == ["a", "b", "c", "d", "e"]


def test_what_cannot_be_satisfied_names_the_chain() -> None:
    found = index(stanza("a", Depends="b"), stanza("b", Depends="c (>= 2) | d"), stanza("c"))
    with pytest.raises(GuestImageError) as caught:
        resolve_closure([found], ["a"])
    assert "c (>= 2) | d" in caught.value.brief
    assert caught.value.details == "wanted by a -> b"
    with pytest.raises(GuestImageError, match="nothing"):
        resolve_closure([found], ["nothing"])


def test_a_closure_is_closed_and_does_not_depend_on_the_order_of_the_index() -> None:
    dice = random.Random(3)
    for _ in range(30):
        known = [f"p{number}" for number in range(30)]
        texts = [stanza(name, Depends=", ".join(dice.sample(known, dice.randrange(3)))) for name in known]
        texts = [text.replace("Depends: \n", "") for text in texts]
        wanted = dice.sample(known, 3)
        found = resolve_closure([index(*texts)], wanted)
        held = {package.name for package in found}
        assert held >= set(wanted)
        assert all(group[0].name in held for package in found for group in parse_relations(package.depends))
        dice.shuffle(texts)
        assert resolve_closure([index(*texts)], wanted) == found


# --- mirrors --------------------------------------------------------------------------------------------------------


def host(root: Path, *, os_id: str = "debian", **files: str) -> Path:
    folder = root / "etc/apt/sources.list.d"
    folder.mkdir(parents=True)
    (root / "etc/os-release").write_text(f'NAME="x"\nVERSION_CODENAME=trixie\nID={os_id}\n')
    for name, text in files.items():
        path = folder.parent / "sources.list" if name == "sources" else folder / name.replace("_", ".")
        path = folder.parent / "mirrors.txt" if name == "mirrors" else path
        path.write_text(text)
    return root


SOURCES = "Types: deb\nSuites: trixie trixie-updates\nComponents: main\n# was: old\n"
KEYRING = "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
KEY_BLOCK = "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n -----END PGP PUBLIC KEY BLOCK-----\n"
MIRROR_LIST = "URIs: mirror+file:///etc/apt/mirrors.txt\n"
LISTED = "# ours\n\nfile:/srv/debian\tpriority:1\nhttps://m/debian/\tpriority:2\nhttp://n/debian\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"sources": "deb http://m/debian/ trixie main # x\n deb https://s/debian-security trixie-security main"},
            {"debian": "http://m/debian", "debian-security": "https://s/debian-security"},
        ),
        ({"a_sources": f"{SOURCES}URIs: http://m/x\n{KEYRING}"}, {"debian": "http://m/x"}),
        ({"a_sources": f"{SOURCES}URIs: http://m/x\n"}, {}),
        ({"a_sources": f"Enabled: no\n{SOURCES}URIs: http://m/debian\n{KEYRING}"}, {}),
        ({"a_list": "# deb http://m/debian trixie main\ndeb-src http://m/debian trixie main"}, {}),
        ({"a_list": "deb http://m/debian trixie-backports main"}, {}),
        ({"a_list": "deb [arch=amd64 signed-by=/docker.asc] https://docker/linux/debian trixie main"}, {}),
        ({"a_list": "deb https://docker/linux/debian trixie stable"}, {}),
        ({"a_list": "deb https://other/apt trixie main"}, {}),
        ({"a_list": "deb file:/srv/debian trixie main\ndeb cdrom:[Debian]/debian trixie main"}, {}),
        (
            {
                "b_list": "deb http://b/debian trixie main",
                "a_list": "deb [arch=amd64] http://a/debian stable main\ndeb http://a/debian/ stable-updates main",
            },
            {"debian": "http://a/debian"},
        ),
        ({"a_list_disabled": "deb http://m/debian trixie main"}, {}),
        ({"a_sources": f"{SOURCES}{MIRROR_LIST}", "mirrors": LISTED}, {"debian": "https://m/debian"}),
        ({"a_sources": f"{SOURCES}{MIRROR_LIST}{KEYRING}", "mirrors": "http://m/x"}, {"debian": "http://m/x"}),
        ({"a_sources": f"{SOURCES}{MIRROR_LIST}", "mirrors": "file:/srv/debian\n"}, {}),
        ({"a_sources": f"{SOURCES}{MIRROR_LIST}"}, {}),
        (
            {"a_list": "deb mirror+file:/etc/apt/mirrors.txt trixie main", "mirrors": LISTED},
            {"debian": "https://m/debian"},
        ),
        ({"a_list": "deb mirror+http://m/mirrors/debian trixie main"}, {}),
        ({"a_sources": f"{SOURCES}URIs: http://m/debian\nSigned-By: /etc/own.asc\n"}, {"debian": "http://m/debian"}),
        ({"a_sources": f"{SOURCES}URIs: http://m/debian\n{KEY_BLOCK}"}, {"debian": "http://m/debian"}),
        ({"a_sources": f"{SOURCES}URIs: http://m/apt\n{KEY_BLOCK}"}, {}),
        (
            {"a_list": "deb [signed-by=/own.gpg] http://m/debian-security trixie-security main"},
            {"debian-security": "http://m/debian-security"},
        ),
        ({"a_list": "deb [signed-by=/winehq.key] https://dl.winehq.org/wine-builds/debian trixie main"}, {}),
        ({"a_list": "deb https://repos.influxdata.com/debian stable main"}, {}),
        ({"a_list": "deb https://notdebian.org/debian stable main"}, {}),
        (
            {"a_list": "deb https://ftp.us.debian.org/debian stable main"},
            {"debian": "https://ftp.us.debian.org/debian"},
        ),
        ({"a_list": "deb http://m/debian sid main"}, {"debian": "http://m/debian"}),
        ({"a_list": "deb http://m/debian bullseye main"}, {}),
        (
            {"a_list": "deb https://wine/debian trixie main", "z_sources": f"{SOURCES}URIs: http://m/debian\n"},
            {"debian": "http://m/debian"},
        ),
        (
            {
                "a_list": "deb http://other/debian trixie main\ndeb http://other/debian trixie-updates main",
                "z_sources": f"{SOURCES}URIs: http://m/debian\n{KEYRING}",
            },
            {"debian": "http://m/debian"},
        ),
    ],
)
def test_the_hosts_mirror_is_found(tmp_path: Path, files: dict[str, str], expected: dict[str, str]) -> None:
    assert host_mirrors(host(tmp_path, **files)) == expected


def test_a_host_that_is_not_debian_has_no_mirror(tmp_path: Path) -> None:
    assert host_mirrors(host(tmp_path, os_id="ubuntu", sources="deb http://m.invalid/debian trixie main")) == {}
    assert host_mirrors(tmp_path / "nothing") == {}


def test_a_setting_comes_before_the_host_and_the_host_before_the_public_default(tmp_path: Path) -> None:
    root = host(tmp_path, sources="deb http://m.invalid/debian trixie main")
    public = "http://public.invalid/debian"
    assert mirror_urls(TRIXIE, {"debian": "http://mine.invalid/debian/"}, root=root) == ["http://mine.invalid/debian"]
    assert mirror_urls(TRIXIE, {"debian": public}, root=root) == [public]
    assert mirror_urls(TRIXIE, {"debian": "auto"}, root=root) == ["http://m.invalid/debian", public]
    assert mirror_urls(TRIXIE, {}, root=tmp_path / "nothing") == [public]
    assert mirror_urls(replace(TRIXIE, public_url="http://m.invalid/debian/"), {}, root=root) == [
        "http://m.invalid/debian"
    ]
