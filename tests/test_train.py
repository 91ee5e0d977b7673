"""train.py and eval.py as people run them: real processes, the shipped tiny models, a small tiny world."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import model
import train
from distill import METHODS, loss_counts
from helpers import config, in_full, same_weights
from support.errors import BadInput
from support.world import COMPOSITION, TINY, make_world
from tiny.__main__ import main as tiny
from tiny.students import STUDENTS
from training import recipes
from training.models import check_pair, load_models

ROOT = Path(train.__file__).parent
LR = 1e-4  # so small because of helpers.same_weights


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small tiny world, shared by the runs of this file."""
    return make_world(tmp_path_factory.mktemp("tiny") / "world", tune=64, pretrain=64, per_kind=4)


def run(*command, ranks=1):
    """A command in a process of its own -> (exit code, output)."""
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, env=environment, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def stage(out, world, *flags, ranks=1, stage=1):
    files = "pretrain.json" if stage in (1, "0a") else "tune.json"
    where = ["--data", world / files, "--images", world / "images", "--out", out, "--log-every", 1]
    code, text = run(ROOT / "train.py", "--stage", stage, "--lr", LR, *where, *flags, ranks=ranks)
    assert code == 0, text
    return read_log(out / "student" / f"stage{stage}.jsonl")


def read_log(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(world, tmp_path_factory):
    """Stages 1 and 2 on one rank: ten steps of eight samples each."""
    out = tmp_path_factory.mktemp("one")
    logs = [stage(out, world, *NAME, "--steps", 10, "--batch-size", 8, stage=n) for n in (1, 2)]
    return out, logs


NAME = ("--name", "student", "--vat-loss", "cosine-rows", "--vat-queries", "text")


@pytest.mark.parametrize("ranks, batch, accumulation", [(2, 4, 1), (1, 2, 4)])
def test_ranks_and_micro_batches_do_not_change_the_training(
    one_rank, world, tmp_path, ranks, batch, accumulation
):
    """The same global batch gives the same losses and the same weights, however it is cut. Samples differ in
    their number of answer tokens, so that a mean of means would fail.
    """
    reference, (_, log) = one_rank
    start = ("--student", reference / "student" / "stage1")
    shape = ("--steps", 10, "--batch-size", batch, "--accumulation", accumulation)
    rows = stage(tmp_path, world, *NAME, *start, *shape, ranks=ranks, stage=2)
    assert len(rows) == len(log) == 10
    for ours, theirs in zip(rows, log):
        assert {"lm", "kl", "adl"} <= ours.keys()
        for name in ("lm", "kl", "adl", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), (name, ours["step"])
    ours, theirs = (load_file(out / "student/stage2/model.safetensors") for out in (tmp_path, reference))
    assert ours.keys() == theirs.keys()
    same_weights(ours, theirs)


def test_each_stage_trains_what_it_says(one_rank):
    """Stage 1 moves P_s alone, stage 2 P_s and the language model; the vision encoder and P_t never move."""
    out, _ = one_rank
    lm = load_file(TINY / "student/model.safetensors")
    teacher = load_file(TINY / "teacher/model.safetensors")
    first, second = (load_file(out / f"student/stage{n}/model.safetensors") for n in (1, 2))
    for name, tensor in first.items():
        if name.startswith("lm."):
            assert torch.equal(tensor, lm[name.removeprefix("lm.")]), name
            assert not torch.equal(tensor, second[name]), name
        elif name.startswith("adapter.student."):
            assert not torch.equal(tensor, second[name]), name
        else:
            frozen = teacher[name.replace("adapter.teacher.", "adapter.")]
            assert torch.equal(tensor, frozen) and torch.equal(second[name], frozen), name


def test_first_step_by_hand(one_rank, world):
    """The first logged losses are those of the plain functions on the first global batch."""
    import distill

    out, (_, log) = one_rank
    student, teacher = model.load(out / "student/stage1"), model.load(TINY / "teacher")
    dataset = data.LlavaDataset(world / "tune.json", world / "images", student.tokenizer, 16, 40)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    batch = data.collate([dataset[i] for i in order[:8]])
    ids, pixels, mask = batch["input_ids"], batch["pixel_values"], batch["attention_mask"]
    s, t = (
        vlm(ids, pixels, mask, attention=in_full(*range(len(vlm.lm.model.layers))))
        for vlm in (student, teacher)
    )
    total, count = distill.kl_loss(s.logits, t.logits, batch["labels"])
    assert log[0]["kl"] == pytest.approx((total / count).item(), abs=1e-5)
    total, count = distill.lm_loss(s.logits, batch["labels"])
    assert log[0]["lm"] == pytest.approx((total / count).item(), abs=1e-5)
    cosines = []  # text rows, student layers 2, 3 of 5 against the means of teacher layers 2, 3 and 3, 4 of 6
    for layer, group in ((2, (2, 3)), (3, (3, 4))):
        target = sum(t.attentions[g] for g in group) / 2
        for row in range(len(ids)):
            columns = (ids[row] == data.IMAGE_TOKEN).nonzero()[:, 0]
            queries = slice(columns[-1] + 1, mask[row].sum())
            a, b = (maps[row].mean(0)[queries][:, columns] for maps in (s.attentions[layer], target))
            cosines += (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).tolist()
    assert log[0]["adl"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


@pytest.mark.slow
def test_a_rank_without_pictures_neither_hangs_nor_skews(one_rank, world, tmp_path):
    """Of eight samples two have a picture, so that of two ranks with a sample each one or both see none: the
    losses and weights are those of one rank with both samples.
    """
    records = json.loads((world / "tune.json").read_text())[:8]
    for record in records[:6]:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].replace(data.IMAGE_MARK, "")
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps(records))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).view(4, 2) >= 6
    assert {int(step.sum()) for step in order} >= {0, 1}  # steps in which no rank or one rank has a picture
    start = one_rank[0] / "student/stage1"
    where = ["--data", file, "--images", world / "images", "--name", "student", "--log-every", 1, "--lr", LR]
    for ranks in (1, 2):
        flags = ["--student", start, "--steps", 4, "--batch-size", 2 // ranks, "--out", tmp_path / str(ranks)]
        code, text = run(ROOT / "train.py", "--stage", 2, *where, *flags, ranks=ranks)
        assert code == 0, text
    one, two = (tmp_path / name / "student/stage2" for name in "12")
    for ours, theirs in zip(*(read_log(out.with_suffix(".jsonl")) for out in (one, two)), strict=True):
        for name in ("lm", "kl", "adl"):
            assert math.isfinite(ours[name]) and ours[name] == pytest.approx(theirs[name], abs=1e-5), name
    same_weights(*(load_file(out / "model.safetensors") for out in (one, two)))


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "sft"],
        ["--method", "kd"],
        ["--method", "kd", "--taf"],
        ["--no-taf"],
        ["--vat-loss", "mse"],
        ["--vat-loss", "kl", "--vat-queries", "image"],
        ["--matching", "simple"],
        ["--matching", "adaptive", "--layers", "all"],
        ["--method", "released", "--layers", "intermediate"],
    ],
    ids=" ".join,
)
def test_every_row_of_the_ablation_tables_runs(world, tmp_path, flags):
    """Stages 1, 2 and 3 with each flag, in this process; the student that comes out answers."""
    where = ["--data", world / "tune.json", "--images", world / "images", "--out", tmp_path, "--name", "x"]
    for number in "123":
        argv = ["--stage", number, *where, "--steps", 2, "--batch-size", 4, *flags]
        train.main(list(map(str, argv)))
    student = model.load(tmp_path / "x/stage3")
    assert isinstance(student.answer(world / "images/test-0.png", "What colour is the circle?"), str)


def step_of(student, teacher, *flags):
    c = config(*flags)
    return train.Step(student, teacher, c.method, c.weights, c.plain)


def test_memory_and_compile_flags_reach_the_models(one_rank):
    start = ("--student", one_rank[0] / "student/stage1")
    student, teacher = load_models(config(*start), "cpu")
    assert not student.lm.checkpointing
    student, teacher = load_models(config(*start, "--gradient-checkpointing", "--compile"), "cpu")
    assert student.lm.checkpointing and not teacher.lm.checkpointing
    towers = student.lm.model, teacher.lm.model, student.vision.encoder
    assert all(layer._compiled_call_impl is not None for tower in towers for layer in tower.layers)


def test_frozen_parts_run_once(one_rank, world):
    """Teacher and student share one pass of the vision encoder and one of the teacher's adapter."""
    c = config("--student", one_rank[0] / "student/stage1")
    student, teacher = load_models(c, "cpu")
    dataset = data.LlavaDataset(world / "tune.json", world / "images", teacher.tokenizer, 16, 40)
    batch = data.collate([dataset[i] for i in range(2)])
    calls = []
    for part in (teacher.vision, teacher.adapter):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    train.Step(student, teacher, c.method, c.weights)(batch, loss_counts(batch, c.method, c.weights))
    assert calls == [teacher.vision, teacher.adapter]


THREE = {"lm": 1, "kl": 1, "adl": 1}


@pytest.mark.parametrize(
    "flags, changes",
    [
        ("--vat-loss mse", {"distance": "mse"}),
        ("--vat-queries text --layers all", {"rows": "text", "layers": "all"}),
        ("--matching simple", {"matching": "simple"}),
        ("--no-taf", {"taf": False}),
        ("--vat-weight 3", {"2": THREE | {"adl": 3}}),
        ("--vat-loss none", {"2": {"lm": 1, "kl": 1}}),
        ("--vat-weight 0", {"2": {"lm": 1, "kl": 1}}),
        ("--kl-weight 0.5", {"1": {"lm": 1, "kl": 0.5}, "2": THREE | {"kl": 0.5}}),
        ("--kl-weight 0", {"1": {"lm": 1}, "2": {"lm": 1, "adl": 1}}),
        ("--method kd --vat-loss mse", {"taf": False, "distance": "mse", "2": THREE}),
        ("--method sft --kl-weight 1", {"taf": False, "2": {"lm": 1, "kl": 1}}),
        ("--method released", dict(kl_shifted=False, distance="released", rows="image", layers="released")),
    ],
)
def test_flags_make_the_method(flags, changes):
    """Every flag of an ablation changes what it says and nothing else."""
    method, paper = config(*flags.split()).method, METHODS["compodistill"]
    assert method.weights == {stage: changes.get(stage, terms) for stage, terms in paper.weights.items()}
    for name in ("taf", "kl_shifted", "distance", "rows", "layers", "matching"):
        assert getattr(method, name) == changes.get(name, getattr(paper, name)), name


def test_plain_training_is_the_same_training(one_rank, world, tmp_path):
    """`--plain`, ten steps from the same start: the losses and the weights of the lean form."""
    reference, (_, log) = one_rank
    start = ("--student", reference / "student/stage1", "--steps", 10, "--batch-size", 8)
    rows = stage(tmp_path, world, *NAME, *start, "--plain", stage=2)
    for ours, theirs in zip(rows, log, strict=True):
        for name in ("lm", "kl", "adl", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), (name, ours["step"])
    ours, theirs = (load_file(out / "student/stage2/model.safetensors") for out in (tmp_path, reference))
    same_weights(ours, theirs)


def hacked(folder, code):
    """train.py with a change of the method before it starts, as somebody tries one out."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import distill, train\n"
    (folder / "hacked.py").write_text(f"{program}{code}\ntrain.main(sys.argv[1:])\n")
    return folder / "hacked.py"


HACKS = {  # what somebody may forget -> what the sentence says
    "counts = distill.loss_counts\n"
    "distill.loss_counts = lambda b, *rest: counts(b, *rest) | {'adl': distill.query_rows(b, 'all').sum()}":
        r"the loss adl counts 4 items on the first step, but was divided by \d\d\d: ",
    "distill.METHODS['compodistill'].weights['2']['forgotten'] = 1.0":
        "stage 2 has weights for lm, kl, adl, forgotten, and loss_counts .* counts lm, kl, adl: ",
    "counts = distill.loss_counts; distill.METHODS['compodistill'].weights['2']['forgotten'] = 1.0\n"
    "distill.loss_counts = lambda b, *rest: counts(b, *rest) | {'forgotten': b['has_image'].sum()}":
        "there is a weight for the loss forgotten, which distillation_loss .*has not returned",
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hack", HACKS)
def test_half_a_loss_stops_the_run(one_rank, world, tmp_path, hack, ranks):
    """A sum over samples that is divided by rows; a weight without a count, or without a loss."""
    program = hacked(tmp_path, hack)
    flags = ["--stage", 2, "--student", one_rank[0] / "student/stage1", "--out", tmp_path / "out"]
    flags += ["--data", world / "tune.json", "--images", world / "images", "--steps", 3]
    flags += ["--batch-size", 4 // ranks]
    code, text = run(program, "--plain", *flags, ranks=ranks)
    assert code != 0 and re.search(f"error: {HACKS[hack]}", text), text
    if "forgotten" in hack and ranks == 1:
        code, text = run(program, *flags)
        assert code == 1 and "error: lean.py does not have the loss forgotten: train with --plain" in text


CHANGES = {  # of distill.py alone -> what the lean form says
    "text columns, too": (
        "distill.visual_map = lambda attention, columns: attention.mean(1)",
        r"the loss adl is [\d.]+ in distill.py and [\d.]+ in lean.py",
    ),
    "other weights": (
        "whole = distill.distillation_loss\n"
        "distill.distillation_loss = lambda *these: (10 * whole(*these)[0], whole(*these)[1])",
        r"L is [\d.]+ in distill.py and [\d.]+ in lean.py",
    ),
    "another gradient": (
        "kl = distill.kl_loss\ndistill.kl_loss = lambda s, *these: kl(s.detach(), *these)",
        r"the gradient norm of the adapter is [\d.]+ in distill.py and [\d.]+ in lean.py",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_lean_does_not_know_stops_its_run(one_rank, world, tmp_path, change):
    """The lean form says both numbers; the plain form trains."""
    code, sentence = CHANGES[change]
    program = hacked(tmp_path, code)
    flags = ["--stage", 2, "--student", one_rank[0] / "student/stage1", "--out", tmp_path / "out"]
    flags += ["--data", world / "tune.json", "--images", world / "images", "--steps", 2, "--batch-size", 4]
    code, text = run(program, *flags)
    assert code == 1 and re.search(f"error: {sentence}", text), text
    if change == "text columns, too":
        code, text = run(program, *flags, "--plain", "--name", "plain")
        assert code == 0, text


def test_dropout_is_no_difference_of_the_forms(one_rank, world, tmp_path):
    """It would be another one in each: the comparison of the first step is made without."""
    flags = ["--stage", 2, "--student", one_rank[0] / "student/stage1", "--out", tmp_path, "--steps", 1]
    flags += ["--data", world / "tune.json", "--images", world / "images", "--batch-size", 4]
    code, text = run(ROOT / "train.py", *flags, "--tune", "lora", "--lora-dropout", 0.3)
    assert code == 0, text


@pytest.mark.slow
def test_attention_alone_trains_on_ranks(one_rank, world, tmp_path):
    """Nothing flows back to the layers behind the aligned ones: ranks do not wait for it."""
    program = hacked(tmp_path, "distill.METHODS['alone'] = distill.Method({'2': {'adl': 1.0}})")
    flags = ["--stage", 2, "--student", one_rank[0] / "student/stage1", "--steps", 3, "--method", "alone"]
    flags += ["--data", world / "tune.json", "--images", world / "images", "--log-every", 1]
    losses = []
    for ranks in (1, 2):
        out = ["--out", tmp_path / str(ranks), "--batch-size", 4 // ranks]
        code, text = run(program, *flags, *out, ranks=ranks)
        assert code == 0, text
        losses.append([row["adl"] for row in read_log(tmp_path / str(ranks) / "alone/stage2.jsonl")])
    assert losses[0][0] > losses[0][-1] and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_mistake_in_a_hack_keeps_its_traceback(one_rank, world, tmp_path):
    program = hacked(
        tmp_path,
        "def distance(student, target, rows):\n    a, b = student.shape\n"
        "distill.DISTANCES['cosine'] = distill.Distance(distance, 'rows')",
    )
    start = ["--stage", 2, "--student", one_rank[0] / "student/stage1", "--out", tmp_path / "out"]
    where = ["--data", world / "tune.json", "--images", world / "images", "--batch-size", 4, "--steps", 1]
    code, text = run(program, *start, *where)
    assert code == 1 and "a, b = student.shape" in text and "too many values to unpack" in text


def test_stage_0_makes_a_teacher_of_any_language_model(world, tmp_path):
    """Both parts in one call; part b goes on from part a, whatever --student said."""
    shutil.copytree(world, tmp_path / "world")  # where `--stage 0` looks for the tiny world
    models = ["--student", TINY / "student", "--vision", TINY / "vision"]
    train.main(list(map(str, ["--stage", "0", "--out", tmp_path, *models, "--steps", 2, "--batch-size", 4])))
    teacher = model.load(tmp_path / "teacher/stage0b")
    assert teacher.num_image_tokens == 16 and teacher.config.text.hidden_size == 48


@pytest.mark.parametrize("taf", [False, True])
def test_new_adapters_are_where_the_model_is(taf):
    """On a GPU, say; the meta device stands in for it here."""
    teacher = model.load(TINY / "teacher").to("meta")
    lm = model.load_lm(TINY / "student").to("meta")
    student = model.VLM.assemble(teacher.vision, lm, teacher.tokenizer, teacher, taf=taf)
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_models_that_do_not_belong_together_are_refused(one_rank, world, tmp_path):
    """Other visual tokens, another tokenizer, another vision encoder: the losses would compare nothing."""
    out, _ = one_rank
    teacher = model.load(TINY / "teacher")
    student = model.load(out / "student/stage1")
    check_pair(student, teacher, taf=True)
    with torch.no_grad():
        model.load(TINY / "teacher").save(tmp_path / "layer")
    change_config(tmp_path / "layer", vision_feature_layer=-1)
    with pytest.raises(ValueError, match="layers or patches of their vision"):
        check_pair(student, model.load(tmp_path / "layer"), taf=True)
    tokenizer = json.loads((TINY / "teacher/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["Ġred"], vocab["Ġblue"] = vocab["Ġblue"], vocab["Ġred"]
    teacher.save(tmp_path / "words")
    (tmp_path / "words/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizers"):
        check_pair(student, model.load(tmp_path / "words"), taf=True)
    other = model.load(TINY / "teacher")
    other.vision.embeddings.patch_embedding.bias.data += 1
    with pytest.raises(ValueError, match="vision encoder"):
        check_pair(student, other, taf=True)
    with pytest.raises(ValueError, match="adapter of its own"):
        check_pair(teacher, teacher, taf=True)
    with pytest.raises(ValueError, match="has the teacher's adapter; start from .* --taf"):
        check_pair(student, teacher, taf=False)
    argv = ["--stage", 2, "--student", TINY / "teacher", "--out", tmp_path, "--steps", 1]
    with pytest.raises(SystemExit, match="student .*teacher, teacher .*teacher: the student has an"):
        train.main(list(map(str, argv)))


def test_a_method_that_does_not_fit_leaves_no_run_behind(one_rank, world, tmp_path):
    out, _ = one_rank
    data = ["--data", world / "tune.json", "--images", world / "images", "--out", tmp_path, "--steps", 1]
    argv = ["--stage", 2, "--method", "released", "--student", out / "student/stage1", *data]
    with pytest.raises(SystemExit, match="no list for 5 layers.*give --layers intermediate"):
        train.main(list(map(str, argv)))
    train.main(list(map(str, [*argv, "--layers", "intermediate"])))


def broken(tmp_path, world):
    """name -> (arguments, words that the one sentence must hold)."""
    half = tmp_path / "half"
    model.load(TINY / "teacher").save(half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    bad_json = tmp_path / "bad.json"
    bad_json.write_text('[{"id": 1')
    outside = tmp_path / "outside.json"
    turns = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    outside.write_text(json.dumps([{"id": "evil", "image": "../../etc/passwd", "conversations": turns}] * 8))
    no_turns = tmp_path / "no_turns.json"
    no_turns.write_text('[{"id": 7, "image": "x.png", "text": "hello"}]')
    images = ["--images", world / "images"]
    return {
        "no teacher": (["--stage", "1", "--teacher", tmp_path / "none"], ["none"]),
        "plain language model as teacher": (
            ["--stage", "1", "--teacher", TINY / "student"],
            ["config.json", "qwen2"],
        ),
        "a folder as data": (["--stage", "1", "--data", tmp_path, *images], [str(tmp_path)]),
        "a record without turns": (
            ["--stage", "1", "--data", no_turns, *images],
            ["record 7", "conversations"],
        ),
        "a multimodal start": (["--stage", "1", "--student", TINY / "teacher"], ["multimodal"]),
        "truncated teacher": (["--stage", "1", "--teacher", half], ["model.safetensors"]),
        "stage 2 without stage 1": (
            ["--stage", "2", "--name", "mine"],
            ["mine/stage1 is missing", "`python train.py --stage 1 --name mine"],
        ),
        "stage 3 without stage 2": (
            ["--stage", "3"],
            ["compodistill/stage2 is missing", "`python train.py --stage 2 --out", "TUNE.json"],
        ),
        "no data": (["--stage", "1", "--data", tmp_path / "no.json", *images], ["no.json"]),
        "broken data": (["--stage", "1", "--data", bad_json, *images], ["bad.json"]),
        "no images": (["--stage", "1", "--data", world / "tune.json", "--images", tmp_path / "no"], ["no"]),
        "a picture outside its folder": (
            ["--stage", "1", "--data", outside, *images],
            ["evil", "etc/passwd"],
        ),
    }


CASES = """
a multimodal start|no teacher|plain language model as teacher|truncated teacher|stage 2 without stage 1
stage 3 without stage 2|no data|broken data|a folder as data|a record without turns|no images
a picture outside its folder
"""


@pytest.mark.parametrize("case", CASES.strip().replace("\n", "|").split("|"))
def test_bad_input_is_one_sentence(case, world, tmp_path):
    argv, words = broken(tmp_path, world)[case]
    out = tmp_path / "out"
    rest = [] if "--data" in argv else ["--data", world / "tune.json", "--images", world / "images"]
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, [*argv, *rest, "--out", out, "--steps", 1, "--batch-size", 4])))
    sentence = str(stop.value)
    assert (
        sentence.startswith("error: ") and "\n" not in sentence and all(word in sentence for word in words)
    ), sentence
    assert not list(out.glob("*/stage?")), "something half-written was left behind"


@pytest.mark.parametrize(
    "argv",
    [
        "--stage 4",
        "--stage 2 --method magic",
        "--stage 2 --vat-loss l1",
        "--unknown",
        "--stage 2 --data x.json",
        "--stage 0 --data x.json --images x",
        "--stage 2 --vat-loss none --vat-queries text",
        "--stage 2 --method kd --vat-weight 3",
        "--stage 2 --method sft --layers all",
        "--stage 2 --steps 1 --epochs 1",
        "--data x.json --images x",
        "--stage 2 --steps 0",
        "--stage 2 --lr 0",
        "--stage 2 --batch-size -1",
        "--stage 2 --kl-weight nan",
    ],
)
def test_unknown_flag_values_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv.split())
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_an_output_that_exists_is_never_overwritten(one_rank, world):
    out, _ = one_rank
    before = (out / "student/stage2/model.safetensors").read_bytes()
    argv = [
        "--stage",
        "2",
        "--name",
        "student",
        "--out",
        out,
        "--data",
        world / "tune.json",
        "--images",
        world / "images",
    ]
    with pytest.raises(SystemExit, match="exists already"):
        train.main(list(map(str, argv)))
    assert (out / "student/stage2/model.safetensors").read_bytes() == before


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [train.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates[3] == 1.0
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] < 1e-3
    assert rates[3 + 97 // 2] == pytest.approx(0.5, abs=0.02)  # half way down the cosine


def test_global_batches_do_not_depend_on_ranks():
    one = list(data.batches_of(10, steps=6, accumulation=1, size=4, rank=0, ranks=1, seed=3))
    flat = [index for batch in one for index in batch]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and flat[:10] != flat[10:20]  # epochs
    parts = [
        list(data.batches_of(10, steps=6, accumulation=2, size=1, rank=r, ranks=2, seed=3)) for r in range(2)
    ]
    again = [parts[r][2 * step + micro][0] for step in range(6) for micro in range(2) for r in range(2)]
    assert again == flat


def test_the_four_students_are_no_work_for_torchrun(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="no work for torchrun"):
        tiny(["--out", str(tmp_path)])


def test_the_command_of_the_stage_before_is_whole(monkeypatch, tmp_path):
    """With all flags that both stages have in common, under torchrun, too; and what is there is named."""
    (tmp_path / "kd/stage1").mkdir(parents=True)
    argv = [
        "--stage",
        "2",
        "--name",
        "l1",
        "--out",
        str(tmp_path),
        "--vat-loss",
        "mse",
        "--steps=30",
        "--no-taf",
    ]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun sets it
    with pytest.raises(BadInput) as error:
        recipes.configure("2", recipes.parse_args("", argv), ranks=2)
    command = f"torchrun --nproc-per-node 2 train.py --stage 1 {' '.join(argv[2:])}"
    assert str(error.value) == (
        f"{tmp_path}/l1/stage1 is missing; make it with `{command}`, "
        f"or start from another: --student {tmp_path}/kd/stage1"
    )


@pytest.mark.parametrize(
    "stage, models, asked",
    [("2", ["--teacher", "T"], "--teacher T --data CAPTIONS.json --images FOLDER --student STUDENT"),
     ("3", [], "--data TUNE.json --images FOLDER --teacher TEACHER")],
)  # fmt: skip
def test_the_command_of_the_stage_before_in_the_papers_recipe(stage, models, asked, tmp_path):
    """With the models that it needs, and data of its own: a command that the parser takes."""
    argv = [
        "--recipe",
        "paper",
        "--stage",
        stage,
        "--out",
        str(tmp_path),
        "--data",
        "a",
        "b",
        "--images",
        "c",
        *models,
    ]
    with pytest.raises(BadInput) as error:
        recipes.configure(stage, recipes.parse_args("", argv), ranks=8)
    command = re.search("`python train.py (.*)`", str(error.value))[1]
    assert command == f"--stage {int(stage) - 1} --recipe paper --out {tmp_path} {asked}"
    recipes.parse_args("", command.split())


def test_a_stop_while_the_model_is_saved_begins_no_other_stage(world, tmp_path, capsys, monkeypatch):
    shutil.copytree(world, tmp_path / "world")
    plain = train.save_model
    monkeypatch.setattr(
        train, "save_model", lambda *these: signal.raise_signal(signal.SIGTERM) or plain(*these)
    )
    train.main(["--out", str(tmp_path), "--steps", "2", "--batch-size", "4", "--name", "mine"])
    assert f"stage 1 is finished, {tmp_path}/mine/stage1; stopped after it" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "mine").glob("stage?")) == ["stage1"]


def test_what_does_not_fit_stage_2_is_refused_in_stage_1(tmp_path, world):
    where = ["--data", world / "tune.json", "--images", world / "images", "--out", tmp_path]
    with pytest.raises(SystemExit, match="no list for 5 layers.*give --layers intermediate"):
        train.main(list(map(str, ["--stage", 1, "--method", "released", *where])))


def test_stages_1_2_and_3_follow_one_another(world, tmp_path, capsys):
    """`python train.py` without --stage, on the tiny world that lies under --out; done, it is done."""
    shutil.copytree(world, tmp_path / "world")
    argv = ["--out", str(tmp_path), "--steps", "2", "--batch-size", "4", "--name", "mine"]
    train.main(argv)
    assert [f"stage {n} done: {tmp_path}/mine/stage{n}" in capsys.readouterr().out or n for n in "1"] == [
        True
    ]
    assert model.load(tmp_path / "mine/stage3").config.taf_width == 64
    train.main(argv)
    assert capsys.readouterr().out.count("finished already") == 3


def test_the_main_job_looks_at_what_is_there_before_any_work(world, tmp_path, monkeypatch):
    """A teacher that is missing; a student, not finished, of another number of steps: no process starts."""
    monkeypatch.setattr("tiny.students.run_students", lambda *_: pytest.fail("work has begun"))
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        tiny(["--out", str(out), "--teacher", str(tmp_path / "nowhere")])
    where = ["--data", world / "pretrain.json", "--images", world / "images", "--out", out]
    flags = ["--stage", 1, "--method", "kd", "--steps", 3, "--batch-size", 4, "--stop-after", 2]
    train.main([*map(str, [*flags, *where])])
    with pytest.raises(SystemExit, match="has students of --seed 0 --steps 3; choose another --out"):
        tiny(["--out", str(out)])


@pytest.mark.slow
def test_main_job(tmp_path):
    """In small: the distance falls, aligned students look like the teacher, table and picture are there."""
    out = tmp_path / "out"
    make_world(out / "world", tune=2000, pretrain=200, per_kind=40)
    code, text = run("-m", "tiny", "--steps", 240, "--out", out)
    assert code == 0, text
    scores = json.loads((out / "results.json").read_text())
    assert list(scores) == ["teacher", *STUDENTS]
    assert min(scores["teacher"].values()) >= 95
    for name in ("compodistill", "compodistill-rows"):
        distance = [row["adl"] for row in read_log(out / name / "stage2.jsonl")]
        assert distance[-1] < 0.75 * distance[0], (name, distance)
        assert scores[name]["similarity"] > scores["kd"]["similarity"] + 0.1
        assert scores[name]["similarity"] > scores["sft"]["similarity"] + 0.1
    for name in STUDENTS:
        first, *_, last = read_log(out / name / "stage2.jsonl")
        assert last["lm"] < 0.7 * first["lm"] and last["step"] == 240
    table = (out / "results.md").read_text()
    assert table in text and all(f"| {name} |" in table for name in scores)
    code, text = run("-m", "tiny", "--steps", 240, "--out", out)
    assert code == 0 and "finished already" in text and table in text
    code, text = run("-m", "tiny", "--steps", 240, "--out", out, "--seed", 1)
    assert code == 1 and "has students of --seed 0 --steps 240; choose another --out" in text
    points = list(csv.DictReader((out / "curves.csv").read_text().splitlines()))
    assert [(row["student"], int(row["step"])) for row in points] == [
        (name, step) for name in STUDENTS for step in range(24, 241, 24)
    ]
    for name in STUDENTS:
        own = [row for row in points if row["student"] == name]
        logged = {row["step"]: row for row in read_log(out / name / "stage2.jsonl")}
        for row in own:
            assert row["lm"] == str(logged[int(row["step"])]["val_lm"])
            assert float(row["compositional"]) == pytest.approx(np.mean([float(row[k]) for k in COMPOSITION]))
        assert (own[-1]["adl"] != "") == name.startswith("compodistill")
    with Image.open(out / "attention.png") as picture:
        assert picture.width > 6 * 240 and len(set(picture.convert("L").tobytes())) > 20


def test_readme_speaks_of_what_there_is():
    """Every file that the README links is there, and every flag it shows is known to a parser."""
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    programs = ["training/recipes.py", "eval.py", "model.py", "tiny/__main__.py"]
    programs += [*ROOT.glob("evals/*.py"), *ROOT.glob("bench/*.py")]
    source = "".join((ROOT / file).read_text() for file in programs)
    known = set(re.findall(r"\"(--[\w-]+)\"", source))
    shown = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - {"--nproc-per-node", "--help"}
    assert shown and {option.replace("--no-taf", "--taf") for option in shown} <= known, shown - known
