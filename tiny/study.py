"""`python -m tiny study`: the trainings behind RESULTS.md, each variant of the method with several seeds.

    python -m tiny study --out FOLDER                                all tables, seeds 0 to 4: many hours
    python -m tiny study --out FOLDER --only modules --seeds 0 1     one table, two seeds

A table is rows, a row is a variant: flags of train.py (a --lr is stage 2's alone), or the teacher itself. A
variant that stands in several tables is trained once. Every training that is done is a line of
FOLDER/results.jsonl, and is not done again: what was stopped goes on, and another FOLDER goes on from a copy
of that file. Lines of another METHOD are kept, and count for nothing.
"""

import argparse
import fcntl
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import model
from evals.analyses import WAYS, intervene, pair_hits, world_questions
from support.checkpoint import find, fingerprint
from support.errors import BadInput, one_line
from support.files import (
    check_writable,
    digest,
    field,
    lock_file,
    parse_json,
    read_json,
    read_text,
    write_atomically,
)
from support.program import commit
from support.world import COMPOSITION, RECOGNITION
from tiny.scores import attention_similarity, compared_layers, tiny_scores
from tiny.students import configs_of, load_teacher, make_test_world, refuse_ranks, run_jobs, steps_of
from training.log import step_of

# Of what a line's figures depend on beside its flags: one more with every change of the code after which a
# training ends with other losses (tests/test_study.py).
METHOD = 1
LONG_POINTS = 40  # of the curve of a training with more than the recipe's steps
FORCED = 150  # caption pairs of a kind, of the intervention
TEACHER = "teacher"  # in the place of flags: it is scored, and nothing is trained
FIELDS = (("flags", str), ("times", int), ("teacher", str))  # of a Variant
SCORES = ("recognition", "compositional", *RECOGNITION, *COMPOSITION)


class Variant(NamedTuple):
    flags: str  # of train.py, or TEACHER
    times: int = 1  # the recipe's steps; more than 1: with a curve
    teacher: str = "tiny"  # or one of --teachers

    @property
    def trained(self) -> bool:
        return self.flags != TEACHER


PAPER, ROWS = "--method compodistill", "--method compodistill-rows"
KD, KD_TAF, SFT = "--method kd", "--method kd --taf", "--method sft"
ALIGNED = " --tokenizers aligned"
LAYER_0 = f"{PAPER} --student-layers 0 --teacher-layers 0"

TABLES: dict[str, dict[str, Variant]] = {
    # the paper's
    "systems": {
        "teacher": Variant(TEACHER),
        "SFT": Variant(SFT),
        "KD": Variant(KD),
        "LLaVA-KD": Variant("--method llava-kd --weights image_kl=0.03"),
        "LLaVADI": Variant("--method llavadi"),
        "LLaVA-MoD": Variant("--method llava-mod"),
        "CompoDistill": Variant(PAPER),
        "CompoDistill, row by row": Variant(ROWS),
    },
    "modules": {
        "KD": Variant(KD),
        "VAT": Variant(f"{PAPER} --no-taf"),
        "TAF": Variant(KD_TAF),
        "VAT and TAF": Variant(PAPER),
    },
    "loss": {
        "none": Variant(KD_TAF),
        "MSE": Variant(f"{PAPER} --vat-loss mse"),
        "KL": Variant(f"{PAPER} --vat-loss kl"),
        "cosine": Variant(PAPER),
    },
    "layers": {
        "early": Variant(f"{PAPER} --layers early"),
        "later": Variant(f"{PAPER} --layers later"),
        "all": Variant(f"{PAPER} --layers all"),
        "intermediate": Variant(PAPER),
    },
    "matching": {
        "simple": Variant(f"{PAPER} --matching simple"),
        "adaptive": Variant(f"{PAPER} --matching adaptive"),
        "group": Variant(PAPER),
    },
    # ours
    "rates": {
        "SFT": Variant(SFT),
        "SFT, 1.5e-3": Variant(f"{SFT} --lr 1.5e-3"),
        "KD": Variant(KD),
        "KD, 1e-3": Variant(f"{KD} --lr 1e-3"),
        "KD with TAF": Variant(KD_TAF),
        "KD with TAF, 1.5e-3": Variant(f"{KD_TAF} --lr 1.5e-3"),
        "CompoDistill": Variant(PAPER),
    },
    "rows": {
        "whole map, all rows": Variant(PAPER),
        "whole map, rows of the picture": Variant(f"{PAPER} --vat-queries image"),
        "whole map, rows of text": Variant(f"{PAPER} --vat-queries text"),
        "row by row, all rows": Variant(f"{ROWS} --vat-queries all"),
        "row by row, rows of the picture": Variant(f"{ROWS} --vat-queries image"),
        "row by row, rows of text": Variant(ROWS),
    },
    "weight": {
        "0.3": Variant(f"{PAPER} --vat-weight 0.3"),
        "1": Variant(PAPER),
        "3": Variant(f"{PAPER} --vat-weight 3"),
        "10": Variant(f"{PAPER} --vat-weight 10"),
    },
    "heads": {
        "mean of the heads": Variant(ROWS),
        "matched heads": Variant(f"{ROWS} --vat-heads matched"),
    },
    "controls": {
        "the teacher's maps": Variant(PAPER),
        "shuffled": Variant(f"{PAPER} --vat-control shuffled"),
        "of another sample": Variant(f"{PAPER} --vat-control other"),
        "uniform": Variant(f"{PAPER} --vat-control uniform"),
        "none": Variant(KD_TAF),
    },
    "vocabularies": {
        "KD": Variant(KD + ALIGNED, teacher="other"),
        "CompoDistill": Variant(PAPER + ALIGNED, teacher="other"),
    },
    "depth": {  # what the last window of each has, `eval.py analyse layers` says of its teacher
        "4 layers: KD": Variant(KD, teacher="layers-4"),
        # 30 to 70 % are its layer 2 alone, to which the student's two cannot be matched
        "4 layers: layer 2": Variant(f"{PAPER} --student-layers 2 --teacher-layers 2", teacher="layers-4"),
        "4 layers: layer 0": Variant(LAYER_0, teacher="layers-4"),
        "8 layers: KD": Variant(KD, teacher="layers-8"),
        "8 layers: 30 to 70 %": Variant(PAPER, teacher="layers-8"),
        "8 layers: layer 6": Variant(f"{PAPER} --student-layers 4 --teacher-layers 6", teacher="layers-8"),
        "12 layers: KD": Variant(KD, teacher="layers-12"),
        "12 layers: 30 to 70 %": Variant(PAPER, teacher="layers-12"),
        "12 layers: layer 0": Variant(LAYER_0, teacher="layers-12"),
    },
    "freezing": {
        "none": Variant(PAPER),
        "layers 2, 3": Variant(f"{PAPER} --freeze-layers 2,3"),
        "layers 0, 1": Variant(f"{PAPER} --freeze-layers 0,1"),
        "layer 4": Variant(f"{PAPER} --freeze-layers 4"),
    },
    "pairs": {
        "both": Variant(PAPER),
        "layer 2 alone": Variant(f"{PAPER} --align-layers 2"),
        "layer 3 alone": Variant(f"{PAPER} --align-layers 3"),
    },
    "budget": {
        "SFT": Variant(f"{SFT} --lr 5e-4", 8),
        "KD": Variant(f"{KD} --lr 5e-4", 8),
        "KD with TAF": Variant(f"{KD_TAF} --lr 1e-3", 8),
        "CompoDistill": Variant(f"{PAPER} --lr 1e-3", 8),
    },
}
VARIANTS = list(dict.fromkeys(variant for rows in TABLES.values() for variant in rows.values()))
OTHERS = sorted({variant.teacher for variant in VARIANTS} - {"tiny"})  # teachers that do not ship


def named_folder(text: str) -> tuple[str, str]:
    """ "NAME=FOLDER" of one of OTHERS."""
    name, _, folder = text.partition("=")
    if name not in OTHERS or not folder:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not NAME=FOLDER with one of {', '.join(OTHERS)}")
    return name, folder


def study(args: argparse.Namespace) -> None:
    """`python -m tiny study`, as parsed."""
    refuse_ranks()
    check_writable(args.out)
    with open(args.out / "lock", "w") as lock:
        taken = f"another study is at work in {args.out}; wait for it, or choose another --out"
        lock_file(lock, fcntl.LOCK_EX, taken)
        train_missing(args)


def train_missing(args: argparse.Namespace) -> None:
    """Train and score what is missing of the tables args.only and the seeds; a line of results.jsonl each."""
    load_teacher(args.teacher)
    world, file = make_test_world(args.out), args.out / "results.jsonl"
    teachers = {"tiny": args.teacher} | dict(args.teachers)
    prints = {who: fingerprint(find(name)) for who, name in teachers.items()} | {"world": world_print(world)}
    lines, jobs, todo, code = read_lines(file, prints), {}, {}, commit()

    def add_line(variant: Variant, seed: int, steps: dict[str, int], more: dict) -> None:
        line = variant._asdict() | {"seed": seed, "method": METHOD, "steps": steps, "commit": code}
        line |= {"prints": {who: prints[who] for who in (variant.teacher, "world")}} | more
        before = read_text(file) if file.exists() else ""
        if before and not before.endswith("\n"):  # as some editors leave it
            before += "\n"
        write_atomically(file, before + json.dumps(line) + "\n")

    rows = list(dict.fromkeys(variant for name in args.only for variant in TABLES[name].values()))
    if missing := {variant.teacher for variant in rows} - teachers.keys():
        names = ", ".join(sorted(missing))
        print(f"rows of the teachers {names} are left out: python -m tiny make makes them, for --teachers")
    rows = [variant for variant in rows if variant.teacher in teachers]
    trained = [variant for variant in rows if variant.trained]
    for variant in trained:
        steps = steps_of(variant.flags, args.steps, variant.times)
        for seed in dict.fromkeys(args.seeds):
            name = run_name(variant, seed)
            argv = [*variant.flags.split(), "--seed", str(seed), "--name", name, f"--out={args.out}"]
            argv.append(f"--teacher={teachers[variant.teacher]}")
            done = lines.get((variant, seed))
            if not done:
                points = LONG_POINTS if variant.times > 1 else 0
                jobs[name], todo[name] = (argv, steps, points), (variant, seed)
            elif done.get("steps") != steps:
                raise BadInput(
                    f"{file} has {name} with steps {done.get('steps')}, not {steps}; choose another --out"
                )
    for variant in rows:
        if not variant.trained and (variant, 0) not in lines:
            add_line(variant, 0, {}, rounded(tiny_scores(model.load(teachers[variant.teacher]), world)))
    print(f"{len(trained) * len(set(args.seeds))} trainings, of which {len(jobs)} are to come")
    # one thread each, however many are missing: sums of more threads round otherwise
    for name in run_jobs(args.out, jobs, study_scores, threads=1) if jobs else ():
        (variant, seed), folder = todo[name], args.out / name
        logs = logged(folder, terms=configs_of(variant.flags)["2"].weights)
        add_line(variant, seed, jobs[name][1], logs | read_json(folder / "scores.json"))
    print(f"{one_line(file)}: a line for each training")


def run_name(variant: Variant, seed: int) -> str:
    """The folder of a training, which no other METHOD has."""
    words = re.sub("[^a-z0-9.,]+", "-", variant.flags.removeprefix("--method "))
    teacher = f"-of-{variant.teacher}" * (variant.teacher != "tiny")
    method = f"-method-{METHOD}" * (METHOD > 1)
    return f"{words}{f'-x{variant.times}' * (variant.times > 1)}{teacher}{method}-{seed}"


def study_scores(student: model.VLM, teacher: model.VLM, world: Path) -> dict:
    """Scores, in %; where the paper's layers of both can be compared also the similarity of their attention,
    and the pairs that are right with the teacher's attention forced on the student (evals.analyses.WAYS).
    """
    scores = rounded(tiny_scores(student, world))
    try:
        compared_layers(student, teacher)
    except ValueError:
        return scores
    pairs = world_questions(world, FORCED)["compositional"]
    odds = intervene(teacher, {"student": student}, pairs)["student"]
    forced = {way: round(float(pair_hits(x).mean()), 3) for way, x in odds.items()}
    similarity = round(attention_similarity(student, teacher, world), 4)
    return scores | {"similarity": similarity, "forced": forced}


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(score, 3) for name, score in scores.items()}


def logged(folder: Path, terms: Iterable[str]) -> dict:
    """Of a training's logs: its last losses of stage 2, seconds of all steps, peak memory; and its curve.

    Seconds of a training that was stopped are those since, where the log does not show when that was.
    """
    rows = {
        log.stem: [json.loads(line) for line in read_text(log).splitlines() if step_of(line)]
        for log in sorted(folder.glob("stage?.jsonl"))
    }
    clocks = [[row["seconds"] for row in of_stage] for of_stage in rows.values()]
    # a clock that goes back is that of a process that went on after a stop
    seconds = sum(a for clock in clocks for a, b in zip(clock, [*clock[1:], 0]) if b < a)
    last = rows["stage2"][-1]
    more = {"curve": read_json(folder / "curve.json")} if (folder / "curve.json").exists() else {}
    return {
        "losses": {term: round(last[term], 4) for term in terms if term in last},
        "seconds": round(seconds, 1),
        "memory_gb": max(row["memory_gb"] for of_stage in rows.values() for row in of_stage),
        **more,
    }


def world_print(world: Path) -> str:
    """Tells one tiny world from another: its records, not their pictures."""
    whole = hashlib.sha256()
    for file in [
        *(world / f"{name}.json" for name in ("pretrain", "tune", "val")),
        *sorted(world.glob("test/*.json")),
    ]:
        with open(file, "rb") as handle:
            whole.update(f"{file.relative_to(world)} {digest(handle)}".encode())
    return whole.hexdigest()[:16]


# ---------------------------------------------------------------- lines


def read_lines(file: Path, prints: dict[str, str] | None = None) -> dict[tuple[Variant, int], dict]:
    """{(variant, seed): line} of this METHOD, checked. prints: of teachers and world, which all must have.

    BadInput: a line that is damaged, another's, or there twice.
    """
    found, remedy = {}, "; take this line out, and its training is done again"
    whole = read_text(file, "; take what is no text out") if file.exists() else ""
    for number, text in enumerate(whole.split("\n"), 1):
        where = f"{file}, line {number}"
        if not text.strip():
            continue
        try:
            line = parse_json(text, where)
            run = Variant(*(field(line, *named, where) for named in FIELDS)), field(line, "seed", int, where)
            if field(line, "method", int, where) != METHOD:
                continue
            if run[0] not in VARIANTS or not run[0].trained and run[1]:
                raise BadInput(f"{where}: no table of tiny/study.py has {run[0].flags:.60}, seed {run[1]}")
            check_scores(line, where)
            own = {who: field(line["prints"], who, str, where) for who in field(line, "prints", dict, where)}
            if lost := {run[0].teacher, "world"} - own.keys():
                raise BadInput(f"{where}: prints says nothing of {', '.join(sorted(lost))}")
        except BadInput as error:
            raise BadInput(f"{error}{remedy}") from None
        if run in found:
            raise BadInput(f"{where} is a second one of {run[0].flags}, seed {run[1]}; take one of them out")
        for who in own.keys() & (prints or {}).keys():
            if own[who] != prints[who]:
                what = "world" if who == "world" else "teacher"
                raise BadInput(f"{where} was made with another {what} than this one; choose another --out")
        found[run] = line
    return found


def check_scores(line: dict, where: str) -> None:
    """BadInput: a score that is missing or out of its range."""

    def ranged(record: dict, names: Iterable[str], least: int, most: int, where: str) -> None:
        for name in names:
            if not least <= field(record, name, float, where) <= most:
                raise BadInput(f"{where}: {name} is {record[name]!s:.20}, not from {least} to {most}")

    ranged(line, SCORES, 0, 100, where)
    ranged(line, {"similarity"} & line.keys(), -1, 1, where)
    if "forced" in line:
        ranged(field(line, "forced", dict, where), WAYS, 0, 100, f"{where}, forced")
    if "curve" in line or line["times"] > 1:
        if not field(line, "curve", dict, where):
            raise BadInput(f"{where}: curve is empty")
        for step, point in line["curve"].items():
            if not re.fullmatch("[1-9][0-9]{0,8}", step):
                raise BadInput(f"{where}, curve: {step!r:.40} is no step")
            ranged(point, ("recognition", "compositional"), 0, 100, f"{where}, curve, {step}")
