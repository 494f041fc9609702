"""The commands that show what a spec, a model, and the one on the other are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from peltc.runtime.commands.shell import (
    all_option,
    architecture_option,
    cli,
    json_option,
    model_argument,
    quiet_option,
    spec_argument,
    talking,
    text_only_option,
)
from peltc.spec.modes import MODES


@cli.command()
@spec_argument
@json_option
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
@model_argument
@click.option("--svg", type=click.Path(dir_okay=False), help="Draw the reference architecture into a file.")
@architecture_option
@text_only_option
@all_option
@json_option
@quiet_option
def sites(
    model: str, svg: str | None, architecture: str | None, text_only: bool, every: bool, as_json: bool, quiet: bool
) -> None:
    """Show where modules can attach in MODEL, or draw it."""
    from peltc.compiler.base.opening import open_base
    from peltc.compiler.earlier import check_model

    check_model(model)
    with talking(quiet) as talk:
        base = open_base(model, architecture=architecture, text_only=text_only, talk=talk)
    anatomy = base.anatomy
    if svg:
        from peltc.compiler.picture.drawing import draw

        Path(svg).write_text(draw(anatomy, f"{base.architecture}"), encoding="utf-8")
        click.echo(f"drawn into {svg}", err=True)
    if as_json:
        click.echo(json.dumps([site.row() for site in anatomy], indent=1))
    elif not svg:
        for line in anatomy.told(every):
            click.echo(line)


@cli.command()
@spec_argument
@model_argument
@click.option("--weights", type=click.Path(), help="The adapter's tensors, to be held against the plan too.")
@click.option("--mode", type=click.Choice(MODES), help="In place of the spec's deploy.mode.")
@click.option("--generation/--no-generation", default=None, help="In place of the spec's deploy.generation.")
@click.option("--lowering", is_flag=True, help="Show what computes each attention core instead, and why.")
@architecture_option
@text_only_option
@all_option
@json_option
@quiet_option
def plan(
    spec: str, model: str, weights: str | None, mode: str | None, generation: bool | None, lowering: bool,
    architecture: str | None, text_only: bool, every: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Show every decision about SPEC on MODEL; nothing is written."""
    from peltc.compiler.base.source import check_order
    from peltc.runtime.building.compile import plan_for
    from peltc.runtime.building.lowering import lowering_for
    from peltc.spec.specification import load_spec

    check_order(spec, model)
    read = load_spec(spec)
    read = read if generation is None else replace(read, generation=generation)
    with talking(quiet) as talk:
        made, base = plan_for(read, model, weights, architecture=architecture, mode=mode,
                              text_only=text_only, talk=talk)  # fmt: skip
        graphs = lowering_for(made, base, model, weights, architecture=architecture, text_only=text_only,
                              talk=talk) if lowering else {}  # fmt: skip
    if as_json:
        told = {name: one.record() for name, one in graphs.items()} if lowering else made.to_json()
        click.echo(json.dumps(told, indent=1))
        return
    for name, one in graphs.items():
        click.echo("\n".join([f"{name}.onnx", *(f"  {line}" for line in one.told(every))]))
    if lowering:
        return
    for line in made.told(every):
        click.echo(line)
    total, cost = base.size, made.cost
    click.echo(
        f"\nin the graph: {cost.flops:,} operations per token, {cost.stored:,} stored values, {cost.nodes} nodes"
    )
    click.echo(f"{made.trained():,} trained values, {made.trained() / max(total, 1):.3%} of the base's {total:,}")
