"""`generate` of `transformers` on an artifact: the model class's own generation, with ONNX Runtime as its `forward`."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peltc.compiler.export.exported import DECODE
from peltc.compiler.files.manifest import CACHE, GIVEN, GROWN, KEPT, LENGTH, read_manifest
from peltc.runtime.kept import ROWS, carried, carry, check_generate
from peltc.runtime.running.cache import InPlace, reorder
from peltc.runtime.running.inputs import (
    NO_LIMITS,
    check_lengths,
    check_shapes,
    check_values,
    count_tokens,
    shown,
    translating,
)
from peltc.runtime.running.runner import NO_EMBEDS, Encoder, runner_of
from peltc.spec.diagnostics import Place, fail

EXTRA = frozenset({"use_cache", "return_dict", "encoder_outputs", "past_key_values", "logits_to_keep"})
"""What `generate` may call `forward` with though no graph takes it."""
HINTS = {
    "output_attentions": "a torch model with the modules attached gives them: peltc.attach",
    "output_hidden_states": "a torch model with the modules attached gives them: peltc.attach",
    "inputs_embeds": NO_EMBEDS,
}
"""What may help who asks a graph for what it does not have, by name."""
CACHES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16",
          "tensor(double)": "float64"}  # fmt: skip
"""The torch type of a cache, by what ONNX Runtime calls it."""


def generator(
    config: Any,
    architecture: str,
    sessions: Mapping[str, Any],
    records: Mapping[str, Any],
    options: Any = None,
    starts: Mapping[str, Any] = MappingProxyType({}),
    limits: Mapping[str, Any] = NO_LIMITS,
    added: int = 0,
    grown: tuple[str, ...] = (),
    copying: Callable[[], Any] | None = None,
) -> Any:
    """A model of `transformers` that generates with graphs; it has no parameters of its own.

    Args:
        config: the model's config.
        architecture: name of its class.
        sessions: of ONNX Runtime, by graph: `decode`, and `encoder` where there is one.
        records: `transformers`' record of each graph's export.
        options: the model's generation config; without it that of the config.
        starts: what caches begin with [1, H, P, Dh], by the graph's inputs.
        limits: what the model's tables allow, as the artifact's manifest records it.
        added: how many tokens of its own the encoder puts before a text.
        grown: the outputs that `decode` writes into its inputs' buffers, where it shares its cache.
        copying: opens the graph that copies its cache, where `decode` is one that shares it.
    """
    import torch
    import transformers
    from accelerate import init_empty_weights

    base = getattr(transformers, architecture)
    made: Any = type(f"Onnx{architecture}", (_Generator, base), {"__module__": base.__module__, "forward": _as(base)})
    with init_empty_weights(include_buffers=False):
        model = made._from_config(config, dtype=torch.float32).eval()
    if options is not None:
        model.generation_config = options
        options.cache_implementation = None  # how the torch model keeps its cache; a graph's grows
    model.use(sessions, records, starts, limits, added)
    if grown and copying is not None:
        model.share(grown, copying)
    return model


def open_generator(
    folder: Path, open_session: Callable[[str], Any], open_sharing: Callable[[str], tuple[Any, tuple[str, ...]]]
) -> Any:
    """The generator of an artifact.

    Args:
        folder: the artifact's.
        open_session: opens one of its graphs, by file name.
        open_sharing: opens one whose cache is shared between past and present, with the outputs that are written into
            it; none where it copies its cache.

    Raises:
        PeltError: E611 the artifact was compiled without generation.
    """
    import transformers
    from safetensors.torch import load_file
    from transformers.exporters.metadata import ExportMetadata

    from peltc.compiler.export.torch_model import parse_config, quiet

    manifest = read_manifest(folder)
    names = [name for name in manifest.get("graphs", ()) if name != "model"]
    if not names:
        raise fail("E611", "the artifact has no graphs with a cache, which generation takes", Place(str(folder)),
                   "an artifact compiled with --generation, or `deploy: {generation: true}`")  # fmt: skip
    components = json.loads((folder / "export.json").read_text(encoding="utf-8"))["components"]
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    file = folder / "generation_config.json"
    with quiet():
        config = parse_config(content)
        options = transformers.GenerationConfig.from_pretrained(folder) if file.is_file() else None
        records = {name: ExportMetadata.from_dict(components[name]["metadata"]) for name in names}
        sessions = {name: open_session(f"{name}.onnx") for name in names if name != DECODE}
        sessions[DECODE], grown = open_sharing(f"{DECODE}.onnx")
        starts = load_file(folder / CACHE) if (folder / CACHE).is_file() else {}
        limits = manifest.get("limits") or NO_LIMITS
        added, copying = manifest.get("tokens_before") or 0, partial(open_session, f"{DECODE}.onnx")
        return generator(config, manifest["base"]["architecture"], sessions, records, options, starts, limits, added,
                         grown, copying)  # fmt: skip


def _as(base: Any) -> Any:
    """The generator's `forward` under the signature of a model's, which tells `generate` what the model takes."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    return forward


class _Generator:
    """What replaces a model's computation by graphs; it precedes the model's class among the bases of `generator`."""

    device = property(lambda self: self._place)
    dtype = property(lambda self: self._dtype)

    def use(
        self,
        sessions: Mapping[str, Any],
        records: Mapping[str, Any],
        starts: Mapping[str, Any],
        limits: Mapping[str, Any],
        added: int,
    ) -> None:
        """Take up the graphs."""
        import torch

        self._runners: dict[str, Any] = {name: runner_of(records[name], one) for name, one in sessions.items()}
        self._flat: Any = runner_of(records["decode"], sessions["decode"], flat=True)
        self._place = self._runners["decode"].device
        self._inputs = {n: {i.name: i for i in s.get_inputs() if i.name != LENGTH} for n, s in sessions.items()}
        caches = [i.type for name, i in self._inputs["decode"].items() if "past_key_values." in name]
        self._dtype = getattr(torch, CACHES[caches[0]]) if caches else self._runners["decode"].dtype
        self._leaves = {n: {i.removeprefix(GIVEN) for i in inputs} for n, inputs in self._inputs.items()}
        kept = self._inputs["decode"].get(GIVEN + KEPT)
        self._width = kept.shape[2] if kept is not None else 0  # of what is kept from the prompt
        leaves = set().union(*self._leaves.values())
        self._known = {leaf.partition(".")[0] for leaf in leaves - {KEPT}} | EXTRA
        self._starts = {leaf.removeprefix(GIVEN): start for leaf, start in starts.items()}
        self._encoder = Encoder(self._runners["encoder"]) if "encoder" in sessions else None
        self._limits, self._added = limits, added
        found = {leaf.removeprefix(GIVEN): spec for inputs in self._inputs.values() for leaf, spec in inputs.items()}
        # tokens and masks [B, S], by name: ONNX Runtime's names of their types
        self.takes = {name: i.type for name, i in found.items() if len(i.shape) == 2 and "." not in name}

    def share(self, grown: tuple[str, ...], copying: Callable[[], Any]) -> None:
        """Let the decoder's graph write new keys and values into buffers.

        Args:
            grown: the outputs that it writes so.
            copying: opens the graph that copies its cache.
        """
        self._own, opened = threading.local(), functools.cache(copying)

        def shared(whole: Any, flat: bool) -> InPlace:
            other = functools.cache(lambda: runner_of(whole.metadata, opened(), flat))
            return InPlace(whole, grown, other, lambda: 0 if flat else getattr(self._own, "room", 0))

        self._runners[DECODE], self._flat = shared(self._runners[DECODE], False), shared(self._flat, True)

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers`' own, which tells how long the text may become."""
        if hasattr(self, "_own"):
            self._own.room = kwargs.get("max_cache_length", args[-1] if args else 0) or 0
        return super()._prepare_cache_for_generation(*args, **kwargs)  # type: ignore[misc]

    def _reorder_cache(self, cache: Any, rows: Any) -> Any:
        """A cache whose rows are those of chosen beams; called by `generate`."""
        if not hasattr(self, "_own"):
            cache.reorder_cache(rows)
            return cache
        reorder(cache, rows)
        if held := carried(cache):
            carry(cache, {key: ROWS["reorder_cache"](value, rows) for key, value in held.items()})
        return cache

    @property
    def decoder_inputs(self) -> Mapping[str, Any]:
        """What the decoder's graph takes, by its own names."""
        return {name.removeprefix(GIVEN): spec for name, spec in self._inputs["decode"].items()}

    @property
    def starts(self) -> Mapping[str, Any]:
        """What caches begin with, before there is a text."""
        return self._starts

    @property
    def vocabulary(self) -> int:
        """How many tokens the decoder's logits tell apart."""
        outputs = self._flat.session.get_outputs()
        return int(next(o.shape[-1] for o in outputs if o.name == "logits"))

    def begun(self, batch: int, states: Any = None) -> dict[str, Any]:
        """What the decoder's graph is given of the past of texts that begin.

        Args:
            states: the encoder's, where there is one.
        """
        kept = {KEPT: self._kept(batch, None)} if self._width else {}
        return self._empty(batch, states) | kept

    def advance(self, batch: int, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs of one run of the decoder's graph, by its own names, for who keeps the rows' caches himself.

        Args:
            leaves: tensors by the names of `decoder_inputs`.

        Raises:
            PeltError: E612 what ONNX Runtime says.
        """
        self._flat.session.rows = batch
        with translating(shown({name: leaves[name] for name in self.takes if name in leaves})):
            outputs: dict[str, Any] = self._flat(**leaves)
        return {name.removeprefix(GROWN): value for name, value in outputs.items()}

    def get_encoder(self, modality: str | None = None) -> Any:
        return self._encoder if self._encoder is not None else super().get_encoder(modality)  # type: ignore[misc]

    def generate(self, *args: Any, **options: Any) -> Any:
        """`transformers`' own.

        Raises:
            PeltError: E606 something is kept from the prompt, and an option lets a part of it be read; and as `run`.
        """
        if self._width:
            check_generate(self, options, "E606")
        return super().generate(*args, **options)  # type: ignore[misc]

    def run(self, input_ids: Any = None, **kwargs: Any) -> Any:
        """One call of `forward`: the logits of new tokens, and the cache that they are added to.

        Raises:
            PeltError: E606 an input that the graphs were not exported with, or of another shape; E615 token ids that
                the model's tables do not have; E616 the text has grown longer than the model's positions; E612 what
                ONNX Runtime says.
        """
        import torch

        given = {name: value for name, value in kwargs.items() if value is not None}
        if input_ids is not None:
            given["input_ids"] = input_ids
        cache = given.pop("past_key_values", None)
        self._check_known(given, cache)
        tokens = given["decoder_input_ids" if self._encoder is not None else "input_ids"]
        batch, length = tokens.shape
        past = cache.get_seq_length() if cache is not None else 0
        runner, known = self._runners["decode"], self._leaves["decode"]
        runner.session.rows = batch
        kept = given.pop("logits_to_keep", 0)
        if isinstance(kept, int):
            kept = torch.arange(length - kept if kept else 0, length)
        given["logits_to_keep"] = kept
        if "attention_mask" in known and "attention_mask" not in given:
            seen = (batch, past + length) if self._encoder is None else self._encoded(given)
            given["attention_mask"] = torch.ones(seen, dtype=torch.long)
        self._check_text(past + length, given)
        leaves = {k: v for k, v in given.items() if k == "logits_to_keep" or k not in EXTRA}
        if past:
            leaves["past_key_values"] = cache
        else:
            leaves |= self._empty(batch, given.get("encoder_outputs"))
        leaves |= {KEPT: self._kept(batch, cache if past else None)} if self._width else {}
        with translating(shown({name: given[name] for name in self.takes if name in given})):
            result, first = runner(**leaves)
        _count_text(result["past_key_values"], past + length)
        if self._encoder is not None:
            result = self._joined(result, leaves, cache if past else None)
        if first is not None:
            carry(result["past_key_values"], {KEPT: first})
        if "logits_to_keep" not in known and len(kept) < length:
            result["logits"] = result["logits"][:, kept]
        if given.get("use_cache") is False:
            return type(result)(logits=result["logits"])
        return result

    def _kept(self, batch: int, cache: Any) -> Any:
        """What is kept from the prompt [B, 1, N]; [B, 0, N] where there is none so far."""
        import torch

        if cache is None:
            return torch.zeros(batch, 0, self._width)
        if KEPT not in carried(cache):
            raise fail("E606", "the cache carries nothing of its prompt, which gates of the modules are computed from",
                       expected="a cache that this artifact has filled, from its first token on")  # fmt: skip
        return carried(cache)[KEPT]

    def _check_known(self, given: Mapping[str, Any], cache: Any) -> None:
        """Refuse what the graphs have no input or output for, and a cache of another kind than theirs, which grows."""
        from transformers import DynamicCache, EncoderDecoderCache

        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if not isinstance(own, DynamicCache | None):
            raise fail("E606", f"the graphs do not take the cache that they are given, a {type(own).__name__}",
                       expected="a DynamicCache, which grows with the text",
                       hint="leave cache_implementation out: its form changes no token")  # fmt: skip
        strange = [name for name, value in given.items() if name not in self._known and value is not False]
        if strange:
            raise fail("E606", f"the graphs were exported without '{strange[0]}'",
                       expected=", ".join(sorted(self._known - EXTRA)), hint=HINTS.get(strange[0], ""))  # fmt: skip

    def _check_text(self, length: int, given: Mapping[str, Any]) -> None:
        """Hold what a graph reads against its tables, and the mask against the text so far, that in the cache included.

        Args:
            length: of the text so far.
        """
        feeds = {name: given[name].numpy(force=True) for name in self.takes if name in given}
        check_values(feeds, self._limits)
        seen: dict[str, list[int | str]] = {
            "attention_mask": [len(feeds["input_ids"]), length] if self._encoder is None else self._encoded(given)
        }
        hint = "prefill_chunk_size is for a decoder alone" * (self._encoder is not None)
        check_shapes({name: feeds[name] for name in seen if name in feeds}, seen, hint)
        name, axis = ("input_ids", "sequence") if self._encoder is None else ("decoder_input_ids", "target")
        if axis in self._limits["lengths"]:
            mask = given.get("attention_mask") if self._encoder is None else None
            counted = {} if mask is None else count_tokens({"mask": mask}, {"mask": ["batch", axis]})
            check_lengths({axis: (length, name)}, counted, {"lengths": {axis: self._limits["lengths"][axis]}})

    def _encoded(self, given: Mapping[str, Any]) -> list[Any]:
        """The batch and length of the text that the encoder has read."""
        batch, length, _ = given["encoder_outputs"].last_hidden_state.shape
        return [batch, length - self._added]

    def _joined(self, result: Any, leaves: Any, cache: Any) -> Any:
        """The graph's outputs, with the keys and values of the cross-attention that the graph was given."""
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import Seq2SeqLMOutput

        if cache is None:
            stem = "past_key_values.cross_attention_cache.layers."
            count = sum(leaf.startswith(stem) for leaf in leaves) // 2
            crossed = DynamicCache([(leaves[f"{stem}{i}.keys"], leaves[f"{stem}{i}.values"]) for i in range(count)])
        else:
            crossed = cache.cross_attention_cache
        grown = result["past_key_values"]["self_attention_cache"]
        return Seq2SeqLMOutput(logits=result["logits"], past_key_values=EncoderDecoderCache(grown, crossed))

    def _empty(self, batch: int, states: Any) -> dict[str, Any]:
        """What a graph takes for an empty cache: no keys and values, but those of the encoder's states."""
        import torch

        found = {}
        for leaf, spec in self._inputs["decode"].items():
            leaf = leaf.removeprefix(GIVEN)
            if not leaf.startswith("past_key_values."):
                continue
            if states is not None and leaf in states:
                found[leaf] = states[leaf]
            elif leaf in self._starts:
                start = self._starts[leaf].to(self.dtype)
                found[leaf] = start.expand(batch, *start.shape[1:])
            else:
                sizes = [batch, *(d if isinstance(d, int) else 0 for d in spec.shape[1:])]
                found[leaf] = torch.empty(sizes, dtype=self.dtype)
        return found


def _count_text(grown: Any, length: int) -> None:
    """Let a cache tell the length of the text in it, without what stands before.

    Args:
        length: of the text.
    """
    cache: Any = grown.get("self_attention_cache") if isinstance(grown, dict) else grown
    whole = cache.get_seq_length
    if (before := whole(0) - length) > 0:
        cache.get_seq_length = lambda layer_idx=0: max(whole(0) - before, 0)
