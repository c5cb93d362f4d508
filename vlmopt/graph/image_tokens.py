"""Where the tokens of an image lie in a program that writes text, and what else has to know how many there are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, fx, nn

from vlmopt.core.program import NO_WORD, Component, Generation, Program
from vlmopt.graph.assembled import VISION
from vlmopt.graph.branches import BranchKind, find_branches
from vlmopt.graph.constants import constant_nodes
from vlmopt.graph.costing import program_cost
from vlmopt.graph.modules import get_at, output_node, output_values
from vlmopt.graph.shapes import compute_shapes

aten = torch.ops.aten

FEATURES = "image_features"

_ON_ELEMENTS = {
    aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default, aten.neg.default,
    aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar, aten.exp.default, aten.erf.default,
    aten.leaky_relu.default, aten.hardtanh.default, aten._to_copy.default, aten.to.dtype, aten.clone.default,
    aten.contiguous.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add.Scalar,
    aten.mul.Scalar, aten.div.Scalar,
}  # fmt: skip


@dataclass(frozen=True)
class TokenPlace:
    """A value [N, T, D] that holds the tokens of N images, and who is to read what is left of them."""

    value: fx.Node
    readers: tuple[fx.Node, ...]

    @property
    def n_tokens(self) -> int:
        return int(self.value.meta["val"].shape[1])


def why_no_tokens(program: Program) -> str:
    """Why the number of tokens of an image cannot change; empty where it can."""
    generation, vision = program.generation, program.components.get(VISION)
    if generation is None or vision is None:
        return "the program writes no text about images, so no image has places in a prompt"
    if vision.outputs[0].name != FEATURES or not generation.image_tokens:
        return "the decoder, or the encoder of its prompt, attends to images across, so they have no places in a prompt"
    shape = vision.outputs[0].shape
    if len(shape) != 3 or shape[1] != generation.image_tokens:
        return f"features come as {shape}, and an image has {generation.image_tokens} places in a prompt"
    return ""


def token_place(vision: Component, *, is_encoded: bool) -> TokenPlace:
    """What the component returns; or with `is_encoded` the earliest value in front of it from where on every token is
    treated by itself, such as what a projector reads.
    """
    (value, *_), n_tokens = output_values(vision.graph), vision.outputs[0].shape[1]
    place = TokenPlace(value, (output_node(vision.graph),))
    if not is_encoded:
        return place
    constant, order = constant_nodes(vision.graph), {node: i for i, node in enumerate(vision.graph.graph.nodes)}
    region: set[fx.Node] = {output_node(vision.graph)}
    live = {value}
    while live:
        last = max(live, key=order.__getitem__)
        if not (set(last.users) <= region and _treats_each(vision.graph, last, constant)):
            return place
        region.add(last)
        live = (live - {last}) | {node for node in last.all_input_nodes if node not in constant}
        if len(live) == 1 and _holds_tokens(next(iter(live)), n_tokens):
            (found,) = live
            place = TokenPlace(found, tuple(user for user in found.users if user in region))
    return place


def _holds_tokens(node: fx.Node, n_tokens: int | str) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 3 and str(value.shape[1]) == str(n_tokens)


def _treats_each(module: fx.GraphModule, node: fx.Node, constant: frozenset[fx.Node]) -> bool:
    """Whether each token of the value [N, T, D] is made of the same token of the operands alone, all in one way."""
    value = node.meta.get("val")
    operands = [operand for operand in node.all_input_nodes if operand not in constant]
    if not isinstance(value, Tensor) or not all(_holds_tokens(each, value.shape[1]) for each in (node, *operands)):
        return False
    if node.op == "call_module":
        leaf = get_at(module, str(node.target))
        return isinstance(leaf, nn.Linear) or (isinstance(leaf, nn.LayerNorm) and len(leaf.normalized_shape) == 1)
    if node.target is aten.mean.dim:
        return list(node.args[1]) in ([-1], [2]) and node.args[2:3] == (True,)  # type: ignore[arg-type]
    if node.target is aten.matmul.default or node.target is aten.linear.default:
        return operands == [node.args[0]]
    return node.target in _ON_ELEMENTS and all(_is_alike(each) for each in node.all_input_nodes if each in constant)


def _is_alike(constant: fx.Node) -> bool:
    """Whether a constant that meets [N, T, D] is the same for all tokens and images."""
    shape = constant.meta["val"].shape
    return all(size == 1 for size in shape[:-1])


def token_grid(program: Program) -> tuple[int, int] | str:
    """Rows and columns in which the tokens of an image lie, row by row; or why there are none.

    A program says so itself, or patches do that a convolution cuts, of which as many lie in a token each way. Without a
    convolution a square number of tokens counts as a square.
    """
    generation, vision = program.generation, program.components[VISION]
    assert generation is not None
    n = generation.image_tokens
    if generation.image_grid is not None:
        return generation.image_grid
    if any(branch.kind is BranchKind.CROSS_ATTENTION for branch in find_branches(vision.graph)):
        return "its tokens are queries that look at the whole image, and lie in no grid"
    grids = list(_grids_of_patches(vision))
    for rows, columns in grids or [(math.isqrt(n),) * 2]:
        per_side = math.isqrt(rows * columns // n) if n <= rows * columns else 0
        fits = per_side > 0 and rows * columns == n * per_side**2
        if fits and rows % per_side == 0 and columns % per_side == 0:
            return rows // per_side, columns // per_side
    more = " and a class token" if any(n == rows * columns + 1 for rows, columns in grids) else ""
    found = ", ".join(f"{rows} x {columns}" for rows, columns in grids) or "no"
    return f"its {n} tokens do not fill a grid: there are {found} patches{more}"


def _grids_of_patches(vision: Component) -> Iterator[tuple[int, int]]:
    """Rows and columns of what convolutions give, one image a row of the batch, the last first."""
    n_images = output_values(vision.graph)[0].meta["val"].shape[0]
    for node in reversed(vision.graph.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_module" or not isinstance(get_at(vision.graph, str(node.target)), nn.Conv2d):
            continue
        if value.dim() == 4 and str(value.shape[0]) == str(n_images):
            yield int(value.shape[2]), int(value.shape[3])


@dataclass(frozen=True)
class Blocks:
    """Blocks of `size` rows and columns that cover the grid."""

    grid: tuple[int, int]
    size: tuple[int, int]

    @property
    def left(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return self.grid[0] // self.size[0], self.grid[1] // self.size[1]


def token_blocks(program: Program, keep: float) -> Blocks | str:
    """Blocks of the grid of tokens that are `keep` in number, the squarest; or why there are none. Of a share below 1
    those that leave most of it.
    """
    grid = token_grid(program)
    if isinstance(grid, str):
        return grid
    (rows, columns), found = grid, dict[int, Blocks]()
    sizes = product(_divisors(rows), _divisors(columns))
    for size in sorted(sizes, key=lambda one: (abs(one[0] - one[1]), one)):
        found.setdefault(rows * columns // math.prod(size), Blocks(grid, size))
    counts = sorted(found.keys() - {rows * columns})
    if keep < 1:
        return found[max((n for n in counts if n <= keep * rows * columns), default=1)]
    if keep in counts:
        return found[int(keep)]
    known = ", ".join(map(str, counts))
    return f"{keep:g} are to be kept, and blocks of one size leave {known} of the {rows} x {columns} tokens"


def _divisors(n: int) -> list[int]:
    return [size for size in range(1, n + 1) if n % size == 0]


def put_tokens(program: Program, place: TokenPlace, left: fx.Node, grid: tuple[int, int] | None = None) -> None:
    """Makes `left` [N, K, D] what is read in the place of the tokens, and the program count K tokens an image.

    Args:
        grid: the rows and columns of what is left, for a program whose places follow a grid.
    """
    vision, keep = program.components[VISION], int(left.meta["val"].shape[1])
    for reader in place.readers:
        reader.replace_input_with(place.value, left)
    first, *others = vision.outputs
    outputs = (replace(first, shape=(first.shape[0], keep, first.shape[2])), *others)
    program.components[VISION] = replace(vision, outputs=outputs)
    compute_shapes(program.components[VISION], program.dims)
    assert program.generation is not None
    program.generation = _counting(program.generation, keep, grid)


def _counting(generation: Generation, keep: int, grid: tuple[int, int] | None) -> Generation:
    n_before = generation.image_tokens
    found = replace(generation, image_tokens=keep, processor_tokens=generation.processor_tokens or n_before)
    if generation.image_grid is not None:
        found = replace(found, image_grid=grid)
    if generation.image_token == NO_WORD:  # the text behind counts from the same place as before
        found = replace(found, first_position=generation.first_position + n_before - keep)
    return found


def n_image_tokens(program: Program) -> int:
    assert program.generation is not None
    return program.generation.image_tokens


def what_is_left(before: Program, after: Program) -> str:
    """What fewer tokens of an image save, in words: costs of a program are counted without the tokens of images."""
    share = 1 - prompt_macs(after) / max(1, prompt_macs(before))
    kept = f"{n_image_tokens(after)} of {n_image_tokens(before)} tokens of an image"
    return f"{kept}; a prompt with one takes {100 * share:.0f} % fewer MACs in all"


def prompt_macs(program: Program, *, n_words: int | None = None) -> int:
    """Multiply-accumulates of all components for one image and a prompt of its tokens and so many words, by default
    those that costs are counted at."""
    assert program.generation is not None
    names = ("encoder", "total") if program.generation.reads_across else ("sequence", "total")
    n_more = program.generation.image_tokens
    dims = {
        name: replace(dim, typical=(n_words or dim.typical) + n_more) if name in names else dim
        for name, dim in program.dims.items()
    }
    return program_cost(replace(program, dims=dims)).macs
