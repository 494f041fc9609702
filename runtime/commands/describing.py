"""The commands that say what methods are, and what a spec is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from peltc.runtime.commands.shell import (
    architecture_option,
    cli,
    json_option,
    print_table,
    quiet_option,
    spec_argument,
    talking,
    text_only_option,
)


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
@spec_argument
@click.argument("model", required=False)
@click.option("--compare", "others", multiple=True, metavar="OTHER ...", help="Specs to show beside it.")
@click.option(
    "--svg", type=click.Path(dir_okay=False), help="Draw SPEC's modules at their places in MODEL into a file."
)
@architecture_option
@text_only_option
@json_option
@quiet_option
def describe(
    spec: str, model: str | None, others: tuple[str, ...], svg: str | None, architecture: str | None, text_only: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Say what SPEC's modules are in the terms of PEFT-Ref, and with MODEL what they cost.

    SPEC and each OTHER are files, or names of recipes: recipe:NAME.
    """
    from shutil import get_terminal_size

    from peltc.compiler.base.source import check_order
    from peltc.runtime.describe import describe, read, told

    if model is not None and not spec.startswith("recipe:"):
        check_order(spec, model)
    with talking(quiet) as talk:
        specs = [read(name) for name in (spec, *others)]
        reports = [describe(each, model, architecture=architecture, text_only=text_only, talk=talk) for each in specs]
    if svg:
        Path(svg).write_text(reports[0].picture(), encoding="utf-8")
        click.echo(f"drawn into {svg}", err=True)
    if as_json:
        click.echo(json.dumps([report.to_json() for report in reports], indent=1))
    elif not svg:
        click.echo(told(reports, get_terminal_size((140, 24)).columns))


@cli.command()
@click.argument("name", required=False)
@json_option
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
        print_table([("METHOD", "SITE", "TITLE"), *((m.name, m.site, m.title) for m in shipped().values())])
        for kind, shelf in shelves[1:]:
            click.echo()
            print_table([(kind.upper(), "TITLE"), *((one.name, one.title) for one in shelf.values())])


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
def schema() -> None:
    """Print the JSON Schema of specs, for editors."""
    from peltc.spec.method import shipped
    from peltc.spec.schema import spec_schema

    click.echo(json.dumps(spec_schema(shipped()), indent=1, ensure_ascii=False))
