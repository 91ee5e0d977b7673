"""CompoDistill (arXiv 2510.12184): what the method adds to plain fine-tuning, pure functions and one module.

    TAF   x_v = P_s(P_t(z))                       TeacherAdapterFetch
    VAT   which layers, who matches whom          understanding_layers, match_layers, group_mean
          L_ADL = 1 - (1/k) sum_j cos(A_t, A_s)   visual_attention_loss   (paper, Eq. 2)
          the released code's form                released_attention_loss
    L_KL  KL(teacher || student) on answers       kl_loss                 (paper, Eq. 4)
    L_LM  next-token cross-entropy on answers     lm_loss
    L = L_LM + L_KL + L_ADL, all weights 1

kl_loss, lm_loss and group_mean are definitions, on whole matrices, to be read; training computes the same
without whole matrices, in answer_losses and qwen.Look, and tests equate them. Losses are sums, beside their
count: add both over micro-batches and ranks and divide once, because a mean of means is a different gradient
when the number of answer tokens varies. Losses are computed in float32, and the teacher's side is detached.
Shapes: B batch, T tokens, P visual tokens, k matched layers, m teacher layers, C width, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # the label of a token that is not supervised

# ---------------------------------------------------------------- TAF: the teacher's adapter, fetched


class TeacherAdapterFetch(nn.Module):
    """x_v = P_s(P_t(z)): the teacher's frozen adapter P_t, then one trainable linear map P_s (paper, TAF).

    z (B,P,C_vision) -> P_t -> (B,P,C_t) -> P_s -> (B,P,C_s). With `gelu` there is a GELU before P_s, as in
    the released 0.5B student.
    """

    def __init__(
        self, teacher_adapter: nn.Module, teacher_width: int, student_width: int, gelu: bool = False
    ):
        super().__init__()
        self.teacher = teacher_adapter.requires_grad_(False)  # P_t
        self.student = nn.Linear(teacher_width, student_width)  # P_s
        self.gelu = gelu

    def forward(self, z: Tensor) -> Tensor:
        return self.fetch(self.teacher(z))

    def fetch(self, teacher_tokens: Tensor) -> Tensor:
        """P_s alone, for when P_t(z) has been computed for the teacher already."""
        teacher_tokens = teacher_tokens.to(self.student.weight.dtype)  # P_t may be kept in bfloat16
        return self.student(F.gelu(teacher_tokens) if self.gelu else teacher_tokens)


# ---------------------------------------------------------------- VAT: which layers, and who matches whom


def understanding_layers(num_layers: int, low: float = 0.3, high: float = 0.7) -> list[int]:
    """The layers i with low * L <= i < high * L, counted from 0: of 24 layers 8..16, of 40 layers 12..27."""
    return [i for i in range(num_layers) if low <= i / num_layers < high]


# The released code's fixed lists: language model layers -> (layers as a student, layers as a teacher).
RELEASED_LAYERS = {
    24: (range(8, 15), range(8, 16)),
    28: (range(9, 16), range(9, 18)),
    32: (range(11, 18), range(11, 20)),
    40: (range(13, 20), range(13, 24)),
}


def choose_layers(which: str, num_layers: int, teacher: bool) -> list[int]:
    """Layers by the paper's names, intermediate (the method), early, later, all; or the released code's."""
    if which == "released":
        if num_layers not in RELEASED_LAYERS:
            raise ValueError(
                f"the released code has no list for {num_layers} layers, only for {list(RELEASED_LAYERS)}; "
                "give --layers intermediate"
            )
        return list(RELEASED_LAYERS[num_layers][teacher])
    shares = {"intermediate": (0.3, 0.7), "early": (0.0, 0.3), "later": (0.7, 1.0), "all": (0.0, 1.0)}
    if which not in shares:
        raise ValueError(f"layers {which!r} are not known; choose released or one of {', '.join(shares)}")
    low, high = shares[which]
    return understanding_layers(num_layers, low, high)


def match_layers(student_layers: list[int], teacher_layers: list[int], how: str = "group") -> list[list[int]]:
    """For each of the k student layers, the teacher layers whose mean map is its target (paper, VAT).

    group:  G_j = {t_j .. t_(j+n-1)}, n = m - k + 1: a sliding window, every teacher layer used, order kept
    simple: {t_(1 + floor((j-1) m / k))}, one teacher layer each (ablation)
    """
    k, m = len(student_layers), len(teacher_layers)
    if not 0 < k <= m:
        raise ValueError(
            f"{k} student layers {student_layers} cannot be matched to {m} teacher layers {teacher_layers}: "
            "choose at least one student layer and no more than the teacher has"
        )
    if how == "group":
        n = m - k + 1
        return [teacher_layers[j : j + n] for j in range(k)]
    if how == "simple":
        return [[teacher_layers[j * m // k]] for j in range(k)]
    raise ValueError(
        f"matching {how!r} is not known; choose group or simple (adaptive needs the maps: adaptive_match)"
    )


def group_mean(teacher_maps: dict[int, Tensor], groups: list[list[int]]) -> Tensor:
    """mean_{l in G_j} A_l for each group: {layer: (B,T,P)} -> (k,B,T,P)."""
    return torch.stack([torch.stack([teacher_maps[layer] for layer in group]).mean(0) for group in groups])


@torch.no_grad()
def adaptive_match(student_maps: Tensor, teacher_maps: Tensor, query_mask: Tensor) -> Tensor:
    """Ablation: for each student layer the one teacher layer with the most similar map, anew for every batch.

    student_maps (k,B,T,P), teacher_maps (m,B,T,P), query_mask (B,T) -> the chosen teacher maps (k,B,T,P). The
    paper's exact rule is not public. Ours: the highest cosine of the flattened maps, averaged over the batch;
    no gradient through the choice, and two student layers may choose the same teacher layer. So it depends on
    how a global batch is cut into micro-batches and ranks, unlike everything else here.
    """
    outside = ~query_mask[..., None]
    s = F.normalize(student_maps.masked_fill(outside, 0).float().flatten(2), dim=-1)  # (k,B,T*P)
    t = F.normalize(teacher_maps.masked_fill(outside, 0).float().flatten(2), dim=-1)  # (m,B,T*P)
    return teacher_maps[torch.einsum("kbx,mbx->km", s, t).argmax(1)]


def query_rows(which: str, visual_columns: Tensor, has_image: Tensor, attention_mask: Tensor) -> Tensor:
    """The queries that are aligned, as a (B,T) mask: `all` (paper), `image`, or `text` (all after the image).

    visual_columns (B,P), has_image (B,), attention_mask (B,T). Never padding, nor a sample without a picture.
    """
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # (T,)
    first, last = visual_columns[:, :1], visual_columns[:, -1:]
    rows = {
        "all": position >= first,  # before the image causality leaves no visual mass
        "image": (position >= first) & (position <= last),
        "text": position > last,
    }[which]
    return rows & attention_mask & has_image[:, None]


def span(query_mask: Tensor) -> slice:
    """The shortest slice of T that holds every query of a (B,T) mask: attention is computed there only."""
    used = query_mask.any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)


# ---------------------------------------------------------------- VAT: the loss

EPS = 1e-8  # least length in a cosine; in the row-by-row KL beside every probability


def visual_attention_loss(
    student_maps: Sequence[Tensor] | Tensor,
    teacher_maps: Sequence[Tensor] | Tensor,
    query_mask: Tensor,
    kind: str = "cosine",
    rowwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """L_ADL = 1 - (1/k) sum_j cos(mean_{l in G_j} A^t_l, A^s_j) (paper, Eq. 2) -> (sum, count).

    student_maps, teacher_maps: k of (B,T,P), head-mean attention over the visual tokens, the teacher's
    already matched. query_mask (B,T): the rows that take part. A row without visual mass (before the image,
    or in a sample without one) never does.

    cosine           1 - cos of the flattened (T*P) matrices, mean over k; counts samples        (the method)
    cosine, rowwise  1 - cos of each row of P; counts rows, in every layer                       (ours)
    mse              (student - teacher)^2; counts entries                                       (ablation)
    kl               KL(teacher || student) of each row, made a distribution; counts rows        (ablation)
    """
    k, P = len(student_maps), student_maps[0].shape[-1]
    mass = sum(t.detach().sum(-1) for t in teacher_maps)  # (B,T)
    rows = query_mask & (mass > 0)
    count = attention_count(rows, k, P, kind, rowwise)
    total = torch.zeros((), device=rows.device)
    for s, t in zip(student_maps, teacher_maps):  # one layer's (B,T,P) at a time
        # filled, not multiplied: what padding holds stays out, NaN too
        s, t = (maps.float().masked_fill(~rows[..., None], 0) for maps in (s, t.detach()))
        if kind == "cosine" and not rowwise:
            loss = (1 - cosine(s.flatten(1), t.flatten(1))) * rows.any(1) / k  # (B,)
        elif kind == "cosine":
            loss = (1 - cosine(s, t)) * rows  # (B,T)
        elif kind == "mse":
            loss = (s - t).square()
        else:
            s, t = (maps / (maps.sum(-1, keepdim=True) + EPS) for maps in (s, t))
            loss = t * ((t + EPS).log() - (s + EPS).log())
        total = total + loss.sum()
    return total, count


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity over the last dimension, which keeps a and b for the backward pass and no third."""
    lengths = a.norm(dim=-1).clamp(min=EPS) * b.norm(dim=-1).clamp(min=EPS)
    return (a * b).sum(-1) / lengths


def attention_count(rows: Tensor, num_layers: int, num_columns: int, kind: str, rowwise: bool) -> Tensor:
    """What visual_attention_loss counts, from the rows (B,T) alone: known before any forward pass."""
    if kind not in ("cosine", "mse", "kl"):
        raise ValueError(f"attention loss {kind!r} is not known; choose cosine, mse or kl")
    if kind == "cosine" and not rowwise:
        return rows.any(1).sum()  # samples
    return rows.sum() * num_layers * (num_columns if kind == "mse" else 1)


def released_attention_loss(student_maps: Tensor, teacher_maps: Tensor) -> tuple[Tensor, Tensor]:
    """The attention loss of the released code (commit 8411926), which is not the paper's -> (sum, count).

    student_maps, teacher_maps (k,B,P,P): head-mean attention from visual tokens to visual tokens, samples
    with an image only. Entries above mean + one (unbiased) standard deviation of their map are dropped on
    either side, which removes attention sinks; so are those where the teacher is exactly 0, which is the
    causal triangle. What is left is averaged over the queries, and the two vectors of P are compared by 1 -
    cos: SUMMED over the layers, counted per sample.
    """
    s, t = student_maps.float(), teacher_maps.detach().float()
    number_of_samples = torch.tensor(s.shape[1], device=s.device)
    if s.shape[1] == 0:
        return s.sum(), number_of_samples
    keep = t != 0
    for maps in (s.detach(), t):
        flat = maps.flatten(2)
        keep = keep & (maps <= (flat.mean(-1) + flat.std(-1))[..., None, None])
    number = keep.sum(2).clamp(min=1)  # (k,B,P): queries left in each column
    s, t = ((maps * keep).sum(2) / number for maps in (s, t))
    return (1 - F.cosine_similarity(s, t, dim=-1)).sum(), number_of_samples


# ---------------------------------------------------------------- L_KL and L_LM


def kl_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, shifted: bool = True
) -> tuple[Tensor, Tensor]:
    """Forward KL(teacher || student), full vocabulary, at every answer token (paper, Eq. 4) -> (sum, count).

    student_logits (B,T,Vs), teacher_logits (B,T,Vt), labels (B,T) with -100 where nothing is supervised. Of
    vocabularies of different size the smaller one counts (what lies beyond the tokenizer is padding). The
    distribution that predicts token t stands at t-1; `shifted=False` compares at t itself, as the released
    code does.
    """
    answers = (next_tokens(labels) if shifted else labels) != IGNORE
    return kl_divergence(student_logits[answers], teacher_logits[answers]), answers.sum()


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The sum of KL(teacher || student) over the rows of (n,Vs) and (n,Vt), over the words that both have."""
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    s = student_logits[:, :size].float().log_softmax(-1)
    t = teacher_logits[:, :size].detach().float().log_softmax(-1)
    return F.kl_div(s, t, reduction="sum", log_target=True)


def lm_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy over the answer tokens: logits (B,T,V), labels (B,T) -> (sum, count)."""
    targets = next_tokens(labels)
    answers = targets != IGNORE
    return F.cross_entropy(logits[answers].float(), targets[answers], reduction="sum"), answers.sum()


def next_tokens(labels: Tensor) -> Tensor:
    """labels (B,T) -> (B,T): what each position is to predict, the label of the token after it."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


# ---------------------------------------------------------------- the same two, from hidden states


def answer_losses(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    kl_weight: float = 1.0,
    shifted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """What training runs: lm_loss and kl_loss with at most LOGIT_ROWS rows of logits of a model at a time.

    student, teacher: final hidden states (B,T,C) and output matrix (V,C); labels (B,T). Returns three sums:
    L_LM + kl_weight * L_KL, to differentiate, then L_LM and L_KL, to show. Without a teacher L_KL is 0.
    """
    hidden, head = student
    targets = next_tokens(labels)
    answers = targets != IGNORE
    x, y = hidden[answers], targets[answers]  # (n,C), (n,)
    if teacher is None:
        return _AnswerLosses.apply(x, head, y, None, None, 1.0, 0.0)
    t, t_head = teacher
    if shifted:
        return _AnswerLosses.apply(x, head, y, t[answers], t_head, 1.0, kl_weight)
    at = labels != IGNORE
    weighted_lm, lm, _ = _AnswerLosses.apply(x, head, y, None, None, 1.0, 0.0)
    weighted_kl, _, kl = _AnswerLosses.apply(hidden[at], head, labels[at], t[at], t_head, 0.0, kl_weight)
    return weighted_lm + weighted_kl, lm, kl


LOGIT_ROWS = 64


class _AnswerLosses(torch.autograd.Function):
    """x (n,C), W (V,C) -> the losses of the logits s = xW^T, and in the same pass their gradients.

    With g = dL/ds, dL/dx = gW and dL/dW = g^T x. So each chunk of logits is used up, forward and backward,
    before the next one is made: nothing of size (n,V) is kept or computed twice. Products run in the dtype of
    x, whatever W is held in.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, teacher, teacher_weight, lm_weight, kl_weight):
        lm, kl = x.new_zeros(2, dtype=torch.float32)
        dx, w = torch.zeros_like(x), weight.to(x.dtype)
        teacher_w = None if teacher is None else teacher_weight.to(teacher.dtype)
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i in range(0, len(x), LOGIT_ROWS):
            rows = slice(i, i + LOGIT_ROWS)
            s = F.linear(x[rows], w).requires_grad_()  # (LOGIT_ROWS,V), a leaf: grad mode is off here
            with torch.enable_grad():
                cross_entropy = F.cross_entropy(s.float(), targets[rows], reduction="sum")
                divergence = torch.zeros_like(kl)
                if teacher is not None:
                    divergence = kl_divergence(s, F.linear(teacher[rows], teacher_w))
                (g,) = torch.autograd.grad(lm_weight * cross_entropy + kl_weight * divergence, s)
            lm, kl = lm + cross_entropy.detach(), kl + divergence.detach()
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
        return dx.mul_(upstream), None if dw is None else dw.mul_(upstream), None, None, None, None, None
