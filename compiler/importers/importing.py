"""From an adapter's folder and its base to a spec and its tensors: every tensor is used once and every target is there,
or the import is refused with what is left.

The spec is written first, from the names of the tensors; then it is planned like any other, and each tensor of the plan
is filled from the module that its site is. So an import that is wrong anywhere does not fit the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peltc.compiler.adapter.identity import BaseRecord, public_name
from peltc.compiler.adapter.mathematics import mathematics
from peltc.compiler.adapter.provenance import provenance
from peltc.compiler.base.base import Base
from peltc.compiler.files.talk import Talk, logged
from peltc.compiler.importers.adapters import library as adapters_library
from peltc.compiler.importers.formats import Array
from peltc.compiler.importers.modules import Read, attachments, fill, name_of
from peltc.compiler.importers.peft import library as peft_library
from peltc.compiler.importers.quirks import Quirks
from peltc.compiler.importers.recorded import metadata
from peltc.compiler.plan.claims import Plan
from peltc.compiler.plan.planner import make_plan
from peltc.spec.diagnostics import wrong_type
from peltc.spec.document import dump
from peltc.spec.foreign import ADAPTERS, AS_TRAINED, recognised
from peltc.spec.specification import Spec, load_spec

ORIGIN = "Imported from"
"""What the first line of an imported spec begins with."""


@dataclass(frozen=True)
class Imported:
    """An adapter in our own words.

    Attributes:
        spec: the spec.
        content: the spec as plain data.
        tensors: the adapter's tensors by our names, float32.
        metadata: what their file says of how they were trained and where they came from.
        base: the model's folder or hub id.
        origin: where it came from, in words.
        plan: the spec's on the model.
        quirks: those that the adapter has, and what became of them.
        record: where it came from, as a manifest says it.
    """

    spec: Spec
    content: Mapping[str, Any]
    tensors: Mapping[str, Array]
    metadata: Mapping[str, str]
    base: str
    origin: str
    plan: Plan
    quirks: Quirks
    record: dict[str, Any]

    def text(self, weights: str = "") -> str:
        """The spec's YAML, with where it came from.

        Args:
            weights: the name of the tensors' file, beside the spec.
        """
        content = {**self.content, **({"weights": weights} if weights else {})}
        return f"# {self.origin}\n# {self.quirks.told()}\n{dump(content)}"


def import_adapter(
    path: Path, model: Any = None, *, base: Base | None = None, quirks: str = AS_TRAINED, talk: Talk = logged
) -> Imported:
    """Read an adapter's folder for a model.

    Args:
        model: the base's folder or hub id; the one that the adapter names where absent.
        base: the base, where it is known already.
        quirks: what becomes of what the library computes otherwise than the method says: `as_trained`, it is computed
            here too, or `fixed`.

    Raises:
        PeltError: E216 a model that is no folder; E430 what is wrong with the adapter's; E431 what of it has no
            counterpart here; E432 modules that the model does not have, or that the file has no tensors of; E433
            tensors that are left; E437 a quirk that cannot be fixed; E5xx the model.
    """
    if model is not None and not isinstance(model, (str, Path)):
        raise wrong_type("the base of an adapter's folder", model, "the folder or hub id that it was loaded from")
    given = recognised(path) if path.is_dir() else None
    library = adapters_library if given is not None and given.library == ADAPTERS else peft_library
    met = Quirks(quirks)
    found = imported(library.read_adapter(path, model, base, met, talk), met)
    if met.names or met.asked != AS_TRAINED:
        talk(f"the adapter has {met.told()}")
    return found


def imports(given: str | Path) -> bool:
    """Whether what is given is an adapter's folder of a method that is imported."""
    found = recognised(given) if Path(given).is_dir() else None
    return found is not None and found.imported


def labels_in(path: Path, base: Base, weight: str) -> int | None:
    """How many labels the head has that an adapter's folder brings; None where it brings none, or does not tell.

    Args:
        weight: the name of the head's weight in the model.
    """
    given = recognised(path)
    if given is not None and given.library == ADAPTERS:
        return adapters_library.labels_in(path, base)
    return peft_library.labels_in(path, weight)


def imported(read: Read, quirks: Quirks) -> Imported:
    """An adapter whose modules are known, as a spec and its tensors.

    Raises:
        PeltError: E433 modules that the spec does not say, or values that do not fit it.
    """
    attach, owners = attachments(read.modules, read.base)
    content = {"pelt": 1, "name": name_of(Path(read.place.path)), **read.model, "attach": attach}
    spec = load_spec(content)
    plan = make_plan(spec, read.base.anatomy, read.base.fingerprint)
    tensors = fill(plan, owners, read.modules, read.place)
    said = provenance(mathematics(plan), BaseRecord(read.base.architecture, public_name(read.named)))
    origin = f"{ORIGIN} {read.origin}"
    record = {"origin": origin[:1000], "quirks": {"asked": quirks.asked, "found": quirks.names}}
    noted = said.metadata() | metadata(record)
    return Imported(spec, content, tensors, noted, read.given, origin, plan, quirks, record)
