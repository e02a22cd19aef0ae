"""The files of one machine, all in its state folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vmbuild.errors import UsageError

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")


@dataclass(frozen=True)
class MachineFiles:
    """Where everything of one machine lies. The lock lies beside the folder, so that it outlives a `destroy`."""

    folder: Path

    @classmethod
    def at(cls, state: Path, name: str) -> MachineFiles:
        """Return the files of a machine by name. Raises UsageError for a name that cannot be one."""
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot be a machine's name",
                resolution="Use up to 63 letters, digits, dots, hyphens and underscores, a letter or digit first.",
            )
        return cls(state / "machines" / name)

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.folder.name

    @property
    def lock(self) -> Path:
        """Held while the machine is started or stopped. The dot in front keeps it apart from a machine `NAME.lock`."""
        return self.folder.with_name(f".{self.name}.lock")

    @property
    def disk(self) -> Path:
        """The machine's own disk, qcow2."""
        return self.folder / "disk.qcow2"

    @property
    def variables(self) -> Path:
        """The firmware's variables, of a machine that has a firmware."""
        return self.folder / "variables.fd"

    @property
    def first_boot(self) -> Path:
        """The ISO image that says what a disk from elsewhere is told at its first boot."""
        return self.folder / "first-boot.iso"

    @property
    def seed(self) -> Path:
        """The tar that tells the guest its keys and name."""
        return self.folder / "seed.tar"

    @property
    def inbox(self) -> Path:
        """The raw drive on which bulk data goes into the guest."""
        return self.folder / "inbox.raw"

    @property
    def outbox(self) -> Path:
        """The raw drive on which bulk data comes out of the guest."""
        return self.folder / "outbox.raw"

    @property
    def facts(self) -> Path:
        """What the machine was last started as, JSON."""
        return self.folder / "machine.json"

    @property
    def pid(self) -> Path:
        """QEMU's process id, written by QEMU."""
        return self.folder / "qemu.pid"

    @property
    def qmp(self) -> Path:
        """QEMU's monitor socket."""
        return self.folder / "qmp.sock"

    @property
    def console(self) -> Path:
        """The serial console's socket."""
        return self.folder / "console.sock"

    @property
    def console_log(self) -> Path:
        """All that the guest wrote to its serial console since the last start."""
        return self.folder / "console.log"

    @property
    def suspension(self) -> Path:
        """What a suspended machine goes on from, JSON; there is none for one that runs or was stopped."""
        return self.folder / "suspended.json"

    @property
    def memory(self) -> Path:
        """The saved memory and devices of a suspended machine."""
        return self.folder / "memory"

    @property
    def qemu_log(self) -> Path:
        """What QEMU itself has to say."""
        return self.folder / "qemu.log"

    @property
    def renewal_log(self) -> Path:
        """What the last renewal in the background had to say."""
        return self.folder / "renewal.log"

    @property
    def control_in(self) -> Path:
        """The pipe that carries orders to the guest."""
        return self.folder / "control.in"

    @property
    def control_out(self) -> Path:
        """The pipe that carries the guest's answers."""
        return self.folder / "control.out"

    @property
    def builds(self) -> Path:
        """The folder of what is known here of the builds that run in the guest."""
        return self.folder / "builds"

    @property
    def contexts(self) -> Path:
        """The folder of what is known here of the build contexts that the guest keeps."""
        return self.folder / "contexts"

    @property
    def client_key(self) -> Path:
        """The private key that the host logs in with."""
        return self.folder / "id_ed25519"

    @property
    def host_key(self) -> Path:
        """The guest's private host key."""
        return self.folder / "ssh_host_ed25519_key"

    @property
    def host_public_key(self) -> Path:
        """The guest's public host key, which the host pins."""
        return self.folder / "ssh_host_ed25519_key.pub"

    @property
    def docker_socket(self) -> Path:
        """The socket of the guest's Docker on this host."""
        return self.folder / "docker.sock"

    @property
    def docker_wanted(self) -> Path:
        """Says, by being there, that this socket comes back whenever the machine does."""
        return self.folder / "docker.wanted"

    @property
    def docker_pid(self) -> Path:
        """The process id of the program behind this socket."""
        return self.folder / "docker.pid"

    @property
    def docker_log(self) -> Path:
        """What that program has to say."""
        return self.folder / "docker.log"

    @property
    def known_hosts(self) -> Path:
        """The guest's public host key, as OpenSSH's client reads it."""
        return self.folder / "known_hosts"

    @property
    def runtime(self) -> tuple[Path, ...]:
        """What only a running QEMU has."""
        docker = (self.docker_pid, self.docker_socket)
        return (self.pid, self.qmp, self.console, self.control_in, self.control_out, *docker)
