"""The stages of a recipe as a drawing: layers from top to bottom, few crossings, only the edges that say something."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx

WIDTH, HEIGHT = 204, 62
"""Of a stage's box, pixels."""
GAP_X, GAP_Y = 28, 36
SWEEPS = 8
"""Passes that put each box below the middle of those above it, and above those below it."""


@dataclass(frozen=True)
class Box:
    """Where one stage stands."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Drawing:
    """A whole graph, sizes in pixels."""

    width: float
    height: float
    boxes: list[Box]
    edges: list[str]
    """SVG paths."""


def layout(needs: Mapping[str, Sequence[str]]) -> Drawing:
    """Positions of the stages (name -> the stages that it reads), and the edges between them.

    An edge that only repeats a longer way is left out. Where an edge passes a layer, a place is kept free for it.
    """
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(needs)
    graph.add_edges_from((need, name) for name, found in needs.items() for need in found if need in needs)
    graph = networkx.transitive_reduction(graph)
    layers, ways = _layers(graph)
    _untangle(layers, ways)
    width = max((len(layer) for layer in layers), default=1) * (WIDTH + GAP_X) + GAP_X
    centres = {
        name: (GAP_X / 2 + (place + 0.5 + (_most(layers) - len(layer)) / 2) * (WIDTH + GAP_X), depth)
        for depth, layer in enumerate(layers)
        for place, name in enumerate(layer)
    }
    tops = {name: (x, GAP_Y / 2 + depth * (HEIGHT + GAP_Y)) for name, (x, depth) in centres.items()}
    return Drawing(
        width=width,
        height=len(layers) * (HEIGHT + GAP_Y),
        boxes=[Box(name, tops[name][0] - WIDTH / 2, tops[name][1]) for name in needs],
        edges=[_path([tops[name] for name in way]) for way in ways],
    )


def _layers(graph: "networkx.DiGraph[str]") -> tuple[list[list[str]], list[list[str]]]:
    """Names in layers, with a name of its own for every layer that an edge passes; and the edges as chains of names."""
    layers = [sorted(layer) for layer in networkx.topological_generations(graph)]
    depth = {name: number for number, layer in enumerate(layers) for name in layer}
    ways = []
    for start, end in sorted(graph.edges):
        passed = [f"{start}>{end}@{level}" for level in range(depth[start] + 1, depth[end])]
        for level, name in enumerate(passed, start=depth[start] + 1):
            layers[level].append(name)
        ways.append([start, *passed, end])
    return layers, ways


def _untangle(layers: list[list[str]], ways: list[list[str]]) -> None:
    """Order each layer by the middle of its neighbours' places (Sugiyama's barycentre heuristic)."""
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for way in ways:
        for upper, lower in pairwise(way):
            above.setdefault(lower, []).append(upper)
            below.setdefault(upper, []).append(lower)
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        neighbours = above if downwards else below
        order = layers if downwards else layers[::-1]
        for fixed, layer in pairwise(order):
            place = {name: (number + 0.5) / len(fixed) for number, name in enumerate(fixed)}
            old = {name: (number + 0.5) / len(layer) for number, name in enumerate(layer)}
            middle = {
                name: sum(near) / len(near) if (near := [place[n] for n in neighbours.get(name, ())]) else old[name]
                for name in layer
            }
            layer.sort(key=middle.__getitem__)


def _most(layers: list[list[str]]) -> int:
    return max(map(len, layers), default=1)


def _path(points: list[tuple[float, float]]) -> str:
    """A smooth line from the bottom of the first box to the top of the last, straight through the places between."""
    (x, y), *rest = points
    y += HEIGHT
    parts = [f"M{x:.1f} {y:.1f}"]
    for number, (to_x, to_y) in enumerate(rest):
        bend = (to_y - y) / 2
        parts.append(f"C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y - bend:.1f} {to_x:.1f} {to_y:.1f}")
        x, y = to_x, to_y
        if number < len(rest) - 1:
            y += HEIGHT
            parts.append(f"L{x:.1f} {y:.1f}")
    return " ".join(parts)
