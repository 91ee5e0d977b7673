"""SigLIP's vision encoder, with Hugging Face's parameter names, so that loading is a prefix filter and a
strict load.

    pixels (N,3,S,S) -> patches (N,P,C) -> L pre-norm transformer blocks -> features (N,P,C)

No CLS token; P = (S // patch_size)^2. Left out on purpose, and dropped when a checkpoint is read: the text
tower, the attention-pooling head, logit scale and bias. Shapes: N images, P patches, C width, H heads, D = C
/ H.

References: Zhai et al. 2023 (arXiv 2303.15343); the parameter names are those of transformers'
models/siglip/modeling_siglip.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import BadInput, find, load_weights, read_json, section, to_dataclass


@dataclass(frozen=True)
class SiglipConfig:
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # pixels, square
    patch_size: int = (
        16  # pixels, square; patches do not overlap, and what is left over at the edge is not seen
    )
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    @classmethod
    def from_hf(cls, config: dict, file: Path) -> "SiglipConfig":
        """From a Hugging Face config.json, whole (`vision_config` inside) or the vision part alone."""
        config = section(config, "vision_config", file)
        if config.get("model_type") not in ("siglip_vision_model", "siglip"):
            raise BadInput(f"{file}: model_type {config.get('model_type')!r} is not a SigLIP vision model")
        if config.get("hidden_act", cls.hidden_act) != cls.hidden_act:
            raise BadInput(
                f"{file}: hidden_act {config['hidden_act']!r} is not supported, only {cls.hidden_act}"
            )
        c = to_dataclass(cls, config, file)  # fields that a file leaves out have transformers' own defaults
        if c.hidden_size % c.num_attention_heads:
            raise BadInput(f"{file}: {c.num_attention_heads} heads do not divide a width of {c.hidden_size}")
        return c

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Embeddings(nn.Module):
    """Patches through one convolution, plus a learned position each."""

    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            c.num_channels, c.hidden_size, kernel_size=c.patch_size, stride=c.patch_size
        )
        self.position_embedding = nn.Embedding(c.num_patches, c.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values)  # (N,C,S/p,S/p)
        x = x.flatten(2).transpose(1, 2)  # (N,P,C), row by row
        return x + self.position_embedding.weight


class Attention(nn.Module):
    """Full attention between all patches."""

    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.num_heads = c.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(c.hidden_size, c.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N,P,C) -> (N,H,P,D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.self_attn = Attention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


class Siglip(nn.Module):
    """The vision encoder: vision(pixel_values (N,3,S,S), layer=-2) -> features (N,P,C)."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, layer: int | None = -2) -> Tensor:
        """hidden_states[layer] of transformers: 0 is the embeddings, L (or -1) the last block's output BEFORE
        post_layernorm; None applies post_layernorm to it. Blocks above the asked one are not run.
        """
        num_layers = self.config.num_hidden_layers
        depth = num_layers if layer is None else layer if layer >= 0 else num_layers + 1 + layer
        if not 0 <= depth <= num_layers:
            raise ValueError(f"layer {layer} is outside the {num_layers + 1} hidden states of this encoder")
        size = self.config.image_size
        if pixel_values.shape[1:] != (self.config.num_channels, size, size):
            raise ValueError(
                f"pictures of shape {tuple(pixel_values.shape)}, but this encoder takes (N,3,{size},{size})"
            )
        x = self.embeddings(pixel_values)
        for block in self.encoder.layers[:depth]:
            x = block(x)
        return self.post_layernorm(x) if layer is None else x

    @classmethod
    def load(cls, folder: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "Siglip":
        """From a plain checkpoint: a whole SiglipModel, or a vision model with or without the `vision_model.`
        prefix.
        """
        folder = find(folder)
        config = SiglipConfig.from_hf(read_json(folder / "config.json"), folder / "config.json")
        with torch.device("meta"):
            vision = cls(config)
        load_weights(vision, folder, rename, dtype, device)
        return vision.eval()


def rename(name: str) -> str | None:
    """A tensor's name in a plain SigLIP checkpoint -> its name in Siglip; None for what is dropped on
    purpose.
    """
    name = name.removeprefix("vision_model.")
    return None if name.startswith(("head.", "text_model.", "logit_scale", "logit_bias")) else name
