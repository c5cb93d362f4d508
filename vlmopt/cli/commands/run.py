"""`vlmopt run`: an artifact on images and texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.answers import show_answers
from vlmopt.cli.display import show, show_json

_N_LABELS = 5  # labels shown of each item; --json holds all
_N_VALUES = 8


@click.command("run", short_help="Run an artifact on images and texts.")
@click.argument("path", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="Repeatable.")
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="Repeatable.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="For a model that writes; repeatable.")
@click.option("--system", metavar="TEXT", help="What the model is told before the prompt.")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="Longest answer; 128 by default.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, metavar="T", help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(0), default=0, metavar="K", help="Draw among the K likeliest; 0: all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, metavar="P", help="... of this sum.")
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    metavar="R",
    help="Above 1: tokens that were read are less probable. The model's own by default.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@click.option("--adapter", metavar="NAME|FILE", help="Use this adapter of the artifact, or of a file; none: without.")
@options.threads()
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    path: Path,
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    prompts: tuple[str, ...],
    *,
    system: str | None,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    repetition_penalty: float | None,
    adapter: str | None,
    threads: int | None,
    is_json: bool,
) -> None:
    """Run an artifact on images and texts.

    \b
    Examples: vlmopt run out --image cat.png --text "a cat" --text "a dog"
              vlmopt run out --image cat.png --prompt "What is this?"

    A classifier ranks its labels for every image, a question answerer its answers for every image and question, and a
    dual encoder compares every image with every text. A generative model writes an answer to every prompt about all
    images together, token by token as it comes; one that writes captions needs no prompt.
    """
    if not images and not texts and not prompts:
        raise click.UsageError("Missing option '--image', '--text' or '--prompt'.", ctx)
    from vlmopt.runtime import Sampling, load

    model = load(path, threads=threads, adapter=adapter)
    generation = model.manifest.generation
    if generation is not None and generation.writes_unasked and images and not prompts:
        prompts = ("",)
    if (generation is not None) != bool(prompts) or (prompts and texts):
        wanted = "--prompt" if generation is not None else "--image and --text"
        raise click.UsageError(f"{path} is a {model.manifest.assembly} model: it takes {wanted}.", ctx)
    if prompts:
        show_answers(
            model,
            prompts,
            images,
            sampling=Sampling(temperature, top_k, top_p, seed, repetition_penalty),
            max_new_tokens=max_new_tokens,
            system=system,
            is_json=is_json,
        )
        return
    found = model(images=list(images) or None, texts=list(texts) or None)
    is_matrix = bool(images and texts) and model.manifest.assembly == "dual"
    items = _items([str(image) for image in images], [] if is_matrix else texts)
    if isinstance(found, list):
        results = [{"labels": [{"label": label, "probability": p} for label, p in ranked]} for ranked in found]
    elif is_matrix:
        texts_of = [zip(texts, row, strict=True) for row in found.tolist()]
        results = [{"texts": [{"text": text, "logit": logit} for text, logit in row]} for row in texts_of]
    else:
        results = [{"values": row} for row in found.tolist()]
    rows = [{**item, **result} for item, result in zip(items, results, strict=True)]
    if is_json:
        show_json({"results": rows})
    else:
        show(*(line for row in rows for line in _lines(row)))


def _items(images: Sequence[str], texts: Sequence[str]) -> list[dict[str, str]]:
    """What each row of the result belongs to: an image, a text, or an image and the text at its place."""
    if not texts or not images:
        key, given = ("image", images) if images else ("text", texts)
        return [{key: value} for value in given]
    n = max(len(images), len(texts))
    pairs = zip(images if len(images) == n else [*images] * n, texts if len(texts) == n else [*texts] * n, strict=True)
    return [{"image": image, "text": text} for image, text in pairs]


def _lines(row: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(row[key] for key in ("image", "text") if key in row)
    for ranked in row.get("labels", ())[:_N_LABELS]:
        yield f"  {100 * ranked['probability']:5.1f} %  {ranked['label']}"
    for compared in sorted(row.get("texts", ()), key=lambda pair: -float(pair["logit"])):
        yield f"  {compared['logit']:8.3f}  {compared['text']}"
    if "values" in row:
        values = row["values"]
        shown = ", ".join(f"{value:.4g}" for value in values[:_N_VALUES])
        yield f"  {len(values)} values: {shown}{', ...' if len(values) > _N_VALUES else ''}"
