"""The CI recipes of ci/ as data: the shell scripts in each, in the order in which their system runs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tree_sitter_groovy
import yaml
from tree_sitter import Language, Node, Parser

CI = Path(__file__).parents[1] / "ci"
GITHUB_ACTION = CI / "github/action.yml"
GITHUB_WORKFLOW = CI / "github/workflow.yml"
GITLAB = CI / "gitlab-ci.yml"
TRAVIS = CI / "travis.yml"
DOCKER_HUB = CI / "dockerhub/hooks/build"
JENKINS = CI / "Jenkinsfile"
KUBERNETES = CI / "kubernetes/job.yaml"
KUBERNETES_IMAGE = CI / "kubernetes/Dockerfile"


@dataclass(frozen=True)
class Script:
    """A shell script of a recipe, and the environment that the recipe gives it."""

    where: str
    text: str
    env: dict[str, str] = field(default_factory=dict)


def load(path: Path) -> Any:
    """Return a YAML file's content."""
    return yaml.safe_load(path.read_text())


def github_steps() -> list[Script]:
    """Return the steps of the composite action that are scripts; their environment is as it is written there."""
    steps = load(GITHUB_ACTION)["runs"]["steps"]
    return [
        Script(f"{GITHUB_ACTION.name}: {each['name']}", each["run"], each.get("env", {})) for each in steps_run(steps)
    ]


def steps_run(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of a workflow's steps that run a script."""
    return [each for each in steps if "run" in each]


def gitlab_job(name: str) -> Script:
    """Return what a job of GitLab runs, its template's preparations first."""
    recipe = load(GITLAB)
    job = {**recipe.get(recipe[name].get("extends", ""), {}), **recipe[name]}
    variables = {key: str(value) for key, value in recipe["variables"].items()}
    return Script(f"{GITLAB.name}: {name}", "\n".join([*job["before_script"], *job["script"]]), variables)


def gitlab_jobs() -> list[Script]:
    """Return the jobs of GitLab's recipe in their order."""
    recipe = load(GITLAB)
    return [gitlab_job(name) for name in recipe if "script" in recipe[name] and not name.startswith(".")]


def travis_stages() -> list[Script]:
    """Return what each stage of Travis runs, from the first preparation on."""
    recipe = load(TRAVIS)
    env = dict(each.split("=", 1) for each in recipe["env"]["global"])
    before = [*recipe["before_install"], *recipe["install"]]
    return [
        Script(f"{TRAVIS.name}: {each['stage']}", "\n".join([*before, *each["script"]]), env)
        for each in recipe["jobs"]["include"]
    ]


def jenkins_tree() -> Node:
    """Return the Jenkinsfile as a syntax tree."""
    return Parser(Language(tree_sitter_groovy.language())).parse(JENKINS.read_bytes()).root_node


def walk(node: Node) -> Iterator[Node]:
    """Yield a node and all below it, in the order in which they are written."""
    yield node
    for child in node.children:
        yield from walk(child)


def jenkins_scripts() -> list[Script]:
    """Return the scripts of the Jenkinsfile, one-liners too."""
    found = []
    for node in walk(jenkins_tree()):
        text = (node.text or b"").decode()
        if node.type in ("string_literal", "character_literal") and ".vmbuild/bin/" in text:
            found.append(Script(f"{JENKINS.name}:{node.start_point.row + 1}", text.strip("'")))
    return found


def docker_hub_script() -> Script:
    """Return Docker Hub's hook."""
    return Script("hooks/build", DOCKER_HUB.read_text())


def kubernetes_container(name: str) -> dict[str, Any]:
    """Return a container of the pod."""
    pod = load(KUBERNETES)["spec"]["template"]["spec"]
    (found,) = (each for each in [*pod["initContainers"], *pod["containers"]] if each["name"] == name)
    return dict(found)


def all_scripts() -> list[Script]:
    """Return every script of every recipe."""
    workflow = [
        Script(f"{GITHUB_WORKFLOW.name}: {name}", step["run"])
        for name, job in load(GITHUB_WORKFLOW)["jobs"].items()
        for step in steps_run(job["steps"])
    ]
    groups = (github_steps(), workflow, gitlab_jobs(), travis_stages(), jenkins_scripts(), [docker_hub_script()])
    return [script for group in groups for script in group]
