"""A run's life: it resumes to the same bits, survives kills and signals, keeps to its folder, says what it
does.

Real processes. `slow`: kills at random moments, and the matrix of ranks, engines and accumulation.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import distill
import model
import train
from helpers import config, same_weights
from support.errors import BadInput
from support.world import TINY, make_world
from training import recipes, resume


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the processes that this file starts: sums are the same to the bit, small models faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ROOT = Path(train.__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small tiny world in which two pictures of forty are broken."""
    folder = make_world(tmp_path_factory.mktemp("tiny") / "world", tune=40, pretrain=16, per_kind=2)
    for name, cut in (("tune-3", 50), ("tune-17", 0)):
        file = folder / "images" / f"{name}.png"
        file.write_bytes(file.read_bytes()[:cut])
    teacher, lm = model.load(TINY / "teacher"), model.load_lm(TINY / "student")
    # slow rotations leave the bias of the keys no gradient but rounding, of which AdamW makes full steps
    lm.config = replace(lm.config, rope_theta=10.0)
    model.VLM.assemble(teacher.vision, lm, teacher.tokenizer, teacher, taf=True).save(folder / "student")
    return folder


def command(world, out, *flags):
    """Stage 2 of a student with a new P_s."""
    where = ["--data", world / "tune.json", "--images", world / "images", "--out", out, "--name", "x"]
    start = ["--stage", 2, "--student", world / "student", "--lr", 1e-4, "--log-every", 1]
    skip = ["--skip-bad-samples", "--max-bad-share", 0.5]
    return list(map(str, [*start, *where, *skip, *flags]))


PROGRAM = """
import os, socket, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, train  # once for all ranks, which saves most of the time of a small run
from test_run import asked_to_stop
torch.set_num_threads(1)
ranks, stop = int(sys.argv[1]), int(sys.argv[2])

def work():
    with asked_to_stop(at=stop):
        train.main(sys.argv[3:])
    sys.stdout.flush()

if ranks == 0:
    work()
    sys.exit()
free = socket.create_server(("127.0.0.1", 0))
there = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=sys.argv[1])
free.close()
children = []
for rank in map(str, range(ranks)):
    children.append(os.fork())
    if children[-1] == 0:
        os.environ |= there | dict(RANK=rank, LOCAL_RANK=rank)
        work()
        os._exit(0)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@contextmanager
def asked_to_stop(at):
    """SIGTERM as the step `at` begins, so that it is saved and not run."""
    plain = train.learning_rate

    def learning_rate(step, *others):
        if step == at:
            signal.raise_signal(signal.SIGTERM)
        return plain(step, *others)

    train.learning_rate = learning_rate
    try:
        yield
    finally:
        train.learning_rate = plain


def train_until(step, argv):
    with asked_to_stop(step):
        train.main(list(map(str, argv)))


def run(argv, ranks=0, expect=0, stop=-1):
    """train.py in a process of its own, or one for each rank as torchrun would start them -> its output."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(root=str(ROOT)), str(ranks), str(stop), *argv],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    text = done.stdout + done.stderr
    assert done.returncode == expect, text
    return text


def rows(out, name="stage2.jsonl"):
    file = out / "x" / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


LOSSES = ("step", "lm", "kl", "adl", "lr", "grad_norm", "bad")


def same_run(one, other):
    """The same weights to the bit, and the same log but for the clock."""
    ours, theirs = (load_file(out / "x/stage2/model.safetensors") for out in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [[row[key] for key in LOSSES] for row in rows(one)] == [
        [row[key] for key in LOSSES] for row in rows(other)
    ]
    ours, theirs = (rows(out, "stage2.bad.jsonl") for out in (one, other))
    assert sorted(map(str, ours)) == sorted(map(str, theirs)), "ranks write in any order"


HARD = "--steps 40 --batch-size 2 --accumulation 2 --tune lora --lora-rank 4 --lora-dropout 0.1".split()


@pytest.mark.parametrize("workers, more", [(0, ()), (2, ("--group-by-length",))], ids=["", "workers"])
def test_forty_steps_are_twenty_and_twenty(world, tmp_path, workers, more):
    """To the bit, with accumulation, LoRA, dropout, workers, skipped samples, over several epochs. A process
    that stops after step 33 without a save (it is killed) must not leave its rows in the log either.
    """
    flags = (*HARD, "--workers", workers, *more)
    for out, stops in ((tmp_path / "whole", ()), (tmp_path / "parts", (20,))):
        for stop in stops:
            train_until(stop, command(world, out, *flags))
            assert not (out / "x/stage2").exists() and rows(out)[-1]["step"] == stop
            log = out / "x/stage2.jsonl"
            log.write_text(log.read_text() + '{"step": 21, "lm": 0}\n{"step": 22, "l')
        train.main(command(world, out, *flags))
    assert [row["step"] for row in rows(tmp_path / "parts")] == list(range(1, 41))
    assert rows(tmp_path / "parts", "stage2.bad.jsonl"), "the broken pictures came up and were noted"
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_dropout_and_order_depend_on_the_seed(world, tmp_path):
    for seed in (0, 1):
        train.main(command(world, tmp_path / str(seed), *HARD, "--steps", 2, "--seed", seed))
    assert rows(tmp_path / "0")[0]["lm"] != rows(tmp_path / "1")[0]["lm"]


def test_a_run_that_has_finished_stays_as_it_is(world, tmp_path, capsys):
    argv = command(world, tmp_path, "--steps", 2, "--batch-size", 2)
    train.main(argv)
    file = tmp_path / "x/stage2/model.safetensors"
    before = file.read_bytes(), file.stat().st_mtime_ns
    train.main(argv)
    assert "finished already" in capsys.readouterr().out
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert not list((tmp_path / "x/stage2.run").glob("step-*")), "saves of a finished run are removed"


@pytest.mark.parametrize(
    "changed, named",
    [(["--lr", 2e-4], "lr"), (["--steps", 9], "steps"), (["--vat-loss", "mse"], "distance"),
     (["--seed", 5], "seed"), (["--kl-weight", 0.5], "weights"), (["--vat-queries", "text"], "rows"),
     (["--batch-size", 4], "global_batch"), (["--teacher", "other"], "teacher"), (["--max-length", 99],
     "max_length")],
)  # fmt: skip
def test_a_folder_of_another_run_is_refused(world, tmp_path, changed, named):
    """Before any work, with what is different, and what was saved stays; the same arguments do go on."""
    flags = ["--steps", 6, "--batch-size", 2]
    train_until(2, command(world, tmp_path, *flags))
    if changed == ["--teacher", "other"]:
        other = model.load(TINY / "teacher")
        other.lm.model.norm.weight.data *= 1.5
        other.save(tmp_path / "other")
        changed = ["--teacher", tmp_path / "other"]
    saved = (tmp_path / "x/stage2.run/latest").read_text()
    with pytest.raises(SystemExit, match=f"belongs to another run.*{named}"):
        train.main(command(world, tmp_path, *flags, *changed))
    assert (tmp_path / "x/stage2.run/latest").read_text() == saved and not (tmp_path / "x/stage2").exists()
    free = ["--workers", 1, "--save-every", 3, "--log-every", 1, "--gradient-checkpointing"]
    train.main(command(world, tmp_path, *flags, *free))
    assert rows(tmp_path)[-1]["step"] == 6


def test_how_the_work_is_cut_may_change_between_runs(world, tmp_path):
    """Stopped with 2 x 4 samples a step, gone on with 4 x 2: the same run, to rounding."""
    flags = ["--steps", 6]
    train.main(command(world, tmp_path / "a", *flags, "--batch-size", 8))
    train_until(3, command(world, tmp_path / "b", *flags, "--batch-size", 4, "--accumulation", 2))
    train.main(command(world, tmp_path / "b", *flags, "--batch-size", 2, "--accumulation", 4))
    close_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_between_two_micro_batches(world, tmp_path, ranks):
    """A long step is not waited for: nothing of it is kept, and it is run again, to the same bits."""
    flags = ["--steps", 1, "--batch-size", 1, "--accumulation", 16 if ranks else 120]
    flags += ["--parallel", "fsdp"] if ranks else []
    process = start(command(world, tmp_path / "parts", *flags), ranks)
    for line in process.stdout:
        if line.startswith("steps: "):
            break
    time.sleep(0.5)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)]).split() if ranks else [process.pid]
    os.kill(int(children[-1]), signal.SIGTERM)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "stopped after step 0" in text, text
    for out in ("parts", "whole"):
        argv = command(world, tmp_path / out, *flags)
        run(argv, ranks) if ranks else train.main(argv)
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("what", ["latest", "run.json", "log", "run.json and latest"])
def test_small_files_that_are_damaged_cost_nothing(world, tmp_path, capsys, what):
    """latest is for whoever looks, of run.json each save has a copy, and a log loses one row."""
    flags = ["--steps", 8, "--batch-size", 2, "--save-every", 2]
    train.main(command(world, tmp_path / "whole", *flags))
    parts, run = command(world, tmp_path / "parts", *flags), tmp_path / "parts/x/stage2.run"
    train_until(4, parts)
    assert "stopped after step 4" in capsys.readouterr().out
    assert (run / "latest").read_text() == "step-00000004"
    for name in what.split(" and "):
        if name == "log":
            log, lost = run.with_suffix(".jsonl"), b'{"st\xff\x00ep": 2}\n[1]\n{"step": "x"}\n'
            log.write_bytes(log.read_bytes().replace(b'{"step": 3,', lost + b'{"st": 3,'))
        else:
            (run / name).write_bytes(b"\x00\xff" * 9)
    train_until(5, parts)
    assert "of which 4 are done" in capsys.readouterr().out
    assert (run / "latest").read_text() == "step-00000005" and json.loads((run / "run.json").read_text())
    train.main(parts)
    if what == "log":
        assert [row["step"] for row in rows(tmp_path / "parts")] == [1, 2, 4, 5, 6, 7, 8]
    else:
        same_run(tmp_path / "whole", tmp_path / "parts")


def test_another_run_is_told_by_the_copy_in_a_save(world, tmp_path):
    argv = command(world, tmp_path, "--steps", 8, "--batch-size", 2)
    train_until(2, argv)
    (tmp_path / "x/stage2.run/run.json").write_text("{")
    with pytest.raises(SystemExit, match="belongs to another run .*lr"):
        train.main([*argv, "--lr", "0.1"])


def test_a_damaged_later_save_does_not_push_out_the_newest_whole_one(world, tmp_path):
    """--keep 1: the save of step 6 is damaged, that of step 3 is written, and is not the one that goes."""
    argv = command(world, tmp_path, "--steps", 8, "--batch-size", 2, "--save-every", 20, "--keep", 1)
    train_until(2, argv)
    run = tmp_path / "x/stage2.run"
    shutil.copytree(run / "step-00000002", run / "step-00000006")
    (run / "step-00000006/.metadata").write_bytes(b"")
    train_until(3, argv)
    assert [folder.name for folder in run.glob("step-*")] == ["step-00000003"]


def test_what_is_no_save_of_this_run_is_passed_over(world, tmp_path, capsys):
    """Another run's save under a later name, a save whose name is not its step, and somebody's folder."""
    flags = ["--steps", 8, "--batch-size", 2]
    train.main(command(world, tmp_path / "whole", *flags))
    train_until(5, command(world, tmp_path / "other", *flags, "--lr", 0.01))
    parts, run = command(world, tmp_path / "parts", *flags), tmp_path / "parts/x/stage2.run"
    train_until(3, parts)
    shutil.copytree(tmp_path / "other/x/stage2.run/step-00000005", run / "step-00000005")
    shutil.copytree(run / "step-00000003", run / "step-00000006")
    (run / "step-notes").mkdir()
    capsys.readouterr()
    train.main(parts)
    said = capsys.readouterr().out
    assert (
        said.count("is damaged, or of another run, and is passed over") == 2 and "of which 3 are done" in said
    )
    same_run(tmp_path / "whole", tmp_path / "parts")
    assert [file.name for file in run.glob("step-*")] == ["step-notes"]


@pytest.mark.parametrize("what", ["an empty folder", "a file", "a config alone", "a model of another kind"])
def test_what_has_the_models_name_does_not_cost_the_saves(world, tmp_path, what):
    argv = command(world, tmp_path, "--steps", 4, "--batch-size", 2)
    train_until(2, argv)
    model_folder = tmp_path / "x/stage2"
    if what == "a file":
        model_folder.write_text("")
    elif what == "a model of another kind":
        shutil.copytree(ROOT / "tiny/student", model_folder)
    else:
        model_folder.mkdir()
    if what == "a config alone":
        (model_folder / "config.json").write_text("{}")
    if what != "an empty folder":
        with pytest.raises(SystemExit, match="x/stage2 is no model of this run .*; choose another --name"):
            train.main(argv)
        assert (tmp_path / "x/stage2.run/step-00000002/state.json").exists()
    else:
        train.main(argv)
        assert (model_folder / "config.json").exists()


def test_stop_after_is_a_way_to_stop(world, tmp_path, capsys):
    flags = ["--steps", 6, "--batch-size", 2]
    train.main(command(world, tmp_path / "whole", *flags))
    parts = command(world, tmp_path / "parts", *flags, "--stop-after", 3)
    train.main(parts)
    assert "stopped after step 3" in capsys.readouterr().out
    train.main(parts)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_its_own_saves_take_no_room_from_a_run(world, tmp_path, monkeypatch):
    """What is asked for at the start is what it will take at most: having saved, it may go on with less."""
    argv = command(world, tmp_path, "--steps", 6, "--batch-size", 2, "--save-every", 2, "--keep", 1)
    train_until(3, argv)
    (save,) = (tmp_path / "x/stage2.run").glob("step-*")
    own = sum(file.stat().st_size for file in save.iterdir())
    student = model.load(world / "student")
    trained = [*student.lm.parameters(), *student.adapter.student.parameters()]
    size, whole = (sum(p.numel() for p in ps) for ps in (trained, student.parameters()))
    most = 2 * 12 * size + 4 * whole  # a save, another before it goes, and the model
    for free, enough in ((most - own - 1, False), (most - own, True)):
        monkeypatch.setattr(resume.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))  # noqa: B023
        if enough:
            train.main(argv)
        else:
            with pytest.raises(SystemExit, match="GB free, and this run's saves and model need"):
                train.main(argv)


def damage(folder, how):
    if how == "cut":
        file = next(folder.glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "a flipped byte":
        content = bytearray((file := next(folder.glob("*.distcp"))).read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "zeros as metadata":
        file = folder / ".metadata"
        file.write_bytes(bytes(file.stat().st_size))
    elif how == "no step":
        state = json.loads((folder / "state.json").read_text())
        del state["step"]
        (folder / "state.json").write_text(json.dumps(state))
    elif how == "no state":
        (folder / "state.json").unlink()
    elif how == "half a state":
        (folder / "state.json").write_text('{"step": ')
    else:
        (folder / ".metadata").unlink()


DAMAGES = "cut", "a flipped byte", "no state", "half a state", "no step", "no metadata", "zeros as metadata"


@pytest.mark.parametrize("how", DAMAGES)
def test_a_half_written_save_is_passed_over(world, tmp_path, how, capsys):
    flags = ["--steps", 8, "--batch-size", 2, "--save-every", 2]
    train.main(command(world, tmp_path / "whole", *flags))
    train_until(6, command(world, tmp_path / "parts", *flags))
    run_folder = tmp_path / "parts/x/stage2.run"
    assert [folder.name for folder in sorted(run_folder.glob("step-*"))] == ["step-00000004", "step-00000006"]
    damage(run_folder / "step-00000006", how)
    leftover = run_folder / ".step-00000008.writing"
    leftover.mkdir()
    capsys.readouterr()
    train.main(command(world, tmp_path / "parts", *flags))
    said = capsys.readouterr().out
    assert (
        "step-00000006 is damaged, or of another run, and is passed over" in said
        and "of which 4 are done" in said
    )
    assert not leftover.exists()
    same_run(tmp_path / "whole", tmp_path / "parts")


def start(argv, ranks=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*(launcher if ranks else [sys.executable]), str(ROOT / "train.py"), *argv],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_step(out, step, process):
    limit = time.time() + 60
    while not any(row["step"] >= step for row in rows(out)[:-1]):
        assert process.poll() is None and time.time() < limit, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number, ranks, who",
    [(signal.SIGINT, 0, "all"),
     pytest.param(signal.SIGTERM, 2, "one rank", marks=pytest.mark.slow),
     pytest.param(signal.SIGTERM, 0, "all", marks=pytest.mark.slow),
     pytest.param(signal.SIGTERM, 2, "launcher", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_signal_saves_and_exits_0(world, tmp_path, number, ranks, who):
    """All processes are signalled, as schedulers and terminals do, loader workers, too; or torchrun, which
    passes it on; or a single rank, and the others stop with it.
    """
    flags = ["--steps", 400, "--batch-size", 4 // max(ranks, 1), "--workers", 1, "--save-every", 1000]
    argv = command(world, tmp_path, *flags)
    process = start(argv, ranks)
    wait_for_step(tmp_path, 3, process)
    children = list(map(int, subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()))
    targets = {"all": [process.pid, *children], "launcher": [process.pid], "one rank": children[-1:]}
    for target in targets[who]:
        os.kill(target, number)
    text, _ = process.communicate(timeout=30)
    assert "stopped after step" in text and 'train.py"' not in text, text  # no traceback of ours
    assert who == "launcher" or process.returncode == 0, text  # torchrun reports the signal that it got
    step = json.loads((tmp_path / "x/stage2.run" / latest(tmp_path) / "state.json").read_text())["step"]
    assert step >= 3 and not (tmp_path / "x/stage2").exists()
    text = run(argv, ranks, stop=step + 1)
    assert f"of which {step} are done" in text


def latest(out):
    return (out / "x/stage2.run/latest").read_text()


@pytest.mark.slow
def test_one_process_at_a_time(world, tmp_path):
    """A second one is refused while the first trains; once that is killed, it goes on from its saves."""
    argv = command(world, tmp_path, "--steps", 400, "--batch-size", 2, "--save-every", 2, "--workers", 1)
    process = start(argv)
    wait_for_step(tmp_path, 4, process)
    assert "being trained by another process" in run(argv, expect=1)
    assert process.poll() is None
    process.kill()
    process.communicate()
    text = run(argv, stop=rows(tmp_path)[-1]["step"] + 1)
    assert "of which 0 are done" not in text and "stopped after step" in text


def test_a_second_signal_ends_at_once(world, tmp_path):
    """While the first one waits for a step that does not end."""
    program = (
        f"import os, signal, sys, threading, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from training.signals import signals_ask_to_stop\n"
        "with signals_ask_to_stop() as asked:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); assert len(asked) == 1\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('still here', flush=True)\n"  # passed on twice
        "    time.sleep(1.1); os.kill(os.getpid(), signal.SIGTERM); print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 128 + signal.SIGTERM and done.stdout == "still here\n", done


def test_log_rows_say_everything(world, tmp_path, capsys):
    train.main(command(world, tmp_path, "--steps", 3, "--batch-size", 4, "--accumulation", 2))
    printed = capsys.readouterr().out + capsys.readouterr().err
    assert "global batch: 1 ranks x 4 x 2 = 8" in printed
    for row in rows(tmp_path):
        assert {*LOSSES, "samples_per_s", "tokens_per_s", "padding", "memory_gb", "eta"} <= row.keys()
        assert (
            row["samples_per_s"] > 0 and row["tokens_per_s"] > row["samples_per_s"] and row["memory_gb"] > 0.1
        )
        assert 0 <= row["padding"] < 0.5
    assert rows(tmp_path)[-1]["eta"] == 0


def test_nan_stops_with_the_samples_written_down(world, tmp_path):
    """A loss that overflows: the step is not taken, the file names the samples of the batch."""
    broken = model.load(world / "student")
    broken.lm.model.norm.weight.data *= 1e38
    broken.save(tmp_path / "broken")
    argv = command(world, tmp_path, "--steps", 3, "--batch-size", 4, "--student", tmp_path / "broken")
    with pytest.raises(SystemExit, match="not finite at step 1.*nan-rank0.json"):
        train.main(argv)
    report = json.loads((tmp_path / "x/stage2.nan-rank0.json").read_text())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()[:4]
    assert report["step"] == 1 and report["ids"] == [[f"tune-{i}" for i in order]]


def test_bad_samples_stop_the_run_or_are_counted(world, tmp_path):
    argv = command(world, tmp_path / "a", "--steps", 20, "--batch-size", 4)
    strict = [flag for flag in argv if flag != "--skip-bad-samples"]
    with pytest.raises(SystemExit, match="record 'tune-(3|17)': .*cannot be read as .*--skip-bad-samples"):
        train.main(strict)
    argv = command(world, tmp_path / "b", "--steps", 20, "--batch-size", 4)
    train.main(argv)
    with_flag = [flag if flag != str(tmp_path / "b") else str(tmp_path / "a") for flag in argv]
    train.main(with_flag)  # the run that was stopped goes on with the flag that its sentence names
    same_run(tmp_path / "a", tmp_path / "b")
    skipped = rows(tmp_path / "b", "stage2.bad.jsonl")
    assert len(skipped) == 4 == rows(tmp_path / "b")[-1]["bad"]  # two epochs, two broken pictures
    assert {name for row in skipped for name in ("tune-3", "tune-17") if name in row["skipped"]} == {
        "tune-3",
        "tune-17",
    }
    argv = command(world, tmp_path / "c", "--steps", 20, "--batch-size", 4, "--max-bad-share", 0.001)
    with pytest.raises(
        SystemExit, match="--max-bad-share 0.001"
    ):  # of 1000 samples, as long as there are fewer
        train.main(argv)


@pytest.mark.parametrize("kind", ["a file in the way", "not writable", "no space", "full while saving"])
def test_an_output_that_cannot_be_written_is_one_sentence(world, tmp_path, kind, monkeypatch):
    out = tmp_path / "out"
    argv = command(world, out, "--steps", 4, "--batch-size", 2, "--save-every", 2)
    usage = SimpleNamespace(free=1000)  # bytes: less than a save needs, so that nothing is begun
    if kind == "a file in the way":
        out.write_text("")
    elif kind == "not writable":
        argv[argv.index(str(out))] = "/proc/out"
    elif kind == "no space":
        monkeypatch.setattr(resume.shutil, "disk_usage", lambda _: usage)
    else:  # a limit on the size of a file is what a full disk looks like to a process
        program = "import resource as r, train; r.setrlimit(r.RLIMIT_FSIZE, (100_000,) * 2); train.main()"
        done = subprocess.run(
            [sys.executable, "-c", program, *argv],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=120,
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and "could not be written" in last and "step-00000002" in last, last
        assert not (out / "x/stage2").exists() and not list(out.glob("x/stage2.run/step-*"))
        train.main(argv)  # with space again it goes on, from the beginning
        assert rows(out)[-1]["step"] == 4
        return
    with pytest.raises(SystemExit, match="^error: .*(cannot be written|GB free)"):
        train.main(argv)


def test_the_global_batch_is_checked():
    def paper(*flags, ranks):
        return config(
            "--recipe", "paper", "--teacher", "t", "--data", "x", "--images", "y", *flags, ranks=ranks
        )

    for ranks, size in ((1, 8), (2, 4), (4, 2)):  # the tiny recipe's batch is shared by the ranks
        c = config(ranks=ranks)
        assert (c.batch_size, c.global_batch) == (size, 8)
    assert paper(ranks=8).accumulation == 4 and paper(ranks=8).global_batch == 128
    assert paper("--batch-size", 16, ranks=8).accumulation == 1
    assert paper("--accumulation", 2, "--global-batch", 64, ranks=8).global_batch == 64
    with pytest.raises(BadInput, match="3 ranks x --batch-size 4 .* = 120, not the global batch of 128"):
        paper(ranks=3)
    with pytest.raises(BadInput, match="= 256, not the global batch of 128"):
        paper("--accumulation", 8, ranks=8)


def test_the_papers_recipe():
    """method.md, section 5: the table of stages."""
    flags = ["--recipe", "paper", "--data", "x", "--images", "y"]
    table = {
        "0a": (1e-3, 256, 2048, 0.0), "0b": (2e-4, 128, 2048, 0.05), "1": (2e-4, 256, 1536, 0.0),
        "2": (2e-4, 128, 1536, 0.0), "3": (2e-4, 192, 1536, 0.05),
    }  # fmt: skip
    models = {"0a": ["--vision", "v"], "1": ["--teacher", "t"], "2": ["--teacher", "t"]}
    for stage, numbers in table.items():
        c = config(*flags, *models.get(stage, []), stage=stage, ranks=8)
        assert (c.lr, c.global_batch, c.max_length, c.lora_dropout) == numbers, stage
        assert (c.epochs, c.steps, c.tune, c.lora_rank, c.lora_alpha) == (1, None, "lora", 128, 256)
        assert c.precision == "bf16" and c.gradient_checkpointing and set(c.weights.values()) == {1.0}
    c = config(*flags, *models["2"], "--tune", "full", "--steps", 7, ranks=8)
    assert c.lr == 2e-5 and c.steps == 7 and c.epochs is None
    assert config(*flags, *models["2"], "--tune", "full", "--lr", 1e-3, ranks=8).lr == 1e-3


@pytest.mark.parametrize(
    "stage, method, needs",
    [("0a", "sft", {"student", "vision"}), ("0b", "sft", set()), ("1", "sft", {"student", "vision"}),
     ("1", "kd", {"student", "teacher"}), ("1", "compodistill", {"student", "teacher"}),
     ("2", "sft", set()), ("2", "kd", {"teacher"}), ("3", "compodistill", set())],
)  # fmt: skip
def test_no_tiny_model_slips_into_the_papers_recipe(stage, method, needs, capsys):
    argv = ["--recipe", "paper", "--data", "x", "--images", "y", "--stage", stage, "--method", method]
    for given in (set(), {"student"}, {"teacher"}, {"vision"}, {"student", "teacher"}, {"student", "vision"}):
        flags = [word for name in given for word in (f"--{name}", "x")]
        if needs <= given:
            recipes.parse_args("", [*argv, *flags])
        else:
            with pytest.raises(SystemExit):
                recipes.parse_args("", [*argv, *flags])
            assert "give --" in capsys.readouterr().err


def test_bf16_keeps_what_is_trained_in_float32(world, tmp_path):
    """Frozen weights in bfloat16, trained ones and their moments in float32, losses near those of float32."""
    train.main(command(world, tmp_path / "32", "--steps", 4, "--batch-size", 8))
    argv = command(world, tmp_path / "16", "--steps", 4, "--batch-size", 8, "--precision", "bf16")
    train_until(2, argv)
    train.main(argv)
    for a, b in zip(rows(tmp_path / "32"), rows(tmp_path / "16")):
        for name in ("lm", "kl", "adl"):
            assert a[name] != b[name] and a[name] == pytest.approx(b[name], rel=0.03, abs=0.01), name
    weights = load_file(tmp_path / "16/x/stage2/model.safetensors")
    frozen = ("vision.", "adapter.teacher.")
    for name, tensor in weights.items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith(frozen) else torch.float32), name
    assert torch.isfinite(model.load(tmp_path / "16/x/stage2").lm(torch.arange(9)[None]).logits).all()


def test_fsdp_without_torchrun_is_refused(world, tmp_path):
    with pytest.raises(SystemExit, match="torchrun"):
        train.main(command(world, tmp_path, "--steps", 1, "--parallel", "fsdp"))


TEN = ["--steps", 10, "--global-batch", 16, "--max-bad-share", 1, "--save-every", 100]


@pytest.fixture(scope="module")
def ten_steps(world, tmp_path_factory):
    """Ten steps of sixteen samples on one rank, of which eight in one process."""
    out = tmp_path_factory.mktemp("ten")
    run(command(world, out, *TEN, "--batch-size", 16))
    return out


def close_run(one, other):
    for a, b in zip(rows(one), rows(other), strict=True):
        for key in LOSSES:
            assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-4 if key == "grad_norm" else 1e-5), key
    same_weights(*(load_file(out / "x/stage2/model.safetensors") for out in (one, other)))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_engines_and_accumulation_do_not_change_the_training(
    ten_steps, world, tmp_path, ranks, parallel, accumulation
):
    batch = 16 // ranks // accumulation
    flags = ["--batch-size", batch, "--accumulation", accumulation, "--parallel", parallel]
    run(command(world, tmp_path, *TEN, *flags), ranks)
    close_run(ten_steps, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, then",
    [((2, "fsdp"), (1, "ddp")), ((4, "fsdp"), (2, "fsdp")), ((2, "ddp"), (4, "fsdp"))],
)
def test_what_some_ranks_saved_others_resume(ten_steps, world, tmp_path, first, then):
    for (ranks, parallel), stop in ((first, 5), (then, -1)):
        flags = ["--batch-size", 16 // ranks, "--parallel", parallel]
        run(command(world, tmp_path, *TEN, *flags), ranks, stop=stop)
    close_run(ten_steps, tmp_path)


LIVES = 34
DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
import torch, train
torch.set_num_threads(1)
for line in sys.stdin:  # one life a line: a child with torch loaded, which the test kills
    child = os.fork()
    if child == 0:
        train.main(line.split("\\t"))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(world, tmp_path):
    """Killed {LIVES} times, in the middle of steps and of saves: nothing saved is lost or half read, and the
    weights and the log are those of the run that nobody killed.
    """
    flags = ["--steps", 240, "--batch-size", 4, "--save-every", 2, "--tune", "lora", "--lora-dropout", 0.1]
    train.main(command(world, tmp_path / "whole", *flags))
    argv, chance = "\t".join(command(world, tmp_path / "parts", *flags)), random.Random(0)
    run_folder = tmp_path / "parts/x/stage2.run"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(root=str(ROOT))], env=ENVIRONMENT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    killed, while_saving, seen = 0, 0, [0]

    def live(kill):
        nonlocal killed, while_saving
        driver.stdin.write(argv + "\n")
        driver.stdin.flush()
        child = int(next(line for line in driver.stdout if line.strip().isdigit()))
        if kill == "saving":
            limit = time.time() + 5
            while not list(run_folder.glob(".step-*.writing")) and time.time() < limit:
                time.sleep(0.0005)
        else:
            time.sleep(kill)
        while_saving += bool(list(run_folder.glob(".step-*.writing")))
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        code = int(next(line for line in driver.stdout if line.strip().lstrip("-").isdigit()))
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), driver.stderr
        saves = [int(folder.name[5:]) for folder in run_folder.glob("step-*") if resume.whole(folder)]
        seen.append(max(saves, default=0 if not (tmp_path / "parts/x/stage2").exists() else 240))
        assert seen[-1] >= seen[-2], "a save was lost"

    for life in range(LIVES):
        live("saving" if life % 3 == 0 else chance.uniform(0.05, 1.2))
    assert killed >= 30 and while_saving >= 5 and seen[-1] > 0, (killed, while_saving, seen)
    driver.stdin.close()
    driver.wait()
    train.main(command(world, tmp_path / "parts", *flags))
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("script, gpus", [("paper_4b_to_1.8b.sh", 2), ("one_24gb_gpu_0.5b.sh", 1)])
def test_the_scripts_in_runs(world, tmp_path, script, gpus):
    """All three stages and the export, with tiny checkpoints and data. Stopped, the script goes on."""
    places = {
        "TEACHER": TINY / "teacher", "STUDENT": TINY / "student", "IMAGES": world / "images",
        "PRETRAIN": world / "pretrain.json", "TUNE": world / "tune.json", "OUT": tmp_path / "out",
        "GPUS": gpus,
    }  # fmt: skip
    stopping = tmp_path / "python"  # a Python whose train.py is asked to stop at step 1
    program = PROGRAM.format(root=str(ROOT)).replace("sys.argv[3:]", "sys.argv[4:]")
    (tmp_path / "program.py").write_text(program)
    stopping.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/program.py" 0 1 "$@"\n')
    stopping.chmod(0o755)
    small = "--steps 2 --global-batch 8 --batch-size 2 --workers 0 --skip-bad-samples --max-bad-share 1"
    for python in (stopping, sys.executable) if gpus == 1 else (sys.executable,):
        places["PYTHON"] = python
        done = subprocess.run(
            ["bash", ROOT / "runs" / script, *small.split()],
            env={**ENVIRONMENT, **{name: str(value) for name, value in places.items()}},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("stopped after step 1" in done.stdout) == (python == stopping) and "error" not in done.stderr
    assert json.loads((tmp_path / "out/released/config.json").read_text())["model_type"] == "compodistill"
    student = model.load(tmp_path / "out/released")
    assert isinstance(student.answer(world / "images/tune-1.png", "What colour is the circle?"), str)
    weights = load_file(tmp_path / "out/released/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


# ---------------------------------------------------------------- validation


@pytest.fixture(scope="module")
def held_out(world):
    """Five records of other scenes: batches of two leave a rest."""
    file = world / "five.json"
    file.write_text(json.dumps(json.loads((world / "val.json").read_text())[:5]))
    return ["--val-data", file, "--val-every", 4]


def test_validation_costs_the_training_no_random_number(world, held_out, tmp_path):
    """With dropout, too; and what is logged are the losses over all records of the model that is saved."""
    few = [*HARD, "--steps", 10]
    train.main(command(world, tmp_path / "without", *few))
    train.main(command(world, tmp_path / "with", *few, *held_out))
    same_run(tmp_path / "without", tmp_path / "with")
    logged = {row["step"]: row for row in rows(tmp_path / "with") if "val_lm" in row}
    assert list(logged) == [4, 8, 10]

    student, teacher = model.load(tmp_path / "with/x/stage2"), model.load(TINY / "teacher")
    c = config(*few)
    step = train.Step(student, teacher, c.method, c.weights, plain=True)
    dataset = data.LlavaDataset(world / "five.json", world / "images", student.tokenizer, 16, 40)
    sums, counts = {}, {}
    for i in range(5):  # one by one
        batch = dataset.batch([i])
        for name, term in step(batch, distill.loss_counts(batch, c.method, c.weights))[1].items():
            sums[name] = sums.get(name, 0) + term.sum.item()
            counts[name] = counts.get(name, 0) + term.count.item()
    for name in ("lm", "kl", "adl"):
        assert logged[10][f"val_{name}"] == pytest.approx(sums[name] / counts[name], rel=1e-4), name
    assert len({round(row["val_lm"], 6) for row in logged.values()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_validation_changes_no_bit_on_ranks(world, held_out, tmp_path, parallel):
    """Two ranks, of which the second has fewer held-out records; with dropout."""
    few = ["--steps", 6, "--global-batch", 4, "--batch-size", 2, "--parallel", parallel]
    few += ["--tune", "lora", "--lora-dropout", 0.1]
    run(command(world, tmp_path / "without", *few), 2)
    run(command(world, tmp_path / "with", *few, *held_out), 2)
    same_run(tmp_path / "without", tmp_path / "with")
    assert "val_lm" in rows(tmp_path / "with")[-1] and "val_lm" not in rows(tmp_path / "without")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_validation_is_over_all_ranks(world, held_out, tmp_path, parallel):
    """Of four ranks one has a record in the second pass, and three have none."""
    few = ["--steps", 4, "--global-batch", 4, *held_out]
    train.main(command(world, tmp_path / "one", *few, "--batch-size", 4))
    run(command(world, tmp_path / "four", *few, "--batch-size", 1, "--parallel", parallel), 4)
    one, four = (rows(tmp_path / out)[-1] for out in ("one", "four"))
    for name in ("val_lm", "val_kl", "val_adl"):
        assert one[name] == pytest.approx(four[name], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_save_after_a_validation_is_whole(world, held_out, tmp_path, parallel):
    """FSDP has gathered weights for it: with all moments a run goes on to the same bits."""
    flags = ["--steps", 6, "--batch-size", 4, "--parallel", parallel, "--save-every", 4, *held_out]
    run(command(world, tmp_path / "whole", *flags), 1)
    run(command(world, tmp_path / "parts", *flags), 1, stop=4)
    run(command(world, tmp_path / "parts", *flags), 1)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_held_out_records_that_cannot_be_used(world, tmp_path):
    """A broken one stops the run before its first step, also where those that are trained on are passed over;
    no other stands in for one without an answer; and of texts alone there is no L_ADL, not one of 0.
    """
    five = json.loads((world / "val.json").read_text())[:5]
    silent = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": ""}]
    spoken = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "no"}]
    files = {
        "five": five,
        "six": [*five, {"id": "long", "conversations": [{**silent[0], "value": "what " * 2000}, spoken[1]]}],
        "texts": [{"id": "t", "conversations": spoken}],
        "broken": [*five[:2], {**five[2], "image": "nowhere.png"}, *five[3:]],
    }
    logged = {}
    for name, records in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        argv = command(world, tmp_path / name, "--steps", 1, "--batch-size", 2)
        argv += ["--val-data", str(tmp_path / f"{name}.json")]
        if name == "broken":
            with pytest.raises(SystemExit, match="error: .*broken.json, record 'val-2': .*nowhere.png") as e:
                train.main([*argv, "--skip-bad-samples"])
            assert "skip-bad-samples" not in str(e.value)
            assert not rows(tmp_path / name)
            continue
        train.main(argv)
        last = rows(tmp_path / name)[-1]
        logged[name] = {key: value for key, value in last.items() if key.startswith("val_")}
    assert logged["five"] == pytest.approx(logged["six"], rel=1e-5)
    assert list(logged["five"]) == ["val_lm", "val_kl", "val_adl"] and list(logged["texts"]) == [
        "val_lm",
        "val_kl",
    ]


def test_a_validation_that_cannot_be_is_one_sentence(world, tmp_path):
    flags = [*HARD, "--steps", 2]
    with pytest.raises(SystemExit, match="error: nowhere.json is missing .*name another with --val-data"):
        train.main(command(world, tmp_path, *flags, "--val-data", "nowhere.json"))
    with pytest.raises(SystemExit):
        train.main(command(world, tmp_path, *flags, "--val-every", 3))
    with pytest.raises(SystemExit, match="error: nowhere: no such folder .*--val-images"):
        train.main(
            command(world, tmp_path, *flags, "--val-data", world / "val.json", "--val-images", "nowhere")
        )
    two = ["--data", world / "tune.json", world / "val.json", "--images", world / "images", world]
    argv = [*command(world, tmp_path, *flags), *map(str, two), "--val-data", str(world / "val.json")]
    with pytest.raises(SystemExit, match="say with --val-images which is the folder of .*val.json"):
        train.main(argv)
