"""The pass that passes/README.md shows a stranger is a pass."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from vlmopt.core.contract import Promise
from vlmopt.registry import find_passes, load_pass, make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.verify.parity import check_step

README = Path(__file__).parents[2] / "passes" / "README.md"


def test_the_example_of_the_readme_keeps_the_contract(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    (tmp_path / "drop_scaling.py").write_text(found.group(1), encoding="utf-8")
    pass_ = make_pass("drop-scaling", {}, [tmp_path])
    feeds = {"model": {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}}
    counts = []
    for case in load_pass("drop-scaling", [tmp_path]).cases():
        program = case.build()
        result = run_step(program, pass_, case.context, step=1)
        counts.append((len(result.applied), case.n_sites, [refusal.reason for refusal in result.refusals]))
        assert result.predicted == result.counted
        gate = check_step("it", Promise.EXACT, program, result.program, feeds)
        assert gate is not None
        assert gate.passed
    assert counts == [(1, 1, []), (0, 0, ["the factor is not one"])]


def test_the_table_of_the_readme_names_every_pass_with_its_promise() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == {name: info.promise.value for name, info in find_passes().items()}
