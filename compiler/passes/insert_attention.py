"""More keys and values in the graph, and masks and positions as wide as these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter, clone_between
from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.compiler.passes.insert_experts import Experts
from peltc.compiler.passes.insertion import Around, swap_input
from peltc.compiler.passes.uneven import Uneven, shown
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import fail
from peltc.spec.formula.syntax import Call, Expr, Name, names
from peltc.spec.method import RUNTIME_NAMES

BATCH = "batch"
"""What graphs call the axis of texts."""
Widening = tuple[Around, ir.Value | None]
"""How many positions a mask is wider by, and which of them profiles bring; None for all."""
MASK_STEPS = {"Cast", "Not", "Identity", "Mul", "Sub", "Unsqueeze"}


class Inserter(Experts):
    """Modules at every kind of site, attention cores among them: more keys and values, and masks as wide as these."""

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
                elif stands(claim, effect) and not self.caches_of(now):
                    new, emitter = self.stood(claim, effect, role, read)
                else:
                    value, interpreter = self.evaluate(claim, effect, read, **self.text_of(claim, now, made))
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
            if any(around) and not claim.takes:
                self.widen_mask(site, claim, around)

    def text_of(self, claim: Claim, now: dict[str, ir.Value], made: set[ir.Node]) -> dict[str, ir.Value]:
        """Keys and values without those of the tokens whose places the claim's own take."""
        if not claim.takes:
            return now
        if self.caches_of(now):
            raise fail("E208", f"'{claim.attachment}' at {claim.site.name} takes positions before the text, and what it"
                               " puts there cannot lie in a cache before the first token",
                       expected="keys and values that depend on nothing in the text, joined to the text's own",
                       hint="compile without `generation`")  # fmt: skip
        emitter = self.emitter(claim, now["k"])
        bounds = [emitter.integers([n]) for n in (claim.takes, 2**62, 2)]
        text = {role: emitter.node("Slice", [value, *bounds]) for role, value in now.items()}
        for role, value in text.items():
            sizes = now[role].shape
            value.shape = None if sizes is None else ir.Shape([sizes[0], sizes[1], None, sizes[3]])
        made |= emitter.added
        return text

    def stood(self, claim: Claim, effect: str, role: str, read: ir.Value) -> tuple[ir.Value, Emitter]:
        """Keys or values with those that a profile brings at the places that these take; see `stand_in`."""
        value, interpreter = self.evaluate(claim, effect, read, **{role: read})
        emitter, joined = interpreter.emitter, interpreter.value(value).producer()
        assert joined is not None
        parts = [part for part in joined.inputs if part is not read]
        part = parts[0] if len(parts) == 1 else emitter.node("Concat", parts, {"axis": -2})
        self.graph.remove(joined, safe=True)
        emitter.added.discard(joined)
        if self.standing is None:
            own = Emitter(self.graph, ir.DataType.FLOAT, f"pelt.{claim.attachment}", claim.marks)
            behind = claim.site.stack == "decoder" and "decoder_input_ids" in self.values
            ids = self.values["decoder_input_ids" if behind else "input_ids"]
            self.standing = Uneven(own, claim.takes, ids)
        assert part is not None
        found = self.standing.over(read, part)
        emitter.added |= self.standing.emitter.added
        return found, emitter

    @staticmethod
    def caches_of(now: Mapping[str, ir.Value]) -> list[ir.Value]:
        """The caches that keys and values are joined to."""
        nodes = [value.producer() for value in now.values()]
        joined = [value for node in nodes if node is not None and node.op_type == "Concat" for value in node.inputs]
        inputs = [value for value in joined if value is not None and value.is_graph_input()]
        return [value for value in inputs if value.shape is not None and len(value.shape) == 4]

    def begins(self, claim: Claim, effect: str, role: str, read: ir.Value) -> bool:
        """Write what a claim puts before keys or values into the start of the cache. This is possible where the cache
        holds just these keys and values, and where the claim depends on nothing that is computed at run time."""
        cache = next(iter(self.caches_of({role: read})), None)
        if cache is None or cache.shape is None or cache.name is None:
            return False
        if not alone(claim, effect):
            return False
        if self.exchange:
            self.begin_within(claim, effect, role, cache, read)
        else:
            start = self.starts.get(cache.name)
            if start is None:
                heads, size = (int(cache.shape[axis]) for axis in (1, 3))  # type: ignore[arg-type]
                start = np.zeros((1, heads, 0, size), np.float32)
            values: dict[str, Any] = {name: self.tensors[t.name] for name, t in claim.tensors.items()}
            numeric = NumericInterpreter()
            found = numeric.evaluate(claim.effects[effect], claim.scope({**values, role: start}, numeric))
            self.starts[cache.name] = np.asarray(found, np.float32)
        self.longer[cache] = self.longer.get(cache, 0) + claim.added(effect)[0]
        if not claim.takes:
            self.counted[cache], self.counted[read] = cache, cache
        return True

    def begin_within(self, claim: Claim, effect: str, role: str, cache: ir.Value, read: ir.Value) -> None:
        """Let the graph put what a claim puts before keys or values into the cache, while there is nothing in it.

        before   concat(cache, k) ─► ...      after   concat(more[: P or 0], cache, k) ─► ...
        """
        value, interpreter = self.evaluate(claim, effect, cache, **{role: cache})
        emitter, node = interpreter.emitter, read.producer()
        joined = interpreter.value(value).producer()
        assert node is not None and joined is not None
        stop = emitter.node("Mul", [self.beginning(cache, emitter), emitter.integers([2**62])])
        bounds = emitter.integers([0]), stop, emitter.integers([2])
        parts = [emitter.node("Slice", [part, *bounds]) for part in joined.inputs if part is not cache]
        for part in parts:
            part.shape = ir.Shape([None, cache.shape[1], None, cache.shape[3]]) if cache.shape is not None else None
        self.graph.remove(joined, safe=True)
        emitter.added.discard(joined)
        inputs = [*parts, *node.inputs]
        node.resize_inputs(len(inputs))
        for i, given in enumerate(inputs):
            node.replace_input_with(i, given)

    def beginning(self, cache: ir.Value, emitter: Emitter) -> ir.Value:
        """One where nothing is in the caches yet, as before a text's first step, and zero ever after [1]."""
        if self.begun is None:
            length = emitter.node("Shape", [cache], {"start": 2, "end": 3})
            none = emitter.node("Equal", [length, emitter.integers([0])])
            self.begun = emitter.node("Cast", [none], {"to": ir.DataType.INT64.value})
        return self.begun

    def count_text(self) -> None:
        """Number positions by the text's, where the graph numbers them by a cache that begins with others; and by all,
        where these take positions and are not in the cache yet."""
        for value, cache in self.counted.items():
            for use in tuple(value.uses()):
                # What was in the cache before is only counted; what it has grown to is laid out too.
                if use.node.op_type != "Shape" or not (value is cache or _counts(use.node)):
                    continue
                if use.node.outputs[0] is self.length_of_begun:
                    continue
                self.recount(use.node, cache, -1, within=value is cache)
        for cache in self.longer:
            for use in tuple(cache.uses()) if cache not in self.counted and self.exchange else ():
                if use.node.op_type == "Shape" and use.node.outputs[0] is not self.length_of_begun:
                    self.recount(use.node, cache, 1, within=True)

    @property
    def length_of_begun(self) -> ir.Value | None:
        """The sizes by which the graph tells whether there is anything in the caches."""
        node = None if self.begun is None else self.begun.producer()
        none = None if node is None or node.inputs[0] is None else node.inputs[0].producer()
        return None if none is None else none.inputs[0]

    def recount(self, node: ir.Node, cache: ir.Value, sign: int, within: bool) -> None:
        """Let what reads a cache's sizes read them without the positions before the text, or with them.

        Args:
            node: gives the sizes.
            sign: whether these positions are added or taken away.
            within: whether the sizes are those that a run is given, at first without anything.
        """
        shape = node.outputs[0]
        emitter = Emitter(self.graph, ir.DataType.INT64, f"pelt.{cache.name}", {})
        axes = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", 4))
        longer = emitter.integers([0, 0, self.longer[cache], 0][axes])
        if within and self.exchange:
            assert self.begun is not None
            first = self.begun
            there = first if sign > 0 else emitter.node("Sub", [emitter.integers([1]), first])
            longer = emitter.node("Mul", [longer, there])
        text = emitter.node("Add" if sign > 0 else "Sub", [shape, longer])
        for reader in tuple(shape.uses()):
            if reader.node not in emitter.added and (within or _numbers(reader.node)):
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
        origin, fill = mask_origin(mask)
        emitter = self.emitter(claim, mask)
        key = positions, self.shown_of(claim, origin, positions)
        wider = self.wider(origin, fill, key, emitter)
        swap_input(total, mask, self.rebuilt(origin, mask, wider, key, emitter))
        for use in tuple(context.uses()):
            if use.node.op_type == "Where" and use.idx > 0 and (rows := use.node.inputs[0]) is not None:
                swap_input(use.node, rows, self.rebuilt(origin, rows, wider, key, emitter))

    def shown_of(self, claim: Claim, origin: ir.Value, positions: Around) -> ir.Value | None:
        """Which of a claim's positions profiles bring, of all sites of an attachment that have as many; None where all
        rows see all of them."""
        before, behind = positions
        if not claim.uneven or behind or not of_rows(origin) or self.numbers is None:
            return None
        key = claim.attachment, before
        if key not in self.shown:  # in all graphs by one name
            number = list(self.numbers[claim.attachment]).index(before)
            emitter = Emitter(self.graph, ir.DataType.FLOAT, f"pelt.{claim.attachment}", claim.marks)
            self.shown[key] = shown(before, emitter, f"shown.{number}" if number else "shown")
        return self.shown[key]

    def wider(self, origin: ir.Value, fill: float, key: Widening, emitter: Emitter) -> ir.Value:
        """A mask [..., T] as [..., P + T + Q]."""
        known = (origin, origin, *key)
        if known not in self.extended:
            lead = emitter.node("Shape", [origin], {"start": 0, "end": -1})
            kind = origin.dtype or ir.DataType.FLOAT
            parts = [origin]
            for place, count in zip((0, 2), key[0], strict=True):
                if count:
                    shape = emitter.node("Concat", [lead, emitter.integers([count])], {"axis": 0})
                    content = emitter.constant(
                        np.array(bool(fill)) if kind == ir.DataType.BOOL else np.array(fill, kind.numpy()), dtype=kind
                    ) if key[1] is None else visible(key[1], fill, kind, emitter)  # fmt: skip
                    part = emitter.node("Expand", [content, shape])
                    if origin.shape is not None:
                        part.shape = ir.Shape([*[None] * (len(origin.shape) - 1), count])
                    parts.insert(place, part)
            self.extended[known] = emitter.node("Concat", parts, {"axis": -1})
            self.extended[known].type = origin.type
        return self.extended[known]

    def rebuilt(
        self, origin: ir.Value, target: ir.Value, wider: ir.Value, key: Widening, emitter: Emitter
    ) -> ir.Value:  # fmt: skip
        """What was derived from a mask, derived from the wider one; shared by the layers that share the mask."""
        known = (origin, target, *key)
        if known not in self.extended:
            self.extended[known] = clone_between(origin, target, wider, emitter)
        return self.extended[known]

    def embedding(self, site: Site, claims: list[Claim]) -> None:
        """Tokens before the sequence: `prepend` has its own pass."""


def alone(claim: Claim, effect: str) -> bool:
    """Whether keys or values that a claim puts before the text's depend on nothing that is computed at run time, and
    the text's own stay as they are."""
    role = {"keys": "k", "values": "v"}[effect]
    reads = claim.reads & set(RUNTIME_NAMES) - {"k", "v"}
    return not reads and not claim.added(effect)[1] and _joins(claim.effects[effect], role)


def stands(claim: Claim, effect: str) -> bool:
    """Whether a profile brings keys or values that take positions, which stand in the sequence at these."""
    return bool(claim.takes) and claim.uneven and alone(claim, effect)


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


def _repeat_heads(value: ir.Value, site: Site, repeats: int, emitter: Emitter) -> ir.Value:
    """[B, K, T, Dh] → [B, H, T, Dh], each key/value head for its group of query heads."""
    kv, dh = site.sizes["kv_heads"], site.sizes["head_dim"]
    grouped = emitter.node("Reshape", [value, emitter.integers([0, kv, 1, -1, dh])])
    wide = emitter.node("Expand", [grouped, emitter.integers([1, 1, repeats, 1, 1])])
    return emitter.node("Reshape", [wide, emitter.integers([0, kv * repeats, -1, dh])])


def of_rows(origin: ir.Value) -> bool:
    """Whether a mask is one for each text of the batch."""
    return origin.shape is not None and len(origin.shape) == 4 and str(origin.shape[0]) == BATCH


def visible(places: ir.Value, fill: float, kind: ir.DataType, emitter: Emitter) -> ir.Value:
    """What a mask has at places [P] of which ones are shown, where `fill` shows one, and zeros are hidden."""
    if not fill:
        one = emitter.constant(np.float32(1), "one", ir.DataType.FLOAT)
        places = emitter.node("Sub", [one, places])
        places.shape = ir.Shape([None])
        if kind != ir.DataType.BOOL:
            lowest = emitter.constant(np.float32(kind.min), "lowest", ir.DataType.FLOAT)
            places = emitter.node("Mul", [places, lowest])
            places.shape = ir.Shape([None])
    return emitter.node("Cast", [places], {"to": kind.value})


def mask_origin(mask: ir.Value) -> tuple[ir.Value, float]:
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
