"""`vlmopt passes new` writes what works as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmopt.cli import entry
from vlmopt.core.contract import Promise
from vlmopt.core.errors import PassError
from vlmopt.registry import build_case, cases_of, find_passes, instantiate, load_pass
from vlmopt.registry.scaffolding import VERBS, check_new_name
from vlmopt.rewrite.pipeline import run_step


def new(folder: Path, name: str, *options: str) -> int:
    return entry.run(["passes", "new", name, "-o", str(folder), *options])


@pytest.fixture(params=["exact", "close", "lossy"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    assert new(tmp_path / "mine", f"fold-{request.param}", "--promise", request.param) == 0
    return tmp_path / "mine" / f"fold_{request.param}.py"


def test_a_new_pass_fires_and_refuses_as_its_cases_say(made: Path) -> None:
    pass_class = load_pass(str(made))
    assert made.stem == f"fold_{pass_class.promise.value}"
    cases = cases_of(pass_class)
    assert sum(case.n_sites for case in cases) >= 1
    assert sum(len(case.refusals) for case in cases) >= 2
    for case in cases:
        result = run_step(build_case(pass_class, case), instantiate(pass_class, case.options), case.context, step=1)
        assert len(result.applied) == case.n_sites
        assert result.predicted == result.counted
        reasons = [refusal.reason for refusal in result.refusals]
        assert len(reasons) == len(case.refusals)
        assert all(wanted in reason for wanted, reason in zip(case.refusals, reasons, strict=True))


def test_a_new_pass_lies_in_a_folder_beside_its_test(made: Path) -> None:
    assert sorted(file.name for file in made.parent.iterdir()) == [made.name, f"test_{made.name}"]
    assert made.stem.replace("_", "-") in find_passes([made.parent])


@pytest.mark.slow
def test_a_new_pass_passes_its_own_test(made: Path) -> None:
    run("pytest", "-q", "-p", "no:cacheprovider", made.parent)


def test_a_new_pass_is_clean_for_ruff_and_mypy(tmp_path: Path) -> None:
    for promise in Promise:
        assert new(tmp_path, f"fuse-{promise.value}", "--promise", promise.value) == 0
    assert new(tmp_path, "fuse-package", "--package") == 0
    run("ruff", "check", "--isolated", "--line-length", "120", tmp_path, cwd=tmp_path)
    run("ruff", "format", "--check", "--isolated", "--line-length", "120", tmp_path, cwd=tmp_path)
    run("mypy", "--strict", *tmp_path.glob("fuse*.py"), cwd=Path(__file__).parents[2])


def run(module: str, *arguments: object, cwd: Path | None = None) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_has_an_entry_point_and_asks_for_this_vlmopt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new(tmp_path, "merge-twins", "--package", "--json") == 0
    files = [Path(path).relative_to(tmp_path) for path in json.loads(capsys.readouterr().out)["files"]]
    assert Path("vlmopt-merge-twins/src/vlmopt_merge_twins/merge_twins.py") in files
    text = (tmp_path / "vlmopt-merge-twins" / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vlmopt.passes"]\nmerge-twins = "vlmopt_merge_twins.merge_twins:MergeTwins"' in text
    assert 'dependencies = ["vlmopt>=0.1,<0.2"]' in text


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_drop_scaling.py").write_text("mine")
    assert new(tmp_path, "drop-scaling") == 1
    assert "test_drop_scaling.py: exists already; choose another name" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["test_drop_scaling.py"]
    assert (tmp_path / "test_drop_scaling.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DropScaling", "is not kebab-case; expected verb-object, such as 'drop-scaling'"),
        ("drop_scaling", "is not kebab-case"),
        ("../drop", "is not kebab-case"),
        ("remove-scaling", "'remove' is no verb of passes; expected one of canonicalize, drop, fold, fuse, hoist"),
        ("dorp-scaling", "did you mean 'drop'?"),
        ("drop", "has no object; expected verb-object, such as 'drop-scaling'"),
        ("fold-constants", "vlmopt 0.1.0 has a pass of that name; choose another one"),
    ],
)
def test_a_name_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    assert new(tmp_path / "new", name) == 1
    found = capsys.readouterr().err
    assert found.startswith(f"error: name '{name}': ")
    assert expected in found
    assert not (tmp_path / "new").exists()


def test_every_verb_makes_a_name() -> None:
    for verb in VERBS:
        check_new_name(f"{verb}-something")
    with pytest.raises(PassError, match="is no verb"):
        check_new_name("verb-something")
