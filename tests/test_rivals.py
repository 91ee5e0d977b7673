"""rivals.py and moe.py: golden values, the lean forms, masks, experts, pairs, flags, and whole runs.

The golden values (float64, naive formulas) come from a batch with pictures at different places, a sample of
text alone, one without answers, and padding full of large numbers.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import ENVIRONMENT, ROOT, rows, run, train_until  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import distill
import lean
import model
import moe
import rivals
import tiny.__main__
import tiny.systems
import train
from distill import IGNORE, METHODS
from helpers import config, same_weights
from qwen import MLP, Output, QwenConfig
from rivals import RIVALS
from support.errors import BadInput
from support.world import TINY, make_pairs, make_world
from training import models, recipes

GOLDEN = Path(__file__).parent / "golden"
VALUES = json.loads((GOLDEN / "baselines.json").read_text())["values"]
TENSORS = load_file(GOLDEN / "baselines.safetensors")
NAMES = {  # of a term -> of its golden mean
    "image_kl": "llavakd_kl_image",
    "relation": "llavakd_relation",
    "all_kl": "llavadi_kl",
    "hidden": "llavadi_mse",
}
FORMS = pytest.mark.parametrize("whole", [True, False], ids=["whole", "lean"])
exactly = partial(torch.testing.assert_close, rtol=1e-6, atol=0)


def golden(*names):
    return [TENSORS[name].float() if TENSORS[name].is_floating_point() else TENSORS[name] for name in names]


def golden_batch(*rows):
    names = "labels", "attention_mask", "has_image", "visual_columns"
    batch = dict(zip(names, golden(*names)))
    return {name: x[list(rows)] for name, x in batch.items()} if rows else batch


def golden_projector():
    projector = rivals.Projector(10, 14)
    for i, name in ((0, "linear_1"), (2, "linear_2")):
        projector[i].weight.data, projector[i].bias.data = golden(
            f"projector_{name}_weight", f"projector_{name}_bias"
        )
    return projector


def terms_of(batch, weights, whole, hidden, t_hidden, head, t_head, projector=None, kept=None, routing=None):
    """rival_terms of hidden states and heads, from whole logits or without."""
    logits = (hidden @ head.T, t_hidden @ t_head.T) if whole else (None, None)
    outputs = Output(hidden, logits[0], {}, routing or {}), Output(t_hidden, logits[1], {}, {})
    projected = projector(hidden[batch["attention_mask"]]) if "hidden" in weights else None
    return rivals.rival_terms(
        *outputs, (head, t_head), projected, batch, weights, {} if kept is None else kept
    )


def close_gradient(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@FORMS
@pytest.mark.parametrize("vocabulary", ["teacher_head", "teacher_head_wide"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_values(name, vocabulary, whole, monkeypatch):
    """In value, count and gradient of all that is trained; a teacher with more vocabulary changes nothing."""
    monkeypatch.setattr(lean, "LOGIT_ROWS", 5)
    hidden, t_hidden, head, t_head = golden("student_hidden", "teacher_hidden", "student_head", vocabulary)
    batch, projector = golden_batch(), golden_projector()
    hidden.requires_grad_()
    head.requires_grad_()
    weights = {name: 1.0}
    term = terms_of(batch, weights, whole, hidden, t_hidden, head, t_head, projector)[name]
    (total,) = rivals.loss_counts(batch, RIVALS["llavadi"], weights).values()
    assert total == term.count
    mean = term.sum / total
    exactly(mean, torch.tensor(VALUES[NAMES[name]]))
    mean.backward()
    close_gradient(hidden.grad, *golden(f"grad_{NAMES[name]}__student_hidden"))
    if name == "hidden":
        for i, layer in ((0, "linear_1"), (2, "linear_2")):
            close_gradient(projector[i].weight.grad, *golden(f"grad_llavadi_mse__{layer}_weight"))
            close_gradient(projector[i].bias.grad, *golden(f"grad_llavadi_mse__{layer}_bias"))
    else:
        close_gradient(head.grad, *golden(f"grad_{NAMES[name]}__student_head"))


def test_totals_of_the_papers():
    """Their weights are those of the methods; L_LM and L_KL, at answers and one before, are distill.py's."""
    hidden, t_hidden, head, t_head = golden(
        "student_hidden", "teacher_hidden", "student_head", "teacher_head"
    )
    batch = golden_batch()
    logits = hidden @ head.T, t_hidden @ t_head.T
    outputs = Output(hidden, logits[0], {}, {}), Output(t_hidden, logits[1], {}, {})
    g = (golden("moe_x")[0] @ golden("moe_router")[0].T).softmax(-1)
    for method, stage, total in (
        ("llava-kd", "1", "llavakd_total_paper"), ("llava-kd", "2", "llavakd_total_paper"),
        ("llava-kd", "3", "lm"), ("llavadi", "1", "lm"), ("llavadi", "2", "llavadi_total"),
        ("llava-mod", "1", "lm"), ("llava-mod", "2", "llavamod_total_d2d"),
        ("llava-mod", "3", "llavamod_total_d2s"),
    ):  # fmt: skip
        weights = RIVALS[method].weights[stage]
        loss, terms = distill.distillation_loss(*outputs, batch, RIVALS[method], weights)
        more = terms_of(
            batch, weights, True, hidden, t_hidden, head, t_head, golden_projector(), routing={0: g}
        )
        assert terms.keys() | more.keys() == weights.keys()
        for name, term in more.items():
            loss = loss + weights[name] * term.sum / term.count
        exactly(loss, torch.tensor(VALUES[total]))
    assert RIVALS["llava-mod"].weights["4"] == {"preference": 1.0, "aux": 0.01}
    assert not any(method.taf for method in RIVALS.values())
    assert {name: "".join(method.weights) for name, method in RIVALS.items()} == {
        "llava-kd": "132", "llavadi": "12", "llava-mod": "1234"
    }  # fmt: skip


@FORMS
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up_and_padding_counts_nothing(name, whole):
    """Each sample alone, without its padding; and in one batch, with NaN in it, which no gradient meets."""
    hidden, t_hidden, head, t_head = golden(
        "student_hidden", "teacher_hidden", "student_head", "teacher_head"
    )
    projector, weights, batch = golden_projector(), {name: 1.0}, golden_batch()
    padding = ~batch["attention_mask"]
    hidden, t_hidden = (
        x.masked_fill(padding[..., None], torch.nan).requires_grad_() for x in (hidden, t_hidden)
    )
    together = terms_of(batch, weights, whole, hidden, t_hidden, head, t_head, projector)[name]
    (gradient,) = torch.autograd.grad(together.sum, hidden)
    assert gradient.isfinite().all() and not gradient[padding].any() and gradient[0].any()
    if name in ("image_kl", "relation"):
        assert not gradient[2].any(), "a sample without a picture"
    alone = []
    for i in range(4):
        length = int(batch["attention_mask"][i].sum())
        one = golden_batch(i)
        one |= {key: one[key][:, :length] for key in ("labels", "attention_mask")}
        states = hidden[i : i + 1, :length], t_hidden[i : i + 1, :length]
        alone.append(terms_of(one, weights, whole, *states, head, t_head, projector)[name])
    exactly(sum(term.sum for term in alone), together.sum, rtol=1e-5)
    assert sum(term.count for term in alone) == together.count
    nothing = alone[2] if name in ("image_kl", "relation") else None
    assert nothing is None or (nothing.sum, nothing.count) == (0, 0)


def test_what_is_compared_stands_at_its_own_token():
    """A change of one position's logits changes image_kl where that is a visual token, not one before it."""
    batch = golden_batch()
    logits, others = torch.randn(4, 22, 37), torch.randn(4, 22, 37)
    visual = rivals.visual_tokens(batch)
    assert visual.nonzero().tolist() == [
        [row, column] for row in (0, 1, 3) for column in batch["visual_columns"][row].tolist()
    ]
    before = rivals.image_kl_loss(logits, others, visual).sum
    for row, column in ((0, 3), (0, 10), (2, 0), (2, 5)):  # around a picture; in a text
        logits[row, column] += torch.randn(37)
        assert rivals.image_kl_loss(logits, others, visual).sum == before
    logits[0, 4] += torch.randn(37)
    assert rivals.image_kl_loss(logits, others, visual).sum != before


def test_a_temperature_and_an_offset_of_all_logits_change_no_z_score():
    """By hand: of the scores 1, 2, 3 the mean is 2 and the unbiased deviation 1."""
    exactly(rivals.z_scored(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[-1.0, 0.0, 1.0]]))
    a, b = torch.randn(2, 5, 9)
    exactly(rivals.z_scored_kl(3 * a + 7, b), rivals.z_scored_kl(a, b), rtol=1e-5)


def test_relations_by_hand():
    """Two visual tokens: Z Z^T is [[1,1],[1,2]] and [[4,0],[0,1]]; cos = 6 / sqrt(7 * 17)."""
    student, teacher = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    loss = rivals.relation_loss(student, teacher, torch.tensor([[0, 1]]), torch.tensor([True]))
    exactly(loss.sum, torch.tensor(1 - 6 / (7 * 17) ** 0.5))
    loss = rivals.relation_loss(5 * student, teacher.flip(2), torch.tensor([[0, 1]]), torch.tensor([True]))
    exactly(loss.sum, torch.tensor(1 - 6 / (7 * 17) ** 0.5))  # any scale, any order of the vocabulary


class Rows(TorchDispatchMode):
    """The most rows of width V that any tensor has."""

    def __init__(self, width):
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] == self.width:
                self.most = max(self.most, x.numel() // self.width)
        return out


@pytest.mark.parametrize("name", [*NAMES, "preference"])
def test_no_logits_of_all_tokens_exist(name, monkeypatch):
    monkeypatch.setattr(lean, "LOGIT_ROWS", 5)
    hidden, t_hidden, head, t_head = golden(
        "student_hidden", "teacher_hidden", "student_head", "teacher_head"
    )
    hidden.requires_grad_()
    most = {}
    for whole in (True, False):
        with Rows(width=37) as mode:
            inputs = golden_batch(), {name: 1.0}, whole, hidden, t_hidden, head, t_head, golden_projector()
            terms_of(*inputs)[name].sum.backward()
        most[whole] = mode.most
    assert most[True] >= 22 and most[False] <= 14, most  # 14: a head is a matrix (V,C), its transpose (C,V)


def test_the_gram_matrix_of_a_frozen_head_is_made_once(monkeypatch):
    made, plain = [], rivals.Gram.forward
    monkeypatch.setattr(
        rivals.Gram, "forward", lambda ctx, weight: made.append(len(weight)) or plain(ctx, weight)
    )
    hidden, t_hidden, head, t_head = golden(
        "student_hidden", "teacher_hidden", "student_head", "teacher_head"
    )
    for trained, expected in ((False, [37, 37]), (True, [37, 37, 37])):
        kept, sums = {}, []
        made.clear()
        for _ in range(2):
            states = hidden.requires_grad_(), t_hidden, head.requires_grad_(trained), t_head
            sums.append(
                terms_of(golden_batch(), {"relation": 1.0}, False, *states, kept=kept)["relation"].sum
            )
        assert made == expected and sums[0] == sums[1]
        assert not any(gram.requires_grad for gram in kept.values())


def test_the_gram_matrix_in_parts_and_in_bfloat16(monkeypatch):
    """Its products are float32, whatever the weights are held in."""
    monkeypatch.setattr(rivals.Gram, "ROWS", 7)
    weight = torch.randn(37, 10, requires_grad=True)
    upstream = torch.randn(10, 10)
    gradients = [
        torch.autograd.grad((g * upstream).sum(), weight)[0]
        for g in (weight.T @ weight, rivals.Gram.apply(weight))
    ]
    torch.testing.assert_close(*gradients)
    half = weight.detach().bfloat16()
    torch.testing.assert_close(rivals.Gram.apply(half), half.float().T @ half.float())


# ---------------------------------------------------------------- experts


def golden_experts(copies=False):
    def mlp(*weights):
        block = MLP(QwenConfig(hidden_size=10, intermediate_size=18))
        for layer, weight in zip((block.gate_proj, block.up_proj, block.down_proj), weights):
            layer.weight.data = weight.clone()
        return block

    if copies:
        dense = golden("moe_dense_gate", "moe_dense_up", "moe_dense_down")
        experts = moe.Experts([mlp(*dense) for _ in range(4)], 10)
    else:
        parts = golden("moe_experts_gate", "moe_experts_up", "moe_experts_down")
        experts = moe.Experts([mlp(*weights) for weights in zip(*parts)], 10)
    experts.router.weight.data = golden("moe_router")[0].clone()
    return experts


def test_golden_experts():
    experts, (x, probe) = golden_experts(), golden("moe_x", "moe_probe")
    x.requires_grad_()
    y, g = experts(x)
    torch.testing.assert_close(y, *golden("moe_output"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        golden_experts(copies=True)(x)[0], *golden("moe_dense_output"), rtol=1e-5, atol=1e-5
    )
    (y * probe).sum().backward()
    close_gradient(x.grad, *golden("grad_moe_output__moe_x"))
    close_gradient(experts.router.weight.grad, *golden("grad_moe_output__moe_router"))
    for name in ("gate", "up", "down"):
        found = torch.stack([getattr(expert, f"{name}_proj").weight.grad for expert in experts.experts])
        close_gradient(found, *golden(f"grad_moe_output__moe_experts_{name}"))


def test_golden_balance():
    """Over tokens that are no padding; with all of them it would be another value."""
    experts, (x,), tokens = golden_experts(), golden("moe_x"), golden_batch()["attention_mask"]
    x.requires_grad_()
    term = rivals.balance_loss({3: experts(x)[1]}, tokens)
    assert term.count == tokens.sum() == VALUES["tokens_count"]
    exactly(term.sum / term.count, torch.tensor(VALUES["moe_aux"]))
    (term.sum / term.count).backward()
    close_gradient(x.grad, *golden("grad_moe_aux__moe_x"))
    close_gradient(experts.router.weight.grad, *golden("grad_moe_aux__moe_router"))
    everywhere = rivals.balance_loss({3: experts(x)[1]}, torch.ones_like(tokens))
    exactly(everywhere.sum / everywhere.count, torch.tensor(VALUES["moe_aux_all_tokens"]))
    both = rivals.balance_loss({0: experts(x)[1], 2: experts(x)[1]}, tokens)
    exactly(both.sum, 2 * term.sum)
    none = rivals.balance_loss({3: experts(x)[1]}, torch.zeros_like(tokens))
    assert (none.sum, none.count) == (0, 0)


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    experts = golden_experts()
    experts.router.weight.data[0] = -1e3 * golden("moe_x")[0][0, 0]
    y, g = experts(golden("moe_x")[0][:1, :1])
    assert 0 not in g.topk(2).indices
    y.sum().backward()
    gradients = [p.grad for p in experts.experts[0].parameters()]
    assert len(gradients) == 3 and not any(gradient.any() for gradient in gradients)
    assert all(p.grad.any() for p in experts.experts[int(g.argmax())].parameters())


@pytest.fixture(scope="module")
def sparse():
    """A student with experts, whose routers and experts differ."""
    student = model.load(TINY / "kd")
    models.add_experts(student)
    generator = torch.Generator().manual_seed(1)
    for name, p in student.lm.named_parameters():
        if ".experts." in name or ".router." in name:
            p.data += 0.3 * p.std() * torch.randn(p.shape, generator=generator)
    return student.eval()


def test_up_cycling_changes_no_logit():
    """Whatever the router says. Layers 0, 2 and 4 of 5 have experts."""
    student = model.load(TINY / "kd")
    ids = torch.randint(0, 300, (2, 17))
    before = student(ids).logits
    models.add_experts(student)
    assert [isinstance(layer.mlp, moe.Experts) for layer in student.lm.model.layers] == [1, 0, 1, 0, 1]
    for layer in student.lm.model.layers[::2]:
        nn.init.normal_(layer.mlp.router.weight)
    out = student(ids)
    torch.testing.assert_close(out.logits, before, rtol=1e-4, atol=1e-4)
    assert {layer: g.shape for layer, g in out.routing.items()} == {i: (2, 17, 4) for i in (0, 2, 4)}
    experts = student.lm.model.layers[0].mlp.experts
    assert len({p.data_ptr() for expert in experts for p in expert.parameters()}) == 12, "no shared copies"


def test_a_token_depends_on_no_other_sample_and_no_padding(sparse):
    ids = torch.randint(0, 300, (3, 11))
    together = sparse(ids).logits
    for i, length in enumerate((11, 7, 4)):
        torch.testing.assert_close(
            sparse(ids[i : i + 1, :length]).logits[0], together[i, :length], rtol=1e-4, atol=1e-4
        )
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0, :5] = False  # on the left, as in generation
    left = sparse(ids, attention_mask=mask).logits[0, 5:]
    torch.testing.assert_close(left, sparse(ids[:1, 5:]).logits[0], rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_is_that_without(sparse):
    ids = torch.randint(0, 300, (2, 6))
    new = sparse.generate(ids, max_new_tokens=8, stop_ids=())
    for _ in range(8):
        ids = torch.cat([ids, sparse(ids).logits[:, -1:].argmax(-1)], 1)
    assert new.shape == (2, 8) and torch.equal(ids[:, 6:], new)


def test_experts_are_saved_and_loaded_in_our_layout_alone(sparse, tmp_path):
    sparse.save(tmp_path / "native")
    again = model.load(tmp_path / "native")
    assert again.config.text.num_experts == 4
    ids = torch.randint(0, 300, (2, 9))
    assert torch.equal(again(ids).logits, sparse(ids).logits)
    for layout in ("released", "hf"):
        with pytest.raises(BadInput, match=f"the {layout} layout has no place for experts; save as native"):
            sparse.save(tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()
    file = tmp_path / "native/config.json"
    text = file.read_text()
    for wrong in ("-1", "2.5", '"4"', "1001"):
        file.write_text(re.sub(r'"num_experts": 4', f'"num_experts": {wrong}', text))
        with pytest.raises(BadInput, match="num_experts is .*not a whole number from 0 to 1000"):
            model.load(tmp_path / "native")
    file.write_text(re.sub(r'"num_experts": 4', '"num_experts": 5', text))
    with pytest.raises(BadInput, match="model.safetensors"):
        model.load(tmp_path / "native")
    assert "num_experts" not in (TINY / "kd/config.json").read_text()


# ---------------------------------------------------------------- preferences


def golden_pairs(wide=""):
    """Hidden states of student and teacher, head of either, labels: first the chosen answers."""
    names = "preference_student", "preference_teacher", "preference_labels"
    student, teacher, labels = (torch.cat(golden(f"{name}_chosen", f"{name}_rejected")) for name in names)
    return student, teacher, *golden("student_head", f"teacher_head{wide}"), labels


@FORMS
@pytest.mark.parametrize("wide", ["", "_wide"])
def test_golden_preference(whole, wide, monkeypatch):
    """log p of either model over its own vocabulary; the loss, with the pair's own baselines; gradients."""
    monkeypatch.setattr(lean, "LOGIT_ROWS", 2)
    student, teacher, head, t_head, labels = golden_pairs(wide)
    student.requires_grad_()
    for name, states, W, w in (("student", student, head, ""), ("teacher", teacher, t_head, wide)):
        form = rivals.log_p(states @ W.T, labels) if whole else rivals.log_p_of_states(states, W, labels)
        parts = [VALUES[f"preference_logp_{name}_{which}{w}"] for which in ("chosen", "rejected")]
        exactly(form, torch.tensor(parts).flatten())
    batch, weights = {"labels": labels, "attention_mask": labels == labels}, {"preference": 1.0}
    term = terms_of(batch, weights, whole, student, teacher, head, t_head)["preference"]
    assert term.count == 6 == rivals.loss_counts(batch, RIVALS["llava-mod"], weights)["preference"]
    if wide:
        return
    exactly(term.sum / 6, torch.tensor(VALUES["preference_kto_each"]))
    (term.sum / 6).backward()
    for gradient, which in zip(student.grad.chunk(2), ("chosen", "rejected")):
        close_gradient(gradient, *golden(f"grad_preference_kto_each__preference_student_{which}"))


@FORMS
def test_a_pair_without_an_answer_counts_nothing(whole):
    """Neither of its two; the others are as without it. Nor does padding, whatever stands there."""
    student, teacher, head, t_head, labels = golden_pairs()
    student[:, -1] = torch.nan  # no label stands there or after it
    assert (labels[:, -1] == IGNORE).all()
    student.requires_grad_()
    labels[4] = IGNORE  # the second pair's rejected answer
    batch = {"labels": labels, "attention_mask": labels == labels}
    term = terms_of(batch, {"preference": 1.0}, whole, student, teacher, head, t_head)["preference"]
    assert term.count == 4
    (gradient,) = torch.autograd.grad(term.sum, student)
    assert gradient[[0, 2, 3, 5]].flatten(1).any(1).all() and not gradient[[1, 4]].any()
    others = [0, 2, 3, 5]
    batch = {"labels": labels[others], "attention_mask": labels[others] == labels[others]}
    rest = terms_of(batch, {"preference": 1.0}, whole, student[others], teacher[others], head, t_head)
    exactly(rest["preference"].sum, term.sum)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("tiny") / "world", tune=24, pretrain=12, per_kind=2)
    make_pairs(folder)
    return folder


def pairs_of(world, **more):
    tokenizer = data.load_tokenizer(TINY / "teacher")
    return data.LlavaDataset(
        world / "tune-pairs.json", world / "images", tokenizer, 16, 40, pairs=True, **more
    )


def test_pairs_of_the_tiny_world(world):
    """No question that tune.json does not have, its answer chosen, another one of the same kind rejected."""
    told = {record["id"]: record["conversations"] for record in json.loads((world / "tune.json").read_text())}
    pairs = json.loads((world / "tune-pairs.json").read_text())
    assert [pair["id"] for pair in pairs] == list(told)
    kinds = set()
    for pair in pairs:
        (question, chosen), (same, rejected) = ((t["value"] for t in pair[x]) for x in ("chosen", "rejected"))
        assert question == same and question.startswith("<image>\n")
        values = [turn["value"].removeprefix("<image>\n") for turn in told[pair["id"]]]
        assert (question.removeprefix("<image>\n"), chosen) in zip(values[::2], values[1::2])
        assert chosen != rejected and len(chosen.split()) == len(rejected.split())
        kinds.add(frozenset({chosen, rejected}))
    assert len(kinds) > 5
    before = (world / "tune-pairs.json").stat().st_mtime_ns
    assert make_pairs(world).stat().st_mtime_ns == before


def test_a_batch_of_pairs(world):
    """Rows: the chosen answers, then the rejected ones; each picture once."""
    dataset = pairs_of(world)
    batch = dataset.batch([3, 0, 5])
    assert batch["pairs"] and batch["ids"] == ["tune-3", "tune-0", "tune-5"]
    assert batch["input_ids"].shape[0] == 6 and batch["pixel_values"].shape[0] == 3
    assert batch["has_image"].all() and torch.equal(*batch["visual_columns"].chunk(2))
    tokenizer = dataset.tokenizer
    records = {pair["id"]: pair for pair in json.loads((world / "tune-pairs.json").read_text())}
    for row, (name, which) in enumerate((n, w) for w in ("chosen", "rejected") for n in batch["ids"]):
        labels = batch["labels"][row]
        text = tokenizer.decode(labels[labels != IGNORE].tolist()).strip()
        assert text == records[name][which][1]["value"]
    assert not data.collate([{"input_ids": [1], "labels": [1]}])["pairs"]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r: r["rejected"][0].update(value="<image>\nAnother one?"), "do not have the same questions"),
        (lambda r: r.pop("rejected"), '"rejected": a conversation is a list'),
        (lambda r: r.update(chosen=r["chosen"][:1]), '"chosen": a conversation is an even number of turns'),
        (lambda r: r.update(image=""), "go together"),
        (lambda r: r.pop("chosen"), '"chosen": a conversation is a list'),
        (lambda r: r["rejected"][1].update(value=3), '"rejected": a conversation is a list'),
    ],
)
def test_pairs_that_are_none(world, tmp_path, change, said):
    """One sentence with file and record; --skip-bad-samples passes over it."""
    records = json.loads((world / "tune-pairs.json").read_text())
    change(records[1])
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    tokenizer = data.load_tokenizer(TINY / "teacher")
    make = partial(
        data.LlavaDataset, tmp_path / "pairs.json", world / "images", tokenizer, 16, 40, pairs=True
    )
    with pytest.raises(BadInput, match=f"pairs.json, record 'tune-1': .*{said}"):
        make()[1]
    sample = make(skip_bad=True)[1]
    assert sample["id"] == "tune-2" and len(sample["replaced"]) == 1


def test_conversations_and_pairs_are_told_apart(world):
    tokenizer = data.load_tokenizer(TINY / "teacher")
    with pytest.raises(BadInput, match='"conversations": a conversation is a list'):
        data.LlavaDataset(world / "tune-pairs.json", world / "images", tokenizer, 16, 40)[0]
    with pytest.raises(BadInput, match='tune.json: no pairs of answers; give records with "chosen" and "re'):
        data.LlavaDataset(world / "tune.json", world / "images", tokenizer, 16, 40, pairs=True)[0]


def test_a_pair_whose_answer_is_cut_off_is_passed_over(world):
    dataset = pairs_of(world)
    record = dataset[0]
    most = int((torch.tensor(record["labels"]) == IGNORE).sum())
    assert len(dataset[0]["rejected"]["labels"]) == len(record["labels"]) > most
    with pytest.raises(BadInput, match="records in a row are bad"):
        pairs_of(world, max_length=min(len(dataset[i]["labels"]) for i in range(24)) - 4)[0]


def test_a_first_record_that_is_no_pair_is_one_bad_record(world, tmp_path):
    records = json.loads((world / "tune-pairs.json").read_text())
    del records[0]["chosen"]
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    tokenizer, where = data.load_tokenizer(TINY / "teacher"), (tmp_path / "pairs.json", world / "images")
    dataset = data.LlavaDataset(*where, tokenizer, 16, 40, pairs=True, skip_bad=True)
    assert dataset[0]["id"] == "tune-1" and len(dataset[0]["replaced"]) == 1


@pytest.mark.parametrize("most, said", [(None, "the same"), (40, "the same within 40 tokens")])
def test_two_answers_that_are_the_same_teach_nothing(tmp_path, most, said):
    """As they are, or as far as they are within the limit of tokens."""
    end = ["x"] * 2 if most is None else ["x " * 40 + "a", "x " * 40 + "b"]
    dataset = one_pair(tmp_path, *(["<image>\nWhat?", text] for text in end), max_length=most)
    with pytest.raises(BadInput, match=f'"chosen" and "rejected" are {said}$'):
        dataset[0]


@pytest.mark.parametrize("text", ["[{}]", "[3]", '[{"conversations": []}]', '[{"conversations": "abcd"}]'])
def test_pairs_of_an_edited_world_are_refused(tmp_path, text):
    (tmp_path / "tune.json").write_text(text)
    with pytest.raises(BadInput, match="tune.json: a record is none of the tiny world's; choose another"):
        make_pairs(tmp_path)


@pytest.mark.parametrize("text", [None, "", '{"step": 5}\n', '{"step": 5, "samples_per_s": "many"}\n'])
def test_a_log_that_does_not_say_how_fast_its_steps_were(tmp_path, text):
    (tmp_path / "sft").mkdir()
    for stage in ("2", "3"):
        (tmp_path / f"sft/stage{stage}.jsonl").write_text('{"step": 1, "samples_per_s": 8.0}\n')
    steps = {"1": 1, "2": 3, "3": 1}  # of 8 and 16 samples
    assert tiny.systems.step_ms(tmp_path, "sft", steps) == pytest.approx((3 * 1000 + 2000) / 4)
    log = tmp_path / "sft/stage3.jsonl"
    log.unlink() if text is None else log.write_text(text)
    with pytest.raises(BadInput, match="stage3.jsonl says nothing of how fast"):
        tiny.systems.step_ms(tmp_path, "sft", steps)


def one_pair(tmp_path, chosen, rejected, **more):
    """A data set of one pair, of which the turns are given as texts, human and gpt alternating."""
    folder = make_world(tmp_path / "world", tune=2, pretrain=1, per_kind=1)
    turns = [
        [{"from": ("human", "gpt")[i % 2], "value": x} for i, x in enumerate(ts)] for ts in (chosen, rejected)
    ]
    pair = {"id": "p", "image": "tune-0.png", "chosen": turns[0], "rejected": turns[1]}
    (tmp_path / "pairs.json").write_text(json.dumps([pair]))
    tokenizer = data.load_tokenizer(TINY / "teacher")
    return data.LlavaDataset(
        tmp_path / "pairs.json", folder / "images", tokenizer, 16, 40, pairs=True, **more
    )


def test_a_picture_that_is_cut_off_of_one_answer(tmp_path):
    """It stands in the second question, and the first chosen answer is long."""
    long, short = (
        ["What is it?", "red " * 60, "<image>\nAnd?", "blue"],
        ["What is it?", "red", "<image>\nAnd?", "blue"],
    )
    assert one_pair(tmp_path / "whole", long, short)[0]["pixel_values"].shape == (3, 40, 40)
    for name, pair in (("a", (long, short)), ("b", (short, long))):
        with pytest.raises(
            BadInput, match="record 'p': the picture is cut off before one of the two answers"
        ):
            one_pair(tmp_path / name, *pair, max_length=60)[0]


def test_a_question_without_an_answer_is_left_out_of_a_pair(tmp_path):
    sample = one_pair(tmp_path, ["<image>\nWhat is it?", "red", "And?"], ["<image>\nWhat is it?", "blue"])[0]
    assert sample["mended"] and not sample["rejected"]["mended"]
    assert len(sample["input_ids"]) == len(sample["rejected"]["input_ids"])


# ---------------------------------------------------------------- flags


def refused(capsys, *words):
    with pytest.raises(SystemExit):
        recipes.parse_args("", list(map(str, words)))
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--method llavadi --taf", "--taf: the student of llavadi has an adapter of its own"),
        (
            "--method llava-kd --weights hidden=1",
            "hidden=1: llava-kd has no such term, but lm, kl, image_kl, relation",
        ),
        ("--method llava-kd --stage 3 --weights kl=1", "kl=1: stage 3 of llava-kd has no such term, but lm"),
        (
            "--method llava-mod --stage 2 --weights aux=1",
            "aux=1: stage 2 of llava-mod has no such term, but kl",
        ),
        ("--method sft --weights kl=1", "kl=1: sft has no such term, but lm"),
        ("--method llava-kd --weights kl", "--weights kl: "),
        ("--method llava-kd --weights kl=-1", "--weights kl=-1: "),
        ("--method llava-kd --weights kl=nan", "--weights kl=nan: "),
        ("--method llavadi --kl-weight 1", "kl=1.0: llavadi has no such term, but lm, all_kl, hidden"),
        ("--method llava-kd --stage 3 --kl-weight 1", "kl=1.0: stage 3 of llava-kd has no such term, but lm"),
        ("--method llava-kd --kl-weight 1 --weights kl=2", "kl=2: this weight is given twice"),
        ("--kl-weight 1 --weights kl=2", "kl=2: this weight is given twice"),
        ("--weights adl=2 --vat-weight 1", "adl=2: this weight is given twice"),
        ("--weights kl=2 --weights kl=3", "kl=2: this weight is given twice"),
        ("--weights lm=2 --stage 0", "--weights: stage 0 makes a teacher, with L_LM alone"),
        ("--method llava-mod --stage 2 --weights kl=0", "stage 2 has no loss left"),
        ("--method sft --weights lm=0", "stage 1 has no loss left"),
        (
            "--method llava-mod --stage 4 --weights preference=0",
            "stage 4 has no loss left but the balance of ex",
        ),
        ("--method llava-kd --data x --images y", "run --stage 1, 3, 2 each on its own"),
        ("--method llavadi --stage 3", "--method llavadi has no stage 3, but 1, 2"),
        ("--method compodistill --stage 4", "--method compodistill has no stage 4, but 1, 2, 3"),
        (
            "--method llava-kd --vat-queries text",
            "--vat-queries: nothing is aligned without an attention loss",
        ),
    ],
)
def test_contradictions_are_refused_in_a_sentence(words, said, capsys):
    assert said in refused(capsys, *words.split())


def test_weights_of_terms():
    args = recipes.parse_args("", ["--method", "llava-kd", "--weights", "relation=1", "kl=0.5"])
    assert args.method.weights == {
        stage: {"lm": 1.0, "kl": 0.5, "image_kl": 1.0, "relation": 1.0} if stage != "3" else {"lm": 1.0}
        for stage in "132"
    }
    c = config("--method", "llava-mod", "--weights", "kl=0.5", stage="3")
    assert c.weights == {"lm": 1.0, "kl": 0.5, "aux": 0.01} and c.method.weights["2"] == {"kl": 1.0}
    assert config("--method", "llavadi", "--weights", "hidden=0").weights == {"lm": 1.0, "all_kl": 1.0}
    c = config("--method", "llava-mod", "--kl-weight", "0.5", stage="2")
    assert c.weights == {"kl": 0.5} and c.method.weights["3"]["kl"] == 1.0
    assert config("--weights", "kl=3", "--weights", "lm=2").weights == {"lm": 2.0, "kl": 3.0, "adl": 1.0}
    assert config("--weights", "adl=3").weights == config("--vat-weight", "3").weights


def test_each_stage_starts_from_the_one_before_it_in_its_method(tmp_path):
    for name, order in (
        ("llava-kd", "132"),
        ("llavadi", "12"),
        ("llava-mod", "1234"),
        ("compodistill", "123"),
    ):
        args = recipes.parse_args("", ["--method", name, "--out", str(tmp_path)])
        assert recipes.before(order[0], args.method) is None
        for earlier, stage in zip(order, order[1:]):
            with pytest.raises(
                BadInput, match=f"stage{earlier} is missing; make it with .*--stage {earlier}"
            ):
                recipes.configure(stage, args, 1)
            (tmp_path / name / f"stage{earlier}").mkdir(parents=True)
            assert recipes.configure(stage, args, 1).student == str(tmp_path / name / f"stage{earlier}")
    args = recipes.parse_args("", ["--method", "llava-mod", "--stage", "0"])
    assert recipes.before("0b", args.method) == "0a"


def test_the_first_stage_takes_its_eyes_from_the_teacher():
    """Of every method that distils later, so that stage 2 finds a student that sees what the teacher sees."""
    for name in (*RIVALS, "kd"):
        assert recipes.has_teacher("1", {**METHODS, **RIVALS}[name])
    assert not recipes.has_teacher("1", METHODS["sft"])
    assert not recipes.has_teacher("3", RIVALS["llava-kd"]) and recipes.has_teacher("4", RIVALS["llava-mod"])


def test_numbers_of_the_recipes():
    """As many steps after stage 1 as CompoDistill has; a whole adapter and whole models at their rates."""
    for name, method in RIVALS.items():
        steps = [config("--method", name, stage=s).steps for s in method.weights if s != "1"]
        assert sum(steps) == sum(config(stage=s).steps for s in "23")
        paper = partial(
            config, "--recipe", "paper", "--data", "x", "--images", "y", "--teacher", "t", "--method", name
        )
        assert paper(stage="1").lr == 1e-3 and paper(stage="2").lr == 2e-4
        assert paper("--tune", "full", stage="2").lr == 2e-5
    paper = partial(config, "--recipe", "paper", "--data", "x", "--images", "y", "--teacher", "t")
    assert paper("--method", "llava-mod", "--tune", "full", stage="4").lr == 2e-6
    assert paper(stage="1").lr == 2e-4, "P_s alone"


# ---------------------------------------------------------------- whole steps and runs

STAGES = [("llava-kd", "1"), ("llava-kd", "2"), ("llavadi", "2"), ("llava-mod", "2"), ("llava-mod", "3"),
          ("llava-mod", "4")]  # fmt: skip


@pytest.fixture(scope="module")
def student(world, tmp_path_factory):
    """A student with eyes and an adapter of its own, as stage 1 leaves it."""
    out = tmp_path_factory.mktemp("one")
    train.main(command(world, None, out, "llavadi", "1", "--steps", 3, "--batch-size", 4))
    return out / "x/stage1"


@pytest.fixture(scope="module")
def experts(student, tmp_path_factory):
    """A student with five different experts, the first of which no token ever chooses."""
    vlm, folder = model.load(student), tmp_path_factory.mktemp("experts") / "student"
    models.add_experts(vlm, 5)
    for layer in vlm.lm.model.layers[::2]:
        w = layer.mlp.router.weight.data  # of a and -a one is above 0, of b and -b, too
        w[0], w[2], w[4] = 0, -w[1], -w[3]
        for expert in layer.mlp.experts:
            expert.down_proj.weight.data += 0.05 * torch.randn(expert.down_proj.weight.shape)
    out = vlm(torch.randint(0, 300, (4, 20)))
    assert all(0 not in g.topk(2).indices for g in out.routing.values())
    vlm.save(folder)
    return folder


def command(world, student, out, method, stage, *flags):
    file = {"1": "pretrain", "4": "tune-pairs"}.get(stage, "tune")
    where = ["--data", world / f"{file}.json", "--images", world / "images", "--out", out, "--name", "x"]
    if stage == "1":
        student = TINY / "student"
    start = ["--method", method, "--stage", stage, "--student", student, "--log-every", 1, "--lr", 1e-4]
    return list(map(str, [*start, *where, *flags]))


@pytest.mark.parametrize("method, stage", STAGES)
def test_a_step_of_plain_and_lean_is_one(world, student, experts, method, stage, tmp_path, monkeypatch):
    """The same loss, terms and gradient of every trained parameter; sums are divided by their counts."""
    monkeypatch.setattr(lean, "LOGIT_ROWS", 7)
    args = recipes.parse_args(
        "", command(world, experts if stage == "4" else student, tmp_path, method, stage)
    )
    c = recipes.configure(stage, args, 1)
    torch.manual_seed(0)
    vlm, teacher = models.load_models(c, "cpu")
    batch = train.open_data(c, vlm, teacher).batch([4, 0, 2])
    totals = rivals.loss_counts(batch, c.method, c.weights)
    trained = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    found = []
    for plain in (True, False):
        loss, terms = train.Step(vlm, teacher, c.method, c.weights, plain)(batch, totals)
        assert terms.keys() == c.weights.keys() == totals.keys()
        assert {name: int(term.count) for name, term in terms.items()} == {
            n: int(x) for n, x in totals.items()
        }
        sums = {name: term.sum.detach() for name, term in terms.items()}
        found.append((loss.detach(), sums, dict(zip(trained, torch.autograd.grad(loss, trained.values())))))
    torch.testing.assert_close(*(f[:2] for f in found), rtol=1e-5, atol=1e-5)
    for name in trained:
        torch.testing.assert_close(found[0][2][name], found[1][2][name], rtol=1e-3, atol=1e-5, msg=name)
    head = vlm.lm.head_weight.requires_grad
    assert head == (stage == "2"), "what is trained: the adapter; all; MLPs and routers"
    if "aux" in c.weights:
        others = {name for name in trained if ".mlp." not in name and not name.startswith("adapter.")}
        assert not others and any(".router." in name for name in trained)


@pytest.mark.parametrize("method, stage", [("llavadi", "2"), ("llava-mod", "3"), ("llava-mod", "4")])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_run_goes_on_to_the_same_bits(world, student, tmp_path, method, stage, tune, capsys):
    """With the projector, the experts and their routers, pairs; the finished model has nothing besides."""
    if stage == "4":
        out = tmp_path / "sparse"
        train.main(command(world, student, out, method, "3", "--steps", 2, "--batch-size", 4))
        student = out / "x/stage3"
    flags = ["--steps", 6, "--batch-size", 4, "--tune", tune, "--lora-rank", 4, "--save-every", 100]
    for out, stops in (("whole", ()), ("parts", (3,))):
        argv = command(world, student, tmp_path / out, method, stage, *flags)
        for stop in stops:
            train_until(stop, argv)
        train.main(argv)
    ours, theirs = (
        load_file(tmp_path / out / f"x/stage{stage}/model.safetensors") for out in ("whole", "parts")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = load_file(student / "model.safetensors")
    if method == "llavadi":
        assert ours.keys() == before.keys()
    elif stage == "3":
        assert len(ours) - len(before) == 3 * (1 + 4 * 3 - 3)
    assert not any("lora" in name or "projector" in name for name in ours)
    vlm = model.load(tmp_path / f"whole/x/stage{stage}")
    assert vlm(torch.randint(0, 300, (1, 7))).logits.isfinite().all()
    changed = {name for name in before if not torch.equal(before[name], ours.get(name, before[name]))}
    assert changed and not any(name.startswith("vision.") for name in changed)
    if method == "llava-mod":
        assert not any("self_attn" in name or "embed" in name or "norm" in name for name in changed)
        if stage == "4":
            assert any("router" in name for name in changed) and any(".experts." in name for name in changed)


def test_the_projector_is_trained_clipped_and_saved(world, student, tmp_path, monkeypatch):
    """It is among the parameters of the optimizer and of the clipped gradient, and in the saves."""
    clipped, plain = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda ps, most: clipped.append({p.shape for p in ps}) or plain(ps, most)
    )
    argv = command(world, student, tmp_path, "llavadi", "2", "--steps", 4, "--batch-size", 4)
    saved, save = [], train.resume.save

    def saving(run, vlm, optimizer, *rest):
        optimized = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
        values = {name: p.clone() for name, p in vlm.projector.named_parameters()}
        saved.append((optimized, vlm.projector, values))
        save(run, vlm, optimizer, *rest)

    monkeypatch.setattr(train.resume, "save", saving)
    train_until(2, argv)
    (optimized, projector, before), *_ = saved
    assert all(p.data_ptr() in optimized for p in projector.parameters())
    assert {p.shape for p in projector.parameters()} <= clipped[0]
    loads, load = [], train.resume.load

    def loaded(run, vlm, optimizer):
        state = load(run, vlm, optimizer)
        loads.append({name: p.clone() for name, p in vlm.projector.named_parameters()})
        return state

    monkeypatch.setattr(train.resume, "load", loaded)
    train.main(argv)
    assert all(torch.equal(loads[0][name], before[name]) for name in before)
    torch.manual_seed(0)
    assert not torch.equal(rivals.Projector(*projector[0].weight.shape[::-1])[0].weight, before["0.weight"])


@pytest.mark.parametrize("method, stage", [("llavadi", "2"), ("llava-mod", "4")])
def test_validation_of_the_rivals_losses(world, student, experts, tmp_path, method, stage):
    """On the records of training, at rate almost 0: the same numbers as in training."""
    file = world / f"{'tune-pairs' if stage == '4' else 'tune'}.json"
    flags = ["--steps", 1, "--batch-size", 24, "--lr", 1e-12, "--val-data", file, "--val-every", 1]
    train.main(command(world, experts if stage == "4" else student, tmp_path, method, stage, *flags))
    (row,) = rows(tmp_path, f"stage{stage}.jsonl")
    for name in RIVALS[method].weights[stage]:
        if name != "aux":
            assert row[f"val_{name}"] == pytest.approx(row[name], rel=1e-4), name


@pytest.fixture(scope="module", params=[
    ("llava-kd", "1", "full"), ("llava-kd", "2", "lora"), ("llavadi", "2", "full"),
    ("llava-mod", "3", "full"), ("llava-mod", "3", "lora"), ("llava-mod", "4", "full"),
])  # fmt: skip
def one_rank(request, world, student, experts, tmp_path_factory):
    """A few steps on one rank -> method, stage, flags, folder."""
    method, stage, tune = request.param
    # aux depends on how a batch is cut: so small that only its use is tested
    aux = ["--weights", "aux=0.000001"] if stage in "34" else []
    flags = ["--steps", 6, "--global-batch", 8, "--tune", tune, "--lora-rank", 4, *aux]
    out = tmp_path_factory.mktemp("one_rank")
    student = experts if stage in "34" else student
    run(command(world, student, out, method, stage, *flags, "--batch-size", 8))
    return method, stage, flags, out


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_do_not_change_the_training(one_rank, world, student, experts, tmp_path, parallel):
    """Two ranks, stopped and gone on, are one rank; also where a rank's expert has no token."""
    method, stage, flags, one = one_rank
    flags = [*flags, "--batch-size", 4, "--parallel", parallel]
    argv = command(world, experts if stage in "34" else student, tmp_path, method, stage, *flags)
    run(argv, 2, stop=3)
    run(argv, 2)
    for a, b in zip(*(rows(out, f"stage{stage}.jsonl") for out in (one, tmp_path)), strict=True):
        for name in RIVALS[method].weights[stage]:
            assert a[name] == pytest.approx(b[name], rel=0.3 if name == "aux" else 1e-4, abs=1e-5), name
    same_weights(*(load_file(out / f"x/stage{stage}/model.safetensors") for out in (one, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_head_that_no_loss_reads_is_not_waited_for(world, student, tmp_path, parallel):
    """Of hidden states alone nothing flows back to a head of its own; ranks go on all the same."""
    untied = shutil.copytree(student, tmp_path / "untied")
    config = json.loads((untied / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (untied / "config.json").write_text(json.dumps(config))
    weights = load_file(untied / "model.safetensors")
    weights["lm.lm_head.weight"] = weights["lm.model.embed_tokens.weight"].clone()
    save_file(weights, untied / "model.safetensors")
    flags = ["--weights", "lm=0", "all_kl=0", "--steps", 3, "--batch-size", 2, "--parallel", parallel]
    run(command(world, untied, tmp_path, "llavadi", "2", *flags), 2)
    after = load_file(tmp_path / "x/stage2/model.safetensors")
    assert torch.equal(after["lm.lm_head.weight"], weights["lm.lm_head.weight"])
    assert not torch.equal(after["lm.model.norm.weight"], weights["lm.model.norm.weight"])


@pytest.mark.slow
def test_the_table_of_systems(tmp_path):
    """`python -m tiny systems` in small, killed on its way: its files; it goes on with what there is."""
    make_world(tmp_path / "out/world", tune=64, pretrain=32, per_kind=4)
    argv = [sys.executable, "-m", "tiny", "systems", "--out", str(tmp_path / "out"), "--steps", "16"]
    process = subprocess.Popen(argv, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    scores, limit = tmp_path / "out/compodistill/scores.json", time.time() + 240
    while not scores.exists():
        assert process.poll() is None and time.time() < limit
        time.sleep(0.1)
    process.kill()
    process.communicate()
    model_file = tmp_path / "out/compodistill/stage3/model.safetensors"
    before = model_file.stat().st_mtime_ns
    done = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and model_file.stat().st_mtime_ns == before, done.stderr
    written = (tmp_path / "out/systems.md").read_text()
    assert written in done.stdout and written.count("(r_w > r_l)") == 2
    lines = [line.split(" | ") for line in written.splitlines() if line.startswith("| ")]
    names = ["teacher", "sft", "llava-kd", "llavadi", "llava-mod", "compodistill"]
    assert [line[0].strip("| ") for line in lines[2:]] == names
    assert lines[0][-1] == "step_ms |" and all(float(line[-1].strip(" |")) > 0 for line in lines[3:])
    table = json.loads((tmp_path / "out/systems.json").read_text())
    assert list(table) == names and table["teacher"]["recognition"] > 99
    third = subprocess.run([*argv, "--seed", "1"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert third.returncode == 1 and "--seed 0 --steps 16; choose another --out" in third.stderr


def test_the_table_of_systems_refuses_a_try_in_its_place_at_once(tmp_path, capsys):
    """Before any work, and whichever of the systems it is."""
    train.main(["--method", "llavadi", "--stage", "1", "--steps", "1", "--out", str(tmp_path)])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="has students of --seed 0 --steps 1; choose another --out"):
        tiny.__main__.main(["systems", "--out", str(tmp_path)])
    assert capsys.readouterr().out == ""


def test_experts_belong_to_the_stage_and_not_to_the_weight_of_their_balance(world, student, tmp_path):
    """With aux=0 it has experts, too, and trains what it trains with it; stage 4 makes none."""
    flags = ["--steps", 1, "--batch-size", 2, "--weights", "aux=0"]
    train.main(command(world, student, tmp_path / "3", "llava-mod", "3", *flags))
    made = tmp_path / "3/x/stage3"
    assert model.load(made).config.text.num_experts == 4
    train.main(command(world, made, tmp_path / "4", "llava-mod", "4", *flags))
    before, after = (load_file(folder / "model.safetensors") for folder in (made, tmp_path / "4/x/stage4"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".mlp." in name or name.startswith("adapter.") for name in changed)
    with pytest.raises(SystemExit, match="stage1 has no experts; run --stage 3, which makes them"):
        train.main(command(world, student, tmp_path / "no", "llava-mod", "4", *flags))


def test_data_without_pictures_are_no_data_of_llava_kd(world, student, tmp_path):
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "text.json").write_text(
        json.dumps([{"id": str(i), "conversations": turns} for i in range(4)])
    )
    argv = command(world, student, tmp_path, "llava-kd", "2", "--steps", 1, "--data", tmp_path / "text.json")
    with pytest.raises(SystemExit, match="text.json: no record has a picture, which this method distils"):
        train.main(argv)


def test_the_command_of_the_stage_before_has_the_weights_that_it_has(tmp_path, capsys):
    """And no other: it is not refused."""
    where = ["--method", "llava-mod", "--stage", "4", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="stage3 is missing; make it with `(.*)`") as error:
        train.main([*where, "--weights", "preference=2", "aux=0.1"])
    words = str(error.value).split("`")[1].split()
    assert words[words.index("--weights") + 1 :] == ["aux=0.1"]
    recipes.parse_args("", words[2:])
    where[where.index("llava-mod")], where[where.index("4")] = "llava-kd", "2"
    with pytest.raises(SystemExit, match="stage3 is missing; make it with `(.*)`") as error:
        train.main(
            [*where, "--kl-weight", "0.5", "--val-data", "pairs.json", "--val-every", "7", "--seed", "3"]
        )
    words = str(error.value).split("`")[1].split()
    assert words[-2:] == ["--seed", "3"] and not {"--kl-weight", "--val-data", "--val-every"} & set(words)
    recipes.parse_args("", words[2:])


@pytest.mark.parametrize("precision, checkpointing", [("bf16", False), ("fp32", True)])
def test_all_stages_one_after_the_other(tmp_path, world, precision, checkpointing):
    """Of LLaVA-MoD, which has the most, as a user starts them: without --stage, on the tiny world."""
    (tmp_path / "world").symlink_to(world)
    flags = ["--gradient-checkpointing"] * checkpointing
    train.main(["--method", "llava-mod", "--out", str(tmp_path), "--steps", "2", "--batch-size", "2",
                "--precision", precision, *flags])  # fmt: skip
    assert sorted(folder.name for folder in (tmp_path / "llava-mod").glob("stage?")) == [
        f"stage{i}" for i in "1234"
    ]
    vlm = model.load(tmp_path / "llava-mod/stage4")
    assert vlm.config.text.num_experts == 4 and isinstance(vlm.answer(None, "What colour is it?"), str)
    weights = load_file(tmp_path / "llava-mod/stage4/model.safetensors")
    routers = [x for name, x in weights.items() if "router" in name]
    assert len(routers) == 3 and all(x.dtype == torch.float32 for x in routers)
    assert replace(vlm.config.text, num_experts=0) == model.load(tmp_path / "llava-mod/stage2").config.text
