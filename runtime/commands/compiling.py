"""The commands that make, verify and run artifacts, and banks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from peltc.runtime.commands.shell import (
    CACHE,
    CONTEXT,
    STEP,
    architecture_option,
    cli,
    json_option,
    permanent,
    print_table,
    quiet_option,
    quirks_option,
    spec_argument,
    talking,
    text_only_option,
)
from peltc.spec.modes import MODES, PROVIDERS
from peltc.spec.quantising import BITS


@cli.command("compile", context_settings=CONTEXT, epilog=CACHE)
@click.version_option(package_name="peltc")
@spec_argument
@click.argument("model", required=False)
@click.option("-o", "--out", required=True, type=click.Path(), help="The artifact's folder.")
@click.option("--weights", type=click.Path(), help="The adapter's tensors, safetensors; in place of the spec's.")
@click.option("--mode", type=click.Choice(MODES), help="In place of the spec's deploy.mode.")
@click.option("--verify/--no-verify", default=True, help="Hold the artifact against PyTorch.", show_default=True)
@click.option("--verify-step", type=STEP, help="One step of the verification alone; half precision has two.")
@click.option("--generation/--no-generation", default=None, help="Add graphs with a cache, for `generate`.")
@click.option("--provider", type=click.Choice(PROVIDERS), help="What it is to run on, in place of the spec's.")
@click.option("--quantise", type=click.Choice(tuple(BITS)), help="In place of the spec's deploy.quantise.")
@click.option("--self-contained", is_flag=True, help="Copy the checkpoint into the artifact rather than link it.")
@architecture_option
@text_only_option
@quirks_option
@json_option
@quiet_option
def compile_command(
    spec: str, model: str | None, out: str, weights: str | None, mode: str | None, generation: bool | None,
    provider: str | None, quantise: str | None, verify: bool, verify_step: str | None, self_contained: bool,
    architecture: str | None, text_only: bool, quirks: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Compile SPEC on MODEL (a folder or a hub id) into an artifact that ONNX Runtime opens.

    SPEC may also be a folder that Hugging Face PEFT or the adapters library saved; without MODEL, the base that it
    names is taken.
    """
    with permanent():
        from peltc.compiler.importers.importing import imports
        from peltc.runtime.building.compile import compile
    if model is None and not imports(spec):
        raise click.UsageError("Missing argument 'MODEL'.", click.get_current_context())

    with talking(quiet) as talk:
        manifest = compile(spec, model, out, weights, architecture=architecture, mode=mode, generation=generation,
                           provider=provider, quantise=quantise,
                           verify=verify_step if verify and verify_step else verify, self_contained=self_contained,
                           text_only=text_only, quirks=quirks, talk=talk)  # fmt: skip
    if as_json:
        click.echo(json.dumps(manifest, indent=1))
        return
    absorbed = sum(1 for m in manifest["modules"] if m["absorbed"])
    staying = len(manifest["modules"]) - absorbed
    click.echo(f"{out}: {absorbed} modules folded into weights, {staying} in the graph")
    for reason in dict.fromkeys(m["reason"] for m in manifest["modules"] if m["reason"]):
        click.echo(f"  in the graph, since {reason}")
    linked = ", ".join(f"{f['file']} ({f['how']}, {f['bytes']:,} bytes)" for f in manifest["base"]["files"])
    known, many = manifest["base"], manifest["bytes_converted"]
    why = f", {many:,} of them weights in {known['precision']} that are stored in {known['stored']}" if many else ""
    click.echo(f"  written: {manifest['bytes_written']:,} bytes{why}; base: {linked or 'none'}")
    for line in _verified(manifest):
        click.echo(f"  {line}")


def _verified(manifest: dict[str, Any]) -> Iterator[str]:
    """What verification found, a line for each step."""
    found = manifest["verification"] or {}
    if found.get("worst") is not None:
        wide = " in float32" if manifest["base"]["precision"] != "float32" else ""
        yield f"equal to PyTorch within {found['worst']:.1e}{wide} (tolerance {found['tolerance']:.0e})"
    if lost := found.get("quantised"):
        yield f"quantised: {lost['worst']:.1e} off the model as it was"
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
@click.argument("out", type=click.Path())
@click.option("--model", help="The base it was compiled from, in place of the checkpoint in the artifact.")
@click.option("--step", type=STEP, help="One step alone, in half precision: what is computed, or how it is rounded.")
@click.option("--provider", "providers", multiple=True, metavar="NAME",
              help="ONNX Runtime's execution provider for the arithmetic; may be given several times.")  # fmt: skip
@json_option
@quiet_option
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
        print_table(rows)
    for errors in (found.get("rounding"), (found["arithmetic"] or {}).get("outputs")):
        if errors:
            sides = [("OUTPUT", "ONNX RUNTIME", "PYTORCH", "TOLERANCE")]
            sides += [(o["output"], *("-" if o[key] is None else f"{o[key]:.1e}"
                                      for key in ("onnxruntime", "pytorch", "limit")))
                      for o in errors]  # fmt: skip
            print_table(sides)
    for line in _verified(manifest):
        click.echo(line)


@cli.command("run")
@click.argument("out", type=click.Path())
@click.option("--text", "texts", multiple=True, help="A text; may be given several times.")
@click.option("--image", "images", multiple=True, type=click.Path(), help="An image file, one for each row.")
@click.option("--sound", "sounds", multiple=True, type=click.Path(), help="A sound file, one for each row.")
@json_option
def run_command(
    out: str, texts: tuple[str, ...], images: tuple[str, ...], sounds: tuple[str, ...], as_json: bool
) -> None:
    """Run the artifact OUT on texts, images or sound, for a look."""
    import numpy as np

    from peltc.runtime.running.session import Session
    from peltc.runtime.running.values import BFLOAT16

    rows = texts or images or sounds
    if not rows:
        raise click.UsageError("give a --text, an --image or a --sound")
    session = Session(out)
    if images or sounds:
        inputs = session.prepare(list(texts) or None, image=list(images) or None, sound=list(sounds) or None)
    else:
        inputs = session.tokenize(texts)
    results = session(**dict[str, Any](inputs))
    if as_json:
        wide = {name: array.astype(np.float32) if array.dtype == BFLOAT16 else array for name, array in results.items()}
        click.echo(json.dumps({name: array.tolist() for name, array in wide.items()}))
        return
    for name, array in results.items():
        click.echo(f"{name} {list(array.shape)}")
        for text, row in zip(rows, array, strict=False):
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
    from peltc.compiler.files.manifest import write_whole

    stacked = stack_bank(list(adapters))
    if silent := silent_files(list(adapters)):
        click.echo(f"warning: {len(silent)} of the adapters say nothing of how they were trained, first"
                   f" '{silent[0].name}': that all are of one spec is taken on trust", err=True)  # fmt: skip
    write_whole(out, save(stacked))
    click.echo(f"{out}: {len(adapters)} adapters of {len(stacked)} tensors, {out.stat().st_size:,} bytes")
