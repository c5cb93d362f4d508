"""task.yaml: what is accepted, what is refused, and how the refusal reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmopt.core.errors import TaskError
from vlmopt.tasks.specification import TaskKind, read_specification


def written(folder: Path, text: str) -> Path:
    file = folder / "task.yaml"
    file.write_text(text)
    return file


def test_a_kind_is_enough_and_the_folder_gives_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "emoji-style"
    folder.mkdir()
    found = read_specification(written(folder, "kind: image-classification\n"))
    assert (found.kind, found.name, found.data) == (TaskKind.IMAGE_CLASSIFICATION, "emoji-style", ".")
    assert (found.headline, found.columns.label, found.columns.group) == ("accuracy", "label", None)
    assert (found.splits.profile, found.splits.validation, found.splits.test) == (0.5, 0.2, 0.3)


def test_labels_may_be_numbers_booleans_and_the_words_yes_and_no(tmp_path: Path) -> None:
    text = "kind: visual-question-answering\nlabels: [yes, no, 3, 2.5, true]\n"
    assert read_specification(written(tmp_path, text)).labels == ("yes", "no", "3", "2.5", "true")


def test_written_answers_have_a_prompt_a_metric_and_a_length(tmp_path: Path) -> None:
    text = "kind: image-text-to-text\nprompt: 'Answer {} in a word.'\nmax_new_tokens: 5\n"
    found = read_specification(written(tmp_path, text))
    assert (found.headline, found.prompt, found.max_new_tokens) == ("exact-match", "Answer {} in a word.", 5)
    found = read_specification(written(tmp_path, "kind: image-captioning\n"))
    assert (found.headline, found.prompt, found.max_new_tokens) == ("cider-d", "", None)


BAD = [
    ("kind: image-clasification", "'image-clasification' is unknown", "did you mean 'image-classification'?"),
    ("name: x", "has no `kind:`", "expected one of image-text-retrieval"),
    ("kind: image-classification\nlabel: [a, b]", "the key 'label' is unknown", "did you mean 'labels'?"),
    ("kind: image-classification\ncolumns: {lable: x}", "the key 'lable' is unknown", "did you mean 'label'?"),
    ("kind: image-classification\nsplits: {sede: 1}", "the key 'sede' is unknown", "did you mean 'seed'?"),
    ("kind: image-classification\nsplits: {test: 0.9}", "profile + validation + test is 1.6", "expected 1"),
    ("kind: image-classification\nsplits: {test: 1.5}", "splits.test", "less than 1"),
    ("kind: image-classification\nsplits: {seed: many}", "splits.seed", "found 'many'"),
    ("kind: image-classification\ncolumns: label", "columns", "found 'label'"),
    ("kind: image-classification\nmetric: f1", "metric 'f1' is unknown", "expected accuracy"),
    ("kind: image-text-retrieval\nmetric: accuracy", "metric 'accuracy'", "recall@1 or recall@5 or recall@10"),
    ("kind: image-classification\nprompts: ['a {}']", "prompts belong to", "zero-shot"),
    ("kind: zero-shot-image-classification\nprompts: [a photo]", "prompt 'a photo' has no {}", "for the label"),
    ("kind: image-text-retrieval\nlabels: [a, b]", "labels have no meaning", "image-text-retrieval"),
    ("kind: image-classification\nlabels: [a, b, a]", "label 'a' is listed twice", ""),
    ("kind: image-classification\nlabels: [a]", "labels has one class ('a')", "two or more"),
    ("kind: image-classification\nlabels: [a, [b]]", "labels.1", "valid string"),
    (
        "kind: image-text-to-text\nmetric: bleu-4",
        "metric 'bleu-4' is unknown",
        "exact-match or vqa-accuracy or anls or",
    ),
    ("kind: image-captioning\nmetric: anls", "metric 'anls' is unknown", "expected cider-d or bleu-4"),
    ("kind: image-captioning\nlabels: [a, b]", "labels have no meaning", "image-captioning"),
    ("kind: image-text-to-text\nprompts: ['a {}']", "prompts belong to", "zero-shot"),
    ("kind: image-text-to-text\nprompt: answer", "prompt 'answer' has no {}", "for the question"),
    ("kind: image-captioning\nprompt: 'a {}'", "prompt 'a {}' has a {}", "no question"),
    ("kind: image-captioning\nmax_new_tokens: 0", "max_new_tokens", "greater than 0"),
    ("kind: image-classification\nprompt: a", "prompt belongs to", "image-text-to-text and image-captioning only"),
    ("kind: image-classification\nmax_new_tokens: 3", "max_new_tokens belongs to", "image-captioning only"),
    ("kind: image-captionning", "'image-captionning' is unknown", "did you mean 'image-captioning'?"),
    ("kind: [1", "line 1", "expected YAML"),
    ("kind: image-classification\nkind: image-classification", "line 2", "given twice"),
]


@pytest.mark.parametrize(("text", "found", "hint"), BAD)
def test_a_mistake_is_one_line_that_names_it_and_the_way_out(tmp_path: Path, text: str, found: str, hint: str) -> None:
    with pytest.raises(TaskError) as caught:
        read_specification(written(tmp_path, text))
    message = str(caught.value)
    assert "task.yaml" in message
    assert found in message
    assert hint in message
    assert "\n" not in message


def test_a_missing_file_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task\.yaml: does not exist.*write a task\.yaml with `kind:` one of"):
        read_specification(tmp_path / "task.yaml")
