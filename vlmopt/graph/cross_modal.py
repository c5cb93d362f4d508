"""Gated adapters in front of a model's join, one for each modality with one projection back, as edits of a program.

`out_m = x_m + (silu(x_m G_m) * (x_m D_m)) U` for m in visual and text; G_m and D_m [d, h] belong to a modality, U
[h, d] to both: `5 d h` parameters. CROME (arXiv 2408.06610) puts such an adapter between its projection and a frozen
language model. Its full text and code were not at hand, so the formula is a reconstruction: a gate, a residual, and
weights that both modalities share, as its abstract says them, in the form of UniAdapter (arXiv 2302.06605).

What differs here: U begins at zero. `Init.PAPER` draws all three with the deviation of other adapters' paper init.

Places: in a generative program the features of images, and the embedded tokens (prompt and answer); in a dual program
what each tower's projection into the joint space reads.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from vlmopt.core.program import Assembly, Component, Program
from vlmopt.graph.adapter_places import AdapterPlace, why_no_adapter
from vlmopt.graph.adapters import PAPER_DEVIATION, Init
from vlmopt.graph.assembled import EMBEDDING, VISION
from vlmopt.graph.build import insert_call
from vlmopt.graph.modules import ADAPTERS, get_at, has_path, output_node, output_values, set_at

aten = torch.ops.aten

CROSS_MODAL = f"{ADAPTERS}.cross_modal"
VISUAL, TEXT = "visual", "text"
MODALITIES = (VISUAL, TEXT)

_GENERATIVE = {VISUAL: VISION, TEXT: EMBEDDING}
_DUAL = {VISUAL: "image_encoder", TEXT: "text_encoder"}
_FEATURES = "image_features"


@dataclass(frozen=True)
class CrossModalForm:
    """h and how the weights begin."""

    rank: int
    init: Init = Init.ZERO

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected at least 1")


def component_of(program: Program, modality: str) -> str:
    """The component that the modality's adapter belongs into; that of all things where there is only one."""
    names = {Assembly.GENERATIVE: _GENERATIVE, Assembly.DUAL: _DUAL}.get(program.assembly, {})
    return names.get(modality, next(iter(program.components)))


def cross_modal_place(program: Program, modality: str) -> AdapterPlace | str:
    """Where the modality's adapter goes, or why nowhere."""
    own = _place(program, modality)
    if isinstance(own, str):
        return own
    other = _place(program, VISUAL if modality == TEXT else TEXT)
    if isinstance(other, str):
        return f"the other modality has no place for it: {other}"
    width, across = (int(place.value.meta["val"].shape[-1]) for place in (own, other))
    if width != across:
        return f"it is {width} wide and the other modality {across}, and one projection serves both"
    return own


def _place(program: Program, modality: str) -> AdapterPlace | str:
    if program.assembly is Assembly.FUSED:
        return "images and text are joined inside of one graph, so nothing lies in front of the join"
    part = program.components.get(component_of(program, modality))
    if part is None:
        return f"the program has no {component_of(program, modality)}"
    found = _joined_value(part) if program.assembly is Assembly.GENERATIVE else _projected(program, part)
    return found if isinstance(found, str) else why_no_adapter(found.value) or found


def _joined_value(part: Component) -> AdapterPlace | str:
    """What the part gives to the prompt."""
    if part.name == VISION and part.outputs[0].name != _FEATURES:
        return "the decoder attends to images across, so no features lie in the prompt"
    return AdapterPlace(output_values(part.graph)[0], readers=(output_node(part.graph),))


def _projected(program: Program, part: Component) -> AdapterPlace | str:
    """What the projection at the end of the tower reads."""
    head = program.heads.get(part.name)
    calls = [node for node in part.graph.graph.nodes if node.op == "call_module" and node.target == head]
    if len(calls) != 1:
        return "its tower ends in no projection into the joint space"
    return AdapterPlace(calls[0].all_input_nodes[0], readers=(calls[0],))


def has_cross_modal(module: fx.GraphModule, modality: str) -> bool:
    return has_path(module, f"{CROSS_MODAL}.{modality}")


def insert_cross_modal(
    program: Program, modality: str, place: AdapterPlace, form: CrossModalForm, *, seed: int = 0
) -> fx.Node:
    """The sum with the adapter, which the place's readers read from now on. The projection back is the one that the
    other modality has already, be it in another component.
    """
    module, value = program.components[component_of(program, modality)].graph, place.value
    like, own = value.meta["val"], f"{CROSS_MODAL}.{modality}"
    width = int(like.shape[-1])
    up = shared_up(program) or _up(width, form, seed, like)
    for name in ("gate", "down"):
        set_at(module, f"{own}.{name}", _linear(width, form.rank, f"{seed} {own}.{name}", like, form.init))
    set_at(module, f"{own}.up", up)  # under a name of its own, so that each modality is a branch of its own
    readers = tuple(value.users) if place.readers is None else place.readers
    with module.graph.inserting_before(value.next):
        gate = insert_call(module, aten.silu.default, (_call(module, f"{own}.gate", value),))
        hidden = insert_call(module, aten.mul.Tensor, (gate, _call(module, f"{own}.down", value)))
        total = insert_call(module, aten.add.Tensor, (value, _call(module, f"{own}.up", hidden)))
    for reader in readers:
        reader.replace_input_with(value, total)
    return total


def shared_up(program: Program) -> nn.Linear | None:
    """The projection back that some modality has already."""
    for part in program.components.values():
        for modality in MODALITIES:
            if has_path(part.graph, path := f"{CROSS_MODAL}.{modality}.up"):
                leaf = get_at(part.graph, path)
                assert isinstance(leaf, nn.Linear)
                return leaf
    return None


def _up(width: int, form: CrossModalForm, seed: int, like: Tensor) -> nn.Linear:
    made = _linear(form.rank, width, f"{seed} {CROSS_MODAL}.up", like, Init.PAPER)
    if form.init is Init.ZERO:
        nn.init.zeros_(made.weight)
    return made


def _linear(d_in: int, d_out: int, seed: str, like: Tensor, init: Init) -> nn.Linear:
    """A Linear without bias, in the dtype and on the device of `like`; as wide as torch draws one, or as the paper."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    deviation = PAPER_DEVIATION if init is Init.PAPER else d_in**-0.5
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float32) * deviation
    leaf = nn.Linear(d_in, d_out, bias=False, device="meta")
    leaf.weight = nn.Parameter(weight.to(dtype=like.dtype, device=like.device))
    leaf.train(False)
    return leaf


def _call(module: fx.GraphModule, path: str, operand: fx.Node) -> fx.Node:
    leaf = get_at(module, path)
    assert isinstance(leaf, nn.Linear)
    node, value = module.graph.call_module(path, (operand,)), operand.meta["val"]
    node.meta["val"] = value.new_empty((*value.shape[:-1], leaf.out_features))
    return node


def adapted_sum(module: fx.GraphModule, modality: str) -> fx.Node | None:
    """The sum `x + f(x)` of the modality's adapter, its gate frozen or not; None where the graph holds none."""
    down = next((node for node in module.graph.nodes if node.target == f"{CROSS_MODAL}.{modality}.down"), None)
    node = down
    while node is not None and node.target is not aten.add.Tensor:
        node = next(iter(node.users), None) if len(node.users) == 1 else None
    return node


def gated_value(module: fx.GraphModule, modality: str) -> fx.Node | None:
    """What the modality's gate reads; None where the graph has no such gate."""
    gate = next((node for node in module.graph.nodes if node.target == f"{CROSS_MODAL}.{modality}.gate"), None)
    return None if gate is None else gate.all_input_nodes[0]


def adapted_program(build: Callable[[], Program]) -> Program:
    """The program with adapters that change it, drawn: for cases and tests."""
    program = build()
    for modality in MODALITIES:
        place = cross_modal_place(program, modality)
        assert not isinstance(place, str)
        insert_cross_modal(program, modality, place, CrossModalForm(2, Init.PAPER))
        program.components[component_of(program, modality)].graph.recompile()
    return program
