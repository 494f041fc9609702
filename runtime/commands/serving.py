"""The command that serves an artifact."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from peltc.runtime.commands.shell import cli
from peltc.spec.packages import needing


@cli.command("serve")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--profiles", "store", type=click.Path(dir_okay=False, path_type=Path), help="A store of profiles.")
@click.option("--resident", type=click.IntRange(1), default=64, show_default=True, help="Profiles in memory at most.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 for one that is free.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="Listen for gRPC too.")
@click.option("--allow", metavar="MODULE:FUNCTION", help="Whether a request may use a profile: f(caller, profile).")
@click.option("--rows", type=click.IntRange(1), default=64, show_default=True, help="Texts of a batch at most.")
@click.option("--tokens", type=click.IntRange(1), default=32768, show_default=True, help="Tokens of a batch at most.")
@click.option("--new-tokens", "new", type=click.IntRange(1), default=4096, show_default=True,
              help="Tokens that a text may get.")  # fmt: skip
@click.option("--queue", type=click.IntRange(1), default=512, show_default=True, help="Texts that wait at most.")
@click.option("--padding", type=click.FloatRange(0, 1), default=0.1, show_default=True,
              help="The share of a batch's tokens that may be padding.")  # fmt: skip
@click.option("--delay", type=click.FloatRange(0, 10), default=0.002, show_default=True,
              help="Seconds that a batch waits for more.")  # fmt: skip
@click.option("--body", type=click.IntRange(1), default=16 << 20, show_default=True, help="Bytes of a request at most.")
@click.option("--connections", type=click.IntRange(1), default=1024, show_default=True, help="At once at most.")
@click.option("--grace", type=click.FloatRange(0), default=30.0, show_default=True,
              help="Seconds that requests have to end when the server is stopped.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of one operator.")
def serve_command(
    out: Path, store: Path | None, resident: int, host: str, port: int, grpc_port: int | None, allow: str | None,
    threads: int | None, **limits: Any,
) -> None:  # fmt: skip
    """Serve the artifact OUT by the Open Inference Protocol, version 2, and, where it generates, by OpenAI's.

    Requests with different profiles are answered in common batches. SIGTERM ends it after the requests that it has.
    """
    with needing("pelt serve"):
        from peltc.runtime.serving.limits import ServingLimits
        from peltc.runtime.serving.server import serve
    from peltc.runtime.running.session import Session

    hook = None if allow is None else _named(allow)
    session = Session(out, threads=threads, spinning=False, store=store, resident=resident)

    serve(session, host, port, grpc_port, ServingLimits(**limits), hook, click.echo)


def _named(name: str) -> Any:
    """A function of the operator's own, by `module:function`."""
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise click.UsageError(f"--allow {name}: {error}") from None
