"""The evidence in a report, against counts made another way: by transformers and by the runtime of the artifact."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import vlmopt
from tests.conftest import N_IMAGES, PROMPTS, Workshop
from vlmopt import workflow
from vlmopt.cli import entry
from vlmopt.core.manifest import read_manifest
from vlmopt.core.progress import Silent
from vlmopt.preprocess import Preprocessor
from vlmopt.recipe import load_recipe
from vlmopt.report import read_report

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """A test item as its metadata tell it."""

    path: Path
    colour: str
    text: str
    question: str


def items_of(task: Path) -> list[Item]:
    rows = [json.loads(line) for line in (task / "metadata.jsonl").read_text().splitlines()]
    return [Item(task / r["file_name"], r["colour"], r["text"], r["question"]) for r in rows if r["split"] == "test"]


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def counted(truth: Sequence[str], before: Sequence[str], after: Sequence[str]) -> dict[str, int]:
    """The counts of `changes`, plainly."""
    rows = list(zip(truth, before, after, strict=True))
    return {
        "n": len(rows),
        "n_lost": sum(old == right != new for right, old, new in rows),
        "n_gained": sum(old != right == new for right, old, new in rows),
        "n_other": sum(right not in (old, new) and old != new for right, old, new in rows),
    }


def check_items(changes: Any, names: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    """Every item shown is one of those, with its picture and its two answers; the first ones are the lost ones."""
    known = {name: (old, new) for name, old, new in zip(names, before, after, strict=True)}
    assert len(changes["items"]) == min(24, changes["n_lost"] + changes["n_gained"] + changes["n_other"])
    for item in changes["items"]:
        assert (item["original"], item["optimized"]) == known[item["name"]]
        picture = Image.open(io.BytesIO(base64.b64decode(item["image"].partition(";base64,")[2])))
        assert picture.size == (32, 32)
    lost = [item["original_is_right"] and not item["optimized_is_right"] for item in changes["items"]]
    assert lost == sorted(lost, reverse=True)
    assert sum(lost) == min(24, changes["n_lost"])


def without_items(changes: Any) -> dict[str, int]:
    return {name: value for name, value in changes.items() if name != "items"}


def arrays(model: Path, items: Sequence[Item], texts: Sequence[str]) -> dict[str, torch.Tensor]:
    processor = Preprocessor.load(model)
    found = processor.images([item.path for item in items]) | processor.texts(texts)
    return {name: torch.from_numpy(array) for name, array in found.items() if name != "token_type_ids"}


def embeddings(model: Path, items: Sequence[Item], texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import CLIPModel

    with torch.no_grad():
        found = CLIPModel.from_pretrained(model).eval()(**arrays(model, items, texts))
    return found.image_embeds.double(), found.text_embeds.double()


def best(rows: Any, names: Sequence[str]) -> list[str]:
    return [names[i] for i in np.asarray(rows).argmax(-1).tolist()]


def runtime_embeddings(
    artifact: Path, items: Sequence[Item], texts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    model, feed = vlmopt.load(artifact), {name: array.numpy() for name, array in arrays(artifact, items, texts).items()}
    made = [next(iter(model.outputs(name, feed).values())) for name in ("image_encoder", "text_encoder")]
    images, embedded = (torch.from_numpy(rows).double() for rows in made)
    return images / images.norm(dim=-1, keepdim=True), embedded / embedded.norm(dim=-1, keepdim=True)


def searches(
    images: torch.Tensor, embedded: torch.Tensor, belongs: Any, texts: Sequence[str], names: Sequence[str]
) -> tuple[list[str], list[bool]]:
    """The first match of every image and then of every text, and whether it is right."""
    similarity = (images @ embedded.T).numpy()
    by_image, by_text = first_matches(similarity, belongs, texts), first_matches(similarity.T, belongs.T, names)
    return by_image[0] + by_text[0], by_image[1] + by_text[1]


def first_matches(rows: Any, belongs: Any, names: Sequence[str]) -> tuple[list[str], list[bool]]:
    """The nearest of every row and whether it is right; of several that are equally near, a wrong one."""
    said, hits = [], []
    for row, is_its in zip(rows, belongs, strict=True):
        nearest = [i for i in range(len(names)) if row[i] > row.max() - 1e-12]
        first = next((i for i in nearest if not is_its[i]), nearest[0])
        said.append(names[first])
        hits.append(bool(is_its[first]))
    return said, hits


def test_a_classifiers_lost_items_are_those_that_the_runtime_gets_wrong(classifier: Path, colours: Path) -> None:
    items, metric = items_of(colours), report_of(classifier)["result"]["metric"]
    names = [f"images/{item.path.name}" for item in items]
    truth = [item.colour for item in items]
    after = [scores[0][0] for scores in vlmopt.load(classifier).classify([item.path for item in items])]
    assert metric["original"] == 1.0  # so the original answers with the truth
    assert without_items(metric["changes"]) == counted(truth, truth, after)
    check_items(metric["changes"], names, truth, after)
    groups = {group["name"]: group for group in metric["groups"]}
    assert sorted(groups) == ["blue", "green", "red"]
    for colour, group in groups.items():
        hits = [answer == colour for answer, right in zip(after, truth, strict=True) if right == colour]
        assert (group["n"], group["original"]) == (10, 1.0)
        assert group["optimized"] == pytest.approx(sum(hits) / 10)
        assert group["drop_interval95"] is None  # of ten items
    drops = [group["drop_points"] for group in metric["groups"]]
    assert drops == sorted(drops, reverse=True)


def test_zero_shot_changes_are_those_between_transformers_and_the_runtime(
    zero_shot: Path, clip: Path, workshop: Workshop
) -> None:
    items = items_of(workshop.task("zero-shot-image-classification"))
    labels = ["blue", "green", "red"]
    prompts = [prompt.replace("{}", label) for label in labels for prompt in PROMPTS]
    images, texts = embeddings(clip, items, prompts)
    classes = texts.reshape(3, len(PROMPTS), -1).mean(1)
    before = best(images @ (classes / classes.norm(dim=-1, keepdim=True)).T, labels)
    after = [scores[0][0] for scores in vlmopt.load(zero_shot).classify([item.path for item in items])]
    changes = report_of(zero_shot)["result"]["metric"]["changes"]
    truth = [item.colour for item in items]
    assert without_items(changes) == counted(truth, before, after)
    check_items(changes, [f"images/{item.path.name}" for item in items], before, after)


def test_retrieval_changes_are_searches_in_both_directions(retriever: Path, clip: Path, workshop: Workshop) -> None:
    items = items_of(workshop.task("image-text-retrieval"))
    texts = list(dict.fromkeys(item.text for item in items))
    names = [f"images/{item.path.name}" for item in items]
    belongs = np.array([[item.text == text for text in texts] for item in items])
    before, was_right = searches(*embeddings(clip, items, texts), belongs, texts, names)
    after, is_right = searches(*runtime_embeddings(retriever, items, texts), belongs, texts, names)
    metric = report_of(retriever)["result"]["metric"]
    rows = list(zip(was_right, is_right, before, after, strict=True))
    assert without_items(metric["changes"]) == {
        "n": N_IMAGES + 3,
        "n_lost": sum(was and not is_now for was, is_now, _, _ in rows),
        "n_gained": sum(is_now and not was for was, is_now, _, _ in rows),
        "n_other": sum(not was and not is_now and a != b for was, is_now, a, b in rows),
    }
    check_items(metric["changes"], names + texts, before, after)
    groups = {group["name"]: group for group in metric["groups"]}
    assert groups["image to text"]["original"] == pytest.approx(np.mean(was_right[:N_IMAGES]))
    assert groups["image to text"]["optimized"] == pytest.approx(np.mean(is_right[:N_IMAGES]))
    assert groups["text to image"]["n"] == N_IMAGES
    both = [sum(group[side] for group in groups.values()) / 2 for side in ("original", "optimized")]
    assert both == pytest.approx([metric["original"], metric["optimized"]])
    assert all(0 <= value <= 1 for pair in metric["all"].values() for value in pair)
    assert metric["all"]["recall@1"] == pytest.approx([metric["original"], metric["optimized"]])


def test_changed_answers_come_with_their_questions(answerer: Path, workshop: Workshop) -> None:
    from transformers import ViltForQuestionAnswering

    items, model = items_of(workshop.task("visual-question-answering")), workshop.model("vilt")
    questions = [item.question for item in items]
    original = ViltForQuestionAnswering.from_pretrained(model).eval()
    with torch.no_grad():
        logits = original(**arrays(model, items, questions)).logits
    before = best(logits, [original.config.id2label[i] for i in range(logits.shape[1])])
    after = [scores[0][0] for scores in vlmopt.load(answerer).answer([item.path for item in items], questions)]
    metric = report_of(answerer)["result"]["metric"]
    truth = [item.colour for item in items]
    assert without_items(metric["changes"]) == counted(truth, before, after)
    check_items(metric["changes"], [f"images/{item.path.name}" for item in items], before, after)
    assert {item["question"] for item in metric["changes"]["items"]} <= {"what colour is it ?"}
    assert metric["groups"] == []  # one question, and answers of one type


def test_the_plan_of_the_report_holds_every_cut_that_was_measured(classifier: Path) -> None:
    report = report_of(classifier)
    plan = report["plan"]
    assert (plan["max_drop_points"], plan["n_items"]) == (20.0, 2 * N_IMAGES)
    accepted = [trial for trial in plan["trials"] if trial["is_accepted"]]
    assert len(accepted) < len(plan["trials"]) or len(plan["trials"]) >= 6
    chosen = max(accepted, key=lambda trial: trial["saved_macs"])
    sites = next(step["sites"] for step in report["passes"] if step["name"] == "skip-branches")
    assert chosen["n_cut"] == len(sites)
    assert chosen["saved_macs"] == sum(site["predicted"]["macs"] for site in sites)
    assert (plan["drop_points"], plan["stderr_points"]) == (chosen["drop_points"], chosen["stderr_points"])
    for trial in accepted:
        assert trial["drop_points"] + 1.645 * trial["stderr_points"] <= 20


def test_every_branch_says_who_cut_it_or_why_it_stays(classifier: Path) -> None:
    report = report_of(classifier)
    cut = {site["name"] for step in report["passes"] if step["name"] == "skip-branches" for site in step["sites"]}
    assert cut
    for branch in report["branches"]:
        is_cut = f"{branch['component']}/{branch['name']}" in cut
        reason = (
            ""
            if is_cut
            else "2 skip-branches: not in the cut that saves most of those that stayed within a drop of 20 points"
        )
        assert (branch["kept"], branch["cut_by"], branch["reason"]) == (
            *(not is_cut, "2 skip-branches" if is_cut else ""),
            reason,
        )


def test_sites_steps_machine_and_recipe_are_those_of_the_run(classifier: Path) -> None:
    report = report_of(classifier)
    for step in report["passes"]:
        seconds = {stage["seconds"] for stage in report["stages"] if stage["name"].endswith(f"-{step['name']}")}
        assert {step["seconds"]} == seconds
        for key, total in step["predicted"].items():
            assert sum(site["predicted"][key] for site in step["sites"]) == total
    assert report["recipe"] == (classifier / "recipe.yaml").read_text()
    manifest = read_manifest(classifier)
    machine = report["machine"]
    assert (machine["processor"], machine["n_cores"]) == (manifest.machine.cpu, manifest.machine.cores)
    assert machine["n_threads"] >= 1
    assert machine["versions"] | {"python": machine["python"]} == manifest.versions | {"vlmopt": vlmopt.__version__}
    pair = report["result"]["latency_ms"]["image_encoder"]
    for side in (pair["original"], pair["optimized"]):
        samples = side["samples_ms"]
        assert len(samples) == 50
        assert samples == sorted(samples)
        assert side["median_ms"] == pytest.approx((samples[24] + samples[25]) / 2, abs=1e-5)
    assert pair["ratio"] == pytest.approx(pair["original"]["median_ms"] / pair["optimized"]["median_ms"])


def test_the_page_lies_beside_the_report_and_under_the_manifest(classifier: Path) -> None:
    page = (classifier / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    for item in report_of(classifier)["result"]["metric"]["changes"]["items"]:
        assert item["image"] in page
    assert {"report.html", "report.md", "report.json"} <= set(read_manifest(classifier).files)


def ruin(clip: Path, task: Path, folder: Path, **content: Any) -> Path:
    """A recipe that cuts all of the image encoder, so that answers change."""
    passes = ["canonicalize", {"skip-branches": {"branches": ["vision_model.*"]}}]
    path = folder / "ruin.yaml"
    path.write_text(yaml.safe_dump({"model": str(clip), "task": str(task), "passes": passes, **content}))
    return path


def test_a_failed_gate_leaves_a_complete_report(clip: Path, colours: Path, tmp_path: Path) -> None:
    recipe = ruin(clip, colours, tmp_path, budgets={"max_drop": 0.0})
    assert entry.run(["optimize", "-q", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 3
    partial = tmp_path / ".out.partial"
    report = read_report(report_of(partial))
    metric = report.result.metric
    assert metric is not None
    assert metric.changes is not None
    assert metric.changes.n_lost - metric.changes.n_gained == round(N_IMAGES * metric.drop_points / 100) > 0
    assert len(metric.changes.items) == min(24, metric.changes.n_lost + metric.changes.n_gained)
    assert len(Counter(item.expected for item in metric.changes.items)) > 1  # spread over labels
    assert [branch.cut_by for branch in report.branches] == ["2 skip-branches"] * 6
    assert report.plan is None  # the recipe names every site
    assert report.machine is not None
    assert report.recipe == (partial / "recipe.yaml").read_text()
    assert not next(gate for gate in report.gates if gate.name.startswith("drop")).passed
    page = (partial / "report.html").read_text()
    assert all(item.image in page for item in metric.changes.items)


class Vanishing(Silent):
    """Deletes the task's pictures once the original has been evaluated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def track(self, items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
        if what.startswith("evaluating the artifact"):
            shutil.rmtree(self.folder)
        return iter(items)


def test_pictures_that_are_gone_and_sites_beyond_the_limit_are_said(clip: Path, colours: Path, tmp_path: Path) -> None:
    task = tmp_path / "task"
    shutil.copytree(colours, task)
    recipe = load_recipe(ruin(clip, task, tmp_path)).model_copy(update={"max_sites": 5})
    workflow.optimize(recipe, tmp_path / "out", progress=Vanishing(task / "images"))
    report = report_of(tmp_path / "out")
    shown = report["result"]["metric"]["changes"]["items"]
    assert shown
    assert {item["image"] for item in shown} == {""}
    missing = [warning for warning in report["warnings"] if "lacks a picture" in warning]
    assert len(missing) == len(shown)
    assert "images/" in missing[0]
    reasons = [branch["reason"] for branch in report["branches"]]
    assert reasons == [""] * 5 + ["2 skip-branches: the largest number of sites was reached"]


def test_a_second_cut_behind_changed_components_counts_its_drop_from_the_original(
    clip: Path, workshop: Workshop, tmp_path: Path
) -> None:
    task = str(workshop.task("zero-shot-image-classification"))
    recipe = {"model": str(clip), "task": task, "budgets": {"max_drop": 100}}

    def plan_behind(name: str, *first: object) -> Any:
        recipe["passes"] = [*first, "fold-fixed-inputs", "skip-branches"]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        assert (
            entry.run(["optimize", "-q", "--recipe", str(tmp_path / f"{name}.yaml"), "-o", str(tmp_path / name)]) == 0
        )
        return report_of(tmp_path / name)["plan"]

    whole = plan_behind("whole")
    twice = plan_behind("twice", {"skip-branches": {"branches": ["vision_model.encoder.layers.2.mlp"]}})
    all_cut = max(whole["trials"], key=lambda trial: trial["n_cut"])
    rest = max(twice["trials"], key=lambda trial: trial["n_cut"])
    assert rest["n_cut"] == all_cut["n_cut"] - 1
    assert rest["drop_points"] == pytest.approx(all_cut["drop_points"])
