"""Training as a part of a run: it is in the report and the recipe, goes on after a stop, and refuses what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
import yaml

from vlmopt.cli import entry
from vlmopt.recipe.schema import RecoverySettings
from vlmopt.registry import make_pass
from vlmopt.rundir import TUNING_WORK
from vlmopt.tuning.gradient import Epoch, State
from vlmopt.workflow import recovering
from vlmopt.workflow.recovering import FileStore, trains_after

Capture = pytest.CaptureFixture[str]
CUT = {"skip-branches": {"branches": ["*layers.1.*"]}}


def recipe_file(folder: Path, clip: Path, task: Path | None, **recovery: object) -> Path:
    content = {
        "model": str(clip),
        "passes": ["canonicalize", CUT, "fold-constants"],
        "recovery": {"level": "weights", "epochs": 2, "learning_rate": 1e-3, **recovery},
        "verify": {"max_drop_gate": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | ({"task": str(task)} if task else {})))
    return path


def optimize(*words: object) -> int:
    return entry.run(["optimize", "-q", *(str(word) for word in words)])


def test_a_run_that_trains_says_how_it_went_and_repeats_itself(clip: Path, colours: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert optimize("--recipe", recipe_file(tmp_path, clip, colours), "-o", out) == 0
    report = json.loads((out / "report.json").read_text())
    recovery = report["recovery"]
    assert (recovery["level"], [epoch["number"] for epoch in recovery["epochs"]]) == ("weights", [0, 1, 2])
    ranks = [(epoch["validation_score"], -epoch["validation_loss"]) for epoch in recovery["epochs"]]
    assert recovery["best_epoch"] == ranks.index(max(ranks))
    assert recovery["n_trainable"] == report["result"]["cost"]["optimized"]["parameters"]
    assert "Training after the cut" in (out / "report.html").read_text()
    assert not (out / ".work" / TUNING_WORK).exists()
    assert optimize("--recipe", out / "recipe.yaml", "-o", tmp_path / "again") == 0
    assert (tmp_path / "again" / "image_encoder.onnx").read_bytes() == (out / "image_encoder.onnx").read_bytes()


def test_weights_train_before_they_are_rounded_and_the_trained_head_stays(
    clip: Path, colours: Path, tmp_path: Path
) -> None:
    recipe = recipe_file(tmp_path, clip, colours)
    rounded = yaml.safe_load(recipe.read_text()) | {"budgets": {"max_drop": 60.0}}
    rounded["passes"].insert(2, "quantize-int8")
    (tmp_path / "rounded.yaml").write_text(yaml.safe_dump(rounded))
    assert optimize("--recipe", recipe, "-o", tmp_path / "out") == 0
    assert optimize("--recipe", tmp_path / "rounded.yaml", "-o", tmp_path / "rounded") == 0
    plain, small = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "rounded"))
    losses = [[one["validation_loss"] for one in report["recovery"]["epochs"]] for report in (plain, small)]
    assert losses[0] == losses[1]
    assert small["recovery"]["n_trainable"] == plain["recovery"]["n_trainable"]  # whatever is rounded behind it
    files = [onnx.load(tmp_path / name / "image_encoder.onnx") for name in ("out", "rounded")]
    assert "MatMulInteger" in {node.op_type for node in files[1].graph.node}
    heads = [
        {one.name: onnx.numpy_helper.to_array(one) for one in file.graph.initializer if "task_head" in one.name}
        for file in files
    ]
    assert heads[0]
    assert heads[0].keys() == heads[1].keys()
    assert all((heads[0][name] == heads[1][name]).all() for name in heads[0])


def test_adapters_train_behind_a_rounding_and_weights_in_front_of_it() -> None:
    names = ("canonicalize", "skip-branches", "quantize-int8", "fold-constants")
    passes = [make_pass(name, {}) for name in names]
    assert trains_after(passes, RecoverySettings(level="weights")) == 2
    assert trains_after(passes, RecoverySettings(level="adapters")) == 3
    assert trains_after([passes[0], passes[2]], RecoverySettings(level="weights")) == 2


def test_a_run_stopped_while_it_trains_goes_on_from_the_last_epoch(
    clip: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_file(tmp_path, clip, colours)
    assert optimize("--recipe", recipe, "-o", tmp_path / "whole") == 0
    save = FileStore.save

    def stopped(store: FileStore, state: State) -> None:
        save(store, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recovering.FileStore, "save", stopped)
        assert optimize("--recipe", recipe, "-o", tmp_path / "out") == 130
    assert not (tmp_path / "out").exists()
    (kept,) = (tmp_path / ".out.partial" / ".work" / TUNING_WORK).glob("*/state.safetensors")
    assert [epoch.number for epoch in FileStore(kept.parent).load().history] == [0, 1]  # type: ignore[union-attr]
    assert optimize("--recipe", recipe, "-o", tmp_path / "out") == 0
    whole, resumed = (tmp_path / name / "image_encoder.onnx" for name in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_closed_form_recovery_compares_heads_alone_with_kept_branches_fitted_too(
    clip: Path, colours: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = recipe_file(tmp_path, clip, colours, level="closed-form")
    assert optimize("--recipe", recipe, "-o", out) == 0
    entries = [json.loads(line) for line in (out / ".work" / "ledger.jsonl").read_text().splitlines()]
    (found,) = [entry for entry in entries if entry["stage"] == "compensation"]
    assert found["event"] == "image_encoder"
    assert (found["compensated"] < found["heads_alone"]) == bool(found["fits"])
    assert all(fit["after"] <= fit["before"] for fit in found["fits"])
    assert optimize("--recipe", out / "recipe.yaml", "-o", tmp_path / "again") == 0
    assert (tmp_path / "again" / "image_encoder.onnx").read_bytes() == (out / "image_encoder.onnx").read_bytes()


@pytest.mark.parametrize(
    ("has_task", "recovery", "said"),
    [
        (False, {}, "recovery: weights trains on a task"),
        (True, {"level": "adapters", "epochs": 1}, "only the heads would be trained"),
        (True, {"level": "everything"}, "recovery.level"),
        (True, {"epoch": 3}, "recovery.epoch"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture, has_task: bool, recovery: dict[str, object], said: str
) -> None:
    recipe = recipe_file(tmp_path, clip, colours if has_task else None, **recovery)
    assert optimize("--recipe", recipe, "-o", tmp_path / "out") == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert not (tmp_path / "out").exists()


def test_a_state_comes_back_as_it_was_and_a_torn_file_counts_as_none(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    assert store.load() is None
    state = State({"now|w": torch.arange(6.0).reshape(2, 3)}, 7, 1, (Epoch(0, None, 2.0, 0.25, 0.0),))
    store.save(state)
    found = store.load()
    assert found is not None
    assert torch.equal(found.tensors["now|w"], state.tensors["now|w"])
    assert (found.step, found.best, found.history) == (7, 1, state.history)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    assert store.load() is None


def test_a_cut_that_training_does_not_make_up_for_is_chosen_again_with_less_headroom(
    clip: Path, colours: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = yaml.safe_load(
        recipe_file(tmp_path, clip, colours, headroom=100.0, learning_rate=1e-9, epochs=1).read_text()
    )
    # Without its attention the class token never sees the image, which 100 points of headroom allow.
    recipe |= {"passes": ["canonicalize", "skip-branches", "fold-constants"], "budgets": {"max_drop": 0.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert optimize("--recipe", tmp_path / "recipe.yaml", "-o", out) == 0
    report = json.loads((out / "report.json").read_text())
    entries = [json.loads(line) for line in (out / ".work" / "ledger.jsonl").read_text().splitlines()]
    given_up = [entry for entry in entries if entry["event"] == "lost too much"]
    assert [entry["headroom"] for entry in given_up] == [100.0 / 2**i for i in range(len(given_up))]
    assert all(entry["drop_points"] > 0 for entry in given_up)
    assert len([text for text in report["warnings"] if text.startswith("a cut was given up")]) == len(given_up) > 0
    last = 100.0 / 2 ** len(given_up)
    assert report["plan"]["max_drop_points"] == (last if last >= 0.25 else 0.0)
    assert len({gate["name"] for gate in report["gates"]}) == len(report["gates"])


@pytest.mark.parametrize("kind", ["bottleneck", pytest.param("eas", marks=pytest.mark.slow)])
def test_adapters_are_inserted_trained_and_folded_where_they_are_linear(
    kind: str, clip: Path, colours: Path, tmp_path: Path
) -> None:
    recipe = yaml.safe_load(recipe_file(tmp_path, clip, colours, level="adapters").read_text())
    cut = {"skip-branches": {"branches": ["image_encoder/*.1.self_attn"]}}
    insert = {"insert-skip-adapter": {"rank": 4, "kind": kind}}
    recipe["passes"] = ["canonicalize", cut, insert, "fold-skip-adapter", "fold-constants"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    assert optimize("--recipe", tmp_path / "recipe.yaml", "-o", out) == 0
    report = json.loads((out / "report.json").read_text())
    by_name = {step["name"]: step for step in report["passes"]}
    assert by_name["insert-skip-adapter"]["n_applied"] == 1
    assert by_name["fold-skip-adapter"]["n_applied"] == (1 if kind == "eas" else 0)
    assert report["recovery"]["level"] == "adapters"
    head = 32 * 3 + 3
    adapter = 4 * 32 + 32 * 4 + 4 + 32 + (2 * 32 if kind == "bottleneck" else 0)
    assert report["recovery"]["n_trainable"] == head + adapter
    predicted, counted = (by_name["fold-skip-adapter"][key]["parameters"] for key in ("predicted", "counted"))
    assert predicted == counted == (adapter if kind == "eas" else 0)
    losses = [epoch["validation_loss"] for epoch in report["recovery"]["epochs"]]
    assert len(set(losses)) == len(losses)
