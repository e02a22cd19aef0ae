"""Small Debian packages and kernel modules, made by hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import struct
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import zstandard

from vmbuild.image.packages import Package, package_path

Entry = tuple[tarfile.TarInfo, bytes]

RELEASE = "6.12-test"
MODULES = f"usr/lib/modules/{RELEASE}"


def entry(name: str, kind: bytes, data: bytes = b"", *, mode: int = 0o644, target: str = "") -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size, info.linkname = kind, mode, len(data), target
    info.uname = info.gname = "builder"
    return info, data


def file(name: str, data: bytes = b"", mode: int = 0o644, *, owner: tuple[int, int] = (0, 0)) -> Entry:
    made = entry(name, tarfile.REGTYPE, data, mode=mode)
    made[0].uid, made[0].gid = owner
    return made


def folder(name: str, mode: int = 0o755) -> Entry:
    return entry(name, tarfile.DIRTYPE, mode=mode)


def symlink(name: str, target: str) -> Entry:
    return entry(name, tarfile.SYMTYPE, mode=0o777, target=target)


def hardlink(name: str, target: str) -> Entry:
    return entry(name, tarfile.LNKTYPE, target=target)


def device(name: str, major: int, minor: int) -> Entry:
    made = entry(name, tarfile.CHRTYPE, mode=0o666)
    made[0].devmajor, made[0].devminor = major, minor
    return made


def pack_tar(entries: Iterable[Entry]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pack_ar(members: Mapping[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, data in members.items():
        out += b"%-16s%-12d%-6d%-6d%-8o%-10d`\n" % (name.encode(), 0, 0, 0, 0o100644, len(data))
        out += data + b"\n" * (len(data) % 2)
    return out


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".xz":
        return lzma.compress(data, preset=0)
    if suffix == ".zst":
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return gzip.compress(data, mtime=0) if suffix == ".gz" else data


def pack_deb(control: Mapping[str, bytes], entries: Iterable[Entry], suffix: str = ".xz") -> bytes:
    """Return a .deb; `control` are the files of its control part."""
    named = pack_tar(file(f"./{name}", data) for name, data in control.items())
    parts = {"control.tar": named, "data.tar": pack_tar(entries)}
    return pack_ar(
        {"debian-binary": b"2.0\n", **{name + suffix: compress(data, suffix) for name, data in parts.items()}}
    )


def put_package(
    downloads: Path,
    name: str,
    entries: Iterable[Entry] = (),
    *,
    fields: str = "",
    control: Mapping[str, bytes] | None = None,
    suffix: str = ".xz",
) -> Package:
    """Write a package where the cache has it; `fields` are further lines of its control file."""
    stanza = f"Package: {name}\nVersion: 1\nArchitecture: arm64\nDescription: {name}\n{fields}"
    return put_deb(downloads, name, pack_deb({"control": stanza.encode(), **(control or {})}, entries, suffix))


def put_deb(downloads: Path, name: str, data: bytes) -> Package:
    """Write a package file, whatever is in it, where the cache has it."""
    sha256 = hashlib.sha256(data).hexdigest()
    package = Package(name, "1", "arm64", sha256, len(data), "", "", "", "", False, "optional", "")
    path = package_path(package, downloads)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return package


def module(
    name: str, depends: Sequence[str] = (), *, soft: str = "", aliases: Sequence[str] = (), wide: bool = True
) -> bytes:
    """Return a kernel module as an ELF file, 64 or 32 bits, that exports a symbol and needs those of `depends`.

    Both `.modinfo` (which vmbuild reads) and the symbols (which depmod reads) say what it depends on.
    """
    facts = [f"alias={alias}" for alias in aliases] + [f"depends={','.join(depends)}", f"name={name}"]
    facts += [f"softdep={soft}"] if soft else []
    needs = [f"{need.replace('-', '_')}_symbol" for need in depends]
    sections = {
        b".modinfo": b"".join(fact.encode() + b"\0" for fact in facts),
        b"__ksymtab_strings": f"{name.replace('-', '_')}_symbol".encode() + b"\0",
        b".strtab": b"\0" + b"".join(need.encode() + b"\0" for need in needs),
        b".symtab": _symbols(needs, wide=wide),
    }
    return _elf(sections, wide=wide)


def _symbols(names: Sequence[str], *, wide: bool) -> bytes:
    """Return a table of undefined global symbols (elf(5), Elf32_Sym and Elf64_Sym)."""
    out, offset = bytes(24 if wide else 16), 1
    for name in names:
        out += (
            struct.pack("<IBBHQQ", offset, 0x10, 0, 0, 0, 0) if wide else struct.pack("<IIIBBH", offset, 0, 0, 16, 0, 0)
        )
        offset += len(name) + 1
    return out


def _elf(sections: Mapping[bytes, bytes], *, wide: bool) -> bytes:
    """Return a little-endian relocatable ELF file of these sections."""
    sections = {b"": b"", **sections, b".shstrtab": b""}
    names = b"".join(name + b"\0" for name in sections)
    body, headers, at = b"", b"", 64 if wide else 52
    for name, data in sections.items():
        data = names if name == b".shstrtab" else data
        kind = {b"": 0, b".symtab": 2, b".strtab": 3, b".shstrtab": 3}.get(name, 1)
        where = 0 if not name else names.index(b"\0" + name + b"\0") + 1
        layout = "<IIQQQQIIQQ" if wide else "<IIIIIIIIII"
        headers += struct.pack(layout, where, kind, 0, 0, at + len(body), len(data), 0, 0, 1, 0)
        body += data
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    layout, header_size, section_size = ("<HHIQQQIHHHHHH", 64, 64) if wide else ("<HHIIIIIHHHHHH", 52, 40)
    machine = 183 if wide else 40  # EM_AARCH64, EM_ARM
    count = len(sections)
    fields = (1, machine, 1, 0, 0, at + len(body), 0, header_size, 0, 0, section_size, count, count - 1)
    return ident + struct.pack(layout, *fields) + body + headers
