"""What is settled before a machine is touched: its architecture, hence guest image, limits, and platforms."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vmbuild.errors import UsageError
from vmbuild.image import catalog, given
from vmbuild.machine import lifetime
from vmbuild.machine.argv import ROWS
from vmbuild.machine.facts import load_facts
from vmbuild.machine.files import MachineFiles
from vmbuild.model import ARCH_DEFAULTS, MIB, Arch, ImageSpec, MachineRequest, arch_name, format_size

RUNS = {
    Arch.ARM64: ("linux/arm64", "linux/arm/v7", "linux/arm/v6"),
    Arch.ARMHF: ("linux/arm/v7", "linux/arm/v6"),
}
"""The platforms that a machine of an architecture builds for, its own first."""


def settle(request: MachineRequest, files: MachineFiles, cache: Path) -> MachineRequest:
    """Return the request with what follows from the machine's architecture, the same for every start of it.

    A machine that is there keeps its architecture and guest image when none is asked for. Raises UsageError when it is
    at work as another than the one that is asked for, and for more CPUs or memory than its architecture can have.
    """
    arch = machine_arch(request, files, cache)
    if not {"arch", "image"} & request.given:
        request = replace(request, image=_usual_image(request, files, arch, cache))
    return fit(request, arch)


def _usual_image(request: MachineRequest, files: MachineFiles, arch: Arch, cache: Path) -> str:
    """Return the guest image that the machine had, else the architecture's own."""
    facts, folders = load_facts(files), catalog.find_folders(cache)
    for name in (facts.image, request.image) if facts is not None else (request.image,):
        with suppress(UsageError):  # its row is gone
            if catalog.load_image(name, folders).arch == arch:  # by its name only: the facts may be a bundle's
                return name
    return ARCH_DEFAULTS[arch].image


def machine_arch(request: MachineRequest, files: MachineFiles, cache: Path) -> Arch:
    """Return the architecture that the machine has or gets. Raises UsageError when it is at work as another."""
    facts = load_facts(files)
    asked = choose_image(request, cache).arch
    if facts is None or facts.arch == asked:
        return asked
    if not {"arch", "image"} & request.given:
        return Arch(facts.arch)
    state = lifetime.status(files).state
    if state == "stopped":
        return asked
    raise UsageError(
        f"the machine {files.name} is {state} with the architecture {arch_name(facts.arch)}, not {arch_name(asked)}",
        resolution=f"Choose another machine with --name, or end this one first: `vmbuild down {files.name}`.",
    )


def choose_image(request: MachineRequest, cache: Path) -> ImageSpec:
    """Return the row of a request's guest image. Raises UsageError when it contradicts the architecture asked for."""
    spec = given.find_row(request.image, cache, arch=request.arch or Arch.ARM64)
    if request.arch not in (None, spec.arch):
        raise UsageError(
            f"the guest image {spec.name} is for {arch_name(spec.arch)}, and --arch asks for {arch_name(request.arch)}",
            resolution="Leave one of --image and --arch out.",
        )
    return spec


def fit(request: MachineRequest, arch: Arch) -> MachineRequest:
    """Return the request with no more CPUs than a machine of this architecture can have.

    Raises UsageError where more of them were chosen, or more memory than it can have.
    """
    row = ROWS[arch]
    if "cpus" in request.given and request.cpus > row.max_cpus:
        raise UsageError(
            f"a machine of the architecture {arch_name(arch)} has {row.max_cpus} CPUs at most, not {request.cpus}",
            resolution=f"Give --cpus {row.max_cpus} or less.",
        )
    most = limit_memory(request.memory_mib, arch)
    if most < request.memory_mib:
        raise UsageError(
            f"a machine of the architecture {arch_name(arch)} has {format_size(most * MIB)} of memory at most",
            resolution=f"Give --memory {most}M or less.",
        )
    return replace(request, cpus=min(request.cpus, row.max_cpus))


def limit_memory(memory_mib: int, arch: Arch) -> int:
    """Return as much of this memory as a machine of this architecture can have."""
    return min(memory_mib, ROWS[arch].max_memory_mib or memory_mib)


def choose_platforms(asked: Sequence[str], arch: Arch) -> tuple[str, ...]:
    """Return the platforms to build for, by default the machine's own. Raises UsageError for one that it cannot run."""
    platforms = tuple(asked) or (default_platform(arch),)
    refuse_foreign(platforms, arch)
    return platforms


def default_platform(arch: Arch) -> str:
    """Return the platform of a machine's own programs."""
    return RUNS[arch][0]


def refuse_foreign(platforms: Sequence[str], arch: Arch) -> None:
    """Raise UsageError for a platform whose programs a machine of this architecture cannot run."""
    for platform in platforms:
        if platform not in RUNS[arch]:
            others = [arch_name(each) for each, names in RUNS.items() if platform in names]
            elsewhere = f" A machine with --arch {others[0]} does." if others else ""
            raise UsageError(
                f"a machine of the architecture {arch_name(arch)} does not build for {platform}",
                resolution=f"Choose {' or '.join(RUNS[arch])}.{elsewhere}",
            )
