"""The config of a run: one tree of sections, read from YAML, complete before anything starts.

In: YAML files and dotted overrides. Out: an immutable `Config`, or a `ConfigError` with every
mistake and its location. Every verb starts here, so this file must not import torch.
All relative paths are resolved against the working directory of the command.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)
from ruamel.yaml import YAML

from data_shards.files import write_atomically
from data_shards.shards.open import CacheOptions, default_cache_folder
from emoverse.config.errors import ConfigError, Problem, problems_of, show
from emoverse.config.rules import cross_field_problems
from emoverse.config.values import (
    DEFAULT_NEW_TOKENS,
    Betas,
    LoosePath,
    Names,
    NewTokens,
    Rates,
    ShardPlace,
    StageName,
)
from emoverse.config.yaml_source import Node, load_tree

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """A part of the config: immutable, and every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunSection(Section):
    """What the run is called and where it writes."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Name of the run: letters, digits, and _ . - inside.",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of everything random: plan, initial adapters, dropout."
    )
    run_dir: LoosePath = Field(
        default_factory=lambda data: Path("runs") / data["name"],
        description="Folder for all that the run writes; relative to the working directory.",
    )


class LoraSection(Section):
    """The low-rank adapters of the language model."""

    preset: Literal["paper", "authors", "custom"] = Field(
        "paper",
        description="Linear layers of the language model with adapters: all (paper), all and those "
        "of the projector too (authors), or the ones that `targets` names (custom).",
    )
    r: int = Field(8, ge=1, description="Rank of the adapters.")
    alpha: int = Field(32, ge=1, description="Scale of the adapters: their output times alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of adapter inputs set to 0.")
    targets: Names = Field(
        (), description="Names of the language model's linear layers with adapters (custom only)."
    )


class ModelSection(Section):
    """The base model and what of it is trained."""

    base: str = Field(
        min_length=1,
        description="The packaged nano, a folder in InternVL2's released layout relative to the "
        "working directory, or, for plan only, internvl2-4b or internvl2-8b.",
    )
    projector: Literal["full", "lora", "frozen"] = Field(
        "full", description="How the projector is trained: all weights, adapters only, or not."
    )
    lora: LoraSection = Field(
        default_factory=LoraSection, description="The adapters of the language model."
    )
    blank_frames: bool = Field(
        False, description="Replace every frame by a grey one: the text-only baseline."
    )
    cache_features: bool = Field(
        False,
        description="Keep every clip's frozen vision features in a file of the run (small models).",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="Number format of weights and activations; masters stay fp32."
    )
    attention: Literal["auto", "flash", "torch", "triton", "sdpa"] = Field(
        "auto", description="Attention for packed batches: the fastest there is, or one by name."
    )
    lean: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Train through lean decoder layers that keep 0.4 of the activations: where "
        "possible, always, or never (transformers' own layers).",
    )


class DataSection(Section):
    """Which records are read and how they become samples."""

    shards: ShardPlace = Field(
        description="Shard folder of the training split: relative to the working directory, or an "
        "address (https://, s3://, ...); tars without an index are indexed first."
    )
    cache_dir: LoosePath = Field(
        default_factory=default_cache_folder,
        description="Folder on a local disk for copies of remote shards, shared by a machine's "
        "processes.",
    )
    cache_gib: float = Field(
        64.0, gt=0, description="Most GiB of remote shards kept: at least two blocks of shards."
    )
    frames_per_clip: int = Field(8, ge=1, le=64, description="Frames taken from a clip.")
    visual: Literal["video", "peak_frame"] = Field(
        "video",
        description="What of a clip is seen: its frames, or only the peak where one is known.",
    )
    resize: Literal["exact", "fast"] = Field(
        "exact",
        description="How video frames get the model's size: Pillow's bicubic filter as InternVL "
        "used it (exact), or libswscale's, other pixels at a lower cost (fast).",
    )
    peak_tiles: int = Field(
        1,
        ge=1,
        le=12,
        description="Most tiles of a peak frame, by InternVL's rule for still images, plus a "
        "thumbnail; 1: one resize.",
    )
    history_frames: int = Field(
        0, ge=0, le=0, description="Frames of earlier turns that ECPE sees; only 0 so far."
    )
    give_emotion: bool = Field(
        False, description="Tell ECPE the true emotion of the target in its query."
    )
    max_tokens: int = Field(4096, ge=64, le=4096, description="Most tokens of one sample.")
    pack_tokens: int = Field(
        4096, ge=64, description="Most tokens of one packed batch: the knob for memory."
    )
    workers: int = Field(2, ge=0, description="Processes per rank that read and decode.")
    batch_timeout_s: float = Field(
        600.0, gt=0, description="Longest wait for the samples of one step, in seconds."
    )
    block_shards: int = Field(
        16, ge=1, description="Shards that are shuffled together: more mixes better, reads wider."
    )
    on_damage: Literal["stop", "replace"] = Field(
        "stop", description="At a damaged record: end the run, or take another of the same task."
    )
    max_damaged: int = Field(
        10, ge=0, description="Damaged records a stage may replace before it stops after all."
    )

    @property
    def cache(self) -> CacheOptions:
        """Where copies of remote shards go."""
        return CacheOptions(folder=self.cache_dir, max_bytes=int(self.cache_gib * 2**30))

    @property
    def frames_per_peak(self) -> int:
        """Tiles of a peak frame at most, its thumbnail included."""
        return self.peak_tiles + (self.peak_tiles > 1)

    @property
    def most_frames(self) -> int:
        """Frames or tiles of the largest sample."""
        return max(self.frames_per_clip, self.frames_per_peak)


class PoolSection(Section):
    """The records that a stage draws from: exactly one of the two keys."""

    take: int | None = Field(None, ge=1, description="Number of records to draw at random.")
    rest_of: Names | None = Field(
        None,
        description="Earlier stages; the pool is all the records that they leave.",
    )


class OptimSection(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr_lora: float = Field(1e-5, ge=0, description="Peak learning rate of the adapters.")
    lr_projector: float = Field(1e-5, ge=0, description="Peak learning rate of the projector.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay per unit of lr.")
    betas: Betas = Field((0.9, 0.95), description="Decay rates of the two moments.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the stage's steps that warm up.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Last learning rate over the peak.")
    clip: float = Field(1.0, gt=0, description="Largest L2 norm of the whole gradient.")


class StageSection(Section):
    """One step of the curriculum."""

    pool: PoolSection = Field(description="The records the stage draws from.")
    rates: Rates = Field(description="Share of the stage's samples per task, exactly.")
    epochs: int = Field(2, ge=1, description="Times the stage's samples are seen.")
    shortage: Literal["error", "repeat", "shrink"] = Field(
        "error",
        description="When a rate asks for more records than offer the task: stop, use scarce "
        "records again, or take fewer samples.",
    )
    epoch_tasks: Literal["keep", "redraw"] = Field(
        "keep", description="Whether a record keeps its task over the epochs."
    )
    start_from: str = Field("base", description="base, or the earlier stage it continues.")
    adapter: Literal["continue", "merge"] = Field(
        "continue",
        description="The earlier stage's adapters: trained further, or merged into the base, which "
        "then gets new ones.",
    )
    optimizer: Literal["fresh", "continue"] = Field(
        "fresh",
        description="Moments of AdamW: zero, or the earlier stage's; the schedule is always new.",
    )
    optim: OptimSection = Field(default_factory=OptimSection, description="The optimiser.")


class TrainSection(Section):
    """What both stages share in the training loop."""

    global_batch_size: int = Field(
        ge=1, description="Samples per optimiser step over all ranks together."
    )
    loss: Literal["sample", "token", "square"] = Field(
        "sample",
        description="What counts equally in a step: samples, supervised tokens, or between both.",
    )
    zero_stage: int = Field(2, ge=0, le=3, description="ZeRO stage of DeepSpeed, 0 to 3.")
    offload: Literal["off", "optimizer", "all"] = Field(
        "off",
        description="What waits in the host's memory: nothing, the optimiser's fp32 weights and "
        "moments (ZeRO 2, 3), or all weights too (ZeRO 3). Less memory on the GPU, slower steps.",
    )
    processes: int = Field(
        1, ge=1, description="Local processes that `emoverse train` starts, one rank each."
    )
    recompute: bool = Field(
        False,
        description="Compute activations again in the backward pass instead of keeping them: less "
        "memory, about a third more work.",
    )
    log_every: int = Field(10, ge=1, description="Steps between two log lines.")
    save_every: int = Field(500, ge=1, description="Steps between two checkpoints.")
    save_minutes: float | None = Field(
        None, gt=0, description="Most minutes between two checkpoints; blank: save_every alone."
    )
    on_save_error: Literal["retry", "stop"] = Field(
        "retry",
        description="When the disk is full or not writable: go on and try again, or end the run.",
    )
    max_minutes: float | None = Field(
        None, gt=0, description="Minutes after which a launch saves and stops; blank is no limit."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept per stage.")
    bad_numbers: Literal["skip", "stop"] = Field(
        "skip", description="A step with a bad loss or gradient: go on without it, or end the run."
    )
    max_skipped: int = Field(
        10, ge=0, description="Steps a stage may skip for bad numbers before it stops after all."
    )
    spike_factor: float | None = Field(
        None, gt=1, description="A bad number is above this many medians; blank: is not finite."
    )
    hang_minutes: float = Field(
        30.0, gt=0, description="Minutes without progress after which a process ends the run."
    )
    wandb: str | None = Field(
        None, description="Project of Weights & Biases to log to as well; blank is off."
    )
    tensorboard: bool = Field(True, description="Also write event files for tensorboard.")
    detect_anomaly: bool = Field(
        False,
        description="Stop at the first output or gradient that is not finite and name the module "
        "and the operation; slow, for debugging.",
    )


class EvaluationSection(Section):
    """How answers are generated and scored."""

    shards: LoosePath = Field(
        description="Shard folder of the held-out split; relative to the working directory."
    )
    batch_size: int = Field(16, ge=1, description="Queries answered at the same time.")
    max_new_tokens: NewTokens = Field(
        default_factory=lambda: dict(DEFAULT_NEW_TOKENS),
        description="Most tokens of an answer, per task.",
    )
    max_records: int | None = Field(
        None, ge=1, description="Most records scored per task; blank means all."
    )
    when: Names = Field(
        ("base", "stage1", "stage2"), description="Scored states: base, or a stage by its name."
    )


class Config(Section):
    """A whole run: what to train, but not on which machines."""

    run: RunSection = Field(description="What the run is called and where it writes.")
    model: ModelSection = Field(description="The base model and what of it is trained.")
    data: DataSection = Field(description="Which records are read and how.")
    stages: dict[StageName, StageSection] = Field(
        min_length=1,
        description="Stages in the order of training, by name: small letters, digits, _.",
    )
    train: TrainSection = Field(description="What all stages share in the training loop.")
    evaluation: EvaluationSection = Field(description="How answers are generated and scored.")


def load_config(paths: Sequence[Path], overrides: Sequence[str] = ()) -> Config:
    """Merge YAML files and `key.key=value` overrides left to right, and check everything.

    Raises ConfigError with all problems at once.
    """
    return load_model(Config, paths, overrides, rules=cross_field_problems, closed="stages")


def load_model(
    model: type[Model],
    paths: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    rules: Callable[[Node], list[Problem]] = lambda tree: [],
    closed: str = "",
) -> Model:
    """Like `load_config` for any pydantic model.

    rules: checks across fields, which see the tree also when fields are wrong.
    closed: the key whose entries have names of the user's own, see `load_tree`.
    """
    tree, problems = load_tree(paths, overrides, closed=closed)
    known = {problem.path for problem in problems}
    loaded = None
    try:
        loaded = model.model_validate(tree.plain())
    except ValidationError as error:
        # A value that the loader refused is null in the tree; complaining again would confuse.
        problems += [p for p in problems_of(error, model, tree) if p.path not in known]
    problems += rules(tree)
    if problems or loaded is None:
        order = [str(path) for path in paths]
        raise ConfigError(sorted(problems, key=lambda problem: problem.position(order)))
    return loaded


def to_yaml(config: BaseModel) -> str:
    """The resolved config as YAML; loading this text alone gives the same config again."""
    stream = io.StringIO()
    yaml = YAML(typ="rt")
    yaml.default_flow_style = False
    yaml.width = 10_000
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


# Frozen configs: checked once, by the launcher; its workers load them as they are ---------------


def to_json(config: Config) -> str:
    """The resolved config as JSON; `from_json` gives the same config again."""
    return config.model_dump_json(indent=1) + "\n"


def from_json(text: str) -> Config:
    """The config behind `to_json`, without the rules across fields.

    Raises ValueError for any other text.
    """
    # Not model_validate_json: its strict mode refuses the paths that our own validators make.
    return Config.model_validate(json.loads(text))


def frozen_path(config: Config, folder: Path) -> Path:
    """FOLDER/config-HASH.json: equal configs have one file, different ones never share one."""
    digest = hashlib.sha256(to_json(config).encode()).hexdigest()
    return folder / f"config-{digest[:12]}.json"


def freeze_config(config: Config, folder: Path) -> Path:
    """Writes the config for workers into a folder of the run directory; returns the file."""
    path = frozen_path(config, folder)
    write_atomically(path, to_json(config))
    return path


def load_frozen(path: Path) -> Config:
    """Reads a config that `freeze_config` has written.

    Raises FileNotFoundError, or ValueError if it is damaged or of another version.
    """
    text = path.read_text(encoding="utf-8")
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(
            f"{path}: not a frozen config of this version; start the run again from its YAML "
            f"({error})"
        ) from error


def describe(config: BaseModel) -> list[tuple[str, str]]:
    """Every key of the resolved config as (dotted path, value), in order, for logs and reports."""

    def walk(prefix: str, value: object) -> list[tuple[str, str]]:
        if isinstance(value, dict):
            return [row for key, below in value.items() for row in walk(f"{prefix}.{key}", below)]
        return [(prefix.lstrip("."), show(value))]

    return walk("", config.model_dump(mode="json"))
