"""What the commands print with `--json`, as JSON Schema, made of the dataclasses that they print.

The files in docs/schemas are made of it by scripts/schemas. A fact may be added to a schema; one that goes, or means
something else, raises its version.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from vmbuild.cli.dockerhost import Environment
from vmbuild.doctor import HostCheck
from vmbuild.guest.resources import Usage
from vmbuild.image.store import Check
from vmbuild.machine.ports import Forward
from vmbuild.machine.snapshot import Snapshot
from vmbuild.machine.suspension import Suspension
from vmbuild.model import BaseResult, BuildResult, Freed, GuestImage, MachineStatus
from vmbuild.stock import ImageRow
from vmbuild.watch import Reading, Round

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
PLAIN: dict[Any, str] = {str: "string", Path: "string", bool: "boolean", int: "integer", float: "number"}
PLAIN[type(None)] = "null"


def describe(kind: Any) -> Schema:
    """Return the schema of a type's values as `ui.print_json` writes them."""
    if kind is Any:
        return {}
    if kind in PLAIN:
        return {"type": PLAIN[kind]}
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return {"type": "string", "enum": [str(each) for each in kind]}
    if is_dataclass(kind):
        return _describe_fields(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _any_of([describe(each) for each in inner])
    if origin in (tuple, list):
        return {"type": "array", "items": describe(inner[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": describe(inner[1])}
    raise TypeError(f"no schema for {kind}")


def _describe_fields(kind: Any) -> Schema:
    hints = get_type_hints(kind)
    made = _object({each.name: describe(hints[each.name]) for each in fields(kind)})
    return {"description": " ".join((kind.__doc__ or "").split()), **made}


def _object(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "required": list(properties)}


def _any_of(kinds: list[Schema]) -> Schema:
    if all(each.keys() == {"type"} for each in kinds):
        return {"type": [each["type"] for each in kinds]}
    return {"anyOf": kinds}


def _with(whole: Schema, more: Mapping[str, Schema]) -> Schema:
    """Return the schema of an object that has more than another."""
    added = _object({**whole["properties"], **more})
    return {**whole, **added}


_MACHINE = describe(MachineStatus)
_STATUS = _with(_MACHINE, {"guest": describe(Usage | None)})
_READING = _with(_MACHINE, {k: v for k, v in describe(Reading)["properties"].items() if k != "machine"})
_SETTING = _object({"value": {"type": ["string", "number", "boolean", "null", "array"]}, "origin": describe(str)})

PRINTED: dict[str, tuple[int, Schema]] = {
    "up": (1, _MACHINE),
    "build": (1, describe(BuildResult)),
    "attach": (1, describe(BuildResult | None)),
    "resume": (1, describe(BuildResult | None)),
    "base": (1, describe(BaseResult)),
    "status": (1, _STATUS),
    "top": (1, _with(describe(Round), {"machines": {"type": "array", "items": _READING}})),
    "trim": (1, describe(Freed)),
    "list": (1, describe(list[MachineStatus])),
    "suspend": (1, describe(Suspension)),
    "env": (1, describe(Environment)),
    "forward": (1, describe(list[Forward])),
    "images": (1, describe(list[ImageRow])),
    "images --snapshots": (1, describe(list[Snapshot])),
    "images snapshot": (1, describe(Snapshot)),
    "images fetch": (1, describe(GuestImage)),
    "images verify": (1, describe(list[Check])),
    "prune": (1, describe(list[Freed])),
    "doctor": (1, describe(list[HostCheck])),
    "config": (1, {"type": "object", "additionalProperties": _SETTING}),
}
"""What each command prints: the version of its schema, and the schema. `top` prints one such object a line."""


def file_name(command: str) -> str:
    """Return the name of the file that holds a command's schema."""
    return command.replace("--", "").replace(" ", "-") + ".json"


def render(command: str) -> Schema:
    """Return a command's schema as its file has it."""
    version, schema = PRINTED[command]
    head = {"$schema": DRAFT, "$id": f"urn:vmbuild:{file_name(command)[:-5]}:{version}"}
    return {**head, "title": f"vmbuild {command} --json, version {version}", **schema}
