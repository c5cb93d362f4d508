"""The LLaVA example on toy towers: its parts fit, its splits keep families apart, its training goes on as if it had
never stopped, and what it writes is what it trained."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlmopt.core.progress import Silent
from vlmopt.preprocess import Preprocessor
from vlmopt.prompting import Prompter
from vlmopt.tasks.dataset import load_task
from vlmopt.workflow.opening import open_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODULES = ("adapters", "assembly", "evaluate", "lessons", "questions", "train")
N_FEATURES = 36
SPLITS = ("profile", "validation", "test")
STYLES = {"flat": (230, 40, 40), "lined": (40, 40, 230)}
SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
SPOKEN = ["user", "assistant", "What", "is", "this?", "Which", "drawing", "style", "Is", "food", "vegetarian?"]
SPOKEN += ["yes", "no", *STYLES]
N_CONCEPTS = 6


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The modules of the example, imported as its scripts import them, and forgotten again."""
    known, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(EXAMPLES / "llava"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path[:] = path
    folders = (EXAMPLES / "llava", EXAMPLES / "emoji")
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent in folders:
            del sys.modules[name]


@pytest.fixture(scope="module")
def tasks(example: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The three task folders over a few squares, two concepts and two foods of each split."""
    root = tmp_path_factory.mktemp("example")
    drawings, foods = [], []
    for i in range(N_CONCEPTS):
        split = SPLITS[i % 3]
        shared = {"family": f"family{i}", "group": "things"}
        for style in STYLES:
            row = {"file_name": f"{style}-{i}.png", "name": f"thing{i}", "style": style, "split_concept": split}
            drawings.append(row | shared)
        diet = "vegetarian" if i % 2 else "not vegetarian"
        foods.append({"file_name": f"{i}.png", "diet": diet, "split": split} | shared)
    write_images(root / "images", drawings)
    write_images(root / "food", foods)
    return example.questions.make_question_tasks(root / "tasks", images=root)  # type: ignore[no-any-return]


def write_images(folder: Path, rows: list[dict[str, str]]) -> None:
    folder.mkdir()
    for i, row in enumerate(rows):
        colour = STYLES.get(row.get("style", ""), (20, 200, 20))
        Image.new("RGB", (84, 84), tuple(level + i for level in colour)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(example: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with its processor, as prepare.py writes it."""
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = toy(example, path)
    model.save_pretrained(path)
    processor = example.assembly.processor(tokenizer, patch_size=14)
    processor.save_pretrained(path)
    processor.image_processor.save_pretrained(path)
    return path


def toy(example: SimpleNamespace, folder: Path) -> tuple[Any, Any]:
    """A LLaVA of toy towers, the same at every call."""
    words = [*SPECIAL, *SPOKEN, *(f"thing{i}" for i in range(N_CONCEPTS))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder / "language")
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    backbone = Dinov2Model(Dinov2Config(**size, image_size=84, patch_size=14, use_mask_token=False))
    text = {**size, "intermediate_size": 64, "num_key_value_heads": 1, "vocab_size": len(words)}
    language = LlamaForCausalLM(LlamaConfig(**text, tie_word_embeddings=True, max_position_embeddings=128))
    tokenizer = example.assembly.load_tokenizer(folder / "language")
    return example.assembly.assemble(backbone, language, tokenizer), tokenizer


@pytest.fixture
def trainer(example: SimpleNamespace, tasks: list[Path], folder: Path, tmp_path: Path) -> Any:
    return new_trainer(example, tasks, folder, tmp_path)


def new_trainer(example: SimpleNamespace, tasks: list[Path], folder: Path, home: Path, n_steps: int = 6) -> Any:
    torch.set_num_threads(1)
    model, _ = toy(example, home)
    course = example.lessons.load_course(model, folder, tasks, home)
    settings = example.train.Settings(batch=4, warmup_steps=2, alignment_steps=3)
    made = {"n_steps": n_steps, "device": torch.device("cpu"), "frozen": torch.float32}
    return example.train.Trainer(model, course, settings, **made)


def test_the_embedding_grows_by_the_token_of_an_image_and_by_no_other(example: SimpleNamespace, tmp_path: Path) -> None:
    model, tokenizer = toy(example, tmp_path)
    n_words = len(SPECIAL) + len(SPOKEN) + N_CONCEPTS
    rows = model.get_input_embeddings().weight
    assert len(rows) == n_words + 1
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == n_words
    assert torch.equal(rows[n_words], rows[:n_words].mean(0))
    assert model.lm_head.weight is rows


def test_a_prompt_holds_the_image_the_question_and_no_system_message(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    prompter = Prompter(Preprocessor.load(folder), config["image_token_index"], config["image_seq_length"])
    ids = prompter.encode("What is this?", 1)
    words = prompter.preprocessor.tokenizer.convert_ids_to_tokens(ids)
    start, end = ["<|im_start|>", "user"], ["What", "is", "this?", "<|im_end|>", "<|im_start|>", "assistant"]
    assert words == [*start, *["<image>"] * N_FEATURES, *end]
    assert prompter.decode(prompter.encode_answer("thing3")) == "thing3"


def test_no_family_is_in_two_splits_or_in_other_splits_of_another_question(tasks: list[Path]) -> None:
    loaded = [load_task(path) for path in tasks]  # which refuses a group in two splits by itself
    assert [task.counts for task in loaded] == [dict.fromkeys(SPLITS, n) for n in (4, 4, 2)]
    seen = {}
    for task in loaded:
        for split in SPLITS:
            for sample in task.all_samples(split):
                assert seen.setdefault(sample.image.path.resolve(), split) == split


def test_lessons_are_the_profile_splits_alone(example: SimpleNamespace, tasks: list[Path], trainer: Any) -> None:
    course = trainer.course
    assert {name: len(lessons) for name, lessons in course.lessons.items()} == {"what": 4, "style": 4, "vegetarian": 2}
    profile = {s.image.path.resolve() for path in tasks for s in load_task(path).samples("profile")}
    assert course.features.shape == (len(profile), N_FEATURES, 32)  # what and style show the same four
    shown = {lesson.image for lessons in course.lessons.values() for lesson in lessons}
    assert shown == set(range(len(profile)))


def test_a_batch_depends_on_its_number_alone_and_every_lesson_has_its_turn(
    example: SimpleNamespace, trainer: Any
) -> None:
    batches = example.lessons.batches
    whole = list(islice(batches(trainer.course, size=4, seed=0), 8))
    assert list(islice(batches(trainer.course, size=4, seed=0, first=5), 3)) == whole[5:]
    assert list(islice(batches(trainer.course, size=4, seed=1), 8)) != whole
    turns = Counter(lesson for batch in whole for lesson in batch)
    assert [Counter(lesson.task for lesson in batch) for batch in whole] == [
        {"what": 2, "style": 1, "vegetarian": 1}
    ] * 8
    assert {(lesson.task, n) for lesson, n in turns.items()} == {("what", 4), ("style", 2), ("vegetarian", 4)}


def test_training_that_was_stopped_ends_with_the_numbers_of_a_run_that_never_was(
    example: SimpleNamespace, tasks: list[Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example.train, "N_LOGGED", 1)
    checkpoint = tmp_path / "checkpoint.pt"

    def stop(line: str) -> None:
        if line.startswith("step 3,"):
            signal.raise_signal(signal.SIGINT)

    whole, first, second = (new_trainer(example, tasks, folder, tmp_path) for _ in range(3))
    whole.align()
    assert trained(example, whole, tmp_path / "whole.pt")
    first.align()
    assert not trained(example, first, checkpoint, log=stop)
    assert second.resume(checkpoint)
    assert second.progress.step == 3
    assert trained(example, second, checkpoint)
    wanted, found = whole.tensors(), second.tensors()
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    assert [name for name in wanted if torch.equal(wanted[name], first.tensors()[name])] == []


def trained(
    example: SimpleNamespace, trainer: Any, checkpoint: Path, log: Callable[[str], None] = lambda line: None
) -> bool:
    return example.train.train(trainer, checkpoint, time_limit_s=600, save_every_s=600, log=log)  # type: ignore[no-any-return]


def test_a_checkpoint_of_other_settings_is_refused(trainer: Any, tmp_path: Path) -> None:
    trainer.save(tmp_path / "checkpoint.pt")
    trainer.settings = replace(trainer.settings, batch=5)
    with pytest.raises(ValueError, match=r"checkpoint\.pt was made with another batch; add --restart"):
        trainer.resume(tmp_path / "checkpoint.pt")


def test_the_written_tensors_make_the_model_that_was_trained(
    example: SimpleNamespace, trainer: Any, tmp_path: Path
) -> None:
    trainer.align()
    for batch in islice(example.lessons.batches(trainer.course, size=4, seed=0), 4):
        trainer.step(batch)
    example.adapters.save_trained(trainer.tensors(), tmp_path / "trained.safetensors", dtype=torch.float32)
    (tmp_path / "again").mkdir()
    model, _ = toy(example, tmp_path / "again")
    lesson = trainer.course.lessons["style"][0]
    with torch.no_grad():
        wanted, _, _ = trainer.answers([lesson])
        before = logits(model, trainer, lesson)
        example.adapters.apply_trained(model, tmp_path / "trained.safetensors")
        after = logits(model, trainer, lesson)
    torch.testing.assert_close(after, wanted, rtol=0, atol=2e-3)  # the cached features are float16
    assert (before - wanted).abs().max() > 0.1


def logits(model: Any, trainer: Any, lesson: Any) -> torch.Tensor:
    """Of the answer's tokens, with the features of the lesson's image in the place of its image."""
    features = trainer.course.features[[lesson.image]].float()
    ids = torch.tensor([[*lesson.prompt, *lesson.answer]])
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == model.config.image_token_id] = model.model.multi_modal_projector(features)[0]
    return model(inputs_embeds=embeds).logits[0, len(lesson.prompt) - 1 : -1]  # type: ignore[no-any-return]


def test_tensors_of_another_model_are_refused(example: SimpleNamespace, tmp_path: Path) -> None:
    model, _ = toy(example, tmp_path)
    example.adapters.save_trained({"model.head.weight": torch.ones(2)}, tmp_path / "trained.safetensors")
    with pytest.raises(ValueError, match=r"the model has no model\.head\.weight"):
        example.adapters.apply_trained(model, tmp_path / "trained.safetensors")


def test_whitening_is_folded_into_the_first_layer(example: SimpleNamespace) -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(40, 5, 6, generator=draw) * torch.logspace(-3, 2, 6) + 3
    whitening = example.train.Whitening.of(features)
    layer = torch.nn.Linear(6, 4)
    weight, bias = whitening.folded(layer.weight, layer.bias)
    wanted = layer(whitening(features))
    torch.testing.assert_close(torch.nn.functional.linear(features, weight, bias), wanted, rtol=0, atol=1e-4)
    assert whitening(features).flatten(0, 1).std(0)[-1] > 0.3 > features.flatten(0, 1).std(0)[0]


def test_evaluation_scores_the_model_the_blanked_images_and_the_commonest_answer(
    example: SimpleNamespace, tasks: list[Path], folder: Path
) -> None:
    opened = open_model(str(folder), device="cpu", dtype="float32", allow_pickle=False, progress=Silent())
    found = example.evaluate.evaluate(opened, tasks[1], is_test=False, num_samples=None)
    assert found.metric == "exact-match"
    assert len(found.model) == len(found.blanked) == 4
    assert found.commonest.tolist() == [1.0, 0.0, 1.0, 0.0]  # of two styles as frequent as each other, the first
    feeds = [{"pixel_values": torch.ones(1, 3, 2, 2), "input_ids": torch.ones(1, 2)}]
    (blank,) = example.evaluate.BlankFeeds(feeds)
    assert not blank["pixel_values"].any()
    assert blank["input_ids"] is feeds[0]["input_ids"]
    cells = example.evaluate.row("style", found).split("|")
    assert cells[1:4] == [" style ", " exact-match ", " 4 "]
    assert len(example.evaluate.evaluate(opened, tasks[1], is_test=True, num_samples=3).model) == 3
