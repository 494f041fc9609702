"""The commands that take up what was trained: an adapter of another library, and a profile of an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from peltc.runtime.commands.shell import cli, quiet_option, quirks_option, talking
from peltc.spec.foreign import AS_TRAINED


@cli.command("import")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The spec's folder.")
@quirks_option
@quiet_option
def import_command(adapter: Path, model: str | None, out: Path, quirks: str | None, quiet: bool) -> None:
    """Read ADAPTER, a folder that Hugging Face PEFT or the adapters library saved, into a spec and its tensors.

    MODEL is the base, a folder or a hub id; the one that the adapter names where it is left out.
    """
    from peltc.compiler.importers.importing import ORIGIN, import_adapter
    from peltc.compiler.importers.written import SPEC, TENSORS, check_free, write_spec

    check_free(out, ORIGIN)
    with talking(quiet) as talk:
        found = import_adapter(adapter, model, quirks=quirks or AS_TRAINED, talk=talk)
    write_spec(out, ORIGIN, found.text, found.tensors, found.metadata)
    values = sum(array.size for array in found.tensors.values())
    click.echo(f"{out / SPEC}: {len(found.spec.attach)} attachments; {out / TENSORS}: {values:,} values")
    click.echo(f"  pelt-compile {out / SPEC} {found.base} -o {out}-artifact")


@cli.command("link")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    required=True,
    type=click.Path(path_type=Path),
    help="A safetensors file, or a folder that Hugging Face PEFT saved.",
)
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The profile.")
@click.option("--labels", help="The names of its labels, with commas between them, where ARTIFACT lets profiles have"
              " fewer than it.")  # fmt: skip
def link_command(artifact: Path, weights: Path, out: Path, labels: str | None) -> None:
    """Make a profile for ARTIFACT, which was compiled with `mode: swappable` or `bank`; its model is not touched."""
    from peltc.compiler.files.labels import LABELS
    from peltc.compiler.linking.linker import Linker
    from peltc.runtime.running.form import write_profile

    linker = Linker(artifact)
    tensors = linker.link(weights, labels=None if labels is None else labels.split(","))
    write_profile(out, tensors, linker.record["fingerprint"])
    tensors.pop(LABELS, None)
    click.echo(f"{out}: {len(tensors)} tensors, {sum(array.nbytes for array in tensors.values()):,} bytes")
