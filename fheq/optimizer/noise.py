"""Noise and cost of TFHE's operations, as concrete's optimizer models them.

Variances are relative to the torus: 1 is the whole ciphertext modulus, squared. Sources, in github.com/zama-ai/concrete:
`backends/concrete-cpu/noise-model/src/gaussian_noise/noise/{external_product_glwe,keyswitch_one_bit,modulus_switching}.rs`,
`compilers/concrete-optimizer/concrete-optimizer/src/{computing_cost/operators,optimization/decomposition,
noise_estimator/error.rs}` and `tools/parameter-curves` (Gaussian noise, 128 bits of security, by the lattice estimator).
The algorithms are those of Chillotti, Gama, Georgieva, Izabachène, "TFHE: Fast Fully Homomorphic Encryption over the Torus"
(J. Cryptology 2020), and the optimization that of Bergerat et al., "Parameter Optimization and Larger Precision for (T)FHE"
(J. Cryptology 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import erfc, sqrt
from statistics import NormalDist

import numpy as np

MODULUS_BITS = 64
FFT_BITS = 53
SECURITY_SLOPE, SECURITY_BIAS, SMALLEST_DIMENSION = -0.025696778711484593, 2.675931372549016, 450
LOWEST_LOG2_STD = 2.0 - MODULUS_BITS
FFT_WEIGHT = -2.57722494
GLWE_DIMENSIONS = range(1, 7)
LOG2_POLYNOMIAL_SIZES = range(8, 18)
LWE_DIMENSIONS = np.arange(512, 2048)
FREE_DIMENSIONS = np.arange(512, 1 << 14)  # of ciphertexts that meet no table
Q2 = 2.0 ** (-2 * MODULUS_BITS)


def secure_variance(dimension: np.ndarray | int) -> np.ndarray:
    """Variance of a fresh encryption under a binary key of `dimension` coefficients; above 1 where none is secure."""
    dimension = np.asarray(dimension, np.float64)
    log2_std = np.maximum(SECURITY_SLOPE * dimension + SECURITY_BIAS, LOWEST_LOG2_STD)
    return np.exp2(2 * np.where(dimension >= SMALLEST_DIMENSION, log2_std, MODULUS_BITS))


def quantile(p_error: float) -> float:
    """kappa: a centred normal of deviation 1 leaves [-kappa, kappa] with probability p_error."""
    return -NormalDist().inv_cdf(p_error / 2)


def failure(variance: float, bound: float, kappa: float) -> float:
    """Probability that noise of a variance leaves the cell whose bound at `kappa` is given."""
    return erfc(kappa * sqrt(bound / variance) / sqrt(2)) if variance > 0 else 0.0


def variance_bound(precision: int, kappa: float) -> float:
    """Largest variance with which a message of `precision` bits and one of padding is read right."""
    return float((2.0 ** (-2 - precision) / kappa) ** 2)


def modulus_switch_variance(dimension: np.ndarray, log2_size: np.ndarray) -> np.ndarray:
    """Noise of the switch from the ciphertext modulus to twice the polynomial's size."""
    return (1 / 12 + dimension / 24) / np.exp2(2.0 * (log2_size + 1)) + Q2 * (dimension / 48 - 1 / 12)


def cmux_variance(k: int, size: int, log2_base: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Noise of one external product, its FFT included; a blind rotation adds one per coefficient of the small key."""
    base, b2l = np.exp2(log2_base), np.exp2(2.0 * np.minimum(log2_base * level, MODULUS_BITS))
    key = level * (k + 1) * size * (base**2 + 2) / 12 * secure_variance(k * size)
    decomposition = (2.0 ** (2 * MODULUS_BITS) - b2l) / (24 * b2l) * Q2 * (1 + k * size / 2)
    rest = Q2 * (k * size / 32 + (1 - k * size) ** 2 / 64)
    lost = 2.0 ** (2 * (MODULUS_BITS - FFT_BITS))
    fft = Q2 * 2.0**FFT_WEIGHT * lost * level * base**2 * float(size) ** 2 * (k + 1)
    return key + decomposition + rest + fft


def cmux_cost(k: int, size: int, level: np.ndarray) -> np.ndarray:
    """Operations of one external product: transforms of the decomposition, products, transforms back."""
    transform = size * np.log2(size) + size
    return (k + 1) * level * transform + (k + 1) * transform + (k + 1) ** 2 * level * size


def keyswitch_variance(log2_base: np.ndarray, level: np.ndarray, dimension: np.ndarray) -> np.ndarray:
    """Noise of a key switch to `dimension`, per coefficient of the key that it leaves."""
    base, b2l = np.exp2(log2_base), np.exp2(2.0 * np.minimum(log2_base * level, MODULUS_BITS))
    decomposition = (2.0 ** (2 * MODULUS_BITS) / (12 * b2l) - 1 / 12) * Q2 / 2
    return decomposition + Q2 / 16 + level * secure_variance(dimension) * (base**2 + 2) / 12


def keyswitch_cost(source: np.ndarray, dimension: np.ndarray, level: np.ndarray | int) -> np.ndarray:
    """Operations of a key switch from `source` to `dimension` coefficients."""
    return source * level * (2 * dimension + 3) - dimension


@dataclass(frozen=True, eq=False)
class Glwe:
    """All pairs (k, log2 N), and for each the useful blind rotations by level: cost and variance per external product.

    Entries that another level dominates have infinite variance.
    """

    k: np.ndarray
    log2_size: np.ndarray
    fresh: np.ndarray
    cost: np.ndarray
    variance: np.ndarray

    @property
    def dimension(self) -> np.ndarray:
        """Coefficients of the key, k N."""
        return self.k << self.log2_size


@lru_cache(maxsize=1)
def glwe_table() -> Glwe:
    """The search space of bootstraps."""
    pairs = [(k, s) for k in GLWE_DIMENSIONS for s in LOG2_POLYNOMIAL_SIZES if k << s >= SMALLEST_DIMENSION]
    k, log2_size = np.array(pairs).T
    bases, levels = np.arange(1, MODULUS_BITS + 1)[:, None], _levels()[None, :]
    allowed = bases * levels <= MODULUS_BITS
    rows = [np.where(allowed, cmux_variance(a, 1 << s, bases, levels), np.inf).min(0) for a, s in pairs]
    variance = _pareto(np.array(rows))
    cost = np.array([cmux_cost(a, 1 << s, _levels()) for a, s in pairs])
    return Glwe(k, log2_size, secure_variance(k << log2_size), cost, variance)


def keyswitch_table(dimension: np.ndarray) -> np.ndarray:
    """Variance of key switches to each dimension by level, per coefficient; infinite where another level dominates."""
    bases, levels = np.arange(1, MODULUS_BITS + 1)[:, None], keyswitch_levels()[None, :]
    base = np.where(bases * levels <= MODULUS_BITS, bases, np.nan)
    variance = keyswitch_variance(base, levels, np.asarray(dimension).reshape(-1, 1, 1))
    return _pareto(np.nanmin(variance, axis=1))


def keyswitch_levels() -> np.ndarray:
    """The levels of `keyswitch_table`'s columns."""
    return np.arange(1, 21)


@lru_cache(maxsize=1)
def small_keyswitch_table() -> np.ndarray:
    """`keyswitch_table` of every small key dimension."""
    return np.concatenate([keyswitch_table(part) for part in np.array_split(LWE_DIMENSIONS, 16)])


def _levels() -> np.ndarray:
    return np.arange(1, 17)


def _pareto(variance: np.ndarray) -> np.ndarray:
    best = np.minimum.accumulate(variance, axis=1)
    before = np.concatenate([np.full((len(best), 1), np.inf), best[:, :-1]], axis=1)
    return np.where(variance < before, variance, np.inf)


@lru_cache(maxsize=1)
def large_keyswitch_table() -> np.ndarray:
    """`keyswitch_table` of the keys of `glwe_table`."""
    return keyswitch_table(glwe_table().dimension)
