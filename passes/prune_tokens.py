"""Leaves fewer tokens of an image, so that projector, decoder and its cache have less to read.

Before: an image is T tokens [N, T, D] in front of the decoder; after: K of them (`vlmopt/graph/token_reduction.py`).
Four methods, the first two of which look at all tokens:

* `pool`: the mean over blocks of the grid in which tokens lie. Needs a grid that blocks of one size cover.
* `merge`: the likest tokens of an image become their mean (ToMe).
* `select-positions`: those at K FIXED places, where features vary most over the items of the task's profile split;
  the same places for every image, and no operation that looks at one.
* `select-salient`: of EACH image those farthest from its mean token.

Place: `encoded` is in front of what treats each token by itself, as a projector does, `projected` behind it; only with
`select-positions` both give the same. What counts tokens follows, the processor's files too. No bound: the task judges.

Cases:
1. Every method, at both places.
2. A number that blocks do not leave, and one that is no smaller, are refused; without places in a prompt, any is.
3. Without data no places are chosen. Where rows and columns are positions, only blocks leave such.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site, StatRequest
from vlmopt.core.facts import CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Generation, Program
from vlmopt.graph.assembled import VISION
from vlmopt.graph.costing import program_cost
from vlmopt.graph.example import eyes_and_words
from vlmopt.graph.image_tokens import n_image_tokens, put_tokens, token_blocks, token_place, what_is_left, why_no_tokens
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.patterns import check_patterns
from vlmopt.graph.token_reduction import chosen, merged, pooled, salient


@dataclass(frozen=True)
class PruneTokens(Pass):
    """Leaves fewer tokens of an image.

    Args:
        keep: how many, or which share of them; with `pool` a share is the most that blocks leave of it.
        method: `pool`, `merge`, `select-positions` (fixed places, found on the task), `select-salient` (of each image).
        place: `encoded` is in front of the projector, `projected` behind it.
        tokens: names or patterns of what holds them, as COMPONENT/tokens; by default all there are.
    """

    keep: int | float
    method: Literal["pool", "merge", "select-positions", "select-salient"] = "merge"
    place: Literal["encoded", "projected"] = "encoded"
    tokens: tuple[str, ...] = ()

    name: ClassVar[str] = "prune-tokens"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})
    changes_signature: ClassVar[bool] = True  # an image has fewer features, and fewer places in a prompt

    def __post_init__(self) -> None:
        if not (0 < self.keep < 1 or (self.keep >= 1 and self.keep == int(self.keep))):
            raise ValueError(f"keep is {self.keep}; expected a number of tokens, or a share between 0 and 1")

    def wants(self, program: Program) -> Iterable[StatRequest]:
        if self.method == "select-positions" and not why_no_tokens(program):
            yield self._request(program)

    def _request(self, program: Program) -> StatRequest:
        place = token_place(program.components[VISION], is_encoded=self.place == "encoded")
        return StatRequest(VISION, place.value.name, "row_variance")

    def plan(self, program: Program, context: Context) -> Plan:
        name = VISION if VISION in program.components else next(iter(program.components))
        key, reason = f"{name}/tokens", why_no_tokens(program) or self._why_not(program, context)
        check_patterns(f"{self.name}: tokens", self.tokens, [key])
        if reason:
            return Plan(refusals=(Refusal(key, name, reason),))
        vision = program.components[name]
        trial = program.with_components({**program.components, name: replace(vision, graph=clone_graph(vision.graph))})
        self._prune(trial, context)
        saving = program_cost(program) - program_cost(trial)
        return Plan((Site(key, name, (self.method,), saving, what_is_left(program, trial)),))

    def _n_kept(self, n_tokens: int) -> int:
        return int(self.keep) if self.keep >= 1 else max(1, round(self.keep * n_tokens))

    def _why_not(self, program: Program, context: Context) -> str:
        n_tokens = n_image_tokens(program)
        if self._n_kept(n_tokens) >= n_tokens:
            return f"an image has {n_tokens} tokens, which are no more than are to be kept"
        if self.method == "pool":
            blocks = token_blocks(program, self.keep)
            return blocks if isinstance(blocks, str) else ""
        if program.generation is not None and program.generation.image_grid is not None:
            return "positions are rows and columns of an image's tokens, and only `pool` leaves whole ones"
        if self.method == "select-positions" and self._request(program) not in context.statistics:
            return "places are chosen by what was measured on a task, and nothing was"
        return ""

    def apply(self, program: Program, site: Site, context: Context) -> None:
        if not why_no_tokens(program) and not self._why_not(program, context):
            self._prune(program, context)

    def _prune(self, program: Program, context: Context) -> None:
        vision = program.components[VISION]
        place, module = token_place(vision, is_encoded=self.place == "encoded"), vision.graph
        blocks, keep = token_blocks(program, self.keep), self._n_kept(n_image_tokens(program))
        with module.graph.inserting_before(place.value.next):
            if self.method == "pool":
                assert not isinstance(blocks, str)
                left = pooled(module, place.value, blocks.grid, blocks.size)
            elif self.method in ("merge", "select-salient"):
                left = (merged if self.method == "merge" else salient)(module, place.value, keep)
            else:
                spread = context.statistics[self._request(program)]
                assert isinstance(spread, Tensor)
                left = chosen(module, place.value, sorted(spread.argsort(descending=True, stable=True)[:keep].tolist()))
        put_tokens(program, place, left, None if isinstance(blocks, str) else blocks.left)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        for method in ("pool", "merge", "select-salient"):
            yield Case(method, _writer, 1, options={"keep": 2, "method": method, "place": "projected"})
        yield Case("block", _writer, 1, options={"keep": 0.3, "method": "pool"})
        yield Case("one", _writer, 1, options={"keep": 1, "tokens": ("vision_encoder/*",)})
        fixed: dict[str, object] = {"keep": 3, "method": "select-positions"}
        yield Case("measured", _writer, 1, (), fixed, _measured(**fixed))
        yield Case("no data", _writer, 0, ("measured on a task, and nothing was",), fixed)
        yield Case("no blocks", _writer, 0, ("leave 1, 2 of the 2 x 2",), {"keep": 3, "method": "pool"})
        yield Case("all", _writer, 0, ("which are no more than",), {"keep": 4})
        grid = partial(_writer, image_grid=(2, 2))
        yield Case("rows", grid, 1, options={"keep": 1, "method": "pool"})
        yield Case("no rows", grid, 0, ("only `pool` leaves whole ones",), {"keep": 2})
        yield Case("no prompt", eyes_and_words, 0, ("writes no text",), {"keep": 2})


def _writer(*, image_grid: tuple[int, int] | None = None) -> Program:
    program = eyes_and_words()
    program.generation = Generation(image_token=15, image_tokens=4, image_grid=image_grid)
    return program


def _measured(**options: object) -> Context:
    """The first of four places varies least."""
    (request,) = PruneTokens(**options).wants(_writer())  # type: ignore[arg-type]
    return Context(statistics={request: torch.arange(4, dtype=torch.float64)})
