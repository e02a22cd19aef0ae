from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.machine import lifetime
from vmbuild.machine.facts import describe, hardware, load_facts, write_facts
from vmbuild.machine.files import MachineFiles


def test_facts_are_kept(files: MachineFiles, tmp_path: Path) -> None:
    assert load_facts(files) is None
    made = describe(make_spec(tmp_path), make_qemu(), 5)
    write_facts(files, made)
    assert load_facts(files) == made
    assert (made.machine_type, made.accel, made.disk_bytes) == ("virt-10.0", "tcg", 5)


def test_hardware_is_what_the_guest_can_tell(tmp_path: Path) -> None:
    here = hardware(make_spec(tmp_path / "here"), make_qemu())
    assert hardware(make_spec(tmp_path / "there"), make_qemu(tmp_path / "other-qemu", sandbox=False)) == here
    assert hardware(make_spec(tmp_path, memory_mib=1024), make_qemu()) != here
    assert hardware(make_spec(tmp_path), make_qemu(accel="kvm")) != here


@pytest.mark.parametrize("change", [{"news": 1}, {"hardware": None, "accel": None, "machine_type": None}], ids=str)
def test_a_machine_of_another_vmbuild_is_found(running: MachineFiles, change: dict[str, object]) -> None:
    """One that was not found would be taken for stopped: another QEMU would be started on its disk."""
    changed = {**json.loads(running.facts.read_text()), **change}
    running.facts.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))
    assert lifetime.status(running).state == "running"


def test_a_machine_of_an_older_vmbuild_is_not_suspended(running: MachineFiles) -> None:
    old = json.loads(running.facts.read_text())
    running.facts.write_text(json.dumps({name: value for name, value in old.items() if name != "hardware"}))
    with pytest.raises(MachineError, match="older vmbuild"):
        lifetime.suspend(running, Deadline.after(5))
    assert lifetime.status(running).state == "running"


@pytest.mark.parametrize("text", ["", "[]", "{}", "7"])
def test_nonsense_is_nothing(files: MachineFiles, text: str) -> None:
    files.facts.write_text(text)
    assert load_facts(files) is None
