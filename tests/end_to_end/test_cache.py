"""A cache that grows in place: nothing is copied, nothing is written over, and what it gives is what a copy gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch

import peltc
from peltc.runtime.running.cache import BEGUN, MARK, InPlace, buffer_of, reorder

pytestmark = pytest.mark.xdist_group("cache")
CPU = ["CPUExecutionProvider"]
IDS = torch.tensor([[1, 5, 6, 7], [1, 9, 8, 7]])


TOLERANCE = {"float32": 1e-5, "float16": 2.0**-9}
"""How far the logits of a cache in place may be from those of a copied one, over the largest; in float16, where both
are rounded, two epsilons."""


def compiled(family: str, folder: Path, precision: str = "checkpoint") -> Path:
    """An artifact that generates."""
    base = models.save(family, folder / "base")
    deploy = {"mode": "static", "precision": precision}
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 2}], "deploy": deploy}
    random = np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in peltc.plan(spec, base).tensors.items()}
    tensors = {name: random.standard_normal(shape).astype(np.float32) / 10 for name, shape in shapes.items()}
    peltc.compile(
        spec, base, folder / "out", tensors, generation=True
    )  # held against PyTorch, by the graph that shares
    return folder / "out"


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def session(request: Any, tmp_path_factory: Any) -> peltc.Session:
    folder = compiled(request.param, tmp_path_factory.mktemp(request.param))
    return peltc.Session(folder, CPU, threads=1)


def step(session: peltc.Session, ids: torch.Tensor, cache: Any = None, **given: Any) -> Any:
    """One call of the generator; of a decoder's alone, with the positions that it wants."""
    model = session.generator
    past = 0 if cache is None else cache.get_seq_length()
    if "encoder" in model._runners:
        given["encoder_outputs"] = model.get_encoder()(input_ids=IDS)
        with torch.no_grad():
            return model.run(decoder_input_ids=ids, past_key_values=cache, **given)
    if "position_ids" in model._known:
        given["position_ids"] = torch.arange(past, past + ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return model.run(ids, past_key_values=cache, **given)


def keys_of(cache: Any) -> torch.Tensor:
    return getattr(cache, "self_attention_cache", cache).layers[0].keys


def copying(session: peltc.Session, ids: list[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    """The logits of texts in parts, by the graph that copies its cache."""
    model, own = session.generator, session.generator._runners["decode"]
    model._runners["decode"] = own._copying()
    try:
        found, cache = [], None
        for part in ids:
            out = step(session, part, cache)
            cache = out.past_key_values
            found.append(out.logits.numpy())
        return found
    finally:
        model._runners["decode"] = own


def same(found: Any, wanted: np.ndarray[Any, Any]) -> bool:
    return bool(np.abs(found.logits.numpy() - wanted).max() <= 1e-5 * np.abs(wanted).max())


def test_steps_write_where_the_cache_lies(session: peltc.Session) -> None:
    assert isinstance(session.generator._runners["decode"], InPlace)
    first = step(session, IDS[:, :2])
    second = step(session, IDS[:, 2:3], first.past_key_values)
    third = step(session, IDS[:, 3:], second.past_key_values)
    places = {keys_of(out.past_key_values).data_ptr() for out in (first, second, third)}
    assert len(places) == 1 and keys_of(third.past_key_values).shape[2] == 4
    wanted = copying(session, [IDS[:, :2], IDS[:, 2:3], IDS[:, 3:]])
    assert all(same(out, logits) for out, logits in zip((first, second, third), wanted, strict=True))


def test_no_text_writes_into_another_s_past(session: peltc.Session) -> None:
    """Two texts that go on from one cache, and the first of them once more."""
    begun = step(session, IDS[:, :2])
    one = step(session, IDS[:, 2:3], begun.past_key_values)
    other = step(session, IDS[:, 3:], begun.past_key_values)
    assert keys_of(one.past_key_values).data_ptr() != keys_of(other.past_key_values).data_ptr()
    on = step(session, IDS[:, 3:], one.past_key_values)
    assert same(on, copying(session, [IDS[:, :2], IDS[:, 2:3], IDS[:, 3:]])[2])
    assert same(other, copying(session, [IDS[:, :2], IDS[:, 3:]])[1])


def test_several_tokens_behind_a_past(session: peltc.Session) -> None:
    """ONNX Runtime's operation takes them for one text alone: the graph that copies does it for several."""
    for rows in (1, 2):
        if rows == 1 and "encoder" in session.generator._runners:
            continue
        begun = step(session, IDS[:rows, :1])
        found = step(session, IDS[:rows, 1:], begun.past_key_values)
        assert same(found, copying(session, [IDS[:rows, :1], IDS[:rows, 1:]])[1])


def test_a_changed_past_is_copied() -> None:
    past = torch.randn(2, 3, 5, 4)
    buffer = buffer_of(past, 6, 10)
    assert buffer.tensor.shape == (2, 3, 64, 4) and (buffer.tensor[:, :, :5] == past).all()
    view = buffer.tensor[:, :, :5]
    setattr(view, MARK, buffer)
    assert buffer_of(view, 6, 10) is buffer
    assert buffer_of(view, 65, 10) is not buffer, "there is no room"
    buffer.filled = 6
    assert buffer_of(view, 6, 10) is not buffer, "another text went on from here"
    for changed in (view.index_select(0, torch.tensor([1, 0])), view[:, :, :4], view.clone()):
        assert buffer_of(changed, 6, 10).tensor.data_ptr() != buffer.tensor.data_ptr()


def test_beams_and_drawn_tokens_are_as_before(session: peltc.Session) -> None:
    if "encoder" in session.generator._runners:
        options: dict[str, Any] = {"decoder_start_token_id": 0}
    else:
        options = {"pad_token_id": 0}
    mask = torch.ones_like(IDS)
    for more in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        tokens = []
        for plain in (False, True):
            model, own = session.generator, session.generator._runners["decode"]
            model._runners["decode"] = own._copying() if plain else own
            torch.manual_seed(0)
            try:
                tokens.append(session.generate(IDS, attention_mask=mask, max_new_tokens=6, **options, **more))
            finally:
                model._runners["decode"] = own
        assert tokens[0].tolist() == tokens[1].tolist()


def generated(session: peltc.Session, plain: bool) -> Any:
    """Tokens, and the logits that they were chosen by, by either graph."""
    model, own = session.generator, session.generator._runners["decode"]
    start = {"decoder_start_token_id": 0} if "encoder" in model._runners else {"pad_token_id": 0}
    model._runners["decode"] = own._copying() if plain else own
    try:
        return session.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, min_new_tokens=8,
                                output_logits=True, return_dict_in_generate=True, **start)  # fmt: skip
    finally:
        model._runners["decode"] = own


def check_in_place(session: peltc.Session, precision: str) -> None:
    """Tokens are those of the copied cache, and the logits are."""
    assert isinstance(session.generator._runners["decode"], InPlace) and not session.copies
    found, wanted = generated(session, False), generated(session, True)
    assert found.sequences.tolist() == wanted.sequences.tolist()
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE[precision] * theirs.abs().max()


def test_it_is_the_same_over_shared_weights(session: peltc.Session) -> None:
    sharing = peltc.Session(session.folder, CPU, threads=1, share_weights=True)
    check_in_place(sharing, "float32")
    assert sharing.weights
    sharing.close()


@pytest.mark.parametrize("family", ["llama"])
def test_it_is_the_same_in_float16(family: str, tmp_path: Path) -> None:
    check_in_place(peltc.Session(compiled(family, tmp_path, "float16"), CPU, threads=1), "float16")


@pytest.mark.parametrize(("family", "spec", "reason"), [
    ("gemma3", {"method": "lora", "at": "attention.query", "r": 2}, "no attention of the graph keeps its own past"),
    ("llama", {"method": "prefix", "at": "attention", "length": 2, "mode": "swappable"}, BEGUN),
])  # fmt: skip
def test_why_a_cache_is_copied(family: str, spec: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """Layers that keep a window of keys join them with new ones outside of their attention."""
    base = models.save(family, tmp_path / "base")
    peltc.compile({"pelt": 1, "attach": [spec]}, base, tmp_path / "out", generation=True, verify=False)
    session = peltc.Session(tmp_path / "out", CPU)
    assert not isinstance(session.generator._runners["decode"], InPlace)
    assert session.copies.startswith(reason)


def test_beams_are_copied_once_and_only_where_they_change(session: peltc.Session) -> None:
    begun = step(session, IDS[:, :2])
    cache = begun.past_key_values
    before, place = keys_of(cache).clone(), keys_of(cache).data_ptr()
    reorder(cache, torch.tensor([0, 1]))
    assert keys_of(cache).data_ptr() == place
    reorder(cache, torch.tensor([1, 1]))
    keys = keys_of(cache)
    assert keys.data_ptr() != place and torch.equal(keys, before[[1, 1]])
    place = keys.data_ptr()
    on = step(session, IDS[:, 2:3], cache)
    assert keys_of(on.past_key_values).data_ptr() == place, "its buffer has room"


def test_beams_of_changed_caches_are_copied_as_any() -> None:
    """A past that is no whole buffer, a cropped one say."""
    from transformers import DynamicCache

    past = torch.randn(2, 3, 5, 4)
    cache = DynamicCache([(past, past + 1)])
    reorder(cache, torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys, past[[1, 0]]) and torch.equal(cache.layers[0].values, past[[1, 0]] + 1)
