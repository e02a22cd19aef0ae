"""The nouns every layer speaks: frozen values with their units in their names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from vmbuild.errors import UsageError
from vmbuild.inputs import Inputs
from vmbuild.outputs import Output

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_SIZE = re.compile(r"(?P<number>\d{1,18}(?:\.\d{1,18})?)\s*(?P<unit>[kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB}


def parse_size(text: str, *, what: str = "size") -> int:
    """Return the bytes that a size as people write it means: `2G`, `1500M`, `1.5GiB`, `1073741824`.

    Units are powers of 1024, as QEMU and Docker read them. Raises UsageError for anything else, zero included.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match["number"]) * _UNITS[match["unit"].lower()]) if match else 0
    if size <= 0:
        raise UsageError(
            f"{text!r} is not a {what}",
            resolution="Write a number and a unit, such as 2G, 1500M or 512MiB.",
        )
    return size


def format_size(size_bytes: float) -> str:
    """Return bytes as people read them, such as `1.5 GiB`."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{int(size_bytes)} B"


class Arch(StrEnum):
    """An architecture that a guest can have, by its Debian name."""

    ARM64 = "arm64"
    ARMHF = "armhf"


@dataclass(frozen=True)
class ArchDefaults:
    """What a machine of an architecture is called, and boots, where nothing else was chosen."""

    machine: str
    image: str


ARCHES = {"arm64": Arch.ARM64, "arm": Arch.ARMHF}
"""The architectures by the names that users give them, which are Docker's."""

ARCH_DEFAULTS = {
    Arch.ARM64: ArchDefaults("default", "debian-13-arm64"),
    Arch.ARMHF: ArchDefaults("arm", "debian-13-armhf"),
}


def arch_name(arch: str) -> str:
    """Return an architecture as users write it: `arm` for Debian's `armhf`."""
    return next(name for name, each in ARCHES.items() if each == arch)


@dataclass(frozen=True)
class Platform:
    """A platform that container images are built for: its parts as OCI image specs name them, and Debian's name.

    `debian` is the architecture whose packages run on every CPU of the platform; a machine's own architecture (`Arch`)
    is another matter.
    """

    name: str
    architecture: str
    variant: str
    debian: str


PLATFORMS = {
    row.name: row
    for row in (
        Platform("linux/arm64", "arm64", "", "arm64"),
        Platform("linux/arm/v7", "arm", "v7", "armhf"),
        Platform("linux/arm/v6", "arm", "v6", "armel"),
    )
}
"""The container platforms that an ARM machine builds for, by name."""

PLATFORM_ALIASES = {"linux/arm64/v8": "linux/arm64", "linux/arm": "linux/arm/v7"}
"""What else Docker takes for a platform's name (containerd, platforms.Normalize)."""


def parse_platforms(text: str) -> tuple[str, ...]:
    """Return the platforms of a list with commas, by their names in PLATFORMS, as they come.

    Raises UsageError for one that nobody knows, and for one that is there twice.
    """
    names = [PLATFORM_ALIASES.get(word, word) for word in (part.strip() for part in text.split(","))]
    for name in names:
        if name not in PLATFORMS:
            what = f"vmbuild does not build for {name!r}" if name else f"a platform is missing in {text!r}"
            raise UsageError(what, resolution=f"Choose among {', '.join(PLATFORMS)}; several with commas between.")
        if names.count(name) > 1:
            raise UsageError(f"the platform {name} is given twice", resolution="Name each platform once.")
    return tuple(names)


@dataclass(frozen=True)
class Repository:
    """One suite of a signed Debian repository, as the catalogue declares it.

    `mirror` names the mirror setting that it follows (`debian` or `debian-security`); `public_url` is the default.
    An `optional` repository that cannot be reached costs a warning, not the guest image. `alias` is the suite's other
    name (`stable` of `trixie`), for a mirror whose package index and Release file are out of step by the first.
    `only` are the packages that are taken from it; all of them where it is empty.
    """

    suite: str
    mirror: str
    public_url: str
    components: tuple[str, ...] = ("main",)
    optional: bool = False
    alias: str | None = None
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSpec:
    """A row of the catalogue: what every kind of guest image has.

    `folder` is where the catalogue file lies; guest files and keys are found relative to it.
    """

    kind: ClassVar[str]
    name: str
    arch: Arch
    description: str
    folder: Path
    guest_files: Path
    keyrings: tuple[Path, ...]
    machine_type: str
    cpu_model: str


@dataclass(frozen=True)
class ApplianceSpec(ImageSpec):
    """A guest image that is assembled from Debian packages and booted without firmware.

    `modules` are loaded in the initramfs, `exclude` are path prefixes left out of the root tree, `without` are
    packages left out of the dependency closure. The kernel is from `kernel_repositories` where there are any.
    """

    kind: ClassVar[str] = "appliance"
    repositories: tuple[Repository, ...]
    packages: tuple[str, ...]
    without: tuple[str, ...]
    exclude: tuple[str, ...]
    kernel: str
    kernel_repositories: tuple[Repository, ...]
    modules: tuple[str, ...]
    kernel_args: tuple[str, ...]


SYSTEMS = ("apt", "apk")
"""The package systems by which Docker can get into a disk (images/guest/disk/provision)."""


@dataclass(frozen=True)
class ConsoleLogin:
    """How to log in on a serial console: the prompts, as regular expressions, and what is answered."""

    login_prompt: str
    user: str
    password_prompt: str
    password: str
    shell_prompt: str


@dataclass(frozen=True)
class DiskSpec(ImageSpec):
    """A guest image that is a bootable disk from elsewhere.

    `url` is `https:`, `http:` or `file:`. It is verified by `digest` (`sha256:...` or `sha512:...`), else by its line
    in the file at `checksums`, which the keyrings must have signed where `signature` is given: a URL of its own, or
    the checksums' own for a signature within. `system`, one of SYSTEMS, is how Docker gets into it; it is first
    entered by `login` on the serial console, or through cloud-init when that is None.
    """

    kind: ClassVar[str] = "disk"
    url: str
    digest: str | None
    checksums: str | None
    signature: str | None
    system: str
    login: ConsoleLogin | None


@dataclass(frozen=True)
class KernelBoot:
    """A guest that QEMU boots directly: no firmware, a read-only root file system, a disk of its own beside it."""

    kernel: Path
    initrd: Path
    root: Path
    kernel_args: tuple[str, ...]


@dataclass(frozen=True)
class DiskBoot:
    """A guest that firmware boots from its disk, a copy of this one (qcow2)."""

    disk: Path


@dataclass(frozen=True)
class GuestImage:
    """A guest image that lies whole and verified in the cache. `digest` is the SHA-256 of its manifest."""

    name: str
    digest: str
    arch: Arch
    machine_type: str
    cpu_model: str
    boot: KernelBoot | DiskBoot
    size_bytes: int


@dataclass(frozen=True)
class Freed:
    """Space that the host has back, in bytes: a guest image, a snapshot, downloads, a machine's disk or memory."""

    what: str
    name: str
    size_bytes: int


@dataclass(frozen=True)
class Home:
    """Where vmbuild keeps things: `cache` may be deleted at any time, `state` holds the machines."""

    cache: Path
    state: Path


@dataclass(frozen=True)
class PassOn:
    """What of this host's ways into the network a guest gets.

    `authorities` are `auto`, `off` or files of certificates; `host_ports` are ports of the guest's localhost that are
    the host's. `logins` are given to builds alone, and to none that is `carried` to another host with its memory.
    """

    proxy: bool = False
    authorities: tuple[str, ...] = ()
    registry_mirrors: tuple[str, ...] = ()
    insecure_registries: tuple[str, ...] = ()
    host_ports: tuple[int, ...] = ()
    logins: bool = False
    carried: bool = False


@dataclass(frozen=True)
class MachineRequest:
    """The machine that the user's settings ask for, before its guest image is at hand.

    `mirror` and `security_mirror` are URLs or `auto` (the host's own apt, else the catalogue's public default).
    `given` names the settings that the user chose, as against defaults: a running machine that differs from a
    default is no surprise, one that differs from a choice deserves a warning. `demanded` names those of them that are
    on the command line: what cannot be is refused there, while a file may be older than the machine is large.
    `arch` is None where none was chosen: then it is the guest image's, or what the machine was last time.
    """

    name: str
    cpus: int
    memory_mib: int
    disk_bytes: int
    image: str
    mirror: str = "auto"
    security_mirror: str = "auto"
    arch: Arch | None = None
    timeout_s: float = 300.0
    snapshots: bool = True
    pass_on: PassOn = PassOn()
    given: frozenset[str] = frozenset()
    demanded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MachineSpec:
    """What a machine is asked to be."""

    name: str
    cpus: int
    memory_mib: int
    disk_bytes: int
    image: GuestImage


@dataclass(frozen=True)
class Endpoint:
    """Where a guest's SSH server listens on the host, and the files that authenticate both sides."""

    host: str
    port: int
    user: str
    client_key: Path
    host_public_key: Path


@dataclass(frozen=True)
class MachineStatus:
    """What a machine is at this moment, derived from its process and QMP. Times are POSIX seconds.

    `cpus` and `memory_mib` are the most that it can have, `memory_now_mib` what the balloon leaves it; `restored`
    tells whether it went on from a snapshot instead of booting.
    """

    name: str
    state: str
    pid: int | None = None
    ssh_port: int | None = None
    cpus: int | None = None
    memory_mib: int | None = None
    memory_now_mib: int | None = None
    disk_virtual_bytes: int | None = None
    disk_actual_bytes: int | None = None
    image: str | None = None
    image_digest: str | None = None
    rss_bytes: int | None = None
    started_at: float | None = None
    restored: bool | None = None
    arch: str | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class BuildRequest:
    """One `docker build`, as the user asked for it.

    `context` is a folder on the host, `-` (a tar or a Dockerfile on standard input) or a Git URL. `outputs` are its
    ways out, none to leave the container image in the guest. `attests` are buildx's values of `--attest`, such as
    `type=provenance,mode=max`. `terminal` is the
    columns and rows of the terminal that BuildKit may draw on. `platforms` are names of PLATFORMS, none for the
    machine's own; several make one container image with an index. `oom_retry` builds again, with more memory, what ran
    out of it. `inputs` is what the build is given besides its context.
    """

    context: str
    tags: tuple[str, ...] = ()
    dockerfile: str | None = None
    build_args: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    target: str | None = None
    platforms: tuple[str, ...] = ()
    no_cache: bool = False
    pull: bool = False
    progress: str = "plain"
    terminal: tuple[int, int] | None = None
    outputs: tuple[Output, ...] = ()
    attests: tuple[str, ...] = ()
    iidfile: Path | None = None
    metadata_file: Path | None = None
    quiet: bool = False
    oom_retry: bool = False
    inputs: Inputs = field(default_factory=Inputs)


@dataclass(frozen=True)
class BaseResult:
    """A base image that a machine now has."""

    reference: str
    platforms: tuple[str, ...]
    image_id: str


@dataclass(frozen=True)
class Delivered:
    """What became of an output: its kind, where it went, the digest that the container image has there, its bytes.

    Of a push, the bytes are those that the registry did not have.
    """

    kind: str
    where: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class BuildResult:
    """What came out of a build. `image_id` is `sha256:...`; sizes in bytes, times in seconds.

    `output` is the place of the first output, if any, and `output_bytes` what all of them wrote.
    """

    image_id: str
    tags: tuple[str, ...]
    output: str | None
    output_bytes: int
    context_bytes: int
    seconds: float
    outputs: tuple[Delivered, ...] = ()
