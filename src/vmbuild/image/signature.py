"""What a key of the catalogue has signed. The only user of gpgv."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vmbuild import process
from vmbuild.errors import GuestImageError

ALTERED = (
    "Something between here and the publisher altered it, or the server is not the publisher's. Do not go on with it."
)


class BadSignature(GuestImageError):
    """Something is not signed, or not by a key of the catalogue."""


def read_signed(signed: bytes, keyrings: Sequence[Path], url: str, *, resolution: str = ALTERED) -> bytes:
    """Return the text that a key of the keyrings has signed, exactly as gpgv gives it out.

    Signatures by unknown keys are passed over, as Debian signs with old and new keys at once. Raises BadSignature.
    """
    with tempfile.TemporaryDirectory(prefix="vmbuild-gpgv-") as folder:
        text = Path(folder) / "text"
        status = _gpgv(folder, keyrings, ["--output", str(text), "-"], signed)
        problem = _signature_problem(status)
        if problem or not text.exists():
            raise _bad(url, problem or "it signs nothing", status, resolution)
        return text.read_bytes()


def check_detached(content: bytes, signature: bytes, keyrings: Sequence[Path], url: str) -> None:
    """See that a key of the keyrings has signed this content, the signature a file of its own. Raises BadSignature."""
    with tempfile.TemporaryDirectory(prefix="vmbuild-gpgv-") as folder:
        path = Path(folder) / "signature"
        path.write_bytes(signature)
        status = _gpgv(folder, keyrings, [str(path), "-"], content)
        problem = _signature_problem(status)
        if problem:
            raise _bad(url, problem, status, ALTERED)


def _gpgv(folder: str, keyrings: Sequence[Path], argv: Sequence[str], content: bytes) -> str:
    """Return gpgv's status lines."""
    keys = [option for keyring in keyrings for option in ("--keyring", str(keyring.resolve()))]
    options = ["--homedir", folder, "--weak-digest", "SHA1", "--status-fd", "1", *keys]
    # 1 and 2: a signature is bad or its key unknown; the status lines say which
    return process.run(["gpgv", *options, *argv], stdin=content, expect=(0, 1, 2)).decode(errors="replace")


def _bad(url: str, problem: str, status: str, resolution: str) -> BadSignature:
    return BadSignature(
        f"the signature of {url} cannot be trusted: {problem}", details=status.strip(), resolution=resolution
    )


def _signature_problem(status: str) -> str:
    """Return what is wrong according to gpgv's status lines, empty when nothing is (GnuPG, doc/DETAILS)."""
    words = [line.split()[1] for line in status.splitlines() if line.startswith("[GNUPG:] ")]
    if "BADSIG" in words or "ERROR" in words:
        return "the content was altered after it was signed"
    # VALIDSIG also follows EXPKEYSIG, EXPSIG and REVKEYSIG; only GOODSIG means that all is in order
    if "GOODSIG" in words and "VALIDSIG" in words:
        return ""
    for word, problem in (
        ("EXPKEYSIG", "the key has expired"),
        ("REVKEYSIG", "the key was revoked"),
        ("EXPSIG", "the signature has expired"),
        ("NO_PUBKEY", "it is signed by keys that the catalogue does not have"),
    ):
        if word in words:
            return problem
    return "it is not signed"
