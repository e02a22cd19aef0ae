"""What completes a command line in a shell: machines, guest images, platforms, the words that a setting takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from vmbuild import settings
from vmbuild.errors import VmbuildError
from vmbuild.model import ARCHES, PLATFORMS, Home

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
SHELLS = ("bash", "zsh", "fish")


def script(shell: str, program: click.Command) -> str:
    """Return what a shell is to evaluate once: it asks the program itself for each completion."""
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click knows them all
    return kind(program, {}, "vmbuild", "_VMBUILD_COMPLETE").source()


def _complete(find: Callable[[], Iterable[str]]) -> Completer:
    """Return a completer of words. It is silent about whatever fails: the command itself will say it."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
        with suppress(VmbuildError, OSError):
            return [CompletionItem(word) for word in find() if word.startswith(incomplete)]
        return []

    return complete


def _home() -> Home:
    return settings.resolve({}, os.environ, Path.cwd()).home()


def _machine_names() -> Iterator[str]:
    folder = _home().state / "machines"
    return (path.name for path in sorted(folder.glob("[!.]*")) if path.is_dir())


def _image_names() -> Iterator[str]:
    from vmbuild.image import catalog

    return (spec.name for spec in catalog.list_images(catalog.find_folders(_home().cache)))


def complete_platforms(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Complete the last platform of a list with commas."""
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    names = [name for name in PLATFORMS if name.startswith(last) and name not in taken]
    return [CompletionItem(before + comma + name) for name in names]


def complete_places(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a machine's name with its colon, or a path of this host."""
    machines = COMPLETERS["name"](ctx, param, incomplete)
    return [CompletionItem(f"{each.value}:") for each in machines] + [CompletionItem(incomplete, type="file")]


def complete_image(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a guest image's name, or the path of a disk."""
    if incomplete.startswith(("/", ".", "~")):
        return [CompletionItem(incomplete, type="file")]
    return _complete(_image_names)(ctx, param, incomplete)


def _complete_folder(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    return [CompletionItem(incomplete, type="dir")]


COMPLETERS: dict[str, Completer] = {
    "name": _complete(_machine_names),
    "image": complete_image,
    "arch": _complete(lambda: ARCHES),
    "snapshots": _complete(lambda: ("on", "off")),
    "time_limit": _complete(lambda: ("off",)),
    "stall_timeout": _complete(lambda: ("off",)),
    "mirror": _complete(lambda: ("auto",)),
    "security_mirror": _complete(lambda: ("auto",)),
    "cache_dir": _complete_folder,
    "state_dir": _complete_folder,
}
"""How the value of a setting is completed, by its key."""
