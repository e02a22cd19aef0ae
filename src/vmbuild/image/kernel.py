"""A kernel package -> the files QEMU boots: kernel, initramfs, and module tables that busybox's modprobe reads."""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from vmbuild.errors import GuestImageError
from vmbuild.image.tree import File, Link


@dataclass(frozen=True)
class Module:
    """A kernel module: its path in the tree (decompressed, `.ko`), what it depends on, the aliases it serves.

    `soft_depends` are wanted before it and `followers` after it, where the kernel has them (modprobe.d(5), softdep).
    """

    path: str
    name: str
    depends: tuple[str, ...]
    aliases: tuple[str, ...]
    soft_depends: tuple[str, ...]
    followers: tuple[str, ...]
    data: bytes


def read_module(path: str, data: bytes) -> Module:
    """Return a module from its file in a package, decompressed here so that the guest need not."""
    if path.endswith(".xz"):
        path, data = path.removesuffix(".xz"), lzma.decompress(data)
    facts: dict[str, list[str]] = {}
    for line in _elf_section(data, b".modinfo").split(b"\0"):
        key, _, value = line.decode(errors="replace").partition("=")
        facts.setdefault(key, []).append(value)
    depends = [name for name in ",".join(facts.get("depends", [])).split(",") if name]
    before, _, after = " ".join(facts.get("softdep", [])).partition("post:")
    return Module(
        path,
        _name(PurePosixPath(path).stem),
        tuple(map(_name, depends)),
        tuple(facts.get("alias", [])),
        tuple(map(_name, before.replace("pre:", "").split())),
        tuple(map(_name, after.split())),
        data,
    )


def _name(text: str) -> str:
    return text.replace("-", "_")


def _elf_section(data: bytes, wanted: bytes) -> bytes:
    """Return a section of a little-endian ELF file by name, empty when it has none (elf(5))."""
    wide = data[4] == 2
    e_shoff, e_shentsize, e_shnum, e_shstrndx = (
        struct.unpack_from("<40xQ10xHHH", data) if wide else struct.unpack_from("<32xI10xHHH", data)
    )
    layout = "<II8x8xQQ" if wide else "<II4x4xII"
    headers = [struct.unpack_from(layout, data, e_shoff + i * e_shentsize) for i in range(e_shnum)]
    names = headers[e_shstrndx][2]
    for name, _type, offset, size in headers:
        end = data.index(b"\0", names + name)
        if data[names + name : end] == wanted:
            return data[offset : offset + size]
    return b""


def load_order(modules: Mapping[str, Module], wanted: Iterable[str], builtin: frozenset[str]) -> list[Module]:
    """Return the wanted modules, each after what it depends on; built-in ones are left out.

    Soft dependencies come too where the kernel has them, in their order as far as the hard ones allow. Raises
    GuestImageError for a module that the kernel has neither built in nor as a module.
    """

    def around(module: Module) -> tuple[Iterable[str], Iterable[str]]:
        soft = filter(modules.__contains__, module.soft_depends)
        return (*module.depends, *soft), filter(modules.__contains__, module.followers)

    softly = _walk(modules, wanted, builtin, around)
    # A soft wish may contradict a hard need; a second walk over needs alone settles it.
    return _hard_order(modules, [module.name for module in softly], builtin)


def _hard_order(modules: Mapping[str, Module], wanted: Iterable[str], builtin: frozenset[str]) -> list[Module]:
    return _walk(modules, wanted, builtin, lambda module: (module.depends, ()))


Around = Callable[[Module], tuple[Iterable[str], Iterable[str]]]
"""What is loaded before a module and what after it, by name."""


def _walk(
    modules: Mapping[str, Module], wanted: Iterable[str], builtin: frozenset[str], around: Around
) -> list[Module]:
    order: list[Module] = []
    visited = set(builtin)  # soft dependencies can go in circles

    def visit(name: str) -> None:
        if name in visited:
            return
        visited.add(name)
        if name not in modules:
            raise GuestImageError(f"the kernel package has no module {name}")
        before, after = around(modules[name])
        for other in before:
            visit(other)
        order.append(modules[name])
        for other in after:
            visit(other)

    for name in wanted:
        visit(_name(name))
    return order


def builtin_modules(modules_builtin: str) -> frozenset[str]:
    """Return the names in a `modules.builtin` file."""
    return frozenset(_name(PurePosixPath(line).stem) for line in modules_builtin.split())


def module_tables(folder: str, modules: Mapping[str, Module], builtin: frozenset[str]) -> list[File]:
    """Return `modules.dep` and `modules.alias` for a module folder, as depmod would write them (modules.dep(5))."""
    dep, alias = [], []
    for module in modules.values():
        needs = [need for need in _hard_order(modules, [module.name], builtin) if need is not module]
        paths = " ".join(str(PurePosixPath(need.path).relative_to(folder)) for need in reversed(needs))
        dep.append(f"{PurePosixPath(module.path).relative_to(folder)}: {paths}".rstrip())
        alias += [f"alias {name} {module.name}" for name in module.aliases]
    return [
        File(f"{folder}/modules.dep", "\n".join([*dep, ""]).encode()),
        File(f"{folder}/modules.alias", "\n".join([*alias, ""]).encode()),
    ]


def pack_initramfs(entries: Sequence[File | Link]) -> bytes:
    """Return a cpio archive (newc, as the kernel's initramfs buffer format asks) of files, links and their folders."""
    out = bytearray()
    folders: dict[str, None] = {}
    for entry in entries:
        folders.update({str(parent): None for parent in reversed(PurePosixPath(entry.path).parents)})
    folders.pop(".", None)
    for number, folder in enumerate(folders, 1):
        out += _newc(number, folder, 0o040755, b"")
    for number, entry in enumerate(entries, len(folders) + 1):
        if isinstance(entry, Link):
            out += _newc(number, entry.path, 0o120777, entry.target.encode())
        else:
            out += _newc(number, entry.path, 0o100000 | entry.mode, entry.data)
    return bytes(out + _newc(0, "TRAILER!!!", 0, b""))


def _newc(inode: int, name: str, mode: int, data: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _pad4(header + encoded) + _pad4(data)


def _pad4(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
