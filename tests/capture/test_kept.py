"""Captures that are kept between runs: found again for the same structure, made anew for any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests import toys
from vlmopt.capture import capture_model, export, kept
from vlmopt.core.program import Component, ModelSource, Program
from vlmopt.rewrite.pipeline import program_text

QUICK = ("clip", "vilt", "llava_llama")
FAMILIES = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in toys.GENERATIVE]

# PyTorch asks for sizes in some convolutions, to choose a kernel, and in a padding: reading these back would fix them.
FIXED = {"florence2": "vision_encoder", "llava_onevision": "vision_encoder", "qwen3_vl": "embed_tokens"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path / "my cache"))
    return tmp_path / "my cache" / "captures"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the components that were exported."""
    found: list[str] = []
    before = export._export

    def counted(name: str, *words: Any) -> Any:
        found.append(name)
        return before(name, *words)

    monkeypatch.setattr(export, "_export", counted)
    return found


def captured(model: Any, family: str = "clip") -> Program:
    source = ModelSource("toy", str(model.config.model_type), type(model).__name__, "")
    return capture_model(model, source, image=toys.IMAGE_SIZES.get(family))


def other_weights(model: Any) -> Any:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def has_sums(component: Component) -> bool:
    """Torch.export gives a dimension that is a sum a symbol of its own, which does not come back: made anew."""
    return any("total" in spec.shape for spec in component.inputs)


def told(program: Program) -> list[str]:
    """All that passes, pictures and reports read of the graphs, without the weights' numbers."""
    return [
        f"{name} {node.name} {node.op} {node.target} {node.args} {node.kwargs} {places(node)} {sizes(node)}"
        for name, component in program.components.items()
        for node in component.graph.graph.nodes
    ]


def places(node: torch.fx.Node) -> list[tuple[str, str]]:
    return [(path, str(getattr(kind, "__qualname__", kind)).rpartition(".")[2]) for path, kind in stack_of(node)]


def stack_of(node: torch.fx.Node) -> list[tuple[str, Any]]:
    return list((node.meta.get("nn_module_stack") or {}).values())


def sizes(node: torch.fx.Node) -> object:
    value = node.meta.get("val")
    return (
        (value.dtype, value.dim(), [n for n in value.shape if isinstance(n, int)]) if torch.is_tensor(value) else None
    )


@pytest.mark.parametrize("family", [*QUICK[:2], *FAMILIES])
def test_a_second_model_of_the_structure_is_not_exported_and_has_its_own_weights(
    family: str, exports: list[str]
) -> None:
    first = captured(toys.make(family), family)
    exports.clear()
    other = other_weights(toys.make(family))
    second = captured(other, family)
    assert set(exports) == {
        name for name, component in first.components.items() if has_sums(component) or FIXED.get(family) == name
    }
    assert told(second) == told(first)
    assert program_text(second) == program_text(first)
    own = {value.untyped_storage().data_ptr() for value in (*other.parameters(), *other.buffers())}
    for component in second.components.values():
        for value in component.graph.parameters():
            assert value.untyped_storage().data_ptr() in own


def scaled(model: Any) -> None:
    model.vision_model.encoder.layers[0].self_attn.scale *= 0.5


def with_hook(model: Any) -> None:
    model.vision_model.post_layernorm.register_forward_hook(lambda module, args, output: output * 1)


def wider(model: Any) -> None:
    model.vision_model.encoder.layers[1].mlp.activation_fn = nn.ReLU()


def tied(model: Any) -> None:
    layers = model.vision_model.encoder.layers
    layers[1].mlp.fc1.weight = layers[0].mlp.fc1.weight


@pytest.mark.parametrize("change", [scaled, with_hook, wider, tied])
def test_another_structure_is_exported(change: Callable[[Any], None], exports: list[str]) -> None:
    model = toys.make("clip")
    captured(model)
    change(model)
    exports.clear()
    captured(model)
    assert "image_encoder" in exports


def test_a_file_that_computes_something_else_is_made_anew(home: Path, exports: list[str]) -> None:
    model = toys.make("clip")
    captured(model)
    path = next(path for path in home.iterdir() if graph_of(path)["outputs"][0]["name"] == "image_embeds")
    words = graph_of(path)
    norm = next(leaf for leaf in words["leaves"].values() if leaf["class"] == "LayerNorm")
    norm["arguments"]["eps"] = 0.5
    with safe_open(path, "pt") as file:
        constants = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    save_file(constants, path, metadata={"graph": json.dumps(words)})
    exports.clear()
    captured(model)
    assert exports == ["image_encoder"]
    exports.clear()
    captured(model)
    assert exports == []  # and mended


def graph_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["graph"])
    return found


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"half a fi"])
def test_a_broken_file_is_made_anew(content: bytes, home: Path, exports: list[str]) -> None:
    model = toys.make("clip")
    captured(model)
    for path in home.iterdir():
        path.write_bytes(content)
    exports.clear()
    assert captured(model).components.keys() == {"image_encoder", "text_encoder"}
    assert exports == ["image_encoder", "text_encoder"]


def test_no_weight_and_no_path_is_kept(home: Path) -> None:
    model = toys.make("clip")
    captured(model)
    n_bytes = sum(path.stat().st_size for path in home.iterdir())
    assert 0 < n_bytes < 4 * sum(p.numel() for p in model.parameters())


def test_a_module_that_holds_what_cannot_be_told_is_captured_all_the_same(home: Path, exports: list[str]) -> None:
    model = toys.make("clip")
    model.vision_model.post_layernorm.notes = torch.eye(3).to_sparse()
    model.text_model.final_layer_norm.notes = torch.eye(3).to_sparse()
    captured(model)
    assert exports == ["image_encoder", "text_encoder"]
    assert not home.exists()


def test_off_keeps_nothing(home: Path, monkeypatch: pytest.MonkeyPatch, exports: list[str]) -> None:
    monkeypatch.setenv(kept.VARIABLE, "off")
    model = toys.make("clip")
    captured(model)
    captured(model)
    assert len(exports) == 4
    assert not home.exists()


def test_a_folder_that_cannot_be_written_stops_nothing(home: Path, exports: list[str]) -> None:
    home.parent.write_text("in the way")
    captured(toys.make("clip"))
    assert len(exports) == 2


def test_the_longest_unused_go_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured(toys.make("clip"))
    before = {path: path.stat().st_size for path in home.iterdir()}
    monkeypatch.setattr(kept, "MOST_BYTES", sum(before.values()) + 10)
    captured(toys.make("siglip"), "siglip")
    left = set(home.iterdir())
    assert sum(path.stat().st_size for path in left) <= kept.MOST_BYTES
    assert left - before.keys()
    assert not before.keys() <= left
