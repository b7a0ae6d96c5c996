"""Requests for `fragmentation.py`: sizes in pages of 4 KiB, and lifetimes, drawn from a seed. Each mix says where it comes from.

Lifetimes have no unit: whoever replays them lets time run as fast as the wanted load demands, so only their spread counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SIZE_MAX = 8192  # pages: 32 MiB, a thirty-second of the area
PHASES = 20
DRAINED = 0.5  # of what is held, at the end of a phase

# width × height × bytes a pixel, in pages: what cameras and decoders ask for
FRAME_NV12_1080 = -(-1920 * 1080 * 3 // 2 // 4096)
FRAME_RGBA_1080 = -(-1920 * 1080 * 4 // 4096)
FRAME_RGBA_2160 = -(-3840 * 2160 * 4 // 4096)

Sizes = npt.NDArray[np.int64]
Lives = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Requests:
    """In order. Before those in `drains`, half of what is held ends at once."""

    sizes: Sizes
    lives: Lives
    drains: frozenset[int] = frozenset()


def power_law(rng: np.random.Generator, count: int) -> Requests:
    """Sizes with P(size > x) ~ 1/x, from a page up: files and messages are that heavy-tailed (Crovella and Bestavros 1997). Exponential lifetimes, as
    in Knuth's analysis of first fit (TAOCP 1, 2.5).
    """
    return Requests(_bounded_pareto(rng, count, 1.0, 1, SIZE_MAX), rng.exponential(1.0, count))


def frames(rng: np.random.Generator, count: int) -> Requests:
    """Video frames of three formats, which live for the depth of a queue, between batches of 16 to 256 pages for inference that live
    exponentially and longer: GCMA's own case, a camera beside other users. Bimodal, few distinct sizes: what Wilson et al. (1995) found in
    real programs.
    """
    formats = np.array([FRAME_NV12_1080, FRAME_RGBA_1080, FRAME_RGBA_2160])
    is_frame = rng.random(count) < 0.3
    sizes = np.where(is_frame, rng.choice(formats, count, p=[0.5, 0.35, 0.15]), 1 << rng.integers(4, 9, count))
    lives = np.where(is_frame, rng.normal(1.0, 0.1, count).clip(0.5), rng.exponential(3.0, count))
    return Requests(sizes, lives)


def heavy_tail(rng: np.random.Generator, count: int) -> Requests:
    """Lognormal sizes around 64 KiB, and lifetimes with P(life > t) ~ 1/t, as of processes (Harchol-Balter and Downey 1997): most buffers go at once, a few
    stay for almost ever and lie in the way.
    """
    sizes = np.exp(rng.normal(np.log(16), 1.8, count)).astype(np.int64).clip(1, SIZE_MAX)
    return Requests(sizes, rng.pareto(1.1, count) + 1)


def phases(rng: np.random.Generator, count: int) -> Requests:
    """Small buffers and large ones take turns, twenty times, and each phase ends with half of what is held given up: ramps and
    peaks, which defeat placements that look good under a steady mix (Wilson et al. 1995).
    """
    phase = np.arange(count) * PHASES // count
    small = _bounded_pareto(rng, count, 1.2, 1, 64)
    large = _bounded_pareto(rng, count, 0.8, 64, SIZE_MAX)
    sizes = np.where(phase % 2 == 0, small, large)
    return Requests(sizes, rng.exponential(1.0, count), frozenset(np.flatnonzero(np.diff(phase)).tolist()))


def _bounded_pareto(rng: np.random.Generator, count: int, alpha: float, low: int, high: int) -> Sizes:
    least, most = float(low) ** -alpha, float(high + 1) ** -alpha
    sizes = (least - rng.random(count) * (least - most)) ** (-1 / alpha)
    clipped: Sizes = sizes.astype(np.int64).clip(low, high)
    return clipped


MIXES: dict[str, Callable[[np.random.Generator, int], Requests]] = {
    "power law": power_law,
    "frames and batches": frames,
    "heavy tail": heavy_tail,
    "phases": phases,
}
