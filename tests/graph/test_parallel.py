"""Chains of linear maps beside a layer: what folds, what stays and why, and that the model is left without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlmopt.core.contract import Context
from vlmopt.core.program import Program
from vlmopt.graph.example import DIMS, component_of, program_from, program_of
from vlmopt.graph.modules import get_at
from vlmopt.graph.parallel import find_parallel
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import StepResult, run_step

Forward = Callable[["Adapted", Tensor], Tensor]


class Adapted(nn.Module):
    """Layers 4 -> 6 of every kind with maps to put beside them, all random, in float64."""

    def __init__(self, forward: Forward, *, bias: bool = True) -> None:
        super().__init__()
        self.function = forward
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.base, self.other = nn.Linear(4, 6, bias=bias), nn.Linear(4, 6)
            self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)
            self.wide, self.thin, self.biased = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(3, 6)
            self.behind = nn.Linear(6, 5)
            self.image = nn.Conv2d(4, 6, 3, padding=1, bias=bias)
            self.image_a, self.image_b = nn.Conv2d(4, 2, 3, padding=1, bias=False), nn.Conv2d(2, 6, 1)
            self.point_a, self.point_b = nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(2, 6, 3, padding=1, bias=False)
            self.strided = nn.Conv2d(4, 2, 3, padding=1, stride=2)
            self.split, self.split_a = nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 2, 3, groups=2)
            self.split_b = nn.Conv2d(2, 6, 1, groups=2)
            self.words, self.word_a = nn.Embedding(9, 6), nn.Embedding(9, 2)
            self.word_t = nn.Parameter(torch.randn(2, 9))
            self.share, self.scale = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(6))
            self.matrix = nn.Parameter(torch.randn(4, 6))
            for parameter in self.parameters():
                parameter.data.normal_()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.function(self, x))


def rows(*, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image() -> Tensor:
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def words() -> Tensor:
    return torch.arange(6).reshape(2, 3)


def fold(program: Program) -> StepResult:
    return run_step(program, make_pass("fold-adapters", {}), Context(), step=1)


def run(program: Program, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = program.components["model"].graph(x)[0]
    return found


def lora(m: Adapted, x: Tensor) -> Tensor:
    return m.b(m.a(x))  # type: ignore[no-any-return]


FOLDING: dict[str, tuple[Forward, Forward, Callable[[], Tensor]]] = {
    "low rank": (lambda m, x: m.base(x) + 0.5 * lora(m, x), lambda m, x: m.base(x), rows),
    "in front": (lambda m, x: lora(m, x) * 3 + m.base(x), lambda m, x: m.base(x), rows),
    "subtracted": (lambda m, x: m.base(x) - lora(m, x), lambda m, x: m.base(x), rows),
    "subtracted as a whole": (
        lambda m, x: torch.sin(x) @ m.matrix - (m.base(x) + lora(m, x)),
        lambda m, x: torch.sin(x) @ m.matrix - m.base(x),
        rows,
    ),
    "many": (
        lambda m, x: m.base(x) + (lora(m, x) / 3 + m.scale * m.biased(m.thin(m.wide(x)))) - m.share[0] * lora(m, x),
        lambda m, x: m.base(x),
        rows,
    ),
    "another layer": (lambda m, x: m.base(x) + m.other(x), lambda m, x: m.base(x), rows),
    "mixture that no input changes": (
        lambda m, x: m.base(x) + (m.share.softmax(0)[0] * lora(m, x) + m.share.softmax(0)[1] * x @ m.matrix),
        lambda m, x: m.base(x),
        rows,
    ),
    "scaled input": (lambda m, x: m.base(x) + lora(m, 0.3 * x), lambda m, x: m.base(x), rows),
    "dropout": (
        lambda m, x: m.base(x) + lora(m, nn.functional.dropout(x, training=False)),
        lambda m, x: m.base(x),
        rows,
    ),
    "rows and back": (
        lambda m, x: m.base(x) + (x.reshape(-1, 4) @ m.matrix).view(x.shape[0], 3, 6),
        lambda m, x: m.base(x),
        rows,
    ),
    "turned and back": (
        lambda m, x: m.base(x) + lora(m, x.transpose(0, 1)).permute(1, 0, 2),
        lambda m, x: m.base(x),
        rows,
    ),
    "casts": (lambda m, x: m.base(x) + lora(m, x.float().double()), lambda m, x: m.base(x), rows),
    "a value between": (
        lambda m, x: m.behind(m.base(x) + lora(m, x)),
        lambda m, x: m.behind(m.base(x)),
        rows,
    ),
    "convolution": (lambda m, x: m.image(x) + 2 * m.image_b(m.image_a(x)), lambda m, x: m.image(x), image),
    "point first": (lambda m, x: m.image(x) + m.point_b(m.point_a(x)), lambda m, x: m.image(x), image),
    "scaled channels": (
        lambda m, x: m.image(x) + m.scale.view(1, 6, 1, 1) * m.image_b(m.image_a(x)),
        lambda m, x: m.image(x),
        image,
    ),
    "groups": (lambda m, x: m.split(x) + m.split_b(m.split_a(x)), lambda m, x: m.split(x), image),
    "embedding": (lambda m, x: m.words(x) + m.b(m.word_a(x)) * 0.1, lambda m, x: m.words(x), words),
    "embedding, table turned": (
        lambda m, x: m.words(x) + nn.functional.embedding(x, m.word_t.T) @ m.b.weight.T,
        lambda m, x: m.words(x),
        words,
    ),
    "embedding with a shift": (
        lambda m, x: m.words(x) * 2 + m.biased(m.word_a(x) @ m.matrix[:2, :3]),
        lambda m, x: m.words(x),
        words,
    ),
}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FOLDING)
def test_a_chain_beside_a_layer_folds_to_the_last_digits_and_leaves_the_model_without_it(
    name: str, *, bias: bool
) -> None:
    adapted, plain, sample = FOLDING[name]
    before = program_of(Adapted(adapted, bias=bias), sample())
    wanted = run(before, sample())
    done = fold(before)
    assert [site.component for site in done.applied] == ["model"]
    assert done.refusals == ()
    assert done.predicted == done.counted
    assert done.text_after == fold(program_of(Adapted(plain, bias=bias), sample())).text_before
    tolerance = 1e-6 if name == "casts" else 1e-13
    assert float((run(done.program, sample()) - wanted).abs().max()) < tolerance * float(wanted.abs().max())
    assert torch.equal(run(before, sample()), wanted)


STAYING: dict[str, tuple[Forward, str, Callable[[], Tensor]]] = {
    "activation": (lambda m, x: m.base(x) + m.b(torch.tanh(m.a(x))), "a tanh is part of it", rows),
    "norm": (lambda m, x: m.base(x) + m.b(nn.functional.layer_norm(m.a(x), (2,))), "a layer_norm is part of it", rows),
    "mask": (lambda m, x: m.base(x) + lora(m, x) * (x[..., :1] > 0), "multiplied by gt, which is no constant", rows),
    "masked input": (lambda m, x: m.base(x) + lora(m, x * (x[..., :1] > 0)), "multiplied by gt", rows),
    "routing": (
        lambda m, x: m.base(x) + torch.matmul(m.a(x), m.a(x).softmax(-1).mean((0, 1))[:, None] * m.b.weight.T),
        "it is routed: the second factor of a matmul is no constant",
        rows,
    ),
    "place by place": (
        lambda m, x: m.base(x) + lora(m, x) * m.share.view(3, 1),
        "differs from token to token",
        rows,
    ),
    "stride": (
        lambda m, x: m.image(x) + m.image_b(nn.functional.interpolate(m.strided(x), size=(5, 5))),
        "a upsample_nearest2d.vec is part of it",
        image,
    ),
    "across the groups": (lambda m, x: m.split(x) + m.image_b(m.split_a(x)), "it mixes the groups", image),
    "other words": (lambda m, x: m.words(x) + m.b(m.word_a(x + 1)), "adds a constant to the value in front", words),
    "read beside": (
        lambda m, x: (y := m.base(x)) + lora(m, x) + torch.relu(y).sum(),
        "is read by relu (relu) as well, which wants it without the adapter",
        rows,
    ),
    "read by its chain": (
        lambda m, x: (y := m.base(x)) + lora(m, x) + m.biased(torch.relu(y[..., :3])),
        "is read by slice_1 (slice.Tensor) as well",
        rows,
    ),
    "called twice": (
        lambda m, x: m.base(x) + lora(m, x) + m.base(torch.sin(x)),
        "reads the weight of its base too",
        rows,
    ),
    "something is taken from it": (
        lambda m, x: torch.sin(m.base(x) + (lora(m, x) - torch.cos(x) @ m.matrix)),
        "another value is subtracted from it alone",
        rows,
    ),
    "chosen by index": (
        lambda m, x: m.base(x)[:, torch.tensor([0, 2])] + lora(m, x[:, torch.tensor([0, 2])]),
        "only some tokens see it",
        rows,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYING)
def test_what_is_no_chain_beside_a_layer_stays_and_says_why(name: str) -> None:
    forward, reason, sample = STAYING[name]
    before = program_of(Adapted(forward), sample())
    done = fold(before)
    assert done.applied == ()
    assert any(reason in refusal.reason for refusal in done.refusals)
    assert done.text_after == done.text_before


class ImageTokens(nn.Module):
    """Low-rank maps that only some tokens see, written in place as partial adapters of released models are."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        out, chosen = self.base(x), torch.tensor([0, 2])
        out[:, chosen] = out[:, chosen] + self.b(self.a(x[:, chosen]))
        return out  # type: ignore[no-any-return]


def test_an_adapter_that_is_put_on_image_tokens_alone_is_refused() -> None:
    done = fold(program_of(ImageTokens(), torch.ones(2, 3, 4)))
    assert done.applied == ()
    assert ["only some tokens see it" in refusal.reason for refusal in done.refusals] == [True]


@pytest.mark.parametrize("kind", ["int8", "computed"])
def test_a_base_whose_weight_is_no_stored_one_says_so(kind: str) -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid = nn.Parameter(torch.arange(24, dtype=torch.int8).reshape(6, 4), requires_grad=False)
            self.table = nn.Parameter(torch.randn(6, 4))
            self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.grid.to(x.dtype) * 0.1 if kind == "int8" else self.table.tanh()
            return nn.functional.linear(x, weight) + self.b(self.a(x))  # type: ignore[no-any-return]

    done = fold(program_of(Quantized(), torch.ones(2, 3, 4)))
    assert done.applied == ()
    reason = {"int8": "the weight of its base is quantized", "computed": "is computed in the graph"}[kind]
    assert [reason in refusal.reason for refusal in done.refusals] == [True]


class Layers(nn.Module):
    """Two layers whose chains share their first map and a pool of second ones, mixed by weights of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.a, self.pool = nn.Linear(4, 2, bias=False), nn.ModuleList(nn.Linear(2, 4, bias=False) for _ in range(3))
        self.mixture = nn.Parameter(torch.randn(2, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer, logits in zip(self.layers, self.mixture, strict=True):
            hidden, shares = self.a(x), logits.softmax(0)
            mixed = sum(share * expert(hidden) for share, expert in zip(shares, self.pool, strict=True))
            x = torch.relu(layer(x) + 0.7 * mixed)
        return x


def test_chains_that_share_their_weights_across_layers_fold_one_by_one_and_the_last_takes_the_weights_along() -> None:
    before = program_of(Layers(), rows())
    wanted = run(before, rows())
    done = fold(before)
    assert [site.name for site in done.applied] == ["model/layers.0", "model/layers.1"]
    assert [site.saving.parameters for site in done.applied] == [0, 4 * 2 + 3 * 2 * 4 + 2 * 3]
    assert done.predicted == done.counted
    assert float((run(done.program, rows()) - wanted).abs().max()) < 1e-13 * float(wanted.abs().max())
    first = run_step(before, make_pass("fold-adapters", {}), Context(), step=1, fuel=1)
    assert first.predicted == first.counted
    assert float((run(first.program, rows()) - wanted).abs().max()) < 1e-13 * float(wanted.abs().max())


def test_a_weight_that_another_component_reads_is_left_alone() -> None:
    shared = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    adapted, plain = Adapted(lambda m, x: m.base(x) + lora(m, x)), Adapted(lambda m, x: m.other(x))
    adapted.base.weight = plain.other.weight = shared
    parts = {"model": component_of(adapted, rows()), "second": component_of(plain, rows(), name="second")}
    done = fold(program_from(parts, program_of(adapted, rows()).assembly))
    assert done.applied == ()
    assert [refusal.reason for refusal in done.refusals] == [
        "second/other reads the weight of its base too, which would have to stay"
    ]


def test_large_parts_beside_a_layer_are_no_adapters_of_it() -> None:
    program = program_of(Adapted(lambda m, x: m.base(x) + m.biased(torch.relu(m.thin(m.wide(x))))), rows())
    assert find_parallel(program.components["model"].graph) == ([], [])


def test_the_fold_error_in_float32_is_that_of_one_rounding_of_the_weight() -> None:
    module = Adapted(lambda m, x: m.base(x) + 0.5 * lora(m, x)).float()
    program = program_of(module, rows().float())
    leaf = get_at(fold(program).program.components["model"].graph, "base")
    wanted = module.base.weight.double() + 0.5 * module.b.weight.double() @ module.a.weight.double()
    assert torch.equal(leaf.weight, wanted.float())  # type: ignore[arg-type, union-attr]
    assert DIMS["batch"].typical == 1


@st.composite
def chains(draw: st.DrawFn) -> Forward:
    """A sum of a layer and chains of random operations, each a linear map."""
    steps = st.lists(st.sampled_from(["scale", "learned", "negate", "flat", "turn", "square", "shift"]), max_size=4)
    drawn = [(draw(steps), draw(st.booleans())) for _ in range(draw(st.integers(1, 3)))]

    def forward(m: Adapted, x: Tensor) -> Tensor:
        total = m.base(x)
        for names, is_first in drawn:
            value = m.b(m.a(x))
            for name in names:
                value = _step(m, name, value)
            total = value + total if is_first else total - value
        return total  # type: ignore[no-any-return]

    return forward


def _step(m: Adapted, name: str, value: Tensor) -> Tensor:
    """One operation; a shift is scaled, since what is added last is a term of the sum and no chain."""
    if name == "flat":
        return (value.reshape(-1, 6) * m.scale).view(value.shape)
    if name == "turn":
        return (value.transpose(0, 1) / 3).transpose(0, 1)
    if name == "square":
        return m.biased(m.thin(nn.functional.linear(value, torch.ones(8, 6, dtype=value.dtype))))  # type: ignore[no-any-return]
    made = {"scale": value * 0.5, "learned": m.scale * value, "negate": -value, "shift": 2 * (value + m.scale)}
    return made[name]


@settings(max_examples=6, deadline=None)
@given(chains())
def test_any_sum_of_linear_chains_folds_into_its_layer(forward: Forward) -> None:
    before = program_of(Adapted(forward), rows())
    done = fold(before)
    wanted = run(before, rows(seed=5))
    assert len(done.applied) == 1
    assert done.predicted == done.counted
    assert done.text_after == fold(program_of(Adapted(lambda m, x: m.base(x)), rows())).text_before
    assert float((run(done.program, rows(seed=5)) - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
