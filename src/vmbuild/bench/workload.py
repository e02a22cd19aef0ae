"""What is measured: a build context, and the small manifest (`bench.toml`) that may lie in it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vmbuild.errors import UsageError
from vmbuild.model import parse_platforms

MANIFEST = "bench.toml"
DEFAULT_RUNS = 3
DEFAULT_PLATFORM = "linux/arm64"
MOST_RUNS = 100

IMAGE = "localhost/vmbuild-bench:latest"
"""What a container image is called where it is built to be measured."""


@dataclass(frozen=True)
class Workload:
    """One build, for one platform. `bases` are what its stages are made from, `stages` their names, "" without one."""

    name: str
    context: Path
    dockerfile: Path
    platform: str = DEFAULT_PLATFORM
    description: str = ""
    runs: int = DEFAULT_RUNS
    build_args: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None
    bases: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """Return its build arguments and target as docker, buildah and vmbuild all take them."""
        options = [word for key, value in self.build_args.items() for word in ("--build-arg", f"{key}={value}")]
        return [*options, "--target", self.target] if self.target else options


@dataclass(frozen=True)
class Choice:
    """What the command line says of a workload, before what its manifest says; None where it says nothing."""

    dockerfile: Path | None = None
    platforms: tuple[str, ...] = ()
    runs: int | None = None
    build_args: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None


def read_context(context: Path, choice: Choice) -> list[Workload]:
    """Return the builds of a context, one for each platform. Raises UsageError."""
    if not context.is_dir():
        raise UsageError(f"{context} is not a folder", resolution="Name the folder that holds the Dockerfile.")
    found = _read_manifest(context)
    file = choice.dockerfile or context / str(found.get("dockerfile", "Dockerfile"))
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {file}", details=str(error), resolution="Name the Dockerfile with -f."
        ) from error
    one = Workload(
        name=context.resolve().name,
        context=context,
        dockerfile=file,
        description=str(found.get("description", "")),
        runs=choice.runs or int(found.get("runs", DEFAULT_RUNS)),
        build_args={**found.get("build_args", {}), **choice.build_args},
        target=choice.target,
        bases=find_bases(text),
        stages=find_stages(text),
    )
    platforms = choice.platforms or parse_platforms(",".join(found.get("platforms", (DEFAULT_PLATFORM,))))
    return [replace(one, platform=platform) for platform in platforms]


def read_suite(folder: Path, choice: Choice) -> list[Workload]:
    """Return every build of a folder of contexts that has a manifest, by name. Raises UsageError when there is none."""
    contexts = sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))
    if not contexts:
        raise UsageError(f"no workload in {folder}", resolution=f"A folder with a {MANIFEST} is one: see examples/.")
    return [workload for context in contexts for workload in read_context(context, choice)]


KEYS: Mapping[str, type] = {
    "description": str,
    "dockerfile": str,
    "platforms": list,
    "runs": int,
    "build_args": dict,
}
"""What a manifest may say, and the types of TOML that it says it in."""


def _read_manifest(context: Path) -> dict[str, Any]:
    path = context / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}", details=str(error)) from error
    for key, value in found.items():
        if key not in KEYS:
            raise UsageError(f"{path} has a key {key!r} that no manifest has", resolution=f"Known: {', '.join(KEYS)}.")
        if type(value) is not KEYS[key]:
            raise UsageError(f"{path}: {key} cannot be {value!r}")
    _check_values(path, found)
    return found


def _check_values(path: Path, found: Mapping[str, Any]) -> None:
    if not 1 <= found.get("runs", 1) <= MOST_RUNS:
        raise UsageError(f"{path}: runs must be 1 to {MOST_RUNS}")
    if Path(str(found.get("dockerfile", ""))).name != str(found.get("dockerfile", "")):
        raise UsageError(f"{path}: the Dockerfile lies in the same folder")
    if not all(isinstance(value, str) for value in found.get("build_args", {}).values()):
        raise UsageError(f"{path}: the values of build_args are text")
    if "platforms" in found:
        parse_platforms(",".join(map(str, found["platforms"])))


_FROM = re.compile(r"^\s*FROM\s+(?:--\S+\s+)*(?P<base>\S+)(?:\s+AS\s+(?P<name>\S+))?\s*$", re.IGNORECASE | re.MULTILINE)


def find_stages(text: str) -> tuple[str, ...]:
    """Return the names of a Dockerfile's stages in their order, "" for one that has none."""
    return tuple((match["name"] or "").lower() for match in _FROM.finditer(text))


def find_bases(text: str) -> tuple[str, ...]:
    """Return what a Dockerfile's stages begin with that is neither another stage nor empty (`scratch`), each once."""
    names: Sequence[str] = find_stages(text)
    bases = [match["base"] for match in _FROM.finditer(text)]
    return tuple(dict.fromkeys(base for base in bases if base.lower() not in (*names, "scratch")))
