"""The real annotation files, which are not part of this repository, and stand-ins for clips."""

import functools
from pathlib import Path

import numpy as np
import pytest

from data_shards.media.video import encode_mp4

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


@functools.cache
def tiny_clip(frames: int = 3, level: int = 90) -> bytes:
    """An mp4 of `frames` grey pictures, 32 x 32 at 10 frames per second."""
    rgb = np.full((frames, 32, 32, 3), level, np.uint8)
    rgb[:, ::4] = np.arange(frames, dtype=np.uint8).reshape(-1, 1, 1, 1) * 7
    return encode_mp4(rgb, fps=10)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with MELD, ECF1, ECF2 and MOSEI; the tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real annotation files in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def clip_bytes() -> bytes:
    return tiny_clip()
