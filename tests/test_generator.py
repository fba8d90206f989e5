import itertools
import re

import numpy as np
import pytest

from dipper.cache import ColumnCache, n_selected, scan
from dipper.errors import ConfigError
from dipper.generator import KINDS, PHI, ScoreGenerator, _innovation_weights

MODELS = ("smollm2", "gemma3-270m", "qwen2.5-0.5b")


@pytest.fixture(scope="module")
def generator():
    return ScoreGenerator.load()


def hit_rate(scores, density, gamma, share, policy):
    n = scores.shape[1]
    k, cache = n_selected(density, n), ColumnCache(n, int(share * n), policy)
    scan(scores[:128], k, cache=cache, counted=False)
    scan(scores[128:], k, gamma, cache)
    return cache.hits / (cache.hits + cache.misses)


def test_fitted_on_three_models_or_on_one_alone(generator):
    assert sorted(generator.fitted_on) == sorted(MODELS)
    for model in MODELS:
        assert ScoreGenerator.load(variant=model).fitted_on == (model,)


def test_mean_lies_between_its_models(generator):
    variants = [ScoreGenerator.load(variant=model) for model in MODELS]
    for kind in KINDS:
        np.testing.assert_allclose(
            generator.tables[kind], np.mean([v.tables[kind] for v in variants], axis=0), atol=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_stream(generator, kind):
    one, same, other = (generator.region(kind, 0.4, 333, seed).scores(20) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("n_columns", [1, 7, 576, 70_000])
def test_calls_may_be_cut_anywhere(generator, n_columns):
    whole = generator.region("glu", 0.3, n_columns, seed=1).scores(23)
    stream = generator.region("glu", 0.3, n_columns, seed=1)
    parts = [stream.scores(n) for n in (1, 0, 3, 12, 7)]
    assert [len(part) for part in parts] == [1, 0, 3, 12, 7]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(("kind", "depth"), list(itertools.product(KINDS, (0.0, 0.37, 1.0))))
def test_scores_are_magnitudes_around_a_median_of_one(generator, kind, depth):
    scores = generator.region(kind, depth, 1000, seed=2).scores(200)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert (scores > 0).all()
    assert np.median(scores, axis=1) == pytest.approx(1.0, abs=0.25)
    # Half-normal inputs have their upper quartile at 1.7 medians; products of two have it further out.
    assert 1.6 < np.quantile(scores, 0.75) < 2.6
    assert 3.0 < np.quantile(scores, 0.98) < 20.0


def test_columns_differ_and_are_in_no_order(generator):
    scores = generator.region("input", 0.6, 2000, seed=3).scores(400)
    used = (scores > np.median(scores, axis=1, keepdims=True)).mean(axis=0)
    assert used.min() < 0.35
    assert used.max() > 0.85
    assert abs(np.corrcoef(used[1:], used[:-1])[0, 1]) < 0.1


def test_memory_is_short_and_in_the_middle_of_the_model(generator):
    def lag(depth, n_tokens):
        logs = np.log(generator.region("glu", depth, 2000, seed=4).scores(300))
        logs -= logs.mean(axis=0)
        return float((logs[n_tokens:] * logs[:-n_tokens]).mean() / (logs * logs).mean())

    assert lag(0.0, 1) < 0.05 < lag(0.5, 1) < 0.25
    assert lag(0.5, 16) < 0.03


@pytest.mark.parametrize("parts", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.25, 0.15), (0.45, 0.45)])
def test_innovation_weights_give_the_autocorrelation(parts):
    c_0, c = (weights.ravel() for weights in _innovation_weights(np.array(parts)[:, None]))
    lags = np.arange(400)
    response = sum(weight * phi ** (lags - 1.0) for weight, phi in zip(c, PHI, strict=True))
    response[0] = c_0[0]
    for lag in (0, 1, 2, 5, 20):
        wanted = 1.0 if lag == 0 else sum(part * phi**lag for part, phi in zip(parts, PHI, strict=True))
        assert response[lag:] @ response[: len(response) - lag] == pytest.approx(wanted, abs=1e-4)


def test_more_columns_do_not_change_hit_rates(generator):
    few, many = (generator.region("input", 0.5, n, seed=5).scores(256) for n in (600, 5120))
    for gamma in (1.0, 0.2):
        assert hit_rate(few, 0.5, gamma, 0.5, "lfu") == pytest.approx(hit_rate(many, 0.5, gamma, 0.5, "lfu"), abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gate", 0.5, 10), "kind 'gate' is unknown: choose input, glu"),
        (("glu", 1.5, 10), "depth is 1.5, outside [0, 1]: give layer / (layers - 1)"),
        (("glu", float("nan"), 10), "depth is nan, outside [0, 1]: give layer / (layers - 1)"),
        (("glu", 0.5, 0), "a region of 0 columns has no scores: at least 1 is needed"),
    ],
)
def test_refuses_what_is_no_region(generator, arguments, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        generator.region(*arguments, seed=0)


def test_refuses_an_unknown_variant():
    with pytest.raises(ConfigError, match=r"^variant 'phi' is unknown: choose .*smollm2"):
        ScoreGenerator.load(variant="phi")


def test_refuses_a_file_that_has_no_parameters(tmp_path):
    (tmp_path / "other.npz").write_bytes(b"something else")
    np.savez(tmp_path / "empty.npz", a=np.zeros(1))
    for name in ("absent.npz", "other.npz", "empty.npz"):
        with pytest.raises(ConfigError, match=rf"{name} has no generator's parameters \(.*fit_generator.py --write$"):
            ScoreGenerator.load(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "n_columns", "density", "gamma", "share", "policy", "wanted"),
    [
        ("input", 600, 0.5, 1.0, 0.5, "lru", 0.576),
        ("input", 600, 0.7, 0.5, 0.3, "lfu", 0.37),
        ("input", 600, 0.5, 0.2, 0.7, "lfu-decay", 0.99),
        ("glu", 1500, 0.5, 1.0, 0.3, "lfu", 0.394),
        ("glu", 1500, 0.5, 0.5, 0.5, "lru", 0.698),
        ("glu", 1500, 0.7, 0.2, 0.5, "lfu", 0.649),
    ],
)
def test_hit_rates_as_they_were_compared_with_real_models(
    generator, kind, n_columns, density, gamma, share, policy, wanted
):
    scores = generator.region(kind, 0.5, n_columns, seed=11).scores(384)
    assert hit_rate(scores, density, gamma, share, policy) == pytest.approx(wanted, abs=0.01)
