"""Soft prompts as Hugging Face PEFT stores them: tokens before the embedded text, evaluated when they are saved.

    PROMPT_TUNING, P_TUNING, CPT    P = prompt_embeddings
    MULTITASK_PROMPT_TUNING         P = prompt_embeddings ⊙ (cols rows), of its one task

What made the prompt in training (a network over it, a bound on how far it may move) is no part of the file. A model
with an encoder and a decoder has rows for both in the file, and reads the encoder's alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peltc.compiler.importers.formats import COMMON, Array, Config, Entry, Format
from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.spec.diagnostics import fail

COUNT = {"type": "integer", "minimum": 1, "maximum": 2**20}
SHARED = {"num_virtual_tokens": COUNT, "num_transformer_submodules": {"enum": [1, 2, None]},
          "modules_to_save": {"type": ["array", "null"], "items": {"type": "string"}}}  # fmt: skip
"""Keys of all methods that learn tokens."""
SIZES = frozenset({"token_dim", "num_attention_heads", "num_layers"})
"""What is in the shapes of the tensors too."""
START = frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"})
"""How a prompt began."""


def sites(config: Config, anatomy: Anatomy) -> Sequence[Site]:
    """Where words are embedded, in the encoder where there is one.

    Raises:
        PeltError: E432 nowhere.
    """
    found = [site for site in anatomy if site.kind == "embedding" and site.role == "embedding.word"]
    first = [site for site in found if site.stack != "decoder"] or found
    if len(first) != 1:
        raise fail("E432", f"the model embeds words at {len(first)} sites", expected="one, before which a prompt joins")
    return first


def entry(config: Config, module: str) -> Entry:
    """How many tokens a prompt has."""
    return Entry("prompt", (("length", config.get("num_virtual_tokens")),))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """P [P, D]."""
    return {"P": tensors["P"]}


def encoders(config: Config, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
    """The rows that PEFT puts before the text: the first as many as there are tokens."""
    return {**tensors, "P": tensors["P"][: config["num_virtual_tokens"]]}


def of_task(config: Config, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
    """P ⊙ (cols [1, P, R] rows [1, R, D]).

    Raises:
        PeltError: E433 shapes of which no product is a prompt's.
    """
    prompt, cols, rows = (tensors[name] for name in ("P", "cols", "rows"))
    ranks = cols.ndim == rows.ndim == 3 and len(cols) == len(rows) == 1 and cols.shape[2] == rows.shape[1]
    if not ranks or (cols.shape[1], rows.shape[2]) != prompt.shape:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in (cols, rows))
        raise fail("E433", f"'prefix_task_cols' and 'prefix_task_rows' have the shapes {shapes}", expected="factors of"
                   f" one task's product, of the shape {list(prompt.shape)}")  # fmt: skip
    return {"P": prompt * (cols[0] @ rows[0])}


def _format(kind: str, inert: frozenset[str], **other: Any) -> Format:
    """What the formats share; a key of which some values alone are understood is in `only`."""
    known: dict[str, Any] = {"tensors": {"prompt_embeddings": "P"}, "refused": {}, "only": {}, "evaluated": encoders}
    known |= other
    return Format(kind=kind, inert=COMMON | SIZES | inert, entry=entry, parameters=parameters, sites=sites,
                  read={key: schema for key, schema in SHARED.items() if key not in known["only"]},
                  **known)  # fmt: skip


PROMPT = _format("PROMPT_TUNING", START)
P_TUNING = _format("P_TUNING", frozenset({"encoder_reparameterization_type", "encoder_hidden_size",
                                          "encoder_num_layers", "encoder_dropout"}))  # fmt: skip
CPT = _format("CPT", frozenset({
    "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor",
    "opt_projection_epsilon", "opt_projection_format_epsilon", "tokenizer_name_or_path"}))  # fmt: skip
MULTITASK = _format(
    "MULTITASK_PROMPT_TUNING", START | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "num_ranks"},
    tensors={"prompt_embeddings": "P", "prefix_task_cols": "cols", "prefix_task_rows": "rows"},
    only={"num_tasks": ((1,), "which of its tasks is meant is told when it runs; train it on the one task, from these"),
          "num_transformer_submodules": ((1, None), "PEFT puts tokens before the decoder's text too then, which no"
                                         " method here does")},
    evaluated=of_task,
)  # fmt: skip
