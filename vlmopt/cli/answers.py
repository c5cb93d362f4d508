"""`vlmopt run --prompt`: answers shown as they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmopt.cli.display import show_json

if TYPE_CHECKING:
    from vlmopt.runtime import Answer, Model, Sampling


def show_answers(
    model: Model,
    prompts: Sequence[str],
    images: Sequence[Path],
    *,
    sampling: Sampling,
    max_new_tokens: int | None,
    system: str | None,
    is_json: bool,
) -> None:
    """Every prompt about all images, one after another: answers on standard output, how long each took on the other."""
    from vlmopt.runtime import Request, answered

    model.warm_up()
    rows = []
    for prompt in prompts:
        answering = model.answering([Request(prompt, images, system)], sampling, max_new_tokens)
        if is_json:
            (answer,) = answered(answering)
            rows.append(_row(prompt, images, answer))
            continue
        if len(prompts) > 1:
            click.echo(f"{prompt}\n  ", nl=False)
        (answer,) = answered(answering, lambda _, piece: click.echo(piece, nl=False))
        click.echo()
        click.echo(_timing_line(answer), err=True)
    if is_json:
        show_json({"results": rows})


def _row(prompt: str, images: Sequence[Path], answer: Answer) -> Mapping[str, Any]:
    timing = answer.timing
    return {
        "prompt": prompt,
        "images": [str(image) for image in images],
        "answer": answer.text,
        "n_prompt_tokens": answer.n_prompt_tokens,
        "n_tokens": len(answer.token_ids),
        "first_token_s": timing.first_token_s,
        "tokens_per_s": timing.tokens_per_s,
    }


def _timing_line(answer: Answer) -> str:
    timing, n = answer.timing, len(answer.token_ids)
    speed = "" if timing.tokens_per_s is None else f", then {timing.tokens_per_s:.1f} tokens/s"
    return f"{n} token{'s' * (n != 1)} behind {answer.n_prompt_tokens}; first after {timing.first_token_s:.2f} s{speed}"
