"""The commands that show what a spec, a model, and the one on the other are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from peltc.runtime.commands.shell import (
    architecture_option,
    cli,
    json_option,
    model_argument,
    print_table,
    quiet_option,
    spec_argument,
    talking,
    text_only_option,
)


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
@json_option
@quiet_option
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
    print_table(rows)
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


@cli.command()
@spec_argument
@model_argument
@click.option("--mode", type=click.Choice(["fold", "static"]), help="In place of the spec's deploy.mode.")
@architecture_option
@text_only_option
@json_option
@quiet_option
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
    print_table(rows)
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
