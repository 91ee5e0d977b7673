"""eval.py: every scorer against the same thing done slowly, one prompt at a time, with the model's plain
forward pass.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import model
import train
from tiny.world import COMPOSITION, RECOGNITION, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tiny") / "world", tune=8, pretrain=8, per_kind=40)


@pytest.fixture(scope="module")
def teacher():
    return model.load(train.TINY / "teacher")


@pytest.fixture(scope="module")
def pairs(world):
    return [pair for rows in evaluation.tiny_items(world, limit=3)[1].values() for pair in rows]


def alone(vlm, picture, question):
    """Logits after one prompt, by the plain forward pass."""
    sample = evaluation.prompt(vlm, picture, question)
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
    assert evaluation.paired_yes(teacher, pairs) == expected
    swapped = [(picture, wrong, true) for picture, true, wrong in pairs]
    assert evaluation.paired_yes(teacher, swapped) == [1 - hit for hit in expected]


def test_a_tie_is_wrong(teacher, pairs):
    same = [(picture, true, true) for picture, true, _ in pairs]
    assert sum(evaluation.paired_yes(teacher, same)) == 0
    assert sum(evaluation.caption_likelihood(teacher, same)) == 0


@torch.no_grad()
def test_choice_in_both_orders(teacher, pairs):
    expected = []
    for picture, true, wrong in pairs:
        first = alone(teacher, picture, evaluation.CHOICE.format(true, wrong))
        second = alone(teacher, picture, evaluation.CHOICE.format(wrong, true))
        a, b = token(teacher, " A"), token(teacher, " B")
        expected.append((float(first[a] > first[b]) + float(second[b] > second[a])) / 2)
    assert evaluation.choice_ab(teacher, pairs) == expected


@torch.no_grad()
@pytest.mark.parametrize("mean", [False, True])
def test_caption_likelihood(teacher, pairs, mean):
    expected = []
    for picture, *captions in pairs:
        scores = []
        for caption in captions:
            sample = evaluation.prompt(teacher, picture, "Describe the picture.")
            answer = teacher.tokenizer.encode(" " + caption, add_special_tokens=False).ids
            answer.append(teacher.tokenizer.token_to_id(data.END_OF_TEXT))
            ids = torch.tensor([sample["input_ids"] + answer])
            log_p = teacher(ids, sample["pixel_values"][None]).logits[0].log_softmax(-1)
            start = len(sample["input_ids"]) - 1
            total = sum(log_p[start + i, token_id].item() for i, token_id in enumerate(answer))
            scores.append(total / len(answer) if mean else total)
        expected.append(float(scores[0] > scores[1]))
    assert evaluation.caption_likelihood(teacher, pairs, mean) == expected


def test_exact_answers_are_what_the_model_says(teacher, world):
    recognition, _ = evaluation.tiny_items(world, limit=5)
    items = [item for rows in recognition.values() for item in rows]
    expected = [float(teacher.answer(picture, question, 4) == answer) for picture, question, answer in items]
    assert evaluation.exact_answers(teacher, items) == expected
    wrong = [(picture, question, answer + "x") for picture, question, answer in items]
    assert sum(evaluation.exact_answers(teacher, wrong)) == 0


def test_averages_are_unweighted_means_over_the_kinds(teacher, world):
    scores = evaluation.tiny_scores(teacher, world, limit=10)
    assert scores["recognition"] == pytest.approx(np.mean([scores[kind] for kind in RECOGNITION]))
    assert scores["compositional"] == pytest.approx(np.mean([scores[kind] for kind in COMPOSITION]))


def test_similarity_of_a_model_to_itself_and_by_hand(teacher, world, monkeypatch):
    """Matched to itself layer by layer the teacher's similarity is 1; the batched figure is that of single
    prompts.
    """
    assert evaluation.attention_similarity(teacher, teacher, world, limit=2) == pytest.approx(1, abs=1e-6)
    student = model.VLM.assemble(
        teacher.vision, model.Qwen.load(train.TINY / "student"), teacher.tokenizer, teacher, taf=True
    )
    cosines = []
    with torch.no_grad():
        for rows in evaluation.tiny_items(world, limit=2)[1].values():
            for picture, true, _ in rows:
                sample = evaluation.prompt(teacher, picture, f"True? {true}")
                ids, pixels = torch.tensor([sample["input_ids"]]), sample["pixel_values"][None]
                s, t = (vlm(ids, pixels, attention_layers=(2, 3, 4)).attentions for vlm in (student, teacher))
                columns = (ids[0] == data.IMAGE_TOKEN).nonzero()[:, 0]
                for layer, group in ((2, (2, 3)), (3, (3, 4))):
                    a = s[layer][0].mean(0)[columns[-1] + 1 :, columns]
                    b = ((t[group[0]] + t[group[1]]) / 2)[0].mean(0)[columns[-1] + 1 :, columns]
                    cosines += torch.nn.functional.cosine_similarity(a, b).tolist()
    similarity = evaluation.attention_similarity(student, teacher, world, limit=2)
    assert similarity == pytest.approx(np.mean(cosines), abs=1e-5)
    assert similarity < 0.98


@torch.no_grad()
def test_question_attention_is_the_mean_of_the_text_rows(teacher, world):
    picture = world / "images/test-0.png"
    sample = evaluation.prompt(teacher, picture, "What colour is the circle?")
    ids = torch.tensor([sample["input_ids"]])
    maps = teacher(ids, sample["pixel_values"][None], attention_layers=(2, 3, 4)).attentions
    columns = (ids[0] == data.IMAGE_TOKEN).nonzero()[:, 0]
    rows = [maps[layer][0].mean(0)[columns[-1] + 1 :, columns] for layer in (2, 3, 4)]
    shown = evaluation.question_attention(teacher, picture, "What colour is the circle?")
    assert shown.shape == (4, 4)
    assert np.allclose(shown.ravel(), torch.stack(rows).mean((0, 1)).numpy(), atol=1e-6)


def test_command_line_scores_and_pictures(world, tmp_path, capsys):
    teacher = str(train.TINY / "teacher")
    evaluation.main(["tiny", "--model", teacher, "--world", str(world), "--limit", "10"])
    out = capsys.readouterr().out
    assert "| recognition | compositional | swap_obj |" in out and "| 1.00 |" in out
    file, image = tmp_path / "look.png", str(world / "images/test-0.png")
    argv = ["attention", "--model", teacher, "--image", image, "--question", "What shape is the red one?"]
    evaluation.main([*argv, "--save", str(file)])
    assert Image.open(file).width > 400
    with pytest.raises(SystemExit, match="error: .*nothing.png"):
        evaluation.main([*argv[:4], "nothing.png", *argv[5:]])
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        evaluation.main(["tiny", "--model", "nowhere", "--world", str(world)])


def test_the_shipped_teacher_has_learned_its_world(teacher, world):
    """The README's promise for the teacher, on 40 items a kind."""
    scores = evaluation.tiny_scores(teacher, world)
    assert scores["recognition"] >= 90 and scores["compositional"] >= 85, scores


def test_the_text_only_student_cannot_guess(teacher, world):
    """Without a picture the questions give nothing away: a blind model stays near chance on caption pairs."""
    torch.manual_seed(0)
    blind = model.VLM.assemble(
        teacher.vision, model.Qwen.load(train.TINY / "student"), teacher.tokenizer, teacher, taf=True
    )
    with torch.no_grad():
        for parameter in blind.adapter.student.parameters():
            parameter.zero_()  # every picture looks the same
    scores = evaluation.tiny_scores(blind.eval(), world)
    assert 40 < scores["compositional"] < 60, scores
