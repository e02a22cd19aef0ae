from __future__ import annotations

import gc
import io
import os
import socket
import tarfile
from pathlib import Path
from typing import Any

import pytest

from vmbuild.errors import UsageError
from vmbuild.guest.context import Context, open_context, parse_ignore

NOTHING = io.BytesIO()


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def sent(context: Context) -> dict[str, tarfile.TarInfo]:
    out = io.BytesIO()
    context.write_tar(out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        return {member.name: member for member in tar}


@pytest.mark.parametrize(
    ("rules", "path", "excluded"),
    [
        ("*.log", "a.log", True),
        ("*.log", "sub/a.log", False),  # not as in .gitignore: a pattern is rooted
        ("**/*.log", "sub/deep/a.log", True),
        ("**/*.log", "a.log", True),
        ("a/**", "a/b/c", True),
        ("a/**/c", "a/c", True),
        ("sub", "sub/deep/file", True),
        ("/sub/", "sub/file", True),
        ("./sub", "sub", True),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("[ab].txt", "b.txt", True),
        ("[!ab].txt", "[!ab].txt", False),
        ("[^ab].txt", "c.txt", True),
        ("\\*.txt", "a.txt", False),
        ("\\*.txt", "*.txt", True),
        ("*\n!keep", "keep", False),
        ("*\n!keep", "keep/inside", False),
        ("*\n!keep\nkeep/secret", "keep/secret", True),
        ("!keep\n*", "keep", True),
        ("# comment\n\n  \n.\n/", "anything", False),
        ("#a", "#a", False),
        ("a.b", "axb", False),
        ("\ufeffbom", "bom", True),
        ("trailing   ", "trailing", True),
        ("a/../b", "b", True),
    ],
)
def test_dockerignore_means_what_docker_says(rules: str, path: str, excluded: bool) -> None:
    assert parse_ignore(rules).excludes(path) is excluded


def test_a_pattern_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UsageError, match=r"\[z-a\]"):
        parse_ignore("[z-a]")


def test_what_travels(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile", "a", "sub/b", "skip/c", "skip/keep")
    (tmp_path / ".dockerignore").write_text("skip\n!skip/keep\nDockerfile\n.dockerignore\n")
    found = sent(open_context(tmp_path, None, NOTHING))
    assert set(found) == {".dockerignore", "Dockerfile", "a", "sub", "sub/b", "skip", "skip/keep"}


def test_the_dockerfiles_own_ignore_file_goes_first(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile", "my.Dockerfile", "a", "b")
    (tmp_path / ".dockerignore").write_text("a")
    (tmp_path / "my.Dockerfile.dockerignore").write_text("b")
    found = sent(open_context(tmp_path, str(tmp_path / "my.Dockerfile"), NOTHING))
    assert "a" in found
    assert "b" not in found
    assert "my.Dockerfile.dockerignore" in found


def test_kinds_modes_and_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "Dockerfile", "run.sh")
    (tmp_path / "run.sh").chmod(0o755)
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("sock")
        found = sent(open_context(Path(), None, NOTHING))
    assert "sock" not in found
    assert found["dangling"].issym() and found["dangling"].linkname == "nowhere"
    assert found["run.sh"].mode & 0o777 == 0o755
    assert {(member.uid, member.gid, member.uname, member.gname) for member in found.values()} == {(0, 0, "", "")}


def test_an_ignored_pipe_is_never_opened(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile")
    (tmp_path / ".dockerignore").write_text("pipe")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" not in sent(open_context(tmp_path, None, NOTHING))


def test_a_name_that_is_no_utf8_survives(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile")
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).write_text("x")
    out = io.BytesIO()
    open_context(tmp_path, None, NOTHING).write_tar(out)
    assert b"caf\xe9" in out.getvalue() or name in sent(open_context(tmp_path, None, NOTHING))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "Dockerfile", "shrinks")
    real = tarfile.TarFile.gettarinfo

    def grown(self: tarfile.TarFile, *args: object, **kwargs: object) -> tarfile.TarInfo:
        info = real(self, *args, **kwargs)  # type: ignore[arg-type]
        info.size += 10 if info.name == "shrinks" else 0
        return info

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", grown)
    with pytest.raises(UsageError, match="shrinks"):
        sent(open_context(tmp_path, None, NOTHING))


@pytest.mark.parametrize("what", ["nothing", "Dockerfile"])
def test_what_is_not_there_is_wrong_usage(tmp_path: Path, what: str) -> None:
    where = tmp_path / what
    if what == "Dockerfile":
        where = tmp_path
    with pytest.raises(UsageError):
        open_context(where, None, NOTHING)


def test_a_dockerfile_from_elsewhere_or_standard_input(tmp_path: Path) -> None:
    folder = tree(tmp_path / "c", "a")
    other = tmp_path / "Other"
    other.write_text("FROM x")
    context = open_context(folder, str(other), NOTHING)
    assert (context.dockerfile_inside, context.dockerfile_content) == (None, b"FROM x")
    context = open_context(folder, "-", io.BytesIO(b"FROM y"))
    assert (context.dockerfile_inside, context.dockerfile_content) == (None, b"FROM y")
    assert set(sent(context)) == {"a"}


@pytest.mark.parametrize(
    ("rules", "path", "excluded"),
    [
        # ** in every place; behaviour as moby's patternmatcher has it
        ("**", "a/b/c", True),
        ("**/**", "a/b", True),
        ("**/", "a/b", True),
        ("logs/**", "logs", False),
        ("logs/**", "logs/x/y/z", True),
        ("**/logs", "logs", True),
        ("**/logs", "x/logs/y", True),
        ("**/logs", "x/mylogs", False),
        ("**/x/*", "a/x/b", True),
        ("**/x/**", "a/x/b/c", True),
        ("**/.env", ".env", True),
        ("**/.env", "prod.env", False),
        ("**tail", "a/b/tail", True),
        ("head**/*.c", "head/x/y/z.c", True),
        ("src/*.c**", "src/main.c.orig", True),
        ("src/**/t/*.c", "src/t/a.c", True),
        ("src/**/t/*.c", "src/x/y/t/a.c", True),
        ("src/**/t/*.c", "src/x/y/t/u/a.c", False),
        ("a**z", "abcz", False),  # `**` in the middle stands for whole folders
        ("a**z", "a/b/z", True),
        # one star and one question mark stay within a folder, and may stand for a dot
        ("*/b", "x/y/b", False),
        ("*/*", "x/y", True),
        ("*/*", "x", False),
        (".*", ".git/config", True),
        (".*", "git", False),
        ("a?b", "a\u263ab", True),
        ("???", "ab", False),
        # character classes
        ("v[0-9]", "v7", True),
        ("v[0-9]", "vx", False),
        ("v[^0-9]", "v7", False),
        ("v[!0-9]", "v!", True),
        ("[\\]]", "]", True),
        ("[\\-x]", "-", True),
        ("[\\-x]", "w", False),
        ("[a-\u03b6]*", "\u03b1", True),
        # escapes, and characters that mean something in a regular expression only
        ("a\\*b", "a*b", True),
        ("a\\*b", "axb", False),
        ("a\\[b", "a[b", True),
        ("a\\\\", "a\\", True),
        ("f(x)|{y}+$^.c", "f(x)|{y}+$^.c", True),
        ("a+b", "aab", False),
        # how lines are read
        ("\\#a", "#a", True),
        ("  #a", "#a", True),  # a comment begins at the line's first character
        ("a#b", "a#b", True),
        ("a\r\nb\r\n", "b", True),
        ("\t a \t", "a", True),
        ("a b", "a b", True),
        ("  ! keep  \n*", "keep", True),
        ("*\n  ! keep  ", "keep", False),
        ("*\n!/keep/", "keep/x", False),
        ("//a//b/", "a/b", True),
        ("a/./b", "a/b", True),
        ("a\x0cb", "a\x0cb", True),  # only a line feed ends a line
        ("a\u2028b", "a\u2028b", True),
        ("one\n\ufefftwo", "two", False),  # a mark of the byte order is one at the beginning only
        # order, and folders above
        ("docs\n!docs/README", "docs/README", False),
        ("docs\n!docs/README", "docs/other", True),
        ("docs/\n!docs/README", "docs/README", False),
        ("!docs/README\ndocs", "docs/README", True),
        ("*\n!src\nsrc/**/*.o", "src/a/b.o", True),
        ("*\n!src\nsrc/**/*.o", "src/a/b.c", False),
        ("**\n!a/b", "a/b/c", False),
        ("a*\n!ab*\nabc", "abc", True),
        ("a*\n!ab*\nabc", "abd", False),
    ],
)
def test_dockerignore_line_by_line(rules: str, path: str, excluded: bool) -> None:
    assert parse_ignore(rules).excludes(path) is excluded


@pytest.mark.parametrize(
    "pattern", ["[", "a[", "[^", "[^bc", "[]a]", "[-]", "[x-]", "[-x]", "[a-b-c]", "a\\", "!", "! "]
)
def test_a_pattern_that_docker_refuses_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="dockerignore"):
        parse_ignore(pattern)


def ignore(folder: Path, rules: str) -> dict[str, tarfile.TarInfo]:
    (folder / ".dockerignore").write_text(rules)
    return sent(open_context(folder, None, NOTHING))


def test_all_but_one_thing(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile", "a", "sub/b", "keep/c", "keep/deep/d")
    found = ignore(tmp_path, "*\n!keep\n")
    assert set(found) == {".dockerignore", "Dockerfile", "keep", "keep/c", "keep/deep", "keep/deep/d"}


def test_a_folder_above_something_kept_travels_with_its_mode(tmp_path: Path) -> None:
    """As Docker sends it: else the folder gets whatever mode the guest's tar gives it."""
    tree(tmp_path, "Dockerfile", "skip/keep", "skip/drop", "empty/drop")
    (tmp_path / "skip").chmod(0o711)
    found = ignore(tmp_path, "skip\nempty\n!skip/keep\n")
    assert set(found) == {".dockerignore", "Dockerfile", "skip", "skip/keep"}
    assert found["skip"].mode & 0o777 == 0o711


def test_a_dockerfile_in_an_ignored_folder_travels(tmp_path: Path) -> None:
    tree(tmp_path, "build/my.Dockerfile", "build/other", "a")
    (tmp_path / "build" / "my.Dockerfile.dockerignore").write_text("*\n")
    context = open_context(tmp_path, str(tmp_path / "build" / "my.Dockerfile"), NOTHING)
    found = {name for name, info in sent(context).items() if info.isreg()}
    assert context.dockerfile_inside == "build/my.Dockerfile"
    assert found == {"build/my.Dockerfile", "build/my.Dockerfile.dockerignore"}


def test_what_is_ignored_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "Dockerfile", "secret", "skip/deep/file", "a")
    opened: list[str] = []
    real_open, real_scan = Path.open, os.scandir

    def noting_open(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(self.relative_to(tmp_path).as_posix())
        return real_open(self, *args, **kwargs)

    def noting_scan(path: Path) -> Any:
        opened.append(Path(path).relative_to(tmp_path).as_posix())
        return real_scan(path)

    (tmp_path / ".dockerignore").write_text("secret\nskip\n")
    context = open_context(tmp_path, None, NOTHING)
    monkeypatch.setattr(Path, "open", noting_open)
    monkeypatch.setattr(os, "scandir", noting_scan)
    sent(context)
    assert opened == [".", ".dockerignore", "Dockerfile", "a"]


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, *methods: str, error: type[OSError] = PermissionError) -> None:
    """Make a file unreadable, also for root."""
    for method in methods:
        real = getattr(Path, method)

        def refusing(self: Path, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
            if self.name == name:
                raise error(13, "Permission denied", str(self))
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(Path, method, refusing)


def test_a_file_that_cannot_be_read_is_named_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "Dockerfile", "secret")
    refuse(monkeypatch, "secret", "open")
    with pytest.raises(UsageError, match=r"secret.*Permission denied") as caught:
        sent(open_context(tmp_path, None, NOTHING))
    assert ".dockerignore" in caught.value.resolution


def test_a_folder_that_cannot_be_read_is_named_unless_it_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, "Dockerfile", "locked/file", "keep/file")
    real = os.scandir

    def refusing(path: Path) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UsageError, match="locked"):
        sent(open_context(tmp_path, None, NOTHING))
    assert "keep/file" in ignore(tmp_path, "locked\n")
    assert "keep/file" in ignore(tmp_path, "locked\n*\n!keep\n")


@pytest.mark.parametrize("name", [".dockerignore", "Dockerfile"])
def test_a_file_that_says_how_to_build_and_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tree(tmp_path / "context", "a", ".dockerignore")
    tree(tmp_path, "Dockerfile")
    refuse(monkeypatch, name, "read_text", "read_bytes", "open")
    with pytest.raises(UsageError, match=name):
        open_context(folder, str(tmp_path / "Dockerfile"), NOTHING)


def test_a_file_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "Dockerfile", "a", "gone")

    real = tarfile.TarFile.gettarinfo

    def vanishing(self: tarfile.TarFile, *args: Any, **kwargs: Any) -> Any:
        (tmp_path / "gone").unlink(missing_ok=True)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", vanishing)
    with pytest.raises(UsageError, match="gone"):
        sent(open_context(tmp_path, None, NOTHING))


def test_a_file_that_really_shrinks_or_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "Dockerfile", "changes", "last")
    real = tarfile.TarFile.gettarinfo
    sizes = iter((200_000, 0))

    def changing(self: tarfile.TarFile, *args: Any, **kwargs: Any) -> Any:
        info = real(self, *args, **kwargs)
        if info.name == "changes":
            (tmp_path / "changes").write_bytes(b"n" * next(sizes))
        return info

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", changing)
    (tmp_path / "changes").write_bytes(b"o" * 100_000)
    found = sent(open_context(tmp_path, None, NOTHING))
    assert found["changes"].size == 100_000
    assert "last" in found
    with pytest.raises(UsageError, match="changes"):
        sent(open_context(tmp_path, None, NOTHING))


def test_a_sink_that_fails_is_not_taken_for_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """The user would look for a fault in the context when it is the connection that broke."""
    tree(tmp_path, "Dockerfile")
    (tmp_path / "big").write_bytes(bytes(2_000_000))

    class Broken(io.BytesIO):
        def write(self, data: object, /) -> int:
            raise ConnectionResetError("the connection broke")

    with pytest.raises(ConnectionResetError):
        open_context(tmp_path, None, NOTHING).write_tar(Broken())


def test_links_travel_as_links_and_are_never_followed(tmp_path: Path) -> None:
    outside = tree(tmp_path / "outside", "secret", "dir/file")
    folder = tree(tmp_path / "context", "Dockerfile", "a")
    (folder / "to-file").symlink_to(outside / "secret")
    (folder / "to-folder").symlink_to(outside / "dir")
    (folder / "loop").symlink_to(folder)
    (folder / "hard").hardlink_to(folder / "a")
    found = sent(open_context(folder, None, NOTHING))
    assert set(found) == {"Dockerfile", "a", "hard", "loop", "to-file", "to-folder"}
    assert found["to-folder"].issym() and found["to-folder"].linkname == str(outside / "dir")
    assert found["to-file"].issym() and found["loop"].issym()
    assert found["hard"].islnk() and found["hard"].linkname == "a"


def test_modes_are_kept_and_empty_folders_travel(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile", "run")
    (tmp_path / "run").chmod(0o4751)
    (tmp_path / "empty").mkdir(mode=0o700)
    found = sent(open_context(tmp_path, None, NOTHING))
    assert found["run"].mode == 0o4751
    assert found["empty"].isdir() and found["empty"].mode == 0o700


def test_the_content_arrives(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile", "a/b/c")
    (tmp_path / "zero").touch()
    out = io.BytesIO()
    open_context(tmp_path, None, NOTHING).write_tar(out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        for name, content in (("a/b/c", b"a/b/c"), ("zero", b""), ("Dockerfile", b"Dockerfile")):
            file = tar.extractfile(name)
            assert file is not None and file.read() == content


def test_a_name_that_is_no_utf8_is_read_back_and_can_be_ignored(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile")
    names = [os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff" * 120), "gr\u00fc\u00dfe"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert set(names) < set(sent(open_context(tmp_path, None, NOTHING)))
    (tmp_path / ".dockerignore").write_bytes(b"caf\xe9\n")
    assert names[0] not in sent(open_context(tmp_path, None, NOTHING))


@pytest.mark.parametrize("given", ["../Other", "sub/../../Other"])
def test_a_dockerfile_outside_by_a_path_with_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    folder = tree(tmp_path / "c", "a", "sub/b")
    (tmp_path / "Other").write_text("FROM x")
    monkeypatch.chdir(folder)
    context = open_context(Path(), given, NOTHING)
    assert (context.dockerfile_inside, context.dockerfile_content) == (None, b"FROM x")


@pytest.mark.parametrize("given", ["sub/../Dockerfile", "./Dockerfile", "sub/Dockerfile"])
def test_a_dockerfile_inside_by_a_path_with_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    folder = tree(tmp_path / "c", "Dockerfile", "sub/Dockerfile")
    monkeypatch.chdir(folder)
    context = open_context(Path(), given, NOTHING)
    assert context.dockerfile_inside is not None
    assert context.dockerfile_inside == os.path.normpath(given)
    assert context.dockerfile_inside in sent(context)


@pytest.mark.parametrize("dockerfile", [None, "nowhere/Dockerfile"])
def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path, dockerfile: str | None) -> None:
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(UsageError) as caught:
            open_context(folder, dockerfile, NOTHING)
        assert caught.value.resolution
        assert caught.value.exit_code == 2


def test_files_that_were_sent_are_forgotten(tmp_path: Path) -> None:
    """A tarfile that remembers its members takes 600 bytes for each."""
    tree(tmp_path, "Dockerfile", *(f"{number:03}" for number in range(1000)))
    counts: list[int] = []

    class Counter:
        def write(self, data: bytes, /) -> None:
            counts.append(sum(isinstance(each, tarfile.TarInfo) for each in gc.get_objects()))

    open_context(tmp_path, None, NOTHING).write_tar(Counter())
    assert len(counts) > 3
    assert max(counts) - counts[0] < 10


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away; for anyone else the owner is not 0")
def test_whoever_owns_a_file_it_travels_as_root_s(tmp_path: Path) -> None:
    tree(tmp_path, "Dockerfile", "sub/theirs")
    os.chown(tmp_path / "sub" / "theirs", 1234, 2345)
    os.chown(tmp_path / "sub", 1234, 2345)
    found = sent(open_context(tmp_path, None, NOTHING))
    assert {(member.uid, member.gid, member.uname, member.gname) for member in found.values()} == {(0, 0, "", "")}
