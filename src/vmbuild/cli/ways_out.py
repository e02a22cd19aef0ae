"""The options of a build that say where its container image goes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from vmbuild.errors import UsageError
from vmbuild.model import Delivered, format_size
from vmbuild.outputs import ANY_ENGINE, BOARD, STDOUT, Kind, Output, check_together, parse_load, parse_output

F = TypeVar("F", bound=Callable[..., Any])


class BuildCommand(click.Command):
    """A command with Docker's `--load`, which may stand alone, before a context too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give each `--load` the value that it has, or the one that it means."""
        return super().parse_args(ctx, list(_with_values(args)))


def _with_values(args: Sequence[str]) -> list[str]:
    """Return a command line in which each `--load` has its value: only a board's address may be the next word."""
    done, left = list[str](), list(args)
    while left:
        word = left.pop(0)
        if word == "--":
            return [*done, word, *left]
        if word == "--load":
            word = f"--load={left.pop(0) if left and left[0].startswith(BOARD) else ANY_ENGINE}"
        done.append(word)
    return done


def output_options(command: F) -> F:
    """Give a click command the options of the ways out; they arrive as `outputs` and `attests` from `read_outputs`."""
    for option in reversed(
        (
            click.option(
                *("-o", "--output", "outputs"),
                multiple=True,
                metavar="FILE|DIR|-|type=...",
                help="Where the container image goes, a docker archive or as buildx has it: "
                "type=docker|oci|tar|local|registry|image,dest=PLACE,...; repeatable.",
            ),
            click.option("--push", is_flag=True, help="Push the container image to the registry of each tag."),
            click.option(
                "--load",
                "loads",
                multiple=True,
                metavar="[=docker|podman|nerdctl|ctr] | ssh://[USER@]HOST[:PORT]",
                help="Load it into the host's engine that answers first, that one, or a board's Docker; repeatable.",
            ),
            click.option("--sbom", metavar="true|KEY=VALUE", help="Attest what is in it, as buildx does."),
            click.option(
                "--provenance", metavar="true|mode=max|false", help="Attest how it was built; off unless asked."
            ),
            click.option("--attest", "attests", multiple=True, metavar="type=...", help="Both of these, buildx's way."),
        )
    ):
        command = option(command)
    return command


def read_outputs(flags: dict[str, Any]) -> tuple[tuple[Output, ...], tuple[str, ...]]:
    """Take the options of the ways out from a command's flags; return outputs and attestations. Raises UsageError."""
    outputs = [parse_output(text) for text in flags.pop("outputs")]
    outputs += [parse_load(text) for text in flags.pop("loads")]
    if flags.pop("push"):
        outputs = _pushed(outputs)
    attests = _attests(flags.pop("sbom"), flags.pop("provenance"), flags.pop("attests"))
    return tuple(dict.fromkeys(outputs)), attests


def _pushed(outputs: list[Output]) -> list[Output]:
    """Return outputs of which one pushes: `--push` makes a push of an output that would stay, as in buildx."""
    if any(each.kind is Kind.REGISTRY for each in outputs):
        return outputs
    return [*(each for each in outputs if each.kind is not Kind.IMAGE or each.names), Output(Kind.REGISTRY)]


def _attests(sbom: str | None, provenance: str | None, attests: Sequence[str]) -> tuple[str, ...]:
    """Return buildx's values of `--attest`; one that is off is left out."""
    short = [(kind, value) for kind, value in (("sbom", sbom), ("provenance", provenance)) if value is not None]
    texts = [*attests, *(_long(kind, value) for kind, value in short)]
    found = {}
    for text in texts:
        fields = [field.strip() for field in text.split(",")]
        kind = next((field.removeprefix("type=") for field in fields if field.startswith("type=")), "")
        if kind not in ("sbom", "provenance"):
            raise UsageError(f"there is no attestation {text}", resolution="Use type=sbom or type=provenance.")
        if kind in found:
            raise UsageError(f"the attestation {kind} is asked for twice", resolution="Say it once.")
        found[kind] = ",".join(fields)
    return tuple(text for text in found.values() if "disabled=true" not in text.split(","))


def _long(kind: str, value: str) -> str:
    """Return a short form's long one. Source: buildx, util/buildflags/attests.go (CanonicalizeAttest)."""
    if value.lower() in ("true", "1"):
        return f"type={kind}"
    if value.lower() in ("false", "0"):
        return f"type={kind},disabled=true"
    return f"type={kind},{value}"


def check_outputs(outputs: Sequence[Output], tags: Sequence[str], *, as_json: bool) -> None:
    """See that the ways out go together, and with standard output as it is. Raises UsageError."""
    check_together(outputs, tags)
    if not any(each.dest == STDOUT for each in outputs):
        return
    if sys.stdout.isatty():
        raise UsageError("cannot write an archive to a terminal", resolution="Use -o FILE, or redirect.")
    if as_json:
        raise UsageError("standard output cannot carry both the archive and JSON", resolution="Use -o FILE.")


def tell_delivered(done: Delivered) -> str:
    """Return what became of an output, for a sentence."""
    size = format_size(done.size_bytes)
    if done.kind == Kind.REGISTRY:
        return f"pushed {done.where} ({size} sent, {done.digest})"
    return f"loaded it into {done.where} ({size})" if done.kind == Kind.LOAD else f"wrote {done.where} ({size})"
