"""The options of a build that say what it is given besides its context, as `docker buildx build` has them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from vmbuild import inputs
from vmbuild.errors import UsageError
from vmbuild.inputs import Inputs
from vmbuild.model import parse_size

F = TypeVar("F", bound=Callable[..., Any])

NETWORKS = ("default", "none", "host")
ENTITLEMENTS = ("network.host", "security.insecure")


def _many(flag: str, metavar: str, help: str) -> Callable[[F], F]:
    return click.option(flag, multiple=True, metavar=metavar, help=f"{help}; repeatable.")


OPTIONS = (
    _many("--secret", "id=ID[,src=FILE|,env=NAME]", "A secret for RUN --mount=type=secret"),
    _many("--ssh", "default|ID[=SOCKET|KEY[,KEY]]", "The SSH agent, or keys, for RUN --mount=type=ssh"),
    _many("--build-context", "NAME=PATH|URL|docker-image://IMAGE", "Another context, by its name"),
    _many("--cache-from", "IMAGE|type=TYPE[,KEY=VALUE]", "Where a build cache comes from: registry, local (src=)"),
    _many("--cache-to", "type=TYPE[,KEY=VALUE]", "Where the build cache goes: registry, local (dest=), inline"),
    _many("--no-cache-filter", "STAGE", "Do not use the build cache for this stage"),
    _many("--add-host", "HOST:ADDRESS", "A line for /etc/hosts in the build"),
    click.option("--network", metavar="MODE", help=f"The network of RUN: {', '.join(NETWORKS)}."),
    click.option("--shm-size", metavar="SIZE", help="Size of /dev/shm in the build."),
    _many("--ulimit", "NAME=SOFT[:HARD]", "A limit of RUN"),
    click.option("--cgroup-parent", metavar="CGROUP", help="Parent of the build's control groups."),
    _many("--allow", "ENTITLEMENT", f"A right beyond the usual: {', '.join(ENTITLEMENTS)}"),
    _many("--annotation", "[TYPE:]KEY=VALUE", "An annotation of the container image"),
)

NAMES = (
    *("secret", "ssh", "build_context", "cache_from", "cache_to", "no_cache_filter", "add_host", "network"),
    *("shm_size", "ulimit", "cgroup_parent", "allow", "annotation"),
)


def ways_in(command: F) -> F:
    """Give a click command these options."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def take_inputs(flags: dict[str, Any], environment: Mapping[str, str] = os.environ) -> Inputs:
    """Take these options out of a command's, and read the secrets. Raises UsageError for what makes no sense."""
    given = {name: flags.pop(name) for name in NAMES}
    secrets = tuple(inputs.read_secret(text, environment) for text in given["secret"])
    ssh = tuple(inputs.read_ssh(text, environment) for text in given["ssh"])
    _check_once("--secret", [each.id for each in secrets])
    _check_once("--ssh", [each.id for each in ssh])
    return Inputs(
        secrets=secrets,
        ssh=ssh,
        contexts=tuple({each.name: each for each in map(inputs.read_context, given["build_context"])}.values()),
        cache_from=tuple(map(inputs.read_cache_from, given["cache_from"])),
        cache_to=tuple(map(inputs.read_cache_to, given["cache_to"])),
        options=tuple(_plain_options(given)),
    )


def _check_once(option: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{option} has {name} more than once")


def _plain_options(given: Mapping[str, Any]) -> list[str]:
    """Return what buildx in the guest gets as it is, looked at first."""
    allowed = [part for text in given["allow"] for part in text.split(",")]
    _check_among("--allow", allowed, ENTITLEMENTS)
    _check_among("--network", [given["network"]] if given["network"] else [], NETWORKS)
    size = given["shm_size"] and str(parse_size(given["shm_size"], what="size for --shm-size"))
    many = {
        "--no-cache-filter": given["no_cache_filter"],
        "--add-host": inputs.read_hosts(given["add_host"]),
        "--ulimit": map(inputs.check_ulimit, given["ulimit"]),
        "--allow": allowed,
        "--annotation": map(inputs.check_annotation, given["annotation"]),
    }
    one = {"--network": given["network"], "--shm-size": size, "--cgroup-parent": given["cgroup_parent"]}
    words = [word for flag, values in many.items() for value in values for word in (flag, value)]
    return words + [word for flag, value in one.items() if value for word in (flag, value)]


def _check_among(option: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise UsageError(f"{option} {value}: choose {' or '.join(known)}")
