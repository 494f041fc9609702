"""Equal layers are exported once and repeated: the grown graph is the whole model's, or nothing is repeated."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import models
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from accelerate import init_empty_weights

from peltc.compiler.export import whole
from peltc.compiler.export.cached import export_stage
from peltc.compiler.export.exported import Exported
from peltc.compiler.export.growth import grow
from peltc.compiler.export.inputs import example_inputs
from peltc.compiler.export.rehearsal import compare, rehearse, repetitions
from peltc.compiler.export.stacks import Irregular, Stack, _repetition, find_stacks, same, shortened
from peltc.compiler.export.torch_model import quiet, unbacked
from peltc.compiler.export.whole import export_model

Array = np.ndarray[Any, Any]
LENGTH = {"bert": "num_hidden_layers", "roberta": "num_hidden_layers", "gpt2": "n_layer", "llama": "num_hidden_layers",
          "t5": "num_layers"}  # fmt: skip
GEMMA = {**models.SMALL, **models.TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3}
LAYERS = 6


def empty(family: str, layers: int = LAYERS) -> Any:
    """A tiny model whose parameters have no memory."""
    if family == "gemma2":  # full and sliding attention in turn
        architecture, config_class, settings = "Gemma2ForCausalLM", "Gemma2Config", GEMMA
    else:
        architecture, config_class, settings = models.families()[family]
    length = LENGTH.get(family, "num_hidden_layers")
    with quiet(), init_empty_weights(include_buffers=False):
        config = getattr(transformers, config_class)(**{**settings, length: layers})
        return getattr(transformers, architecture)._from_config(config, dtype=torch.float32).eval()


@functools.cache
def both(family: str, layers: int) -> tuple[Exported, Exported]:
    """A model exported by repetition, and exported whole."""
    return export_model(empty(family, layers)), export_model(empty(family, layers), whole=True)


def histogram(graph: ir.Graph) -> Counter[Any]:
    return Counter(node.op_identifier() for node in graph)


def run(model: ir.Model, values: dict[str, Array]) -> list[Array]:
    """The outputs of a graph as it stands: no optimisation of the runtime changes the order of sums."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {put.name: values[put.name] for put in session.get_inputs()}))


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    random = np.random.default_rng(0)
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def texts(exported: Exported) -> dict[str, Array]:
    """Three random texts, two of them padded."""
    random = np.random.default_rng(1)
    feeds: dict[str, Array] = {}
    for value in exported.model.graph.inputs:
        name = value.name or ""
        if name in exported.parameters:
            continue
        length = 5 if name.startswith("decoder") else 7
        if name == "attention_mask":
            feeds[name] = (np.arange(length) < np.array([[length], [5], [3]])).astype(np.int64)
        else:
            feeds[name] = random.integers(0, 2 if name == "token_type_ids" else 100, (3, length))
    return feeds


# whole models

CASES = [
    ("bert", LAYERS),
    *(pytest.param(family, LAYERS, marks=pytest.mark.slow) for family in ("roberta", "gpt2", "llama", "t5")),
    pytest.param("gemma2", 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "layers"), CASES)
def test_grown_graph_is_the_whole_models(family: str, layers: int) -> None:
    grown, whole = both(family, layers)
    assert "exported" in grown.repeats and "every layer" not in grown.repeats
    assert list(grown.parameters.items()) == list(whole.parameters.items())
    assert [v.name for v in grown.model.graph.inputs] == [v.name for v in whole.model.graph.inputs]
    assert [v.name for v in grown.model.graph.outputs] == [v.name for v in whole.model.graph.outputs]
    assert histogram(grown.model.graph) == histogram(whole.model.graph)
    assert grown.ties == whole.ties
    scopes = [
        Counter(node.metadata_props.get("namespace", "").rpartition("/")[0] for node in exported.model.graph)
        for exported in (grown, whole)
    ]
    assert scopes[0] == scopes[1]
    names = [value.name for node in grown.model.graph for value in node.outputs]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("family", "layers"), CASES)
def test_grown_graph_computes_what_the_whole_model_computes(family: str, layers: int) -> None:
    grown, whole = both(family, layers)
    values = weights(whole.parameters) | texts(whole)
    for one, other in zip(run(grown.model, values), run(whole.model, values), strict=True):
        assert np.isfinite(other).all() and np.abs(other).max() > 1e-3
        np.testing.assert_array_equal(one, other)


def test_the_numbers_tell_layers_apart() -> None:
    """A witness for the test above: two repeated layers with each other's weights give other numbers."""
    grown, whole = both("bert", LAYERS)
    values = weights(whole.parameters) | texts(whole)
    swapped = {
        name.replace("layer.3.", "layer.#.").replace("layer.4.", "layer.3.").replace("layer.#.", "layer.4."): value
        for name, value in values.items()
    }
    assert swapped.keys() == values.keys()
    assert not np.allclose(run(grown.model, swapped)[0], run(whole.model, values)[0], atol=1e-4)


def test_a_model_is_whole_again_after_its_export() -> None:
    model = empty("bert")
    names = [name for name, _ in model.named_parameters()]
    state = {name: list(vars(module)) for name, module in model.named_modules()}
    stacks = find_stacks(model)
    with shortened(model, stacks):
        assert len(model.bert.encoder.layer) == 3
    repetitions(model, example_inputs(model, "ids"))
    assert [name for name, _ in model.named_parameters()] == names
    assert {name: list(vars(module)) for name, module in model.named_modules()} == state


@pytest.mark.slow
def test_a_failure_leads_to_the_whole_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Irregular("two units differ")

    monkeypatch.setattr(whole, "grow", refuse)
    exported = export_model(empty("gpt2", 5))
    assert exported.repeats == "each layer is exported by itself: two units differ"
    assert histogram(exported.model.graph)["", "Softmax", ""] == 5
    assert sum(name.endswith("attn.c_attn.weight") for name in exported.parameters) == 5


# whole models with a cache

DECODERS = [
    ("gpt2", LAYERS),
    *(pytest.param(family, LAYERS, marks=pytest.mark.slow) for family in ("llama", "t5")),
    pytest.param("gemma2", 8, marks=pytest.mark.slow),
]
SIZES = {"batch": 2, "past": 4, "query": 3, "total": 7, "keep": 2, "source": 5}


@functools.cache
def decoders(family: str, layers: int) -> tuple[Exported, Exported]:
    """A model exported with a cache by repetition, and exported whole."""
    grown, whole = (export_stage(unbacked(empty(family, layers)), "decode", whole) for whole in (False, True))
    return grown, whole


def steps(exported: Exported) -> dict[str, Array]:
    """Random new tokens after a random cache, one token of which is masked."""
    random = np.random.default_rng(1)
    feeds: dict[str, Array] = {}
    for value in exported.model.graph.inputs:
        name = value.name or ""
        if name in exported.parameters:
            continue
        assert value.shape is not None
        sizes = [size if isinstance(size, int) else SIZES[str(size.value)] for size in value.shape]
        if value.dtype == ir.DataType.FLOAT:
            feeds[name] = random.normal(size=sizes).astype(np.float32)
        elif name == "attention_mask":
            feeds[name] = np.ones(sizes, np.int64)
            feeds[name][0, 0] = 0
        elif name == "position_ids":
            feeds[name] = np.tile(np.arange(4, 7), (2, 1))
        else:
            feeds[name] = random.integers(0, 2 if name == "logits_to_keep" else 100, sizes)
    return feeds


def signature(values: Any) -> list[tuple[str, str, str]]:
    return [(value.name, str(value.shape), str(value.type)) for value in values]


@pytest.mark.parametrize(("family", "layers"), DECODERS)
def test_grown_graph_with_a_cache_is_the_whole_models(family: str, layers: int) -> None:
    grown, whole = decoders(family, layers)
    assert "exported" in grown.repeats and "every layer" not in grown.repeats
    assert whole.repeats == "each layer is exported by itself, as asked for"
    assert list(grown.parameters.items()) == list(whole.parameters.items())
    assert signature(grown.model.graph.inputs) == signature(whole.model.graph.inputs)
    assert signature(grown.model.graph.outputs) == signature(whole.model.graph.outputs)
    assert histogram(grown.model.graph) == histogram(whole.model.graph)
    assert grown.ties == whole.ties
    differing = {key for key in whole.metadata if grown.metadata[key] != whole.metadata[key]}
    assert differing <= {"export_config"}  # which names an axis of every input that was traced
    names = [value.name for node in grown.model.graph for value in node.outputs]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("family", "layers"), DECODERS)
def test_grown_graph_with_a_cache_computes_what_the_whole_model_computes(family: str, layers: int) -> None:
    grown, whole = decoders(family, layers)
    values = weights(whole.parameters) | steps(whole)
    expected = run(whole.model, values)
    for one, other in zip(run(grown.model, values), expected, strict=True):
        assert np.isfinite(other).all() and np.abs(other).max() > 1e-3
        np.testing.assert_array_equal(one, other)
    entries = sorted(name for name in values if ".layers." in name and name.endswith(".keys"))
    swapped = values | {entries[3]: values[entries[4]], entries[4]: values[entries[3]]}  # the cache is read by layers
    assert not np.allclose(run(grown.model, swapped)[0], expected[0], atol=1e-4)


def test_a_cached_model_with_an_odd_layer_is_exported_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unbacked(empty("gpt2", 5))
    odd = model.transformer.h[3]
    forward = type(odd).forward

    def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = forward(self, *args, **kwargs)
        return states * 2 if self is odd else states

    monkeypatch.setattr(type(odd), "forward", louder)
    exported = export_stage(model, "decode")
    assert exported.repeats.startswith(
        "each layer is exported by itself: layer 3 of transformer.h and the layers before"
    )
    assert histogram(exported.model.graph)["", "Softmax", ""] == 5
    assert len(exported.model.graph.outputs) == 1 + 2 * 5


# which layers are equal


def test_stacks_of_real_models() -> None:
    assert find_stacks(empty("bert")) == [Stack("bert.encoder.layer", 6, 0, 1)]
    assert find_stacks(empty("t5")) == [Stack("encoder.block", 6, 1, 1), Stack("decoder.block", 6, 1, 1)]
    assert find_stacks(empty("gemma2", 9)) == [Stack("model.layers", 9, 1, 2)]
    assert find_stacks(empty("llama", 4)) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.attention.self, "scaling", 0.5),
        lambda layer: setattr(layer.output.LayerNorm, "eps", 0.1),
        lambda layer: setattr(layer.intermediate, "intermediate_act_fn", torch.nn.ReLU()),
        lambda layer: setattr(layer.output, "extra", torch.nn.Identity()),
        lambda layer: layer.output.dense.register_parameter("bias", None),
        lambda layer: layer.register_buffer("table", torch.zeros(2)),
    ],
)
def test_a_layer_that_differs_is_not_repeated(change: Callable[[Any], object]) -> None:
    model = empty("bert")
    change(model.bert.encoder.layer[4])
    assert find_stacks(model) == []


def test_a_layer_with_two_names_is_not_repeated() -> None:
    model = empty("bert")
    model.favourite = model.bert.encoder.layer[4]
    assert find_stacks(model) == []


def test_what_the_config_lists_layer_by_layer_tells_layers_apart() -> None:
    model = empty("bert")
    model.config.layer_types = ["near"] * 5 + ["far"]
    assert find_stacks(model) == []
    model.config.layer_types = ["far"] + ["near"] * 5
    assert find_stacks(model) == [Stack("bert.encoder.layer", 6, 1, 1)]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (3, 5, True),  # the layer's number
        (3, 4, False),
        (True, False, False),
        ("layer 3 of 3", "layer 5 of 5", True),
        ("layer 3 of 9", "layer 5 of 9", False),
        (0.5, 0.5, True),
        (0.5, 0.25, False),
        ({"a": [1, 2.0]}, {"a": [1, 2.0]}, True),
        ({"a": [1, 2.0]}, {"a": [1, 2.5]}, False),
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.zeros(2), False),
        (torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(2)), True),
        (torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(3)), False),
        (torch.nn.Dropout(0.1), torch.nn.Dropout(0.1), True),
        (torch.nn.Dropout(0.1), torch.nn.Dropout(0.2), False),
        (functools.partial(max, 1), functools.partial(max, 1), True),
        (functools.partial(max, 1), functools.partial(min, 1), False),
        (np.ones(2), np.ones(2), False),  # what answers == with an array is not looked into
        (object(), object(), False),
    ],
)
def test_same(one: Any, other: Any, equal: bool) -> None:
    assert same(one, other, apart=2) is equal


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("aaaaaa", (0, 1)),
        ("aaaa", None),  # three would be left: not worth it
        ("baaaaa", (1, 1)),
        ("aaaaab", None),
        ("abababab", (0, 2)),
        ("ababababa", (1, 2)),
        ("aabaabaabaab", (0, 3)),
        ("abcdefgh", None),
        ("", None),
    ],
)
def test_repetition(kinds: str, found: tuple[int, int] | None) -> None:
    assert _repetition([ord(kind) for kind in kinds]) == found


# what the layers do


class Layer(torch.nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.linear = torch.nn.Linear(4, 4, device="meta")

    def forward(self, x: Any, shared: Any) -> Any:
        return x + torch.tanh(self.linear(x)) * shared


class Toy(torch.nn.Module):
    """A model whose loop over its layers may be tampered with."""

    def __init__(self, loop: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.loop = loop
        self.layers = torch.nn.ModuleList(Layer(i) for i in range(8))

    def forward(self, x: Any) -> Any:
        return self.loop(self.layers, x, torch.cos(x))


def straight(layers: Any, x: Any, shared: Any) -> Any:
    for layer in layers:
        x = layer(x, shared)
    return x


def special(layers: Any, x: Any, shared: Any) -> Any:
    for i, layer in enumerate(layers):
        x = layer(x, shared)
        if i == 5:
            x = x * 2
    return x


def numbered(layers: Any, x: Any, shared: Any) -> Any:
    for layer in layers:
        x = layer(x, shared) / (layer.index + 1)
    return x


def constants(layers: Any, x: Any, shared: Any) -> Any:
    for i, layer in enumerate(layers):
        x = layer(x, shared * torch.tensor(0.5 if i != 5 else 0.25))
    return x


def masked(layers: Any, x: Any, shared: Any) -> Any:
    others = torch.cos(x)
    for i, layer in enumerate(layers):
        x = layer(x, others if i == 5 else shared)
    return x


def counted(layers: Any, x: Any, shared: Any) -> Any:
    return straight(layers, x / len(layers), shared)


def collected(layers: Any, x: Any, shared: Any) -> Any:
    states = [x := layer(x, shared) for layer in layers]
    return states


def backwards(layers: Any, x: Any, shared: Any) -> Any:
    return straight(list(layers)[::-1], x, shared)


def shuffled(layers: Any, x: Any, shared: Any) -> Any:
    return straight([*layers[:3], *list(layers[3:-1])[::-1], layers[-1]], x, shared)


def twice(layers: Any, x: Any, shared: Any) -> Any:
    return straight(layers, straight(layers, x, shared), shared)


def fixed(layers: Any, x: Any, shared: Any) -> Any:
    return straight([layers[i] for i in range(8)], x, shared)


def branching(layers: Any, x: Any, shared: Any) -> Any:
    return straight(layers, x if x.sum() > 0 else -x, shared)


def test_a_straight_loop_repeats() -> None:
    assert repetitions(Toy(straight), {"x": torch.zeros(2, 4, device="meta")}) == [Stack("layers", 8, 0, 1)]


class Caching(torch.nn.Module):
    """A model each of whose layers adds its entry of a cache to its input, and returns the sum as the new entry."""

    def __init__(self, loop: Callable[[Any, Any, Any, Any], Any]) -> None:
        super().__init__()
        self.loop = loop
        self.layers = torch.nn.ModuleList(Layer(i) for i in range(8))

    def forward(self, x: Any, past: Any) -> Any:
        new: list[Any] = []
        x = self.loop(self.layers, x, past, new)
        return {"x": x, "past": new}


def cached(layers: Any, x: Any, past: Any, new: Any) -> Any:
    for layer, entry in zip(layers, past, strict=True):
        x = layer(x, entry)
        new.append(x + entry)
    return x


def neighbours(layers: Any, x: Any, past: Any, new: Any) -> Any:
    return cached(layers, x, past[1:] + past[:1], new)


def borrowing(layers: Any, x: Any, past: Any, new: Any) -> Any:
    return cached(layers, x, [past[2] if i == 5 else entry for i, entry in enumerate(past)], new)


def misplaced(layers: Any, x: Any, past: Any, new: Any) -> Any:
    x = cached(layers, x, past, new)
    new[3:5] = new[4:2:-1]
    return x


def special_entry(layers: Any, x: Any, past: Any, new: Any) -> Any:
    x = cached(layers, x, past, new)
    new[4:5] = past[4:5]
    return x


def entries(count: int) -> dict[str, Any]:
    return {"x": torch.zeros(2, 4, device="meta"), "past": [torch.zeros(2, 4, device="meta") for _ in range(count)]}


def test_a_loop_with_a_cache_repeats() -> None:
    assert repetitions(Caching(cached), entries(8), entries(3)) == [Stack("layers", 8, 0, 1, ("past",))]


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (neighbours, "different things|depends on the number"),
        (borrowing, "layer 5 of layers and the layers before compute different things"),
        (misplaced, "layer 3 of layers and the layers before compute different things"),
        (special_entry, "layer 4 of layers and the layers before compute different things"),
    ],
)
def test_a_loop_that_treats_a_cache_differently_does_not(loop: Callable[..., Any], reason: str) -> None:
    with pytest.raises(Irregular, match=reason):
        repetitions(Caching(loop), entries(8), entries(3))


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (special, "layer 5 of layers and the layers before compute different things"),
        (numbered, "layer 2 of layers and the layers before compute different things"),
        (constants, "different things"),
        (masked, "different things"),
        (counted, "what the model does depends on the number of layers"),
        (collected, "what layers does depends on the number of layers"),
        (backwards, "in their order"),
        (shuffled, "in their order"),
        (twice, "each once"),
        (fixed, "the rehearsal failed: IndexError"),
        (branching, "the rehearsal failed: DataDependent"),
    ],
)
def test_a_loop_that_treats_layers_differently_does_not(loop: Callable[[Any, Any, Any], Any], reason: str) -> None:
    with pytest.raises(Irregular, match=reason):
        repetitions(Toy(loop), {"x": torch.zeros(2, 4, device="meta")})


def test_a_tape_with_a_changed_operation_is_told_apart() -> None:
    model, stacks = Toy(straight), [Stack("layers", 8, 0, 1)]
    inputs = {"x": torch.zeros(2, 4, device="meta")}
    whole = rehearse(model, inputs, stacks)
    with shortened(model, stacks):
        short = rehearse(model, inputs, stacks)
    compare(whole, short, stacks)
    for _, operations in whole[1:]:
        kept, operations[-1] = operations[-1], ("aten.neg.default", "()")
        with pytest.raises(Irregular):
            compare(whole, short, stacks)
        operations[-1] = kept


def test_what_a_forward_keeps_is_put_back() -> None:
    def keeping(layers: Any, x: Any, shared: Any) -> Any:
        layers.table = shared
        layers.register_buffer("positions", shared)
        return straight(layers, x, shared)

    model = Toy(keeping)
    repetitions(model, {"x": torch.zeros(2, 4, device="meta")})
    assert not hasattr(model.layers, "table") and not list(model.buffers()) and len(model.layers) == 8


# the graph

FLOAT = ir.TensorType(ir.DataType.FLOAT)
WIDTH = 4


def chain(layers: int) -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
    """h = x·scale; then for each layer, h = h + tanh(h wᵢᵀ)·cos(x)·factor; in the end, h w.

    All transposes come first, as they may: nothing says that a layer's nodes stand together."""

    def value(name: str, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=FLOAT)

    nodes: list[ir.Node] = []

    def add(op: str, name: str, *inputs: ir.Value) -> ir.Value:
        out = value(name, *((WIDTH, WIDTH) if op == "Transpose" else ("batch", WIDTH)))
        attributes = [ir.AttrInt64s("perm", [1, 0])] if op == "Transpose" else []
        nodes.append(ir.Node("", op, inputs, attributes, outputs=[out], name=f"node_{name}"))
        return out

    def constant(name: str, number: float) -> ir.Value:
        array = np.array(number, np.float32)
        return ir.Value(name=name, shape=ir.Shape(()), type=FLOAT, const_value=ir.tensor(array, name=name))

    scale, factors = constant("scale", 0.5), [constant(f"factor_{i}", 0.8) for i in range(layers)]
    x = value("x", "batch", WIDTH)
    own = [value(f"layers.{i}.weight", WIDTH, WIDTH) for i in range(layers)]
    head = value("head.weight", WIDTH, WIDTH)
    flipped = [add("Transpose", f"flipped_{i}", weight) for i, weight in enumerate(own)]
    h, shared = add("Mul", "scaled", x, scale), add("Cos", "shared", x)
    for i in range(layers):
        active = add("Tanh", f"active_{i}", add("MatMul", f"product_{i}", h, flipped[i]))
        h = add("Add", f"h_{i}", h, add("Mul", f"update_{i}", add("Mul", f"gated_{i}", active, shared), factors[i]))
    y = add("MatMul", "y", h, head)
    graph = ir.Graph([x, *own, head], [y], nodes=nodes, initializers=[scale, *factors], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10), {v.name or "": (WIDTH, WIDTH) for v in (*own, head)}


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == f"node_{name}")


def test_a_chain_grows() -> None:
    model, parameters = chain(3)
    whole, expected = chain(7)
    assert list(grow(model, parameters, [Stack("layers", 7, 0, 1)]).items()) == list(expected.items())
    assert histogram(model.graph) == histogram(whole.graph)
    assert [v.name for v in model.graph.inputs] == [v.name for v in whole.graph.inputs]
    values = weights(expected) | {"x": np.random.default_rng(2).normal(size=(3, WIDTH)).astype(np.float32)}
    np.testing.assert_array_equal(run(model, values)[0], run(whole, values)[0])


def test_a_chain_with_a_prefix_grows_by_groups() -> None:
    model, parameters = chain(1 + 3 * 2)
    whole, expected = chain(1 + 5 * 2)
    assert grow(model, parameters, [Stack("layers", 11, 1, 2)]) == expected
    values = weights(expected) | {"x": np.ones((3, WIDTH), np.float32)}
    np.testing.assert_array_equal(run(model, values)[0], run(whole, values)[0])


def operator(model: ir.Model, layer: int) -> None:
    node(model, f"active_{layer}").op_type = "Relu"


def attribute(model: ir.Model, layer: int) -> None:
    node(model, f"flipped_{layer}").attributes["perm"] = ir.AttrInt64s("perm", [0, 1])


def constant_value(model: ir.Model, layer: int) -> None:
    value = node(model, f"update_{layer}").inputs[1]
    assert value is not None
    value.const_value = ir.tensor(np.array(0.7, np.float32), name=value.name)


def wiring(model: ir.Model, layer: int) -> None:
    node(model, f"update_{layer}").replace_input_with(0, node(model, f"active_{layer}").outputs[0])


def other_input(model: ir.Model, layer: int) -> None:
    node(model, f"gated_{layer}").replace_input_with(1, node(model, "scaled").outputs[0])


def shape(model: ir.Model, layer: int) -> None:
    node(model, f"active_{layer}").outputs[0].shape = ir.Shape(["batch", WIDTH + 1])


def extra(model: ir.Model, layer: int) -> None:
    target = node(model, f"active_{layer}")
    added = ir.Node("", "Identity", [target.inputs[0]], name="added")
    model.graph.insert_before(target, added)
    target.replace_input_with(0, added.outputs[0])


def borrowed(model: ir.Model, layer: int) -> None:
    node(model, f"product_{layer}").replace_input_with(1, node(model, "flipped_0").outputs[0])


def output(model: ir.Model, layer: int) -> None:
    model.graph.outputs.append(node(model, f"h_{layer}").outputs[0])


TAMPERINGS = [operator, attribute, constant_value, wiring, other_input, shape, extra, output]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_a_segment_that_was_tampered_with_is_told(tamper: Callable[[ir.Model, int], None], layer: int) -> None:
    model, parameters = chain(3)
    tamper(model, layer)
    with pytest.raises(Irregular):
        grow(model, parameters, [Stack("layers", 7, 0, 1)])


def test_a_weight_of_another_layer_is_told() -> None:
    for layer in (1, 2):
        model, parameters = chain(3)
        borrowed(model, layer)
        with pytest.raises(Irregular):
            grow(model, parameters, [Stack("layers", 7, 0, 1)])


def test_a_layer_that_reads_past_the_one_before_is_told() -> None:
    model, parameters = chain(3)
    node(model, "h_2").replace_input_with(0, node(model, "h_0").outputs[0])
    with pytest.raises(Irregular, match="no chain"):
        grow(model, parameters, [Stack("layers", 7, 0, 1)])


def test_layers_side_by_side_are_told() -> None:
    model, parameters = chain(3)
    for layer in range(3):
        for index, name in ((0, f"product_{layer}"), (0, f"h_{layer}")):
            node(model, name).replace_input_with(index, node(model, "scaled").outputs[0])
    with pytest.raises(Irregular, match="no chain"):
        grow(model, parameters, [Stack("layers", 7, 0, 1)])


def test_a_stack_that_the_graph_does_not_read_is_told() -> None:
    model, parameters = chain(3)
    with pytest.raises(Irregular, match="does not depend"):
        grow(model, parameters, [Stack("blocks", 7, 0, 1)])


def test_a_tampered_copy_gives_other_numbers() -> None:
    """A witness that the comparison of numbers sees every copy."""
    expected = chain(7)[1]
    values = weights(expected) | {"x": np.ones((3, WIDTH), np.float32)}
    right = run(chain(7)[0], values)[0]
    for copy in range(1, 5):
        model, parameters = chain(3)
        grow(model, parameters, [Stack("layers", 7, 0, 1)])
        node(model, f"active_1.{copy}").op_type = "Relu"
        assert not np.allclose(run(model, values)[0], right, atol=1e-4)


# the graph with a cache


def cached_chain(layers: int) -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
    """The chain, in which each layer adds its entry of a cache to its product, and returns the sum as the new entry;
    in the end the shape of the last entry is added."""
    model, parameters = chain(layers)
    graph = model.graph
    for i in range(layers):
        entry = ir.Value(name=f"input.past.{i}.sums", shape=ir.Shape(["batch", WIDTH]), type=FLOAT)
        graph.inputs.insert(1 + i, entry)
        product = node(model, f"product_{i}").outputs[0]
        out = ir.Value(name=f"output.past.{i}.sums", shape=ir.Shape(["batch", WIDTH]), type=FLOAT)
        total = ir.Node("", "Add", [product, entry], outputs=[out], name=f"node_total_{i}")
        graph.insert_after(node(model, f"product_{i}"), total)
        node(model, f"active_{i}").replace_input_with(0, out)
        graph.outputs.append(out)
    count = ir.node("Shape", [entry], name="node_count")
    cast = ir.node("Cast", [count.outputs[0]], {"to": ir.DataType.FLOAT.value}, name="node_cast")
    first = ir.node("ReduceSum", [cast.outputs[0]], {"keepdims": 0}, name="node_sum")
    for added in (count, cast, first):
        added.outputs[0].name = f"{added.name}_out"
    shared = node(model, "shared").outputs[0]
    scaled = ir.Node("", "Mul", [shared, first.outputs[0]], name="node_counted", num_outputs=1)
    scaled.outputs[0].name, scaled.outputs[0].shape, scaled.outputs[0].type = "counted", shared.shape, FLOAT
    graph.insert_after(node(model, "shared"), [count, cast, first, scaled])
    for i in range(layers):
        node(model, f"gated_{i}").replace_input_with(1, scaled.outputs[0])
    return model, parameters


CACHED = [Stack("layers", 7, 0, 1, ("past",))]


def test_a_chain_with_a_cache_grows() -> None:
    model, parameters = cached_chain(3)
    whole, expected = cached_chain(7)
    assert list(grow(model, parameters, CACHED).items()) == list(expected.items())
    assert histogram(model.graph) == histogram(whole.graph)
    assert signature(model.graph.inputs) == signature(whole.graph.inputs)
    assert signature(model.graph.outputs) == signature(whole.graph.outputs)
    random = np.random.default_rng(2)
    names = ["x", *(f"input.past.{i}.sums" for i in range(7))]
    values = weights(expected) | {name: random.normal(size=(3, WIDTH)).astype(np.float32) for name in names}
    for one, other in zip(run(model, values), run(whole, values), strict=True):
        np.testing.assert_array_equal(one, other)


def entry(model: ir.Model, layer: int) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == f"input.past.{layer}.sums")


def borrowed_entry(model: ir.Model, layer: int) -> None:
    node(model, f"total_{layer}").replace_input_with(1, entry(model, (layer + 1) % 3))


def other_output(model: ir.Model, layer: int) -> None:
    model.graph.outputs[1 + layer].name, node(model, f"product_{layer}").outputs[0].name = "inner", "inner_product"
    model.graph.outputs[1 + layer] = node(model, f"gated_{layer}").outputs[0]
    model.graph.outputs[1 + layer].name = f"output.past.{layer}.sums"


def swapped_outputs(model: ir.Model, layer: int) -> None:
    one, other = model.graph.outputs[1 + layer], model.graph.outputs[1 + (layer + 1) % 3]
    one.name, other.name = other.name, one.name


def missing_output(model: ir.Model, layer: int) -> None:
    del model.graph.outputs[1 + layer]


def other_shape(model: ir.Model, layer: int) -> None:
    entry(model, layer).shape = ir.Shape(["elsewhere", WIDTH])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("tamper", [borrowed_entry, swapped_outputs, missing_output, other_shape])
def test_a_cache_that_was_tampered_with_is_told(tamper: Callable[[ir.Model, int], None], layer: int) -> None:
    model, parameters = cached_chain(3)
    tamper(model, layer)
    with pytest.raises(Irregular):
        grow(model, parameters, CACHED)


@pytest.mark.parametrize("layer", [0, 1])  # the last one's is the exporter's own, and not copied
def test_a_new_entry_that_comes_from_elsewhere_is_told(layer: int) -> None:
    model, parameters = cached_chain(3)
    other_output(model, layer)
    with pytest.raises(Irregular):
        grow(model, parameters, CACHED)
