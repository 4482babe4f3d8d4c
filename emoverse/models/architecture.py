"""The sizes of a model, read from a config.json in InternVL2's released layout. Torch-free.

In:  a released config.json (a dict, a folder, the packaged "nano" or a registry name).
Out: Architecture, and from it in closed form every parameter count that `plan` prints.
The importer (internvl/), LoRA (adapters.py) and the memory estimate all use it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from emoverse.models.internvl.released_config import (
    FAMILIES,
    first_name,
    new_config,
    read_config_json,
    section_of,
    unsupported_settings,
)

__all__ = [
    "PACKAGED",
    "PROJECTOR_LINEARS",
    "REGISTRY",
    "Architecture",
    "LlmSizes",
    "LoraSettings",
    "VisionSizes",
    "base_folder",
    "load_architecture",
    "lora_linears",
    "new_config",
    "parameter_counts",
    "read_config_json",
]

PACKAGED = {"nano": Path(__file__).resolve().parent.parent / "assets" / "nano_base"}
PROJECTOR_LINEARS = ("linear_1", "linear_2")


class LoraSettings(Protocol):
    """The fields of the config's `model.lora` section that are used here."""

    @property
    def preset(self) -> str: ...
    @property
    def r(self) -> int: ...
    @property
    def targets(self) -> Sequence[str]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSizes:
    """InternViT: pre-norm transformer over square patches with one class token."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    image_size: int
    patch_size: int

    @property
    def patches(self) -> int:
        """Patches of one tile, without the class token."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LlmSizes:
    """The language model. `family` is phi3 (fused qkv, gate_up) or internlm2 (run as Llama)."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """Native name -> (in, out) of every linear layer of one decoder layer."""
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.family == "phi3":
            return {
                "qkv_proj": (self.hidden, q_width + 2 * kv_width),
                "o_proj": (q_width, self.hidden),
                "gate_up_proj": (self.hidden, 2 * self.mlp),
                "down_proj": (self.mlp, self.hidden),
            }
        return {
            "q_proj": (self.hidden, q_width),
            "k_proj": (self.hidden, kv_width),
            "v_proj": (self.hidden, kv_width),
            "o_proj": (q_width, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One InternVL2 model: vision tower, projector, language model."""

    vision: VisionSizes
    llm: LlmSizes
    shuffle: int  # side of the square of patches that pixel shuffle joins into one token
    template: str

    @property
    def visual_tokens_per_frame(self) -> int:
        """Tokens that one tile (= one video frame) becomes: 256 for the released models."""
        return self.vision.patches // self.shuffle**2

    @property
    def feature_channels(self) -> int:
        """Channels of a visual token before the projector."""
        return self.vision.hidden * self.shuffle**2

    def projector_linears(self) -> dict[str, tuple[int, int]]:
        """Native name -> (in, out) of the projector's two linear layers."""
        return {
            "linear_1": (self.feature_channels, self.llm.hidden),
            "linear_2": (self.llm.hidden, self.llm.hidden),
        }

    @classmethod
    def from_config_json(
        cls, config_json: Mapping[str, Any], *, origin: str = "config.json"
    ) -> "Architecture":
        """Read the released layout; refuse everything this project cannot reproduce exactly.

        Raises:
            ValueError: naming `origin`, the key, the rule and the value found; all at once.
        """
        problems = unsupported_settings(config_json)
        vision = section_of(config_json, "vision_config", problems)
        llm = section_of(config_json, "llm_config", problems)
        family = FAMILIES.get(first_name(llm.get("architectures")), "")
        if not family and llm:
            problems.append(
                f"llm_config.architectures must name one of {', '.join(FAMILIES)}, "
                f"found {llm.get('architectures')!r}"
            )
        reader = _IntReader(problems)
        architecture = cls(
            vision=VisionSizes(
                hidden=reader.read(vision, "vision_config", "hidden_size"),
                layers=reader.read(vision, "vision_config", "num_hidden_layers"),
                heads=reader.read(vision, "vision_config", "num_attention_heads"),
                mlp=reader.read(vision, "vision_config", "intermediate_size"),
                image_size=reader.read(vision, "vision_config", "image_size"),
                patch_size=reader.read(vision, "vision_config", "patch_size"),
            ),
            llm=LlmSizes(
                family=family,
                hidden=reader.read(llm, "llm_config", "hidden_size"),
                layers=reader.read(llm, "llm_config", "num_hidden_layers"),
                heads=reader.read(llm, "llm_config", "num_attention_heads"),
                kv_heads=reader.read(llm, "llm_config", "num_key_value_heads"),
                mlp=reader.read(llm, "llm_config", "intermediate_size"),
                vocab=reader.read(llm, "llm_config", "vocab_size"),
            ),
            shuffle=_shuffle_of(config_json.get("downsample_ratio")),
            template=str(config_json.get("template", "")),
        )
        if not problems:
            problems += architecture._mismatches()
        if problems:
            lines = "\n  ".join(problems)
            raise ValueError(
                f"{origin} does not describe a model this project can run:\n  {lines}\n"
                "Use the config.json of InternVL2-4B, InternVL2-8B or one written by new_config()."
            )
        return architecture

    def _mismatches(self) -> list[str]:
        """Rules between the sizes."""
        vision, llm = self.vision, self.llm
        side = vision.image_size // vision.patch_size
        rules = [
            (
                vision.image_size % vision.patch_size == 0 and side % self.shuffle == 0,
                f"vision_config.image_size must be a multiple of patch_size / downsample_ratio "
                f"({vision.patch_size * self.shuffle}), found {vision.image_size}",
            ),
            (
                vision.hidden % vision.heads == 0,
                f"vision_config.hidden_size must be a multiple of num_attention_heads "
                f"({vision.heads}), found {vision.hidden}",
            ),
            (
                llm.hidden % llm.heads == 0,
                f"llm_config.hidden_size must be a multiple of num_attention_heads "
                f"({llm.heads}), found {llm.hidden}",
            ),
            (
                llm.heads % llm.kv_heads == 0,
                f"llm_config.num_attention_heads must be a multiple of num_key_value_heads "
                f"({llm.kv_heads}), found {llm.heads}",
            ),
        ]
        return [message for holds, message in rules if not holds]


def _shuffle_of(ratio: object) -> int:
    """Side of the squares that pixel shuffle joins; 1 in place of a ratio that is not a number."""
    return round(1 / ratio) if isinstance(ratio, float) and ratio > 0 else 1


class _IntReader:
    """Reads positive integers and collects problems; 1 in place of a missing size."""

    def __init__(self, problems: list[str]) -> None:
        self._problems = problems

    def read(self, section: Mapping[str, Any], name: str, key: str) -> int:
        value = section.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if section:
            self._problems.append(f"{name}.{key} must be a positive integer, found {value!r}")
        return 1


# The published sizes, for planning without the checkpoint. Training reads the folder's own file;
# the rope factors and the tokenizer exist only there.
_INTERN_VIT_300M = VisionSizes(
    hidden=1024, layers=24, heads=16, mlp=4096, image_size=448, patch_size=14
)
REGISTRY = {
    "internvl2-4b": Architecture(
        vision=_INTERN_VIT_300M,
        llm=LlmSizes(
            family="phi3", hidden=3072, layers=32, heads=32, kv_heads=32, mlp=8192, vocab=32020
        ),
        shuffle=2,
        template="phi3-chat",
    ),
    "internvl2-8b": Architecture(
        vision=_INTERN_VIT_300M,
        llm=LlmSizes(
            family="internlm2", hidden=4096, layers=32, heads=32, kv_heads=8, mlp=14336, vocab=92553
        ),
        shuffle=2,
        template="internlm2-chat",
    ),
}


def base_folder(base: str | Path) -> Path:
    """The folder of a base: the packaged one for a packaged name, else the path itself.

    Raises:
        FileNotFoundError: for a registry name (its weights are not packaged) or a folder
            without config.json.
    """
    name = str(base)
    if name in REGISTRY:
        raise FileNotFoundError(
            f"model.base is {name!r}, a name that only `plan` can use; "
            f"set model.base to the folder of the downloaded {name} checkpoint"
        )
    folder = PACKAGED.get(name, Path(base))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"model.base is {name!r} but {folder / 'config.json'} does not exist; set it to a "
            f"folder in InternVL2's released layout or to one of {', '.join(PACKAGED)} "
            f"(`plan` also takes {', '.join(REGISTRY)})"
        )
    return folder


def load_architecture(base: str | Path) -> Architecture:
    """The sizes of `base`: a registry name, a packaged name or a folder."""
    known = REGISTRY.get(str(base))
    if known is not None:
        return known
    folder = base_folder(base)
    return Architecture.from_config_json(
        read_config_json(folder), origin=str(folder / "config.json")
    )


def lora_linears(
    architecture: Architecture, preset: str, targets: Sequence[str] = ()
) -> tuple[str, ...]:
    """Names of the decoder linears that carry LoRA: all of them, or `targets` for custom.

    Raises:
        ValueError: a target that the backbone does not have, or none at all.
    """
    known = tuple(architecture.llm.linears())
    if preset != "custom":
        return known
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        raise ValueError(
            f"model.lora.targets must name linears of the {architecture.llm.family} backbone "
            f"({', '.join(known)}), found {list(targets)}"
        )
    return tuple(name for name in known if name in targets)


def parameter_counts(
    architecture: Architecture, lora: LoraSettings | None, projector: str
) -> dict[str, int]:
    """Parameters by part, in closed form; `total` is the base, without adapters.

    `lora` None means no adapters. A LoRA on a linear layer has r * (in + out) parameters.
    """
    vision, llm = architecture.vision, architecture.llm
    width, channels = vision.hidden, architecture.feature_channels
    vit_layer = (
        (4 + 2) * width  # two LayerNorms, two layer scales
        + (3 * width * width + 3 * width)
        + (width * width + width)
        + (width * vision.mlp + vision.mlp)
        + (vision.mlp * width + width)
    )
    # class token, positions (patches + class token), patch convolution with bias
    embeddings = width + (vision.patches + 1) * width + (3 * vision.patch_size**2 + 1) * width
    vit = embeddings + vision.layers * vit_layer
    projector_all = 2 * channels + sum(
        inputs * outputs + outputs for inputs, outputs in architecture.projector_linears().values()
    )
    decoder = llm.linears()
    llm_layer = 2 * llm.hidden + sum(inputs * outputs for inputs, outputs in decoder.values())
    llm_all = 2 * llm.vocab * llm.hidden + llm.hidden + llm.layers * llm_layer
    lora_llm = lora_projector = 0
    if lora is not None:
        names = lora_linears(architecture, lora.preset, lora.targets)
        lora_llm = llm.layers * sum(lora.r * sum(decoder[name]) for name in names)
        if projector == "lora":
            lora_projector = sum(
                lora.r * sum(sizes) for sizes in architecture.projector_linears().values()
            )
    full_projector = projector_all if projector == "full" else 0
    return {
        "vit": vit,
        "projector": projector_all,
        "llm": llm_all,
        "lora_llm": lora_llm,
        "lora_projector": lora_projector,
        "trainable": lora_llm + lora_projector + full_projector,
        "total": vit + projector_all + llm_all,
    }
