"""Adapters at real size have as many parameters as the papers say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.benchmarks import counts
from vlmopt.graph.adapters import AdapterForm, AdapterKind
from vlmopt.graph.example import ResidualBlocks, program_of


@pytest.mark.parametrize(("has_norm", "wanted"), [(False, 148_320), (True, 149_856)])
def test_an_adapter_of_rank_96_at_width_768_has_the_papers_count(*, has_norm: bool, wanted: int) -> None:
    program = program_of(ResidualBlocks(blocks=1, width=768), torch.ones(2, 768))
    options = {"rank": 96, "with_norm": has_norm}
    assert counts.n_parameters(program, {"insert-adaptation-adapter": options}) == wanted


@pytest.mark.slow
def test_a_single_stream_model_has_the_papers_counts() -> None:
    assert counts.single_stream_counts() == {
        "adapter_r96": 148_320,
        "adapter_r96_with_norm": 149_856,
        "vilt_24_adapters": 3_559_680,
        "skip_adapter_r192": 295_872,
        "vilt_one_layer_skipped": 22 * 148_320 + 295_872,
    }


@pytest.mark.slow
def test_a_model_of_two_streams_has_the_papers_counts() -> None:
    found = counts.two_stream_counts()
    assert found["meter_36_adapters"] == 5_339_520
    # A skip adapter of rank 288 is as large as the three adapters that it replaces, but for two output biases.
    assert found["meter_4_skipped"] == 5_339_520 - 4 * 2 * 768


@pytest.mark.slow
def test_a_decoder_of_seven_billion_parameters_has_the_papers_counts() -> None:
    found = counts.decoder_counts()
    assert found["llava_64_adapters"] == 33_820_672  # published as 33.8 M
    assert found["llava_4_skipped"] == 37_999_104  # about 38.0 M


@pytest.mark.slow
def test_routed_adapters_have_the_published_totals() -> None:
    assert counts.routed_counts() == {
        "lavin_0_skipped": 3_781_296,
        "lavin_2_skipped": 4_174_560,
        "lavin_4_skipped": 4_567_824,
        "lavin_6_skipped": 4_961_088,
    }


@pytest.mark.parametrize(("width", "rank"), [(4096, 8), (4096, 32), (1024, 8)])
def test_a_routed_adapter_counts_the_convolutions_of_the_released_code(width: int, rank: int) -> None:
    parts = [
        nn.Conv1d(width, rank, 1, device="meta"),
        nn.Conv1d(rank, width, 1, groups=2, device="meta"),
        nn.Conv1d(rank, width, 1, groups=2, device="meta"),
        nn.Linear(width, 2, device="meta"),
    ]
    counted = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert AdapterForm(AdapterKind.ROUTED, rank).parameters(width) == counted
