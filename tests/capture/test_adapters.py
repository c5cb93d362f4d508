"""Adapters in peft's folders: captured with the model, folded into the unadapted graph, refused where they do not fit.

They are drawn at random, since a freshly made one changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.toys import make, write_model
from vlmopt.capture import capture
from vlmopt.core.contract import Context
from vlmopt.core.errors import ModelError
from vlmopt.core.program import AdapterSource, Program
from vlmopt.graph.adapters import adapter_parameters, find_adapters
from vlmopt.graph.branches import find_branches
from vlmopt.graph.replay import run_component
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import StepResult, program_text, run_step

peft = pytest.importorskip("peft", reason="the extra `adapters` is not installed")

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.1, "init_lora_weights": False}
VISION_LINEARS = r".*vision_model.*(q_proj|v_proj|out_proj|fc1)"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("clip", tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def plain(clip_folder: Path) -> Program:
    """The model without an adapter."""
    return capture(str(clip_folder))


def write_adapter(folder: Path, config: Any, *, family: str = "clip", seed: int = 3) -> Path:
    """A folder as peft writes it, its weights random: all that an adapter starts at zero is drawn anew."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(make(family), config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.data.normal_(0.0, 0.2)
            elif "magnitude" in name:
                parameter.data.mul_(1.3)
        model.save_pretrained(folder)
    return folder


def lora(folder: Path, **changes: Any) -> Path:
    seed = changes.pop("seed", 3)
    return write_adapter(folder, peft.LoraConfig(**{**LORA, "target_modules": VISION_LINEARS, **changes}), seed=seed)


def fold(program: Program) -> StepResult:
    clean = run_step(program, make_pass("canonicalize", {}), Context(), step=1).program
    return run_step(clean, make_pass("fold-adapters", {}), Context(), step=2)


def outputs(program: Program) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, part in program.components.items():
        if name in ("image_encoder", "vision_encoder"):
            shape = [2 if isinstance(size, str) else size for size in part.inputs[0].shape]
            found[name] = run_component(part, [{"pixel_values": torch.randn(shape, generator=generator)}])
        elif name == "text_encoder":
            ids = torch.arange(12).reshape(2, 6) + 4
            ids[:, -1] = 3
            found[name] = run_component(part, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    return found


def gap(one: Program, other: Program) -> float:
    pairs = [(first, outputs(other)[name]) for name, first in outputs(one).items()]
    return max(float((first - second).abs().max() / second.abs().max()) for first, second in pairs)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "with biases": {"lora_bias": True},
    "ranks of their own": {"rank_pattern": {"fc1": 3}, "alpha_pattern": {"fc1": 1}},
    "patches": {"target_modules": ["patch_embedding"]},
    "patches, dora": {"target_modules": ["patch_embedding"], "use_dora": True},
    "words": {"target_modules": ["token_embedding", "k_proj"]},
    "words, dora": {"target_modules": ["token_embedding", "k_proj"], "use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_captured_folds_and_leaves_the_graph_of_the_model_without_it(
    kind: str, clip_folder: Path, plain: Program, tmp_path: Path
) -> None:
    folder = lora(tmp_path / "adapter", **KINDS[kind])
    adapted = capture(str(clip_folder), adapters=(AdapterSource("style", str(folder)),))
    assert gap(adapted, plain) > 1e-3
    assert adapter_parameters(adapted)
    assert all(path.partition("/")[2].startswith("adapters.") for path in adapter_parameters(adapted))
    done = fold(adapted)
    assert done.refusals == ()
    assert done.predicted == done.counted
    assert done.text_after == program_text(plain)
    assert gap(done.program, adapted) < 1e-5
    eager = peft.PeftModel.from_pretrained(make("clip"), str(folder)).merge_and_unload().eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = eager.get_image_features(pixel_values=pixels)
    wanted = wanted if isinstance(wanted, Tensor) else wanted.pooler_output
    assert float((outputs(done.program)["image_encoder"] - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())
    names = [branch.name for part in plain.components.values() for branch in find_branches(part.graph)]
    found = [branch.name for part in done.program.components.values() for branch in find_branches(part.graph)]
    assert found == names


def test_several_adapters_add_up_each_by_its_weight(clip_folder: Path, tmp_path: Path) -> None:
    first, second = lora(tmp_path / "first"), lora(tmp_path / "second", r=3, seed=9)
    both = (AdapterSource("first", str(first), 0.5), AdapterSource("second", str(second), -2.0))
    program = capture(str(clip_folder), adapters=both)
    done = fold(program)
    assert {site.summary for site in done.applied} == {"chains beside it: 2"}
    assert gap(done.program, program) < 1e-5
    path = "vision_model.encoder.layers.0.self_attn.q_proj"
    weight = dict(make("clip").named_parameters())[f"{path}.weight"].double()
    for folder, rank, share in ((first, 2, 0.5), (second, 3, -2.0)):
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.{path}.lora_{which}.weight"].double() for which in "AB")
        weight = weight + share * 6 / rank * b @ a
    leaf = done.program.components["image_encoder"].graph.get_submodule(path)
    assert float((leaf.weight.detach().double() - weight.detach()).abs().max()) < 1e-6  # type: ignore[operator, union-attr]


def test_the_fingerprint_of_the_source_tells_adapters_and_their_weights_apart(
    clip_folder: Path, tmp_path: Path
) -> None:
    folder = str(lora(tmp_path / "adapter"))
    every = [(), (AdapterSource("a", folder),), (AdapterSource("a", folder, 0.5),)]
    found = [capture(str(clip_folder), adapters=one).source.fingerprint for one in every]
    assert len(set(found)) == 3
    assert capture(str(clip_folder), adapters=every[1]).source.fingerprint == found[1]


def test_a_router_that_looks_at_the_data_stays_and_says_so(clip_folder: Path, tmp_path: Path) -> None:
    config = peft.LilyConfig(r=4, stride_A=1, num_B=2, target_modules=VISION_LINEARS)
    folder = write_adapter(tmp_path / "adapter", config)
    program = capture(str(clip_folder), adapters=(AdapterSource("lily", str(folder)),))
    done = fold(program)
    assert done.applied == ()
    assert done.refusals
    assert all("no constant" in refusal.reason for refusal in done.refusals)
    assert find_adapters(done.program.components["image_encoder"].graph)


def test_layers_that_were_trained_whole_take_the_place_of_the_models_own(
    clip_folder: Path, plain: Program, tmp_path: Path
) -> None:
    folder = lora(tmp_path / "adapter", modules_to_save=["visual_projection"])
    program = capture(str(clip_folder), adapters=(AdapterSource("style", str(folder)),))
    assert program.heads == plain.heads
    tensors = load_file(folder / "adapter_model.safetensors")
    leaf = program.components["image_encoder"].graph.get_submodule("visual_projection")
    assert torch.equal(leaf.weight, tensors["base_model.model.visual_projection.weight"])  # type: ignore[arg-type]
    assert fold(program).text_after == program_text(plain)


def test_a_generative_model_is_opened_with_an_adapter(tmp_path: Path) -> None:
    model = write_model("llava_llama", tmp_path / "model")
    config = peft.LoraConfig(**{**LORA, "target_modules": r".*language_model.*(q_proj|down_proj)"})
    folder = write_adapter(tmp_path / "adapter", config, family="llava_llama")
    program = capture(str(model), adapters=(AdapterSource("style", str(folder)),))
    done = fold(program)
    assert len(done.applied) == 6
    assert {site.component for site in done.applied} == {"decoder_model_merged"}
    assert done.text_after == program_text(capture(str(model)))


def _truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def _pickled(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")


def _edited(change: Any) -> Any:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def _set(**settings: Any) -> Any:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return edit


def _lost(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _first(tensors: dict[str, Tensor]) -> str:
    return min(tensors)


BROKEN: dict[str, tuple[Any, str]] = {
    "no folder of peft": (_lost, "has no adapter_config.json; expected a folder that peft wrote"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no weights"),
    "truncated": (_truncated, "is truncated or no safetensors file"),
    "pickled": (_pickled, "is a pickle, which can run any code"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "no type": (lambda f: (f / "adapter_config.json").write_text("{}"), "names no peft_type"),
    "unknown type": (_set(peft_type="TELEPATHY"), "cannot be read by peft"),
    "prompts": (
        lambda f: (f / "adapter_config.json").write_text(
            json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4})
        ),
        "changes what the model is called with",
    ),
    "rank 0": (_set(r=0), "its rank r is 0; expected at least 1"),
    "rank 0 of one": (_set(rank_pattern={"fc1": 0}), "its rank fc1 is 0"),
    "not a number": (_edited(lambda t: t[_first(t)].fill_(float("nan"))), "numbers that are not finite"),
    "other names": (_set(target_modules=["gate_proj"]), "does not fit this model"),
    "fewer places": (_set(target_modules=["fc1"]), "have no place in this model"),
    "missing": (_edited(lambda t: t.pop(_first(t))), "of its tensors are missing"),
    "other shapes": (_set(r=5), "does not fit this model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_adapter_that_cannot_be_used_is_refused_in_one_line(name: str, clip_folder: Path, tmp_path: Path) -> None:
    folder = lora(tmp_path / "adapter")
    breaking, message = BROKEN[name]
    breaking(folder)
    with pytest.raises(ModelError) as caught:
        capture(str(clip_folder), adapters=(AdapterSource("style", str(folder)),))
    assert message in caught.value.one_line()
    assert caught.value.one_line().startswith(f"adapter style ({folder})")


def test_a_pickled_adapter_is_read_where_pickles_are_allowed(clip_folder: Path, tmp_path: Path) -> None:
    folder = lora(tmp_path / "adapter")
    safe = capture(str(clip_folder), adapters=(AdapterSource("a", str(folder)),))
    _pickled(folder)
    pickled = capture(str(clip_folder), adapters=(AdapterSource("a", str(folder)),), allow_pickle=True)
    assert gap(pickled, safe) == 0.0


def test_a_folder_that_is_not_there_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder; expected a folder that peft wrote"):
        capture(str(clip_folder), adapters=(AdapterSource("a", str(tmp_path / "nowhere")),))


def test_adapters_of_two_types_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    one = lora(tmp_path / "one")
    other = write_adapter(tmp_path / "other", peft.LoHaConfig(r=2, target_modules=["fc1"]))
    with pytest.raises(ModelError, match="is of the type LOHA, and the one before is LORA"):
        capture(str(clip_folder), adapters=(AdapterSource("a", str(one)), AdapterSource("b", str(other))))
