"""LoRA through PEFT: which layers carry adapters, the trainable set, files in PEFT's format.

In:  the native model of internvl/checkpoint.py and the config's `model.lora` and `model.projector`.
Out: the same model with adapters inside, frozen everywhere else; adapter folders that
PeftModel.from_pretrained reads. No other file imports peft.

How LoRA enters the forward: `attach_lora` puts PEFT's layers into the model. In a packed training
batch the decoder layers of lean_layers.py take W, A, B, scale and dropout from them by
`read_linear` and compute with kernels/layer.py and kernels/lora.py; everywhere else PEFT's own
layers run.
Legend: I input features, O output features, R rank.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from emoverse.models.architecture import (
    PROJECTOR_LINEARS,
    Architecture,
    LoraSettings,
    lora_linears,
)
from emoverse.models.merge import delta

WEIGHTS_FILE = "adapter_model.safetensors"
PROJECTOR = "model.multi_modal_projector"
LAYERS = "model.language_model.layers"
FILE_PREFIX = "base_model.model."
ATTENTION = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj")


class AdapterSettings(LoraSettings, Protocol):
    """The config's `model.lora` section."""

    @property
    def alpha(self) -> int: ...
    @property
    def dropout(self) -> float: ...


def adapter_pattern(architecture: Architecture, lora: LoraSettings, projector: str) -> str:
    """Regular expression for the full names of the adapted modules.

    Anchored at the decoder's layers: plain names such as q_proj exist in the vision tower too.

    Raises:
        ValueError: see lora_linears.
    """
    names = lora_linears(architecture, lora.preset, lora.targets)
    pattern = rf"{LAYERS}\.\d+\.(?:self_attn|mlp)\.(?:{'|'.join(names)})"
    if projector == "lora":
        pattern += rf"|{PROJECTOR}\.(?:{'|'.join(PROJECTOR_LINEARS)})"
    return pattern.replace("model.", r"model\.")


def attach_lora(
    native: InternVLForConditionalGeneration,
    architecture: Architecture,
    lora: AdapterSettings,
    projector: str,
    *,
    seed: int = 0,
) -> None:
    """Put adapters into `native` in place and freeze everything else (see trainable_names).

    The same seed gives the same A matrices; B starts at zero, so the model's output is unchanged.
    """
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=adapter_pattern(architecture, lora, projector),
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # PEFT would make adapters fp32 beside a bf16 base: ZeRO-3 refuses mixed types, and
        # DeepSpeed keeps fp32 masters anyway.
        with warnings.catch_warnings():
            # PEFT asks for an attribute that transformers is about to rename.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            get_peft_model(native, settings, autocast_adapter_dtype=False)
    if projector == "full":
        native.model.multi_modal_projector.requires_grad_(True)
    trained = {name for name, value in native.named_parameters() if value.requires_grad}
    expected = trainable_names(architecture, lora, projector)
    assert trained == expected, sorted(trained ^ expected)[:5]


def trainable_names(
    architecture: Architecture, lora: LoraSettings, projector: str
) -> frozenset[str]:
    """Names of all trained parameters of the native model, derived without the model."""
    modules = []
    for layer in range(architecture.llm.layers):
        for name in lora_linears(architecture, lora.preset, lora.targets):
            block = "self_attn" if name in ATTENTION else "mlp"
            modules.append(f"{LAYERS}.{layer}.{block}.{name}")
    names = set()
    if projector == "lora":
        modules += [f"{PROJECTOR}.{name}" for name in PROJECTOR_LINEARS]
    elif projector == "full":
        names = _projector_names()
    return frozenset(
        names | {f"{module}.lora_{ab}.default.weight" for module in modules for ab in "AB"}
    )


def _projector_names() -> set[str]:
    modules = ("layer_norm", *PROJECTOR_LINEARS)
    return {f"{PROJECTOR}.{name}.{leaf}" for name in modules for leaf in ("weight", "bias")}


class LinearParameters(NamedTuple):
    """A linear layer as the lean layers read it; without an active adapter `a` is None."""

    weight: Tensor
    a: Tensor | None
    b: Tensor | None
    scale: float
    p: float  # dropout of the adapter's input
    plain: bool  # the weight plus scale * B A is the whole layer


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def read_linear(module: nn.Module, training: bool) -> LinearParameters:
    """The current parameters of a linear layer with or without an adapter."""
    if not isinstance(module, LoraLayer):
        return LinearParameters(_weight(module), None, None, 0.0, 0.0, type(module) is nn.Linear)
    weight = _weight(module.get_base_layer())
    plain = type(module.get_base_layer()) is nn.Linear
    if module.disable_adapters or module.merged or not module.active_adapters:
        return LinearParameters(weight, None, None, 0.0, 0.0, plain)
    (name,) = module.active_adapters
    dropout = module.lora_dropout[name]
    plain = plain and not module.use_dora[name] and not module.lora_bias[name]
    return LinearParameters(
        weight,
        _weight(module.lora_A[name]),
        _weight(module.lora_B[name]),
        float(module.scaling[name]),
        dropout.p if training and isinstance(dropout, nn.Dropout) else 0.0,
        plain,
    )


def is_lora(name: str) -> bool:
    """Is this the A or B of an adapter, rather than a parameter of the projector?"""
    return ".lora_A." in name or ".lora_B." in name


def save_adapter(
    native: InternVLForConditionalGeneration,
    folder: str | Path,
    *,
    base: str,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write everything trained in PEFT's format: adapter_config.json + adapter_model.safetensors.

    A fully trained projector is stored as PEFT's modules_to_save.

    Args:
        base: what the adapter belongs to, stored as base_model_name_or_path.
        tensors: values by parameter name instead of the model's own (gathered ZeRO-3 weights,
            fp32 masters); must cover every trained parameter.
    """
    folder = Path(folder)
    trained = {name: value for name, value in native.named_parameters() if value.requires_grad}
    source = trained if tensors is None else tensors
    missing = sorted(set(trained) - set(source))
    if missing:
        raise ValueError(
            f"cannot save the adapter to {folder}: {len(missing)} trained tensors have no value "
            f"(first: {missing[0]}); pass all of them"
        )
    settings = LoraConfig(**_peft_config(native).to_dict())
    _write_adapter({name: source[name] for name in trained}, settings, folder, base)


def write_adapter(
    tensors: Mapping[str, Tensor], folder: str | Path, *, r: int, alpha: int, base: str
) -> None:
    """An adapter folder in PEFT's format from tensors by native name, without a model.

    Raises:
        ValueError: whole tensors that PEFT could not restore: outside the projector, or an
            incomplete projector.
    """
    adapted = sorted({name.partition(".lora_")[0] for name in tensors if is_lora(name)})
    foreign = [name for name in tensors if not is_lora(name) and not name.startswith(PROJECTOR)]
    if foreign:
        raise ValueError(
            f"cannot write {folder}: {foreign[0]} is no adapter and not the projector's; export "
            "--layout internvl2 merges everything"
        )
    whole = {name for name in tensors if not is_lora(name)}
    missing = sorted(_projector_names() - whole) if whole else []
    if missing:
        raise ValueError(
            f"cannot write {folder}: {min(whole)} is trained but {missing[0]} is not, and PEFT "
            "stores the projector as a whole; export --layout internvl2 merges everything"
        )
    pattern = "|".join(name.replace(".", r"\.") for name in adapted)
    settings = LoraConfig(r=r, lora_alpha=alpha, target_modules=pattern, bias="none")
    _write_adapter(tensors, settings, Path(folder), base)


def _write_adapter(
    tensors: Mapping[str, Tensor], settings: LoraConfig, folder: Path, base: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        FILE_PREFIX + name.replace(".default.", "."): value.detach().cpu().contiguous()
        for name, value in tensors.items()
    }
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    if any(not is_lora(name) for name in tensors):
        settings.modules_to_save = [PROJECTOR.rpartition(".")[2]]
    settings.save_pretrained(str(folder))


def put_on(native: InternVLForConditionalGeneration, folder: str | Path) -> None:
    """Attach a saved adapter to a plain model in place, by PEFT's own reader."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        PeftModel.from_pretrained(native, str(folder), autocast_adapter_dtype=False)


def load_adapter(native: InternVLForConditionalGeneration, folder: str | Path) -> None:
    """Copy an adapter folder's values into a model with the same adapters attached.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: another rank, or other layers than the model's.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; point to a folder with a saved adapter")
    saved = PeftConfig.from_pretrained(str(folder))
    own = _peft_config(native)
    for key in ("r", "lora_alpha"):
        expected, actual = getattr(own, key), getattr(saved, key)
        if expected != actual:
            raise ValueError(
                f"{folder}: the adapter has {key} {actual}, the config asks for {expected}; "
                "set model.lora to the adapter's values"
            )
    state = load_file(path)
    trained = {
        FILE_PREFIX + name.replace(".default.", "."): value
        for name, value in native.named_parameters()
        if value.requires_grad
    }
    if state.keys() != trained.keys():
        raise ValueError(
            f"{path} holds other layers than the config trains: "
            f"{sorted(state.keys() ^ trained.keys())[0]} is only in one of them; "
            "set model.lora and model.projector as they were when it was saved"
        )
    with torch.no_grad():
        for name, value in trained.items():
            if state[name].shape != value.shape:
                raise ValueError(
                    f"{path}: {name} must have shape {tuple(value.shape)}, found "
                    f"{tuple(state[name].shape)}; the adapter belongs to another base model"
                )
            value.copy_(state[name])


@torch.no_grad()
def merge_adapters(native: InternVLForConditionalGeneration) -> None:
    """Merge the adapters into the base weights, in place; the model is plain again afterwards.

    The sum is taken in fp32 and rounded once. PEFT's own merge adds in the type of the weight.
    """
    adapted = [
        (name, module) for name, module in native.named_modules() if isinstance(module, LoraLayer)
    ]
    for name, module in adapted:
        plain = module.get_base_layer()
        a_RI, b_OR = _weight(module.lora_A["default"]), _weight(module.lora_B["default"])
        weight = _weight(plain)
        weight.copy_(weight.float() + module.scaling["default"] * delta(a_RI, b_OR))
        parent, _, leaf = name.rpartition(".")
        setattr(native.get_submodule(parent), leaf, plain)


def _peft_config(native: InternVLForConditionalGeneration) -> LoraConfig:
    configs: dict[str, LoraConfig] | None = getattr(native, "peft_config", None)
    if not configs:
        raise ValueError("this model has no adapters; attach_lora comes first")
    return configs["default"]
