"""The functions of the method language: names, parameters and meanings, in one table.

What each means on shapes, tensors, affine maps and graph values is told by the interpreters; a function stands here
once, with its signature. Axes count from the end (`axis=-1`), so that leading batch dimensions never matter.
Letters: `...` any leading dimensions, `I`/`O` inputs and outputs of a linear map, `S` sequence, `P` prefix length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REQUIRED = object()


@dataclass(frozen=True)
class Function:
    """A function's signature: `parameters` maps names to defaults, in order; `variadic` takes any number of tensors.
    `doc` says in a line what it means, `gives` which shape its result has."""

    name: str
    doc: str
    gives: str
    parameters: tuple[tuple[str, Any], ...]
    variadic: bool = False

    def bind(self, values: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name.

        Raises:
            TypeError: too many, missing, or unknown arguments.
        """
        named = [name for name, _ in self.parameters]
        bound: dict[str, Any] = {}
        if self.variadic:
            leading = [n for n in named[1:] if dict(self.parameters)[n] is REQUIRED]
            bound = dict(zip(leading, values, strict=False))
            bound[named[0]] = values[len(leading) :]
            if not bound[named[0]]:
                raise TypeError(f"{self.signature} needs at least one tensor")
        else:
            if len(values) > len(named):
                raise TypeError(f"{self.signature} takes at most {len(named)} arguments, not {len(values)}")
            bound = dict(zip(named, values, strict=False))
        for key, value in options.items():
            if key not in named or key in bound:
                raise TypeError(f"{self.signature} takes no argument '{key}' here")
            bound[key] = value
        for key, default in self.parameters:
            if key not in bound:
                if default is REQUIRED:
                    raise TypeError(f"{self.signature} lacks its argument '{key}'")
                bound[key] = default
        return bound

    @property
    def signature(self) -> str:
        """`linear(x, weight, bias=None)`."""
        first = 1 if self.variadic else 0
        required = [name for name, default in self.parameters[first:] if default is REQUIRED]
        optional = [f"{name}={default!r}" for name, default in self.parameters[first:] if default is not REQUIRED]
        many = [f"*{self.parameters[0][0]}"] if self.variadic else []
        return f"{self.name}({', '.join([*required, *many, *optional])})"


def _function(name: str, doc: str, gives: str, *parameters: str | tuple[str, Any], variadic: bool = False) -> Function:
    full = tuple((p, REQUIRED) if isinstance(p, str) else p for p in parameters)
    return Function(name, doc, gives, full, variadic)


BOTH, SAME, NUMBER, TRUTH = "that of a and b, broadcast", "that of x", "a number", "true or false"
REDUCED = "that of x, 1 along the axis"


_TABLE = [
    # operators
    *(_function(name, f"elementwise, broadcasting: a {sign} b", BOTH, "a", "b") for name, sign in [
        ("add", "+"), ("subtract", "-"), ("multiply", "*"), ("divide", "/"), ("power", "**"),
    ]),
    *(_function(name, f"of known numbers: a {sign} b", NUMBER, "a", "b") for name, sign in [
        ("floor_divide", "//"), ("modulo", "%"),
    ]),
    *(_function(name, f"of known values: a {sign} b", TRUTH, "a", "b") for name, sign in [
        ("equal", "=="), ("not_equal", "!="), ("less", "<"),
        ("less_equal", "<="), ("greater", ">"), ("greater_equal", ">="), ("and", "and"), ("or", "or"),
    ]),
    _function("negate", "-x", SAME, "x"),
    _function("not", "not x", TRUTH, "x"),
    _function("min", "the smaller of two known numbers", NUMBER, "a", "b"),
    _function("max", "the larger of two known numbers", NUMBER, "a", "b"),
    _function("floor", "the largest whole number that is not above a known number", NUMBER, "x"),
    _function("matmul", "matrix product over the last two axes, a [..., M, K] and b [..., K, N]: a @ b", "[..., M, N]",
              "a", "b"),
    # linear algebra
    _function("linear", "x Wᵀ + b: x [..., I], weight [O, I], bias [O]", "[..., O]", "x", "weight", ("bias", None)),
    _function("einsum", "Einstein summation: einsum('ij,jk->ik', a, b)", "as the equation says",
              "operands", "equation", variadic=True),
    _function("kron", "Kronecker product of a [A, B] and b [C, D]", "[A*C, B*D]", "a", "b"),
    _function("inverse", "inverse of square matrices [..., N, N]", SAME, "x"),
    _function("eye", "the identity matrix", "[n, n]", "n"),
    _function("skew", "skew-symmetric matrices: vectors [..., n(n-1)/2] above the diagonal, in row order",
              "[..., n, n]", "x", "n"),
    _function("block_diagonal", "a matrix with the K blocks of x [K, A, B] on its diagonal", "[K*A, K*B]", "x"),
    _function("butterfly", "the product of M factors, the last one leftmost: each has K blocks of x [M, K, A, A] on its"
              " diagonal, and from factor to factor the halves of blocks that meet lie twice as far apart",
              "[K*A, K*A]", "x"),
    _function("upper", "what lies above the diagonal of x [..., N, N], zeros elsewhere", SAME, "x"),
    _function("orthonormal", "the columns of x [..., M, N] made orthogonal to those before them and of length 1, by"
              " Gram-Schmidt; M is at least N", SAME, "x"),
    _function("circulant", "matrices of a first row x [..., N]; each other row is the one above, turned right by one",
              "[..., N, N]", "x"),
    _function("scatter", "the values [n] at places [n, 2], each a row and a column, of a matrix that is 0 elsewhere",
              "[M, N]", "values", "places", "shape"),
    _function("inverse_fourier", "the real part of the inverse Fourier transform over the last two axes", SAME, "x"),
    _function("norm2", "Euclidean norm along an axis, which stays with size 1", REDUCED, "x", ("axis", -1)),
    # elementwise
    *(_function(name, doc, SAME, "x") for name, doc in [
        ("relu", "max(x, 0)"), ("gelu", "x Φ(x), with erf"), ("gelu_tanh", "the tanh approximation of gelu"),
        ("silu", "x σ(x), also called swish"), ("tanh", "tanh"), ("sigmoid", "σ(x) = 1 / (1 + e⁻ˣ)"),
        ("exp", "eˣ"), ("log", "natural logarithm"), ("sqrt", "√x"), ("abs", "|x|"), ("identity", "x"),
        ("cos", "cosine"), ("sin", "sine"),
    ]),
    _function("activation", "one of relu, gelu, gelu_tanh, silu, tanh, sigmoid, identity, by name", SAME, "x", "name"),
    _function("softmax", "softmax along an axis", SAME, "x", ("axis", -1)),
    _function("detach", "x; no gradient flows through it in training", SAME, "x"),
    _function("dropout", "dropout with probability p in training, x otherwise", SAME, "x", "p"),
    _function("layer_norm", "(x - mean) / √(variance + 1e-5) over the last axis, times a gain, plus a bias",
              SAME, "x", ("gain", None), ("bias", None)),
    _function("attend", "softmax(q kᵀ / √E) v: q [B, S, E], k [B, T, E], v [B, T, F]; a mask [B, T] hides keys,"
              " `causal` those that come later", "[B, S, F]", "q", "k", "v", ("mask", None), ("causal", False)),
    # reductions; the reduced axis stays with size 1
    _function("mean", "mean along an axis, which stays with size 1", REDUCED, "x", ("axis", -1)),
    _function("sum", "sum along an axis, which stays with size 1", REDUCED, "x", ("axis", -1)),
    _function("running_sum", "each element with those before it along an axis, added up", SAME, "x", ("axis", -1)),
    _function("mean_seq", "mean of x [B, S, ...] over the sequence; with a mask [B, S], over its ones only",
              "[B, 1, ...]", "x", ("mask", None)),
    # layout
    _function("reshape", "the same elements in another shape; only for tensors known at compile time", "shape",
              "x", "shape"),
    _function("transpose", "swaps the last two axes of x [..., M, N]", "[..., N, M]", "x"),
    _function("permute", "reorders all axes: permute(x, [1, 0, 2])", "that of x, reordered", "x", "axes"),
    _function("concat", "joins along an axis; tensors of lower rank repeat over the leading axes",
              "that of the tensors, sizes added along the axis", "tensors", ("axis", -1), variadic=True),
    _function("take", "the index-th slice along an axis, which goes", "that of x without the axis",
              "x", "index", ("axis", 0)),
    _function("slice", "x from start up to stop along an axis", "that of x, stop - start along the axis",
              "x", "start", "stop", ("axis", -1)),
    _function("pick", "slices along an axis, by a list of their indices",
              "that of x, as many along the axis as the list has", "x", "index", ("axis", 0)),
    _function("put", "x with other slices along an axis, at a list of indices", SAME,
              "x", "values", "index", ("axis", 0)),
    _function("length", "how many a list has", NUMBER, "items"),
    _function("unsqueeze", "a new axis of size 1 at the place", "that of x with the axis", "x", ("axis", -1)),
    _function("zeros", "zeros of a shape", "shape", "shape"),
    _function("ones", "ones of a shape", "shape", "shape"),
    # one meaning in training, another in deployment
    _function("choose", "a random index of the first axis in training (draw j; of the `site`, or of all sites of an"
              " attachment in a `layer`), the mean over it in deployment", "that of the stack without its first axis",
              "stack", ("draw", 0), ("scope", "site")),
    _function("top_k_mask", "1 at the k largest along the last axis, lowest index first among equals, 0 elsewhere;"
              " straight-through gradient in training", "that of z", "z", "k"),
]  # fmt: skip

FUNCTIONS: dict[str, Function] = {function.name: function for function in _TABLE}

SCOPES = ("site", "layer")
"""What one draw of `choose` may be for."""

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "identity")

COMPILE_TIME = frozenset({
    "kron", "inverse", "skew", "block_diagonal", "butterfly", "orthonormal", "circulant", "scatter", "inverse_fourier",
    "reshape", "choose", "top_k_mask",
})  # fmt: skip
"""Functions of tensors whose sizes are known at compile time: none of them takes what depends on the input, and of all
but `reshape`, which also takes a weight that stays in the graph, the deployed graph has no form."""
