"""Who the user is to a registry, by Docker's own configuration and its credential helpers."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmbuild.docker_config import HUB_KEY, TOKEN_USER, ask_helper, config_folder, is_helper, load_config, table
from vmbuild.errors import HostError
from vmbuild.process import CommandError

DOCKER_HUB = "docker.io"
HELPER_S = 60.0
"""A helper may ask the user to unlock a keyring."""


@dataclass(frozen=True)
class Login:
    """A user's name and password at a registry, or the identity token that stands for them. Never shown."""

    user: str = field(repr=False)
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)


def find_login(registry: str, environment: Mapping[str, str] = os.environ) -> Login | None:
    """Return the login that Docker would use at a registry (`HOST[:PORT]`), None when there is none.

    Raises HostError when the configuration or a helper fails.
    """
    config = _read_config(config_folder(environment).expanduser())
    keys = _keys(registry)
    helpers = table(config, "credHelpers")
    for key in keys:
        if key in helpers:
            return _ask_helper(str(helpers[key]), key)
    if config.get("credsStore"):
        found = next(filter(None, (_ask_helper(str(config["credsStore"]), key) for key in keys)), None)
        if found is not None:
            return found
    by_host = {_host_of(str(key)): entry for key, entry in table(config, "auths").items()}
    return next((_read_entry(by_host[key]) for key in map(_host_of, keys) if key in by_host), None)


def _keys(registry: str) -> tuple[str, ...]:
    return (HUB_KEY, DOCKER_HUB) if registry == DOCKER_HUB else (registry, f"https://{registry}")


def _host_of(key: str) -> str:
    """Return the registry that a key of `auths` means, as docker compares them."""
    if key == HUB_KEY:
        return DOCKER_HUB
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return load_config(folder)
    except (OSError, ValueError) as error:
        path = folder / "config.json"
        raise HostError(f"cannot read {path}", details=type(error).__name__, resolution="Mend it.") from error


def _read_entry(entry: object) -> Login | None:
    if not isinstance(entry, dict):
        return None
    user, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if entry.get("auth"):
        try:
            text = base64.b64decode(str(entry["auth"]), validate=True).decode()
        except (binascii.Error, ValueError):
            return None
        user, _, password = text.rstrip("\0").partition(":")
    token = str(entry.get("identitytoken") or "")
    return Login(user, password, token) if user or token else None


def _ask_helper(name: str, key: str) -> Login | None:
    """Ask a credential helper. Raises HostError when it is missing or fails; its words stay unsaid, as secrets may."""
    if not is_helper(name):
        raise HostError(f"{name!r} in Docker's configuration is no credential helper")
    program = f"docker-credential-{name}"
    try:
        found = ask_helper(name, "get", key, HELPER_S)
        user, secret = str(found["Username"]), str(found["Secret"])
    except CommandError:
        raise HostError(f"{program} could not say who you are at {key}", resolution=f"Run `{program} get`.") from None
    except (ValueError, TypeError, KeyError):
        raise HostError(f"{program} gave an answer that makes no sense") from None
    except LookupError:
        return None
    return Login("", "", secret) if user == TOKEN_USER else Login(user, secret)
