"""The 64-bit mixing function that hashes and random draws on the host use."""

import numpy as np


def splitmix64(values: np.ndarray) -> np.ndarray:
    """uint64 -> same: every input bit stirred into every output bit, and no two values into one (the finalizer of
    SplitMix64: Steele, Lea and Flood, 2014). Arithmetic wraps."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
