"""What the guest has of the host's ways into the network: authorities, registries, ports of the host's loopback.

All of it is in memory only, gone with the boot; what was applied is written down beside it, so that the next look
costs one command; a guest that has begun with nothing, and shall have nothing, is not asked. Docker reads its proxies,
which are the seed's (`guest.seed`), and certificates when it starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmbuild.address import HOST
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError
from vmbuild.guest.ready import PING
from vmbuild.guest.seed import environment_text
from vmbuild.guest.session import Session, capture, send

STATE = "/run/vmbuild/passed"
DAEMON = "/etc/docker/daemon.json"
APPLY_S = 60.0
RELOAD_S = 30.0
"""How long Docker may take to go by another configuration."""
RESTART_S = 120.0

_LISTENS = "0A"
"""The state of a socket that listens, in /proc/net/tcp (Linux, net/tcp_states.h)."""

_LOOK = f"cat {STATE} 2>/dev/null; echo --; cat /proc/net/tcp /proc/net/tcp6 2>/dev/null"

# Bound over the guest's own, which may be on a disk that stays: nothing of the host is left there.
_TRUST = """
set -e
bundle=/etc/ssl/certs/ca-certificates.crt
cat >/run/vmbuild/authorities.pem
while umount $bundle 2>/dev/null; do :; done
[ -s /run/vmbuild/authorities.pem ] || exit 0
cat $bundle /run/vmbuild/authorities.pem >/run/vmbuild/ca-certificates.crt
mount --bind /run/vmbuild/ca-certificates.crt $bundle
"""
_READ_DAEMON = f"cat /run/vmbuild/daemon.own 2>/dev/null || cat {DAEMON} 2>/dev/null || echo '{{}}'"
_WRITE_DAEMON = f"""
set -e
cd /run/vmbuild
if [ ! -e daemon.own ]; then
    mkdir -p /etc/docker
    [ -e {DAEMON} ] || echo '{{}}' >{DAEMON}
    cp {DAEMON} daemon.own
    : >daemon.json
    mount --bind daemon.json {DAEMON}
fi
cat >daemon.json
kill -HUP "$(cat /run/docker.pid)"
"""
# Docker answers `null` to a client that has closed its side, as socat does at the end of its input.
_INFO = "printf 'GET /info HTTP/1.0\\r\\n\\r\\n' | socat -T 20 -,ignoreeof UNIX-CONNECT:/run/docker.sock"

# Who uses Docker has a connection to it, a build as long as it runs; one that is about to begin has a workspace.
_IS_IDLE = """
[ -z "$(ls /var/lib/vmbuild/work 2>/dev/null)" ] || exit 0
awk '$6 == "03" && $8 ~ /docker.sock$/' /proc/net/unix | grep -q . || echo idle
"""

# Whoever started it (init, systemd, OpenRC) starts it again.
_RESTART = f"""
set -e
cat >/run/vmbuild/seed/environment
old=$(cat /run/docker.pid)
kill "$old"
until new=$(cat /run/docker.pid 2>/dev/null) && [ "$new" != "$old" ] && {PING}; do
    sleep 0.2
done
"""

# A packet to the guest's own loopback goes to the host's, from this guest's address: which only its own programs can
# send, and only over the one interface that leads there.
_FORWARD = f"""
set -e
out=$(ip route show default | sed -n 's/.* dev \\([^ ]*\\).*/\\1/p' | head -n 1)
echo 1 >/proc/sys/net/ipv4/conf/$out/route_localnet
{{
    echo '*nat'
    echo ':VMBUILD - [0:0]'
    for port; do
        echo "-A VMBUILD -p tcp -m tcp --dport $port -j DNAT --to-destination {HOST}:$port"
    done
    echo COMMIT
}} | iptables-restore -w --noflush
iptables -w -t nat -C OUTPUT -d 127.0.0.1 -j VMBUILD 2>/dev/null || {{
    iptables -w -t nat -A OUTPUT -d 127.0.0.1 -j VMBUILD
    iptables -w -t nat -A POSTROUTING -s 127.0.0.1 -d {HOST} -j MASQUERADE
}}
"""


@dataclass(frozen=True)
class Passed:
    """What a guest shall have. `authorities` is PEM; a mirror is a URL, an insecure registry `host[:port]` or a CIDR.

    `ports` are those of the guest's 127.0.0.1 that are the host's. `proxies` are what Docker has from the seed.
    """

    proxies: Mapping[str, str] = field(default_factory=dict)
    authorities: str = ""
    mirrors: tuple[str, ...] = ()
    insecure: tuple[str, ...] = ()
    ports: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Outcome:
    """What could not be had: what Docker reads when it starts, as it is in use, and ports that are the guest's own."""

    is_late: bool = False
    guests_own: tuple[int, ...] = ()


@dataclass(frozen=True)
class _State:
    """What was applied since the guest has booted, nothing at first: digests by what they are of; who listens in it."""

    digests: Mapping[str, str]
    ports: frozenset[int]
    listening: frozenset[int]


def apply(session: Session, wanted: Passed, *, is_new: bool) -> Outcome:
    """Let the guest have what is wanted, and take away what no longer is. Raises GuestError.

    `is_new` tells that its Docker has just begun, with the proxies that are wanted.

    Docker is started again for what it reads only then, unless somebody uses it. A port that is the host's stays so
    until the guest goes down, or something in it listens there: other builds run.
    """
    if is_new and wanted == Passed():
        return Outcome()
    state, new = _NEW if is_new and not wanted.ports else _look(session), _digests(wanted)
    # Nobody has asked a new one for anything yet: what is put beside it now it will read.
    old = {**state.digests, "started": new["started"]} if is_new else state.digests
    if new["authorities"] != old["authorities"]:
        _run(session, _TRUST, feed=wanted.authorities)
    if new["registries"] != old["registries"]:
        _set_registries(session, wanted.mirrors, wanted.insecure)
    is_late = new["started"] != old["started"]
    has_others = new["registries"] != old["registries"] and bool(wanted.mirrors or wanted.insecure) and not is_new
    # For minutes BuildKit goes by what it knew of a registry when it last asked for an image (util/resolver/pool.go).
    if (is_late or has_others) and _is_idle(session):
        _run(session, _RESTART, feed=environment_text(wanted.proxies), limit_s=RESTART_S)
        is_late = False
    elif is_late:
        new["started"] = old["started"]
    _remember(session, state, new, (state.ports | wanted.ports) - state.listening)
    return Outcome(is_late, tuple(sorted(wanted.ports & state.listening)))


def _remember(session: Session, state: _State, digests: Mapping[str, str], ports: frozenset[int]) -> None:
    """Let these ports be the host's, and write down what was applied, where either has changed."""
    if ports != state.ports:
        _run(session, _FORWARD, *map(str, sorted(ports)))
    if digests != state.digests or ports != state.ports:
        lines = [f"{key} {value}\n" for key, value in digests.items()]
        _run(session, f"cat >{STATE}", feed="".join([*lines, f"ports {' '.join(map(str, sorted(ports)))}\n"]))


def _is_idle(session: Session) -> bool:
    """Tell whether nobody uses Docker: no build, no client, no container."""
    if _run(session, _IS_IDLE).strip() != "idle":
        return False
    try:
        return int(_ask_docker(session)["ContainersRunning"]) == 0
    except (ValueError, KeyError, TypeError):
        return False


def _look(session: Session) -> _State:
    state, _, sockets = capture(session, ["sh", "-c", _LOOK], deadline=Deadline.after(APPLY_S)).partition("--\n")
    rows = {key: value for key, _, value in (line.partition(" ") for line in state.splitlines())}
    ports = frozenset(int(word) for word in rows.pop("ports", "").split())
    return _State(rows or _digests(Passed()), ports, frozenset(_listening(sockets)))


def _listening(sockets: str) -> Iterable[int]:
    """Yield the ports that somebody listens on who would be met at 127.0.0.1 (proc_pid_net(5), tcp)."""
    for fields in map(str.split, sockets.splitlines()):
        if len(fields) > 3 and fields[3] == _LISTENS:
            address, _, port = fields[1].rpartition(":")
            if not address.strip("0") or address.endswith("0100007F") or address == f"{'0' * 24}01000000":
                yield int(port, 16)


def _set_registries(session: Session, mirrors: tuple[str, ...], insecure: tuple[str, ...]) -> None:
    """Let Docker go by these, beside what its own configuration says. Raises GuestError when it does not."""
    own = json.loads(_run(session, _READ_DAEMON))
    for key, values in (("registry-mirrors", mirrors), ("insecure-registries", insecure)):
        own[key] = list(dict.fromkeys([*own.get(key, []), *values]))
    _run(session, _WRITE_DAEMON, feed=json.dumps(own, indent=2))
    limit = Deadline.after(RELOAD_S)
    while not _goes_by(session, own["registry-mirrors"], own["insecure-registries"]):
        if limit.passed:
            raise GuestError(
                "Docker in the guest does not take the registries that the settings name",
                details=_run(session, "tail -n 20 /var/log/docker.log"),
                resolution="Check registry_mirrors and insecure_registries: `vmbuild config` shows them.",
            )
        limit.sleep(0.2)


def _goes_by(session: Session, mirrors: list[str], insecure: list[str]) -> bool:
    """Tell whether Docker has these mirrors and insecure registries, and no others."""
    try:
        config = _ask_docker(session)["RegistryConfig"]
    except (ValueError, KeyError, TypeError):  # it does not answer just now
        return False
    named = {name for name, index in (config["IndexConfigs"] or {}).items() if not index["Secure"]}
    ranges = {str(each) for each in config["InsecureRegistryCIDRs"] or []} - _ALWAYS_INSECURE
    has_mirrors = [each.rstrip("/") for each in config["Mirrors"] or []] == [each.rstrip("/") for each in mirrors]
    return has_mirrors and named | ranges == set(insecure) - _ALWAYS_INSECURE


_ALWAYS_INSECURE = {"127.0.0.0/8", "::1/128"}
"""What Docker takes for insecure by itself (moby, registry/config.go)."""


def _ask_docker(session: Session) -> Any:
    """Return what Docker tells of itself. Raises ValueError when it does not answer."""
    return json.loads(_run(session, _INFO).partition("\r\n\r\n")[2])


def _run(session: Session, script: str, *words: str, feed: str = "", limit_s: float = APPLY_S) -> str:
    argv = ["sh", "-c", script, "passed", *words]
    return capture(session, argv, feed=send(feed.encode()), deadline=Deadline.after(limit_s))


def _digests(wanted: Passed) -> dict[str, str]:
    return {
        "authorities": _digest(wanted.authorities),
        "registries": _digest([wanted.mirrors, wanted.insecure]),
        "started": _digest([sorted(wanted.proxies.items()), wanted.authorities]),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


_NEW = _State(_digests(Passed()), frozenset(), frozenset())
