"""The commands for what is in the cache: guest images, snapshots, downloads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmbuild.cli.options import Group, as_json, machine_options, read_settings
from vmbuild.errors import GuestImageError, UsageError
from vmbuild.model import format_size

if TYPE_CHECKING:
    from vmbuild.machine.snapshot import Snapshot
    from vmbuild.stock import ImageRow


@click.group(cls=Group, invoke_without_command=True)
@click.option("--snapshots", is_flag=True, help="List the snapshots that machines start from instead.")
@as_json
@click.pass_context
def images(ctx: click.Context, snapshots: bool, as_json: bool) -> None:
    """List the guest images: the catalogue, and what is in the cache."""
    if ctx.invoked_subcommand is not None:
        if snapshots:
            raise UsageError(f"--snapshots goes before no other command, such as {ctx.invoked_subcommand}")
        if as_json:
            ctx.default_map = {name: {"as_json": True} for name in images.commands}
        return
    from vmbuild import stock, ui

    if snapshots:
        _show_snapshots(stock.list_snapshots(read_settings({}).home()), as_json)
        return
    rows = stock.list_images(read_settings({}).home())
    if as_json:
        ui.print_json(rows)
        return
    columns = ("name", "kind", "arch", "cached", "size", "description", "verified", "source")
    ui.print_table(columns, [_cells(row) for row in rows])
    for row in rows:
        if row.hides:
            ui.say(f"{row.name} is your own ({row.origin}); it hides {', '.join(map(str, row.hides))}.")


def _cells(row: ImageRow) -> tuple[str | None, ...]:
    fetched = row.fetched_digest and f"{row.fetched_digest.partition(':')[2][:12]} (as fetched)"
    cached, size = (row.digest[:12], row.size_bytes) if row.digest else (fetched, row.fetched_bytes)
    facts = (row.description, row.verified, row.source)
    return (row.name, row.kind, row.arch, cached, format_size(size) if size else None, *facts)


def _show_snapshots(found: list[Snapshot], as_json: bool) -> None:
    from vmbuild import ui

    if as_json:
        ui.print_json(found)
        return
    rows = [(s.image, s.cpus, f"{s.memory_mib} MiB", format_size(s.size_bytes), s.qemu, s.key[:12]) for s in found]
    ui.print_table(("image", "cpus", "memory", "size", "qemu", "key"), rows)


@images.command("snapshot")
@machine_options("arch", "cpus", "memory", "image", "timeout", "mirror", "security_mirror")
@click.option("--in-background", is_flag=True, hidden=True)
@as_json
def images_snapshot(as_json: bool, in_background: bool, **flags: Any) -> None:
    """Have the snapshot that machines of this shape start from; `up` has it made in the background."""
    from vmbuild import stock, ui

    found = read_settings(flags)
    made = stock.make_snapshot(found.as_request(), found.home(), ui.TerminalReporter(), in_background=in_background)
    if as_json:
        ui.print_json(made)
    else:
        ui.say(f"The snapshot is in the cache ({format_size(made.size_bytes)}).")


@images.command("fetch")
@machine_options("arch", "image", "mirror", "security_mirror")
@click.option("--refresh", is_flag=True, help="Even if it is there: take what is published today.")
@as_json
def images_fetch(as_json: bool, refresh: bool, **flags: Any) -> None:
    """Have a guest image in the cache, for a CI cache or before a journey; with --refresh the newest."""
    from vmbuild import start, ui

    found = read_settings(flags)
    image = start.fetch_image(found.as_request(), found.home(), ui.TerminalReporter(), refresh=refresh)
    if as_json:
        ui.print_json(image)
    else:
        ui.say(f"The guest image {image.name} is in the cache ({format_size(image.size_bytes)}).")


@images.command("verify")
@as_json
def images_verify(as_json: bool) -> None:
    """Hash every cached guest image and disk again."""
    from vmbuild import stock, ui

    checks = stock.verify_images(read_settings({}).home())
    if as_json:
        ui.print_json(checks)
    else:
        ui.print_table(("name", "digest", "result"), [(c.name, c.digest[:12], c.problem or "whole") for c in checks])
    if any(check.problem for check in checks):
        raise GuestImageError("a guest image in the cache is damaged", resolution="Delete its folder in the cache.")


@click.command()
@click.option("--all", "everything", is_flag=True, help="Also what the next machine would start from.")
@as_json
def prune(everything: bool, as_json: bool) -> None:
    """Delete outdated guest images, their snapshots, disks and downloads from the cache; say how much that frees."""
    from vmbuild import stock, ui

    freed = stock.prune(read_settings({}).home(), ui.TerminalReporter(), everything=everything)
    if as_json:
        ui.print_json(freed)
        return
    ui.print_table(("what", "name", "size"), [(f.what, f.name, format_size(f.size_bytes)) for f in freed])
    ui.say(f"Freed {format_size(sum(f.size_bytes for f in freed))}.")
