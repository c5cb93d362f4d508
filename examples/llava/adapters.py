"""What is trained of the model: its projector, and low-rank adapters (LoRA) beside the linear layers of the language
model; and the file that keeps just these.

`y = W x` becomes `y = W x + SCALE * B (A x)` with A [RANK, in] and B [out, RANK]; B begins as zeros, so the model
begins as it was. The model that is shipped has `W + SCALE * B A` in place of W and no adapter. It is written here in a
few lines, since a dependency on peft would bring nothing else that the example needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RANK = 16
SCALE = 2.0
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")  # with gate and up the file would pass 8 MB
PROJECTOR = "multi_modal_projector"
_A, _B = "lora_a", "lora_b"


class Adapted(nn.Module):
    """A frozen linear layer with an adapter beside it, which is kept in float32 and computes in the layer's type."""

    def __init__(self, base: nn.Linear, *, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a.to(x.dtype))
        return self.base(x) + SCALE * F.linear(low, self.lora_b.to(x.dtype))


def insert_adapters(model: nn.Module, *, rank: int = RANK) -> None:
    """Freeze the model, put adapters into its language model, and leave them and the projector to be trained.

    The caller seeds torch.
    """
    model.requires_grad_(False)
    for path, layer in list(_adaptable(model)):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Adapted(layer, rank=rank))
    projector(model).requires_grad_(True)


def projector(model: nn.Module) -> nn.Module:
    """The module that maps features of the image onto embeddings of the language model."""
    return next(module for path, module in model.named_modules() if path.endswith(PROJECTOR))


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every trained tensor by its name in the model with adapters."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def save_trained(tensors: Mapping[str, Tensor], file: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the tensors in this number format; the file appears whole or not at all."""
    partial = file.with_suffix(".partial")
    save_file({name: value.to(dtype).contiguous() for name, value in tensors.items()}, partial)
    partial.rename(file)


@torch.no_grad()
def apply_trained(model: nn.Module, file: Path) -> None:
    """Put the trained tensors into a model without adapters: the projector as it is, the adapters added to the weights.

    Raises:
        ValueError: a tensor has no place in the model.
    """
    tensors = {name: value.float() for name, value in load_file(file).items()}
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == _B:
            continue
        place = f"{layer}.weight" if part == _A else name
        if place not in parameters:
            raise ValueError(f"{file.name} has {name}, and the model has no {place}")
        if part == _A:
            parameters[place] += SCALE * tensors[f"{layer}.{_B}"] @ value
        else:
            parameters[place].copy_(value)


def _adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in model.named_modules():
        is_language = "language_model" in path.split(".")
        if is_language and path.rpartition(".")[2] in ADAPTED and isinstance(module, nn.Linear):
            yield path, module
