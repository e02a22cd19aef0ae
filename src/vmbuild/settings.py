"""Every option of a machine, declared once: flag, environment variable, file key, default and help in one row."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import platformdirs

from vmbuild.address import is_place
from vmbuild.errors import UsageError
from vmbuild.model import (
    ARCH_DEFAULTS,
    ARCHES,
    GIB,
    MIB,
    Arch,
    Home,
    MachineRequest,
    PassOn,
    arch_name,
    format_size,
    parse_size,
)
from vmbuild.networks import parse_authorities, parse_mirrors, parse_ports, parse_registries

F = TypeVar("F", bound=Callable[..., Any])
PROJECT_FILE = "vmbuild.toml"
MIN_MEMORY = 256 * MIB
MAX_CPUS = 512
"""What GICv3 on QEMU's virt machine allows (QEMU, hw/arm/virt.c)."""


@dataclass(frozen=True)
class Setting:
    """One option. `parse` raises UsageError or ValueError; a project's file may not say what is `trusted_only`."""

    key: str
    metavar: str
    help: str
    default: Callable[[], str]
    default_text: str
    parse: Callable[[str], Any]
    trusted_only: Callable[[str], bool] = lambda _: False

    @property
    def flag(self) -> str:
        """The command-line option."""
        return "--" + self.key.replace("_", "-")

    @property
    def env(self) -> str:
        """The environment variable."""
        return "VMBUILD_" + self.key.upper()


@dataclass(frozen=True)
class Value:
    """A setting's value, the text it was read from, and where that came from."""

    value: Any
    text: str
    origin: str


FORMS = {"TIME": "TIME, such as 90s, 45m or 2h", "SIZE": "SIZE, such as 2G", "N": "a number"}
"""How a value is written, by its metavar."""


def _parse_arch(text: str) -> Arch:
    if text not in ARCHES:
        raise UsageError(
            f"vmbuild has no machines of architecture {text!r}", resolution=f"Choose {' or '.join(ARCHES)}."
        )
    return ARCHES[text]


def _parse_cpus(text: str) -> int:
    cpus = int(text)
    if not 1 <= cpus <= MAX_CPUS:
        raise UsageError(f"{cpus} is not a number of CPUs", resolution=f"Choose 1 to {MAX_CPUS}.")
    return cpus


def _parse_memory(text: str) -> int:
    memory = parse_size(text)
    if memory < MIN_MEMORY:
        raise UsageError(f"{text} of memory is too little for Docker", resolution="Give 256M or more.")
    return memory


def _parse_disk(text: str) -> int:
    size = parse_size(text)
    if size < GIB:
        raise UsageError(f"a disk of {text} is too small for Docker", resolution="Give 1G or more; it is sparse.")
    return size // MIB * MIB


def _parse_seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    seconds = float(number) * unit
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def _parse_limit(text: str) -> float | None:
    return None if text.lower() in ("off", "none") else _parse_seconds(text)


def _parse_switch(text: str) -> bool:
    words = {"on": True, "yes": True, "true": True, "1": True, "off": False, "no": False, "false": False, "0": False}
    if text.lower() not in words:
        raise ValueError
    return words[text.lower()]


def _parse_url(text: str) -> str:
    if text != "auto" and not text.startswith(("http://", "https://")):
        raise UsageError(f"{text!r} is not a mirror", resolution="Give an http or https URL, or auto.")
    return text.rstrip("/")


def _parse_folder(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~somebody, whom this host does not know
        raise ValueError(str(error)) from error


def _parse_image(text: str) -> str:
    """Return a name of the catalogue or a URL as it is, a path made absolute."""
    return str(_parse_folder(text)) if is_place(text) and "://" not in text else text


def _turns_on(text: str) -> bool:
    return text.lower() not in ("off", "no", "false", "0")


def _on() -> str:
    return "on"


def _host_cpus() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(min(usable, MAX_CPUS))


def _host_memory() -> str:
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return f"{max(512, min(4096, half // MIB))}M"


def _always(text: str) -> bool:  # noqa: ARG001
    return True


def _off() -> str:
    return "off"


SETTINGS = (
    Setting(
        *("name", "NAME", "The machine's name.", lambda: ARCH_DEFAULTS[Arch.ARM64].machine),
        *("default; arm of a 32-bit machine", str),
    ),
    Setting(
        *("arch", "ARCH", "Architecture of the machine: arm64, or arm for a 32-bit one.", lambda: "arm64"),
        *("arm64, or the image's", _parse_arch),
    ),
    Setting("cpus", "N", "Virtual CPUs of the machine.", _host_cpus, "all of the host's", _parse_cpus),
    Setting("memory", "SIZE", "Memory of the machine.", _host_memory, "half the host's, up to 4G", _parse_memory),
    Setting("disk", "SIZE", "Disk of the machine, sparse; can grow, never shrink.", lambda: "40G", "40G", _parse_disk),
    Setting(
        *("image", "IMAGE", "Guest image: a name of the catalogue, or a disk's path or URL#sha256=HEX."),
        lambda: ARCH_DEFAULTS[Arch.ARM64].image,
        *("debian-13-arm64; debian-13-armhf of a 32-bit machine", _parse_image, is_place),
    ),
    Setting("timeout", "TIME", "How long to wait until Docker answers.", lambda: "300s", "300s", _parse_seconds),
    Setting("time_limit", "TIME", "Suspend the machine before a build has taken so long.", _off, "off", _parse_limit),
    Setting("reserve", "TIME", "Kept of that beyond what suspending takes.", lambda: "60s", "60s", _parse_seconds),
    Setting("stall_timeout", "TIME", "End a build that does nothing for so long.", lambda: "1h", "1h", _parse_limit),
    Setting(
        *("snapshots", "on/off", "Start machines from a snapshot, made once in the background.", lambda: "on", "on"),
        _parse_switch,
    ),
    Setting(
        *("mirror", "URL", "Debian mirror to fetch packages from.", lambda: "auto"),
        *("auto: the one this host's apt uses, else the catalogue's", _parse_url, _always),
    ),
    Setting(
        *("security_mirror", "URL", "Debian security mirror.", lambda: "auto"),
        *("auto, as for the mirror", _parse_url, _always),
    ),
    Setting(
        *("proxy", "on/off", "Pass this host's proxies on, to Docker and the steps of builds.", _on, "on"),
        *(_parse_switch, _turns_on),
    ),
    Setting(
        *("ca", "FILES", "CA certificates to trust, in the guest and for downloads and pushes.", lambda: "auto"),
        *("auto: those that this host's administrator added", parse_authorities, _turns_on),
    ),
    Setting(
        *("registry_mirrors", "URLS", "Mirrors of Docker Hub, asked before it.", _off, "none"),
        *(parse_mirrors, _turns_on),
    ),
    Setting(
        *("insecure_registries", "HOSTS", "Registries without TLS, or without a valid certificate.", _off, "none"),
        *(parse_registries, _turns_on),
    ),
    Setting(
        *("host_ports", "PORTS", "Ports of the guest's localhost that are this host's.", _off),
        *("those of registries that a build names", parse_ports, _turns_on),
    ),
    Setting(
        *("logins", "on/off", "Give builds the logins of docker's config.json that they can use.", _on, "on"),
        *(_parse_switch, _turns_on),
    ),
    Setting(
        *(
            "cache_dir",
            "FOLDER",
            "Guest images, snapshots and downloads; may be deleted.",
            lambda: platformdirs.user_cache_dir("vmbuild"),
        ),
        *("the user's cache folder", _parse_folder, _always),
    ),
    Setting(
        *("state_dir", "FOLDER", "The machines: disks, keys, logs.", lambda: platformdirs.user_state_dir("vmbuild")),
        *("the user's state folder", _parse_folder, _always),
    ),
)
BY_KEY = {setting.key: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Settings:
    """Every setting's value and origin."""

    values: Mapping[str, Value]

    def __getitem__(self, key: str) -> Any:
        return self.values[key].value

    def as_request(self) -> MachineRequest:
        """Return the machine that these settings ask for."""
        return MachineRequest(
            name=self["name"],
            cpus=self["cpus"],
            memory_mib=self["memory"] // MIB,
            disk_bytes=self["disk"],
            image=self["image"],
            mirror=self["mirror"],
            security_mirror=self["security_mirror"],
            arch=None if self.values["arch"].origin == "default" else self["arch"],
            timeout_s=self["timeout"],
            snapshots=self["snapshots"],
            pass_on=PassOn(*(self[key] for key in PASSED_ON)),
            given=frozenset(key for key, value in self.values.items() if value.origin != "default"),
            demanded=frozenset(key for key, value in self.values.items() if value.origin == BY_KEY[key].flag),
        )

    def home(self) -> Home:
        """Return where vmbuild keeps things."""
        return Home(self["cache_dir"], self["state_dir"])


def resolve(
    flags: Mapping[str, str | None], env: Mapping[str, str], cwd: Path, user_config: Path | None = None
) -> Settings:
    """Return every setting: flag, else environment, else project file, else user's file, else default.

    Raises UsageError, naming the place, for a key nobody knows or a value that makes no sense.
    """
    user_config = user_config or Path(platformdirs.user_config_dir("vmbuild")) / "config.toml"
    project = find_project_file(cwd)
    files = [(path, _read_file(path)) for path in (project, user_config) if path is not None and _is_file(path)]
    if project is not None:
        _refuse_untrusted(project, files[0][1])
    values = {setting.key: _choose(setting, flags, env, files) for setting in SETTINGS}
    return Settings({**values, **_follow_arch(values)})


def _follow_arch(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return what the architecture decides where nothing was chosen: the guest image, and the machine's name."""
    defaults = ARCH_DEFAULTS[values["arch"].value]
    follow = {"name": defaults.machine, "image": defaults.image}
    return {key: Value(text, text, "default") for key, text in follow.items() if values[key].origin == "default"}


def find_project_file(cwd: Path) -> Path | None:
    """Return the `vmbuild.toml` of this folder or the nearest one above it, None when there is none."""
    candidates = (folder / PROJECT_FILE for folder in (cwd, *cwd.parents))
    return next((path for path in candidates if _is_file(path)), None)


def _is_file(path: Path) -> bool:
    """Tell whether a file is there; in a folder that may not be searched, as after `su`, there is none."""
    try:
        return path.is_file()
    except PermissionError:
        return False


def _read_file(path: Path) -> dict[str, str]:
    try:
        found = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError) as error:  # ValueError: no TOML, or no text at all
        raise UsageError(f"cannot read {path}", details=str(error)) from error
    for key in found:
        if key not in BY_KEY:
            near = difflib.get_close_matches(key, BY_KEY, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(BY_KEY)}."
            raise UsageError(f"{path} has a key {key!r} that vmbuild does not know", resolution=hint)
    return {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in found.items()}


def _refuse_untrusted(path: Path, found: Mapping[str, str]) -> None:
    for key, text in found.items():
        if BY_KEY[key].trusted_only(text):
            raise UsageError(
                f"{path} must not set {key!r}" + (f" to {text}" if key == "image" else ""),
                details="A project's file comes with the project; it may not say where your files go or come from.",
                resolution=f"Set it in your own configuration file, or as {BY_KEY[key].env}.",
            )


def _choose(
    setting: Setting, flags: Mapping[str, str | None], env: Mapping[str, str], files: list[tuple[Path, dict[str, str]]]
) -> Value:
    flag = flags.get(setting.key)
    candidates = [(setting.flag, flag), (f"environment {setting.env}", env.get(setting.env) or None)]
    candidates += [(str(path), found.get(setting.key)) for path, found in files]
    origin, text = next(((o, t) for o, t in candidates if t is not None), ("default", setting.default()))
    try:
        return Value(setting.parse(text), text, origin)
    except UsageError as error:
        raise UsageError(f"{error.brief} (from {origin})", resolution=error.resolution) from error
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{text!r} is no value for {setting.key} (from {origin})",
            resolution=f"{FORMS.get(setting.metavar, setting.metavar)}: {setting.help}",
        ) from error


def machine_options(*keys: str, completers: Mapping[str, Any] | None = None) -> Callable[[F], F]:
    """Return a decorator that gives a click command the options of these keys, and what completes their values."""
    complete = (completers or {}).get

    def decorate(command: F) -> F:
        for key in reversed(keys):
            setting = BY_KEY[key]
            text = f"{setting.help} [{setting.env}; default: {setting.default_text}]"
            names = (setting.flag, setting.key)
            option = click.option(*names, metavar=setting.metavar, help=text, shell_complete=complete(setting.key))
            command = option(command)
        return command

    return decorate


def settings_table() -> str:
    """Return the settings as a Markdown table."""
    rows = ["| flag | environment | key | default | what |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        flag = f"`{setting.flag} {setting.metavar}`" if setting.key in COMMAND_LINE + BUILD_LIMITS else "-"
        rows.append(f"| {flag} | `{setting.env}` | `{setting.key}` | {setting.default_text} | {setting.help} |")
    return "\n".join(rows)


BUILD_LIMITS = ("time_limit", "reserve", "stall_timeout")
"""The settings that are options of the commands that follow a build."""

PASSED_ON = ("proxy", "ca", "registry_mirrors", "insecure_registries", "host_ports", "logins")
"""The settings of what a guest gets of this host, in PassOn's order."""

COMMAND_LINE = (
    *("name", "arch", "cpus", "memory", "disk", "image", "timeout", "snapshots", "mirror", "security_mirror"),
    *PASSED_ON,
)
"""The settings that are options of `up`, `build` and `base`."""


def show(value: Value, key: str) -> str:
    """Return a value as people read it, and write it."""
    if isinstance(value.value, bool):
        return "on" if value.value else "off"
    if value.value is None:
        return "off"
    if isinstance(value.value, tuple):
        return ", ".join(map(str, value.value)) or "off"
    if isinstance(value.value, Arch):
        return arch_name(value.value)
    if isinstance(value.value, float):
        return f"{value.value:g}s"
    return format_size(value.value) if key in ("memory", "disk") else str(value.value)
