"""Seeds of the environments of a run."""

from __future__ import annotations

from enum import IntEnum

# Runs have fewer environments than this.
SEEDS_APART = 1000
# Some environments take 32-bit seeds only.
SEED_LIMIT = 2**30


class Purpose(IntEnum):
    """What environments are for, as a distance between their seeds."""

    TRAINING = 0
    INTERIM_EVALUATION = 100_000
    FINAL_EVALUATION = 200_000
    INSPECTION = 300_000
    DEMONSTRATION = 400_000


def environment_seed(seed: int, purpose: Purpose) -> int:
    """Seed of the first environment; the others have the numbers after it.

    Stable-Baselines3 seeds environment i with `seed + i`, which would give runs of neighbouring seeds nearly the same
    episodes: their mean would then be no more certain than that of one run.

    Args:
        seed: of the run.
        purpose: each has episodes of its own.
    """
    return (seed * SEEDS_APART + purpose) % SEED_LIMIT
