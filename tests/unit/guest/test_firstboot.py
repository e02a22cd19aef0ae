"""The drive of a first boot, read as the guest reads it."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pycdlib
import pytest

from vmbuild.guest.firstboot import PROVISION, KitFile, user_data, write_first_boot

KIT = (KitFile("usr/lib/vmbuild/grow", b"#!/bin/sh\n", 0o755), KitFile("etc/x.conf", b"x\n", 0o644))


def write(folder: Path, settings: dict[str, str] | None = None) -> Path:
    path = folder / "first-boot.iso"
    write_first_boot(path, b"echo provisioning\n", KIT, settings or {})
    return path


def read(path: Path, name: str, kind: str = "joliet_path") -> bytes:
    iso, out = pycdlib.PyCdlib(), io.BytesIO()
    iso.open(str(path))
    iso.get_file_from_iso_fp(out, **{kind: f"/{name}"})
    iso.close()
    return out.getvalue()


def test_cloud_init_knows_it_by_its_label(tmp_path: Path) -> None:
    data = write(tmp_path).read_bytes()
    # The primary volume descriptor is sector 16, its identifier is at 40 (ECMA-119, 8.4).
    assert data[16 * 2048 + 40 : 16 * 2048 + 72].rstrip() == b"CIDATA"


@pytest.mark.parametrize("kind", ["joliet_path", "rr_path"])
@pytest.mark.parametrize("name", ["user-data", "meta-data", "provision", "settings", "kit.tar"])
def test_names_are_as_they_are_on_either_kind_of_system(tmp_path: Path, name: str, kind: str) -> None:
    assert read(write(tmp_path), name, kind) or name == "settings"


def test_user_data_is_a_cloud_config_that_runs_the_script(tmp_path: Path) -> None:
    first, rest = read(write(tmp_path), "user-data").split(b"\n", 1)
    assert first == b"#cloud-config"
    assert json.loads(rest) == user_data()
    assert user_data()["runcmd"] == [["sh", "-c", PROVISION]]
    assert json.loads(read(write(tmp_path), "meta-data"))["instance-id"]


def test_the_kit_is_a_tar_of_roots(tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(read(write(tmp_path), "kit.tar"))) as tar:
        found = [(m.name, m.mode, m.uid, m.gid) for m in tar]
    assert found == [("usr/lib/vmbuild/grow", 0o755, 0, 0), ("etc/x.conf", 0o644, 0, 0)]


def test_settings_are_what_a_shell_reads(tmp_path: Path) -> None:
    nasty = 'it\'s $(touch never) `x` "q" \\'
    (tmp_path / "settings").write_bytes(read(write(tmp_path, {"MIRROR": nasty}), "settings"))
    said = subprocess.check_output(["sh", "-c", '. ./settings; printf %s "$MIRROR"'], cwd=tmp_path)
    assert said.decode() == nasty


def test_the_drive_is_the_owners_alone(tmp_path: Path) -> None:
    assert write(tmp_path, {"http_proxy": "http://user:password@proxy"}).stat().st_mode & 0o777 == 0o600


def test_the_command_finds_its_drive_by_serial_number_and_runs_the_script(tmp_path: Path) -> None:
    """With the kernel's folders elsewhere, and a mount that copies."""
    for name, serial in (("vda", "vmbuild-disk"), ("vdb", "vmbuild-cidata"), ("vdc", "vmbuild-seed")):
        (tmp_path / "block" / name).mkdir(parents=True)
        (tmp_path / "block" / name / "serial").write_text(serial)
    mount = tmp_path / "mount"
    mount.write_text('#!/bin/sh\necho "$2" >mounted\necho "echo ran" >"$3/provision"\n')
    mount.chmod(0o755)
    command = PROVISION.replace("/sys/block", f"{tmp_path}/block").replace("/run/", f"{tmp_path}/run/")
    said = subprocess.check_output(["sh", "-c", command], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert said == b"ran\n"
    assert (tmp_path / "mounted").read_text() == "/dev/vdb\n"
