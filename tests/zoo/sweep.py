"""Compile three specs on every architecture that exports, and write down what came of it.

    python tests/zoo/sweep.py              all, on two processes; writes architectures.md and lowerings.md
    python tests/zoo/sweep.py bert gpt2    some, printed
    python tests/zoo/sweep.py --senses     those that read images, sound, videos or series; writes senses.md

Bases are built anew, and timed, unless PELTC_CACHE says where to keep them.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import instances
import numpy as np
import senses

HERE = Path(__file__).parent
TOLERANCE = 1e-5
"""Largest difference from PyTorch as a share of the largest value."""

SPECS: dict[str, list[dict[str, Any]]] = {
    "LoRA": [{"method": "lora", "at": ["attention.query", "attention.value"], "r": 4}],
    "adapter": [{"method": "bottleneck", "at": "feed_forward.block", "reduction": 4}],
    "(IA)3": [{"method": "ia3", "at": ["attention.key", "attention.value"]}],
}

WITHOUT_ATTENTION = {
    "bamba": "its tiny instance has state-space layers alone",
    "mra": "it approximates attention by blocks, without a softmax of a product",
    "yoso": "it hashes queries and keys, without a softmax",
}
"""Architectures whose graph has no attention that LoRA and (IA)3 could attach to, and why."""


@dataclass
class Found:
    """What a sweep saw of an architecture.

    Attributes:
        layers, sites, unnamed: numbers of layers, of named sites, of linear maps without a role.
        worst: the largest relative difference from PyTorch, by spec and mode; a reason where there is none.
        exporter: seconds within `transformers`' exporter; `added` what a cold compilation takes beside, as a share.
        seconds: all of it.
        lowering: what the manifest of the last spec says of the graph's lowering.
        read: the inputs of a model that reads more than text, with their axes.
    """

    model_type: str
    layers: int = 0
    sites: int = 0
    unnamed: int = 0
    roles: list[str] = field(default_factory=list)
    worst: dict[str, float | str] = field(default_factory=dict)
    exporter: float = 0.0
    added: float = 0.0
    seconds: float = 0.0
    lowering: dict[str, Any] = field(default_factory=dict)
    read: str = ""

    @property
    def missed(self) -> list[str]:
        """Specs that do not hold, with the reason; of an architecture without attention, the adapter alone."""
        wanted = {k: v for k, v in self.worst.items() if k.startswith("adapter") or self.attending}
        return [f"{key}: {value}" for key, value in wanted.items() if isinstance(value, str) or value > TOLERANCE]

    @property
    def attending(self) -> bool:
        """Whether there is attention to attach to."""
        return self.model_type not in {**WITHOUT_ATTENTION, **senses.WITHOUT_ATTENTION}


@contextmanager
def exporter_timed() -> Iterator[list[float]]:
    """Collect the seconds that `transformers`' exporter takes."""
    from transformers.exporters.exporter_onnx import OnnxExporter

    spent: list[float] = []
    original = OnnxExporter.export

    def export(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    OnnxExporter.export = export
    try:
        yield spent
    finally:
        OnnxExporter.export = original


def examine(model_type: str, architecture: str, folder: Path) -> Found:
    """Compile the specs on a tiny instance, folded and static, and compare with PyTorch."""
    import peltc
    from peltc.compiler.base.opening import open_base
    from peltc.runtime.building.compile import plan_for
    from peltc.spec.diagnostics import PeltError

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    found = Found(model_type)
    text = (model_type, architecture) in instances.FAMILIES
    model = (instances if text else senses).save(model_type, architecture, folder / "model")
    try:
        with exporter_timed() as spent:
            start = time.perf_counter()
            base = open_base(model, text_only=text)
            cold = time.perf_counter() - start
    except PeltError as error:
        found.worst = dict.fromkeys(SPECS, error.diagnostics[0].message)
        return found
    if spent:  # nothing where the base was known
        found.exporter, found.added = sum(spent), cold / sum(spent) - 1
    found.read = (
        "; ".join(f"{name} [{', '.join(word or '·' for word in words)}]" for name, words in base.reading.axes.items())
        if base.reading
        else ""
    )
    for name, attach in SPECS.items():
        spec = peltc.load_spec({"pelt": 1, "name": "zoo", "attach": attach})
        try:
            plan, base = plan_for(spec, model, text_only=text)
        except PeltError as error:
            found.worst[name] = error.diagnostics[0].message
            continue
        anatomy = base.anatomy
        found.layers = len({(s.stack, s.layer) for s in anatomy if s.layer is not None})
        found.sites, found.unnamed, found.roles = len(anatomy.named), len(anatomy.unnamed), anatomy.roles()
        random = np.random.default_rng(0)
        tensors = {n: (0.05 * random.standard_normal(t.shape)).astype(np.float32) for n, t in plan.tensors.items()}
        for mode in ("fold", "static"):
            try:
                manifest = peltc.compile(spec, model, folder / f"{name}-{mode}", tensors, mode=mode, text_only=text)
                found.worst[f"{name} {mode}"] = manifest["verification"]["worst"]
                found.lowering = manifest["lowering"]["model"]
            except PeltError as error:
                found.worst[f"{name} {mode}"] = error.diagnostics[0].message
            except Exception as error:
                found.worst[f"{name} {mode}"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    found.seconds = time.perf_counter() - begin
    return found


def worker(family: tuple[str, str]) -> Found:
    import os

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("PELTC_CACHE", str(Path(folder) / "cache"))
        try:
            return examine(*family, Path(folder))
        except Exception as error:
            return Found(family[0], worst={"model": f"{type(error).__name__}: {error}".splitlines()[0][:200]})


def sweep(families: list[tuple[str, str]], processes: int = 2) -> Iterator[Found]:
    """What is found of each, as it comes; processes are replaced, so that memory does not grow."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=8) as pool:
        yield from pool.imap(worker, families)


def read(results: list[Found]) -> str:
    """What became of models that read more than text, as a Markdown document."""
    attending = [f for f in results if f.attending]
    held = [f for f in attending if not f.missed]
    lines = [
        "# Images, sound and series",
        "",
        "Written by `python tests/zoo/sweep.py --senses`: tiny random instances of architectures of `transformers` that"
        " read images, sound, videos or series, alone or beside text; on each, LoRA on `attention.query` and"
        " `attention.value`, a bottleneck adapter on `feed_forward.block` and (IA)3 on `attention.key` and"
        " `attention.value`, folded and static, against PyTorch with the same modules attached, at other sizes.",
        "",
        f"{len(held)} of {len(attending)} architectures with attention hold within {TOLERANCE:.0e} of the largest value"
        f" in all six ({len(held) / max(len(attending), 1):.1%}). The other {len(results) - len(attending)} have none: "
        + "; ".join(f"{name} ({why})" for name, why in senses.WITHOUT_ATTENTION.items())
        + ".",
        "",
        "An axis of any size has a name; one that is fixed is a dot.",
        "",
        "| architecture | inputs | layers | sites | unnamed maps | worst difference |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for f in results:
        numbers = [value for value in f.worst.values() if not isinstance(value, str)]
        worst = f"{max(numbers):.1e}" if numbers else "-"
        mark = f"{worst} ¹" if f.attending and f.missed else worst
        lines.append(f"| {f.model_type} | {f.read} | {f.layers} | {f.sites} | {f.unnamed} | {mark} |")
    lines += ["", "¹ What does not hold:", ""]
    lines += [f"* {f.model_type}: {'; '.join(dict.fromkeys(f.missed))}" for f in attending if f.missed]
    return "\n".join(lines) + "\n"


def table(results: list[Found]) -> str:
    """The results as a Markdown document."""
    import platform
    from importlib.metadata import version

    attending = [f for f in results if f.attending]
    held = [f for f in attending if not f.missed]
    slower = sorted(f.added for f in results if f.exporter)
    lines = [
        "# Architectures",
        "",
        "Written by `python tests/zoo/sweep.py`: tiny random instances of every text architecture of `transformers`"
        " that its exporter turns into ONNX with symbolic axes; on each, LoRA on `attention.query` and"
        " `attention.value`, a bottleneck adapter on `feed_forward.block` and (IA)3 on `attention.key` and"
        " `attention.value`, folded and static, against PyTorch with the same modules attached.",
        "",
        f"{len(held)} of {len(attending)} architectures with attention hold within {TOLERANCE:.0e} of the largest value"
        f" in all six ({len(held) / max(len(attending), 1):.1%}). The other {len(results) - len(attending)} have none: "
        + "; ".join(f"{name} ({why})" for name, why in WITHOUT_ATTENTION.items())
        + ". There the adapter holds.",
        f"A cold base takes {np.median(slower):.0%} more than the exporter alone (median; 90 % of them at most"
        f" {slower[int(0.9 * (len(slower) - 1))]:.0%})."
        if slower
        else "",
        "",
        "| architecture | layers | sites | unnamed maps | worst difference | exporter, s | added | all, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for f in results:
        numbers = [value for value in f.worst.values() if not isinstance(value, str)]
        worst = f"{max(numbers):.1e}" if numbers else "-"
        mark = f"{worst} ¹" if f.missed else worst
        lines.append(f"| {f.model_type} | {f.layers} | {f.sites} | {f.unnamed} | {mark} | {f.exporter:.1f}"
                     f" | {f.added:+.0%} | {f.seconds:.0f} |")  # fmt: skip
    missed = [f for f in results if f.missed]
    lines += ["", "¹ What does not hold:", ""] if missed else [""]
    for f in missed:
        lines += [f"* {f.model_type}: {'; '.join(dict.fromkeys(f.missed))}"]
    tools = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime-gpu"))
    lines += ["", f"Python {platform.python_version()}, {tools}; CPU, two processes of one thread each."]
    return "\n".join(lines) + "\n"


def lowerings(results: list[Found]) -> str:
    """What became of attention cores and of nodes, as a Markdown document."""
    from collections import Counter

    lowered = [f for f in results if f.lowering]
    cores = [core for f in lowered for core in f.lowering["cores"]]
    pieces = [core for core in cores if core["operation"] == "pieces"]
    ratios = [f.lowering["nodes"] / f.lowering["nodes_before"] for f in lowered]
    lines = [
        "# Lowerings",
        "",
        "Written by `python tests/zoo/sweep.py`: what computes each attention core of the architectures in"
        " [architectures.md](architectures.md), and how many nodes their graphs have with (IA)3 live, before and after."
        " The worst difference is that of all specs, from PyTorch.",
        "",
        f"{len(cores) - len(pieces)} of {len(cores)} cores are one operation"
        f" ({1 - len(pieces) / max(len(cores), 1):.1%}); graphs have {np.median(ratios):.0%} of their nodes in the"
        " median.",
        "",
        "| architecture | cores | lowered to | in pieces | nodes before | after | share | worst difference |",
        "|---|--:|---|---|--:|--:|--:|--:|",
    ]
    for f in lowered:
        found = f.lowering
        to = Counter(core["operation"] for core in found["cores"] if core["operation"] != "pieces")
        rest = Counter(core["reason"] for core in found["cores"] if core["operation"] == "pieces")
        numbers = [value for value in f.worst.values() if not isinstance(value, str)]
        lines.append(
            f"| {f.model_type} | {len(found['cores'])} | {', '.join(f'{n} × {name}' for name, n in to.items())} |"
            f" {', '.join(f'{n}: {why}' for why, n in rest.items())} | {found['nodes_before']} | {found['nodes']} |"
            f" {found['nodes'] / found['nodes_before']:.0%} | {max(numbers):.1e} |"
        )
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    if "--senses" in names:
        results = []
        for number, found in enumerate(sweep(senses.FAMILIES), 1):
            results.append(found)
            said = "; ".join(found.missed) or "holds"
            print(f"{number}/{len(senses.FAMILIES)} {found.model_type}: {said}", flush=True)
        (HERE / "senses.md").write_text(read(results), encoding="utf-8")
        return
    every = [*instances.FAMILIES, *senses.FAMILIES] if names else instances.FAMILIES
    families = [family for family in every if not names or family[0] in names]
    results = []
    earlier = {line["model_type"]: line for line in map(json.loads, (HERE / "architectures.jsonl").open())}
    with (HERE / "architectures.jsonl").open("w") if not names else tempfile.TemporaryFile("w") as record:
        for number, found in enumerate(sweep(families), 1):
            if not found.exporter and (known := earlier.get(found.model_type)):  # its base was in the cache
                found.exporter, found.added, found.seconds = known["exporter"], known["added"], known["seconds"]
            results.append(found)
            record.write(json.dumps(asdict(found)) + "\n")
            record.flush()
            print(f"{number}/{len(families)} {found.model_type}: {'; '.join(found.missed) or 'holds'}", flush=True)
    if names:
        print(table(results), lowerings(results), sep="\n")
    else:
        (HERE / "architectures.md").write_text(table(results), encoding="utf-8")
        (HERE / "lowerings.md").write_text(lowerings(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
