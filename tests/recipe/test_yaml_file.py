"""YAML that reads as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmopt.core.errors import RecipeError, TaskError
from vlmopt.recipe.yaml_file import read_yaml, write_yaml


def test_yes_and_no_are_words_and_scientific_numbers_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("labels: [yes, no, on]\nrate: 1e-3\nn: 010\nwhen: 2024-01-01\nt: 1:30\nflag: true\nnothing: ~\n")
    assert read_yaml(file) == {
        "labels": ["yes", "no", "on"],
        "rate": 0.001,
        "n": 10,
        "when": "2024-01-01",
        "t": "1:30",
        "flag": True,
        "nothing": None,
    }


def test_what_is_written_is_read_again_in_order(tmp_path: Path) -> None:
    content = {
        "b": ["yes", "1e-3", "010", "", "~", "true", "a: b", "é", "2024-01-01", "1:30", "0x10"],
        "a": {"x": 1e-7, "y": -3, "z": None, "w": False, "big": 1e22, "inf": float("inf")},
        "empty": [],
    }
    write_yaml(tmp_path / "a.yaml", content)
    again = read_yaml(tmp_path / "a.yaml")
    assert again == content
    assert list(again) == ["b", "a", "empty"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        ("a: 1\nb: [1\nc: 2\n", "line 3", "expected ',' or ']'"),
        ("a: 1\nb: 2\na: 3\n", "line 3", "key 'a' is given twice"),
        ("x:\n  a: 1\n  a: 2\n", "line 3", "key 'a' is given twice"),
        ("- 1\n- 2\n", "bad.yaml", "holds a list"),
        ("1: x\n", "bad.yaml", "the key 1 is no text"),
        ("a: !!python/object:os.system {}\n", "line 1", "could not determine a constructor"),
        ("a: \x00\n", "bad.yaml", "special characters"),
        ("a: &x [*x]\nb: {[1]: 2}\n", "line 2", "unhashable"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, place: str, found: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_yaml(file)
    assert place in caught.value.place
    assert found in caught.value.found


def test_files_that_are_missing_or_no_text_are_errors_of_the_kind_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml", error=TaskError)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(TaskError, match="UTF-8"):
        read_yaml(tmp_path / "bytes.yaml", error=TaskError)


def test_what_is_no_plain_data_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    write_yaml(file, {"a": 1})
    with pytest.raises(RecipeError, match="cannot"):
        write_yaml(file, {"a": object()})
    assert read_yaml(file) == {"a": 1}
