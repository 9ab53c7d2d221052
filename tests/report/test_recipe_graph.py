import re
from itertools import pairwise

import pytest

from megatron_r1.report.recipe_graph import GAP_X, HEIGHT, WIDTH, Drawing, layout

RECIPE = {
    "corpus": [],
    "tokenizer": ["corpus"],
    "base": ["corpus", "tokenizer"],
    "r1_zero": ["base", "tokenizer"],
    "cold_start": ["base", "r1_zero"],
    "dev1": ["base", "cold_start"],
    "small": ["corpus", "tokenizer"],
    "distilled": ["small", "dev1"],
}


def points(edge: str) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", edge)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def tops(drawing: Drawing) -> dict[str, tuple[float, float]]:
    return {box.name: (box.x + WIDTH / 2, box.y) for box in drawing.boxes}


def test_every_stage_stands_below_what_it_reads() -> None:
    where = tops(layout(RECIPE))
    assert where.keys() == RECIPE.keys()
    for name, needs in RECIPE.items():
        for need in needs:
            assert where[name][1] > where[need][1] + HEIGHT


def test_boxes_do_not_overlap_and_are_inside() -> None:
    drawing = layout(RECIPE)
    for box in drawing.boxes:
        assert 0 <= box.x <= drawing.width - WIDTH
        assert 0 <= box.y <= drawing.height - HEIGHT
    for level in {box.y for box in drawing.boxes}:
        places = sorted(box.x for box in drawing.boxes if box.y == level)
        assert all(right - left >= WIDTH + GAP_X for left, right in pairwise(places))


def test_an_edge_that_a_longer_way_repeats_is_left_out() -> None:
    drawing = layout(RECIPE)
    where = tops(drawing)
    ends = {(points(edge)[0], points(edge)[-1]) for edge in drawing.edges}

    def drawn(start: str, end: str) -> bool:
        (x, y), last = where[start], where[end]
        return ((x, y + HEIGHT), last) in ends

    assert drawn("tokenizer", "base")
    assert drawn("small", "distilled")
    assert not drawn("corpus", "base")
    assert not drawn("base", "dev1")
    assert len(drawing.edges) == 8


def test_a_long_edge_goes_round_the_boxes() -> None:
    drawing = layout(RECIPE)
    long = next(edge for edge in drawing.edges if edge.count("L") >= 2)
    for upper, lower in ((points(long)[i], points(long)[i + 1]) for i in range(3, len(points(long)) - 1, 4)):
        for box in drawing.boxes:
            if box.y == pytest.approx(upper[1], abs=0.1):
                assert not box.x < upper[0] < box.x + WIDTH, (box, upper, lower)


def test_one_stage_and_none() -> None:
    assert len(layout({"base": []}).boxes) == 1
    assert layout({}).boxes == []
