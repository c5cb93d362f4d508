"""Models whose features of images follow from more than pixels are refused with what they need, and what to take."""

from __future__ import annotations

import pytest

from tests.benchmarks import families
from tests.capture.test_generative import source_of
from vlmopt.capture import capture_model
from vlmopt.core.errors import CaptureError

NEEDS = {
    "instructblip": ("needs qformer_input_ids beside the pixels", "depends on the prompt", "BLIP-2 for InstructBLIP"),
    "mistral3": ("needs image_sizes beside the pixels", "of images of one size alone", "take a model with one image"),
    "lfm2_vl": ("needs pixel_attention_mask and spatial_shapes beside the pixels", "one size alone", "take a model"),
    "llama4": ("projects them for its decoder later", "with pooler_output", "take another model"),
    "blip2_t5": ("from the states of an encoder", "encoder and decoder of BART or BLIP", "BLIP-2 with OPT"),
}


@pytest.mark.parametrize("family", NEEDS)
def test_a_refusal_says_what_is_found_what_is_expected_and_what_to_do(family: str) -> None:
    model = families.make(family)
    with pytest.raises(CaptureError) as caught:
        capture_model(model, source_of(model), image=families.IMAGE_SIZES.get(family))  # type: ignore[arg-type]
    line = str(caught.value)
    found, expected, remedy = NEEDS[family]
    assert found in caught.value.found
    assert expected in f"{caught.value.found}; {caught.value.expected}"
    assert remedy in caught.value.remedy
    assert type(model).__name__ in line
    assert "torch.export stopped" not in line


def test_a_model_of_videos_is_refused() -> None:
    from transformers import GitConfig, GitForCausalLM

    config = families.make("git").config
    made = GitForCausalLM(GitConfig(**{**config.to_dict(), "num_image_with_embedding": 6}))  # type: ignore[union-attr, arg-type]
    with pytest.raises(CaptureError, match="is 6: the model reads the frames of a video"):
        capture_model(made, source_of(made))
