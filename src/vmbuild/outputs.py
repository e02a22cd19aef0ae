"""Where a container image goes when it is built: what `-o`, `--push` and `--load` say, as values."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vmbuild.errors import UsageError

STDOUT = "-"


class Kind(StrEnum):
    """A kind of output, by the type that buildx knows it by; `load` is vmbuild's own word."""

    DOCKER = "docker"
    OCI = "oci"
    TAR = "tar"
    LOCAL = "local"
    REGISTRY = "registry"
    IMAGE = "image"
    LOAD = "load"


ENGINES = ("docker", "podman", "nerdctl", "ctr")
"""Programs of the host that container images can be loaded with, in the order in which they are asked."""

ANY_ENGINE = "auto"
BOARD = "ssh://"

LEVELS = {"uncompressed": range(0), "gzip": range(10), "zstd": range(1, 23)}
"""The compressions of layers, and the levels that each has."""


@dataclass(frozen=True)
class Output:
    """One way out of a build.

    `dest` is a path or `-`; of a load it is one of ENGINES, `auto`, or `ssh://[USER@]HOST[:PORT]`. `names` are the
    container image's names there, none for the build's own. A `compression` of None is the kind's own; `force` holds it
    for layers too that have another already. `oci_types` None leaves the media types to the kind. `is_tar` is False for
    an OCI layout in a folder.
    """

    kind: Kind
    dest: str = ""
    names: tuple[str, ...] = ()
    compression: str | None = None
    level: int | None = None
    force: bool = False
    oci_types: bool | None = None
    is_tar: bool = True
    insecure: bool = False
    by_digest: bool = False

    @property
    def is_plain_archive(self) -> bool:
        """Tell whether it is an archive of the container image just as the guest has it."""
        return self == Output(Kind.DOCKER, self.dest)

    @property
    def is_folder(self) -> bool:
        """Tell whether it is a folder of the host."""
        return self.kind is Kind.LOCAL or (self.kind is Kind.OCI and not self.is_tar)

    @property
    def leaves_host(self) -> bool:
        """Tell whether it changes anything but a file or a folder."""
        return self.kind in (Kind.REGISTRY, Kind.LOAD)

    @property
    def deed(self) -> str:
        """What it does, for a sentence."""
        verbs = {Kind.REGISTRY: "push to", Kind.LOAD: "load into"}
        return f"{verbs.get(self.kind, 'write')} {','.join(self.names) or self.dest or 'the registry of its tags'}"

    @property
    def text(self) -> str:
        """This output as `parse_output` reads it."""
        fields = [f"type={self.kind}"]
        for key, option in _OPTIONS.items():
            value = getattr(self, option.field)
            if value != getattr(Output, option.field):
                fields.append(f"{key}={option.write(value)}")
        row = io.StringIO()
        csv.writer(row, lineterminator="").writerow(fields)
        return row.getvalue()

    def __str__(self) -> str:
        return self.dest if self.is_plain_archive or self.kind is Kind.LOAD else self.text


def _read_flag(text: str) -> bool:
    flags = {"true": True, "1": True, "t": True, "false": False, "0": False, "f": False}
    if text.lower() not in flags:
        raise ValueError("is neither true nor false")
    return flags[text.lower()]


def _read_compression(text: str) -> str:
    if text not in LEVELS:
        raise ValueError(f"is none of {', '.join(LEVELS)}")
    return text


def _read_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        check_name(name)
    return names


def _write_flag(value: bool) -> str:
    return str(value).lower()


@dataclass(frozen=True)
class _Option:
    """A key of `-o`: the field it sets, the kinds that have it, and how its value is read and written."""

    field: str
    kinds: frozenset[Kind]
    read: Callable[[str], object]
    write: Callable[..., str] = str


_LAYERED = frozenset({Kind.DOCKER, Kind.OCI, Kind.REGISTRY})
_OPTIONS = {
    "dest": _Option("dest", frozenset({*Kind} - {Kind.REGISTRY, Kind.IMAGE}), str),
    "name": _Option("names", frozenset({*_LAYERED, Kind.IMAGE}), _read_names, ",".join),
    "compression": _Option("compression", _LAYERED, _read_compression),
    "compression-level": _Option("level", _LAYERED, int),
    "force-compression": _Option("force", _LAYERED, _read_flag, _write_flag),
    "oci-mediatypes": _Option("oci_types", _LAYERED, _read_flag, _write_flag),
    "tar": _Option("is_tar", frozenset({Kind.OCI}), _read_flag, _write_flag),
    "registry.insecure": _Option("insecure", frozenset({Kind.REGISTRY}), _read_flag, _write_flag),
    "push-by-digest": _Option("by_digest", frozenset({Kind.REGISTRY}), _read_flag, _write_flag),
}
_TYPES = ", ".join(kind for kind in Kind if kind is not Kind.LOAD)

_NAME = re.compile(
    r"(?:(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::\d{1,5})?/)?"
    r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*(?::\w[\w.-]{0,127})?",
    re.ASCII,
)
"""A name with an optional tag. Source: distribution/reference, reference.go."""

_BOARD = re.compile(
    r"ssh://(?P<user>[A-Za-z0-9_][\w.-]*@)?(?P<host>[A-Za-z0-9][\w.-]*|\[[0-9a-fA-F:]+\])(?P<port>:\d{1,5})?/?",
    re.ASCII,
)


def check_name(name: str) -> None:
    """See that a container image can have a name. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a container image")


def parse_output(text: str) -> Output:
    """Return the output that a value of `-o` means, as buildx writes it or a bare place. Raises UsageError.

    A bare place is a docker archive, or `type=local` when it is a folder.
    """
    fields = _split(text)
    if not any(field.startswith(("type=", "dest=")) for field in fields):
        return _parse_place(text)
    try:
        return _read_fields(_pairs(fields))
    except ValueError as error:
        raise UsageError(
            f"vmbuild cannot write {text}: {error}",
            resolution=f"Use -o FILE, -o FOLDER/, or -o type=TYPE,dest=PLACE,...; the types are {_TYPES}.",
        ) from error


def _split(text: str) -> list[str]:
    return next(csv.reader([text]), [""]) if "\n" not in text else [text]


def _parse_place(text: str) -> Output:
    if not text:
        raise UsageError("an output is empty", resolution="Use -o FILE, -o FOLDER/, or -o type=TYPE,dest=PLACE,...")
    is_folder = text != STDOUT and (text.endswith(("/", "/.", "/..")) or text in (".", "..") or os.path.isdir(text))  # noqa: PTH112
    return Output(Kind.LOCAL if is_folder else Kind.DOCKER, text)


def _pairs(fields: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for field in fields:
        key, equals, value = field.partition("=")
        key = key.strip().lower()
        if not equals:
            raise ValueError(f"{field!r} has no value")
        if key in pairs:
            raise ValueError(f"{key} is there twice")
        pairs[key] = value
    return pairs


def _read_fields(pairs: dict[str, str]) -> Output:
    kind = _read_kind(pairs)
    values: dict[str, object] = {}
    for key, value in pairs.items():
        option = _OPTIONS.get(key)
        if option is None or kind not in option.kinds:
            known = ", ".join(name for name, each in _OPTIONS.items() if kind in each.kinds)
            raise ValueError(f"type={kind} has no {key}; it has {known}")
        try:
            values[option.field] = option.read(value)
        except ValueError as error:
            raise ValueError(f"{key}={value}: {error}") from error
    return _complete(Output(kind, **values))  # type: ignore[arg-type]


def _read_kind(pairs: dict[str, str]) -> Kind:
    """Take what says the kind from the pairs and return it."""
    word = pairs.pop("type", Kind.LOCAL if "dest" not in pairs else "")
    if word not in list(Kind):
        raise ValueError(f"there is no type={word}" if word else "a type= is missing")
    kind = Kind(word)
    if kind is Kind.IMAGE and _read_flag(pairs.pop("push", "false")):
        return Kind.REGISTRY
    if kind is Kind.REGISTRY and not _read_flag(pairs.pop("push", "true")):
        return Kind.IMAGE
    if kind is Kind.DOCKER and "dest" not in pairs:
        pairs["dest"] = "docker"
        return Kind.LOAD
    if kind is Kind.IMAGE:
        for key in ("compression", "compression-level", "force-compression", "oci-mediatypes"):
            pairs.pop(key, None)  # what stays in the machine stays as it is
    return kind


def _complete(output: Output) -> Output:
    """Return an output that makes sense as a whole. Raises ValueError."""
    if output.kind in (Kind.DOCKER, Kind.OCI, Kind.TAR, Kind.LOCAL, Kind.LOAD) and not output.dest:
        raise ValueError("dest= is missing")
    if output.is_folder and output.dest == STDOUT:
        raise ValueError("a folder cannot go to standard output")
    if output.level is not None:
        levels = LEVELS[output.compression or default_compression(output.kind)]
        if output.level not in levels:
            kind = f"{levels[0]} to {levels[-1]}" if levels else "no levels"
            raise ValueError(f"{output.compression or default_compression(output.kind)} has {kind}")
    if output.compression == "zstd" and output.oci_types is False and output.kind is not Kind.DOCKER:
        raise ValueError("compression=zstd needs oci-mediatypes=true")
    if output.kind is Kind.LOAD:
        check_engine(output.dest)
    return output


def default_compression(kind: Kind) -> str:
    """Return how new layers are compressed where nothing was said: as `docker save` does it, and as a push does."""
    return "gzip" if kind in (Kind.OCI, Kind.REGISTRY) else "uncompressed"


def check_engine(dest: str) -> None:
    """See that a container image can be loaded there. Raises ValueError."""
    if dest not in (ANY_ENGINE, *ENGINES) and not _BOARD.fullmatch(dest):
        raise ValueError(f"{dest!r} is none of {', '.join(ENGINES)}, nor ssh://[USER@]HOST[:PORT]")


def parse_load(text: str) -> Output:
    """Return the output that a value of `--load` means. Raises UsageError."""
    try:
        check_engine(text)
    except ValueError as error:
        raise UsageError(f"cannot load the container image: {error}") from error
    return Output(Kind.LOAD, text)


def board_of(dest: str) -> tuple[str, str] | None:
    """Return `[user@]host` and the port, or nothing for it, of a board; None for an engine of the host."""
    match = _BOARD.fullmatch(dest)
    if match is None:
        return None
    return (match["user"] or "") + match["host"].strip("[]"), (match["port"] or "").lstrip(":")


def names_of(output: Output, tags: Sequence[str]) -> tuple[str, ...]:
    """Return the names that a container image has at an output: its own, else the build's."""
    return output.names or tuple(tags)


def check_together(outputs: Sequence[Output], tags: Sequence[str]) -> None:
    """See that a build can have all of these outputs. Raises UsageError."""
    places = [output.dest for output in outputs if not output.leaves_host and output.kind is not Kind.IMAGE]
    for place in places:
        if places.count(place) > 1:
            what = "standard output" if place == STDOUT else place
            raise UsageError(f"two outputs would be written to {what}", resolution="Give each a place of its own.")
    for output in outputs:
        if output.kind is Kind.REGISTRY:
            _check_push(output, tags)


def _check_push(output: Output, tags: Sequence[str]) -> None:
    names = names_of(output, tags)
    if not names:
        raise UsageError("nothing says where to push the container image", resolution="Add -t REGISTRY/NAME:TAG.")
    try:
        for name in names:
            check_name(name)
    except ValueError as error:
        raise UsageError(f"cannot push: {error}", resolution="Names are like localhost:5000/app:1.") from error
