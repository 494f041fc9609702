"""Layers that share their parameters: one set of tensors, one change in all of them, and the user is told."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import peltc
from peltc.compiler.base.opening import open_base
from peltc.runtime.building.compile import plan_for
from peltc.runtime.verification.verify import load_model
from peltc.spec.diagnostics import PeltError

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from instances import save

LORA = {"method": "lora", "at": "attention.query", "r": 4, "alpha": 4}


@pytest.fixture(scope="module")
def albert(tmp_path_factory):
    return save("albert", "AlbertForMaskedLM", tmp_path_factory.mktemp("albert") / "model")


def spec(**more):
    return peltc.load_spec({"pelt": 1, "name": "shared", "attach": [{**LORA, **more}]})


def test_one_set_of_tensors_acts_in_every_layer(albert, tmp_path):
    plan, _ = plan_for(spec(), albert)
    assert [claim.site.path for claim in plan.claims] == [f"encoder.layers.{i}.attention.query" for i in (0, 1)]
    assert list(plan.tensors) == [f"lora.encoder.layers.0.attention.query.{name}" for name in "AB"]
    lines = []
    random = np.random.default_rng(0)
    tensors = {n: random.standard_normal(t.shape).astype(np.float32) * 0.1 for n, t in plan.tensors.items()}
    manifest = peltc.compile(spec(), albert, tmp_path / "out", tensors, talk=lines.append)
    assert "'lora' at encoder.layers.0.attention.query acts in 2 places, which share these parameters" in lines
    assert len(manifest["folded"]) == 1

    model = load_model(open_base(albert))  # by hand: the one weight that both layers are
    weight = model.get_parameter(manifest["folded"][0]["parameter"])
    a, b = (torch.from_numpy(tensors[f"lora.encoder.layers.0.attention.query.{name}"]) for name in "AB")
    ids = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = model(ids).logits
        weight += b @ a
        expected = model(ids).logits.numpy()
    found = peltc.Session(tmp_path / "out")(input_ids=ids.numpy())["logits"]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(found - bare.numpy()).max() > 1e-3 * np.abs(expected).max()


def test_some_of_the_layers_cannot_be_meant(albert):
    with pytest.raises(PeltError, match="E214") as error:
        plan_for(spec(layers=[1]), albert)
    assert "one set of parameters" in str(error.value)
