"""analyses.py and story.py: every number against whole maps of one prompt at a time, the intervention by
hand, the statistics by hand or by their textbook formula, and what the story says about given numbers.
"""

import argparse
import csv
import importlib.util
import json
import math
import re
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
from distill import METHODS
from evals import analyses
from evals.analyses import Guided, Question
from helpers import in_full
from lean import VisualAttention
from qwen import Qwen, QwenConfig, rope_angles, rotate
from support.errors import BadInput
from support.layouts import VLMConfig
from support.world import COMPOSITION, TINY, make_world, tiny_items
from tiny import story
from tiny.scores import paired_yes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tiny") / "world", tune=8, pretrain=8, per_kind=20)


def new_student(teacher, seed=0):
    """A student with a random adapter, its attention sharpened, so that its maps differ from head to head."""
    torch.manual_seed(seed)
    lm = model.load_lm(TINY / "student")
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.q_proj.weight.mul_(2)
    return model.VLM.assemble(teacher.vision, lm, teacher.tokenizer, teacher, taf=True).eval()


@pytest.fixture(scope="module")
def student(teacher):
    return new_student(teacher)


@pytest.fixture(scope="module")
def questions(world):
    return analyses.world_questions(world, limit=2)


def prompt_of(vlm, question):
    """ids (1,T), pixels and the columns of the picture, of one question alone."""
    turn = {"from": "human", "value": f"<image>\n{question.text}"}
    ids = torch.tensor([data.encode_prompt([turn], vlm.tokenizer, vlm.num_image_tokens)])
    pixels = data.preprocess(question.picture, vlm.config.vision.image_size)[None]
    return ids, pixels, (ids[0] == data.IMAGE_TOKEN).nonzero()[:, 0].tolist()


def tokens(vlm, text):
    return vlm.tokenizer.encode(text, add_special_tokens=False).ids


def single_tokens(vlm, word):
    """The tokens that are a whole written yes or no, with the space that stands before an answer."""
    forms = [tokens(vlm, form) for form in (f" {word}", f" {word.title()}")]
    return sorted({ids[0] for ids in forms if len(ids) == 1})


# ---------------------------------------------------------------- questions


def test_questions_are_the_tiny_worlds_test(world, questions):
    assert [len(asked) for asked in questions.values()] == [4 * 2, 7 * 2 * 2]
    pairs = json.loads((world / "test/swap_att.json").read_text())
    mine = [question for question in questions["compositional"] if question.kind == "swap_att"]
    file = world / "images" / pairs["1"]["filename"]
    assert mine[2:] == [
        Question(file, f"True? {pairs['1']['caption']}", "yes", "swap_att"),
        Question(file, f"True? {pairs['1']['negative_caption']}", "no", "swap_att"),
    ]
    item = json.loads((world / "test/recognition.json").read_text())[0]
    expected = Question(world / "images" / item["image"], item["question"], item["answer"], item["kind"])
    assert questions["recognition"][0] == expected


def test_questions_of_real_benchmarks(tmp_path):
    """SugarCrepe and GQA in their own files: kinds, right answers, at most so many of a kind."""
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    for kind in ("swap_obj", "add_att"):
        captions = {i: {"caption": f"{kind} {i}", "negative_caption": f"no {i}"} for i in (3, 7)}
        pairs = {str(i): {"filename": "a.jpg", **two} for i, two in captions.items()}
        (tmp_path / f"{kind}.json").write_text(json.dumps(pairs))
    record = {"isBalanced": True, "question": "What is it?", "answer": "cat", "imageId": "b"}
    kinds = {"9": "query", "8": "verify", "7": "query"}
    records = {key: {**record, "types": {"structural": kind}} for key, kind in kinds.items()}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(records))
    sugarcrepe = tmp_path / "swap_obj.json"
    found = analyses.benchmark_questions((sugarcrepe, tmp_path), (tmp_path, tmp_path), limit=1)
    said = {items: [(q.picture.name, q.answer, q.kind) for q in asked] for items, asked in found.items()}
    assert said["compositional"] == [("a.jpg", "yes", "swap_obj"), ("a.jpg", "no", "swap_obj")]
    assert said["recognition"] == [("b.jpg", "cat", "open"), ("b.jpg", "cat", "binary")]
    assert ['"swap_obj 3"' in q.text or '"no 3"' in q.text for q in found["compositional"]] == [True, True]
    assert set(analyses.benchmark_questions((sugarcrepe, tmp_path), None)) == {"compositional"}


# ---------------------------------------------------------------- what the models do, one prompt at a time


def test_which_layers_are_compared():
    assert analyses.matched(5, 6) == [[0], [1], [2, 3], [3, 4], [5]]
    real = analyses.matched(24, 40)  # Qwen1.5-1.8B and 4B
    assert real[8] == list(range(12, 20)) and real[16] == list(range(20, 28))  # groups, as in training
    assert [real[i] for i in (0, 7, 17, 23)] == [[0], [12], [29], [39]]  # (i + 1/2) / 24 of 40
    assert analyses.matched(7, 7) == [[i] for i in range(7)]
    later = replace(METHODS["compodistill"], layers="later")
    assert analyses.matched(5, 6, later) == [[0], [1], [3], [4], [5]]  # layers 4 of 5 and 5 of 6


def right_probability(vlm, question):
    ids, pixels, _ = prompt_of(vlm, question)
    if question.answer in ("yes", "no"):
        p = vlm(ids, pixels).logits[0, -1].softmax(0)
        sums = {word: p[single_tokens(vlm, word)].sum().item() for word in ("yes", "no")}
        return sums[question.answer] / (sums["yes"] + sums["no"])
    probability = 1.0
    for token in tokens(vlm, f" {question.answer}"):
        probability *= vlm(ids, pixels).logits[0, -1].softmax(0)[token].item()
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return probability


def maps_of(vlm, question):
    """Head means (L,T,T) of one prompt alone."""
    ids, pixels, columns = prompt_of(vlm, question)
    layers = range(len(vlm.lm.model.layers))
    whole = vlm(ids, pixels, attention=in_full(*layers)).attentions
    return [whole[layer][0].mean(0).detach().numpy().astype(float) for layer in layers], columns


@torch.no_grad()
@pytest.mark.parametrize("size", [3, 128])
def test_observed_numbers_are_those_of_whole_maps(teacher, student, questions, size):
    asked = questions["recognition"] + questions["compositional"][:9]
    observed = analyses.observe(teacher, {"student": student}, asked, size)
    for name, vlm in (("teacher", teacher), ("student", student)):
        seen = observed[name]
        for i, question in enumerate(asked):
            assert seen.probability[i] == pytest.approx(right_probability(vlm, question), abs=1e-5)
            maps, columns = maps_of(vlm, question)
            for layer, A in enumerate(maps):
                parts = {"before": range(columns[0]), "image": columns}
                parts["after"] = range(columns[-1] + 1, len(A))
                for part, keys in parts.items():
                    assert seen.mass[part][i, layer] == pytest.approx(A[-1, list(keys)].sum(), abs=1e-5)
    assert observed["teacher"].cosine == {}
    groups = [[0], [1], [2, 3], [3, 4], [5]]
    for i, question in enumerate(asked):
        theirs, columns = maps_of(teacher, question)
        ours, _ = maps_of(student, question)
        T = len(ours[0])
        keys = {"image": columns, "text": [k for k in range(T) if k not in columns]}
        for layer, group in enumerate(groups):
            goal = np.mean([theirs[g] for g in group], 0)
            for part, some in keys.items():
                cosines = [
                    ours[layer][row, some] @ goal[row, some]
                    / np.linalg.norm(ours[layer][row, some]) / np.linalg.norm(goal[row, some])
                    for row in range(columns[-1] + 1, T)
                ]  # fmt: skip
                got = observed["student"].cosine[part][i, layer]
                assert got == pytest.approx(np.mean(cosines), abs=1e-5), (part, layer)
    assert observed["student"].cosine["image"].std() > 0.02


def test_a_model_looks_where_it_looks(teacher, questions):
    observed = analyses.observe(teacher, {"itself": teacher_copy(teacher)}, questions["recognition"])
    for cosine in observed["itself"].cosine.values():
        np.testing.assert_allclose(cosine, 1, atol=1e-5)


def teacher_copy(teacher):
    copy = model.VLM(teacher.config, teacher.tokenizer)
    copy.load_state_dict(teacher.state_dict())
    return copy.eval()


# ---------------------------------------------------------------- the intervention by hand


def test_guided_by_hand():
    """Two heads, one row of interest, four keys of which 3 and 1 are visual."""
    A = torch.tensor([[[[0.5, 0.1, 0.2, 0.2]], [[0.1, 0.7, 0.2, 0.0]]]])  # (1,2,1,4)
    M = torch.tensor([[[0.4, 0.3]]])  # of keys 3 and 1
    columns = torch.tensor([[3, 1]])
    half = Guided(M, columns, 0.5).mixed(A)[0, :, 0]
    expected = torch.tensor([[0.5, 0.2, 0.2, 0.3], [0.1, 0.5, 0.2, 0.2]])  # sums 1.2 and 1
    torch.testing.assert_close(half, expected / torch.tensor([[1.2], [1.0]]))
    full = Guided(M, columns, 1.0).mixed(A)[0, :, 0]
    expected = torch.tensor([[0.5, 0.3, 0.2, 0.4], [0.1, 0.3, 0.2, 0.4]])
    torch.testing.assert_close(full, expected / torch.tensor([[1.4], [1.0]]))
    torch.testing.assert_close(Guided(M, columns, 0.0).mixed(A), A)


SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def random_lm(**changes):
    torch.manual_seed(0)
    lm = Qwen(QwenConfig(**{**SIZES, "num_key_value_heads": 2, **changes}))
    with torch.no_grad():
        for name, tensor in lm.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.3 + ("norm" in name))
    return lm.eval()


@torch.no_grad()
def test_a_guide_changes_its_layer_and_what_follows():
    lm, ids, columns = random_lm(), torch.randint(0, 61, (2, 8)), torch.tensor([[1, 2, 3], [4, 2, 3]])
    maps = torch.rand(2, 8, 3).tril(-1)
    guide = Guided(maps, columns, 0.5)
    plain = lm(ids, attention=in_full(0, 1, 2))
    forced = lm(ids, attention=in_full(0, 2) | {1: guide})
    torch.testing.assert_close(forced.attentions[0], plain.attentions[0])
    assert forced.attentions[1] is None
    assert (forced.attentions[2] - plain.attentions[2]).abs().max() > 1e-3
    changed = lm(ids, attention={1: guide}).hidden
    torch.testing.assert_close(changed, forced.hidden)
    assert (changed - plain.hidden).abs().max() > 1e-3
    padded = torch.cat([ids, torch.zeros(2, 2, dtype=torch.long)], 1)  # rows after the prompt change nothing
    more = {1: Guided(torch.cat([maps, torch.rand(2, 2, 3)], 1), columns, 0.5)}
    torch.testing.assert_close(lm(padded, attention=more).hidden[:, :8], changed, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_single_heads_own_map_changes_nothing(share):
    lm = random_lm(num_attention_heads=1, num_key_value_heads=1)
    ids, columns = torch.randint(0, 61, (2, 8)), torch.tensor([[1, 2, 3], [4, 5, 6]])
    plain = lm(ids, attention=dict.fromkeys(range(3), VisualAttention(slice(0, 8), columns)))
    guides = {layer: Guided(own, columns, share) for layer, own in plain.attentions.items()}
    torch.testing.assert_close(lm(ids, attention=guides).hidden, plain.hidden, rtol=1e-4, atol=1e-5)


def slow_logits(vlm, question, goals, share):
    """The student's whole forward pass written out, its visual attention replaced row by row."""
    ids, pixels, columns = prompt_of(vlm, question)
    x, c = vlm.embed(ids, pixels), vlm.config.text
    T, H, D = ids.shape[1], c.num_attention_heads, c.hidden_size // c.num_attention_heads
    rope = rope_angles(torch.arange(T)[None], D, c.rope_theta)
    for layer, block in enumerate(vlm.lm.model.layers):
        h, attention = block.input_layernorm(x), block.self_attn
        q, k, v = (
            proj(h).view(1, T, -1, D) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, *rope), rotate(k, *rope), v))
        out = torch.zeros(1, T, H, D)
        for head in range(H):
            shared = head * k.shape[1] // H
            for row in range(T):
                a = (k[0, shared, : row + 1] @ q[0, head, row] / math.sqrt(D)).softmax(0)
                if layer in goals and share:
                    for j, column in enumerate(columns):
                        if column <= row:
                            a[column] = (1 - share) * a[column] + share * goals[layer][row, j]
                    a = a / a.sum()
                out[0, row, head] = a @ v[0, shared, : row + 1]
        x = x + attention.o_proj(out.flatten(2))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return vlm.lm.head(vlm.lm.model.norm(x))[0, -1]


@torch.no_grad()
def test_intervention_equals_the_written_out_forward(teacher, student, questions):
    pairs = questions["compositional"][3:7]  # of different length
    found = analyses.intervene(teacher, {"student": student}, pairs, size=3)
    yes, no = (single_tokens(teacher, word) for word in ("yes", "no"))
    for i, question in enumerate(pairs):
        theirs, columns = maps_of(teacher, question)
        goals = {2: (theirs[2] + theirs[3]) / 2, 3: (theirs[3] + theirs[4]) / 2}
        elsewhere = pairs[(1, 0, 0, 1)[i]].picture  # the pictures are A, B, B, A
        strange, _ = maps_of(teacher, question._replace(picture=elsewhere))
        own, _ = maps_of(student, question)
        stranger = {2: (strange[2] + strange[3]) / 2, 3: (strange[3] + strange[4]) / 2}
        by_hand = {"as it is": ({}, 0.0), "mean": (goals, 0.5), "full": (goals, 1.0)}
        by_hand |= {"own mean": ({2: own[2], 3: own[3]}, 0.5), "other picture": (stranger, 0.5)}
        for way, (goals, share) in by_hand.items():
            goals = {layer: torch.tensor(goal[:, columns]).float() for layer, goal in goals.items()}
            p = slow_logits(student, question, goals, share).softmax(0)
            expected = (p[yes].sum() / p[no].sum()).log().item()
            assert found["student"][way][i] == pytest.approx(expected, abs=2e-4), (way, i)
        assert found["student"].keys() == by_hand.keys()
        p = teacher(*prompt_of(teacher, question)[:2]).logits[0, -1].softmax(0)
        expected = (p[yes].sum() / p[no].sum()).log().item()
        assert found["teacher"]["as it is"][i] == pytest.approx(expected, abs=2e-4)
    ways = np.array(list(found["student"].values()))  # (5,n)
    apart = np.abs(ways[:, None] - ways[None])[~np.eye(5, dtype=bool)]
    assert apart.max(1).min() > 0.01, "each does something of its own"


def test_every_question_gets_another_picture():
    asked = [Question(picture, str(i), "yes", "") for i, picture in enumerate("aabbacc")]
    others = analyses.with_other_pictures(asked)
    assert [question.picture for question in others] == list("bbccbaa")
    assert [question.text for question in others] == list("0123456")
    with pytest.raises(BadInput, match="two pictures"):
        analyses.with_other_pictures(asked[:2])


def test_scores_as_it_is_are_those_of_the_paired_scorer(teacher, student, world):
    pairs = [pair for rows in tiny_items(world, limit=5)[1].values() for pair in rows]
    asked = analyses.world_questions(world, limit=5)["compositional"]
    found = analyses.intervene(teacher, {"student": student}, asked)
    for name, vlm in (("teacher", teacher), ("student", student)):
        hits = analyses.pair_hits(found[name]["as it is"])
        assert (hits / 100).tolist() == paired_yes(vlm, pairs)


# ---------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors, made in here, that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.users, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                self.users[key] = self.users.get(key, 0) + 1
                self.now += size if self.users[key] == 1 else 0
                weakref.finalize(tensor, self.gone, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key, size):
        self.users[key] -= 1
        self.now -= 0 if self.users[key] else size


@torch.no_grad()
def test_maps_do_not_fill_memory():
    """400 tokens, 300 of them visual, 60 text rows: what observe and intervene ask for, against all maps."""
    lm, T, L = random_lm(num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8), 400, 6
    ids, columns = torch.randint(0, 61, (2, T)), torch.arange(20, 320).expand(2, -1)
    text = VisualAttention(slice(340, T), torch.arange(T).expand(2, -1))
    guides = {layer: Guided(torch.rand(2, T, 300).tril(-20), columns, 0.5) for layer in (2, 3, 4)}

    def peak(attention=None):
        with LiveBytes() as live:
            lm(ids, attention=attention, logits=False)
        return live.peak

    one = 4 * 2 * 8 * T * T  # bytes of one layer's map with heads
    everything = peak(in_full(*range(L)))
    assert everything > L * one  # the measure sees what is kept
    plain = peak()
    looked, forced = peak(dict.fromkeys(range(L), text)), peak(guides)
    assert looked < plain + L * 4 * 2 * 60 * T + one / 2 < everything / 3
    assert forced < everything / 1.5


# ---------------------------------------------------------------- statistics


def some_questions(pictures, kind="k"):
    return [Question(picture, "?", "yes", kind) for picture in pictures]


def test_ranks_and_spearman():
    assert analyses.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    rng = np.random.default_rng(1)
    for n in (5, 40):
        x, y = rng.permutation(n), rng.permutation(n)
        textbook = 1 - 6 * np.sum((x - y) ** 2) / (n * (n**2 - 1))
        assert analyses.spearman(np.exp(x), y**3) == pytest.approx(textbook)
    ties = analyses.spearman(np.array([1, 2, 2, 4.0]), np.array([1, 3, 2, 4.0]))
    assert ties == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # ranks 0, 1.5, 1.5, 3 and 0, 2, 1, 3
    assert analyses.spearman(np.ones(4), np.arange(4)) == 0


def test_interval_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(0).normal(3, 2, 400)
    mean, low, high = analyses.estimate(values, analyses.resamples(some_questions(range(400))))
    reach = 1.96 * values.std() / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (mean - low, high - mean) == (pytest.approx(reach, rel=0.12), pytest.approx(reach, rel=0.12))


@pytest.mark.parametrize("pictures", [[0], [0, 0, 0], [0, 0, 1], [2, 1, 0]])
def test_an_interval_of_few_holds_its_mean(pictures):
    """In float32, too, and where resamples draw none of the items in question."""
    drawn = analyses.resamples(some_questions([0, 1, 2, 3, 4, *pictures]))[:, -len(pictures) :]
    values = np.array([0.7297, 0.1, 0.3], dtype=np.float32)[: len(pictures)] + np.float32(0.1)
    mean, low, high = analyses.estimate(values, drawn)
    assert values.min() - 1e-6 <= low <= mean <= high <= values.max() + 1e-6


def test_two_questions_about_one_picture_are_no_two_observations():
    values = np.random.default_rng(0).normal(3, 2, 100)
    single = analyses.estimate(values, analyses.resamples(some_questions(range(100))))
    twice = analyses.estimate(values.repeat(2), analyses.resamples(some_questions(np.arange(100).repeat(2))))
    assert twice == pytest.approx(single)


def test_correlation_within_kinds():
    """Two kinds, in each of which y falls with x, though over both it rises."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.random(100), 2 + rng.random(100)])
    y = np.concatenate([-x[:100], 8 - x[100:]]) + rng.normal(0, 0.3, 200)
    strata = analyses.by_kind(["a"] * 100 + ["b"] * 100)
    drawn = analyses.resamples(some_questions(range(200)))
    rho, low, high = analyses.correlation(x, y, strata, drawn)
    parts = [analyses.spearman(x[:100], y[:100]), analyses.spearman(x[100:], y[100:])]
    assert rho == pytest.approx(np.mean(parts))
    assert low < rho < high < 0
    fisher = [math.tanh(math.atanh(rho) + sign * 1.96 * math.sqrt(1.06 / 97 / 2)) for sign in (-1, 1)]
    assert (low, high) == (pytest.approx(fisher[0], abs=0.05), pytest.approx(fisher[1], abs=0.05))
    all_low = analyses.correlation(x, y, [np.arange(200)], drawn)[1]
    assert all_low > 0


def test_groups_are_equal_and_of_one_mix():
    rng = np.random.default_rng(0)
    kinds = rng.permutation(["a"] * 50 + ["b"] * 100)
    values = rng.random(150) + 5 * (kinds == "b")
    group = analyses.grouped(values, analyses.by_kind(kinds.tolist()))
    for kind, size in (("a", 10), ("b", 20)):
        own = values[kinds == kind], group[kinds == kind]
        assert np.bincount(own[1]).tolist() == [size] * 5
        assert all(own[0][own[1] == g].max() < own[0][own[1] == g + 1].min() for g in range(4))


# ---------------------------------------------------------------- rows


def test_rows_of_groups_and_interventions():
    """Ten pairs of pictures 0 to 9, numbers chosen so that every row can be said in advance."""
    pairs = [
        Question(picture, "?", answer, kind)
        for picture, kind in enumerate(["swap_obj"] * 5 + ["add_att"] * 5)
        for answer in ("yes", "no")
    ]
    cosine = np.zeros((20, 5))
    cosine[:, 2:4] = (np.arange(20) // 2 % 5 / 10)[:, None]  # layers 2 and 3 are what counts
    cosine[:, 4] = 9
    cosine[::2, 2] += 0.02
    cosine[1::2, 3] -= 0.02
    probability = np.repeat([0.1, 0.2, 0.3, 0.4, 0.5] * 2, 2) + np.tile([0.05, -0.05], 10)
    seen = analyses.Observed(probability, {}, {"image": cosine}, [2, 3])
    observed = {"compositional": {"teacher": analyses.Observed(probability, {}, {}, [2, 3, 4]), "S": seen}}
    groups, correlations = analyses.group_rows(observed, {"compositional": pairs})
    assert [row["probability"] for row in groups] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert [row["similarity"] for row in groups] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [(row["model"], row["n"]) for row in groups] == [("S", 2)] * 5
    assert [(row["over"], row["rho"]) for row in correlations] == [("all", 1), ("within kinds", 1)]

    plain = np.where(np.arange(20) % 2 == 0, 1.0, 0.0)  # every pair right
    forced = plain.copy()
    forced[[0, 2]] = -1  # two of five swaps wrong
    tie = np.zeros(20)  # a tie is wrong
    shares = {"as it is": plain, "mean": forced, "full": tie}
    rows = analyses.intervention_rows({"S": shares}, pairs)
    scores = {(row["attention"], row["kind"]): (row["score"], row["change"], row["n"]) for row in rows}
    assert scores["as it is", "all"] == (100, 0, 10)
    assert scores["mean", "Swap"] == (60, -40, 5) and scores["mean", "Add"] == (100, 0, 5)
    assert scores["mean", "all"] == (80, -20, 10) and scores["full", "all"] == (0, -100, 10)


# ---------------------------------------------------------------- the story


def claim(low, high):
    return story.Claim("", (low + high) / 2, low, high)


def test_verdicts_follow_from_intervals():
    yes, open_, no = claim(0.1, 0.3), claim(-0.1, 0.3), claim(-0.3, -0.1)
    assert [c.verdict for c in (yes, open_, no)] == ["holds", "not shown", "the opposite holds"]
    assert claim(0.0, 0.2).verdict == "not shown"
    says = story.link_verdict
    assert says([yes, yes]) == "holds" and says([no]) == "the opposite holds" and says([]) == "not tested"
    assert says([yes, open_]) == "in part: 1 of 2 claims hold" and says([open_, open_]) == "not shown"
    assert says([yes, no, no]) == "in part: 1 of 3 claims hold, the opposite of 2"
    assert says([open_, no]) == "not shown, the opposite of 1"


def made_up_study(sft, forced, aligned, rng):
    """A study whose numbers say: SFT and KD score `sft`, `forced` with the teacher's attention; CompoDistill
    scores `aligned`. Similarity and right answers of SFT and KD go together, those of CompoDistill do not.
    """
    pairs = [Question(i // 2, "?", ("yes", "no")[i % 2], COMPOSITION[i // 2 % 7]) for i in range(700)]
    single = [Question(i, "?", "red", "colour") for i in range(100)]
    questions = {"recognition": single, "compositional": pairs}

    def odds(score):  # hits for so many % of the pairs
        hit = np.arange(700) // 2 % 50 < score / 2
        return np.where(np.arange(700) % 2, 0.0, np.where(hit, 1.0, -1.0))

    def mass(n, layers):
        return dict.fromkeys(("image", "before", "after"), np.full((n, layers), 1 / 3))

    def seen(n, image, follows):
        noise = rng.random(n // 2).repeat(2)
        cosine = {"image": np.tile(image + 0.1 * noise[:, None], 5), "text": np.full((n, 5), 0.6)}
        right = 0.5 + 0.4 * noise if follows else rng.random(n)
        return analyses.Observed(right, mass(n, 5), cosine, [2, 3])

    observed = {
        items: {
            "teacher": analyses.Observed(np.ones(n), mass(n, 6), {}, [2, 3, 4]),
            "sft": seen(n, 0.3, True),
            "kd": seen(n, 0.4, True),
            "compodistill": seen(n, 0.8, False),
        }
        for items, n in (("recognition", 100), ("compositional", 700))
    }
    scores = {"sft": (sft, forced), "kd": (sft, forced), "compodistill": (aligned, aligned - 10)}
    intervened = {"teacher": {"as it is": odds(98)}} | {
        name: {"as it is": odds(plain), "mean": odds(mixed), "full": odds(mixed - 20)}
        | {"own mean": odds(plain), "other picture": odds(mixed - 8)}
        for name, (plain, mixed) in scores.items()
    }
    rows = dict(zip(("groups", "correlation"), analyses.group_rows(observed, questions)))
    rows["intervention"] = analyses.intervention_rows(intervened, pairs)
    return analyses.Study(questions, observed, intervened, rows)


def test_the_story_says_what_the_numbers_say(monkeypatch):
    monkeypatch.setattr(analyses, "RESAMPLES", 200)
    recognised = {name: np.ones(100) for name in ("teacher", "sft", "kd", "compodistill")}
    rng = np.random.default_rng(0)

    def report(study, missing, figures):
        return story.report(study, story.tested(study), recognised, missing, figures)

    good = report(made_up_study(60, 76, 90, rng), "", figures=True)
    verdicts = re.findall(r"^\| \d\. [^|]*\| ([^|]*) \|", good, re.M)
    assert verdicts[0] == verdicts[2] == verdicts[3] == "holds" and "**3 of 4 links hold.**" in good
    assert verdicts[1] == "in part: 2 of 3 claims hold"
    assert "sft: cosine over text minus over image tokens: +0.25" in good  # 0.6 - 0.35
    assert "compodistill minus sft with the teacher's attention mixed in, points: +14.00" in good
    chance = report(made_up_study(50, 40, 90, rng), "", figures=True)
    assert re.findall(r"^\| \d\. [^|]*\| ([^|]*) \|", chance, re.M)[2] == "not tested"
    bad = report(made_up_study(66, 50, 66, rng), "Not found: x.", figures=False)
    verdicts = re.findall(r"^\| \d\. [^|]*\| ([^|]*) \|", bad, re.M)
    assert verdicts[2] == "the opposite holds" and verdicts[3] == "in part: 2 of 3 claims hold"
    assert "Not found: x." in bad
    assert "similarity.png" not in bad and "pip install matplotlib" in bad and "picture.png" in bad
    assert "| sft | 100.0 [100.0, 100.0] | 66.0 [" in bad  # its scores as it is
    row = (
        "| sft | mean | 50.0 | 50.0 | 50.0 | 50.0 | -16.0 [-"  # 66 - 50; its own mean has 66, the other's 42
    )
    assert re.search(re.escape(row) + r"[^|]*\| -16.0 [^|]*\| 8.0 ", bad)


# ---------------------------------------------------------------- the command line


def call(*argv):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    analyses.add_arguments(commands)
    analyses.add_common_arguments(commands.add_parser("story"), "out/story")
    args = parser.parse_args([str(word) for word in argv])
    (story.story if args.command == "story" else analyses.run)(args)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, teacher, world):
    """What `python -m tiny` would have written, of two students that have learned nothing."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("kd", "compodistill")):
        new_student(teacher, seed).save(folder / name / "stage3")
    return folder


def test_story_runs_through(runs, world, tmp_path, capsys, monkeypatch):
    """With its figures where there is matplotlib."""
    monkeypatch.setattr(analyses, "RESAMPLES", 50)
    call("story", "--runs", runs, "--world", world, "--limit", 5, "--out", tmp_path / "s")
    report = (tmp_path / "s/report.md").read_text()
    lost = f"Not found under {runs}: sft, compodistill-rows; `python -m tiny --out {runs}` makes them"
    assert lost in report
    linked = re.findall(r"\]\(([\w.]+)\)", report)
    drawn = analyses.ANALYSES if importlib.util.find_spec("matplotlib") else ["picture"]
    assert {name for name in linked if name.endswith(".png")} == {f"{name}.png" for name in drawn}
    for name in linked:
        assert (tmp_path / "s" / name).stat().st_size > 200, name
    for name in drawn:  # a drawing, no blank page
        assert len(np.unique(np.asarray(Image.open(tmp_path / "s" / f"{name}.png").convert("L")))) > 20
    assert "1. attention is misaligned: " in capsys.readouterr().out
    for file in (tmp_path / "s").glob("*.json"):
        rows = json.loads(file.read_text())
        with open(file.with_suffix(".csv"), newline="") as table:
            same = list(csv.DictReader(table))
        assert [{key: str(value) for key, value in row.items()} for row in rows] == same
    with pytest.raises(BadInput, match="exists already"):
        call("story", "--runs", runs, "--world", world, "--out", tmp_path / "s")


def test_without_matplotlib_the_numbers_are_there(runs, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyses, "RESAMPLES", 50)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    argv = ["--runs", runs, "--world", world, "--limit", 5]
    call("analyse", "similarity", "groups", *argv, "--out", tmp_path / "a")
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == [f"{n}.{e}" for n in ("correlation", "groups", "similarity") for e in ("csv", "json")]
    assert "pip install matplotlib" in capsys.readouterr().err
    rows = json.loads((tmp_path / "a/similarity.json").read_text())
    some = [row for row in rows if row["model"] == "kd" and row["tokens"] == "image"]
    assert [row["teacher_layers"] for row in some[:5]] == ["0", "1", "2 3", "3 4", "5"]
    assert [row["understanding"] for row in some[:5]] == [False, False, True, True, False]


def test_picture_of_any_image_and_its_numbers(runs, world, teacher, tmp_path):
    image = world / "images/test-1.png"
    argv = ["--runs", runs, "--image", image, "--question", "What shape is the red one?"]
    maps, columns = maps_of(teacher, Question(image, "What shape is the red one?", "", ""))
    for which, layers in (("intermediate", (2, 3, 4)), ("later", (5,))):
        call("analyse", "picture", *argv, "--layers", which, "--out", tmp_path / which)
        assert Image.open(tmp_path / which / "picture.png").width > 700
        rows = json.loads((tmp_path / which / "picture.json").read_text())
        assert len(rows) == 3 * 16
        shown = np.mean([maps[layer][-1, columns] for layer in layers], 0)
        own = [row["attention"] for row in rows if row["model"] == "teacher"]
        np.testing.assert_allclose(own, shown, atol=1e-6)
        assert [(row["row"], row["column"]) for row in rows[:5]] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


def test_bad_input_is_one_sentence(runs, world, teacher, tmp_path):
    out = ["--world", world, "--limit", 2, "--out", tmp_path / "out"]
    one, picture = ["analyse", "similarity", *out], ["analyse", "picture", *out, "--runs", runs]

    def refused(match, *argv):
        with pytest.raises(BadInput, match=match) as error:
            call(*argv)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    def student_of(name, vlm):
        vlm.save(tmp_path / name)
        return ["--students", f"A={tmp_path / name}"]

    refused("nowhere has no student .*python -m tiny --out", *one, "--runs", "nowhere")
    refused("--students kd: give each as NAME=FOLDER", *one, "--students", "kd")
    refused("every name once", *one, "--students", "A=x", "A=y")
    refused("no name for a student", *one, "--students", "teacher=x")
    refused("nowhere: no such folder", *one, "--students", "A=nowhere")
    refused("give both or none", *picture, "--image", "x.png")
    refused("nothing.png", *picture, "--image", "nothing.png", "--question", "?")
    refused("nowhere does not exist", *one, "--runs", runs, "--sugarcrepe", "nowhere", tmp_path)

    deep = QwenConfig(**{**SIZES, "num_key_value_heads": 4, "num_hidden_layers": 9, "vocab_size": 478})
    deep = model.VLM(VLMConfig(teacher.config.vision, deep), teacher.tokenizer)
    refused("deep: .*cannot be matched", *one, *student_of("deep", deep))
    config = new_student(teacher).config
    other = model.VLM(replace(config, text=replace(config.text, vocab_size=479)))
    other.tokenizer = Tokenizer.from_str(teacher.tokenizer.to_str())
    other.tokenizer.add_tokens(["one more"])
    refused("words has another tokenizer", *one, *student_of("words", other))
    broken = new_student(teacher)
    with torch.no_grad():
        broken.lm.model.norm.weight.fill_(float("nan"))
    broken = student_of("nan", broken)
    refused("/nan gives numbers that are not finite", *one, *broken)
    refused("/nan gives numbers that are not finite", "analyse", "intervention", *out, *broken)

    (tmp_path / "file").write_text("")
    refused("could not be", *one[:-1], tmp_path / "file/sub", "--runs", runs)
    with pytest.raises(SystemExit):
        call("story", "--out", tmp_path / "out", "--limit", 0)
