"""Weight files that are incomplete, ambiguous or of another type are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emoverse.models.internvl.checkpoint import build_native, export_checkpoint, import_checkpoint


def test_both_kinds_of_weights_at_once_are_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("internlm2")
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds both model.safetensors and .*index.json"):
        import_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not the index of a sharded checkpoint"),
        ("[]", "is not the index of a sharded checkpoint"),
        ('{"weight_map": {}}', "must name files beside it, found none"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "must name files beside it, found"),
    ],
)
def test_a_broken_index_is_refused(
    text: str, message: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("internlm2")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder)


def test_quantised_weights_are_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("phi3")
    state = load_file(folder / "model.safetensors")
    state["mlp1.1.weight"] = state["mlp1.1.weight"].to(torch.int8)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"mlp1.1.weight is stored as I8, but weights must be"):
        import_checkpoint(folder)


def test_refuses_pickles_and_gaps(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model.bin\)"):
        import_checkpoint(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        import_checkpoint(folder)


def test_refuses_a_torn_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        import_checkpoint(folder)


def test_refuses_a_wrong_index(tmp_path: Path, config_json: dict[str, Any]) -> None:
    model = build_native(config_json)
    export_checkpoint(model, config_json, tmp_path, None, shard_bytes=60_000)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name = index["weight_map"].pop("mlp1.0.weight")
    index_path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="0 missing, 1 unlisted"):
        import_checkpoint(tmp_path)
    index["weight_map"]["mlp1.0.weight"] = name
    # The same tensor once more, in a shard that the index does not name for it.
    other = next(file for file in index["weight_map"].values() if file != name)
    index_path.write_text(json.dumps(index))
    twice = load_file(tmp_path / other)
    save_file(twice | {"mlp1.0.weight": torch.zeros(128)}, tmp_path / other)
    with pytest.raises(ValueError, match=rf"{other} does not hold .* 0 missing, 1 unlisted"):
        import_checkpoint(tmp_path)
    save_file(twice, tmp_path / other)
    import_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="listed in the index but missing"):
        import_checkpoint(tmp_path)
