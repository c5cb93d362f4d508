"""Budgets of a run: what is left to save when a cut is planned, whether a cut really saves it, and the final gates.

MACs are counted on the graph. Latency and size are those of the emitted files, so a plan under such a budget is emitted
and measured before it is taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vlmopt.core.budgets import Limit, Quantity, amount_text
from vlmopt.core.contract import Context
from vlmopt.core.errors import PassOptionError
from vlmopt.core.program import Program
from vlmopt.devices.document import read_device_profile
from vlmopt.emit import emit_program
from vlmopt.graph.costing import program_cost
from vlmopt.recipe.schema import SHORTENING_PASSES, Recipe
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.verify.parity import Gate
from vlmopt.workflow.device_predicting import predict_program
from vlmopt.workflow.evidence import Evidence
from vlmopt.workflow.run_state import RunState, later_steps
from vlmopt.workflow.timing import arrays_of, graphs_bytes, of_each, read_by, time_each

LATENCY_NOISE = 0.05  # medians of one graph differ by so much from run to run on a machine that does other work too
_RUNS, _ROUNDS = 60, 10


@dataclass(frozen=True)
class Found:
    """What a cut really takes of a limited resource, and what is allowed, in the resource's unit."""

    limit: Limit
    found: float
    allowed: float

    @property
    def is_met(self) -> bool:
        noise = LATENCY_NOISE if self.limit.quantity is Quantity.LATENCY else 0.0
        return self.found <= self.allowed * (1.0 + noise)

    @property
    def is_met_without_noise(self) -> bool:
        """What a plan is held to: the allowance for noise is for the gate at the end, which measures once more."""
        return self.found <= self.allowed

    @property
    def text(self) -> str:
        quantity = self.limit.quantity
        found, allowed = amount_text(quantity, self.found), amount_text(quantity, self.allowed)
        return f"{quantity.value} {found}, {allowed} allowed"


def folded_components(recipe: Recipe, program: Program) -> frozenset[str]:
    """Components that the recipe evaluates at compile time, all their inputs being fixed."""
    if all(step.name != "fold-fixed-inputs" for step in recipe.passes):
        return frozenset()
    return frozenset(
        name
        for name, component in program.components.items()
        if {spec.name for spec in component.inputs} <= program.fixed_inputs.get(name, {}).keys()
    )


def needs_of(
    state: RunState, program: Program, times: Mapping[str, float], *, folded: Collection[str]
) -> dict[str, float]:
    """What edits of `program` must save of every limited resource, by its name in recipes.

    MACs that later steps spare without a cut need not be saved: that they spare as many behind it is a guess, which
    `really_takes` corrects.

    Args:
        times: microseconds of every component; empty where no latency is limited.
        folded: components that are evaluated at compile time, which cost nothing at the end.
    """
    left = {name: part for name, part in program.components.items() if name not in folded}
    short = _shortened(state, program)
    now, original = program_cost(program.with_components(left)), program_cost(state.original)
    amounts: Mapping[Quantity, tuple[float, float]] = {
        Quantity.MACS: (
            program_cost(short.with_components({name: short.components[name] for name in left})).macs,
            original.macs,
        ),
        Quantity.SIZE: (now.parameters_bytes, original.parameters_bytes),
        Quantity.LATENCY: (sum(times.get(name, 0.0) for name in left), sum(times.values())),
    }
    needs = {}
    for limit in state.recipe.budgets.limits.resources:
        taken, before = amounts[limit.quantity]
        needs[limit.quantity.value] = taken - limit.resolve(before)
    return needs


def allowed_amounts(state: RunState, times: Mapping[str, float]) -> dict[str, float]:
    """What is allowed of every limited resource, in the unit in which plans are made; `times` as for `needs_of`."""
    original = program_cost(state.original)
    before = {
        Quantity.MACS: float(original.macs),
        Quantity.SIZE: float(original.parameters_bytes),
        Quantity.LATENCY: float(sum(times.values())),
    }
    limits = state.recipe.budgets.limits.resources
    return {limit.quantity.value: limit.resolve(before[limit.quantity]) for limit in limits}


def really_takes(state: RunState, program: Program, *, folded: Collection[str]) -> list[Found]:
    """What a planned program takes with the adapters that the recipe puts in afterwards and without the products that
    it spares then, of every limited resource, in emitted files where that matters."""
    limits = state.recipe.budgets.limits.resources
    cut = _behind_later(state, program)
    cut = cut.with_components({name: part for name, part in cut.components.items() if name not in folded})
    found = []
    if any(limit.quantity is not Quantity.MACS for limit in limits):
        with state.progress.stage("checking the plan in ONNX Runtime"):
            emitted = _emitted(state, cut, limits)
    for limit in limits:
        if limit.quantity is Quantity.MACS:
            taken, before = float(program_cost(cut).macs), float(program_cost(state.original).macs)
        else:
            taken, before = emitted[limit.quantity]
        found.append(Found(limit, taken, limit.resolve(before)))
    return found


def _shortened(state: RunState, program: Program) -> Program:
    """The program behind the later steps that leave fewer products to the same function."""
    for step in later_steps(state):
        if step.name in SHORTENING_PASSES:
            program = run_step(program, make_pass(step.name, step.options), Context(), step=state.step).program
    return program


def _behind_later(state: RunState, cut: Program) -> Program:
    """The program behind the later passes that change what it takes: adapters cost something, too."""
    for step in later_steps(state):
        with suppress(PassOptionError):  # it names what only a pass in between makes
            pass_ = make_pass(step.name, step.options, [Path(folder) for folder in state.recipe.pass_dirs])
            cut = run_step(cut, pass_, Context(seed=state.recipe.seed), step=state.step).program
    return cut


def _emitted(state: RunState, cut: Program, limits: Collection[Limit]) -> dict[Quantity, tuple[float, float]]:
    """Size and, where it is limited, latency of the cut program and of the original."""
    with tempfile.TemporaryDirectory(prefix="vlmopt-plan-") as place:
        folders = {"cut": Path(place) / "cut", "original": Path(place) / "original"}
        files = {}
        for name, program in (("cut", cut), ("original", state.original)):
            folders[name].mkdir()
            files[name] = emit_program(
                program, ("onnx",), folders[name], opset=state.recipe.opset, progress=state.progress
            )
        sizes = {name: float(graphs_bytes(folder, files[name])) for name, folder in folders.items()}
        found = {Quantity.SIZE: (sizes["cut"], sizes["original"])}
        is_timed = any(limit.quantity is Quantity.LATENCY for limit in limits)
        if is_timed and state.recipe.device_profile is not None:
            found[Quantity.LATENCY] = _predicted_us(state, cut), _predicted_us(state, state.original)
        elif is_timed:
            found[Quantity.LATENCY] = _latency(state, cut, folders, files)
            limit = next(limit for limit in limits if limit.quantity is Quantity.LATENCY)
            taken, before = found[Quantity.LATENCY]
            if not Found(
                limit, taken, limit.resolve(before)
            ).is_met_without_noise:  # a miss costs quality, so noise must not be one
                again = _latency(state, cut, folders, files)
                found[Quantity.LATENCY] = min(taken, again[0]), min(before, again[1])
    return found


def _latency(
    state: RunState, cut: Program, folders: Mapping[str, Path], files: Mapping[str, Mapping[str, Mapping[str, str]]]
) -> tuple[float, float]:
    """Of the cut program and of the original; a share is measured on one thread, where noise is least."""
    limit = state.recipe.budgets.limits.limits[Quantity.LATENCY]
    threads = 1 if limit.is_relative else None
    read = read_by(state, cut)
    programs = {"cut": read["optimized"], "original": read["original"]}
    feeds = of_each(programs, state.sample_feeds)
    totals = {"cut": 0.0, "original": 0.0}
    for component in files["original"]:
        one = {name: arrays_of(programs[name], component, own.get(component, {})) for name, own in feeds.items()}
        made = [name for name in ("cut", "original") if component in files[name]]
        paths = {name: folders[name] / files[name][component]["onnx"] for name in made}
        table = time_each(paths, one, progress=state.progress, runs=_RUNS, rounds=_ROUNDS, threads=threads)
        for name, latency in table.items():
            totals[name] += 1e3 * latency.quietest_ms
    return totals["cut"], totals["original"]


def resource_gates(state: RunState, evidence: Evidence) -> list[Gate]:
    """A gate for every resource budget of the recipe, on what the finished artifact takes."""
    gates = []
    for limit in state.recipe.budgets.limits.resources:
        found = Found(limit, *_taken(state, evidence, limit))
        name = {
            Quantity.MACS: "MACs for one sample",
            Quantity.SIZE: "size of the files in bytes",
            Quantity.LATENCY: "latency in microseconds, "
            + ("predicted for another device" if state.recipe.device_profile else "quietest round")
            + f" ({100 * LATENCY_NOISE:.0f} % of noise allowed)",
        }[limit.quantity]
        gates.append(Gate(name, found.is_met, found.found, found.allowed))
    return gates


def _taken(state: RunState, evidence: Evidence, limit: Limit) -> tuple[float, float]:
    """What the artifact takes, and what it may."""
    if limit.quantity is Quantity.MACS:
        taken, before = float(program_cost(state.optimized).macs), float(program_cost(state.original).macs)
    elif limit.quantity is Quantity.SIZE:
        taken, before = float(evidence.size_bytes["optimized"]), float(evidence.size_bytes["original"])
    elif state.recipe.device_profile is not None:
        taken, before = (_predicted_us(state, program) for program in (state.optimized, state.original))
    else:
        taken, before = evidence.quietest_us["optimized"], evidence.quietest_us["original"]
    return taken, limit.resolve(before)


def _predicted_us(state: RunState, program: Program) -> float:
    """Microseconds of a call of every component on the device that the recipe plans for."""
    place = Path(str(state.recipe.device_profile))
    device = read_device_profile(place, allow_other_runtime=True)
    found = predict_program(program, device, place=str(place), progress=state.progress)
    return sum(one.us for one in found.values())
