"""The command that shows what a server is doing."""

from __future__ import annotations

import time

import click

from peltc.runtime.commands.shell import cli
from peltc.spec.packages import needing


@cli.command("top")
@click.argument("address", default="http://127.0.0.1:8080")
@click.option(
    "--every", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True, help="Seconds between looks."
)
@click.option("--once", is_flag=True, help="Show what was counted since the server started, and end.")
def top_command(address: str, every: float, once: bool) -> None:
    """Show requests, latencies, queue, batches and profiles of the server at ADDRESS, until Ctrl-C."""
    with needing("pelt top"):
        from peltc.runtime.serving.top import ask, told

    before = ask(address)
    lines = told(before, 0)
    while True:
        if not once:
            click.clear()
        click.echo("\n".join([address, *lines]))
        if once:
            return
        started = time.monotonic()
        time.sleep(every)
        now = ask(address)
        lines, before = told(now.since(before), time.monotonic() - started), now
