"""Low-rank adapters: bit-equal until trained, their formulas, their counts, trained by recovery, folded afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.benchmarks.adapter_counts import COUNTS, lily_plan
from vlmopt.cli import entry
from vlmopt.core.contract import Context
from vlmopt.core.errors import PassError
from vlmopt.core.program import Program
from vlmopt.graph.adapters import adapter_parameters
from vlmopt.graph.example import AttentionBlocks, program_of
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import StepResult, program_text, run_step

KINDS: list[dict[str, Any]] = [
    {"kind": "lora"},
    {"kind": "rslora"},
    {"kind": "lily", "experts": 3},
    {"kind": "lily", "stride": 2, "alpha": 0.5},
    {"kind": "lily", "mixture": "routed"},
    {"kind": "rasa"},
    {"kind": "rasa", "rank": 4, "shared_rank": 2},
]


def blocks() -> Program:
    return program_of(AttentionBlocks().double(), torch.ones(2, 3, 8).double())


def step(program: Program, name: str, options: dict[str, Any], *, fuel: int | None = None) -> StepResult:
    return run_step(program, make_pass(name, options), Context(), step=1, fuel=fuel)


def insert(program: Program, options: dict[str, Any], *, fuel: int | None = None) -> StepResult:
    return step(program, "insert-low-rank-adapter", {"rank": 3, **options}, fuel=fuel)


def batch() -> Tensor:
    return torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(program: Program, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = program.components["model"].graph(x)[0]
    return found


def train(program: Program) -> dict[str, Tensor]:
    """Gives every adapter parameter other numbers, as training would; returns them by their paths."""
    generator = torch.Generator().manual_seed(7)
    weights = adapter_parameters(program)
    for parameter in weights.values():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5
    return {name.removeprefix("model/adapters."): weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_an_inserted_adapter_changes_no_bit_and_folds_once_it_is_trained(options: dict[str, Any]) -> None:
    before = blocks()
    done = insert(before, options)
    assert len(done.applied) == 12
    assert done.predicted == done.counted
    assert torch.equal(run(done.program, batch()), run(before, batch()))
    train(done.program)
    trained = run(done.program, batch())
    assert float((trained - run(before, batch())).abs().max()) > 1e-3
    folded = step(done.program, "fold-adapters", {})
    if options.get("mixture") == "routed":
        assert folded.applied == ()
        assert len(folded.refusals) == 12
        assert all("it is routed: the second factor of a linear is no" in one.reason for one in folded.refusals)
        return
    assert folded.refusals == ()
    assert folded.predicted == folded.counted
    assert folded.text_after == program_text(before)
    assert adapter_parameters(folded.program) == {}
    assert float((run(folded.program, batch()) - trained).abs().max()) < 1e-12 * float(trained.abs().max())


def change_of(options: dict[str, Any], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the adapter of the head alone adds to the output, with all weights random."""
    before = blocks()
    done = insert(before, {"modules": ["head"], **options})
    weights = train(done.program)
    return run(done.program, x) - run(before, x), weights


def hidden_of(x: Tensor) -> Tensor:
    """What the head reads."""
    model = AttentionBlocks().double()
    model.head = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        found: Tensor = model(x)
    return found


@pytest.mark.parametrize(("kind", "scale"), [("lora", 16 / 3), ("rslora", 16 / math.sqrt(3))])
def test_lora_adds_its_formula(kind: str, scale: float) -> None:
    found, w = change_of({"kind": kind}, batch())
    wanted = scale * hidden_of(batch()) @ w["head.low_rank.down.weight"].T @ w["head.low_rank.up.weight"].T
    assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())


@pytest.mark.parametrize("mixture", ["static", "routed"])
def test_training_draws_the_experts_of_lily_apart(mixture: str) -> None:
    program = insert(blocks(), {"kind": "lily", "experts": 3, "mixture": mixture, "rank": 2}).program
    weights = adapter_parameters(program)
    optimizer = torch.optim.AdamW([weight.requires_grad_(True) for weight in weights.values()], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        program.components["model"].graph(batch())[0].square().sum().backward()
        optimizer.step()
    experts = [weight for name, weight in weights.items() if name.endswith(".experts")]
    assert experts
    assert all(float((weight[0] - weight[1]).abs().max()) > 1e-5 for weight in experts)


@pytest.mark.parametrize("mixture", ["static", "routed"])
def test_lily_adds_its_formula(mixture: str) -> None:
    found, w = change_of({"kind": "lily", "experts": 2, "alpha": 0.7, "mixture": mixture}, batch())
    hidden = hidden_of(batch()) @ w["head_8_3.down_0.weight"].T
    if mixture == "routed":
        shares = (hidden @ w["head.low_rank.route.weight"].T).softmax(-1).mean((0, 1))
    else:
        shares = w["head.low_rank.mixture"].softmax(-1)[0]
    experts = w["head_8_3.experts"].view(2, 3, 3)
    wanted = 0.7 * hidden @ sum(share * expert for share, expert in zip(shares, experts, strict=True)).T  # type: ignore[union-attr]
    assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())


def test_rasa_adds_its_formula() -> None:
    found, w = change_of({"kind": "rasa", "shared_rank": 2}, batch())
    x = hidden_of(batch())
    own = x @ w["head.low_rank.down.weight"].T @ w["head.low_rank.up.weight"].T
    pool = (x @ w["head_8_3.pool_down.weight"].T * w["head.low_rank.share"]) @ w["head_8_3.pool_up.weight"].T
    wanted = 16 / 3 * (own + pool)
    assert own.shape == pool.shape
    assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())


def test_layers_of_a_family_share_what_the_paper_shares() -> None:
    weights = train(insert(blocks(), {"kind": "lily", "stride": 2, "modules": ["*.query", "*.up"]}).program)
    assert set(weights) == {
        "layers_attention_query_8_8.down_0.weight", "layers_attention_query_8_8.experts",
        "layers_ffn_up_8_16.down_0.weight", "layers_ffn_up_8_16.experts",
        *(f"layers.{i}.{name}.low_rank.mixture" for i in range(2) for name in ("attention.query", "ffn.up")),
    }  # fmt: skip
    apart = train(insert(blocks(), {"kind": "lily", "modules": ["*.query"]}).program)
    assert {f"layers_attention_query_8_8.down_{i}.weight" for i in range(2)} < set(apart)


def test_a_stopped_run_goes_on_to_the_same_program() -> None:
    whole = insert(blocks(), {"kind": "rasa"})
    part = insert(blocks(), {"kind": "rasa"}, fuel=5)
    assert part.predicted == part.counted
    rest = insert(part.program, {"kind": "rasa"})
    assert len(rest.applied) == 7
    assert {refusal.reason for refusal in rest.refusals} > {"has a low-rank adapter already"}
    assert {name: tuple(w.shape) for name, w in adapter_parameters(rest.program).items()} == {
        name: tuple(w.shape) for name, w in adapter_parameters(whole.program).items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; expected at least 1"),
        ({"stride": 0}, "stride is 0"),
        ({"kind": "rasa", "shared_rank": 3}, "shared_rank is 3; expected 1 to 2"),
        ({"alpha": float("inf")}, "expected a finite number"),
        ({"kinds": ["attend"]}, "kinds holds 'attend'"),
        ({"kind": "lorra"}, "kind"),
    ],
)
def test_options_of_which_no_adapter_can_be_made_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        make_pass("insert-low-rank-adapter", {"rank": 3, **options})


def test_a_misspelled_module_is_refused_with_the_closest_one() -> None:
    with pytest.raises(PassError, match=r"'layers.0.ffn.upp' matches nothing.*did you mean 'layers.0.ffn.up'"):
        insert(blocks(), {"modules": ["layers.0.ffn.upp"]})


@pytest.mark.parametrize("name", COUNTS)
def test_lily_at_real_size_has_the_published_counts(name: str) -> None:
    n_layers, shapes, options, wanted = COUNTS[name]
    for mixture, count in (("routed", wanted), ("static", None)):
        plan = lily_plan(name, mixture)
        found = -sum(site.saving.parameters for site in plan.sites)
        n_scores = n_layers * len(shapes) * options["experts"]
        assert len(plan.sites) == n_layers * len(shapes)
        assert found == (wanted - n_scores * (options["rank"] - 1) if count is None else count)


@pytest.mark.slow
def test_adapters_are_trained_by_recovery_and_folded(
    clip: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {"insert-low-rank-adapter": {"rank": 2, "modules": ["image_encoder/*.fc1", "image_encoder/*.v_proj"]}}
    recovery = {"level": "adapters", "epochs": 2, "learning_rate": 1e-2}
    recipe = tmp_path / "recipe.yaml"
    passes = ["canonicalize", lora, "fold-adapters"]
    content = {"model": str(clip), "task": str(colours), "passes": passes, "recovery": recovery}
    recipe.write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    assert entry.run(["optimize", "-q", "--json", "--recipe", str(recipe), "-o", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    steps = {one["name"]: one for one in report["passes"]}
    assert steps["fold-adapters"]["n_applied"] == steps["insert-low-rank-adapter"]["n_applied"] == 6
    assert steps["fold-adapters"]["counted"]["parameters"] == -steps["insert-low-rank-adapter"]["counted"]["parameters"]
    fold = next(gate for gate in report["gates"] if gate["name"] == "3 fold-adapters is close")
    assert 0.0 <= fold["found"] <= fold["allowed"]
