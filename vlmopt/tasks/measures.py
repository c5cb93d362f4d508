"""The measures of a kind of task whose answers are written, by name; those of captions know the whole split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vlmopt.tasks.caption_metrics import CIDER_SCALE, CiderD, corpus_bleu, sentence_bleu
from vlmopt.tasks.specification import METRICS, VQA_ACCURACY, TaskKind
from vlmopt.tasks.text_metrics import ENOUGH_ANNOTATORS, anls, exact_match, token_f1, vqa_accuracy

Measure = Callable[[str, Sequence[str]], float]  # of an answer and its references, in [0, 1]

OF_QUESTIONS: Mapping[str, Measure] = {
    "exact-match": exact_match,
    VQA_ACCURACY: vqa_accuracy,
    "anls": anls,
    "token-f1": token_f1,
}
# From which score on an answer counts as right when answers are shown one by one. Captions of people agree among
# themselves to a CIDEr-D of about 1 of 10.
RIGHT_FROM: Mapping[str, float] = {
    "exact-match": 1.0,
    VQA_ACCURACY: 0.5,
    "anls": 0.5,
    "token-f1": 0.5,
    "cider-d": 0.1,
    "bleu-4": 0.25,
}


def measures(kind: TaskKind, references: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """The measures of this kind that these references, an entry an item, allow.

    CIDEr-D comes divided by ten, since its own scale ends there; what papers print is ten times its percentage here.
    """
    if kind is TaskKind.IMAGE_CAPTIONING:
        consensus = CiderD(references)
        found: dict[str, Measure] = {
            "cider-d": lambda answer, known: consensus.score(answer, known) / CIDER_SCALE,
            "bleu-4": sentence_bleu,
        }
    else:
        found = dict(OF_QUESTIONS)
    if min(map(len, references)) < ENOUGH_ANNOTATORS:
        found.pop(VQA_ACCURACY, None)
    return {name: found[name] for name in METRICS[kind] if name in found}


def corpus_percentages(kind: TaskKind, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """What can only be said of all answers together, in percent: for captions BLEU-1 to BLEU-4."""
    if kind is not TaskKind.IMAGE_CAPTIONING:
        return {}
    return {f"corpus_bleu-{n}": 100 * score for n, score in enumerate(corpus_bleu(answers, references), start=1)}
