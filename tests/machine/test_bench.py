"""A real comparison, small, and its page in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.machine import host_engine, user_mode
from tests.machine.conftest import BASE, Cli
from tests.unit.bench.examples import make_failed, make_report, make_result
from vmbuild.bench import binfmt, page

pytestmark = [pytest.mark.machine, pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")]

ARTEFACTS = "VMBUILD_TEST_ARTEFACTS"
"""The variable that names a folder where screenshots are kept."""

DOCKERFILE = f"""FROM {BASE} AS build
ARG WORD=none
RUN uname -m | tee /machine && test "$(nproc)" = 1 && find /usr -xdev | sort | sha256sum
COPY data .
RUN echo $WORD; cat data >out; echo "cpu ${{QEMU_CPU:-of the machine}}"
FROM {BASE}
COPY --from=build /out /machine /
RUN grep -q aarch64 /machine
"""

STEPS = ["run 1.01", "run 1.02", "run 2.01"]


@pytest.mark.skipif(not user_mode.can_emulate(), reason="no buildah, no emulator, or no namespaces for it")
def test_a_small_build_is_compared(cli: Cli, tmp_path: Path) -> None:
    context = tmp_path / "small"
    context.mkdir()
    (context / "Dockerfile").write_text(DOCKERFILE)
    (context / "data").write_bytes(os.urandom(100_000))
    before = binfmt.find_registered(binfmt.EMULATORS["linux/arm64"])
    options = ("--runs", "1", "--cpus", "1", "--name", "bench", "--build-arg", "WORD=hello", "--quiet-limit", "0")
    done = cli.ok("bench", str(context), *options, "--report", str(tmp_path / "report"), "--json", "-")
    data = done.json()
    assert data == json.loads((tmp_path / "report/report.json").read_text())
    assert (tmp_path / "report/index.html").read_text().endswith("</html>\n")
    (result,) = data["results"]
    assert [(run["side"], run["number"]) for run in result["runs"]] == [("vm", 1), ("user", 1)]
    for run in result["runs"]:
        _check_run(run)
    facts = result["side_facts"]
    assert (facts["vm"]["cpu"], facts["user"]["cpu"]) == ("cortex-a76,pmu=off", "cortex-a76")
    assert "-smp 1" in facts["vm"]["flags"]
    assert binfmt.find_registered(binfmt.EMULATORS["linux/arm64"]) == before  # the host is as it was
    states = {machine["name"]: machine["state"] for machine in cli.ok("list", "--json").json()}
    assert states["bench-vm"] == "stopped"


def _check_run(run: dict[str, Any]) -> None:
    seconds = {phase["key"]: phase["seconds"] for phase in run["phases"]}
    assert [key for key in seconds if key.startswith("run")] == STEPS
    assert all(seconds[key] > 0.005 for key in STEPS)
    assert {"context", "base", "export"} <= set(seconds)
    assert sum(seconds.values()) == pytest.approx(run["seconds"], rel=0.15, abs=1.0)
    assert 0.3 < run["cpu_s"] < 2 * run["seconds"] + 2
    assert run["peak_memory_bytes"] > 10_000_000
    assert run["archive_bytes"] > 20_000_000
    assert run["samples"]


@pytest.mark.skipif(not user_mode.can_emulate(), reason="no buildah, no emulator, or no namespaces for it")
def test_what_only_a_machine_can_build_is_a_result(cli: Cli, tmp_path: Path) -> None:
    words = "this is user mode"
    for name, test in (("one", f"""if [ "$QEMU_CPU" ]; then echo {words}; exit 75; fi"""), ("two", "true")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "Dockerfile").write_text(f"FROM {BASE}\nRUN {test}\n")
        (tmp_path / name / "bench.toml").write_text("runs = 1\n")
    options = ("--suite", "--cpus", "1", "--name", "bench", "--quiet-limit", "0")
    done = cli.ok("bench", str(tmp_path), *options, "--report", str(tmp_path / "report"))
    assert f"    {words}\n" in done.err
    one, two = json.loads((tmp_path / "report/report.json").read_text())["results"]
    assert [(each["side"], each["number"]) for each in one["failures"]] == [("user", 0)]
    assert [run["side"] for run in one["runs"]] == ["vm"]
    assert one["summary"][0]["ratios"] == {}
    assert two["failures"] == []
    assert [run["side"] for run in two["runs"]] == ["vm", "user"]


@pytest.mark.slow
@pytest.mark.skipif(not host_engine.can_run(), reason="no root, or no binfmt_misc at /proc/sys/fs/binfmt_misc")
def test_dockers_own_buildx_is_compared(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    step = 'RUN [ "$(uname -m)" = aarch64 ] && find /usr -xdev | sort | sha256sum && sleep 1\n'
    (tmp_path / "context/Dockerfile").write_text(f"FROM {BASE}\n{step}")
    emulator = binfmt.EMULATORS["linux/arm64"]
    program = shutil.which(emulator.program)
    assert program
    options = ("--runs", "1", "--name", "bench", "--user-runner", "docker", "--quiet-limit", "0")
    with host_engine.running(cli.cache) as where, host_engine.registered(emulator, program):
        done = cli.ok(
            "bench",
            str(tmp_path / "context"),
            *options,
            "--json",
            "-",
            DOCKER_HOST=where.host,
            DOCKER_CONFIG=where.config,
        )
        left = subprocess.check_output(["docker", "images", "--format", "{{.Repository}}"], env=where.env).decode()
    (result,) = done.json()["results"]
    assert result["failures"] == []
    _, user = result["runs"]
    assert user["side"] == "user"
    assert {"run 1.01", "export"} <= {phase["key"] for phase in user["phases"]}
    assert user["archive_bytes"] > 20_000_000
    assert user["cpu_s"] > 0.05
    facts = result["side_facts"]["user"]
    assert facts["what"] == "docker buildx, with qemu-user through binfmt_misc"
    assert facts["emulator"] == program
    assert left == ""


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
MEASURE = """<!doctype html><iframe id=it style="border:0;width:{width}px;height:2000px" srcdoc="{page}"></iframe>
<p id=said></p><script>it.onload = () => {{ const root = it.contentDocument.documentElement;
said.textContent = "wide " + root.scrollWidth + " of " + root.clientWidth + ", " +
it.contentWindow.getComputedStyle(it.contentDocument.body).backgroundColor }}</script>"""


def browse(tmp_path: Path, url: str, *options: str) -> str:
    """Open a page in the browser, which has never been used before, and return what it prints."""
    assert CHROMIUM is not None
    argv = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", *options, url]
    return subprocess.run(argv, check=True, capture_output=True, timeout=120).stdout.decode()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize(
    ("width", "theme", "background"),
    [(1100, "light", "rgb(249, 249, 247)"), (1100, "dark", "rgb(13, 13, 13)"), (390, "light", "rgb(249, 249, 247)")],
)
def test_the_page_fits_and_follows_the_theme(tmp_path: Path, width: int, theme: str, background: str) -> None:
    text = page.render(make_report(make_result(), make_result("python-wheel", 66, 44), make_failed("user")))
    file, frame = tmp_path / "index.html", tmp_path / "frame.html"
    file.write_text(text)
    escaped = text.replace("&", "&amp;").replace('"', "&quot;")
    frame.write_text(MEASURE.format(width=width, page=escaped))
    dark = ("--force-dark-mode",) if theme == "dark" else ()
    said = browse(tmp_path, frame.as_uri(), "--dump-dom", "--virtual-time-budget=5000", *dark)
    found = re.search(r"wide (\d+) of (\d+), (rgb\([^)]*\))", said)
    assert found is not None, said[-500:]
    assert int(found[1]) <= int(found[2]) == width, "it has to be scrolled sideways"
    assert found[3] == background
    kept = Path(os.environ.get(ARTEFACTS) or tmp_path)
    shot = kept / f"bench-{theme}-{width}.png"
    browse(tmp_path, file.as_uri(), f"--window-size={width},4000", f"--screenshot={shot}", *dark)
    assert shot.stat().st_size > 20_000
