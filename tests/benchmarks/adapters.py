"""Adapters on the LLaVA example: counts at real size, what folding changes, and what training each kind is worth.

`folding`: LoRA on every Linear of the example but its head, whose weight is also the table of words, with random
weights, folded: the largest error of a weight against the sum in float64, and of the logits; and whether the program
has the nodes and the size of the one without adapters again.

`lily`: routed Lily on the decoder, random weights: how far the weights may move when the routers become constants
(certificate), and how far the logits really do, behind a prompt and behind one cached step.

`trained`: every kind with the same items, steps and recovery, three seeds (`trained_adapters.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks import towers
from tests.benchmarks.adapter_counts import counts
from vlmopt.core.contract import Context, StatRequest
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.adapters import adapter_parameters, site_name
from vlmopt.graph.assembled import DECODER
from vlmopt.graph.costing import program_cost
from vlmopt.graph.mixtures import Exchange, exchanges, find_mixtures
from vlmopt.graph.modules import ADAPTERS, get_at
from vlmopt.profiling.node_statistics import node_statistics
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import program_text, run_step
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.verify.parity import difference, program_scores
from vlmopt.workflow.opening import open_model, open_task
from vlmopt.workflow.samples import sample_shapes

TASK = "style"
SIZE = 0.02  # of random factors: the change they make is a few percent of a weight
PLACES = ("prefill", "decode")


def parts() -> Mapping[str, Callable[[], Mapping[str, float]]]:
    """What can be measured on its own."""
    from tests.benchmarks import trained_adapters

    return {
        "counts": counts,
        "folding": _folding,
        "lily": _lily,
        "trained": partial(trained_adapters.figures, TASK),
    }


def _folding() -> dict[str, float]:
    program, _ = _example()
    adapted = _adapted(program, {"rank": 8, "modules": ["vision_encoder/*", f"{DECODER}/*layers*"]})
    folded = run_step(adapted, make_pass("fold-adapters", {}), Context(), step=2)
    worst = 0.0
    for site in folded.applied:
        (path,) = site.target
        graph, own = adapted.components[site.component].graph, f"{ADAPTERS}.{site_name(path)}.low_rank"
        down, up = (_weight(graph, f"{own}.{part}").double() for part in ("down", "up"))
        wanted = _weight(graph, path).double() + 2.0 * up @ down
        error = (_weight(folded.program.components[site.component].graph, path).double() - wanted).abs().max()
        worst = max(worst, float(error / wanted.abs().max()))
    return {
        "lora_folded_linears": float(len(folded.applied)),
        "lora_refused_linears": float(len(folded.refusals)),
        "lora_fold_weight_error": worst,
        **{f"lora_fold_logits_error_{place}": gap for place, gap in _logit_gaps(adapted, folded.program).items()},
        "lora_folded_has_the_same_nodes": float(program_text(folded.program) == program_text(program)),
        "lora_folded_size_ratio": program_cost(folded.program).parameters_bytes
        / program_cost(program).parameters_bytes,
    }


def _lily() -> dict[str, float]:
    program, fit = _example()
    options = {"kind": "lily", "mixture": "routed", "rank": 16, "stride": 5, "experts": 4, "alpha": 1.0}
    adapted = _adapted(program, {**options, "modules": [f"{DECODER}/*layers*"]})
    pass_ = make_pass("fold-routers", {"tolerance": 1.0})
    known = node_statistics(adapted, pass_.wants(adapted), fit, Silent())
    certificates = [one for one in _certificates(adapted, known) if isinstance(one, Exchange)]
    constant = run_step(adapted, pass_, Context(statistics=known), step=2)
    folded = run_step(constant.program, make_pass("fold-adapters", {}), Context(), step=3)
    return {
        "lily_routers": float(len(certificates)),
        "lily_routers_folded": float(len(constant.applied)),
        "lily_linears_folded": float(len(folded.applied)),
        "lily_certificate_rms_worst": max(one.rms for one in certificates),
        "lily_certificate_any_input_worst": max(one.largest for one in certificates),
        **{f"lily_fold_logits_change_{place}": gap for place, gap in _logit_gaps(adapted, folded.program).items()},
        "lily_folded_has_the_same_nodes": float(program_text(folded.program) == program_text(program)),
    }


def _n_bytes(program: Program) -> int:
    return program_cost(program).parameters_bytes


def _certificates(program: Program, known: Mapping[StatRequest, Tensor]) -> list[Exchange | str]:
    found: list[Exchange | str] = []
    for name, component in program.components.items():
        nodes = [mixture.node.name for mixture in find_mixtures(component.graph)]
        moments = {
            node: (known[StatRequest(name, node, "mean")], known[StatRequest(name, node, "second_moment")])
            for node in nodes
        }
        found += exchanges(component.graph, moments).values()
    return found


def _example() -> tuple[Program, TaskWorkload]:
    home = towers.cache() / "llava"
    opened = open_model(str(home / "model"), device="cpu", dtype="float32", allow_pickle=False, progress=Silent())
    bound = open_task(opened, str(home / "tasks" / TASK), seed=0, progress=Silent())
    clean = run_step(bound.program, make_pass("canonicalize", {}), Context(), step=1).program
    return clean, bound.source.workload(clean, "profile", limit=64)


def _adapted(program: Program, options: dict[str, Any]) -> Program:
    """The program with adapters of random weights."""
    adapted = run_step(program, make_pass("insert-low-rank-adapter", options), Context(), step=1).program
    generator = torch.Generator().manual_seed(1)
    for weight in adapter_parameters(adapted).values():
        weight.data = SIZE * torch.randn(weight.shape, generator=generator)
    return adapted


def _logit_gaps(before: Program, after: Program) -> dict[str, float]:
    """Largest difference of the decoder's logits over the largest logit, behind a prompt and behind a cached step."""
    feeds = sample_shapes(before, None, seed=0)
    found: dict[str, float] = {}
    for i, place in enumerate(PLACES):
        feed = {name: shapes[min(i, len(shapes) - 1)] for name, shapes in feeds.items()}
        wanted, seen = (program_scores(side, feed)["logits"] for side in (before, after))
        found[place] = difference(seen, wanted)
    return found


def _weight(graph: nn.Module, path: str) -> Tensor:
    leaf = get_at(graph, path)
    assert isinstance(leaf, nn.Linear)
    return leaf.weight.detach()
