"""The fake programs, for every test that starts one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.fakes import FakeSession, Reply
from vmbuild import operate, start
from vmbuild.guest import ready
from vmbuild.image import store
from vmbuild.model import Home
from vmbuild.report import SilentReporter

PROGRAMS = Path(__file__).parents[1] / "programs"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the fake programs, first on PATH."""
    monkeypatch.setenv("PATH", f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}")
    return PROGRAMS


@pytest.fixture(autouse=True)
def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests from them."""
    for name in [name for name in os.environ if name.startswith("VMBUILD_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def home(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home with the fake QEMU, a guest image, and a guest that is ready at once; its machine is gone at the end."""
    from tests.unit.machine.conftest import make_qemu, make_spec

    monkeypatch.setenv("CI", "true")  # nothing is begun in the background
    monkeypatch.setattr(start, "fetch_image", lambda *_: make_spec(tmp_path).image)
    monkeypatch.setattr(store, "find_digest", lambda *_: make_spec(tmp_path).image)
    monkeypatch.setattr(start, "probe_for", lambda *_: make_qemu())
    monkeypatch.setattr(ready, "wait_ready", lambda *_: FakeSession((("sh",), Reply())))
    home = Home(tmp_path / "cache", tmp_path / "state")
    home.cache.mkdir()
    yield home
    operate.destroy("box", home, SilentReporter())
