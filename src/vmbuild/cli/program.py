"""A command line from its start to its exit code: the one place where an exception becomes one."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from vmbuild.cli.app import app
from vmbuild.errors import BROKEN_PIPE, INTERRUPTED, HungUp, ReaderGone, UsageError, VmbuildError


def main() -> NoReturn:
    """Run the program."""
    gc.set_threshold(50_000)  # modules are no garbage: looking for some while they load takes a twentieth of a start
    _open_standard_streams()
    # How CI systems cancel: clean up as after Ctrl-C. And how a terminal says that it is gone: a build goes on then.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, _interrupt)
    sys.exit(run(sys.argv[1:]))


def _open_standard_streams() -> None:
    """Open what was closed by who started us: Python has None in its place, and another file would get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


def _interrupt(number: int, frame: object) -> NoReturn:  # noqa: ARG001
    raise HungUp if number == signal.SIGHUP else KeyboardInterrupt


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        app.main(list(argv), prog_name="vmbuild", standalone_mode=False)
    except VmbuildError as error:
        from vmbuild import ui

        ui.show_error(error)
        _settle_stdout()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return UsageError.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except ReaderGone:  # say nothing
        _settle_stdout()
        return BROKEN_PIPE
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except Exception:
        traceback.print_exc()
        click.echo("This is a defect in vmbuild. Please report it with the lines above.", err=True)
        return VmbuildError.exit_code
    return 0


def _settle_stdout() -> None:
    """Write what is left, or let it go: else Python complains of it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
