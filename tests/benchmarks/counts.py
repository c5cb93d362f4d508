"""Parameters of adapters at real size, on programs without weights: what the papers count, counted from graphs.

Programs come from configurations alone, adapters from the passes, and numbers from the modules that the passes put in.
Sources: Dynamic Architecture Skipping (arXiv 2309.01479) and the tables of its released code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmopt.capture import capture
from vlmopt.capture.loading import load_model
from vlmopt.core.contract import Context
from vlmopt.core.program import Program
from vlmopt.graph.adapters import adapter_parameters
from vlmopt.graph.example import program_of
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Steps = Mapping[str, Mapping[str, object]]

_AS_COUNTED: dict[str, object] = {"rank": 96, "with_norm": False}  # the papers' counts leave the norms out


def single_stream() -> Program:
    """ViLT-B/32: 12 pre-norm layers of attention and FFN, 768 wide."""
    from transformers import ViltConfig

    return _from_config(ViltConfig(), "ViltForQuestionAnswering")


def two_streams() -> Program:
    """BridgeTower, whose 6 + 6 cross-modal layers are those of METER: post-norm, 768 wide, three branches each."""
    from transformers import BridgeTowerConfig

    return _from_config(BridgeTowerConfig(), "BridgeTowerForImageAndTextRetrieval")


def decoder() -> Program:
    """LLaMA-7B without its output layer: 32 layers, 4096 wide."""
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder, FakeTensorMode(allow_non_fake_inputs=True):
        _write(LlamaConfig(), "LlamaModel", Path(folder))
        model, _, _ = load_model(folder, device="cpu", dtype="float32", allow_pickle=False, with_weights=False)
        model.requires_grad_(requires_grad=False)
        return program_of(_Decoder(model), torch.ones(2, 8, dtype=torch.int64))


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return found


def _from_config(config: PreTrainedConfig, architecture: str) -> Program:
    with tempfile.TemporaryDirectory() as folder:
        _write(config, architecture, Path(folder))
        return capture(folder, with_weights=False)


def _write(config: PreTrainedConfig, architecture: str, folder: Path) -> None:
    config.architectures = [architecture]
    config.save_pretrained(folder)


def n_parameters(program: Program, steps: Steps) -> int:
    """Parameters of all adapters after these passes; what every step predicts must be what is counted."""
    for number, (name, options) in enumerate(steps.items(), 1):
        done = run_step(program, make_pass(name, dict(options)), Context(), step=number)
        if done.predicted != done.counted:
            raise AssertionError(f"{name} predicts {done.predicted}, and {done.counted} is counted")
        program = done.program
    return sum(parameter.numel() for parameter in adapter_parameters(program).values())


def single_stream_counts() -> dict[str, float]:
    """24 adaptation adapters, one of them with its norm, and one layer replaced by a skip adapter of rank 192."""
    program = single_stream()
    one = {"rank": 96, "branches": ["*.layer.0.attention"]}
    skip = {"skip-layers": {"layers": ["*.layer.7"]}, "insert-skip-adapter": {"rank": 192, "with_norm": False}}
    return {
        "adapter_r96": n_parameters(program, {"insert-adaptation-adapter": {**one, "with_norm": False}}),
        "adapter_r96_with_norm": n_parameters(program, {"insert-adaptation-adapter": one}),
        "vilt_24_adapters": n_parameters(program, {"insert-adaptation-adapter": _AS_COUNTED}),
        "skip_adapter_r192": n_parameters(program, skip),
        "vilt_one_layer_skipped": n_parameters(program, {**skip, "insert-adaptation-adapter": _AS_COUNTED}),
    }


def two_stream_counts() -> dict[str, float]:
    """36 adaptation adapters in the cross-modal layers, and four layers replaced by skip adapters of rank 288."""
    program = two_streams()
    inside = {"insert-adaptation-adapter": {**_AS_COUNTED, "branches": ["*cross_modal*"]}}
    skip = {
        "skip-layers": {"layers": ["*cross_modal_text_layers.[45]", "*cross_modal_image_layers.[45]"]},
        "insert-skip-adapter": {"rank": 288, "with_norm": False},
    }
    return {"meter_36_adapters": n_parameters(program, inside), "meter_4_skipped": n_parameters(program, skip | inside)}


def decoder_counts() -> dict[str, float]:
    """LLaVA with an adapter of rank 64 at every branch, with 4 layers skipped (rank 256), and LaVIN's linear part."""
    program = decoder()
    inside = {"insert-adaptation-adapter": {"rank": 64, "with_norm": False}}
    skip = {
        "skip-layers": {"layers": ["*layers.21", "*layers.2[456]"]},
        "insert-skip-adapter": {"rank": 256, "with_norm": False},
    }
    linear = {"insert-adaptation-adapter": {"rank": 8, "kind": "linear", "branches": ["*self_attn"]}}
    return {
        "llava_64_adapters": n_parameters(program, inside),
        "llava_4_skipped": n_parameters(program, skip | inside),
        "lavin_32_linear_adapters": n_parameters(program, linear),
    }


def routed_adapter_parameters(width: int, rank: int, *, groups: int = 2) -> int:
    """LaVIN's linear adapter: `s (w0 B(A x) + w1 D(A x))`, `w = softmax(W x / t)`.

    A is dense [d, r], B and D are grouped [r, d], all with biases, and W is [d, 2], which makes
    `d r + r + 2 (d r / groups + d) + 2 d + 2`.
    vlmopt builds no grouped projections and no router; this is a formula, not a count.
    """
    return width * rank + rank + 2 * (width * rank // groups + width) + 2 * width + 2


def routed_total(*, n_skipped: int) -> int:
    """All that LaVIN-7B trains with so many layers skipped, by formula.

    One adapter of rank 8 for each of 32 layers (rank 32 where the layer is skipped) and for each of the 24 layers of
    its image encoder (1024 wide), the projection 1024 -> 128 -> 4096 of image features, and two modality tokens. The
    parts outside the decoder are inferred: with them all four published totals come out to the digit.
    """
    language = (32 - n_skipped) * routed_adapter_parameters(4096, 8) + n_skipped * routed_adapter_parameters(4096, 32)
    vision = 24 * routed_adapter_parameters(1024, 8)
    projection = (1024 * 128 + 128) + (128 * 4096 + 4096)
    return language + vision + projection + 2 * 4096


def adapter_counts() -> dict[str, float]:
    """All of them, for a benchmark; takes about a minute."""
    lavin = {f"lavin_{n}_skipped_by_formula": float(routed_total(n_skipped=n)) for n in (0, 2, 4, 6)}
    return {**single_stream_counts(), **two_stream_counts(), **decoder_counts(), **lavin}
