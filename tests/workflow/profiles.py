"""Profiles made by hand, for plans whose best cut can be found by trying them all."""

from __future__ import annotations

import random
from pathlib import Path

from vlmopt.profiling.document import (
    Profile,
    ProfileCost,
    ProfiledInteraction,
    ProfiledModel,
    ProfiledScore,
    ProfiledTask,
    ProfiledTotal,
    ProfileStability,
)

N_LAYERS = 4
MACS = {"attention": 90, "ffn": 130}
TIMES = {"attention": 70.0, "ffn": 60.0}
PARAMS = {"attention": 20, "ffn": 40}
TOTAL_MACS, TOTAL_PARAMS, TOTAL_US = 1000, 300, 800.0


def profile(
    task: str,
    *,
    seed: int,
    model: str = "model-a",
    with_drops: bool = True,
    with_totals: bool = True,
    with_times: bool = True,
    interactions: tuple[ProfiledInteraction, ...] = (),
    stability: ProfileStability | None = None,
) -> Profile:
    """Four layers of an attention and an FFN branch, losses and drops drawn at random."""
    draw = random.Random(seed)
    scores = []
    for layer in range(N_LAYERS):
        both = []
        for kind in ("attention", "ffn"):
            loss = round(draw.uniform(-0.02, 0.3), 3)
            both.append(_score(f"layers.{layer}.{kind}", kind, layer, loss, with_drops=with_drops))
        together = round(sum(score.score for score in both) + draw.uniform(-0.05, 0.05), 3)
        layer_score = _score(f"layers.{layer}", "layer", layer, together, with_drops=with_drops)
        names = tuple(score.name for score in both)
        scores += [*both, layer_score.model_copy(update={"branches": names, "scope": "layer"})]
    if not with_times:
        scores = [score.model_copy(update={"latency_us": None}) for score in scores]
    total = ProfiledTotal(
        component="encoder",
        params=TOTAL_PARAMS,
        params_bytes=4 * TOTAL_PARAMS,
        macs=TOTAL_MACS,
        latency_us=TOTAL_US if with_times else None,
    )
    return Profile(
        vlmopt="0",
        created="2026-01-01",
        model=ProfiledModel(path="toy", model_type="toy", architecture="Toy", fingerprint=model),
        task=ProfiledTask(name=task, kind="image-classification", fingerprint=f"data of {task}", n_items=10),
        estimator="leave-one-out",
        scoring="refit",
        unit="loss",
        seed=0,
        dtype="float32",
        versions={},
        cost=ProfileCost(forward_passes=1.0, seconds=1.0),
        reference_loss=0.5,
        scores=tuple(scores),
        interactions=interactions,
        totals=(total,) if with_totals else (),
        stability=stability,
    )


def _score(name: str, kind: str, layer: int, loss: float, *, with_drops: bool) -> ProfiledScore:
    is_layer = kind == "layer"
    return ProfiledScore(
        component="encoder",
        name=name,
        scope="branch",
        kind=kind,
        layer=layer,
        branches=(name,),
        params=sum(PARAMS.values()) if is_layer else PARAMS[kind],
        macs=sum(MACS.values()) if is_layer else MACS[kind],
        score=loss,
        stderr=0.01,
        drop_points=round(10 * loss, 3) if with_drops else None,
        drop_stderr=0.3 if with_drops else None,
        latency_us=sum(TIMES.values()) if is_layer else TIMES[kind],
    )


def written(folder: Path, made: Profile) -> Path:
    path = folder / f"{made.task.name}.json"
    path.write_text(made.to_json(), encoding="utf-8")
    return path
