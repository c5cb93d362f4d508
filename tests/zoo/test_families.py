"""Every family captures, has exactly the branches it is known to have, and computes what eager computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.zoo.conftest import Captured, captured_toy
from vlmopt.capture import capture
from vlmopt.capture.wrappers import Fused, ImageEncoder, TextEncoder, Wrapper
from vlmopt.core.program import Assembly
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import assertion_nodes, dead_nodes, hand_on_nodes, writes
from vlmopt.graph.costing import component_cost, peak_activation_bytes
from vlmopt.graph.modules import placeholders
from vlmopt.graph.regions import is_read_behind
from vlmopt.graph.text import component_text

Row = tuple[str, str, int, bool]  # name, kind, layer, is_post_norm


def layers(path: str, n: int, *parts: tuple[str, str], first: int = 0, is_post_norm: bool = False) -> list[Row]:
    """The branches of `n` equal layers under `path`."""
    return [(f"{path}.{i}.{part}", kind, first + i, is_post_norm) for i in range(n) for part, kind in parts]


SELF, MLP = ("self_attn", "attention"), ("mlp", "ffn")
ATTENTION, FFN, CROSS = ("attention", "attention"), ("ffn", "ffn"), ("crossattention", "cross_attention")
CLIP_VISION = layers("vision_model.encoder.layers", 3, SELF, MLP)
CLIP_TEXT = layers("text_model.encoder.layers", 2, SELF, MLP)
EXPECTED: dict[str, dict[str, list[Row]]] = {
    "clip": {"image_encoder": CLIP_VISION, "text_encoder": CLIP_TEXT},
    "siglip": {
        "image_encoder": [*CLIP_VISION, ("vision_model.head.mlp", "ffn", 3, False)],
        "text_encoder": CLIP_TEXT,
    },
    "dual_encoder": {
        "image_encoder": layers("vision_model.encoder.layer", 3, ATTENTION, MLP),
        "text_encoder": layers("text_model.encoder.layer", 2, ATTENTION, FFN, is_post_norm=True),
    },
    "vilt": {"model": layers("vilt.encoder.layer", 3, ATTENTION, FFN)},
    "blip_matching": {
        "model": [
            *CLIP_VISION,
            *layers("text_encoder.encoder.layer", 2, ATTENTION, CROSS, FFN, first=3, is_post_norm=True),
        ]
    },
    "blip": {
        "image_encoder": CLIP_VISION,
        "text_encoder": layers("text_model.encoder.layer", 2, ATTENTION, FFN, is_post_norm=True),
    },
}
HEADS = {
    "clip": {"image_encoder": "visual_projection", "text_encoder": "text_projection"},
    "siglip": {"text_encoder": "text_model.head"},
    "dual_encoder": {"image_encoder": "visual_projection", "text_encoder": "text_projection"},
    "vilt": {"model": "classifier.3"},
    "blip_matching": {"model": "itm_head"},
    "blip": {"image_encoder": "visual_projection", "text_encoder": "text_projection"},
}


def eager(captured: Captured, component: str) -> Wrapper:
    if component == "image_encoder":
        return ImageEncoder(captured.model)
    if component == "text_encoder":
        return TextEncoder(captured.model)
    return Fused(captured.model, captured.program.components["model"].outputs[0].name)


def test_it_has_exactly_the_branches_it_is_known_to_have(captured: Captured) -> None:
    found = {
        name: [(b.name, b.kind.value, b.layer, b.is_post_norm) for b in find_branches(component.graph)]
        for name, component in captured.program.components.items()
    }
    assert found == EXPECTED[captured.family]


def test_its_assembly_heads_and_labels_are_known(captured: Captured) -> None:
    program = captured.program
    is_dual = len(program.components) == 2
    assert program.assembly is (Assembly.DUAL if is_dual else Assembly.FUSED)
    assert (program.similarity is not None) is is_dual
    assert program.heads == HEADS[captured.family]
    labels = {"vilt": ("red", "green", "blue", "none"), "blip_matching": ("LABEL_0", "LABEL_1")}
    assert program.labels == labels.get(captured.family, ())


@pytest.mark.parametrize(("batch", "text"), [(1, 5), (5, 20)])
def test_it_equals_eager_at_sizes_the_capture_has_not_seen(captured: Captured, batch: int, text: int) -> None:
    for name, component in captured.program.components.items():
        feed = captured.feed(component, batch=batch, text=text)
        with torch.no_grad(), torch.random.fork_rng():  # ViLT shuffles its patches
            found = component.graph(*feed.values())[0].double()
            wanted = eager(captured, name)(**feed)[0].double()
        assert found.shape == wanted.shape
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_its_dims_are_free_and_its_graph_is_canonical(captured: Captured) -> None:
    for component in captured.program.components.values():
        for spec, node in zip(component.inputs, placeholders(component.graph), strict=True):
            free = [isinstance(size, torch.SymInt) for size in node.meta["val"].shape]
            assert free == [isinstance(size, str) for size in spec.shape], spec.name
            assert spec.shape[0] == "batch"
        graph = component.graph
        assert (assertion_nodes(graph), hand_on_nodes(graph), dead_nodes(graph)) == ([], [], [])
        assert not any(writes(node) for node in graph.graph.nodes)


def test_its_weights_keep_their_names_and_values(captured: Captured) -> None:
    known = {id(parameter): name for name, parameter in captured.model.named_parameters(remove_duplicate=False)}
    named = dict(captured.model.named_parameters(remove_duplicate=False))
    for component in captured.program.components.values():
        for name, parameter in component.graph.named_parameters():
            assert name in named, name
            assert parameter is named[name] or torch.equal(parameter, named[name])
    assert len(known) > 20


def test_none_of_its_branches_is_read_behind_its_sum(captured: Captured) -> None:
    for component in captured.program.components.values():
        assert not any(is_read_behind(component, branch) for branch in find_branches(component.graph))


@pytest.mark.parametrize("family", ["clip", "siglip", "vilt", "dual_encoder"])
def test_config_json_alone_gives_the_same_structure_and_counts(family: str, tmp_path: Path) -> None:
    with_weights = captured_toy(family)
    with_weights.model.config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), "architectures": [type(with_weights.model).__name__]}
    path.write_text(json.dumps(config))
    program = capture(str(tmp_path), with_weights=False)
    assert program.assembly is with_weights.program.assembly
    assert program.heads == with_weights.program.heads
    assert program.labels == with_weights.program.labels
    assert program.similarity is None
    assert program.source.architecture == type(with_weights.model).__name__
    for name, known in with_weights.program.components.items():
        component = program.components[name]
        assert component_text(component) == component_text(known)
        assert component.outputs == known.outputs
        assert component_cost(component, program.dims) == component_cost(known, with_weights.program.dims)
        assert peak_activation_bytes(component, program.dims) == peak_activation_bytes(known, with_weights.program.dims)
        assert [b.name for b in find_branches(component.graph)] == [b.name for b in find_branches(known.graph)]
