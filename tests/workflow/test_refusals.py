"""Bad input ends in one clear line and the right exit code, with nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests import toys
from tests.conftest import Workshop
from vlmopt.cli import entry

Capture = pytest.CaptureFixture[str]
Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: Capture, tmp_path: Path) -> Refuse:
    """Runs `vlmopt WORDS`, which must fail with `code` and leave `tmp_path` as it was; returns the one line it says."""

    def run(*words: object, code: int = 1) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert entry.run([str(word) for word in words]) == code
        shown = capsys.readouterr()
        assert snapshot(tmp_path) == before
        assert shown.out == ""
        *progress, last = shown.err.splitlines()
        assert last.startswith("Error: " if code == 2 else "error: ")
        assert not any("Traceback" in line or "internal" in line for line in [*progress, last])
        return last

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def task(colours: Path, tmp_path: Path) -> Path:
    """A copy of the classification task that may be spoilt."""
    return Path(shutil.copytree(colours, tmp_path / "a task"))


@pytest.fixture
def model(clip: Path, tmp_path: Path) -> Path:
    """A copy of the model that may be spoilt."""
    return Path(shutil.copytree(clip, tmp_path / "a model"))


def optimize(model: Path, task: Path, output: Path, *more: object) -> list[object]:
    return ["optimize", "-m", model, "-t", task, "-o", output, "--max-drop", "20", *more]


@pytest.mark.parametrize("split", ["profile", "validation", "test"])
def test_an_image_that_does_not_decode(split: str, clip: Path, task: Path, tmp_path: Path, refuse: Refuse) -> None:
    rows = [json.loads(line) for line in (task / "metadata.jsonl").read_text().splitlines()]
    name = [row["file_name"] for row in rows if row["split"] == split][3]
    (task / name).write_bytes((task / name).read_bytes()[:60])
    shown = refuse(*optimize(clip, task, tmp_path / "out"))
    assert name in shown
    assert "decode" in shown


def test_a_task_without_records(clip: Path, task: Path, tmp_path: Path, refuse: Refuse) -> None:
    (task / "metadata.jsonl").write_text("")
    assert "task.yaml: the task is empty" in refuse(*optimize(clip, task, tmp_path / "out"))


def test_a_folder_without_a_task_file(clip: Path, task: Path, tmp_path: Path, refuse: Refuse) -> None:
    (task / "task.yaml").unlink()
    assert "task.yaml" in refuse(*optimize(clip, task, tmp_path / "out"))


def test_an_answer_that_the_model_does_not_know(workshop: Workshop, tmp_path: Path, refuse: Refuse) -> None:
    task = Path(shutil.copytree(workshop.task("visual-question-answering"), tmp_path / "task"))
    text = (task / "metadata.jsonl").read_text()
    (task / "metadata.jsonl").write_text(text.replace('"colour": "red"', '"colour": "crimson"'))
    shown = refuse(*optimize(workshop.model("vilt"), task, tmp_path / "out"))
    assert "'crimson' is not in the list" in shown
    assert "metadata.jsonl, line 1" in shown


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"budgets": {"max_dorp": 1.0}}, "budgets.max_dorp: is no key of a recipe; did you mean 'max_drop'?"),
        ({"passes": ["skip-brnaches"]}, "there is no pass 'skip-brnaches'; did you mean 'skip-branches'?"),
        (
            {"passes": [{"skip-branches": {"branch": ["x"]}}]},
            "pass 'skip-branches': has no option 'branch'; did you mean 'branches'?",
        ),
        (
            {"passes": [{"skip-branches": {"branches": ["vision_model.encoder.layers.0.mpl"]}}]},
            "did you mean 'vision_model.encoder.layers.0.mlp'?",
        ),
        ({"passes": [{"skip-layers": {"layers": ["vision_model.encoder.layer.0"]}}]}, "matches nothing"),
        ({"device": "gpu"}, "device"),
        ({"dtype": "bfloat16"}, "dtype: ONNX Runtime has no MatMul of bfloat16 on a CPU"),
        ({"opset": 5}, "opset"),
        ({"profile": {"file": "nowhere.json"}}, "nowhere.json: no such file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_recipe_with_a_mistake(
    change: dict[str, object], expected: str, clip: Path, colours: Path, tmp_path: Path, refuse: Refuse
) -> None:
    content = {"model": str(clip), "task": str(colours), "budgets": {"max_drop": 20.0}, **change}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    assert expected in refuse("optimize", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "out")


def test_a_loose_budget_beside_one_that_nothing_can_meet_names_the_latter(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    budgets, out = ["--latency", "100s", "--size", "1kB"], tmp_path / "out"
    assert entry.run(["optimize", "-q", "-m", str(clip), "-t", str(colours), "-o", str(out), *budgets]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: --size: cannot be met: cutting all 6 candidates saves 79 % of what must go; allow")
    assert not out.exists()


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_instead(model: Path) -> None:
    torch.save({}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def forget_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def unknown_type(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "clop"}))


def no_json(model: Path) -> None:
    (model / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "model.safetensors: is truncated or no safetensors file"),
        (pickle_instead, "is a pickle, which can run any code"),
        (forget_weights, "has no weights"),
        (unknown_type, "model_type 'clop' cannot be read"),
        (no_json, "JSON (Expecting property name"),
        (shutil.rmtree, "no such folder"),
    ],
)
@pytest.mark.parametrize("command", ["optimize", "profile", "eval", "inspect"])
def test_a_model_that_cannot_be_used(
    command: str,
    damage: Callable[[Path], None],
    expected: str,
    model: Path,
    colours: Path,
    tmp_path: Path,
    refuse: Refuse,
) -> None:
    damage(model)
    out = tmp_path / "out"
    words = {
        "optimize": optimize(model, colours, out),
        "profile": ["profile", "-m", model, "-t", colours, "-o", out],
        "eval": ["eval", model, "-t", colours],
        "inspect": ["inspect", model, "--weights"],
    }[command]
    assert expected in refuse(*words)


def test_a_profile_of_another_model_or_of_other_data(
    classifier: Path, clip: Path, colours: Path, workshop: Workshop, tmp_path: Path, refuse: Refuse
) -> None:
    toys.write_model("clip", tmp_path / "other", seed=1)
    profile = ("--profile", classifier / "profile.json")
    shown = refuse(*optimize(tmp_path / "other", colours, tmp_path / "out", *profile))
    assert "profile.json: was measured on another model" in shown
    shown = refuse(*optimize(clip, workshop.task("zero-shot-image-classification"), tmp_path / "out", *profile))
    assert "was measured for a task of kind image-classification" in shown
    task = Path(shutil.copytree(colours, tmp_path / "task"))
    (task / "images" / "0000.png").write_bytes((task / "images" / "0001.png").read_bytes())
    assert "was measured on another task data" in refuse(*optimize(clip, task, tmp_path / "out", *profile))


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--max-drop", "1"], 1, "there is no task to measure it on; pass -t TASK"),
        (["-t", "TASK", "--max-drop", "-1"], 2, "'-1' is no budget"),
        (["-t", "TASK", "--max-drop", "much"], 2, "'much' is no budget"),
        (
            ["-t", "TASK", "--max-drop", "1", "--emit", "onnx,coreml"],
            2,
            "'coreml' is not one of 'onnx', 'torchscript', 'pt2'",
        ),
        (["-t", "TASK", "--max-drop", "1", "--emit", ""], 2, "'' is not one of"),
        (["-t", "TASK", "--max-drop", "1", "--device", "gpu"], 1, "device"),
        (["-t", "TASK", "--max-drop", "1", "--device", "cuda:99"], 1, "device: 'cuda:99' cannot be used"),
        (["-t", "TASK", "--max-drop", "1", "--num-samples", "1"], 2, "1 is not in the range"),
        (["-t", "TASK", "--max-drop", "1", "--opset", "99"], 1, "opset"),
        (["-t", "nowhere at all", "--max-drop", "1"], 1, "nowhere at all: does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense(
    words: list[str], code: int, expected: str, clip: Path, colours: Path, tmp_path: Path, refuse: Refuse
) -> None:
    given = [str(colours) if word == "TASK" else word for word in words]
    assert expected in refuse("optimize", "-m", clip, "-o", tmp_path / "out", *given, code=code)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
@pytest.mark.parametrize("command", ["profile", "eval", "inspect"])
def test_a_device_that_is_not_there(
    command: str, device: str, clip: Path, colours: Path, tmp_path: Path, refuse: Refuse
) -> None:
    words = {
        "profile": ["profile", "-m", clip, "-t", colours, "-o", tmp_path / "out"],
        "eval": ["eval", clip, "-t", colours],
        "inspect": ["inspect", clip],
    }[command]
    assert f"device: '{device}' cannot be used" in refuse(*words, "--device", device)


def test_a_file_where_the_profile_should_go_stays(clip: Path, colours: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "p.json").write_text("mine")
    assert "exists already; --force replaces it" in refuse(
        "profile", "-m", clip, "-t", colours, "-o", tmp_path / "p.json"
    )
