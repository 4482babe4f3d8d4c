"""Pretraining of the nano base from scratch: a small InternVL2 aligned on generic pairs.

In: a PretrainConfig. Out: a folder in InternVL2's released layout with tokenizer, provenance and
the figures of its gates. Four phases: `look` (the vision tower alone classifies visible signs),
`basics` (all modules on captions of single faces and word lists to repeat), `align` (all modules on
the mixture of image-text, video-text and text-only pairs) and `talk` (who said what). The base is
never trained on the five tasks. Only this program trains all parameters; the stages train the
projector and LoRA.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from data_shards.files import write_atomically
from data_shards.progress import format_duration
from data_shards.tasks import TASKS
from data_shards.world import pairs
from data_shards.world.describe import SIGNS, VISIBLE_FROM
from emoverse.config.deepspeed_settings import deepspeed_config
from emoverse.config.schema import to_yaml
from emoverse.data.collate import Batch, FrameShape, collate, zero_example
from emoverse.data.encode import EncodeOptions
from emoverse.data.tokenizer import Tokenizer
from emoverse.engine.deepspeed_engine import Engine, start_process_group
from emoverse.engine.distributed import World, gather_rows, shutdown
from emoverse.engine.optim import lr_factor
from emoverse.engine.step_types import Packs, StepResult
from emoverse.loss import LossMode, StepOutput
from emoverse.models.emoverse import EmoVerse, compose
from emoverse.models.internvl.checkpoint import build_native, export_checkpoint, import_checkpoint
from emoverse.models.internvl.released_config import new_config, read_config_json
from emoverse.nano.gates import check_gates, measure_gates
from emoverse.nano.pretrain_config import Phase, PretrainConfig
from emoverse.nano.pretrain_data import encode_generic, pair_options, world_texts
from emoverse.nano.train_tokenizer import train_tokenizer

# Streams of random numbers of one seed; the corpus draws from other streams (sources/synthetic.py).
_STREAM = {"look": 102, "basics": 104, "align": 103, "talk": 105}
# The loss of a step has five slots, in the order of TASKS; pretraining counts these kinds in them.
_SLOT_NAMES = ("image", "video", "dialogue", "repeat", "turns")
_UNITS = tuple(SIGNS)
_LOG_EVERY = 50  # steps
_LOSSES = "losses.json"  # from rank 0 to the parent, removed at the end
_PROGRESS = "progress.json"  # exists from the first stored part until the gates are passed
_PARTS = ("new", "talk")
_ALIGNED = "aligned"  # the base after the first part; the second part only reads it

# (generator, count) -> one pack of `count` examples, and the weight of its loss in the step.
Draw = Callable[[np.random.Generator, int], tuple[Packs, float]]


# Phase 1: look ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pictures:
    """Frames [F, H, W, 3] uint8, and the signs that each shows [F, signs], 0 or 1."""

    pixels: Tensor
    signs: Tensor

    def to(self, device: torch.device) -> "_Pictures":
        return replace(self, pixels=self.pixels.to(device), signs=self.signs.to(device))


class _Looker(nn.Module):
    """The vision tower with one linear classifier over all visual tokens of a frame."""

    def __init__(self, model: EmoVerse) -> None:
        super().__init__()
        self._see = model.vision_features
        self.tower = model.native.model.vision_tower
        shape = model.architecture
        self.head = nn.Linear(shape.visual_tokens_per_frame * shape.feature_channels, len(_UNITS))

    def forward(self, pictures: _Pictures) -> StepOutput:
        logits_FS = self.head(self._see(pictures.pixels).flatten(1))
        loss = F.binary_cross_entropy_with_logits(logits_FS, pictures.signs, reduction="sum")
        counts = torch.zeros(len(TASKS))
        counts[0] = pictures.signs.numel()
        losses = torch.zeros(len(TASKS))
        losses[0] = loss.detach()
        return StepOutput(loss, losses, counts, counts)


def _draw_pictures(rng: np.random.Generator, count: int) -> tuple[_Pictures, float]:
    frames, signs = [], []
    for _ in range(count):
        frame, au, _, _ = pairs.still_face(rng)
        frames.append(frame)
        signs.append([float(au[unit] >= VISIBLE_FROM) for unit in _UNITS])
    pictures = _Pictures(pixels=torch.from_numpy(np.stack(frames)), signs=torch.tensor(signs))
    return pictures, float(pictures.signs.numel())


# Phases 2 and 3: basics, align -----------------------------------------------------------------


def _pair_drawer(
    tokenizer: Tokenizer, options: EncodeOptions, shares: Mapping[str, float], loss: LossMode
) -> Draw:
    """Packs of generic pairs whose kinds are drawn by `shares`."""
    shape = FrameShape(
        image_context_id=tokenizer.image_context_id,
        tokens_per_frame=options.tokens_per_frame,
        image_size=options.image_size,
    )

    def draw(rng: np.random.Generator, count: int) -> tuple[Batch, float]:
        drawn = (pairs.draw_pair(rng, pairs.draw_kind(rng, shares)) for _ in range(count))
        examples = [
            encode_generic(pair, tokenizer, options, answer=True, position=index)
            for index, pair in enumerate(drawn)
        ]
        # Gradients of all parameters are reduced over ranks, so every pack must have a frame.
        if not any(example.num_frames for example in examples):
            examples.append(zero_example(shape))
        batch = collate(examples, loss)
        return batch, batch.normaliser

    return draw


# All phases -----------------------------------------------------------------------------------


def _optimizer(module: nn.Module, config: PretrainConfig, lr: float) -> torch.optim.AdamW:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        group |= {"lr": lr, "initial_lr": lr}
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)


def _run_phase(
    name: str, module: nn.Module, phase: Phase, config: PretrainConfig, world: World, draw: Draw
) -> list[float]:
    """Train one phase; returns the loss of every step. Each rank has one pack in every step."""
    settings = deepspeed_config(
        zero_stage=0,
        precision="fp32",
        clip=config.clip,
        world_size=world.world_size,
        num_trainable=sum(p.numel() for p in module.parameters()),
    )
    engine = Engine(module, _optimizer(module, config, phase.lr), world, settings)
    log = _PhaseLog(name, phase.steps)
    for step in range(phase.steps):
        rng = np.random.default_rng([config.seed, _STREAM[name], step, world.rank])
        pack, weight = draw(rng, phase.batch // world.world_size)
        result = engine.step(
            [pack],
            num_packs=1,
            normaliser=float(gather_rows(world, [weight]).sum()),
            lr_factor=lr_factor(step, num_steps=phase.steps, warmup=phase.warmup, min_ratio=0.02),
            make_empty=_no_empty_pack,
        )
        line = log.add(result)
        if line and world.is_main:
            print(line, flush=True)
    engine.close()
    return log.losses


def _no_empty_pack() -> Packs:
    raise AssertionError("every rank has one pack in every step")


class _PhaseLog:
    """The losses of a phase, and a log line every _LOG_EVERY steps."""

    def __init__(self, name: str, num_steps: int) -> None:
        self._name, self._num_steps = name, num_steps
        self._began = time.monotonic()
        self._sums = np.zeros((2, len(TASKS)))  # losses and weights since the last line
        self.losses: list[float] = []

    def add(self, result: StepResult) -> str:
        """Add a step; returns the line to print, empty for none."""
        self.losses.append(result.loss)
        self._sums += np.array([result.task_loss, result.task_weight])
        done = len(self.losses)
        if done % _LOG_EVERY:
            return ""
        used = self._sums[:, : len(_SLOT_NAMES)]
        slots = " ".join(
            f"{slot} {loss / weight:.3f}"
            for slot, loss, weight in zip(_SLOT_NAMES, *used, strict=True)
            if weight
        )
        self._sums[:] = 0
        per_step = (time.monotonic() - self._began) / done
        return (
            f"{self._name} step {done}/{self._num_steps} | "
            f"loss {np.mean(self.losses[-_LOG_EVERY:]):.4f} ({slots}) | {per_step:.3f} s/step | "
            f"eta {format_duration(per_step * (self._num_steps - done))}"
        )


def _rank_main(rank: int, config: PretrainConfig, folder: str, rendezvous: str, part: str) -> None:
    """One process of one part of the pretraining; rank 0 exports the result to `folder`."""
    torch.set_num_threads(1)
    world = World(
        rank=rank,
        world_size=config.processes,
        local_rank=rank,
        device=torch.device("cpu"),
        init_method=f"file://{rendezvous}",
    )
    start_process_group(world, timeout_s=600)
    if part == "new":
        config_json = read_config_json(Path(folder))
        native = build_native(config_json)
    else:
        native, config_json = import_checkpoint(Path(folder) / _ALIGNED, torch.float32)
    tokenizer = Tokenizer.load(folder)
    torch.manual_seed(config.seed)
    model = compose(native, config_json, None, train="all")
    model.train()
    options = pair_options(
        model.architecture, config_json["template"], max_tokens=config.llm.max_positions
    )

    def run(name: str, phase: Phase, shares: Mapping[str, float], loss: LossMode) -> list[float]:
        draw = _pair_drawer(tokenizer, options, shares, loss)
        return _run_phase(name, model, phase, config, world, draw)

    if part == "new":
        _run_phase("look", _Looker(model), config.look, config, world, _draw_pictures)
        # Classifying signs and copying words are learned late in the mixture, so they come first.
        run("basics", config.basics, pairs.BASICS, "token")
        losses = run("align", config.align, pairs.MIXTURE, "token")
    else:
        # Weighted by tokens, captions would dominate the short answers.
        losses = run("talk", config.talk, pairs.TALK, "sample")
    if world.is_main:
        target = Path(folder) / _ALIGNED if part == "new" else Path(folder)
        export_checkpoint(model.native, config_json, target)
        write_atomically(Path(folder) / _LOSSES, json.dumps(losses))
    shutdown()


def _prepare(config: PretrainConfig, folder: Path) -> None:
    """Tokenizer and config.json of the new model."""
    tokenizer = train_tokenizer(
        world_texts(config.seed, config.tokenizer_texts),
        folder,
        vocab_size=config.llm.vocab,
        family=config.llm.family,
    )
    vision, llm = config.vision, config.llm
    config_json = new_config(
        family=llm.family,
        vision_hidden=vision.hidden,
        vision_layers=vision.layers,
        vision_heads=vision.heads,
        vision_mlp=vision.mlp,
        image_size=vision.image_size,
        hidden=llm.hidden,
        layers=llm.layers,
        heads=llm.heads,
        mlp=llm.mlp,
        vocab=tokenizer.vocab_size,
        bos_id=1,
        eos_id=tokenizer.stop_ids[-1],
        pad_id=tokenizer.stop_ids[-1],
        img_context_id=tokenizer.image_context_id,
        max_positions=llm.max_positions,
    )
    write_atomically(folder / "config.json", json.dumps(config_json, indent=2) + "\n")


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train a base into `config.out`. Returns its provenance with the gate figures.

    The base is stored after `align` in its own folder, and again after `talk`. An interrupted run
    resumes after its last stored part when it is started again with the same config. The gates may
    differ: they are measured last, and a base that missed them is measured again.

    Raises:
        ValueError: `out` holds something else, or the finished base misses a gate; in the latter
            case the folder is kept, with its figures in provenance.json.
    """
    # For the ranks: one thread each, and DeepSpeed's import of inductor costs a second.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    progress = _progress_so_far(config)
    if progress is None:
        config.out.mkdir(parents=True, exist_ok=True)
        _prepare(config, config.out)
        progress = _Progress()
    for part in _PARTS[progress.parts :]:
        minutes, losses = _run_part(config, part)
        progress = _Progress(
            parts=progress.parts + 1,
            minutes=progress.minutes + minutes,
            final_loss=float(np.mean(losses[-100:])),
        )
        state = {"config": _trained_by(config), **asdict(progress)}
        write_atomically(config.out / _PROGRESS, json.dumps(state) + "\n")
    shutil.rmtree(config.out / _ALIGNED, ignore_errors=True)
    figures = measure_gates(config.out, seed=config.seed, samples=config.gates.samples)
    provenance = {
        "made_by": "emoverse pretrain",
        "config": to_yaml(config),
        "final_loss": progress.final_loss,
        "minutes": round(progress.minutes, 1),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "gates": figures,
    }
    write_atomically(config.out / "provenance.json", json.dumps(provenance, indent=2) + "\n")
    check_gates(figures, config.gates)
    (config.out / _PROGRESS).unlink()
    return provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class _Progress:
    """Progress of a run: stored parts, the minutes that they took, final loss of the last one."""

    parts: int = 0
    minutes: float = 0.0
    final_loss: float = 0.0


def _trained_by(config: PretrainConfig) -> dict[str, Any]:
    """The fields of a config that determine the weights: all but the gates."""
    return config.model_dump(mode="json", exclude={"gates"})


def _progress_so_far(config: PretrainConfig) -> _Progress | None:
    """What an earlier run of the same config has stored; None: start from scratch."""
    if not config.out.exists() or not any(config.out.iterdir()):
        return None
    file = config.out / _PROGRESS
    if not file.is_file():
        raise ValueError(f"out: {config.out} is not empty; remove it or choose another folder")
    state = json.loads(file.read_text(encoding="utf-8"))
    if state.pop("config") != _trained_by(config):
        raise ValueError(
            f"out: {config.out} holds an unfinished run of another config; remove it, choose "
            "another folder, or resume it with its own config"
        )
    return _Progress(**state)


def _run_part(config: PretrainConfig, part: str) -> tuple[float, list[float]]:
    """All ranks of one part; (minutes, losses of its last phase)."""
    began = time.monotonic()
    # The fork server has imported this module, so that ranks start at once and share no state.
    multiprocessing.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as rendezvous:
        start_processes(
            _rank_main,
            args=(config, str(config.out), str(Path(rendezvous) / "ranks"), part),
            nprocs=config.processes,
            start_method="forkserver",
        )
    file = config.out / _LOSSES
    losses: list[float] = json.loads(file.read_text(encoding="ascii"))
    file.unlink()
    return (time.monotonic() - began) / 60, losses
