"""Recipes that traverse layers: trained in stages, gates measured and shown, dropped before emission or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml

from tests import toys
from tests.conftest import Workshop
from tests.workflow.answerer import write_answerer
from vlmopt.cli import entry
from vlmopt.core.errors import PassOptionError
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.recipe.loading import load_recipe
from vlmopt.recipe.schema import RecoverySettings
from vlmopt.registry import make_pass
from vlmopt.tuning.gradient import Epoch, Tuned
from vlmopt.workflow.recovering import trains_after
from vlmopt.workflow.trainings import followed, trainings_of

Capture = pytest.CaptureFixture[str]
STAGES = [
    {"train": ["*traversal_*", "*projector*"], "epochs": 2, "learning_rate": 2e-2},
    {"train": ["*adapters.*", "*projector*"], "epochs": 1},
]
EXAMPLES = Path(__file__).parents[2] / "examples"


def optimized(folder: Path, capsys: Capture, *passes: object, **more: object) -> tuple[dict[str, Any], Path]:
    recipe, out = folder / "recipe.yaml", folder / "out"
    content = {"passes": ["canonicalize", *passes], "verify": {"max_drop_gate": False}, **more}
    recipe.write_text(yaml.safe_dump(content))
    assert entry.run(["optimize", "-q", "--json", "--recipe", str(recipe), "-o", str(out)]) == 0, (
        capsys.readouterr().err
    )
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found, out


@pytest.mark.slow
def test_a_traversed_answerer_is_trained_in_two_stages_and_emitted_with_branches(
    workshop: Workshop, tmp_path: Path, capsys: Capture
) -> None:
    task = workshop.folder("asked", lambda path: toys.write_task(path, "image-text-to-text", n=48))
    model = workshop.folder("answerer", lambda path: write_answerer(path, task))
    lora = {"insert-low-rank-adapter": {"rank": 2, "modules": ["decoder_model_merged/*.v_proj"]}}
    recovery = {"level": "adapters", "stages": STAGES, "batch_items": 12}
    passes = (lora, {"insert-traversal": {"n_layers": 1}}, "fold-constants")
    report, out = optimized(tmp_path, capsys, *passes, model=str(model), task=str(task), recovery=recovery)
    assert all(gate["passed"] for gate in report["gates"])
    assert [epoch["number"] for epoch in report["recovery"]["epochs"]] == [0, 1, 2, 3]
    (gate,) = report["traversals"]
    assert (gate["component"], gate["number"], gate["is_kept"]) == ("decoder_model_merged", 1, True)
    assert gate["mean"] != 0.0
    assert gate["spread"] > 0.0
    assert "Traversed layers" in (out / "report.html").read_text()
    graph = onnx.load(out / "onnx" / "decoder_model_merged.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("If") == 1
    again = tmp_path / "again"
    assert entry.run(["optimize", "-q", "--recipe", str(out / "recipe.yaml"), "-o", str(again)]) == 0
    file = Path("onnx") / "decoder_model_merged.onnx"
    assert (again / file).read_bytes() == (out / file).read_bytes()


@pytest.mark.slow
def test_a_dual_encoder_trained_with_traversal_is_deployed_without(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    passes = ({"insert-traversal": {"n_layers": 1}}, {"drop-traversal": {"below": 10.0}})
    recovery = {"level": "adapters", "epochs": 1, "learning_rate": 1e-2}
    report, _ = optimized(tmp_path, capsys, *passes, model=str(clip), task=str(colours), recovery=recovery)
    assert report["recovery"]["n_trainable"] > 0
    assert {one["component"] for one in report["traversals"]} == {"image_encoder"}
    assert not any(one["is_kept"] for one in report["traversals"])
    steps = {step["name"]: step for step in report["passes"]}
    assert steps["drop-traversal"]["counted"]["macs"] == -steps["insert-traversal"]["counted"]["macs"] > 0
    cost = report["result"]["cost"]
    assert cost["original"]["parameters"] == cost["optimized"]["parameters"]


def test_a_bound_on_gates_without_a_task_is_refused(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "recipe.yaml"
    passes = ["canonicalize", "insert-traversal", {"drop-traversal": {"below": 0.1}}]
    recipe.write_text(yaml.safe_dump({"model": str(clip), "passes": passes}))
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 1
    assert "wants statistics of a task, and there is none" in capsys.readouterr().err


def test_training_takes_place_in_front_of_what_takes_traversals_out() -> None:
    names = ("canonicalize", "insert-traversal", "insert-low-rank-adapter", "drop-traversal", "fold-constants")
    passes = [make_pass(name, {}) for name in names]
    recovery = RecoverySettings(level="adapters")
    assert trains_after(passes, recovery) == 3
    assert trains_after(passes[:3], recovery) == 3
    assert trains_after(passes[:2], recovery) == 2
    assert trains_after(passes, RecoverySettings()) is None


def test_stages_name_what_trains_and_what_differs() -> None:
    program = program_of(ResidualBlocks(), torch.ones(2, 8))
    stages = [{"train": ["*.up.*"], "epochs": 2}, {"train": ["model/head.bias"]}]
    recovery = RecoverySettings.model_validate({"level": "weights", "epochs": 5, "stages": stages})
    first, second = trainings_of(program, recovery, seed=3)
    assert (first.settings.epochs, second.settings.epochs, second.settings.seed) == (2, 5, 3)
    assert first.wanted("model/layers.0.up.weight")
    assert not first.wanted("model/head.bias")
    assert second.wanted("model/head.bias")
    wrong = RecoverySettings.model_validate({"level": "weights", "stages": [{"train": ["*.upp.*"]}]})
    with pytest.raises(PassOptionError, match=r"recovery: stage 1.*matches nothing"):
        trainings_of(program, wrong, seed=0)
    with pytest.raises(ValueError, match="level head trains none"):
        RecoverySettings.model_validate({"stages": stages})


def test_two_trainings_are_one_history() -> None:
    def made(*scores: float, best: int) -> Tuned:
        epochs = tuple(Epoch(number, None, 1.0, score, 0.0) for number, score in enumerate(scores))
        return Tuned(program_of(ResidualBlocks(), torch.ones(2, 8)), epochs, best, 7)

    first = made(0.1, 0.3, 0.2, best=1)
    joined = followed(first, made(0.3, 0.2, 0.4, best=2))
    assert [epoch.number for epoch in joined.history] == [0, 1, 2, 3, 4]
    assert (joined.best, joined.history[joined.best].validation_score) == (4, 0.4)
    assert followed(first, made(0.3, 0.2, best=0)).best == 1


@pytest.mark.parametrize("path", ["llava/recipes/vegetarian-traversal.yaml", "emoji/recipes/retrieval-traversal.yaml"])
def test_the_recipes_of_the_examples_are_read_and_their_passes_are_in_order(path: str) -> None:
    from vlmopt.workflow.optimizing import load_passes

    recipe = load_recipe(EXAMPLES / path)
    assert {pass_.name for pass_ in load_passes(recipe)} > {"insert-traversal", "drop-traversal"}
