"""The command line. Results go to stdout, talk to stderr; exit codes: 0, 1 the user's input, 2 usage, 70 our bug."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from peltc.spec.diagnostics import PeltError

INPUT, USAGE, BUG = 1, 2, 70
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOENT, errno.ENOTDIR,
        errno.EISDIR)  # fmt: skip


def run(arguments: Sequence[str], name: str = "pelt") -> int:
    """Run a command line; returns the exit code."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # who starts us with a signal ignored wants it so
        signal.signal(signal.SIGTERM, _terminate)
    try:
        cli.main(list(arguments), prog_name=name, standalone_mode=False)
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
        return INPUT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            click.echo(f"{error.filename or 'disk'}\n  E602 cannot write: {error.strerror}", err=True)
            return INPUT
        traceback.print_exc()
        click.echo("\nThis is a bug in peltc; please report it with the lines above.", err=True)
        return BUG


@contextmanager
def permanent() -> Iterator[None]:
    """Spare Python's collector what a process imports first, which stays until it ends: it would walk all of those
    functions and classes several times, and once more while a small model is compiled."""
    if gc.get_freeze_count():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _terminate(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


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


_model = click.argument("model")
_spec = click.argument("spec", type=click.Path())
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
_quiet = click.option("--quiet", "-q", is_flag=True, help="Say warnings and errors only.")
_STEP = click.Choice(["function", "arithmetic"])
_architecture = click.option(
    "--architecture", metavar="CLASS", help="A class of transformers, in place of the config's."
)
_text_only = click.option(
    "--text-only", is_flag=True, help="Of a MODEL that reads more than text, take what reads token ids."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="peltc")
def cli() -> None:
    """Compile parameter-efficient fine-tuning modules and a transformer checkpoint into an ONNX deployment."""


@cli.command("compile")
@_spec
@_model
@click.option("-o", "--out", required=True, type=click.Path(), help="The artifact's folder.")
@click.option("--weights", type=click.Path(), help="The adapter's tensors, safetensors; in place of the spec's.")
@click.option("--mode", type=click.Choice(["fold", "static"]), help="In place of the spec's deploy.mode.")
@click.option("--verify/--no-verify", default=True, help="Hold the artifact against PyTorch.", show_default=True)
@click.option("--verify-step", type=_STEP, help="One step of the verification alone; half precision has two.")
@click.option("--generation/--no-generation", default=None, help="Add graphs with a cache, for `generate`.")
@click.option("--self-contained", is_flag=True, help="Copy the checkpoint into the artifact rather than link it.")
@_architecture
@_text_only
@_json
@_quiet
def compile_command(
    spec: str, model: str, out: str, weights: str | None, mode: str | None, generation: bool | None, verify: bool,
    verify_step: str | None, self_contained: bool, architecture: str | None, text_only: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Compile SPEC on MODEL (a folder or a hub id) into an artifact that ONNX Runtime opens."""
    with permanent():
        from peltc.runtime.building.compile import compile

    with talking(quiet) as talk:
        manifest = compile(spec, model, out, weights, architecture=architecture, mode=mode, generation=generation,
                           verify=verify_step if verify and verify_step else verify, self_contained=self_contained,
                           text_only=text_only, talk=talk)  # fmt: skip
    if as_json:
        click.echo(json.dumps(manifest, indent=1))
        return
    absorbed = sum(1 for m in manifest["modules"] if m["absorbed"])
    staying = len(manifest["modules"]) - absorbed
    click.echo(f"{out}: {absorbed} modules folded into weights, {staying} in the graph")
    for reason in dict.fromkeys(m["reason"] for m in manifest["modules"] if m["reason"]):
        click.echo(f"  in the graph, since {reason}")
    linked = ", ".join(f"{f['file']} ({f['how']}, {f['bytes']:,} bytes)" for f in manifest["base"]["files"])
    click.echo(f"  written: {manifest['bytes_written']:,} bytes; base: {linked or 'none'}")
    for line in _verified(manifest):
        click.echo(f"  {line}")


def _verified(manifest: dict[str, Any]) -> Iterator[str]:
    """What verification found, a line for each step."""
    found = manifest["verification"] or {}
    if found.get("worst") is not None:
        wide = " in float32" if manifest["base"]["precision"] != "float32" else ""
        yield f"equal to PyTorch within {found['worst']:.1e}{wide} (tolerance {found['tolerance']:.0e})"
    if stored := found.get("stored"):
        yield f"folded weights: {stored['worst']:.4f} units in the last place from PyTorch's (0.5 is rounding)"
    if errors := found.get("arithmetic"):
        kind = errors["precision"]
        if errors["status"] == "open":
            yield f"arithmetic in {kind} not verified: {errors['reason']}"
            return
        ours, theirs, limit = (max((o[key] or 0) for o in errors["outputs"])
                               for key in ("onnxruntime", "pytorch", "limit"))  # fmt: skip
        yield f"arithmetic in {kind}: ONNX Runtime {ours:.1e} off, PyTorch {theirs:.1e} (tolerance {limit:.1e})"


@cli.command()
@_spec
@_json
def check(spec: str, as_json: bool) -> None:
    """Read SPEC and say what is wrong with it; no model is needed."""
    from peltc.spec.interpreters.check import check_formulas
    from peltc.spec.specification import load_spec

    loaded = load_spec(spec)
    check_formulas(loaded)
    if as_json:
        click.echo(json.dumps({"name": loaded.name, "attach": [a.name for a in loaded.attach]}))
    else:
        click.echo(f"{spec}: {len(loaded.attach)} attachment{'s' if len(loaded.attach) > 1 else ''}, no errors")


@cli.command()
@_model
@click.option("--svg", type=click.Path(dir_okay=False), help="Draw the reference architecture into a file.")
@_architecture
@_text_only
@_json
@_quiet
def sites(
    model: str, svg: str | None, architecture: str | None, text_only: bool, as_json: bool, quiet: bool
) -> None:  # fmt: skip
    """Show where modules can attach in MODEL."""
    from peltc.compiler.base.opening import open_base
    from peltc.compiler.earlier import check_model

    check_model(model)
    with talking(quiet) as talk:
        base = open_base(model, architecture=architecture, text_only=text_only, talk=talk)
    anatomy = base.anatomy
    if svg:
        from peltc.compiler.picture.drawing import draw

        Path(svg).write_text(draw(anatomy, f"{base.architecture}"), encoding="utf-8")
    if as_json:
        click.echo(json.dumps([site.row() for site in anatomy], indent=1))
        return
    rows = [("SITE", "KIND", "SIZE", "PARAMETERS")]
    for site in anatomy.named:
        rows.append((site.path, site.kind, _size(site), _parameters(site)))
    _table(rows)
    if anatomy.unnamed:
        click.echo(f"\n{len(anatomy.unnamed)} linear maps have no role; attach to them by `parameter:`")
        for site in anatomy.unnamed:
            click.echo(f"  {site.parameters['weight']}")
    if svg:
        click.echo(f"drawn into {svg}", err=True)


def _size(site: Any) -> str:
    size = site.sizes
    if site.kind == "attention":
        kv = f" / {size['kv_heads']}" if size["kv_heads"] != size["heads"] else ""
        return f"{size['heads']}{kv} heads x {size['head_dim']}"
    if "in" in size and site.kind in ("linear", "table", "embedding"):
        return f"{size['in']} -> {size['out']}"
    return str(size.get("d", ""))


def _parameters(site: Any) -> str:
    names = ", ".join(dict.fromkeys(site.parameters.values()))
    if site.rows:
        names += " rows " + ", ".join(f"{a}:{b}" for a, b in site.rows[:4]) + (", ..." if len(site.rows) > 4 else "")
    return names


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@cli.command()
@_spec
@_model
@click.option("--mode", type=click.Choice(["fold", "static"]), help="In place of the spec's deploy.mode.")
@_architecture
@_text_only
@_json
@_quiet
def plan(
    spec: str, model: str, mode: str | None, architecture: str | None, text_only: bool, as_json: bool, quiet: bool
) -> None:  # fmt: skip
    """Show every decision about SPEC on MODEL; nothing is written."""
    from peltc.runtime.building.compile import plan_for
    from peltc.spec.specification import load_spec

    with talking(quiet) as talk:
        made, base = plan_for(load_spec(spec), model, architecture=architecture, mode=mode, text_only=text_only,
                              talk=talk)  # fmt: skip
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=1))
        return
    rows = [("ATTACHMENT", "SITE", "EFFECT", "DECISION", "PARAMETERS")]
    for claim in made.claims:
        decision = f"folds into {claim.absorbed}" if claim.absorbed else f"stays: {claim.reason}"
        tensors = ", ".join(f"{n} {list(t.shape)}" for n, t in claim.tensors.items())
        rows.append((claim.attachment, claim.site.name, "+".join(claim.effects), decision, tensors))
    _table(rows)
    for line in made.notes:
        click.echo(line)
    total = sum(_count(site.shape) for site in base.parameters.values())
    cost = made.cost
    click.echo(
        f"\nin the graph: {cost.flops:,} operations per token, {cost.stored:,} stored values, {cost.nodes} nodes"
    )
    click.echo(f"{made.trained():,} trained values, {made.trained() / max(total, 1):.3%} of the base's {total:,}")


def _count(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


class _Comparing(click.Command):
    """Lets `--compare A B` stand for `--compare A --compare B`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        comparing = False
        for before, arg in zip(["", *args], args, strict=False):
            if arg.startswith("-"):
                comparing = arg == "--compare"
            elif comparing and before != "--compare":
                spread.append("--compare")
            spread.append(arg)
        return super().parse_args(ctx, spread)


@cli.command(cls=_Comparing)
@_spec
@click.argument("model", required=False)
@click.option("--compare", "others", multiple=True, metavar="OTHER ...", help="Specs to show beside it.")
@click.option(
    "--svg", type=click.Path(dir_okay=False), help="Draw SPEC's modules at their places in MODEL into a file."
)
@_architecture
@_text_only
@_json
@_quiet
def describe(
    spec: str, model: str | None, others: tuple[str, ...], svg: str | None, architecture: str | None, text_only: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Say what SPEC's modules are in the terms of PEFT-Ref, and with MODEL what they cost.

    SPEC and each OTHER are files, or names of recipes: recipe:NAME.
    """
    from shutil import get_terminal_size

    from peltc.runtime.describe import describe, read, told

    with talking(quiet) as talk:
        specs = [read(name) for name in (spec, *others)]
        reports = [describe(each, model, architecture=architecture, text_only=text_only, talk=talk) for each in specs]
    if svg:
        Path(svg).write_text(reports[0].picture(), encoding="utf-8")
    if as_json:
        click.echo(json.dumps([report.to_json() for report in reports], indent=1))
        return
    click.echo(told(reports, get_terminal_size((140, 24)).columns))
    if svg:
        click.echo(f"drawn into {svg}", err=True)


@cli.command()
@click.argument("name", required=False)
@_json
def methods(name: str | None, as_json: bool) -> None:
    """List the methods, recipes and combinators; with a NAME, show one: source, options, formulas."""
    from peltc.spec.combinators import COMBINATORS
    from peltc.spec.diagnostics import fail, nearest, one_of
    from peltc.spec.method import shipped
    from peltc.spec.recipe import recipes

    shelves = (("method", shipped()), ("recipe", recipes()), ("combinator", COMBINATORS))
    known = [key for _, shelf in shelves for key in shelf]
    if name is not None and name not in known:
        message = f"there is no method, recipe or combinator '{name}'"
        raise fail("E201", message, expected=one_of(sorted(known)), hint=nearest(name, known))
    chosen = [(kind, one) for kind, shelf in shelves for key, one in shelf.items() if name in (None, key)]
    if as_json:
        click.echo(json.dumps([_facts(kind, one) for kind, one in chosen], indent=1, ensure_ascii=False))
    elif name is not None:
        for kind, one in chosen:
            _show(kind, one)
    else:
        _table([("METHOD", "SITE", "TITLE"), *((m.name, m.site, m.title) for m in shipped().values())])
        for kind, shelf in shelves[1:]:
            click.echo()
            _table([(kind.upper(), "TITLE"), *((one.name, one.title) for one in shelf.values())])


def _facts(kind: str, one: Any) -> dict[str, Any]:
    """A method, recipe or combinator as plain data."""
    from peltc.spec.interpreters.typology import row_of

    facts = {kind: one.name, "title": one.title, "source": one.source, "notes": one.notes,
             "options": {o.name: dict(o.schema) for o in one.options}}  # fmt: skip
    if kind == "method":
        return {**facts, "site": one.site, **row_of(one)}
    return {**facts, "attach": list(one.attach)} if kind == "recipe" else facts


def _show(kind: str, one: Any) -> None:
    """Print all about a method, recipe or combinator."""
    from peltc.spec.document import dump
    from peltc.spec.interpreters.typology import PROPERTIES, row_of

    click.echo(f"{one.title}\n{one.source}")
    if kind == "method":
        click.echo(f"attaches to: {one.site}")
    for option in one.options:
        click.echo(f"  {option.name} = {option.default!r}  {option.doc}")
    if kind == "method":
        for key, expr in (*one.let, *one.effects):
            click.echo(f"  {key}: {expr.text}")
        for key, value in row_of(one).items():
            click.echo(f"  {PROPERTIES[key]}: {value}")
    elif kind == "recipe":
        click.echo(dump({"attach": list(one.attach)}).rstrip())
    if one.notes:
        click.echo(f"\n{one.notes}")


@cli.command()
@click.argument("out", type=click.Path())
@click.option("--model", help="The base it was compiled from, in place of the checkpoint in the artifact.")
@click.option("--step", type=_STEP, help="One step alone, in half precision: what is computed, or how it is rounded.")
@click.option("--provider", "providers", multiple=True, metavar="NAME",
              help="ONNX Runtime's execution provider for the arithmetic; may be given several times.")  # fmt: skip
@_json
@_quiet
def verify(
    out: str, model: str | None, step: str | None, providers: tuple[str, ...], as_json: bool, quiet: bool
) -> None:
    """Hold the artifact OUT against PyTorch once more.

    In half precision that is two steps. The function: the graph on its own bytes, computed in float32, is PyTorch's.
    The arithmetic: rounding costs ONNX Runtime no more than twice what it costs PyTorch.
    """
    from peltc.runtime.building.compile import verify as verify_again
    from peltc.runtime.verification.answers import share

    with talking(quiet) as talk:
        manifest = verify_again(out, model, step=step, providers=providers or None, talk=talk)
    found = manifest["verification"]
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"errors: {found['measure']}")
    if found["shapes"]:
        rows = [("BATCH", "LENGTH", "PADDING", "OUTPUT", "ERROR", "LARGEST VALUE")]
        rows += [(str(f["batch"]), str(f["length"]), str(f["padding"]), f["output"], f"{share(f):.1e}",
                  f"{f['reference']:.3g}") for f in found["shapes"]]  # fmt: skip
        _table(rows)
    for errors in (found.get("rounding"), (found["arithmetic"] or {}).get("outputs")):
        if not errors:
            continue
        rows = [("OUTPUT", "ONNX RUNTIME", "PYTORCH", "TOLERANCE")]
        rows += [(o["output"], *("-" if o[key] is None else f"{o[key]:.1e}"
                                 for key in ("onnxruntime", "pytorch", "limit")))
                 for o in errors]  # fmt: skip
        _table(rows)
    for line in _verified(manifest):
        click.echo(line)


@cli.command("run")
@click.argument("out", type=click.Path())
@click.option("--text", "texts", multiple=True, required=True, help="A text; may be given several times.")
@_json
def run_command(out: str, texts: tuple[str, ...], as_json: bool) -> None:
    """Run the artifact OUT on texts, for a look."""
    import numpy as np

    from peltc.runtime.running.session import Session

    session = Session(out)
    results = session(**session.tokenize(texts))
    if as_json:
        click.echo(json.dumps({name: array.tolist() for name, array in results.items()}))
        return
    for name, array in results.items():
        click.echo(f"{name} {list(array.shape)}")
        for text, row in zip(texts, array, strict=True):
            flat = np.asarray(row, np.float64).reshape(-1)
            head = " ".join(f"{v:.4f}" for v in flat[:6]) + (" ..." if flat.size > 6 else "")
            top = f"  largest at {int(flat.argmax())}" if row.ndim == 1 and flat.size <= 64 else ""
            click.echo(f"  {text[:48]!r}: {head}{top}")


@cli.command()
@click.argument("adapters", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The bank's file.")
def bank(adapters: tuple[Path, ...], out: Path) -> None:
    """Stack ADAPTERS of one spec, safetensors files, into a bank that masks choose from."""
    from safetensors.numpy import save

    from peltc.compiler.adapter.bank import silent_files, stack_bank
    from peltc.compiler.artifact import write_whole

    stacked = stack_bank(list(adapters))
    if silent := silent_files(list(adapters)):
        click.echo(f"warning: {len(silent)} of the adapters say nothing of how they were trained, first"
                   f" '{silent[0].name}': that all are of one spec is taken on trust", err=True)  # fmt: skip
    write_whole(out, save(stacked))
    click.echo(f"{out}: {len(adapters)} adapters of {len(stacked)} tensors, {out.stat().st_size:,} bytes")


@cli.command()
def schema() -> None:
    """Print the JSON Schema of specs, for editors."""
    from peltc.spec.method import shipped
    from peltc.spec.schema import spec_schema

    click.echo(json.dumps(spec_schema(shipped()), indent=1, ensure_ascii=False))
