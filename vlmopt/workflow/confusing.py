"""`vlmopt triples`: wrong answers that a model itself finds likely, as triples for tuning by preference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmopt.core.errors import OutputExistsError
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress, Silent
from vlmopt.graph.joined import MODEL, joined
from vlmopt.graph.replay import run_component
from vlmopt.tasks.binding import bind
from vlmopt.tasks.dataset import Task, load_task
from vlmopt.tasks.feeding import Feeder
from vlmopt.tasks.kinds import text_generation
from vlmopt.tasks.splits import Sample
from vlmopt.tasks.triples import as_questions, candidates, write_triples
from vlmopt.workflow.opening import open_model

DEFAULT_CANDIDATES = 16


def make_triples(
    model: str,
    task: str,
    output: Path,
    *,
    question: str | None = None,
    n_candidates: int = DEFAULT_CANDIDATES,
    num_samples: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a task whose profile split has for every item the wrong answer that the model finds likeliest.

    Likely is what has the greatest mean log-probability of its tokens, so that length is no advantage. Items beyond
    `num_samples` are left out of the profile split; the other splits stay as they are.

    Raises:
        TaskError: the task has no closed answers, or the model writes no text.
        OutputExistsError: the output exists.
    """
    show = progress or Silent()
    if output.exists():
        raise OutputExistsError(str(output), "exists already", remedy="choose another path")
    asked = as_questions(load_task(task), question)
    samples = asked.samples("profile", limit=num_samples, seed=seed)
    wrong = candidates(samples, n_candidates)
    opened = open_model(model, device=device, dtype=dtype, allow_pickle=allow_pickle, progress=show)
    program = joined(bind(opened.program, asked, opened.preprocessor)).program
    pairs = [
        replace(sample, label=answer, references=(answer,))
        for sample, others in zip(samples, wrong, strict=True)
        for answer in (sample.label, *others)
    ]
    losses = _losses(program, asked, pairs, Feeder(opened.preprocessor), show)
    chosen: dict[Sample, str] = {}
    margins: list[float] = []
    for sample, others in zip(samples, wrong, strict=True):
        own, *rest = losses[: len(others) + 1].tolist()
        losses = losses[len(others) + 1 :]
        best = min(range(len(rest)), key=rest.__getitem__)
        chosen[sample] = others[best]
        margins.append(rest[best] - own)
    kept = asked if num_samples is None else _with_profile(asked, samples)
    write_triples(kept, chosen, output)
    return {
        "folder": str(output),
        "n": len(samples),
        "n_preferred_wrong": sum(margin < 0 for margin in margins),
        "mean_margin": sum(margins) / len(margins),
    }


def _losses(program: Program, task: Task, pairs: Sequence[Sample], feeder: Feeder, progress: Progress) -> Tensor:
    """The mean negative log-probability of the tokens of every pair's answer, [n]."""
    workload = text_generation.workload(program, task, pairs, feeder)
    feeds = workload.feeds[MODEL]
    tracked = progress.track(feeds, "likelihood of answers", total=len(feeds))
    with torch.no_grad():
        return workload.losses({MODEL: run_component(program.components[MODEL], tracked)})


def _with_profile(task: Task, samples: Sequence[Sample]) -> Task:
    splits = {"profile": tuple(samples), **{name: task.all_samples(name) for name in ("validation", "test")}}
    return Task(task.path, task.specification, splits, hashes=task.image_hashes())
