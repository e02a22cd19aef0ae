from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

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
    assert set(found) == {".dockerignore", "Dockerfile", "a", "sub", "sub/b", "skip/keep"}


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
