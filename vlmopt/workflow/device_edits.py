"""What edits of one plan leave, for a device that is to know their operations before there is a task.

A profile of the model as it is knows no int8 product and no narrower layer, so a plan for that device would have to do
without. Here all sites of a kind are edited at once; numbers do not matter, sizes do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch

from vlmopt.core.contract import Context, Pass, StatRequest
from vlmopt.core.program import Program
from vlmopt.recipe import QUANTIZATIONS
from vlmopt.recipe.schema import PassStep
from vlmopt.recipe.together import TOKENS, WIDTHS
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step

_N_ROWS = 64
_INT8 = next(step for step in QUANTIZATIONS["int8"][0] if step.name == "quantize-int8")


def edited_programs(program: Program) -> Iterator[Program]:
    """The program with each number of tokens, widths and precision that `--together` offers, but as it is."""
    for tokens in ((), *((step,) for step in TOKENS)):
        reduced = _behind(program, tokens)
        if tokens and reduced is program:
            continue
        for widths in ((), *_in_turns(WIDTHS)):
            narrowed = _behind(reduced, widths)
            if widths and narrowed is reduced:
                continue
            if narrowed is not program:
                yield narrowed
            quantized = _behind(narrowed, (_INT8,))
            if quantized is not narrowed:
                yield quantized


def _in_turns(steps: Sequence[PassStep]) -> list[tuple[PassStep, ...]]:
    """Steps in sets that hold each pass once: two of one pass are ways to do the same."""
    by_name: dict[str, list[PassStep]] = {}
    for step in steps:
        by_name.setdefault(step.name, []).append(step)
    return [tuple(step for step in turn if step is not None) for turn in zip_longest(*by_name.values())]


def _behind(program: Program, steps: Sequence[PassStep]) -> Program:
    """The program behind all sites of the steps; itself where they have none."""
    for step in steps:
        pass_ = make_pass(step.name, step.options)
        result = run_step(program, pass_, Context(statistics=_invented(program, pass_)), step=1)
        program = result.program if result.applied else program
    return program


def _invented(program: Program, pass_: Pass) -> dict[StatRequest, object]:
    """Rows as of a task, for passes that want them."""
    generator, found = torch.Generator().manual_seed(0), dict[StatRequest, object]()
    for request in pass_.wants(program):
        nodes = program.components[request.component].graph.graph.nodes
        width = next(node.meta["val"].shape[-1] for node in nodes if node.name == request.node)
        if request.statistic == "rows":
            found[request] = torch.randn(_N_ROWS, int(width), generator=generator)
    return found
