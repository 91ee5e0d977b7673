"""vocabularies.py: a teacher that reads other tokens than its student. Tokens by their characters, words by
their spelling, and a step of training; with one tokenizer for both it is the step that it was.

Tokenizers: the tiny world's, one made here, and Qwen1.5's where the variable SHARED names the folder
that holds it. Shapes: B batch, T student tokens, S teacher tokens, P visual tokens, V vocabulary.
"""

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_run import run
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
import distill
import lean
import model
import train
import vocabularies
from distill import IGNORE, METHODS, SharedWords, shared_kl_divergence
from helpers import config, in_full, same_weights
from qwen import Qwen
from support.errors import BadInput
from support.world import TINY, make_world
from training.models import check_pair

KOREAN = unicodedata.normalize("NFD", "빨강 한국")
TEXTS = [
    "What colour is the red circle?",
    " naïve café, e\u0301clair ﬁn",
    "日本語の文。 Привет  мир\n\n x",
    "Du cafe\u0301",
    KOREAN,
    "👩‍🚀 ok\t...  ",
]


def other_tokenizer(trim: bool = False) -> Tokenizer:
    """Byte-level pairs of other texts: another cut of the same characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", data.END_OF_TEXT],
        show_progress=False,
    )
    some = (
        "the circle is left of a square; what colour, shape or place? yes no red reddish circular 日本語 ASS"
    )
    tokenizer.train_from_iterator([some] * 4, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tiny():
    return data.load_tokenizer(TINY / "teacher")


@pytest.fixture(params=["tiny", "other", "trimmed", "qwen"])
def tokenizer(request, tiny):
    if request.param == "qwen":
        if "SHARED" not in os.environ:
            pytest.skip("SHARED is not set: no real tokenizer")
        return data.load_tokenizer(Path(os.environ["SHARED"]) / "data/qwen1.5-tokenizer")
    return tiny if request.param == "tiny" else other_tokenizer(trim=request.param == "trimmed")


def turns(question, answer):
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


# ---------------------------------------------------------------- spans


@pytest.mark.parametrize("template", ["chat", "pretrain"])
@pytest.mark.parametrize("text", TEXTS)
def test_every_byte_is_covered_by_its_token(tokenizer, text, template):
    """From left to right without a gap, by bytes; a token covers the bytes that it is made of, a visual token
    and the end of the text one each. Where a normaliser composes what it reads, a token covers what made it;
    of Korean syllables that were taken apart several tokens have parts, and together they make the text."""
    conversation = turns("Look:", text)
    ids, _ = data.encode(conversation, tokenizer, 3, template)
    spans = data.spans(conversation, tokenizer, 3, template)
    assert spans.shape == (len(ids), 2)
    written = [(piece, piece is data.IMAGE_MARK) for piece, _ in data.pieces(conversation, template)]
    whole = "".join(
        "###" if is_image else "$" if piece is data.END_OF_TEXT else piece for piece, is_image in written
    )
    whole, end, spelled = whole.encode(), 0, {i: word for word, i in vocabularies.spelling(tokenizer).items()}
    said = [
        b"#" if i == data.IMAGE_TOKEN else spelled[i].replace(data.END_OF_TEXT.encode(), b"$") for i in ids
    ]
    assert b"".join(said) in (whole, unicodedata.normalize("NFC", whole.decode()).encode())
    for word, (start, stop) in zip(said, spans.tolist()):
        assert start == end < stop
        end, covered = stop, whole[start:stop]
        if word != covered and text != KOREAN:  # composed by a normaliser
            assert word == unicodedata.normalize("NFC", covered.decode()).encode()
    assert end == len(whole)


def test_spans_by_hand(tiny):
    """With Qwen's words: a token a word; the picture's tokens begin behind "USER: "."""
    spans = data.spans(turns("red?", "yes"), tiny, 2)
    system = len(data.SYSTEM) + len("USER: ")
    text = "\nred? ASSISTANT:"
    assert spans[-1].tolist() == [
        system + 2 + len(text) + 4,
        system + 2 + len(text) + 5,
    ]  # the end of the text
    assert spans[-2].tolist() == [system + 2 + len(text), system + 2 + len(text) + 4]  # " yes"
    pictures = [i for i, (a, b) in enumerate(spans.tolist()) if a in (system, system + 1)]
    assert spans[pictures].tolist() == [[system, system + 1], [system + 1, system + 2]]


# ---------------------------------------------------------------- rows and answers


def test_overlap_by_hand():
    """Student [0,2) [2,6), teacher [0,1) [1,3) [3,6): half of each of the first two; and of the last two."""
    student, teacher = torch.tensor([[[0, 2], [2, 6], [0, 0]]]), torch.tensor([[[0, 1], [1, 3], [3, 6]]])
    expected = torch.tensor([[[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 0]]])
    assert torch.equal(vocabularies.overlap(student, teacher), expected)
    assert torch.equal(vocabularies.overlap(teacher, teacher)[0], torch.eye(3))


def test_answers_are_compared_where_both_begin_a_token():
    """From character 4 on it is the answer. Student [0,4) [4,6) [6,8) [8,9) [9,10), teacher [0,2) [2,4) [4,6)
    [6,9) [9,10): both begin a token at 4, 6 and 9; at 8 the student alone.
    """
    student = {
        "spans": torch.tensor([[[0, 4], [4, 6], [6, 8], [8, 9], [9, 10]]]),
        "labels": torch.tensor([[IGNORE, 1, 2, 3, 4]]),
    }
    teacher = {
        "spans": torch.tensor([[[0, 2], [2, 4], [4, 6], [6, 9], [9, 10]]]),
        "labels": torch.tensor([[IGNORE, IGNORE, 5, 6, 7]]),
    }
    found = vocabularies.match_tokens(student, teacher)
    assert found["kl_labels"].tolist() == [[IGNORE, 1, 2, IGNORE, 4]]
    position = found["position"][0].tolist()
    assert [position[i] for i in (0, 1, 3)] == [1, 2, 3]  # of the teacher's token that ends there
    assert found["covered"].all()


@pytest.mark.parametrize("answer", [TEXTS[0], "l'été à Ångström", TEXTS[2], "بيت أحمر, 👩‍🚀 ok"])
def test_answers_of_two_real_tokenizers(tokenizer, tiny, answer):
    """L_KL stands at as many tokens as begin in both, by the bytes of words, and at the end of the text."""

    def begins(which):
        spelled = {i: word for word, i in vocabularies.spelling(which).items()}
        ids = which.encode(" " + answer, add_special_tokens=False).ids
        return {sum(len(spelled[i]) for i in ids[:n]) for n in range(len(ids))}

    batches = []
    for which in (tiny, tokenizer):
        ids, labels = data.encode(turns("Look:", answer), which, 3)
        spans = data.spans(turns("Look:", answer), which, 3)
        batches.append({"labels": torch.tensor([labels]), "spans": spans[None]})
    found = vocabularies.match_tokens(*batches)
    same = begins(tiny) & begins(tokenizer)
    assert (found["kl_labels"] != IGNORE).sum() == len(same) + 1
    assert found["covered"].all() and vocabularies.match_tokens(*reversed(batches))["covered"].all()


def test_tokens_of_which_nothing_is_left():
    """Both have an empty token at 4, before the answer's [4,6): it is the last of those that end there after
    which the answer begins, and the empty one is no answer that is compared."""
    spans = torch.tensor([[[0, 4], [4, 4], [4, 6]]])
    batch = {"spans": spans, "labels": torch.tensor([[IGNORE, 1, 2]])}
    found = vocabularies.match_tokens(batch, batch)
    assert found["kl_labels"].tolist() == [[IGNORE, IGNORE, 2]] and found["position"][0, 1] == 1


def test_maps_are_moved_row_by_row():
    """Each row of a student's token is the mean of the teacher's rows whose characters it shares: counted
    out, character by character."""
    torch.manual_seed(0)
    spans, own = [[0, 3], [3, 4], [4, 9]], [[0, 1], [1, 3], [3, 6], [6, 9]]
    batch = {"spans": torch.tensor([spans]), "teacher": {"spans": torch.tensor([own])}}
    batch["position"] = torch.tensor([[1, 0, 3]])
    A = torch.rand(1, 4, 5)
    hidden, logits = torch.rand(1, 4, 6), torch.rand(1, 4, 7)
    out = distill.Output(hidden, logits, {2: A}, {})
    moved = vocabularies.as_the_student_reads(out, batch, (slice(0, 3), slice(0, 4)))
    for row, (a, b) in zip(moved.attentions[2][0], spans):
        touching = [A[0, j] for j, (c, d) in enumerate(own) if {*range(a, b)} & {*range(c, d)}]
        torch.testing.assert_close(row, sum(touching) / len(touching))
    assert torch.equal(moved.hidden, hidden[:, [1, 0, 3]]) and torch.equal(moved.logits, logits[:, [1, 0, 3]])


# ---------------------------------------------------------------- words


def vocabulary(words, metaspace=False, special=()):
    """A tokenizer with these words, whose spaces are written as Ġ or as ▁."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    made.add_special_tokens(list(special))
    return made


def test_words_are_known_by_their_spelling():
    """Ġred and ▁red are one word, é in bytes and as a letter; <0x41> is an A where there is no other."""
    ours = vocabulary(["Ġred", "Ã©", "A", "blue", "Ċ"], special=["<|endoftext|>"])
    theirs = vocabulary(
        ["green", "▁red", "é", "<0x41>", "<|endoftext|>"], metaspace=True, special=["<|endoftext|>"]
    )
    words = vocabularies.shared_words((ours, theirs), (8, 7))
    assert dict(zip(words.student.tolist(), words.teacher.tolist())) == {0: 1, 1: 2, 2: 3, 5: 4, 6: 6}
    assert words.student_rest.tolist() == [3, 4] and words.teacher_rest.tolist() == [0, 5]  # 7: padding


def test_the_same_tokenizer_shares_every_row(tokenizer):
    size = tokenizer.get_vocab_size() + 10  # padded
    words = vocabularies.shared_words((tokenizer, tokenizer), (size, size))
    assert torch.equal(words.student, torch.arange(size)) and torch.equal(words.teacher, torch.arange(size))
    assert not len(words.student_rest) and not len(words.teacher_rest)


def test_the_words_of_two_real_vocabularies(tokenizer, tiny):
    """Each pair says the same; and every byte is in both."""
    sizes = tiny.get_vocab_size(), tokenizer.get_vocab_size()
    words = vocabularies.shared_words((tiny, tokenizer), sizes)
    assert len(words.student) >= 257
    for i, j in zip(words.student.tolist(), words.teacher.tolist()):
        assert tiny.decode([i], skip_special_tokens=False) == tokenizer.decode([j], skip_special_tokens=False)
    assert len(words.student) + len(words.student_rest) == sizes[0]
    assert len(words.teacher) + len(words.teacher_rest) == sizes[1]


def test_of_two_words_with_one_spelling_the_added_one_counts():
    """The encoder uses it; and it is the same one in every process, whatever order a vocabulary comes in."""
    made = vocabulary(["ĠĠ", "a", "b"])
    made.add_tokens(["  "])
    assert {vocabularies.spelling(made)[b"  "] for _ in range(5)} == {3}
    words = vocabularies.shared_words((made, made), (6, 6))
    assert (
        words.student.tolist() == words.teacher.tolist() == [1, 2, 3, 4, 5]
    )  # and not 0, as a word or padding


@pytest.mark.parametrize("kind", ["words", "prefix", "lower case"])
def test_words_that_do_not_spell_the_text_are_refused(kind, tiny):
    """Whole words without their spaces, a space put before every text, a normaliser: L_KL would compare what
    does not mean the same."""
    vocabularies.check_spelling(tiny)
    if kind == "words":
        made = Tokenizer(models.WordLevel({"?": 0, "yes": 1, "red": 2}, unk_token="?"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        made = other_tokenizer()
        if kind == "prefix":
            made.normalizer = normalizers.Prepend(" ")
        else:
            made.normalizer = normalizers.Replace("the", "The")
    with pytest.raises(BadInput, match="does not spell .* as it is"):
        vocabularies.check_spelling(made)


def test_tokenizers_that_share_no_word_are_refused():
    ours, theirs = (vocabulary([word], special=["<|endoftext|>"]) for word in ("red", "rot"))
    with pytest.raises(BadInput, match="no word in common"):
        vocabularies.shared_words((ours, theirs), (2, 2))


# ---------------------------------------------------------------- the divergence

WORDS = SharedWords(*map(torch.tensor, ([0, 2, 5], [1, 0, 3], [1, 3, 4], [2])))  # V = 6 and 4


def test_the_shared_divergence_counted_out():
    """Word by word, with one more for all others."""
    s, t = torch.randn(3, 6), torch.randn(3, 4)
    expected = 0
    for p, q in zip(t.softmax(-1).tolist(), s.softmax(-1).tolist()):
        pairs = [(p[1], q[0]), (p[0], q[2]), (p[3], q[5]), (p[2], q[1] + q[3] + q[4])]
        expected += sum(a * (torch.tensor(a / b).log().item()) for a, b in pairs)
    assert shared_kl_divergence(s, t, WORDS).item() == pytest.approx(expected, abs=1e-5)


def test_the_shared_divergence_of_one_vocabulary_is_the_plain_one():
    s, t, all_of_it = torch.randn(3, 6), torch.randn(3, 6), torch.arange(6)
    none = torch.tensor([], dtype=torch.long)
    words = SharedWords(all_of_it, all_of_it, none, none)
    torch.testing.assert_close(shared_kl_divergence(s, t, words), distill.kl_divergence(s, t))


@pytest.mark.parametrize("sizes", [(478, 542), (542, 478), (488, 542)])
def test_one_vocabulary_padded_in_two_ways(tiny, sizes):
    """Output matrices of other sizes: as with --tokenizers same, the smaller one counts."""
    assert tiny.get_vocab_size() == 478
    words = vocabularies.shared_words((tiny, tiny), sizes)
    s, t = (torch.randn(3, size) for size in sizes)
    torch.testing.assert_close(shared_kl_divergence(s, t, words), distill.kl_divergence(s, t))
    (ours, gradient), (plain, expected) = (
        lean.shared_kl_with_gradient(words, s, t),
        lean.kl_with_gradient(s, t),
    )
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "words, sizes",
    [
        (WORDS, (6, 4)),
        (WORDS, (9, 5)),
        (SharedWords(*map(torch.tensor, ([0, 1], [2, 0], [2], [1, 3]))), (3, 4)),
        (
            SharedWords(
                torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([]).long(), torch.tensor([1])
            ),
            (2, 3),
        ),
        (
            SharedWords(
                torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([]).long()
            ),
            (3, 2),
        ),
    ],
    ids=["both have others", "padding", "both", "the teacher alone", "the student alone"],
)
def test_the_gradient_that_is_written_out(words, sizes):
    s, t = (torch.randn(5, size) for size in sizes)
    s.requires_grad_()
    value = shared_kl_divergence(s, t, words)
    (expected,) = torch.autograd.grad(value, s)
    kl, gradient = lean.shared_kl_with_gradient(words, s.detach(), t)
    torch.testing.assert_close(kl, value.detach())
    torch.testing.assert_close(gradient, expected[:, : gradient.shape[1]])
    assert not expected[:, gradient.shape[1] :].any()  # padding


# ---------------------------------------------------------------- a step


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tiny") / "world", tune=16, pretrain=8, per_kind=1)


@pytest.fixture(scope="module")
def teacher():
    return model.load(TINY / "teacher").requires_grad_(False)


@pytest.fixture(scope="module")
def other_lm(tmp_path_factory):
    """A plain language model that reads other tokens, as a checkpoint folder: random weights."""
    folder, tokenizer = tmp_path_factory.mktemp("lm") / "other", other_tokenizer(trim=True)
    torch.manual_seed(1)
    text = replace(model.load_lm(TINY / "student").config, vocab_size=tokenizer.get_vocab_size() + 5)
    lm = Qwen(text)
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else None
    from support.checkpoint import write_folder
    from support.layouts import qwen_fields

    write_folder(folder, lm.state_dict(), qwen_fields(text), {"tokenizer.json": tokenizer.to_str()})
    return folder


def batch_of(world, student, teacher, aligned=True, **more):
    """Six samples, among them one without a picture and one with its picture in a later turn."""
    records = json.loads((world / "tune.json").read_text())[:4]
    text = [{"from": "human", "value": "Any shape?"}, {"from": "gpt", "value": "naïve, no"}]
    records.append({"id": "t", "conversations": text})
    later = [{"from": "human", "value": "<image> And here?"}, text[1]]
    records.append({"id": "l", "image": records[0]["image"], "conversations": [*text, *later]})
    file = world / "six.json"
    file.write_text(json.dumps(records))
    tokenizer = teacher.tokenizer if aligned else None
    dataset = data.LlavaDataset(
        file, world / "images", student.tokenizer, 16, 40, teacher_tokenizer=tokenizer, **more
    )
    return dataset.batch(list(range(6)))


def step(student, teacher, batch, method, plain, tokenizers="aligned"):
    """Loss, terms, and the gradient of every trained parameter."""
    student.requires_grad_(True)
    student.vision.requires_grad_(False)
    student.adapter.teacher.requires_grad_(False)
    weights = method.weights["2"]
    module = train.Step(student, teacher, method, weights, plain, "fp32", tokenizers)
    loss, terms = module(batch, distill.loss_counts(batch, method, weights))
    names, parameters = zip(*[(n, p) for n, p in student.named_parameters() if p.requires_grad])
    found = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))
    return loss.detach(), {name: (t.sum.detach(), t.count) for name, t in terms.items()}, found


def assemble(folder, teacher):
    torch.manual_seed(0)
    lm = model.load_lm(folder)
    tokenizer = data.load_tokenizer(folder, lm.config.vocab_size)
    return model.VLM.assemble(teacher.vision, lm, tokenizer, teacher, taf=True)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", ["compodistill", "compodistill-rows"])
def test_one_tokenizer_through_aligned_is_the_same(world, teacher, name, plain):
    """Loss, terms and gradients to 1e-6, with the text-only sample and the picture in a later turn."""
    student, method = assemble(TINY / "student", teacher), METHODS[name]
    batches = [batch_of(world, student, teacher, aligned) for aligned in (False, True)]
    assert torch.equal(batches[1]["kl_labels"], batches[0]["labels"])
    one, two = (
        step(student, teacher, batch, method, plain, tokenizers)
        for batch, tokenizers in zip(batches, ("same", "aligned"))
    )
    torch.testing.assert_close(one[0], two[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one[1], two[1], rtol=1e-6, atol=1e-6)
    for key, gradient in one[2].items():
        torch.testing.assert_close(two[2][key], gradient, rtol=1e-4, atol=1e-6, msg=key)


VARIED = {name: METHODS[name] for name in ("kd", "compodistill", "compodistill-rows")}
VARIED["kd"] = replace(VARIED["kd"], taf=True)
VARIED |= {
    "heads": replace(METHODS["compodistill-rows"], distance="matched-heads"),
    "adaptive": replace(METHODS["compodistill"], matching="adaptive"),
    "image rows": replace(METHODS["compodistill"], rows="image"),
    "shuffled": replace(METHODS["compodistill-rows"], control="shuffled"),
    "other": replace(METHODS["compodistill"], control="other"),
    "half the KL": replace(METHODS["compodistill"], weights={"2": {"lm": 1.0, "kl": 0.5, "adl": 1.0}}),
}


@pytest.mark.parametrize("cut", [None, 230], ids=["whole", "cut"])
@pytest.mark.parametrize("name", VARIED)
def test_plain_and_lean_are_one_with_two_tokenizers(world, teacher, other_lm, monkeypatch, name, cut):
    monkeypatch.setattr(lean, "QUERY_ROWS", 7)
    monkeypatch.setattr(lean, "LOGIT_ROWS", 5)
    student = assemble(other_lm, teacher)
    batch = batch_of(world, student, teacher, max_length=cut)
    assert batch["teacher"]["input_ids"].shape[1] != batch["input_ids"].shape[1] or cut
    one, two = (step(student, teacher, batch, VARIED[name], plain) for plain in (True, False))
    torch.testing.assert_close(one[:2], two[:2], rtol=1e-5, atol=1e-5)
    counts = distill.loss_counts(batch, VARIED[name], VARIED[name].weights["2"])
    assert {key: count.item() for key, (_, count) in one[1].items()} == {
        k: v.item() for k, v in counts.items()
    }
    assert 0 < counts["kl"] < counts["lm"]
    for key, gradient in one[2].items():
        torch.testing.assert_close(two[2][key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_a_sample_by_hand(world, teacher, other_lm):
    """L_ADL and L_KL of one sample from two whole forward passes, token by token by their characters."""
    student, method = assemble(other_lm, teacher), METHODS["compodistill-rows"]
    conversation = json.loads((world / "tune.json").read_text())[0]
    batch = batch_of(world, student, teacher)
    tokens = [len(batch["spans"][0]), len(batch["teacher"]["spans"][0])]
    tokens = [int(b["attention_mask"][0].sum()) for b in (batch, batch["teacher"])]
    outs = [
        vlm(b["input_ids"][:1, :n], batch["pixel_values"][:1], attention=in_full(*range(5)))
        for vlm, b, n in zip((student, teacher), (batch, batch["teacher"]), tokens)
    ]
    spans = [b["spans"][0, :n].tolist() for b, n in zip((batch, batch["teacher"]), tokens)]
    columns = [b["visual_columns"][0] for b in (batch, batch["teacher"])]
    # understanding layers: 2, 3 of the student; 2, 3, 4 of the teacher, in groups of two
    seen = [{i: A[0].mean(0)[:, c] for i, A in out.attentions.items()} for out, c in zip(outs, columns)]
    distances = []
    for i, (a, b) in enumerate(spans[0]):
        if i <= columns[0][-1]:
            continue
        over = [j for j, (c, d) in enumerate(spans[1]) if max(a, c) < min(b, d)]
        for layer, group in ((2, (2, 3)), (3, (3, 4))):
            target = sum(seen[1][g][j] for g in group for j in over)
            distances.append(1 - F.cosine_similarity(seen[0][layer][i], target, dim=0))
    _, terms, _ = step(student, teacher, {**batch_one(world, student, teacher)}, method, plain=False)
    total, count = terms["adl"]
    assert count == len(distances) // 2
    assert total.item() == pytest.approx(sum(distances).item() / 2, rel=1e-4)

    text = "".join("#" * 16 if p is data.IMAGE_MARK else "$" if p is data.END_OF_TEXT else p
                   for p, _ in data.pieces(conversation["conversations"], "chat"))  # fmt: skip
    assert spans[0][-1][1] == spans[1][-1][1] == len(text)
    words = vocabularies.shared_words(
        (student.tokenizer, teacher.tokenizer), tuple(len(vlm.lm.head_weight) for vlm in (student, teacher))
    )
    labels = [b["labels"][0] for b in (batch, batch["teacher"])]
    begins = [
        {a: i for i, (a, _) in enumerate(spans[k]) if labels[k][i] != IGNORE and spans[k][i - 1][1] <= a}
        for k in (0, 1)
    ]
    shared = sorted(begins[0].keys() & begins[1].keys())
    kl = sum(
        shared_kl_divergence(outs[0].logits[0, begins[0][a] - 1 : begins[0][a]],
                             outs[1].logits[0, begins[1][a] - 1 : begins[1][a]], words)
        for a in shared
    )  # fmt: skip
    total, count = terms["kl"]
    assert count == len(shared) > 5 and total.item() == pytest.approx(kl.item(), rel=1e-4)


def batch_one(world, student, teacher):
    """The first sample alone."""
    dataset = data.LlavaDataset(
        world / "tune.json", world / "images", student.tokenizer, 16, 40, teacher_tokenizer=teacher.tokenizer
    )
    return dataset.batch([0])


# ---------------------------------------------------------------- training


def argv(world, out, stage, lm, *flags):
    files = "pretrain.json" if stage == 1 else "tune.json"
    words = [
        "--stage",
        stage,
        "--data",
        world / files,
        "--images",
        world / "images",
        "--out",
        out,
        "--name",
        "x",
    ]
    words += ["--tokenizers", "aligned", "--steps", 3, "--batch-size", 4, *flags]
    return [*map(str, words), *(["--student", str(lm)] if stage == 1 else [])]


def test_all_stages_with_another_tokenizer(world, other_lm, tmp_path):
    """The student keeps its own tokenizer, and answers; a run that is stopped goes on to the same bits."""
    for stage in (1, 2, 3):
        train.main(argv(world, tmp_path / "whole", stage, other_lm))
    student = model.load(tmp_path / "whole/x/stage3")
    assert student.tokenizer.to_str() == data.load_tokenizer(other_lm).to_str()
    assert isinstance(student.answer(world / "images/test-0.png", "What colour is the circle?"), str)
    start = ["--student", str(tmp_path / "whole/x/stage1")]
    train.main([*argv(world, tmp_path / "parts", 2, other_lm), *start, "--stop-after", "2"])
    train.main([*argv(world, tmp_path / "parts", 2, other_lm), *start])
    one, two = (model.load(tmp_path / name / "x/stage2").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_attention_alone_with_another_tokenizer(world, other_lm, tmp_path):
    """--kl-weight 0: in stage 1 the teacher gives its adapter alone, and reads other tokens all the same."""
    for stage in (1, 2):
        train.main(argv(world, tmp_path, stage, other_lm, "--kl-weight", 0))
    rows = [json.loads(line) for line in (tmp_path / "x/stage2.jsonl").read_text().splitlines()]
    assert all(row["adl"] > 0 and "kl" not in row for row in rows)


def test_other_tokenizers_are_refused_without_the_flag(world, other_lm, teacher, tmp_path):
    student = assemble(other_lm, teacher)
    with pytest.raises(BadInput, match="tokenizers differ; give --tokenizers aligned"):
        check_pair(student, teacher, taf=True)
    check_pair(student, teacher, True, "aligned")


@pytest.mark.parametrize("method", ["llavadi", "llava-kd", "released"])
def test_losses_that_need_one_vocabulary(method, capsys):
    with pytest.raises(SystemExit):
        config("--method", method, "--tokenizers", "aligned")
    assert f"the losses of {method} need one vocabulary" in capsys.readouterr().err


def test_a_cut_of_the_teachers_text_is_counted(world, teacher, other_lm):
    """Whose tokens are more: with a limit that all of the student's texts keep."""
    reading_more = assemble(other_lm, teacher)
    batch = batch_of(world, teacher, reading_more, max_length=160)
    real = batch["attention_mask"]
    assert real.sum(1).max() < 160 and batch["teacher"]["attention_mask"].sum(1).max() == 160
    assert batch["cut"] >= 4 and not batch["covered"][real].all()  # tokens whose counterpart is cut off


@pytest.mark.slow
def test_held_out_records_are_counted_once_on_ranks(world, other_lm, tmp_path):
    """Three records on two ranks, one at a time: a rank has none left in the second pass."""
    train.main(argv(world, tmp_path / "start", 1, other_lm))
    records = json.loads((world / "val.json").read_text())[:3]
    (world / "three.json").write_text(json.dumps(records))
    more = ["--student", str(tmp_path / "start/x/stage1"), "--val-data", str(world / "three.json")]
    train.main([*argv(world, tmp_path / "one", 2, other_lm, "--lr", 1e-9), *more])
    flags = argv(world, tmp_path / "two", 2, other_lm, "--lr", 1e-9)
    flags[flags.index("--batch-size") + 1] = "1"
    run([*flags, *more], 2)
    one, two = (
        json.loads((tmp_path / out / "x/stage2.jsonl").read_text().splitlines()[-1]) for out in ("one", "two")
    )
    for name in ("val_lm", "val_kl", "val_adl"):
        assert one[name] == pytest.approx(two[name], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("parallel, tune", [("ddp", "lora"), ("fsdp", "full"), ("fsdp", "lora")])
def test_ranks_change_nothing(world, other_lm, tmp_path, parallel, tune):
    """Two tokenizers, heads one by one, a frozen layer: two ranks train what one does."""
    train.main(argv(world, tmp_path / "start", 1, other_lm))
    start = ["--student", str(tmp_path / "start/x/stage1"), "--vat-heads", "matched", "--vat-queries", "text"]
    start += ["--freeze-layers", "1", "--tune", tune, "--lr", "1e-4", "--log-every", "1"]
    flags = argv(world, tmp_path / "one", 2, other_lm)
    train.main([*flags, *start])
    flags = argv(world, tmp_path / "two", 2, other_lm)
    flags[flags.index("--batch-size") + 1] = "2"
    run([*flags, *start, "--parallel", parallel], 2)
    logs = [(tmp_path / out / "x/stage2.jsonl").read_text().splitlines() for out in ("one", "two")]
    for ours, theirs in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        for name in ("lm", "kl", "adl", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    same_weights(*(load_file(tmp_path / out / "x/stage2/model.safetensors") for out in ("one", "two")))
