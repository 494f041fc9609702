"""Texts that grow together: each gets the tokens that `Session.generate` gives it alone, whoever it grows beside,
greedy and drawn; texts join and leave while others go on."""

from __future__ import annotations

import random
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import peltc
from peltc.compiler.linking.linker import Linker
from peltc.runtime.generating.decoder import Begun, Decoder
from peltc.runtime.generating.engine import Engine, GrowthLimits
from peltc.runtime.generating.rows import Piece, Row, Wish
from peltc.runtime.generating.texts import Reader
from peltc.spec.diagnostics import PeltError

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from instances import FAMILIES, save

pytestmark = pytest.mark.xdist_group("growth")

Folder = Callable[..., Path]
CPU = ["CPUExecutionProvider"]
LORA = {"method": "lora", "at": ["attention.query", "attention.value"], "r": 4}
LIMITS = GrowthLimits(rows=6, tokens=400, padding=0.5, queue=100, profiles=4, new=40)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bank": ("llama", "bank", {"attach": [LORA]}),
    "swappable": ("gpt2", "swappable", {"attach": [LORA]}),
    "encoder": ("t5", "bank", {"attach": [LORA]}),
    "prefix": ("llama", "static", {"attach": [LORA, {"method": "prefix", "at": "attention", "length": 5}]}),
    "gates": ("gpt2", "static", {"attach": [{"recipe": "unipelt"}], "deploy": {"gates": {"at": "prefill"}}}),
    "alibi": ("bloom", "static", {"attach": [LORA]}),
    "encoder with positions": ("bart", "static", {"attach": [LORA]}),
}
SWEPT = ("alibi", "encoder with positions")


class Watched:
    """What an engine tells."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.begun = self.rows = 0

    def began(self, tokens: int, waited: float) -> None:
        self.begun += tokens

    def stepped(self, rows: int, seconds: float) -> None:
        self.steps.append(rows)

    def running(self, rows: int) -> None:
        self.rows = rows


class Asked:
    """A text that grows, and what is told of it."""

    def __init__(self, engine: Engine, wish: Wish, index: int = 0, reader: Reader | None = None):
        self.wish, self.pieces, self.done = wish, list[Piece](), threading.Event()
        self.row = Row(wish, index, reader, self.tell)
        engine.submit([self.row])

    def tell(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.end or piece.error:
            self.done.set()

    def tokens(self) -> list[int]:
        assert self.done.wait(60)
        for piece in self.pieces:
            if piece.error:
                raise piece.error
        return [token for piece in self.pieces for token in piece.tokens]


def built(name: str, folder: Path) -> peltc.Session:
    """A session of an artifact with drawn modules, or with four profiles of them."""
    family, mode, content = CASES[name]
    model = save(family, dict(FAMILIES)[family], folder / "model")
    spec = peltc.load_spec({"pelt": 1, "name": "toy", **content})
    draw = np.random.default_rng(0)
    tensors = None
    if mode == "static":
        from peltc.runtime.building.compile import plan_for

        plan, _ = plan_for(spec, model)
        tensors = {n: draw.normal(0, 0.2, t.shape).astype(np.float32) for n, t in plan.tensors.items()}
    peltc.compile(spec, model, folder / "out", tensors, mode=mode, generation=True, verify=False)
    session = peltc.Session(folder / "out", CPU)
    if mode != "static":
        linker = Linker(folder / "out")
        for i in range(4):
            drawn = {n: draw.normal(0, 0.3, t.shape).astype(np.float32) for n, t in linker.plan.tensors.items()}
            session.add_profile(f"p{i}", linker.link(drawn))
    return session


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], peltc.Session]:
    known: dict[str, peltc.Session] = {}

    def session(name: str) -> peltc.Session:
        if name not in known:
            known[name] = built(name, tmp_path_factory.mktemp("growth"))
        return known[name]

    return session


@pytest.fixture(scope="module")
def bank(sessions: Callable[[str], peltc.Session]) -> Iterator[tuple[Engine, Watched, peltc.Session]]:
    engine = Engine(Decoder(session := sessions("bank")), LIMITS, watch := Watched())
    yield engine, watch, session
    engine.close(10)


def alone(session: peltc.Session, wish: Wish, index: int = 0) -> list[int]:
    """What `generate` gives a text by itself."""
    if wish.seed is not None:
        torch.manual_seed(wish.seed + index)
    options = {"max_new_tokens": wish.new, **wish.options}
    found = session.generate([list(wish.ids)], profile=wish.profile, **options)[0].tolist()
    return found[1 if session.generator.config.is_encoder_decoder else len(wish.ids) :]


def drawn(session: peltc.Session, count: int) -> list[Wish]:
    """Wishes of all kinds."""
    draw, wishes = random.Random(3), []
    names = [None, *session.profiles] if session.kept.record else [None]
    for i in range(count):
        options: dict[str, Any] = {"do_sample": i % 2 == 1}
        if i % 2:
            options |= {"temperature": 0.7, "top_p": 0.9, "top_k": (0, 20)[i % 4 == 1]}
        if i % 3 == 0:
            options |= {"repetition_penalty": 1.3}
        if i % 5 == 0:
            options |= {"eos_token_id": None}
        if session.generator.config.is_encoder_decoder:
            options |= {"decoder_start_token_id": 0}
        ids = [draw.randrange(3, 100) for _ in range(draw.randint(1, 12))]
        wishes.append(Wish(ids, names[i % len(names)], draw.randint(1, 20), options, seed=i))
    return wishes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SWEPT else name for name in CASES]
)
def test_each_text_grows_as_if_it_were_alone(name: str, sessions: Callable[[str], peltc.Session]) -> None:
    session, watch = sessions(name), Watched()
    engine = Engine(Decoder(session), LIMITS, watch)
    wishes = drawn(session, 16)
    asked = []
    for i, wish in enumerate(wishes):
        asked.append(Asked(engine, wish))
        if i % 5 == 4:
            time.sleep(0.02)  # others have begun by then
    found = [one.tokens() for one in asked]
    engine.close(10)
    for wish, one, tokens in zip(wishes, asked, found, strict=True):
        assert tokens == alone(session, wish), wish
        ends = wish.options.get("eos_token_id", session.generator.generation_config.eos_token_id)
        assert one.pieces[-1].end == ("stop" if ends is not None and tokens[-1] == ends else "length")
    assert sum(watch.steps) + len(found) == sum(map(len, found)) and max(watch.steps) > 1 and watch.rows == 0
    assert watch.begun == sum(len(wish.ids) for wish in wishes)
    assert len({tuple(tokens) for tokens in found}) > 10, "texts and profiles differ, or nothing was shown"


def test_lengths_are_mixed_where_padding_changes_nothing(
    sessions: Callable[[str], peltc.Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By trying; a graph that counts positions along the cache is found out, and still answers right."""
    expected = {"bank": (True, True), "gates": (False, True), "encoder": (False, False)}
    for name, pads in expected.items():
        decoder = Decoder(sessions(name))
        assert (decoder.pads_prompts, decoder.pads) == pads, name
    session = sessions("bank")
    run = type(session.generator).advance

    def counted(self: Any, batch: int, leaves: Any) -> Any:
        at = leaves["attention_mask"].shape[1] - leaves["input_ids"].shape[1]
        places = at + torch.arange(leaves["input_ids"].shape[1])
        return run(self, batch, {**leaves, "position_ids": places.expand(batch, -1)})

    alike, other = Wish([5, 6, 7], "p0", 8), Wish([9, 3, 4, 8, 11, 60], "p1", 8)
    expected_tokens = [alone(session, wish) for wish in (alike, other)]
    monkeypatch.setattr(type(session.generator), "advance", counted)
    decoder = Decoder(session)
    assert (decoder.pads_prompts, decoder.pads) == (True, False)  # rotations tell distances, which prompts keep
    engine = Engine(decoder, LIMITS, watch := Watched())
    assert [Asked(engine, wish).tokens() for wish in (alike, other)] == expected_tokens
    both = [Asked(engine, wish) for wish in (alike, other)]
    assert [one.tokens() for one in both] == expected_tokens
    engine.close(5)
    assert watch.rows == 0
    gpt2 = sessions("swappable")
    monkeypatch.setattr(type(gpt2.generator), "advance", counted)
    decoder = Decoder(gpt2)
    assert (decoder.pads_prompts, decoder.pads) == (False, False)


def test_caches_joined_and_parted(sessions: Callable[[str], peltc.Session]) -> None:
    """The witness that order and padding count: rows of a joined batch in another order, cut to what they need."""
    decoder = Decoder(session := sessions("prefix"))
    with session.taken(None, None) as taken:
        texts = [Begun([5, 6, 7]), Begun([8] * 9), Begun([3, 4, 3, 4])]
        single = [decoder.read([text], taken)[0] for text in texts]
        joined = decoder.joined(single)
        assert joined.lengths == [3, 9, 4]
        back = decoder.chosen(joined, [2, 0, 0])
        assert back.lengths == [4, 3, 3]
        name = next(name for name in joined.leaves if name.endswith("keys"))
        assert [batch.leaves[name].shape[2] for batch in (joined, back)] == [14, 9]
        found = decoder.go_on(back, [11, 12, 13], taken)[1]
        expected = [decoder.go_on(single[i], [token], taken)[1] for i, token in ((2, 11), (0, 12), (0, 13))]
        assert (found - torch.cat(expected)).abs().max() < 1e-5 * found.abs().max()
        assert (found[1] - found[2]).abs().max() > 1e-3, "another token, another answer"


def test_texts_of_one_wish_differ_by_their_seeds(bank: tuple[Engine, Watched, peltc.Session]) -> None:
    """Their prompt is read once."""
    engine, _, session = bank
    wish = Wish([5, 6, 7], "p1", 12, {"do_sample": True, "top_k": 0}, seed=4)
    told: list[list[Piece]] = [[] for _ in range(3)]
    done = threading.Semaphore(0)

    def tell(i: int, piece: Piece) -> None:
        told[i].append(piece)
        if piece.end:
            done.release()

    engine.submit([Row(wish, i, None, lambda piece, i=i: tell(i, piece)) for i in range(3)])
    assert all(done.acquire(timeout=30) for _ in told)
    found = [[token for piece in pieces for token in piece.tokens] for pieces in told]
    assert found == [alone(session, wish, i) for i in range(3)] and len({*map(tuple, found)}) == 3


def test_probabilities_are_the_models_own(bank: tuple[Engine, Watched, peltc.Session]) -> None:
    """Before temperature and penalties; each text's beside others."""
    engine, _, session = bank
    options = {"do_sample": True, "temperature": 0.5, "top_k": 5}
    wishes = [Wish([5, 6, 7, 9], "p0", 6, options, (0.5, 0.5), seed=1, best=3), Wish([8, 3], "p1", 9, seed=2)]
    asked = [Asked(engine, wish) for wish in wishes]
    tokens = asked[0].tokens()
    whole = session(input_ids=[[5, 6, 7, 9, *tokens[:-1]]], profile="p0")["logits"][0, 3:]
    logprobs = torch.tensor(whole).log_softmax(-1)
    for step, piece in zip(logprobs, asked[0].pieces, strict=True):
        (one,) = piece.weighed
        assert one.token == piece.tokens[0] and abs(one.logprob - step[one.token]) < 1e-4
        values, ids = step.topk(3)
        assert [token for token, _ in one.best] == ids.tolist()
        assert np.allclose([value for _, value in one.best], values, atol=1e-4)
    asked[1].tokens()
    assert not asked[1].pieces[0].weighed


def test_penalties(bank: tuple[Engine, Watched, peltc.Session]) -> None:
    """OpenAI's formula on the logits of a whole run; the prompt's own tokens do not count."""
    engine, _, session = bank
    wish = Wish([5, 5, 5], "p2", 10, {"do_sample": False}, (0.6, 0.3))
    found, ids = Asked(engine, wish).tokens(), [5, 5, 5]
    for token in found:
        logits = session(input_ids=[ids], profile="p2")["logits"][0, -1].copy()
        for known in ids[3:]:
            logits[known] -= 0.6
        for known in {*ids[3:]}:
            logits[known] -= 0.3
        assert token == logits.argmax()
        ids.append(token)
    assert found != alone(session, Wish([5, 5, 5], "p2", 10, {"do_sample": False}))


def test_a_profile_stays_as_it_was_when_the_text_began(
    sessions: Callable[[str], peltc.Session], tmp_path: Path
) -> None:
    """It is put again while the text grows, and deleted; the next text has the new one, or none. A damaged one fails
    its own text alone."""
    out = sessions("bank").folder
    linker, store, draw = Linker(out), peltc.ProfileStore(tmp_path / "store", out), np.random.default_rng(5)

    def put(name: str) -> None:
        store.put(name, linker.link({n: draw.normal(0, 0.3, t.shape).astype(np.float32)
                                     for n, t in linker.plan.tensors.items()}))  # fmt: skip

    for name in ("a/x", "a/y", "a/z"):
        put(name)
    session = peltc.Session(out, CPU, store=store, resident=4)
    engine = Engine(Decoder(session), LIMITS, Watched())
    slow, held = threading.Event(), threading.Event()
    wish = Wish([5, 6, 7], "a/x", 20, {"eos_token_id": None, "do_sample": False})
    before = alone(session, wish)
    first = Asked(engine, wish)

    def wait(piece: Piece) -> None:
        first.__class__.tell(first, piece)
        if len(first.pieces) == 3:
            held.set()
            assert slow.wait(30)

    first.row.tell = wait
    assert held.wait(30) or first.done.is_set()
    put("a/x")
    with sqlite3.connect(tmp_path / "store") as db:
        db.execute("UPDATE record SET content = zeroblob(size) WHERE name = 'z'")
    store.delete("a/y")
    second, third, gone = (Asked(engine, Wish([5, 6, 7], n, 20, wish.options)) for n in ("a/x", "a/z", "a/y"))
    slow.set()
    assert first.tokens() == before
    after = alone(session, wish)
    assert second.tokens() == after != before
    with pytest.raises(PeltError, match="E634"):
        third.tokens()
    with pytest.raises(PeltError, match="E626"):
        gone.tokens()
    engine.close(10)
    assert not any(entry.runs for entry in session.residents.entries.values())  # type: ignore[union-attr]


def test_bounds(bank: tuple[Engine, Watched, peltc.Session]) -> None:
    """Of texts, tokens, profiles and the queue; what was cancelled is let go of, and nothing passes the first."""
    engine, watch, session = bank
    options = {"eos_token_id": None, "do_sample": False}
    asked = [Asked(engine, Wish([5] * n, f"p{n % 4}", 40, options)) for n in range(1, 20)]
    found = [one.tokens() for one in asked]
    assert all(len(tokens) == 40 for tokens in found) and max(watch.steps) <= 6
    for wish, texts, code in (
        (Wish([5], None, 41), 1, "E802 the request asks for 41 new tokens"),
        (Wish([5], None, 5), 7, "E802 the request asks for 7 texts"),
        (Wish([5] * 390, None, 20), 1, "E802 the request asks for 410 tokens"),
        (Wish([], None, 5), 1, "E617"),
        (Wish([100], None, 5), 1, "E615"),
    ):
        with pytest.raises(PeltError, match=code):
            engine.check(wish, texts)
    small = Engine(engine.decoder, GrowthLimits(1, 400, 0.5, 2, 1, 40), counted := Watched())
    gate = threading.Event()
    first = Asked(small, Wish([5], "p0", 30, options))
    first.row.tell = lambda piece: (gate.wait(30), first.tell(piece))  # type: ignore[assignment]
    while small.waiting():
        time.sleep(0.001)
    second, third = Asked(small, Wish([6], "p1", 30, options)), Asked(small, Wish([7], "p2", 30, options))
    with pytest.raises(PeltError, match="E803 the queue is full: 2 texts wait"):
        Asked(small, Wish([8], None, 2))
    small.cancel([second.row])
    assert small.waiting() == 1
    gate.set()
    assert third.tokens() == alone(session, third.wish) and not second.pieces
    assert counted.steps and {*counted.steps} == {1}
    fourth = Asked(small, Wish([7], "p2", 40, options))
    small.close(30)
    assert fourth.tokens() == alone(session, fourth.wish), "what was taken is answered"
    with pytest.raises(PeltError, match="E806"):
        small.submit([])
    brief = Engine(engine.decoder, LIMITS, Watched())
    gate.clear()
    fifth = Asked(brief, Wish([7], "p2", 40, options))
    fifth.row.tell = lambda piece: (gate.wait(0.2), fifth.tell(piece))  # type: ignore[assignment]
    brief.close(0.3)
    with pytest.raises(PeltError, match="E806"):
        fifth.tokens()


def test_what_generate_refuses_is_refused(bank: tuple[Engine, Watched, peltc.Session]) -> None:
    engine, _, session = bank
    with pytest.raises(PeltError, match="E809 the options are refused"):
        Asked(engine, Wish([5], None, 5, {"do_sample": True, "top_p": -1.0})).tokens()
    session.generator.generation_config.guidance_scale = 2.0
    try:
        with pytest.raises(PeltError, match=r"E809 .* guidance"):
            Asked(engine, Wish([5], None, 5)).tokens()
    finally:
        session.generator.generation_config.guidance_scale = None
    wish = Wish([5], None, 5)
    assert Asked(engine, wish).tokens() == alone(session, wish), "others go on"


def test_a_run_that_fails_tells_all_its_texts(
    bank: tuple[Engine, Watched, peltc.Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _, session = bank
    run = engine.decoder.go_on

    def failing(batch: Any, tokens: Any, taken: Any) -> Any:
        if 7 in batch.lengths:
            raise RuntimeError("no memory")
        return run(batch, tokens, taken)

    monkeypatch.setattr(engine.decoder, "go_on", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        Asked(engine, Wish([5, 6, 7], None, 20, {"eos_token_id": None})).tokens()
    monkeypatch.undo()
    wish = Wish([5], None, 5)
    assert Asked(engine, wish).tokens() == alone(session, wish)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def text(self, ids: Any) -> str:
        return bytes(ids).decode(errors="replace")


def test_characters_of_several_tokens_and_strings_that_end_a_text() -> None:
    def read(text: bytes, *stops: str, before: bytes = b"") -> tuple[list[str], bool]:
        reader, found = Reader(Bytes(), list(before), stops), []  # type: ignore[arg-type]
        for i, token in enumerate(text):
            said, stopped = reader.read(token, i == len(text) - 1)
            found.append(said)
            if stopped:
                return found, True
        return found, False

    assert read("aé€b".encode()) == (["a", "", "é", "", "", "€", "b"], False)
    assert read("é".encode()[:1]) == (["\N{REPLACEMENT CHARACTER}"], False)
    assert read("€x".encode()[1:], before="ab€".encode()[:3]) == (["", "", "x"], False)  # begun in the prompt
    assert read(b"one END two", "END") == ([*"one ", "", "", ""], True)
    assert read(b"one EN", "END") == ([*"one ", "", "EN"], False)
    assert read(b"aab", "ab") == (["", "a", ""], True)
    assert read(b"abc", "bc", "b") == (["a", ""], True)
    assert read(b"xyz", "yzz", "q") == (["x", "", "yz"], False)
