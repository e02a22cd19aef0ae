"""The guest's Docker socket on the host where ssh cannot carry it: a program in the guest for each connection."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vmbuild.errors import GuestError
from vmbuild.guest.session import CHUNK_BYTES, Session, Sink

# Who has said all may still hear much, as of a container that is attached to; when Docker has, it is over. socat knows
# one time for both.
SCRIPT = r"""
use Socket;
socket(my $docker, PF_UNIX, SOCK_STREAM, 0) || die "socket: $!\n";
connect($docker, sockaddr_un($ARGV[0])) || die "$ARGV[0]: $!\n";
sub carry {
    my ($from, $to) = @_;
    while (sysread($from, my $data, 65536)) {
        while (length $data) { substr($data, 0, syswrite($to, $data) // return) = "" }
    }
}
my $other = fork // die "fork: $!\n";
if (!$other) { carry(\*STDIN, $docker); shutdown($docker, 1); exit }
carry($docker, \*STDOUT);
kill "TERM", $other;
"""
CARRY = ("perl", "-e", SCRIPT, "/run/docker.sock")

Wanted = Callable[[], bool]

LOOK_EVERY_S = 1.0


def serve(session: Session, path: Path, is_wanted: Wanted) -> None:
    """Listen on a Unix socket that only this user can open, and carry each connection, as long as it is wanted."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            listener.bind(str(new))
        finally:
            os.umask(before)
        listener.listen(64)
        new.replace(path)  # who sees it is not refused
        listener.settimeout(LOOK_EVERY_S)
        while is_wanted():
            with suppress(TimeoutError):
                client, _ = listener.accept()
                threading.Thread(target=carry, args=(session, client), daemon=True).start()


def carry(session: Session, client: socket.socket) -> None:
    """Carry one connection to Docker, each direction to its own end."""

    def feed(sink: Sink) -> None:
        while data := client.recv(CHUNK_BYTES):
            sink.write(data)

    client.settimeout(None)
    with client, suppress(GuestError, OSError):
        try:
            session.run(CARRY, feed=feed, on_stdout=client.sendall)
        finally:
            client.shutdown(socket.SHUT_RDWR)  # closing alone would not wake who waits in recv
