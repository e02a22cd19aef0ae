"""The drive that tells a disk from elsewhere what to become at its first boot, whichever way it is entered.

An ISO image that cloud-init knows by its label (the NoCloud data source), with vmbuild's files, their settings and the
script that installs them. Who logs in on the serial console runs the same script.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmbuild.guest.seed import quote
from vmbuild.whole import write_whole

LABEL = "CIDATA"
SERIAL = "vmbuild-cidata"
"""By which the guest finds the drive, as all others of vmbuild's."""

PROVISION = (
    "mkdir -p /run/vmbuild-first; for block in /sys/block/vd*; do "
    f'[ "$(cat $block/serial)" != {SERIAL} ] || mount -r /dev/${{block##*/}} /run/vmbuild-first; done; '
    "sh /run/vmbuild-first/provision"
)
"""What is run as root in the guest: finds the drive and runs its script."""


@dataclass(frozen=True)
class KitFile:
    """A file of the kit: its path in the guest without a leading slash, content and permission bits."""

    path: str
    data: bytes
    mode: int


def user_data() -> dict[str, Any]:
    """Return cloud-init's configuration: run the script, and leave to it, or as it is, what cloud-init would do."""
    return {
        "users": [],
        "disable_root": False,
        "ssh_pwauth": False,
        "preserve_hostname": True,
        "locale": False,
        "growpart": {"mode": "off"},
        "resize_rootfs": False,
        "apt": {"preserve_sources_list": True},
        "runcmd": [["sh", "-c", PROVISION]],
    }


def write_first_boot(path: Path, script: bytes, kit: Iterable[KitFile], settings: Mapping[str, str]) -> None:
    """Write the drive; `settings` become shell variables of the script. Raises HostError."""
    meta = {"instance-id": "vmbuild", "local-hostname": "vmbuild"}
    files = {
        "meta-data": json.dumps(meta).encode(),  # YAML, of which JSON is a part
        "user-data": b"#cloud-config\n" + json.dumps(user_data()).encode(),
        "provision": script,
        "settings": "".join(f"{name}={quote(value)}\n" for name, value in settings.items()).encode(),
        "kit.tar": _pack(kit),
    }
    write_whole(path, _iso(files), mode=0o600)


def _pack(kit: Iterable[KitFile]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file in kit:
            info = tarfile.TarInfo(file.path)
            info.size, info.mode = len(file.data), file.mode
            tar.addfile(info, io.BytesIO(file.data))
    return packed.getvalue()


def _iso(files: Mapping[str, bytes]) -> bytes:
    """Return an ISO 9660 image; Rock Ridge and Joliet have the names as they are."""
    import pycdlib  # once a guest image, and not for every command to load

    iso, out = pycdlib.PyCdlib(), io.BytesIO()
    iso.new(interchange_level=3, vol_ident=LABEL, rock_ridge="1.09", joliet=3)
    for number, (name, data) in enumerate(files.items()):
        iso.add_fp(io.BytesIO(data), len(data), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
    iso.write_fp(out)
    iso.close()
    return out.getvalue()
