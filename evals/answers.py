"""The eleven benchmarks: a model answers what benchmarks.py reads, and benchmarks.py scores the replies.

Each answer becomes a line of a JSONL file as it comes: the same command goes on with it, and --score-only
scores it without a model. Under torchrun the ranks share the questions, each with a file of its own.
"""

import argparse
import fcntl
import glob
import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

import model
from evals import benchmarks
from evals.readers import answer_lines
from evals.scorers import (
    Ask,
    by_picture,
    choose,
    described,
    likelihoods,
    load,
    option_tokens,
    shared_once,
    write,
    yes_odds,
)
from model import DTYPES
from support.checkpoint import find, fingerprint
from support.errors import BadInput, one_line
from support.files import check_output, lock_file, open_file, write_atomically
from support.program import number
from support.ranks import agree, barrier, rank_and_ranks

BENCH_SCORERS = "choice", "likelihood", "likelihood-per-token", "yes", "generate"
PAIR_SCORERS = BENCH_SCORERS[1:4]  # of captions, each alone; the other two write a reply to each question
SHOWS = 'Does this figure show "{}"? Please answer yes or no.'  # VQAScore's question, as BiVLC's code asks it
DESCRIBE_IMAGE = "Describe the image concisely."  # LLaVA's, of its caption data


class Line(NamedTuple):
    """One line of an answers file: what is known of it before the answer."""

    line: dict  # question_id, prompt and, of a caption's score, caption
    picture: Path
    options: tuple[str, ...]


def questions_of(units: list, scorer: str) -> dict[str, Line]:
    """Items -> {question_id: Line}; for a pair scorer pairs, whose i-th caption is question "key/i"."""
    if scorer not in PAIR_SCORERS:
        lines = [({"question_id": item.key, "prompt": item.question}, item) for item in units]
    else:
        prompt = SHOWS if scorer == "yes" else DESCRIBE_IMAGE
        lines = [
            ({"question_id": f"{pair.key}/{i}", "prompt": prompt.format(caption), "caption": caption}, pair)
            for pair in units
            for i, caption in enumerate(pair.captions)
        ]
    return {line["question_id"]: Line(line, u.image, getattr(u, "options", ())) for line, u in lines}


def answer(
    vlm: model.VLM, questions: list[Line], scorer: str, max_new_tokens: int, chunks, workers: int
) -> Iterator[tuple[Line, dict]]:
    """Questions in batches -> each with its part of the line: "text", or a caption's "score"."""
    names = {question.options for question in questions} if scorer == "choice" else {("yes", "no")}
    options = {some: option_tokens(vlm, some) for some in names} if scorer in ("choice", "yes") else {}

    def ask(question: Line) -> Ask:
        if scorer.startswith("likelihood"):
            return described(vlm, question.picture, DESCRIBE_IMAGE, question.line["caption"])
        some = options.get(question.options if scorer == "choice" else ("yes", "no"))
        return Ask(question.picture, question.line["prompt"], some.lead if some else ())

    for chunk, batch in shared_once(vlm, [ask(question) for question in questions], chunks, workers):
        some = [questions[i] for i in chunk]
        if scorer == "generate":
            parts = [{"text": text} for text in write(vlm, batch, max_new_tokens)]
        elif scorer == "choice":
            chosen = choose(vlm, batch, [options[question.options] for question in some])
            parts = [{"text": text, "unasked": free, "log_p": log_p} for text, log_p, free in chosen]
        elif scorer == "yes":
            odds = yes_odds(vlm, batch)
            parts = [{"text": "yes" if score > 0 else "no", "score": score} for score in odds]
        else:
            parts = [{"score": score, "tokens": n} for score, n in likelihoods(vlm, batch)]
        yield from zip(some, parts)


def parts_of(file: Path) -> list[Path]:
    """The files that the ranks of a run have written: rank 0 the file itself, each other one a part."""
    others = file.parent.glob(glob.escape(file.name) + ".rank*")
    return [file] * file.exists() + sorted(part for part in others if part.suffix[5:].isdecimal())


def lock_answers(handle: IO, how: int) -> None:
    """Lock an open answers file: ranks may still write to it after their launcher was killed."""
    lock_file(handle, how, f"{handle.name} is being written by another process; wait until it ends")


def answers_so_far(file: Path, run: dict, questions: dict[str, Line]) -> dict[str, dict]:
    """{question_id: line} of the file and of other ranks' parts; those of another run are refused."""
    answers = {}
    for part in parts_of(file):
        with open_file(part) as handle:
            lock_answers(handle, fcntl.LOCK_SH)  # nobody writes to it
        for _, row in answer_lines(part):
            if different := [name for name, value in run.items() if row.get(name) != value]:
                there = {name: row.get(name) for name in different}
                here = {name: run[name] for name in different}
                raise BadInput(
                    f"{part} holds answers of another run ({there} there, {here} here); choose another "
                    "--answers, or score it as it is with --score-only"
                )
            if scored := run["scorer"] not in ("choice", "generate"):
                tokens = row.get("tokens", 1)
                sound = isinstance(row.get("score"), float) and isinstance(tokens, int) and 0 < tokens < 1e9
            else:
                sound = isinstance(row.get("text"), str)
            if not sound:
                raise BadInput(
                    f"{part}: the answer to {row['question_id']!r} has no {'score' if scored else 'text'}; "
                    "remove its line, and the same command asks again"
                )
            known = questions.get(row["question_id"])
            if known is None or any(row.get(name) != value for name, value in known.line.items()):
                raise BadInput(
                    f"{part} answers another question {row['question_id']!r} than these annotations ask; "
                    "choose another --answers, or the annotations and flags that it was made with"
                )
            answers.setdefault(row["question_id"], row)
    return answers


def write_answers(file: Path, answers: dict[str, dict], order: Iterable[str]) -> None:
    """All answers in one file, in the benchmark's order, then the ranks' parts go. All ranks call."""
    barrier()
    if rank_and_ranks()[0] == 0:
        rows = [json.dumps(answers[key], ensure_ascii=False) + "\n" for key in order if key in answers]
        write_atomically(file, "".join(rows))
        for part in parts_of(file)[1:]:
            part.unlink()
    barrier()


def answer_file(
    args: argparse.Namespace, file: Path, chosen: dict[str, Line], everything: dict[str, Line]
) -> None:
    """Answer all that is not answered yet, a flushed line each; ranks share the batches."""
    rank, ranks = rank_and_ranks()
    folder = find(args.model)
    run = {"benchmark": args.name, "scorer": args.scorer.removesuffix("-per-token")}
    run |= {"model": fingerprint(folder), "precision": args.precision}
    agree(run | {"batch size": args.batch_size, "questions": len(chosen)})
    check_output(file, b'{"question_id": ')
    answers = answers_so_far(file, run, everything)
    write_answers(file, answers, everything)  # in place of a cut line and of other ranks' parts
    todo = [question for key, question in chosen.items() if key not in answers]
    if not todo:
        return
    vlm = load(str(folder), args.precision)
    chunks = by_picture([question.picture for question in todo], args.batch_size)[rank::ranks]
    most = benchmarks.BENCHMARKS[args.name].max_new_tokens
    todo_here, started = sum(map(len, chunks)), time.perf_counter()
    mine = file.with_name(f"{file.name}.rank{rank}") if rank else file
    try:
        with open(mine, "a", encoding="utf-8") as out, tqdm(total=todo_here, disable=rank > 0) as bar:
            lock_answers(out, fcntl.LOCK_EX)
            for question, part in answer(vlm, todo, args.scorer, most, chunks, args.workers):
                row = {**question.line, **part, "model_id": str(args.model), **run}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                bar.update()
    except OSError as error:
        raise BadInput(f"{mine}: {error.strerror or error}; the same command goes on from here") from None
    if rank == 0:
        seconds = time.perf_counter() - started
        print(f"{todo_here} answers in {seconds:.1f} s, {todo_here / seconds:.1f} a second and process")
    barrier()
    write_answers(file, answers_so_far(file, run, everything), everything)


def spread_out(units: list, limit: int | None) -> list:
    """Items or pairs of about `limit` units, evenly over the benchmark; what counts together stays so."""

    def together(unit) -> str:
        truth = getattr(unit, "answer", unit)
        return truth.square or getattr(truth, "unit", "") or unit.key

    names = list(dict.fromkeys(map(together, units)))
    if not limit or limit >= len(names):
        return units
    kept = {names[i * len(names) // limit] for i in range(limit)}
    return [unit for unit in units if together(unit) in kept]


def summarise(name: str, units: list, rows: list[dict], scorer: str, as_released: bool) -> benchmarks.Summary:
    """The lines of an answers file -> what they are worth."""
    if scorer not in PAIR_SCORERS:
        return benchmarks.score(name, units, {row["question_id"]: row["text"] for row in rows}, as_released)
    divided = scorer == "likelihood-per-token"
    scores = {row["question_id"]: row["score"] / (row["tokens"] if divided else 1) for row in rows}
    ids = {pair.key: [f"{pair.key}/{i}" for i in range(len(pair.captions))] for pair in units}
    complete = {key: [scores[i] for i in some] for key, some in ids.items() if scores.keys() >= set(some)}
    return benchmarks.score_pairs(name, units, complete)


def summary_file(args: argparse.Namespace, file: Path) -> Path:
    """Where the summary goes; refused before any work where it cannot."""
    kind = ".per-token" * (args.scorer == "likelihood-per-token") + ".as-released" * args.as_released
    out = args.out or file.with_suffix(f"{kind}.scores.json")
    check_output(out, b'{\n "answers": ', [file, args.annotations])
    return out


def ask_and_score(args: argparse.Namespace) -> tuple[benchmarks.Summary, list[dict], Path, Path]:
    """Let the model answer -> the summary, the lines that it is about, their file, where the summary goes."""
    read = benchmarks.read_pairs if args.scorer in PAIR_SCORERS else benchmarks.read
    everything = read(args.name, args.annotations, args.images, args.as_released)
    if args.scorer not in PAIR_SCORERS:
        closed = all(item.options for item in everything)
        args.scorer = args.scorer or ("choice" if closed else "generate")
        if args.scorer == "choice" and not closed:
            raise BadInput(f"{args.name} asks for free answers; use --scorer generate")
    units = spread_out(everything, args.limit)
    asked, known = questions_of(units, args.scorer), questions_of(everything, args.scorer)
    kind = args.scorer.removesuffix("-per-token")  # which only divides: one file serves both
    model_name = re.sub(r"\W+", "-", args.model).strip("-")
    file = args.answers or Path(f"out/bench/{args.name}.{model_name}.{kind}.jsonl")
    out = summary_file(args, file)
    answer_file(args, file, asked, known)
    rows = [row for _, row in answer_lines(file) if row["question_id"] in asked]
    summary = summarise(args.name, units, rows, args.scorer, args.as_released)
    summary.notes.extend(benchmarks.prompt_notes(args.name, [row["prompt"] for row in rows]))
    return summary, rows, file, out


def only_score(args: argparse.Namespace) -> tuple[benchmarks.Summary, list[dict], Path, Path]:
    """Score any file of answers (--score-only), ours or LLaVA's, without a model -> as ask_and_score."""
    file = args.score_only
    rows = [row for _, row in answer_lines(file)]
    if others := {str(row["benchmark"]) for row in rows if "benchmark" in row} - {args.name}:
        raise BadInput(f"{file} answers {', '.join(sorted(others))}, not {args.name}; score it as that")
    args.scorer = args.scorer or next((row["scorer"] for row in rows if "scorer" in row), None)
    out = summary_file(args, file)
    if args.scorer not in PAIR_SCORERS:
        summary = benchmarks.score_file(args.name, args.annotations, file, args.as_released)
        return summary, rows, file, out
    if not any("score" in row for row in rows):
        raise BadInput(f"{file} has no scores of captions; leave --scorer out")
    pairs = benchmarks.read_pairs(args.name, args.annotations, None, args.as_released)
    run = {"benchmark": args.name, "scorer": args.scorer.removesuffix("-per-token")}
    rows = [*answers_so_far(file, run, questions_of(pairs, args.scorer)).values()]
    return summarise(args.name, pairs, rows, args.scorer, args.as_released), rows, file, out


def bench(args: argparse.Namespace) -> None:
    """Answer and score, or only score: prints a table and writes a JSON."""
    summary, rows, file, out = only_score(args) if args.score_only else ask_and_score(args)
    if rank_and_ranks()[0] > 0:
        return
    print(summary)
    how = {name: getattr(args, name) for name in ("scorer", "as_released", "limit")}
    made = {name: rows[0].get(name) for name in ("model_id", "precision")}
    notes = {"answers": str(file), **how, **made}
    if unasked := [row["unasked"] for row in rows if isinstance(row.get("unasked"), bool)]:
        notes["unasked"] = sum(unasked) / len(unasked)
        print(f"{100 * notes['unasked']:.1f} % of {len(rows)} replies began with an option unasked")
    write_atomically(out, json.dumps(notes | summary.json(), indent=1))
    print(one_line(f"{file} and {out}"))


def add_arguments(commands) -> None:
    command = commands.add_parser("bench", help="one of the eleven benchmarks, from its native files")
    whole, size, add = number(int, 1), number(int, 1, 1e5), command.add_argument
    add("name", choices=list(benchmarks.BENCHMARKS))
    add("--annotations", type=Path, required=True, help="file or folder, as readers.py says")
    add("--images", type=Path, help="folder of the pictures")
    add("--model", help="checkpoint folder or hub name")
    add("--scorer", choices=BENCH_SCORERS, help="(default: choice; generate where answers are free)")
    add("--answers", type=Path, metavar="JSONL", help="(default: out/bench/NAME.MODEL.SCORER.jsonl)")
    add("--score-only", type=Path, metavar="JSONL", help="score these answers, ours or LLaVA's; no model")
    add("--out", type=Path, metavar="JSON", help="the summary (default: beside the answers, .scores.json)")
    add("--limit", type=whole, metavar="N", help="about N pairs or questions, evenly spread (default: all)")
    add("--batch-size", type=size, default=32, help="questions at a time (default: %(default)s)")
    add("--workers", type=number(int, 0, 1000), default=0, help="that decode pictures (default: 0)")
    add("--precision", choices=list(DTYPES), default="fp32", help="(default: %(default)s)")
    add("--as-released", action="store_true", help="the released texts, and parser of --scorer generate")
