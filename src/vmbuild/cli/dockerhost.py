"""The commands that make the guest's Docker the host's: what a shell sets for it, and the client in the guest."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vmbuild.cli.options import as_json, name_argument, name_option, read_settings
from vmbuild.errors import UsageError

GUEST_SOCKET = "/var/run/docker.sock"
CONTRADICTING = (
    *("DOCKER_CONTEXT", "DOCKER_TLS", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "DOCKER_API_VERSION"),
    "BUILDX_BUILDER",
)
"""What makes a client ask elsewhere, or in another way, although DOCKER_HOST is set (docker's cli, cli/command; buildx,
commands/root.go)."""


@dataclass(frozen=True)
class Shell:
    """How a shell sets a variable, forgets one, and runs what a command prints."""

    set_line: Callable[[str, str], str]
    unset_line: Callable[[str], str]
    usage: str


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _powershell_quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


SHELLS = {
    "sh": Shell(
        lambda name, value: f"export {name}={shlex.quote(value)}", lambda name: f"unset {name}", 'eval "$({command})"'
    ),
    "fish": Shell(
        lambda name, value: f"set -gx {name} {_fish_quote(value)};",
        lambda name: f"set -e {name};",
        "{command} | source",
    ),
    "powershell": Shell(
        lambda name, value: f"$Env:{name} = {_powershell_quote(value)}",
        lambda name: f"Remove-Item -ErrorAction Ignore Env:\\{name}",
        "{command} | Out-String | Invoke-Expression",
    ),
}


@dataclass(frozen=True)
class Environment:
    """What a shell sets and forgets to use a machine's Docker; `socket` is None where it is to forget all of it."""

    machine: str
    socket: str | None
    environment: dict[str, str]
    unset: list[str]


def variables(socket: Path) -> dict[str, str]:
    """Return what makes Docker's clients use a socket.

    Testcontainers mounts Docker's socket into a container of its own: there it is where the guest has it. Ports of
    containers are where `vmbuild forward` opens them; in a container itself, as jobs of CI are, its Python would take
    the guest's gateway for where they are (testcontainers, core/docker_client.py, get_connection_mode).
    """
    return {
        "DOCKER_HOST": f"unix://{socket}",
        "TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE": GUEST_SOCKET,
        "TESTCONTAINERS_HOST_OVERRIDE": "127.0.0.1",
        "TESTCONTAINERS_CONNECTION_MODE": "docker_host",
    }


@click.command()
@name_argument
@name_option
@click.option("--shell", type=click.Choice(list(SHELLS)), help="Whose words to print. [default: as SHELL says]")
@click.option("--unset", is_flag=True, help="Print what makes the shell forget it.")
@click.option("--serve", hidden=True)
@as_json
def env(positional: str | None, shell: str | None, unset: bool, serve: str | None, as_json: bool, **flags: Any) -> None:
    """Print what makes docker, compose, buildx and others on this host use the guest's Docker; for `eval`."""
    from vmbuild import dockerhost, ui

    found = read_settings(flags, positional)
    name, home = found["name"], found.home()
    if serve is not None:
        dockerhost.serve(name, home, serve)
        return
    if unset:
        told = Environment(name, None, {}, list(variables(Path("/"))))
    else:
        socket = dockerhost.open_socket(name, home, ui.TerminalReporter()).socket
        gone = [each for each in CONTRADICTING if each in os.environ]
        told = Environment(name, str(socket), variables(socket), gone)
    if as_json:
        ui.print_json(told)
    else:
        usage = "vmbuild env" + (f" {shlex.quote(name)}" if found.values["name"].origin != "default" else "")
        ui.print_text(_lines(SHELLS[shell or _users_shell()], told, usage + (" --unset" if unset else "")))


def _lines(shell: Shell, told: Environment, usage: str) -> str:
    lines = [shell.unset_line(name) for name in told.unset]
    lines += [shell.set_line(name, value) for name, value in told.environment.items()]
    return "\n".join([*lines, "# " + shell.usage.format(command=usage)])


def _users_shell() -> str:
    name = Path(os.environ.get("SHELL", "sh")).name
    return {"fish": "fish", "pwsh": "powershell"}.get(name, "sh")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("args", metavar="[--] ARGS...", nargs=-1, type=click.UNPROCESSED)
@name_option
def docker(args: Sequence[str], **flags: Any) -> None:
    """Run the guest's docker client on this terminal or pipe; ends with its exit code."""
    from vmbuild import operate

    found = read_settings(flags)
    sys.exit(operate.run_in_guest(found["name"], ["docker", *args], found.home()))


@click.command()
@click.argument("wanted", metavar="[[HOST:]PORT]...", nargs=-1)
@click.option("--remove", is_flag=True, help="Forward these no more.")
@click.option("--containers", is_flag=True, help="Forward what containers publish, as they come and go, until Ctrl-C.")
@name_option
@as_json
def forward(wanted: Sequence[str], remove: bool, containers: bool, as_json: bool, **flags: Any) -> None:
    """Forward ports of 127.0.0.1 on this host to the guest until the machine ends; list them without any."""
    from vmbuild import ports, ui

    if (containers and (wanted or remove or as_json)) or (remove and not wanted):
        raise UsageError("--containers stands alone, and --remove before ports")
    found = read_settings(flags)
    name, home = found["name"], found.home()
    asked = [ports.parse_forward(each) for each in wanted]
    if containers:
        with suppress(KeyboardInterrupt):  # Ctrl-C is how one leaves it
            ports.follow_containers(name, home, ui.TerminalReporter())
        return
    if asked:
        (ports.remove if remove else ports.forward)(name, home, asked)
    rows = ports.list_forwards(name, home)
    if as_json:
        ui.print_json(rows)
    else:
        ui.print_table(("host", "guest"), [(f"127.0.0.1:{row.host_port}", row.guest_port) for row in rows])
