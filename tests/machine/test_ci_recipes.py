"""CI recipes as their runners run them: an ordinary user with an empty home, a job that ends in time, and a pod."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import ci_recipes as ci
from tests.machine import users
from tests.machine.conftest import BASE, Cli
from tests.machine.users import User

pytestmark = pytest.mark.machine

SUSPENDED = 75
STEPS_S = 50
"""The build says something each second for so long: longer than the job may take."""


@dataclass
class Runner:
    """A GitLab runner: a user, and what it keeps between the jobs of a pipeline."""

    user: User
    project: Path

    @property
    def env(self) -> dict[str, str]:
        """What the runner sets, and how much of this host a machine may have."""
        return {
            "CI": "true",
            "CI_PROJECT_DIR": str(self.project),
            "CI_REGISTRY_IMAGE": "registry.example.org/app",
            "CI_COMMIT_REF_SLUG": "main",
            "PATH": f"{self.project.parent}/programs:{users.PATH}",
            "VMBUILD_MEMORY": "1G",
            "VMBUILD_SNAPSHOTS": "on",
            "VMBUILD_RESERVE": "10s",
        }

    def run(self, script: ci.Script, **env: str) -> tuple[int, str]:
        """Run a job and return its exit code and what it said."""
        given = {
            **script.env,
            "VMBUILD_SOURCE": str(self.project.parent / "clone"),
            "VMBUILD_CACHE_DIR": f"{self.project}/.cache/vmbuild",
            "IMAGE": "registry.example.org/app:main",
        }
        argv = ["bash", "-e", "-o", "pipefail", "-c", script.text]
        with self.user.start(argv, self.project, **{**self.env, **given, **env}) as program:
            try:
                said, _ = program.communicate(timeout=600)
            except BaseException:
                program.terminate()
                raise
        return program.returncode, said


@pytest.fixture(scope="module")
def runner(cli: Cli) -> Iterator[Runner]:
    """A runner with vmbuild's repository, a project to build, and a cache from an earlier pipeline."""
    with users.fresh_user() as user:
        found = Runner(user, user.home / "project")
        users.clone_into(user.home / "clone", user)
        found.project.mkdir()
        (found.project / "Dockerfile").write_text(
            f"FROM {BASE}\nRUN for i in $(seq {STEPS_S}); do echo at-$i; sleep 1; done; echo done >/done\n"
        )
        (found.project / ".dockerignore").write_text(".cache\ncarry\n")
        (user.home / "programs").mkdir()
        apt = user.home / "programs/apt-get"  # what it would install is here, and who is not root may not
        apt.write_text("#!/bin/sh\n")
        apt.chmod(0o755)
        cli.ok("images", "fetch")
        cache = found.project / ".cache/vmbuild"
        cache.mkdir(parents=True)
        for name in ("packages", "indexes", "bases", "images"):
            if (cli.cache / name).exists():
                unfinished = shutil.ignore_patterns("*.part", "*.lock")
                shutil.copytree(cli.cache / name, cache / name, ignore=unfinished)
        subprocess.run(["chown", "-R", user.name, str(user.home)], check=True)
        user.home.chmod(0o755)
        try:
            yield found
        finally:
            program = user.home / "vmbuild/bin/vmbuild"
            if program.exists():
                with user.start([str(program), "destroy", "--yes", "default"], user.home, **found.env) as ending:
                    ending.communicate(timeout=60)


def with_base(script: ci.Script) -> ci.Script:
    """Return a job that has the base image made before it builds, as no registry is reached."""
    return ci.Script(script.where, script.text.replace("mkdir -p carry\n", f"mkdir -p carry\nvmbuild base {BASE}\n"))


def test_gitlabs_second_job_ends_what_its_first_began(runner: Runner, tmp_path: Path) -> None:
    code, said = runner.run(with_base(ci.gitlab_job("build")), TIME_LIMIT="40s")
    assert code == SUSPENDED, said
    assert "The snapshot is in the cache" in said
    assert "Restoring the machine" in said
    assert "vmbuild resume" in said
    assert [path.name for path in (runner.project / "carry").iterdir()] == ["default.vmbundle"]
    assert not (runner.project / "image.tar").exists()

    shutil.rmtree(
        runner.user.home / ".local"
    )  # the next job is on another runner, which has the artifacts and the cache
    code, said = runner.run(ci.gitlab_job("resume"), TIME_LIMIT="1h")
    assert code == 0, said
    assert f"at-{STEPS_S}\n" in said
    facts = json.loads(subprocess.check_output(["skopeo", "inspect", f"docker-archive:{runner.project}/image.tar"]))
    assert (facts["Os"], facts["Architecture"]) == ("linux", "arm64")
    assert not (runner.project / "carry").exists()

    code, said = runner.run(ci.gitlab_job("resume"), TIME_LIMIT="1h")
    assert code == 0, said
    assert "Unpacking" not in said


@pytest.fixture
def pod_volume() -> Iterator[Path]:
    """An emptyDir as a pod with fsGroup has it: the group's, and its files' too."""
    folder = Path(tempfile.mkdtemp(prefix="vmbuild-pod-", dir="/tmp"))
    pod = ci.load(ci.KUBERNETES)["spec"]["template"]["spec"]["securityContext"]
    try:
        os.chown(folder, 0, pod["fsGroup"])
        folder.chmod(0o2777)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming the pod's user needs root")
def test_the_pods_command_works_without_name_capability_or_new_privilege(runner: Runner, pod_volume: Path) -> None:
    pod = ci.load(ci.KUBERNETES)["spec"]["template"]["spec"]["securityContext"]
    container = ci.kubernetes_container("build")
    context = pod_volume / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN uname -m >/machine && cat /machine\n")
    cache = runner.project / ".cache"
    shutil.move(cache, pod_volume / ".cache")
    subprocess.run(["chown", "-R", f"{pod['runAsUser']}:{pod['runAsGroup']}", str(pod_volume / ".cache")], check=True)
    confined = ["setpriv", f"--reuid={pod['runAsUser']}", f"--regid={pod['runAsGroup']}", "--clear-groups"]
    confined += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    env = {each["name"]: each["value"] for each in container["env"]}
    env |= {"PATH": users.PATH, "HOME": str(pod_volume), "VMBUILD_CPUS": "2", "VMBUILD_MEMORY": "1G"}

    def vmbuild(*args: str) -> str:
        argv = [*confined, str(runner.user.home / "vmbuild/bin/vmbuild"), *args]
        done = subprocess.run(
            argv, cwd=pod_volume, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    args = [str(context) if "://" in each else each.replace("/out", str(pod_volume)) for each in container["args"]]
    try:
        vmbuild("base", BASE)
        assert "aarch64" in vmbuild(*args)
        assert (pod_volume / "image.tar").stat().st_uid == pod["runAsUser"]
        reference = f"docker-archive:{pod_volume}/image.tar"
        facts = json.loads(subprocess.check_output(["skopeo", "inspect", reference]))
        assert facts["Architecture"] == "arm64"
    finally:
        vmbuild("destroy", "--yes")
