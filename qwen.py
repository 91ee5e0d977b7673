"""Qwen1.5 / Qwen2, with Hugging Face's parameter names and explicit attention returns.

    ids (B,T) -> embeddings (B,T,C) -> L pre-norm blocks (attention, MLP) -> norm -> logits (B,T,V)

q, k and v have a bias, nothing else has; rotary positions; RMSNorm (root mean square norm); SwiGLU (a gated
MLP); keys and values may be shared by groups of heads; the output head may be tied to the embedding. Left out
on purpose: sliding windows (use_sliding_window is false in every Qwen1.5 checkpoint; true is an error), rope
scaling, dropout. Without the biases it is Llama (model_type llama). With num_experts every other MLP is a
mixture of experts (moe.py), which no Qwen1.5 is, but LLaVA-MoD's student.

Every layer attends through a function of one signature, AttentionFunction. A caller who wants to see the
attention of a layer gives that layer another one:

    lm(ids).attentions                                       {}: fused_attention everywhere, no map exists
    lm(ids, attention={8: explicit_attention}).attentions    {8: A (B,H,T,S)}

lean.py and evals/analyses.py have functions of their own. Shapes: B batch, T query tokens, S key tokens (T,
or more with a cache), H heads, D head dim, C width, V vocabulary.

References: Bai et al. 2023 (arXiv 2309.16609); names of transformers' models/qwen2/modeling_qwen2.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe


@dataclass(frozen=True)
class QwenConfig:
    """The fields of a Hugging Face config.json that the network depends on, with transformers' defaults."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    hidden_act: str = "silu"
    num_experts: int = 0  # of every other layer; 0: all are dense
    qkv_bias: bool = True  # False: model_type llama, which is the same network without it


class Output(NamedTuple):
    """What a forward pass returns."""

    hidden: Tensor  # (B,T,C), after the last norm: what the head reads
    logits: Tensor | None  # (B,T,V), or None where nobody asked for them
    attentions: dict[int, Tensor | None]  # of each layer in `attention` what its function returned
    routing: dict[int, Tensor]  # of each layer with experts the router's shares, (B,T,E)


# ---------------------------------------------------------------- attention

# How one layer attends: q (B,H,T,D), k and v (B,H,S,D), mask (B,1,T,S) True = may see, None = causal
# -> its output (B,H,T,D), and what the caller is to see of its attention (None: nothing)
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    """softmax(QK^T / sqrt(D)) V by torch's fused kernel: the map never exists."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None), None


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same with the map in hand -> (B,H,T,D), A (B,H,T,S) in float32."""
    attention = probabilities(q, k, mask)
    return attention.to(v.dtype) @ v, attention


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """A = softmax(QK^T / sqrt(D)), computed in float32: q (B,H,T,D), k (B,H,S,D) -> (B,H,T,S) in `dtype`.

    mask True = may see; None = causal, where the last of the T queries sees all S keys.
    """
    T, S = q.shape[2], k.shape[2]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    with torch.no_grad():  # where A is 0 the softmax gives no gradient: there is nothing to remember
        if mask is None:  # only the last T keys hide from anyone: query i sees the first i + 1 of them
            future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
            scores[..., S - T :].masked_fill_(future, float("-inf"))
        else:
            scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1, dtype=dtype)


def rope_angles(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (B,T,1,D) at positions (B,T): channel pair (i, i + D/2) turns by p * theta^(-2i/D)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions[:, :, None, None].float() * frequencies  # (B,T,1,D/2)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of x (B,T,H,D)."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


# ---------------------------------------------------------------- the network


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learned weight a channel: (B,T,C) -> (B,T,C)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # computed in float32 and returned in the dtype of x; autocast would return float32
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c: QwenConfig):
        super().__init__()
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.groups = c.num_attention_heads // c.num_key_value_heads  # query heads that share a key head
        kv_width = c.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: list[Tensor] | None,
        attend: AttentionFunction,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B,T,C) -> (B,T,C), and what `attend` returns of the attention."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B,T,C) -> (B,T,H,D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, *rope), rotate(k, *rope), v))  # -> (B,H,T,D)
        if cache is not None:  # this layer's [k, v] of the tokens before, extended in place
            cache[:] = [torch.cat([old, new], 2) for old, new in zip(cache, (k, v))] if cache else [k, v]
            k, v = cache
        if self.groups > 1:  # (B, key heads, S, D) -> (B,H,S,D)
            k = k.repeat_interleave(self.groups, dim=1)
            v = v.repeat_interleave(self.groups, dim=1)
        out, attention = attend(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2)), attention  # (B,H,T,D) -> (B,T,C)


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x), (B,T,C) -> (B,T,C)."""

    def __init__(self, c: QwenConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One block: attention, then the MLP, each on a normed input and added to what came in."""

    def __init__(self, c: QwenConfig, sparse: bool = False):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        if sparse:
            self.mlp = moe.Experts([MLP(c) for _ in range(c.num_experts)], c.hidden_size)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: list[Tensor] | None,
        attend: AttentionFunction,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x (B,T,C) -> (B,T,C), what `attend` returns of the attention, and the router's shares (B,T,E)."""
        out, attention = self.self_attn(self.input_layernorm(x), rope, mask, cache, attend)
        x = x + out
        out = self.mlp(self.post_attention_layernorm(x))
        out, routing = out if isinstance(self.mlp, moe.Experts) else (out, None)
        return x + out, attention, routing


class Decoder(nn.Module):
    """Everything but the output head; Qwen.forward runs it."""

    def __init__(self, c: QwenConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        sparse = [moe.is_sparse(i, c.num_experts) for i in range(c.num_hidden_layers)]
        self.layers = nn.ModuleList(Layer(c, one) for one in sparse)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Cache:
    """Keys and values of the tokens so far, and which of these tokens are padding."""

    def __init__(self, num_layers: int):
        self.layers: list[list[Tensor]] = [[] for _ in range(num_layers)]  # [k, v] each, (B,H,S,D)
        self.visible: Tensor | None = None  # (B,S) bool


class Qwen(nn.Module):
    """The language model: lm(input_ids (B,T)) -> Output."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # gradient checkpointing: a layer keeps its input and runs again backward
        self.model = Decoder(config)
        self.lm_head = None  # tied: the embedding matrix, no parameter of its own, in memory as in the file
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention: Mapping[int, AttentionFunction] | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        logits: bool = True,
    ) -> Output:
        """input_ids (B,T), or inputs_embeds (B,T,C) in their place -> Output.

        attention_mask (B,T) bool, False = padding; what a padding position itself computes is never read.
        attention: layer, counted from 0 -> how it attends. logits=False leaves the head out.
        ValueError: a layer that is not there.
        """
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        c, attention, attentions, routing = self.config, attention or {}, {}, {}
        if outside := sorted(set(attention) - set(range(c.num_hidden_layers))):
            last = c.num_hidden_layers - 1
            raise ValueError(f"attention of layers {outside}: this model has layers 0 to {last}")
        positions, mask = self._positions_and_mask(x, attention_mask, cache)
        angles = rope_angles(positions, c.hidden_size // c.num_attention_heads, c.rope_theta)
        rope = tuple(values.to(x.dtype) for values in angles)  # once for all layers
        for i, layer in enumerate(self.model.layers):
            layer_cache = None if cache is None else cache.layers[i]
            inputs = x, rope, mask, layer_cache, attention.get(i, fused_attention)
            if self.checkpointing and torch.is_grad_enabled():
                x, seen, shares = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, seen, shares = layer(*inputs)
            if i in attention:
                attentions[i] = seen
            if shares is not None:
                routing[i] = shares
        x = self.model.norm(x)
        return Output(x, self.head(x) if logits else None, attentions, routing)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V,C)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def head(self, x: Tensor) -> Tensor:
        """(..., C) -> logits (..., V)."""
        return F.linear(x, self.head_weight)

    def _positions_and_mask(self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None):
        """Positions (B,T), counting real tokens only, and the one boolean mask (B,1,T,S), True = may see.

        Without padding and cache the mask is None: causal.
        """
        B, T = x.shape[:2]
        if attention_mask is None and cache is None:
            return torch.arange(T, device=x.device).expand(B, T), None
        visible = attention_mask.bool() if attention_mask is not None else x.new_ones(B, T, dtype=torch.bool)
        if cache is not None:
            visible = visible if cache.visible is None else torch.cat([cache.visible, visible], 1)
            cache.visible = visible
        S = visible.shape[1]
        positions = (visible.cumsum(1) - 1).clamp(min=0)[:, S - T :]
        causal = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        itself = causal.triu(S - T)  # the diagonal: a padding query sees itself, or its softmax would be NaN
        return positions, (causal & visible[:, None, None, :]) | itself
