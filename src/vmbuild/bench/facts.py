"""What a report tells of the host it was made on, so that another can tell whether it compares."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from vmbuild.model import format_size

FLAGS = ("-machine", "-accel", "-cpu", "-smp", "-m")
"""The options of QEMU that decide how fast a machine is; the others name files and sockets of this host."""


def host_facts() -> Mapping[str, str]:
    """Return what this host is and how busy it was: CPU, memory, kernel, load."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    load = ", ".join(f"{each:.2f}" for each in os.getloadavg())
    return {
        "CPU": f"{_cpu_name()}, {os.cpu_count()} of them",
        "CPUs used": ", ".join(map(str, sorted(os.sched_getaffinity(0)))),
        "memory": format_size(pages),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load at the beginning": load,
    }


def _cpu_name() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def pick_flags(argv: Sequence[str]) -> str:
    """Return those options of a QEMU command line that decide how fast it is."""
    return " ".join(f"{option} {value}" for option, value in pairwise(argv) if option in FLAGS)
