"""Linking: the tensors of a profile, from an adapter's, on the graph that an artifact keeps for it.

An artifact whose modules are exchanged holds the base's graph without its weights, and the anatomy. The modules are
written into that graph once more, with the adapter's tensors; the constants that come of it are the profile. No weight
of the base is read, and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.identity import BaseRecord, public_name, stored_samples
from peltc.compiler.adapter.mathematics import mathematics
from peltc.compiler.adapter.provenance import check_file, other_mathematics
from peltc.compiler.adapter.weights import check_arrays, load_tensors
from peltc.compiler.base.opening import read_base
from peltc.compiler.files.checkpoint import open_checkpoint
from peltc.compiler.files.manifest import LINK, read_manifest
from peltc.compiler.files.talk import Talk, logged
from peltc.compiler.importers.importing import import_adapter, imports
from peltc.compiler.linking.profiles import DIGITS
from peltc.compiler.passes.offer import STAMP, constants
from peltc.compiler.passes.rewrite import rewritten
from peltc.compiler.plan.planner import make_plan
from peltc.spec.diagnostics import PeltError, Place, fail
from peltc.spec.document import parse
from peltc.spec.specification import build_spec

Array = np.ndarray[Any, Any]


class Linker:
    """Makes profiles for an artifact.

    Args:
        folder: the artifact's.

    Raises:
        PeltError: E603 no artifact; E624 an artifact whose modules cannot be exchanged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        record = manifest.get("profiles")
        if not record:
            raise fail("E624", "the modules of this artifact are fixed in it", Place(str(self.folder)),
                       "an artifact compiled with `mode: swappable` or `mode: bank`")  # fmt: skip
        self.record: dict[str, Any] = record
        held = manifest["base"]
        self.base = read_base(
            self.folder / LINK, folder=self.folder, architecture=held["architecture"], config={},
            precision=held["precision"], variant="ids", fingerprint=held["fingerprint"],
            checkpoint=open_checkpoint(self.folder))  # fmt: skip
        modes = {module["mode"] for module in manifest["modules"]}
        mode = modes.pop() if len(modes) == 1 else None  # several modes can only be said in the spec
        self.plan = make_plan(build_spec(parse(manifest["spec"])), self.base.anatomy, self.base.fingerprint, mode)
        self.sites = {site.key: site for site in self.base.anatomy}

    def link(self, weights: str | Path | Mapping[str, Array], talk: Talk = logged) -> dict[str, Array]:
        """A profile's tensors by the names of the artifact's inputs.

        Args:
            weights: an adapter's file, its arrays by tensor name, or a folder that `pelt import` reads.

        Raises:
            PeltError: what is wrong with the tensors; E408 they are of other modules than the artifact's.
        """
        if isinstance(weights, Mapping):
            tensors = check_arrays(self.plan, weights)
        elif imports(weights):
            found = import_adapter(Path(weights), base=self.base)
            theirs, own = mathematics(found.plan), mathematics(self.plan)
            if theirs.digest != own.digest:
                raise PeltError(other_mathematics(self.plan, "the adapter", theirs, own))
            tensors = check_arrays(self.plan, found.tensors)
        else:
            here = BaseRecord(self.base.architecture, public_name(str(self.folder)))
            for sentence in check_file(self.plan, Path(weights), here, stored_samples(self.base)):
                talk(f"warning: {sentence}")
            tensors = load_tensors(self.plan, Path(weights))
        model, _ = rewritten(self.base, self.plan, self.sites, tensors, self.base)
        made, end = constants(model), f"{STAMP}{self.record['fingerprint'][:DIGITS]}"
        return {name: np.ascontiguousarray(made[name.removesuffix(end)]) for name in self.record["inputs"]}
