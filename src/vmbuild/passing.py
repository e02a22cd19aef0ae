"""The recipe of what is passed on: what of this host's ways into the network a guest gets, and a build in it.

Each can be turned off, each that there is is told in one line, none is left in the guest when the machine is down.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import certifi

from vmbuild import authorities, docker_config, logins, trust
from vmbuild.address import seen_from_guest, without_credentials
from vmbuild.guest import passed, seed
from vmbuild.guest.context import Context
from vmbuild.guest.session import Session
from vmbuild.model import BuildRequest, MachineRequest
from vmbuild.report import Reporter

_LOOPBACK = re.compile(r"(?:(?<=docker-image://)|(?<![\w./-]))(?:localhost|127\.0\.0\.1):(?P<port>\d{1,5})(?!\d)")
"""A registry of this host's in an image's name. What follows `http://` is an address that a step may mean."""

_NAMING = re.compile(r"^\s*(?:FROM|ARG)\b.*|^#\s*syntax\s*=.*|.*\bfrom=.*", re.IGNORECASE | re.MULTILINE)
"""The lines of a Dockerfile that can name a container image, or a part of such a name."""

NO_IMAGES = ("labels", "annotations", "context")
"""The fields of a build's request that name no container image."""

PROXY_KEYS = {"http_proxy": "httpProxy", "https_proxy": "httpsProxy", "no_proxy": "noProxy"}
"""The variables as docker's `config.json` calls them (docker/cli, cli/config/configfile)."""


def proxies(request: MachineRequest) -> dict[str, str]:
    """Return the proxies of this host's environment as they are right in a guest; none where they are turned off."""
    return seed.proxies(os.environ) if request.pass_on.proxy else {}


def trust_here(request: MachineRequest) -> None:
    """Let vmbuild's own downloads and pushes trust what a guest shall trust. Raises UsageError."""
    trust.trust_also("".join(each.pem for each in find_authorities(request)))


def check_named(request: MachineRequest) -> None:
    """See that the certificates that somebody named are there, before anything is begun. Raises UsageError."""
    authorities.find((word for word in request.pass_on.authorities if word != authorities.AUTO), os.environ)


def find_authorities(request: MachineRequest) -> list[authorities.Authority]:
    """Return the authorities of this host that a guest shall trust. Raises UsageError."""
    return authorities.find(request.pass_on.authorities, os.environ, [Path(certifi.where())])


def for_build(request: MachineRequest, asked: BuildRequest, source: Context | None) -> MachineRequest:
    """Return the machine as a build needs it: registries that it names on localhost are the host's."""
    ports = _ports("\n".join([_naming_lines(source) or "", *_words(asked)]))
    choice = request.pass_on
    return replace(request, pass_on=replace(choice, host_ports=(*choice.host_ports, *ports)))


def to_guest(session: Session, request: MachineRequest, report: Reporter, *, is_new: bool) -> None:
    """Let a guest that is ready have what is passed on, and say what that is.

    `is_new` tells that it has begun with this very request. Raises GuestError, or UsageError as `find_authorities`.
    """
    found = find_authorities(request)
    wanted = _wanted(request, found)
    if words := list(_describe(wanted, found)):
        report.step(f"Passing on to the guest: {'; '.join(words)}")
    outcome = passed.apply(session, wanted, is_new=is_new)
    if outcome.is_late:
        report.warn(
            f"Docker in the machine {request.name} is in use, and began with other proxies or certificates: "
            f"it takes these when nothing runs in it, or after `vmbuild down {request.name}`"
        )
    for port in outcome.guests_own:
        report.warn(f"localhost:{port} is the guest's own: something in it listens there")


def _wanted(request: MachineRequest, found: list[authorities.Authority]) -> passed.Passed:
    choice = request.pass_on
    named = " ".join([*(urlsplit(url).netloc for url in choice.registry_mirrors), *choice.insecure_registries])
    return passed.Passed(
        proxies=proxies(request),
        authorities="".join(each.pem for each in found),
        mirrors=choice.registry_mirrors,
        insecure=choice.insecure_registries,
        ports=frozenset({*choice.host_ports, *_ports(named)}),
    )


def _describe(wanted: passed.Passed, found: list[authorities.Authority]) -> Iterator[str]:
    if urls := sorted({without_credentials(url) for key, url in wanted.proxies.items() if key.lower() != "no_proxy"}):
        yield f"proxy {', '.join(urls)}"
    if found:
        names = ", ".join(each.name for each in found[:3]) + (", ..." if len(found) > 3 else "")
        yield f"{len(found)} CA certificate{'s' if len(found) > 1 else ''} ({names})"
    if wanted.mirrors:
        yield f"registry mirror {', '.join(wanted.mirrors)}"
    if wanted.insecure:
        yield f"insecure registry {', '.join(wanted.insecure)}"
    if wanted.ports:
        yield f"the host's localhost:{', '.join(map(str, sorted(wanted.ports)))}"


@dataclass(frozen=True)
class ClientConfig:
    """A `config.json` for a build's client. It belongs in the guest's memory, and there no longer than the build."""

    content: str
    has_logins: bool


def client_config(
    request: MachineRequest, asked: BuildRequest, source: Context | None, report: Reporter
) -> ClientConfig | None:
    """Return what a build's client is told: logins, and the proxies of its steps; None when there is nothing."""
    docker = logins.read_config(docker_config.config_folder(os.environ), report)
    lines = _naming_lines(source)
    text = None if lines is None else "\n".join([lines, *_words(asked)])
    steps, found = _step_proxies(request, docker), _find_logins(request, docker, text, report)
    if request.pass_on.carried and any(without_credentials(url) != url for url in steps.values()):
        report.warn("a bundle of this machine would hold its memory, and the proxy's password is there")
    made = {"proxies": {"default": steps} if steps else {}, "auths": found}
    return ClientConfig(json.dumps(made), bool(found)) if steps or found else None


def _find_logins(
    request: MachineRequest, docker: dict[str, Any], text: str | None, report: Reporter
) -> dict[str, logins.Login]:
    if not request.pass_on.logins:
        return {}
    found = logins.find(docker, text, report)
    names = ", ".join(sorted({logins.host_of(key) for key in found}))
    if found and request.pass_on.carried:
        report.warn(f"this build does without your login to {names}: a bundle would hold the memory that has it")
        return {}
    if found:
        report.step(f"Logged in for this build: {names}")
    return found


def _step_proxies(request: MachineRequest, docker: dict[str, Any]) -> dict[str, str]:
    """Return the proxies of a build's steps: what docker is told for them, else those of this host's environment."""
    if not request.pass_on.proxy:
        return {}
    found = {PROXY_KEYS[key.lower()]: url for key, url in sorted(proxies(request).items())}
    told = docker.get("proxies")
    default = told.get("default") if isinstance(told, dict) else None
    if isinstance(default, dict):
        found.update({str(key): seen_from_guest(str(url)) for key, url in default.items()})
    return found


def _naming_lines(source: Context | None) -> str | None:
    """Return the lines of a Dockerfile that can name container images, None when it cannot be known."""
    if source is None:
        return None
    content = source.dockerfile_content
    if source.dockerfile_inside is not None:
        with suppress(OSError):  # who sends it will say so
            content = (source.folder / source.dockerfile_inside).read_bytes()
    return "\n".join(match[0] for match in _NAMING.finditer(content.decode(errors="replace")))


def _words(value: object) -> Iterator[str]:
    """Yield every text in a request, however deep."""
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        for each in fields(value):
            if each.name not in NO_IMAGES:
                yield from _words(getattr(value, each.name))
    elif isinstance(value, tuple | list | frozenset):
        for item in value:
            yield from _words(item)


def _ports(text: str) -> Iterable[int]:
    found = (int(match["port"]) for match in _LOOPBACK.finditer(text))
    return sorted({port for port in found if 0 < port < 65536})
