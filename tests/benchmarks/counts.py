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


def image_encoder() -> Program:
    """The image tower of CLIP ViT-L/14: 24 layers, 1024 wide."""
    from transformers import CLIPVisionConfig

    config = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    with tempfile.TemporaryDirectory() as folder, FakeTensorMode(allow_non_fake_inputs=True):
        _write(config, "CLIPVisionModel", Path(folder))
        model, _, _ = load_model(folder, device="cpu", dtype="float32", allow_pickle=False, with_weights=False)
        model.requires_grad_(requires_grad=False)
        return program_of(_Tower(model), torch.ones(2, 3, 224, 224))


class _Tower(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.model(pixel_values=pixel_values).last_hidden_state
        return found


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
    """LLaVA with an adapter of rank 64 at every branch, and with 4 layers skipped (rank 256)."""
    program = decoder()
    inside = {"insert-adaptation-adapter": {"rank": 64, "with_norm": False}}
    skip = {
        "skip-layers": {"layers": ["*layers.21", "*layers.2[456]"]},
        "insert-skip-adapter": {"rank": 256, "with_norm": False},
    }
    return {
        "llava_64_adapters": n_parameters(program, inside),
        "llava_4_skipped": n_parameters(program, skip | inside),
    }


def routed_counts() -> dict[str, float]:
    """All that LaVIN-7B trains with 0, 2, 4 and 6 layers skipped.

    Counted: a routed adapter of rank 8 beside the attention of every layer of the decoder and of its image encoder (24
    layers, 1024 wide), and one of rank 32 for every skipped layer. Added by formula, since vlmopt does not train them
    as adapters: the projection 1024 -> 128 -> 4096 of image features and two modality tokens.
    """
    language, vision = decoder(), image_encoder()
    beside: dict[str, object] = {"rank": 8, "kind": "routed", "branches": ["*self_attn"]}
    projection = (1024 * 128 + 128) + (128 * 4096 + 4096) + 2 * 4096
    fixed = n_parameters(vision, {"insert-adaptation-adapter": beside}) + projection
    found = {}
    for n_skipped in (0, 2, 4, 6):
        steps: dict[str, Mapping[str, object]] = {}
        if n_skipped:
            steps["skip-layers"] = {"layers": [f"*layers.{31 - i}" for i in range(n_skipped)]}
            steps["insert-skip-adapter"] = {"rank": 32, "kind": "routed"}
        steps["insert-adaptation-adapter"] = beside
        found[f"lavin_{n_skipped}_skipped"] = float(n_parameters(language, steps) + fixed)
    return found


def adapter_counts() -> dict[str, float]:
    """All of them, for a benchmark; takes about a minute."""
    return {**single_stream_counts(), **two_stream_counts(), **decoder_counts(), **routed_counts()}
