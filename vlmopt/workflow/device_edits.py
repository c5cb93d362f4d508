"""What edits of one plan leave, for a device that is to know their operations before there is a task.

A profile of the model as it is knows no int8 product and no narrower layer, so a plan for that device would have to do
without. Here all sites of a kind are edited at once; numbers do not matter, sizes do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product, zip_longest

import torch

from vlmopt.core.contract import Context, Pass, StatRequest
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.graph.modules import make_code
from vlmopt.graph.width_cuts import cut_anyhow
from vlmopt.graph.widths import find_head_groups, find_hidden
from vlmopt.recipe import QUANTIZATIONS
from vlmopt.recipe.schema import SHORTENING_PASSES, PassStep
from vlmopt.recipe.together import TOKENS, WIDTHS
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import clone_program

_WIDTHS = {"prune-heads": find_head_groups, "prune-ffn": find_hidden}
_SHORTENING = tuple(PassStep(name=name) for name in SHORTENING_PASSES)
_INT8 = next(step for step in QUANTIZATIONS["int8"][0] if step.name == "quantize-int8")


def edited_programs(program: Program, progress: Progress, *, together: bool) -> Iterator[Program]:
    """The program behind what spares it products, and with `together` with each number of tokens, widths and precision
    that `--together` offers, but as it is."""
    parts: tuple[Sequence[tuple[PassStep, ...]], ...] = (((), _SHORTENING),)
    if together:
        parts = (((), *((step,) for step in TOKENS)), ((), *_in_turns(WIDTHS)), *parts, ((), (_INT8,)))
    _, *plans = product(*parts)
    for plan in progress.track(plans, "edits that a run may make", total=len(plans)):
        edited = program
        for steps in plan:
            before, edited = edited, _behind(edited, steps)
            if steps and edited is before:
                break  # they have no sites, and the plan without them is among the others
        else:
            yield edited


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
        context = Context(statistics=_invented(program, pass_))
        plan, clone = pass_.plan(program, context), clone_program(program)
        for site in plan.sites:
            if step.name in _WIDTHS:  # which units stay is a search that takes minutes, and makes no difference here
                cut_anyhow(clone, site, _WIDTHS[step.name])
            else:
                pass_.apply(clone, site, context)
        for component in clone.components.values():
            make_code(component.graph)
        program = clone if plan.sites else program
    return program


def _invented(program: Program, pass_: Pass) -> dict[StatRequest, object]:
    """Rows as of a task, for passes that want them."""
    found: dict[StatRequest, object] = {}
    for request in pass_.wants(program):
        nodes = program.components[request.component].graph.graph.nodes
        width = next(node.meta["val"].shape[-1] for node in nodes if node.name == request.node)
        if request.statistic == "rows":
            found[request] = torch.zeros(1, int(width))
    return found
