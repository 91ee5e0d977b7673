"""Evaluation: the eleven benchmarks and the tiny world's for any checkpoint, and where a model looks.

    python eval.py bench sugarcrepe --model DIR --annotations DIR --images DIR    # also under torchrun
    python eval.py tiny --model out/KD/stage3    # scores, and similarity to the teacher
    python eval.py attention --model tiny/teacher --image FILE --question "What colour is the circle?"
    python eval.py analyse | story | chat        # analyses.py, chat.py

A caption pair is (true caption, hard negative) of one picture. A pair is right
    yes         if P(yes | true caption) > P(yes | negative), each asked alone
    choice      as often as its letter is preferred, offered as (A) and as (B)
    likelihood  if the true caption is the likelier reply to a request to describe the picture

`bench` asks what benchmarks.py reads and lets it score the replies. Each answer becomes a line of a JSONL
file as it comes: the same command goes on with it, and --score-only scores it without a model.
Shapes: R or B prompts, N pictures, T tokens, P visual tokens, C width, V vocabulary, k matched layers.
"""

import argparse
import fcntl
import glob
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import distill
import model
from checkpoint import BadInput, find, sentence
from evals import benchmarks
from qwen import Cache, Look
from tiny.world import COMPOSITION, DESCRIBE, RECOGNITION, caption_question, make_world
from train import DTYPES, pick_device
from training import recipes, resume

TINY = Path(__file__).parent / "tiny"  # the models that ship with the repository
BATCH = 256  # prompts scored at once

# ---------------------------------------------------------------- scorers


def prompt(vlm: model.VLM, picture: Path, question: str) -> dict:
    """A sample for collate: the picture and the question, ready to be answered."""
    ids = vlm.question_ids(question, picture=True)
    pixels = data.preprocess(picture, vlm.config.vision.image_size)
    return {"input_ids": ids, "labels": [data.IGNORE] * len(ids), "pixel_values": pixels}


def batches(samples: Iterable[dict], device: torch.device, size: int = BATCH):
    """Samples, made one batch at a time -> batches on the device."""
    samples = iter(samples)
    while chunk := list(islice(samples, size)):
        yield data.to_device(data.collate(chunk), device)


# ---------------------------------------------------------------- many prompts to few pictures


class Ask(NamedTuple):
    """One prompt."""

    picture: Path
    question: str  # what stands after "<image>\n"
    then: tuple[int, ...] = ()  # tokens put after the prompt: a caption to be scored, what options begin with


class Batch(NamedTuple):
    """R prompts of which all that they share has been read already."""

    ids: Tensor  # (R,T) the rest of each prompt and its `then`, padded on the right
    mask: Tensor  # (R,T) False = padding
    cache: Cache  # of what they share, R rows
    ends: list[int]  # R: which of T is the end of the prompt, which predicts what follows it
    thens: list[tuple[int, ...]]


class Pictures(torch.utils.data.Dataset):
    """The pictures of each batch, (N,3,S,S): decoded in a DataLoader's workers."""

    def __init__(self, files: list[list[Path]], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack([data.preprocess(file, self.size) for file in self.files[index]])


def words(vlm: model.VLM, text: str) -> list[int]:
    """The tokens of a reply, which begins with a space where the template has none before it."""
    space = " " if vlm.template == "chat" else ""
    return data.text_ids(vlm.tokenizer, space + text)


def by_picture(pictures: Sequence[Path], size: int) -> list[list[int]]:
    """The indices of prompts to these pictures in batches, those of one picture side by side."""
    place = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}
    order = sorted(range(len(pictures)), key=lambda i: place[pictures[i]])
    return [order[at : at + size] for at in range(0, len(order), size)]


def shared_once(
    vlm: model.VLM, asks: Sequence[Ask], chunks: list[list[int]], workers: int = 0
) -> Iterator[tuple[list[int], Batch]]:
    """The prompts in batches, each a list of their indices in `chunks`, pictures decoded by `workers`."""
    files = [list(dict.fromkeys(asks[i].picture for i in chunk)) for chunk in chunks]
    pictures = Pictures(files, vlm.config.vision.image_size)
    loader = torch.utils.data.DataLoader(pictures, batch_size=None, num_workers=workers)
    for chunk, some, pixels in zip(chunks, files, loader):
        row_of = {file: row for row, file in enumerate(some)}
        yield chunk, prefill(vlm, [asks[i] for i in chunk], [row_of[asks[i].picture] for i in chunk], pixels)


@torch.no_grad()
def prefill(vlm: model.VLM, asks: list[Ask], owner: list[int], pixels: Tensor) -> Batch:
    """R prompts to N pictures (N,3,S,S); owner: which picture each prompt is about.

    Template, picture and the beginning of the question are the same tokens in all prompts. They run once a
    picture; their keys and values then serve all its prompts: both orders, both captions, every question.
    """
    prompts = [vlm.question_ids(ask.question, picture=True) for ask in asks]
    shared = min(common(prompts), min(map(len, prompts)) - 1)  # the end of each prompt is still to be read
    cache = Cache(len(vlm.lm.model.layers))
    ids = torch.tensor([prompts[0][:shared]], device=vlm.device).expand(len(pixels), -1)
    vlm.lm.hidden(inputs_embeds=vlm.embed(ids, pixels.to(vlm.device)), cache=cache)
    rows = torch.tensor(owner, device=vlm.device)
    cache.visible = cache.visible[rows]
    for layer in cache.layers:
        layer[:] = [y[rows] for y in layer]  # (N,H,S,D) -> (R,H,S,D)
    rest = [torch.tensor([*ids[shared:], *ask.then]) for ids, ask in zip(prompts, asks)]
    mask = pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in rest], batch_first=True)
    ids = pad_sequence(rest, batch_first=True)
    ends = [len(ids) - shared - 1 for ids in prompts]
    return Batch(ids.to(vlm.device), mask.to(vlm.device), cache, ends, [ask.then for ask in asks])


def common(rows: list[list[int]]) -> int:
    """With how many equal tokens all rows begin."""
    first, last = min(rows), max(rows)  # in the order of a dictionary: what these two share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


@torch.no_grad()
def log_probabilities(vlm: model.VLM, batch: Batch) -> Iterator[Tensor]:
    """For each row (n+1,V): of what comes after the prompt, and after each of the n tokens of its `then`."""
    hidden, _ = vlm.lm.hidden(batch.ids, batch.mask, cache=batch.cache)  # (R,T,C)
    rows = [
        row[end : end + len(then) + 1] for row, end, then in zip(hidden, batch.ends, batch.thens)
    ]  # only there are logits needed
    for at in range(0, len(rows), 16):  # not all at once: V is 150,000
        some = rows[at : at + 16]
        logits = vlm.lm.head(torch.cat(some)).float()
        yield from logits.log_softmax(-1).split([len(row) for row in some])


def first_token(vlm: model.VLM, answer: str) -> int:
    """The first token of an answer."""
    return words(vlm, answer)[0]


# ---------------------------------------------------------------- scorers of one batch


class Options(NamedTuple):
    """The written options of a question as tokens: what all of them begin with, then one token each."""

    names: tuple[str, ...]
    lead: tuple[int, ...]
    tokens: list[list[int]]  # of each option: "yes" and "Yes", but only "A", since "a" is an article


def option_tokens(vlm: model.VLM, names: tuple[str, ...]) -> Options:
    """Where " A" is a token of its own there is no lead; a tokenizer that splits it has the space as lead."""
    forms = [{name} if len(name) == 1 else {name, name.lower(), name.capitalize()} for name in names]
    encoded = [[words(vlm, form) for form in sorted(some)] for some in forms]
    tokens = [[ids[0] for ids in some if len(ids) == 1] for some in encoded]
    if all(tokens):
        return Options(names, (), tokens)
    plain = [words(vlm, name) for name in names]
    n = common(plain)
    if any(len(ids) == n for ids in plain) or len({ids[n] for ids in plain}) < len(names):
        raise BadInput(
            f"the options {', '.join(names)} begin alike in this checkpoint's tokens; use --scorer generate"
        )
    return Options(names, tuple(plain[0][:n]), [[ids[n]] for ids in plain])


def choose(vlm: model.VLM, batch: Batch, options: list[Options]) -> list[tuple[str, dict, bool]]:
    """The option that greedy writing would choose if it had to choose one -> of each row the option, log P
    of every option, and whether the model would have begun with it unasked.
    """
    chosen = []
    for log_p, some in zip(log_probabilities(vlm, batch), options):
        scores = {name: log_p[-1, ids].max().item() for name, ids in zip(some.names, some.tokens)}
        *path, last = log_p.argmax(-1).tolist()
        free = tuple(path) == some.lead and any(last in ids for ids in some.tokens)
        chosen.append((max(scores, key=scores.get), scores, free))
    return chosen


def yes_odds(vlm: model.VLM, batch: Batch) -> list[float]:
    """log P(yes) / P(no) of each row, each the sum over its forms."""
    yes, no = option_tokens(vlm, ("yes", "no")).tokens
    rows = log_probabilities(vlm, batch)
    return [(log_p[-1, yes].logsumexp(0) - log_p[-1, no].logsumexp(0)).item() for log_p in rows]


def likelihoods(vlm: model.VLM, batch: Batch) -> list[tuple[float, int]]:
    """(log P, number of tokens) of what follows each prompt."""
    return [
        (log_p[range(len(then)), list(then)].sum().item(), len(then))
        for log_p, then in zip(log_probabilities(vlm, batch), batch.thens)
    ]


def write(vlm: model.VLM, batch: Batch, max_new_tokens: int) -> list[str]:
    """The greedy reply to each prompt."""
    new = vlm.generate(batch.ids, None, batch.mask, max_new_tokens, cache=batch.cache)
    return [vlm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in new.tolist()]


def described(vlm: model.VLM, picture: Path, question: str, caption: str) -> Ask:
    """The prompt whose reply is the caption, to its end of text."""
    return Ask(picture, question, (*words(vlm, caption.strip()), vlm.stop_ids[0]))


# ---------------------------------------------------------------- scorers of caption pairs


def of_all(vlm: model.VLM, asks: list[Ask], score: Callable, size: int = BATCH) -> list:
    """score(vlm, batch) of all prompts, in their order."""
    results = [None] * len(asks)
    for chunk, batch in shared_once(vlm, asks, by_picture([ask.picture for ask in asks], size)):
        for i, result in zip(chunk, score(vlm, batch)):
            results[i] = result
    return results


def paired_yes(vlm: model.VLM, pairs: list[tuple[Path, str, str]]) -> list[float]:
    """1.0 where P(yes) / (P(yes) + P(no)) is higher for the true caption; ties are wrong."""
    lead = option_tokens(vlm, ("yes", "no")).lead
    asks = [
        Ask(picture, caption_question(caption), lead) for picture, *captions in pairs for caption in captions
    ]
    odds = of_all(vlm, asks, yes_odds)
    return [float(true > wrong) for true, wrong in zip(odds[::2], odds[1::2])]


def choice_ab(vlm: model.VLM, pairs: list[tuple[Path, str, str]]) -> list[float]:
    """Both orders: 1.0, 0.5 or 0.0 for how often the true caption's letter is the likelier of A and B."""
    options = option_tokens(vlm, ("A", "B"))
    items = [
        item
        for picture, *captions in pairs
        for item in benchmarks.choices(benchmarks.Pair("", picture, tuple(captions), (), ""))
    ]
    asks = [Ask(item.image, item.question, options.lead) for item in items]
    chosen = of_all(vlm, asks, lambda vlm, batch: choose(vlm, batch, [options] * len(batch.ends)))
    margins = [scores["A"] - scores["B"] for _, scores, _ in chosen]
    return [((a > 0) + (b < 0)) / 2 for a, b in zip(margins[::2], margins[1::2])]


def caption_likelihood(vlm: model.VLM, pairs: list[tuple[Path, str, str]], mean: bool = False) -> list[float]:
    """1.0 where log P(caption | picture, DESCRIBE) is higher for the true caption; `mean`: per token."""
    asks = [described(vlm, picture, DESCRIBE, caption) for picture, *two in pairs for caption in two]
    scores = [total / (n if mean else 1) for total, n in of_all(vlm, asks, likelihoods, BATCH // 4)]
    return [float(true > wrong) for true, wrong in zip(scores[::2], scores[1::2])]


SCORERS = {
    "yes": paired_yes,
    "choice": choice_ab,
    "likelihood": caption_likelihood,
    "likelihood-per-token": partial(caption_likelihood, mean=True),
}


def exact_answers(vlm: model.VLM, items: list[tuple[Path, str, str]]) -> list[float]:
    """1.0 where the greedy answer to (picture, question) is the expected one, letter for letter."""
    asks = [Ask(picture, question) for picture, question, _ in items]
    replies = of_all(vlm, asks, partial(write, max_new_tokens=4))
    return [float(reply == answer) for reply, (_, _, answer) in zip(replies, items)]


# ---------------------------------------------------------------- the tiny world's benchmark


def tiny_items(world: Path, limit: int | None = None) -> tuple[dict, dict]:
    """-> two dicts by kind: of [(picture, question, answer)] and of [(picture, true caption, negative)]."""
    recognition = {kind: [] for kind in RECOGNITION}
    for item in data.read_records(world / "test" / "recognition.json"):
        recognition[item["kind"]].append((world / "images" / item["image"], item["question"], item["answer"]))
    composition = {}
    for kind in COMPOSITION:
        items = json.loads((world / "test" / f"{kind}.json").read_text(encoding="utf-8")).values()
        composition[kind] = [
            (world / "images" / i["filename"], i["caption"], i["negative_caption"]) for i in items
        ]
    return tuple({kind: rows[:limit] for kind, rows in items.items()} for items in (recognition, composition))


def tiny_scores(
    vlm: model.VLM, world: Path, scorer: str = "yes", limit: int | None = None
) -> dict[str, float]:
    """{kind: % right} with "recognition" and "compositional", the unweighted means over their kinds."""
    recognition, composition = tiny_items(world, limit)
    hits = {kind: exact_answers(vlm, items) for kind, items in recognition.items()}
    hits |= {kind: SCORERS[scorer](vlm, pairs) for kind, pairs in composition.items()}
    scores = {kind: 100 * sum(right) / len(right) for kind, right in hits.items()}
    scores["recognition"] = float(np.mean([scores[kind] for kind in RECOGNITION]))
    scores["compositional"] = float(np.mean([scores[kind] for kind in COMPOSITION]))
    return scores


@torch.no_grad()
def attention_similarity(
    student: model.VLM, teacher: model.VLM, world: Path, limit: int | None = 100
) -> float:
    """How much the student looks where its teacher looks, from -1 to 1.

    The mean cosine of attention over the picture, over the text queries of the first `limit` true captions of
    each kind and over the understanding layers, each against the mean of its teacher group.
    """
    layers = [distill.understanding_layers(len(vlm.lm.model.layers)) for vlm in (student, teacher)]
    groups = [[layer] for layer in layers[0]], distill.match_layers(*layers)
    _, composition = tiny_items(world, limit)
    pairs = [pair for kind in composition.values() for pair in kind]
    distance = count = 0
    samples = (prompt(student, picture, caption_question(true)) for picture, true, _ in pairs)
    for batch in batches(samples, student.device):
        queries = distill.query_rows(
            "text", batch["visual_columns"], batch["has_image"], batch["attention_mask"]
        )
        rows = distill.span(queries)
        looks = (Look(which, rows, batch["visual_columns"]) for which in groups)
        maps = (
            vlm.hidden(batch["input_ids"], batch["pixel_values"], look=look)[1]
            for vlm, look in zip((student, teacher), looks)
        )
        total, number = distill.visual_attention_loss(*maps, queries[:, rows], rowwise=True)
        distance, count = distance + total.item(), count + number.item()
    return 1 - distance / count


# ---------------------------------------------------------------- the eleven benchmarks

BENCH_SCORERS = "choice", "likelihood", "likelihood-per-token", "yes", "generate"
PAIR_SCORERS = BENCH_SCORERS[1:4]  # of captions, each alone; the other two write a reply to each question
SHOWS = 'Does this figure show "{}"? Please answer yes or no.'  # VQAScore's question, as BiVLC's code asks it
DESCRIBE_IMAGE = "Describe the image concisely."  # LLaVA's, of its caption data


class Question(NamedTuple):
    """One line of an answers file: what is known of it before the answer."""

    line: dict  # question_id, prompt and, of a caption's score, caption
    picture: Path
    options: tuple[str, ...]


def questions_of(units: list, scorer: str) -> dict[str, Question]:
    """Items -> {question_id: Question}; for a pair scorer pairs, whose i-th caption is question "key/i"."""
    if scorer not in PAIR_SCORERS:
        lines = [({"question_id": item.key, "prompt": item.question}, item) for item in units]
    else:
        prompt = SHOWS if scorer == "yes" else DESCRIBE_IMAGE
        lines = [
            ({"question_id": f"{pair.key}/{i}", "prompt": prompt.format(caption), "caption": caption}, pair)
            for pair in units
            for i, caption in enumerate(pair.captions)
        ]
    return {line["question_id"]: Question(line, u.image, getattr(u, "options", ())) for line, u in lines}


def answer(
    vlm: model.VLM, questions: list[Question], scorer: str, max_new_tokens: int, chunks, workers: int
) -> Iterator[tuple[Question, dict]]:
    """Questions in batches -> each with its part of the line: "text", or a caption's "score"."""
    names = {question.options for question in questions} if scorer == "choice" else {("yes", "no")}
    options = {some: option_tokens(vlm, some) for some in names} if scorer in ("choice", "yes") else {}

    def ask(question: Question) -> Ask:
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


def read_answers(file: Path) -> list[dict]:
    """The lines of an answers file; a last line that a killed run has cut is dropped."""
    lines, rows = file.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("question_id"), str | int)):
                raise ValueError("no object with a question_id")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise BadInput(f"{file}, line {number}: {error}; mend or remove the line") from None
    return rows


def parts_of(file: Path) -> list[Path]:
    """What the ranks of a run have written: rank 0 into the file itself."""
    others = file.parent.glob(glob.escape(file.name) + ".rank*")
    return [file] * file.exists() + sorted(others)


def lock(handle: IO, how: int) -> None:
    """A launcher may be killed and its ranks live on."""
    resume.hold(handle, how, f"{handle.name} is being written by another process; wait until it ends")


def answers_so_far(file: Path, run: dict, questions: dict[str, Question]) -> dict[str, dict]:
    """{question_id: line} of the file and of other ranks' parts; those of another run are refused."""
    answers = {}
    for part in parts_of(file):
        with open(part, "rb") as handle:
            lock(handle, fcntl.LOCK_SH)  # nobody writes to it
        for row in read_answers(part):
            if different := [name for name, value in run.items() if row.get(name) != value]:
                there, here = ({name: which.get(name) for name in different} for which in (row, run))
                raise BadInput(
                    f"{part} holds answers of another run ({there} there, {here} here); choose another "
                    "--answers, or score it as it is with --score-only"
                )
            if scored := run["scorer"] not in ("choice", "generate"):
                tokens = row.get("tokens", 1)
                sound = isinstance(row.get("score"), float) and isinstance(tokens, int) and tokens > 0
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
    resume.barrier()
    if resume.rank_and_ranks()[0] == 0:
        rows = [json.dumps(answers[key], ensure_ascii=False) + "\n" for key in order if key in answers]
        resume.write_atomically(file, "".join(rows))
        for part in parts_of(file)[1:]:
            part.unlink()
    resume.barrier()


def answer_file(
    args: argparse.Namespace, file: Path, chosen: dict[str, Question], everything: dict[str, Question]
) -> None:
    """Answer all that is not answered yet, a flushed line each; ranks share the batches."""
    rank, ranks = resume.rank_and_ranks()
    folder = find(args.model)
    run = {"benchmark": args.name, "scorer": args.scorer.removesuffix("-per-token")}
    run |= {"model": resume.fingerprint(folder), "precision": args.precision}
    resume.check_writable(file.parent)
    answers = answers_so_far(file, run, everything)
    write_answers(file, answers, everything)  # in place of a cut line and of other ranks' parts
    todo = [question for key, question in chosen.items() if key not in answers]
    if not todo:
        return
    vlm = load(str(folder), args.precision)
    chunks = by_picture([question.picture for question in todo], args.batch_size)[rank::ranks]
    most = benchmarks.BENCHMARKS[args.name].max_new_tokens
    number, started = sum(map(len, chunks)), time.perf_counter()
    mine = file.with_name(f"{file.name}.rank{rank}") if rank else file
    try:
        with open(mine, "a", encoding="utf-8") as out, tqdm(total=number, disable=rank > 0) as bar:
            lock(out, fcntl.LOCK_EX)
            for question, part in answer(vlm, todo, args.scorer, most, chunks, args.workers):
                row = {**question.line, **part, "model_id": str(args.model), **run}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                bar.update()
    except OSError as error:
        raise BadInput(f"{mine}: {error.strerror or error}; the same command goes on from here") from None
    if rank == 0:
        seconds = time.perf_counter() - started
        print(f"{number} answers in {seconds:.1f} s, {number / seconds:.1f} a second and process")
    resume.barrier()
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


def summarise(
    name: str, units: list, rows: list[dict], scorer: str, as_released: bool
) -> benchmarks.Summary:
    """The lines of an answers file -> what they are worth."""
    if scorer not in PAIR_SCORERS:
        return benchmarks.score(name, units, {row["question_id"]: row["text"] for row in rows}, as_released)
    divided = scorer == "likelihood-per-token"
    scores = {row["question_id"]: row["score"] / (row["tokens"] if divided else 1) for row in rows}
    ids = {pair.key: [f"{pair.key}/{i}" for i in range(len(pair.captions))] for pair in units}
    complete = {key: [scores[i] for i in some] for key, some in ids.items() if scores.keys() >= set(some)}
    return benchmarks.score_pairs(name, units, complete)


def bench(args: argparse.Namespace) -> None:
    """Answer and score, or only score: prints a table and writes a JSON."""
    if args.score_only:
        rows, file = read_answers(args.score_only), args.score_only
        args.scorer = args.scorer or next((row["scorer"] for row in rows if "scorer" in row), None)
        if args.scorer in PAIR_SCORERS:
            pairs = benchmarks.read_pairs(args.name, args.annotations, None, args.as_released)
            run = {"benchmark": args.name, "scorer": args.scorer.removesuffix("-per-token")}
            rows = [*answers_so_far(file, run, questions_of(pairs, args.scorer)).values()]
            summary = summarise(args.name, pairs, rows, args.scorer, args.as_released)
        else:
            summary = benchmarks.score_file(args.name, args.annotations, file, args.as_released)
    else:
        read = benchmarks.read_pairs if args.scorer in PAIR_SCORERS else benchmarks.read
        everything = read(args.name, args.annotations, args.images, args.as_released)
        if args.scorer not in PAIR_SCORERS:
            closed = all(item.options for item in everything)
            args.scorer = args.scorer or ("choice" if closed else "generate")
            if args.scorer == "choice" and not closed:
                raise BadInput(f"{args.name} asks for free answers; use --scorer generate")
        units = spread_out(everything, args.limit)
        asked, known = (questions_of(some, args.scorer) for some in (units, everything))
        kind = args.scorer.removesuffix("-per-token")  # which only divides: one file serves both
        file = args.answers or Path(f"out/bench/{args.name}.{kind}.jsonl")
        answer_file(args, file, asked, known)
        rows = [row for row in read_answers(file) if row["question_id"] in asked]
        summary = summarise(args.name, units, rows, args.scorer, args.as_released)
    if resume.rank_and_ranks()[0] > 0:
        return
    print(summary)
    notes = {"scorer": args.scorer, "answers": str(file), "model": args.model}
    if unasked := [row["unasked"] for row in rows if "unasked" in row]:
        notes["unasked"] = sum(unasked) / len(unasked)
        print(f"{100 * notes['unasked']:.1f} % of {len(rows)} replies began with an option unasked")
    per_token = ".per-token" if args.scorer == "likelihood-per-token" else ""
    out = args.out or file.with_suffix(f"{per_token}.scores.json")
    if out.exists() and out.samefile(file):
        raise BadInput(f"{out} holds the answers; choose another --out")
    resume.write_atomically(out, json.dumps(notes | summary.json(), indent=1))
    print(f"{file} and {out}")


# ---------------------------------------------------------------- where does it look?


@torch.no_grad()
def question_attention(vlm: model.VLM, picture: Image.Image | Path, question: str) -> np.ndarray:
    """Where the text after the picture looks: mean over heads, understanding layers and text queries.

    -> (side, side), the attention that falls on each patch.
    """
    (batch,) = batches([prompt(vlm, picture, question)], vlm.device)
    text = distill.query_rows("text", batch["visual_columns"], batch["has_image"], batch["attention_mask"])
    layers = distill.understanding_layers(len(vlm.lm.model.layers))
    look = Look([layers], distill.span(text), batch["visual_columns"])
    _, (attention,) = vlm.hidden(batch["input_ids"], batch["pixel_values"], look=look)  # (1,R,P)
    return on_patches(vlm, attention.mean((0, 1)))


def on_patches(vlm: model.VLM, attention: Tensor) -> np.ndarray:
    """(P,) -> (side, side) as the patches lie in the picture; one that the model drops gets 0."""
    side = vlm.config.vision.image_size // vlm.config.vision.patch_size
    attention = F.pad(attention.float().cpu(), (int(vlm.config.drop_first_patch), 0))
    return attention.view(side, side).numpy()


SIDE, GAP, HEAD = 240, 14, 44  # pixels: a picture's side, the space between two, the text above


def enlarge(picture: Image.Image) -> Image.Image:
    """To SIDE x SIDE; small pictures keep their pixels visible."""
    resample = Image.Resampling.NEAREST if picture.width < 100 else Image.Resampling.BICUBIC
    return picture.resize((SIDE, SIDE), resample)


def heat(picture: Image.Image, attention: np.ndarray) -> Image.Image:
    """The picture, bright where the attention (side, side) is high and dark where it is low."""
    weight = enlarge(Image.fromarray((255 * attention / attention.max()).astype(np.uint8)))
    bright = enlarge(picture)
    dark = Image.blend(bright, Image.new("RGB", bright.size, (25, 25, 45)), 0.75)
    return Image.composite(bright, dark, weight)


def attention_picture(models: dict[str, model.VLM], cases: list[tuple[Path, str]], file: Path) -> None:
    """One row per (picture, question): the picture, then where each model looks, above it its answer."""
    width, height = (SIDE + GAP) * (len(models) + 1) + GAP, (HEAD + SIDE + GAP) * len(cases) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (path, question) in enumerate(cases):
        picture, y = data.open_picture(path), GAP + row * (HEAD + SIDE + GAP)
        columns = [("\n".join(textwrap.wrap(question, 42)), enlarge(picture))]
        for name, vlm in models.items():
            answer = vlm.answer(picture, question, max_new_tokens=16)
            columns.append((f"{name}\n{answer}", heat(picture, question_attention(vlm, picture, question))))
        for column, (text, image) in enumerate(columns):
            x = GAP + column * (SIDE + GAP)
            pen.multiline_text((x, y), text, fill="black", font_size=13)
            sheet.paste(image, (x, y + HEAD))
    try:
        sheet.save(file)
    except OSError as error:
        raise BadInput(f"{file} could not be written ({error.strerror or error})") from None


# ---------------------------------------------------------------- tables and command line


def tiny_cases(world: Path) -> list[tuple[Path, str]]:
    """The questions of the main job's picture: true captions of three kinds, of different pictures."""
    _, composition = tiny_items(world)
    items = [composition["swap_att"][0], composition["replace_obj"][5], composition["swap_obj"][10]]
    return [(picture, caption_question(true)) for picture, true, _ in items]


def table(rows: dict[str, dict[str, float]]) -> str:
    """{method: scores} -> a Markdown table: the two averages, every composition kind, similarity to the
    teacher.
    """
    columns = ["recognition", "compositional", *COMPOSITION, "similarity"]
    lines = ["| " + " | ".join(["", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in rows.items():
        cells = [f"{scores[column]:.1f}" for column in columns[:-1]]
        cells.append(f"{scores['similarity']:.2f}" if "similarity" in scores else "")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from evals import analyses, chat  # both import this file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tiny = commands.add_parser(
        "tiny", help="scores on the tiny world, and the similarity of its attention to the teacher's"
    )
    tiny.add_argument("--model", required=True, help="checkpoint folder or hub name")
    tiny.add_argument(
        "--teacher",
        default=str(TINY / "teacher"),
        help="whose attention to compare with (default: %(default)s)",
    )
    tiny.add_argument(
        "--world", type=Path, default=Path("out/world"), help="made if it is not there (default: %(default)s)"
    )
    tiny.add_argument(
        "--scorer", choices=list(SCORERS), default="yes", help="of the caption pairs (default: %(default)s)"
    )
    tiny.add_argument(
        "--limit", type=int, choices=range(1, 10**6), metavar="N", help="items per kind (default: all)"
    )
    look = commands.add_parser("attention", help="a picture of where models look when they answer a question")
    look.add_argument(
        "--model", nargs="+", required=True, help="one or several checkpoint folders or hub names"
    )
    look.add_argument("--image", type=Path, required=True)
    look.add_argument("--question", required=True)
    look.add_argument(
        "--save", type=Path, default=Path("attention.png"), help="PNG to write (default: %(default)s)"
    )
    add_bench_arguments(commands)
    analyses.add_arguments(commands)
    chat.add_arguments(commands)
    args = parser.parse_args(argv)
    if args.command == "bench" and not args.score_only and not (args.model and args.images):
        parser.error("bench asks a model about pictures: give --model and --images, or --score-only")
    return args


def add_bench_arguments(commands) -> None:
    command = commands.add_parser("bench", help="one of the eleven benchmarks, from its native files")
    whole, add = recipes.number(int, 1), command.add_argument
    add("name", choices=list(benchmarks.BENCHMARKS))
    add("--annotations", type=Path, required=True, help="file or folder, as benchmarks.py says")
    add("--images", type=Path, help="folder of the pictures")
    add("--model", help="checkpoint folder or hub name")
    add("--scorer", choices=BENCH_SCORERS, help="(default: choice; generate where answers are free)")
    add("--answers", type=Path, metavar="JSONL", help="(default: out/bench/NAME.SCORER.jsonl)")
    add("--score-only", type=Path, metavar="JSONL", help="score these answers, ours or LLaVA's; no model")
    add("--out", type=Path, metavar="JSON", help="the summary (default: beside the answers, .scores.json)")
    add("--limit", type=whole, metavar="N", help="about N pairs or questions, evenly spread (default: all)")
    add("--batch-size", type=whole, default=32, help="questions at a time (default: %(default)s)")
    add("--workers", type=recipes.number(int, 0), default=0, help="that decode pictures (default: 0)")
    add("--precision", choices=list(DTYPES), default="fp32", help="(default: %(default)s)")
    add("--as-released", action="store_true", help="the released texts and parser, stray white space and all")


def load(name: str, precision: str = "fp32") -> model.VLM:
    """A checkpoint that can be asked questions, on the GPU (under torchrun this rank's) if there is one."""
    vlm = model.load(name, DTYPES[precision], pick_device())
    vlm.require_tokenizer()
    return vlm


def main(argv: list[str] | None = None) -> None:
    from evals import analyses, chat  # both import this file

    args = parse_args(argv)
    try:
        if args.command == "tiny":
            vlm, teacher = load(args.model), load(args.teacher)
            world = make_world(args.world)
            scores = tiny_scores(vlm, world, args.scorer, args.limit)
            try:
                scores["similarity"] = attention_similarity(vlm, teacher, world, args.limit or 100)
            except (
                ValueError
            ) as error:  # of another size or depth than this teacher: scores there are all the same
                print(f"no similarity to {args.teacher}: {error}")
            print(table({str(args.model): scores}))
        elif args.command == "bench":
            if "RANK" in os.environ:  # started by torchrun
                dist.init_process_group("gloo")  # only for barriers
            bench(args)
        elif args.command == "chat":
            chat.run(args)
        elif args.command in ("analyse", "story"):
            analyses.run(args)
        else:
            models = {name: load(name) for name in args.model}
            attention_picture(models, [(args.image, args.question)], args.save)
            print(args.save)
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError) as error:  # BadInput among them
        sys.exit(f"error: {sentence(error)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
