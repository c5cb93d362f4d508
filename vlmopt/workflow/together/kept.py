"""What was measured about plans, kept for the next try under a digest of all that it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from vlmopt.core.contract import Plan
from vlmopt.core.program import Program
from vlmopt.planning.cuts import Measurement
from vlmopt.planning.together import Plan as Edits
from vlmopt.rundir import CHOICE_WORK, write_json
from vlmopt.workflow.judging import Judge
from vlmopt.workflow.opening import OpenedTask
from vlmopt.workflow.profiling import digest
from vlmopt.workflow.remembering import choice_key
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.together.steps import OpenStep


class MeasuredPlans:
    """Measures every plan once, and remembers it when the run is stopped and started again."""

    def __init__(self, state: RunState, bound: OpenedTask, program: Program, steps: Sequence[OpenStep]) -> None:
        options = [[step.number, step.step.name, step.step.options] for step in steps]
        sites = Plan(tuple(site for step in steps for site in step.sites.values()))
        folded = [[step.name, step.options] for step in state.recipe.passes]
        key = choice_key(state, bound, program, sites, workloads=[digest([options, folded])])
        self._file = state.run.work(CHOICE_WORK) / f"together-{key}.json"
        self._found: dict[str, Measurement] = {}
        with suppress(FileNotFoundError, json.JSONDecodeError, ValidationError):
            content = json.loads(self._file.read_text(encoding="utf-8"))
            self._found = TypeAdapter(dict[str, Measurement]).validate_python(content)

    def measured(self, judge: Judge, plan: Edits, program: Callable[[], Program]) -> Measurement:
        """What the plan loses on the items of the judge.

        Args:
            program: makes the program behind the plan, where it was not measured before.
        """
        key = digest([judge.n_items, sorted(plan)])
        if key not in self._found:
            self._found[key] = judge.measure(program())
            write_json(self._file, {name: asdict(one) for name, one in self._found.items()})
        return self._found[key]
