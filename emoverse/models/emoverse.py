"""EmoVerse: frozen vision tower -> projector -> visual tokens spliced into the text -> LLM -> loss.

In:  a packed batch (collate.py): ids, segment boundaries, frames or their cached features.
Out: StepOutput (loss.py), the weighted loss sum and its shares by task; or inputs for transformers'
generate.
`EmoVerse.forward` is one forward pass of training; `compose` puts LoRA into the language model
(adapters.py), whose decoder layers then compute with it (lean_layers.py).
Legend: B samples, T packed tokens, L padded tokens, D hidden, F frames, P visual tokens of a frame,
C feature channels, R supervised rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from data_shards.tasks import TASKS
from emoverse.engine import distributed
from emoverse.kernels import attention
from emoverse.kernels.backend import kernel_backend
from emoverse.loss import StepOutput, supervised_cross_entropy, weighted_loss
from emoverse.models.adapters import AdapterSettings, attach_lora, is_lora
from emoverse.models.architecture import Architecture, base_folder
from emoverse.models.internvl.checkpoint import Deferred, import_checkpoint, import_deferred
from emoverse.models.lean_layers import is_lean, make_lean
from emoverse.models.merge import Adapter

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Frames per forward of the vision tower; bounds the memory of evaluation batches.
MAX_FRAMES = 64

# transformers passes a 4-D mask through unchanged. With cu_seqlens it is never read, and without it
# every forward would build a T x T mask.
_UNREAD_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


class ModelSettings(Protocol):
    """The config's `model` section."""

    @property
    def projector(self) -> str: ...
    @property
    def lora(self) -> AdapterSettings: ...
    @property
    def attention(self) -> str: ...
    @property
    def lean(self) -> str: ...


class PackedBatch(Protocol):
    """What forward() reads of a batch."""

    ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    pixels: Tensor | None
    features: Tensor | None
    supervised_rows: Tensor
    targets: Tensor
    row_weights: Tensor
    task_of_row: Tensor


class EmoVerse(nn.Module):
    """The native model with EmoVerse's forward.

    Args:
        train_vision: gradients flow into the vision tower (pretraining a base); otherwise it is
            frozen, in eval mode and without a graph.
    """

    def __init__(
        self,
        native: InternVLForConditionalGeneration,
        architecture: Architecture,
        *,
        train_vision: bool = False,
    ) -> None:
        super().__init__()
        native.set_attn_implementation(attention.NAME)
        self.native = native
        self.architecture = architecture
        self.train_vision = train_vision
        self.deferred: Deferred | None = None  # frozen weights that are not yet read
        self.image_token_id = int(native.config.image_token_id)
        if not train_vision:
            native.model.vision_tower.requires_grad_(False)
        self.train(native.training)

    def forward(self, batch: PackedBatch) -> StepOutput:
        """Loss of a packed batch: frames and text -> hidden states -> loss (emoverse/loss.py)."""
        hidden_TD = self.hidden_states(batch)
        losses_R = supervised_cross_entropy(
            hidden_TD, batch.supervised_rows, batch.targets, self.native.lm_head
        )
        return weighted_loss(losses_R, batch.row_weights, batch.task_of_row, len(TASKS))

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Last hidden states of all packed tokens: T, D. Segments do not attend to each other."""
        pixels, features = batch.pixels, batch.features
        dummy = pixels is None and features is None
        if dummy:
            # A text-only batch must call the same modules in the same order, and have gradients for
            # the same parameters, as those of other ranks: ZeRO exchanges them one by one.
            size = self.architecture.vision.image_size
            pixels = batch.ids_T.new_zeros(1, size, size, 3, dtype=torch.uint8)
        if pixels is not None:
            features = self.vision_features(pixels)
        return self._decode(self.embed(batch.ids_T, features, dummy=dummy), batch)

    def vision_features(self, pixels_FHWC: Tensor, tower: nn.Module | None = None) -> Tensor:
        """Frames -> visual tokens before the projector.

        Args:
            pixels_FHWC: uint8 frames at the model's image size.
            tower: a copy of the frozen vision tower to use instead of the model's own.
        Returns:
            F, P, C in the model's dtype; without a graph unless train_vision.
        """
        size = self.architecture.vision.image_size
        if pixels_FHWC.dtype != torch.uint8 or pixels_FHWC.shape[1:] != (size, size, 3):
            raise ValueError(
                f"frames must be uint8 of shape F, {size}, {size}, 3, found "
                f"{pixels_FHWC.dtype} of shape {tuple(pixels_FHWC.shape)}; resize them to the base "
                "model's image size when they are decoded"
            )
        if self.train_vision:
            return self._vision(pixels_FHWC, self.native.model.vision_tower)
        with torch.no_grad():
            return self._vision(pixels_FHWC, tower or self.native.model.vision_tower)

    def _vision(self, pixels_FHWC: Tensor, tower: nn.Module) -> Tensor:
        dtype = tower.get_parameter("embeddings.patch_embeddings.projection.weight").dtype
        mean, std = (
            torch.tensor(values, device=pixels_FHWC.device).view(1, 3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        # Normalised in fp32 and cast afterwards, as the released pipeline does.
        values_FCHW = (pixels_FHWC.permute(0, 3, 1, 2).float() / 255 - mean) / std
        hidden = tower(pixel_values=values_FCHW.to(dtype)).last_hidden_state[:, 1:]
        side = self.architecture.vision.image_size // self.architecture.vision.patch_size
        shuffled = self.native.model.pixel_shuffle(
            hidden.unflatten(1, (side, side)), scale_factor=1 / self.architecture.shuffle
        )
        features: Tensor = shuffled.flatten(1, 2)
        return features

    def embed(self, ids_T: Tensor, features_FPC: Tensor | None, *, dummy: bool = False) -> Tensor:
        """Token embeddings, with projected visual tokens in place of the context tokens: T, D.

        Args:
            dummy: the features belong to no context token and change nothing (times 0.0).
        Raises:
            ValueError: the ids do not hold one context token per visual token.
        """
        embeddings_TD: Tensor = self.native.get_input_embeddings()(ids_T)
        positions = (ids_T == self.image_token_id).nonzero().squeeze(1)
        shape = (self.architecture.visual_tokens_per_frame, self.architecture.feature_channels)
        frames = 0 if features_FPC is None or dummy else features_FPC.shape[0]
        if features_FPC is not None and features_FPC.shape[1:] != shape:
            raise ValueError(
                f"features must have shape F, {shape[0]}, {shape[1]}, found "
                f"{tuple(features_FPC.shape)}; they belong to another base model"
            )
        self._check_context(ids_T, frames)
        if features_FPC is None:
            return embeddings_TD
        projector = self.native.model.multi_modal_projector
        visual_FPD: Tensor = projector(features_FPC.to(embeddings_TD.dtype))
        if dummy:
            return embeddings_TD + 0.0 * visual_FPD.sum()
        return embeddings_TD.index_copy(0, positions, visual_FPD.flatten(0, 1))

    def _check_context(self, ids_T: Tensor, frames: int) -> None:
        """Raises ValueError unless there are as many context tokens as visual tokens."""
        tokens = self.architecture.visual_tokens_per_frame
        count = int((ids_T == self.image_token_id).sum())
        if count != frames * tokens:
            raise ValueError(
                f"the ids hold {count} image context tokens (id {self.image_token_id}) but "
                f"{frames} frames give {frames * tokens} visual tokens; write exactly {tokens} "
                "context tokens per frame into the prompt"
            )

    def _decode(self, embeddings_TD: Tensor, batch: PackedBatch) -> Tensor:
        self._check_rotary()
        output = self.native.model.language_model(
            inputs_embeds=embeddings_TD.unsqueeze(0),
            position_ids=batch.position_ids_T.unsqueeze(0),
            attention_mask=_UNREAD_MASK.to(embeddings_TD.device),
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
        )
        hidden: Tensor = output.last_hidden_state.squeeze(0)
        return hidden

    def _check_rotary(self) -> None:
        """In bf16 neighbouring positions coincide, and the loss hardly shows it."""
        rotary = self.native.model.language_model.rotary_emb.inv_freq
        assert rotary.dtype == torch.float32, f"rotary table cast to {rotary.dtype}"

    @torch.no_grad()
    def prepare_generation(
        self,
        items: Sequence[tuple[Sequence[int] | NDArray[Any] | Tensor, NDArray[Any] | Tensor | None]],
    ) -> dict[str, Tensor]:
        """Left-padded inputs for `native.generate(**inputs, use_cache=True, ...)`.

        Args:
            items: per sample its ids and its uint8 frames (F, H, W, 3), its features (F, P, C) or
                None for text only.
        Returns:
            inputs_embeds (B, L, D) and attention_mask (B, L).
        """
        self._check_rotary()
        device = next(self.native.lm_head.parameters()).device
        all_ids = [to_tensor(ids).to(device, torch.long) for ids, _ in items]
        visuals = [None if visual is None else to_tensor(visual).to(device) for _, visual in items]
        features = self._features_of(visuals)
        for ids, feature in zip(all_ids, features, strict=True):
            self._check_context(ids, 0 if feature is None else len(feature))
        # One call of the projector and of the embedding for all items: under ZeRO-3 the ranks call
        # the same modules in the same order, however many items each of them has.
        present = [feature for feature in features if feature is not None]
        dummy = not present
        if dummy and self.partitioned:
            size = self.architecture.vision.image_size
            blank = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device)
            present = [self._live_features([blank])[0]]
        joined_FPC = torch.cat(present) if present else None
        embeddings_TD = self.embed(torch.cat(all_ids), joined_FPC, dummy=dummy)
        longest = max(len(ids) for ids in all_ids)
        rows, mask_BL = [], torch.zeros(len(items), longest, dtype=torch.long, device=device)
        for row, item_TD in enumerate(embeddings_TD.split([len(ids) for ids in all_ids])):
            padding = longest - len(item_TD)
            rows.append(nn.functional.pad(item_TD, (0, 0, padding, 0)))
            mask_BL[row, padding:] = 1
        return {"inputs_embeds": torch.stack(rows), "attention_mask": mask_BL}

    def _features_of(self, visuals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Features of each item; all uint8 frames go through the tower together."""
        features: list[Tensor | None] = list(visuals)
        live = [i for i, x in enumerate(visuals) if x is not None and x.dtype == torch.uint8]
        clips = [x for x in (visuals[i] for i in live) if x is not None]
        if live:
            for i, clip_features in zip(live, self._live_features(clips), strict=True):
                features[i] = clip_features
        return features

    def _live_features(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Frames through the tower in chunks; under ZeRO-3 as many chunks as the busiest rank."""
        chunks = list(torch.cat(list(clips)).split(MAX_FRAMES))
        computed = [self.vision_features(chunk) for chunk in chunks]
        if self.partitioned:
            for _ in range(distributed.largest(len(chunks), chunks[0].device) - len(chunks)):
                self.vision_features(chunks[0][:1])
        return list(torch.cat(computed).split([len(clip) for clip in clips]))

    @property
    def partitioned(self) -> bool:
        """Does each rank hold only its share of the weights (ZeRO-3)?"""
        return hasattr(self.native.lm_head.weight, "ds_id")

    def train(self, mode: bool = True) -> "EmoVerse":
        """As nn.Module, except that a frozen vision tower stays in eval mode."""
        super().train(mode)
        if not self.train_vision:
            self.native.model.vision_tower.eval()
        return self

    @property
    def implementations(self) -> str:
        """For logs: what attention and the decoder layers of training run on."""
        weight = self.native.lm_head.weight
        device = weight.device.type
        layers = "lean" if is_lean(self.native.model.language_model) else "transformers'"
        return (
            f"attention {attention.attention_backend(device, weight.dtype)}, {layers} layers, "
            f"kernels {kernel_backend(device)}"
        )

    def recompute_activations(self) -> None:
        """From now on a decoder layer keeps only its input and runs again in the backward pass."""
        self.native.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def trainable_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trained parameters by group: lora and projector; vision and llm when all are trained."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if is_lora(name):
                group = "lora"
            elif ".multi_modal_projector." in name:
                group = "projector"
            else:
                group = "vision" if ".vision_tower." in name else "llm"
            groups.setdefault(group, []).append((name, parameter))
        return groups


def to_tensor(values: Sequence[int] | NDArray[Any] | Tensor) -> Tensor:
    """As torch.as_tensor; read-only arrays, as decoders return them, are copied first."""
    if isinstance(values, np.ndarray):
        return torch.from_numpy(np.require(values, requirements=("C", "W")))
    return torch.as_tensor(values)


def compose(
    native: InternVLForConditionalGeneration,
    config_json: Mapping[str, Any],
    settings: ModelSettings | None,
    *,
    train: str = "lora",
    seed: int = 0,
) -> EmoVerse:
    """EmoVerse around a native model.

    Args:
        settings: the config's model section; may be None unless train is lora.
        train: lora (adapters and projector, as in both stages), all (pretraining a base: every
            parameter) or none (answering with the base as it is).
    """
    architecture = Architecture.from_config_json(config_json)
    if settings is not None:
        attention.configure_attention(settings.attention)
    if train == "all":
        native.requires_grad_(True)
    elif train == "none":
        native.requires_grad_(False)
    elif train == "lora" and settings is not None:
        attach_lora(native, architecture, settings.lora, settings.projector, seed=seed)
        make_lean(native.model.language_model, settings.lean)
    else:
        raise ValueError(f"train must be lora (with model settings), all or none, found {train!r}")
    return EmoVerse(native, architecture, train_vision=train == "all")


def build_model(
    base: str | Path,
    settings: ModelSettings,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    train: str = "lora",
    seed: int = 0,
    adapters: Sequence[Adapter] = (),
    defer: bool = False,
) -> EmoVerse:
    """Import the base checkpoint and make it EmoVerse (see compose). In eval mode.

    Args:
        adapters: adapters of earlier stages to merge into the base while it is read.
        defer: leave the frozen weights to `EmoVerse.deferred`: they take no memory until the
            engine partitions them (ZeRO-3).
    Raises:
        FileNotFoundError, ValueError: see base_folder and import_checkpoint.
    """
    folder = base_folder(base)
    deferred: Deferred | None = None
    if defer:
        native, config_json, deferred = import_deferred(
            folder, dtype, device=device, adapters=adapters
        )
    else:
        native, config_json = import_checkpoint(folder, dtype, device=device, adapters=adapters)
    model = compose(native, config_json, settings, train=train, seed=seed)
    model.deferred = deferred
    return model
