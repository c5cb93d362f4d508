"""Fetch, convert and render the emoji example in one command; a second run only looks.

    CACHE/emoji/model           Hugging Face folder of the dual encoder
    CACHE/emoji/images          the drawings with their metadata.jsonl
    CACHE/emoji/tasks/NAME      one task folder a question

CACHE is `$VLMOPT_CACHE`, else `~/.cache/vlmopt`. A folder that was built from other inputs than today's is rebuilt.
Exit codes are those of `fetch.py`: 4 means that a registry is out of reach and the example is to be skipped, visibly.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convert import convert
from fetch import EXTRAS, UNREACHABLE, FetchError, UnreachableError, cache_root, fetch, selection
from folders import Existing
from make_tasks import make_tasks


def prepare(root: Path, *, extras: list[str]) -> list[Path]:
    """Bring model and tasks under `root` up to date; returns their folders."""
    fetch(selection(extras))
    model = root / "model"
    convert(model, existing=Existing.REFRESH)
    return [model, *make_tasks(root, extras=extras, existing=Existing.REFRESH)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with", dest="extras", action="append", choices=sorted(EXTRAS), default=[])
    options = parser.parse_args(arguments)
    try:
        folders = prepare(cache_root() / "emoji", extras=options.extras)
    except UnreachableError as error:
        print(f"prepare: skipped, {error}", file=sys.stderr)
        return UNREACHABLE
    except (FetchError, ValueError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    print("\n".join(str(folder) for folder in folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
