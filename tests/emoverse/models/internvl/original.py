"""The released modules written out from their weights, for the parity tests.

Nothing of the package is used: names, shapes, order of rows and every formula stand here. fp32,
samples on both sides of the rope switch, right padding, a text-only sample.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]
TOLERANCE = 5e-5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTEXT, PAD, SWITCH = 96, 2, 24  # SWITCH: tokens above which the ropes change
VIT, WIDTH, HIDDEN, MLP, VOCAB, HEAD = 32, 48, 64, 80, 97, 16


def rope_of(family: str) -> dict[str, Any]:
    if family == "phi3":
        short = [1.0 + 0.05 * place for place in range(HEAD // 2)]
        long = [1.03 + 1.7 * place for place in range(HEAD // 2)]
        return {"type": "su", "short_factor": short, "long_factor": long}
    return {"type": "dynamic", "factor": 2.0}


def released_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released file with two layers on either side."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, VIT),
        "vision_model.embeddings.position_embedding": (1, 17, VIT),
        "vision_model.embeddings.patch_embedding.weight": (VIT, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (VIT,),
        "mlp1.0.weight": (4 * VIT,),
        "mlp1.0.bias": (4 * VIT,),
        "mlp1.1.weight": (HIDDEN, 4 * VIT),
        "mlp1.1.bias": (HIDDEN,),
        "mlp1.3.weight": (HIDDEN, HIDDEN),
        "mlp1.3.bias": (HIDDEN,),
        "language_model.model.norm.weight": (HIDDEN,),
    }
    rows = {"attn.qkv": (3 * VIT, VIT), "attn.proj": (VIT, VIT)}
    rows |= {"mlp.fc1": (WIDTH, VIT), "mlp.fc2": (VIT, WIDTH)}
    phi3 = family == "phi3"
    embedding, head = ("embed_tokens", "lm_head") if phi3 else ("tok_embeddings", "output")
    shapes[f"language_model.model.{embedding}.weight"] = (VOCAB, HIDDEN)
    shapes[f"language_model.{head}.weight"] = (VOCAB, HIDDEN)
    if phi3:
        linears = {"self_attn.qkv_proj": (3 * HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
        linears |= {"mlp.gate_up_proj": (2 * MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP)}
        norms = ("input_layernorm", "post_attention_layernorm")
    else:
        linears = {"attention.wqkv": (8 * HEAD, HIDDEN), "attention.wo": (HIDDEN, HIDDEN)}
        linears |= {f"feed_forward.w{n}": (MLP, HIDDEN) for n in (1, 3)}
        linears["feed_forward.w2"] = (HIDDEN, MLP)
        norms = ("attention_norm", "ffn_norm")
    for layer in range(2):
        tower = f"vision_model.encoder.layers.{layer}"
        shapes |= {f"{tower}.{name}": (VIT,) for name in ("ls1", "ls2")}
        shapes |= {f"{tower}.{n}.{leaf}": (VIT,) for n in ("norm1", "norm2") for leaf in LEAVES}
        for name, shape in rows.items():
            shapes |= {f"{tower}.{name}.weight": shape, f"{tower}.{name}.bias": shape[:1]}
        block = f"language_model.model.layers.{layer}"
        shapes |= {f"{block}.{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{block}.{name}.weight": (HIDDEN,) for name in norms}
    return shapes


LEAVES = ("weight", "bias")


def random_weights(family: str) -> Weights:
    """Random everywhere, exact in bf16; small where an epsilon would else be invisible."""
    generator = torch.Generator().manual_seed(12)
    weights = {}
    for name, shape in sorted(released_shapes(family).items()):
        noise = torch.randn(shape, generator=generator)
        if "norm" in name or name == "mlp1.0.weight":
            value = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        elif "patch_embedding.weight" in name:
            value = noise * 0.03 / math.sqrt(3 * 14 * 14)
        elif "vision_model.embeddings" in name or ".ls" in name:
            value = noise * 0.03
        elif "embed" in name:
            value = noise * 0.05
        else:
            value = noise * (1.2 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1)
        weights[name] = value.bfloat16().float()
    return weights


class Original:
    """The released modules as formulas over the released tensors."""

    def __init__(self, family: str, weights: Weights) -> None:
        self.phi3 = family == "phi3"
        self.w = weights

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return centred / spread * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * scale * self.w[f"{name}.weight"]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def tower(self, pixels_NCHW: Tensor) -> Tensor:
        """Patches, class token first: N, 17, VIT. No norm at the end."""
        stem = "vision_model.embeddings"
        patches = pixels_NCHW.unfold(2, 14, 14).unfold(3, 14, 14)  # N, C, 4, 4, 14, 14
        flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(len(pixels_NCHW), 16, -1)
        kernel = self.w[f"{stem}.patch_embedding.weight"].flatten(1)
        x = flat @ kernel.T + self.w[f"{stem}.patch_embedding.bias"]
        first = self.w[f"{stem}.class_embedding"].expand(len(x), 1, VIT)
        x = torch.cat((first, x), 1) + self.w[f"{stem}.position_embedding"]
        for layer in range(2):
            name = f"vision_model.encoder.layers.{layer}"
            mixed = self.tower_attention(self.layer_norm(x, f"{name}.norm1", 1e-6), name)
            x = x + mixed * self.w[f"{name}.ls1"]
            inner = self.linear(self.layer_norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1")
            x = x + self.linear(self.gelu(inner), f"{name}.mlp.fc2") * self.w[f"{name}.ls2"]
        return x

    def tower_attention(self, x: Tensor, name: str) -> Tensor:
        q, k, v = self.linear(x, f"{name}.attn.qkv").split(VIT, -1)  # rows q, then k, then v
        q, k, v = (part.unflatten(-1, (2, VIT // 2)).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.transpose(2, 3) / math.sqrt(VIT // 2)).softmax(-1)
        return self.linear((scores @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")

    def features(self, pixels_NCHW: Tensor) -> Tensor:
        """Projected visual tokens N, 4, HIDDEN: squares of 2 x 2 patches, row by row, then mlp1."""
        grid = self.tower(pixels_NCHW)[:, 1:].view(-1, 2, 2, 2, 2, VIT)  # row, in row, column, in
        tokens = grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4 * VIT)
        inner = self.linear(self.layer_norm(tokens, "mlp1.0", 1e-5), "mlp1.1")
        return self.linear(self.gelu(inner), "mlp1.3")

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, length x HEAD, for a batch whose longest sample has `length` tokens."""
        exponents = torch.arange(0, HEAD, 2).double() / HEAD
        scale, scaling = 1.0, rope_of("phi3" if self.phi3 else "internlm2")
        if self.phi3:
            key = "long_factor" if length > SWITCH else "short_factor"
            frequencies = 1 / (torch.tensor(scaling[key]).double() * 10000.0**exponents)
            scale = math.sqrt(1 + math.log(32) / math.log(SWITCH))
        else:
            base, factor = 1e6, scaling["factor"]
            if length > SWITCH:
                stretch = factor * length / SWITCH - (factor - 1)
                base *= stretch ** (HEAD / (HEAD - 2))
            frequencies = base**-exponents
        angles = torch.outer(torch.arange(length).double(), frequencies).repeat(1, 2)
        return (angles.cos() * scale).float(), (angles.sin() * scale).float()

    def attention(self, x: Tensor, block: str, mask: Tensor) -> Tensor:
        if self.phi3:
            rows = self.linear(x, f"{block}.self_attn.qkv_proj").split(HIDDEN, -1)
            q, k, v = (part.unflatten(-1, (4, HEAD)) for part in rows)
        else:  # per key/value head: two queries, a key, a value
            rows = self.linear(x, f"{block}.attention.wqkv").unflatten(-1, (2, 4, HEAD))
            q, k, v = rows[..., :2, :].flatten(2, 3), rows[..., 2, :], rows[..., 3, :]
            k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        cos, sin = (table[None, :, None] for table in self.rotary(x.shape[1]))
        turned = []
        for part in (q, k):
            half = torch.cat((-part[..., HEAD // 2 :], part[..., : HEAD // 2]), -1)
            turned.append((part * cos + half * sin).transpose(1, 2))
        scores = turned[0] @ turned[1].transpose(2, 3) / math.sqrt(HEAD)
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.transpose(1, 2)
        output = f"{block}.self_attn.o_proj" if self.phi3 else f"{block}.attention.wo"
        return self.linear(mixed.transpose(1, 2).flatten(2), output)

    def mlp(self, x: Tensor, block: str) -> Tensor:
        if self.phi3:
            gate, up = self.linear(x, f"{block}.mlp.gate_up_proj").chunk(2, -1)
            return self.linear(up * gate * gate.sigmoid(), f"{block}.mlp.down_proj")
        gate = self.linear(x, f"{block}.feed_forward.w1")
        up = self.linear(x, f"{block}.feed_forward.w3")
        return self.linear(up * gate * gate.sigmoid(), f"{block}.feed_forward.w2")

    def logits(self, ids_BL: Tensor, lengths: list[int], pixels: Tensor) -> Tensor:
        names = ("embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm")
        if not self.phi3:
            names = ("tok_embeddings", "output", "attention_norm", "ffn_norm")
        x = self.w[f"language_model.model.{names[0]}.weight"][ids_BL]
        if len(pixels):
            x = x.masked_scatter((ids_BL == CONTEXT)[..., None], self.features(pixels))
        length = ids_BL.shape[1]
        key_is_real = torch.arange(length) < torch.tensor(lengths)[:, None]
        mask = torch.ones(length, length, dtype=torch.bool).tril() & key_is_real[:, None, None]
        for layer in range(2):
            block = f"language_model.model.layers.{layer}"
            x = x + self.attention(self.rms_norm(x, f"{block}.{names[2]}"), block, mask)
            x = x + self.mlp(self.rms_norm(x, f"{block}.{names[3]}"), block)
        return self.linear(
            self.rms_norm(x, "language_model.model.norm"), f"language_model.{names[1]}"
        )


class Case:
    """Two clips and a text, padded on the right; every fourth token of a text is supervised."""

    def __init__(self, words: tuple[int, int, int]) -> None:
        generator = torch.Generator().manual_seed(sum(words))
        rows = []
        for count, frames in zip(words, (2, 1, 0), strict=True):
            text = torch.randint(3, CONTEXT, (count,), generator=generator)
            rows.append(torch.cat((text[:3], torch.full((4 * frames,), CONTEXT), text[3:])))
        self.rows, self.lengths = rows, [len(row) for row in rows]
        self.ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        self.mask = (torch.arange(self.ids.shape[1]) < torch.tensor(self.lengths)[:, None]).long()
        every_fourth = (torch.arange(self.ids.shape[1]) % 4 == 0) & (self.mask == 1)
        self.labels = self.ids.where(every_fourth & (self.ids != CONTEXT), torch.tensor(-100))
        self.frames = torch.randint(
            *(0, 256, (3, 56, 56, 3)), dtype=torch.uint8, generator=generator
        )
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
        self.pixels = (self.frames.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), self.labels[:, 1:].flatten())


CASES = {"short": Case((9, 12, 7)), "long": Case((24, 30, 9))}
assert max(CASES["short"].lengths) <= SWITCH < max(CASES["long"].lengths)


def write_released(family: str, folder: Path, config: dict[str, Any]) -> None:
    """A released folder, written without the exporter: one file, or for InternLM2 two shards."""
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(family)
    if family == "phi3":
        save_file(weights, folder / "model.safetensors")
        return
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    placed = {name: parts[place % 2] for place, name in enumerate(weights)}
    for part in parts:
        save_file({n: w for n, w in weights.items() if placed[n] == part}, folder / part)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def native_logits(native: Any, case: Case) -> Tensor:
    found: Tensor = native(
        input_ids=case.ids, pixel_values=case.pixels, attention_mask=case.mask
    ).logits
    return found


def distance(case: Case, ours: Tensor, theirs: Tensor) -> float:
    """Largest difference at real positions."""
    return float((ours - theirs).detach()[case.mask.bool()].abs().max())
