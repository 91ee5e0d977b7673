"""The main job, `python -m tiny`: four students of the tiny world, trained beside one another and scored."""

import argparse
import csv
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import model
import train
from data import load_tokenizer
from evals import figures
from evals.pictures import MADE, attention_picture, tiny_cases
from support.checkpoint import find, fingerprint
from support.errors import BadInput, one_line, told
from support.files import check_output, check_writable, field, read_json, write_atomically
from support.world import COMPOSITION, TINY, make_world, tiny_items
from tiny.scores import attention_similarity, table, tiny_scores
from training import recipes
from training.log import step_of
from training.signals import Stopped
from training.validation import is_due

# Same stages, steps, batches and data order, and the same text-only language model; only --method differs.
STUDENTS = ("sft", "kd", "compodistill", "compodistill-rows")
OTHER = "; choose another --out"
CURVES = ("recognition", "compositional", *COMPOSITION)
POINTS, ITEMS = 10, 40  # of the curves: how often a student is scored in stage 2, on how many items of a kind


def train_students(args: argparse.Namespace) -> None:
    """Train and score the students, as many at a time as there are cores; then a table and a picture."""
    refuse_ranks()
    steps = steps_of("--method compodistill", args.steps)
    check_students(args, dict.fromkeys(STUDENTS, steps))
    if (args.out / "results.json").exists():
        check_same(args, "kd", steps["2"])
        rows = {name: scores_in(args.out / "results.json", name) for name in ("teacher", *STUDENTS)}
        print(f"finished already, {one_line(args.out)}\n\n{table(rows)}")
        if not (args.out / "curves.png").exists():
            write_curves(args.out)
        return
    check_writable(args.out)
    check_output(args.out / "results.md", b"| ")
    check_output(args.out / "curves.csv", b"student,step,")
    for name in ("attention.png", "curves.png"):
        check_output(args.out / name, MADE)
    started = time.time()
    teacher, world = load_teacher(args.teacher), make_test_world(args.out)
    run_students(args, dict.fromkeys(STUDENTS, steps))
    rows = {"teacher": tiny_scores(teacher, world)}
    for name in STUDENTS:
        rows[name] = scores_in(args.out / name / "scores.json")
    text = table(rows)
    models = {"teacher": teacher} | {name: model.load(args.out / name / "stage3") for name in STUDENTS}
    attention_picture(models, tiny_cases(models, world), args.out / "attention.png")
    curves = write_curves(args.out)
    write_atomically(args.out / "results.md", text + "\n")
    write_atomically(args.out / "results.json", json.dumps(rows, indent=1))
    minutes = (time.time() - started) / 60
    files = ", ".join(["results.md", "results.json", "attention.png", *curves])
    print(f"\n{text}\n\n{args.out}/{files}; {minutes:.1f} minutes")


def refuse_ranks() -> None:
    """BadInput under torchrun: the students have processes of their own."""
    if "RANK" in os.environ:
        raise BadInput("python -m tiny is no work for torchrun, which train.py --stage is")


def configs_of(flags: str) -> dict[str, recipes.Config]:
    """{stage: Config} of flags of train.py, --method among them, in its recipe."""
    # with a --student nothing is looked for that the stage before has made
    args = recipes.parse_args("", [*flags.split(), "--student", "any"])
    return {stage: recipes.configure(stage, args, ranks=1) for stage in args.method.weights}


def steps_of(flags: str, second: int | None, times: int = 1) -> dict[str, int]:
    """{stage: steps}: `times` its recipe's, or in proportion to `second` of CompoDistill's stage 2."""
    whole = recipes.RECIPES["tiny"]["2"]["steps"]
    share = times * (second or whole) / whole
    return {stage: max(1, round(share * c.steps)) for stage, c in configs_of(flags).items()}


def check_students(args: argparse.Namespace, students: dict[str, dict[str, int]]) -> None:
    """check_same of every stage that a student {method: {stage: steps}} has begun, before any work."""
    stages = [(name, stage) for name, steps in students.items() for stage in steps]
    for name, stage in sorted(stages, key=lambda which: which != ("compodistill", "2")):  # --steps is of it
        if (args.out / name / f"stage{stage}.run/run.json").exists():
            check_same(args, name, students[name][stage], stage)


def check_same(args: argparse.Namespace, name: str, steps: int, stage: str = "2") -> None:
    """BadInput where a stage of a student in --out is of another teacher, seed or number of steps."""
    run = args.out / name / f"stage{stage}.run/run.json"
    before = read_json(run, remedy="; its students have results, but it is lost: choose another --out")
    teacher = fingerprint(find(args.teacher)) if configs_of(f"--method {name}")[stage].teacher else None
    if before.get("teacher") != teacher:
        raise BadInput(
            f"{args.out} has students of another teacher than {args.teacher}; choose another --out"
        )
    if (before.get("seed"), before.get("steps")) != (args.seed, steps):
        raise BadInput(
            f"{args.out} has students of --seed {before.get('seed')} --steps {before.get('steps')}; "
            "choose another --out"
        )


def load_teacher(name: str) -> model.VLM:
    """BadInput where it reads other tokens than the students of these jobs."""
    teacher = model.load(name)
    if teacher.require_tokenizer().get_vocab() != load_tokenizer(TINY / "student").get_vocab():
        raise BadInput(
            f"{name} has another tokenizer than the students of this job; train one with train.py "
            f"--teacher {name} --tokenizers aligned, and score it with python -m tiny score"
        )
    return teacher


def make_test_world(out: Path) -> Path:
    """The tiny world of --out, whole, before any work -> its folder."""
    world = make_world(out / "world")
    print(f"tiny world: {one_line(world)}")
    tiny_items(world)
    if not (world / "val.json").exists():
        raise BadInput(f"{world} is of an earlier version; choose another --out")
    return world


def scores_in(file: Path, name: str | None = None) -> dict[str, float]:
    """The scores in a file or, with a name, under that name in it. BadInput: something is missing."""
    content = read_json(file, remedy=OTHER)
    scores = content if name is None else field(content, name, dict, file)
    for column in (*CURVES, *({"similarity", "step_ms"} & scores.keys())):
        field(scores, column, float, f"{file}{f', {name}' * bool(name)}")
    return scores


def run_students(
    args: argparse.Namespace, students: dict[str, dict[str, int]], flags: dict[str, list[str]] | None = None
) -> None:
    """A process for each student {method: {stage: steps}}, until all have their scores.

    flags: of train.py, of a method.
    """
    jobs = {}
    for name, steps in reversed(students.items()):  # the slow ones first: they share the cores best
        argv = ["--method", name, f"--out={args.out}", "--seed", str(args.seed), f"--teacher={args.teacher}"]
        argv += (flags or {}).get(name, [])
        if not args.steps:  # else their stages have other numbers of steps than train.py's
            print(f"  python train.py {' '.join(argv)}")
        jobs[name] = (argv, steps, POINTS)
    for _ in run_jobs(args.out, jobs, student_scores):
        pass


def run_jobs(
    out: Path, jobs: dict[str, tuple], scored: Callable[..., dict], threads: int | None = None
) -> Iterator[str]:
    """{name: (words of train.py, {stage: steps}, points of the curve)} -> the names, as they finish.

    As many at a time as there are cores, with as many threads each as that leaves, or `threads`. A student's
    scores are what scored(student, teacher, world) says. BadInput, when the others are done: one stopped.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads, at_once = threads or max(1, cores // max(1, len(jobs))), min(cores, len(jobs))
    spawn = torch.multiprocessing.get_context("spawn")
    waiting, running, failed = list(jobs), {}, []
    total = sum(sum(steps.values()) for _, steps, _ in jobs.values())
    done = sum(last_step(out / name) for name in jobs)  # before: no part of the rate that the bar goes by
    bar = tqdm(total=total, initial=done, desc=f"{len(jobs)} students", unit="step", dynamic_ncols=True)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                work = (*jobs[name], threads, scored)
                running[name] = spawn.Process(target=student_process, args=work, daemon=True)
                plain = signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C this process tells it
                running[name].start()
                signal.signal(signal.SIGINT, plain)
            time.sleep(0.5)
            bar.update(sum(last_step(out / name) for name in jobs) - bar.n)
            for name in [name for name, process in running.items() if process.exitcode is not None]:
                code = running.pop(name).exitcode
                if code:
                    failed.append(code)
                else:
                    yield name
        if any(code < 0 for code in failed):
            raise BadInput("a student was killed, perhaps for want of memory; the same command goes on")
        if failed:
            raise BadInput("a student stopped, as said above; mended, the same command goes on")
    finally:  # whatever ends this process: they save first
        bar.close()
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(60)


def student_process(
    argv: list[str], steps: dict[str, int], points: int, threads: int, scored: Callable[..., dict]
) -> None:
    """One student: its stages, scored on a few items while it learns, and on all at the end.

    argv: words of train.py; a --lr is stage 2's, where the other stages keep the recipe's.
    """
    torch.set_num_threads(threads)
    parent = torch.multiprocessing.parent_process().pid  # not getppid(): it may be dead already
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    args = recipes.parse_args("", argv)
    args.quiet, args.val_every = True, max(1, steps["2"] // max(1, points))
    rate = args.lr
    try:
        for stage, args.steps in steps.items():
            args.lr = rate if stage == "2" else None
            args.val_data = args.out / "world/val.json" if stage == "2" and points else None
            c = recipes.configure(stage, args, ranks=1)
            for step, student in train.train_steps(c):
                if args.val_data and is_due(step, args.steps, args.val_every):
                    add_point(args.out, args.name, step, student)
        scores = scored(model.load(c.folder), model.load(args.teacher), args.out / "world")
        write_atomically(args.out / args.name / "scores.json", json.dumps(scores, indent=1))
    except (KeyboardInterrupt, Stopped):
        sys.exit(1)
    except Exception as error:
        if (said := told(error)) is None:
            raise
        sys.exit(f"{args.name}: {said}")


def student_scores(student: model.VLM, teacher: model.VLM, world: Path) -> dict[str, float]:
    """Of a student that is done."""
    return tiny_scores(student, world) | {"similarity": attention_similarity(student, teacher, world)}


# ---------------------------------------------------------------- curves


def add_point(out: Path, name: str, step: int, student: model.VLM) -> None:
    """Scores in the middle of training, on a few items; of a step that is done again they are the same."""
    student.eval()
    scores = tiny_scores(student, out / "world", ITEMS)
    student.train()
    file = out / name / "curve.json"
    points = read_json(file, remedy=OTHER) if file.exists() else {}
    points = {at: point for at, point in points.items() if at.isdecimal() and int(at) < step}
    write_atomically(file, json.dumps(points | {str(step): scores}, indent=1))


def write_curves(out: Path) -> list[str]:
    """curves.csv and curves.png -> which of them: without matplotlib there is no picture, but a sentence.

    Per student and step its scores on a few items, and its losses on the held-out records. Of students that
    train.py has made there are none, and no files.
    """
    rows, losses = [], ("lm", "kl", "adl")
    for name in STUDENTS:
        file, log = out / name / "curve.json", out / name / "stage2.jsonl"
        points = read_json(file, remedy=OTHER) if file.exists() else {}
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        logged = {step_of(line): json.loads(line) for line in lines if step_of(line) and "val_lm" in line}
        for at, point in points.items():
            if not at.isdecimal():
                raise BadInput(f"{file}: {f'{at!r}':.20} is no step{OTHER}")
            scores = {column: field(point, column, float, f"{file}, {at}") for column in CURVES}
            row = logged.get(int(at), {})
            terms = {term: row[f"val_{term}"] for term in losses if f"val_{term}" in row}
            for term in terms:
                field(row, f"val_{term}", float, f"{log}, step {at}")
            rows.append({"student": name, "step": int(at), **scores, **terms})
    if not rows:
        return []
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["student", "step", *CURVES, *losses], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "curves.csv", text.getvalue())
    title = "Stage 2: scores on a few test items, losses on held-out records"
    if figures.draw(out / "curves.png", figures.training_panels, (9, 6.5), title, rows):
        return ["curves.csv", "curves.png"]
    print('curves.png needs matplotlib (the extra "plots"): install it, and give the same command again')
    return ["curves.csv"]


def end_with(parent: int) -> None:
    """End this process soon after its parent was killed, so that the next `python -m tiny` can go on."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def last_step(folder: Path) -> int:
    """How many steps a student has done, from the whole lines of its logs."""
    logs = [log.read_text(errors="replace").splitlines() for log in folder.glob("stage?.jsonl")]
    return sum(next(filter(None, map(step_of, reversed(lines))), 0) for lines in logs)
