"""What a guest has of the host: applied when it differs, and only then."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from tests.unit.guest.fakes import FakeSession, Reply
from vmbuild.errors import GuestError
from vmbuild.guest import passed
from vmbuild.guest.passed import Outcome, Passed

TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1389 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 10
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11
   2: 0F02000A:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12
   3: 0100007F:1F91 0100007F:0016 01 00000000:00000000 00:00000000 00000000     0        0 13
  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 14
   1: 00000000000000000000000001000000:0051 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 15
   2: 0000000000000000FFFF00000100007F:0052 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 16
"""


class Guest(FakeSession):
    """A guest that does what it is told: it keeps its state, and Docker goes by what its configuration says."""

    def __init__(self, own: dict[str, Any] | None = None, *, obeys: bool = True, use: str = "idle") -> None:
        super().__init__()
        self.state = ""
        self.daemon = json.dumps(own or {"log-level": "warn"})
        self.config: dict[str, Any] = {}
        self.obeys = obeys
        self.use = use
        self.environment: str | None = None

    def run(self, argv: Sequence[str], **options: Any) -> int:
        self.table = ((("sh",), Reply(stdout=self._answer(argv[2]))),)
        code = super().run(argv, **options)
        fed = self.calls[-1].stdin.decode()
        if argv[2] == passed._WRITE_DAEMON:
            self.config = json.loads(fed)
        elif argv[2] == passed._RESTART:
            self.environment = fed
        elif argv[2] == f"cat >{passed.STATE}":
            self.state = fed
        return code

    def _answer(self, script: str) -> bytes:
        if script == passed._LOOK:
            return f"{self.state}--\n{TCP}".encode()
        if script == passed._READ_DAEMON:
            return self.daemon.encode()
        if script == passed._INFO:
            config = self.config if self.obeys else {}
            names = config.get("insecure-registries", [])
            ranges = [name for name in names if "/" in name]
            indexes = {name: {"Secure": False} for name in names if "/" not in name} | {"docker.io": {"Secure": True}}
            registries = {
                "Mirrors": [f"{url}/" for url in config.get("registry-mirrors", [])] or None,
                "IndexConfigs": indexes,
                "InsecureRegistryCIDRs": ["127.0.0.0/8", "::1/128", *ranges],
            }
            answer = {"RegistryConfig": registries, "ContainersRunning": int(self.use == "container")}
            return f"HTTP/1.0 200 OK\r\nA: b\r\n\r\n{json.dumps(answer)}".encode()
        return b"" if self.use == "busy" else b"idle\n"

    def scripts(self) -> list[str]:
        """Return the scripts that were run since the last time, and forget them."""
        found = [call.argv[2] for call in self.calls]
        self.calls.clear()
        return found


def begin(guest: FakeSession, wanted: Passed) -> Outcome:
    """Let a guest that has just begun have what is wanted."""
    return passed.apply(guest, wanted, is_new=True)


def apply(guest: FakeSession, wanted: Passed) -> Outcome:
    """Let a guest that was there before have what is wanted."""
    return passed.apply(guest, wanted, is_new=False)


MIRRORED = Passed(mirrors=("https://m.example", "http://localhost:5000"), insecure=("r.example:5000", "10.0.0.0/8"))


def test_nothing_costs_nothing_at_first_and_later_a_look() -> None:
    guest = Guest()
    assert begin(guest, Passed()) == Outcome()
    assert guest.scripts() == []
    assert apply(guest, Passed()) == Outcome()
    assert guest.scripts() == [passed._LOOK]


def test_a_new_guest_is_asked_only_who_listens_in_it() -> None:
    guest = Guest()
    begin(guest, Passed(authorities="PEM"))
    assert guest.scripts() == [passed._TRUST, f"cat >{passed.STATE}"]
    begin(guest, Passed(ports=frozenset({5000})))
    assert passed._LOOK in guest.scripts()


def test_a_guest_that_began_with_nothing_gets_what_it_is_given_later() -> None:
    guest = Guest()
    begin(guest, Passed())
    assert apply(guest, LATER) == Outcome()
    assert guest.environment == "http_proxy='http://it'\\''s'\n"
    assert passed._TRUST in guest.scripts()
    assert apply(guest, LATER) == Outcome()
    assert guest.scripts() == [passed._LOOK]


def test_registries_go_beside_what_docker_has_of_its_own_and_go_away_again() -> None:
    guest = Guest({"log-level": "warn", "registry-mirrors": ["https://own.example"]})
    begin(guest, MIRRORED)
    assert guest.config == {
        "log-level": "warn",
        "registry-mirrors": ["https://own.example", "https://m.example", "http://localhost:5000"],
        "insecure-registries": ["r.example:5000", "10.0.0.0/8"],
    }
    guest.scripts()
    apply(guest, MIRRORED)
    assert guest.scripts() == [passed._LOOK]
    apply(guest, Passed())
    assert guest.config["registry-mirrors"] == ["https://own.example"]
    assert guest.config["insecure-registries"] == []


def test_a_docker_that_does_not_obey_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passed, "RELOAD_S", 0.3)
    with pytest.raises(GuestError, match="does not take the registries"):
        begin(Guest(obeys=False), MIRRORED)


@pytest.mark.parametrize("answer", ["", "HTTP/1.0 500 No\r\n\r\n", "x\r\n\r\n{}", "x\r\n\r\nnull\n"])
def test_a_docker_that_does_not_answer_does_not_obey_yet_and_is_not_idle(answer: str) -> None:
    guest = FakeSession(
        (("sh", "-c", passed._IS_IDLE), Reply(stdout=b"idle")), (("sh",), Reply(stdout=answer.encode()))
    )
    assert not passed._goes_by(guest, [], [])
    assert not passed._is_idle(guest)


def test_authorities_are_fed_and_taken_away() -> None:
    guest = Guest()
    assert begin(guest, Passed(authorities="PEM")) == Outcome()
    (call,) = [call for call in guest.calls if call.argv[2] == passed._TRUST]
    assert call.stdin == b"PEM"
    guest.scripts()
    assert apply(guest, Passed()) == Outcome()
    assert passed._TRUST in guest.scripts()


PROXY = {"http_proxy": "http://it's"}
LATER = Passed(proxies=PROXY, authorities="PEM")


def test_docker_starts_again_for_what_it_reads_at_its_start() -> None:
    guest = Guest()
    begin(guest, Passed(proxies={"http_proxy": "http://a"}))
    assert guest.environment is None
    assert apply(guest, LATER) == Outcome()
    assert guest.environment == "http_proxy='http://it'\\''s'\n"
    guest.scripts()
    assert apply(guest, LATER) == Outcome()
    assert guest.scripts() == [passed._LOOK]
    assert apply(guest, Passed()) == Outcome()  # turned off is off
    assert guest.environment == ""


@pytest.mark.parametrize("use", ["busy", "container"])
def test_but_not_while_somebody_uses_it(use: str) -> None:
    guest = Guest(use=use)
    begin(guest, Passed())
    assert apply(guest, LATER) == Outcome(is_late=True)
    assert apply(guest, LATER) == Outcome(is_late=True)
    assert apply(guest, Passed()) == Outcome()  # which it began with
    assert guest.environment is None
    guest.use = "idle"
    assert apply(guest, LATER) == Outcome()
    assert guest.environment is not None


def test_docker_forgets_what_it_knew_of_a_registry_that_is_another_now() -> None:
    guest = Guest()
    begin(guest, MIRRORED)
    assert guest.environment is None  # it has only just started
    apply(guest, Passed())
    assert guest.environment is None
    apply(guest, MIRRORED)
    assert guest.environment == ""
    busy = Guest(use="busy")
    begin(busy, Passed())
    assert apply(busy, MIRRORED) == Outcome()
    assert busy.config["insecure-registries"] == ["r.example:5000", "10.0.0.0/8"]
    assert busy.environment is None


def test_a_password_is_not_in_what_is_remembered() -> None:
    guest = Guest()
    begin(guest, Passed(proxies={"http_proxy": "http://me:s3cret@a"}))
    assert "s3cret" not in guest.state
    assert "s3cret" not in repr(guest.calls)


def test_ports_are_the_hosts_until_something_in_the_guest_listens() -> None:
    guest = Guest()
    assert begin(guest, Passed(ports=frozenset({5000, 22}))) == Outcome(guests_own=(22,))
    (call,) = [call for call in guest.calls if call.argv[2] == passed._FORWARD]
    assert call.argv[4:] == ("5000",)
    guest.scripts()
    apply(guest, Passed(ports=frozenset({6000})))
    assert [call.argv[4:] for call in guest.calls if call.argv[2] == passed._FORWARD] == [("5000", "6000")]
    guest.scripts()
    apply(guest, Passed(ports=frozenset({5000})))
    assert guest.scripts() == [passed._LOOK]
    guest.state = guest.state.replace("5000", "5001")  # which somebody listens on by now
    apply(guest, Passed())
    assert [call.argv[4:] for call in guest.calls if call.argv[2] == passed._FORWARD] == [("6000",)]


def test_who_listens_on_loopback_is_read_from_the_kernel() -> None:
    assert set(passed._listening(TCP)) == {5001, 22, 80, 81, 82}


SCRIPTS = (
    *(passed._LOOK, passed._TRUST, passed._READ_DAEMON, passed._WRITE_DAEMON),
    *(passed._INFO, passed._IS_IDLE, passed._RESTART, passed._FORWARD),
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_shell(script: str) -> None:
    assert subprocess.run(["/bin/sh", "-n", "-c", script], check=False).returncode == 0
