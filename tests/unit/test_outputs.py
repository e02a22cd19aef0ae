"""What `-o`, `--push` and `--load` mean, and what they refuse before a machine is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmbuild import outputs
from vmbuild.errors import UsageError
from vmbuild.outputs import Kind, Output, check_together, parse_load, parse_output

NAMED = 'type=oci,dest=a.tar,"name=a:1,b:2",compression=zstd,compression-level=19,force-compression=true'


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("out.tar", Output(Kind.DOCKER, "out.tar")),
        ("-", Output(Kind.DOCKER, "-")),
        ("a,b.tar", Output(Kind.DOCKER, "a,b.tar")),
        ("new/", Output(Kind.LOCAL, "new/")),
        (".", Output(Kind.LOCAL, ".")),
        ("type=docker,dest=a", Output(Kind.DOCKER, "a")),
        ("dest=a,type=docker", Output(Kind.DOCKER, "a")),
        ("type=docker", Output(Kind.LOAD, "docker")),
        ("type=tar,dest=-", Output(Kind.TAR, "-")),
        ("type=local,dest=d", Output(Kind.LOCAL, "d")),
        ('type=local,"dest=a,b"', Output(Kind.LOCAL, "a,b")),
        ("type=image", Output(Kind.IMAGE)),
        ("type=image,name=a:1,compression=gzip", Output(Kind.IMAGE, names=("a:1",))),
        ("type=image,name=r.io/a,push=true", Output(Kind.REGISTRY, names=("r.io/a",))),
        ("type=registry,registry.insecure=1", Output(Kind.REGISTRY, insecure=True)),
        ("type=registry,push=false", Output(Kind.IMAGE)),
        ("type=registry,push-by-digest=true,name=localhost:5000/a", None),
        ("type=oci,dest=lay,tar=false", Output(Kind.OCI, "lay", is_tar=False)),
        (NAMED, Output(Kind.OCI, "a.tar", ("a:1", "b:2"), "zstd", 19, True)),
    ],
)
def test_an_output_is_read_as_docker_reads_it(text: str, output: Output | None) -> None:
    found = parse_output(text)
    assert output in (None, found)
    assert parse_output(found.text) == found


def test_a_folder_that_is_there_takes_files(tmp_path: Path) -> None:
    assert parse_output(str(tmp_path)) == Output(Kind.LOCAL, str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("dest=x", "type= is missing"),
        ("type=new,dest=x", "no type=new"),
        ("type=oci", "dest= is missing"),
        ("type=local,dest=-", "a folder cannot go to standard output"),
        ("type=oci,dest=-,tar=false", "a folder cannot go to standard output"),
        ("type=oci,dest=x,compression=estargz", "none of uncompressed, gzip, zstd"),
        ("type=oci,dest=x,compression-level=10", "gzip has 0 to 9"),
        ("type=docker,dest=x,compression-level=1", "uncompressed has no levels"),
        ("type=oci,dest=x,compression=zstd,compression-level=0", "zstd has 1 to 22"),
        ("type=oci,dest=x,compression-level=high", "compression-level=high"),
        ("type=registry,compression=zstd,oci-mediatypes=false", "needs oci-mediatypes=true"),
        ("type=tar,dest=x,compression=gzip", "type=tar has no compression; it has dest"),
        ("type=tar,dest=x,dest=y", "dest is there twice"),
        ("type=local,dest=x,y", "'y' has no value"),
        ("type=image,push=maybe", "neither true nor false"),
        ("type=registry,name=Upper/Case", "no name of a container image"),
        ("type=load,dest=-oProxyCommand=x", "none of docker"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_output(text)
    assert words in caught.value.brief


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ssh://pi@board", ("pi@board", "")),
        ("ssh://board.local:2222/", ("board.local", "2222")),
        ("ssh://[fe80::1]:22", ("fe80::1", "22")),
        ("docker", None),
        ("auto", None),
    ],
)
def test_a_load_goes_to_an_engine_or_a_board(text: str, found: tuple[str, str] | None) -> None:
    assert outputs.board_of(parse_load(text).dest) == found


@pytest.mark.parametrize(
    "text", ["", "rkt", "ssh://", "ssh://-oProxyCommand=x", "ssh://a b", "ssh://-x@b", "ssh://a/x"]
)
def test_what_could_be_an_option_of_ssh_is_no_board(text: str) -> None:
    with pytest.raises(UsageError):
        parse_load(text)


def test_two_outputs_cannot_share_a_place() -> None:
    with pytest.raises(UsageError, match="written to standard output"):
        check_together([parse_output("-"), parse_output("type=tar,dest=-")], ())
    with pytest.raises(UsageError, match=r"written to a.tar"):
        check_together([parse_output("a.tar"), parse_output("type=oci,dest=a.tar")], ())
    check_together([parse_output("a.tar"), parse_load("docker"), parse_load("auto")], ())


def test_a_push_needs_a_name() -> None:
    push = parse_output("type=registry")
    with pytest.raises(UsageError, match="nothing says where to push"):
        check_together([push], ())
    with pytest.raises(UsageError, match="no name of a container image"):
        check_together([push], ("localhost:5000/A",))
    check_together([push], ("localhost:5000/a:1",))
    check_together([parse_output("type=registry,name=a/b")], ())
