"""Lowered graphs against closed forms in float64: each form of a core, a rotation, a norm, a mask, a map."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from lowered import Array, drawn, kinds, model_of, near, number, run, whole, with_weights

from peltc.compiler.lowering.lower import Lowering, lower

B, H, K, S, T, D = 2, 4, 2, 3, 5, 8


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(q: Array, k: Array, v: Array, m: Any = 0.0, s: float = 1.0, c: float = 0.0, z: Any = None) -> Array:
    """softmax([c tanh(s q kᵀ / c) + m, z]) [v; 0] in float64; heads are repeated for their groups."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    scores = s * q @ k.swapaxes(-1, -2)
    scores = (c * np.tanh(scores / c) if c else scores) + m
    if z is None:
        return softmax(scores) @ v
    sink = np.broadcast_to(z, (*scores.shape[:-1], 1))
    return softmax(np.concatenate([scores, sink], -1))[..., :-1] @ v


OPERANDS = "float[batch,4,query,8] q, float[batch,4,total,8] k, float[batch,4,total,8] v"
SCORES = "kt = Transpose <perm=[0,1,3,2]> (k)  p = MatMul (q, kt)"
END = "a = Softmax <axis=-1> (x)  y = MatMul (a, v)"
MASK = np.where(np.arange(B * S * T).reshape(B, 1, S, T) % 4 == 1, -np.inf, 0.0)
SHOWN = np.isfinite(MASK)
Q, KEYS, VALUES = drawn(B, H, S, D), drawn(B, H, T, D, seed=1), drawn(B, H, T, D, seed=2)
BIAS, SINK = drawn(B, 1, S, T, seed=3), drawn(1, H, 1, 1, seed=4)
FEW_KEYS, FEW_VALUES = drawn(B, K, T, D, seed=5), drawn(B, K, T, D, seed=6)
REPEATED = (
    f"{whole('two', 2)} {whole('wide', 2, 2, 2, 5, 8)} {whole('four', 2, 4, 5, 8)}"
    "ku = Unsqueeze (g, two) ke = Expand (ku, wide) k = Reshape (ke, four)"
    "vu = Unsqueeze (w, two) ve = Expand (vu, wide) v = Reshape (ve, four)"
)

CORES: dict[str, tuple[str, str, dict[str, Array], Array]] = {
    "a scale after the product": (
        OPERANDS, f"{number('s', 0.3)} {SCORES} x = Mul (p, s) {END}", {}, attention(Q, KEYS, VALUES, s=0.3),
    ),
    "a scale on both sides of it": (
        OPERANDS,
        f"{number('s', 0.5)} qs = Mul (q, s) kt = Transpose <perm=[0,1,3,2]> (k) ks = Mul (kt, s)"
        f" x = MatMul (qs, ks) {END}",
        {}, attention(Q, KEYS, VALUES, s=0.25),
    ),
    "a division and something added": (
        f"{OPERANDS}, float[batch,1,query,total] m", f"{number('s', 4.0)} {SCORES} d = Div (p, s) x = Add (m, d) {END}",
        {"m": BIAS}, attention(Q, KEYS, VALUES, BIAS, s=0.25),
    ),
    "something added before it is scaled": (
        f"{OPERANDS}, float[batch,1,query,total] m", f"{number('s', 0.5)} {SCORES} d = Add (p, m) x = Mul (d, s) {END}",
        {"m": BIAS}, attention(Q, KEYS, VALUES, 0.5 * BIAS, s=0.5),
    ),
    "something subtracted": (
        f"{OPERANDS}, float[batch,1,query,total] m", f"{SCORES} x = Sub (p, m) {END}",
        {"m": BIAS}, attention(Q, KEYS, VALUES, -BIAS),
    ),
    "a mask of one row for all queries": (
        f"{OPERANDS}, float[batch,1,1,total] m", f"{SCORES} x = Add (p, m) {END}",
        {"m": BIAS[:, :, :1]}, attention(Q, KEYS, VALUES, BIAS[:, :, :1]),
    ),
    "a condition that shows": (
        f"{OPERANDS}, bool[batch,1,query,total] m", f"{number('f', -3e38)} {SCORES} x = Where (m, p, f) {END}",
        {"m": SHOWN}, attention(Q, KEYS, VALUES, MASK),
    ),
    "a condition that hides": (
        f"{OPERANDS}, bool[batch,1,query,total] m", f"{number('f', -1e4)} {SCORES} x = Where (m, f, p) {END}",
        {"m": ~SHOWN}, attention(Q, KEYS, VALUES, MASK),
    ),
    "a cap": (
        f"{OPERANDS}, float[batch,1,query,total] m",
        f"{number('s', 0.5)} {number('c', 2.0)} {SCORES} d = Mul (p, s) e = Div (d, c) t = Tanh (e) u = Mul (t, c)"
        f" x = Add (u, m) {END}",
        {"m": BIAS}, attention(Q, KEYS, VALUES, BIAS, s=0.5, c=2.0),
    ),
    "a sink": (
        f"{OPERANDS}, float[1,4,1,1] z, float[batch,1,query,total] m",
        f"{whole('size', B, H, S, 1)} {whole('zero', 0)} {whole('end', -1)} {SCORES} d = Add (p, m)"
        " e = Expand (z, size) j = Concat <axis=-1> (d, e) h = ReduceMax <keepdims=1> (j, end) x = Sub (j, h)"
        " b = Softmax <axis=-1> (x) a = Slice (b, zero, end, end) y = MatMul (a, v)",
        {"z": SINK, "m": BIAS}, attention(Q, KEYS, VALUES, BIAS, z=SINK),
    ),
    "one axis for texts and heads": (
        "float[batches,query,8] q, float[batches,total,8] k, float[batches,total,8] v",
        f"kt = Transpose <perm=[0,2,1]> (k) x = MatMul (q, kt) {END}",
        {"q": Q[:, 0], "k": KEYS[:, 0], "v": VALUES[:, 0]}, attention(Q[:, :1], KEYS[:, :1], VALUES[:, :1])[:, 0],
    ),
    "heads that are repeated for groups": (
        "float[2,4,3,8] q, float[2,2,5,8] g, float[2,2,5,8] w",
        f"{REPEATED} {SCORES} x = Identity (p) {END}",
        {"g": FEW_KEYS, "w": FEW_VALUES}, attention(Q, FEW_KEYS, FEW_VALUES),
    ),
    "products as Einsum": (
        OPERANDS,
        'x = Einsum <equation="bhid,bhjd->bhij"> (q, k) a = Softmax <axis=-1> (x)'
        ' y = Einsum <equation="bhij,bhjd->bhid"> (a, v)',
        {}, attention(Q, KEYS, VALUES),
    ),
}  # fmt: skip


def core(name: str) -> tuple[ir.Model, dict[str, Array], Array]:
    inputs, body, feeds, wanted = CORES[name]
    known = {"q": Q, "k": KEYS, "v": VALUES, **feeds}
    sizes = "float[batches,query,8] y" if wanted.ndim == 3 else "float[batch,4,query,8] y"
    model = model_of(inputs, sizes, body)
    return model, {value.name: known[value.name] for value in model.graph.inputs}, wanted


@pytest.mark.parametrize("name", CORES)
def test_core_is_one_operation(name: str) -> None:
    model, feeds, wanted = core(name)
    before = run(model, feeds)[0]
    found = lower(model)
    assert [(c.operation, c.reason) for c in found.cores] == [("Attention", "")]
    assert "Softmax" not in kinds(model) and kinds(model).count("Attention") == 1
    after = run(model, feeds)[0]
    assert near(before, wanted) and near(after, wanted)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.attributes["scale"] = ir.AttrFloat32("scale", attention.attributes["scale"].as_float() * 1.01)
    assert not near(run(model, feeds)[0], wanted), "what is wrong is seen"


def test_groups_read_the_heads_that_there_are() -> None:
    model, _, _ = core("heads that are repeated for groups")
    lower(model)
    node = next(node for node in model.graph if node.op_type == "Attention")
    assert [v.name for v in node.inputs[:3]] == ["q", "g", "w"] and "Expand" not in kinds(model)


REFUSED = {
    "its probabilities go through Mul": (
        f"{OPERANDS}, float[1] h", f"{SCORES} b = Softmax <axis=-1> (p) a = Mul (b, h) y = MatMul (a, v)",
    ),
    "its probabilities are read by more than its product with values": (
        f"{OPERANDS}", f"{SCORES} a = Softmax <axis=-1> (p) z = MatMul (a, v) r = MatMul (a, z) y = Add (z, r)",
    ),
    "its scores are multiplied by something computed": (
        f"{OPERANDS}, float[batch,1,query,total] h", f"{SCORES} x = Mul (p, h) {END}",
    ),
    "something is added to its scores before they are capped": (
        f"{OPERANDS}, float[batch,1,query,total] h",
        f"{number('c', 2.0)} {SCORES} d = Add (p, h) e = Div (d, c) t = Tanh (e) x = Mul (t, c) {END}",
    ),
    "a condition puts something into its scores that hides nothing": (
        f"{OPERANDS}, bool[batch,1,query,total] h", f"{number('f', -1.0)} {SCORES} x = Where (h, p, f) {END}",
    ),
    "Exp stands between its product and its softmax": (OPERANDS, f"{SCORES} x = Exp (p) {END}"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_core_stays_in_pieces(reason: str) -> None:
    inputs, body = REFUSED[reason]
    model = model_of(inputs, "float[batch,4,query,8] y", body)
    found = lower(model)
    assert [(c.operation, c.reason) for c in found.cores] == [("pieces", reason)]
    assert "Softmax" in kinds(model) and "Attention" not in kinds(model)


ROTATED = (
    f"{whole('one', 1)} {whole('zero', 0)} {whole('half', 4)} {whole('end', 8)} {whole('last', 3)}"
    "f = Concat <axis=-1> (t, t) cf = Cos (f) sf = Sin (f) c = Unsqueeze (cf, one) s = Unsqueeze (sf, one)"
    "a = Slice (x, zero, half, last, one) b = Slice (x, half, end, last, one)"
)


@pytest.mark.parametrize("texts", [1, B])
def test_rotation_is_one_operation(texts: int) -> None:
    """Angles of each text, or the same for all."""
    body = f"{ROTATED} n = Neg (b) r = Concat <axis=-1> (n, a) xc = Mul (x, c) rs = Mul (r, s) y = Add (xc, rs)"
    angles = f"float[{'batch' if texts > 1 else 1},query,4] t"
    model = model_of(f"float[batch,4,query,8] x, {angles}", "float[batch,4,query,8] y", body)
    x, t = drawn(B, H, S, D), drawn(texts, S, D // 2)
    first, second, cos, sin = x[..., :4], x[..., 4:], np.cos(t)[:, None], np.sin(t)[:, None]
    wanted = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    lower(model)
    assert kinds(model).count("RotaryEmbedding") == 1 and "Neg" not in kinds(model)
    assert near(run(model, {"x": x, "t": t})[0], wanted)


def test_turn_the_other_way_is_no_rotation() -> None:
    body = f"{ROTATED} n = Neg (a) r = Concat <axis=-1> (b, n) xc = Mul (x, c) rs = Mul (r, s) y = Add (xc, rs)"
    model = model_of("float[batch,4,query,8] x, float[batch,query,4] t", "float[batch,4,query,8] y", body)
    lower(model)
    assert "RotaryEmbedding" not in kinds(model)


def test_norms_add_what_they_are_of() -> None:
    """An RMS norm in pieces of a sum, and a layer norm of a map's output, its bias and the residual stream."""
    body = (
        f"{number('two', 2.0)} {whole('last', -1)} {number('eps', 1e-5)} h = Add (x, r) p = Pow (h, two)"
        " m = ReduceMean <keepdims=1, noop_with_empty_axes=0> (p, last) e = Add (m, eps) q = Sqrt (e)"
        " i = Reciprocal (q)"
        " n = Mul (h, i) y = Mul (g, n) z = Add (x, b) w = Add (z, r)"
        " l = LayerNormalization <axis=-1, epsilon=0.001> (w, g, c)"
    )
    model = model_of(
        "float[batch,query,8] x, float[batch,query,8] r, float[8] g, float[8] c, float[8] b",
        "float[batch,query,8] y, float[batch,query,8] h, float[batch,query,8] l", body,
    )  # fmt: skip
    x, r, g, c, b = drawn(B, S, D), drawn(B, S, D, seed=1), drawn(D), drawn(D, seed=1), drawn(D, seed=2)
    lower(with_weights(model, {"g": g, "c": c, "b": b}))
    assert sorted(kinds(model)) == ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"]
    total, biased = (x + r).astype(np.float64), (x + r + b).astype(np.float64)
    centred = biased - biased.mean(-1, keepdims=True)
    rms = g * total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5)
    norm = g * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) + c
    assert all(near(f, w) for f, w in zip(run(model, {"x": x, "r": r}), (rms, total, norm), strict=True))


GRID = (
    f"zero = Constant <value = int64 {{0}}> () one = Constant <value = int64 {{1}}> () {whole('last', -1)}"
    f"{whole('three', 1, 2, 3)} {whole('front', 0, 1, 2)}"
    "bs = Shape <start=0, end=1> (m) b0 = Squeeze (bs) ts = Shape <start=1, end=2> (m) t0 = Squeeze (ts)"
)


@pytest.mark.parametrize("start", ["zero", "one"])
def test_mask_looked_up_everywhere_is_the_mask(start: str) -> None:
    """And one that is looked up from its second key on is not."""
    body = (
        f"{GRID} br = Range (zero, b0, one) tr = Range ({start}, t0, one) bu = Unsqueeze (br, three)"
        " tu = Unsqueeze (tr, front) mx = Max (bu, tu) sh = Shape (mx) be = Expand (bu, sh) te = Expand (tu, sh)"
        " bi = Unsqueeze (be, last) ti = Unsqueeze (te, last) ix = Concat <axis=-1> (bi, ti) y = GatherND (m, ix)"
    )
    model = model_of("bool[batch,total] m", "bool[batch,1,1,total] y", body)
    shapes = {"br": ["batch"], "tr": ["total"], "bu": ["batch", 1, 1, 1], "tu": [1, 1, 1, "total"],
              **dict.fromkeys(("be", "te"), [None] * 4), **dict.fromkeys(("bi", "ti"), [None] * 4 + [1])}  # fmt: skip
    for node in model.graph:
        for value in node.outputs:
            if value.name in shapes:
                value.shape = ir.Shape(shapes[value.name])
    m = drawn(B, T) > 0
    before = run(model, {"m": m})[0]
    lower(model)
    assert ("GatherND" in kinds(model)) == (start == "one")
    assert (run(model, {"m": m})[0] == before).all()


def test_heads_lie_side_by_side_and_the_cache_is_the_operation_s_own() -> None:
    parts = "".join(
        f"{n}r = Reshape ({n}, {sizes}) {n}t = Transpose <perm=[0,2,1,3]> ({n}r)"
        for n, sizes in (("q", "many"), ("k", "few"), ("v", "few"))
    )
    body = (
        f"{whole('many', 0, 0, 4, 8)} {whole('few', 0, 0, 2, 8)} {whole('flat', 0, 0, 32)} {parts}"
        f"{whole('two', 2)} gk = Concat <axis=2> (pk, kt) gv = Concat <axis=-2> (pv, vt) {repeated('gk', 'kw')}"
        f"{repeated('gv', 'vw')} kx = Transpose <perm=[0,1,3,2]> (kw) x = MatMul (qt, kx) a = Softmax <axis=-1> (x)"
        " h = MatMul (a, vw) ht = Transpose <perm=[0,2,1,3]> (h) y = Reshape (ht, flat)"
    )
    model = model_of(
        "float[batch,query,32] q, float[batch,query,16] k, float[batch,query,16] v,"
        " float[batch,2,past,8] pk, float[batch,2,past,8] pv",
        "float[batch,query,32] y, float[batch,2,total,8] gk, float[batch,2,total,8] gv",
        body,
    )  # fmt: skip
    for node in model.graph:  # sizes that the exporter knows
        if node.outputs[0].name in ("kw", "vw"):
            node.outputs[0].shape = ir.Shape(["batch", 4, "total", 8])
        if node.op_type == "Unsqueeze":
            node.outputs[0].shape = ir.Shape(["batch", 2, 1, "total", 8])
    feeds = {"q": drawn(B, S, 32), "k": drawn(B, S, 16), "v": drawn(B, S, 16, seed=1), "pk": drawn(B, 2, 4, 8),
             "pv": drawn(B, 2, 4, 8, seed=1)}  # fmt: skip
    lower(model)
    assert kinds(model) == ["Attention"]
    heads = {n: feeds[n].reshape(B, S, -1, D).swapaxes(1, 2) for n in "qkv"}
    keys, values = (np.concatenate([feeds[f"p{n}"], heads[n]], 2) for n in "kv")
    wanted = attention(heads["q"], keys, values).swapaxes(1, 2).reshape(B, S, 32)
    found = run(model, feeds)
    assert near(found[0], wanted) and (found[1] == keys).all() and (found[2] == values).all()


def repeated(source: str, name: str) -> str:
    """Two heads as four."""
    return (
        f"{name}u = Unsqueeze ({source}, two) {whole(f'{name}w', 1, 1, 2, 1, 1)} {name}e = Expand ({name}u, {name}w)"
        f"{whole(f'{name}s', 0, 4, -1, 8)} {name} = Reshape ({name}e, {name}s)"
    )


def test_map_reads_its_weight_as_it_lies() -> None:
    model = model_of("float[batch,query,8] x, float[6,8] w", "float[batch,query,6] y",
                     "t = Transpose <perm=[1,0]> (w) y = MatMul (x, t)")  # fmt: skip
    weight, x = drawn(6, D), drawn(B, S, D)
    lower(with_weights(model, {"w": weight}))
    assert kinds(model) == ["FusedMatMul"]
    assert near(run(model, {"x": x})[0], x.astype(np.float64) @ weight.T)


def test_record_says_what_became_of_a_graph() -> None:
    model, _, _ = core("a scale after the product")
    found = lower(model)
    assert isinstance(found, Lowering) and found.after == len(model.graph) < found.before
    assert found.record()["cores"] == [{"site": "a", "operation": "Attention"}]
