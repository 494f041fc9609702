"""A graph called with a model's inputs by name: `transformers`' own runner of ONNX graphs."""

from __future__ import annotations

from typing import Any

from peltc.compiler.files.manifest import GROWN, KEPT
from peltc.runtime.running.inputs import shown, translating
from peltc.spec.diagnostics import fail

NO_EMBEDS = "give the text as input_ids"
"""What helps who gives embedded tokens."""


def runner_of(record: Any, session: Any, flat: bool = False) -> Any:
    """`transformers`' runner of a graph: called with its inputs by name, it gives what the model returns, and what is
    kept from the prompt, None where nothing is.

    Args:
        flat: whether it gives the graph's outputs by their names instead.
    """
    from transformers.exporters.runners.runner_onnx import OnnxModelRunner

    class Runner(OnnxModelRunner):
        def unflatten(self, outputs: list[Any]) -> Any:
            if flat:
                return dict(zip((o.name for o in self.session.get_outputs()), outputs, strict=True))
            first = outputs[0] if self.session.get_outputs()[0].name == GROWN + KEPT else None
            return super().unflatten(outputs), first

    return Runner(record, session)


class Encoder:
    """The encoder's graph in the place of the module."""

    def __init__(self, runner: Any):
        self.runner = runner
        self.main_input_name = "input_ids"

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        """Hidden states, with the keys and values of the cross-attention beside them, so that `generate` expands them
        for beams like the states.

        Raises:
            PeltError: E606 no token ids; E612 what ONNX Runtime says.
        """
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        if input_ids is None:
            raise fail("E606", "the input 'input_ids' is missing", hint=NO_EMBEDS)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        self.runner.session.rows = len(input_ids)
        with translating(shown(given)):
            found, _ = self.runner(**given)
        states = BaseModelOutput(last_hidden_state=found.pop("last_hidden_state"))
        for name, value in found.items():
            states[name] = value
        return states

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> Any:
        return self.forward(input_ids, attention_mask)
