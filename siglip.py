"""SigLIP's vision encoder, with Hugging Face's parameter names and explicit attention returns.

    pixels (N,3,S,S) -> patches (N,P,C) -> L pre-norm transformer blocks -> features (N,P,C)

No CLS token; P = (S // patch_size)^2. Left out on purpose, and dropped when a checkpoint is read: the text
tower, the attention-pooling head, logit scale and bias. Shapes: N images, S side in pixels, P patches, C
width, H heads, D head dim, L layers.

References: Zhai et al. 2023 (arXiv 2303.15343); the parameter names are those of transformers'
models/siglip/modeling_siglip.py.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class SiglipConfig:
    """The fields of a Hugging Face config.json that the network depends on, with transformers' defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # pixels, square
    patch_size: int = 16  # pixels, square, no overlap; what is left over at the edge is not seen
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    @property
    def num_patches(self) -> int:
        """P = (S // patch_size)^2."""
        return (self.image_size // self.patch_size) ** 2


class VisionOutput(NamedTuple):
    """What a forward pass returns."""

    features: Tensor  # (N,P,C)
    attentions: dict[int, Tensor]  # of each layer in `attention_layers` A (N,H,P,P), in float32


class Embeddings(nn.Module):
    """Patches through one convolution, plus a learned position each."""

    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, stride=c.patch_size)
        self.position_embedding = nn.Embedding(c.num_patches, c.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        cudnn = torch.backends.cudnn
        with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):  # float32 is to be float32 on a GPU, too
            x = self.patch_embedding(pixel_values)  # (N,C,S/p,S/p)
        x = x.flatten(2).transpose(1, 2).contiguous()  # (N,P,C), row by row; all layers keep this order
        return x + self.position_embedding.weight


class Attention(nn.Module):
    """Full attention between all patches."""

    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.num_heads = c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, explicit: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (N,P,C) -> (N,P,C), A (N,H,P,P) or, unless it is explicit, None."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N,P,C) -> (N,H,P,D)
        k = self.k_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if explicit:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            attention = scores.softmax(-1, dtype=torch.float32)
            out = attention.to(v.dtype) @ v
        else:
            attention = None  # torch's fused kernel makes no map
            out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2)), attention  # (N,H,P,D) -> (N,P,C)


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

    def forward(self, x: Tensor, explicit: bool = False) -> tuple[Tensor, Tensor | None]:
        out, attention = self.self_attn(self.layer_norm1(x), explicit)
        x = x + out
        return x + self.mlp(self.layer_norm2(x)), attention


class Encoder(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


class Siglip(nn.Module):
    """The vision encoder: vision(pixel_values (N,3,S,S)) -> VisionOutput."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, pixel_values: Tensor, layer: int | None = -2, attention_layers: Collection[int] = ()
    ) -> VisionOutput:
        """Pictures (N,3,S,S) in [-1, 1] -> features (N,P,C), which transformers calls hidden_states[layer].

        layer: 0 is the embeddings, L (or -1) the last block's output BEFORE post_layernorm; None applies
        post_layernorm to it. Blocks above the asked one are not run.
        ValueError: a layer that is not there or not run, pictures of another size.
        """
        num_layers, size = self.config.num_hidden_layers, self.config.image_size
        depth = num_layers if layer is None else layer  # how many blocks are run
        if depth < 0:
            depth += num_layers + 1
        if not 0 <= depth <= num_layers:
            raise ValueError(f"layer {layer} is outside the {num_layers + 1} hidden states of this encoder")
        if outside := sorted(set(attention_layers) - set(range(depth))):
            raise ValueError(f"attention of layers {outside}: layers 0 to {depth - 1} are run")
        if pixel_values.shape[1:] != (self.config.num_channels, size, size):
            shape = tuple(pixel_values.shape)
            raise ValueError(f"pictures of shape {shape}, but this encoder takes (N,3,{size},{size})")
        x, attentions = self.embeddings(pixel_values), {}
        for i, block in enumerate(self.encoder.layers[:depth]):
            x, attention = block(x, i in attention_layers)
            if i in attention_layers:
                attentions[i] = attention
        return VisionOutput(self.post_layernorm(x) if layer is None else x, attentions)
