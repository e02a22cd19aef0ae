"""The walls of the house, as data: who may import whom, and who is the one door to what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "vmbuild"
GROUND = {
    *("errors", "outputs", "model", "inputs", "deadline", "report", "whole", "lock", "address", "plain", "record"),
    "trust",
}
IMAGE = {
    *(
        "tree",
        "rootfs",
        "kernel",
        "table",
        "disk_row",
        "catalog",
        "tries",
        "http",
        "fetch",
        "mirrors",
        "packages",
        "signature",
        "debian",
    ),
    *("appliance", "checksums", "disk", "cloud", "given", "store", "prune", "base"),
}
MACHINE = {
    "files",
    "firmware",
    "probe",
    "argv",
    "qmp",
    "serial",
    "login",
    "control",
    "migration",
    "facts",
    "sparse",
    "sealed",
    "bundle",
    "snapshot",
    "suspension",
    "resources",
    "ports",
    "lifetime",
}
GUEST = {
    "session",
    "keys",
    "job",
    "channel",
    "secrets",
    "agent",
    "cache",
    "seed",
    "firstboot",
    "ssh",
    "terminal",
    "ready",
    "clock",
    "oom",
    "resources",
    "context",
    "docker",
    "listing",
    "sync",
    "transfer",
    "archive",
    "oci",
    "image",
    "compress",
    "blobs",
    "rewrite",
    "flatten",
    "folder",
    "bases",
    "passed",
    *("forward", "relay", "extract", "copying", "published"),
}
COMMANDS = {"build", "machine", "top", "cache", "host", "dockerhost", "inside", "bench"}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "outputs": {"errors"},
    "model": {"errors", "inputs", "outputs"},
    "deadline": {"errors"},
    "report": set(),
    "whole": {"errors"},
    "trust": set(),
    "lock": {"report", "whole"},
    "address": set(),
    "inputs": {"errors", "address"},
    "plain": set(),
    "record": {"errors", "outputs", "plain", "whole"},
    "process": GROUND,
    "image.tree": GROUND,
    "image.table": GROUND,
    "image.disk_row": GROUND | {"image.table"},
    "image.catalog": GROUND | {"image.table", "image.disk_row"},
    "image.tries": GROUND,
    "image.http": GROUND | {"image.tries"},
    "image.fetch": GROUND | {"image.http", "image.tries"},
    "image.mirrors": GROUND,
    "image.packages": GROUND | {"image.fetch"},
    "image.signature": GROUND | {"process"},
    "image.debian": GROUND | {"image.fetch", "image.mirrors", "image.packages", "image.signature"},
    "image.checksums": GROUND,
    "image.disk": GROUND | {"process"},
    "image.cloud": GROUND | {"image.checksums", "image.disk", "image.fetch", "image.signature"},
    "image.rootfs": GROUND | {"image.tree", "image.packages"},
    "image.kernel": GROUND | {"image.tree"},
    "image.appliance": GROUND | {"process", "image.tree", "image.rootfs", "image.kernel", "image.packages"},
    "image.base": GROUND
    | {
        f"image.{name}"
        for name in IMAGE
        - {"base", "appliance", "kernel", "cloud", "disk", "disk_row", "checksums", "given", "store", "prune"}
    },
    "image.given": GROUND | {"image.catalog", "image.checksums", "image.fetch"},
    "image.store": GROUND | {f"image.{name}" for name in IMAGE - {"base", "given", "store", "prune"}},
    "image.prune": GROUND | {"image.cloud", "image.store"},
    "machine.files": GROUND,
    "machine.firmware": GROUND,
    "machine.probe": GROUND | {"process", "machine.firmware"},
    "machine.argv": GROUND | {"machine.files", "machine.probe"},
    "machine.qmp": GROUND,
    "machine.serial": GROUND | {"machine.qmp"},
    "machine.login": GROUND | {"machine.qmp", "machine.serial"},
    "machine.control": GROUND | {"machine.files", "machine.serial"},
    "machine.migration": GROUND | {"machine.qmp"},
    "machine.ports": GROUND | {"machine.files", "machine.qmp"},
    "machine.resources": GROUND | {"machine.files", "machine.qmp"},
    "machine.sparse": GROUND,
    "machine.sealed": GROUND,
    "machine.bundle": GROUND | {"machine.sparse", "machine.sealed"},
    "machine.snapshot": GROUND | {"machine.files", "machine.probe", "machine.argv", "machine.sparse"},
    "machine.facts": GROUND | {"machine.files", "machine.probe", "machine.argv"},
    "machine.suspension": GROUND | {f"machine.{name}" for name in ("files", "probe", "facts", "snapshot")},
    "machine.lifetime": GROUND | {"process"} | {f"machine.{name}" for name in MACHINE},
    "guest.session": GROUND,
    "guest.keys": GROUND,
    "guest.seed": GROUND | {"guest.keys"},
    "guest.firstboot": GROUND | {"guest.seed"},
    "guest.ssh": GROUND | {"guest.session"},
    "guest.terminal": GROUND | {"guest.session"},
    "guest.clock": set(),
    "guest.oom": GROUND | {"guest.session"},
    "guest.resources": GROUND | {"guest.session"},
    "guest.ready": GROUND | {"guest.clock", "guest.session"},
    "guest.listing": GROUND,
    "guest.context": GROUND | {"guest.session", "guest.listing"},
    "guest.job": GROUND | {"guest.session"},
    "guest.channel": GROUND | {"guest.session"},
    "guest.transfer": GROUND | {"guest.session", "guest.channel"},
    "guest.sync": GROUND | {f"guest.{name}" for name in ("session", "channel", "context", "listing", "transfer")},
    "guest.secrets": GROUND | {"guest.session"},
    "guest.agent": GROUND | {"guest.session"},
    "guest.docker": GROUND | {"guest.session", "guest.job", "guest.secrets", "guest.transfer"},
    "guest.cache": GROUND | {"guest.session", "guest.channel", "guest.oci"},
    "guest.oci": GROUND | {"guest.session"},
    "guest.image": GROUND | {"guest.session", "guest.oci"},
    "guest.archive": GROUND | {"guest.session", "guest.channel", "guest.oci", "guest.image"},
    "guest.compress": GROUND,
    "guest.blobs": GROUND | {f"guest.{name}" for name in ("session", "channel", "oci", "image", "archive", "compress")},
    "guest.rewrite": GROUND | {"guest.oci", "guest.image", "guest.blobs"},
    "guest.flatten": GROUND | {"guest.compress"},
    "guest.folder": GROUND | {"guest.session", "guest.image", "guest.flatten"},
    "registry.logins": GROUND | {"docker_config", "process"},
    "registry.transport": GROUND | {"registry.logins"},
    "registry.push": GROUND | {"registry.transport"},
    "load": GROUND | {"process"},
    "board": GROUND | {"process"},
    "deliver": GROUND
    | {"load", "board", *(f"registry.{name}" for name in ("logins", "transport", "push"))}
    | {f"guest.{name}" for name in ("session", "archive", "blobs", "flatten", "folder", "image", "oci", "rewrite")},
    "guest.bases": GROUND | {"guest.session", "guest.oci"},
    "guest.forward": GROUND,
    "guest.relay": GROUND | {"guest.session"},
    "guest.extract": GROUND,
    "guest.published": GROUND,
    "guest.copying": GROUND | {f"guest.{name}" for name in ("session", "channel", "context", "extract", "transfer")},
    "settle": GROUND
    | {"image.catalog", "image.given"}
    | {f"machine.{name}" for name in ("argv", "facts", "files", "lifetime")},
    "reach": GROUND
    | {"machine.files", "machine.lifetime"}
    | {f"guest.{name}" for name in ("channel", "ready", "seed", "session", "ssh")},
    "authorities": GROUND,
    "docker_config": GROUND | {"process"},
    "logins": GROUND | {"docker_config"},
    "guest.passed": GROUND | {f"guest.{name}" for name in ("ready", "seed", "session")},
    "passing": GROUND
    | {"authorities", "docker_config", "logins", "image.http"}
    | {f"guest.{name}" for name in ("context", "passed", "seed", "session")},
    "dockerhost": GROUND
    | {"process", "reach", "guest.forward", "guest.relay"}
    | {f"machine.{name}" for name in ("facts", "files", "lifetime")},
    "ports": GROUND
    | {"dockerhost", "reach", "guest.published"}
    | {f"machine.{name}" for name in ("files", "lifetime")}
    | {"machine.ports"},
    "copy": GROUND | {"reach"} | {f"guest.{name}" for name in ("session", "channel", "copying", "extract")},
    "provision": GROUND
    | {"passing", "process", "reach", "image.cloud", "image.mirrors", "image.store"}
    | {f"machine.{name}" for name in ("control", "files", "lifetime", "login", "probe", "serial")}
    | {f"guest.{name}" for name in ("firstboot", "session")},
    "start": GROUND
    | {
        "dockerhost",
        "passing",
        "process",
        "provision",
        "reach",
        "settle",
        "image.catalog",
        "image.given",
        "image.store",
    }
    | {f"machine.{name}" for name in MACHINE}
    | {f"guest.{name}" for name in GUEST},
    "host_agent": GROUND | {"process", "guest.agent"},
    "supply": GROUND
    | {"host_agent"}
    | {f"guest.{name}" for name in ("agent", "channel", "context", "secrets", "session", "sync", "transfer")},
    "follow": GROUND
    | {"deliver", "reach", "renew", "supply", "image.base"}
    | {f"machine.{name}" for name in ("files", "lifetime", "serial")}
    | {f"guest.{name}" for name in ("session", "archive", "blobs", "cache", "docker", "job", "oom", "resources")},
    "build": GROUND
    | {"deliver", "start", "reach", "follow", "operate", "passing", "process", "settle", "supply"}
    | {"image.base", "image.catalog"}
    | {f"machine.{name}" for name in ("files", "lifetime", "resources")}
    | {f"guest.{name}" for name in ("session", "bases", "channel", "context", "docker", "oom")}
    | {"guest.copying", "guest.transfer"},
    "operate": GROUND
    | {"start", "reach", "dockerhost"}
    | {f"machine.{name}" for name in ("files", "lifetime", "serial", "suspension", "resources")}
    | {f"guest.{name}" for name in ("ready", "resources", "terminal")},
    "renew": GROUND
    | {"process", "reach", "start", "guest.resources"}
    | {f"machine.{name}" for name in ("files", "lifetime", "ports", "qmp", "resources", "serial")},
    "guard": GROUND | {"follow", "process"} | {f"machine.{name}" for name in ("files", "bundle", "lifetime")},
    "carry": GROUND
    | {"deliver", "start", "reach", "operate", "follow", "guard", "guest.keys"}
    | {f"machine.{name}" for name in ("files", "bundle", "facts", "lifetime", "suspension")},
    "watch": GROUND | {"reach", "process", "guest.resources", "guest.session", "machine.files", "machine.lifetime"},
    "stock": GROUND
    | {"start", "reach", "process", "settle"}
    | {f"image.{name}" for name in ("catalog", "cloud", "given", "prune", "store")}
    | {f"machine.{name}" for name in ("control", "facts", "files", "lifetime", "probe", "snapshot")},
    "doctor": GROUND | {"process", "image.debian", "machine.firmware", "machine.probe"},
    "bench.workload": GROUND,
    "bench.statistics": set(),
    "bench.phases": set(),
    "bench.sampler": GROUND,
    "bench.binfmt": GROUND | {"process"},
    "bench.runner": GROUND | {"process", "bench.phases", "bench.sampler"},
    "bench.userspace": GROUND | {"process", *(f"bench.{name}" for name in ("binfmt", "phases", "runner", "workload"))},
    "bench.engine": GROUND
    | {"process", *(f"bench.{name}" for name in ("binfmt", "phases", "runner", "sampler", "workload"))},
    "bench.facts": GROUND,
    "bench.result": {"bench.phases", "bench.sampler", "bench.statistics"},
    "bench.style": set(),
    "bench.charts": GROUND | {"bench.result", "bench.sampler", "bench.statistics"},
    "bench.page": GROUND | {"bench.charts", "bench.result", "bench.style"},
    "sides": GROUND
    | {"build", "operate", "process", "reach", "settle", "start", "image.base", "image.catalog"}
    | {f"machine.{name}" for name in ("files", "lifetime", "probe")}
    | {"guest.archive", "guest.bases", "guest.oci"}
    | {f"bench.{name}" for name in ("binfmt", "engine", "facts", "phases", "runner", "userspace", "workload")},
    "compare": GROUND | {"sides"} | {f"bench.{name}" for name in ("facts", "result", "runner", "sampler", "workload")},
    "networks": GROUND,
    "settings": GROUND | {"networks"},
    "ui": GROUND,
    "schemas": GROUND
    | {"doctor", "stock", "watch", "cli.dockerhost", "guest.resources", "image.store"}
    | {"machine.ports", "machine.snapshot", "machine.suspension"},
    "cli.completion": {"errors", "model", "settings", "image.catalog"},
    "cli.options": {"errors", "settings", "cli.completion"},
    "cli.dockerhost": {"errors", "ui", "cli.options", "dockerhost", "operate", "ports"},
    "cli.inside": {"errors", "ui", "cli.completion", "cli.options", "copy", "operate"},
    "cli.ways_in": {"errors", "model", "inputs"},
    "cli.ways_out": {"errors", "model", "outputs"},
    "cli.build": {"errors", "model", "outputs", "settings", "ui", "cli.completion", "cli.options", "cli.ways_in"}
    | {"cli.ways_out"}
    | {"build", "follow", "guard", "carry", "passing"},
    "cli.machine": {"errors", "model", "ui", "cli.options", "operate", "carry", "renew"},
    "cli.top": {"errors", "model", "ui", "cli.completion", "cli.options", "watch"},
    "cli.cache": {"errors", "model", "ui", "cli.options", "start", "stock", "machine.snapshot"},
    "cli.host": {"errors", "settings", "ui", "cli.completion", "cli.options", "doctor"},
    "cli.bench": {"errors", "model", "whole", "ui", "cli.options", "compare", "sides"}
    | {"bench.workload", "bench.result", "bench.page"},
    "cli.app": {"errors", "cli.options", *(f"cli.{name}" for name in COMMANDS)},
    "cli.program": {"errors", "ui", "cli.app"},
    "__main__": {"cli.program"},
}

DOORS = {
    "subprocess": {"process"},
    "requests": {"image.http", "registry.transport"},
    "urllib3": {"image.http"},
    "certifi": {"passing"},
    "paramiko": {"guest.ssh"},
    "debian": {"image.mirrors", "image.packages", "image.debian", "image.rootfs", "image.base"},
    "rich": {"ui"},
    "click": {
        "settings",
        "cli.completion",
        "cli.options",
        "cli.ways_in",
        "cli.ways_out",
        "cli.app",
        "cli.program",
        *(f"cli.{name}" for name in COMMANDS),
    },
    "cryptography": {"authorities", "guest.keys", "machine.snapshot"},
    "pexpect": {"machine.login"},
    "pycdlib": {"guest.firstboot"},
}
"""A foreign package, and the modules that may import it."""

SPEAKERS = {"ui", "cli.dockerhost", "cli.inside", "cli.machine", "cli.program"}
SAY_OR_END = ("print", "exit", "quit", "sys.exit", "os._exit", "SystemExit")
START = ("os.system", "os.popen", "os.fork", "os.execv", "os.posix_spawn", "pty.spawn")
HIDE = ("__import__", "import_module", "importlib.import_module")
CALLS: dict[str, set[str]] = {
    **{call: SPEAKERS for call in SAY_OR_END},
    **{call: {"process"} for call in START},
    **{call: set() for call in HIDE},
}
"""A call, and the modules that may make it; nobody hides an import from this test."""

FRONTS = {"cli": ["from vmbuild.cli.program import main as main"]}
"""What stands in a package's `__init__.py` besides its docstring; in every other one nothing does."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def modules() -> dict[str, Path]:
    return {module_name(path): path for path in SOURCE.rglob("*.py") if path.name != "__init__.py"}


def imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Yield what a module imports: `vmbuild.` modules by their full name, foreign ones by their first word."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield whole if module == "vmbuild" or whole.removeprefix("vmbuild.") in known else module


def faults(name: str, source: str, known: set[str]) -> list[str]:
    """Return every wall that a module's source goes through."""
    tree = ast.parse(source)
    found = []
    for imported in imports(tree, known):
        first, _, rest = imported.partition(".")
        if not first or (first == "vmbuild" and rest not in ALLOWED[name]):  # a relative import would hide its wall
            found.append(f"{name} imports {imported}")
        if first in DOORS and name not in DOORS[first]:
            found.append(f"{name} imports {first}")
    for node in ast.walk(tree):
        spoken = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name not in CALLS.get(spoken, {name}):
            found.append(f"{name} calls {spoken}")
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_wall_has_fallen(name: str) -> None:
    assert name in ALLOWED, "a new module: say in the table what it may import, and in docs/design.md why it is there"
    assert faults(name, modules()[name].read_text(), set(modules())) == []


def statements(source: str) -> list[str]:
    """Return what a module consists of besides its docstring."""
    tree = ast.parse(source)
    return [ast.unparse(node) for node in tree.body[ast.get_docstring(tree) is not None :]]


def test_the_packages_themselves_hold_nothing() -> None:
    held = {path.parent.name: statements(path.read_text()) for path in SOURCE.rglob("__init__.py")}
    assert {package: found for package, found in held.items() if found} == FRONTS


def test_nobody_imports_who_imports_him() -> None:
    graph = {name: allowed - {name} for name, allowed in ALLOWED.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(ALLOWED)  # raises CycleError


def test_every_foreign_package_is_declared() -> None:
    declared = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=]", line)[0] for line in declared}
    trees = [ast.parse(path.read_text()) for path in modules().values()]
    foreign = {imported.partition(".")[0] for tree in trees for imported in imports(tree, set())}
    foreign -= sys.stdlib_module_names | {"vmbuild"}
    assert [name for name in foreign if not names & set(packages_distributions()[name])] == []


def test_a_module_that_nobody_entered_fails() -> None:
    with pytest.raises(AssertionError, match="a new module"):
        test_no_wall_has_fallen("image.unheard_of")


def test_the_table_names_only_what_is_there() -> None:
    assert set(ALLOWED) == set(modules())


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("image.fetch", "from vmbuild.machine import qmp", "image.fetch imports vmbuild.machine.qmp"),
        ("guest.docker", "import vmbuild.image.store", "guest.docker imports vmbuild.image.store"),
        ("machine.argv", "import subprocess", "machine.argv imports subprocess"),
        ("build", "def f():\n    from paramiko import Transport", "build imports paramiko"),
        ("guest.ready", "print('hello')", "guest.ready calls print"),
        ("model", "import sys\nsys.exit(1)", "model calls sys.exit"),
        ("build", "raise SystemExit(1)", "build calls SystemExit"),
        ("guest.ssh", "import os\nos.system('ls')", "guest.ssh calls os.system"),
        ("guest.ssh", "from vmbuild import machine", "guest.ssh imports vmbuild.machine"),
        ("guest.ssh", "import vmbuild", "guest.ssh imports vmbuild"),
        ("machine.lifetime", "from . import qmp", "machine.lifetime imports ."),
        ("image.fetch", "from ..machine.qmp import Monitor", "image.fetch imports ..machine.qmp"),
        ("image.fetch", "import requests", "image.fetch imports requests"),
        ("build", "import click", "build imports click"),
        ("operate", "from vmbuild import cli", "operate imports vmbuild.cli"),
        ("operate", "from vmbuild.cli import main", "operate imports vmbuild.cli"),
        ("cli.top", "from vmbuild.cli.machine import up", "cli.top imports vmbuild.cli.machine"),
        ("cli.build", "import sys\nsys.exit(1)", "cli.build calls sys.exit"),
        ("build", "from importlib import import_module\nimport_module('x')", "build calls import_module"),
    ],
)
def test_the_checker_sees_a_fallen_wall(name: str, source: str, fault: str) -> None:
    assert faults(name, source, set(modules())) == [fault]


def test_a_machine_that_is_at_hand_comes_up_without_what_only_downloads_and_provisioning_need() -> None:
    heavy = {"requests", "urllib3", "debian", "pexpect", "pycdlib", "paramiko"}
    script = f"import sys, vmbuild.operate; print(*({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
