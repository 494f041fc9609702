"""Thirty mistakes that people make, and what they are told: `python tests/bad_input/mistakes.py > docs/mistakes.md`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import peltc
from peltc.spec.interpreters.check import check_formulas

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import save

Content = dict[str, Any]


def attached(**entry: Any) -> Content:
    """A spec with one attachment."""
    return {"pelt": 1, "name": "mine", "attach": [{k: v for k, v in {"method": "lora", **entry}.items() if v}]}


def own(**method: Any) -> Content:
    """A spec with a method of one's own at the queries."""
    whole = {"title": "mine", "source": "me", "site": "linear", **method}
    return {"pelt": 1, "name": "mine", "attach": [{"method": "mine", "at": "attention.query"}],
            "methods": {"mine": whole}}  # fmt: skip


QUERY = "attention.query"
SPECS: dict[str, Content] = {
    "PEFT's word for an option": attached(at=QUERY, rank=8),
    "PEFT's word for a place": attached(target_modules=["q_proj"]),
    "PEFT's name of a method": attached(method="prefix_tuning", at="attention"),
    "The model's own name of a layer": attached(at="q_proj"),
    "A slip in a key": {"pelt": 1, "attach": [{"metod": "lora", "at": QUERY}]},
    "A slip in a method": attached(method="bottlenek", at="feed_forward.block"),
    "A slip in a site": attached(at="atention.query"),
    "A number as text": attached(at=QUERY, r="eight"),
    "A fraction for a whole number": attached(at=QUERY, r=8.0),
    "Nothing where something should be": {"pelt": 1, "attach": []},
    "No version": {"attach": [{"method": "lora", "at": QUERY}]},
    "A mode that there is not": {**attached(at=QUERY), "deploy": {"mode": "merged"}},
    "A type by torch's name": {**attached(at=QUERY), "deploy": {"precision": "bf16"}},
    "A number for a mixture": attached(method="bottleneck", at="feed_forward.block", experts=4),
    "A method at another kind of site": attached(method="prefix", at=QUERY),
    "A layer that is not there": attached(at=QUERY, layers=[0, 12]),
    "More values than layers": attached(at=QUERY, r=[2, 4, 8]),
    "Other sites than expected": attached(at=QUERY, expect=12),
    "An order that must be said": {"pelt": 1, "attach": [
        {"method": "dora", "at": QUERY}, {"method": "lora", "at": QUERY}]},
    "Two attachments of one name": {"pelt": 1, "attach": [
        {"method": "lora", "at": QUERY}, {"method": "lora", "at": "attention.value"}]},
    "A formula with an unknown function": own(delta="swish(x)"),
    "A formula with an unknown name": own(delta="x * alpha"),
    "A formula of another shape": own(parameters={"A": {"shape": [4, "in"], "init": "zeros"}}, delta="linear(x, A)"),
    "Python in a formula": own(delta="x.mean()"),
    "Texts that read each other": own(delta="y - mean(y, axis=0)"),
}  # fmt: skip


def calls(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is done, in words, and how."""
    model = save("llama", folder / "llama")
    for words, spec in SPECS.items():
        yield words, lambda spec=spec: (check_formulas(peltc.load_spec(spec)), peltc.plan(spec, model))
    good = attached(at=QUERY, r=2)
    yield "A name in place of a model", lambda: peltc.attach("llama", good)
    yield "No spec", lambda: peltc.plan(None, model)
    yield "A model that is not there", lambda: peltc.compile(good, folder / "nowhere", folder / "out")
    yield "A spec that is not there", lambda: peltc.load_spec(folder / "nowhere.yaml")
    yield "Weights of another size", lambda: peltc.compile(
        good, model, folder / "out", {f"lora.layers.{i}.attention.query.{n}": np.ones((3, 3), np.float32)
                                      for i in range(2) for n in "AB"})  # fmt: skip
    yield "An artifact that is not there", lambda: peltc.Session(folder / "nowhere")
    peltc.compile(good, model, folder / "artifact", verify=False)
    session = peltc.Session(folder / "artifact", ["CPUExecutionProvider"])
    yield "A token that the model does not have", lambda: session(input_ids=[[1, 2, 500]])
    yield "A mask of another length", lambda: session(input_ids=[[1, 2, 3]], attention_mask=[[1, 1]])
    yield "Generation that was not compiled", lambda: session.generate([[1, 2, 3]])


def mistakes(folder: Path) -> Iterator[tuple[str, peltc.PeltError]]:
    """Each mistake with what it raises."""
    for words, call in calls(folder):
        try:
            call()
        except peltc.PeltError as error:
            yield words, error
        else:
            raise AssertionError(f"'{words}' is no mistake")


def page() -> str:
    """The document."""
    lines = ["# Mistakes", "", "What people get wrong, and what they are told. The messages are those of the program:",
             "`python tests/bad_input/mistakes.py > docs/mistakes.md` writes this page.", ""]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for words, error in mistakes(Path(folder)):
            text = str(error).replace(folder, "/home/me")
            lines += [f"## {words}", "", "```text", text, "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
