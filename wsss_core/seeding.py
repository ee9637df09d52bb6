"""Seeds as pure functions: of the run and the stage, or of the epoch and the photo.

No global generator is touched.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every part, the same on every machine.

    A stage's seed is `derive_seed(run_seed, stage_name)`: the round is not in it, so every arm of a
    study and every round sees the same batches.
    """
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *parts: str | int) -> np.random.Generator:
    """A fresh generator for one photo in one epoch, or any other named purpose."""
    return np.random.default_rng(derive_seed(seed, *parts))


def torch_generator(seed: int, *parts: str | int) -> torch.Generator:
    """A fresh CPU generator, for weight initialisation and permutations."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))
