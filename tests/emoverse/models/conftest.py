"""Tiny models of both layouts, their sections of a config, and packed batches for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from emoverse.models.emoverse import EmoVerse, compose
from emoverse.models.internvl.checkpoint import build_native
from emoverse.models.internvl.released_config import new_config

CONTEXT = 96
TOKENS = 4  # visual tokens of a 56-pixel frame


def tiny(family: str, **changes: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vision_hidden": 32,
        "vision_layers": 2,
        "vision_heads": 2,
        "vision_mlp": 48,
        "image_size": 56,
        "hidden": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 4 if family == "phi3" else 2,
        "mlp": 80,
        "vocab": 97,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 2,
        "img_context_id": CONTEXT,
    }
    return new_config(family=family, **(sizes | changes))


def settings(
    preset: str = "paper",
    projector: str = "full",
    *,
    targets: Sequence[str] = (),
    dropout: float = 0.0,
    r: int = 8,
) -> Any:
    lora = SimpleNamespace(preset=preset, r=r, alpha=32, dropout=dropout, targets=tuple(targets))
    return SimpleNamespace(lora=lora, projector=projector, attention="auto", lean="auto")


def roughen(model: torch.nn.Module, seed: int = 5) -> None:
    """Random values everywhere, also where initialisation leaves zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator) * 0.08
            value.add_(noise.to(value.dtype))


@pytest.fixture(params=["phi3", "internlm2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config_json(family: str) -> dict[str, Any]:
    return tiny(family)


@pytest.fixture
def make_tiny() -> Callable[..., dict[str, Any]]:
    return tiny


@pytest.fixture
def make_settings() -> Callable[..., Any]:
    return settings


@pytest.fixture
def make_model(config_json: dict[str, Any]) -> Callable[..., EmoVerse]:
    """A tiny EmoVerse whose every parameter is random."""

    def make(train: str = "lora", **changes: Any) -> EmoVerse:
        native = build_native(config_json, seed=3)
        model = compose(native, config_json, settings(**changes), train=train, seed=4)
        roughen(model)
        return model

    return make


class Sample:
    """One example: ids with context tokens for its frames, the last `supervised` ids as answer."""

    def __init__(self, seed: int, *, words: int, frames: int, supervised: int, task: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(3, CONTEXT, (words,), generator=generator)
        context = torch.full((frames * TOKENS,), CONTEXT)
        self.ids = torch.cat((text[:2], context, text[2:]))
        self.pixels = torch.randint(
            *(0, 256, (frames, 56, 56, 3)), dtype=torch.uint8, generator=generator
        )
        self.supervised = supervised
        self.task = task


def packed(samples: Sequence[Sample], *, weight: Callable[[Sample], float] | None = None) -> Any:
    """What collate makes of the samples."""
    lengths = [len(sample.ids) for sample in samples]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    rows: list[Tensor] = []
    weights: list[Tensor] = []
    tasks: list[Tensor] = []
    for sample, end in zip(samples, ends[1:].tolist(), strict=True):
        count = sample.supervised
        rows.append(torch.arange(end - count - 1, end - 1))
        value = 1 / max(count, 1) if weight is None else weight(sample)
        weights.append(torch.full((count,), value))
        tasks.append(torch.full((count,), sample.task))
    ids = torch.cat([sample.ids for sample in samples])
    frames = torch.cat([sample.pixels for sample in samples])
    return SimpleNamespace(
        ids_T=ids,
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=ends.to(torch.int32),
        max_seqlen=max(lengths),
        pixels=frames if len(frames) else None,
        features=None,
        supervised_rows=torch.cat(rows),
        targets=ids[torch.cat(rows) + 1],
        row_weights=torch.cat(weights),
        task_of_row=torch.cat(tasks),
    )


@pytest.fixture
def samples() -> list[Sample]:
    shapes = [(9, 2, 3, 0), (30, 1, 1, 1), (11, 0, 4, 4), (8, 2, 5, 1), (31, 1, 2, 2)]
    return [
        Sample(seed, words=words, frames=frames, supervised=supervised, task=task)
        for seed, (words, frames, supervised, task) in enumerate(shapes)
    ]


@pytest.fixture
def make_sample() -> type[Sample]:
    return Sample


@pytest.fixture
def make_batch() -> Callable[..., Any]:
    return packed


@dataclass
class Pack:
    """A namespace batch with the engine's `to`."""

    values: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def to(self, device: torch.device) -> "Pack":
        return Pack(
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.values.items()}
        )


@pytest.fixture
def make_pack() -> Callable[[Any], Pack]:
    """A batch as the engine takes it."""
    return lambda batch: Pack(vars(batch))


@pytest.fixture(scope="session")
def original() -> ModuleType:
    """internvl/original.py, loaded by its path, because tests are not a package."""
    spec = spec_from_file_location("original", Path(__file__).parent / "internvl" / "original.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder_of(tmp_path: Path, original: ModuleType) -> Callable[[str], Path]:
    """`folder_of(family)`: a released folder of the original's random weights."""

    def make(family: str) -> Path:
        phi3 = family == "phi3"
        config = tiny(
            family,
            rope_scaling=original.rope_of(family),
            max_positions=32 * original.SWITCH if phi3 else original.SWITCH,
            rope_theta=1e4 if phi3 else 1e6,
        )
        config["llm_config"]["original_max_position_embeddings"] = original.SWITCH
        folder = tmp_path / family
        if not folder.exists():
            folder.mkdir()
            original.write_released(family, folder, config)
        return folder

    return make
