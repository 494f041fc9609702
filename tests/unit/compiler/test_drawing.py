"""The picture of an anatomy, read back as XML: what is in it, how often, and where it stands."""

import xml.etree.ElementTree as ET
from collections import Counter

import pytest

from peltc.compiler.picture.drawing import DASHED, draw
from peltc.compiler.survey.anatomy import Anatomy, Rows, Site

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '</text><script>alert(1)</script>&lt;"\x00\x1b\ud800\ufffe\u202e]]>' * 3
Picture = ET.Element


def picture(sites: list[Site], title: str = "") -> Picture:
    text = draw(Anatomy(tuple(sites), 64), title)
    text.encode()
    return ET.fromstring(text)


def words(part: Picture, style: str) -> list[str]:
    return [word.text or "" for word in part.iter(f"{SVG}tspan") if word.get("class") == style]


def runs(part: Picture) -> list[Picture]:
    return [group for group in part.iter(f"{SVG}g") if group.get("class") == "run"]


def height(part: Picture, name: str) -> float:
    """Where a name stands: smaller is higher."""
    return place(part, name)[1]


def place(part: Picture, name: str) -> tuple[float, float]:
    for line in part.iter(f"{SVG}text"):
        if any(word.text == name for word in line):
            return float(line.get("x", "")), float(line.get("y", ""))
    raise AssertionError(f"{name} is not in the picture")


def sums(part: Picture) -> list[float]:
    """The heights of the residual additions, from the lowest up; a product's ring has a dot of its own inside."""
    rings = [circle for circle in part.iter(f"{SVG}circle")]
    dots = {circle.get("cy") for circle in rings if circle.get("class") == "tip"}
    found = {float(c.get("cy", "")) for c in rings if c.get("class") == "ring" and c.get("cy") not in dots}
    return sorted(found, reverse=True)


def linear(path: str, inputs: int, outputs: int, weight: str = "", rows: Rows | None = None) -> Site:
    return Site(path, "linear", {"weight": weight or f"{path}.weight"}, rows, {"in": inputs, "out": outputs})


def norm(path: str, x: str, y: str) -> Site:
    return Site(path, "norm", {"weight": f"{path}.weight"}, None, {"d": 64}, {"x": x, "y": y})


def block(path: str, **values: str) -> Site:
    return Site(path, "block", sizes={"in": 64, "out": 64, "d": 64}, values=values)


def attention(path: str, name: str = "attention", norm_first: bool = True, fused: bool = False) -> list[Site]:
    """An attention block that reads `r`, with values named as a survey names them."""
    path = f"{path}.{name}"
    rows: list[Rows | None] = [((0, 64),), ((64, 96),), ((96, 128),)] if fused else [None, None, None]
    weight = f"{path}.all" if fused else ""
    r, x, y, total, after = (f"{path}:{value}" for value in ("r", "x", "y", "sum", "after"))
    ends = (r, x) if norm_first else (total, after)
    return [
        *(
            linear(f"{path}.{role}", 64, outputs, weight, owned)
            for role, outputs, owned in zip(("query", "key", "value"), (64, 32, 32), rows, strict=True)
        ),
        linear(f"{path}.output", 64, 64),
        Site(path, "attention", sizes={"heads": 4, "kv_heads": 2, "head_dim": 16, "d": 64}),
        norm(f"{path}.norm", *ends),
        block(f"{path}.block", r=r, x=x if norm_first else r, y=y, norm_x=ends[0], norm_y=ends[1]),
    ]


def feed_forward(path: str, width: int = 256, gated: bool = False) -> list[Site]:
    path = f"{path}.feed_forward"
    return [
        *([linear(f"{path}.gate", 64, width)] if gated else []),
        linear(f"{path}.up", 64, width),
        linear(f"{path}.down", width, 64),
        norm(f"{path}.norm", f"{path}:r", f"{path}:x"),
        block(f"{path}.block", r=f"{path}:r", x=f"{path}:x", y=f"{path}:y"),
    ]


def layer(number: int, stack: str = "decoder", width: int = 256) -> list[Site]:
    path = f"{stack}.layers.{number}"
    return [*attention(path), *feed_forward(path, width, gated=True), block(path)]


def embedding(prefix: str = "") -> list[Site]:
    return [
        Site(f"{prefix}embedding.word", "embedding", {"weight": "table"}, None, {"vocab": 1000, "d": 64}),
        norm(f"{prefix}embedding.norm", "sum", "start"),
        Site(f"{prefix}embedding", "embedding", {"weight": "table"}, None, {"d": 64, "in": 64, "out": 64}),
    ]


def decoder(*widths: int) -> list[Site]:
    layers = [site for number, width in enumerate(widths) for site in layer(number, width=width)]
    return [*embedding(), *layers, norm("final_norm", "end", "last"), linear("head", 64, 1000)]


def encoder_decoder() -> list[Site]:
    path = "decoder.layers.0"
    return [
        *embedding(),
        *layer(0, "encoder"),
        norm("encoder.final_norm", "end", "memory"),
        *embedding("decoder."),
        *attention(path),
        *attention(path, "cross_attention"),
        *feed_forward(path),
        block(path),
        norm("decoder.final_norm", "end", "last"),
        linear("head", 64, 1000),
    ]


def test_every_role_stands_once_in_a_run() -> None:
    sites = layer(0)
    (run,) = runs(picture(sites))
    assert Counter(words(run, "name")) == Counter(dict.fromkeys((site.role for site in sites), 1))


def test_what_is_outside_the_layers_is_drawn_too() -> None:
    names = words(picture(decoder(256)), "name")
    for role in ("embedding", "embedding.word", "embedding.norm", "final_norm", "head"):
        assert names.count(role) == 1


def test_sizes_are_drawn() -> None:
    sizes = words(picture(decoder(256)), "size")
    assert {"64 → 32", "64 → 256", "256 → 64", "1000 × 64", "4 heads / 2 kv heads × 16", "64 → 1000"} <= set(sizes)


def test_equal_layers_are_drawn_once_with_their_number() -> None:
    drawn = picture(decoder(*[256] * 22))
    assert len(runs(drawn)) == 1
    assert words(drawn, "count") == ["× 22  (layers 0-21)"]
    assert drawn.get("height") == picture(decoder(256)).get("height")


def test_a_layer_that_differs_splits_the_run() -> None:
    drawn = picture(decoder(256, 256, 512, 256))
    assert sorted(words(drawn, "count")) == ["× 1  (layer 2)", "× 1  (layer 3)", "× 2  (layers 0-1)"]
    assert height(drawn, "× 2  (layers 0-1)") > height(drawn, "× 1  (layer 2)") > height(drawn, "× 1  (layer 3)")


@pytest.mark.parametrize(
    "changed",
    [
        attention("decoder.layers.1", fused=True),
        attention("decoder.layers.1", norm_first=False),
        attention("decoder.layers.1")[:-2],
    ],
    ids=["rows", "place of the norm", "roles"],
)
def test_layers_are_equal_only_with_equal_rows_places_and_roles(changed: list[Site]) -> None:
    assert len(runs(picture([*attention("decoder.layers.0"), *changed]))) == 2


def test_a_gap_in_the_numbers_splits_the_run() -> None:
    assert len(runs(picture([*layer(0), *layer(2)]))) == 2


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_norm_stands_where_the_dataflow_has_it(norm_first: bool) -> None:
    drawn = picture(attention("encoder.layers.0", norm_first=norm_first))
    (addition,) = sums(drawn)
    if norm_first:
        assert height(drawn, "attention.norm") > height(drawn, "attention.query") > addition
    else:
        assert height(drawn, "attention.query") > addition > height(drawn, "attention.norm")


def test_a_norm_between_the_map_and_the_sum_stands_in_the_block() -> None:
    path = "decoder.layers.0.attention"
    sites = [*attention("decoder.layers.0"), norm(f"{path}.post_norm", f"{path}:o", f"{path}:y")]
    drawn = picture(sites)
    (addition,) = sums(drawn)
    assert height(drawn, "attention.output") > height(drawn, "attention.post_norm") > addition
    assert height(drawn, "attention.post_norm") > height(drawn, "attention.block")


def test_the_norms_own_values_count_where_the_blocks_norm_is_another() -> None:
    sites = layer(0)
    last = "decoder.layers.0.feed_forward"
    block_values = {"norm_x": "the stream's end", "norm_y": "the final norm"}
    sites[-2] = block(f"{last}.block", r=f"{last}:r", x=f"{last}:x", y=f"{last}:y", **block_values)
    drawn = picture(sites)
    assert height(drawn, "feed_forward.norm") > height(drawn, "feed_forward.up")


def test_every_sublayer_has_a_sum_and_the_gate_a_product() -> None:
    drawn = picture(layer(0))
    assert len(sums(drawn)) == 2
    assert len([c for c in drawn.iter(f"{SVG}circle") if c.get("class") == "tip"]) == 1


def test_parallel_sublayers_share_a_sum() -> None:
    path = "decoder.layers.0"
    ahead = attention(path)
    beside = [block(f"{path}.feed_forward.block", r=f"{path}.attention:r", x=f"{path}.attention:x", y="z")]
    drawn = picture([*ahead, linear(f"{path}.feed_forward.up", 64, 256), *beside])
    assert len(sums(drawn)) == 1
    assert height(drawn, "attention.norm") > height(drawn, "feed_forward.up")


def test_fused_projections_are_slices_of_one_box() -> None:
    drawn = picture(attention("decoder.layers.0", fused=True))
    outline, *others = (box for box in drawn.iter(f"{SVG}rect") if box.get("class") == "fused")
    assert not others
    left = float(outline.get("x", ""))
    right = left + float(outline.get("width", ""))
    assert all(left < place(drawn, f"attention.{role}")[0] < right for role in ("query", "key", "value"))
    sizes = words(drawn, "size")
    assert {"rows 0:64", "rows 64:96", "rows 96:128", "one weight, rows 0:128"} <= set(sizes)


def test_many_row_ranges_are_shortened() -> None:
    rows = tuple((start, start + 8) for start in range(0, 512, 24))
    drawn = picture([linear("decoder.layers.0.attention.query", 64, 176, rows=rows)])
    assert "rows 0:8, … 22 ranges" in words(drawn, "size")


def test_an_encoder_and_a_decoder_stand_side_by_side() -> None:
    drawn = picture(encoder_decoder())
    assert words(drawn, "stack") == ["encoder", "decoder"]
    assert place(drawn, "encoder")[0] < place(drawn, "decoder")[0]
    assert len(runs(drawn)) == 2
    assert words(drawn, "name").count("embedding.word") == 2
    assert words(drawn, "name").count("final_norm") == 2
    assert place(drawn, "head")[0] > place(drawn, "cross_attention.key")[0]


def test_the_encoders_output_reaches_the_keys_and_values_of_the_cross_attention() -> None:
    drawn = picture(encoder_decoder())
    source = place(drawn, "encoder")[0]
    wires = [
        [tuple(map(float, corner.split(","))) for corner in wire.get("points", "").split()]
        for wire in drawn.iter(f"{SVG}polyline")
    ]
    (crossing,) = (
        wire for wire in wires if wire[0][0] < source + 1 and wire[-1][0] > place(drawn, "decoder")[0] / 2 + 1
    )
    ends = [wire[-1] for wire in wires if wire[0] == crossing[-1]]
    assert sorted(x for x, _ in ends) == [place(drawn, f"cross_attention.{role}")[0] for role in ("key", "value")]
    assert all(y > height(drawn, "cross_attention.key") for _, y in ends)


def test_maps_without_a_role_are_counted() -> None:
    unnamed = Site("", "linear", {"weight": "extra.weight"}, None, {"in": 3, "out": 3})
    assert words(picture(layer(0)), "note") == [DASHED]
    assert set(words(picture([*layer(0), unnamed]), "note")) == {
        DASHED, "+ 1 linear map without a role, selected by parameter"}  # fmt: skip
    assert words(picture([unnamed] * 3), "note")[0] == "+ 3 linear maps without a role, selected by parameter"


def test_layers_that_share_their_weights_say_so() -> None:
    path = "encoder.layers.{}.attention.query"
    sites = [
        Site(path.format(a), "linear", {"weight": "w"}, None, {"in": 8, "out": 8}, shared=(path.format(b),))
        for a, b in ((0, 1), (1, 0))
    ]
    assert "the layers share their weights" in words(picture(sites), "size")


def test_hostile_text_stays_text() -> None:
    sites = [
        linear(f"decoder.layers.0.attention.{HOSTILE}", 8, 8, HOSTILE, ((0, 4),)),
        linear("decoder.layers.0.attention.query", 8, 8, HOSTILE, ((4, 8),)),
        linear(HOSTILE, 8, 8),
        Site("", "linear", {"weight": HOSTILE}),
    ]
    drawn = picture(sites, HOSTILE)
    tags = {element.tag.removeprefix(SVG) for element in drawn.iter()}
    assert tags <= {
        "svg",
        "title",
        "style",
        "defs",
        "marker",
        "path",
        "rect",
        "text",
        "tspan",
        "polyline",
        "circle",
        "g",
    }
    assert all(len(name) <= 40 for name in words(drawn, "name"))
    assert not {"\x1b", "\x00", "\u202e"} & set("".join(drawn.itertext()))


def test_text_stays_in_its_box_and_boxes_on_the_page() -> None:
    for sites in (decoder(256, 512), encoder_decoder(), attention("encoder.layers.0", fused=True)):
        drawn = picture(sites, "a title " * 40)
        width, tall = float(drawn.get("width", "")), float(drawn.get("height", ""))
        for box in drawn.iter(f"{SVG}rect"):
            x, y, w, h = (float(box.get(key, "")) for key in ("x", "y", "width", "height"))
            assert x >= 0 and y >= 0 and x + w <= width + 0.1 and y + h <= tall + 0.1
        for line in drawn.iter(f"{SVG}text"):
            length = 6.6 * sum(len(word.text or "") for word in line)
            start = float(line.get("x", "")) - (length / 2 if line.get("text-anchor") == "middle" else 0)
            assert start >= 0 and start + length <= width


def test_no_picture_needs_anything_from_outside() -> None:
    text = draw(Anatomy(tuple(encoder_decoder())), "model")
    assert "href" not in text and "<script" not in text and "@import" not in text and "url(http" not in text


def test_a_model_without_sites() -> None:
    assert words(picture([]), "note") == ["no site has a role"]


def test_the_same_anatomy_gives_the_same_picture() -> None:
    assert draw(Anatomy(tuple(encoder_decoder()))) == draw(Anatomy(tuple(encoder_decoder())))
