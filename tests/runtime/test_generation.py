"""Answers of an artifact in ONNX Runtime: those of the model it was made from, token by token."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests import toys
from tests.capture.test_generative import alone
from tests.conftest import Workshop
from tests.toy_prompts import WITHOUT_TEMPLATE
from vlmopt.cli import entry
from vlmopt.core.errors import ArtifactError, TaskError
from vlmopt.core.manifest import GenerationEntry, read_manifest
from vlmopt.core.program import Generation
from vlmopt.graph.assembled import placed as placed_in_torch
from vlmopt.prompting import Prompter
from vlmopt.runtime import Model, Request, Sampling, answered, load
from vlmopt.runtime.placing import placed

N_NEW = 8
QUESTION = "what colour is it ?"
ATTENTION = "decoder_model_merged/model.language_model.layers.1.self_attn"
Picture = Image.Image


def picture(colour: str) -> Picture:
    return Image.new("RGB", (40, 30), toys.COLOURS[colour])


@pytest.fixture(scope="module")
def folder(workshop: Workshop) -> Path:
    """A LLaVA as it is."""
    return compiled(workshop, "llava_llama", [])


def compiled(workshop: Workshop, family: str, branches: list[str]) -> Path:
    def make(path: Path) -> None:
        passes: list[Any] = ["canonicalize"]
        if branches:
            passes.append({"skip-branches": {"branches": branches}})
        recipe = {"model": str(workshop.model(family)), "passes": passes}
        file = path.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(recipe))
        assert entry.run(["optimize", "-q", "--recipe", str(file), "-o", str(path)]) == 0

    return workshop.folder(f"answers {family} {len(branches)}", make)


def eager_tokens(family: str, model: Model, request: Request) -> list[int]:
    """What Hugging Face's own `generate` writes behind the same ids and pixels."""
    generation = model.manifest.generation
    assert generation is not None
    prompter = Prompter.of(model.preprocessor, generation)
    ids = torch.tensor([prompter.encode(request.prompt, len(request.images))])
    pixels = model.preprocessor.images(list(request.images)) if request.images else {}
    given = {name: torch.from_numpy(value) for name, value in pixels.items()}
    if family in WITHOUT_TEMPLATE:
        return written_alone(family, ids[0], given["pixel_values"], prompter)
    # what its own processor says beside them
    is_image = (ids == generation.image_token).long()
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = is_image
    if generation.token_types is not None:
        text, image, _ = generation.token_types
        given["token_type_ids"] = torch.where(is_image == 1, image, text)
    with torch.no_grad():
        found = toys.make(family).generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), **given, max_new_tokens=N_NEW, do_sample=False
        )
    return up_to_end([int(token) for token in found[0, ids.shape[1] :]], prompter)


def written_alone(family: str, ids: torch.Tensor, pixels: torch.Tensor, prompter: Prompter) -> list[int]:
    """The same for models whose own loop counts from another place: they give their answer and what it starts with."""
    model: Any = toys.make(family)
    feed = alone(model, ids, pixels)
    n_start = 1 if family in ("blip_vqa", "florence2") else int((ids >= 0).sum())
    with torch.no_grad():
        found = model.generate(**feed, max_new_tokens=N_NEW, do_sample=False)
    return up_to_end([int(token) for token in found[0, n_start:]], prompter)


def up_to_end(tokens: list[int], prompter: Prompter) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in prompter.end_tokens]
    return tokens[: ends[0] + 1] if ends else tokens  # toys name no end of their own


@pytest.mark.parametrize("colours", [("red",), ("red", "blue"), ()])
def test_answers_are_those_of_the_original_token_by_token(folder: Path, colours: tuple[str, ...]) -> None:
    model = load(folder, threads=1)
    images = [picture(colour) for colour in colours]
    answer = model.generate(QUESTION, images, max_new_tokens=N_NEW)
    assert list(answer.token_ids) == eager_tokens("llava_llama", model, Request(QUESTION, images))
    assert len(answer.token_ids) == N_NEW  # else the whole answer was one token that ends it
    assert answer.timing.n_later == N_NEW - 1
    assert answer.timing.first_token_s > 0


@pytest.mark.parametrize(
    ("family", "n_images"),
    [
        ("blip_vqa", 1),
        pytest.param("qwen2_vl", 1, marks=pytest.mark.slow),
        pytest.param("smolvlm", 2, marks=pytest.mark.slow),
        pytest.param("git", 1, marks=pytest.mark.slow),
        pytest.param("florence2", 1, marks=pytest.mark.slow),
        pytest.param("internvl", 2, marks=pytest.mark.slow),
        pytest.param("gemma3", 2, marks=pytest.mark.slow),
        pytest.param("paligemma", 1, marks=pytest.mark.slow),
    ],
)
def test_other_families_answer_as_their_originals(workshop: Workshop, family: str, n_images: int) -> None:
    model = load(compiled(workshop, family, []), threads=1)
    request = Request(QUESTION, [picture("red"), picture("blue").resize((91, 17))][:n_images])
    (answer,) = answered(model.answering([request], max_new_tokens=N_NEW))
    assert list(answer.token_ids) == eager_tokens(family, model, request)


CAPTIONER = "decoder_model_merged/text_decoder.bert.encoder.layer"
CAPTIONER_CUTS = [f"{CAPTIONER}.0.attention", f"{CAPTIONER}.1.crossattention"]


@pytest.mark.slow
def test_a_caption_is_written_unasked(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = compiled(workshop, "blip_caption", [])
    model = load(folder, threads=1)
    found = model.generate(images=picture("red"), max_new_tokens=N_NEW)
    assert list(found.token_ids) == eager_tokens("blip_caption", model, Request("", [picture("red")]))
    begun = model.generate("a photo of", picture("red"), max_new_tokens=N_NEW)
    assert list(begun.token_ids) == eager_tokens("blip_caption", model, Request("a photo of", [picture("red")]))
    picture("red").save(tmp_path / "red.png")
    assert entry.run(["run", str(folder), "--image", str(tmp_path / "red.png"), "--max-new-tokens", str(N_NEW)]) == 0
    assert capsys.readouterr().out == f"{found.text}\n"
    with pytest.raises(TaskError, match="comes with 2 images; expected one: the model reads a single image"):
        model.generate("a photo of", [picture("red"), picture("blue")])
    assert entry.run(["run", str(folder), "--prompt", "a photo of"]) == 1
    assert "comes with 0 images" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cut_cross_attention_has_no_entry_any_more(workshop: Workshop) -> None:
    cut, whole = (compiled(workshop, "blip_caption", branches) for branches in (CAPTIONER_CUTS, []))
    manifest = read_manifest(cut)
    assert manifest.generation is not None
    assert (manifest.generation.cache_layers, manifest.generation.cross_layers) == ((1, 2), (0, 2))
    decoder, tower = (manifest.components[name] for name in ("decoder_model_merged", "vision_encoder"))
    entries = [f"{n}.encoder.{side}" for n in (0, 1) for side in ("key", "value")]
    own = [entry.replace("encoder", "decoder") for entry in entries]
    assert [spec.name for spec in decoder.inputs[3:]] == [f"past_key_values.{entry}" for entry in (*own, *entries)]
    assert [spec.name for spec in tower.outputs] == [f"present.{entry}" for entry in entries]
    requests = [Request("a photo of", [picture("red")]), Request("", [picture("blue")])]
    answers = {}
    for folder in (cut, whole):
        model = load(folder, threads=1)
        together = answered(model.answering(requests, max_new_tokens=N_NEW))
        lone = [model.generate(request.prompt, request.images, max_new_tokens=N_NEW) for request in requests]
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in lone]
        answers[folder] = [answer.token_ids for answer in lone]
    assert answers[cut] != answers[whole]
    assert entry.run(["verify", "-q", str(cut)]) == 0


def test_questions_of_other_lengths_are_answered_as_alone(workshop: Workshop) -> None:
    model = load(compiled(workshop, "blip_vqa", []), threads=1)
    requests = [Request(QUESTION, [picture("red")]), Request("what is it of a photo ?", [picture("blue")])]
    together = answered(model.answering(requests, max_new_tokens=N_NEW))
    lone = [model.generate(request.prompt, request.images, max_new_tokens=N_NEW) for request in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in lone]
    with pytest.raises(ArtifactError, match="the prompt: is empty"):
        model.generate(images=picture("red"))


def test_prompts_side_by_side_are_answered_as_alone(folder: Path) -> None:
    model = load(folder, threads=1)
    requests = [Request(QUESTION, [picture("red")]), Request("what is it ?", [picture("blue"), picture("red")])]
    together = answered(model.answering(requests, max_new_tokens=N_NEW))
    alone = [model.generate(r.prompt, r.images, max_new_tokens=N_NEW) for r in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert together[0].n_prompt_tokens != together[1].n_prompt_tokens  # so one of them was padded


def test_text_comes_in_pieces_that_make_the_answer(folder: Path) -> None:
    pieces: list[str] = []
    answer = load(folder, threads=1).generate(QUESTION, picture("red"), max_new_tokens=N_NEW, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert 1 < len(pieces) <= N_NEW  # one a token, but for special ones


def test_an_answer_ends_with_a_stop_token(folder: Path) -> None:
    model = load(folder, threads=1)
    whole = model.generate(QUESTION, picture("red"), max_new_tokens=N_NEW)
    generation = model.manifest.generation
    assert generation is not None
    stop = whole.token_ids[3]
    manifest = model.manifest.model_copy(update={"generation": generation.model_copy(update={"stop_tokens": (stop,)})})
    cut = replace(model, manifest=manifest).generate(QUESTION, picture("red"), max_new_tokens=N_NEW)
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]


def test_what_is_drawn_depends_on_the_seed_alone(folder: Path) -> None:
    model = load(folder, threads=1)

    def drawn(seed: int, **settings: float) -> tuple[int, ...]:
        return model.generate(QUESTION, max_new_tokens=N_NEW, temperature=2.0, seed=seed, **settings).token_ids  # type: ignore[arg-type]

    assert drawn(0) == drawn(0)
    assert len({drawn(seed) for seed in range(4)}) > 1
    greedy = model.generate(QUESTION, max_new_tokens=N_NEW).token_ids
    assert drawn(1, top_k=1) == drawn(2, top_p=1e-6) == greedy


def test_tokens_that_were_read_are_penalized_as_transformers_does() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    read = np.array([[0, 3, 3, 8], [1, 1, 2, 7]])
    favoured = np.array([[row.argmax(), -1] for row in logits])[:, :1]
    for tokens in (read, favoured):
        wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.from_numpy(tokens), torch.from_numpy(logits.copy()))
        found = Sampling(repetition_penalty=1.7).choose(logits, list(tokens))
        assert found.tolist() == wanted.argmax(-1).tolist()
    assert (Sampling(repetition_penalty=9.0).choose(logits, list(favoured)) != favoured[:, 0]).any()


def test_the_penalty_of_the_model_s_configuration_is_obeyed(folder: Path, tmp_path: Path) -> None:
    own = load(folder, threads=1).generate(QUESTION, picture("red"), max_new_tokens=N_NEW)
    penalized = load(folder, threads=1).generate(
        QUESTION, picture("red"), max_new_tokens=N_NEW, repetition_penalty=50.0
    )
    assert len(set(penalized.token_ids)) == len(penalized.token_ids)
    assert penalized.token_ids != own.token_ids
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    file = changed / "generation_config.json"
    stated = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**stated, "repetition_penalty": 50.0}))
    model = replace(load(folder, threads=1), folder=changed)
    assert model.generate(QUESTION, picture("red"), max_new_tokens=N_NEW).token_ids == penalized.token_ids


def test_draws_follow_the_probabilities_that_are_left() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], dtype=np.float32))

    def shares(**settings: Any) -> list[float]:
        sampling = Sampling(**settings)
        drawn = [int(sampling.choose(logits)[0]) for _ in range(4000)]
        return [drawn.count(token) / len(drawn) for token in range(4)]

    assert shares(temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(temperature=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(temperature=1.0, top_p=0.8) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(temperature=1.0, top_p=0.81)[2] > 0
    assert shares(temperature=0.5)[0] == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.03)
    assert shares() == [1, 0, 0, 0]
    for bad in (
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"temperature": float("nan")},
        {"repetition_penalty": 0.0},
    ):
        with pytest.raises(ArtifactError, match=next(iter(bad))):
            Sampling(**bad)  # type: ignore[arg-type]


def test_a_cut_attention_leaves_no_gap_in_the_numbers_of_the_cache(workshop: Workshop, folder: Path) -> None:
    cut = compiled(workshop, "llava_llama", [ATTENTION])
    manifest = read_manifest(cut)
    assert manifest.generation is not None
    assert manifest.generation.cache_layers == (0, 2)
    names = [spec.name for spec in manifest.components["decoder_model_merged"].inputs]
    assert names[3:] == [f"past_key_values.{n}.{side}" for n in (0, 1) for side in ("key", "value")]
    found = load(cut, threads=1).generate(QUESTION, picture("red"), max_new_tokens=N_NEW)
    assert found.token_ids != load(folder, threads=1).generate(QUESTION, picture("red"), max_new_tokens=N_NEW).token_ids
    configuration = json.loads((cut / "config.json").read_text())
    assert configuration["text_config"]["num_hidden_layers"] == 2
    assert entry.run(["verify", "-q", str(cut)]) == 0


def test_the_manifest_says_all_that_the_program_says() -> None:
    assert set(GenerationEntry.model_fields) == {field.name for field in fields(Generation)}


@pytest.mark.parametrize(
    "entry_",
    [
        GenerationEntry(image_token=9, image_tokens=6),
        GenerationEntry(image_token=9, image_tokens=6, first_position=1, token_types=(0, 0, 1)),
        GenerationEntry(image_token=9, image_tokens=6, token_types=(0, 1, 2)),
        GenerationEntry(image_token=9, image_tokens=6, image_grid=(2, 3)),
    ],
)
def test_tokens_are_placed_as_in_the_program(entry_: GenerationEntry) -> None:
    from tests.capture.test_generative import captured_toy

    program = replace(captured_toy("llava_llama")[1], generation=Generation(**entry_.model_dump()))
    ids = np.array([[0, 0, 1, *[9] * 6, 2, 3, 4, 4], [5, *[9] * 6, 6, 7, 8, 8, 1, 9]])
    mask = (ids > 0).astype(np.int64)
    prompt, step = (ids[:, :-1], ids.shape[1] - 1), (ids, 1)
    for tokens, n_new in (prompt, step):
        seen = mask[:, : tokens.shape[1]]
        wanted = placed_in_torch(program, torch.from_numpy(seen), n_new, input_ids=torch.from_numpy(tokens))
        found = placed(entry_, seen, tokens, n_new)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert np.array_equal(found[name], value.numpy()), name


def test_prompts_that_cannot_be_answered_are_refused(folder: Path, tmp_path: Path) -> None:
    model = load(folder, threads=1)
    with pytest.raises(ArtifactError, match="the prompt: is empty"):
        model.generate("  ", picture("red"))
    with pytest.raises(TaskError, match="holds 2 <image> for 1 images"):
        model.generate("<image> <image> what", picture("red"))
    with pytest.raises(ArtifactError, match="and 500 new ones were asked for; expected at most 128 in all"):
        model.generate(QUESTION, max_new_tokens=500)
    with pytest.raises(ArtifactError, match="has 202 tokens; expected at most 128 in all"):
        model.generate("what " * 200)
    with pytest.raises(TaskError, match=r"gone\.png: does not exist"):
        model.generate(QUESTION, tmp_path / "gone.png")
    with pytest.raises(ArtifactError, match=r"writes its answers token by token; call generate"):
        model(images=[picture("red")])


@pytest.mark.parametrize("mode", ["RGBA", "L", "CMYK", "P", "1", "I;16"])
def test_images_of_any_kind_and_size_are_taken(folder: Path, mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (7, 91)) if mode == "I;16" else picture("red").resize((7, 91)).convert(mode)
    file = tmp_path / "it.tiff"
    image.save(file)
    assert load(folder, threads=1).generate(QUESTION, file, max_new_tokens=2).token_ids


def test_a_damaged_artifact_is_noticed(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    decoder, embedding = copy / "onnx" / "decoder_model_merged.onnx", copy / "onnx" / "embed_tokens.onnx"
    shutil.copyfile(embedding, decoder)
    with pytest.raises(ArtifactError, match=r"onnx/decoder_model_merged\.onnx: has \d+ bytes"):
        load(copy)
    decoder.unlink()
    with pytest.raises(ArtifactError, match=r"onnx/decoder_model_merged\.onnx: is missing"):
        load(copy)


def test_the_command_streams_the_answer_and_says_how_long_it_took(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture("red").save(tmp_path / "red.png")
    given = ["run", str(folder), "--image", str(tmp_path / "red.png"), "--prompt", QUESTION, "--max-new-tokens", "4"]
    assert entry.run(given) == 0
    shown = capsys.readouterr()
    answer = load(folder, threads=1).generate(QUESTION, tmp_path / "red.png", max_new_tokens=4)
    assert shown.out == f"{answer.text}\n"
    assert f"4 tokens behind {answer.n_prompt_tokens}; first after " in shown.err
    assert entry.run([*given, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["answer"], row["n_tokens"]) == (answer.text, 4)
    for wrong in (["--text", "a"], ["--image", str(tmp_path / "red.png")]):
        assert entry.run(["run", str(folder), *wrong]) == 2
        assert "is a generative model: it takes --prompt" in capsys.readouterr().err
