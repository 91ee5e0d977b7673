"""Qwen1.5 / Qwen2, with Hugging Face's parameter names and explicit attention returns.

    ids (B,T) -> embeddings (B,T,C) -> L pre-norm blocks (attention, SwiGLU) -> RMSNorm -> logits (B,T,V)

q/k/v have a bias, nothing else has; rotary positions; RMSNorm; keys and values may be shared by groups of
heads; the output head may be tied to the embedding. Left out on purpose: sliding windows (use_sliding_window
is false in every Qwen1.5 checkpoint; true is an error), rope scaling, mixture of experts, dropout.

Attention comes in three forms, on the same mask; tests/test_qwen.py equates them:
    SDPA                 nobody looks: torch's fused kernel, no map exists
    explicit_attention   the plain softmax(QK^T / sqrt(D)) V, whole maps (B,H,T,S), in `attention_layers`
    visual_map           what distillation reads (`Look`): some rows and columns, head mean, beside SDPA
and in one that computes something else on purpose, for the intervention at inference (evals/analyses.py):
    guided               in layers with a `Guide`, visual attention is mixed with another model's

Shapes: B batch, T query tokens, S key tokens (T, or more with a cache), R query rows looked at, H heads, D
head dim, C width, P visual tokens, V vocabulary. References: Bai et al. 2023 (arXiv 2309.16609); names of
transformers' models/qwen2/modeling_qwen2.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint import BadInput, find, load_weights, read_json, section, to_dataclass


@dataclass(frozen=True)
class QwenConfig:
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

    @classmethod
    def from_hf(cls, config: dict, file: Path) -> "QwenConfig":
        """From a Hugging Face config.json of transformers 4 or 5, whole (`text_config` inside) or the
        language part alone.
        """
        config = section(config, "text_config", file)
        if config.get("model_type") != "qwen2":
            raise BadInput(
                f"{file}: model_type {config.get('model_type')!r} is not qwen2, the family of Qwen1.5"
            )
        # transformers 5 writes rope_theta into rope_parameters, 4.x beside it
        rope = section({"rope_parameters": config.get("rope_parameters") or {}}, "rope_parameters", file)
        scaling = section({"rope_scaling": config.get("rope_scaling") or rope}, "rope_scaling", file)
        scaled = scaling.get("rope_type", scaling.get("type", "default")) != "default"
        if config.get("use_sliding_window") or scaled or config.get("hidden_act", "silu") != "silu":
            raise BadInput(
                f"{file}: sliding windows, rope scaling and activations other than silu are not supported"
            )
        c = to_dataclass(cls, {"rope_theta": rope.get("rope_theta"), **config}, file)
        if c.hidden_size % c.num_attention_heads or c.num_attention_heads % c.num_key_value_heads:
            raise BadInput(
                f"{file}: width {c.hidden_size}, {c.num_attention_heads} heads and {c.num_key_value_heads} "
                "key heads do not divide one another"
            )
        return c


class Look(NamedTuple):
    """Which attention to return as k maps (B,R,P): head means, averaged over each of k groups of layers."""

    groups: Sequence[Sequence[int]]  # k groups of layers; [[8], [9]] is a map of each
    rows: slice  # R query tokens, of every sample
    columns: Tensor  # (B,P) key tokens: a sample's visual tokens (evals/analyses.py asks for all)


class Guide(NamedTuple):
    """Visual attention from outside for one layer, head mean (B,T,P), as a teacher's Look gives it."""

    maps: Tensor  # (B,T,P), every query row
    columns: Tensor  # (B,P) key tokens: the visual tokens; every sample has a picture
    share: float  # of these maps in the result: 0.5 is the mean of both, 1.0 a full replacement


class Output(NamedTuple):
    """What a forward pass gives: of `attention_layers` whole maps {layer: (B,H,T,S)}, of a Look its k maps
    [(B,R,P)].
    """

    logits: Tensor  # (B,T,V)
    attentions: dict[int, Tensor] | list[Tensor]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_angles(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (B,T) -> cos, sin (B,1,T,D): the angle of channel pair (i, i + D/2) is position *
    theta^(-2i/D).
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions[:, None, :, None].float() * frequencies  # (B,1,T,D/2)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of x (B,H,T,D)."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """A = softmax(QK^T / sqrt(D)) in float32: q (B,H,T,D), k (B,H,S,D) -> (B,H,T,S).

    mask True = may see; None = causal, where the last of the T queries sees all S keys.
    """
    T, S = q.shape[2], k.shape[2]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is None:  # only the last T keys hide from anyone: query i sees the first i + 1 of them
        hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores[..., S - T :].masked_fill_(hidden, float("-inf"))
    else:
        scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(QK^T / sqrt(D)) V with the probabilities in hand: -> (B,H,T,D), A (B,H,T,S) in float32."""
    attention = probabilities(q, k, mask)
    return attention.to(v.dtype) @ v, attention


def guided(attention: Tensor, guide: Guide) -> Tensor:
    """A' of the intervention (paper, section 3): (B,H,T,S) -> (B,H,T,S), every row sums to 1.

    On the visual columns (1 - share) A + share M, with the same M for all heads; on the text columns A; then
    each row is divided by its sum.
    """
    columns = guide.columns[:, None, None].expand(*attention.shape[:3], -1)  # (B,H,T,P)
    visual = torch.lerp(attention.gather(3, columns), guide.maps[:, None], guide.share)
    attention = attention.scatter(3, columns, visual)
    return attention / attention.sum(-1, keepdim=True)


def visual_columns_of(attention: Tensor, columns: Tensor, unseen: int = 0) -> Tensor:
    """Head mean, then the visual columns (paper, VAT): (B,H,T,S), columns (B,P) -> (B,T,P).

    `unseen` keys were left out at the end of S; their attention is 0.
    """
    mean = F.pad(attention.mean(1), (0, unseen))
    return mean.gather(2, columns[:, None, :].expand(-1, mean.shape[1], -1))


QUERY_ROWS = 128  # whose attention exists at one time in visual_map


@torch.compiler.disable  # compiled, it would be compiled anew for every length
def visual_map(q: Tensor, k: Tensor, mask: Tensor | None, rows: slice, columns: Tensor) -> Tensor:
    """visual_columns_of(probabilities(q, k, mask), columns)[:, rows] -> M (B,R,P), without ever holding A.

    QUERY_ROWS rows at a time and only the keys they may see, computed again in the backward pass: what stays
    in memory between the two passes is (B,R,P) and nothing with heads.
    """
    return _VisualMap.apply(q, k, mask, rows, columns)


def _attention_of_rows(q: Tensor, k: Tensor, mask: Tensor | None, rows: slice):
    """A of `rows`, a few at a time -> which of T they are, how many keys they may see, A (B,H,rows,seen)."""
    for start in range(rows.start, rows.stop, QUERY_ROWS):
        stop = min(start + QUERY_ROWS, rows.stop)
        seen = k.shape[2] - q.shape[2] + stop  # no query of these sees a key beyond
        part = None if mask is None else mask[:, :, start:stop, :seen]
        yield slice(start, stop), seen, probabilities(q[:, :, start:stop], k[:, :, :seen], part)


class _VisualMap(torch.autograd.Function):
    """The gradient in closed form. M is the head mean of A on the visual columns; G = dL/dM there, 0 on the
    other keys. Through the mean and the softmax of each head: dL/dscores = A (G - sum_S A G) / H.
    """

    @staticmethod
    def forward(ctx, q, k, mask, rows, columns):
        ctx.save_for_backward(q, k, mask, columns)
        ctx.rows = rows
        maps = q.new_empty(len(q), rows.stop - rows.start, columns.shape[1], dtype=torch.float32)
        for some, seen, attention in _attention_of_rows(q, k, mask, rows):
            of_rows = maps[:, some.start - rows.start : some.stop - rows.start]
            of_rows.copy_(visual_columns_of(attention, columns, k.shape[2] - seen))
        return maps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dmaps):
        q, k, mask, columns = ctx.saved_tensors
        rows, (B, H, _, D), S = ctx.rows, q.shape, k.shape[2]
        wanted = columns[:, None, :].expand_as(dmaps)
        G = dmaps.new_zeros(B, dmaps.shape[1], S).scatter_add_(2, wanted, dmaps / H)  # (B,R,S)
        dq, dk = torch.zeros_like(q), torch.zeros_like(k, dtype=torch.float32)
        for some, seen, A in _attention_of_rows(q, k, mask, rows):
            dscores = A * G[:, None, some.start - rows.start : some.stop - rows.start, :seen]
            dscores.addcmul_(A, dscores.sum(-1, keepdim=True), value=-1)
            dscores = dscores.to(q.dtype)
            dq[:, :, some] = (dscores @ k[:, :, :seen]) * D**-0.5
            dk[:, :, :seen] += dscores.transpose(-2, -1) @ (q[:, :, some] * D**-0.5)
        return dq, dk.to(k.dtype), None, None, None


class Attention(nn.Module):
    def __init__(self, c: QwenConfig):
        super().__init__()
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.groups = c.num_attention_heads // c.num_key_value_heads  # query heads that share a key head
        kv_width = c.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, kv_width)
        self.v_proj = nn.Linear(c.hidden_size, kv_width)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: list | None, look):
        """x (B,T,C), mask (B,1,T,S) True = may see, None = causal -> (B,T,C), attention.

        look: None, "whole" -> attention (B,H,T,S), or a Look -> the map (B,R,P) of this layer; or a Guide ->
        attention (B,H,T,S), as guided.
        """
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B,T,C) -> (B,H,T,D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:  # this layer's [k, v] of the tokens before, extended in place
            cache[:] = [torch.cat([old, new], 2) for old, new in zip(cache, (k, v))] if cache else [k, v]
            k, v = cache
        k, v = (y.repeat_interleave(self.groups, dim=1) for y in (k, v)) if self.groups > 1 else (k, v)
        if look == "whole":
            out, attention = explicit_attention(q, k, v, mask)
        elif isinstance(look, Guide):
            attention = guided(probabilities(q, k, mask), look)
            out = attention.to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            attention = None if look is None else visual_map(q, k, mask, look.rows, look.columns)
        return self.o_proj(out.transpose(1, 2).flatten(2)), attention


class MLP(nn.Module):
    def __init__(self, c: QwenConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: QwenConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: list | None, look):
        out, attention = self.self_attn(self.input_layernorm(x), rope, mask, cache, look)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), attention


class Decoder(nn.Module):
    def __init__(self, c: QwenConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Cache:
    """Keys and values of the tokens so far, one [k, v] per layer, each (B,H,S,D), and which of them are
    padding.
    """

    def __init__(self, num_layers: int):
        self.layers: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self.visible: Tensor | None = None  # (B,S) bool


class Qwen(nn.Module):
    """The language model: lm(input_ids (B,T)) -> Output(logits (B,T,V), attentions)."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # gradient checkpointing: a layer keeps its input and runs again backward
        self.model = Decoder(config)
        # A tied head is the embedding matrix: no parameter of its own, in memory as in the file.
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def forward(self, *args, **kwargs) -> Output:
        """What `hidden` takes -> logits (B,T,V) and attentions."""
        x, attentions = self.hidden(*args, **kwargs)
        return Output(self.head(x), attentions)

    def hidden(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_layers: Sequence[int] = (),
        look: Look | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        guides: dict[int, Guide] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor] | list[Tensor]]:
        """input_ids (B,T), or inputs_embeds (B,T,C) in their place -> final hidden states (B,T,C) and
        attentions: whole ones (B,H,T,S) of `attention_layers`, or the maps (B,R,P) of a `look`. In the layers
        of `guides` attention is guided, and so are the whole maps of them.

        attention_mask (B,T) bool, False = padding. What a padding position itself computes is never read.
        """
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        groups, guides = [] if look is None else look.groups, guides or {}
        asked = {*attention_layers, *guides, *(i for group in groups for i in group)}
        if outside := sorted(asked - set(range(len(self.model.layers)))):
            raise ValueError(
                f"attention of layers {outside}: this model has layers 0 to {len(self.model.layers) - 1}"
            )
        if look is not None and (attention_layers or guides):
            raise ValueError(
                "attention_layers and look exclude each other: whole maps, or a look's; guided ones are whole"
            )
        positions, mask = self._positions_and_mask(x, attention_mask, cache)
        rope = rope_angles(
            positions, self.config.hidden_size // self.config.num_attention_heads, self.config.rope_theta
        )
        whole, means = {}, [None] * len(groups)
        for i, layer in enumerate(self.model.layers):
            layer_cache = None if cache is None else cache.layers[i]
            wanted = None if i not in asked else guides.get(i, "whole") if look is None else look
            inputs = x, rope, mask, layer_cache, wanted
            if self.checkpointing and torch.is_grad_enabled():
                x, attention = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, attention = layer(*inputs)
            if i in attention_layers:
                whole[i] = attention
            for j, group in enumerate(groups):  # the mean over a group grows as its maps appear
                if i in group and means[j] is None:
                    means[j] = attention / len(group)
                elif i in group:  # in place: a new (B,R,P) each time would cost more than the attention
                    means[j].add_(attention, alpha=1 / len(group))
        return self.model.norm(x), whole if look is None else means

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V,C)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def head(self, x: Tensor) -> Tensor:
        """(..., C) -> logits (..., V)."""
        return F.linear(x, self.head_weight)

    def _positions_and_mask(self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None):
        """-> positions (B,T), counting real tokens only, and the one boolean mask (B,1,T,S), True = may see.
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
        itself = causal.triu(S - T)  # the diagonal, so that no row is empty, padding or not
        return positions, (causal & visible[:, None, None, :]) | itself

    @classmethod
    def load(cls, folder: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "Qwen":
        """From a plain Qwen1.5 / Qwen2 checkpoint: a local folder or a hub name, one file or shards."""
        folder = find(folder)
        config = QwenConfig.from_hf(read_json(folder / "config.json"), folder / "config.json")
        with torch.device("meta"):
            lm = cls(config)
        # some tied files still carry a copy of the embedding
        drop = "lm_head." if config.tie_word_embeddings else ()
        load_weights(lm, folder, lambda name: None if name.startswith(drop) else name, dtype, device)
        return lm.eval()
