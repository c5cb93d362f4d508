"""The fastest session options are measured, never slower than the runtime's own, and used on this machine only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import vlmopt
from vlmopt.core.errors import ArtifactError
from vlmopt.core.manifest import read_manifest
from vlmopt.core.session_choice import SESSION
from vlmopt.workflow import tune_session, verify_artifact
from vlmopt.workflow.publishing import CASES
from vlmopt.workflow.session_tuning import Variant, _computes_the_same, fastest_first, variants_of

DEFAULT, PLAIN, SINGLE = Variant("all", 4), Variant("basic", 4), Variant("all", 1)


def test_the_runtimes_own_choice_comes_first_and_every_level_meets_every_number_of_threads() -> None:
    found = variants_of(4)
    assert found[0] == DEFAULT
    assert len(found) == len(set(found)) == 9
    assert len(variants_of(1)) == 3


def test_a_slower_variant_is_never_taken_and_one_within_noise_is_not_either() -> None:
    assert fastest_first({DEFAULT: 100.0, PLAIN: 97.0, SINGLE: 140.0}, default=DEFAULT) == [DEFAULT]
    assert fastest_first({DEFAULT: 100.0, PLAIN: 80.0, SINGLE: 60.0}, default=DEFAULT) == [SINGLE, PLAIN, DEFAULT]


@pytest.fixture
def tuned(classifier: Path, tmp_path: Path) -> Path:
    path = tmp_path / "out"
    shutil.copytree(classifier, path)
    tune_session(path, runs=6)
    return path


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((path / SESSION).read_text(encoding="utf-8"))
    edit(data)
    (path / SESSION).write_text(json.dumps(data), encoding="utf-8")


def test_an_artifact_is_opened_with_what_was_fastest_here_and_answers_the_same(tuned: Path, classifier: Path) -> None:
    edited(tuned, lambda data: data.update(optimization="basic", threads=1))
    model = vlmopt.load(tuned)
    assert (model.threads, model.optimization) == (1, "basic")
    image = Image.fromarray(np.full((32, 32, 3), (220, 30, 30), np.uint8))
    found, wanted = (dict(one.classify([image])[0]) for one in (model, vlmopt.load(classifier)))
    assert found == pytest.approx(wanted, abs=1e-5)
    given = vlmopt.load(tuned, threads=2)
    assert (given.threads, given.optimization) == (2, "all")
    assert all(gate["passed"] for gate in verify_artifact(tuned)["gates"])


def test_what_was_fastest_elsewhere_counts_for_nothing(tuned: Path) -> None:
    edited(tuned, lambda data: data.update(cpu="another", threads=7))
    assert vlmopt.load(tuned).threads is None


def test_a_damaged_choice_is_refused_in_one_line(tuned: Path) -> None:
    edited(tuned, lambda data: data.pop("threads"))
    with pytest.raises(ArtifactError, match=r"session.json: cannot be read \(threads: Field required\); delete it"):
        vlmopt.load(tuned)


def test_options_that_change_what_is_computed_are_not_taken(tuned: Path) -> None:
    manifest, variant = read_manifest(tuned), Variant("basic", 1)
    assert _computes_the_same(tuned, manifest, variant)
    recorded = load_file(tuned / CASES)
    save_file({key: value + 1 if "=" in key else value for key, value in recorded.items()}, tuned / CASES)
    assert not _computes_the_same(tuned, manifest, variant)
