"""`vlmopt bisect` as a user meets it: what it finds, writes, refuses, and what is left when it is interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.workflow.sums import FAULTY, passes_of, recipe_of, run_of, sums
from vlmopt.cli import entry
from vlmopt.core.errors import VlmoptError
from vlmopt.preprocess import Preprocessor
from vlmopt.workflow.bisecting.judging import refuse_unknown_command
from vlmopt.workflow.bisecting.search import bisect_state

Capture = pytest.CaptureFixture[str]


def write_recipe(folder: Path, **content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_case(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "case.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_fault_is_found_written_and_gone_when_the_pass_is_mended(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    passes = shutil.copytree(FAULTY, tmp_path / "my passes", ignore=shutil.ignore_patterns("__pycache__"))
    step = {"replace-addition": {"broken": 9, "how": "wrong"}}
    recipe = write_recipe(tmp_path, model=str(clip), passes=[step], pass_dirs=[str(passes)])
    case = tmp_path / "case"
    assert entry.run(["bisect", str(recipe), "-o", str(case), "--json", "-q"]) == 3
    shown = capsys.readouterr()
    assert shown.err == ""
    found = json.loads(shown.out)
    assert (found["outcome"], found["fault"], found["needs_model"]) == ("site", "promise", False)
    assert found["n_checks"] <= found["at_most"]
    assert (found["sites"][0]["step"], found["sites"][0]["component"]) == (1, "text_encoder")
    assert found["n_nodes"] < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["case", "my passes", "recipe.yaml"]
    done = run_case(case)
    assert (done.returncode, done.stderr) == (1, "")
    assert "step 1 replace-addition promises to be exact, and changes the result by" in done.stdout
    file = passes / "replace_addition.py"
    file.write_text(file.read_text().replace('"wrong": 1.25', '"wrong": 1.0'))
    mended = run_case(case)
    assert (mended.returncode, mended.stdout) == (0, "the fault is gone\n")


@pytest.mark.slow
def test_a_drop_is_bisected_on_the_validation_split(clip: Path, colours: Path, tmp_path: Path, capsys: Capture) -> None:
    named = {"skip-branches": {"branches": ["vision_model.*"]}}
    recipe = write_recipe(
        tmp_path, model=str(clip), task=str(colours), budgets={"max_drop": 20.0}, passes=["canonicalize", named]
    )
    words = ["bisect", str(recipe), "-o", str(tmp_path / "case"), "-q"]
    assert entry.run(words) == 3
    shown = capsys.readouterr().out
    assert "of step 2 skip-branches (component image_encoder" in shown
    assert "points on the validation split (allowed 20)" in shown
    assert "and needs the model and the task" in shown
    done = run_case(tmp_path / "case")
    assert done.returncode == 1
    assert "points on the validation split (allowed 20)" in done.stdout
    capsys.readouterr()
    assert entry.run([*words, "--force", "--max-drop", "100"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("nothing is bad (")
    assert "judged on the validation split, and the gate of a run judges the test split" in shown


@pytest.mark.slow
def test_a_check_may_evaluate_the_artifact_of_a_state(
    clip: Path, colours: Path, tmp_path: Path, capsys: Capture
) -> None:
    named = {"skip-branches": {"branches": ["vision_model.encoder.layers.0.*"]}}
    recipe = write_recipe(tmp_path, model=str(clip), task=str(colours), passes=[named])
    program = f"{sys.executable} -c 'from vlmopt.cli import main; main()'"
    image = next((colours / "images").glob("*.png"))
    check = f"{program} eval {{}} -t '{colours}' --json && {program} run \"$VLMOPT_ARTIFACT\" --image '{image}'"
    assert entry.run(["bisect", str(recipe), "-o", str(tmp_path / "case"), "-q", "--check", check]) == 0
    assert capsys.readouterr().out == "nothing is bad (2 sites, 2 checks)\n"


def checked(clip: Path, folder: Path, check: str, **options: Any) -> dict[str, Any]:
    """What bisect says of five harmless sites under this check."""
    recipe = recipe_of({})
    with run_of(sums(5), recipe, folder, Preprocessor.load(clip)) as state:
        return bisect_state(state, passes_of(recipe), folder / "case", check=check, **options)


def test_a_command_decides_by_its_exit_code(clip: Path, tmp_path: Path) -> None:
    count = "grep -c 'mul.*1.0'"
    check = f'echo seen $({count} {{}}/model.txt); test $({count} "$VLMOPT_ARTIFACT/model.txt") -lt 3'
    found = checked(clip, tmp_path, check)
    assert (found["outcome"], found["sites"][0]["number"]) == ("site", 3)
    assert found["found"] == "the check exits with 1 (seen 3)"
    log = (tmp_path / "case" / "checks.log").read_text()
    assert log.count("--- exit code") == found["n_checks"]
    assert not (tmp_path / "case" / "model.onnx").exists()


def test_a_state_that_cannot_be_told_leaves_several_sites(clip: Path, tmp_path: Path) -> None:
    check = "n=$(grep -c 'mul.*1.0' {}/model.txt); test $n = 2 && exit 125; test $n -lt 3"
    found = checked(clip, tmp_path, check)
    assert found["outcome"] == "range"
    assert [site["number"] for site in found["sites"]] == [2, 3]
    assert found["line"].startswith("the check could not tell more than that it is model/add_1 or model/add_2 (5 sites")
    assert found["case"] is None
    always = checked(clip, tmp_path / "again", "exit 125")
    assert always["line"].endswith("model/add_4 or the original or nothing at all (5 sites, 6 checks)")


def test_an_original_that_is_bad_is_not_blamed_on_a_site(clip: Path, tmp_path: Path) -> None:
    found = checked(clip, tmp_path, "echo no such thing; kill -9 $$")
    assert found["outcome"] == "original"
    assert found["line"].startswith(
        "the original is bad before any pass: the check is ended by signal 9 (no such thing)"
    )
    assert found["case"] is None


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("no-such-command-anywhere {}", "there is no command 'no-such-command-anywhere'"),
        ("./nowhere.sh {}", "there is no command './nowhere.sh'"),
        ("test 'a", "is no shell command ("),
        ("if true", "is no shell command ("),
        (" ", "is no command"),
    ],
)
def test_a_check_that_does_not_exist_is_refused_before_anything_runs(command: str, reason: str) -> None:
    with pytest.raises(VlmoptError) as caught:
        refuse_unknown_command(command)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "command", ["test -f {}/model.onnx", "A=1 true", "! false", "if true; then true; fi", "(exit 0)"]
)
def test_whatever_the_shell_knows_is_a_check(command: str) -> None:
    refuse_unknown_command(command)


def test_a_command_that_vanishes_is_no_bad_state(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(VlmoptError, match=r"the shell cannot run it \(exit code 127\)"):
        checked(clip, tmp_path, "(nowhere-at-all)")


def test_what_cannot_be_bisected_is_refused_in_one_line(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    def refused(*words: str) -> str:
        assert entry.run(["bisect", *words]) == 1
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1, shown
        return shown

    good = str(write_recipe(tmp_path, model=str(clip), passes=["canonicalize"]))
    (tmp_path / "misspelled.yaml").write_text(f"model: {clip}\npases: [canonicalize]\n")
    (tmp_path / "lossy.yaml").write_text(f"model: {clip}\npasses: [skip-branches]\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "nowhere.yaml" in refused(str(tmp_path / "nowhere.yaml"))
    assert "did you mean 'passes'?" in refused(str(tmp_path / "misspelled.yaml"))
    assert "has a lossy pass with neither a budget nor named sites" in refused(str(tmp_path / "lossy.yaml"))
    assert "exists already; choose another path" in refused(good, "-o", str(tmp_path / "mine"))
    assert "is no failing case" in refused(good, "-o", str(tmp_path / "mine"), "--force")
    assert "there is no command 'nonsense'" in refused(good, "--check", "nonsense {}")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".yaml", ".yaml", ".yaml"]


@pytest.mark.slow
def test_ctrl_c_ends_the_check_and_the_same_command_takes_the_answers_up(
    clip: Path, tmp_path: Path, capsys: Capture
) -> None:
    named = {"skip-branches": {"branches": ["vision_model.encoder.layers.0.*"]}}
    recipe = write_recipe(tmp_path, model=str(clip), passes=[named])
    hang = tmp_path / "hang"
    check = f"echo $$ > '{tmp_path}/pid'; if test -f '{hang}'; then sleep 100; fi; touch '{hang}'"
    words = ["bisect", str(recipe), "-o", str(tmp_path / "case"), "--check", check]
    command = [sys.executable, "-c", "from vlmopt.cli import main; main()", *words]
    running = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert running.stderr is not None
    shown = ""
    while "check 2 of" not in shown:
        shown += running.stderr.readline()
    pid = (tmp_path / "pid").read_text()
    while (tmp_path / "pid").read_text() in (pid, ""):
        time.sleep(0.05)
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    out, error = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert error.splitlines()[-1].endswith("run the same command again to resume")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    hang.unlink()
    assert not (tmp_path / "case").exists()
    assert entry.run(words) == 0
    shown = capsys.readouterr().err
    assert "taking up the answers in" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hang", "pid", "recipe.yaml"]
