"""A `Session` over SSH, host key pinned. The only importer of paramiko."""

from __future__ import annotations

import logging
import select
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import paramiko
from paramiko.common import MSG_CHANNEL_CLOSE, MSG_CHANNEL_DATA, MSG_CHANNEL_EOF, MSG_CHANNEL_WINDOW_ADJUST

from vmbuild.deadline import NEVER, Deadline
from vmbuild.errors import GuestError, MachineError, VmbuildError
from vmbuild.guest.session import ConnectionLostError, Feed, Output, Tick, WrongHostKeyError
from vmbuild.model import Endpoint

WINDOW_BYTES = 4 * 1024 * 1024
Watch = Callable[[], None]

Where = Callable[[], Endpoint]
"""Tells where the guest is reached: another port, when the machine was suspended and goes on in another QEMU."""

Signal = Callable[[str, str], None]
"""Sends a signal, by name, to a process group in the guest."""

WATCH_EVERY_S = 5.0
"""After so much silence it is asked whether the machine still runs."""

START_S = 5.0
"""So long is waited for a program to say its group before it is given up as one that never started."""

STAIRCASE = (("INT", 10.0), ("TERM", 5.0), ("KILL", 5.0))
"""How a program in the guest is ended: each signal and the seconds it has."""


class Transport(paramiko.Transport):
    """Sends nothing over a channel that has been closed.

    paramiko's threads do: one has made a message and not sent it yet when another closes the channel. dropbear then
    ends the whole connection, with all that runs over it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sending = threading.Lock()
        self._closed = set[int]()
        super().__init__(sock, default_window_size=WINDOW_BYTES)

    def open_session(
        self, window_size: int | None = None, max_packet_size: int | None = None, timeout: float | None = None
    ) -> paramiko.Channel:
        """Open a channel, which may get the number of one that was closed. Raises SSHException."""
        channel = super().open_session(window_size, max_packet_size, timeout)
        self._closed.discard(channel.remote_chanid)
        return channel

    def _send_user_message(self, data: paramiko.Message) -> None:
        """Send a message: its kind and, of these, the number that the other side gave the channel (RFC 4254, 5)."""
        message = data.asbytes()
        kind, number = message[0], int.from_bytes(message[1:5], "big")
        with self._sending:
            if kind in (MSG_CHANNEL_DATA, MSG_CHANNEL_EOF, MSG_CHANNEL_WINDOW_ADJUST) and number in self._closed:
                return
            if kind == MSG_CHANNEL_CLOSE:
                self._closed.add(number)
            super()._send_user_message(data)  # type: ignore[misc] # the one place that all of them go through


class SshSession:
    """An authenticated SSH connection to one guest; see `Session`."""

    def __init__(self, where: Where, transport: paramiko.Transport, watch: Watch) -> None:
        self._where = where
        self._transport = transport
        self._watch = watch
        self._in_vain: VmbuildError | None = None

    @classmethod
    def connect(cls, where: Where, deadline: Deadline, watch: Watch = lambda: None) -> SshSession:
        """Connect once, check the pinned host key, log in.

        `where` is asked for each connection anew. `watch` is called now and then while a program is silent; it raises
        when waiting is in vain.

        Raises WrongHostKeyError for another host key, GuestError when nobody answers or the key is refused.
        """
        return cls(where, _log_in(where(), deadline), watch)

    def reopen(self, deadline: Deadline) -> None:
        """Connect anew; see `Session.reopen`. Raises what the watch says when waiting is in vain."""
        self._transport.close()
        self._ask_watch()
        try:
            endpoint = self._where()
        except MachineError as error:  # it is about to go on
            raise GuestError("the guest is not there yet", details=str(error)) from error
        self._transport = _log_in(endpoint, deadline)

    def run(
        self,
        argv: Sequence[str],
        *,
        feed: Feed | None = None,
        on_stdout: Output | None = None,
        on_stderr: Output | None = None,
        terminal: tuple[int, int] | None = None,
        deadline: Deadline = NEVER,
        on_tick: Tick | None = None,
    ) -> int:
        """Run a program and return its exit code; see `Session.run`."""
        if self._in_vain is not None:  # nothing runs there any more, not even what would clean up
            raise self._in_vain
        try:
            channel = self._transport.open_session(WINDOW_BYTES, timeout=deadline.remaining_s(60))
            with _closed_after(channel, deadline.remaining_s(60)):
                if terminal is not None:
                    channel.get_pty("xterm-256color", *terminal)
                channel.exec_command(_tell_group(argv, has_session=terminal is not None))
        except (paramiko.SSHException, OSError, EOFError) as error:
            if deadline.passed:
                raise _too_late() from error
            raise ConnectionLostError("the connection to the guest broke", details=str(error)) from error
        run = _Run(channel, feed, on_stdout, on_stderr, deadline, self._ask_watch, has_terminal=terminal is not None)
        return run.to_the_end(self._signal, on_tick or _do_nothing)

    def _ask_watch(self) -> None:
        try:
            self._watch()
        except VmbuildError as error:
            self._in_vain = error
            raise

    def _signal(self, group: str, name: str) -> None:
        with suppress(paramiko.SSHException, OSError, EOFError):
            channel = self._transport.open_session(timeout=10)
            channel.exec_command(f"kill -{name} -{group}")
            channel.settimeout(10)
            channel.recv(1)
            channel.close()

    def close(self) -> None:
        """End the connection. Twice is harmless."""
        self._transport.close()


@contextmanager
def _closed_after(channel: paramiko.Channel, seconds: float) -> Iterator[None]:
    """Close a channel in so many seconds unless the block has ended: paramiko waits for a request without a limit."""

    def close() -> None:
        with suppress(paramiko.SSHException, OSError, EOFError):  # the connection may have broken before
            channel.close()

    timer = threading.Timer(seconds, close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _too_late() -> GuestError:
    return GuestError("a command in the guest did not end in time")


def _tell_group(argv: Sequence[str], *, has_session: bool) -> str:
    """Return a command line that prints its process group and becomes the program: so it can be ended later.

    With a terminal the SSH server has made a session for it; without one it would share dropbear's own group, while
    OpenSSH makes a session each time. There setsid would fork, and its first process end at once (setsid(1)).
    """
    script = f"echo $$; exec {shlex.join(argv)}"
    if has_session:
        return script
    inner = ["sh", "-c", script]
    if list(argv[:2]) == ["sh", "-c"]:  # one shell tells its group and does the work: each start is dear in a guest
        inner[2:] = [f"echo $$; {argv[2]}", *argv[3:]]
    # Process id, name, state, parent and group: proc_pid_stat(5).
    return f'read -r _ _ _ _ g _ </proc/$$/stat; [ "$g" = $$ ] || exec setsid {shlex.join(inner)}; {script}'


class _Run:
    """One program that runs in the guest."""

    def __init__(
        self,
        channel: paramiko.Channel,
        feed: Feed | None,
        on_stdout: Output | None,
        on_stderr: Output | None,
        deadline: Deadline,
        watch: Watch,
        *,
        has_terminal: bool,
    ) -> None:
        self._watch = watch
        self._has_terminal = has_terminal
        self._channel = channel
        self._on_stdout = on_stdout or _ignore
        self._on_stderr = on_stderr or _ignore
        self._deadline = deadline
        self._head = b""
        self._group: str | None = None
        self._feed_error: BaseException | None = None
        self._sink = _ChannelSink(channel)
        self._feeder = threading.Thread(target=self._run_feed, args=(feed,), daemon=True)

    def to_the_end(self, signal: Signal, on_tick: Tick) -> int:
        self._feeder.start()
        try:
            self._pump(on_tick)
            return self._exit_code()
        except _InVain as error:
            assert error.__cause__ is not None  # noqa: S101 - see _ask_watch
            raise error.__cause__ from None
        except BaseException:
            self._end(signal)
            raise
        finally:
            self._channel.close()
            self._sink.settle()

    def _run_feed(self, feed: Feed | None) -> None:
        if feed is None and self._has_terminal:
            return  # a terminal has no half: told that no input comes, dropbear hangs it up, and the program dies
        try:
            if feed is not None:
                feed(self._sink)
            self._sink.end()
        except _ProgramStoppedReading:
            pass  # it ended, or closed its input, before it had read all: its exit code says the rest
        except BaseException as error:
            self._feed_error = error

    def _pump(self, on_tick: Tick) -> None:
        """Pass both outputs on until both have ended."""
        channel = self._channel
        handle = channel.fileno()
        heard = time.monotonic()
        while True:
            if self._feed_error is not None:
                raise self._feed_error
            if self._deadline.passed:
                raise _too_late()
            on_tick()
            ready, _, _ = select.select([handle], [], [], self._deadline.remaining_s(0.5))
            heard = time.monotonic() if ready else heard
            if time.monotonic() - heard > WATCH_EVERY_S:
                self._ask_watch()
                heard = time.monotonic()
            # One piece of each a turn: a program that never pauses must not keep the time limit from being seen.
            if channel.recv_ready():
                self._take_stdout(_receive(channel.recv))
            if channel.recv_stderr_ready():
                self._on_stderr(_receive(channel.recv_stderr))
            has_ended = channel.eof_received or channel.closed
            if has_ended and not channel.recv_ready() and not channel.recv_stderr_ready():
                return

    def _ask_watch(self) -> None:
        try:
            self._watch()
        except VmbuildError as error:
            raise _InVain from error

    def _take_stdout(self, data: bytes) -> None:
        if self._group is None:
            data = self._take_head(data)
        if data:
            self._on_stdout(data)

    def _take_head(self, data: bytes) -> bytes:
        """Take output up to the line that tells the program's group; return what comes after it."""
        self._head += data
        line, found, rest = self._head.partition(b"\n")
        if found:
            self._group = line.strip().decode(errors="replace")
        return rest

    def _exit_code(self) -> int:
        if not self._channel.status_event.wait(self._deadline.remaining_s(30)) or self._channel.exit_status == -1:
            self._check_connection()
            return 255  # ended by a signal, which has no exit code
        return int(self._channel.exit_status)

    def _check_connection(self) -> None:
        """Ask for another channel: paramiko says that channels are closed before it says that the connection is."""
        try:
            self._channel.get_transport().open_session(timeout=10).close()
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise ConnectionLostError(
                "the connection to the guest broke",
                resolution="Run `vmbuild logs` to see the guest's last words, and the command again.",
            ) from error

    def _end(self, signal: Signal) -> None:
        """End the program in the guest: ask, terminate, kill, each with a limit."""
        try:
            self._watch()
        except VmbuildError:  # the machine stands still, or is gone
            return
        started = Deadline.after(START_S)
        while self._group is None and not self._channel.closed and not started.passed:
            self._take_head(self._channel.recv(1024)) if self._channel.recv_ready() else started.sleep(0.05)
        if self._group is None or not self._group.isdigit():
            return
        for name, grace_s in STAIRCASE:
            signal(self._group, name)
            limit = Deadline.after(grace_s)
            while not limit.passed:
                if self._channel.exit_status_ready():
                    return
                with suppress(OSError):
                    self._channel.recv(WINDOW_BYTES) if self._channel.recv_ready() else limit.sleep(0.1)
                    self._channel.recv_stderr(WINDOW_BYTES) if self._channel.recv_stderr_ready() else None


def _receive(read: Callable[[int], bytes]) -> bytes:
    """Read what has come. To do so tells the other side that there is room again, which fails on a lost connection."""
    try:
        return read(WINDOW_BYTES)
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise ConnectionLostError("the connection to the guest broke", details=str(error)) from error


class _ProgramStoppedReading(Exception):
    pass


class _InVain(Exception):
    """The machine does not run: nothing in it can be ended, or asked."""


class _ChannelSink:
    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._sending = threading.Lock()

    def write(self, data: bytes, /) -> None:
        with self._sending, _stopping_reading():
            self._channel.sendall(data)

    def end(self) -> None:
        with self._sending, _stopping_reading():
            self._channel.shutdown_write()

    def settle(self) -> None:
        """Wait until nothing is being sent over the channel, which is closed: the next one may have its number."""
        with self._sending:
            pass


@contextmanager
def _stopping_reading() -> Iterator[None]:
    """Raise _ProgramStoppedReading where nothing takes input any more: the program, or nobody on a lost connection.

    Which it is shows when the channel is closed, and that is not yet sure to be: a write may be the first to fail.
    """
    try:
        yield
    except (OSError, EOFError) as error:
        raise _ProgramStoppedReading from error


def _ignore(data: bytes) -> None:
    """Drop output that nobody asked for."""


def _do_nothing() -> None:
    """Be a tick that nobody asked for."""


def silence_paramiko() -> None:
    """Keep paramiko from printing tracebacks of connections that are tried again."""
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)


silence_paramiko()


def _log_in(endpoint: Endpoint, deadline: Deadline) -> paramiko.Transport:
    transport = _open_transport(endpoint, deadline)
    transport.auth_timeout = deadline.remaining_s(30)
    try:
        _check_host_key(transport, endpoint)
        transport.auth_publickey(endpoint.user, paramiko.Ed25519Key.from_private_key_file(str(endpoint.client_key)))
    except (paramiko.SSHException, OSError, EOFError) as error:
        transport.close()
        raise GuestError("the guest's SSH server refused the log-in", details=str(error)) from error
    except BaseException:
        transport.close()
        raise
    transport.set_keepalive(30)
    return transport


def _open_transport(endpoint: Endpoint, deadline: Deadline) -> paramiko.Transport:
    try:
        sock = socket.create_connection((endpoint.host, endpoint.port), timeout=deadline.remaining_s(5))
        transport = Transport(sock)
        # User-mode networking accepts at once and waits for the guest; a banner that is late will not come.
        transport.banner_timeout = deadline.remaining_s(5)
        try:
            transport.start_client(timeout=deadline.remaining_s(15))
            transport.get_remote_server_key()  # raises where start_client, its time up, just returns
        except BaseException:
            transport.close()
            raise
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise GuestError("the guest's SSH server does not answer", details=str(error)) from error
    return transport


def _check_host_key(transport: paramiko.Transport, endpoint: Endpoint) -> None:
    kind, base64, *_ = endpoint.host_public_key.read_text().split()
    offered = transport.get_remote_server_key()
    if (offered.get_name(), offered.get_base64()) != (kind, base64):
        raise WrongHostKeyError(
            "the server on the machine's SSH port does not have the machine's host key",
            details=f"{endpoint.host}:{endpoint.port} offered {offered.get_name()} {offered.fingerprint}",
            resolution="Another program may have taken the port: run `vmbuild down` and `vmbuild up`.",
        )
