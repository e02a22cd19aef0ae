"""The user's logins to registries, as docker keeps them: in `config.json`, or with a credential helper.

A build gets those that it can use: of a registry that its Dockerfile or its command names, and Docker Hub's, which
references without a registry mean.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmbuild.docker_config import TOKEN_USER, ask_helper, is_helper, load_config, table
from vmbuild.errors import HostError
from vmbuild.report import Reporter

HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io")

HELPER_S = 30.0
"""How long a credential helper may take: one that asks its user waits for a person."""

FIELDS = ("auth", "username", "password", "identitytoken", "registrytoken")
"""What a login in `config.json` consists of."""

Login = dict[str, str]


def read_config(folder: Path, report: Reporter) -> dict[str, Any]:
    """Return docker's configuration, empty where there is none, or, with a warning, none that can be read."""
    try:
        return load_config(folder)
    except (OSError, ValueError) as error:
        path = folder / "config.json"
        report.warn(f"{path} cannot be read, and no login in it is passed on ({type(error).__name__})")
        return {}


def host_of(key: str) -> str:
    """Return the registry that a login's key means: `https://index.docker.io/v1/` is `docker.io`."""
    host = re.sub(r"^https?://", "", key).partition("/")[0]
    return "docker.io" if host in HUB_NAMES else host


def find(config: Mapping[str, Any], text: str | None, report: Reporter) -> dict[str, Login]:
    """Return the logins that a build can use, by their keys in `config.json`.

    `text` is all that may name a registry; None when nobody can know: then every login that `config.json` names is
    meant. A helper that fails costs a warning, and what it would have said.
    """
    stored, helpers, store = table(config, "auths"), table(config, "credHelpers"), config.get("credsStore")
    keys = dict.fromkeys([*stored, *helpers, *(_list_store(store, report) if store and text is not None else ())])
    found = {}
    for key in keys:
        if text is None or is_meant(host_of(key), text):
            login = _ask(helpers.get(key) or store, key, report) or _pick(stored.get(key))
            if login:
                found[key] = login
    return found


def is_meant(host: str, text: str) -> bool:
    """Tell whether a registry's name stands in a text; Docker Hub needs not be named."""
    return host == "docker.io" or re.search(rf"(?<![\w.-]){re.escape(host)}(?![\w.-]|:\d)", text) is not None


def _pick(stored: object) -> Login:
    """Return what of an entry of `auths` is a login."""
    fields = stored if isinstance(stored, dict) else {}
    return {key: str(fields[key]) for key in FIELDS if fields.get(key)}


def _list_store(helper: object, report: Reporter) -> list[str]:
    found = _run_helper(helper, "list", "", report)
    return [str(key) for key in found]


def _ask(helper: object, key: str, report: Reporter) -> Login:
    """Return the login that a helper has for a key, empty when it has none."""
    found = _run_helper(helper, "get", key, report) if helper else {}
    user, secret = str(found.get("Username", "")), str(found.get("Secret", ""))
    if not secret:
        return {}
    if user == TOKEN_USER:
        return {"identitytoken": secret}
    return {"auth": base64.b64encode(f"{user}:{secret}".encode()).decode()}


def _run_helper(helper: object, order: str, stdin: str, report: Reporter) -> dict[str, Any]:
    """Ask a credential helper; one that fails costs a warning, which tells nothing of what it said."""
    name = str(helper)
    if not is_helper(name):
        report.warn(f"{name!r} cannot be the name of a credential helper")
        return {}
    try:
        found = ask_helper(name, order, stdin, HELPER_S)
    except LookupError:
        return {}
    except HostError as error:
        report.warn(f"{error.brief}: what it keeps is not passed on")
        return {}
    except ValueError:
        report.warn(f"docker-credential-{name} answered with nonsense: what it keeps is not passed on")
        return {}
    return found if isinstance(found, dict) else {}
