"""The CI recipes: well-formed for the system that each is for, and doing what they say, with fake programs on PATH."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests import ci_recipes as ci
from tests.command_lines import resolve

SCHEMAS = {
    ci.GITHUB_ACTION: "vendor.github-actions",
    ci.GITHUB_WORKFLOW: "vendor.github-workflows",
    ci.GITLAB: "vendor.gitlab-ci",
    ci.TRAVIS: "vendor.travis",
}
YAML_FILES = [*SCHEMAS, ci.KUBERNETES]
KUBERNETES_VERSION = "1.30"
YAMLLINT = """
extends: default
rules:
  line-length: {max: 140}
  document-start: disable
  truthy: {check-keys: false}
  comments-indentation: disable
"""
REAL = ("bash", "sh", "env", "cat", "date", "dirname", "find", "grep", "id", "mkdir", "mktemp", "rm", "sed", "uname")
"""What the scripts find of the real host."""

FAKE = ("apt-get", "apt-cache", "docker", "pip", "python3", "skopeo", "sudo", "vmbuild")
FAKE_PROGRAM = """#!{python}
import json, os, sys
from pathlib import Path
name = Path(sys.argv[0]).name
folder = Path({folder!r})
with (folder / "log").open("a") as log:
    log.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "sudo":
    os.execvp(sys.argv[1], sys.argv[1:])
if name == "qemu-system-aarch64":
    print("QEMU emulator version 8.2.2 (Debian 1:8.2.2+ds-0ubuntu1)")
if name == "python3" and "venv" in sys.argv:
    bin = Path(sys.argv[-1]) / "bin"
    bin.mkdir(parents=True, exist_ok=True)
    for each in ("pip", "vmbuild"):
        (bin / each).unlink(missing_ok=True)
        (bin / each).symlink_to(folder / "bin" / each)
if name == "vmbuild" and sys.argv[1] in ("build", "resume"):
    sys.exit(int(os.environ.get("FAKE_CODE", "0")))
"""


# --- what they look like --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yamllint_has_nothing_to_say(path: Path) -> None:
    argv = [sys.executable, "-m", "yamllint", "--strict", "-d", YAMLLINT, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_it_is_what_its_system_reads(path: Path) -> None:
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[path], str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_checker_of_schemas_sees_a_fault(tmp_path: Path) -> None:
    broken = tmp_path / "gitlab-ci.yml"
    broken.write_text(ci.GITLAB.read_text().replace("allow_failure", "allow_failures"))
    with pytest.raises(AssertionError):
        argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[ci.GITLAB], str(broken)]
        assert subprocess.run(argv, capture_output=True, check=False).returncode == 0


def test_the_job_is_what_kubernetes_takes() -> None:
    kubernetes_validate.validate(ci.load(ci.KUBERNETES), KUBERNETES_VERSION, strict=True)


def test_the_pod_meets_the_restricted_standard() -> None:
    # https://kubernetes.io/docs/concepts/security/pod-security-standards/
    pod = ci.load(ci.KUBERNETES)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod["initContainers"], *pod["containers"]):
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert own["readOnlyRootFilesystem"] is True
        assert {each["name"] for each in container["volumeMounts"]} <= {each["name"] for each in pod["volumes"]}
    assert all(each.keys() <= {"name", "emptyDir", "secret"} for each in pod["volumes"])
    assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))


def test_only_who_pushes_has_the_login() -> None:
    mounts = {name: ci.kubernetes_container(name)["volumeMounts"] for name in ("build", "push")}
    assert {name: "login" in [each["name"] for each in found] for name, found in mounts.items()} == {
        "build": False,
        "push": True,
    }


def test_the_jenkinsfile_is_groovy() -> None:
    assert not ci.jenkins_tree().has_error


@pytest.mark.parametrize("script", ci.all_scripts(), ids=lambda script: script.where)
def test_shellcheck_has_nothing_to_say(script: ci.Script) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    argv = [str(shellcheck), "--shell", "bash", "-"]
    done = subprocess.run(argv, input=script.text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", sorted(ci.CI.rglob("*")), ids=lambda path: path.name)
def test_no_recipe_asks_for_privilege_or_shows_a_secret(path: Path) -> None:
    if path.is_dir():
        return
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith(("#", "//")))
    for word in ("privileged: true", "--privileged", "/var/run/docker.sock", "docker:dind", "set -x", "--password "):
        assert word not in text, word


# --- what they do ---------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """A CI job: an empty folder and a home, and programs that note how they were called."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        (self.folder / "work").mkdir()
        for name in REAL:
            (self.folder / "bin" / name).symlink_to(shutil.which(name) or "")
        for name in (*FAKE, "qemu-system-aarch64", "qemu-img", "sqfstar", "gpgv"):
            program = self.folder / "bin" / name
            program.write_text(FAKE_PROGRAM.format(python=sys.executable, folder=str(self.folder)))
            program.chmod(0o755)
        self.env |= {"PATH": str(self.folder / "bin"), "HOME": str(self.folder / "home")}

    def run(self, script: ci.Script, **env: str) -> int:
        """Run a script as its system does, stopping at what fails, and return its exit code."""
        argv = ["bash", "-e", "-o", "pipefail", "-c", script.text]
        done = subprocess.run(
            argv, cwd=self.folder / "work", env={**self.env, **script.env, **env}, capture_output=True, check=False
        )
        return done.returncode

    def calls(self, program: str) -> list[list[str]]:
        """Return the arguments of each call of a program."""
        log = self.folder / "log"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [args for name, *args in lines if name == program]

    def commands(self) -> list[str]:
        """Return the vmbuild commands that were called, each found to be one that vmbuild knows."""
        calls = self.calls("vmbuild")
        for args in calls:
            resolve(args)
        return [args[0] for args in calls]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def github(runner: Runner, code: int, **inputs: str) -> tuple[int, str]:
    """Run the steps of the composite action, and return the exit code of the last and what it says of suspension."""
    output = runner.folder / "output"
    given = {name: each["default"] for name, each in ci.load(ci.GITHUB_ACTION)["inputs"].items()} | inputs
    own = {
        "GITHUB_OUTPUT": str(output),
        "GITHUB_PATH": str(runner.folder / "path"),
        "RUNNER_TEMP": str(runner.folder),
        "FAKE_CODE": str(code),
    }
    for step in ci.github_steps():
        env = {key: fill_in(value, given) for key, value in step.env.items()}
        ended = runner.run(ci.Script(step.where, step.text, env), **own)
        if ended != 0:
            return ended, output.read_text()
    return 0, output.read_text()


def fill_in(value: str, inputs: dict[str, str]) -> str:
    """Return a value with GitHub's expressions in it as the runner sees it."""
    value = value.replace("${{ github.action_path }}", str(ci.GITHUB_ACTION.parent))
    for name, given in inputs.items():
        value = value.replace(f"${{{{ inputs.{name} }}}}", given)
    assert "${{" not in value
    return value


def test_github_builds_and_says_whether_it_was_suspended(runner: Runner) -> None:
    code, said = github(runner, 0, options="--tag=app:1\n--platform=linux/arm64,linux/arm/v7\n\n")
    assert code == 0
    assert "suspended=false" in said
    assert "key=vmbuild-x86_64-qemu8.2.2-" in said or os.uname().machine != "x86_64"
    assert runner.commands() == ["images", "prune", "build"]
    *_, build = runner.calls("vmbuild")
    options = ["--tag=app:1", "--platform=linux/arm64,linux/arm/v7"]
    limits = ["--time-limit", "45m", "--suspend-to", "carry/"]
    assert build == ["build", ".", *options, "-o", "image.tar", *limits]


def test_github_hands_a_suspended_build_on(runner: Runner) -> None:
    code, said = github(runner, 75)
    assert (code, "suspended=true" in said) == (0, True)


def test_github_fails_where_the_build_does(runner: Runner) -> None:
    code, said = github(runner, 7)
    assert (code, "suspended" in said) == (7, False)


def test_github_goes_on_with_a_bundle(runner: Runner) -> None:
    (runner.folder / "work/carry").mkdir()
    (runner.folder / "work/carry/default.vmbundle").touch()
    assert github(runner, 0)[0] == 0
    assert runner.commands() == ["images", "prune", "resume"]


def test_githubs_workflow_uses_what_the_action_has() -> None:
    action = ci.load(ci.GITHUB_ACTION)
    jobs = ci.load(ci.GITHUB_WORKFLOW)["jobs"]
    uses = [step for job in jobs.values() for step in job["steps"] if "ci/github" in step.get("uses", "")]
    assert len(uses) == 2
    for step in uses:
        assert step.get("with", {}).keys() <= action["inputs"].keys()
    for job in jobs.values():
        assert job["outputs"].keys() == action["outputs"].keys()
    names = [step["with"]["name"] for step in jobs["build"]["steps"] if "upload-artifact" in step.get("uses", "")]
    assert names == ["bundle-1", "image"]


@pytest.mark.parametrize(("ended", "expected"), [(0, 0), (75, 75), (7, 7)])
def test_gitlab_builds_and_ends_as_vmbuild_does(runner: Runner, ended: int, expected: int) -> None:
    job = ci.gitlab_job("build")
    assert runner.run(job, FAKE_CODE=str(ended)) == expected
    assert runner.commands() == ["images", "prune", "build"]
    assert ci.load(ci.GITLAB)["build"]["allow_failure"] == {"exit_codes": 75}
    assert ci.load(ci.GITLAB)[".vmbuild"]["artifacts"]["when"] == "always"


def test_gitlab_goes_on_only_where_it_was_suspended(runner: Runner) -> None:
    (runner.folder / "work/carry").mkdir()
    assert runner.run(ci.gitlab_job("resume")) == 0
    assert runner.commands()[-1] == "resume"
    (runner.folder / "work/image.tar").touch()
    assert runner.run(ci.gitlab_job("resume")) == 0
    assert runner.commands()[-1] == "prune"


def test_gitlab_pushes_with_a_login_that_no_process_shows(runner: Runner) -> None:
    secret = {"CI_REGISTRY_PASSWORD": "hidden", "CI_REGISTRY_USER": "u", "CI_REGISTRY": "r"}
    assert runner.run(ci.gitlab_job("push"), **secret) == 0
    login, copy = runner.calls("skopeo")
    assert login == ["login", "-u", "u", "--password-stdin", "r"]
    assert copy[:2] == ["copy", "docker-archive:image.tar"]
    assert "hidden" not in (runner.folder / "log").read_text()


@pytest.mark.parametrize(("ended", "expected"), [(0, 0), (75, 0), (7, 1)])
def test_travis_goes_on_in_its_next_stage(runner: Runner, ended: int, expected: int) -> None:
    build, resume = ci.travis_stages()
    assert (runner.run(build, FAKE_CODE=str(ended)) != 0) == bool(expected)
    assert runner.commands()[-1] == "build"
    assert runner.run(resume) == 0
    assert runner.commands()[-1] == "resume"
    (runner.folder / "work/out/image.tar").touch()
    assert runner.run(resume) == 0
    assert runner.commands()[-1] == "prune"


def test_docker_hub_has_the_image_in_its_docker_before_it_pushes(runner: Runner) -> None:
    (runner.folder / "work/image.tar").touch()  # as vmbuild would
    assert runner.run(ci.docker_hub_script(), IMAGE_NAME="me/app:1", DOCKERFILE_PATH="arm/Dockerfile") == 0
    assert runner.commands() == ["build", "destroy"]
    build = runner.calls("vmbuild")[0]
    assert build[build.index("-t") + 1] == "me/app:1"
    assert build[build.index("-f") + 1] == "arm/Dockerfile"
    assert runner.calls("docker") == [["load", "-i", "image.tar"]]


def test_docker_hub_stops_where_the_build_fails(runner: Runner) -> None:
    assert runner.run(ci.docker_hub_script(), IMAGE_NAME="me/app:1", FAKE_CODE="7") == 7
    assert runner.calls("docker") == []


def test_jenkins_runs_its_scripts_in_order(runner: Runner) -> None:
    for script in ci.jenkins_scripts():
        assert runner.run(script, TIME_LIMIT="45m") == 0, script.where
    assert runner.commands() == ["destroy", "images", "prune", "build", "destroy", "resume", "destroy"]


def test_the_pod_runs_a_command_that_vmbuild_knows() -> None:
    resolve(ci.kubernetes_container("build")["args"])
    assert ci.KUBERNETES_IMAGE.read_text().rstrip().endswith('ENTRYPOINT ["vmbuild"]')


INSTALLERS = (ci.GITHUB_ACTION, ci.GITLAB, ci.TRAVIS, ci.DOCKER_HUB, ci.KUBERNETES_IMAGE)


@pytest.mark.parametrize("path", INSTALLERS, ids=lambda path: path.name)
@pytest.mark.parametrize("package", ["gpgv", "python3-venv", "qemu-system-arm", "qemu-utils", "squashfs-tools"])
def test_whoever_installs_installs_all_that_vmbuild_calls(path: Path, package: str) -> None:
    assert package in path.read_text()


def test_every_recipe_pins_what_it_fetches() -> None:
    for path in (ci.GITLAB, ci.TRAVIS, ci.DOCKER_HUB, ci.JENKINS):
        assert "git+https://example.org/vmbuild@v" in path.read_text(), path
    images: Sequence[str] = [ci.kubernetes_container(name)["image"] for name in ("build", "push")]
    assert all(":" in image and not image.endswith(":latest") for image in images)
    assert yaml.safe_load(ci.GITHUB_WORKFLOW.read_text())["permissions"] == {"contents": "read"}
