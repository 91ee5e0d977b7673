"""The eleven benchmarks, without any model: native files -> questions; replies -> scores with intervals.

    files, pictures -> read       -> [Item] -> (a model replies)     -> {key: reply}  -> score -> Summary
                       read_pairs -> [Pair] -> (likelihoods, P(yes)) -> {key: scores} -> score_pairs
    files, answers                                                                    -> score_file

BENCHMARKS at the end has one entry for each. How files are read is in readers.py, how replies are scored in
metrics.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.metrics import (
    Estimate,
    Row,
    averages,
    option,
    released_option,
    score_choice,
    score_gqa,
    score_mme,
    score_rbench,
    score_reefknot,
    score_soft,
    share,
    squares,
    table,
)
from evals.readers import (
    OCR,
    Item,
    Pair,
    answer_lines,
    bivlc,
    choices,
    first_line,
    gqa,
    identity,
    mme,
    picture,
    rbench,
    reefknot,
    sade,
    sugarcrepe,
    textvqa,
    tidy,
    vizwiz,
    vqav2,
    winoground,
)
from support.errors import BadInput, one_line


def markdown(head: list[str], lines: list[list]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(one_line, row)) + " |" for row in rows)


class Summary(NamedTuple):
    """A table: str() is Markdown, json() a dict to be written as it is. The first row has the headline."""

    benchmark: str
    column: str  # of the headline
    rows: list[dict[str, Any]]  # {"": name, "n": complete units, column: Estimate ..., "missing": items}
    notes: list[str]

    @property
    def headline(self) -> Estimate | None:
        return self.rows[0].get(self.column)

    def json(self) -> dict:
        rows = [
            {name or "row": x._asdict() if isinstance(x, Estimate) else x for name, x in row.items()}
            for row in self.rows
        ]
        headline = {"row": rows[0]["row"], "column": self.column, **rows[0].get(self.column, {})}
        return {"benchmark": self.benchmark, "headline": headline, "rows": rows, "notes": self.notes}

    def __str__(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        columns.sort(key=lambda column: column == "missing")  # stable: moves one column to the end
        table = markdown(columns, [[row.get(column, "") for column in columns] for row in self.rows])
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"{self.benchmark} (95 % intervals in brackets)\n\n{table}\n{notes}"


# ---------------------------------------------------------------- read


def read(
    name: str, annotations: str | Path, images: str | Path | None = None, as_released: bool = False
) -> list[Item]:
    """The questions of a benchmark, every key once. as_released leaves white space in captions as it is.

    Captions become written choices, the true one once under every letter ("swap_obj/17/A" has it under A).
    Raises BadInput for a wrong or damaged file, an empty text, a record that is there twice, a picture that
    is missing or lies outside the folder.
    """
    if benchmark(name).pairs:
        return [item for pair in read_pairs(name, annotations, images, as_released) for item in choices(pair)]
    return _read(name, annotations, images)


def read_pairs(
    name: str, annotations: str | Path, images: str | Path | None = None, as_released: bool = False
) -> list[Pair]:
    """Pictures with captions, of the benchmarks that are about captions; the rest as in read."""
    if not benchmark(name).pairs:
        raise BadInput(f"{name} has no captions to compare; choose another --scorer")
    pairs = _read(name, annotations, images)
    if as_released:
        return pairs
    return [pair._replace(captions=tuple(map(tidy, pair.captions))) for pair in pairs]


def benchmark(name: str) -> "Benchmark":
    """The benchmark of this name. BadInput: there is none."""
    if name not in BENCHMARKS:
        raise BadInput(f"there is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _read(name: str, annotations: str | Path, images: str | Path | None) -> list:
    picture.cache_clear()
    annotations = Path(annotations)
    images = None if images is None else Path(images)
    if images is not None and not images.is_dir():
        raise BadInput(f"{images}: no such folder of pictures; give it with --images")
    try:
        if not annotations.exists():
            raise BadInput(f"{annotations} does not exist")
        found = list(BENCHMARKS[name].reader(annotations, images))
        if not found:
            raise BadInput(f"{annotations} has no record of it")
        key, times = Counter(entry.key for entry in found).most_common(1)[0]
        if times > 1:
            raise BadInput(f"{annotations}: record {key!r} is there twice")
    except BadInput as error:
        files = BENCHMARKS[name].files
        remedy = "" if ";" in str(error) else f"; mend or fetch it again: {name} is read from {files}"
        raise BadInput(f"{error}{remedy}") from None
    wanted = {entry.image for entry in found if entry.image}
    if missing := sorted(path for path in wanted if not path.is_file()):
        number = f"{len(missing)} of {len(wanted)} pictures are missing, the first is {missing[0]}"
        raise BadInput(f"{number}; give the folder of {name}'s pictures with --images")
    return found


# ---------------------------------------------------------------- score


def score(name: str, items: list[Item], answers: dict[str, str], as_released: bool = False) -> Summary:
    """{key: reply} -> table. as_released reads the letters of caption choices by the released rule."""
    missing = sum(item.key not in answers for item in items)
    if missing == len(items):
        raise BadInput(f"{name}: none of {missing} questions has an answer; let a model answer them first")
    if benchmark(name).pairs:
        pick = released_option if as_released else option
        rows = score_choice(items, answers, pick, BENCHMARKS[name].average)
    else:
        rows = BENCHMARKS[name].score(items, answers)
    notes = [BENCHMARKS[name].note]
    if benchmark(name).pairs:
        notes.append("a liking for one letter shows in the rows of the orders")
    if replaced := sum(item.answer.replaced for item in items):
        notes.append(f"{replaced} records share their id with a later one and do not count")
    if missing:
        notes.append(
            f"{missing} of {len(items)} questions have no answer; they, and what is counted together with "
            "them, are left out: not a score of the whole benchmark"
        )
    return Summary(name, BENCHMARKS[name].column, rows, notes)


def score_pairs(name: str, pairs: list[Pair], scores: dict[str, Sequence[float]]) -> Summary:
    """{key: one score per caption, in their order} -> table.

    A pair is right if the true caption has more than every other; ties are wrong. Of a square, the four
    single comparisons are BiVLC's ("T0 to I": caption 0 has more with picture 0 than with picture 1); I2T is
    Winoground's text score, T2I its image score.
    """
    rows: dict[str, Row] = {}
    for pair in pairs:
        values = scores.get(pair.key)
        if values is not None and (len(values) != len(pair.captions) or not np.isfinite(values).all()):
            raise BadInput(f"{name}, pair {pair.key}: {values} is not one number per caption; score it again")
        for title in pair.rows:
            row = rows.get(title, Row([], 0))
            if values is not None:
                row.units.append((pair.square, values))
            rows[title] = row._replace(missing=row.missing + (values is None))
    if not any(row.units for row in rows.values()):
        raise BadInput(f"{name}: no pair has scores; let a model score them first")

    def right(values: Sequence[float]) -> bool:
        return values[0] > max(values[1:])

    def cells(units: list) -> dict[str, Estimate]:
        found = {"accuracy": share(sum(right(values) for _, values in units), len(units))}
        both = np.array(list(squares(units).values()))  # (squares, picture, caption: its own first)
        if not len(both):
            return found
        own, other = both[..., 0], both[..., 1]
        to_text, to_image = own > other, own > other[:, ::-1]  # a caption of one is the other's second
        directions = {"I0 to T": to_text[:, 0], "I1 to T": to_text[:, 1]}
        directions |= {"T0 to I": to_image[:, 0], "T1 to I": to_image[:, 1]}
        directions |= {"I2T": to_text.all(1), "T2I": to_image.all(1), "group": (to_text & to_image).all(1)}
        return found | {title: share(hits.sum(), len(both)) for title, hits in directions.items()}

    means = {title: [float(right(values)) for _, values in row.units] for title, row in rows.items()}
    top = averages(means, "accuracy") if benchmark(name).average else []
    missing = sum(pair.key not in scores for pair in pairs)
    notes = [f"{missing} of {len(pairs)} pairs have no scores and are left out"] if missing else []
    return Summary(name, "accuracy", top + table(rows, cells), [BENCHMARKS[name].note, *notes])


# ---------------------------------------------------------------- files of answers


def match_answers(name: str, items: list[Item], file: str | Path) -> tuple[dict[str, str], list[str]]:
    """A file of answers {"question_id", "prompt", "text"}, ours or of others -> {key: reply}, notes.

    A line belongs to the item whose key is its question_id (R-Bench: to the later record) or, for VizWiz, its
    image; else, for VizWiz and Reefknot, to the one at the position that question_id is; else to the only one
    with its picture, which LLaVA's question_id is for TextVQA and MME, and with the first line of its prompt.
    Raises BadInput for a line that is cut, repeats an answer, or answers something else.
    """
    file, whole_prompt = Path(file), benchmark(name).pairs
    by_key, by_prompt = {item.key: item for item in items}, {}
    by_place, numbers = {}, Counter()
    for item in items:
        place, part = (item.group, first_line(item.question)), item.answer.rows[0]
        by_prompt[place] = None if place in by_prompt else item
        if name in ("vizwiz", "reefknot"):  # each of Reefknot's two files has its own positions
            by_place.setdefault(numbers[part], []).append(item)
            numbers[part] += 1
    comparable = (lambda text: tidy(text).lower()) if whole_prompt else first_line

    def fits(item: Item, record: dict) -> bool:
        pictures = {Path(f"{record[x]}").stem for x in ("image_id", "image") if x in record}
        shown = str(record["question_id"]) == item.key or pictures <= {Path(item.group).stem}
        prompt = record.get("prompt")
        return shown and (prompt is None or comparable(prompt) == comparable(item.question))

    answers, unknown, placed = {}, 0, 0
    for where, record in answer_lines(file):
        if (theirs := record.get("benchmark", name)) != name:
            raise BadInput(f"{where} answers {theirs}, not {name}; score the file with its own benchmark")
        key, text, prompt = identity(record, "question_id", where), record.get("text"), record.get("prompt")
        if not isinstance(text, str) or not isinstance(prompt, str | None):
            raise BadInput(f"{where}: text or prompt is no text; remove that line")
        group = key
        if name == "mme":  # artwork/images/1.jpg -> artwork/1
            group = f"{key.split('/')[0]}/{Path(key).stem}"
        image = Path(f"{record.get('image')}").name if name == "vizwiz" else key
        named = by_key.get(key), by_key.get(image)
        places = by_place.get(record["question_id"], [])  # of whole numbers; names of pictures are texts
        found = [*named, *places, by_prompt.get((group, first_line(prompt or "")))]
        found = [item for item in found if item]
        if not found or prompt is None and len(places) > 1:
            unknown += 1
            continue
        item = next((item for item in found if fits(item, record)), None)
        if item is None and found[0].answer.replaced:
            continue  # the answer to the earlier record
        if item is None:
            keys = " or ".join(repr(item.key) for item in found)
            raise BadInput(
                f"{where} answers another question than {name} has under {keys}; score it with the "
                "annotations that it was made from"
            )
        if item.key in answers and not item.answer.replaced:
            raise BadInput(f"{where} answers {item.key!r} once more; remove one of the two lines")
        answers[item.key] = text
        placed += item in places and item not in named
    if not answers or placed and not any(answers.values()):  # Reefknot's own records come with empty replies
        raise BadInput(f"{file}: no line answers a question of {name}; give the file of its answers")
    notes = [f"{unknown} lines answer no question of these annotations"] if unknown else []
    if placed:
        notes.append(f"{placed} answers were joined by their position in the annotations")
    return answers, notes


def prompt_notes(name: str, prompts: Iterable[str | None]) -> list[str]:
    """Say how many prompts had OCR (optical character recognition) tokens: TextVQA's score depends on it."""
    if name != "textvqa":
        return []
    known = [prompt for prompt in prompts if prompt is not None]
    return [f"{sum(OCR in prompt for prompt in known)} of {len(known)} prompts had OCR tokens"]


def score_file(
    name: str, annotations: str | Path, answers_file: str | Path, as_released: bool = False
) -> Summary:
    """Scores a file of answers, see match_answers; needs neither pictures nor a model."""
    items = read(name, annotations, as_released=as_released)
    answers, notes = match_answers(name, items, answers_file)
    summary = score(name, items, answers, as_released)
    prompts = (row.get("prompt") for _, row in answer_lines(Path(answers_file)))  # read only where asked for
    return summary._replace(notes=summary.notes + notes + prompt_notes(name, prompts))


# ---------------------------------------------------------------- the eleven


class Benchmark(NamedTuple):
    reader: Callable[[Path, Path | None], Iterator]
    files: str  # where the reader finds its records, for sentences
    note: str
    score: Callable[[list[Item], dict[str, str]], list[dict]] | None = None  # None: score_choice
    column: str = "accuracy"  # the headline, in the first row
    max_new_tokens: int = 128  # LLaVA's and CompoDistill's answerers
    average: bool = False  # the headline is an unweighted mean over subsets

    @property
    def pairs(self) -> bool:
        """It is about captions: read_pairs and score_pairs work, too."""
        return self.score is None


CHANCE = "chance is 50, of I2T and T2I 25, of group 16.7; which of them the paper averages is not known"

# fmt: off
BENCHMARKS = {
    "sugarcrepe": Benchmark(
        sugarcrepe, "its seven files swap_obj.json ... add_att.json, or one of them",
        "chance is 50", max_new_tokens=32, average=True),
    "sade": Benchmark(
        sade, "sade.json in the form of evals/readers.py, Winoground's examples.jsonl, or a folder of both",
        "SADE's own files are not public; the mean of branches is ours", max_new_tokens=32, average=True),
    "bivlc": Benchmark(bivlc, "its parquet files or bivlc.jsonl", CHANCE, max_new_tokens=32),
    "winoground": Benchmark(winoground, "examples.jsonl", CHANCE, max_new_tokens=32),
    "vqav2": Benchmark(
        vqav2, "a folder with one *questions.json and one *annotations.json",
        "a split with public answers; published figures are mostly of test-dev", score_soft, "N1"),
    "gqa": Benchmark(gqa, "testdev_balanced_questions.json", "exact match, balanced questions", score_gqa),
    "textvqa": Benchmark(
        textvqa, "TextVQA_0.5.1_val.json, in a folder with llava_textvqa_val_v051_ocr.jsonl for OCR tokens",
        "soft accuracy; LLaVA-1.5 reports N1", score_soft, "N1"),
    "vizwiz": Benchmark(
        vizwiz, "val.json (test.json has no answers)",
        "a split with public answers; published figures are mostly of test",
        partial(score_soft, constant="Unanswerable"), "N1"),
    "mme": Benchmark(
        mme, "the folder of its subtasks, existence.txt ... or existence/ ...",
        "score = accuracy + accuracy+; n counts pictures; averages take perception / 20",
        score_mme, "score", max_new_tokens=16),
    "rbench": Benchmark(
        rbench, "image-level_filterd.json, in a folder with nocaps_image-level_rel_ids_1.json to 5",
        "published figures are means over the id lists; those over all ids (65 % yes) do not compare",
        score_rbench, "F1"),
    "reefknot": Benchmark(
        reefknot, "a folder with YESNO.jsonl and Multichoice.jsonl, or one of them",
        "always yes has F1 66.67 on YESNO: see the yes ratio; nobody can have more than accuracy 99.65",
        score_reefknot, "F1", max_new_tokens=16),
}
# fmt: on
