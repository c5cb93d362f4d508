"""Closed forms: ridge, folds, clustered means, similarity."""

from __future__ import annotations

import math

import pytest
import torch

from vlmopt.core.program import Similarity
from vlmopt.graph.clusters import clustered
from vlmopt.graph.ridge import FOLDS, STRENGTHS, fit_ridge, fold_numbers
from vlmopt.graph.similarity import class_embeddings, normalized, similarity_logits


def data(n: int, *, noise: float, d: int = 6, k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(k, d, generator=generator, dtype=torch.float64)
    return x, weight, x @ weight.T + 2.0 + noise * torch.randn(n, k, generator=generator, dtype=torch.float64)


def each_alone(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def test_ridge_recovers_a_known_map_and_its_intercept() -> None:
    x, weight, y = data(200, noise=0.0)
    fit = fit_ridge(x, y, each_alone(200))
    assert fit.strength == STRENGTHS[0]
    assert float((fit.weight - weight).abs().max()) < 1e-4
    assert float((fit.bias - 2.0).abs().max()) < 1e-4
    assert float((fit.held_out - y).abs().max()) < 1e-3


def test_noise_asks_for_more_strength_and_pure_noise_for_a_map_near_zero() -> None:
    clean, noisy = (fit_ridge(x, y, each_alone(12)) for x, _, y in (data(12, noise=0.01), data(12, noise=4.0)))
    assert clean.strength < noisy.strength
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 30, generator=generator), torch.randn(40, 2, generator=generator)
    fit = fit_ridge(x, y, each_alone(40))
    assert fit.strength >= 1.0
    assert float(fit.weight.norm()) < 0.3 * float(torch.linalg.lstsq(x, y).solution.norm())


def test_the_intercept_is_not_penalised() -> None:
    x, _, y = data(30, noise=4.0)
    shifted = fit_ridge(x, y + 1000.0, each_alone(30))
    plain = fit_ridge(x, y, each_alone(30))
    assert float((shifted.bias - plain.bias - 1000.0).abs().max()) < 1e-6


def test_a_prior_is_returned_where_the_data_say_nothing_and_overruled_where_they_do() -> None:
    x, weight, y = data(200, noise=0.0)
    wrong = -weight
    assert float((fit_ridge(x, y, each_alone(200), prior=wrong).weight - weight).abs().max()) < 1e-3
    few_x, _, few_y = data(4, noise=0.5)
    near = fit_ridge(few_x, few_y, each_alone(4), prior=weight).weight
    far = fit_ridge(few_x, few_y, each_alone(4)).weight
    assert float((near - weight).norm()) < 0.5 * float((far - weight).norm())


def test_rows_of_a_group_are_never_split_and_all_folds_are_used() -> None:
    groups = [str(i // 4) for i in range(60)]
    folds = fold_numbers(groups, seed=1)
    for group in set(groups):
        assert len({int(f) for f, g in zip(folds, groups, strict=True) if g == group}) == 1
    assert sorted(set(folds.tolist())) == list(range(FOLDS))
    assert torch.equal(folds, fold_numbers(groups, seed=1))
    assert not torch.equal(folds, fold_numbers(groups, seed=2))
    assert max(folds.bincount()) == 12
    assert sorted(set(fold_numbers(["a", "a", "b"]).tolist())) == [0, 1]


def test_held_out_rows_are_predicted_by_fits_that_did_not_see_their_group() -> None:
    """Targets that only the group knows cannot be predicted from outside the group."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    secrets = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    x, y = centres.repeat_interleave(4, 0), secrets.repeat_interleave(4, 0)
    groups = [str(i // 4) for i in range(80)]
    honest = fit_ridge(x, y, groups)
    leaking = fit_ridge(x, y, each_alone(80))
    errors = [float(((fit.held_out - y) ** 2).mean() / y.var()) for fit in (honest, leaking)]
    assert errors[0] > 0.7
    assert errors[1] < 0.1


def test_the_error_of_a_clustered_mean_is_that_of_the_cluster_means() -> None:
    values = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    mean, error = clustered(values, ["a", "a", "b", "b", "c", "c"])
    assert mean == pytest.approx(2 / 3)
    assert error == pytest.approx(1 / 3)  # three observations 1, 0, 1: sd / sqrt(3)
    alone = clustered(values, each_alone(6))[1]
    assert alone == pytest.approx(math.sqrt(6 * (2 / 9) / 5 / 6))
    assert alone < error
    assert math.isnan(clustered(values, ["a"] * 6)[1])


def test_class_embeddings_average_unit_vectors_class_by_class() -> None:
    prompts = torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 0.0], [1.0, 0.0]])
    made = class_embeddings(prompts, 2)
    half = 1 / math.sqrt(2)
    assert torch.allclose(made, torch.tensor([[half, half], [1.0, 0.0]]))
    assert torch.equal(class_embeddings(prompts, 4), normalized(prompts))


def test_similarity_is_scaled_cosine_and_bias() -> None:
    images, texts = torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0], [0.0, -2.0]])
    logits = similarity_logits(images, texts, Similarity(10.0, -1.0))
    assert torch.allclose(logits, torch.tensor([[5.0, -9.0]]))
