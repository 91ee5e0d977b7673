"""tiny/study.py: trainings and their lines; what is done is neither done again nor mixed with others'.

After a change of what training does, give study.METHOD one more, and `python tests/test_study.py` writes the
losses that test_lines_are_of_this_method compares with.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a program

import distill
import model
import train
from support.world import TINY, make_world
from tiny import students, study
from tiny.__main__ import main
from tiny.study import PAPER, TABLES, VARIANTS, Variant, run_name
from training import recipes

WORLD = dict(tune=64, pretrain=32, per_kind=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tiny") / "world", **WORLD)


def test_no_two_variants_are_one():
    """By what is trained, not by the words; and each has a folder of its own."""
    assert len({run_name(variant, 0) for variant in VARIANTS}) == len(VARIANTS)
    seen = {}
    for variant in filter(lambda variant: variant.trained, VARIANTS):
        args = recipes.parse_args("", [*variant.flags.split(), "--student", "any", "--name", "x"])
        stages = [recipes.configure(stage, args, ranks=1) for stage in args.method.weights]
        whole = str([{**asdict(c), "method": (asdict(c.method), c.weights)} for c in stages])
        assert seen.setdefault((whole, variant.times, variant.teacher), variant) == variant


def test_steps_are_in_proportion():
    assert study.steps_of("--method kd", None, 8) == {"1": 1600, "2": 32000, "3": 800}
    assert study.steps_of("--method kd", 40, 2) == {"1": 4, "2": 80, "3": 2}


def test_layers_of_every_row_can_be_matched():
    """With a teacher as deep as its name says, and the student that ships: 5 layers."""
    for variant in VARIANTS:
        named = re.fullmatch("layers-([0-9]+)", variant.teacher)
        if named or variant.teacher == "tiny" and variant.trained:
            for config in students.configs_of(variant.flags).values():
                if "adl" in config.weights:
                    distill.aligned_layers(config.method, 5, int(named[1]) if named else 6)
    with pytest.raises(ValueError, match="cannot be matched to 1 teacher layers"):
        distill.aligned_layers(distill.METHODS["compodistill"], 5, 4)


def argv(out, *flags):
    return ["study", "--out", str(out), "--only", "pairs", "--steps", "2", *map(str, flags)]


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """A folder with lines of all of one table, one seed."""
    out = tmp_path_factory.mktemp("study")
    shutil.copytree(world, out / "world")
    main(argv(out, "--seeds", 0))
    return out


def lines_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_line_for_each_training(done):
    lines = lines_of(done)
    assert {line["flags"] for line in lines} == {variant.flags for variant in TABLES["pairs"].values()}
    for line in lines:
        assert (line["seed"], line["times"], line["teacher"], line["method"]) == (0, 1, "tiny", study.METHOD)
        assert line["steps"] == {"1": 1, "2": 2, "3": 1} and line["seconds"] > 0 and line["memory_gb"] > 0
        assert set(line["losses"]) == {"lm", "kl", "adl"} and -1 <= line["similarity"] <= 1
        kinds = [line[kind] for kind in study.COMPOSITION]
        assert line["compositional"] == pytest.approx(sum(kinds) / len(kinds), abs=1e-2)
        assert set(line["forced"]) == {"as it is", "mean", "full", "own mean", "other picture"}
        log = done / run_name(Variant(line["flags"]), 0) / "stage2.jsonl"
        assert line["losses"]["adl"] == pytest.approx(
            json.loads(log.read_text().splitlines()[-1])["adl"], abs=1e-4
        )


def test_what_is_done_is_not_done_again(done, world, tmp_path, monkeypatch, capsys):
    """Not there, and not in a folder that has a copy of the lines; another seed is missing."""
    shutil.copytree(world, tmp_path / "world")
    shutil.copy(done / "results.jsonl", tmp_path)
    for out in (done, tmp_path):
        main(argv(out, "--seeds", 0))
        assert "3 trainings, of which 0 are to come" in capsys.readouterr().out
    jobs = {}
    monkeypatch.setattr(study, "run_jobs", lambda out, todo, scored, threads: jobs.update(todo) or [])
    main(argv(tmp_path, "--seeds", 0, 1))
    assert list(jobs) == [run_name(variant, 1) for variant in TABLES["pairs"].values()]
    main(
        ["study", "--out", str(tmp_path), "--only", "systems", "vocabularies", "--steps", "2", "--seeds", "0"]
    )
    assert "rows of the teachers other are left out" in capsys.readouterr().out
    # the paper's own form stands in both tables; the teacher is scored, and not trained
    assert len(jobs) == 3 + len(TABLES["systems"]) - 2
    assert [line["flags"] for line in lines_of(tmp_path)[3:]] == [study.TEACHER]
    main(argv(tmp_path, "--only", "systems", "--seeds", 0, 1))
    assert [line["flags"] for line in lines_of(tmp_path)[3:]] == [study.TEACHER]


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"forced"', '{"', "line 1 .*take this line out"),
        ('"seed": 0', '"seed": "0"', "line 1: seed is '0', not a int; take this line out"),
        ('"colour": ', '"colour": 999', "line 1: colour is 999.* from 0 to 100; take this line out"),
        ('"colour": ', '"hue": ', "line 1: colour is None.*; take this line out"),
        ('"2": 2', '"2": 3', "with steps .*choose another --out"),
        ('"world": "', '"world": "x', "made with another world than this one"),
        ('"tiny": "', '"tiny": "x', "made with another teacher than this one"),
        ('"own mean": ', '"own": ', "line 1, forced: own mean is None.*; take this line out"),
        ('"similarity": ', '"similarity": "x", "y": ', "line 1: similarity is 'x'.*; take this line out"),
        ('"similarity": ', '"similarity": NaN, "y": ', "line 1.*; take this line out"),
        ('"similarity": ', '"similarity": 1e400, "y": ', "line 1.*; take this line out"),
        ('"similarity": ', f'"similarity": 1{"0" * 400}, "y": ', "line 1: similarity is 10.* from -1 to 1"),
        ('"as it is": ', '"as it is": 101, "y": ', "line 1, forced: as it is is 101, not from 0 to 100"),
        ('"tiny": "', '"tinny": "', "line 1: prints says nothing of tiny; take this line out"),
        ("--method", "--mehtod", "line 1: no table of tiny/study.py has --mehtod .*; take this line out"),
        ('"similarity": ', '"curve": {}, "similarity": ', "line 1: curve is empty; take this line out"),
        ('"similarity": ', '"curve": {"01": {}}, "similarity": ', "line 1, curve: '01' is no step"),
        ('"times": 1', '"times": 2', "line 1: no table .*; take this line out"),
        ("{", "[1]\n{", "line 1: .*; take this line out"),
        ("{", "TWICE", "line 4 is a second one of .*, seed 0; take one of them out"),
    ],
)
def test_lines_that_are_damaged_or_foreign(done, world, tmp_path, old, new, said):
    shutil.copytree(world, tmp_path / "world")
    text = (done / "results.jsonl").read_text()
    text = 2 * text if new == "TWICE" else text.replace(old, new, 1)
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        main(argv(tmp_path, "--seeds", 0))
    assert (tmp_path / "results.jsonl").read_text() == text


def test_teachers_by_name(done, tmp_path, capsys, monkeypatch):
    """Rows of a teacher that is not given are left out; one that is given must be one of the tables'."""
    jobs = {}
    monkeypatch.setattr(study, "run_jobs", lambda out, todo, scored, threads: jobs.update(todo) or [])
    shutil.copytree(done / "world", tmp_path / "world")
    words = [*argv(tmp_path), "--only", "vocabularies", "depth", "--seeds", "0"]
    main([*words, "--teachers", f"layers-8={TINY / 'teacher'}"])
    said = capsys.readouterr().out
    assert "rows of the teachers layers-12, layers-4, other are left out" in said
    rows = [variant for variant in TABLES["depth"].values() if variant.teacher == "layers-8"]
    assert list(jobs) == [run_name(variant, 0) for variant in rows] and "-of-layers-8-0" in list(jobs)[0]
    assert all(f"--teacher={TINY / 'teacher'}" in words for words, *_ in jobs.values())
    for bad in ("layers-9=x", "layers-8", "layers-8="):
        with pytest.raises(SystemExit):
            main([*words, "--teachers", bad])
        assert f"'{bad}' is not NAME=FOLDER with one of layers-12, " in capsys.readouterr().err


def test_a_student_of_a_shallow_teacher(done, teacher):
    """Of four layers one lies at 30 to 70 %, to which the student's two cannot be matched: scores alone."""
    student = model.load(TINY / "compodistill")
    text = replace(teacher.config.text, num_hidden_layers=4)
    shallow = copy.deepcopy(teacher)
    shallow.config = replace(teacher.config, text=text)
    shallow.lm.config, shallow.lm.model.layers = text, shallow.lm.model.layers[:4]
    scores, more = (study.study_scores(student, vlm, done / "world") for vlm in (shallow, teacher))
    assert scores.keys() | {"similarity", "forced"} == more.keys() and more.items() > scores.items()


def test_a_rate_is_of_stage_2_alone(world, tmp_path):
    """Of the row `SFT, 1.5e-3` stages 1 and 3 have the recipe's rates."""
    shutil.copytree(world, tmp_path / "world")
    words = [*TABLES["rates"]["SFT, 1.5e-3"].flags.split(), f"--out={tmp_path}", "--name", "x"]
    words.append(f"--teacher={TINY / 'teacher'}")
    jobs = {"x": (words, {"1": 1, "2": 1, "3": 1}, 0)}
    assert list(students.run_jobs(tmp_path, jobs, study.study_scores)) == ["x"]
    rates = {
        log.stem: json.loads(log.read_text().splitlines()[-1])["lr"] for log in tmp_path.glob("x/*.jsonl")
    }
    assert rates == {"stage1": 2e-3, "stage2": 1.5e-3, "stage3": 5e-4}


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on(done, tmp_path):
    """kill -9 with one training done and others at work: nothing is lost, and the lines are the same."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        shutil.copytree(done / "world", out / "world")
    words = ["--seeds", 0, "--steps", 120]
    command = [sys.executable, "-m", "tiny", *argv(killed, *words)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        lines = killed / "results.jsonl"
        while not lines.exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    before = lines.read_text()
    assert len(before.splitlines()) < 3
    while True:  # its children end by themselves
        try:
            main(argv(killed, *words))
            break
        except SystemExit as error:
            assert "is at work" in str(error)
            time.sleep(0.5)
    main(argv(whole, *words))
    assert lines.read_text().startswith(before)

    def known(out):
        clocks = {"seconds", "memory_gb"}
        rows = ({key: line[key] for key in line.keys() - clocks} for line in lines_of(out))
        return sorted(rows, key=lambda line: line["flags"])

    assert known(killed) == known(whole) and len(known(whole)) == 3


def test_one_study_at_a_time(done):
    holds = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    holds += "; print(flush=True); input()"
    words = [sys.executable, "-c", holds, str(done / "lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit, match="another study is at work in .*; wait for it"):
            main(argv(done, "--seeds", 0))
        other.stdin.close()


def test_lines_of_another_method_are_kept_and_do_not_count(done, tmp_path, monkeypatch):
    """Nor do its trainings, which lie in the same folder: all is done again."""
    out = tmp_path / "study"
    shutil.copytree(done, out)
    before = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(before.rstrip("\n"))  # as some editors leave it
    monkeypatch.setattr(study, "METHOD", study.METHOD + 1)
    main(argv(out, "--seeds", 0, 0))
    after = (out / "results.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 6
    assert len(study.read_lines(out / "results.jsonl")) == 3
    assert len([*out.glob("*-method-2-0/stage3")]) == len([*out.glob("compodistill*/stage3")]) - 3 == 3


def test_a_training_that_stops_does_not_stop_the_others(done, tmp_path, capfd):
    """It is said at once, and again at the end; then the others are done."""
    out = tmp_path / "study"
    shutil.copytree(done / "world", out / "world")
    (out / run_name(Variant(PAPER), 0)).mkdir(parents=True)
    (out / run_name(Variant(PAPER), 0) / "stage1.run").write_text("no folder")
    with pytest.raises(
        SystemExit, match="a student stopped, as said above; mended, the same command goes on"
    ):
        main(argv(out, "--seeds", 0))
    assert "stage1.run" in capfd.readouterr().err
    assert sorted(line["flags"] for line in lines_of(out)) == sorted(
        variant.flags for variant in TABLES["pairs"].values() if variant != Variant(PAPER)
    )


def test_seconds_of_a_training_that_was_stopped(tmp_path):
    """A clock that goes back is that of a process that went on."""
    logs = {"stage1": [3, 5], "stage2": [2, 4, 1, 6]}
    for name, clock in logs.items():
        rows = [{"step": i + 1, "seconds": at, "memory_gb": at / 10, "lm": i} for i, at in enumerate(clock)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert study.logged(tmp_path, ["lm", "kl"]) == {"losses": {"lm": 3}, "seconds": 15, "memory_gb": 0.6}


SHORT = Path(__file__).with_name("study_losses.json")
TRAINED = [v for v in VARIANTS if v.trained and (v.times, v.teacher) == (1, "tiny")]


def short_training(variant, world, out):
    """{stage: last losses and gradient norm} of three steps of each stage."""
    shutil.copytree(world, out / "world")
    flags = [*variant.flags.split(), "--out", out, "--name", "x", "--steps", 3, "--log-every", 1]
    train.main([*map(str, flags), "--batch-size", "4", "--global-batch", "4"])
    logs = {log.stem: log.read_text().splitlines()[-1] for log in sorted((out / "x").glob("stage?.jsonl"))}
    last, names = {stage: json.loads(row) for stage, row in logs.items()}, ("lm", "kl", "adl", "grad_norm")
    return {stage: [round(row[name], 5) for name in names if name in row] for stage, row in last.items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", TRAINED, ids=lambda variant: run_name(variant, 0))
def test_lines_are_of_this_method(variant, world, tmp_path):
    """The losses of a short training are those that this METHOD had; 1e-3 is far more than rounding."""
    expected, found = json.loads(SHORT.read_text()), short_training(variant, world, tmp_path)
    assert expected["method"] == study.METHOD
    assert found.keys() == expected[variant.flags].keys()
    for stage, values in expected[variant.flags].items():
        assert found[stage] == pytest.approx(values, rel=1e-3), stage


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = make_world(root / "world", **WORLD)
        losses = {v.flags: short_training(v, source, root / run_name(v, 0)) for v in TRAINED}
    SHORT.write_text(json.dumps({"method": study.METHOD} | losses, indent=1))
