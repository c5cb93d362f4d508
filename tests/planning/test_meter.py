"""What the meter says a cut costs is what cutting and fitting really costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from tests.profiling.workloads import Classification, planted_program, planted_workload, with_head
from vlmopt.core.contract import Context
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.core.workload import HeadBlock
from vlmopt.graph.clusters import clustered
from vlmopt.graph.head import head_features
from vlmopt.graph.refit import fit_head
from vlmopt.graph.replay import run_component
from vlmopt.planning.cuts import Measurement
from vlmopt.planning.meter import CutMeter
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.tuning.closed_form import recover_heads

FIT = planted_workload(seed=1)
CHECK = replace(planted_workload(seed=2, n=80), group_names=[f"check {i // 2}" for i in range(80)])
NEEDED, USELESS = "model/layers.1.ffn", "model/layers.3.ffn"


@pytest.fixture(scope="module")
def program() -> Program:
    return with_head(planted_program(), FIT)


def meter_of(program: Program) -> CutMeter:
    return CutMeter(program, FIT, CHECK, {}, progress=Silent())


def really_cut(program: Program, names: Iterable[str]) -> Program:
    """The program cut by the pass and its head fitted as the main job does it."""
    step = run_step(program, make_pass("skip-branches", {"branches": sorted(names)}), Context(), step=1)
    return recover_heads(step.program, FIT, {}, components=frozenset({"model"}), progress=Silent(), seed=0)


def items(program: Program) -> torch.Tensor:
    """Item scores of both splits: by fits that have not seen the row on FIT, by the program as it stands on CHECK."""
    component = program.components["model"]
    features = run_component(component, FIT.feeds["model"], head_features(component, program.heads["model"]))
    fit = fit_head("model", features, FIT, {}, seed=0)
    assert fit is not None
    seen = CHECK.item_scores({"model": run_component(component, CHECK.feeds["model"])})
    return torch.cat([FIT.item_scores({"model": fit.held_out}), seen])


@pytest.mark.parametrize(
    "cut",
    [
        {NEEDED},
        {USELESS},
        {"model/layers.0.ffn", "model/layers.2.ffn"},
        {NEEDED, USELESS, "model/layers.0.ffn", "model/layers.2.ffn"},
    ],
    ids=len,
)
def test_a_measured_drop_is_the_drop_after_cutting_and_fitting(program: Program, cut: set[str]) -> None:
    (found,) = meter_of(program).measure([frozenset(cut)])
    drops = 100 * (items(program) - items(really_cut(program, cut)))
    wanted, error = clustered(drops, [*FIT.item_groups, *CHECK.item_groups])
    assert found.drop_points == pytest.approx(wanted, abs=1e-9)
    assert found.standard_error == pytest.approx(error, abs=1e-9)


def test_the_needed_branch_costs_points_and_the_useless_one_none(program: Program) -> None:
    needed, useless = meter_of(program).measure([frozenset({NEEDED}), frozenset({USELESS})])
    assert needed.drop_points > 20
    assert useless.drop_points == 0.0
    assert useless.standard_error == 0.0


def test_cuts_measured_together_or_one_by_one_are_the_same(program: Program) -> None:
    cuts = [frozenset({NEEDED}), frozenset({USELESS, "model/layers.2.ffn"}), frozenset[str](), frozenset({NEEDED})]
    together, alone = meter_of(program).measure(cuts), meter_of(program)
    assert together == [alone.measure([cut])[0] for cut in cuts]
    assert together[2].drop_points == 0.0
    assert together[0] == together[3]


def test_items_kept_out_are_whole_groups_that_the_search_never_sees(program: Program) -> None:
    meter = CutMeter(program, FIT, CHECK, {}, progress=Silent(), kept_out=0.25)
    plain = meter_of(program)
    cut = frozenset({NEEDED})
    searched, kept, whole = meter.measure([cut])[0], meter.measure_kept_out([cut])[0], meter.measure_all([cut])[0]
    assert whole == plain.measure([cut])[0]
    groups = [*FIT.item_groups, *CHECK.item_groups]
    n_kept = int(meter._is_hidden.sum())
    hidden = {group for group, is_hidden in zip(groups, meter._is_hidden.tolist(), strict=True) if is_hidden}
    assert len(hidden) == round(0.25 * len(set(groups)))
    assert n_kept == sum(group in hidden for group in groups)
    n = len(groups)
    mean = ((n - n_kept) * searched.drop_points + n_kept * kept.drop_points) / n
    assert mean == pytest.approx(whole.drop_points, abs=1e-9)
    assert plain.measure_kept_out([cut]) == []


def test_the_reference_is_the_metric_of_the_uncut_program_on_all_items(program: Program) -> None:
    assert meter_of(program).reference_points == pytest.approx(100 * float(items(program).mean()), abs=1e-9)


@dataclass
class Halves(Classification):
    """Two tasks that share their outputs: the first half of the items and the second."""

    @property
    def item_parts(self) -> list[str]:
        return ["first" if item < self.n_items // 2 else "second" for item in range(self.n_items)]

    def head_blocks(self) -> Sequence[HeadBlock]:
        return ()


def test_the_loss_grows_by_what_the_items_lose(program: Program) -> None:
    (found,) = CutMeter(program, FIT, CHECK, {}, progress=Silent()).measure([frozenset({NEEDED})])
    (harmless,) = CutMeter(program, FIT, CHECK, {}, progress=Silent()).measure([frozenset()])
    assert harmless.loss == 0.0
    assert found.loss > 0.1


def test_of_several_tasks_the_one_that_loses_most_counts(program: Program) -> None:
    fit, check = (Halves(w.x, w.targets, w.group_names, w.n_classes) for w in (FIT, CHECK))
    (found,) = CutMeter(program, fit, check, {}, progress=Silent()).measure([frozenset({NEEDED})])
    drops = 100 * (items(program) - items(really_cut(program, {NEEDED})))
    parts, groups = [*fit.item_parts, *check.item_parts], [*FIT.item_groups, *CHECK.item_groups]
    wanted = []
    for part in ("first", "second"):
        rows = [i for i, own in enumerate(parts) if own == part]
        wanted.append(Measurement(*clustered(drops[rows], [groups[i] for i in rows])))
    assert replace(found, loss=0.0) == max(wanted, key=lambda one: one.cautious_drop)
    assert wanted[0] != wanted[1]


@pytest.mark.parametrize("room", [0, 3000, 20_000, 1 << 20])
def test_what_is_kept_of_the_uncut_run_changes_no_measurement(room: int, program: Program) -> None:
    plain = meter_of(program)
    meter = CutMeter(program, FIT, CHECK, {}, progress=Silent(), prefix_bytes=room)
    assert meter.measure([frozenset()]) == plain.measure([frozenset()])
    cuts = [frozenset({f"model/layers.{i}.ffn", f"model/layers.{j}.ffn"}) for i in range(4) for j in range(i)]
    assert [meter.measure([cut]) for cut in cuts] == [plain.measure([cut]) for cut in cuts]
    kept = [part.values for prefixes in meter._prefixes.values() for part in prefixes]
    held = sum(value.nbytes for values in kept for value in values.values())
    assert held <= room
    assert bool(held) == (room > 3000)


def test_what_earlier_passes_lost_counts_too(program: Program) -> None:
    before, now = "model/layers.0.ffn", "model/layers.2.ffn"
    made = CutMeter(really_cut(program, {before}), FIT, CHECK, {}, progress=Silent(), original=program)
    wanted = meter_of(program).measure([frozenset({before}), frozenset({before, now})])
    found = made.measure([frozenset[str](), frozenset({now})])
    for one, other in zip(found, wanted, strict=True):
        assert one.drop_points == pytest.approx(other.drop_points, abs=1e-9)
        assert one.standard_error == pytest.approx(other.standard_error, abs=1e-9)
    assert wanted[0].standard_error > 0
    assert made.reference_points == meter_of(program).reference_points
