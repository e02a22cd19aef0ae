"""The file system of a container image as a tar, or as files of the user in a folder of the host."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from vmbuild.errors import GuestError, HostError, UsageError
from vmbuild.guest.flatten import Node, Tree, Words
from vmbuild.guest.image import Image
from vmbuild.guest.session import Sink
from vmbuild.model import MIB
from vmbuild.report import Meter, Reporter
from vmbuild.whole import open_whole, write_whole, writing_in

CHUNK_BYTES = MIB
XATTR = "SCHILY.xattr."
NOT_FOLLOWED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Trees = Sequence[tuple[str, Tree]]
"""File systems, each with the name of the folder that it goes into; empty for none."""


def check_folder(target: Path) -> None:
    """See that a folder can be written, or made. Raises HostError or UsageError."""
    at = target.resolve()
    if (target.exists() and not target.is_dir()) or not at.parent.is_dir():
        raise UsageError(f"cannot write to the folder {target}", resolution="Name a folder, in a folder that exists.")
    if not os.access(at.parent, os.W_OK) or (at.exists() and not os.access(at, os.W_OK)):
        raise HostError(f"cannot write to the folder {target}: no permission", resolution="Name another place.")


def write_layout(image: Image, names: Sequence[str], target: Path, path_of: Callable[[str], Path]) -> int:
    """Write an OCI layout into a folder, beside what that has under other names; return the bytes of it.

    Raises HostError.
    """
    blobs, target = target / "blobs" / "sha256", target.resolve()
    with writing_in(target):
        blobs.mkdir(parents=True, exist_ok=True)
        for blob in image.each_blob_once():
            with path_of(blob.digest).open("rb") as source, open_whole(blobs / blob.digest) as out:
                shutil.copyfileobj(source, out, CHUNK_BYTES)
    for digest, data in image.documents.items():
        write_whole(blobs / digest, data)
    tables = image.tables(names)
    index = _beside_others(target / "index.json", cast(dict[str, Any], tables["index.json"]))
    write_whole(target / "oci-layout", json.dumps(tables["oci-layout"]).encode())
    write_whole(target / "index.json", json.dumps(index).encode())
    return sum(blob.size for blob in image.each_blob_once()) + sum(map(len, image.documents.values()))


def _beside_others(path: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Return an index with the entries of an older one that have names of their own."""
    try:
        others = [each for each in json.loads(path.read_bytes())["manifests"] if _name_of(each)]
    except (OSError, ValueError, KeyError, TypeError):
        return index
    ours = {_name_of(each) for each in index["manifests"]}
    return {**index, "manifests": [*(each for each in others if _name_of(each) not in ours), *index["manifests"]]}


def _name_of(entry: Any) -> str:
    notes = entry.get("annotations") or {}
    return str(notes.get("io.containerd.image.name") or notes.get("org.opencontainers.image.ref.name") or "")


def write_tar(trees: Trees, out: Sink, report: Reporter) -> int:
    """Write file systems as one tar, owners and extended attributes with them; return its bytes."""
    counted = _Counted(out)
    with (
        _metered(trees, report) as meter,
        tarfile.open(
            fileobj=cast(IO[bytes], counted), mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK_BYTES
        ) as tar,
    ):
        for prefix, tree in trees:
            _add_tree(tar, prefix, tree, meter)
    return counted.size


class _Counted:
    def __init__(self, out: Sink) -> None:
        self.size = 0
        self._out = out

    def write(self, data: bytes) -> None:
        self._out.write(data)
        self.size += len(data)


@contextmanager
def _metered(trees: Trees, report: Reporter) -> Iterator[Meter]:
    """Measure what is written, and say of a layer that it is damaged where that shows only now."""
    total = sum(node.info.size for _, tree in trees for node in tree.nodes() if node.info.isreg())
    with report.meter("write", total) as meter:
        try:
            yield meter
        except tarfile.TarError as error:
            raise GuestError("a layer of the container image is damaged", details=str(error)) from error


def _add_tree(tar: tarfile.TarFile, prefix: str, tree: Tree, meter: Meter) -> None:
    """Add folders first, then files, then what names them: a hard link comes after what it names."""
    before = (prefix,) if prefix else ()
    nodes = list(tree.nodes())
    for node in nodes:
        if node.is_folder and (*before, *node.names[0]):
            tar.addfile(_member(node, (*before, *node.names[0])))
    for node, content in tree.contents():
        tar.addfile(_member(node, (*before, *node.names[0])), cast(IO[bytes], _Metered(content, meter)))
        for name in node.names[1:]:
            tar.addfile(_hard_link(node, (*before, *name), (*before, *node.names[0])))
    for node in nodes:
        if not node.is_folder and not node.info.isreg():
            for name in node.names:
                tar.addfile(_member(node, (*before, *name)))


class _Metered:
    def __init__(self, content: IO[bytes], meter: Meter) -> None:
        self._content, self._meter = content, meter

    def read(self, size: int = -1) -> bytes:
        data = self._content.read(size)
        self._meter.advance(len(data))
        return data


def _member(node: Node, words: Words) -> tarfile.TarInfo:
    info = copy.copy(node.info)
    info.name = "/".join(words)
    if info.isreg():
        info.type, info.sparse = tarfile.REGTYPE, None
    info.pax_headers = {key: text for key, text in info.pax_headers.items() if key.startswith(XATTR)}
    return info


def _hard_link(node: Node, words: Words, target: Words) -> tarfile.TarInfo:
    info = _member(node, words)
    info.type, info.linkname, info.size = tarfile.LNKTYPE, "/".join(target), 0
    return info


def write_folder(trees: Trees, target: Path, report: Reporter) -> int:
    """Write file systems into a folder, over what it has already; return the bytes of their files.

    All becomes the user's: no owners, no setuid bits. Devices are left out, with a warning. Raises HostError.
    """
    target = target.resolve()
    with writing_in(target.parent):
        target.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with writing_in(target), _metered(trees, report) as meter:
            folders = [_fill(made, prefix, tree, meter) for prefix, tree in trees]
            devices = sum(left_out for _, left_out in folders)
            _move_all(made, target, {words: node for found, _ in folders for words, node in found.items()})
    finally:
        _remove(made)
    if devices:
        report.warn(f"{devices} devices are not in {target}: they cannot be files of a user")
    return sum(node.info.size for _, tree in trees for node in tree.nodes() if node.info.isreg())


def _fill(made: Path, prefix: str, tree: Tree, meter: Meter) -> tuple[Mapping[Words, Node], int]:
    """Write a file system into a folder that is ours alone; return its folders and how many devices it had.

    Links are made last: until then no name in there leads elsewhere.
    """
    before = (prefix,) if prefix else ()
    folders, nodes = dict[Words, Node](), list(tree.nodes())
    for node in nodes:
        if node.is_folder:
            folders[*before, *node.names[0]] = node
            made.joinpath(*before, *node.names[0]).mkdir(mode=0o700, exist_ok=True)
    for node, content in tree.contents():
        path = made.joinpath(*before, *node.names[0])
        _write_file(path, node, content, meter)
        for name in node.names[1:]:
            os.link(path, made.joinpath(*before, *name), follow_symlinks=False)
    for node in nodes:
        for name in node.names if node.info.issym() else ():
            made.joinpath(*before, *name).symlink_to(node.info.linkname)
        for name in node.names if node.info.isfifo() else ():
            os.mkfifo(made.joinpath(*before, *name), node.info.mode & 0o777)
    return folders, sum(1 for node in nodes if node.info.ischr() or node.info.isblk())


def _write_file(path: Path, node: Node, content: IO[bytes], meter: Meter) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb", buffering=0) as file:
        while data := content.read(CHUNK_BYTES):
            file.write(data)
            meter.advance(len(data))
        os.fchmod(handle, node.info.mode & 0o777)
        _set_time(handle, node)


def _set_time(handle: int, node: Node) -> None:
    os.utime(handle, (node.info.mtime, node.info.mtime))


def _move_all(made: Path, target: Path, folders: Mapping[Words, Node]) -> None:
    source, to = os.open(made, NOT_FOLLOWED), os.open(target, NOT_FOLLOWED)
    try:
        _move(source, to, (), folders)
    finally:
        os.close(source)
        os.close(to)


def _move(source: int, to: int, words: Words, folders: Mapping[Words, Node]) -> None:
    """Move what a folder holds into another. A link that is there already is replaced, never followed."""
    with os.scandir(source) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if not is_folder:
            _move_file(source, to, (*words, name))
            continue
        inner, inner_to = os.open(name, NOT_FOLLOWED, dir_fd=source), _open_folder(name, to)
        try:
            _move(inner, inner_to, (*words, name), folders)
            if (node := folders.get((*words, name))) is not None:
                os.fchmod(inner_to, node.info.mode & 0o777 | 0o700)
                _set_time(inner_to, node)
        finally:
            os.close(inner)
            os.close(inner_to)


def _move_file(source: int, to: int, words: Words) -> None:
    try:
        os.replace(words[-1], words[-1], src_dir_fd=source, dst_dir_fd=to)
    except IsADirectoryError as error:
        raise HostError(
            f"{'/'.join(words)} is a file in the container image, and a folder where it should be written",
            resolution="Choose an empty folder.",
        ) from error


def _open_folder(name: str, parent: int) -> int:
    for _ in range(2):
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
        try:
            return os.open(name, NOT_FOLLOWED, dir_fd=parent)
        except OSError:  # a link, or a file: what the container image has takes its place
            os.unlink(name, dir_fd=parent)
    raise FileExistsError(f"{name} cannot become a folder")


def _remove(made: Path) -> None:
    shutil.rmtree(made, ignore_errors=True)
