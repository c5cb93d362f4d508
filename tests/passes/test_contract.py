"""Every registered pass keeps the contract: all checks of the public harness, on all of its cases."""

from __future__ import annotations

from pathlib import Path

from vlmopt.registry import find_passes
from vlmopt.testing import contract_tests

GOLDEN = Path(__file__).parents[1] / "golden"

test_contract = contract_tests(golden=GOLDEN)


def test_every_folder_of_golden_texts_belongs_to_a_pass() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(find_passes())
