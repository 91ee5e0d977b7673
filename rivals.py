"""The other systems of the paper's table, from their published objectives: LLaVA-KD, LLaVADI, LLaVA-MoD.

    image_kl    KL(teacher || student) at the visual tokens           image_kl_loss     LLaVA-KD   2410.16236
    relation    1 - cos(Z_t Z_t^T, Z_s Z_s^T), Z their logits (P,V)   relation_loss     LLaVA-KD
    all_kl      KL of z-scored logits at every token                  all_kl_loss       LLaVADI    2407.19409
    hidden      mean (proj(h_s) - h_t)^2 at every token               hidden_loss       LLaVADI
    aux         load-balancing loss of the experts (moe.py)           balance_loss      LLaVA-MoD  2408.15881
    preference  the student prefers what the teacher prefers, KTO     preference_loss   LLaVA-MoD

L_LM and L_KL are those of distill.py. Nobody looks at attention: that is what CompoDistill adds. The student
has an adapter of its own (no TAF). These are our implementations of what the papers and their code say, not
their authors' runs; where the two differ, a comment says which one this is. All stages have data.py's chat
template, also LLaVA-KD's first, which its authors train on bare captions.

Each loss is here on whole matrices, to be read, and `--plain` trains with it. Where that would need logits of
every token, (T,V) a sample, the same number without them stands below, and tests/test_rivals.py equates them.

Shapes: B batch, T tokens, P visual tokens, C width, V vocabulary, E experts.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distill
import lean
from distill import IGNORE, LM, LM_KL, Method, Term
from qwen import Output

# ---------------------------------------------------------------- LLaVA-KD


def visual_tokens(batch: dict) -> Tensor:
    """(B,T): where the visual tokens stand."""
    is_visual = torch.zeros_like(batch["attention_mask"]).scatter(1, batch["visual_columns"], True)
    return is_visual & batch["has_image"][:, None]  # a sample without a picture has 0 in all its columns


def image_kl_loss(student_logits: Tensor, teacher_logits: Tensor, visual: Tensor) -> Term:
    """KL(teacher || student) AT every visual token, not before it: logits (B,T,V) of both, visual (B,T)."""
    return Term(distill.kl_divergence(student_logits[visual], teacher_logits[visual]), visual.sum())


def relation_loss(student_logits: Tensor, teacher_logits: Tensor, columns: Tensor, has_image: Tensor) -> Term:
    """1 - cos(vec(Z_t Z_t^T), vec(Z_s Z_s^T)) of each sample with a picture: raw logits of its visual tokens.

    logits (B,T,V) of both, columns (B,P), has_image (B,). Of each sample, as in the paper: the released code
    has one cosine for a micro-batch, which at its size of 1 is the same.
    """
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    z = [at_columns(x[..., :size].float(), columns) for x in (student_logits, teacher_logits)]  # (B,P,V)
    return relation_distance(*(x @ x.transpose(1, 2) for x in z), has_image)


def at_columns(x: Tensor, columns: Tensor) -> Tensor:
    """(B,T,C), columns (B,P) -> (B,P,C)."""
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))


def relation_distance(student: Tensor, teacher: Tensor, has_image: Tensor) -> Term:
    """1 - cos of two (B,P,P), over the samples that have a picture (B,)."""
    values = 1 - distill.cosine(student.flatten(1), teacher.detach().flatten(1))  # (B,)
    return Term(values.masked_fill(~has_image, 0).sum(), has_image.sum())


# ---------------------------------------------------------------- LLaVADI


def all_kl_loss(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Term:
    """KL of z-scored logits at every token, (B,T,V) of both, tokens (B,T): all but padding.

    One sum and one count. The released code averages each sample first, without those that have no answer,
    and then the samples.
    """
    return Term(z_scored_kl(student_logits[tokens], teacher_logits[tokens]), tokens.sum())


def z_scored_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The sum of KL(teacher || student) over the rows of (n,Vs) and (n,Vt), cut to the smaller V, z-scored.

    Cut first, so that what lies beyond the tokenizer moves no mean.
    """
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return distill.kl_divergence(z_scored(student_logits[:, :size]), z_scored(teacher_logits[:, :size]))


def z_scored(z: Tensor) -> Tensor:
    """(z - mean z) / std z over the vocabulary, in float32: a temperature of its own for every position."""
    z = z.float()
    return (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))


class Projector(nn.Sequential):
    """h_s (n,C_s) -> (n,C_t). It is trained with the student, and no part of the finished model."""

    def __init__(self, student_width: int, teacher_width: int):
        first = nn.Linear(student_width, teacher_width)
        super().__init__(first, nn.GELU(), nn.Linear(teacher_width, teacher_width))


def hidden_loss(projected: Tensor, teacher_hidden: Tensor, tokens: Tensor) -> Term:
    """Mean square of proj(h_s) - h_t at every token: h is what the head reads.

    projected (n,C_t), of the n tokens (B,T); teacher_hidden (B,T,C_t).
    """
    squares = (projected.float() - teacher_hidden[tokens].detach().float()).square()
    return Term(squares.mean(-1).sum(), tokens.sum())


# ---------------------------------------------------------------- LLaVA-MoD


def balance_loss(routing: Mapping[int, Tensor], tokens: Tensor) -> Term:
    """The load-balancing loss: E sum_e (mean of g_e) (share of tokens whose largest g is e), over the layers.

    routing: {layer: g (B,T,E)}. 1 a layer where all experts are used alike. A product of two means is no sum
    over tokens: the number given is n times it, for n tokens (B,T), so that several micro-batches are
    averaged by their tokens. So it depends on how a batch is cut. The released code counts padding, too, and
    adds the loss twice: in dense-to-sparse by mistake, with preferences once for either answer.
    """
    n, total = tokens.sum(), torch.zeros((), device=tokens.device)
    for g in routing.values():
        g = g[tokens]  # (n,E)
        first = F.one_hot(g.argmax(-1), g.shape[-1]).float()  # no gradient goes through the choice
        total = total + g.shape[-1] * (g.sum(0) * first.sum(0)).sum() / n.clamp(min=1)
    return Term(total, n)


BETA = 0.1  # how much a ratio of probabilities counts


def preference_loss(student_log_p: Tensor, teacher_log_p: Tensor, whole: Tensor) -> Term:
    """KTO, Kahneman-Tversky optimisation, of pairs of answers, with the teacher as the reference.

    log p(answer | question) of 2n answers, first the chosen of n pairs, then the rejected. With
    r_w, r_l = log p_s - log p_t of the two, and as baselines k_w, k_l = max(0, r_w), max(0, r_l):

        1 - sigmoid(beta (r_w - k_l))   and   1 - sigmoid(beta (k_w - r_l))

    whole (n,): pairs that have both answers. Each pair has its own baselines, and the gradient goes through
    them, as in the released run, whose micro-batch is one pair; KTO's authors take the batch's mean, as a
    constant.
    """
    r_w, r_l = (student_log_p - teacher_log_p.detach()).chunk(2)  # (n,)
    k_w, k_l = r_w.clamp(min=0), r_l.clamp(min=0)
    losses = 2 - torch.sigmoid(BETA * (r_w - k_l)) - torch.sigmoid(BETA * (k_w - r_l))
    return Term(losses.masked_fill(~whole, 0).sum(), 2 * whole.sum())


def log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each sample's answer, summed over its tokens: logits (B,T,V), labels (B,T) -> (B,)."""
    targets = distill.next_tokens(labels)
    answers = targets != IGNORE
    costs = F.cross_entropy(logits[answers].float(), targets[answers], reduction="none")  # (n,)
    per_token = torch.zeros_like(targets, dtype=costs.dtype).masked_scatter(answers, costs)  # (B,T)
    return -per_token.sum(1)


def whole_pairs(labels: Tensor) -> Tensor:
    """(n,): the pairs of a batch of 2n answers of which both have a token."""
    return torch.stack((distill.next_tokens(labels) != IGNORE).any(1).chunk(2)).all(0)


# ---------------------------------------------------------------- the same, without the logits of every token


def relation_loss_of_states(
    student: Tensor, teacher: Tensor, student_gram: Tensor, teacher_gram: Tensor, batch: dict
) -> Term:
    """relation_loss from hidden states (B,T,C): Z Z^T = H (W^T W) H^T, with W^T W (C,C) of either head."""
    columns = batch["visual_columns"]
    h = [at_columns(x, columns).float() for x in (student, teacher)]  # (B,P,C)
    r = [x @ gram @ x.transpose(1, 2) for x, gram in zip(h, (student_gram, teacher_gram))]  # (B,P,P)
    return relation_distance(*r, batch["has_image"])


class Gram(torch.autograd.Function):
    """W (V,C) -> W^T W (C,C) in float32, some rows of W at a time; the gradient is W (dG + dG^T)."""

    ROWS = 1 << 14  # of W that are float32 at one time

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32)
        for rows in weight.split(Gram.ROWS):
            gram.addmm_(rows.float().T, rows.float())
        return gram

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (weight,) = ctx.saved_tensors
        return (weight.float() @ (upstream + upstream.T)).to(weight.dtype)


def gram_of(head: Tensor, size: int, kept: dict[str, Tensor], name: str) -> Tensor:
    """The Gram matrix of a head's first `size` rows. That of a frozen head is made once, and kept by name."""
    if head.requires_grad:
        return Gram.apply(head[:size])
    if name not in kept:
        kept[name] = Gram.apply(head[:size])
    return kept[name]


def z_scored_kl_with_gradient(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """z_scored_kl, and its gradient at the student's logits (n,Vs), cut to the smaller V.

    A LayerNorm divides by the standard deviation of V numbers, z_scored by that with V - 1: the gain is their
    ratio. (Where it is almost 0, 1e-7 is added to it there and its square to the variance here.)
    """
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = (x[:, :size].float() for x in (student_logits, teacher_logits))
    gain = student.new_full((size,), ((size - 1) / size) ** 0.5)
    with torch.enable_grad():
        z = F.layer_norm(student.requires_grad_(), (size,), gain, eps=1e-14)
    kl, g = lean.kl_with_gradient(z.detach(), F.layer_norm(teacher, (size,), gain, eps=1e-14))
    return kl, torch.autograd.grad(z, student, g)[0]


def log_p_of_states(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """log_p from hidden states (B,T,C) and a head (V,C): one answer at a time, for each has its gradient."""
    targets, sums = distill.next_tokens(labels), []
    for h, t in zip(hidden, targets):
        sums.append(-lean.logit_losses((h, head), None, t != IGNORE, t, lm_weight=1.0)[0])
    return torch.stack(sums)


# ---------------------------------------------------------------- all of it

LLAVA_KD = LM_KL | {"image_kl": 1.0, "relation": 0.5}  # 0.5 in the paper, 1 in its code
RIVALS = {
    "llava-kd": Method({"1": LLAVA_KD, "3": LM, "2": LLAVA_KD}, taf=False),
    "llavadi": Method({"1": LM, "2": LM | {"all_kl": 1.0, "hidden": 1.0}}, taf=False),
    # dense to dense; dense to sparse; preference. L_KL one position before each answer, as everywhere here,
    # where the released code has it at the answers.
    "llava-mod": Method(
        {"1": LM, "2": {"kl": 1.0}, "3": LM_KL | {"aux": 0.01}, "4": {"preference": 1.0, "aux": 0.01}},
        taf=False,
        sparse="34",
    ),
}
NUM_EXPERTS = 4  # of LLaVA-MoD
TERMS = {"image_kl", "relation", "all_kl", "hidden", "aux", "preference"}
PROJECTED = {"hidden"}  # read the student's states through a Projector, which is trained with it
OF_PICTURES = {"image_kl", "relation"}  # nothing without one
OUTPUT_LOSSES = distill.LOGIT_LOSSES | TERMS  # they read what the last layer gives; others may read attention
HEAD_LOSSES = OUTPUT_LOSSES - {"hidden", "aux"}  # of these those that the output matrix takes part in


def rival_terms(
    student: Output,
    teacher: Output | None,
    heads: tuple[Tensor, Tensor | None],
    projected: Tensor | None,
    batch: dict,
    weights: Mapping[str, float],
    kept: dict[str, Tensor],
) -> dict[str, Term]:
    """The terms of this file that `weights` names, from whole logits or, where there are none, without.

    student, teacher: what their forward passes returned; heads: their output matrices (V,C); projected:
    Projector's output; kept: Gram matrices of frozen heads, for the next batch.
    """
    terms, tokens, whole = {}, batch["attention_mask"], student.logits is not None
    of_student = student.hidden, heads[0]
    of_teacher = (teacher.hidden, heads[1]) if teacher else None
    if "image_kl" in weights:
        visual = visual_tokens(batch)
        if whole:
            terms["image_kl"] = image_kl_loss(student.logits, teacher.logits, visual)
        else:
            terms["image_kl"] = Term(lean.logit_losses(of_student, of_teacher, visual)[0], visual.sum())
    if "relation" in weights:
        if whole:
            where = batch["visual_columns"], batch["has_image"]
            terms["relation"] = relation_loss(student.logits, teacher.logits, *where)
        else:
            size = min(len(head) for head in heads)
            grams = [gram_of(head, size, kept, name) for head, name in zip(heads, ("student", "teacher"))]
            terms["relation"] = relation_loss_of_states(student.hidden, teacher.hidden, *grams, batch)
    if "all_kl" in weights:
        if whole:
            terms["all_kl"] = all_kl_loss(student.logits, teacher.logits, tokens)
        else:
            divergence = z_scored_kl_with_gradient
            loss, *_ = lean.logit_losses(of_student, of_teacher, tokens, divergence=divergence)
            terms["all_kl"] = Term(loss, tokens.sum())
    if "hidden" in weights:
        terms["hidden"] = hidden_loss(projected, teacher.hidden, tokens)
    if "aux" in weights:
        terms["aux"] = balance_loss(student.routing, tokens)
    if "preference" in weights:
        labels = batch["labels"]
        if whole:
            both = log_p(student.logits, labels), log_p(teacher.logits, labels)
        else:
            both = log_p_of_states(*of_student, labels), log_p_of_states(*of_teacher, labels)
        terms["preference"] = preference_loss(*both, whole_pairs(labels))
    return terms


def loss_counts(batch: dict, method: Method, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The number that each term is divided by, distill.loss_counts's and those of this file."""
    counts = {
        "image_kl": lambda: visual_tokens(batch).sum(),
        "relation": lambda: batch["has_image"].sum(),
        "all_kl": lambda: batch["attention_mask"].sum(),
        "hidden": lambda: batch["attention_mask"].sum(),
        "aux": lambda: batch["attention_mask"].sum(),
        "preference": lambda: 2 * whole_pairs(batch["labels"]).sum(),
    }
    more = {name: counts[name]() for name in weights if name in counts}
    return distill.loss_counts(batch, method, weights) | more
