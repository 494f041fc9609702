"""The command line. Results go to stdout, talk to stderr; exit codes: 0, 1 the user's input, 2 usage, 70 our bug,
130 interrupted."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from peltc.runtime.commands import compiling, describing, exporting, importing, looking, serving, storing, watching
from peltc.runtime.commands.shell import cli
from peltc.spec.diagnostics import PeltError
from peltc.spec.packages import missing

COMMANDS = (compiling, looking, describing, importing, storing, serving, watching, exporting)
"""The modules whose commands there are; each adds its own when it is imported."""

INPUT, USAGE, BUG, INTERRUPTED = 1, 2, 70, 130
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOENT, errno.ENOTDIR,
        errno.EISDIR)  # fmt: skip


def run(arguments: Sequence[str], name: str = "pelt", verb: str = "") -> int:
    """Run a command line; returns the exit code.

    Args:
        name: what the program is called.
        verb: the one command that the program is, where it is not all of them.
    """
    program = cli.commands[verb] if verb else cli
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # who starts us with a signal ignored wants it so
        signal.signal(signal.SIGTERM, _terminate)
    try:
        program.main(list(arguments), prog_name=name, standalone_mode=False)
        return 0
    except PeltError as error:
        if "--json" in arguments:
            click.echo(json.dumps({"errors": [d.to_dict() for d in error.diagnostics]}, indent=1))
        for diagnostic in error.diagnostics:
            click.echo(f"{diagnostic}\n", err=True)
        count = len(error.diagnostics)
        click.echo(f"{count} error{'s' if count > 1 else ''}", err=True)
        return INPUT
    except click.ClickException as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; what was there before is as it was", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (absent := missing(error, f"this command of {name}")):
            click.echo(f"{absent}", err=True)
            return INPUT
        if isinstance(error, OSError) and error.errno in DISK:
            click.echo(f"{error.filename or 'disk'}\n  E602 cannot write: {error.strerror}", err=True)
            return INPUT
        traceback.print_exc()
        click.echo("\nThis is a bug in peltc; please report it with the lines above.", err=True)
        return BUG


def _terminate(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
