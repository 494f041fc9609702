"""Quirks: as it was trained, an adapter computes what its library does; fixed, what the method's paper says, which is
written out here by hand in float64, from the library's own tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters_cases as cases
import models
import numpy as np
import peft
import pytest
import torch
import transformers
from adapters_cases import bottleneck, config, lora, prefix
from safetensors.numpy import load_file
from test_closed_forms import Places, attend, bert_by_hand, linear, relu, sigmoid
from test_import_adapters import change

import peltc
from peltc.compiler.importers.importing import Imported, import_adapter
from peltc.compiler.importers.quirk_table import table
from peltc.runtime.commands.cli import run
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError
from peltc.spec.foreign import AS_TRAINED, FIXED

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]
pytestmark = [pytest.mark.xdist_group("adapters"), pytest.mark.filterwarnings("ignore::UserWarning:peft.*")]
EFFECT = 1e-3
"""How far apart both are at least, as a share of the largest value, for the comparison to mean anything."""
ROOT = Path(__file__).parents[2]
WEIGHTS = [3.0, 1.0]


def average(*configs: Any) -> dict[str, Any]:
    return {"setup": {"kind": "Average", "configs": list(configs), "options": {"weights": WEIGHTS}}}


DORA = lora("DoRAConfig", intermediate_lora=True)
FOLDERS: dict[str, tuple[str, Any, Any]] = {
    "gates": ("bert", config("UniPELTConfig", prefix_tuning=prefix(use_gating=True), adapter=bottleneck(
        use_gating=True), lora=lora(use_gating=True)), {}),
    "vectors with gates": ("bert", config("IA3Config", use_gating=True, intermediate_lora=False), {}),
    "vectors": ("bert", config("IA3Config"), {}),
    "magnitudes": ("bert", DORA, {}),
    "magnitudes with gates": ("bert", lora("DoRAConfig", use_gating=True), {}),
    "low rank": ("bert", lora(), {}),
    "the first map": ("llama", lora(intermediate_lora=True), {}),
    "both maps": ("llama", lora(intermediate_lora=True, output_lora=True), {}),
    "an average": ("bert", {}, average(lora(), lora())),
    "an average of vectors": ("bert", {}, average(config("IA3Config", intermediate_lora=False), config(
        "IA3Config", intermediate_lora=False))),
    "an average of bottlenecks": ("bert", {}, average(bottleneck(), bottleneck(reduction_factor=8, scaling=2.0))),
}  # fmt: skip


class Library:
    """What the library saved and answered, by the name of the case."""

    def __init__(self, root: Path, toys: Any):
        self.bases = {name: toys.base(family).folder for name, (family, _, _) in FOLDERS.items()}
        self.base = self.bases["low rank"]
        self.model = toys.model("bert").double()
        cases.write(FOLDERS, lambda family: toys.base(family).folder, root)
        self.places = {name: root / str(number) for number, name in enumerate(FOLDERS)}

    def folder(self, name: str) -> Path:
        return self.places[name] / "adapter"

    def tensors(self, name: str) -> dict[str, Array]:
        """All that was saved, in float64."""
        found: dict[str, Array] = {}
        for file in sorted(self.folder(name).rglob("*.safetensors")):
            found |= load_file(file)
        for file in sorted(self.folder(name).rglob("*.bin")):
            found |= {n: t.numpy() for n, t in torch.load(file, weights_only=True).items()}
        return {n: array.astype(np.float64) for n, array in found.items()}

    def import_(self, name: str, quirks: str) -> Imported:
        return import_adapter(self.folder(name), self.bases[name], quirks=quirks)


@pytest.fixture(scope="session")
def library(toys: Any, tmp_path_factory: pytest.TempPathFactory) -> Library:
    if not cases.PYTHON.is_file():
        pytest.skip(f"no interpreter with the adapters library at {cases.PYTHON}: make .venv/adapters/.ready")
    return Library(tmp_path_factory.mktemp("quirks"), toys)


# The methods as their papers have them

WHERE = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
         "up": "intermediate.dense", "down": "output.dense"}  # fmt: skip


def at(tensors: Tensors, kind: str, layer: int, role: str, adapter: str = "one") -> dict[str, Array]:
    """What an adapter has at a map or a sub-layer of a layer."""
    start = f"encoder.layer.{layer}.{WHERE.get(role, role)}.{kind}.{adapter}."
    return {n.removeprefix(start): array for n, array in tensors.items() if n.startswith(start)}


@dataclass(frozen=True)
class Gate:
    """The mean of σ(z w + c) over the tokens."""

    mask: Array

    def __call__(self, z: Array, t: Tensors) -> Array:
        each = sigmoid(linear(z, t["gate.weight"], t["gate.bias"])) * self.mask[..., None]
        return each.sum(1, keepdims=True) / self.mask.sum(1)[:, None, None]


def adapter(t: Tensors, z: Array) -> Array:
    """up(relu(down z))"""
    hidden = relu(linear(z, t["adapter_down.0.weight"], t["adapter_down.0.bias"]))
    return linear(hidden, t["adapter_up.weight"], t["adapter_up.bias"])


def unipelt(t: Tensors, mask: Array) -> Places:
    """Each submodule scaled by its gate: g s B A x, g · the bottleneck, [g K; k] and [g V; v]."""
    gate = Gate(mask)
    seen_last: dict[int, Array] = {}
    net = {n.partition("self_prefix.")[2]: array for n, array in t.items() if n.startswith("prefix_tuning.")}
    hidden = np.tanh(linear(net["wte.weight"], net["control_trans.0.weight"], net["control_trans.0.bias"]))
    both = linear(hidden, net["control_trans.2.weight"], net["control_trans.2.bias"]).reshape(3, 2, 2, 4, 8)

    def maps(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        own = at(t, "loras", i, role)
        if role == "query":
            seen_last[i] = x  # what the layer's attention reads
        if not own:
            return linear(x, W, b)
        return linear(x, W, b) + gate(x, own) * (3 / 2) * linear(linear(x, own["lora_A"]), own["lora_B"])

    def attention(i: int, q: Array, k: Array, v: Array, seen: Array) -> Array:
        own = {f"gate.{n}": a for n, a in at(t, "prefix_gates", i, "attention.self.prefix_tuning").items()}
        g = gate(seen_last[i], own)[:, None]
        K, V = (g * both[:, i, n].transpose(1, 0, 2)[None] for n in (0, 1))
        wide = np.ones((*seen.shape[:3], 3), bool)
        return attend(q, np.concatenate([K, k], 2), np.concatenate([V, v], 2), np.concatenate([wide, seen], 3))

    def block(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        if role != "feed_forward":
            return y
        own, z = at(t, "adapters", i, "output"), norm(y + r)
        return y + gate(z, own) * adapter(own, z)

    return Places(linear=maps, attention=attention, block=block)


def gated_vectors(t: Tensors, mask: Array) -> Places:
    """y + g (l ⊙ y - y)"""

    def maps(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        own, y = at(t, "loras", i, role), linear(x, W, b)
        return y + Gate(mask)(x, own) * (own["lora_B"][:, 0] * y - y) if own else y

    return Places(linear=maps)


def vectors(t: Tensors, mask: Array) -> Places:
    """l ⊙ of keys, of values, and of what the activation makes."""

    def maps(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        if role == "down":
            return linear(x * at(t, "loras", i, "up")["lora_B"][:, 0], W, b)
        own = at(t, "loras", i, role) if role in ("key", "value") else {}
        return linear(x, W, b) * (own["lora_B"][:, 0] if own else 1.0)

    return Places(linear=maps)


def magnitudes(t: Tensors, mask: Array) -> Places:
    """m V / ‖V‖, V = W + s B A; the bias as it was."""

    def maps(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        own = at(t, "loras", i, role)
        if not own:
            return linear(x, W, b)
        V = W + (3 / 2) * own["lora_B"] @ own["lora_A"]
        return linear(x, own["m.weight"] * V / np.sqrt((V * V).sum(1, keepdims=True)), b)

    return Places(linear=maps)


def low_rank(t: Tensors, mask: Array, scale: float = 3 / 2) -> Places:
    """y + s B A x"""

    def maps(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        own = at(t, "loras", i, role)
        return linear(x, W + scale * own["lora_B"] @ own["lora_A"] if own else W, b)

    return Places(linear=maps)


SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]


def averaged(t: Tensors, mask: Array) -> Places:
    """y + Σ w s B A x"""

    def maps(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        for share, name in zip(SHARES, ("one0", "one1"), strict=True):
            if own := at(t, "loras", i, role, name):
                W = W + share * (3 / 2) * own["lora_B"] @ own["lora_A"]
        return linear(x, W, b)

    return Places(linear=maps)


def averaged_vectors(t: Tensors, mask: Array) -> Places:
    """(Σ w l) ⊙ y"""

    def maps(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        own = [at(t, "loras", i, role, name).get("lora_B") for name in ("one0", "one1")]
        total = sum(s * vector[:, 0] for s, vector in zip(SHARES, own, strict=True) if vector is not None)
        return linear(x, W, b) * (total if own[0] is not None else 1.0)

    return Places(linear=maps)


def averaged_bottlenecks(t: Tensors, mask: Array) -> Places:
    """y + Σ w f a"""

    def block(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        if role != "feed_forward":
            return y
        z, parts = norm(y + r), (("one0", 1.0), ("one1", 2.0))
        return y + sum(s * f * adapter(at(t, "adapters", i, "output", name), z)
                       for s, (name, f) in zip(SHARES, parts, strict=True))  # fmt: skip

    return Places(block=block)


FORMS: dict[str, tuple[Callable[[Tensors, Array], Places], list[str]]] = {
    "gates": (unipelt, ["gate_over_padding", "gate_without_scale"]),
    "vectors with gates": (gated_vectors, ["gate_of_the_result", "gate_over_padding"]),
    "vectors": (vectors, ["vector_before_activation"]),
    "magnitudes": (magnitudes, ["magnitudes_scale_the_bias", "norm_without_scale"]),
    "an average": (averaged, ["average_divided_twice"]),
    "an average of vectors": (averaged_vectors, ["average_divided_twice"]),
    "an average of bottlenecks": (averaged_bottlenecks, ["average_divided_twice"]),
}
"""The closed form of each and the quirks that it has not."""


def answered(folder: Path, base: Path, out: Path, given: Mapping[str, Array], **how: Any) -> tuple[Array, Any]:
    """What an artifact answers, and its manifest."""
    manifest = peltc.compile(folder, base, out, verify=False, **how)
    (found,) = (array for name, array in peltc.Session(out, ["CPUExecutionProvider"])(**given).items()
                if name in ("last_hidden_state", "logits"))  # fmt: skip
    return found, manifest["imported"]


def distance(found: Array, expected: Array, mask: Array) -> float:
    """The largest difference at a token, as a share of the largest value."""
    return float(np.abs(found - expected)[mask > 0].max() / np.abs(expected[mask > 0]).max())


def by_hand(library: Library, places: Places, given: Mapping[str, Array]) -> Array:
    inputs = {name: torch.from_numpy(array) for name, array in given.items()}
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return bert_by_hand(library.model, inputs, places)


@pytest.mark.parametrize("name", FORMS)
def test_fixed_is_what_the_paper_says(name: str, library: Library, tmp_path: Path) -> None:
    """Folded and static; and the library computes something else."""
    form, quirks = FORMS[name]
    trained, given = cases.answers(library.places[name])
    mask = given["attention_mask"]
    expected = by_hand(library, form(library.tensors(name), mask), given)
    assert distance(trained, expected, mask) > EFFECT
    for mode in ("fold", "static"):
        found, imported = answered(library.folder(name), library.base, tmp_path / mode, given, mode=mode, quirks=FIXED)
        assert distance(found, expected, mask) < TOLERANCE["float32"]
        assert imported["quirks"] == {"asked": FIXED, "found": quirks}


@pytest.mark.parametrize("name", ["an average", "an average of vectors"])
def test_as_trained_an_average_is_what_the_library_computes(name: str, library: Library, tmp_path: Path) -> None:
    """The other cases are held where all folders are."""
    trained, given = cases.answers(library.places[name])
    for mode in ("fold", "static"):
        found, imported = answered(library.folder(name), library.base, tmp_path / mode, given, mode=mode)
        assert distance(found, trained, given["attention_mask"]) < TOLERANCE["float32"]
        assert imported["quirks"] == {"asked": AS_TRAINED, "found": ["average_divided_twice"]}


def test_as_trained_is_what_is_imported_where_nothing_is_asked(library: Library) -> None:
    for name, (_, quirks) in FORMS.items():
        if name != "an average of bottlenecks":
            found = library.import_(name, AS_TRAINED)
            assert (found.quirks.asked, found.quirks.names) == (AS_TRAINED, quirks)


def test_the_scale_of_early_versions(library: Library, tmp_path: Path) -> None:
    """Before 1.1.0 there was none."""
    folder = shutil.copytree(library.folder("low rank"), tmp_path / "adapter")
    change(folder, version="adapters.1.0.1")
    _, given = cases.answers(library.places["low rank"])
    for asked, scale in ((AS_TRAINED, 1.0), (FIXED, 3 / 2)):
        found, imported = answered(folder, library.base, tmp_path / asked, given, quirks=asked)
        expected = by_hand(library, low_rank(library.tensors("low rank"), given["attention_mask"], scale), given)
        assert distance(found, expected, given["attention_mask"]) < TOLERANCE["float32"]
        assert imported["quirks"] == {"asked": asked, "found": ["scale_of_early_versions"]}


def test_without_quirks_both_are_the_same(library: Library, tmp_path: Path) -> None:
    said: list[str] = []
    fixed = import_adapter(library.folder("low rank"), library.base, quirks=FIXED)
    assert fixed.content == library.import_("low rank", AS_TRAINED).content
    assert fixed.text().splitlines()[1] == "# no quirks"
    peltc.compile(library.folder("low rank"), library.base, tmp_path, verify=False, quirks=FIXED, talk=said.append)
    assert "the adapter has no quirks" in said


def test_what_has_no_fixed_form_is_refused(library: Library, tmp_path: Path) -> None:
    assert library.import_("the first map", AS_TRAINED).quirks.names == ["maps_swapped"]
    assert library.import_("both maps", FIXED).quirks.names == []
    with pytest.raises(
        PeltError, match="E437 the quirk 'maps_swapped' has no fixed form: the trained tensors do not fit"
    ):
        library.import_("the first map", FIXED)
    library.import_("magnitudes with gates", AS_TRAINED)
    with pytest.raises(PeltError, match="E437 the quirk 'magnitudes_scale_the_bias' has no fixed form: its magnitudes"):
        library.import_("magnitudes with gates", FIXED)
    with pytest.raises(PeltError, match=r"(?s)E431 an average of bottlenecks: .*`--quirks fixed` reads it"):
        library.import_("an average of bottlenecks", AS_TRAINED)
    with pytest.raises(PeltError, match="E437 there is no choice 'mended' of what becomes of quirks"):
        library.import_("low rank", "mended")
    with pytest.raises(PeltError, match="E437 a spec has no quirks"):
        peltc.compile({"pelt": 1, "name": "a", "attach": []}, library.base, tmp_path, quirks=FIXED)


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, -1.0], [0, 0], [1.0, "1"], [True, 1.0], [10**400, 1], [float("nan"), 1.0], {}]
)
def test_weights_of_an_average_have_a_sum(weights: Any, library: Library, tmp_path: Path) -> None:
    folder = shutil.copytree(library.folder("an average"), tmp_path / "adapter")
    said = json.loads((folder / "adapter_setup.json").read_text())["adapter_setup"]
    change(folder, "adapter_setup.json", adapter_setup=said | {"kwargs": {"weights": weights}})
    with pytest.raises(PeltError, match="E430 the weights of the average are"):
        import_adapter(folder, library.base)


# From the folder to the manifest


def test_the_spec_and_the_manifest_say_it(library: Library, tmp_path: Path) -> None:
    """Also where the spec is compiled later, from its file."""
    folder, base = str(library.folder("magnitudes")), str(library.base)
    assert run(["import", folder, base, "-o", str(tmp_path / "spec"), "--quirks", "fixed", "-q"]) == 0
    text = (tmp_path / "spec/spec.yaml").read_text().splitlines()
    assert text[1] == "# quirks fixed: magnitudes_scale_the_bias, norm_without_scale"
    assert run(["compile", str(tmp_path / "spec/spec.yaml"), base, "-o", str(tmp_path / "out"), "-q"]) == 0
    imported = json.loads((tmp_path / "out/pelt.json").read_text())["imported"]
    assert imported == {"origin": text[0].removeprefix("# "), "quirks": {
        "asked": FIXED, "found": ["magnitudes_scale_the_bias", "norm_without_scale"]}}  # fmt: skip
    assert run(["compile", folder, base, "-o", str(tmp_path / "two"), "--quirks", "fixed", "-q", "--no-verify"]) == 0
    assert json.loads((tmp_path / "two/pelt.json").read_text())["imported"] == imported


def test_profiles_are_linked_as_the_artifact_was_compiled(library: Library, tmp_path: Path) -> None:
    folder = library.folder("magnitudes")
    trained, given = cases.answers(library.places["magnitudes"])
    mask = given["attention_mask"]
    fixed = by_hand(library, magnitudes(library.tensors("magnitudes"), mask), given)
    for asked, expected in ((AS_TRAINED, trained), (FIXED, fixed)):
        peltc.compile(folder, library.base, tmp_path / asked, mode="swappable", verify=False, quirks=asked)
        session = peltc.Session(tmp_path / asked, ["CPUExecutionProvider"])
        session.add_profile("one", peltc.link(tmp_path / asked, folder))
        found = session(**given, profile="one")["last_hidden_state"]
        assert distance(found, expected, mask) < TOLERANCE["float32"]


def test_what_a_file_says_of_its_import_is_held_against_the_schema(library: Library, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    found = library.import_("low rank", AS_TRAINED)
    for text in ("[", "[]", '{"origin": "a"}', '{"origin": "a", "quirks": {"asked": "mended", "found": []}}'):
        save_file(dict(found.tensors), tmp_path / "x.safetensors", {**found.metadata, "pelt.imported": text})
        with pytest.raises(PeltError, match="E409 what the file says of the adapter that it was imported from"):
            peltc.compile(found.content, library.base, tmp_path / "out", tmp_path / "x.safetensors", verify=False)


def test_the_table_is_up_to_date() -> None:
    """`python -m peltc.compiler.importers.quirk_table docs/import.md` writes it."""
    assert f"<!-- quirks:begin -->\n{table()}\n<!-- quirks:end -->" in (ROOT / "docs/import.md").read_text("utf-8")


# Hugging Face PEFT


def saved(model: Any, how: Any, folder: Path) -> Any:
    """A model with an adapter of PEFT whose values are random, saved."""
    live: Any = peft.get_peft_model(model, how).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in live.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.25)
    live.save_pretrained(folder)
    return live


def ids(size: int) -> dict[str, Array]:
    """Two texts, of which the last is padded."""
    found = np.random.default_rng(1).integers(5, size, (2, 9))
    mask = np.ones_like(found)
    mask[1, -3:] = 0
    return {"input_ids": found, "attention_mask": mask}


def test_whole_factors_have_no_scale(toys: Any, tmp_path: Path) -> None:
    """ΔW = w1 ⊗ w2 where neither is a product, whatever alpha is."""
    base, given = toys.base("bert").folder, ids(72)
    how = peft.LoKrConfig(target_modules=["query", "value"], r=8, alpha=4, rank_pattern={"value": 2})
    live = saved(toys.model("bert"), how, tmp_path / "adapter")
    tensors = {n.removeprefix("base_model.model."): array.astype(np.float64)
               for n, array in load_file(tmp_path / "adapter/adapter_model.safetensors").items()}  # fmt: skip

    def kronecker(scale: float) -> Places:
        def maps(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
            start = f"encoder.layer.{i}.attention.self.{role}.lokr_"
            own = {n.removeprefix(start): array for n, array in tensors.items() if n.startswith(start)}
            if not own:
                return linear(x, W, b)
            large = own["w2"] * scale if "w2" in own else (4 / 2) * own["w2_a"] @ own["w2_b"]
            return linear(x, W + np.kron(own["w1"], large), b)

        return Places(linear=maps)

    inputs = {
        **{n: torch.from_numpy(a) for n, a in given.items()},
        "token_type_ids": torch.zeros(2, 9, dtype=torch.long),
    }
    with torch.no_grad():
        trained = live(**inputs).last_hidden_state.numpy()
    expected = {asked: bert_by_hand(toys.model("bert").double(), inputs, kronecker(scale))
                for asked, scale in ((AS_TRAINED, 4 / 8), (FIXED, 1.0))}  # fmt: skip
    mask = given["attention_mask"]
    assert distance(trained, expected[AS_TRAINED], mask) < TOLERANCE["float32"]
    assert distance(trained, expected[FIXED], mask) > EFFECT
    for asked, mode in ((AS_TRAINED, "fold"), (FIXED, "fold"), (FIXED, "static")):
        found, imported = answered(tmp_path / "adapter", base, tmp_path / asked / mode, given, mode=mode, quirks=asked)
        assert distance(found, expected[asked], mask) < TOLERANCE["float32"]
        assert imported["quirks"] == {"asked": asked, "found": ["scale_of_whole_factors"]}


def test_each_layer_of_a_decoder_has_its_own_prefix(tmp_path: Path) -> None:
    """As PyTorch computes it in float64 with a cache of what is stored for each layer."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    base = models.save("t5", tmp_path / "base")
    model = transformers.T5ForConditionalGeneration.from_pretrained(base).eval()
    live = saved(model, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3), tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")["prompt_embeddings"].astype(np.float64)
    given: dict[str, Any] = ids(100) | {"decoder_input_ids": np.arange(10, 20).reshape(2, 5)}
    inputs = {name: torch.from_numpy(array) for name, array in given.items()}
    own = DynamicCache()
    for layer, (key, value) in enumerate(stored.reshape(3, 2, 2, 4, 8).transpose(1, 2, 3, 0, 4)):
        own.update(*(torch.from_numpy(np.stack([part, part])) for part in (key, value)), layer)
    with torch.no_grad():
        trained = live(**inputs).logits.numpy()
        wide = transformers.T5ForConditionalGeneration.from_pretrained(base).double().eval()
        expected = wide(**inputs, past_key_values=EncoderDecoderCache(own, DynamicCache())).logits.numpy()
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    bare = shutil.copytree(tmp_path / "adapter", tmp_path / "bare")
    (bare / "adapter_config.json").write_text(json.dumps({n: said[n] for n in said if n != "num_layers"}))
    with pytest.raises(PeltError, match="E433 'K' of 'PREFIX_TUNING' is missing"):
        import_adapter(bare, base)
    mask = np.ones((2, 5))
    assert distance(trained, expected, mask) > EFFECT
    for asked, mode in ((AS_TRAINED, "fold"), (FIXED, "fold"), (FIXED, "static")):
        found, imported = answered(tmp_path / "adapter", base, tmp_path / asked / mode, given, mode=mode, quirks=asked)
        assert distance(found, trained if asked == AS_TRAINED else expected, mask) < TOLERANCE["float32"]
        assert imported["quirks"] == {"asked": asked, "found": ["prefix_of_another_layer"]}


def test_what_pefts_folders_do_not_tell(toys: Any, tmp_path: Path) -> None:
    base = toys.base("bert").folder
    patterns = {"self.query": 5, "query": 64}
    saved(toys.model("bert"), peft.LoraConfig(target_modules=["query"], alpha_pattern=patterns), tmp_path / "overlap")
    blocks = peft.BOFTConfig(target_modules=["query"], boft_block_size=4, boft_n_butterfly_factor=2)
    saved(toys.model("bert"), blocks, tmp_path / "blocks")
    for name, quirk in (("overlap", "overlapping_patterns"), ("blocks", "one_factor")):
        found = import_adapter(tmp_path / name, base)
        assert found.text().splitlines()[1] == f"# quirks as trained: {quirk}"
        with pytest.raises(PeltError, match=f"E437 the quirk '{quirk}' has no fixed form"):
            import_adapter(tmp_path / name, base, quirks=FIXED)
