"""A cache that grows in place: nothing is copied, nothing is written over, and what it gives is what a copy gives."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import pytest
import torch

import peltc
from peltc.runtime.running.cache import MARK, InPlace, buffer_of

pytestmark = pytest.mark.xdist_group("cache")
IDS = torch.tensor([[1, 5, 6, 7], [1, 9, 8, 7]])


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def session(request: Any, tmp_path_factory: Any) -> peltc.Session:
    folder = tmp_path_factory.mktemp(request.param)
    base = models.save(request.param, folder / "base")
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 2}]}
    random = np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in peltc.plan(spec, base).tensors.items()}
    tensors = {name: random.standard_normal(shape).astype(np.float32) / 10 for name, shape in shapes.items()}
    peltc.compile(
        spec, base, folder / "out", tensors, generation=True
    )  # held against PyTorch, by the graph that shares
    return peltc.Session(folder / "out", ["CPUExecutionProvider"], threads=1)


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
