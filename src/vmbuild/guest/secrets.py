"""What a build may know and nobody else: files on a tmpfs of the guest, gone when the build ends, whoever follows it.

The other sides are usr/lib/vmbuild/secrets, which writes and wipes them, and usr/lib/vmbuild/job, which has them wiped.
"""

from __future__ import annotations

from collections.abc import Mapping

from vmbuild.guest.session import Feed, Sink

PROGRAM = "/usr/lib/vmbuild/secrets"
ROOT = "/run/vmbuild/held"


def folder_of(workspace: str) -> str:
    """Return where the build of a workspace has its files."""
    return f"{ROOT}/{workspace.rpartition('/')[2]}"


def put_before(workspace: str) -> list[str]:
    """Return the words before a job's own command that have it find its files; it reads `feed_of` them first."""
    return [PROGRAM, "put", folder_of(workspace), f"{workspace}/held"]


def feed_of(files: Mapping[str, bytes]) -> Feed:
    """Return a feed of files, by their names."""

    def feed(sink: Sink) -> None:
        for name, content in files.items():
            sink.write(f"{len(content)} {name}\n".encode())
            sink.write(content)
        sink.write(b".\n")

    return feed
