"""Phantom Optimization: the preference term against sums by hand, and what it does to a model that writes answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests import toys
from tests.profiling.workloads import Classification
from vlmopt.capture import capture
from vlmopt.core.errors import RecipeError, TaskError, TuningError
from vlmopt.core.progress import Silent
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.joined import MODEL, joined
from vlmopt.graph.replay import run_component
from vlmopt.preprocess import Preprocessor
from vlmopt.recipe.loading import default_recipe
from vlmopt.tasks.binding import TaskSource, bind
from vlmopt.tasks.dataset import load_task
from vlmopt.tuning.gradient import tune
from vlmopt.tuning.objective import preference
from vlmopt.tuning.settings import TuningSettings
from vlmopt.workflow.confusing import make_triples
from vlmopt.workflow.refusing import refuse_recovery


def test_the_preference_is_the_papers_sum() -> None:
    chosen, rejected = [[-0.2, -1.1, -0.3], [-4.0]], [[-0.9, -0.1], [-0.5, -0.5, -2.0, -1.0]]  # log pi by token
    wanted = [
        -math.log(1 / (1 + math.exp(-(2 / len(a) * sum(a) - 2 / len(b) * sum(b) - 0.5))))
        for a, b in zip(chosen, rejected, strict=True)
    ]
    losses = [torch.tensor([-sum(row) / len(row) for row in side]) for side in (chosen, rejected)]
    found = preference(*losses, beta=2.0, gamma=0.5)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted, abs=1e-7)
    assert wanted[1] > wanted[0]  # the second pair is the wrong way round


def test_a_large_lead_overflows_in_neither_direction() -> None:
    found = preference(torch.tensor([0.0, 1e4]), torch.tensor([1e4, 0.0]), beta=2.0, gamma=0.5)
    assert found.tolist() == pytest.approx([0.0, 2e4 + 0.5], abs=1e-9)


class Parts(Classification):
    """Can be taken in parts, and knows of no rejected answers."""

    def rows(self, component: str, items: Sequence[int]) -> Sequence[int]:
        return items

    def part(self, items: Sequence[int]) -> Classification:
        return self


def test_tuning_by_preference_needs_rejected_answers() -> None:
    program = program_of(ResidualBlocks(), torch.ones(2, 8))
    workload = Parts(torch.ones(4, 8), torch.tensor([0, 1, 2, 0]), ("a", "b", "c"))
    settings = TuningSettings(epochs=1, preference=1.0)
    with pytest.raises(TuningError, match="there are no rejected answers"):
        tune(program, lambda key: True, workload, workload, None, settings, progress=Silent())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy LLaVA, a task about colours, and triples that the model itself made of it."""
    root = tmp_path_factory.mktemp("preference")
    toys.write_model("llava_llama", root / "model")
    toys.write_task(root / "task", "image-text-to-text", n=9)
    made = make_triples(str(root / "model"), str(root / "task"), root / "triples")
    assert made["n"] == 9
    return root


def test_the_rejected_answer_is_the_wrong_one_that_the_model_finds_likeliest(folder: Path) -> None:
    triples = load_task(folder / "triples")
    preprocessor = Preprocessor.load(folder / "model")
    program = joined(bind(capture(str(folder / "model")), triples, preprocessor)).program
    assert triples.counts == {"profile": 9, "validation": 9, "test": 9}
    losses = {}
    for colour in toys.COLOURS:  # the mean over its tokens of every answer to every item, by another way
        rows = (folder / "triples" / "metadata.jsonl").read_text().replace('"answer": ["', '"answer": ["~')
        other = folder / f"all-{colour}"
        if not other.exists():
            other.mkdir()
            (other / "images").symlink_to(folder / "triples" / "images")
            (other / "task.yaml").write_text("kind: image-text-to-text\ncolumns: {split: split, group: group}\n")
            for word in toys.COLOURS:
                rows = rows.replace(f'"answer": ["~{word}"]', f'"answer": "{colour}"')
            lines = rows.splitlines()
            lines[-1] = lines[-1].replace(f'"answer": "{colour}"', '"answer": "none"')  # a task has two answers
            (other / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        source = TaskSource(load_task(other), preprocessor)
        workload = source.workload(program, "profile")
        losses[colour] = workload.losses({MODEL: run_component(program.components[MODEL], workload.feeds[MODEL])})
    for i, sample in enumerate(triples.samples("profile")):
        wrong = {colour: float(losses[colour][i]) for colour in toys.COLOURS if colour != sample.label}
        assert sample.rejected == min(wrong, key=wrong.__getitem__)


def test_training_by_preference_widens_the_lead_of_the_expected_answers(folder: Path) -> None:
    triples = load_task(folder / "triples")
    preprocessor = Preprocessor.load(folder / "model")
    bound = bind(capture(str(folder / "model")), triples, preprocessor)
    program = joined(bound).program
    source = TaskSource(triples, preprocessor)
    fit = source.workload(program, "profile")

    def lead(weights: float) -> float:
        settings = TuningSettings(epochs=3, learning_rate=3e-3, batch_items=9, patience=9, preference=weights)
        done = tune(program, lambda key: ".mlp." in key, fit, fit, None, settings, progress=Silent()).program
        own = fit.losses({MODEL: run_component(done.components[MODEL], fit.feeds[MODEL])})
        other = fit.rejected()  # type: ignore[attr-defined]
        against = other.losses({MODEL: run_component(done.components[MODEL], other.feeds[MODEL])})
        return float(F.logsigmoid(2 * (against - own) - 0.5).mean())

    assert lead(4.0) > lead(0.0)


def test_items_without_a_rejected_answer_are_named(folder: Path) -> None:
    task = load_task(folder / "triples")
    source = TaskSource(task, Preprocessor.load(folder / "model"))
    program = bind(capture(str(folder / "model")), task, Preprocessor.load(folder / "model"))
    with pytest.raises(TaskError, match=r"metadata.jsonl, line 10: has no rejected answer"):
        source.workload(program, "validation").rejected()  # type: ignore[attr-defined]


def test_a_recipe_that_cannot_prefer_anything_is_refused_early() -> None:
    fused = program_of(ResidualBlocks(), torch.ones(2, 8))
    trained = default_recipe("m", None, {"recovery.level": "adapters", "recovery.preference": 1.0})
    with pytest.raises(RecipeError, match="the model writes no text"):
        refuse_recovery(trained, fused)
    with pytest.raises(RecipeError, match="level head trains nothing"):
        refuse_recovery(default_recipe("m", None, {"recovery.preference": 1.0}), fused)
