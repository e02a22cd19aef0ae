"""Base images in the recipe: made once, whoever asks for them meanwhile."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.unit.listener import Listener
from vmbuild import build
from vmbuild.image import base, catalog
from vmbuild.image.base import BasePlan


def test_two_that_want_the_same_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BasePlan(catalog.load_base("debian:trixie-slim"), (), tmp_path, "", tmp_path / "bases" / "it.tar.gz")
    reports, begun, made = (Listener(), Listener()), threading.Event(), list[BasePlan]()

    def configure(plan: BasePlan, *_: object) -> None:
        made.append(plan)
        begun.set()
        while not (reports[0].steps or reports[1].steps):
            time.sleep(0.01)
        base.keep_layer(plan, io.BytesIO(b"a tree").read)

    monkeypatch.setattr(build, "_configure_layer", configure)
    nobody: Any = None
    with ThreadPoolExecutor() as pool:
        first = pool.submit(build._make_layer, plan, nobody, nobody, reports[0])
        assert begun.wait(20)
        second = pool.submit(build._make_layer, plan, nobody, nobody, reports[1])
        assert first.result(20) == second.result(20)
    assert made == [plan]
    assert reports[1].steps == ["Waiting for another vmbuild that makes debian:trixie-slim"]
