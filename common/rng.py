"""Random numbers as pure functions: what happens to a sample never depends on the process, the worker or the past."""

import numpy as np

# Who draws from which stream. Two uses may share a number only if they never meet in one run. The views of a sample
# are streams 0, 1, 2 ...; what a script draws for itself begins at SCRIPT.
VIEWS = 0
TINT, NOISE = 98, 99  # the fake data set
SCRIPT = 100  # masks, negatives, orders and seeds of a pre-training script
DROPOUT, PICTURES = 101, 101
LABELLED, LARGER, ERASE, PATHS = 100, 101, 102, 103  # fine-tuning: its draw of labels, erasing, drop path
SHOTS = 100  # low-shot samples, one stream per class from here on
MIXING = 2**40  # mixup and CutMix, by step, for a generator of NumPy

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x):
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit flips half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed, epoch, index, stream, n):
    """(len(index), n) float64 numbers in [0, 1), a pure function of its arguments: row i belongs to index[i]."""
    state = np.zeros(1, np.uint64)
    for part in (seed, epoch, stream):
        state = _mix(state + _GOLDEN + np.array([part]).astype(np.uint64))
    state = _mix(_mix(state + np.asarray(index).astype(np.uint64)) + _GOLDEN)
    bits = _mix(state[:, None] + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def seeds(seed, epoch, n, stream=SCRIPT):
    """n integers below 2^53, to seed other generators with: the same on every process."""
    return (uniforms(seed, epoch, [0], stream, n)[0] * 2**53).astype(np.int64).tolist()


def normals(u):
    """Uniforms (B, 2 n) -> (B, 2 n) independent standard normal numbers (Box & Muller 1958)."""
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, 0::2])), 2 * np.pi * u[:, 1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def permutation(seed, epoch, n):
    """An order of n samples (n,), the same on every process."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
