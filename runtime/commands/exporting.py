"""The commands that give things away: adapters to Hugging Face PEFT, several as one, artifacts to Triton."""

from __future__ import annotations

from pathlib import Path

import click

from peltc.runtime.commands.shell import cli, quiet_option, talking
from peltc.spec.packages import needing


@cli.command("export-peft")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The adapter's folder.")
@click.option("--weights", type=click.Path(path_type=Path), help="The adapter's tensors, in place of the spec's.")
@quiet_option
def export_command(source: Path, model: str | None, out: Path, weights: Path | None, quiet: bool) -> None:
    """Write SOURCE, an artifact or a spec with its tensors, as a folder that Hugging Face PEFT loads.

    MODEL is the base, a folder or a hub id, which the folder will name; an artifact has its own.
    """
    from peltc.runtime.building.adapters import export_peft

    with talking(quiet) as talk:
        config = export_peft(source, model, out, weights, talk=talk)
    click.echo(f"{out}: {config['peft_type']} at {config['target_modules']}")


@cli.command("combine")
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The spec's folder.")
@click.option(
    "--weight", "weights", multiple=True, type=float, help="A factor for each adapter, in order; 1 if absent."
)
@click.option("--how", type=click.Choice(["cat", "svd", "ties", "dare"]), default="cat", show_default=True,
              help="The sum; the sum cut to a rank; or what of the values is kept.")  # fmt: skip
@click.option("--rank", type=click.IntRange(1), help="The rank to which the result is cut.")
@click.option("--density", type=float, help="The share of the values that ties and dare keep.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides which values dare keeps.")
@quiet_option
def combine_command(
    adapters: tuple[Path, ...], model: str, out: Path, weights: tuple[float, ...], how: str, rank: int | None,
    density: float | None, seed: int, quiet: bool,
) -> None:  # fmt: skip
    """Make one adapter of several ADAPTERS on MODEL: a spec and its tensors.

    An adapter is an artifact, a spec with its tensors, or a folder that Hugging Face PEFT saved.
    """
    from peltc.compiler.importers.written import SPEC, TENSORS
    from peltc.runtime.building.adapters import combine

    with talking(quiet) as talk:
        made = combine(adapters, model, out, weights=weights or None, how=how, rank=rank, density=density, seed=seed,
                       talk=talk)  # fmt: skip
    values = sum(array.size for array in made.tensors.values())
    click.echo(f"{out / SPEC}: {len(made.spec.attach)} attachments; {out / TENSORS}: {values:,} values")
    if made.ranks:
        low, high = min(made.ranks.values()), max(made.ranks.values())
        click.echo(f"  rank {low}" if low == high else f"  ranks {low} to {high}")
    if rank is not None and made.errors:
        worst = max(made.errors, key=lambda key: made.errors[key])
        click.echo(
            f"  cutting to the rank leaves out {made.error:.2%} of the change, {made.errors[worst]:.2%} at {worst}"
        )
    click.echo(f"  pelt-compile {out / SPEC} {model} -o {out}-artifact")


@cli.command("export-triton")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "-o", "--repository", required=True, type=click.Path(path_type=Path), help="The model repository's folder."
)
@click.option("--profiles", "store", type=click.Path(dir_okay=False, path_type=Path), help="A store of profiles.")
@click.option("--profile", "files", multiple=True, metavar="NAME=FILE", help="A profile that `pelt link` wrote.")
@click.option("--rows", type=click.IntRange(1), default=64, show_default=True, help="Texts of a batch at most.")
@click.option("--delay", type=click.IntRange(0), default=2000, show_default=True,
              help="Microseconds that a batch waits for more.")  # fmt: skip
@click.option("--queue", type=click.IntRange(1), default=512, show_default=True, help="Requests that wait at most.")
@click.option("--tokens", type=click.IntRange(1), default=4096, show_default=True,
              help="Tokens of a generated text at most, with its beginning.")  # fmt: skip
@click.option("--instances", type=click.IntRange(1), default=1, show_default=True,
              help="Sessions of each graph; each has the base in memory.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of one operator on the CPU.")
@click.option("--copy", is_flag=True, help="Copy the base's files rather than link them.")
@click.option("--renumber", is_flag=True, help="Give profiles new rows, and leave out those of profiles that are gone.")
@quiet_option
def triton_command(
    out: Path, repository: Path, store: Path | None, files: tuple[str, ...], threads: int | None, copy: bool,
    renumber: bool, quiet: bool, **tuning: int,
) -> None:  # fmt: skip
    """Write the artifact OUT as a model repository of the Triton Inference Server.

    An export that is there is replaced, under the next version's number.
    """
    with needing("pelt export-triton"):
        from peltc.runtime.triton.configs import TritonTuning
        from peltc.runtime.triton.repository import export_triton

    if store is not None and files:
        raise click.UsageError("--profiles and --profile are given: a store has all of its profiles")
    named = dict(_named(each) for each in files)
    with talking(quiet) as talk:
        tuned = TritonTuning(threads=threads or 0, **tuning)
        made = export_triton(
            out, repository, store or named or None, tuning=tuned, copy=copy, renumber=renumber, talk=talk
        )
    click.echo(f"{repository}: {', '.join(made.models)}, version {made.version}; {made.profiles:,} profiles")
    for file, how in made.how.items():
        click.echo(f"  {file} ({how})")


def _named(each: str) -> tuple[str, str]:
    name, _, file = each.partition("=")
    if not name or not file:
        raise click.UsageError(f"--profile {each}: NAME=FILE is meant")
    return name, file
