"""`vlmopt device`: every failure is one line, and results are shown or printed as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.devices.graphs import profile
from vlmopt.cli import entry
from vlmopt.devices.document import GraphCheck


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "here.json"
    check = GraphCheck(component="model", n_operations=3, predicted_us=90.0, measured_us=100.0)
    path.write_text(profile({"Relu": 3.0, "MatMul": 80.0}).model_copy(update={"checks": (check,)}).to_json())
    return path


def test_show_prints_machine_errors_and_the_dearest_first(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["device", "show", str(file)]) == 0
    text = capsys.readouterr().out
    assert "A, 1 cores, Linux; ONNX Runtime" in text
    assert "model: 100 us measured, 3 operations alone take 90 us (-10.0 %)" in text
    assert text.index("MatMul") < text.index("Relu")


def test_energy_is_shown_where_it_could_be_read_and_why_not_where_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.json"
    for joules, note in (
        (0.0021, "package energy, other processes included"),
        (None, "energy is unavailable: no zone"),
    ):
        check = GraphCheck(component="m", n_operations=3, predicted_us=90.0, measured_us=100.0, joules=joules)
        path.write_text(profile({"Relu": 3.0}).model_copy(update={"checks": (check,), "energy": note}).to_json())
        assert entry.run(["device", "show", str(path)]) == 0
        text = capsys.readouterr().out
        assert ("m: 100 us measured, 2.1 mJ, 3 operations" in text) == (joules is not None)
        assert f"{note[0].upper()}{note[1:]}." in text


def test_show_as_json_is_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["device", "show", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["operations"]["Relu"]["quietest_us"] == 3.0
    assert found["checks"][0]["error"] == pytest.approx(-0.1)


def test_a_profile_of_another_runtime_predicts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    path.write_text(profile({"Relu": 3.0}, version="1.2.3").to_json())
    assert entry.run(["device", "predict", "-m", "anything", "--profile", str(path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: was measured with ONNX Runtime 1.2.3")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["show", "nothing.json"], "error: nothing.json: no such file"),
        (["import", "nothing.json", "-o", "out.json"], "error: nothing.json: no such file"),
        (["profile", "-m", "nowhere", "-o", "out.json"], "error: nowhere: "),
        (["export", "-m", "nowhere", "-o", "out"], "error: nowhere: "),
    ],
)
def test_what_is_not_there_is_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert entry.run(["device", *words, *(["-q"] if words[0] in ("profile", "export") else [])]) == 1
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert len(err.splitlines()) == 1
    assert not Path("out.json").exists()


@pytest.mark.parametrize("size", ["0", "224x", "axb", "1x2x3", "-5"])
def test_a_size_that_is_none_is_a_usage_error(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["device", "export", "-m", "x", "-o", "y", f"--image-size={size}"]) == 2
    assert "is no size; expected pixels as in 224 or 224x336" in capsys.readouterr().err
