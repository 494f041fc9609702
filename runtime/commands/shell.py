"""What the commands share: their group, their common options, talk on stderr, tables on stdout."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from peltc.spec.foreign import QUIRKS


@contextmanager
def permanent() -> Iterator[None]:
    """Keep what is imported within this context out of Python's garbage collection. A process needs it until it ends,
    and the collector would otherwise walk through all of its functions and classes several times."""
    if gc.get_freeze_count():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def talking(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A function that says a line on stderr; on a terminal, what is being done stays in sight with its seconds."""
    from tqdm import tqdm

    started = time.monotonic()
    done = threading.Event()
    shown = sys.stderr.isatty() and not quiet
    bar = tqdm(bar_format="{elapsed}  {desc}", leave=False, disable=not shown, file=sys.stderr)

    def tick() -> None:
        while not done.wait(0.5):
            bar.refresh()

    def talk(line: str) -> None:
        bar.set_description_str(line)
        if not quiet or line.startswith("warning"):
            bar.clear()
            click.echo(f"{time.monotonic() - started:6.1f} s  {line}", err=True)

    ticker = threading.Thread(target=tick, daemon=True)
    if shown:
        ticker.start()
    try:
        yield talk
    finally:
        done.set()
        bar.close()


model_argument = click.argument("model")
spec_argument = click.argument("spec", type=click.Path())
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Say warnings and errors only.")
STEP = click.Choice(["function", "arithmetic"])
architecture_option = click.option(
    "--architecture", metavar="CLASS", help="A class of transformers, in place of the config's."
)
all_option = click.option("--all", "every", is_flag=True, help="List each layer, not equal ones once.")
text_only_option = click.option(
    "--text-only", is_flag=True, help="Of a MODEL that reads more than text, take what reads token ids."
)
quirks_option = click.option(
    "--quirks",
    type=click.Choice(QUIRKS),
    help="Of an adapter's folder: compute what its library computes, which is the default, or what the methods say.",
)


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
CACHE = "What compilations keep between them lies in ~/.cache/peltc, or where the variable PELTC_CACHE says."


@click.group(context_settings=CONTEXT, epilog=CACHE)
@click.version_option(package_name="peltc")
def cli() -> None:
    """Compile parameter-efficient fine-tuning modules and a transformer checkpoint into an ONNX deployment."""


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    from peltc.compiler.survey.grouping import columns

    for line in columns(rows):
        click.echo(line)
