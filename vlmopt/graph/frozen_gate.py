"""The gate of a cross-modal adapter as constants: fitted to rows of data, with what it costs measured on others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.cross_modal import CROSS_MODAL
from vlmopt.graph.modules import get_at, set_at


@dataclass(frozen=True)
class FrozenGate:
    """Constants [h], and how far they lead off on rows that they were not fitted to.

    `deviation` is the root mean square over that of the adapted value, `of_change` over that of what the adapter adds,
    and `largest` the largest of a row over the row.
    """

    gate: Tensor
    deviation: float
    of_change: float
    largest: float
    n_rows: int

    def certificate(self) -> str:
        return (
            f"frozen, its gate changes the adapted value by {100 * self.deviation:.3g} % "
            f"(at most {100 * self.largest:.3g} %, {100 * self.of_change:.3g} % of what it adds; {self.n_rows} rows)"
        )


def freeze_gate(module: fx.GraphModule, modality: str, rows: Tensor) -> FrozenGate:
    """Fits the constants to every second row [n, D] and measures on the others, in float64."""
    gate, down, up = (_weight(module, f"{CROSS_MODAL}.{modality}.{name}") for name in ("gate", "down", "up"))
    x = rows.to(gate)
    opened, through = nn.functional.silu(x @ gate.T), x @ down.T
    fit, held = slice(0, None, 2), slice(1, None, 2)
    weight = through[fit].square()
    constant = (opened[fit] * weight).sum(0) / weight.sum(0).clamp(min=torch.finfo(weight.dtype).tiny)
    change = (opened[held] * through[held]) @ up.T
    off = ((opened[held] - constant) * through[held]) @ up.T
    adapted = x[held] + change
    size = off.square().sum(-1)
    return FrozenGate(
        constant,
        _root_share(size, adapted),
        _root_share(size, change),
        float((size / adapted.square().sum(-1).clamp(min=1e-30)).max().sqrt()),
        len(off),
    )


def _root_share(squares: Tensor, of: Tensor) -> float:
    whole = float(of.square().sum(-1).mean())
    return (float(squares.mean()) / whole) ** 0.5 if whole else 0.0


def _weight(module: fx.GraphModule, path: str) -> Tensor:
    leaf = get_at(module, path)
    assert isinstance(leaf, nn.Linear)
    return leaf.weight.detach().double().cpu()


def put_gate(module: fx.GraphModule, modality: str, gate: Tensor) -> None:
    """Takes the constants into the projection behind the gate, whose place it then takes; dead code is gone."""
    own = f"{CROSS_MODAL}.{modality}"
    old = get_at(module, f"{own}.down")
    assert isinstance(old, nn.Linear)
    leaf = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
    weight = old.weight.detach().double() * gate.to(old.weight.device)[:, None]
    leaf.weight = nn.Parameter(weight.to(old.weight), requires_grad=old.weight.requires_grad)
    set_at(module, f"{own}.down", leaf.train(False))
    down = next(node for node in module.graph.nodes if node.target == f"{own}.down")
    (product,) = down.users
    product.replace_all_uses_with(down)
    drop_dead_nodes(module)
