"""CompoDistill (arXiv 2510.12184): what the method adds to plain fine-tuning, as the paper prints it.

    TAF   teacher adapter fetch        x_v = P_s(P_t(z))                        TeacherAdapterFetch
    VAT   visual attention alignment   which layers, and who matches whom       choose_layers, match_layers
    ADL   attention distillation       L_ADL = 1 - (1/k) sum_j cos(A_t, A_s)    visual_attention_loss   Eq. 2
    KL    Kullback-Leibler             L_KL = KL(teacher || student), answers   kl_loss                 Eq. 4
    LM    language modelling           L_LM = cross-entropy, answers            lm_loss
          all of it                    L = L_LM + L_KL + L_ADL                  distillation_loss

This is the method on whole matrices, to be read and to be changed: `python train.py --plain` trains with it.
Without that flag training computes the same from parts of the matrices (lean.py), and tests/test_lean.py
equates both over a whole step. Losses are computed in float32, and the teacher's side has no gradient.

Shapes: B batch, T tokens, P visual tokens, H heads, k matched layers, C width, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controls import control_maps
from qwen import Output

IGNORE = -100  # the label of a token that is not supervised
EPS = 1e-8  # the least norm in a cosine; added to the probabilities in the KL of rows

# ---------------------------------------------------------------- TAF: the teacher's adapter, fetched


class TeacherAdapterFetch(nn.Module):
    """x_v = P_s(P_t(z)): the teacher's frozen adapter P_t, then one trainable linear map P_s (paper, TAF).

    z are the vision encoder's features of the pictures, x_v the visual tokens that the student reads:
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

# The paper's names of layers: from which to which share of the depth.
DEPTH_RANGES = {"intermediate": (0.3, 0.7), "early": (0.0, 0.3), "later": (0.7, 1.0), "all": (0.0, 1.0)}


def understanding_layers(num_layers: int, which: str = "intermediate") -> list[int]:
    """The layers i with low * L <= i < high * L, counted from 0: of 24 layers 8..16, of 40 layers 12..27."""
    low, high = DEPTH_RANGES[which]
    return [i for i in range(num_layers) if low <= i / num_layers < high]


# The released code's fixed lists: language model layers -> (layers as a student, layers as a teacher).
RELEASED_LAYERS = {
    24: (range(8, 15), range(8, 16)),
    28: (range(9, 16), range(9, 18)),
    32: (range(11, 18), range(11, 20)),
    40: (range(13, 20), range(13, 24)),
}


def numbered_layers(text: str) -> list[int]:
    """Layers by number, counted from 0: "8-16" or "2,5,7-9" -> [8 .. 16], [2, 5, 7, 8, 9].

    ValueError: no such text, or layers that do not rise.
    """
    layers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not re.fullmatch(r"\d{1,4}(-\d{1,4})?", part) or int(last or first) < int(first):
            break
        layers += range(int(first), int(last or first) + 1)
    else:
        if layers == sorted({*layers}):
            return layers
    raise ValueError(f"layers {f'{text!r}':.60} are no rising numbers; give them as 8-16 or 2,5,7-9")


def choose_layers(which: str, num_layers: int, teacher: bool) -> list[int]:
    """Layers by the paper's names: intermediate (the method), early, later, all; the released code's; or by
    their numbers."""
    if which[:1].isdecimal():
        layers = numbered_layers(which)
        if layers[-1] >= num_layers:
            raise ValueError(f"layers {which}: this model has layers 0 to {num_layers - 1}")
        return layers
    if which == "released":
        if num_layers not in RELEASED_LAYERS:
            raise ValueError(
                f"the released code has no list for {num_layers} layers, only for {list(RELEASED_LAYERS)}; "
                "give --layers intermediate"
            )
        as_student, as_teacher = RELEASED_LAYERS[num_layers]
        return list(as_teacher if teacher else as_student)
    if which not in DEPTH_RANGES:
        raise ValueError(
            f"layers {which!r} are not known; choose released or one of {', '.join(DEPTH_RANGES)}"
        )
    return understanding_layers(num_layers, which)


def aligned_layers(method: "Method", student_depth: int, teacher_depth: int) -> tuple[list[int], list[int]]:
    """The student's and the teacher's layers that a method compares, from their numbers of layers.

    ValueError: layers that are not known, or that cannot be matched.
    """
    student_layers = choose_layers(method.layers, student_depth, teacher=False)
    teacher_layers = choose_layers(method.teacher_layers or method.layers, teacher_depth, teacher=True)
    adaptive = method.matching == "adaptive"  # which chooses from all of the teacher's
    groups = match_layers(student_layers, teacher_layers, "group" if adaptive else method.matching)
    if (only := method.align_layer) is not None:
        if only not in student_layers:
            raise ValueError(f"layer {only} is not among the student's aligned layers, {student_layers}")
        teacher_layers = teacher_layers if adaptive else groups[student_layers.index(only)]
        student_layers = [only]  # and that group is the only one that these can form
    return student_layers, teacher_layers


MATCHINGS = ("group", "simple", "adaptive")


def match_layers(student_layers: list[int], teacher_layers: list[int], how: str = "group") -> list[list[int]]:
    """For each of the k student layers, the teacher layers whose mean map is its target (paper, VAT).

    group:  G_j = {t_j .. t_(j+n-1)}, n = m - k + 1: a sliding window, every teacher layer used, order kept
    simple: {t_(1 + floor((j-1) m / k))}, one teacher layer each (ablation)
    """
    k, m = len(student_layers), len(teacher_layers)
    if not 0 < k <= m:
        raise ValueError(
            f"{k} student layers {student_layers} cannot be matched to {m} teacher layers {teacher_layers}: "
            "choose at least one student layer and no more than the teacher has (--student-layers)"
        )
    if how == "group":
        n = m - k + 1
        return [teacher_layers[j : j + n] for j in range(k)]
    if how == "simple":
        return [[teacher_layers[j * m // k]] for j in range(k)]
    raise ValueError(f"matching {how!r} is not known; choose group or simple (adaptive_match needs the maps)")


@torch.no_grad()
def adaptive_match(
    student_maps: dict[int, Tensor], teacher_maps: dict[int, Tensor], rows: Tensor
) -> list[list[int]]:
    """Ablation: for each student layer the one teacher layer with the most similar map, anew for every batch.

    So it depends on how a global batch is cut into micro-batches and ranks, unlike everything else here. The
    paper's exact rule is not public. Ours: the highest cosine of the flattened maps, averaged over the batch;
    no gradient through the choice; two student layers may choose the same teacher layer. {layer: (B,T,P)}
    each, rows (B,T).
    """
    student = torch.stack([keep_rows(maps, rows).flatten(1) for maps in student_maps.values()])  # (k,B,T*P)
    teacher = torch.stack([keep_rows(maps, rows).flatten(1) for maps in teacher_maps.values()])  # (m,B,T*P)
    similarity = torch.einsum("kbx,mbx->km", F.normalize(student, dim=-1), F.normalize(teacher, dim=-1))
    layers = list(teacher_maps)
    return [[layers[best]] for best in similarity.argmax(1).tolist()]


def group_mean(teacher_maps: dict[int, Tensor], groups: list[list[int]]) -> list[Tensor]:
    """mean_{l in G_j} A_l for each group: {layer: (B,T,P)} -> k of (B,T,P)."""
    means = []
    for first, *others in groups:
        mean = teacher_maps[first] / (1 + len(others)) if others else teacher_maps[first]
        for layer in others:  # in place: a new map for each would cost more than the attention that made it
            mean.add_(teacher_maps[layer], alpha=1 / (1 + len(others)))
        means.append(mean)
    return means


def matched_targets(
    student_maps: dict[int, Tensor], teacher_maps: dict[int, Tensor], rows: Tensor, matching: str
) -> Iterable[Tensor]:
    """For each student layer the map that it is pulled to: {layer: (B,T,P)} of both -> k of (B,T,P).

    With heads, (B,H,T,P), all those of its group side by side, one layer at a time: heads of different layers
    have nothing in common, of which there could be a mean.
    """
    if matching == "adaptive":
        return group_mean(teacher_maps, adaptive_match(student_maps, teacher_maps, rows))
    groups = match_layers(list(student_maps), list(teacher_maps), matching)
    if next(iter(teacher_maps.values())).dim() == 4:
        return (torch.cat([teacher_maps[layer] for layer in group], 1) for group in groups)
    return group_mean(teacher_maps, groups)


# ---------------------------------------------------------------- VAT: what is compared


def visual_map(attention: Tensor, columns: Tensor) -> Tensor:
    """Ã: the head mean of A, then its visual columns (paper, VAT): (B,H,T,S), columns (B,P) -> (B,T,P)."""
    head_mean = attention.mean(1)  # (B,T,S)
    return head_mean.gather(2, columns[:, None, :].expand(-1, head_mean.shape[1], -1))


def visual_maps_of_heads(attention: Tensor, columns: Tensor) -> Tensor:
    """The visual columns of each head: (B,H,T,S), columns (B,P) -> (B,H,T,P)."""
    return attention.gather(3, columns[:, None, None].expand(-1, *attention.shape[1:3], -1))


ROWS = ("all", "image", "text")


def query_rows(batch: dict, which: str) -> Tensor:
    """The queries that are aligned, as a (B,T) mask: `all` (paper), `image`, or `text` (all after the image).

    Never padding, nor a sample without a picture; and before the image causality leaves no attention on it.
    """
    if which not in ROWS:
        raise ValueError(f"rows {which!r} are not known; choose one of {', '.join(ROWS)}")
    columns = batch["visual_columns"]  # (B,P)
    first, last = columns[:, :1], columns[:, -1:]
    position = torch.arange(batch["attention_mask"].shape[1], device=columns.device)  # (T,)
    rows = {
        "all": position >= first,
        "image": (position >= first) & (position <= last),
        "text": position > last,
    }[which]
    rows = rows & batch["attention_mask"] & batch["has_image"][:, None]
    return rows & batch["covered"] if "covered" in batch else rows  # by a token of another tokenizer


def keep_rows(maps: Tensor, rows: Tensor, heads: bool = False) -> Tensor:
    """maps (B,T,P), or with heads (B,H,T,P), in float32, 0 outside the rows (B,T).

    Filled, not multiplied: NaN in padding stays out.
    """
    if (len(maps), *maps.shape[1 + heads : -1]) != rows.shape:
        raise ValueError(f"maps of shape {tuple(maps.shape)} do not fit rows (B,T) of {tuple(rows.shape)}")
    rows = rows[:, None] if heads else rows
    return maps.float().masked_fill(~rows[..., None], 0)


# ---------------------------------------------------------------- VAT: distances of two maps
# Each takes one layer's student map (B,T,P), its target (B,T,P), both 0 outside the rows, and the rows (B,T).


def cosine_distance(student: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """1 - cos of the flattened (T*P) matrices -> (B,). The method (paper, Eq. 2)."""
    return 1 - cosine(student.flatten(1), target.flatten(1))


def row_cosine_distance(student: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """1 - cos of each row of P -> (B,T). Ours: no row outweighs another by how much it looks at all."""
    return 1 - cosine(student, target)


def squared_distance(student: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Mean squared error of each row -> (B,T). Ablation."""
    return (student - target).square().mean(-1)


def kl_distance(student: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """KL(teacher || student) of each row, made a distribution over the P visual tokens -> (B,T). Ablation."""
    s = student / (student.sum(-1, keepdim=True) + EPS)
    t = target / (target.sum(-1, keepdim=True) + EPS)
    return (t * ((t + EPS).log() - (s + EPS).log())).sum(-1)


def released_distance(student: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """The released code's (commit 8411926), which is not the paper's -> (B,). Meant for rows = image: (P,P).

    Entries above mean + one (unbiased) standard deviation of their map are dropped on either side, which
    removes attention sinks; so are those where the teacher is exactly 0, which is the causal triangle. What
    is left is averaged over the queries, and the two vectors of P are compared by 1 - cos.
    """
    inside = rows[..., None]  # (B,T,1)
    number = (rows.sum(1) * student.shape[-1]).clamp(min=2)[:, None, None]  # entries of a map, (B,1,1)
    keep = inside & (target != 0)
    for maps in (student.detach(), target):
        mean = maps.sum((1, 2), keepdim=True) / number
        variance = ((maps - mean).square() * inside).sum((1, 2), keepdim=True) / (number - 1)
        keep = keep & (maps <= mean + variance.sqrt())
    queries = keep.sum(1).clamp(min=1)  # (B,P): how many are left in each column
    return 1 - cosine((student * keep).sum(1) / queries, (target * keep).sum(1) / queries)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity over the last dimension, which keeps a and b for the backward pass and no third."""
    lengths = a.norm(dim=-1).clamp(min=EPS) * b.norm(dim=-1).clamp(min=EPS)
    return (a * b).sum(-1) / lengths


def matched_heads_distance(student: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """1 - (1/H_t) sum_h max_g cos(A^t_h, A^s_g) of each row: (B,H_s,T,P), (B,H_t,T,P) -> (B,T). Ours.

    Every head of the teacher's group of layers, H_t in all, is compared with the student's head that looks
    most like it; the numbers of heads may differ, and there is no gradient through the choice.
    """
    student, target = (F.normalize(A, dim=-1, eps=EPS) for A in (student, target))
    with torch.no_grad():
        similarity = torch.einsum("bhtp,bgtp->bthg", target, student)  # (B,T,H_t,H_s)
        chosen = F.one_hot(similarity.argmax(-1), student.shape[1]).float()  # max_g, as a 1 in H_s
        # the sum of the teacher's heads that chose a head: what is kept has H_s maps, and not H_t
        pull = torch.einsum("bthg,bhtp->bgtp", chosen, target)
    return 1 - (pull * student).sum((1, 3)) / target.shape[1]


class Distance(NamedTuple):
    """One way to compare two maps."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    # what L_ADL is the mean of: samples with a picture, where the function gives (B,), or rows, (B,T)
    counts: Literal["samples", "rows"]
    over_layers: str = "mean"  # the paper's, or "sum", the released code's: k times as much
    heads: bool = False  # whether maps come with heads, (B,H,T,P), and not as their mean


DISTANCES = {  # --vat-loss
    "cosine": Distance(cosine_distance, "samples"),
    "cosine-rows": Distance(row_cosine_distance, "rows"),
    "mse": Distance(squared_distance, "rows"),
    "kl": Distance(kl_distance, "rows"),
    "released": Distance(released_distance, "samples", "sum"),
    "matched-heads": Distance(matched_heads_distance, "rows", heads=True),  # --vat-heads matched
}

# ---------------------------------------------------------------- the losses, as sums beside their counts


class Term(NamedTuple):
    """One loss, not yet divided.

    Sums and counts are added over micro-batches and ranks, and divided once: a mean of means is a different
    gradient when the counts vary.
    """

    sum: Tensor
    count: Tensor


def visual_attention_loss(
    student_maps: Iterable[Tensor], targets: Iterable[Tensor], rows: Tensor, distance: str = "cosine"
) -> Term:
    """L_ADL = 1 - (1/k) sum_j cos(mean_{l in G_j} A^t_l, A^s_j) (paper, Eq. 2), or with another distance.

    student_maps, targets: k of (B,T,P) each. rows (B,T): the queries that take part. The sum is over samples
    or rows, whichever the distance has a value for; the mean over the k layers is in it.
    """
    if distance not in DISTANCES:
        raise ValueError(f"attention loss {distance!r} is not known; choose one of {', '.join(DISTANCES)}")
    counted = rows.any(1) if DISTANCES[distance].counts == "samples" else rows  # (B,) or (B,T)
    heads = DISTANCES[distance].heads
    total, k = torch.zeros((), device=rows.device), 0
    for student, target in zip(student_maps, targets, strict=True):  # one layer at a time
        student, target = (keep_rows(maps, rows, heads) for maps in (student, target.detach()))
        values = DISTANCES[distance].function(student, target, rows)
        if values.shape != counted.shape:
            raise ValueError(
                f"distance {distance!r} gave values of shape {tuple(values.shape)}, and its entry in "
                f"DISTANCES counts {DISTANCES[distance].counts}: {tuple(counted.shape)}"
            )
        total, k = total + values.masked_fill(~counted, 0).sum(), k + 1
    if k == 0:
        raise ValueError("there is no attention map to compare; the forward passes were asked for none")
    if DISTANCES[distance].over_layers == "mean":
        total = total / k
    return Term(total, counted.sum())


class SharedWords(NamedTuple):
    """Two vocabularies: ids of the n words that both have, and of all that only one of them has."""

    student: Tensor  # (n,)
    teacher: Tensor  # (n,)
    student_rest: Tensor  # (Vs - n,)
    teacher_rest: Tensor  # (Vt - n,)


def kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    shifted: bool = True,
    words: SharedWords | None = None,
) -> Term:
    """Forward KL(teacher || student), full vocabulary, at every answer token (paper, Eq. 4).

    student_logits (B,T,Vs), teacher_logits (B,T,Vt), labels (B,T) with -100 where nothing is supervised. The
    distribution that predicts token t stands at t-1; `shifted=False` compares at t itself, as the released
    code does. words: of two vocabularies that differ.
    """
    answers = (next_tokens(labels) if shifted else labels) != IGNORE
    s, t = student_logits[answers], teacher_logits[answers]
    return Term(shared_kl_divergence(s, t, words) if words else kl_divergence(s, t), answers.sum())


def shared_kl_divergence(student_logits: Tensor, teacher_logits: Tensor, words: SharedWords) -> Tensor:
    """The sum of KL(teacher || student) over the rows of (n,Vs) and (n,Vt), over the words that both
    vocabularies have and all others as one more. Ours; the paper needs one vocabulary."""
    s = log_p_of_shared(student_logits, words.student, words.student_rest)
    t = log_p_of_shared(teacher_logits.detach(), words.teacher, words.teacher_rest)
    return F.kl_div(s, t, reduction="sum", log_target=True)


def log_p_of_shared(logits: Tensor, shared: Tensor, rest: Tensor) -> Tensor:
    """Logits (n,V) -> (n,m+1): log p of the m shared words, then of all others together, at least EPS.

    Rows beyond these are padding that the other model has not, and take no part, as in kl_divergence.
    """
    log_p = logits[:, : len(shared) + len(rest)].float().log_softmax(-1)
    others = log_p.new_full((len(log_p), 1), math.log(EPS))
    if len(rest):
        others = log_p[:, rest].logsumexp(-1, keepdim=True).clamp(min=math.log(EPS))
    return torch.cat([log_p[:, shared], others], -1)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The sum of KL(teacher || student) over the rows of (n,Vs) and (n,Vt).

    Of vocabularies of different size the smaller one counts: what lies beyond the tokenizer is padding.
    """
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    s = student_logits[:, :size].float().log_softmax(-1)
    t = teacher_logits[:, :size].detach().float().log_softmax(-1)
    return F.kl_div(s, t, reduction="sum", log_target=True)


def lm_loss(logits: Tensor, labels: Tensor) -> Term:
    """Next-token cross-entropy over the answer tokens: logits (B,T,V), labels (B,T)."""
    targets = next_tokens(labels)
    answers = targets != IGNORE
    return Term(F.cross_entropy(logits[answers].float(), targets[answers], reduction="sum"), answers.sum())


def next_tokens(labels: Tensor) -> Tensor:
    """labels (B,T) -> (B,T): what each position is to predict, the label of the token after it."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


# ---------------------------------------------------------------- the method: which losses in which stage


@dataclass(frozen=True)
class Method:
    """One row of the paper's tables, as a value."""

    # stages, all of them and in their order -> the terms of their loss, and what each weighs
    weights: Mapping[str, Mapping[str, float]]
    taf: bool = True  # the student fetches the teacher's adapter; else it has one of its own
    kl_shifted: bool = True  # at the positions that predict the answers; the released code: at the answers
    distance: str = "cosine"  # of two attention maps, one of DISTANCES (--vat-loss)
    rows: str = "all"  # the queries that are compared, one of ROWS (--vat-queries)
    layers: str = "intermediate"  # those that are aligned: one of DEPTH_RANGES, released, or numbers
    teacher_layers: str | None = None  # where the teacher's are named otherwise
    matching: str = "group"  # of student and teacher layers, one of MATCHINGS
    align_layer: int | None = None  # of the student: its pair alone, not all k
    control: str | None = None  # one of controls.CONTROLS: VAT without the teacher's looking
    sparse: str = ""  # the stages in which the student has experts (rivals.py)


LOGIT_LOSSES = {"lm", "kl"}  # they read logits alone; any other may read attention maps

LM, LM_KL = {"lm": 1.0}, {"lm": 1.0, "kl": 1.0}
LM_KL_ADL = {"lm": 1.0, "kl": 1.0, "adl": 1.0}
METHODS = {
    # supervised fine-tuning alone
    "sft": Method({"1": LM, "2": LM, "3": LM}, taf=False),
    # vanilla knowledge distillation
    "kd": Method({"1": LM_KL, "2": LM_KL, "3": LM}, taf=False),
    # the paper's
    "compodistill": Method({"1": LM_KL, "2": LM_KL_ADL, "3": LM}),
    # ours: the rows of the text, one by one
    "compodistill-rows": Method({"1": LM_KL, "2": LM_KL_ADL, "3": LM}, distance="cosine-rows", rows="text"),
    # as the released code has it
    "released": Method(
        {"1": LM_KL, "2": LM_KL_ADL, "3": LM},
        kl_shifted=False,
        distance="released",
        rows="image",
        layers="released",
    ),
}


def distillation_loss(
    student: Output,
    teacher: Output | None,
    batch: dict,
    method: Method,
    weights: Mapping[str, float],
    totals: Mapping[str, Tensor] | None = None,
    words: SharedWords | None = None,
) -> tuple[Tensor, dict[str, Term]]:
    """The whole method, from whole logits and whole attention maps -> L, and its terms by name.

    student, teacher: what their forward passes returned: .logits (B,T,V) and, from explicit_attention,
    .attentions {layer: (B,H,T,T)} of the layers to be aligned. batch: data.collate's. weights: of the terms
    of this stage. totals: the number that each sum is divided by, `loss_counts` of the global batch (default:
    the counts of this batch alone). words: of two vocabularies (vocabularies.py).
    """
    terms = {}
    if "lm" in weights:  # L_LM: say what the data says
        terms["lm"] = lm_loss(student.logits, batch["labels"])
    if "kl" in weights:  # L_KL: with the teacher's probabilities
        labels = batch.get("kl_labels", batch["labels"])  # kl_labels: of two vocabularies
        terms["kl"] = kl_loss(student.logits, teacher.logits, labels, method.kl_shifted, words)
    if "adl" in weights:  # L_ADL: and look where the teacher looks
        rows, columns = query_rows(batch, method.rows), batch["visual_columns"]  # (B,T), (B,P)
        seen = visual_maps_of_heads if DISTANCES[method.distance].heads else visual_map
        student_maps = {i: seen(A, columns) for i, A in student.attentions.items()}  # {layer: (B,T,P)}
        teacher_maps = {i: seen(A, columns) for i, A in teacher.attentions.items()}
        if method.control:
            teacher_maps = control_maps(teacher_maps, batch, method.control, rows)
        targets = matched_targets(student_maps, teacher_maps, rows, method.matching)  # k of (B,T,P)
        terms["adl"] = visual_attention_loss(student_maps.values(), targets, rows, method.distance)
    totals = totals or {name: term.count for name, term in terms.items()}
    # a total may be 0, and its sum then is, too: no picture in the whole batch
    loss = sum(weights[name] * term.sum / totals[name].clamp(min=1) for name, term in terms.items())
    return loss, terms


def loss_counts(batch: dict, method: Method, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The number that each term is divided by, from the batch alone: known before any forward pass.

    On the first step train.py compares them with the counts that the terms came with.
    """
    labels, counts = batch["labels"], {}
    if "lm" in weights:
        counts["lm"] = (next_tokens(labels) != IGNORE).sum()
    if "kl" in weights:
        compared = batch.get("kl_labels", labels)
        counts["kl"] = ((next_tokens(compared) if method.kl_shifted else compared) != IGNORE).sum()
    if "adl" in weights:
        rows = query_rows(batch, method.rows)
        counts["adl"] = (rows.any(1) if DISTANCES[method.distance].counts == "samples" else rows).sum()
    return counts
