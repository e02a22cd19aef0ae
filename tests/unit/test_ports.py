"""Ports of the host that lead to the guest: chosen ones, and what containers publish."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.listener import Listener
from vmbuild import dockerhost, ports
from vmbuild.dockerhost import DockerHost
from vmbuild.errors import GuestError, HostError, MachineError, UsageError
from vmbuild.guest import published
from vmbuild.machine import ports as machine_ports
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.ports import Forward
from vmbuild.model import Home
from vmbuild.report import SilentReporter

HOME = Home(Path("/cache"), Path("/state"))
USERNET = """Hub -1 (net):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[HOST_FORWARD]  11       127.0.0.1 40222       10.0.2.15    22     0     0
  TCP[HOST_FORWARD]  14       127.0.0.1  8080       10.0.2.15    80     0     0
  TCP[ESTABLISHED]   15       127.0.0.1 40222       10.0.2.15    22     0     0
"""


class Monitor:
    """A QEMU that knows forwards by the host's port; `taken` are ports that this host does not give."""

    def __init__(self) -> None:
        self.forwards: dict[int, int] = {}
        self.taken: set[int] = set()
        self.said: list[str] = []

    def hmp(self, line: str) -> str:
        self.said.append(line)
        word, *rest = line.split()
        if word == "info":
            rows = [
                f"TCP[HOST_FORWARD] 1 127.0.0.1 {host} 10.0.2.15 {guest} 0 0" for host, guest in self.forwards.items()
            ]
            return "\n".join(rows)
        host, _, guest = rest[1].removeprefix("tcp:127.0.0.1:").partition("-10.0.2.15:")
        if word == "hostfwd_remove":
            gone = self.forwards.pop(int(host), None)
            return f"host forwarding rule for {rest[1]} {'removed' if gone else 'not found'}\n"
        if int(host) in self.taken | self.forwards.keys():
            return f"could not set up host forwarding rule '{rest[1]}'\n"
        self.forwards[int(host)] = int(guest)
        return ""


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> Monitor:
    monitor = Monitor()

    @contextmanager
    def connect(*_: object) -> Iterator[Monitor]:
        yield monitor

    monkeypatch.setattr(machine_ports, "Qmp", connect)
    monkeypatch.setattr(ports, "_running", lambda name, _: MachineFiles.at(HOME.state, name))
    monkeypatch.setattr(dockerhost, "open_socket", lambda name, *_: DockerHost(name, Path("/d.sock")))
    return monitor


def test_what_is_forwarded_is_no_connection() -> None:
    assert machine_ports.parse_forwards(USERNET) == [Forward(8080, 80), Forward(40222, 22)]
    assert machine_ports.count_connections(USERNET) == 1


def test_the_port_that_vmbuild_needs_is_not_listed(qemu: Monitor) -> None:
    qemu.forwards = {40222: 22, 8080: 80}
    assert ports.list_forwards("box", HOME) == [Forward(8080, 80)]


@pytest.mark.parametrize(("text", "wanted"), [("80", Forward(80, 80)), ("8080:80", Forward(8080, 80))])
def test_a_port_is_written_as_docker_writes_it(text: str, wanted: Forward) -> None:
    assert ports.parse_forward(text) == wanted


@pytest.mark.parametrize("text", ["", "x", "80:", ":80", "0", "65536", "-1", "1:2:3", "22", "2222:22", "1.2.3.4:80:80"])
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        ports.parse_forward(text)


def test_ports_come_and_go_on_loopback_alone(qemu: Monitor) -> None:
    ports.forward("box", HOME, [Forward(8080, 80), Forward(90, 90)])
    ports.forward("box", HOME, [Forward(8080, 80)])
    assert ports.list_forwards("box", HOME) == [Forward(90, 90), Forward(8080, 80)]
    ports.remove("box", HOME, [Forward(8080, 8080)])
    assert qemu.forwards == {90: 90}
    assert all("tcp:127.0.0.1:" in line for line in qemu.said if line.startswith("hostfwd"))


def test_a_port_that_is_taken_is_said(qemu: Monitor) -> None:
    qemu.taken = {80}
    with pytest.raises(HostError, match="80"):
        ports.forward("box", HOME, [Forward(80, 80)])
    with pytest.raises(UsageError):
        ports.remove("box", HOME, [Forward(80, 80)])
    with pytest.raises(MachineError):
        machine_ports.remove_forward(MachineFiles.at(HOME.state, "box"), 80)


def test_what_containers_publish_is_followed(qemu: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu.forwards, qemu.taken = {7000: 70}, {9999}
    seen: list[dict[int, int]] = []

    def rounds(_: Path) -> Iterator[set[int]]:
        for now in ({1111, 9999}, {1111, 2222, 7000}, {2222}):
            yield now
            seen.append(dict(qemu.forwards))

    monkeypatch.setattr(published, "watch_published", rounds)
    report = Listener()
    ports.follow_containers("box", HOME, report)
    mine = {7000: 70}
    assert seen == [{**mine, 1111: 1111}, {**mine, 1111: 1111, 2222: 2222}, {**mine, 2222: 2222}]
    assert qemu.forwards == mine
    assert len(report.warnings) == 1 and "9999" in report.warnings[0]


def test_leaving_closes_what_was_opened(qemu: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(_: Path) -> Iterator[set[int]]:
        yield {1111}
        raise KeyboardInterrupt

    monkeypatch.setattr(published, "watch_published", rounds)
    with pytest.raises(KeyboardInterrupt):
        ports.follow_containers("box", HOME, SilentReporter())
    assert qemu.forwards == {}


CONTAINERS: list[dict[str, Any]] = [
    {"Ports": [{"IP": "127.0.0.1", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"}]},
    {"Ports": [{"IP": "::", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"}, {"PrivatePort": 5, "Type": "tcp"}]},
    {"Ports": [{"PrivatePort": 53, "PublicPort": 53, "Type": "udp"}]},
    {"Ports": None},
    {},
]


def test_what_docker_says_is_published() -> None:
    assert published.parse_published(CONTAINERS) == {8080}


@pytest.mark.parametrize("told", [None, 5, [5], {"message": "no"}, [{"Ports": [{"Type": "tcp", "PublicPort": "x"}]}]])
def test_nonsense_is_no_list(told: Any) -> None:
    with pytest.raises(ValueError):
        published.parse_published(told)


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[Path]:
    """A Docker that tells of one start, each time with another port, and then goes away."""
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer(body: bytes) -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)

        def lists(ports_: list[int]) -> bytes:
            return json.dumps([{"Ports": [{"Type": "tcp", "PublicPort": port}]} for port in ports_]).encode()

        def serve() -> None:
            events, _ = listener.accept()
            with events:
                asked = events.recv(65536)
                assert b"GET /events?filters=" in asked and b"start" in asked
                events.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                answer(lists([1111]))
                event = b'{"Type":"container","Action":"start"}\n'
                events.sendall(f"{len(event):x}\r\n".encode() + event + b"\r\n")
                answer(lists([1111, 2222]))
                events.sendall(b"0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join(10)


def test_events_are_followed_until_docker_goes_away(docker: Path) -> None:
    assert list(published.watch_published(docker)) == [{1111}, {1111, 2222}]


def test_no_docker_is_an_error_of_the_guest(tmp_path: Path) -> None:
    with pytest.raises(GuestError):
        list(published.watch_published(tmp_path / "nothing"))
    with pytest.raises(GuestError):
        published.read_published(tmp_path / "nothing")
