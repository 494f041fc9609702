"""What a method of the `adapters` library is: which keys of its config are understood, and how its parts become
modules.

A config of the library is one method's, or a union of several. Bottlenecks alone may be there more than once, after
different sub-layers or in different layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peltc.compiler.importers.adapters.folder import AdapterFolder, Part
from peltc.compiler.importers.adapters.places import Places
from peltc.compiler.importers.formats import Array, Config
from peltc.compiler.importers.modules import Module
from peltc.compiler.importers.quirks import Quirk
from peltc.spec.diagnostics import PeltError, Place, fail

ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu",
    "silu": "silu", "tanh": "tanh", "sigmoid": "sigmoid", "linear": "identity",
}  # fmt: skip
"""Our names of the library's non-linearities."""
LEAVE_OUT = {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}}
COUNT = {"type": "integer", "minimum": 1, "maximum": 2**20}


@dataclass(frozen=True, eq=False)
class Facts:
    """One method as the library stores it.

    Attributes:
        name: what the library calls its architecture.
        kinds: the kinds of parts that it has.
        read: keys of the config that are understood, with the JSON Schema of their values.
        inert: keys that change nothing in what the adapter computes once it is trained.
        refused: keys that must be off, with the reason.
        only: keys of which some values alone are understood, with these and the reason.
        modules: its modules, from its configs in a folder.
        needed: keys that must be there.
        shared: what the adapters of a config share, by the names of `shared_parameters`.
        note: what a config leaves open, for the first line of the spec.
        quirks: where the library computes something else than the method says.
    """

    name: str
    kinds: tuple[str, ...]
    read: Mapping[str, Any]
    inert: frozenset[str]
    refused: Mapping[str, str]
    only: Mapping[str, tuple[tuple[Any, ...], str]]
    modules: Callable[[Sequence[Config], Places], list[Module]]
    needed: tuple[str, ...] = ()
    shared: Callable[[Config], set[str]] = lambda config: set()
    note: Callable[[Config], str] = lambda config: ""
    quirks: tuple[Quirk, ...] = ()


INERT = frozenset({"architecture", "init_weights", "init_weights_seed"})
"""Keys of every config that say nothing of the function."""


PADDING = Quirk(
    "gate_over_padding",
    "a gate is the mean over the sequence's tokens and its padding, so that a text has another gate in another batch",
    "the mean is over the tokens", "arXiv:2110.07577, section 3.2: a gate is of the input",
)  # fmt: skip


def gate(places: Places, **said: Any) -> Any:
    """What a spec says of a gate.

    Args:
        said: the gate's options beside.
    """
    if places.fixes(PADDING):
        said["mask_padding"] = True
    return said or True


def values(tensors: Mapping[str, Any], known: Mapping[str, str], part: Part, folder: AdapterFolder) -> dict[str, Array]:
    """A part's tensors, float32, by our names.

    Args:
        known: our names by the library's.

    Raises:
        PeltError: E433 a tensor that has none.
    """
    left = [name for name in tensors if name not in known]
    if left:
        raise fail("E433", f"'{left[0][:120]}' of '{part.source[:120]}' is no part of what the config says",
                   Place(str(folder.path)), "a file each of whose tensors is used once")  # fmt: skip
    return {known[name]: np.asarray(stored.array(), np.float32) for name, stored in tensors.items()}


def activation(config: Config, folder: AdapterFolder) -> str:
    """Our name of a config's non-linearity.

    Raises:
        PeltError: E431 one that the language does not have.
    """
    said = str(config.get("non_linearity")).lower()
    if said not in ACTIVATIONS:
        raise unsaid(folder, "non_linearity", config, "the language does not have it", sorted(ACTIVATIONS))
    return ACTIVATIONS[said]


def unsaid(
    folder: AdapterFolder, key: str, config: Config, why: str, allowed: Iterable[object] | None = None
) -> PeltError:
    """The finding about a key whose value has no counterpart."""
    expected = f"one of {', '.join(map(str, allowed))}" if allowed else "the key off"
    return fail("E431", f"'{key}' is {config.get(key)!r:.60}: {why}", Place(folder.place.path, key=key), expected)
