"""eval.py: every scorer against the same thing done slowly, one prompt at a time, with the model's plain
forward pass. `bench`: its lines and files, kills, ranks, and what it refuses.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import eval as evaluation
import model
from evals import answers, benchmarks, pictures, scorers
from evals.pictures import tiny_cases
from helpers import in_full
from support.errors import BadInput
from support.world import COMPOSITION, RECOGNITION, TINY, make_world, tiny_items
from tiny.__main__ import main as tiny
from tiny.scores import attention_similarity, exact_answers, paired_yes, tiny_scores
from tiny.students import CURVES, STUDENTS, write_curves


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tiny") / "world", tune=8, pretrain=8, per_kind=40)


@pytest.fixture(scope="module")
def pairs(world):
    return [pair for rows in tiny_items(world, limit=3)[1].values() for pair in rows]


def alone(vlm, picture, question):
    """Logits after one prompt, by the plain forward pass."""
    sample = scorers.prompt(vlm, picture, question)
    return vlm(torch.tensor([sample["input_ids"]]), sample["pixel_values"][None]).logits[0, -1]


def token(vlm, text):
    return vlm.tokenizer.encode(text, add_special_tokens=False).ids[0]


@torch.no_grad()
def test_paired_yes(teacher, pairs):
    expected = []
    for picture, *captions in pairs:
        p = [alone(teacher, picture, f"True? {caption}").softmax(0) for caption in captions]
        yes = [q[token(teacher, " yes")] / (q[token(teacher, " yes")] + q[token(teacher, " no")]) for q in p]
        expected.append(float(yes[0] > yes[1]))
    assert paired_yes(teacher, pairs) == expected
    swapped = [(picture, wrong, true) for picture, true, wrong in pairs]
    assert paired_yes(teacher, swapped) == [1 - hit for hit in expected]


def test_a_tie_is_wrong(teacher, pairs):
    same = [(picture, true, true) for picture, true, _ in pairs]
    assert sum(paired_yes(teacher, same)) == 0


@torch.no_grad()
def log_p(vlm, picture, question, tokens):
    """Of each token that follows the prompt, by the plain forward pass of one whole text."""
    sample = scorers.prompt(vlm, picture, question)
    logits = vlm(torch.tensor([sample["input_ids"] + tokens]), sample["pixel_values"][None]).logits[0]
    rows = logits[len(sample["input_ids"]) - 1 :].log_softmax(-1)
    return [rows[i, token].item() for i, token in enumerate(tokens)]


def test_exact_answers_are_what_the_model_says(teacher, world):
    recognition, _ = tiny_items(world, limit=5)
    items = [item for rows in recognition.values() for item in rows]
    expected = [float(teacher.answer(picture, question, 4) == answer) for picture, question, answer in items]
    assert exact_answers(teacher, items) == expected
    wrong = [(picture, question, answer + "x") for picture, question, answer in items]
    assert sum(exact_answers(teacher, wrong)) == 0


def test_averages_are_unweighted_means_over_the_kinds(teacher, world):
    scores = tiny_scores(teacher, world, limit=10)
    assert scores["recognition"] == pytest.approx(np.mean([scores[kind] for kind in RECOGNITION]))
    assert scores["compositional"] == pytest.approx(np.mean([scores[kind] for kind in COMPOSITION]))


def test_similarity_of_a_model_to_itself_and_by_hand(teacher, world, monkeypatch):
    """Matched to itself layer by layer the teacher's similarity is 1; the batched figure is that of single
    prompts.
    """
    assert attention_similarity(teacher, teacher, world, limit=2) == pytest.approx(1, abs=1e-6)
    student = model.VLM.assemble(
        teacher.vision, model.load_lm(TINY / "student"), teacher.tokenizer, teacher, taf=True
    )
    cosines = []
    with torch.no_grad():
        for rows in tiny_items(world, limit=2)[1].values():
            for picture, true, _ in rows:
                sample = scorers.prompt(teacher, picture, f"True? {true}")
                ids, pixels = torch.tensor([sample["input_ids"]]), sample["pixel_values"][None]
                s, t = (vlm(ids, pixels, attention=in_full(2, 3, 4)).attentions for vlm in (student, teacher))
                columns = (ids[0] == data.IMAGE_TOKEN).nonzero()[:, 0]
                for layer, group in ((2, (2, 3)), (3, (3, 4))):
                    a = s[layer][0].mean(0)[columns[-1] + 1 :, columns]
                    b = ((t[group[0]] + t[group[1]]) / 2)[0].mean(0)[columns[-1] + 1 :, columns]
                    cosines += torch.nn.functional.cosine_similarity(a, b).tolist()
    similarity = attention_similarity(student, teacher, world, limit=2)
    assert similarity == pytest.approx(np.mean(cosines), abs=1e-5)
    assert similarity < 0.98


@torch.no_grad()
def test_question_attention_is_that_of_the_answering_position(teacher, world):
    picture = world / "images/test-0.png"
    sample = scorers.prompt(teacher, picture, "What colour is the circle?")
    ids = torch.tensor([sample["input_ids"]])
    maps = teacher(ids, sample["pixel_values"][None], attention=in_full(0, 1, 2, 3, 4)).attentions
    columns = (ids[0] == data.IMAGE_TOKEN).nonzero()[:, 0]
    for flags, layers in (([], (2, 3, 4)), (["early"], (0, 1))):
        rows = [maps[layer][0].mean(0)[-1, columns] for layer in layers]
        shown = pictures.question_attention(teacher, picture, "What colour is the circle?", *flags)
        assert shown.shape == (4, 4)
        assert np.allclose(shown.ravel(), torch.stack(rows).mean(0).numpy(), atol=1e-6)


def test_command_line_scores_and_pictures(world, tmp_path, capsys):
    teacher = str(TINY / "teacher")
    tiny(["score", "--model", teacher, "--world", str(world), "--limit", "10"])
    out = capsys.readouterr().out
    assert "| recognition | compositional | swap_obj |" in out and "| 1.00 |" in out
    file, image = tmp_path / "look.png", str(world / "images/test-0.png")
    argv = ["attention", "--model", teacher, "--image", image, "--question", "What shape is the red one?"]
    evaluation.main([*argv, "--save", str(file)])
    assert Image.open(file).width > 400
    with pytest.raises(SystemExit, match="error: .*nothing.png"):
        evaluation.main([*argv[:4], "nothing.png", *argv[5:]])
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        tiny(["score", "--model", "nowhere", "--world", str(world)])


@pytest.mark.parametrize("name, least", [("teacher", 98), ("compodistill", 95)])
def test_what_ships_has_learned_its_world(world, name, least):
    """In every kind, of 40 items each: of the teacher's none may be wrong. And it all is small."""
    scores = tiny_scores(model.load(TINY / name), world)
    assert min(scores.values()) >= least and scores["recognition"] >= 99, scores
    assert sum(file.stat().st_size for file in TINY.glob("*/*")) < 8e6


def test_the_text_only_student_cannot_guess(blind, world):
    """Without a picture the questions give nothing away: a blind model stays near chance on caption pairs."""
    scores = tiny_scores(blind, world)
    assert 40 < scores["compositional"] < 60, scores


# ---------------------------------------------------------------- pictures


def test_the_cases_that_are_drawn_follow_a_rule(teacher, blind, world):
    """The first caption, each of another picture, that the teacher judges rightly and KD wrongly: by asking
    both one by one.
    """
    cases = tiny_cases({"teacher": teacher, "kd": blind}, world)
    before = set()
    for kind, case in zip(("swap_obj", "replace_rel", "swap_att"), cases, strict=True):
        for picture, *captions in tiny_items(world)[1][kind]:
            for caption, right in zip(captions, ("yes", "no")):
                question = f"True? {caption}"
                said = [vlm.answer(picture, question) == right for vlm in (teacher, blind)]
                if said == [True, False] and picture not in before:
                    break
            else:
                continue
            break
        assert case == (picture, question, right)
        before.add(picture)
    first = tiny_items(world)[1]["swap_obj"][0]
    assert tiny_cases({"teacher": teacher}, world)[0] == (first[0], f"True? {first[1]}", "yes")


def test_panels_say_right_and_wrong_in_words_and_marks(teacher, blind, world, tmp_path, monkeypatch):
    """The share of the attention on the picture, on one scale for a row: its brightest patch is untouched."""
    written, plain_text = [], ImageDraw.ImageDraw.multiline_text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "multiline_text",
        lambda pen, at, text, **how: written.append(text) or plain_text(pen, at, text, **how),
    )
    models = {"teacher": teacher, "kd": blind}
    (case, *_), file = tiny_cases(models, world), tmp_path / "look.png"
    drawn = pictures.attention_picture(models, [case], file)
    page, side, gap = np.asarray(Image.open(file)).astype(int), pictures.SIDE, pictures.GAP
    top = next(y for y in range(200) if (page[y, gap] == 235).all())  # the picture's grey begins
    shares = [grid / grid.sum() for *_, grid in drawn]
    plain = page[top : top + side, gap : gap + side]
    for column, share in enumerate(shares, 1):
        x = gap + column * (side + gap)
        panel = page[top : top + side, x : x + side]
        for row, line in np.ndindex(4, 4):
            patch = np.s_[60 * row + 20 : 60 * row + 40, 60 * line + 20 : 60 * line + 40]
            w = int(255 * share[row, line] / max(map(np.max, shares))) / 255
            dark = plain[patch] * 0.25 + 0.75 * np.array((25, 25, 45))
            assert np.allclose(panel[patch], w * plain[patch] + (1 - w) * dark, atol=3)
        below = page[top + side : top + side + 24, x : x + 20].reshape(-1, 3)
        green, red = ((below == colour).all(1).any() for colour in ((0, 122, 94), (179, 71, 0)))
        assert (green, red) == (column == 1, column == 2)
    said = [text for text in written if text.endswith((": right", ": wrong"))]
    assert said == [f"{case.answer}: right", f"{blind.answer(*case[:2])}: wrong"]
    tick, cross = Image.new("1", (20, 20)), Image.new("1", (20, 20))
    for image, right in ((tick, True), (cross, False)):  # in black and white
        pictures.mark(ImageDraw.Draw(image), 0, 0, right)
    tick, cross = np.asarray(tick), np.asarray(cross)
    assert tick.any() and not tick[:6, :8].any() and cross[:6, :6].any(), (
        "a tick has nothing at the upper left"
    )


@pytest.fixture
def learning(tmp_path):
    """What two students leave while they learn: scores after 5 and 10 steps, losses after 5."""
    for name in STUDENTS[:2]:
        (tmp_path / name).mkdir()
        points = {str(step): {column: 10.0 * step for column in CURVES} for step in (5, 10)}
        (tmp_path / name / "curve.json").write_text(json.dumps(points))
        (tmp_path / name / "stage2.jsonl").write_text('{"step": 5, "val_lm": 0.5, "val_kl": 0.25}\n')
    return tmp_path


def test_curves_without_matplotlib_are_numbers_and_a_sentence(learning, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_curves(learning) == ["curves.csv"] and not (learning / "curves.png").exists()
    head, first, second, *others = (learning / "curves.csv").read_text().splitlines()
    assert head.split(",")[:3] == ["student", "step", "recognition"] and head.endswith("lm,kl,adl")
    assert first.startswith("sft,5,50.0,50.0,") and first.endswith(",0.5,0.25,")
    assert second.startswith("sft,10,100.0,") and second.endswith(",100.0,,,") and len(others) == 2
    said = capsys.readouterr().out.strip()
    assert "curves.png needs matplotlib" in said and "the same command again" in said and "\n" not in said


def test_curves_are_drawn(learning):
    pytest.importorskip("matplotlib", reason="the optional extra that draws curves")
    assert write_curves(learning) == ["curves.csv", "curves.png"]
    assert len(np.unique(np.asarray(Image.open(learning / "curves.png").convert("L")))) > 20


# ---------------------------------------------------------------- bench

TEACHER = str(TINY / "teacher")


def bench(world, out, *flags, name="sugarcrepe", annotations=None):
    """`eval.py bench` -> the lines of its answers file, the summary."""
    where = ["--annotations", annotations or world / "test", "--images", world / "images", "--model", TEACHER]
    argv = ["bench", name, *where, "--answers", out, *flags]
    evaluation.main(list(map(str, argv)))
    per_token = "likelihood-per-token" in flags
    summary = out.with_suffix(".per-token.scores.json" if per_token else ".scores.json")
    return lines(out), json.loads(summary.read_text())


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def asked(world, tmp_path_factory):
    """A yes/no benchmark (R-Bench's form) whose questions the tiny teacher was trained to answer."""
    records = []
    for rows in tiny_items(world, limit=4)[1].values():
        for picture, *captions in rows:
            for caption, label in zip(captions, ("Yes", "No")):
                record = {"question_id": len(records), "qtype": "Positive", "image": picture.name}
                records.append(record | {"text": f"True? {caption}", "label": label})
    file = tmp_path_factory.mktemp("rbench") / "image-level_filterd.json"
    file.write_text(json.dumps(records))
    return file


@pytest.mark.parametrize("flags", [("--batch-size", 7), ("--batch-size", 1), ("--workers", 1)])
def test_choice_is_one_prompt_at_a_time(world, teacher, tmp_path, flags):
    rows, _ = bench(world, tmp_path / "a.jsonl", "--limit", 20, *flags)
    items = {item.key: item for item in benchmarks.read("sugarcrepe", world / "test", world / "images")}
    assert len(rows) == 40
    for row in rows:
        item = items[row["question_id"]]
        letters = (teacher.tokenizer.encode(f" {letter}", add_special_tokens=False).ids for letter in "AB")
        expected = [log_p(teacher, item.image, item.question, tokens)[1] for tokens in letters]
        expected = dict(zip("AB", expected))
        assert row["log_p"] == pytest.approx(expected, abs=1e-4)
        assert row["text"] == max(expected, key=expected.get) and row["prompt"] == item.question
        assert not row["unasked"] and teacher.answer(item.image, item.question, 4) not in ("A", "B")


def test_an_option_that_is_written_is_the_option_that_is_chosen(world, asked, teacher, tmp_path):
    """Where the greedy reply is an option, one forward pass finds the same, and says so."""
    rows, summary = bench(world, tmp_path / "a.jsonl", name="rbench", annotations=asked)
    written, _ = bench(world, tmp_path / "b.jsonl", "--scorer", "generate", name="rbench", annotations=asked)
    items = {item.key: item for item in benchmarks.read("rbench", asked, world / "images")}
    replies = {key: teacher.answer(item.image, item.question) for key, item in items.items()}
    assert set(replies.values()) == {"yes", "no"}
    assert {row["question_id"]: row["text"] for row in written} == replies
    assert {row["question_id"]: row["text"] for row in rows} == replies
    assert all(row["unasked"] for row in rows) and summary["unasked"] == 1
    for row in rows:
        item = items[row["question_id"]]
        yes = log_p(teacher, item.image, item.question, [token(teacher, " yes")])[0]
        assert row["log_p"]["yes"] == pytest.approx(yes, abs=1e-4)
    assert summary["headline"]["value"] > 80


def test_free_answers_are_generated(world, teacher, tmp_path):
    """GQA's form, with the tiny world's own questions and the suffix of GQA: replies of several lengths."""
    records = {}
    for kind, rows in tiny_items(world, limit=6)[0].items():
        for i, (picture, question, answer) in enumerate(rows):
            record = {"imageId": picture.stem, "question": question, "answer": answer, "isBalanced": True}
            Image.open(picture).save(tmp_path / f"{picture.stem}.jpg", quality=100)
            records[f"{kind}{i}"] = record | {"types": {"structural": "query"}}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(records))
    where = ["--annotations", tmp_path, "--images", tmp_path, "--model", TEACHER]
    out = tmp_path / "a.jsonl"
    evaluation.main(list(map(str, ["bench", "gqa", *where, "--answers", out, "--batch-size", 5])))
    items = {item.key: item for item in benchmarks.read("gqa", tmp_path, tmp_path)}
    replies = {row["question_id"]: row["text"] for row in lines(out)}
    assert replies == {key: teacher.answer(item.image, item.question) for key, item in items.items()}
    with pytest.raises(SystemExit, match="error: gqa asks for free answers"):
        evaluation.main(list(map(str, ["bench", "gqa", *where, "--scorer", "choice"])))


def test_captions_are_scored_one_at_a_time(world, teacher, tmp_path):
    pairs = {pair.key: pair for pair in benchmarks.read_pairs("sugarcrepe", world / "test", world / "images")}
    flags = ["--limit", 14, "--batch-size", 5]
    likely, summary = bench(world, tmp_path / "l.jsonl", "--scorer", "likelihood", *flags)
    before = (tmp_path / "l.jsonl").read_bytes()
    _, per_token = bench(world, tmp_path / "l.jsonl", "--scorer", "likelihood-per-token", *flags)
    assert (tmp_path / "l.jsonl").read_bytes() == before, "the same answers serve both"
    asked, yes_summary = bench(world, tmp_path / "y.jsonl", "--scorer", "yes", *flags)
    hits = {"sum": [], "mean": [], "yes": []}
    for one, two in zip(likely[::2], likely[1::2]):
        pair = pairs[one["question_id"].removesuffix("/0")]
        sums, means = [], []
        for row, caption in zip((one, two), pair.captions):
            tokens = teacher.tokenizer.encode(" " + caption, add_special_tokens=False).ids
            tokens.append(teacher.tokenizer.token_to_id(data.END_OF_TEXT))
            sums.append(sum(log_p(teacher, pair.image, "Describe the image concisely.", tokens)))
            means.append(sums[-1] / len(tokens))
            assert row["score"] == pytest.approx(sums[-1], abs=1e-3) and row["tokens"] == len(tokens)
        hits["sum"].append(sums[0] > sums[1])
        hits["mean"].append(means[0] > means[1])
    for one, two in zip(asked[::2], asked[1::2]):
        pair = pairs[one["question_id"].removesuffix("/0")]
        odds = []
        for row, caption in zip((one, two), pair.captions):
            question = f'Does this figure show "{caption}"? Please answer yes or no.'
            odds.append(log_p(teacher, pair.image, question, [token(teacher, " yes")])[0])
            odds[-1] -= log_p(teacher, pair.image, question, [token(teacher, " no")])[0]
            assert row["score"] == pytest.approx(odds[-1], abs=1e-3)
        hits["yes"].append(odds[0] > odds[1])
    found = {"sum": summary, "mean": per_token, "yes": yes_summary}
    kinds = [row["question_id"].split("/")[0] for row in likely[::2]]
    for name, right in hits.items():  # the headline is the unweighted mean over kinds
        shares = [np.mean([hit for hit, other in zip(right, kinds) if other == kind]) for kind in set(kinds)]
        assert found[name]["headline"]["value"] == pytest.approx(100 * np.mean(shares)), name


def test_options_in_a_real_tokenizer(teacher):
    """ "yes" in any case, "A" as it is: " a" is an article. No lead where " A" is one token."""
    vlm = copy.copy(teacher)
    vlm.tokenizer = copy.deepcopy(teacher.tokenizer)
    vlm.tokenizer.add_tokens([" Yes", " No", " A", " B", " a", " b"])
    ids = {word: vlm.tokenizer.token_to_id(word) for word in (" Yes", " No", " A", " B")}
    letters, answers = (scorers.option_tokens(vlm, some) for some in (("A", "B"), ("Yes", "no")))
    assert letters == (("A", "B"), (), [[ids[" A"]], [ids[" B"]]])
    assert answers.lead == () and [set(some) for some in answers.tokens] == [
        {ids[" Yes"], token(teacher, " yes")},
        {ids[" No"], token(teacher, " no")},
    ]
    with pytest.raises(BadInput, match="begin alike"):
        scorers.option_tokens(teacher, ("A", "A B"))


def test_an_option_that_the_model_would_not_have_said(teacher, pairs):
    """`unasked` is False where greedy writing begins otherwise, and where it only ends as an option does."""
    picture, true, _ = pairs[0]
    sample = scorers.prompt(teacher, picture, f"True? {true}")
    ids = torch.tensor([sample["input_ids"] + [token(teacher, " the")]])
    follows = teacher(ids, sample["pixel_values"][None]).logits[0, -1].argmax().item()
    asked = [
        answers.Line({"prompt": "What colour is the circle?"}, picture, ("yes", "no")),
        answers.Line({"prompt": f"True? {true}"}, picture, ("yes", "no")),
        answers.Line(
            {"prompt": f"True? {true}"}, picture, ("the" + teacher.tokenizer.decode([follows]), "the the")
        ),
    ]
    said = [part for _, part in answers.answer(teacher, asked, "choice", 1, [[0, 1, 2]], 0)]
    assert [part["unasked"] for part in said] == [False, True, False]
    assert said[2]["text"] == asked[2].options[0]


@pytest.mark.parametrize("flags", [(), ("--scorer", "yes"), ("--scorer", "generate")])
def test_numbers_that_are_not_finite_are_no_answers(teacher, world, tmp_path, flags):
    """The argmax of NaN is an option like any other: such a model would score at chance."""
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken.lm.model.norm.weight.fill_(float("nan"))
    broken.save(tmp_path / "nan")
    with pytest.raises(SystemExit, match="error: .*/nan gives numbers that are not finite"):
        bench(world, tmp_path / "a.jsonl", *flags, "--limit", 3, "--model", tmp_path / "nan")
    assert (tmp_path / "a.jsonl").read_text() == ""


def test_pictures_stay_together_in_batches():
    a, b, c = Path("a"), Path("b"), Path("c")
    assert scorers.by_picture([a, b, a, c, b, a], 2) == [[0, 2], [5, 1], [4, 3]]
    assert scorers.common([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 2
    assert scorers.common([[1, 2], [1, 2]]) == 2 and scorers.common([[1], [2]]) == 0


def same(one, other):
    """The same lines, scores to rounding: other batches add up in another order."""
    assert [row["question_id"] for row in one] == [row["question_id"] for row in other]
    for a, b in zip(one, other):
        assert a.pop("log_p") == pytest.approx(b.pop("log_p"), abs=1e-4) and a == b


def test_it_goes_on_where_it_stopped(world, tmp_path, capsys):
    """A cut line is answered again, and no other; a smaller run before, in another order, is of use, too."""
    whole, summary = bench(world, tmp_path / "whole.jsonl", "--limit", 30)
    out = tmp_path / "parts.jsonl"
    bench(world, out, "--limit", 10)
    text = out.read_text().splitlines(keepends=True)
    marked = text[0].replace('"text": "', '"text": "kept')
    out.write_text("".join([marked, *text[1:4]]) + text[4][:50])
    capsys.readouterr()
    rows, _ = bench(world, out, "--limit", 30)
    assert f"{len(rows) - 4} answers in" in capsys.readouterr().out
    kept = [row for row in rows if row["text"].startswith("kept")]
    assert len(kept) == 1 and kept[0]["question_id"] == json.loads(text[0])["question_id"]
    kept[0]["text"] = kept[0]["text"].removeprefix("kept")
    known = {row["question_id"] for row in whole}
    same([row for row in rows if row["question_id"] in known], copy.deepcopy(whole))
    order = [item.key for item in benchmarks.read("sugarcrepe", world / "test")]
    keys = [row["question_id"] for row in rows]
    assert keys == sorted(keys, key=order.index) and len(keys) == len(set(keys))
    assert {key[:-1] + "A" for key in keys} <= set(keys), "both orders of each pair"
    again = out.read_bytes()
    bench(world, out, "--limit", 30)
    assert out.read_bytes() == again and summary["headline"]["n"]


def test_answers_are_scored_without_a_model(world, tmp_path, capsys):
    _, summary = bench(world, tmp_path / "a.jsonl")
    rows = lines(tmp_path / "a.jsonl")
    keys = "question_id", "prompt", "text"
    foreign = tmp_path / "llava.jsonl"
    foreign.write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows))
    alone = ["--out", str(tmp_path / "s.json"), "--annotations", str(world / "test"), "--score-only"]
    for file in (tmp_path / "a.jsonl", foreign):
        evaluation.main(["bench", "sugarcrepe", *alone, str(file)])
        scored = json.loads((tmp_path / "s.json").read_text())
        assert scored["rows"] == summary["rows"] and scored["headline"] == summary["headline"]
    _, summary = bench(world, tmp_path / "l.jsonl", "--scorer", "likelihood", "--limit", 20)
    evaluation.main(["bench", "sugarcrepe", *alone, str(tmp_path / "l.jsonl")])
    assert json.loads((tmp_path / "s.json").read_text())["headline"] == summary["headline"]
    refused = {  # sentence -> file, flags
        "error: .*l.jsonl": (tmp_path / "l.jsonl", "--scorer", "choice"),
        "error: .*l.jsonl holds answers of another run": (tmp_path / "l.jsonl", "--scorer", "yes"),
        "error: .*a.jsonl has no scores of captions": (tmp_path / "a.jsonl", "--scorer", "yes"),
        "error: .*a.jsonl is read by this command": (tmp_path / "a.jsonl", "--out", tmp_path / "a.jsonl"),
        "error: .*nowhere.jsonl": (tmp_path / "nowhere.jsonl",),
    }
    before = (tmp_path / "a.jsonl").read_bytes()
    for sentence, (file, *flags) in refused.items():
        with pytest.raises(SystemExit, match=sentence):
            evaluation.main(["bench", "sugarcrepe", *alone, str(file), *map(str, flags)])
    assert (tmp_path / "a.jsonl").read_bytes() == before
    foreign = (tmp_path / "l.jsonl").read_text().replace('"sugarcrepe"', '"bivlc"')
    (tmp_path / "l.jsonl").write_text(foreign)
    with pytest.raises(SystemExit, match="error: .*l.jsonl answers bivlc, not sugarcrepe"):
        evaluation.main(["bench", "sugarcrepe", *alone, str(tmp_path / "l.jsonl")])


def test_foreign_answers_are_refused_and_kept(world, asked, tmp_path):
    out = tmp_path / "a.jsonl"
    bench(world, out, "--limit", 7)
    before = out.read_bytes()

    def refused(sentence, *flags, **which):
        with pytest.raises(SystemExit, match=sentence):
            bench(world, out, *flags, **which)
        assert out.read_bytes() == before

    refused("error: .*a.jsonl holds.* of another run.*sugarcrepe.*rbench", name="rbench", annotations=asked)
    refused("another run.*choice.*generate", "--scorer", "generate")
    refused("another run.*fp32.*bf16", "--precision", "bf16")
    refused("another run.*model", "--model", str(TINY / "teacher-lm"))
    other = tmp_path / "test"
    other.mkdir()
    for file in (world / "test").glob("*_*.json"):
        (other / file.name).write_text(file.read_text().replace("the ", "some "))
    refused("a.jsonl answers another question", annotations=other)
    lines = before.splitlines(keepends=True)
    out.write_bytes(before := b"".join([lines[0], lines[1][:20] + b"\n", *lines[2:]]))
    refused("a.jsonl, line 2 is not valid JSON")
    out.write_bytes(before := b'{"question_id": "swap_obj/0/A", "text": "A"}\n')
    refused("another run")
    out.write_bytes(before := lines[0].replace(b'"text"', b'"word"'))
    refused("the answer to 'swap_obj/.*/A' has no text")
    for line in (b"[1]", b'{"question_id": []}', b"[" * 100_000, b"\xff"):
        out.write_bytes(before := line + b"\n" + lines[0])
        refused("a.jsonl(, line 1| was not written by this program)")


def test_bad_pictures_stop_it_with_their_name(world, tmp_path):
    """What was answered before stays; with the picture mended it goes on."""
    images = tmp_path / "images"
    images.mkdir()
    for file in (world / "images").glob("test-*.png"):
        (images / file.name).write_bytes(file.read_bytes())
    file = world / "test" / "add_att.json"
    pictures = [item.image.name for item in benchmarks.read("sugarcrepe", file, images)]
    pictures = list(dict.fromkeys(pictures))
    content = (images / pictures[9]).read_bytes()
    (images / pictures[9]).write_bytes(content[:60])
    out, flags = tmp_path / "a.jsonl", ("--batch-size", 4, "--images", images, "--annotations", file)
    for workers in (0, 1):
        with pytest.raises(SystemExit, match=f"^error: {images}/{pictures[9]} cannot be read"):
            bench(world, out, *flags, "--workers", workers)
    answered = len(lines(out))
    assert answered >= 4
    (images / pictures[9]).write_bytes(content)
    rows, _ = bench(world, out, *flags)
    assert len(rows) == 80
    with pytest.raises(SystemExit, match="error: .*pictures are missing"):
        bench(world, out, "--images", tmp_path)


def test_half_precision_and_a_file_that_cannot_be_written(world, tmp_path):
    rows, _ = bench(world, tmp_path / "a.jsonl", "--limit", 7, "--precision", "bf16")
    exact, _ = bench(world, tmp_path / "b.jsonl", "--limit", 7)
    assert len(rows) == 14 and rows[0]["precision"] == "bf16"
    assert rows[0]["log_p"] == pytest.approx(exact[0]["log_p"], rel=0.05)
    assert rows[0]["log_p"] != pytest.approx(exact[0]["log_p"], rel=1e-6)
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        bench(world, Path("/proc/nowhere/a.jsonl"), "--limit", 7)


# ---------------------------------------------------------------- ranks and kills, in processes of their own

ROOT = Path(evaluation.__file__).parent


def start(world, out, ranks=0, *flags):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher = launcher if ranks else []
    where = ["--annotations", world / "test", "--images", world / "images", "--model", TEACHER]
    argv = [*launcher, ROOT / "eval.py", "bench", "sugarcrepe", *where, "--answers", out, *flags]
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def finish(process):
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    return text


def test_two_ranks_are_one(world, tmp_path):
    one, summary = bench(world, tmp_path / "one.jsonl", "--limit", 60, "--batch-size", 8)
    two = tmp_path / "two.jsonl"
    text = finish(start(world, two, 2, "--limit", 60, "--batch-size", 8))
    assert text.count("95 % intervals") == 1 and "64 answers in" in text, "rank 0 has 8 of 15 batches"
    same(one, lines(two))
    assert json.loads(two.with_suffix(".scores.json").read_text())["rows"] == summary["rows"]
    assert len(list(tmp_path.iterdir())) == 4, "no part is left"


@pytest.mark.slow
def test_ranks_that_outlive_their_launcher_are_not_disturbed(world, tmp_path):
    out = tmp_path / "a.jsonl"
    process = start(world, out, 2, "--batch-size", 1)
    while answered(out) < 4:
        time.sleep(0.01)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.kill()
    os.kill(int(ranks[0]), signal.SIGSTOP)
    with pytest.raises(SystemExit, match="error: .*a.jsonl.* is being written by another process"):
        bench(world, out, "--batch-size", 1)
    for pid in ranks:
        os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    assert len(bench(world, out)[0]) == 560


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_runs_go_on_with_one_rank(world, tmp_path, ranks):
    """kill -9 at moments that lie anywhere in the run; no line is answered twice, and none is lost."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    finish(start(world, whole, 0, "--batch-size", 2))
    seen = 0
    for least in (1, 60, 150):
        process = start(world, out, ranks, "--batch-size", 2)
        while process.poll() is None and answered(out) < seen + least:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it was killed"
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
        for pid in (process.pid, *map(int, children.split() if ranks else ())):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        assert answered(out) >= seen
        seen = answered(out)
    finish(start(world, out, 0, "--batch-size", 2))
    same(lines(whole), lines(out))
    assert not list(tmp_path.glob("*.rank*"))


def answered(out):
    return sum(file.read_bytes().count(b"\n") for file in out.parent.glob(out.name + "*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, says",
    [("scoring.py --rounds 1 --items 4", "choice agrees in 4 of them"),
     ("step.py floor --shape real --batch 1", "TFLOP")],
)  # fmt: skip
def test_the_benchmarks_of_speed_run(argv, says):
    argv = [sys.executable, ROOT / "bench" / argv.split()[0], *argv.split()[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and says in done.stdout, done.stderr
