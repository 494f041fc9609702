"""What modules look like in the picture: a name and the sites that it is at."""

from __future__ import annotations

from dataclasses import dataclass

from peltc.compiler.survey.anatomy import Site


@dataclass(frozen=True)
class Attached:
    """Modules of one name in the picture.

    Attributes:
        about: what the legend says of them.
        sites: the names of their sites.
    """

    name: str
    about: str
    sites: frozenset[str]


@dataclass(frozen=True)
class Carrier(Site):
    """A site with modules: the style and name of each."""

    modules: tuple[tuple[str, str], ...] = ()
