"""`vlmopt optimize --adapter`: the adapter is folded, and the files compute what the adapted model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.toys import make
from vlmopt.cli import entry
from vlmopt.recipe.schema import SHORTENING_PASSES

peft = pytest.importorskip("peft", reason="the extra `adapters` is not installed")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "style"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        peft.get_peft_model(make("clip"), config).save_pretrained(folder)
    return folder


def test_a_given_adapter_is_folded_and_the_fold_error_is_reported(
    clip: Path, adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    given = ["--adapter", f"style={adapter}:0.5"]
    assert entry.run(["optimize", "-q", "--json", "-m", str(clip), *given, "-o", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    steps = {step["name"]: step for step in report["passes"]}
    assert list(steps) == ["canonicalize", "fold-adapters", *SHORTENING_PASSES, "fold-constants"]
    assert steps["fold-adapters"]["counted"]["parameters"] == 5 * 2 * (32 + 32) + 5 * 2 * (32 + 64)
    gates = {gate["name"]: gate for gate in report["gates"]}
    fold = gates["2 fold-adapters is close"]
    assert 0.0 < fold["found"] <= fold["allowed"] == 1e-5
    assert all(gate["passed"] for gate in gates.values())


def test_an_adapter_of_another_model_is_refused_in_one_line(
    clip: Path, adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = adapter / "adapter_config.json"
    folder = tmp_path / "other"
    folder.mkdir()
    settings = {**json.loads(file.read_text()), "target_modules": ["gate_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    given = ["--adapter", f"style={folder}"]
    assert entry.run(["optimize", "-q", "-m", str(clip), *given, "-o", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "does not fit this model" in shown
    assert not (tmp_path / "out").exists()
