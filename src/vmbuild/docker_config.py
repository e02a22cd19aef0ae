"""Docker's own configuration on this host: `config.json`, and the credential helpers that it names.

Source: docker/cli, cli/config (auths, credsStore, credHelpers) and docker-credential-helpers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmbuild import process
from vmbuild.deadline import Deadline

HUB_KEY = "https://index.docker.io/v1/"
"""The key of Docker Hub (docker/cli, config/types)."""

TOKEN_USER = "<token>"  # noqa: S105 - what a helper says instead of a user: the secret is an identity token

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NOT_FOUND = "credentials not found"


def config_folder(environment: Mapping[str, str]) -> Path:
    """Return where docker keeps its configuration."""
    home = environment.get("HOME") or Path.home()
    return Path(environment.get("DOCKER_CONFIG") or Path(home) / ".docker")


def load_config(folder: Path) -> dict[str, Any]:
    """Return docker's configuration, empty where there is none. Raises OSError or ValueError when it cannot be read."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


def table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a table of the configuration, empty where it has none of that name."""
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def is_helper(name: str) -> bool:
    """Tell whether a credential helper can have a name, which becomes part of a program's."""
    return _HELPER.fullmatch(name) is not None


def ask_helper(name: str, order: str, stdin: str, limit_s: float) -> Any:
    """Return what a credential helper answers, parsed. What it says on a failure may be secret: repeat none of it.

    Raises LookupError when it has no such login, HostError (CommandError) when it is missing or fails, ValueError when
    it answers nonsense.
    """
    try:
        answer = process.run(
            [f"docker-credential-{name}", order], stdin=stdin.encode(), deadline=Deadline.after(limit_s)
        )
    except process.CommandError as error:
        if _NOT_FOUND in error.output:
            raise LookupError(name) from None
        raise
    return json.loads(answer)
