"""Certificate authorities that this process trusts beside those that a connection trusts anyway: the setting `ca`."""

from __future__ import annotations

_also: list[str] = []


def trust_also(pem: str) -> None:
    """Let every connection from now on trust these authorities too; empty for none."""
    _also[:] = [pem] if pem else []


def trusted_too() -> str:
    """Return the authorities that `trust_also` was given last, as PEM; empty for none."""
    return "".join(_also)
