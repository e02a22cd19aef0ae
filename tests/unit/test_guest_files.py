"""The files of images/guest that carry a promise, and its shell functions, which run on this host as well."""

from __future__ import annotations

import json
import subprocess
import time
import tomllib
from contextlib import ExitStack
from pathlib import Path

from vmbuild.guest.oci import BLOBS

ROOT = Path(__file__).parents[2] / "images" / "guest" / "root"
PARTS = ROOT / "usr/share/vmbuild/parts"

DEAF = """
trap 'echo {name} >>{folder}/log' TERM
echo $$ >{folder}/{name}.pid
while :; do sleep 0.02; done
"""


def test_blobs_are_looked_for_where_containerd_keeps_them() -> None:
    config = tomllib.loads((ROOT / "etc/containerd/config.toml").read_text())
    assert f"{config['root']}/io.containerd.content.v1.content/blobs/sha256" == BLOBS


def test_dockerd_is_told_of_the_containerd_that_init_starts() -> None:
    address = json.loads((ROOT / "etc/docker/daemon.json").read_text())["containerd"]
    assert f"rm -f {address}\n" in (ROOT / "usr/lib/vmbuild/containerd").read_text()
    assert "::respawn:/usr/lib/vmbuild/containerd\n" in (ROOT / "etc/inittab").read_text()


def test_docker_is_asked_to_end_before_containerd_and_neither_is_waited_for_for_ever(tmp_path: Path) -> None:
    names = ["docker", "containerd"]
    script = PARTS.read_text().replace("/run/", f"{tmp_path}/") + "stop_docker 1"
    with ExitStack() as stack:
        for name in names:
            program = DEAF.format(name=name, folder=tmp_path)
            running = stack.enter_context(subprocess.Popen(["sh", "-c", program]))
            stack.callback(running.kill)
            while not (tmp_path / f"{name}.pid").is_file() or not (tmp_path / f"{name}.pid").read_text():
                time.sleep(0.01)
        subprocess.run(["sh", "-c", script], check=True, timeout=10)
        assert (tmp_path / "log").read_text().split() == names
