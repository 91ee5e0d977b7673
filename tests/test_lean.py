"""lean.py: the same numbers as distill.py's whole matrices, in value and in gradient.

First single pieces (maps, answer losses), then a whole step of training. Shapes: B batch, T query tokens, S
key tokens, R query rows, P visual tokens, H heads, V vocabulary.
"""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_distill import mask
from test_qwen import CLOSE, IDS, LEFT, RIGHT, Calls, gradients, tiny

import data
import distill
import lean
import model
import train
from controls import CONTROLS
from distill import DISTANCES, IGNORE, METHODS, Method, kl_loss, lm_loss
from helpers import in_full
from lean import VisualAttention, answer_losses, shortest_slice
from support.world import TINY, make_world

# ---------------------------------------------------------------- maps

COLUMNS = torch.tensor([[1, 2, 3], [5, 3, 4], [0, 2, 1]])  # elsewhere in every row, not only ascending


def seen(rows, *layers, columns=COLUMNS):
    return dict.fromkeys(layers, VisualAttention(rows, columns))


@pytest.mark.parametrize(
    "chunk, align, kept", [(1, 1, 0), (2, 1, 0), (4, 1, 99), (128, 1, 9999), (4, 4, 0), (128, 8, 0)]
)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["unpadded", "right", "left"])
@pytest.mark.parametrize("rows", [slice(0, 9), slice(2, 9), slice(3, 7), slice(8, 9), slice(4, 4)])
def test_a_map_is_that_of_whole_attention(monkeypatch, mask, kv_heads, chunk, align, kept, rows):
    """The same numbers, logits and gradients through the maps as distill.visual_map has from whole attention,
    however many rows are made at a time, where parts are made larger, as for a GPU, and whether they are
    kept for the backward pass or computed again (with kept=99 some are).
    """
    monkeypatch.setattr(lean, "SMALL", kept)
    monkeypatch.setattr(lean, "QUERY_ROWS", chunk)
    monkeypatch.setitem(lean.ALIGN, "cpu", align)
    lm = tiny(num_key_value_heads=kv_heads)
    whole, part = lm(IDS, mask, in_full(0, 2)), lm(IDS, mask, seen(rows, 0, 2))
    torch.testing.assert_close(whole.logits, part.logits, **CLOSE)
    expected = [distill.visual_map(A, COLUMNS)[:, rows] for A in whole.attentions.values()]
    got = list(part.attentions.values())
    assert [m.shape for m in got] == [(3, rows.stop - rows.start, 3)] * 2
    torch.testing.assert_close(got, expected)
    if rows.start == rows.stop:
        return
    weight = torch.randn(2, 3, rows.stop - rows.start, 3)
    expected, got = (gradients(lm, (torch.stack(maps) * weight).sum()) for maps in (expected, got))
    for name in expected:
        assert (got[name] is None) == (expected[name] is None), name
        if got[name] is not None:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
    if rows.stop - rows.start > 1:
        assert got["model.layers.0.self_attn.q_proj.weight"].abs().max() > 1e-3
        assert got["model.layers.2.self_attn.k_proj.weight"].abs().max() > 1e-3
    assert got["model.layers.2.self_attn.o_proj.weight"] is None  # comes after the last map


def test_no_map_with_heads_is_kept(monkeypatch):
    """What the backward pass keeps of a layer is q, k and (B,R,P): nothing of size H * T * S, and
    no more than without a request, but for the maps.
    """
    monkeypatch.setattr(lean, "SMALL", 0)
    torch.manual_seed(0)
    lm, T = tiny(max_position_embeddings=512), 300
    ids, columns = torch.randint(0, 61, (2, T)), torch.arange(5, 55).expand(2, 50)

    def kept(attention=None):
        sizes = {}
        pack = lambda t: sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t  # noqa
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = lm(ids, attention=attention, logits=False)
        return out, sizes.values()

    heads = 4 * 2 * 4 * T * T  # bytes of one (B,H,T,S) map
    _, plain = kept()
    _, whole = kept(in_full(1))
    _, some = kept(seen(slice(5, T), 1, columns=columns))
    assert max(plain) < heads / 2 and max(some) < heads / 2 and max(whole) >= heads
    assert sum(some) - sum(plain) < 3 * 4 * 2 * (T - 5) * 50, "more than some (B,R,P)"


def test_other_rows_are_never_computed(monkeypatch):
    """The queries that reach softmax are those asked for, each once, with the keys before them only."""
    shapes, plain = [], lean.probabilities
    monkeypatch.setattr(lean, "QUERY_ROWS", 2)
    monkeypatch.setattr(
        lean,
        "probabilities",
        lambda q, k, *rest: shapes.append((q.shape[2], k.shape[2])) or plain(q, k, *rest),
    )
    with torch.no_grad():
        tiny()(IDS, attention=seen(slice(3, 8), 1))
    assert shapes == [(2, 5), (2, 7), (1, 8)]


def test_the_shortest_slice_with_all_queries():
    assert shortest_slice(mask("00110", "01000")) == slice(1, 4)
    assert shortest_slice(mask("11111")) == slice(0, 5)
    assert shortest_slice(mask("000", "001")) == slice(2, 3)
    assert shortest_slice(mask("000", "000")) == slice(0, 0)


def test_checkpointing_of_layers_changes_no_number():
    """Maps are computed again inside layers that are computed again."""
    lm, silu = tiny(), "aten.silu.default"
    weight, results, calls = torch.randn(3, 9, 61), [], []
    for lm.checkpointing in (False, True):
        with Calls() as mode:
            out = lm(IDS, attention=seen(slice(2, 9), 0, 1, 2))
            maps = sum((i + 1) * m.square().sum() for i, m in out.attentions.items())
            loss = (out.logits * weight).sum() + maps
            results.append((loss, gradients(lm, loss)))
        calls.append(mode.number[silu])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert calls == [3, 6]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_give_the_same(tmp_path, monkeypatch):
    """Logits, maps and gradients, for a first length and for another, which compiles with sizes left open."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    lm, fast = tiny(num_hidden_layers=1), tiny(num_hidden_layers=1)
    fast.load_state_dict(lm.state_dict())
    for layer in fast.model.layers:
        layer.compile()
    for length in (9, 7):
        results = []
        for which in (lm, fast):
            out = which(IDS[:, :length], attention=seen(slice(1, length), 0))
            loss = out.logits.square().mean() + out.attentions[0].square().sum()
            results.append((out.logits, out.attentions[0], gradients(which, loss)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- losses of the answers, from hidden states

ONE = {"lm": torch.tensor(1), "kl": torch.tensor(1)}


def divided(loss):
    """The node of the graph that made the sum which was divided and added to nothing."""
    return loss.grad_fn.next_functions[1][0].next_functions[0][0]


def sums(terms):
    return {name: term.sum.detach() for name, term in terms.items()}


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize(
    "words", [(40, 40), (40, 33), (33, 40)], ids=["equal", "student-more", "teacher-more"]
)
@pytest.mark.parametrize("frozen", [False, True], ids=["head-trained", "head-frozen"])
def test_answer_losses_are_the_plain_losses(monkeypatch, chunk, shifted, words, frozen):
    """From hidden states in chunks = from whole logits: values, and gradients of states and output matrix."""
    monkeypatch.setattr(lean, "LOGIT_ROWS", chunk)
    torch.manual_seed(0)
    labels = torch.full((3, 9), IGNORE)
    labels[0, 3:6], labels[1, 8], labels[2, 1:3], labels[2, 7:] = torch.tensor([4, 5, 6]), 7, 8, 9
    hidden = torch.randn(3, 9, 12, requires_grad=True)
    head = torch.randn(words[0], 12, requires_grad=not frozen)
    teacher = torch.randn(3, 9, 10, requires_grad=True), torch.randn(words[1], 10, requires_grad=True)
    inputs = [hidden] if frozen else [hidden, head]
    weights, totals = (
        {"lm": 1.5, "kl": 0.7},
        {"lm": torch.tensor(20), "kl": torch.tensor(20 if shifted else 21)},
    )

    lm = lm_loss(hidden @ head.T, labels)
    kl = kl_loss(hidden @ head.T, teacher[0] @ teacher[1].T, labels, shifted)
    expected = 1.5 * lm.sum / totals["lm"] + 0.7 * kl.sum / totals["kl"]
    plain = torch.autograd.grad(expected, inputs)
    loss, terms = answer_losses((hidden, head), teacher, labels, weights, totals, shifted)
    torch.testing.assert_close(
        sums(terms), {"lm": lm.sum.detach(), "kl": kl.sum.detach()}, rtol=1e-5, atol=1e-5
    )
    assert terms["lm"].count == lm.count == terms["kl"].count == kl.count == 8
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(loss, inputs)
    assert all(gradient.abs().max() > 1e-3 for gradient in plain)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)

    loss, terms = answer_losses((hidden, head), None, labels, {"lm": 1.0}, ONE)
    torch.testing.assert_close(sums(terms), {"lm": lm.sum.detach()}, rtol=1e-5, atol=1e-5)
    plain = torch.autograd.grad(lm_loss(hidden @ head.T, labels).sum, inputs)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), plain, rtol=1e-5, atol=1e-5)


def test_gradients_of_answer_losses_are_handed_over_and_used_once():
    """The output matrix's gradient is the one made in the forward pass, not a copy of it; a second backward
    pass, for which it is gone, is an error.
    """
    hidden, head = torch.randn(1, 5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss, _ = answer_losses((hidden, head), None, torch.tensor([[IGNORE, 1, 2, 3, 4]]), {"lm": 1.0}, ONE)
    made = divided(loss).saved_tensors[1].data_ptr()
    loss.backward()
    assert head.grad.data_ptr() == made
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_answer_losses_with_a_tied_head_and_without_answers():
    """The output matrix that is the embedding, too, gets both gradients; no answer gives 0 and zeros."""
    torch.manual_seed(0)
    table, labels = torch.randn(20, 6, requires_grad=True), torch.tensor([[IGNORE, 3, 4, IGNORE]])
    teacher, weights = (torch.randn(1, 4, 6), torch.randn(20, 6)), {"lm": 1.0, "kl": 1.0}
    hidden = table[torch.tensor([[1, 2, 3, 4]])]
    plain = lm_loss(hidden @ table.T, labels).sum
    plain = plain + kl_loss(hidden @ table.T, teacher[0] @ teacher[1].T, labels).sum
    ours, _ = answer_losses((table[torch.tensor([[1, 2, 3, 4]])], table), teacher, labels, weights, ONE)
    gradients = [torch.autograd.grad(loss, table) for loss in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    hidden, nothing = table[torch.tensor([[1, 2, 3, 4]])], torch.full((1, 4), IGNORE)
    loss, terms = answer_losses((hidden, table), teacher, nothing, weights, ONE)
    assert loss == terms["lm"].sum == terms["kl"].sum == terms["lm"].count == 0
    assert torch.autograd.grad(loss, table)[0].abs().max() == 0


def test_answer_losses_make_logits_of_answers_only(monkeypatch):
    """Every row of logits that exists belongs to an answer, and LOGIT_ROWS of them exist at once."""
    monkeypatch.setattr(lean, "LOGIT_ROWS", 4)
    made, plain = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: made.append(len(x)) or plain(x, w))
    labels = torch.full((2, 20), IGNORE)
    labels[0, 5:12], labels[1, 18] = 1, 2
    state = torch.randn(2, 20, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    teacher = torch.randn(2, 20, 5), torch.randn(50, 5)
    answer_losses(state, teacher, labels, {"lm": 1.0, "kl": 1.0}, ONE)[0].backward()
    assert made == [4, 4, 4, 4]  # 8 answers, in two chunks, student and teacher; none of them twice


# ---------------------------------------------------------------- a whole step: plain and lean are one


@pytest.fixture(scope="module")
def pair():
    """A student with a new P_s, and its teacher."""
    torch.manual_seed(0)
    teacher = model.load(TINY / "teacher").requires_grad_(False)
    lm = model.load_lm(TINY / "student")
    student = model.VLM.assemble(teacher.vision, lm, teacher.tokenizer, teacher, taf=True)
    return student, teacher


@pytest.fixture(scope="module")
def batch(pair, tmp_path_factory):
    """Six samples, among them one without a picture and one with a picture in a later turn."""
    world = make_world(tmp_path_factory.mktemp("tiny") / "world", tune=8, pretrain=1, per_kind=1)
    tokenizer = pair[1].tokenizer
    dataset = data.LlavaDataset(world / "tune.json", world / "images", tokenizer, 16, 40)
    samples = [dataset[i] for i in range(4)]
    text = [{"from": "human", "value": "Any shape?"}, {"from": "gpt", "value": "no"}]
    for turns in (text, [*text, {"from": "human", "value": "<image> And here?"}, text[1]]):
        ids, labels = data.encode(turns, tokenizer, 16)
        samples.append({"input_ids": ids, "labels": labels})
    samples[-1]["pixel_values"] = samples[0]["pixel_values"]
    return data.collate(samples)


def step(pair, batch, method, stage="2", plain=False, totals=None, precision="fp32"):
    """Loss, terms and the gradient of every trained parameter of one step."""
    student, teacher = pair
    student.requires_grad_(True)
    student.vision.requires_grad_(False)
    student.adapter.teacher.requires_grad_(False)
    weights = method.weights[stage]
    module = train.Step(student, teacher, method, weights, plain, precision)
    totals = totals or distill.loss_counts(batch, method, weights)
    loss, terms = module(batch, totals)
    names, parameters = zip(*[(n, p) for n, p in student.named_parameters() if p.requires_grad])
    found = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))
    return loss.detach(), {name: (t.sum.detach(), t.count) for name, t in terms.items()}, found


PAPER = METHODS["compodistill"]
VARIED = {name: replace(method, layers="intermediate") for name, method in METHODS.items()}
for rows in ("all", "image", "text"):
    VARIED |= {f"{name}, {rows} rows": replace(PAPER, distance=name, rows=rows) for name in DISTANCES}
VARIED |= {f"{how} matching": replace(PAPER, matching=how) for how in ("simple", "adaptive")}
VARIED |= {f"{which} layers": replace(PAPER, layers=which) for which in ("early", "later", "all")}
VARIED |= {f"{how} maps": replace(PAPER, control=how) for how in CONTROLS}
VARIED |= {f"{how} maps, text rows": replace(METHODS["compodistill-rows"], control=how) for how in CONTROLS}
VARIED |= {
    "shuffled heads": replace(PAPER, distance="matched-heads", rows="text", control="shuffled"),
    "adaptive rows": replace(METHODS["compodistill-rows"], matching="adaptive"),
    "layers by number": replace(PAPER, layers="1,2", teacher_layers="2-4"),
    "one pair": replace(PAPER, align_layer=2),
    "one pair, adaptive": replace(PAPER, align_layer=2, matching="adaptive"),
    "no KL": Method({"2": {"lm": 1.0, "adl": 1.0}}),
    "half the KL": Method({"2": {"lm": 1.0, "kl": 0.5, "adl": 3.0}}),
    "half the unshifted KL": Method({"2": {"lm": 1.0, "kl": 0.5}}, kl_shifted=False),
    "KL alone": Method({"2": {"kl": 0.5}}),
    "unshifted KL alone": Method({"2": {"kl": 0.5}}, kl_shifted=False),
    "attention alone": Method({"2": {"adl": 2.0}}),
    "away from the teacher": Method({"2": {"lm": 1.0, "adl": -0.5}}),
}


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("name", VARIED)
def test_a_step_of_plain_and_lean_is_one(pair, batch, monkeypatch, name, chunk):
    """The same loss, terms, counts and gradient of every parameter, from whole matrices and from parts;
    and the counts are those that the sums were divided by.
    """
    monkeypatch.setattr(lean, "QUERY_ROWS", chunk)
    monkeypatch.setattr(lean, "LOGIT_ROWS", chunk)
    loss, terms, gradients = step(pair, batch, VARIED[name])
    plain_loss, plain_terms, plain_gradients = step(pair, batch, VARIED[name], plain=True)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms, plain_terms, rtol=1e-5, atol=1e-5)
    assert terms.keys() == VARIED[name].weights["2"].keys()
    counts = distill.loss_counts(batch, VARIED[name], VARIED[name].weights["2"])
    assert {key: count.item() for key, (_, count) in terms.items()} == {
        k: v.item() for k, v in counts.items()
    }
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, plain_gradients[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: k + m
        )


@pytest.mark.parametrize("name", ["compodistill", "compodistill-rows", "released", "kd"])
def test_plain_and_lean_are_one_in_bfloat16(pair, batch, monkeypatch, name):
    """As near as each is to float32, whose distance from bfloat16 is what rounding does."""
    monkeypatch.setattr(lean, "QUERY_ROWS", 7)
    results = [
        step(pair, batch, VARIED[name], plain=plain, precision=precision)
        for plain, precision in ((False, "bf16"), (True, "bf16"), (True, "fp32"))
    ]
    (ours, _, g), (plain, _, g_plain), (exact, _, g_exact) = results
    assert ours != exact and ours.item() == pytest.approx(plain.item(), rel=0.02)
    norm, error, difference = (
        torch.cat([(a[key] - (b[key] if b else 0)).flatten() for key in g_exact]).norm()
        for a, b in ((g_exact, None), (g_plain, g_exact), (g, g_exact))
    )
    assert difference < 1.5 * error < 0.15 * norm


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_between_layers_have_the_dtype_of_products(pair, batch, precision):
    """Half the bytes in bfloat16, although the weights that are trained, norms among them, are float32."""
    student, seen = pair[0], set()
    inside = [*student.lm.model.layers, student.lm.model.norm]
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, out: seen.add(
                (inputs[0].dtype, (out[0] if isinstance(out, tuple) else out).dtype)
            )
        )
        for layer in inside
    ]
    step(pair, batch, PAPER, precision=precision)
    for hook in hooks:
        hook.remove()
    dtype = model.DTYPES[precision]
    assert seen == {(dtype, dtype)} and student.lm.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["sft", "kd", "compodistill"])
def test_stage_1_of_plain_and_lean_is_one(pair, batch, name):
    """No attention is looked at, and without distillation no teacher."""
    method = METHODS[name]
    lean_step, plain_step = (step(pair, batch, method, "1", plain) for plain in (False, True))
    torch.testing.assert_close(lean_step[0], plain_step[0], rtol=1e-5, atol=1e-5)
    assert lean_step[1].keys() == method.weights["1"].keys()
    for key, gradient in lean_step[2].items():
        torch.testing.assert_close(gradient, plain_step[2][key], rtol=1e-4, atol=1e-5)


def test_each_variant_is_another_loss(pair, batch):
    """Every distance, choice of rows, layers and matching reaches the loss: no two have the same terms, but
    those that are one method by two names.
    """
    found = {}
    for name, method in VARIED.items():
        _, terms, _ = step(pair, batch, method)
        values = tuple(round((total / count).item(), 6) for total, count in terms.values())
        found.setdefault(values, []).append(name)
    twins = [names for names in found.values() if len(names) > 1]
    expected = [
        ["compodistill", "cosine, all rows", "half the KL"],
        ["compodistill-rows", "cosine-rows, text rows"],
        ["no KL", "away from the teacher"],
    ]
    assert sorted(twins) == expected


def test_terms_by_hand(pair, batch):
    """Both forms return what a loop over samples, rows and layers finds in whole maps and logits."""
    student, teacher = pair
    ids, labels, real = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
    s, t = (vlm(ids, batch["pixel_values"], attention=in_full(2, 3, 4)) for vlm in pair)
    lm = kl = answers = 0
    distances, samples = [], []
    for b in range(len(ids)):
        for i in range(1, ids.shape[1]):
            if labels[b, i] != IGNORE:
                p, q = (out.logits[b, i - 1].log_softmax(0) for out in (s, t))
                lm, kl, answers = lm - p[labels[b, i]], kl + (q.exp() * (q - p)).sum(), answers + 1
        columns = (ids[b] == data.IMAGE_TOKEN).nonzero()[:, 0]
        if len(columns):
            cosines = []
            for layer, group in ((2, (2, 3)), (3, (3, 4))):  # of 5 layers, of 6 layers
                ours = s.attentions[layer][b].mean(0)[columns[0] : real[b].sum()][:, columns]
                theirs = sum(t.attentions[g][b].mean(0) for g in group) / 2
                theirs = theirs[columns[0] : real[b].sum()][:, columns]
                cosines.append(F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))
                distances += (1 - F.cosine_similarity(ours, theirs, dim=1))[len(columns) :].tolist()
            samples.append(1 - sum(cosines) / 2)
    for plain in (False, True):
        _, terms, _ = step(pair, batch, METHODS["compodistill"], plain=plain)
        assert terms["lm"] == (pytest.approx(lm.item(), rel=1e-5), answers)
        assert terms["kl"] == (pytest.approx(kl.item(), rel=1e-5), answers)
        assert terms["adl"] == (pytest.approx(sum(samples).item(), rel=1e-4), 5)
        _, terms, _ = step(pair, batch, METHODS["compodistill-rows"], plain=plain)
        assert terms["adl"] == (pytest.approx(sum(distances) / 2, rel=1e-4), len(distances) // 2)


@pytest.mark.parametrize("plain", [False, True])
def test_micro_batches_add_up(pair, batch, plain):
    """Divided by the totals of all, two halves (one with the text-only sample) give the gradient of all."""
    method = METHODS["compodistill"]
    whole, terms, gradients = step(pair, batch, method, plain=plain)
    totals = distill.loss_counts(batch, method, method.weights["2"])
    parts = []
    for some in (slice(0, 3), slice(3, 6)):
        pictures = slice(0, 3) if some.start == 0 else slice(3, 5)
        half = {
            name: batch[name][some]
            for name in ("input_ids", "labels", "attention_mask", "has_image", "visual_columns")
        }
        half["pixel_values"] = batch["pixel_values"][pictures]
        parts.append(step(pair, half, method, plain=plain, totals=totals))
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole, rtol=1e-5, atol=1e-5)
    for name in terms:
        added = sum(part[1][name][0] for part in parts), sum(part[1][name][1] for part in parts)
        torch.testing.assert_close(added, terms[name], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(parts[0][2][name] + parts[1][2][name], gradient, rtol=1e-4, atol=1e-5)
