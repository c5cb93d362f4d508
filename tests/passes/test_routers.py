"""Routers folded into their means on the task: the certificate, the exchange, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.capture.test_adapters import write_adapter
from tests.passes.test_low_rank import batch, blocks, insert, run, step, train
from vlmopt.cli import entry
from vlmopt.core.contract import Context, StatRequest
from vlmopt.core.program import Program
from vlmopt.graph.mixtures import Exchange, exchanges, find_mixtures, layer_mixtures
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step


def routed(n_experts: int = 3) -> Program:
    """Lily with routers that look at the data, all weights random."""
    program = insert(blocks(), {"kind": "lily", "mixture": "routed", "experts": n_experts}).program
    train(program)
    return program


def mixtures_of(program: Program, samples: Tensor) -> dict[str, Tensor]:
    """What every mixture is for every sample alone, [n, E]."""
    graph = program.components["model"].graph
    found: dict[str, list[Tensor]] = {}
    nodes = [mixture.node for mixture in find_mixtures(graph)]

    class Recording(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n in nodes:
                found.setdefault(n.name, []).append(value.detach())
            return value

    for sample in samples:
        Recording(graph).run(sample.unsqueeze(0))
    return {name: torch.stack(values) for name, values in found.items()}


def moments_of(program: Program, samples: Tensor) -> dict[StatRequest, Tensor]:
    known: dict[StatRequest, Tensor] = {}
    for name, values in mixtures_of(program, samples).items():
        known[StatRequest("model", name, "mean")] = values.mean(0)
        known[StatRequest("model", name, "second_moment")] = values.T @ values / len(values)
    return known


@pytest.mark.parametrize("mixture", ["routed", "static"])
def test_the_layer_beside_every_mixture_is_found(mixture: str) -> None:
    program = insert(blocks(), {"kind": "lily", "mixture": mixture, "experts": 3}).program
    train(program)
    graph = program.components["model"].graph
    found = layer_mixtures(graph)
    assert len({one.layer for one in found}) == len(found) == 12
    assert all(type(graph.get_submodule(one.layer)) is torch.nn.Linear for one in found)
    assert all((one.node is None) is (mixture == "static") for one in found)
    for one in found:
        if one.node is None:
            assert abs(sum(one.shares) - 1) < 1e-9
            assert max(one.shares) - min(one.shares) > 1e-3


def test_the_certificate_is_the_distance_between_weights() -> None:
    program = routed()
    samples = torch.randn(16, 3, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    graph = program.components["model"].graph
    seen = mixtures_of(program, samples)
    known = moments_of(program, samples)
    moments = {
        name: (known[StatRequest("model", name, "mean")], known[StatRequest("model", name, "second_moment")])
        for name in seen
    }
    found = exchanges(graph, moments)
    assert len(found) == 12
    tensors = {path: weight.detach() for path, weight in graph.named_parameters()}
    for exchange in found.values():
        assert isinstance(exchange, Exchange)
        assert 0 < exchange.rms <= exchange.largest
    name, values = next(iter(seen.items()))
    exchange = found[name]
    assert isinstance(exchange, Exchange)
    family = next(path for path in tensors if path.endswith("experts") and "query" in path)
    down = tensors[family.replace("experts", "down_0.weight")]
    experts = tensors[family].view(3, 8, -1)
    weight = tensors[f"{exchange.layer}.weight"] + 16 * torch.einsum("e,eor,ri->oi", values.mean(0), experts, down)
    moved = [16 * torch.einsum("e,eor,ri->oi", value - values.mean(0), experts, down) for value in values]
    rms = torch.stack(moved).flatten(1).square().sum(1).mean().sqrt() / weight.norm()
    assert exchange.rms == pytest.approx(float(rms.detach()), rel=1e-9)
    assert all(float(one.norm() / weight.norm()) <= exchange.largest for one in moved)


def test_a_replaced_mixture_folds_to_the_weight_of_the_mean() -> None:
    program = routed()
    context = Context(statistics=moments_of(program, batch()))
    done = run_step(program, make_pass("fold-routers", {"tolerance": 10.0}), context, step=1)
    assert len(done.applied) == 12
    assert done.predicted == done.counted
    assert "the weight of" in done.applied[0].summary
    folded = step(done.program, "fold-adapters", {})
    assert folded.refusals == ()
    constant = run(done.program, batch())
    assert float((run(folded.program, batch()) - constant).abs().max()) < 1e-12 * float(constant.abs().max())
    assert float((constant - run(program, batch())).abs().max()) > 1e-6


def test_a_mixture_that_is_the_same_for_all_inputs_changes_nothing() -> None:
    program = routed()
    for path, weight in program.components["model"].graph.named_parameters():
        if path.endswith("route.weight"):
            weight.data.zero_()
    context = Context(statistics=moments_of(program, batch()))
    done = run_step(program, make_pass("fold-routers", {"tolerance": 1e-9}), context, step=1)
    assert len(done.applied) == 12
    assert float((run(done.program, batch()) - run(program, batch())).abs().max()) < 1e-12


def test_a_mixture_that_moves_too_much_stays_with_the_figures() -> None:
    program = routed()
    context = Context(statistics=moments_of(program, batch()))
    done = run_step(program, make_pass("fold-routers", {"tolerance": 0.0}), context, step=1)
    assert done.applied == ()
    assert all("more than the tolerance of 0.00%" in refusal.reason for refusal in done.refusals)


@pytest.fixture(scope="module")
def routed_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lily as peft writes it, its router and experts random."""
    peft = pytest.importorskip("peft", reason="the extra `adapters` is not installed")
    config = peft.LilyConfig(r=2, stride_A=1, num_B=3, scaling=1.0, target_modules=r".*vision_model.*(v_proj|fc1)")
    return write_adapter(tmp_path_factory.mktemp("adapter") / "lily", config)


@pytest.mark.parametrize("tolerance", [10.0, 1e-6], ids=["within", "beyond"])
def test_a_run_measures_the_mixtures_of_a_given_adapter_and_folds_them(
    tolerance: float,
    clip: Path,
    colours: Path,
    routed_adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = {
        "model": str(clip),
        "task": str(colours),
        "adapters": [f"style={routed_adapter}"],
        "passes": ["canonicalize", {"fold-routers": {"tolerance": tolerance}}, "fold-adapters"],
    }
    recipe.write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    code = entry.run(["optimize", "-q", "--json", "--recipe", str(recipe), "-o", str(out)])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    steps = {one["name"]: one for one in report["passes"]}
    n = 6 if tolerance > 1 else 0
    assert steps["fold-routers"]["n_applied"] == n
    mixtures = report["mixtures"]
    assert len({one["layer"] for one in mixtures}) == 6
    assert all(one["is_routed"] and abs(sum(one["shares"]) - 1) < 1e-6 for one in mixtures)
    assert any(max(one["spread"]) > 0 for one in mixtures)
    assert steps["fold-adapters"]["n_applied"] == n
    assert entry.run(["explain", "--json", str(recipe)]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["plan"]}
    assert len(rows["fold-routers"]["sites"]) == n
    assert len(rows["fold-routers"]["refusals"]) == 6 - n
