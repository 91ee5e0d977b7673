"""The paper's five analyses of attention (its section 3). tiny/story.py says what follows on the tiny world.

    python eval.py analyse similarity groups    # figures (PNG) and their numbers (CSV, JSON)
    python -m tiny story                        # all five, the scores, one report of what holds

    attention     of the answering position over picture and text, by layer                  paper, Fig. 3a
    similarity    cosine of teacher's and student's attention, by layer                       Fig. 3b-e
    groups        items grouped by similarity -> probability of the right answer              Fig. 4
    intervention  visual attention mixed with the teacher's at inference (Guided)             Fig. 5
    picture       where teacher and students look                                             Fig. 2, 7

Attention is a head mean throughout. Its *text rows* are the queries after the picture, up to and including
the *answering position*, which predicts the first word of the answer; cosines are taken row by row and
averaged over them. A student's understanding layers (--layers) are compared with their teacher groups, as in
training; any other layer with the teacher's layer at the same relative depth. An item is a recognition
question or a caption pair, both captions asked. Intervals hold 95 %: bootstrap over pictures, RESAMPLES
times.

No map with heads outlives its layer, nor one of all rows: lean.VisualAttention leaves (B,R,T). Only the
intervention holds maps (B,T,P) of the understanding layers; give large models a small --batch-size there.
Shapes: B questions, T tokens, R text rows, P visual tokens, L layers, n questions or items.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import distill
import lean
import model
from distill import DEPTH_RANGES, METHODS, Method
from evals import benchmarks, figures, pictures, scorers
from evals.answers import SHOWS
from lean import VisualAttention
from qwen import probabilities
from support.errors import BadInput, one_line
from support.files import whole_folder
from support.program import number
from support.world import TINY, caption_question, make_world, tiny_items

PLAIN, ALIGNED = ("sft", "kd"), ("compodistill", "compodistill-rows")  # what `python -m tiny` trains
WAYS = {  # of the intervention: whose head-mean maps stand in for visual attention, and their share
    "as it is": ("", 0.0),
    "mean": ("teacher", 0.5),  # the paper's
    "full": ("teacher", 1.0),
    "own mean": ("own", 0.5),  # a control: what averaging over heads does, without a teacher
    "other picture": ("stranger", 0.5),  # a control: where the teacher looks in another picture
}
GROUPS, RESAMPLES = 5, 1000
TEACHER = str(TINY / "teacher")


class Question(NamedTuple):
    """One question about one picture. Of a caption pair there are two, one after the other: true first."""

    picture: Path
    text: str
    answer: str  # the right one
    kind: str


def world_questions(world: Path, limit: int | None = None) -> dict[str, list[Question]]:
    """The tiny world's test -> {"recognition": questions, "compositional": both captions of every pair}."""
    recognition, composition = tiny_items(world, limit)
    single = [Question(*item, kind) for kind, items in recognition.items() for item in items]
    pairs = [
        Question(picture, caption_question(caption), answer, kind)
        for kind, items in composition.items()
        for picture, true, negative in items
        for caption, answer in ((true, "yes"), (negative, "no"))
    ]
    return {"recognition": single, "compositional": pairs}


def benchmark_questions(
    sugarcrepe: tuple[Path, Path] | None, gqa: tuple[Path, Path] | None, limit: int | None = None
) -> dict[str, list[Question]]:
    """Questions of SugarCrepe (compositional) and GQA (recognition), each from annotations and pictures."""
    questions = {}
    if gqa:
        items = [(item.image, item.question, item.answer) for item in benchmarks.read("gqa", *gqa)]
        rows = [Question(picture, text, truth.label, truth.rows[-1]) for picture, text, truth in items]
        questions["recognition"] = first_of_each_kind(rows, limit)
    if sugarcrepe:
        rows = [
            Question(pair.image, SHOWS.format(caption), answer, pair.rows[0])
            for pair in benchmarks.read_pairs("sugarcrepe", *sugarcrepe)
            for caption, answer in zip(pair.captions, ("yes", "no"))
        ]
        questions["compositional"] = first_of_each_kind(rows, limit and 2 * limit)
    return questions


def first_of_each_kind(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions of each kind, the first ones."""
    kinds = dict.fromkeys(question.kind for question in questions)
    return [q for kind in kinds for q in [q for q in questions if q.kind == kind][:limit]]


# ---------------------------------------------------------------- what the models do


PAPER = METHODS["compodistill"]  # what analyses compare unless they are told another method


def matched(student_depth: int, teacher_depth: int, method: Method = PAPER) -> list[list[int]]:
    """For each student layer the teacher layers that it is compared with, as their mean.

    In the layers that the method aligns its group (distill.match_layers), elsewhere the one layer at the same
    relative depth.
    """
    layers = [[int((i + 0.5) / student_depth * teacher_depth)] for i in range(student_depth)]
    aligned, of_teacher = distill.aligned_layers(method, student_depth, teacher_depth)
    for i, group in zip(aligned, distill.match_layers(aligned, of_teacher, method.matching)):
        layers[i] = group
    return layers


class Observed(NamedTuple):
    """One model over n questions, one number a layer for most."""

    probability: np.ndarray  # (n,) of the right answer, all its tokens; of yes and no, against the other
    mass: dict[str, np.ndarray]  # image, before it, after it -> (n,L), of the answering position; sums to 1
    cosine: dict[str, np.ndarray]  # image, text -> (n,L), to the teacher; {} for the teacher itself
    layers: list[int]  # those that the method aligns


def answered(vlm: model.VLM, question: Question) -> dict:
    """A sample for collate: the prompt, and the right answer as its labels."""
    sample = scorers.prompt(vlm, question.picture, question.text)
    answer = scorers.words(vlm, question.answer)
    vlm.check_length(len(sample["input_ids"]) + len(answer), f"the answer {f'{question.answer!r}':.60}")
    labels = sample["labels"] + answer
    return {**sample, "input_ids": sample["input_ids"] + answer, "labels": labels, "id": question.answer}


@torch.no_grad()
def observe(
    teacher: model.VLM,
    students: dict[str, model.VLM],
    questions: list[Question],
    size: int = 128,
    method: Method = PAPER,
) -> dict[str, Observed]:
    """Analyses 1 to 3 in one pass: {"teacher" and each student: Observed}; `size` questions at a time."""
    models = {"teacher": teacher, **students}
    found = {name: [] for name in models}
    options = scorers.option_tokens(teacher, ("yes", "no"))
    samples = (answered(teacher, question) for question in questions)
    for batch in scorers.batches(samples, teacher.device, size):
        position = torch.arange(batch["input_ids"].shape[1], device=teacher.device)
        first = (batch["labels"] != data.IGNORE).long().argmax(1, keepdim=True)  # (B,1), of the answer
        columns, real = batch["visual_columns"], batch["attention_mask"]
        queries = distill.query_rows(batch, "text") & (position < first)
        rows = lean.shortest_slice(queries)
        keys = {"image": (position >= columns[:, :1]) & (position <= columns[:, -1:])}  # (B,T) each
        parts = keys | {"before": position < columns[:, :1], "after": (position > columns[:, -1:]) & real}
        keys["text"] = parts["before"] | parts["after"]
        answering = torch.arange(len(first), device=first.device), first[:, 0] - 1 - rows.start
        attend = VisualAttention(rows, position.expand(len(first), -1))  # text rows, every column
        for name, vlm in models.items():
            every = dict.fromkeys(range(vlm.config.text.num_hidden_layers), attend)
            out = vlm(batch["input_ids"], batch["pixel_values"], attention=every, logits=False)
            hidden, maps = out.hidden, list(out.attentions.values())  # (B,T,C), L of (B,R,T)
            mass = {part: [(m[answering] * where).sum(1) for m in maps] for part, where in parts.items()}
            cosine = {}
            if vlm is teacher:
                theirs = maps
            else:
                groups = matched(len(maps), len(theirs), method)
                goals = [sum(theirs[i] for i in group) / len(group) for group in groups]
                for part, where in keys.items():
                    pairs = [[m * where[:, None] for m in both] for both in zip(maps, goals)]
                    cosine[part] = [rows_mean(distill.cosine(*both), queries[:, rows]) for both in pairs]
            right = answer_probability(vlm, hidden, batch["labels"])
            yes = yes_over_no(vlm, hidden, first[:, 0] - 1 + len(options.lead), options).sigmoid()
            for answer, p in (("yes", yes), ("no", 1 - yes)):
                asked = torch.tensor([it == answer for it in batch["ids"]], device=right.device)
                right = torch.where(asked, p, right)
            found[name].append((right, mass, cosine))
    for name, parts in found.items():
        model.finite(torch.cat([part[0] for part in parts]), models[name].name)
    seen = {}
    for name, parts in found.items():
        own = models[name].config.text.num_hidden_layers
        layers = distill.choose_layers(method.layers, own, teacher=name == "teacher")
        seen[name] = gathered(parts, layers)
    return seen


def rows_mean(values: Tensor, queries: Tensor) -> Tensor:
    """(B,R) -> (B,): the mean over the rows that count."""
    return (values * queries).sum(1) / queries.sum(1)


def answer_probability(vlm: model.VLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """P(all tokens of the answer), one after the other: hidden (B,T,C), labels (B,T) -> (B,)."""
    targets = distill.next_tokens(labels)
    rows, columns = (targets != data.IGNORE).nonzero(as_tuple=True)
    logits = vlm.lm.head(hidden[rows, columns]).float()
    loss = F.cross_entropy(logits, targets[rows, columns], reduction="none")
    return torch.zeros(len(hidden), device=loss.device).index_add_(0, rows, -loss).exp()


def gathered(batches: list[tuple], layers: list[int]) -> Observed:
    """The batches' (B,) and {name: L of (B,)} -> arrays over all questions."""

    def joined(parts: list[dict]) -> dict[str, np.ndarray]:
        names = parts[0].keys()
        return {
            name: torch.cat([torch.stack(part[name], 1) for part in parts]).cpu().numpy() for name in names
        }

    probabilities, masses, cosines = zip(*batches)
    return Observed(torch.cat(probabilities).cpu().numpy(), joined(masses), joined(cosines), layers)


@dataclass(frozen=True)
class Guided:
    """An AttentionFunction (qwen.py) that changes what its layer computes: visual attention from outside."""

    maps: Tensor  # (B,T,P), head means, every query row
    columns: Tensor  # (B,P) key tokens: the visual tokens; every sample has a picture
    share: float  # of these maps in the result: 0.5 is the mean of both, 1.0 a full replacement

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        return self.mixed(probabilities(q, k, mask)).to(v.dtype) @ v, None

    def mixed(self, attention: Tensor) -> Tensor:
        """A' of the intervention (paper, section 3): A (B,H,T,S) -> (B,H,T,S), every row sums to 1.

        On the visual columns (1 - share) A + share M, with the same M for all heads; on the text columns A;
        then each row is divided by its sum.
        """
        columns = self.columns[:, None, None].expand(*attention.shape[:3], -1)  # (B,H,T,P)
        visual = torch.lerp(attention.gather(3, columns), self.maps[:, None], self.share)
        attention = attention.scatter(3, columns, visual)
        return attention / attention.sum(-1, keepdim=True)


@torch.no_grad()
def intervene(
    teacher: model.VLM,
    students: dict[str, model.VLM],
    questions: list[Question],
    size: int = 128,
    method: Method = PAPER,
) -> dict[str, dict[str, np.ndarray]]:
    """Analysis 4: {model: {key of WAYS: log P(yes) / P(no) (n,)}}; of the teacher only "as it is".

    In each understanding layer of a student what is mixed in is the mean map of that layer's teacher group,
    or, as controls, the student's own map as it was, and the teacher's for the same words and another
    picture.
    """
    found = {"teacher": {"as it is": []}} | {name: {way: [] for way in WAYS} for name in students}
    depth = teacher.config.text.num_hidden_layers
    of_teacher = distill.choose_layers(method.layers, depth, teacher=True)
    options = scorers.option_tokens(teacher, ("yes", "no"))
    streams = (
        scorers.batches(prompts(teacher, asked, options.lead), teacher.device, size)
        for asked in (questions, with_other_pictures(questions))
    )
    for batch, other in zip(*streams):
        ids, columns = batch["input_ids"], batch["visual_columns"]
        last = batch["attention_mask"].sum(1) - 1
        attend = VisualAttention(slice(0, ids.shape[1]), columns)  # (B,T,P) a layer
        looked_at = dict.fromkeys(of_teacher, attend)
        out = teacher(ids, batch["pixel_values"], attention=looked_at, logits=False)
        found["teacher"]["as it is"].append(yes_over_no(teacher, out.hidden, last, options))
        theirs = {"teacher": out.attentions}
        out = teacher(ids, other["pixel_values"], attention=looked_at, logits=False)
        theirs["stranger"] = out.attentions
        for name, vlm in students.items():
            layers, _ = distill.aligned_layers(method, vlm.config.text.num_hidden_layers, depth)
            groups = distill.match_layers(layers, of_teacher, method.matching)
            goals = {who: distill.group_mean(maps, groups) for who, maps in theirs.items()}
            embeds = vlm.embed(ids, batch["pixel_values"])
            plain = vlm.lm(inputs_embeds=embeds, attention=dict.fromkeys(layers, attend), logits=False)
            goals["own"] = list(plain.attentions.values())
            for way, (whose, share) in WAYS.items():
                out = plain
                if share:
                    guides = {i: Guided(goal, columns, share) for i, goal in zip(layers, goals[whose])}
                    out = vlm.lm(inputs_embeds=embeds, attention=guides, logits=False)
                found[name][way].append(yes_over_no(vlm, out.hidden, last, options))
    joined = {name: {way: torch.cat(x) for way, x in ways.items()} for name, ways in found.items()}
    models = {"teacher": teacher, **students}
    for name, ways in joined.items():
        model.finite(torch.cat(list(ways.values())), models[name].name)
    return {name: {way: x.cpu().numpy() for way, x in ways.items()} for name, ways in joined.items()}


def with_other_pictures(questions: list[Question]) -> list[Question]:
    """The same questions, each with another picture: the one half the list of pictures away."""
    own = list(dict.fromkeys(question.picture for question in questions))
    if len(own) < 2:
        raise BadInput("the intervention's control needs two pictures; give a larger --limit")
    half = len(own) // 2
    other = dict(zip(own, own[half:] + own[:half]))
    return [question._replace(picture=other[question.picture]) for question in questions]


def prompts(vlm: model.VLM, questions: list[Question], lead: tuple[int, ...]) -> Iterator[dict]:
    """Samples for collate, each the prompt and the tokens with which yes and no both begin, if any."""
    for question in questions:
        sample = scorers.prompt(vlm, question.picture, question.text)
        longer = {name: sample[name] + list(lead) for name in ("input_ids", "labels")}
        yield sample | longer


def yes_over_no(vlm: model.VLM, hidden: Tensor, last: Tensor, options: scorers.Options) -> Tensor:
    """log P(yes) / P(no) after position `last` (B,), the sum over their forms: hidden (B,T,C) -> (B,)."""
    logits = vlm.lm.head(hidden[torch.arange(len(last), device=last.device), last]).float()
    yes, no = options.tokens
    return logits[:, yes].logsumexp(1) - logits[:, no].logsumexp(1)


# ---------------------------------------------------------------- statistics


def resamples(questions: list[Question]) -> np.ndarray:
    """(RESAMPLES,n): how often each question is drawn. Pictures are drawn, with all that is asked of them:
    what one picture's questions have in common does not count as many observations.
    """
    pictures, of = np.unique([str(question.picture) for question in questions], return_inverse=True)
    number = len(pictures)
    draw = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    return draw[:, of]


def estimate(values: np.ndarray, drawn: np.ndarray) -> tuple[float, float, float]:
    """The mean of values (n,) and its 95 % interval, from the resamples that drew any of them."""
    values, number = values.astype(float), drawn.sum(1)
    means = (drawn @ values)[number > 0] / number[number > 0]
    value, (low, high) = float(values.mean()), np.percentile(means, [2.5, 97.5]).tolist()
    return value, min(low, value), max(high, value)  # a few items may all lie on one side


def ranks(values: np.ndarray) -> np.ndarray:
    """(n,) -> 0 for the least; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of x (n,) and y (n,): Pearson's of the ranks; 0 where either does not vary."""
    x, y = ranks(x), ranks(y)
    x, y = x - x.mean(), y - y.mean()
    length = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / length) if length else 0.0


def correlation(
    x: np.ndarray, y: np.ndarray, strata: list[np.ndarray], drawn: np.ndarray
) -> tuple[float, float, float]:
    """The mean over `strata` (indices of items) of Spearman's rho within each, and its 95 % interval."""

    def rho(times: np.ndarray) -> float:
        chosen = [np.repeat(some, times[some]) for some in strata]
        return float(np.mean([spearman(x[some], y[some]) for some in chosen if len(some)] or [0]))

    low, high = np.percentile([rho(times) for times in drawn], [2.5, 97.5])
    return rho(np.ones(len(x), dtype=int)), float(low), float(high)


def by_kind(kinds: list[str]) -> list[np.ndarray]:
    """The indices of the items of each kind."""
    return [np.flatnonzero(np.array(kinds) == kind) for kind in dict.fromkeys(kinds)]


def grouped(values: np.ndarray, strata: list[np.ndarray]) -> np.ndarray:
    """Values (n,) -> their groups (n,), 0 (least) to GROUPS - 1, of equal size within each stratum.

    So every group has the same mix of kinds: an easy kind with high similarity would else look like an effect
    of similarity.
    """
    group = np.zeros(len(values), dtype=int)
    for some in strata:
        order = values[some].argsort(kind="stable").argsort(kind="stable")
        group[some] = order * GROUPS // len(some)
    return group


# ---------------------------------------------------------------- the numbers: rows of each analysis


def attention_rows(observed: dict, questions: dict) -> list[dict]:
    """Analysis 1: share of the answering position's attention, by items, model, part of the prompt, layer."""
    rows = []
    for items, models in observed.items():
        drawn = resamples(questions[items])
        for name, seen in models.items():
            masses = {"image": seen.mass["image"], "text": seen.mass["before"] + seen.mass["after"]}
            masses |= {"text before the image": seen.mass["before"], "text after it": seen.mass["after"]}
            for part, mass in masses.items():
                for layer, values in enumerate(mass.T):
                    row = dict(items=items, model=name, tokens=part, layer=layer, layers=mass.shape[1])
                    rows.append(row | measured("attention", values, drawn))
    return rows


def similarity_rows(observed: dict, questions: dict, teacher_depth: int, method: Method) -> list[dict]:
    """Analysis 2: cosine to the teacher, by items, student, layer and tokens attended to."""
    rows = []
    for items, models in observed.items():
        drawn = resamples(questions[items])
        for name, seen in models.items():
            for part, cosine in seen.cosine.items():
                layers = cosine.shape[1]
                groups = matched(layers, teacher_depth, method)
                for layer, values in enumerate(cosine.T):
                    row = dict(items=items, model=name, tokens=part, layer=layer, layers=layers)
                    row["teacher_layers"] = " ".join(map(str, groups[layer]))
                    row["understanding"] = layer in seen.layers
                    rows.append(row | measured("cosine", values, drawn))
    return rows


def measured(name: str, values: np.ndarray, drawn: np.ndarray) -> dict:
    """The columns of a mean: its name, its interval, of how many."""
    return dict(zip((name, "low", "high"), estimate(values, drawn)), n=len(values))


def understanding_cosine(seen: Observed, tokens: str = "image") -> np.ndarray:
    """(n,): the mean cosine of each question over the aligned layers, the understanding layers by default."""
    return seen.cosine[tokens][:, seen.layers].mean(1)


def group_rows(observed: dict, questions: dict) -> tuple[list[dict], list[dict]]:
    """Analysis 3: items in groups by similarity, and the correlation of similarity and right answers.

    Similarity is that over image tokens in the understanding layers; each group has the mean probability of
    the right answer; Spearman's rho of the two is over all items and within kinds.
    """
    groups, correlations = [], []
    for items, models in observed.items():
        step = 2 if items == "compositional" else 1  # an item is a pair: both captions' mean
        asked = questions[items][::step]
        kinds, drawn = [question.kind for question in asked], resamples(asked)
        for name, seen in models.items():
            if not seen.cosine:
                continue
            x = understanding_cosine(seen).reshape(-1, step).mean(1)
            y = seen.probability.reshape(-1, step).mean(1)
            group = grouped(x, by_kind(kinds))
            for g in range(GROUPS):
                some = group == g
                if not some.any():  # fewer items than groups
                    continue
                row = dict(items=items, model=name, group=g + 1, similarity=float(x[some].mean()))
                groups.append(row | measured("probability", y[some], drawn[:, some]))
            for over, strata in {"all": [np.arange(len(x))], "within kinds": by_kind(kinds)}.items():
                rho = dict(zip(("rho", "low", "high"), correlation(x, y, strata, drawn)))
                correlations.append(dict(items=items, model=name, over=over, **rho, n=len(x)))
    return groups, correlations


def pair_hits(log_odds: np.ndarray) -> np.ndarray:
    """100 where yes is likelier after the true caption than after its negative, else 0: (2n,) -> (n,)."""
    yes = log_odds.reshape(-1, 2)
    return 100.0 * (yes[:, 0] > yes[:, 1])


def intervention_rows(intervened: dict, pairs: list[Question]) -> list[dict]:
    """Analysis 4: % of pairs right, by model, attention and kind; `change` against the model as it is."""
    rows, pairs = [], pairs[::2]
    kinds, drawn = np.array([question.kind for question in pairs]), resamples(pairs)
    families = {family: np.char.startswith(kinds, family.lower()) for family in FAMILIES}
    families = {family: some for family, some in families.items() if some.any()}
    for name, ways in intervened.items():
        plain = pair_hits(ways["as it is"])
        for way, log_odds in ways.items():
            hits = pair_hits(log_odds)
            for family, some in (families | {"all": np.ones(len(kinds), dtype=bool)}).items():
                row = dict(model=name, attention=way, kind=family)
                row |= measured("score", hits[some], drawn[:, some])
                change = estimate((hits - plain)[some], drawn[:, some])
                rows.append(row | dict(zip(("change", "change_low", "change_high"), change)))
    return rows


FAMILIES = ("Swap", "Replace", "Add")


def picture_rows(drawn: list[tuple[Path, str, str, np.ndarray]]) -> list[dict]:
    """Analysis 5: attention on each patch, of all that pictures.attention_picture has drawn."""
    rows = []
    for path, question, name, grid in drawn:
        where = dict(picture=path.name, question=question, model=name)
        for (row, column), value in np.ndenumerate(grid):
            rows.append(where | dict(row=row, column=column, attention=float(value)))
    return rows


ANALYSES = ("attention", "similarity", "groups", "intervention", "picture")


# ---------------------------------------------------------------- files


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """checkpoint.whole_folder, with one sentence for what cannot be read or written on the way."""
    try:
        with whole_folder(folder) as temporary:
            yield temporary
    except OSError as error:
        name, reason = error.filename or folder, error.strerror or error
        raise BadInput(f"{name} could not be read or written ({reason}); mend it or take another") from error


def write_rows(folder: Path, name: str, rows: list[dict]) -> None:
    """name.csv and name.json, the same numbers."""
    with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- running them


class Study(NamedTuple):
    """What was computed: per question (n,...) and as rows."""

    questions: dict[str, list[Question]]
    observed: dict[str, dict[str, Observed]]  # items -> model -> Observed; {} if nobody asked for it
    intervened: dict[str, dict[str, np.ndarray]]  # model -> way -> log odds of the compositional questions
    rows: dict[str, list[dict]]  # file name -> its rows


def analyse(
    models: dict[str, model.VLM],
    questions: dict[str, list[Question]],
    cases: list[pictures.Case],
    which: list[str],
    folder: Path,
    size: int = 128,
    method: Method = PAPER,
) -> Study:
    """Run the analyses of `which` and write their numbers and figures.

    models: the teacher first, by name "teacher", then its students; size: questions computed at once.
    """
    if "intervention" in which and "compositional" not in questions:
        raise BadInput("the intervention is scored on caption pairs; give some with --sugarcrepe")
    teacher, students = models["teacher"], {name: vlm for name, vlm in models.items() if name != "teacher"}
    observed, intervened, rows = {}, {}, {}
    if {"attention", "similarity", "groups"} & set(which):
        for items, asked in questions.items():
            observed[items] = observe(teacher, students, asked, size, method)
    if "attention" in which:
        rows["attention"] = attention_rows(observed, questions)
    if "similarity" in which:
        depth = teacher.config.text.num_hidden_layers
        rows["similarity"] = similarity_rows(observed, questions, depth, method)
    if "groups" in which:
        rows["groups"], rows["correlation"] = group_rows(observed, questions)
    if "intervention" in which:
        intervened = intervene(teacher, students, questions["compositional"], size, method)
        rows["intervention"] = intervention_rows(intervened, questions["compositional"])
    if "picture" in which:
        seen = pictures.attention_picture(models, cases, folder / "picture.png", method.layers)
        rows["picture"] = picture_rows(seen)
    for name, own in rows.items():
        write_rows(folder, name, own)
    drawn = [
        figures.draw(folder / f"{name}.png", *figures.FIGURES[name], rows[name])
        for name in which
        if name in figures.FIGURES
    ]
    if not all(drawn):
        print(figures.NO_PLOTS, file=sys.stderr)
    return Study(questions, observed, intervened, rows)


def load_models(
    teacher: str, students: dict[str, str | Path], method: Method = PAPER
) -> dict[str, model.VLM]:
    """{"teacher", then the students}. BadInput: a student that does not read what the teacher reads."""
    models = {"teacher": scorers.load(teacher)}
    first = models["teacher"]
    for name, folder in students.items():
        vlm = models[name] = scorers.load(str(folder))
        reads = [(m.question_ids("?", True), m.config.vision.image_size) for m in (vlm, first)]
        if reads[0] != reads[1] or vlm.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise BadInput(
                f"{folder} has another tokenizer, picture size or number of visual tokens than {teacher}, so "
                "that positions do not coincide; give a --teacher that reads what it reads"
            )
        try:
            matched(vlm.config.text.num_hidden_layers, first.config.text.num_hidden_layers, method)
        except ValueError as error:
            raise BadInput(f"{folder}: {error}") from None
    return models


# ---------------------------------------------------------------- command line


def find_students(args: argparse.Namespace) -> tuple[dict[str, Path], str]:
    """--students, or those of `python -m tiny` under --runs; and a sentence about what is not there."""
    if args.students:
        pairs = [student.partition("=")[::2] for student in args.students]
        names = [name for name, folder in pairs if folder]
        if len({"", "teacher", *names}) < len(pairs) + 2:
            raise BadInput(
                f"--students {' '.join(args.students)}: give each as NAME=FOLDER, every name once, for "
                "example kd=out/kd/stage3; teacher is no name for a student"
            )
        return dict(pairs), ""
    folders = {name: args.runs / name / "stage3" for name in (*PLAIN, *ALIGNED)}
    found = {name: folder for name, folder in folders.items() if folder.is_dir()}
    command = f"`python -m tiny --out {args.runs}` makes them"
    if not found:
        raise BadInput(f"{args.runs} has no student ({', '.join(folders)}); {command}")
    lost = [name for name in folders if name not in found]
    return found, f"Not found under {args.runs}: {', '.join(lost)}; {command}." if lost else ""


def add_arguments(commands) -> None:
    """The subcommand `analyse` of eval.py."""
    single = commands.add_parser("analyse", help="the paper's analyses of attention: figures and numbers")
    names = [*ANALYSES, "layers"]
    single.add_argument("which", nargs="+", choices=names, metavar="ANALYSIS", help=" | ".join(names))
    for name, text in {"sugarcrepe": "caption pairs", "gqa": "recognition questions"}.items():
        single.add_argument(
            f"--{name}", nargs=2, type=Path, metavar=("ANNOTATIONS", "IMAGES"),
            help=f"{text} in place of the tiny world's",
        )  # fmt: skip
    single.add_argument("--image", type=Path, help="of `picture`, with --question (default: test items)")
    single.add_argument("--question", help="of `picture`")
    single.add_argument("--model", nargs="+", help="of `layers`: checkpoint folders or hub names")
    add_common_arguments(single, "out/ANALYSIS")


def add_common_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """What `analyse` and the tiny world's `story` have in common."""
    add, whole = parser.add_argument, dict(type=number(int, 1, 1e5), metavar="N")
    add("--out", type=Path, help=f"new folder for figures and numbers (default: {out})")
    add("--runs", type=Path, default=Path("out"), help="of `python -m tiny` (default: %(default)s)")
    add("--students", nargs="+", metavar="NAME=FOLDER", help="other checkpoints than those under --runs")
    add("--teacher", default=TEACHER, help="default: the tiny one")
    add(
        "--layers",
        choices=[*DEPTH_RANGES, "released"],
        default=PAPER.layers,
        help="that are aligned, by name (default: %(default)s)",
    )
    add("--world", type=Path, help="whose test items, made if not there (default: RUNS/world)")
    add("--limit", default=300, help="items per kind, at most (default: %(default)s)", **whole)
    add("--batch-size", default=128, help="questions at once (default: %(default)s)", **whole)


def run(args: argparse.Namespace) -> None:
    """`analyse`, as parsed. ValueError (BadInput among them): one sentence for the user."""
    if args.model:
        raise BadInput("--model goes with `analyse layers`; others compare --students with their --teacher")
    if (args.image is None) != (args.question is None):
        raise BadInput(f"--image {args.image} and --question {args.question!r}: give both or none")
    students, missing = find_students(args)
    args.out = args.out or Path("out") / "-".join(args.which)
    with output_folder(args.out) as folder:
        questions, cases = {}, [pictures.Case(args.image, args.question)] if args.image else []
        if args.sugarcrepe or args.gqa:
            questions = benchmark_questions(args.sugarcrepe, args.gqa, args.limit)
            some = [question for asked in questions.values() for question in asked[:2]]
            cases = cases or [pictures.Case(question.picture, question.text) for question in some]
        elif set(args.which) != {"picture"} or args.image is None:
            world = make_world(args.world or args.runs / "world")
            questions = world_questions(world, args.limit)
        method = replace(PAPER, layers=args.layers)
        models = load_models(args.teacher, students, method)
        if "picture" in args.which and not cases:
            cases = pictures.tiny_cases(models, world)
        analyse(models, questions, cases, args.which, folder, args.batch_size, method)
    print(f"{missing}\n{one_line(args.out)}".strip())
