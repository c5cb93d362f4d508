"""The plugin in `examples/plugin` is a real second package: built, installed and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.zoo.conftest import captured_toy
from vlmopt.core.contract import Context
from vlmopt.graph.replay import run_component
from vlmopt.registry import cases_of, load_pass
from vlmopt.rewrite.pipeline import run_step

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"
FILE = EXAMPLE / "src" / "vlmopt_share_subexpressions" / "share_subexpressions.py"
RECIPE = """
model: '{model}'
passes: [canonicalize, share-subexpressions, fold-constants]
"""


OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in ("siglip", "vilt")]


@pytest.mark.parametrize("family", ["clip", *OTHERS])
def test_it_shares_what_captured_models_compute_twice(family: str) -> None:
    captured = captured_toy(family)
    result = run_step(captured.program, load_pass(str(FILE))(), Context(), step=1)
    assert len(result.applied) >= 4
    assert result.predicted == result.counted
    again = run_step(result.program, load_pass(str(FILE))(), Context(), step=2)
    assert again.applied == ()
    for name, component in captured.program.components.items():
        for batch, text in ((1, 5), (3, 9)):
            feed = captured.feed(component, batch=batch, text=text)
            assert torch.equal(run_component(component, [feed]), run_component(result.program.components[name], [feed]))


def test_it_has_a_case_that_fires_and_one_that_refuses() -> None:
    cases = cases_of(load_pass(str(FILE)))
    assert {bool(case.n_sites) for case in cases} == {True, False}


@pytest.fixture(scope="module")
def vlmopt(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs the command line in a process that has the plugin installed from its wheel; gives standard output."""
    folder = tmp_path_factory.mktemp("plugin")
    source, wheels, site = folder / "source", folder / "wheels", folder / "site"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, source])
    (wheel,) = wheels.iterdir()
    run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel])

    def vlmopt(*words: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        return run([sys.executable, "-c", "from vlmopt.cli import main; main()", *words], environment)

    return vlmopt


def run(words: list[object], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_is_listed_and_shown_with_its_distribution(vlmopt: Callable[..., str]) -> None:
    listed = json.loads(vlmopt("passes", "list", "--json"))
    origins = {row["name"]: row["origin"] for row in listed["passes"]}
    assert origins["share-subexpressions"] == "vlmopt-share-subexpressions 0.1.0"
    assert listed["broken"] == []
    shown = json.loads(vlmopt("passes", "show", "share-subexpressions", "--json"))
    assert [len(case["sites"]) for case in shown["cases"]] == [2, 1, 0]


@pytest.mark.slow
def test_it_keeps_its_word(vlmopt: Callable[..., str]) -> None:
    vlmopt("passes", "check", "share-subexpressions")


@pytest.mark.slow
def test_a_recipe_that_names_it_runs(vlmopt: Callable[..., str], clip: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=clip), encoding="utf-8")
    vlmopt("optimize", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "-q")
    steps = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["passes"]
    (step,) = (step for step in steps if step["name"] == "share-subexpressions")
    assert step["n_applied"] >= 4
