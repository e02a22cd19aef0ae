"""The keys of one machine: the host's own to log in with, and the guest's to be known by, both made here."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from vmbuild.whole import write_whole


def ensure_key(path: Path, comment: str) -> None:
    """Make an ed25519 key pair in OpenSSH's format at `path` and `path.pub`, unless it is there. Raises HostError."""
    if path.exists():
        return
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_whole(path.with_name(path.name + ".pub"), public + f" {comment}\n".encode())
    write_whole(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), mode=0o600)


def forget_key(path: Path) -> None:
    """Delete a key pair, if it is there: who needs one makes another."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".pub").unlink(missing_ok=True)


def dropbear_key(path: Path) -> bytes:
    """Return a private key in the format that dropbear keeps host keys in.

    Two SSH strings: the type, then the 32 bytes of the private and the 32 of the public key (dropbear, ed25519.c).
    """
    key = load_ssh_private_key(path.read_bytes(), password=None)
    assert isinstance(key, Ed25519PrivateKey)  # noqa: S101 - ensure_key makes no other
    pair = key.private_bytes_raw() + key.public_key().public_bytes_raw()
    return b"".join(len(part).to_bytes(4, "big") + part for part in (b"ssh-ed25519", pair))
