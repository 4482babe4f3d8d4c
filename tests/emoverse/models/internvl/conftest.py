"""A released folder of a random model."""

from pathlib import Path
from typing import Any

import pytest

from emoverse.models.internvl.checkpoint import build_native, export_checkpoint


@pytest.fixture
def folder(tmp_path: Path, config_json: dict[str, Any]) -> Path:
    """An exported random model in fp32."""
    export_checkpoint(build_native(config_json, seed=1), config_json, tmp_path / "base", None)
    return tmp_path / "base"
