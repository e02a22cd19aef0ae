"""A build context that stays in the guest from build to build, so that only what changed since travels.

The host remembers what it sent, file by file with its digest, and the guest keeps it beside a stamp that says which
sending that was. The other side is usr/lib/vmbuild/context.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError
from vmbuild.guest import transfer
from vmbuild.guest.channel import Channel
from vmbuild.guest.context import Context, add_file, open_tar, unreadable
from vmbuild.guest.listing import Changes, Entry, compare, load_listing, save_listing
from vmbuild.guest.session import Session, Sink, capture, send
from vmbuild.lock import attempt
from vmbuild.report import Reporter

PROGRAM = "/usr/lib/vmbuild/context"
ROOT = "/var/lib/vmbuild/contexts"

MOST = 8
"""So many contexts stay in a guest; the one that was used longest ago goes first."""

CLAIM_S = 120.0


@dataclass(frozen=True)
class Copy:
    """A context's copy in the guest, taken for one build. `stamp` is that of what lies there now."""

    key: str
    stamp: str
    listing: Path

    @property
    def folder(self) -> str:
        """Where it lies in the guest."""
        return f"{ROOT}/{self.key}"


@contextmanager
def claimed(session: Session, source: Context, workspace: str, listings: Path) -> Iterator[Copy | None]:
    """Take a context's copy for the build of a workspace, which must have begun when the block ends.

    Yields None where another build uses it. `listings` is the host's folder of what it remembers. Raises GuestError.
    """
    key = hashlib.sha256(bytes(source.folder.resolve())).hexdigest()[:16]
    listing = listings / f"{key}.json"
    with attempt(listing.with_suffix(".lock")) as is_ours:
        if not is_ours:
            yield None
            return
        argv = [PROGRAM, "claim", ROOT, key, workspace, str(MOST)]
        answer = capture(session, argv, deadline=Deadline.after(CLAIM_S)).strip()
        yield None if answer == "busy" else Copy(key, answer, listing)


def clear(session: Session) -> None:
    """Remove every copy that no build uses. Raises GuestError."""
    capture(session, [PROGRAM, "clear", ROOT], deadline=Deadline.after(CLAIM_S))


def update(session: Session, source: Context, copy: Copy, channel: Channel, report: Reporter) -> int:
    """Make a context's copy what the context is now; return the bytes that travelled.

    Raises UsageError for a file that cannot be read, GuestError when the guest cannot.
    """
    changes = _survey(source, copy)
    _apply(session, copy, changes)
    sending = _Sending(copy, changes, secrets.token_hex(16))
    sent = transfer.unpack_context(session, ROOT, sending.write_tar, channel, report)
    save_listing(copy.listing, sending.stamp, sending.entries)
    return sent


def _survey(source: Context, copy: Copy) -> Changes:
    try:
        return compare(load_listing(copy.listing, copy.stamp), source.files())
    except OSError as error:
        raise unreadable(Path(error.filename or source.folder), error) from error


def _apply(session: Session, copy: Copy, changes: Changes) -> None:
    """Remove what is gone and set the times of what only looks different."""
    records = [b"- " + _encode(name) for name in changes.gone]
    records += [
        b"= %d %d %d %s" % (entry.mode, *divmod(entry.mtime_ns, 1_000_000_000), _encode(name))
        for name, entry in changes.touched.items()
    ]
    if records:
        errors = bytearray()
        feed = send(b"".join(record + b"\0" for record in records))
        if session.run([PROGRAM, "apply", ROOT, copy.key], feed=feed, on_stderr=errors.extend) != 0:
            raise GuestError("the build context in the guest could not be changed", details=errors.decode())


class _Sending:
    """What travels of a context, and what the guest has when it has come."""

    def __init__(self, copy: Copy, changes: Changes, stamp: str) -> None:
        self.stamp = stamp
        self.entries: dict[str, Entry] = {}
        self._copy, self._changes = copy, changes

    def write_tar(self, sink: Sink) -> None:
        self.entries = {**self._changes.kept, **self._changes.touched}
        with open_tar(sink) as tar:
            for name, path in self._changes.sent:
                if (entry := add_file(tar, f"{self._copy.key}/{name}", path)) is not None:
                    self.entries[name] = entry
            # Unpacked last: a copy has a stamp when it is whole.
            info = tarfile.TarInfo(f"{self._copy.key}.stamp")
            info.size, info.mode = len(self.stamp), 0o600
            tar.addfile(info, io.BytesIO(self.stamp.encode()))


def _encode(name: str) -> bytes:
    return name.encode(errors="surrogateescape")
