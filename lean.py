"""The losses of distill.py without its whole matrices: what training computes unless it is told `--plain`.

    in distill.py                                here
    attention maps (B,H,T,T) of a layer          VisualAttention: some rows and columns, head mean, (B,R,P)
    logits (B,T,V)                               answer_losses: at the answers, some of them at a time
    gradients of L_LM and L_KL by autograd       written out: differences of probabilities
    distillation_loss                            distillation_loss, the same value and gradient

Nothing else is different: matching, distances and counts are distill.py's. tests/test_lean.py equates a whole
step of both for every method, distance, choice of rows and matching. (In bfloat16 each head's probabilities
are rounded to it here before their mean, and in distill.py are not.)

Shapes: B batch, T query tokens, S key tokens, R query rows asked for, P visual tokens, H heads, D head dim, C
width, V vocabulary, n rows of logits.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distill
from controls import control_maps
from distill import EPS, IGNORE, Method, SharedWords, Term
from qwen import Output, fused_attention, probabilities

# ---------------------------------------------------------------- attention: a map and no more

QUERY_ROWS = 128  # whose attention, with heads, exists at one time: 128 suit the caches of a CPU
SMALL = 1 << 18  # scores (B,H,rows,S): so few are kept for the backward pass, not computed again
GPU_SCORES = 1 << 26  # a GPU is kept busy by more: about so many scores (B,H,rows,S) at one time
ALIGN = {"cuda": 8}  # queries and keys in multiples of it: for others a GPU has slower products


@dataclass(frozen=True)
class VisualAttention:
    """An AttentionFunction (qwen.py): torch's fused attention, and beside it the map (B,R,P) of some rows.

    distill.visual_map(A, columns)[:, rows], without ever holding A (B,H,T,S); or of each head, (B,H,R,P).
    """

    rows: slice  # R query tokens, of every sample
    columns: Tensor  # (B,P) key tokens: a sample's visual tokens
    heads: bool = False  # one map a head, and not their mean

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        out, _ = fused_attention(q, k, v, mask)
        return out, visual_map(q, k, mask, self.rows, self.columns, self.heads)


@torch.compiler.disable  # compiled, it would be compiled anew for every length
def visual_map(
    q: Tensor, k: Tensor, mask: Tensor | None, rows: slice, columns: Tensor, heads: bool = False
) -> Tensor:
    """The head mean of the attention of `rows` on `columns` -> (B,R,P), some rows at a time.

    Each part is computed again in the backward pass, unless it is small: in between only (B,R,P) stays, and
    nothing with heads. With `heads` it is (B,H,R,P), H times as much.
    """
    (B, H, T, _), S, n = q.shape, k.shape[2], ALIGN.get(q.device.type, 1)
    step = max(n, GPU_SCORES // (B * H * S) // n * n) if q.is_cuda else QUERY_ROWS
    first = rows.start - rows.start % n
    shape = (B, H, 0, columns.shape[1]) if heads else (B, 0, columns.shape[1])
    parts = [q.new_empty(shape, dtype=torch.float32)]  # there may be no row at all
    for start in range(first, rows.stop, step):
        stop = min(start + step, rows.stop)
        visible = S - T + stop  # keys; no query of these sees one beyond
        part_mask = None if mask is None else mask[:, :, start:stop, :visible]
        inputs = q[:, :, start:stop], k[:, :, :visible], part_mask, columns, S, heads
        if B * H * (stop - start) * visible <= SMALL or not torch.is_grad_enabled():
            part = _map_of_part(*inputs)
        else:
            part = checkpoint(_map_of_part, *inputs, use_reentrant=False, preserve_rng_state=False)
        parts.append(part[..., max(0, rows.start - start) :, :])
    return torch.cat(parts, -2)


def _map_of_part(
    q: Tensor, k: Tensor, mask: Tensor | None, columns: Tensor, keys: int, heads: bool
) -> Tensor:
    """The map of these queries; the keys after those that they see, up to `keys`, have no attention."""
    (_, H, R, _), visible = q.shape, k.shape[2]
    more = -visible % ALIGN.get(q.device.type, 1) if mask is None else 0
    if more:  # as many queries as keys, so that they see what they saw
        q, k = (F.pad(x, (0, 0, 0, more)) for x in (q, k))
    attention = probabilities(q, k, mask, q.dtype)  # in bfloat16 half the bytes; the sum is float32
    if heads:
        attention = F.pad(attention[:, :, :R, :visible].float(), (0, keys - visible))  # (B,H,R,S)
        return distill.visual_maps_of_heads(attention, columns)
    head_mean = attention.sum(1, dtype=torch.float32)[:, :R, :visible] / H
    head_mean = F.pad(head_mean, (0, keys - visible))  # (B,R,S), R of these queries
    return head_mean.gather(2, columns[:, None, :].expand(-1, R, -1))


def shortest_slice(rows: Tensor) -> slice:
    """The shortest slice of T that holds every query of a (B,T) mask: attention is computed there only."""
    used = rows.any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)


def visual_attention_of(batch: dict, which: str, heads: bool = False) -> tuple[VisualAttention, Tensor]:
    """What sees the query rows `all`, `image` or `text` of a batch, and which of its R rows count, (B,R)."""
    rows = distill.query_rows(batch, which)
    some = shortest_slice(rows)
    return VisualAttention(some, batch["visual_columns"], heads), rows[:, some]


def teacher_targets(
    teacher: Output, student_layers: list[int], batch: dict, rows: Tensor | None, first: int, method: Method
) -> Output:
    """The teacher's output with its maps averaged over their groups: fewer to hold while the student runs.

    They are k now, each matched to itself by `group` and by `simple`; adaptive matching and matched heads
    choose from all maps. A control is a linear map, and comes to the same before and after the mean. rows
    (B,R): which of the R tokens from `first` on count.
    """
    maps = teacher.attentions
    if not maps:
        return teacher
    if method.matching != "adaptive" and not distill.DISTANCES[method.distance].heads:
        groups = distill.match_layers(student_layers, list(maps), method.matching)
        maps = dict(zip(student_layers, distill.group_mean(maps, groups)))
    if method.control:
        maps = control_maps(maps, batch, method.control, rows, first)
    return teacher._replace(attentions=maps)


# ---------------------------------------------------------------- logits: at the answers, a few at a time

LOGIT_ROWS, GPU_LOGIT_ROWS = 64, 512  # that exist at one time


# Logits (n,Vs) and (n,Vt) -> a divergence summed over the rows, and its gradient (n,V) at the student's; V is
# the smaller vocabulary.
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def kl_with_gradient(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """distill.kl_divergence, and its gradient softmax(s) - softmax(t)."""
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_s = student_logits[:, :size].float().log_softmax(-1)
    log_t = teacher_logits[:, :size].float().log_softmax(-1)
    p_t = log_t.exp()
    kl = log_t.sub_(log_s).mul_(p_t).sum()  # what is done in place saves an (n,V)
    return kl, log_s.exp_().sub_(p_t)


def shared_kl_with_gradient(
    words: SharedWords, student_logits: Tensor, teacher_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """distill.shared_kl_divergence, and its gradient.

    Of a word that both have p_s - p_t, as ever; of the others p_s (1 - t/s), with s and t the probabilities
    of all of the student's and of all of the teacher's. (Where the student has none of them, what the
    teacher gives them is lost: p_s (1 - t) - p_t.)
    """
    log_s = distill.log_p_of_shared(student_logits, words.student, words.student_rest)  # (n,m+1)
    p_t = distill.log_p_of_shared(teacher_logits, words.teacher, words.teacher_rest).exp()
    kl = F.kl_div(log_s, p_t, reduction="sum")
    size = len(words.student) + len(words.student_rest)  # of the student's rows, without padding of its own
    p, t = student_logits[:, :size].float().softmax(-1), p_t[:, -1:]
    live = log_s[:, -1:] > math.log(EPS)
    g = p * (1 - t * ~live)
    g[:, words.student] -= p_t[:, :-1]
    if len(words.student_rest):
        g[:, words.student_rest] -= p[:, words.student_rest] * live * t / log_s[:, -1:].exp()
    return kl, g


def cross_entropy_with_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(s) at the targets (n,), summed, and its gradient: softmax(s), less 1 at the targets."""
    log_s, at = logits.float().log_softmax(-1), targets[:, None]
    cost = -log_s.gather(1, at).sum()
    return cost, log_s.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=log_s.dtype))


def answer_losses(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    weights: Mapping[str, float],
    totals: Mapping[str, Tensor],
    shifted: bool = True,
    kl_labels: Tensor | None = None,
    words: SharedWords | None = None,
) -> tuple[Tensor, dict[str, Term]]:
    """distill.lm_loss and kl_loss with some rows of logits of a model at a time.

    student, teacher: final hidden states (B,T,C) and output matrix (V,C). kl_labels, words: of two
    vocabularies. Returns the weighted sum, divided by the totals, which alone has a gradient, and the terms.
    """
    targets = distill.next_tokens(labels)
    answers = targets != IGNORE  # where answers are predicted
    kl_labels = labels if kl_labels is None else kl_labels
    compared = (distill.next_tokens(kl_labels) if shifted else kl_labels) != IGNORE  # where L_KL stands
    divergence = partial(shared_kl_with_gradient, words) if words else kl_with_gradient
    lm_weight, kl_weight = weights.get("lm", 0.0), weights.get("kl", 0.0)
    # same positions, same total: one pass over the logits
    if "lm" in weights and "kl" in weights and shifted and not words:
        loss, lm, kl = logit_losses(student, teacher, answers, targets, lm_weight, kl_weight)
        count = answers.sum()
        return loss / totals["lm"].clamp(min=1), {"lm": Term(lm, count), "kl": Term(kl, count)}
    loss, terms = student[0].new_zeros((), dtype=torch.float32), {}
    if "lm" in weights:
        part, lm, _ = logit_losses(student, None, answers, targets, lm_weight)
        loss, terms["lm"] = loss + part / totals["lm"].clamp(min=1), Term(lm, answers.sum())
    if "kl" in weights:
        part, _, kl = logit_losses(student, teacher, compared, None, 0.0, kl_weight, divergence)
        loss, terms["kl"] = loss + part / totals["kl"].clamp(min=1), Term(kl, compared.sum())
    return loss, terms


def logit_losses(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | None,
    rows: Tensor,
    targets: Tensor | None = None,
    lm_weight: float = 0.0,
    kl_weight: float = 1.0,
    divergence: Divergence = kl_with_gradient,
) -> tuple[Tensor, Tensor, Tensor]:
    """At rows (B,T) the sums of L_LM and L_KL -> their weighted sum, which alone has a gradient, and both.

    student, teacher: hidden states (B,T,C) and output matrix (V,C). targets (B,T): without them no L_LM,
    without a teacher no L_KL, which is `kl_with_gradient` or another divergence.
    """
    (hidden, head), (t_hidden, t_head) = student, teacher or (None, None)
    t_rows, targets = None if teacher is None else t_hidden[rows], None if targets is None else targets[rows]
    return _LogitLosses.apply(hidden[rows], head, targets, t_rows, t_head, lm_weight, kl_weight, divergence)


class _LogitLosses(torch.autograd.Function):
    """x (n,C), W (V,C) -> the losses of the logits s = xW^T, and in the same pass their gradients.

    With g = dL/ds, dL/dx = gW and dL/dW = g^T x. So each chunk of logits is used up, forward and backward,
    before the next one is made: nothing of size (n,V) is kept or computed twice. Products run in the dtype of
    x, whatever W is held in.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, teacher, teacher_weight, lm_weight, kl_weight, divergence_of):
        lm, kl = x.new_zeros(2, dtype=torch.float32)
        dx, w = torch.zeros_like(x), weight.to(x.dtype)
        teacher_w = None if teacher is None else teacher_weight.to(teacher.dtype)
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        step = GPU_LOGIT_ROWS if x.is_cuda else LOGIT_ROWS
        for i in range(0, len(x), step):
            rows = slice(i, i + step)
            s, g = F.linear(x[rows], w), None  # (step,V)
            if targets is not None:
                cost, g_lm = cross_entropy_with_gradient(s, targets[rows])
                lm, g = lm + cost, g_lm.mul_(lm_weight)
            if teacher is not None:
                cost, g_kl = divergence_of(s, F.linear(teacher[rows], teacher_w))
                kl, more = kl + cost, s.shape[1] - g_kl.shape[1]
                g_kl = F.pad(g_kl, (0, more)) if more else g_kl
                g = g_kl.mul_(kl_weight) if g is None else g.add_(g_kl, alpha=kl_weight)
            if not any(ctx.needs_input_grad):  # of a teacher
                continue
            g = g.to(x.dtype)
            dx[rows] = g @ w
            if dw is not None and g.dtype == dw.dtype:
                dw.addmm_(g.T, x[rows])
            elif dw is not None:
                dw += g.T @ x[rows]  # in bfloat16 a sum of many chunks would lose its small parts
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(lm, kl)
        return lm_weight * lm + kl_weight * kl, lm, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        dx, dw = ctx.saved_tensors  # changed in place: their only use, and there is one backward pass
        return dx.mul_(upstream), None if dw is None else dw.mul_(upstream), *[None] * 6


# ---------------------------------------------------------------- the whole method

TERMS = {"lm", "kl", "adl"}  # the losses that have a lean form


def distillation_loss(
    student: Output,
    teacher: Output | None,
    heads: tuple[Tensor, Tensor | None],
    rows: Tensor | None,
    batch: dict,
    method: Method,
    weights: Mapping[str, float],
    totals: Mapping[str, Tensor],
    words: SharedWords | None = None,
) -> tuple[Tensor, dict[str, Term]]:
    """distill.distillation_loss, from hidden states (B,T,C) and maps (B,R,P) -> L, and its terms by name.

    student, teacher: what their forward passes returned, without logits, with `visual_attention_of` the batch
    in the layers to be aligned, the teacher's `teacher_targets`. heads: their output matrices (V,C). rows
    (B,R): which rows of the maps count.
    """
    of_teacher = (teacher.hidden, heads[1]) if "kl" in weights else None
    of_student = student.hidden, heads[0]
    labels = batch["labels"], weights, totals, method.kl_shifted, batch.get("kl_labels"), words
    loss, terms = answer_losses(of_student, of_teacher, *labels)
    if "adl" in weights:
        targets = distill.matched_targets(student.attentions, teacher.attentions, rows, method.matching)
        adl = distill.visual_attention_loss(student.attentions.values(), targets, rows, method.distance)
        loss, terms["adl"] = loss + weights["adl"] * adl.sum / totals["adl"].clamp(min=1), adl
    return loss, terms
