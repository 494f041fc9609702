"""What leaves a lowered graph with fewer nodes, against closed forms in float64: rotations in all their forms,
activations, nodes that do nothing, layout in one step, sizes that are read once."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from lowered import Array, drawn, kinds, model_of, near, number, run, whole, with_weights

from peltc.compiler.lowering.idle import leave_out
from peltc.compiler.lowering.lower import lower

B, H, S, D, R = 2, 4, 3, 16, 8
CONSTANTS = (
    f"{whole('zero', 0)} {whole('one', 1)} {whole('two', 2)} {whole('last', 3)} {whole('end', 9223372036854775807)}"
    f"{whole('r', R)} {whole('half', R // 2)} {whole('back', -1)} {whole('four', 4)}"
)
PARTS = "x = Slice (w, zero, r, last, one) z = Slice (w, r, end, last, one)"
TURNS = {
    "halves": (
        "f = Concat <axis=-1> (t, t) cf = Cos (f) sf = Sin (f)",
        "a = Slice (x, zero, half, last, one) b = Slice (x, half, end, last, one) n = Neg (b)"
        " u = Concat <axis=-1> (n, a)",
    ),
    "neighbours": (
        f"{whole('twice', 1, 1, 1, 2)} {whole('flat', 0, 0, R)} tu = Unsqueeze (t, back) tt = Tile (tu, twice)"
        " f = Reshape (tt, flat) cf = Cos (f) sf = Sin (f)",
        f"{whole('pairs', 0, 0, 0, R)} a = Slice (x, zero, end, last, two) b = Slice (x, one, end, last, two)"
        " n = Neg (b) nu = Unsqueeze (n, back) au = Unsqueeze (a, back) j = Concat <axis=-1> (nu, au)"
        " u = Reshape (j, pairs)",
    ),
}


def rotation(pairs: str, part: bool, heads: int, texts: int) -> ir.Model:
    """A rotation in pieces: of halves or of neighbours, of a part of the features or of all, heads before tokens or
    behind them, with angles of each text or of all."""
    angles, turn = TURNS[pairs]
    x = "w" if part else "x"
    lengths = "4,query" if heads == 1 else "query,4"
    width = D if part else R
    body = (
        f"{CONSTANTS} {angles} {whole('h', heads)} c = Unsqueeze (cf, h) s = Unsqueeze (sf, h) {PARTS if part else ''}"
        f"{turn} xc = Mul (x, c) us = Mul (u, s) {'v' if part else 'y'} = Add (xc, us)"
        f"{'y = Concat <axis=-1> (v, z)' if part else ''}"
    )
    model = model_of(f"float[batch,{lengths},{width}] {x}, float[{'batch' if texts > 1 else 1},query,{R // 2}] t",
                     f"float[batch,{lengths},{width}] y", body)  # fmt: skip
    for node in model.graph:  # sizes that an exporter knows and ONNX's own inference does not
        for value in node.outputs:
            if value.name in ("tt", "f", "u", "j"):
                lead = ["batch" if texts > 1 else 1, "query"] if value.name in ("tt", "f") else ["batch", *(
                    [4, "query"] if heads == 1 else ["query", 4])]  # fmt: skip
                tail = {"tt": [R // 2, 2], "f": [R], "u": [R], "j": [R // 2, 2]}[value.name]
                if pairs == "neighbours":
                    value.shape = ir.Shape([*lead, *tail])
    return model


def rotated(x: Array, t: Array, pairs: str, heads: int) -> Array:
    cos, sin = (np.expand_dims(f(t.astype(np.float64)), heads) for f in (np.cos, np.sin))
    turned, rest = x[..., :R].astype(np.float64), x[..., R:]
    cut = [slice(0, R // 2), slice(R // 2, R)] if pairs == "halves" else [slice(0, R, 2), slice(1, R, 2)]
    a, b = turned[..., cut[0]], turned[..., cut[1]]
    out = np.empty_like(turned)
    out[..., cut[0]], out[..., cut[1]] = a * cos - b * sin, b * cos + a * sin
    return np.concatenate([out, rest], -1)


@pytest.mark.parametrize("texts", [1, B])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("pairs", TURNS)
def test_rotation_of_any_form_is_one_operation(pairs: str, part: bool, heads: int, texts: int) -> None:
    model = rotation(pairs, part, heads, texts)
    shape = (B, H, S) if heads == 1 else (B, S, H)
    x, t = drawn(*shape, D if part else R), drawn(texts, S, R // 2)
    feeds = {model.graph.inputs[0].name or "": x, "t": t}
    wanted = rotated(x, t, pairs, heads)
    assert near(run(model, feeds)[0], wanted)
    lower(model)
    assert kinds(model).count("RotaryEmbedding") == 1
    assert not {"Neg", "Slice", "Tile", "Mul", "Add", "Squeeze"} & {*kinds(model)}
    assert near(run(model, feeds)[0], wanted)
    other = "neighbours" if pairs == "halves" else "halves"
    assert not near(run(model, feeds)[0], rotated(x, t, other, heads)), "what is wrong is seen"


def test_rest_from_elsewhere_stays_behind_a_rotation() -> None:
    """What is joined to rotated features must be the rest of the same value."""
    model = rotation("halves", True, 1, B)
    cut = next(node for node in model.graph if node.outputs[0].name == "z")
    cut.replace_input_with(1, next(v for v in model.graph.initializers.values() if v.name == "half"))
    model.graph.outputs[0].shape = ir.Shape(["batch", 4, "query", None])
    cut.outputs[0].shape = ir.Shape(["batch", 4, "query", D - R // 2])
    x, t = drawn(B, H, S, D), drawn(B, S, R // 2)
    before = run(model, {"w": x, "t": t})[0]
    lower(model)
    node = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert "rotary_embedding_dim" not in node.attributes
    assert near(run(model, {"w": x, "t": t})[0], before)


C, K = math.sqrt(2 / math.pi), 0.044715
NUMBERS = f"{number('half', 0.5)} {number('three', 3.0)} {number('k', K)} {number('c', C)} {number('one', 1.0)}"
GELUS = {
    "as it is written": "p = Pow (x, three) q = Mul (p, k) i = Add (x, q) j = Mul (i, c) t = Tanh (j) u = Add (t, one)"
    " h = Mul (x, half) y = Mul (h, u)",
    "with the half last": "p = Pow (x, three) q = Mul (k, p) i = Add (q, x) j = Mul (c, i) t = Tanh (j)"
    " u = Add (one, t) h = Mul (u, x) y = Mul (half, h)",
    "with a square": f"{number('ck', C * K)} s = Mul (x, x) q = Mul (s, ck) r = Mul (x, c) p = Mul (x, q)"
    " j = Add (r, p) t = Tanh (j) u = Add (t, one) h = Mul (x, half) y = Mul (u, h)",
    "as an operation": 'y = Gelu <approximate="tanh"> (x)',
}


def gelu(x: Array) -> Array:
    wide = x.astype(np.float64)
    return wide * (1 + np.tanh(C * (wide + K * wide**3))) / 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", GELUS)
def test_gelu_by_tanh_is_one_operation(name: str, bias: bool) -> None:
    first = "x = Add (w, b)" if bias else "x = Identity (w)"
    given = "float[batch,query,8] w" + (", float[8] b" if bias else "")
    model = model_of(given, "float[batch,query,8] y", f"{NUMBERS} {first} {GELUS[name]}")
    b = drawn(8, seed=1)
    lower(with_weights(model, {"b": b}) if bias else model)
    assert kinds(model) == ["FastGelu"]
    x = drawn(B, S, 8)
    found = run(model, {"w": x})[0]
    assert near(found, gelu(x + b if bias else x)) and not near(found, gelu(x * 1.01))


@pytest.mark.parametrize("wrong", [GELUS["as it is written"].replace("half)", "one)"),
                                   GELUS["as it is written"].replace("(p, k)", "(p, half)"),
                                   GELUS["as it is written"].replace("Pow (x, three)", "Pow (x, half)")])  # fmt: skip
def test_other_numbers_are_no_gelu(wrong: str) -> None:
    model = model_of("float[batch,query,8] x", "float[batch,query,8] y", f"{NUMBERS} {wrong}")
    lower(model)
    assert "FastGelu" not in kinds(model) and "Tanh" in kinds(model)


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_product_with_a_sigmoid_is_one_operation(alpha: float) -> None:
    scaled = "s = Identity (x)" if alpha == 1.0 else f"{number('a', alpha)} s = Mul (x, a)"
    model = model_of("float[batch,query,8] x, float[batch,query,8] u", "float[batch,query,8] y",
                     f"{scaled} g = Sigmoid (s) h = Mul (x, g) y = Mul (h, u)")  # fmt: skip
    lower(model)
    assert kinds(model) == ["QuickGelu", "Mul"]
    x, u = drawn(B, S, 8), drawn(B, S, 8, seed=1)
    assert near(run(model, {"x": x, "u": u})[0], u * x.astype(np.float64) / (1 + np.exp(-alpha * x.astype(np.float64))))


def test_sigmoid_of_another_value_stays() -> None:
    model = model_of("float[batch,8] x, float[batch,8] u", "float[batch,8] y", "g = Sigmoid (u) y = Mul (x, g)")
    lower(model)
    assert kinds(model) == ["Sigmoid", "Mul"]


def test_bias_and_exact_gelu_are_one_operation() -> None:
    model = model_of("float[batch,query,8] x, float[8] b", "float[batch,query,8] y",
                     'w = Add (b, x) y = Gelu <approximate="none"> (w)')  # fmt: skip
    b, x = drawn(8, seed=1), drawn(B, S, 8)
    lower(with_weights(model, {"b": b}))
    assert kinds(model) == ["BiasGelu"]
    wide = (x + b).astype(np.float64)
    wanted = wide * (1 + np.vectorize(math.erf)(wide / math.sqrt(2))) / 2
    assert near(run(model, {"x": x})[0], wanted)


IDLE = {
    "a sum with zero": f"{number('n', 0.0)} m = Add (n, x)",
    "a difference from zero": f"{number('n', 0.0)} m = Sub (x, n)",
    "a product with one": f"{number('n', 1.0)} m = Mul (x, n)",
    "a quotient by one": f"{number('n', 1.0)} m = Div (x, n)",
    "a cast to its own type": "m = Cast <to=1> (x)",
    "its own order": "m = Transpose <perm=[0,1,2]> (x)",
    "two orders that undo each other": "o = Transpose <perm=[1,2,0]> (x) m = Transpose <perm=[2,0,1]> (o)",
    "its own sizes": f"{whole('s', 1, 1, 8)} m = Expand (x, s)",
    "a cut that cuts nothing": f"{whole('a', 0)} {whole('b', 2**63 - 1)} {whole('c', 2)} m = Slice (x, a, b, c)",
}


@pytest.mark.parametrize("name", IDLE)
def test_what_does_nothing_is_left_out(name: str) -> None:
    model = model_of("float[batch,query,8] x", "float[batch,query,8] y", f"{IDLE[name]} y = Abs (m)")
    for node in model.graph:
        if node.outputs[0].name == "m":
            node.outputs[0].shape = ir.Shape(["batch", "query", 8])
    lower(model)
    assert kinds(model) == ["Abs"]


BUSY = {
    "a difference of zero and it": f"{number('n', 0.0)} m = Sub (n, x)",
    "one over it": f"{number('n', 1.0)} m = Div (n, x)",
    "a sum with one": f"{number('n', 1.0)} m = Add (x, n)",
    "the other way round": f"{whole('a', -1)} {whole('b', -9)} {whole('c', 2)} m = Slice (x, a, b, c, a)",
    "another order": "o = Transpose <perm=[1,2,0]> (x) m = Transpose <perm=[1,2,0]> (o)",
    "more sizes": f"{whole('s', 3, 1, 1, 1)} m = Expand (x, s)",
}


@pytest.mark.parametrize("name", BUSY)
def test_what_does_something_stays(name: str) -> None:
    model = model_of("float[batch,query,8] x", "float[a,b,c] y" if name != "more sizes" else "float[a,b,c,d] y",
                     f"{BUSY[name]} y = Abs (m)")  # fmt: skip
    x = drawn(B, S, 8)
    before = run(model, {"x": x})[0]
    lower(model)
    assert len(kinds(model)) > 1 and (run(model, {"x": x})[0] == before).all()


def test_number_that_a_profile_decides_is_none() -> None:
    """A scale that is one by default, and an input, may be another in the next call."""
    model = model_of("float[batch,8] x, float[1] s", "float[batch,8] y", "m = Mul (x, s) y = Abs (m)")
    scale = next(value for value in model.graph.inputs if value.name == "s")
    scale.const_value = ir.tensor(np.ones(1, np.float32), name="s")
    model.graph.register_initializer(scale)
    leave_out(model.graph)
    assert kinds(model) == ["Mul", "Abs"]
    x = drawn(B, 8)
    assert near(run(model, {"x": x, "s": np.full(1, -2.0, np.float32)})[0], np.abs(2.0 * x))


def test_weight_in_a_file_is_not_read() -> None:
    """It may be one by chance; whether it is there at all is not asked either."""
    model = model_of("float[batch,8] x, float[8] w", "float[batch,8] y", "m = Mul (x, w) y = Abs (m)")
    lower(with_weights(model, {"w": np.ones(8, np.float32)}))
    assert kinds(model) == ["Abs"]
    model = model_of("float[batch,8] x, float[8] w", "float[batch,8] y", "m = Mul (x, w) y = Abs (m)")
    with_weights(model, {"w": np.ones(8, np.float32)})
    model.graph.initializers["w"].const_value = ir.ExternalTensor(
        "absent.safetensors", 0, 32, ir.DataType.FLOAT, shape=ir.Shape([8]), name="w")  # fmt: skip
    lower(model)
    assert kinds(model) == ["Mul", "Abs"]


def test_layout_is_one_step_by_constants() -> None:
    """Sizes that are read and joined, axes that are added and left out: one Reshape, that serves any length."""
    body = (
        f"{whole('heads', 4)} {whole('width', 2)} {whole('many', 2)} b = Shape <start=0, end=1> (x)"
        " s = Shape <start=1, end=2> (x) n = Concat <axis=0> (b, s, heads, width) v = Reshape (x, n)"
        " e = Unsqueeze (v, many) y = Abs (e)"
    )
    model = model_of("float[batch,query,8] x", "float[batch,query,1,4,2] y", body)
    for node in model.graph:
        for value in node.outputs:
            sizes = {"v": ["batch", "query", 4, 2], "e": ["batch", "query", 1, 4, 2]}.get(value.name or "")
            value.shape = ir.Shape(sizes) if sizes else value.shape
    lower(model)
    assert kinds(model) == ["Reshape", "Abs"]
    for length in (S, 1, 0):
        x = drawn(B, length, 8)
        assert (run(model, {"x": x})[0] == np.abs(x.reshape(B, length, 1, 4, 2))).all()


def test_layout_of_lengths_that_may_be_zero_stays() -> None:
    """[batch, query, 8] → [batch, query · 8]: the product is left to be computed, which zero beside it forbids."""
    rest = whole("rest", -1)
    body = f"b = Shape <start=0, end=1> (x) {rest} n = Concat <axis=0> (b, rest) m = Reshape (x, n) y = Abs (m)"
    model = model_of("float[batch,query,8] x", "float[batch,flat] y", body)
    for node in model.graph:
        if node.outputs[0].name == "m":
            node.outputs[0].shape = ir.Shape(["batch", "flat"])
    lower(model)
    assert kinds(model) == ["Shape", "Concat", "Reshape", "Abs"]


def test_sizes_are_read_once() -> None:
    body = "u = Abs (x) v = Neg (x) a = Shape <start=0, end=1> (u) b = Shape <start=-3, end=-2> (v) y = Add (a, b)" \
           " w = Shape <start=2> (u) z = Add (w, y)"  # fmt: skip
    model = model_of("float[batch,query,8] x", "int64[1] z", body)
    lower(model)
    assert kinds(model) == ["Shape", "Add", "Add"]
    assert run(model, {"x": drawn(B, S, 8)})[0].tolist() == [2 * B + 8]


@pytest.mark.parametrize("first", [True, False])
def test_condition_as_numbers_is_one_choice(first: bool) -> None:
    body = f"{number('low', -3e38)} n = Not (b) c = Cast <to=1> (n) y = Mul ({'low, c' if first else 'c, low'})"
    model = model_of("bool[batch,total] b", "float[batch,total] y", body)
    lower(model)
    assert kinds(model) == ["Where"]
    b = drawn(B, S) > 0
    assert (run(model, {"b": b})[0] == np.where(b, np.float32(0), np.float32(-3e38))).all()


def test_numbers_of_a_condition_times_something_else_stay() -> None:
    model = model_of("bool[batch,total] b, float[batch,total] x", "float[batch,total] y",
                     "n = Not (b) c = Cast <to=1> (n) y = Mul (c, x)")  # fmt: skip
    lower(model)
    assert kinds(model) == ["Not", "Cast", "Mul"]


def attending(query: str, key: str = "k", out: str = "y") -> str:
    return (
        f"kt = Transpose <perm=[0,1,3,2]> ({key}) p = MatMul ({query}, kt) a = Softmax <axis=-1> (p)"
        f" {out} = MatMul (a, v)"
    )


def attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    scores = np.exp(scale * q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2))
    return scores / scores.sum(-1, keepdims=True) @ v


def test_scale_of_heads_side_by_side_is_the_attention_s() -> None:
    """Behind layout, where reading a core does not look; of what else is read, it stays."""
    parts = (
        f"{whole('heads', 0, 0, 4, 8)} {whole('flat', 0, 0, 32)} {number('s', 0.25)} {number('d', 2.0)}"
        "qs = Mul (x, s) qr = Reshape (qs, heads) q = Transpose <perm=[0,2,1,3]> (qr)"
        " ks = Div (x, d) kr = Reshape (ks, heads) k = Transpose <perm=[0,2,1,3]> (kr)"
        " vr = Reshape (x, heads) v = Transpose <perm=[0,2,1,3]> (vr)"
    )
    ends = "ot = Transpose <perm=[0,2,1,3]> (o) y = Reshape (ot, flat)"
    x = drawn(B, S, 32)
    heads = x.reshape(B, S, 4, 8).swapaxes(1, 2)
    wanted = attention(heads, heads, heads, 0.125).swapaxes(1, 2).reshape(B, S, 32)
    for more, stays in (("", 0), (" z = Neg (ks)", 1)):
        outputs = "float[batch,query,32] y" + (", float[batch,query,32] z" if more else "")
        model = model_of("float[batch,query,32] x", outputs, f"{parts} {attending('q', out='o')} {ends}{more}")
        lower(model)
        assert kinds(model).count("Attention") == 1 and kinds(model).count("Div") == stays
        assert "Mul" not in kinds(model)
        assert near(run(model, {"x": x})[0], wanted)
        assert not near(run(model, {"x": x})[0], attention(heads, heads, heads, 0.25).swapaxes(1, 2).reshape(B, S, 32))


def test_result_of_one_axis_for_texts_and_heads_is_none_on_its_way() -> None:
    """[B, H, S, D] → [B H, S, D] → [B, H, S, D] around the products is nothing around the operation."""
    body = (
        f"{whole('n', -1, S, 8)} {whole('t', -1, 5, 8)}"
        f"{whole('four', B, 4, S, 8)} qf = Reshape (q, n) kf = Reshape (k, t) vf = Reshape (v, t)"
        " kt = Transpose <perm=[0,2,1]> (kf) p = MatMul (qf, kt) a = Softmax <axis=-1> (p) o = MatMul (a, vf)"
        " w = Reshape (o, four) y = Abs (w)"
    )
    model = model_of(f"float[{B},4,{S},8] q, float[{B},4,5,8] k, float[{B},4,5,8] v", f"float[{B},4,{S},8] y", body)
    q, k, v = drawn(B, 4, S, 8), drawn(B, 4, 5, 8, seed=1), drawn(B, 4, 5, 8, seed=2)
    lower(model)
    assert kinds(model) == ["Attention", "Abs"]
    assert near(run(model, {"q": q, "k": k, "v": v})[0], np.abs(attention(q, k, v, 1.0)))


def test_length_of_a_cache_is_read_from_it() -> None:
    """It may hold a prefix beside what the mask counts, under one name."""
    body = (
        "g = Concat <axis=2> (p, k) n = Shape <start=2, end=3> (g) b = Shape <start=0, end=1> (g)"
        " y = Concat <axis=0> (n, b)"
    )
    model = model_of("int64[batch,total] m, float[batch,2,past,4] p, float[batch,2,query,4] k",
                     "int64[2] y, float[batch,2,total,4] g", body)  # fmt: skip
    next(v for node in model.graph for v in node.outputs if v.name == "g").shape = ir.Shape(["batch", 2, "total", 4])
    lower(model)
    feeds = {"m": np.ones((B, 6), np.int64), "p": drawn(B, 2, 8, 4), "k": drawn(B, 2, 3, 4)}
    assert run(model, feeds)[0].tolist() == [11, B]
    sizes = [node for node in model.graph if node.op_type == "Shape"]
    assert sorted(node.inputs[0].name or "" for node in sizes if node.inputs[0] is not None) == ["g", "m"]
