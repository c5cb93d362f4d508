"""Adapters as files: trained, written, attached, detached, held side by side in one artifact, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import toys
from tests.capture.test_generative import captured_toy
from tests.conftest import Workshop
from tests.passes.test_cross_modal import are_equal, outputs_of, step
from tests.workflow.answerer import QUESTION, write_answerer
from vlmopt.cli import entry
from vlmopt.core.adapter_file import AdapterHeader
from vlmopt.core.errors import ArtifactError, ModelError
from vlmopt.core.manifest import read_manifest
from vlmopt.core.program import AdapterSource, Program
from vlmopt.runtime import load
from vlmopt.tuning.trainable import trainable_copy
from vlmopt.workflow.attaching import AttachedAdapter, attach, is_whole, trained_adapter, with_tensors, without_adapter

Capture = pytest.CaptureFixture[str]
N_ITEMS = 48
PASSES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "cross-modal": [("insert-cross-modal-adapter", {"rank": 4})],
    "lora": [("insert-low-rank-adapter", {"rank": 2})],
    "lily": [("insert-low-rank-adapter", {"rank": 2, "kind": "lily", "mixture": "routed"})],
    "skip": [
        ("skip-branches", {"branches": ["decoder_model_merged/model.language_model.layers.1.mlp"]}),
        ("insert-skip-adapter", {"rank": 2}),
    ],
}


def trained(base: Program, kind: str = "cross-modal", *, name: str = "a") -> tuple[Program, AttachedAdapter]:
    """The program with an adapter of numbers that a training might have left, and the adapter."""
    steps, program = [], base
    for pass_, options in PASSES[kind]:
        steps.append(step(program, pass_, **options))
        program = steps[-1].program
    program, weights = trainable_copy(program, lambda key: key.partition("/")[2].startswith("adapters."))
    generator = torch.Generator().manual_seed(3)
    for weight in weights.values():
        weight.data = torch.randn(weight.shape, generator=generator).to(weight) * 0.2
    options = [given for _, given in PASSES[kind]]
    return program, trained_adapter(name, program, base=base, steps=steps, options=options, data="task", seed=0)


def written(adapter: AttachedAdapter, folder: Path) -> AdapterSource:
    path = folder / f"{adapter.name}.safetensors"
    path.write_bytes(adapter.as_bytes())
    return AdapterSource(adapter.name, str(path))


@pytest.mark.parametrize("kind", PASSES)
def test_an_attached_file_is_the_trained_program_and_nothing_in_its_place_is_the_base(
    kind: str, tmp_path: Path
) -> None:
    _, base = captured_toy("llava_tied")
    program, made = trained(base, kind)
    attached, (found,) = attach(base, [written(made, tmp_path)])
    assert found.header == made.header
    assert are_equal(outputs_of(attached), outputs_of(program))
    assert is_whole(attached, found)
    bare = with_tensors(attached, without_adapter(found, base).tensors)
    if kind != "skip":  # its base is the model without the branch
        assert are_equal(outputs_of(bare), outputs_of(base))
        assert not are_equal(outputs_of(attached), outputs_of(base))
    assert attached.source.fingerprint != base.source.fingerprint


def test_a_tensor_that_both_modalities_share_is_stored_once(tmp_path: Path) -> None:
    _, base = captured_toy("llava_tied")
    _, made = trained(base)
    path = Path(written(made, tmp_path).path)
    assert sum(tensor.numel() for tensor in load_file(path).values()) == 5 * 32 * 4
    assert json.loads(safe_open(path, framework="np").metadata()["vlmopt_adapter"])["base"] == base.source.fingerprint


def spoiled(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    tensors = load_file(path)
    header = json.loads(safe_open(path, framework="np").metadata()["vlmopt_adapter"])
    change(tensors, header)
    save_file(tensors, path, {"vlmopt_adapter": json.dumps(header)})


def _set(name: str, value: object) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda _, header: header.update({name: value})


def _not_finite(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _wider(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.zeros(7, 7)


def _fewer(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    del tensors["embed_tokens/adapters.cross_modal.text.gate.weight"]


def _others(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors["decoder_model_merged/adapters.odd.weight"] = torch.zeros(2, 2)


def _rank(rank: int) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda _, header: header["steps"][0]["options"].update(rank=rank)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("base", "0" * 64), "was trained on another model"),
        (_set("version", 2), "version"),
        (_set("steps", [{"name": "insert-odd", "options": {}, "sites": []}]), "cannot be made again"),
        (_rank(0), "rank is 0; expected at least 1"),
        (_rank(5), r"is \[4, 32\] float32; expected \[5, 32\]"),
        (_not_finite, "numbers that are not finite"),
        (_wider, r"is \[7, 7\] float32"),
        (_fewer, "1 of its tensors are missing"),
        (_others, "1 of its tensors have no place in this model"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor], dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    _, base = captured_toy("llava_tied")
    source = written(trained(base)[1], tmp_path)
    spoiled(Path(source.path), change)
    with pytest.raises(ModelError, match=message):
        attach(base, [source])


def test_what_is_no_adapter_file_is_refused(tmp_path: Path) -> None:
    _, base = captured_toy("llava_tied")
    path = tmp_path / "a.safetensors"
    source = AdapterSource("a", str(path))
    with pytest.raises(ModelError, match="no such file"):
        attach(base, [source])
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ModelError, match="is truncated, a pickle, or no safetensors file"):
        attach(base, [source])
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ModelError, match="is no adapter file of vlmopt"):
        attach(base, [source])
    good = written(trained(base)[1], tmp_path)
    Path(good.path).write_bytes(Path(good.path).read_bytes()[:-5])
    with pytest.raises(ModelError, match="is truncated"):
        attach(base, [good])
    with pytest.raises(ModelError, match="no scale that a weight could change"):
        attach(base, [AdapterSource("a", str(path), 0.5)])


def test_adapters_of_two_kinds_have_no_common_place(tmp_path: Path) -> None:
    _, base = captured_toy("llava_tied")
    sources = [written(trained(base, kind, name=name)[1], tmp_path) for kind, name in (("lora", "a"), ("lily", "b"))]
    with pytest.raises(ModelError, match="adapter b .*was made by other passes than a"):
        attach(base, sources)


@pytest.fixture(scope="module")
def task(workshop: Workshop) -> Path:
    return workshop.folder("asked", lambda path: toys.write_task(path, "image-text-to-text", n=N_ITEMS))


@pytest.fixture(scope="module")
def model(workshop: Workshop, task: Path) -> Path:
    return workshop.folder("answerer", lambda path: write_answerer(path, task))


def recipe_of(folder: Path, model: Path, task: Path | None, **more: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(model), **({} if task is None else {"task": str(task)}), **more}))
    return path


@pytest.fixture(scope="module")
def tuned(workshop: Workshop, model: Path, task: Path) -> Path:
    """An artifact with a cross-modal adapter that was trained on the task, left in its graphs."""

    def make(path: Path) -> None:
        recovery = {"level": "adapters", "epochs": 2, "learning_rate": 3e-3, "batch_items": 16}
        passes = ["canonicalize", {"insert-cross-modal-adapter": {"rank": 4, "init": "paper"}}]
        folder = path.with_name("tuned recipe")
        folder.mkdir()
        recipe = recipe_of(folder, model, task, passes=passes, recovery=recovery, verify={"max_drop_gate": False})
        assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(path)]) == 0

    return workshop.folder("tuned adapter", make)


def logits_of(folder: Path, **options: Any) -> np.ndarray[Any, Any]:
    """What the vision encoder makes of one image, and the embedding of some words."""
    loaded = load(folder, threads=1, **options)
    pixels = np.linspace(-1, 1, 3 * 32 * 32, dtype=np.float32).reshape(1, 3, 32, 32)
    features = loaded.outputs("vision_encoder", {"pixel_values": pixels})["image_features"]
    words = loaded.outputs("embed_tokens", {"input_ids": np.arange(1, 9)[None]})["inputs_embeds"]
    return np.concatenate([features.ravel(), words.ravel()])


def test_training_leaves_a_file_that_goes_on_the_model_again(tuned: Path, model: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tuned)
    assert {name: (item.is_active, item.is_switchable) for name, item in manifest.adapters.items()} == {
        "colour": (True, True), "none": (False, True)
    }  # fmt: skip
    through = json.loads((tuned / "report.json").read_text())["through"]
    assert len(through["places"]) == 16
    assert all(share > 0 for share in through["places"])
    assert {"what", "colour", "is", "it", "?"} <= {word["text"] for word in through["words"]}
    file = tuned / "adapters/colour.safetensors"
    out = tmp_path / "out"
    recipe = recipe_of(tmp_path, model, None, passes=["canonicalize"], adapters=[f"mine={file}"])
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(out)]) == 0
    assert (logits_of(out) == logits_of(tuned)).all()


@pytest.mark.slow
def test_one_artifact_holds_the_base_once_and_switches_at_load(
    tuned: Path, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    first = tuned / "adapters/colour.safetensors"
    second = tmp_path / "other.safetensors"
    shutil.copy(first, second)
    spoiled(second, lambda tensors, _: [tensor.mul_(-1.5) for tensor in tensors.values()] and None)
    out, bare = tmp_path / "out", tmp_path / "bare"
    given = ["--adapter", f"a={first}", "--adapter", f"b={second}"]
    assert entry.run(["optimize", "-q", "-m", str(model), *given, "-o", str(out)]) == 0
    assert entry.run(["optimize", "-q", "-m", str(model), "-o", str(bare)]) == 0
    report = json.loads((out / "report.json").read_text())
    switched = [gate for gate in report["gates"] if "with adapter" in gate["name"]]
    assert len(switched) == 4
    assert all(gate["passed"] for gate in switched)
    assert (logits_of(out, adapter="none") == logits_of(bare)).all()
    assert (logits_of(out, adapter="a") == logits_of(tuned)).all()
    assert (logits_of(out) == logits_of(out, adapter="a")).all()
    assert abs(logits_of(out, adapter="b") - logits_of(out)).max() > 1e-3
    assert (logits_of(out, adapter=second) == logits_of(out, adapter="b")).all()
    picture = tmp_path / "red.png"
    Image.new("RGB", (32, 32), toys.COLOURS["red"]).save(picture)
    words = ["run", str(out), "--image", str(picture), "--prompt", QUESTION, "--json"]
    answers = []
    for adapter in ("none", "a"):
        assert entry.run([*words, "--adapter", adapter]) == 0
        answers.append(json.loads(capsys.readouterr().out)["results"][0]["answer"])
    assert answers[0] == load(bare, threads=1).generate(QUESTION, str(picture)).text
    with pytest.raises(ArtifactError, match="has no adapter c; expected a, b, none, or a file of one"):
        load(out, adapter="c")
    with pytest.raises(ArtifactError, match="has no adapter that can be switched"):
        load(bare, adapter="a")


@pytest.mark.slow
def test_a_single_adapter_is_folded_and_several_cannot_be(
    tuned: Path, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tuned / "adapters/colour.safetensors"
    out = tmp_path / "out"
    words = ["optimize", "-q", "--json", "-m", str(model)]
    assert entry.run([*words, "--adapter", f"a={file}", "-o", str(out)]) == 0
    steps = {one["name"]: one for one in json.loads(capsys.readouterr().out)["passes"]}
    assert steps["fold-cross-modal-adapter"]["n_applied"] == 1
    assert not read_manifest(out).adapters["a"].is_switchable
    recipe = recipe_of(tmp_path, model, None, passes=["canonicalize", "fold-cross-modal-adapter"])
    both = ["--adapter", f"a={file}", "--adapter", f"b={file}"]
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), *both, "-o", str(tmp_path / "no")]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "its place is gone from the graphs" in shown


@pytest.mark.slow
def test_inspect_eval_and_profile_take_adapters(
    tuned: Path, model: Path, task: Path, tmp_path: Path, capsys: Capture
) -> None:
    given = ["--adapter", f"a={tuned / 'adapters/colour.safetensors'}"]
    assert entry.run(["inspect", str(model), *given, "--json"]) == 0
    shown = capsys.readouterr().out
    assert "adapters.cross_modal.visual" in shown
    assert entry.run(["eval", str(model), "-t", str(task), *given, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    recorded = json.loads((tuned / "report.json").read_text())["result"]["metric"]["optimized"]
    assert found["value"] == pytest.approx(recorded)
    assert entry.run(["eval", str(tuned), "-t", str(task), *given, "-q"]) == 1
    assert "is an artifact, whose graphs are made" in capsys.readouterr().err
    profile = tmp_path / "profile.json"
    words = ["profile", "-q", "-m", str(model), "-t", str(task), "--num-samples", "4", "--estimator", "gate-gradient"]
    assert entry.run([*words, *given, "-o", str(profile)]) == 0
    assert entry.run(["inspect", str(model), "--adapter", "nothing"]) == 1
    assert "'nothing' is no adapter" in capsys.readouterr().err


def test_the_header_of_another_version_is_not_guessed_at() -> None:
    with pytest.raises(ValueError, match="version"):
        AdapterHeader.model_validate({"version": 2, "vlmopt": "9", "base": "x", "steps": []})
