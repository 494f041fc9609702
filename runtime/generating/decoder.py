"""The decoder's graph on rows of different texts: caches that are joined, and from which rows are taken."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peltc.compiler.files.manifest import KEPT
from peltc.runtime.running.inputs import check_lengths, check_values
from peltc.runtime.running.profiles import Taken
from peltc.runtime.running.session import Session
from peltc.spec.diagnostics import Place, fail
from peltc.spec.modes import BANK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PAST, MASK, POSITIONS, KEEP, LOGITS = "past", "attention_mask", "position_ids", "logits_to_keep", "logits"
IDS = ("input_ids", "decoder_input_ids")
CACHE = "past_key_values."
"""What the names of caches begin with."""
TOLERANCE, ROUGH = 1e-4, 2e-2
"""How far logits beside padding may be from those without it, in shares of the largest one, where the cache is float32
and where it is narrower: rounding is far below, another position far above."""


@dataclass
class Begun:
    """What is known of a text before the decoder has read any of it.

    Attributes:
        ids: of the text that the decoder begins with.
        states: the encoder's output for it, where there is an encoder.
        mask: of the text that the encoder has read [1, source].
    """

    ids: list[int]
    states: Any = None
    mask: Any = None


@dataclass
class Batch:
    """The caches of rows that run together.

    Attributes:
        leaves: what the graph is given of the past, [rows, ...] by its own names; each row's past stands at the right.
        lengths: how many tokens of each row are in the cache.
    """

    leaves: dict[str, Tensor]
    lengths: list[int]


class Decoder:
    """Runs the decoder's graph of a session.

    Texts of different lengths run together, padded on the left, where a mask hides the padding and where that was seen
    to change nothing: a graph may count positions along the cache. Elsewhere only texts of equal lengths do.

    Args:
        session: an artifact that was compiled with generation.

    Raises:
        PeltError: as `Session.generator`; E611 the graph takes something that only `generate` makes.

    Attributes:
        vocabulary: how many tokens there are.
        encodes: whether an encoder reads the prompt, and the decoder begins with tokens of its own.
        mixes: whether rows of a batch may have different profiles.
        pads_prompts: whether prompts of different lengths may be read together.
        pads: whether texts of different lengths may go on together.
    """

    def __init__(self, session: Session):
        self.session, self.model = session, session.generator
        self.inputs = {name: [*spec.shape] for name, spec in self.model.decoder_inputs.items()}
        self.ids = next(name for name in IDS if name in self.inputs)
        self.vocabulary: int = self.model.vocabulary
        self.encodes = bool(self.model.config.is_encoder_decoder)
        self.mixes = (session.kept.record or {}).get("mode") == BANK
        strange = [
            name for name, shape in self.inputs.items()
            if name not in (self.ids, MASK, KEEP, KEPT) and not name.startswith(CACHE)
            and not (name == POSITIONS and len(shape) == 2)
        ]  # fmt: skip
        if strange:
            raise fail("E611", f"the graph takes '{strange[0]}', which the server does not make of a text",
                       Place(str(session.folder)), hint="Session.generate runs it")  # fmt: skip
        self.begins = {name: self.model.starts[name].shape[2] if name in self.model.starts else 0
                       for name in self.inputs if PAST in self.inputs[name]}  # fmt: skip
        """The places of each cache before the text's, which padding follows."""
        axis = "target" if self.encodes else "sequence"
        limit = session.limits["lengths"].get(axis)
        self.axis, self.most = axis, limit["most"] if limit else None
        """How many tokens a text may have; None where nothing bounds it."""
        self.pads_prompts = self.pads = MASK in self.inputs and not self.encodes
        if self.pads:
            self.pads_prompts, self.pads = self._probed()
        if KEPT in self.inputs:  # values that are made of a whole prompt, of its padding too
            self.pads_prompts = False

    def check(self, ids: Sequence[int]) -> None:
        """Hold a prompt against the model's tables.

        Raises:
            PeltError: E615 an id that has no row; E616 it is too long; E617 there is none.
        """
        import numpy as np

        if not ids:
            raise fail("E617", "the prompt is empty", expected="at least one token")
        check_values({"input_ids": np.array([ids])}, self.session.limits)
        check_lengths({"sequence": (len(ids), "input_ids")}, {}, self.session.limits)

    @contextmanager
    def lending(self, taken: Taken) -> Iterator[None]:
        """Run graphs of this thread with what was taken of profiles."""
        before = getattr(self.session.generating, "taken", None)
        self.session.generating.taken = taken
        try:
            yield
        finally:
            self.session.generating.taken = before

    def read(self, texts: Sequence[Begun], taken: Taken) -> tuple[Batch, Tensor]:
        """Read what texts begin with.

        Returns:
            Their caches, and the logits of what follows each [rows, V].
        """
        import torch

        rows, width = len(texts), max(len(text.ids) for text in texts)
        ids = torch.zeros(rows, width, dtype=torch.long)
        for i, text in enumerate(texts):
            ids[i, width - len(text.ids) :] = torch.tensor(text.ids)
        if self.encodes:
            each = [Batch(self.model.begun(1, text.states) | {MASK: text.mask}, [0]) for text in texts]
            begun = self.joined(each)
        else:
            begun = Batch(self.model.begun(rows), [0] * rows)
        return self._run(begun, ids, [len(text.ids) for text in texts], taken)

    def go_on(self, batch: Batch, tokens: Sequence[int], taken: Taken) -> tuple[Batch, Tensor]:
        """Read one more token of each row.

        Returns:
            The caches with it, and the logits of what follows [rows, V].
        """
        import torch

        return self._run(batch, torch.tensor(tokens)[:, None], [1] * len(tokens), taken)

    def joined(self, batches: Sequence[Batch]) -> Batch:
        """Batches made one."""
        if len(batches) == 1:
            return batches[0]
        import torch

        leaves = {}
        for name in batches[0].leaves:
            tensors = [batch.leaves[name] for batch in batches]
            sizes = [max(t.shape[i] for t in tensors) for i in range(tensors[0].ndim)]
            leaves[name] = torch.cat([self._padded(name, t, sizes) for t in tensors])
        return Batch(leaves, [length for batch in batches for length in batch.lengths])

    def chosen(self, batch: Batch, rows: Sequence[int]) -> Batch:
        """Some rows of a batch, one of them several times if it is said so, without the padding that none needs."""
        import torch

        index = torch.tensor(rows)
        lengths = [batch.lengths[i] for i in rows]
        spare = max(batch.lengths) - max(lengths)
        leaves = {}
        for name, tensor in batch.leaves.items():
            picked = tensor.index_select(0, index.to(tensor.device))
            if name in self.begins and spare:
                at, axis = self.begins[name], self._past(name)
                before, after = (
                    picked.narrow(axis, 0, at),
                    picked.narrow(axis, at + spare, picked.shape[axis] - at - spare),
                )
                picked = torch.cat([before, after], axis) if at else after
            leaves[name] = picked
        return Batch(leaves, lengths)

    def _run(self, batch: Batch, ids: Tensor, new: Sequence[int], taken: Taken) -> tuple[Batch, Tensor]:
        """Read tokens, padded on the left, of rows that have a past or none."""
        import torch

        rows, query = ids.shape
        lengths = [before + more for before, more in zip(batch.lengths, new, strict=True)]
        leaves = {**batch.leaves, self.ids: ids}
        width = max(batch.lengths) + query
        seen = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
        if not self.encodes and MASK in self.inputs:
            leaves[MASK] = seen.to(torch.bool if "bool" in self.model.takes[MASK] else torch.long)
        if POSITIONS in self.inputs:
            leaves[POSITIONS] = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, -query:]
        if KEEP in self.inputs:
            leaves[KEEP] = torch.tensor([query - 1])
        with self.lending(taken):
            outputs = self.model.advance(rows, leaves)
        logits = outputs.pop(LOGITS)[:, -1].to("cpu", torch.float32)
        grown = {name: outputs.get(name, value) for name, value in batch.leaves.items()}
        return Batch(grown, lengths), logits

    def _past(self, name: str) -> int:
        return int(self.inputs[name].index(PAST))

    def _padded(self, name: str, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """A tensor with zeros up to sizes: before a row's past, and after anything else."""
        import torch

        past = self._past(name) if name in self.begins else None
        for axis in range(1, tensor.ndim):
            if missing := sizes[axis] - tensor.shape[axis]:
                shape = [*tensor.shape]
                shape[axis] = missing
                zeros = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
                at = self.begins[name] if axis == past else tensor.shape[axis]
                before, after = tensor.narrow(axis, 0, at), tensor.narrow(axis, at, tensor.shape[axis] - at)
                tensor = torch.cat([before, zeros, after], axis)
        return tensor

    def _probed(self) -> tuple[bool, bool]:
        """Whether padding changes nothing: of prompts that are read together, and of caches that go on together."""
        import torch

        rows = self.session.limits["values"].get("input_ids", 16)
        long, short = ([(7 * i + n) % rows for i in range(n)] for n in (6, 3))
        if (self.session.kept.record or {}).get("no_bare_base"):  # and no profile to try it with
            return False, False
        with self.session.taken(None, None) as taken:
            alone = [self.read([Begun(ids)], taken) for ids in (long, short)]
            together, logits = self.read([Begun(long), Begun(short)], taken)
            expected = torch.cat([logits for _, logits in alone])
            prompts = _close(logits, expected, together)
            expected = torch.cat([self.go_on(batch, [5 % rows], taken)[1] for batch, _ in alone])
            joined = self.joined([batch for batch, _ in alone])
            return prompts, _close(self.go_on(joined, [5 % rows] * 2, taken)[1], expected, joined)


def _close(found: Tensor, expected: Tensor, batch: Batch) -> bool:
    import torch

    narrow = any(leaf.dtype in (torch.float16, torch.bfloat16) for leaf in batch.leaves.values())
    return bool((found - expected).abs().max() <= (ROUGH if narrow else TOLERANCE) * expected.abs().max())
