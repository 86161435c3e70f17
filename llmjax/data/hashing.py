"""64-bit mixing functions for hashes and random draws on the host. Arithmetic wraps."""

import numpy as np

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, odd: the step of SplitMix64's counter


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Map uint64 to uint64 one to one, so that every input bit changes about half of the output bits.

    The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash64(index: np.ndarray, key: np.uint64 | np.ndarray) -> np.ndarray:
    """Output number `index` of the SplitMix64 generator with seed `key`: uint64 of the broadcast shape."""
    return splitmix64(index * np.uint64(GOLDEN_GAMMA) + key)
