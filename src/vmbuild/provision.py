"""The recipe of a guest image that is a disk from elsewhere: booted once, given Docker and vmbuild's files, kept.

What the guest is asked to do is in images/guest/disk/provision; it tells its phases on the control port.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from vmbuild import passing, process
from vmbuild.address import seen_from_guest
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, MachineError
from vmbuild.guest.firstboot import PROVISION, KitFile, write_first_boot
from vmbuild.guest.session import Session, capture
from vmbuild.image import cloud, store
from vmbuild.image.mirrors import AUTO, host_mirrors
from vmbuild.lock import hold
from vmbuild.machine import control, lifetime, serial
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.login import run_on_console
from vmbuild.machine.probe import probe_for
from vmbuild.model import GIB, DiskBoot, DiskSpec, GuestImage, Home, MachineRequest, MachineSpec
from vmbuild.reach import wait_ready, write_seed
from vmbuild.report import Reporter

FIRST_BOOT_S = 3600.0
"""How long a first boot and the installation of Docker may take: minutes, but on a busy host many."""

READY_S = 300.0
CLEAN_S = 300.0
POWER_OFF_S = 120.0

DISK_BYTES = 8 * GIB
"""What the disk is grown to: a distribution's own leaves no room for Docker. It is sparse, and grows on."""

SHARED = (
    *("etc/containerd/config.toml", "usr/share/vmbuild/parts"),
    *(f"usr/lib/vmbuild/{name}" for name in ("agent", "context", "control", "job", "second-stage", "secrets")),
)
"""What a disk has in common with the appliance."""


def ensure(spec: DiskSpec, request: MachineRequest, home: Home, report: Reporter) -> GuestImage:
    """Return a guest image that is a disk, provisioning it first when the cache has none of this row.

    Raises GuestImageError, HostError, or MachineError with the console's last lines; nothing half-made is kept then.
    """
    found = store.find(spec, home.cache)
    if found is not None:
        return found
    with hold(home.cache / "images" / f"{spec.name}.lock", report, f"provisions {spec.name}"):
        return store.find(spec, home.cache) or _provision(spec, request, home, report)


def _provision(spec: DiskSpec, request: MachineRequest, home: Home, report: Reporter) -> GuestImage:
    fetched = cloud.ensure(spec, home.cache, report)
    for left in (home.cache / "images").glob(f".{spec.name}~*/{spec.name}"):  # we hold the lock: nobody waits for these
        lifetime.stop(MachineFiles(left), Deadline.after(0))
    with store.workspace(home.cache, spec.name) as folder:
        files = MachineFiles(folder / spec.name)
        _run_first_boot(spec, fetched.path, files, request, home, report)
        report.step("Keeping the disk")
        argv = ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", str(files.disk), str(folder / "disk.qcow2")]
        process.run(argv)
        shutil.rmtree(files.folder)
        facts = {"source": fetched.source, "source_digest": fetched.source_digest}
        return store.publish(spec, home.cache, folder, facts)


def _run_first_boot(
    spec: DiskSpec, disk: Path, files: MachineFiles, request: MachineRequest, home: Home, report: Reporter
) -> None:
    """Boot a copy of the disk, have it provisioned, see that Docker answers, clean up, power off."""
    image = GuestImage(spec.name, "", spec.arch, spec.machine_type, spec.cpu_model, DiskBoot(disk), 0)
    machine = MachineSpec(spec.name, request.cpus, request.memory_mib, DISK_BYTES, image)
    qemu = probe_for(image, home.cache)
    lifetime.prepare(machine, files, explicit_disk=False, firmware=qemu.firmware)
    write_seed(files, "vmbuild", passing.proxies(request))
    write_first_boot(
        files.first_boot, (spec.guest_files / "disk/provision").read_bytes(), _kit(spec), _settings(spec, request)
    )
    report.step("Booting the disk for the first time, which takes minutes")
    lifetime.start(machine, files, qemu, first_boot=True)
    try:
        with _with_console(files):
            limit = Deadline.after(max(FIRST_BOOT_S, request.timeout_s))
            if spec.login is not None:
                run_on_console(files.console, spec.login, PROVISION, limit)
            _follow_phases(files, limit, report)
            session = wait_ready(files, Deadline.after(max(READY_S, request.timeout_s)), report)
            report.step("Removing what the first boot left behind")
            _clean(session)
            _wait_off(files)
    finally:
        lifetime.stop(files, Deadline.after(0))


def _follow_phases(files: MachineFiles, deadline: Deadline, report: Reporter) -> None:
    alive = partial(lifetime.check_running, files)
    for line in control.listen(files, "provisioned", deadline, check_alive=alive, pause_s=1.0):
        word, _, phase = line.partition(" ")
        if word == "phase":
            report.step(" ".join(serial.read_lines(phase.encode()))[:100])


@contextmanager
def _with_console(files: MachineFiles) -> Iterator[None]:
    """Give an error of the block the last lines of the serial console, where the guest says why."""
    try:
        yield
    except (MachineError, GuestError) as error:
        words = serial.tail(files.console_log)
        if words not in error.details:
            error.details = f"{error.details}\n{words}".strip()
        raise


def _clean(session: Session) -> None:
    """Have the guest forget its first boot, and power off."""
    try:
        capture(session, ["sh", "/run/vmbuild-first/provision", "clean"], deadline=Deadline.after(CLEAN_S))
        with suppress(GuestError):  # the answer may be lost with the connection
            session.run(["poweroff"], deadline=Deadline.after(POWER_OFF_S))
    finally:
        session.close()


def _wait_off(files: MachineFiles) -> None:
    if not lifetime.wait_off(files, Deadline.after(POWER_OFF_S)):
        raise MachineError("the guest does not power off")


def _kit(spec: DiskSpec) -> list[KitFile]:
    """Return vmbuild's files for a disk; those under usr/lib/vmbuild and etc/init.d are programs."""
    shared, own = spec.guest_files / "root", spec.guest_files / "disk/root"
    found = {name: shared / name for name in SHARED}
    found |= {path.relative_to(own).as_posix(): path for path in sorted(own.rglob("*")) if path.is_file()}
    programs = ("usr/lib/vmbuild/", "etc/init.d/")
    return [
        KitFile(name, path.read_bytes(), 0o755 if name.startswith(programs) else 0o644) for name, path in found.items()
    ]


def _settings(spec: DiskSpec, request: MachineRequest) -> Mapping[str, str]:
    """Return the variables of the script: where packages come from, as the guest sees it."""
    own = host_mirrors()
    asked = {"MIRROR": (request.mirror, "debian"), "SECURITY_MIRROR": (request.security_mirror, "debian-security")}
    mirrors = {name: own.get(key, "") if url == AUTO else url for name, (url, key) in asked.items()}
    mirrors = {name: seen_from_guest(url).rstrip("/") for name, url in mirrors.items()}
    return {"SYSTEM": spec.system, **mirrors, **passing.proxies(request)}
