"""The file system that the layers of a container image make together, read without unpacking one of them.

Layers are not to be trusted: what they say is only ever looked up in a tree in memory, where a link leads nowhere but
to another entry. Source: the OCI image specification 1.1, layer.md (whiteouts, opaque folders).
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from vmbuild.errors import GuestError
from vmbuild.guest.compress import open_plain

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
MOST_LINKS = 40
"""So many links one name may go through, as in Linux (path_resolution(7))."""

MOST_FOLDERS = 256
"""So deep a path may go; Linux itself ends at 2048."""

MOST_SECONDS = 2.0**33
MOST_DEVICES = 0o10000000
"""Tar has seven digits for a device's number."""

Words = tuple[str, ...]


@dataclass
class Node:
    """An entry of the tree: a file, a folder (with `children`), a link or a device. Hard links share one node.

    `layer` and `number` say which member of which layer it is; `names` are its paths, the first of them its own.
    """

    info: tarfile.TarInfo
    layer: int = -1
    number: int = -1
    children: dict[str, Node] | None = None
    names: list[Words] = field(default_factory=list)

    @property
    def is_folder(self) -> bool:
        """Tell whether it can hold others."""
        return self.children is not None


def make_folder_node(mode: int = 0o755) -> Node:
    """Return a folder that no layer tells of."""
    info = tarfile.TarInfo()
    info.type, info.mode = tarfile.DIRTYPE, mode
    return Node(info, children={})


class Tree:
    """The merged file system of some layers, which are files of the host, the lowest first."""

    def __init__(self, layers: Sequence[Path]) -> None:
        self._layers = layers
        self.root = make_folder_node()
        for number in range(len(layers)):
            self._lay(number)
        self._name(self.root, ())

    def nodes(self) -> Iterator[Node]:
        """Yield each node once, a folder before what it holds."""
        yield from (node for node, words in _walk(self.root, ()) if node.names[:1] == [words])

    def contents(self) -> Iterator[tuple[Node, IO[bytes]]]:
        """Yield each regular file with its content, which is to be read at once, layer by layer."""
        wanted = {(node.layer, node.number): node for node in self.nodes() if node.info.isreg()}
        for layer in sorted({layer for layer, _ in wanted}):
            with _open(self._layers[layer]) as tar:
                for number, member in _number(tar):
                    node = wanted.get((layer, number))
                    content = tar.extractfile(member) if node is not None else None
                    if node is not None and content is not None:
                        yield node, content

    def _name(self, node: Node, words: Words) -> None:
        for each, path in _walk(node, words):
            each.names.append(path)

    def _lay(self, layer: int) -> None:
        """Put a layer over those below: first what it hides of them, then what it has."""
        with _open(self._layers[layer]) as tar:
            members = [(number, member, _split(member.name)) for number, member in _number(tar)]
        for _, _, words in members:
            if words and words[-1].startswith(WHITEOUT):
                self._hide(words)
        for number, member, words in members:
            if not (words and words[-1].startswith(WHITEOUT)):
                self._put(layer, number, member, words)

    def _hide(self, words: Words) -> None:
        parent = self._find(words[:-1])
        if parent is None or parent.children is None:
            return
        if words[-1] == OPAQUE:
            parent.children.clear()
        else:
            parent.children.pop(words[-1].removeprefix(WHITEOUT), None)

    def _put(self, layer: int, number: int, member: tarfile.TarInfo, words: Words) -> None:
        if not words:
            if member.isdir():
                self.root.info = member
            return
        parent = self._folder(words[:-1])
        assert parent.children is not None  # noqa: S101 - a folder has children
        old = parent.children.get(words[-1])
        if member.islnk():
            target = self._find(_split(member.linkname))
            if target is None or target.is_folder:
                raise GuestError(f"a layer of the container image links {member.name} to what is not there")
            parent.children[words[-1]] = target
        elif member.isdir():
            below = old.children if old is not None and old.is_folder else {}
            parent.children[words[-1]] = Node(member, layer, number, children=below)
        elif member.isreg() or member.issym() or member.isdev():
            parent.children[words[-1]] = Node(member, layer, number)

    def _folder(self, words: Words) -> Node:
        """Return a folder by its path, made where there is none."""
        node = self.root
        for at, word in enumerate(words):
            assert node.children is not None  # noqa: S101 - it is a folder
            found = node.children.get(word)
            if found is not None and found.info.issym():
                found = self._find(words[: at + 1], to_its_end=True)
            if found is None or not found.is_folder:
                found = node.children[word] = make_folder_node()
            node = found
        return node

    def _find(self, words: Words, *, to_its_end: bool = False) -> Node | None:
        """Return what a path leads to, through links of this tree; one at its end is followed with `to_its_end`."""
        left, links = list(words), 0
        node, above = self.root, list[Node]()
        while left:
            word = left.pop(0)
            if word == "..":
                node = above.pop() if above else self.root
                continue
            found = node.children.get(word) if node.children is not None else None
            if found is None:
                return None
            if not found.info.issym() or not (left or to_its_end):
                above.append(node)
                node = found
                continue
            links += 1
            if links > MOST_LINKS:
                return None
            if found.info.linkname.startswith("/"):
                node, above = self.root, []
            left = [part for part in found.info.linkname.split("/") if part not in ("", ".")] + left
        return node


def _walk(node: Node, words: Words) -> Iterator[tuple[Node, Words]]:
    """Yield nodes with their paths, in the order of their names; without recursion, as folders may be deep."""
    stack = [(node, words)]
    while stack:
        at, path = stack.pop()
        yield at, path
        children = sorted((at.children or {}).items(), reverse=True)
        stack += [(child, (*path, name)) for name, child in children]


def _number(tar: tarfile.TarFile) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """Yield the members of a layer with their numbers, each further on than the one before. Raises GuestError."""
    at = -1
    for number, member in enumerate(tar):
        if member.offset <= at or member.size < 0:  # tarfile would read the same ones for ever
            raise GuestError(f"a layer of the container image says of {member.name!r} that it ends before it begins")
        at = member.offset
        yield number, _tidy(member)


def _tidy(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member whose numbers can be written again. Raises GuestError for a device that cannot be."""
    seconds = float(member.mtime)
    member.mtime = min(max(seconds, 0), MOST_SECONDS) if math.isfinite(seconds) else 0
    if member.isdev() and not all(0 <= each < MOST_DEVICES for each in (member.devmajor, member.devminor)):
        raise GuestError(f"a layer of the container image has a device that cannot be: {member.name!r}")
    return member


def _split(name: str) -> Words:
    """Return the parts of a member's name. Raises GuestError for one that leads out of the tree."""
    words = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in words or "\0" in name or len(words) > MOST_FOLDERS:
        raise GuestError(f"a layer of the container image has an entry named {name!r}")
    return words


@contextmanager
def _open(path: Path) -> Iterator[tarfile.TarFile]:
    """Yield a layer's tar, which is read from its beginning to its end. Raises GuestError."""
    with open_plain(path) as plain:
        mode: Literal["r:", "r|"] = "r:" if isinstance(plain, io.BufferedReader) else "r|"
        try:
            with tarfile.open(fileobj=plain, mode=mode) as tar:
                yield tar
        except tarfile.TarError as error:
            raise GuestError(f"the layer {path.name} is no tar", details=str(error)) from error
