"""The program of examples/readdir32, compiled on this host for 32-bit ARM: static, so that it runs anywhere."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = "arm-linux-gnueabihf-gcc"
SOURCE = Path(__file__).parents[2] / "examples/readdir32/readdir32.c"
FLAGS = ("-O2", "-Wall", "-Werror", "-static", "-U_TIME_BITS", "-U_FILE_OFFSET_BITS", "-D_FILE_OFFSET_BITS=32")

LIST_FRESH_FOLDER = """set -e
work=$(mktemp -d /tmp/readdir32.XXXXXX)
cat >"$work/readdir32"
chmod +x "$work/readdir32"
mkdir "$work/many"
for name in 1 2 3 4 5 6; do : >"$work/many/$name"; done
df -T "$work/many" | awk 'NR == 2 { print $2 }'
"$work/readdir32" "$work/many"
rm -r "$work"
"""
"""Reads the program from standard input; prints the file system's type and what the program says of six files."""


def compile_readdir32(folder: Path) -> Path:
    """Return the compiled program, in this folder. Skips the test where there is no compiler for it."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed (Debian: gcc-arm-linux-gnueabihf, libc6-dev-armhf-cross)")
    program = folder / "readdir32"
    subprocess.run([COMPILER, *FLAGS, "-o", str(program), str(SOURCE)], check=True)
    return program


def fill_folder(folder: Path) -> Path:
    """Return a new folder with six files."""
    many = folder / "many"
    many.mkdir()
    for name in "123456":
        (many / name).touch()
    return many
