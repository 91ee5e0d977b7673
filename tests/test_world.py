"""The tiny world: what its questions say is checked against the pixels of its pictures, by code that shares
nothing with it.
"""

import json
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny.make
import train
from support.checkpoint import fingerprint
from support.world import COMPOSITION, TINY, make_tokenizer, make_world
from tiny.__main__ import main
from training.recipes import RECIPES

RGB = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 230), "yellow": (240, 200, 30)}
SHAPE = r"(circle|square|triangle)"
THING = rf"(?:(red|green|blue|yellow) )?{SHAPE}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tiny") / "world", tune=300, pretrain=60, per_kind=60)


def see(file):
    """A 40 x 40 picture -> {(colour, shape): (column, row)}, from its pixels."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    found = {}
    for row in range(4):
        for column in range(4):
            cell = pixels[10 * row : 10 * row + 10, 10 * column : 10 * column + 10]
            for colour, value in RGB.items():
                filled = np.abs(cell - value).sum(-1) < 30
                if filled.any():
                    top, bottom = filled[1, 1], filled[8, 1]  # corners of the object's box
                    shape = "square" if top and bottom else "triangle" if bottom else "circle"
                    found[colour, shape] = (column, row)
    return found


def is_true(caption, scene):
    """Does this caption hold in the scene? Understands the two sentences of the tiny world."""
    holds = {"left of": lambda a, b: a[0] < b[0], "right of": lambda a, b: a[0] > b[0],
             "above": lambda a, b: a[1] < b[1], "below": lambda a, b: a[1] > b[1]}  # fmt: skip
    if related := re.fullmatch(rf"the {THING} is ({'|'.join(holds)}) the {THING}", caption):
        c1, s1, relation, c2, s2 = related.groups()
        return (c1, s1) in scene and (c2, s2) in scene and holds[relation](scene[c1, s1], scene[c2, s2])
    listed = re.fullmatch(rf"there is a {THING}(?: and a {THING})?", caption)
    assert listed, caption
    things = [listed.groups()[:2], listed.groups()[2:]]
    return all(any(s == shape and c in (None, colour) for colour, shape in scene) for c, s in things if s)


def test_captions_are_true_and_negatives_false(world):
    for kind in COMPOSITION:
        items = json.loads((world / "test" / f"{kind}.json").read_text())
        assert len(items) == 60
        for item in items.values():
            scene = see(world / "images" / item["filename"])
            assert is_true(item["caption"], scene) and not is_true(item["negative_caption"], scene), (
                kind,
                item,
                scene,
            )


def test_half_of_the_longer_captions_are_true(world):
    """So that length alone decides nothing."""
    for kind in ("add_obj", "add_att"):
        items = json.loads((world / "test" / f"{kind}.json").read_text()).values()
        longer = [len(item["caption"].split()) > len(item["negative_caption"].split()) for item in items]
        assert 0.3 < np.mean(longer) < 0.7


def answer(question, scene):
    """The one right answer to a training or recognition question."""
    if caption := question.removeprefix("True? ") if question.startswith("True? ") else None:
        return "yes" if is_true(caption, scene) else "no"
    if m := re.fullmatch(rf"What colour is the {SHAPE}\?", question):
        (right,) = [colour for colour, shape in scene if shape == m[1]]
    elif m := re.fullmatch(r"What shape is the (\w+) one\?", question):
        (right,) = [shape for colour, shape in scene if colour == m[1]]
    elif m := re.fullmatch(rf"Is there a {THING}\?", question):
        right = "yes" if m.groups() in scene else "no"
    elif m := re.fullmatch(rf"Where is the {THING}\?", question):
        column, row = scene[m.groups()]
        right = "abcd"[column] + "1234"[row]
    elif m := re.fullmatch(r"What is at ([abcd])([1234])\?", question):
        (right,) = [
            " ".join(kind) for kind, cell in scene.items() if cell == ("abcd".index(m[1]), int(m[2]) - 1)
        ]
    elif m := re.fullmatch(rf"Is the {THING} (left or right of|above or below) the {THING}\?", question):
        axis = m[3].startswith("above")
        a, b = scene[m[1], m[2]][axis], scene[m[4], m[5]][axis]
        assert a != b
        right = (("left", "right"), ("above", "below"))[axis][a > b]
    else:
        raise AssertionError(question)
    return right


def test_every_answer_is_the_right_one(world):
    records = json.loads((world / "tune.json").read_text())
    asked = set()
    for record in records:
        scene, turns = see(world / "images" / record["image"]), record["conversations"]
        assert len(turns) == 12 and turns[0]["value"].startswith("<image>\n")
        for human, gpt in zip(turns[::2], turns[1::2]):
            question = human["value"].removeprefix("<image>\n")
            assert gpt["value"] == answer(question, scene), (question, scene)
            asked.add(" ".join(question.split()[:2]))
    assert len(records) == 300 and len(asked) >= 6
    for item in json.loads((world / "test/recognition.json").read_text()):
        assert item["answer"] == answer(item["question"], see(world / "images" / item["image"]))


def test_descriptions_are_complete(world):
    for record in json.loads((world / "pretrain.json").read_text()):
        scene = see(world / "images" / record["image"])
        said = record["conversations"][1]["value"]
        assert sorted(said.split(" and ")) == sorted(
            f"a {' '.join(kind)} at {'abcd'[column]}{row + 1}" for kind, (column, row) in scene.items()
        )


def test_train_and_test_pictures_never_coincide(world):
    pictures = {"train": set(), "test": set()}
    for file in (world / "images").iterdir():
        pictures["test" if file.name.startswith(("test", "val")) else "train"].add(
            np.asarray(Image.open(file)).tobytes()
        )
    assert len(pictures["train"]) > 300 and len(pictures["test"]) > 50
    assert not pictures["train"] & pictures["test"]


def test_the_world_is_the_same_every_time(world, tmp_path):
    again = make_world(tmp_path / "world", tune=300, pretrain=60, per_kind=60)
    for file in ("tune.json", "pretrain.json", "val.json", "test/swap_obj.json", "images/tune-7.png"):
        assert (again / file).read_bytes() == (world / file).read_bytes()


def test_every_word_of_the_world_is_one_token():
    tokenizer = make_tokenizer()
    text = " True? the yellow triangle is left of the red circle"
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text).ids] == re.findall(r" ?\w+|\?", text)
    assert (
        tokenizer.decode(tokenizer.encode("never seen: Ångström, 三角形").ids)
        == "never seen: Ångström, 三角形"
    )


def small(monkeypatch):
    """Two steps for each part of the models that ship."""
    monkeypatch.setattr(tiny.make.pretrain_vision, "__defaults__", (2,))
    monkeypatch.setattr(tiny.make.pretrain_text, "__defaults__", (2,))


def test_the_tiny_models_can_be_made_again(tmp_path, monkeypatch, capsys):
    """`python -m tiny make`: the files, shapes and tokenizer of those that ship. Done, it is done."""
    small(monkeypatch)
    make_world(tmp_path / "world", tune=64, pretrain=64, per_kind=2)
    argv = ["make", "--out", str(tmp_path), "--steps", "2"]
    main(argv)
    for name in ("vision", "teacher-lm", "student", "teacher"):
        made, ships = (load_file(root / name / "model.safetensors") for root in (tmp_path, TINY))
        assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in ships.items()}
        for file in ("config.json", "tokenizer.json"):
            if name != "vision" or file == "config.json":
                made, ships = (json.loads((folder / name / file).read_text()) for folder in (tmp_path, TINY))
                assert made == ships, (name, file)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/model.safetensors")}
    main(argv)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/model.safetensors")} == before
    with pytest.raises(SystemExit, match="error: .*has models of .*choose another --out"):
        main([*argv, "--seed", "1"])


def test_a_teacher_of_another_depth(tmp_path, monkeypatch, capsys):
    """make --layers: of the teacher alone."""
    small(monkeypatch)
    make_world(tmp_path / "world", tune=64, pretrain=64, per_kind=2)
    argv = ["make", "--out", str(tmp_path), "--steps", "2"]
    main([*argv, "--layers", "8"])
    for name, layers in (("teacher-lm", 8), ("teacher", 8), ("student", 5)):
        made = json.loads((tmp_path / name / "config.json").read_text())
        assert made.get("text_config", made)["num_hidden_layers"] == layers
    with pytest.raises(SystemExit, match="has models of .*choose another --out"):
        main([*argv, "--layers", "9"])


def test_a_teacher_that_has_not_learned_goes_on_with_other_scenes(tmp_path, monkeypatch, capsys):
    """From where it is; and after so many rounds one sentence says that it has not."""
    small(monkeypatch)
    monkeypatch.setattr(tiny.make, "ROUNDS", 2)
    for stage in ("0a", "0b"):
        monkeypatch.setitem(RECIPES["tiny"], stage, dict(steps=2, lr=1e-3, batch_size=4))
    for number, folder in ((1, tmp_path), (2, tmp_path / "round2")):
        make_world(folder / "world", number, tune=64, pretrain=64, per_kind=2)
    with pytest.raises(SystemExit, match="error: .*not learned its world in 2 rounds; try another"):
        main(["make", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "| round 1 |" in said and "| round 2 |" in said and not (tmp_path / "teacher").exists()
    run = json.loads((tmp_path / "round2/stages/stage0b.run/run.json").read_text())
    assert run["student"] == fingerprint(tmp_path / "stages/stage0b")
    assert not (tmp_path / "round2/stages/stage0a").exists()


def test_another_teacher(tmp_path, monkeypatch, capsys):
    """make --other: Llama, grouped keys, an untied head, another width, depth and tokenizer. A student of the
    usual kind learns from it, and is scored; attention of other tokens is not compared unawares.
    """
    small(monkeypatch)
    make_world(tmp_path / "world", tune=64, pretrain=64, per_kind=2)
    main(["make", "--other", "--out", str(tmp_path), "--steps", "2"])
    assert not (tmp_path / "student").exists() and not (tmp_path / "compodistill").exists()
    text = json.loads((tmp_path / "teacher/config.json").read_text())["text_config"]
    assert text["model_type"] == "llama" and not text["tie_word_embeddings"] and text["rope_theta"] == 1e4
    assert (text["num_attention_heads"], text["num_key_value_heads"]) == (4, 2)
    with pytest.raises(SystemExit, match="has models of .*choose another --out"):
        main(["make", "--out", str(tmp_path), "--steps", "2"])

    for job in ([], ["systems"]):  # their students read the tokens of the teacher that ships
        with pytest.raises(SystemExit, match="has another tokenizer than .*--tokenizers aligned"):
            main([*job, "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "job")])
        assert not list((tmp_path / "job").glob("*"))
    words = [
        "--out",
        str(tmp_path),
        "--teacher",
        str(tmp_path / "teacher"),
        "--steps",
        "2",
        "--batch-size",
        "4",
    ]
    with pytest.raises(SystemExit, match="tokenizers differ; give --tokenizers aligned"):
        train.main(words)
    train.main([*words, "--tokenizers", "aligned"])
    log = [json.loads(line) for line in (tmp_path / "compodistill/stage2.jsonl").read_text().splitlines()]
    assert 0 < log[-1]["adl"] < 1 and log[-1]["kl"] > 0
    capsys.readouterr()
    score = ["score", "--model", str(tmp_path / "compodistill/stage3"), "--world", str(tmp_path / "world")]
    main([*score, "--teacher", str(tmp_path / "teacher")])
    said = capsys.readouterr().out
    assert "no similarity to" in said and "tokenizers differ" in said and "| recognition |" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_maker_that_was_stopped_goes_on_to_the_same_models(tmp_path, monkeypatch, capsys, number):
    """Asked to stop in the middle of a language model, and again in a stage of the teacher: one sentence each
    time, what is whole stays, and the same command ends with the models of the command that nobody stopped.
    """
    small(monkeypatch)
    for out in ("whole", "parts"):
        make_world(tmp_path / out / "world", tune=64, pretrain=64, per_kind=2)
    argv = ["make", "--steps", "4", "--out"]
    main([*argv, str(tmp_path / "whole")])

    def stopped(module, name):
        plain = getattr(module, name)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *these: signal.raise_signal(number) or plain(*these))
            main([*argv, str(tmp_path / "parts")])

    with pytest.raises(SystemExit, match="stopped; the same command goes on"):
        stopped(tiny.make, "pretrain_text")
    assert (tmp_path / "parts/vision").exists() and not (tmp_path / "parts/teacher-lm").exists()
    capsys.readouterr()
    stopped(train, "learning_rate")
    assert "stopped after step 0" in capsys.readouterr().out and not (tmp_path / "parts/teacher").exists()
    main([*argv, str(tmp_path / "parts")])
    for name in ("vision", "teacher-lm", "student", "teacher"):
        one, other = (load_file(tmp_path / out / name / "model.safetensors") for out in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one), name
