"""What the kernel is told of an emulator, and what it says of those that it knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmbuild.bench import binfmt
from vmbuild.bench.binfmt import EMULATORS
from vmbuild.errors import HostError
from vmbuild.model import PLATFORMS

ARM64 = EMULATORS["linux/arm64"]


def test_every_platform_has_an_emulator_and_a_cpu() -> None:
    assert set(EMULATORS) == set(PLATFORMS) == set(binfmt.NATIVE)


@pytest.mark.parametrize(("name", "machine"), [("linux/arm64", 183), ("linux/arm/v7", 40)])
def test_a_row_is_for_elf_programs_of_the_architecture(name: str, machine: int) -> None:
    row = binfmt.row_for(EMULATORS[name], "/usr/bin/it")
    _, called, kind, offset, magic, mask, program, flags = row.split(":")
    assert (kind, offset, program, flags) == ("M", "", "/usr/bin/it", "POF")
    assert called == EMULATORS[name].name
    head, kept = (bytes.fromhex(re.sub(r"\\x", "", text)) for text in (magic, mask))
    assert len(head) == len(kept) == 20
    assert head[:4] == b"\x7fELF"
    assert int.from_bytes(head[18:20], "little") == machine  # e_machine: EM_AARCH64, EM_ARM
    assert kept[16] == 0xFE  # both ET_EXEC and ET_DYN


def entry(folder: Path, flags: str = "POF", state: str = "enabled") -> Path:
    (folder / "status").write_text("enabled\n")
    text = f"{state}\ninterpreter /usr/bin/qemu-aarch64\nflags: {flags}\noffset 0\nmagic 7f454c46\n"
    (folder / ARM64.name).write_text(text)
    return folder


def test_a_handler_that_works_in_containers_is_found(tmp_path: Path) -> None:
    assert binfmt.find_registered(ARM64, entry(tmp_path)) == "/usr/bin/qemu-aarch64"


def test_why_there_is_none_is_said(tmp_path: Path) -> None:
    assert "no binfmt_misc" in binfmt.why_not_registered(ARM64, tmp_path / "none")
    assert "not mounted" in binfmt.why_not_registered(ARM64, tmp_path)
    (tmp_path / "status").write_text("disabled\n")
    assert "switched off" in binfmt.why_not_registered(ARM64, tmp_path)
    (tmp_path / "status").write_text("enabled\n")
    assert "no handler qemu-aarch64" in binfmt.why_not_registered(ARM64, tmp_path)
    for flags, state in (("OC", "enabled"), ("POF", "disabled")):
        table = entry(tmp_path, flags, state)
        assert binfmt.find_registered(ARM64, table) is None
        assert "no flag F" in binfmt.why_not_registered(ARM64, table)


@pytest.mark.parametrize("release", ["6.7.0", "6.12.1-amd64", "7.0"])
def test_newer_kernels_have_a_table_for_each_namespace(release: str) -> None:
    binfmt.check_namespaces(release)


@pytest.mark.parametrize("release", ["6.1.0-25-amd64", "5.15", "odd"])
def test_older_ones_have_one_for_all(release: str) -> None:
    with pytest.raises(HostError, match="one binfmt_misc for all"):
        binfmt.check_namespaces(release)


@pytest.mark.parametrize(
    ("text", "version", "short"),
    [
        ("qemu-aarch64 version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright", "10.0.2 (Debian 1:10.0.2+ds-2)", "10.0.2"),
        ("QEMU emulator version 9.2.0\nCopyright", "9.2.0", "9.2.0"),
    ],
)
def test_versions_are_read_of_both_kinds_of_program(tmp_path: Path, text: str, version: str, short: str) -> None:
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    assert binfmt.version_of(str(program)) == version
    assert binfmt.short_version(version) == short
