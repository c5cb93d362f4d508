"""A run with a faulty plugin ends in one line, prints nothing else, and keeps what it had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.writing import PLAN, before, write_pass
from vlmopt.cli import entry

FAULTS = [
    (before(PLAN, "raise KeyError('lost')"), "error: step 2 drop-scaling, plan: raised KeyError: 'lost' ("),
    (before(PLAN, "print('{}')"), "error: step 2 drop-scaling, plan: printed '{}'; expected no output"),
    (before(PLAN, "while True: pass"), "error: step 2 drop-scaling, plan: is not done after 2 s ("),
    (before(PLAN, "raise SystemExit(0)"), "error: step 2 drop-scaling, plan: called sys.exit(0) ("),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "expected"), FAULTS)
def test_a_faulty_plugin_ends_a_run_with_one_line(
    tmp_path: Path, clip: Path, capfd: pytest.CaptureFixture[str], change: tuple[str, str], expected: str
) -> None:
    write_pass(tmp_path / "mine", change)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: '{clip}'\npasses: [canonicalize, drop-scaling]\npass_dirs: [mine]\n")
    out = tmp_path / "out"
    words = ["--recipe", str(recipe), "-o", str(out), "--pass-timeout", "2"]
    assert entry.run(["optimize", "-q", "--json", *words]) == 1
    found = capfd.readouterr()
    assert found.out == ""
    (line,) = found.err.splitlines()
    assert line.startswith(expected)
    assert not out.exists()
