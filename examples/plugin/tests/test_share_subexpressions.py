"""share-subexpressions keeps its word: every check of the harness, on every case."""

from __future__ import annotations

from vlmopt.testing import contract_tests

test_contract = contract_tests("share-subexpressions")
