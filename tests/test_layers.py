"""evals/layers.py: which layers need their visual attention. Shapes: T tokens, P visual tokens."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import eval as evaluation
from evals import figures, layers
from evals.analyses import Question, world_questions
from evals.layers import Blind, layer_rows, right_answers, suggestions, window
from qwen import explicit_attention
from support.errors import BadInput
from support.world import TINY, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tiny") / "world", tune=8, pretrain=8, per_kind=6)


def test_evened_by_hand():
    """Visual tokens at 1 and 2: query 1 sees one of them, the others both; a head at a time."""
    A = torch.tensor([[[1.0, 0, 0, 0], [0.4, 0.6, 0, 0], [0.2, 0.7, 0.1, 0], [0.1, 0.2, 0.3, 0.4]]])
    A = torch.stack([A, A.flip(1).tril() / A.flip(1).tril().sum(-1, keepdim=True)], 1)  # (1,2,4,4)
    got = Blind(torch.tensor([[1, 2]])).evened(A)
    expected = [[1, 0, 0, 0], [0.4, 0.6, 0, 0], [0.2, 0.4, 0.4, 0], [0.1, 0.25, 0.25, 0.4]]
    torch.testing.assert_close(got[0, 0], torch.tensor(expected))
    torch.testing.assert_close(got.sum(-1), A.sum(-1))
    torch.testing.assert_close(got[0, 1, 3, 1:3], A[0, 1, 3, 1:3].mean().expand(2))


@torch.no_grad()
def test_right_answers_are_those_of_single_questions(teacher, world):
    """Each question alone: what the model says letter for letter, and with a layer that is blind by an
    attention function of the test's own."""
    for items, asked in world_questions(world, 2).items():
        asked = asked[:8]
        got = right_answers(
            teacher, asked, [1, 3], 3 if items == "recognition" else 4, items == "compositional"
        )
        if items == "recognition":
            said = [teacher.answer(q.picture, q.text) == q.answer for q in asked]
            assert got[0].tolist() == said
        for row, layer in ((1, 1), (2, 3)):
            for i, question in enumerate(asked):
                ids = torch.tensor([teacher.question_ids(question.text, picture=True)])
                columns = (ids[0] == -200).nonzero()[:, 0]

                def even(q, k, v, mask, columns=columns):
                    _, A = explicit_attention(q, k, v, mask)
                    for t in range(A.shape[2]):
                        seen = columns[columns <= t]
                        if len(seen):
                            A[:, :, t, seen] = A[:, :, t, columns].sum(-1, keepdim=True) / len(seen)
                    return A.to(v.dtype) @ v, None

                pixels = layers.data.preprocess(question.picture, 40)[None]
                logits = teacher(ids, pixels, attention={layer: even}).logits[0, -1]
                words = layers.scorers.words(teacher, question.answer)
                if items == "recognition" and len(words) == 1:
                    assert got[row, i] == float(logits.argmax() == words[0])
                elif items == "compositional" and i % 2 == 0:
                    yes, no = (layers.scorers.words(teacher, word)[0] for word in ("yes", "no"))
                    odds = [float(logits[yes] - logits[no])]
                    other = torch.tensor([teacher.question_ids(asked[i + 1].text, picture=True)])
                    logits = teacher(other, pixels, attention={layer: even}).logits[0, -1]
                    odds.append(float(logits[yes] - logits[no]))
                    assert got[row, i // 2] == float(odds[0] > odds[1])


def test_the_shortest_window_by_hand():
    assert window([0, 5, 1, 4, 0]) == (1, 3)  # 5 and 4 are 90 % with what is between them
    assert window([0, 8, 1, 1, -9]) == (1, 1)  # a layer that does harm takes nothing away
    assert window([1, 1, 1, 1], share=0.5) == (0, 1)
    with pytest.raises(BadInput, match="no layer needs"):
        window([0, -1, 0])


def test_a_layer_that_is_needed_is_found(teacher, world):
    """The teacher reads the picture in some layers: there accuracy is lost."""
    rows = layer_rows({"teacher": teacher}, world_questions(world, 6), 64)
    assert {(row["items"], row["layer"]) for row in rows} == {
        (items, layer) for items in ("recognition", "compositional") for layer in range(6)
    }
    assert all(row["low"] <= row["loss"] <= row["high"] for row in rows)
    losses = [row["loss"] * (row["low"] > 0) for row in rows if row["items"] == "recognition"]
    assert max(losses) > 20 and rows[0]["accuracy"] == 100
    (one, *_) = suggestions(rows)
    first, last = window(losses)
    assert first < last, "or its sentence is another"
    assert one.startswith(f"teacher, recognition (100.0 %): layers {first}-{last} hold 80% of what is lost")
    held = 100 * np.maximum(losses, 0)[2:5].sum() / np.maximum(losses, 0).sum()
    assert one.endswith(f"2-4, hold {held:.0f} %")


def test_models_in_a_figure_are_told_apart():
    """By colour and marker, those that have styles of their own and those that have none."""
    for names in ("abcdefgh", ["teacher", "kd", "x", "y", "z"]):
        found = figures.styles(list(names))
        assert len({found[name] for name in names}) == len({found[name][0] for name in names}) == len(names)


@pytest.mark.parametrize("depth, papers", [(4, [2]), (6, [2, 3, 4]), (8, [3, 4, 5]), (12, [4, 5, 6, 7, 8])])
def test_the_window_beside_the_papers(depth, papers):
    """All is lost in the last layer of 30 to 70 % and, half as much, in the one after: 2/3 in the former, and
    both are needed for 80 %."""
    losses = {papers[-1]: 20.0, papers[-1] + 1: 10.0}
    rows = [
        dict(model="m", items="x", layer=i, layers=depth, loss=losses.get(i, 0.1), low=losses.get(i, -1))
        for i in range(depth)
    ]
    (said,) = suggestions([row | {"accuracy": 99.0} for row in rows])
    assert said == (
        f"m, x (99.0 %): layers {papers[-1]}-{papers[-1] + 1} hold 80% of what is lost; those at 30 to 70 % "
        f"of the depth, {'2' if depth == 4 else f'{papers[0]}-{papers[-1]}'}, hold 67 %"
    )


def test_analyse_layers(world, tmp_path, capsys):
    argv = ["analyse", "layers", "--world", str(world), "--limit", "3", "--out", str(tmp_path / "l")]
    evaluation.main([*argv, "--model", str(TINY / "teacher"), str(TINY / "kd")])
    rows = json.loads((tmp_path / "l/layers.json").read_text())
    assert len(rows) == 2 * (6 + 5)
    assert (tmp_path / "l/layers.png").exists() == bool(find_spec("matplotlib"))
    assert capsys.readouterr().out.count("teacher, ") == 2
    for bad, named in (
        (argv[:-1] + [str(tmp_path / "m")], "--model"),
        (["analyse", "layers", "picture", *argv[2:], "--model", "x"], "goes alone"),
        (["analyse", "layers", "--layers", "all", "--model", "x"], "without --teacher and --layers"),
        ([*argv[:-1], str(tmp_path / "n"), "--model", str(tmp_path / "nowhere")], "nowhere"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{named}"):
            evaluation.main(bad)


def test_a_model_that_sees_nothing_needs_no_layer(blind, world):
    """Of a model whose answers do not depend on the picture nothing is lost: one sentence says so."""
    questions = [q for q in world_questions(world, 3)["recognition"] if q.kind == "colour"]
    rows = layer_rows({"blind": blind}, {"recognition": questions}, 64)
    assert isinstance(questions[0], Question) and all(row["loss"] == 0 for row in rows)
    assert "no layer needs its visual attention" in suggestions(rows)[0]
