"""The commands for a store of profiles."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import click

from peltc.runtime.commands.shell import cli, json_option, print_table, quiet_option, talking

store_argument = click.argument("store", type=click.Path(dir_okay=False, path_type=Path))


@cli.group("profiles")
def profiles_group() -> None:
    """Keep the profiles of an artifact in a STORE, one file on the disk, by names TENANT/NAME."""


@profiles_group.command("add")
@store_argument
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--artifact", type=click.Path(path_type=Path),
              help="The artifact that they are of; needed for a new STORE, and where FILE is an adapter.")  # fmt: skip
@quiet_option
def add_command(store: Path, name: str, file: Path, artifact: Path | None, quiet: bool) -> None:
    """Put a profile into STORE, which is made where there is none, in place of the one of that NAME.

    FILE is what `pelt link` wrote, or an adapter as `pelt link` reads it.
    """
    from peltc.runtime.running.store import ProfileStore

    with talking(quiet) as talk, ProfileStore(store, artifact) as held:
        held.put(name, file, talk)
        numbers = held.stats()
    click.echo(f"{store}: {numbers['profiles']:,} profiles, {numbers['bytes']:,} bytes")


@profiles_group.command("list")
@store_argument
@click.option("--tenant", help="Of one tenant alone.")
@json_option
def list_command(store: Path, tenant: str | None, as_json: bool) -> None:
    """Show the names and sizes of the profiles in STORE."""
    from peltc.runtime.running.store import ProfileStore

    with ProfileStore(store) as held:
        if as_json:
            rows = [{"name": record.name, "bytes": record.size} for record in held.list(tenant)]
            click.echo(json.dumps({"profiles": rows, "stats": held.stats(tenant)}, indent=1))
            return
        numbers = held.stats(tenant)
        rest = f", {numbers['file']:,} in the file" if tenant is None else ""
        click.echo(f"{numbers['profiles']:,} profiles, {numbers['bytes']:,} bytes{rest}", err=True)
        print_table([*chain([("PROFILE", "BYTES")], ((r.name, f"{r.size:,}") for r in held.list(tenant)))])


@profiles_group.command("remove")
@store_argument
@click.argument("names", nargs=-1, required=True)
def remove_command(store: Path, names: tuple[str, ...]) -> None:
    """Delete profiles from STORE, all of the NAMES or none."""
    from peltc.runtime.running.store import ProfileStore

    with ProfileStore(store) as held:
        held.delete(*names)
        click.echo(f"{store}: {held.stats()['profiles']:,} profiles are left")


@profiles_group.command("compact")
@store_argument
def compact_command(store: Path) -> None:
    """Write STORE anew without the room of deleted profiles; it takes as much room again while it lasts."""
    from peltc.runtime.running.store import ProfileStore

    with ProfileStore(store) as held:
        before, after = held.compact()
    click.echo(f"{store}: {before:,} bytes before, {after:,} now")


@profiles_group.command("check")
@store_argument
def check_command(store: Path) -> None:
    """Hold every profile in STORE against its checksum; what is damaged is named."""
    from peltc.runtime.running.store import ProfileStore
    from peltc.spec.diagnostics import PeltError

    with ProfileStore(store) as held:
        if findings := held.check():
            raise PeltError(findings)
        click.echo(f"{store}: {held.stats()['profiles']:,} profiles, all as they were put")
