"""`vlmopt passes show` tells everything about a pass and runs its cases before the reader's eyes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.plugins.writing import APPLY, PLAN, before, write_pass
from vlmopt.cli import entry
from vlmopt.registry.options import argument_helps

OPTIONS = """    Args:
        ratio: how much of it,
            in parts of one.
        names (tuple): which ones: patterns.

    Raises: nothing.
"""


def show(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert entry.run(["passes", "show", "-q", *map(str, words)]) == code
    found = capsys.readouterr()
    assert (found.err == "") == (code == 0)
    return found.out if code == 0 else found.err


def test_a_pass_is_shown_with_facts_origin_and_what_it_does_to_its_cases(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write_pass(tmp_path)
    text = show(capsys, file)
    for line in (
        "drop-scaling: Removes multiplications by one.",
        "promise   exact",
        "requires  captured: components are flat graphs over torch.nn leaves, equal to the original model",
        "produces  none",
        "vlmopt    >=0.1,<0.2",
        f"origin    {file}",
        "options   none",
        "Identity: IEEE multiplication by one returns its operand.",
        "case 'by one'",
        "  fires 1 time: model/mul",
        "  -%mul: float32[batch, 4] = mul.Tensor (%x, 1.0)",
        "  +%relu: float32[batch, 4] = relu (%x)",
        "case 'by two'",
        "  fires 0 times",
        "  refuses model/mul: the factor is not one",
    ):
        assert line in text.splitlines()
    assert "\x1b[" not in text


def test_cases_may_be_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "case 'by one'" not in show(capsys, write_pass(tmp_path), "--no-cases")


def test_options_have_types_defaults_and_help(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary, name = '"""Removes multiplications by one.', '    name: ClassVar[str] = "drop'
    doc = (f'    {summary}"""\n', f'    {summary}\n\n{OPTIONS}    """\n\n')
    fields = (name, f"    ratio: float = 0.5\n    names: tuple[str, ...] = ()\n\n{name}")
    text = show(capsys, write_pass(tmp_path, doc, fields), "--no-cases")
    lines = text.splitlines()
    at = lines.index("options")
    assert lines[at + 1 : at + 5] == [
        "  ratio: float  [default 0.5]",
        "      how much of it, in parts of one.",
        "  names: tuple[str, ...]  [default ()]",
        "      which ones: patterns.",
    ]


def test_the_help_of_arguments_is_read_from_their_section_alone() -> None:
    docstring = "One.\n\nArgs:\n    a: b\n    c: d\n        e: f\n\nReturns:\n    g: h\n"
    assert argument_helps(docstring) == {"a": "b", "c": "d e: f"}
    assert argument_helps("ratio: no section") == {}


def test_everything_is_there_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json.loads(show(capsys, write_pass(tmp_path), "--json"))
    assert found["name"] == "drop-scaling"
    assert list(found["facts"]) == found["requires"] == ["captured"]
    first, second, third = found["cases"]
    assert (first["sites"], first["refusals"], second["sites"]) == (["model/mul"], [], [])
    assert third["refusals"] == ["model/mul: an output would be one of its inputs, or another output"]
    assert "mul.Tensor" in first["before"]["model"]
    assert "mul.Tensor" not in first["after"]["model"]


def test_a_case_that_fails_says_why_and_the_pass_is_shown_all_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = show(capsys, write_pass(tmp_path, before(APPLY, "raise ValueError('not today')")))
    assert "  fails: step 1 drop-scaling, apply model/mul: raised ValueError: not today (" in text
    assert "  refuses model/mul: the factor is not one" in text


def test_a_pass_that_loops_is_given_up_after_its_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = show(capsys, write_pass(tmp_path, before(PLAN, "while True: pass")), "--pass-timeout", "0.2")
    assert text.count("  fails: step 1 drop-scaling, plan: is not done after 0.2 s (") == 3


def test_a_time_limit_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert entry.run(["passes", "show", str(write_pass(tmp_path)), "--pass-timeout", "0"]) == 2
    assert "--pass-timeout" in capsys.readouterr().err


def test_what_cannot_be_shown_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "there is no such file" in show(capsys, tmp_path / "none.py", code=1)
    text = show(capsys, write_pass(tmp_path, ("import torch\n", "import torhc\n")), code=1)
    assert text.startswith(f"error: {tmp_path / 'drop_scaling.py'}, import: raised ModuleNotFoundError: ")
    assert len(text.splitlines()) == 1
