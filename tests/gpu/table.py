"""Write tests/gpu/kernels.md: what CUDA computes of every case of the laws, on toy models, in each precision.

python tests/gpu/table.py [--only CASE ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "conformance")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
import cases  # noqa: E402
import models  # noqa: E402

from peltc.compiler.lowering.kernels import table  # noqa: E402
from peltc.runtime.building.compile import compile, plan_for  # noqa: E402
from peltc.spec.diagnostics import PeltError  # noqa: E402
from peltc.spec.specification import load_spec  # noqa: E402

TABLE = HERE / "kernels.md"
TYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Cell:
    family: str
    case: str
    precision: str

    def measure(self, models_folder: Path) -> dict[str, Any]:
        """What the manifest says of each graph of an artifact; the refusal where there is none."""
        folder = models.save(self.family, models_folder / self.family)
        try:
            plan, _ = plan_for(load_spec(cases.spec(self.case, self.family, "static", self.precision)), folder)
            for generation in (True, False):
                with tempfile.TemporaryDirectory() as out:
                    try:
                        found = compile(plan.spec, folder, Path(out) / "out", cases.tensors(plan),
                                        generation=generation and self.family != "bert", verify=False)  # fmt: skip
                    except PeltError as error:
                        if not generation or error.diagnostics[0].code not in ("E208", "E212"):
                            raise
                        continue
                    return dict(found["kernels"])
        except PeltError as error:
            return {"refused": str(error.diagnostics[0])}
        raise AssertionError("a compilation without generation is refused as one that generates")


def lines(rows: Iterable[tuple[Cell, dict[str, Any]]]) -> list[str]:
    """The table, and what lacks a kernel or hinders a CUDA graph."""
    told, by = dict[str, list[str]](), dict[tuple[str, str], list[dict[str, Any]]]()
    for cell, graphs in rows:
        for name, found in graphs.items():
            where = f"{cell.case} on {cell.family}, {cell.precision}, {name}"
            if name == "refused":
                told.setdefault(f"refused: {found}".split("\n")[0], []).append(where)
                continue
            by.setdefault((f"{cell.family} {name}", cell.precision), []).append(found)
            for reason in found["lacking"] or ([found["cuda_graph"]] if found["cuda_graph"] is not True else []):
                told.setdefault(reason, []).append(where)
    made = ["| graph | precision | cases | nodes on the CPU, for sizes | cases that lack kernels | captured |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for (graph, precision), found in by.items():
        least, most = (pick(one["cpu_nodes"] for one in found) for pick in (min, max))
        lacking, captured = (sum(map(bool, held)) for held in (
            [one["lacking"] for one in found], [one["cuda_graph"] is True for one in found]))  # fmt: skip
        made.append(f"| {graph} | {precision} | {len(found)} | {least} to {most} | {lacking} | {captured} |")
    made += ["", "What is said of the others:" if told else "Nothing else is to be said.", ""]
    return made + [f"- {reason}: {len(where)}, first {where[0]}" for reason, where in told.items()]


def measured(given: tuple[Cell, Path]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return given[0].measure(given[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=list(cases.CASES))
    parser.add_argument("--types", nargs="+", default=TYPES)
    chosen = parser.parse_args()
    cells = [Cell(f, c, t) for f in cases.SAMPLE for t in chosen.types for c in chosen.only]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("PELTC_CACHE", f"{folder}/cache")
        for family in cases.SAMPLE:
            models.save(family, Path(folder) / family)
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(measured, [(cell, Path(folder)) for cell in cells]))
    made = lines(zip(cells, found, strict=True))
    if set(chosen.only) != set(cases.CASES) or set(chosen.types) != set(TYPES):
        print("\n".join(made))
        return
    title = f"""# What CUDA computes

By `python tests/gpu/table.py`, against the CUDA kernels of ONNX Runtime {table()[0]}: every case of the laws in
`mode: static`, with graphs that generate where the case can.

"""
    TABLE.write_text(title + "\n".join(made) + "\n", encoding="utf-8")
    print(json.dumps({"written": str(TABLE), "cells": len(cells)}))


if __name__ == "__main__":
    main()
