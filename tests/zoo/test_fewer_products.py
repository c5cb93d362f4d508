"""Encoders that read one token compute no more than it needs, and the same."""

from __future__ import annotations

from tests.zoo.conftest import Captured, captured_toy
from vlmopt.core.contract import Context
from vlmopt.core.program import Program
from vlmopt.graph.costing import component_cost, nodes_cost
from vlmopt.graph.example import without_branches
from vlmopt.graph.replay import run_component
from vlmopt.recipe.schema import SHORTENING_PASSES
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import clone_program, run_step
from vlmopt.verify.parity import difference
from vlmopt.verify.tolerances import CLOSE

# Families whose image encoder hands on its class token; others pool all tokens, or count those of a text with them.
READ_EARLY = {"clip": (1, 1), "dual_encoder": (1, 1), "blip": (1, 0)}  # blip's keys and queries are one Linear's


def shortened(program: Program) -> tuple[Program, tuple[int, ...]]:
    """The program behind the passes, and how many sites each had."""
    counts = []
    for step, name in enumerate(SHORTENING_PASSES, 1):
        done = run_step(program, make_pass(name, {}), Context(), step=step)
        assert done.predicted.macs == done.counted.macs
        program, counts = done.program, [*counts, len(done.applied)]
    return program, tuple(counts)


def test_what_nobody_reads_is_not_computed_and_the_rest_is_equal(captured: Captured) -> None:
    program, counts = shortened(captured.program)
    assert counts == READ_EARLY.get(captured.family, (0, 0))
    for name, component in captured.program.components.items():
        feed = captured.feed(component, batch=3, text=7)
        wanted = run_component(component, [feed])
        assert difference(run_component(program.components[name], [feed]), wanted) <= CLOSE["float32"]


def test_of_a_tower_with_one_attention_left_little_more_than_the_projection_of_patches_remains() -> None:
    whole = captured_toy("dual_encoder").program
    branches = [f"vision_model.encoder.layer.{i}.{part}" for i in range(3) for part in ("attention", "mlp")]
    cut = without_branches(clone_program(whole), *branches[1:])
    tower = cut.components["image_encoder"]
    patches = next(node for node in tower.graph.graph.nodes if node.name.endswith("projection"))
    after, counts = shortened(cut)
    assert counts == (1, 1)
    left = component_cost(after.components["image_encoder"], after.dims).macs
    assert left < 0.5 * component_cost(tower, cut.dims).macs
    assert left < 2 * nodes_cost(tower, [patches], cut.dims).macs
