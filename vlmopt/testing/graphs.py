"""Small random programs: residual branches, views, casts, constants, duplicates, dead code, several outputs.

A `Blueprint` says what is in one; `programs()` draws them with Hypothesis, which shrinks what fails, and
`random_blueprint` draws them with Python's random numbers, for which nothing has to be installed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Pass
from vlmopt.core.facts import CANONICAL
from vlmopt.core.program import Program
from vlmopt.graph.example import program_of

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

N_TOKENS, N_WORDS = 4, 7
STEMS = ("values", "tokens", "image")
WIDTHS = (4, 8)
MAX_BLOCKS = 5
DEAD_CODE = "dead code"


@dataclass(frozen=True)
class Blueprint:
    """A small program: a stem that makes [B, N, D] of the input, blocks one after another, and a head.

    Args:
        blocks: names among `BLOCKS`.
        is_raw: as captured, with assertions and dead code; otherwise canonical.
    """

    stem: str
    blocks: tuple[str, ...]
    width: int
    seed: int
    has_head: bool
    is_raw: bool


def build_program(blueprint: Blueprint) -> Program:
    """The program of a blueprint; the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(blueprint.seed)
        model = _Model(blueprint)
    return program_of(model, _sample(blueprint), raw=blueprint.is_raw)


def random_blueprint(source: random.Random) -> Blueprint:
    """A blueprint from random numbers."""
    return Blueprint(
        stem=source.choice(STEMS),
        blocks=tuple(source.choice(list(BLOCKS)) for _ in range(source.randint(2, MAX_BLOCKS))),
        width=source.choice(WIDTHS),
        seed=source.randrange(1000),
        has_head=source.random() < 0.5,
        is_raw=source.random() < 0.7,
    )


def fitting(blueprint: Blueprint, pass_class: type[Pass]) -> Blueprint:
    """The blueprint, less what no run hands to this pass.

    What a pass requires to be canonical is; and dead code is left to the pass whose work it is, since whichever pass
    comes first takes it along and then saves more than it predicts.
    """
    if CANONICAL in pass_class.produces:
        return blueprint
    blocks = tuple(name for name in blueprint.blocks if name != DEAD_CODE)
    return replace(blueprint, blocks=blocks, is_raw=blueprint.is_raw and CANONICAL not in pass_class.requires)


def blueprints() -> SearchStrategy[Blueprint]:
    """All blueprints, as a Hypothesis strategy."""
    from hypothesis import strategies as st

    return st.builds(
        Blueprint,
        stem=st.sampled_from(STEMS),
        blocks=st.lists(st.sampled_from(list(BLOCKS)), max_size=MAX_BLOCKS).map(tuple),
        width=st.sampled_from(WIDTHS),
        seed=st.integers(0, 999),
        has_head=st.booleans(),
        is_raw=st.booleans(),
    )


def programs() -> SearchStrategy[Program]:
    """Small random programs, as a Hypothesis strategy."""
    return blueprints().map(build_program)


def _sample(blueprint: Blueprint) -> Tensor:
    if blueprint.stem == "tokens":
        return torch.arange(2 * N_TOKENS).reshape(2, N_TOKENS) % N_WORDS
    if blueprint.stem == "image":
        return torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    return torch.linspace(-1, 1, 2 * N_TOKENS * blueprint.width).reshape(2, N_TOKENS, blueprint.width)


class _Model(nn.Module):
    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        width = blueprint.width
        self.stem: nn.Module = nn.Identity()
        if blueprint.stem == "tokens":
            self.stem = nn.Embedding(N_WORDS, width)
        elif blueprint.stem == "image":
            self.stem = nn.Conv2d(3, width, kernel_size=2, stride=2)
        self.is_image = blueprint.stem == "image"
        self.blocks = nn.ModuleList(BLOCKS[name](width) for name in blueprint.blocks)
        self.head = nn.Linear(width, 3) if blueprint.has_head else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        if self.is_image:
            x = x.flatten(2).transpose(1, 2)
        more: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            if isinstance(block, _Tap):
                more.append(x * 0.5)
        x = torch.tanh(x)
        return (x if self.head is None else self.head(x.mean(1)), *more)


class _Act(nn.Module):
    """An activation, or any other function without weights."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Tap(nn.Module):
    """Its value is also an output of the program."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Residual self-attention with two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        q, k, v = (
            layer(x).view(x.shape[0], N_TOKENS, 2, width // 2).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape[0], N_TOKENS, width))  # type: ignore[no-any-return]


class _Constant(nn.Module):
    """Adds what is computed from a weight alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.interpolate(self.table.mT, size=N_TOKENS, mode="linear").mT


class _Duplicate(nn.Module):
    """Computes the same value twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + torch.relu(self.linear(x))


class _Shared(nn.Module):
    """Two layers that share their weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class _Convolution(nn.Module):
    """A convolution over the tokens as a 2 x 2 picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        picture = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 2, 2)
        return self.conv(picture).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def _dead(x: Tensor) -> Tensor:
    torch.cos(x).sum()
    return x


def _asserted(x: Tensor) -> Tensor:
    torch.ops.aten._assert_tensor_metadata.default(x, dtype=x.dtype)
    return x


def _same_cast(x: Tensor) -> Tensor:
    return torch.ops.aten.to.dtype(x, x.dtype)  # type: ignore[no-any-return]


def _wide_cast(x: Tensor) -> Tensor:
    return torch.sin(x.to(torch.float64)).to(x.dtype)


def _views(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().view(x.shape[0], -1).view(x.shape[0], x.shape[2], x.shape[1]).mT


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda width: nn.Linear(width, width),
    "norm": nn.LayerNorm,
    "ffn": _FeedForward,
    "attention": _Attention,
    "constant": _Constant,
    "duplicate": _Duplicate,
    "shared": _Shared,
    "convolution": _Convolution,
    "output": lambda width: _Tap(),
    "relu": lambda width: _Act(torch.relu),
    "same cast": lambda width: _Act(_same_cast),
    "wide cast": lambda width: _Act(_wide_cast),
    "views": lambda width: _Act(_views),
    DEAD_CODE: lambda width: _Act(_dead),
    "assertion": lambda width: _Act(_asserted),
    "by one": lambda width: _Act(lambda x: x * 1.0),
    "plus itself": lambda width: _Act(lambda x: x + x),
    "dropout": lambda width: nn.Dropout(0.5),
}
