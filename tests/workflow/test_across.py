"""The whole pipeline on models with an image in front of their text, and on those that attend across to what they see.

Their decoders are judged on captions or on answers; of an attention that is cut nothing stays in the cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import toys
from tests.conftest import Workshop
from tests.workflow.writers import write_writer
from vlmopt.cli import entry
from vlmopt.core.manifest import read_manifest

N_ITEMS = 24  # of every split
KINDS = {
    "git": "image-captioning",
    "blip_caption": "image-captioning",
    "blip_vqa": "image-text-to-text",
    "florence2": "image-text-to-text",
}
pytestmark = pytest.mark.slow
METRICS = {"image-captioning": "cider-d", "image-text-to-text": "exact-match"}
DECODER = "decoder_model_merged"


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def task_of(family: str, workshop: Workshop) -> Path:
    kind = KINDS[family]
    return workshop.folder(f"written {kind}", lambda path: toys.write_task(path, kind, n=N_ITEMS))


def writer(family: str, workshop: Workshop) -> Path:
    task = task_of(family, workshop)
    return workshop.folder(f"writer {family}", lambda path: write_writer(family, path, task))


def artifact_of(family: str, workshop: Workshop) -> Path:
    """Cut as far as ten points of drop allow."""
    model, task = writer(family, workshop), task_of(family, workshop)

    def make(path: Path) -> None:
        given = ["-m", str(model), "-t", str(task), "-o", str(path), "--max-drop", "10"]
        assert entry.run(["optimize", "-q", *given]) == 0

    return workshop.folder(f"writer cut {family}", make)


def report_of(artifact: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((artifact / "report.json").read_text())
    return found


def test_it_is_profiled_cut_emitted_and_judged(family: str, workshop: Workshop) -> None:
    artifact = artifact_of(family, workshop)
    report = report_of(artifact)
    metric = report["result"]["metric"]
    assert metric["name"] == METRICS[KINDS[family]]
    assert metric["original"] > 0.5
    assert metric["optimized"] >= metric["original"] - 0.1
    branches = report["branches"]
    encoder = {"encoder_model"} if family in ("blip_vqa", "florence2") else set()
    assert {branch["component"] for branch in branches} == {"vision_encoder", DECODER} | encoder
    assert any(not branch["kept"] for branch in branches)
    assert all(gate["passed"] for gate in report["gates"])


def test_the_manifest_names_the_layers_whose_keys_are_kept(family: str, workshop: Workshop) -> None:
    artifact = artifact_of(family, workshop)
    manifest, branches = read_manifest(artifact), report_of(artifact)["branches"]
    assert manifest.generation is not None
    kept = [one for one in branches if one["kept"] and one["component"] == DECODER]
    entries = [spec.name for spec in manifest.components[DECODER].inputs if spec.name.startswith("past_key_values")]
    n_attentions = sum(one["kind"] in ("attention", "cross_attention") for one in kept)
    assert len(entries) == 2 * n_attentions
    assert len(manifest.generation.cache_layers) == sum(one["kind"] == "attention" for one in kept)


@pytest.mark.parametrize("family", ["git"])
def test_it_is_verified_again_and_rechecked(
    family: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, task = artifact_of(family, workshop), task_of(family, workshop)
    assert entry.run(["verify", "-q", str(artifact), "-t", str(task)]) == 0
    capsys.readouterr()
    assert entry.run(["recheck", "-q", str(artifact), "-t", str(task), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metric"]["drop_points"] == pytest.approx(again["metric"]["drop_points_when_made"])
