"""Random numbers: pure functions, fixed for ever, uniform, and independent in every direction."""

import math

import numpy as np
import pytest
from scipy import stats

from common import rng
from common.rng import uniforms


def test_uniforms_are_a_pure_function_of_their_arguments():
    whole = uniforms(3, 7, [4, 9, 2, 9], 1, 40)
    assert whole.shape == (4, 40) and whole.dtype == np.float64
    assert np.array_equal(whole[1], whole[3])
    assert np.array_equal(uniforms(3, 7, np.array([2]), 1, 40)[0], whole[2])
    assert np.array_equal(uniforms(3, 7, [4, 9, 2, 9], 1, 5), whole[:, :5])  # asking for more changes none
    for seed, epoch, stream in ((4, 7, 1), (3, 8, 1), (3, 7, 2), (7, 3, 1)):
        assert not np.isin(uniforms(seed, epoch, [4, 9, 2], stream, 40), whole).any()
    assert uniforms(0, 0, [], 0, 3).shape == (0, 3)


def test_numbers_never_change():
    """Resumed runs, and comparisons between versions, rely on them."""
    assert uniforms(0, 0, [0], 0, 1)[0, 0] == 0.7383342515493277
    assert uniforms(1, 2, [3], 4, 6)[0, 5] == 0.8298562645235117
    assert uniforms(2**40 + 1, 999, [1_281_166], 101, 36)[0, 35] == 0.2410831801458766
    assert rng.seeds(3, 4, 2) == [int(u * 2**53) for u in uniforms(3, 4, [0], rng.SCRIPT, 2)[0]]
    assert rng.permutation(1, 2, 7).tolist() == [6, 0, 4, 5, 2, 3, 1]


def test_streams_that_meet_in_one_run_differ():
    fake = [rng.TINT, rng.NOISE]
    pretraining = [*range(rng.VIEWS, rng.VIEWS + 64), *fake, rng.SCRIPT, rng.DROPOUT]
    finetuning = [rng.VIEWS, *fake, rng.LABELLED, rng.LARGER, rng.ERASE, rng.PATHS, rng.MIXING]
    features = [*fake, rng.PICTURES]
    low_shot = [*fake, *range(rng.SHOTS, rng.SHOTS + 1000)]
    for streams in (pretraining, finetuning, features, low_shot):
        assert len(streams) == len(set(streams))


def test_uniforms_fill_the_unit_interval():
    u = uniforms(0, 0, range(20_000), 0, 8)
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == u.size
    assert abs(u.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / u.size)
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / u.size)
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3


INDEX = np.arange(1, 40_001)
NEIGHBOURS = {  # of column 0 of uniforms(0, 0, INDEX, 0, 1): seed, epoch, index, stream and column
    "index": (0, 0, INDEX + 1, 0, 0),
    "index far": (0, 0, INDEX + 2**32, 0, 0),
    "epoch": (0, 1, INDEX, 0, 0),
    "stream": (0, 0, INDEX, 1, 0),
    "seed": (1, 0, INDEX, 0, 0),
    "column": (0, 0, INDEX, 0, 1),
    "epoch and index": (0, 1, INDEX - 1, 0, 0),
    "index and column": (0, 0, INDEX - 1, 0, 1),
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_neighbouring_uniforms_are_independent(neighbour):
    *where, column = NEIGHBOURS[neighbour]
    a, b = uniforms(0, 0, INDEX, 0, 1)[:, 0], uniforms(*where, 2)[:, column]
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))
    cells, _, _ = np.histogram2d(a, b, bins=16, range=[[0, 1], [0, 1]])
    assert 1e-3 < stats.chisquare(cells.ravel()).pvalue < 1 - 1e-3
    low_a, low_b = ((x * 2**53).astype(np.int64) % 16 for x in (a, b))  # the lowest bits are as good as the highest
    cells = np.bincount(16 * low_a + low_b, minlength=256)
    assert 1e-3 < stats.chisquare(cells).pvalue < 1 - 1e-3


def test_uniforms_of_consecutive_epochs_and_seeds_are_independent():
    """One sample over 1,500 epochs, streams and seeds, as a chain."""
    for axis in range(3):
        where = [[i if k == axis else 0 for k in range(3)] for i in range(1500)]
        chain = np.concatenate([uniforms(seed, epoch, [17], stream, 1)[0] for seed, epoch, stream in where])
        assert abs(np.corrcoef(chain[:-1], chain[1:])[0, 1]) < 4 / math.sqrt(1500)
        assert stats.kstest(chain, "uniform").pvalue > 1e-3
