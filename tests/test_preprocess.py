from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmopt.core.errors import ModelError, TaskError
from vlmopt.preprocess import Preprocessor, open_picture

PLAIN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_normalize": True}
PROCESSORS = {
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "crop_size": 8, **PLAIN},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 8, "width": 12}, **PLAIN},
    "vilt": {"image_processor_type": "ViltImageProcessor", "size": {"shortest_edge": 70}, "size_divisor": 32, **PLAIN},
    "blip": {"image_processor_type": "BlipImageProcessor", "size": {"height": 8, "width": 8}, **PLAIN},
    "bit": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 9}, "crop_size": 8, **PLAIN},
}
SIZES = {"clip": (8, 8), "siglip": (8, 12), "vilt": (64, 64), "blip": (8, 8), "bit": (8, 8)}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle"]


def folder_of(
    path: Path,
    *,
    processor: dict[str, object] | None = None,
    has_text: bool = False,
    config: dict[str, object] | None = None,
) -> Path:
    path.mkdir(exist_ok=True)
    if processor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    if has_text:
        (path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
        stated = {"tokenizer_class": "BertTokenizer", "model_max_length": 10}
        (path / "tokenizer_config.json").write_text(json.dumps(stated), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config or {"model_type": "bert"}), encoding="utf-8")
    return path


def halves(width: int = 20, height: int = 10) -> Image.Image:
    """Left half red, right half blue."""
    values = np.zeros((height, width, 3), dtype=np.uint8)
    values[:, : width // 2, 0] = values[:, width // 2 :, 2] = 255
    return Image.fromarray(values)


@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_every_family_makes_float_pixels_of_the_size_it_states(kind: str, tmp_path: Path) -> None:
    made = Preprocessor.load(folder_of(tmp_path / "m", processor=PROCESSORS[kind]))
    assert made.image_size == SIZES[kind]
    arrays = made.images([halves(), halves(10, 30), Image.new("RGB", (3, 1)), Image.new("L", (1, 3), 255)])
    assert arrays["pixel_values"].dtype == np.float32
    assert arrays["pixel_values"].shape == (4, 3, *SIZES[kind])
    assert arrays["pixel_values"].min() >= -1.0001
    assert np.allclose(arrays["pixel_values"][3], 1.0)


def test_a_processor_that_keeps_the_aspect_ratio_gets_squares_with_nothing_masked(tmp_path: Path) -> None:
    arrays = Preprocessor.load(folder_of(tmp_path / "m", processor=PROCESSORS["vilt"])).images([halves(200, 50)])
    assert arrays["pixel_mask"].shape == (1, 64, 64)
    assert arrays["pixel_mask"].min() == 1


@pytest.mark.parametrize(
    ("bounds", "edge"),
    [((16, 400), 16), ((16, 10**9), 448), ((20**2, 30**2), 24), ((500**2, 10**9), 504)],
)
def test_pictures_of_any_shape_make_one_number_of_patches(bounds: tuple[int, int], edge: int, tmp_path: Path) -> None:
    pixels = dict(zip(("shortest_edge", "longest_edge"), bounds, strict=True))
    stated = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2, "size": pixels}
    found = Preprocessor.load(folder_of(tmp_path, processor={**stated, **PLAIN}))
    assert found.image_size == (edge, edge)
    if edge < 448:
        made = found.images([halves(), halves(10, 30)])
        assert made["image_grid_thw"].tolist() == [[1, edge // 4, edge // 4]] * 2


def test_pictures_are_not_cut_into_tiles_of_a_number_that_depends_on_their_shape(tmp_path: Path) -> None:
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
    found = Preprocessor.load(
        folder_of(tmp_path, processor={"image_processor_type": "Idefics3ImageProcessor", **sizes, **PLAIN})
    )
    assert found.image_size == (16, 16)
    made = found.images([halves(), halves(10, 30)])
    assert made["pixel_values"].shape == (2, 1, 3, 16, 16)
    assert made["pixel_attention_mask"].all()
    tiled = {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 8}, "crop_size": 8}
    grid = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
    found = Preprocessor.load(folder_of(tmp_path, processor={**tiled, **grid, **PLAIN}))
    assert found.image_size == (8, 8)
    assert len({found.images([halves(*shape)])["pixel_values"].shape for shape in ((20, 10), (10, 30), (9, 9))}) == 1


def test_a_nested_processor_configuration_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    nested = {"processor_class": "CLIPProcessor", "image_processor": PROCESSORS["clip"]}
    (folder / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")
    assert Preprocessor.load(folder).image_size == (8, 8)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert open_picture(clear).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert open_picture(half).getpixel((0, 0)) == (255, 127, 127)
    assert open_picture(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 3)
    palette.putpalette([0, 0, 0] * 3 + [0, 255, 0])
    palette.save(tmp_path / "p.png", transparency=3)
    assert open_picture(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)
    palette.save(tmp_path / "q.png")
    assert open_picture(tmp_path / "q.png").getpixel((0, 0)) == (0, 255, 0)


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        (Image.new("L", (2, 2), 100), (100, 100, 100)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("I;16", (2, 2), 257 * 100), (100, 100, 100)),
        (Image.new("I", (2, 2), 257 * 100), (100, 100, 100)),
        (Image.new("I", (2, 2), 100), (100, 100, 100)),
        (Image.new("F", (2, 2), 0.5), (128, 128, 128)),
    ],
    ids=["gray", "one bit", "CMYK", "16 bit", "32 bit of 16", "32 bit of 8", "float"],
)
def test_every_mode_becomes_rgb(picture: Image.Image, colour: tuple[int, int, int]) -> None:
    assert open_picture(picture).getpixel((1, 1)) == colour


def test_a_rotated_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    halves(20, 10).save(tmp_path / "r.png", exif=exif)
    upright = open_picture(tmp_path / "r.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 0)) == (255, 0, 0)
    assert upright.getpixel((5, 19)) == (0, 0, 255)


def test_the_first_frame_of_an_animation_counts_wherever_it_stands(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)
    with Image.open(tmp_path / "a.gif") as opened:
        opened.seek(2)
        assert open_picture(opened).getpixel((0, 0)) == (255, 0, 0)


def test_a_file_that_does_not_decode_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(TaskError, match=r"cut\.jpg: does not decode as an image \(.*truncated"):
        open_picture(tmp_path / "cut.jpg")
    (tmp_path / "note.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(TaskError, match=r"note\.png: does not decode as an image \(no known image format\)"):
        open_picture(tmp_path / "note.png")
    with pytest.raises(TaskError, match=r"gone\.png: does not exist; expected an image file"):
        open_picture(str(tmp_path / "gone.png"))
    with pytest.raises(TaskError, match="does not decode"):
        open_picture(tmp_path)


def test_texts_are_padded_and_cut_as_asked(tmp_path: Path) -> None:
    config = {"model_type": "vilt", "max_position_embeddings": 6}
    made = Preprocessor.load(folder_of(tmp_path / "m", has_text=True, config=config))
    arrays = made.texts(["a red circle", "red"])
    assert arrays["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 6, 3, 0, 0]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.int64)}
    assert made.texts(["red"], length=6)["input_ids"].tolist() == [[2, 6, 3, 0, 0, 0]]
    assert made.texts(["red"], length=99)["input_ids"].shape == (1, 6)
    assert made.texts(["red " * 50])["input_ids"].tolist() == [[2, 6, 6, 6, 6, 3]]
    fixed = Preprocessor.load(made.folder, text_length=4)
    assert fixed.texts(["a"])["input_ids"].tolist() == [[2, 5, 3, 0]]


def test_a_model_trained_on_one_text_length_gets_it(tmp_path: Path) -> None:
    config = {"model_type": "siglip", "text_config": {"max_position_embeddings": 7}}
    made = Preprocessor.load(folder_of(tmp_path / "m", has_text=True, config=config))
    assert made.texts(["red"])["input_ids"].tolist() == [[2, 6, 3, 0, 0, 0, 0]]


def test_positions_behind_the_padding_are_not_counted_as_tokens(tmp_path: Path) -> None:
    text = {"model_type": "roberta", "max_position_embeddings": 8, "pad_token_id": 1}
    config = {"model_type": "vision-text-dual-encoder", "text_config": text}
    assert Preprocessor.load(folder_of(tmp_path / "m", has_text=True, config=config)).longest_text == 6


def test_either_half_of_a_processor_works_alone(tmp_path: Path) -> None:
    images = Preprocessor.load(folder_of(tmp_path / "images", processor=PROCESSORS["clip"]))
    assert not images.has_text
    assert images.images([halves()])["pixel_values"].shape == (1, 3, 8, 8)
    with pytest.raises(ModelError, match=r"images: has no tokenizer; expected one of tokenizer\.json"):
        images.texts(["red"])
    texts = Preprocessor.load(folder_of(tmp_path / "texts", has_text=True))
    assert texts.has_text
    assert texts.image_size is None
    with pytest.raises(ModelError, match=r"texts: has no image processor; expected preprocessor_config\.json"):
        texts.images([halves()])


def test_the_files_to_carry_are_those_that_preprocessing_reads(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", processor=PROCESSORS["clip"], has_text=True)
    (folder / "model.safetensors").write_bytes(b"")
    names = [path.name for path in Preprocessor.load(folder).files]
    assert sorted(names) == ["config.json", "preprocessor_config.json", "tokenizer_config.json", "vocab.txt"]


def test_bad_folders_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        Preprocessor.load(tmp_path / "nowhere")
    folder = folder_of(tmp_path / "m", processor=PROCESSORS["clip"], has_text=True)
    made = Preprocessor.load(folder)
    with pytest.raises(TaskError, match="images: there are none"):
        made.images([])
    with pytest.raises(TaskError, match="texts: there are none"):
        made.texts([])
    (folder / "preprocessor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: cannot be read as JSON"):
        Preprocessor.load(folder).images([halves()])
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Nonsense"}', encoding="utf-8")
    with pytest.raises(ModelError, match="its image processor cannot be built"):
        Preprocessor.load(folder).images([halves()])


def test_preprocessing_works_where_torch_is_not_installed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", processor=PROCESSORS["clip"], has_text=True)
    script = f"""
import importlib.abc, importlib.metadata, importlib.util, sys
class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "torch" else found(name, *rest)
sys.meta_path.insert(0, NoTorch())
from PIL import Image
from vlmopt.preprocess import Preprocessor
made = Preprocessor.load({str(folder)!r})
print(made.images([Image.new("RGB", (5, 4))])["pixel_values"].shape, made.texts(["red"])["input_ids"].shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 3, 8, 8) (1, 3)", done.stderr[-2000:]
