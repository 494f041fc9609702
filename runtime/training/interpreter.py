"""The torch interpreter: formulas over tensors, differentiable. Training and the reference run on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from peltc.compiler.interpreters.numeric import EPSILON, HIDDEN, PASSING, OneHot, butterfly_order, looked_up
from peltc.spec.formula.functions import SCOPES
from peltc.spec.formula.interpreter import FormulaError, Interpreter

Tensor = torch.Tensor


class TorchInterpreter(Interpreter[Any]):
    """Evaluates formulas over torch tensors.

    Args:
        training: whether functions with two meanings (`dropout`, `choose`, `top_k_mask`) take that of training.
        like: gives new tensors their type and device.
        drawn: what was drawn already, by what the draw is for (a `site`, a `layer`), then by what is drawn together;
            shared by definitions that draw once.
    """

    def __init__(
        self, training: bool = False, like: Tensor | None = None, drawn: Mapping[str, dict[Any, Tensor]] | None = None
    ):
        self.training, self.like = training, like
        self.drawn: Mapping[str, dict[Any, Tensor]] = {scope: {} for scope in SCOPES} if drawn is None else drawn

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        if any(isinstance(value, OneHot) for value in arguments.values()):
            return self.lookup(name, arguments)
        if name in ("dropout", "choose", "top_k_mask", "eye", "zeros", "ones"):
            return getattr(self, name)(**arguments)
        if name not in _MEANING:
            raise FormulaError(f"'{name}' works on options and sizes, not on tensors")
        return _MEANING[name](**arguments)

    def lookup(self, name: str, arguments: dict[str, Any]) -> Any:
        """A function of one-hot vectors, given as ids: the ids pick rows of a matrix. Dropout leaves the vectors as
        they are, since a single feature of a one-hot vector means nothing before a matrix turns it into a row."""
        if name in PASSING:
            return arguments["x"]
        padding = next((v.padding for v in arguments.values() if isinstance(v, OneHot)), None)
        found, bias = looked_up(name, arguments, lambda matrix, ids: F.embedding(ids, matrix, padding))
        return found if bias is None else found + bias

    def dropout(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p, self.training)

    def choose(self, stack: Tensor, draw: Any, scope: str) -> Tensor:
        if not self.training:
            return stack.mean(0)
        key, drawn = (draw, len(stack)), self.drawn[scope]
        if key not in drawn:  # what is drawn together is the same expert of each
            drawn[key] = torch.randint(len(stack), (1,), device=stack.device)
        return stack.index_select(0, drawn[key].to(stack.device)).squeeze(0)

    def top_k_mask(self, z: Tensor, k: int) -> Tensor:
        order = torch.argsort(z, dim=-1, descending=True, stable=True)[..., :k]
        hard = torch.zeros_like(z).scatter(-1, order, 1.0)
        return hard + (z - z.detach()) if self.training else hard

    def eye(self, n: int) -> Tensor:
        return torch.eye(n, **self.kind())

    def zeros(self, shape: list[int]) -> Tensor:
        return torch.zeros(shape, **self.kind())

    def ones(self, shape: list[int]) -> Tensor:
        return torch.ones(shape, **self.kind())

    def kind(self) -> dict[str, Any]:
        return {} if self.like is None else {"dtype": self.like.dtype, "device": self.like.device}


_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda x: x,
}  # fmt: skip


def _apply(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def _skew(x: Tensor, n: int) -> Tensor:
    rows, columns = torch.triu_indices(n, n, 1, device=x.device)
    upper = x.new_zeros(*x.shape[:-1], n, n)
    upper[..., rows, columns] = x
    return upper - upper.transpose(-1, -2)


def _block_diagonal(x: Tensor) -> Tensor:
    result: Tensor = torch.block_diag(*x)  # type: ignore[no-untyped-call]
    return result


def _butterfly(x: Tensor) -> Tensor:
    product: Tensor = torch.eye(x.shape[1] * x.shape[2], dtype=x.dtype, device=x.device)
    for level, blocks in enumerate(x):
        order = torch.from_numpy(butterfly_order(len(product), x.shape[2], level)).to(x.device)
        product = _block_diagonal(blocks)[order][:, order] @ product
    return product


def _orthonormal(x: Tensor) -> Tensor:
    q, r = torch.linalg.qr(x.double())
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    columns: Tensor = q * signs[..., None, :]
    return columns.to(x.dtype)


def _circulant(x: Tensor) -> Tensor:
    index = torch.arange(x.shape[-1], device=x.device)
    return x[..., (index[None, :] - index[:, None]) % len(index)]


def _scatter(values: Tensor, places: Tensor, shape: list[int]) -> Tensor:
    rows, columns = places.long().unbind(-1)
    if not ((rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])).all():
        raise FormulaError(f"the places are not all rows and columns of a matrix {shape}")
    return values.new_zeros(shape).index_put((rows, columns), values)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None] <= 0, HIDDEN)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, HIDDEN)
    return torch.softmax(scores, -1) @ v


def _mean_seq(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean(1, keepdim=True)
    weights = mask.reshape(*mask.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    return (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def _indices(index: list[int], like: Tensor) -> Tensor:
    return torch.tensor(index, device=like.device)


def _put(x: Tensor, values: Tensor, index: list[int], axis: int) -> Tensor:
    return x.index_copy(axis, _indices(index, x), values)


def _concat(tensors: list[Tensor], axis: int) -> Tensor:
    rank = max(t.dim() for t in tensors)
    lead = next(t.shape for t in tensors if t.dim() == rank)
    full = [t if t.dim() == rank else t.expand(*lead[: rank - t.dim()], *t.shape) for t in tensors]
    return torch.cat(full, axis)


_MEANING: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b, "power": lambda a, b: a**b, "negate": lambda x: -x, "matmul": lambda a, b: a @ b,
    "linear": lambda x, weight, bias: F.linear(x, weight, bias),
    "einsum": lambda operands, equation: torch.einsum(equation, *operands),
    "kron": lambda a, b: torch.kron(a.contiguous(), b.contiguous()), "inverse": lambda x: torch.linalg.inv(x),
    "skew": _skew, "block_diagonal": lambda x: _block_diagonal(x), "butterfly": _butterfly, "orthonormal": _orthonormal,
    "upper": lambda x: torch.triu(x, 1), "circulant": _circulant, "scatter": _scatter,
    "inverse_fourier": lambda x: torch.fft.ifft2(x).real,
    "norm2": lambda x, axis: torch.linalg.vector_norm(x, dim=axis, keepdim=True),
    **{name: partial(_apply, f) for name, f in _ACTIVATION.items()},
    "activation": lambda x, name: _ACTIVATION[name](x),
    "exp": lambda x: torch.exp(x), "log": lambda x: torch.log(x), "sqrt": lambda x: torch.sqrt(x),
    "abs": lambda x: torch.abs(x), "cos": lambda x: torch.cos(x), "sin": lambda x: torch.sin(x),
    "softmax": lambda x, axis: torch.softmax(x, axis), "detach": lambda x: x.detach(),
    "mean": lambda x, axis: x.mean(axis, keepdim=True), "sum": lambda x, axis: x.sum(axis, keepdim=True),
    "layer_norm": lambda x, gain, bias: F.layer_norm(x, x.shape[-1:], gain, bias, EPSILON), "attend": _attend,
    "running_sum": lambda x, axis: torch.cumsum(x, axis),
    "mean_seq": _mean_seq, "reshape": lambda x, shape: x.reshape(shape), "transpose": lambda x: x.transpose(-1, -2),
    "permute": lambda x, axes: x.permute(axes), "concat": _concat,
    "take": lambda x, index, axis: x.select(axis, index),
    "slice": lambda x, start, stop, axis: x.narrow(axis, start, stop - start),
    "unsqueeze": lambda x, axis: x.unsqueeze(axis), "put": _put,
    "pick": lambda x, index, axis: x.index_select(axis, _indices(index, x)),
}  # fmt: skip
