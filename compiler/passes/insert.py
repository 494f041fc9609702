"""Insertion: claims that are not absorbed become nodes beside, before or after the values of their sites.

    linear     y ──────────► y + delta(x, y)         block     y ──► y + delta(x, y, r, norm)
    attention  k ──► concat(more, k)                 mask ──► mask that shows the new positions

Every node carries `pelt.attachment`, `pelt.method` and `pelt.site` in its metadata; taking out what is so marked
gives the base graph back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.graphs.flow import last_size
from peltc.compiler.graphs.wide import HALF
from peltc.compiler.interpreters.emitter import Emitter, clone_between, replace_uses
from peltc.compiler.interpreters.numeric import NumericInterpreter, OneHot
from peltc.compiler.interpreters.onnx import OnnxInterpreter
from peltc.compiler.plan.claims import LEVELS, Claim
from peltc.compiler.survey.anatomy import Rows, Site
from peltc.spec.diagnostics import fail
from peltc.spec.formula.interpreter import Deferred
from peltc.spec.formula.syntax import Call, Expr, Name, names
from peltc.spec.method import ROLES, RUNTIME_NAMES

Array = np.ndarray[Any, Any]
Around = tuple[int, int]
"""How many positions stand before the text's own, and behind them."""
MASK_STEPS = {"Cast", "Not", "Identity", "Mul", "Sub", "Unsqueeze"}


def insert(
    model: ir.Model, claims: Iterable[Claim], sites: Mapping[str, Site], tensors: Mapping[str, Array]
) -> dict[str, Array]:
    """Write claims into a graph, in place.

    Args:
        sites: the graph's own sites by key.
        tensors: the adapter's tensors by name.

    Returns:
        In a graph with a cache of keys and values, what each cache begins with [1, H, P, Dh], by its input's name: keys
        and values that stand before the text's are there before the first token.
    """
    inserter = _Inserter(model, tensors)
    groups: dict[str, list[Claim]] = {}
    for claim in claims:  # the plan was made on the graph of token ids, whose values have other names
        groups.setdefault(claim.site.key, []).append(replace(claim, site=sites[claim.site.key]))
    ordered = sorted(groups, key=lambda key: (LEVELS[sites[key].kind], sites[key].role == "layer"))
    for key in ordered:
        getattr(inserter, sites[key].kind)(sites[key], groups[key])
    inserter.count_text()
    model.graph.sort()
    return inserter.starts


class _Inserter:
    def __init__(self, model: ir.Model, tensors: Mapping[str, Array]):
        self.graph, self.tensors = model.graph, tensors
        self.values: dict[str, ir.Value] = {v.name: v for v in model.graph.inputs if v.name}
        for node in model.graph:
            self.values |= {v.name: v for v in node.outputs if v.name}
        self.replaced: dict[ir.Value, ir.Value] = {}
        self.weights: dict[str, ir.Value] = {}
        self.biased: dict[str, Any] = {}  # what claims make of the bias of a map that has none
        self.kept: set[ir.Node] = set()  # nodes that go on reading the values which claims replace
        self.extended: dict[tuple[ir.Value, ir.Value, Around], ir.Value] = {}
        self.starts: dict[str, Array] = {}
        self.caches: dict[ir.Value, ir.Value] = {}

    def emitter(self, claim: Claim, like: ir.Value) -> Emitter:
        dtype = like.dtype or ir.DataType.FLOAT
        return Emitter(self.graph, dtype, f"pelt.{claim.attachment}.{claim.site.name}", claim.marks)

    def current(self, name: str) -> ir.Value:
        """A graph value as it is by now, claims made before included."""
        value = self.values[name]
        while value in self.replaced:
            value = self.replaced[value]
        return value

    def scope(self, claim: Claim, interpreter: OnnxInterpreter, **values: Any) -> dict[str, Any]:
        """What the claim's formulas may read; runtime values of the site by name."""
        found: dict[str, Any] = {"mask": Deferred(partial(self.mask, claim, interpreter))}
        for role in ("x", "y", "r", "h", "q", "k", "v"):
            if claim.site.values.get(role):
                found[role] = Deferred(partial(self.current, claim.site.values[role]))
        own = {name: self.tensors[t.name] for name, t in claim.tensors.items()}
        return claim.scope(found | values | own, interpreter)  # a parameter may have a name of other kinds of site

    def mask(self, claim: Claim, interpreter: OnnxInterpreter) -> ir.Value:
        """The mask of the tokens that a site sees, [B, S], as numbers: ones where the graph takes none."""
        site = claim.site
        behind = site.stack == "decoder" and "decoder_input_ids" in self.values and not site.reads_encoder
        given = self.values.get("decoder_attention_mask" if behind else "attention_mask")
        emitter = interpreter.emitter
        if given is None:
            x = self.current(site.values["x"])
            if x.shape is None or len(x.shape) < 3:
                raise fail("E208", f"this model takes no attention mask, and a formula reads `mask` at {site.name},"
                                   " whose tokens stand in one row")  # fmt: skip
            lead = emitter.node("Shape", [x], {"start": 0, "end": 2})
            return emitter.node("Expand", [emitter.constant(np.ones((), np.float32)), lead])
        return emitter.node("Cast", [given], {"to": emitter.dtype.value})

    def evaluate(self, claim: Claim, effect: str, like: ir.Value, **values: Any) -> tuple[Any, OnnxInterpreter]:
        interpreter = OnnxInterpreter(self.emitter(claim, like))
        own = self.parameters(claim.site, interpreter.emitter) if claim.method.site in ("linear", "norm") else {}
        found = interpreter.evaluate(claim.effects[effect], self.scope(claim, interpreter, **{**own, **values}))
        if effect in ("input", "output"):
            found = filled(claim, effect, found, like, interpreter)
        return found, interpreter

    def write(self, old: ir.Value, new: ir.Value, keep: set[ir.Node]) -> None:
        """Let everything downstream read `new` instead of `old`."""
        new.shape = old.shape
        new.type = old.type
        replace_uses(old, new, keep | self.kept, self.graph)
        self.replaced[old] = new

    # sites

    def linear(self, site: Site, claims: list[Claim]) -> None:
        """Inputs first, then weights and biases, then what is added to or made of the output."""
        product = self.values[site.values["product"]].producer()
        assert product is not None
        if claims[0].mirrors is not None:
            self.mirror(claims, product)
            return
        site, claims = self.joined(site, claims)
        x = self.current(site.values["x"])
        start, apart = x, False
        for claim in claims:
            if "input" in claim.effects:
                value, interpreter = self.evaluate(claim, "input", x, x=x)
                x = interpreter.value(value)
                if site.rows is None:
                    source = product.inputs[0]
                    assert source is not None
                    moved = clone_between(start, source, x, interpreter.emitter)
                    product.replace_input_with(0, moved)
                    start = x
                else:
                    apart = True
        for claim in claims:
            if "weight" in claim.effects:
                self.weight(site, claim, product)
        if "bias" in site.parameters:
            self.biases(site, claims, product)
        y = self.current(site.values["y"])
        if apart:
            last = next(c for c in claims if "input" in c.effects)
            emitter = self.emitter(last, y)
            new = emitter.node(
                "MatMul", [x, self.oriented(self.rows(site, self.full_weight(site, emitter), emitter), emitter)]
            )
            bias = site.parameters.get("bias")
            if bias:
                new = emitter.node("Add", [new, self.rows(site, self.weights.get(bias, self.values[bias]), emitter)])
            self.write(y, new, emitter.added)
        if "bias" not in site.parameters:
            self.biases(site, claims, product)
        if any({"delta", "output"} & set(c.effects) and "x" in c.reads for c in claims):
            self.outputs(site, claims, {"x": self.unflattened(x, site, claims[0])})
        else:
            self.outputs(site, claims, {})

    def table(self, site: Site, claims: list[Claim]) -> None:
        """The rows of a table, then what ids pick of it."""
        product = self.values[site.values["product"]].producer()
        assert product is not None
        if claims[0].mirrors is not None:
            self.mirror(claims, product)
            return
        for claim in claims:
            if "weight" in claim.effects:
                self.weight(site, claim, product)
        self.biases(site, claims, product)
        ids = self.values[site.values["x"]]
        self.outputs(site, claims, {"x": OneHot(ids, site.sizes["in"])})

    def mirror(self, claims: list[Claim], product: ir.Node) -> None:
        """Let a map, or another table, have all rows of the table that it is the same tensor as."""
        table = claims[0].mirrors
        assert table is not None
        emitter = self.emitter(claims[0], self.values[table.parameters["weight"]])
        rows = self.oriented(self.full_weight(table, emitter), emitter)
        rows.shape = self.values[table.parameters["weight"]].shape
        zeros = np.zeros(table.sizes["out"], np.float32)
        for claim in (c for c in claims if "bias" in c.effects):
            value, interpreter = self.evaluate(claim, "bias", rows, b=zeros)
            shape, rows = rows.shape, interpreter.value(interpreter.on_add(rows, value))
            rows.shape = shape
        for claim in claims:
            for effect in ("delta", "output"):
                if effect in claim.effects:
                    every = OneHot(None, table.sizes["in"])
                    value, interpreter = self.evaluate(claim, effect, rows, x=every, y=rows)
                    shape, rows = rows.shape, interpreter.value(
                        interpreter.on_add(rows, value) if effect == "delta" else value)  # fmt: skip
                    rows.shape = shape
        if product.op_type == "Gather":
            product.replace_input_with(0, rows)
        else:
            flat = product.op_type == "Gemm" and product.attributes.get_int("transB", 0) == 1
            product.replace_input_with(1, rows if flat else self.oriented(rows, emitter))

    def joined(self, site: Site, claims: list[Claim]) -> tuple[Site, list[Claim]]:
        """The site with its own features, and no others, in one axis. The graph may part a fused map by heads before it
        parts queries from keys, or lay heads out first."""
        name, full = site.values["y"], self.values[site.values["full"]]
        y = self.current(name)
        apart = y.shape is not None and full.shape is not None and len(y.shape) > len(full.shape)
        mixed = site.rows is not None and name == full.name
        if not (apart or mixed) or full.shape is None:
            return site, claims
        emitter = self.emitter(claims[0], y)
        if mixed:
            assert site.rows is not None
            owned = [i for a, b in site.rows for i in range(a, b)]
            extent = last_size(full) or 0
            places = np.arange(extent)
            places[owned] = extent + np.arange(len(owned))
            flat = emitter.node("Gather", [y, emitter.integers(owned)], {"axis": -1})
            both = emitter.node("Concat", [y, flat], {"axis": -1})
            back = emitter.node("Gather", [both, emitter.integers(places.tolist())], {"axis": -1})
            both.shape = back.shape = None
        else:
            lead = [0] * (len(full.shape) - 1)
            flat = emitter.node("Reshape", [y, emitter.integers([*lead, site.sizes["out"]])])
            back = emitter.node("Reshape", [flat, emitter.node("Shape", [y])])
        flat.shape = ir.Shape([*list(full.shape)[:-1], site.sizes["out"]])
        self.write(y, back, emitter.added)
        self.values[flat.name or ""] = flat
        site = replace(site, values={**site.values, "y": flat.name or ""})
        return site, [replace(claim, site=site) for claim in claims]

    def unflattened(self, x: ir.Value, site: Site, claim: Claim) -> ir.Value:
        """The input with the output's leading axes, where the graph flattens tokens before the product."""
        y = self.current(site.values["y"])
        if x.shape is None or y.shape is None or len(x.shape) == len(y.shape):
            return x
        emitter = self.emitter(claim, x)
        lead = emitter.node("Shape", [y], {"start": 0, "end": len(y.shape) - 1})
        shape = emitter.node("Concat", [lead, emitter.integers([site.sizes["in"]])], {"axis": 0})
        self.kept |= emitter.added
        return emitter.node("Reshape", [x, shape])

    def outputs(self, site: Site, claims: list[Claim], values: Mapping[str, Any]) -> None:
        """Definitions of `delta` and `output`."""
        for claim in claims:
            for effect in ("delta", "output"):
                if effect not in claim.effects:
                    continue
                y = self.current(site.values["y"])
                value, interpreter = self.evaluate(claim, effect, y, **{**values, "y": y})
                if effect == "delta":
                    value = interpreter.on_add(y, value)
                self.write(y, interpreter.value(value), interpreter.emitter.added)

    def full_weight(self, site: Site, emitter: Emitter) -> ir.Value:
        """The whole weight as it is by now, [O, I]."""
        name = site.parameters["weight"]
        if name not in self.weights:
            parameter = self.values[name]
            self.weights[name] = self.oriented(parameter, emitter) if site.transposed else parameter
        return self.weights[name]

    @staticmethod
    def oriented(value: ir.Value, emitter: Emitter) -> ir.Value:
        return emitter.node("Transpose", [value], {"perm": [1, 0]})

    @staticmethod
    def rows(site: Site, full: ir.Value, emitter: Emitter) -> ir.Value:
        """The rows that the site owns."""
        if site.rows is None:
            return full
        parts = [_cut(full, a, b, emitter) for a, b in site.rows]
        return parts[0] if len(parts) == 1 else emitter.node("Concat", parts, {"axis": 0})

    def weight(self, site: Site, claim: Claim, product: ir.Node) -> None:
        """A weight computed in the graph from the base's, in float32; ONNX Runtime does so once, at load."""
        parameter = self.values[site.parameters["weight"]]
        emitter = self.emitter(claim, parameter)
        full = self.full_weight(site, emitter)
        if not claim.follows:  # what follows has the same parameters, changed already
            wide = OnnxInterpreter(Emitter(self.graph, ir.DataType.FLOAT, emitter.owner, emitter.marks))
            own = self.parameters(site, wide.emitter)
            W = own["W"]()
            new = wide.evaluate(claim.effects["weight"], self.scope(claim, wide, **own))
            new = filled(claim, "weight", new, W, wide)
            if parameter.dtype in HALF:
                assert parameter.dtype is not None
                new = _cast(new, parameter.dtype, wide.emitter)
            full = self.weights[site.parameters["weight"]] = _assemble(full, site.rows, new, self.extent(site), emitter)
        flat = product.op_type == "Gemm" and product.attributes.get_int("transB", 0) == 1
        place = 0 if site.kind == "table" else 1
        product.replace_input_with(place, full if flat else self.oriented(full, emitter))

    def extent(self, site: Site) -> int:
        """The number of output features of the whole map."""
        shape = self.values[site.parameters["weight"]].shape
        assert shape is not None
        return int(shape[1 if site.transposed else 0])  # type: ignore[arg-type]

    def parameters(self, site: Site, emitter: Emitter) -> dict[str, Deferred]:
        """A map's own weight [O, I] and bias [O] as they are by now, in the type that the emitter computes in; for no
        bias, what claims have made of zeros."""

        def own(role: str) -> Any:
            name = site.parameters.get(role)
            if name is None:
                return self.biased.get(site.key, np.zeros(site.sizes.get("out", site.sizes.get("d", 0)), np.float32))
            if site.kind == "norm":
                return self.weights.get(name, self.values[name])
            full = self.full_weight(site, emitter) if role == "weight" else self.weights.get(name, self.values[name])
            value = self.rows(site, full, emitter)
            if self.values[name].dtype in HALF and emitter.dtype not in HALF:
                value = _cast(value, emitter.dtype, emitter)
            sizes = ("out", "in") if role == "weight" else ("out",)
            value.shape = ir.Shape([site.sizes[size] for size in sizes])
            return value

        return {short: Deferred(partial(own, role)) for role, short in ROLES.items()}

    def biases(self, site: Site, claims: list[Claim], product: ir.Node) -> None:
        """A map's own bias, or a new one, which is added to its output."""
        claims = [claim for claim in claims if "bias" in claim.effects]
        if "bias" in site.parameters or not claims:
            for claim in claims:
                self.bias(site, claim, product)
            return
        y = self.current(site.values["y"])
        added: set[ir.Node] = set()
        for claim in claims:
            interpreter = OnnxInterpreter(self.emitter(claim, y))
            given = self.parameters(site, interpreter.emitter)
            self.biased[site.key] = interpreter.evaluate(claim.effects["bias"], self.scope(claim, interpreter, **given))
            added |= interpreter.emitter.added
        total = interpreter.value(interpreter.on_add(y, self.biased[site.key]))
        self.write(y, total, added | interpreter.emitter.added)

    def bias(self, site: Site, claim: Claim, product: ir.Node) -> None:
        """A map's own bias as a claim defines it."""
        name = site.parameters["bias"]
        emitter = self.emitter(claim, self.current(site.values["y"]))
        interpreter = OnnxInterpreter(emitter)
        full = self.weights.get(name, self.values[name])
        if claim.follows:
            changed = full
        else:
            own = self.parameters(site, emitter)
            new = interpreter.evaluate(claim.effects["bias"], self.scope(claim, interpreter, **own))
            new = filled(claim, "bias", new, own["b"], interpreter)
            changed = self.weights[name] = _assemble(full, site.rows, new, self.extent(site), emitter)
        readers = {product, *(use.node for use in product.outputs[0].uses())}
        for use in tuple((self.values[name] if claim.follows else full).uses()):
            if use.node in readers:
                use.node.replace_input_with(use.idx, changed)

    def norm(self, site: Site, claims: list[Claim]) -> None:
        """A normalisation's gain and bias, or its output."""
        for role in ROLES:
            for claim in claims:
                if role in claim.effects and not claim.follows:  # what follows has the same parameters, changed already
                    parameter = self.weights.get(site.parameters[role], self.values[site.parameters[role]])
                    value, interpreter = self.evaluate(claim, role, parameter)
                    new = filled(claim, role, value, parameter, interpreter)
                    replace_uses(parameter, new, interpreter.emitter.added, self.graph)
                    self.weights[site.parameters[role]] = new
        self.outputs(site, claims, {})

    def block(self, site: Site, claims: list[Claim]) -> None:
        """What follows a sub-layer, before its residual addition."""
        for claim in claims:
            emitter_like = self.current(site.values["y"])

            def norm(z: Any, claim: Claim = claim, like: ir.Value = emitter_like) -> ir.Value:
                interpreter = OnnxInterpreter(self.emitter(claim, like))
                source, target = self.values[site.values["norm_x"]], self.values[site.values["norm_y"]]
                result = clone_between(source, target, interpreter.value(z), interpreter.emitter)
                self.kept |= interpreter.emitter.added
                return result

            for effect in ("delta", "output"):
                if effect in claim.effects:
                    y = self.current(site.values["y"])
                    value, interpreter = self.evaluate(claim, effect, y, y=y, norm=norm)
                    if effect == "delta":
                        value = interpreter.on_add(y, value)
                    self.write(y, interpreter.value(value), interpreter.emitter.added)

    def attention(self, site: Site, claims: list[Claim]) -> None:
        """Keys and values of an attention core, and the mask where they grow longer."""
        made = set[ir.Node]()
        for claim in claims:
            now = {role: self.current(site.values[role]) for role in ("k", "v")}
            around = (0, 0)
            for effect, role in (("keys", "k"), ("values", "v")):
                if effect not in claim.effects:
                    continue
                read = now[role]
                around = claim.added(effect)
                if any(around) and self.begins(claim, effect, role, read):
                    new, emitter = read, self.emitter(claim, read)
                else:
                    value, interpreter = self.evaluate(claim, effect, read, **now)
                    emitter = interpreter.emitter
                    new = interpreter.value(value)
                repeats = site.sizes["heads"] // site.sizes["kv_heads"]
                # The base repeats heads with lengths taken from the input, which are no longer right.
                wide = _repeat_heads(new, site, repeats, emitter) if repeats > 1 else new
                old = self.current(site.values[effect])
                if wide is old:
                    continue
                wide.shape, wide.type = ir.Shape([None, site.sizes["heads"], None, site.sizes["head_dim"]]), old.type
                for use in tuple(old.uses()):  # not a cache of keys, which is the text's, nor what counts its positions
                    if use.node not in made | emitter.added and not _counts(use.node):
                        use.node.replace_input_with(use.idx, wide)
                made |= emitter.added  # what read a value before it was changed goes on reading that
                self.replaced[old] = wide
                if repeats > 1 and new is not read:
                    new.type = read.type
                    new.shape = ir.Shape([None, site.sizes["kv_heads"], None, site.sizes["head_dim"]])
                    self.replaced[read] = new
            if any(around):
                self.widen_mask(site, claim, around)

    def begins(self, claim: Claim, effect: str, role: str, read: ir.Value) -> bool:
        """Let the cache begin with what a claim puts before keys or values, where these are the cached ones and the new
        ones, and the claim depends on nothing that runs."""
        node = read.producer()
        cache = node.inputs[0] if node is not None and node.op_type == "Concat" else None
        if cache is None or not cache.is_graph_input() or cache.shape is None or cache.name is None:
            return False
        if (
            claim.reads & set(RUNTIME_NAMES) - {"k", "v"}
            or claim.added(effect)[1]
            or not _joins(claim.effects[effect], role)
        ):
            return False
        start = self.starts.get(cache.name)
        if start is None:
            heads, size = (int(cache.shape[axis]) for axis in (1, 3))  # type: ignore[arg-type]
            start = np.zeros((1, heads, 0, size), np.float32)
        values: dict[str, Any] = {name: self.tensors[t.name] for name, t in claim.tensors.items()}
        numeric = NumericInterpreter()
        found = numeric.evaluate(claim.effects[effect], claim.scope({**values, role: start}, numeric))
        self.starts[cache.name] = np.asarray(found, np.float32)
        self.caches[cache], self.caches[read] = cache, cache
        return True

    def count_text(self) -> None:
        """Number positions by the text's, where the graph numbers them by a cache that begins with others."""
        for value, cache in self.caches.items():
            longer = self.starts[cache.name or ""].shape[2]
            for use in tuple(value.uses()):
                # What was in the cache before is only counted; what it has grown to is laid out too.
                if use.node.op_type != "Shape" or not (value is cache or _counts(use.node)):
                    continue
                shape = use.node.outputs[0]
                emitter = Emitter(self.graph, ir.DataType.INT64, f"pelt.{cache.name}", {})
                axes = slice(use.node.attributes.get_int("start", 0), use.node.attributes.get_int("end", 4))
                text = emitter.node("Sub", [shape, emitter.integers([0, 0, longer, 0][axes])])
                for reader in tuple(shape.uses()):
                    if reader.node not in emitter.added and (value is cache or _numbers(reader.node)):
                        reader.node.replace_input_with(reader.idx, text)

    def widen_mask(self, site: Site, claim: Claim, positions: Around) -> None:
        """Let the mask show new positions before the others, and behind them.

        The mask is widened where it is still true and false (or a bias in numbers), so that everything the attention
        derives from it, rows without any visible key too, sees the new positions."""
        if not site.values.get("mask"):
            return
        total = self.values[site.values["masked"]].producer()
        context = self.values[site.values["context"]]
        assert total is not None
        widened = set(self.extended.values())
        mask = next(v for v in total.inputs if v is not None and (v.name == site.values["mask"] or v in widened))
        origin, fill = _mask_origin(mask)
        emitter = self.emitter(claim, mask)
        wider = self.wider(origin, fill, positions, emitter)
        _swap(total, mask, self.rebuilt(origin, mask, wider, positions, emitter))
        for use in tuple(context.uses()):
            if use.node.op_type == "Where" and use.idx > 0 and (rows := use.node.inputs[0]) is not None:
                _swap(use.node, rows, self.rebuilt(origin, rows, wider, positions, emitter))

    def wider(self, origin: ir.Value, fill: float, positions: Around, emitter: Emitter) -> ir.Value:
        """A mask [..., T] as [..., P + T + Q]."""
        key = (origin, origin, positions)
        if key not in self.extended:
            lead = emitter.node("Shape", [origin], {"start": 0, "end": -1})
            kind = origin.dtype or ir.DataType.FLOAT
            parts = [origin]
            for place, count in zip((0, 2), positions, strict=True):
                if count:
                    shape = emitter.node("Concat", [lead, emitter.integers([count])], {"axis": 0})
                    constant = emitter.constant(
                        np.array(bool(fill)) if kind == ir.DataType.BOOL else np.array(fill, kind.numpy()), dtype=kind
                    )
                    parts.insert(place, emitter.node("Expand", [constant, shape]))
            self.extended[key] = emitter.node("Concat", parts, {"axis": -1})
            self.extended[key].type = origin.type
        return self.extended[key]

    def rebuilt(
        self, origin: ir.Value, target: ir.Value, wider: ir.Value, positions: Around, emitter: Emitter
    ) -> ir.Value:
        """What was derived from a mask, derived from the wider one; shared by the layers that share the mask."""
        key = (origin, target, positions)
        if key not in self.extended:
            self.extended[key] = clone_between(origin, target, wider, emitter)
        return self.extended[key]

    def embedding(self, site: Site, claims: list[Claim]) -> None:
        """Tokens before the sequence: `prepend` has its own pass."""


def filled(claim: Claim, effect: str, value: Any, like: Any, interpreter: OnnxInterpreter) -> ir.Value:
    """A definition's value, in the shape of what it stands for: what is the same for all may be said once.

    Args:
        like: what it stands for; or `Deferred`, where that is computed if need be.
    """
    if not claim.narrow(effect):
        return interpreter.value(value)
    return interpreter.expanded(value, like() if isinstance(like, Deferred) else like)


def _joins(expr: Expr, role: str) -> bool:
    """Whether a definition of keys or values joins others to them and does nothing else with them."""
    return (
        isinstance(expr, Call)
        and expr.function == "concat"
        and expr.args.count(Name(role)) == 1
        and not any(role in names(part) for part in expr.args if part != Name(role))
    )


def _counts(node: ir.Node) -> bool:
    """Whether a node takes a shape to number positions by, and not just to lay values out."""
    return node.op_type == "Shape" and any(_numbers(use.node) for use in node.outputs[0].uses())


def _numbers(node: ir.Node) -> bool:
    """Whether a node that reads sizes leads to a range of positions."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op_type == "Range":
            return True
        for output in current.outputs:
            for use in output.uses():
                laid_out = use.node.op_type in ("Reshape", "Expand", "Tile") and use.idx == 1
                if use.node not in seen and not laid_out:
                    seen.add(use.node)
                    pending.append(use.node)
    return False


def _swap(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for i, value in enumerate(node.inputs):
        if value is old:
            node.replace_input_with(i, new)


def _cast(value: ir.Value, dtype: ir.DataType, emitter: Emitter) -> ir.Value:
    return emitter.node("Cast", [value], {"to": dtype.value})


def _cut(value: ir.Value, start: int, stop: int, emitter: Emitter) -> ir.Value:
    return emitter.node("Slice", [value, *(emitter.integers([n]) for n in (start, stop, 0))])


def _assemble(full: ir.Value, rows: Rows | None, part: ir.Value, extent: int, emitter: Emitter) -> ir.Value:
    """A fused parameter with some of its rows replaced."""
    if rows is None:
        return part
    pieces, position, taken = [], 0, 0
    for start, stop in rows:
        if start > position:
            pieces.append(_cut(full, position, start, emitter))
        pieces.append(part if len(rows) == 1 else _cut(part, taken, taken + stop - start, emitter))
        position, taken = stop, taken + stop - start
    if position < extent:
        pieces.append(_cut(full, position, extent, emitter))
    return emitter.node("Concat", pieces, {"axis": 0})


def _repeat_heads(value: ir.Value, site: Site, repeats: int, emitter: Emitter) -> ir.Value:
    """[B, K, T, Dh] → [B, H, T, Dh], each key/value head for its group of query heads."""
    kv, dh = site.sizes["kv_heads"], site.sizes["head_dim"]
    grouped = emitter.node("Reshape", [value, emitter.integers([0, kv, 1, -1, dh])])
    wide = emitter.node("Expand", [grouped, emitter.integers([1, 1, repeats, 1, 1])])
    return emitter.node("Reshape", [wide, emitter.integers([0, kv * repeats, -1, dh])])


def _mask_origin(mask: ir.Value) -> tuple[ir.Value, float]:
    """Where a mask was still itself, before casts and scalings, and the content that shows a position."""
    origin, steps = mask, list[ir.Node]()
    while (node := origin.producer()) is not None and node.op_type in MASK_STEPS:
        rest = [v for v in node.inputs if v is not None and v.const_value is None]
        if len(rest) != 1 or (node.op_type == "Unsqueeze" and rest[0].shape is None):
            break
        steps.append(node)
        origin = rest[0]
    for fill in (1.0, 0.0):
        if _through(steps, fill, origin) == 0:
            return origin, fill
    return mask, 0.0


def _through(steps: list[ir.Node], fill: float, origin: ir.Value) -> float:
    """What becomes of a number on its way through mask steps."""
    number = fill
    for node in reversed(steps):
        constants = [v.const_value.numpy() for v in node.inputs if v is not None and v.const_value is not None]
        if node.op_type == "Not":
            number = float(not number)
        elif node.op_type == "Mul":
            number = number * float(constants[0].reshape(()))
        elif node.op_type == "Sub":
            constant = float(constants[0].reshape(()))
            first = node.inputs[0] is not None and node.inputs[0].const_value is not None
            number = constant - number if first else number - constant
    return number
