"""Gives every box of a drawing a row and a lane, so that lines can run between boxes and never through them.

Rows are depths. Lane 0 is the spine: the value that the residual stream carries from input to output. The other lanes,
to its right, hold chains of boxes, each alone in its lane from its first row to its last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlmopt.core.drawing import Drawing, NodeKind
from vlmopt.core.errors import VlmoptError

SHORT_RUN = 12  # rows; what is read farther below than this is led around everything else
_LONGEST_TRAIL = 6  # rows that a line may run on below the last box of a chain, in the chain's own lane


@dataclass(frozen=True)
class Graph:
    """A drawing as numbers: node i of the drawing, its operands and its readers."""

    drawing: Drawing
    operands: Sequence[Sequence[int]]
    readers: Sequence[Sequence[int]]

    @classmethod
    def of(cls, drawing: Drawing) -> Graph:
        """The graph; who makes a drawing lists its boxes so that every edge runs forward."""
        index = {node.key: i for i, node in enumerate(drawing.nodes)}
        operands: list[list[int]] = [[] for _ in drawing.nodes]
        readers: list[list[int]] = [[] for _ in drawing.nodes]
        for source, target in dict.fromkeys(drawing.edges):
            if index.get(source, len(index)) >= index.get(target, -1):
                found = f"the edge from {source!r} to {target!r} does not run along the order of the boxes"
                raise VlmoptError(f"drawing {drawing.title!r}", found, expected="boxes in topological order")
            operands[index[target]].append(index[source])
            readers[index[source]].append(index[target])
        return cls(drawing, operands, readers)


@dataclass(frozen=True)
class Ranks:
    """Row and lane of every box; `straight` are the edges that run down a lane; `trails` are the boxes below which the
    lane is free down to that row, for a line."""

    rows: Sequence[int]
    lanes: Sequence[int]
    straight: frozenset[tuple[int, int]]
    trails: dict[int, int]


def rank(graph: Graph) -> Ranks:
    """Rows and lanes of all boxes, the same for the same drawing."""
    depths = _depths(graph)
    spine = _spine(graph, depths)
    is_after = _after(graph, spine)
    rows = _rows(graph, depths, is_after)
    chains = _chains(graph, set(spine), [_main_operand(graph, i, depths, is_after) for i in range(len(depths))])
    trails = _trails(graph, chains, rows)
    serving = {chain[0] for chain in chains if not is_after[chain[0]] or _is_read_far_below(graph, chain[-1], rows)}
    lanes = _lanes(chains, rows, trails, serving)
    lanes.update(dict.fromkeys(spine, 0))
    straight = frozenset(pair for chain in (spine, *chains) for pair in pairwise(chain))
    linked = frozenset((a, b) for a, b in straight if b in graph.readers[a])
    return Ranks(rows, [lanes[i] for i in range(len(rows))], linked, trails)


def _depths(graph: Graph) -> list[int]:
    depths: list[int] = []
    for operands in graph.operands:
        depths.append(1 + max((depths[i] for i in operands), default=-1))
    return depths


def _spine(graph: Graph, depths: Sequence[int]) -> list[int]:
    """From the deepest box upwards, along the residual stream where a box says so, else along the longest way that
    begins at an input."""
    if not depths:
        return []
    index = {node.key: i for i, node in enumerate(graph.drawing.nodes)}
    inputs = [i for i, node in enumerate(graph.drawing.nodes) if node.kind is NodeKind.INPUT]
    is_fed = _after(graph, inputs)
    current = max(range(len(depths)), key=lambda i: (depths[i], i))
    spine = [current]
    while graph.operands[current]:
        followed = index.get(graph.drawing.nodes[current].follows)
        is_operand = followed is not None and followed in graph.operands[current]
        deepest = max(graph.operands[current], key=lambda i: (is_fed[i], _weight(graph, i), depths[i], -i))
        current = followed if is_operand and followed is not None else deepest
        spine.append(current)
    return spine[::-1]


def _weight(graph: Graph, node: int) -> int:
    """What is computed comes before what is stored, and numbers come last."""
    return {NodeKind.SIZE: 0, NodeKind.TENSOR: 1}.get(graph.drawing.nodes[node].kind, 2)


def _after(graph: Graph, sources: Sequence[int]) -> list[bool]:
    """Which boxes compute from one of these; what reads only sizes of them does not."""
    is_after = [False] * len(graph.operands)
    for i in sources:
        is_after[i] = True
    for i, operands in enumerate(graph.operands):
        is_size = graph.drawing.nodes[i].kind is NodeKind.SIZE
        is_after[i] = is_after[i] or (not is_size and any(is_after[operand] for operand in operands))
    return is_after


def _rows(graph: Graph, depths: Sequence[int], is_after: Sequence[bool]) -> list[int]:
    """Depths; what does not compute from the spine moves down to where it is read."""
    rows = list(depths)
    for i in reversed(range(len(rows))):
        if not is_after[i] and graph.readers[i]:
            rows[i] = min(rows[reader] for reader in graph.readers[i]) - 1
    return rows


def _chains(graph: Graph, spine: set[int], main: Sequence[int]) -> list[list[int]]:
    """Boxes beside the spine as chains, each going on to the reader with the longest way ahead of it."""
    ahead = [0] * len(graph.readers)
    for i in reversed(range(len(ahead))):
        ahead[i] = 1 + max((ahead[reader] for reader in graph.readers[i] if reader not in spine), default=0)
    taken = set(spine)
    chains = []
    for start in range(len(ahead)):
        if start in taken:
            continue
        chain = [start]
        taken.add(start)
        while onward := [i for i in graph.readers[chain[-1]] if i not in taken and main[i] == chain[-1]]:
            chain.append(max(onward, key=lambda i: (ahead[i], -i)))
            taken.add(chain[-1])
        chains.append(chain)
    return chains


def _main_operand(graph: Graph, node: int, depths: Sequence[int], is_after: Sequence[bool]) -> int:
    """The operand that a box continues: what comes from the stream on the longest way, the first one of several."""
    operands = graph.operands[node]
    return max(operands, key=lambda i: (is_after[i], _weight(graph, i), depths[i], -operands.index(i)), default=-1)


def _is_read_far_below(graph: Graph, node: int, rows: Sequence[int]) -> bool:
    return any(rows[reader] - rows[node] > SHORT_RUN for reader in graph.readers[node])


def _trails(graph: Graph, chains: Iterable[Sequence[int]], rows: Sequence[int]) -> dict[int, int]:
    trails = {}
    for chain in chains:
        last = max((rows[reader] for reader in graph.readers[chain[-1]]), default=0) - 1
        if 0 < last - rows[chain[-1]] <= _LONGEST_TRAIL:
            trails[chain[-1]] = last
    return trails


def _lanes(
    chains: Sequence[Sequence[int]], rows: Sequence[int], trails: dict[int, int], serving: set[int]
) -> dict[int, int]:
    """For every chain the first lane in which its rows are free; branches come first, so that they lie beside the
    stream, and what serves them from the side (masks, sizes) lies outside."""
    taken: defaultdict[int, set[int]] = defaultdict(set)
    lanes: dict[int, int] = {}
    for chain in sorted(chains, key=lambda chain: (chain[0] in serving, rows[chain[0]], chain[0])):
        needed = range(rows[chain[0]], trails.get(chain[-1], rows[chain[-1]]) + 1)
        lane = 1
        while not taken[lane].isdisjoint(needed):
            lane += 1
        taken[lane].update(needed)
        lanes.update(dict.fromkeys(chain, lane))
    return lanes
