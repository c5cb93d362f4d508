"""The two optional data sets: food photographs and paint stamps, as folders of square images with a
`metadata.jsonl`.

Both are made square here, since the processor of the example resizes to a square without keeping the aspect:
photographs are cropped around their centre, cut-outs are laid on white. Look-alikes stay in one split: foods that
differ only behind the comma of their name ("Rice, raw, brown"), and stamps with the same caption.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from concepts import FRACTIONS, SEED, Row, split_families
from PIL import Image, ImageOps
from resvg_py import svg_to_bytes
from tqdm import tqdm

SIDE = 168
_STAMPS = "usr/share/tuxpaint/stamps"


def build_food(folder: Path, *, pictures: Path, table: Path) -> list[Row]:
    """Write one square photograph a food; returns the rows of `metadata.jsonl`."""
    with (table / "package" / "index.csv").open(encoding="utf-8", newline="") as stream:
        foods = list(csv.DictReader(stream))
    rows = []
    for food in tqdm(foods, desc="food", delay=2, disable=None):
        code, name = food["Food Code; code"], food["Food Name; name"]
        with Image.open(pictures / "package" / "assets" / f"{code}.jpeg") as photograph:
            ImageOps.fit(photograph.convert("RGB"), (SIDE, SIDE)).save(folder / f"{code}.png")
        diet = "vegetarian" if food["Tags; tags"].startswith("vegetarian") else "not vegetarian"
        family = re.split(r",|-\d+$", name)[0].strip().lower()
        group = food["Food Group; grup"].lower()
        rows.append({"file_name": f"{code}.png", "name": name, "group": group, "diet": diet, "family": family})
    return _with_splits(rows)


def build_stamps(folder: Path, *, package: Path) -> list[Row]:
    """Write one square image a stamp; returns the rows of `metadata.jsonl`."""
    rows, undrawn = [], []
    for source in tqdm(list(_stamp_files(package / _STAMPS)), desc="stamps", delay=2, disable=None):
        place = source.relative_to(package / _STAMPS)
        file_name = "-".join(place.with_suffix(".png").parts)
        try:
            picture = _picture(source)
        except ValueError:
            undrawn.append(place.name)
            continue
        _on_white(picture).save(folder / file_name)
        caption = source.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0].strip()
        rows.append({"file_name": file_name, "caption": caption, "group": place.parts[0], "family": caption.lower()})
    if undrawn:
        print(f"left out {len(undrawn)} stamps whose SVG resvg refuses: {', '.join(undrawn)}")
    return _with_splits(rows)


def _stamp_files(root: Path) -> Iterator[Path]:
    """Every picture that has a sentence; of a stamp stored as bitmap and as drawing, the bitmap."""
    pictures: dict[Path, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix in {".png", ".svg"} and path.with_suffix(".txt").is_file():
            pictures.setdefault(path.with_suffix(""), path)
    yield from pictures.values()


def _picture(source: Path) -> Image.Image:
    """The stamp with its transparency; raises ValueError for a drawing that resvg cannot make sense of."""
    if source.suffix == ".png":
        return Image.open(source).convert("RGBA")
    drawn = svg_to_bytes(svg_path=str(source), width=2 * SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(drawn)).convert("RGBA")


def _on_white(picture: Image.Image) -> Image.Image:
    """The picture fitted into a white square."""
    fitted = ImageOps.contain(picture, (SIDE, SIDE))
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(fitted, ((SIDE - fitted.width) // 2, (SIDE - fitted.height) // 2), mask=fitted)
    return square


def _with_splits(rows: list[Row]) -> list[Row]:
    """The rows with a `split` column: whole families, every group divided alike."""
    families: Mapping[str, str] = {row["family"]: row["group"] for row in reversed(rows)}
    sizes = Counter(row["family"] for row in rows)
    splits = split_families(families, sizes, FRACTIONS, seed=SEED)
    return [row | {"split": splits[row["family"]]} for row in rows]
