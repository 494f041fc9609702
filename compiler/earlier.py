"""Artifacts that are there already: where another one is written, or where a model should be."""

from __future__ import annotations

from pathlib import Path

from peltc.compiler.base.base import Base
from peltc.compiler.files.manifest import MANIFEST, read_manifest
from peltc.spec.diagnostics import PeltError, Place, fail, printable, wrong_type
from peltc.spec.document import parse
from peltc.spec.specification import Spec


def replacing(out: Path, spec: Spec, base: Base) -> str:
    """What to say where an artifact of another spec or base is replaced; empty where there is none, or the same one's.

    Specs are the same where they say the same, however they are laid out.
    """
    if not (out / MANIFEST).is_file():
        return ""
    try:
        old = read_manifest(out)
        name, text, known = str(old["name"])[:80], str(old["spec"]), old["base"]
        architecture, fingerprint = str(known["architecture"])[:80], known["fingerprint"]
    except (PeltError, KeyError, TypeError):
        return f"warning: '{out}' holds an artifact whose manifest cannot be read; it is replaced"
    try:
        same = parse(text).tree == parse(spec.text).tree
    except PeltError:
        same = False
    if same and fingerprint == base.fingerprint:
        return ""
    what = "another base of this spec" if same else "another spec"
    return printable(f"warning: '{out}' holds an artifact of {what}, '{name}' on {architecture}; it is replaced")


def check_model(model: object, out: Path | None = None) -> None:
    """Refuse what is no model, an artifact among it, but for one that is compiled anew from the base that it holds.

    Args:
        out: where the result will be written.

    Raises:
        PeltError: E216, E507.
    """
    if not isinstance(model, (str, Path)) and not hasattr(model, "named_parameters"):
        raise wrong_type("the model", model, "a model folder, a hub id, or a torch model")
    if not isinstance(model, (str, Path)) or "\0" in str(model):
        return
    folder = Path(model)
    if not (folder / MANIFEST).is_file() or (out is not None and folder.resolve() == out.resolve()):
        return
    try:
        known = read_manifest(folder)
        name, base = f"'{str(known['name'])[:80]}'", str(known["base"]["architecture"])[:80]
    except (PeltError, KeyError, TypeError):
        name, base = "unknown", "a model"
    raise fail(
        "E507",
        f"the folder is an artifact, {name} on {base}, and no model",
        Place(str(folder)),
        f"the {base} that it was compiled from" if base != "a model" else "a model folder",
        "the folder holds the bare base beside the compiled graph, so that its modules would be lost without a word:"
        " modules do not stack. Put all of them into one spec and compile that on the base; to compile this artifact"
        " anew, give its folder as the output too",
    )
