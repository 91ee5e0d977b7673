"""The main job, `python -m tiny`: four students of the tiny world, trained beside one another and scored."""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

import model
import train
from evals.pictures import attention_picture
from support.checkpoint import check_writable
from support.errors import BadInput, sentence
from support.world import make_world, tiny_cases
from tiny.scores import attention_similarity, table, tiny_scores
from training import recipes
from training.signals import Stopped

# Same stages, steps, batches and data order, and the same text-only language model; only --method differs.
STUDENTS = ("sft", "kd", "compodistill", "compodistill-rows")


def train_students(args: argparse.Namespace) -> None:
    """Train and score the students, as many at a time as there are cores; then a table and a picture."""
    recipe = recipes.RECIPES["tiny"]
    share = (args.steps or recipe["2"]["steps"]) / recipe["2"]["steps"]
    steps = {stage: max(1, round(share * recipe[stage]["steps"])) for stage in "123"}
    if "RANK" in os.environ:
        raise BadInput("python -m tiny is no work for torchrun, which train.py --stage is")
    if (args.out / "results.json").exists():
        before = json.loads((args.out / "sft/stage2.run/run.json").read_text())
        if (before["seed"], before["steps"]) != (args.seed, steps["2"]):
            raise BadInput(
                f"{args.out} has students of --seed {before['seed']} --steps {before['steps']}; "
                "choose another --out"
            )
        print(f"finished already, {args.out}\n\n{(args.out / 'results.md').read_text()}")
        return
    check_writable(args.out)
    started = time.time()
    print(f"tiny world: {make_world(args.out / 'world')}")
    run_students(args, steps)
    teacher = model.load(args.teacher)
    rows = {"teacher": tiny_scores(teacher, args.out / "world")}
    for name in STUDENTS:
        rows[name] = json.loads((args.out / name / "scores.json").read_text())
    text = table(rows)
    (args.out / "results.md").write_text(text + "\n")
    (args.out / "results.json").write_text(json.dumps(rows, indent=1))
    models = {"teacher": teacher} | {name: model.load(args.out / name / "stage3") for name in STUDENTS}
    attention_picture(models, tiny_cases(args.out / "world"), args.out / "attention.png")
    minutes = (time.time() - started) / 60
    print(f"\n{text}\n\n{args.out}/results.md, results.json, attention.png; {minutes:.1f} minutes")


def run_students(args: argparse.Namespace, steps: dict[str, int]) -> None:
    """A process for each student, as many at a time as there are cores, until all have their scores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads, at_once = max(1, cores // len(STUDENTS)), min(cores, len(STUDENTS))
    spawn = torch.multiprocessing.get_context("spawn")
    waiting, running = [], []
    for name in reversed(STUDENTS):  # the slow ones first: they share the cores best
        argv = ["--method", name, "--out", str(args.out), "--seed", str(args.seed), "--teacher", args.teacher]
        if not args.steps:  # else their stages have other numbers of steps than train.py's
            print(f"  python train.py {' '.join(argv)}")
        waiting.append(spawn.Process(target=student_process, args=(argv, steps, threads), daemon=True))
    total = len(STUDENTS) * sum(steps.values())
    with tqdm(total=total, desc="four students", unit="step", dynamic_ncols=True) as bar:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(0.5)
            bar.update(sum(last_step(args.out / name) for name in STUDENTS) - bar.n)
            if any(process.exitcode for process in running):
                for process in running:
                    process.terminate()
                raise BadInput("a student stopped, as the sentence above says; the same command goes on")
            running = [process for process in running if process.exitcode is None]


def student_process(argv: list[str], steps: dict[str, int], threads: int) -> None:
    """One student: stages 1, 2 and 3, then its scores."""
    torch.set_num_threads(threads)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    args = recipes.parse_args("", argv)
    args.quiet = True
    try:
        for stage, args.steps in steps.items():
            folder = train.train(recipes.configure(stage, args, ranks=1))
        student, teacher = model.load(folder), model.load(args.teacher)
        scores = tiny_scores(student, args.out / "world")
        scores["similarity"] = attention_similarity(student, teacher, args.out / "world")
        (args.out / args.name / "scores.json").write_text(json.dumps(scores, indent=1))
    except (KeyboardInterrupt, Stopped):
        sys.exit(1)
    except (BadInput, OSError) as error:
        sys.exit(f"{args.name}: {sentence(error)}")


def end_with(parent: int) -> None:
    """End this process soon after its parent was killed, so that the next `python -m tiny` can go on."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def last_step(folder: Path) -> int:
    """How many steps a student has done, from the whole lines of its logs."""
    logs = [log.read_text() for log in folder.glob("stage?.jsonl")]
    lines = [log[: log.rfind("\n") + 1].splitlines() for log in logs]
    return sum(json.loads(rows[-1])["step"] for rows in lines if rows)
