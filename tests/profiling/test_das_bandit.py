"""A search leaves batches out in which no head can be judged on items that it has not seen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.profiling.workloads import planted_program, planted_workload, with_head
from vlmopt.core.errors import ProfileError
from vlmopt.core.progress import Silent
from vlmopt.profiling.das_bandit import DasBandit
from vlmopt.profiling.estimator import no_checkpoint

WORKLOAD = planted_workload(seed=1)
PART = WORKLOAD.part(range(2 * WORKLOAD.batch + 1))  # a last batch of one item
PROGRAM = with_head(planted_program(), WORKLOAD)


@pytest.mark.parametrize(("is_refit", "batches"), [(True, {0, 1}), (False, {0, 1, 2})])
def test_a_batch_of_one_item_takes_no_part_where_heads_are_fitted(is_refit: bool, batches: set[int]) -> None:
    bandit = DasBandit(n_updates=6, subset_size=1, is_refit=is_refit)
    found = bandit.search(PROGRAM, PART, progress=Silent(), checkpoint=no_checkpoint, seed=0)
    assert {entry.batch for entry in found.log} == batches
    assert len(found.log) == 18


def test_items_of_one_group_alone_are_refused() -> None:
    alike = replace(PART, group_names=["same"] * PART.n_items)
    with pytest.raises(ProfileError, match="no batch with items of two groups"):
        DasBandit(n_updates=2, subset_size=1, is_refit=True).search(
            PROGRAM, alike, progress=Silent(), checkpoint=no_checkpoint, seed=0
        )
