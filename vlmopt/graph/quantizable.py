"""Layers that can have integers for weights: which there are, what their inputs are on the task, and the exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from vlmopt.core.contract import Context, Refusal, StatRequest
from vlmopt.core.cost import Cost
from vlmopt.core.program import Program
from vlmopt.graph.build import replace_leaf
from vlmopt.graph.modules import get_at
from vlmopt.graph.parallel_folding import weight_readers
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.graph.quantized import QuantizedLeaf
from vlmopt.graph.quantizing import Moments

_MOMENTS = ("mean", "second_moment")


@dataclass(frozen=True)
class Layer:
    """A Linear or an Embedding at its path, and the nodes that call it. `key` is what users write."""

    component: str
    path: str
    leaf: nn.Linear | nn.Embedding
    calls: tuple[fx.Node, ...]

    @property
    def key(self) -> str:
        return f"{self.component}/{self.path}"

    @property
    def operand(self) -> fx.Node:
        """What the first call reads."""
        (operand,) = self.calls[0].all_input_nodes
        return operand

    def requests(self, statistics: Iterable[str] = _MOMENTS) -> list[StatRequest]:
        """For what is to be known of its input on the task."""
        return [StatRequest(self.component, self.operand.name, statistic) for statistic in statistics]

    def misfit(self, rows: Tensor | None, moments: Moments | None) -> str:
        """Why what was measured of its input cannot be of this layer, rows being [n, in]; empty where it can."""
        takes = self.leaf.weight.shape[1]
        measured = (rows, *(() if moments is None else (moments.mean, moments.second)))
        sizes = {tensor.shape[-1] for tensor in measured if tensor is not None and tensor.ndim > 0} - {takes}
        return f"its input on the task has {min(sizes)} numbers, and it takes {takes}" if sizes else ""

    def moments(self, context: Context) -> Moments | None:
        """Those of its input; None where they were not collected."""
        mean, second = (context.statistics.get(request) for request in self.requests())
        return Moments(mean, second) if isinstance(mean, Tensor) and isinstance(second, Tensor) else None


def find_layers(program: Program, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> list[Layer]:
    """All layers of exactly these classes, in the order of the graphs."""
    found: list[Layer] = []
    for name, component in program.components.items():
        calls: dict[str, list[fx.Node]] = {}
        for node in component.graph.graph.nodes:
            if node.op == "call_module" and len(node.all_input_nodes) == 1:
                calls.setdefault(str(node.target), []).append(node)
        for path, nodes in calls.items():
            leaf = get_at(component.graph, path)
            if type(leaf) in kinds:
                assert isinstance(leaf, nn.Linear | nn.Embedding)
                found.append(Layer(name, path, leaf, tuple(nodes)))
    return found


def layer_at(program: Program, component: str, path: str) -> Layer | None:
    """The layer at a path, where there still is one."""
    every = find_layers(program, (nn.Linear, nn.Embedding))
    return next((layer for layer in every if (layer.component, layer.path) == (component, path)), None)


def chosen(
    place: str,
    program: Program,
    layers: Sequence[Layer],
    modules: Sequence[str],
    why_not: Callable[[Layer], str] = lambda _: "",
) -> tuple[list[Layer], list[Refusal]]:
    """The layers that `modules` name (all where it is empty) and that nothing speaks against, and the others.

    The head of a task stays in float, unless it is named itself: it is small, and is fitted behind the others.

    Raises:
        PassOptionError: one of `modules` names no layer.
    """
    check_patterns(f"{place}: modules", modules, [layer.key for layer in layers])
    taken: list[Layer] = []
    refusals: list[Refusal] = []
    for layer in layers:
        is_named = not modules or is_match(layer.key, modules)
        is_head = program.heads.get(layer.component) == layer.path and not {layer.key, layer.path} & set(modules)
        reason = "is the task's head, which is fitted behind the others" if is_head else ""
        reason = reason or why_not(layer) if is_named else "not named in `modules`"
        if reason:
            refusals.append(Refusal(layer.key, layer.component, reason))
        else:
            taken.append(layer)
    return taken, refusals


def savings(program: Program, layers: Sequence[Layer], made: Callable[[Layer], QuantizedLeaf]) -> list[Cost]:
    """What the exchange of each layer saves behind those before it; a weight that others read too goes with the last.

    Args:
        made: a leaf of the right shapes in the place of a layer, without numbers.
    """
    readers = {key: set(who) for key, who in weight_readers(program).items()}
    found: list[Cost] = []
    for layer in layers:
        gone = [weight for weight in layer.leaf.parameters() if _is_last(layer, readers[id(weight)])]
        fresh = made(layer)
        own = [buffer for buffer in fresh.buffers() if buffer is not fresh.weight]
        found.append(
            Cost(sum(weight.numel() for weight in gone), sum(map(_bytes, gone)))
            - Cost(fresh.n_weights + sum(b.numel() for b in own), sum(map(_bytes, (fresh.weight, *own))))
        )
    return found


def _is_last(layer: Layer, readers: set[tuple[str, fx.Node]]) -> bool:
    readers -= {(layer.component, node) for node in layer.calls}
    return not readers


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def exchange(program: Program, layer: Layer, leaf: QuantizedLeaf) -> None:
    """Puts the leaf in the layer's place. A head so exchanged is none any more: nothing fits it again."""
    for call in layer.calls:
        replace_leaf(program.components[layer.component].graph, call, leaf)
    if program.heads.get(layer.component) == layer.path:
        del program.heads[layer.component]
