"""The eleven benchmarks, without any model: native files -> questions; replies -> scores with intervals.

    files, pictures -> read       -> [Item] -> (a model replies)     -> {key: reply}  -> score -> Summary
                       read_pairs -> [Pair] -> (likelihoods, P(yes)) -> {key: scores} -> score_pairs
    files, answers                                                                    -> score_file

Inside: one reader, prompt and metric per benchmark, the parsers, the two published normalisations of short
answers, intervals; BENCHMARKS at the end has one entry for each. Left out on purpose: evaluation servers
(test splits), R-Bench's instance level (masks), Reefknot's open questions (they need a judge).

Intervals are 95 %: Wilson for shares of things that count once; for all else (means of several orders, soft
accuracies, F1, sums over subsets) a percentile bootstrap, 1,000 resamples, seed 0, which draws whole units
(a pair of captions in all orders, an MME picture, else a question), each subset in its own size. It has no
width where all units agree. Questions to one picture count as independent.
Missing answers: a unit that lacks one is left out of every figure; "missing" counts them and a note says so.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoint import BadInput
from data import inside

LETTERS = "ABCDEF"
YES_NO = ("yes", "no")
SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA's suffix for short answers


class Truth(NamedTuple):
    """What scoring needs of one question; the model never sees it."""

    label: Any  # the letter, "yes" or "no", the word, or all human answers
    rows: tuple[str, ...]  # rows of the table that it counts in
    unit: str = ""  # questions of one unit count together: the orders of a pair, an MME picture
    square: str = ""  # two pairs of one square are two pictures that share their two captions
    replaced: int = 0  # earlier records of the same id, which do not count (R-Bench)


class Item(NamedTuple):
    """One question to one picture."""

    key: str  # unique, the same in every run
    image: Path | None  # inside the folder of pictures; None without such a folder
    question: str  # exactly what stands after "<image>\n"
    options: tuple[str, ...]  # of a written choice: letters, or yes and no in any case; () for free answers
    answer: Truth
    group: str  # items of one group share their picture


class Pair(NamedTuple):
    """A picture and its captions, the true one first: two of them, in SADE up to six."""

    key: str
    image: Path | None
    captions: tuple[str, ...]
    rows: tuple[str, ...]  # as in Truth
    group: str
    square: str = ""


class Figure(NamedTuple):
    """A measured number with its 95 % interval: percent, except MME's scores."""

    value: float
    low: float
    high: float
    n: float  # of the things counted
    interval: str  # "Wilson" or "bootstrap"

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.1f}, {self.high:.1f}]"


class Summary(NamedTuple):
    """A table: str() is Markdown, json() a dict to be written as it is. The first row has the headline."""

    benchmark: str
    column: str  # of the headline
    rows: list[dict[str, Any]]  # {"": name, "n": complete units, column: Figure ..., "missing": items}
    notes: list[str]

    @property
    def headline(self) -> Figure | None:
        return self.rows[0].get(self.column)

    def json(self) -> dict:
        rows = [
            {name or "row": x._asdict() if isinstance(x, Figure) else x for name, x in row.items()}
            for row in self.rows
        ]
        headline = {"row": rows[0]["row"], "column": self.column, **rows[0].get(self.column, {})}
        return {"benchmark": self.benchmark, "headline": headline, "rows": rows, "notes": self.notes}

    def __str__(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        columns.sort(key=lambda column: column == "missing")  # stable: moves one column to the end
        lines = [columns, ["---"] * len(columns)]
        lines += [[str(row.get(column, "")) for column in columns] for row in self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"{self.benchmark} (95 % intervals in brackets)\n\n{table}\n{notes}"


# ---------------------------------------------------------------- files


def load(file: Path, kind: type) -> Any:
    """A JSON file that holds a `kind`. Two equal keys are an error: Python would silently keep the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict:
        if len(content := dict(pairs)) != len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise BadInput(f"record {key!r} is there twice")
        return content

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror})") from None
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is no JSON ({error})") from None
    if not isinstance(content, kind):
        raise BadInput(f"{file} holds a {type(content).__name__}, not a {kind.__name__}")
    return content


def load_lines(file: Path, remedy: str = "") -> Iterator[tuple[str, dict]]:
    """The objects of a file of JSON lines, each with file and number to name it by."""
    try:
        with open(file, "rb") as handle:
            for number, line in enumerate(handle, 1):
                where = f"{file}, line {number}"
                try:
                    record = json.loads(line.decode("utf-8")) if line.strip() else None
                except (ValueError, RecursionError):
                    raise BadInput(f"{where} is damaged or cut short{remedy}") from None
                if line.strip() and not isinstance(record, dict):
                    raise BadInput(f"{where} is no JSON object{remedy}")
                if line.strip():
                    yield where, record
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror})") from None


def field(record: Any, name: str, kind: type, where: str) -> Any:
    """record[name], which must be a `kind` and, if a text, not blank."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise BadInput(f"{where}: {name} is {f'{value!r}':.60}, not a {kind.__name__}")
    if isinstance(value, str) and not value.strip():
        raise BadInput(f"{where}: {name} is empty")
    return value


def texts(record: Any, where: str, *names: str) -> list[str]:
    return [field(record, name, str, where) for name in names]


def identity(record: Any, name: str, where: str) -> str:
    """A text or whole number that names a record."""
    number = isinstance(record, dict) and type(record.get(name)) is int
    return str(field(record, name, int if number else str, where))


def human_answers(record: dict, where: str) -> tuple[str, ...]:
    """Texts, or objects with a text under "answer"; an answer may be empty."""
    answers = field(record, "answers", list, where)
    answers = tuple(answer.get("answer") if isinstance(answer, dict) else answer for answer in answers)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadInput(f"{where}: answers are no list of texts")
    return answers


def one(annotations: Path, pattern: str) -> Path:
    """The file itself, or the one in the folder that the pattern names."""
    found = [annotations] if annotations.is_file() else sorted(annotations.glob(pattern))
    if len(found) != 1:
        raise BadInput(f"{annotations} has {len(found)} files {pattern}, not one")
    return found[0]


def some(annotations: Path, names: Iterable[str]) -> list[Path]:
    """Those of the names that the folder has, or the one file that is given."""
    found = [file for name in names if (file := annotations / name).is_file()]
    if annotations.is_file() and annotations.name in names:
        found = [annotations]
    if not found:
        raise BadInput(f"{annotations} is or has none of the files {', '.join(names)}")
    return found


@cache  # emptied by each read: paths are slow to check, and VQAv2 asks five times for each
def picture(images: Path | None, *names: str) -> Path | None:
    """The first of the names that is a file in the folder, else the first name, for the error to name."""
    if images is None:
        return None
    try:
        paths = [inside(images, name) for name in names]
        return next((path for path in paths if path.is_file()), paths[0])
    except (ValueError, OSError, RuntimeError) as error:  # outside, a zero byte, too long, a loop of links
        raise BadInput(f"picture {f'{names[0]!r}':.60}: {error}") from None


# ---------------------------------------------------------------- readers: (annotations, images) -> pairs

SUGARCREPE = [
    f"{name}.json" for name in "swap_obj swap_att replace_obj replace_rel replace_att add_obj add_att".split()
]


def sugarcrepe(annotations: Path, images: Path | None) -> Iterator[Pair]:
    """Seven files, each an object from key to record; keys have gaps (swap_obj has no 108)."""
    for file in some(annotations, SUGARCREPE):
        for key, record in load(file, dict).items():
            where = f"{file}, record {key!r}"
            name, *captions = texts(record, where, "filename", "caption", "negative_caption")
            yield Pair(f"{file.stem}/{key}", picture(images, name), tuple(captions), (file.stem,), name)


def square(key: str, captions: list[str], files: list[list[str]], images: Path | None, rows: tuple):
    """Two pictures and their two captions -> two pairs; files[i] are the names that picture i may have."""
    for i in (0, 1):
        pictures = picture(images, *files[i])
        yield Pair(f"{key}/{i}", pictures, (captions[i], captions[1 - i]), rows, files[i][0], square=key)


def winoground(annotations: Path, images: Path | None) -> Iterator[Pair]:
    """examples.jsonl and the unpacked images.zip; caption_k belongs to image_k, a name without its .png."""
    for where, record in load_lines(one(annotations, "**/examples.jsonl")):
        captions = texts(record, where, "caption_0", "caption_1")
        names = texts(record, where, "image_0", "image_1")
        files = [[f"{name}.png", f"images/{name}.png"] for name in names]
        rows = ("all", *texts(record, where, "collapsed_tag"))
        yield from square(identity(record, "id", where), captions, files, images, rows)


def sade(annotations: Path, images: Path | None) -> Iterator[Pair]:
    """A form of our own, because SADE's is not public: sade.json, a list of

        {"id": 17, "branch": "Relation", "source": "VG", "image": "VG_100K/1.jpg",
         "references": ["the true one", "a false one", ...]}             two to six references

    and Winoground's examples.jsonl as the Comprehensive branch; a folder with either or both, or one file.
    """
    if annotations.suffix == ".jsonl" or annotations.is_dir() and any(annotations.glob("**/examples.jsonl")):
        for pair in winoground(annotations, images):
            rows, key = ("Comprehensive/Winoground",), f"winoground/{pair.key}"
            yield pair._replace(key=key, rows=rows, square=f"winoground/{pair.square}")
    file = annotations / "sade.json" if annotations.is_dir() else annotations
    if file.suffix != ".json" or annotations.is_dir() and not file.exists():
        return
    for number, record in enumerate(load(file, list)):
        where = f"{file}, record {number}"
        references = field(record, "references", list, where)
        captions = [field({"a reference": text}, "a reference", str, where) for text in references]
        if not 2 <= len(captions) <= len(LETTERS):
            raise BadInput(f"{where}: {len(captions)} references, not two to six")
        name, *row = texts(record, where, "image", "branch", "source")
        key = identity(record, "id", where)
        yield Pair(key, picture(images, name), tuple(captions), ("/".join(row),), name)


def bivlc(annotations: Path, images: Path | None) -> Iterator[Pair]:
    """The parquet files, whose pictures are unpacked into the folder of pictures; or unpacked by the user:

        bivlc.jsonl   {"caption": ..., "negative_caption": ..., "type": "add", "subtype": "obj",
                       "image": "0.jpg", "negative_image": "0_negative.jpg"}         names in that folder

    Rows repeat, so the number of the row is the key.
    """
    if annotations.suffix == ".parquet" or annotations.is_dir() and any(annotations.glob("**/*.parquet")):
        records = parquet(annotations, images)
    else:
        records = load_lines(one(annotations, "bivlc.jsonl"))
    for row, (where, record) in enumerate(records):
        captions = texts(record, where, "caption", "negative_caption")
        files = [[name] for name in texts(record, where, "image", "negative_image")]
        kind, subtype = texts(record, where, "type", "subtype")
        yield from square(str(row), captions, files, images, ("all", kind, f"{kind} {subtype}"))


def parquet(annotations: Path, images: Path | None) -> Iterator[tuple[str, dict]]:
    """BiVLC's rows as in bivlc.jsonl. Its pictures become files of the folder, unless they are already."""
    try:
        from pyarrow.parquet import ParquetFile  # optional, and needed only here
    except ImportError:
        raise BadInput(
            f"{annotations}: parquet needs the optional package pyarrow (pip install pyarrow); without it "
            "unpack the rows into bivlc.jsonl and a folder of pictures (benchmarks.bivlc has the form)"
        ) from None
    files = [annotations] if annotations.is_file() else sorted(annotations.glob("**/*.parquet"))
    names = {"image": "bivlc_{}.jpg", "negative_image": "bivlc_{}_negative.jpg"}
    columns = ["caption", "negative_caption", "type", "subtype", *([] if images is None else names)]
    row = 0
    for file in files:
        try:
            for batch in ParquetFile(file).iter_batches(batch_size=64, columns=columns):
                for record in batch.to_pylist():
                    where = f"{file}, row {row}"
                    for column, name in names.items():
                        if images is not None:
                            content = field(field(record, column, dict, where), "bytes", bytes, where)
                            unpack(content, images / name.format(row))
                        record[column] = name.format(row)
                    yield where, record
                    row += 1
        except BadInput:
            raise
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are children of these
            raise BadInput(f"{file} cannot be read or unpacked ({f'{error}':.200})") from None


def unpack(content: bytes, file: Path) -> None:
    """A picture into a file that appears whole or not at all."""
    if file.exists() and file.stat().st_size == len(content):
        return
    temporary = file.with_name(f".{file.name}.writing-{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, file)


# ---------------------------------------------------------------- readers: (annotations, images) -> items


def vqav2(annotations: Path, images: Path | None) -> Iterator[Item]:
    """Two files, questions and annotations, joined on question_id."""
    file, truths = one(annotations, "*questions.json"), {}
    answers_file = one(annotations, "*annotations.json")
    for number, record in enumerate(field(load(answers_file, dict), "annotations", list, str(answers_file))):
        where = f"{answers_file}, record {number}"
        if (key := identity(record, "question_id", where)) in truths:
            raise BadInput(f"{where}: question {key} is there twice")
        kind, start = texts(record, where, "answer_type", "question_type")
        truths[key] = Truth(human_answers(record, where), ("all", kind, f"type: {start}"))
    content = load(file, dict)
    split = field(content, "data_subtype", str, str(file))
    for number, record in enumerate(field(content, "questions", list, str(file))):
        where = f"{file}, record {number}"
        key, image = identity(record, "question_id", where), field(record, "image_id", int, where)
        if key not in truths:
            raise BadInput(f"{where}: question {key} has no answers in {answers_file}")
        name = f"COCO_{split}_{image:012d}.jpg"
        path = picture(images, name, f"{split}/{name}")
        yield Item(key, path, field(record, "question", str, where) + SHORT, (), truths[key], str(image))


def gqa(annotations: Path, images: Path | None) -> Iterator[Item]:
    """One object from question id to record; only balanced questions count."""
    file = one(annotations, "testdev_balanced_questions.json")
    for key, record in load(file, dict).items():
        where = f"{file}, record {key!r}"
        if not field(record, "isBalanced", bool, where):
            continue
        question, answer, image = texts(record, where, "question", "answer", "imageId")
        structure = field(field(record, "types", dict, where), "structural", str, where)
        truth = Truth(answer, ("all", "open" if structure == "query" else "binary"))
        path = picture(images, f"{image}.jpg", f"images/{image}.jpg")
        yield Item(key, path, question + SHORT, (), truth, image)


OCR = "Reference OCR token:"


def textvqa(annotations: Path, images: Path | None) -> Iterator[Item]:
    """The annotation and, where it lies in the same folder, LLaVA's question file with the OCR tokens.

    With and without OCR tokens are two benchmarks: LLaVA-1.5 and CompoDistill have them. Without, give the
    annotation as a file; the question then begins with a capital, as in lmms-eval.
    """
    file = one(annotations, "TextVQA_*_val.json")
    ocr_file, prompts = annotations / "llava_textvqa_val_v051_ocr.jsonl", {}
    if ocr_file.is_file():
        for where, record in load_lines(ocr_file):
            text = field(record, "text", str, where)
            prompts[identity(record, "question_id", where), first_line(text)] = text
    for number, record in enumerate(field(load(file, dict), "data", list, str(file))):
        where = f"{file}, record {number}"
        question, image = texts(record, where, "question", "image_id")
        prompt = prompts.get((image, first_line(question)), question.capitalize() + SHORT)
        if prompts and OCR not in prompt:
            raise BadInput(f"{where}: its question is not in {ocr_file}")
        key = identity(record, "question_id", where)
        path = picture(images, f"{image}.jpg", f"train_images/{image}.jpg")
        yield Item(key, path, prompt, (), Truth(human_answers(record, where), ("all",)), image)


UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def vizwiz(annotations: Path, images: Path | None) -> Iterator[Item]:
    """val.json, a list; its records have no id, the picture is the key."""
    file = one(annotations, "*val.json")
    for number, record in enumerate(load(file, list)):
        where = f"{file}, record {number}"
        image, kind, question = texts(record, where, "image", "answer_type", "question")
        prompt = question.strip() + UNANSWERABLE + SHORT
        truth = Truth(human_answers(record, where), ("all", kind))
        yield Item(image, picture(images, image, f"val/{image}"), prompt, (), truth, image)


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
PLEASE = "Please answer yes or no."


def mme(annotations: Path, images: Path | None) -> Iterator[Item]:
    """<subtask>.txt of the evaluation tool (picture, question, Yes or No, between tabs), here or in
    ground_truth/; or the release: <subtask>/ with a .txt for each picture (question, Yes or No).
    """
    for subtask in PERCEPTION + COGNITION:
        files = [annotations / f"{subtask}.txt", annotations / "ground_truth" / f"{subtask}.txt"]
        files = [file for file in files if file.is_file()][:1] or sorted(
            (annotations / subtask).glob("**/*.txt")
        )
        for file in files:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise BadInput(f"{file} cannot be read ({error})") from None
            for number, line in enumerate(lines, 1):
                *name, question, label = ["", *line.split("\t")][-3:]
                if label not in ("Yes", "No") or not (question := question.replace(PLEASE, "").strip()):
                    raise BadInput(f"{file}, line {number} is not: picture, question, Yes or No")
                name = Path(name[0] or file.name)
                group = f"{subtask}/{name.stem}"
                endings = [name.suffix] if name.suffix != ".txt" else [".jpg", ".png"]
                names = [f"{subtask}/{sub}{name.stem}{end}" for sub in ("", "images/") for end in endings]
                truth = Truth(label.lower(), (subtask,), unit=group)
                path = picture(images, *names)
                yield Item(f"{group}/{question}", path, question + SHORT, YES_NO, truth, group)


def rbench(annotations: Path, images: Path | None) -> Iterator[Item]:
    """The image-level list and, beside it, the id lists nocaps_image-level_rel_ids_1.json to 5: the published
    figures are means over these. 95 ids are there twice; the later record counts, as in the official code.
    """
    file = one(annotations, "image-level_*.json")
    lists = {}
    for path in sorted(file.parent.glob("*image-level_rel_ids_[1-5].json")):
        lists[f"list {path.stem[-1]}"] = {str(key) for key in load(path, list)}
    records: dict[str, list[dict]] = {}
    for number, record in enumerate(load(file, list)):
        key = identity(record, "question_id", f"{file}, record {number}")
        records.setdefault(key, []).append(record)
    if strange := [name for name, keys in lists.items() if not keys & records.keys()]:
        raise BadInput(f"{file}: id {strange[0]} beside it has none of its ids")
    for key, same in records.items():
        where, record = f"{file}, question {key}", same[-1]
        name, text, label = texts(record, where, "image", "text", "label")
        rows = ("all ids", *(row for row, keys in lists.items() if key in keys))
        truth = Truth("no" if "no" in label.lower() else "yes", rows, replaced=len(same) - 1)
        yield Item(key, picture(images, name), text, YES_NO, truth, name)


def reefknot(annotations: Path, images: Path | None) -> Iterator[Item]:
    """YESNO.jsonl and Multichoice.jsonl. Rows repeat, so file and line, from 0, are the key."""
    for file in some(annotations, ("YESNO.jsonl", "Multichoice.jsonl")):
        options = YES_NO if file.stem == "YESNO" else tuple("ABCD")
        for number, (where, record) in enumerate(load_lines(file)):
            names = "image_id", "query_prompt", "label", "relation_type"
            image, text, label, kind = texts(record, where, *names)
            if label not in options:
                raise BadInput(f"{where}: the label is {label!r}, not one of {', '.join(options)}")
            path = picture(images, *(f"{folder}/{image}.jpg" for folder in ("VG_100K", "VG_100K_2")))
            truth = Truth(label, (file.stem, f"{file.stem} {kind}"))
            yield Item(f"{file.stem}/{number}", path, text, options, truth, image)


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
        raise BadInput(f"{name} has no captions to compare; use its questions")
    pairs = _read(name, annotations, images)
    if as_released:
        return pairs
    return [pair._replace(captions=tuple(map(tidy, pair.captions))) for pair in pairs]


def benchmark(name: str) -> "Benchmark":
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
        raise BadInput(f"{error}; mend or fetch it again: {name} is read from {files}") from None
    wanted = {entry.image for entry in found if entry.image}
    if missing := sorted(path for path in wanted if not path.is_file()):
        number = f"{len(missing)} of {len(wanted)} pictures are missing, the first is {missing[0]}"
        raise BadInput(f"{number}; give the folder of {name}'s pictures with --images")
    return found


def tidy(text: str) -> str:
    return " ".join(text.split())


def first_line(text: str) -> str:
    return tidy(text.strip().split("\n")[0]).lower()


def choices(pair: Pair) -> Iterator[Item]:
    """SugarCrepe's question in the released code, with its space before (B); the truth once in each place."""
    true, *others = pair.captions
    letters = LETTERS[: len(pair.captions)]
    for place, letter in enumerate(letters):
        captions = [*others[:place], true, *others[place:]]
        options = "\n ".join(f"({mark}) {caption}" for mark, caption in zip(letters, captions))
        question = (
            f"Which caption best describes the image?\n{options}\n"
            "Answer with the option's alphabet from the given choices directly."
        )
        truth = Truth(letter, pair.rows, unit=pair.key, square=pair.square)
        yield Item(f"{pair.key}/{letter}", pair.image, question, tuple(letters), truth, pair.group)


# ---------------------------------------------------------------- what a reply says


def option(reply: str, letters: Sequence[str] = "AB") -> str | None:
    """The letter that a reply chooses, or None: no letter, or several of them.

    A reply chooses what it begins with or is ("B", "(b)", "A. A cat"), else the only letter in it that stands
    alone. An "A" before a word is the article, unless that word is one of a few that follow no article.
    """
    some = f"[{''.join(letters)}]"
    if match := re.match(rf"\W*({some})(?:\W*$|[).:,\]\"'\n])", reply, re.IGNORECASE):
        return match[1].upper()
    article = r"(?!\s+(?!(?:is|because|describes|and|or)\b)\w)"
    alone = rf"\(({some})\)|(?<![\w.'-])(?:(?!A)({some})|(A){article})(?![\w'-])"
    found = {"".join(groups) for groups in re.findall(alone, reply)} & set(letters)
    return found.pop() if len(found) == 1 else None


def released_option(reply: str, letters: Sequence[str] = "AB") -> str | None:
    """The rule of CompoDistill's released code, which takes the article "a" for option A."""
    match = re.search(rf"\b([{''.join(letters)}])\b", reply.strip().upper())
    return match[1] if match else None


def mme_reply(reply: str) -> str:
    """The official rule: yes or no within the first four characters, yes looked for first."""
    start = reply.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def pope_reply(reply: str) -> str:
    """POPE's rule, which R-Bench has: what is not no is yes, an empty reply and "NO" too."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def first_word(reply: str) -> str:
    """Our rule for Reefknot, which documents none."""
    word = re.search(r"[^\W_]+", reply.lower())
    return word[0] if word and word[0] in YES_NO else "other"


# ---------------------------------------------------------------- short answers

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
# A word with one of its apostrophes missing is mended. Words that are also others (its, were, hell) are not
# in the published table, nor is a form with two missing.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've"""
APOSTROPHES = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTIONS.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round, as published


@lru_cache(maxsize=1 << 18)
def normalise_evalai(text: str) -> str:
    """N1: LLaVA's m4c_evaluator and lmms-eval."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(text)


@lru_cache(maxsize=1 << 18)
def normalise_official(text: str) -> str:
    """N2: GT-Vision-Lab's vqaEval, where it normalises at all; see official_accuracy."""
    return _words(text)


def plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _words(text: str) -> str:
    text = out = plain(text)
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        drop = beside_space or re.search(r"\d,\d", text)
        out = out.replace(mark, "" if drop else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # only 32, by a slip of the originals
    words = (NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


def soft_accuracy(
    reply: str, answers: Sequence[str], normalise: Callable[[str], str] = normalise_evalai
) -> float:
    """min(1, matches / 3) among the other answers, mean over leaving out each answer in turn, by position.

    In closed form: with n of k answers matching, n times it is one of them that is left out.
    """
    said, k = normalise(reply), len(answers)
    n = sum(normalise(answer) == said for answer in answers)
    return (n * min(1, (n - 1) / 3) + (k - n) * min(1, n / 3)) / k


def official_accuracy(reply: str, answers: Sequence[str]) -> float:
    """soft_accuracy as vqaEval has it: when all answers are the same text, only ends are stripped."""
    differ = len(set(map(plain, answers))) > 1
    return soft_accuracy(reply, answers, normalise_official if differ else plain)


# ---------------------------------------------------------------- intervals

Z, RESAMPLES = 1.959964, 1000  # Z: 95 % of the normal distribution lie within


def share(hits: float, n: float) -> Figure:
    """100 * hits / n with its Wilson interval; of nothing it is 0 with all of [0, 100]."""
    if n < 1:
        return Figure(0.0, 0.0, 100.0, 0, "Wilson")
    p, z = hits / n, Z * Z / n
    centre, half = (p + z / 2) / (1 + z), (z * p * (1 - p) + z * z / 4) ** 0.5 / (1 + z)
    low, high = max(0.0, centre - half), min(1.0, centre + half)  # rounding alone leads out of it
    return Figure(100 * p, 100 * low, 100 * high, int(n), "Wilson")


def bootstrap(strata: list[np.ndarray], statistic: Callable[[list[np.ndarray]], np.ndarray]) -> Figure:
    """strata: (units, k) each; statistic: the means (R,k) of each stratum -> (R,), for R samples at once.

    Drawing units with replacement is drawing how often each kind of unit comes: the multinomial does it for
    any number of units at the price of the few kinds that there are.
    """
    random, means = np.random.default_rng(0), []
    for units in strata:
        kinds, counts = np.unique(units, axis=0, return_counts=True)
        n = len(units)
        means.append(random.multinomial(n, counts / n, size=RESAMPLES) @ kinds / n)
    value = statistic([units.mean(0, keepdims=True) for units in strata])
    low, high = np.percentile(statistic(means), [2.5, 97.5])
    return Figure(float(value[0]), float(low), float(high), sum(map(len, strata)), "bootstrap")


def mean(values: Sequence[float]) -> Figure:
    """In percent, of one value in 0..1 per unit."""
    return bootstrap([100 * np.array(values, dtype=float)[:, None]], lambda means: means[0][:, 0])


def averages(strata: dict[str, list[float]], column: str) -> list[dict]:
    """Unweighted: subsets ("swap_obj") count the same, within a branch its sources ("Relation/VG") do."""
    branches: dict[str, list[np.ndarray]] = {}
    for row, values in strata.items():
        if values:
            branches.setdefault(row.split("/")[0], []).append(100 * np.array(values, dtype=float)[:, None])

    def row(name: str, branches: list[list[np.ndarray]]) -> dict:
        weights = [1 / len(branches) / len(sources) for sources in branches for _ in sources]
        figure = bootstrap(
            [units for sources in branches for units in sources],
            lambda means: sum(weight * m[:, 0] for weight, m in zip(weights, means)),
        )
        return {"": name, "n": figure.n, column: figure}

    rows = [row(f"mean of {len(branches)} subsets", list(branches.values()))] if branches else []
    return rows + [row(f"{name}, mean", [sources]) for name, sources in branches.items() if len(sources) > 1]


# ---------------------------------------------------------------- scores: (items, answers) -> rows


class Row(NamedTuple):
    units: list[list[tuple[Truth, str]]]  # the complete ones: their truths and replies
    missing: int  # answers


def gather(items: list[Item], answers: dict[str, str]) -> dict[str, Row]:
    """Each row of the table with its units; rows with many units ("all") come before their parts."""
    units: dict[str, list[Item]] = {}
    for item in items:
        units.setdefault(item.answer.unit or item.key, []).append(item)
    rows, depth = {}, {}
    for unit in units.values():
        missing = sum(item.key not in answers for item in unit)
        for level, name in enumerate(unit[0].answer.rows):
            depth.setdefault(name, level)
            row = rows.get(name, Row([], 0))
            if not missing:
                row.units.append([(item.answer, answers[item.key]) for item in unit])
            rows[name] = row._replace(missing=row.missing + missing)
    return {name: rows[name] for name in sorted(rows, key=depth.get)}


def table(rows: dict[str, Row], cells: Callable[[list], dict[str, Figure]]) -> list[dict]:
    return [
        {"": name, "n": len(row.units), **(cells(row.units) if row.units else {}), "missing": row.missing}
        for name, row in rows.items()
    ]


def squares(hits: Iterable[tuple[str, bool]]) -> dict[str, list[bool]]:
    """The two results of each square that has both, in the order of its pictures."""
    found: dict[str, list[bool]] = {}
    for key, hit in hits:
        if key:
            found.setdefault(key, []).append(hit)
    return {key: hits for key, hits in found.items() if len(hits) == 2}


def score_choice(items: list[Item], answers: dict[str, str], pick: Callable, average: bool) -> list[dict]:
    """Written choices: the truth under each letter, mean over the letters; I2T: both pictures of a square
    right in all orders.
    """

    def right(unit: list) -> list[bool]:
        return [pick(reply, LETTERS[: len(unit)]) == truth.label for truth, reply in unit]

    def cells(units: list) -> dict[str, Figure]:
        hits, none = {}, []
        for unit in units:
            for (truth, reply), hit in zip(unit, right(unit)):
                hits.setdefault(f"truth is {truth.label}", []).append(hit)
                none.append(pick(reply, LETTERS[: len(unit)]) is None)
        found = {"accuracy": mean([np.mean(right(unit)) for unit in units])}
        found |= {column: share(sum(hits[column]), len(hits[column])) for column in sorted(hits)}
        found["no option"] = share(sum(none), len(none))
        both = squares((unit[0][0].square, all(right(unit))) for unit in units).values()
        return found | ({"I2T": share(sum(map(all, both)), len(both))} if both else {})

    rows = gather(items, answers)
    means = {name: [float(np.mean(right(unit))) for unit in row.units] for name, row in rows.items()}
    return (averages(means, "accuracy") if average else []) + table(rows, cells)


def score_soft(items: list[Item], answers: dict[str, str], constant: str | None = None) -> list[dict]:
    """VQA soft accuracy by both normalisations, and what one constant answer has (by N1)."""

    def cells(units: list) -> dict[str, Figure]:
        pairs = [(reply, truth.label) for unit in units for truth, reply in unit]
        found = {
            "N1": mean([soft_accuracy(*pair) for pair in pairs]),
            "N2": mean([official_accuracy(*pair) for pair in pairs]),
        }
        if constant:
            found[f'always "{constant}"'] = mean([soft_accuracy(constant, label) for _, label in pairs])
        return found

    return table(gather(items, answers), cells)


def score_gqa(items: list[Item], answers: dict[str, str]) -> list[dict]:
    def cells(units: list) -> dict[str, Figure]:
        hits = [reply.strip().rstrip(".").lower() == truth.label for unit in units for truth, reply in unit]
        return {"accuracy": share(sum(hits), len(hits))}

    return table(gather(items, answers), cells)


# Counts of yes/no replies (..., 6): the truth is yes and the reply yes, no, other; then the truth is no.
ALL = [0, 1, 2, 3, 4, 5]
RATES = {"accuracy": ([0, 4], ALL), "precision": ([0], [0, 3]), "recall": ([0], [0, 1, 2])}
RATES_OF_NO = {"precision": ([4], [1, 4]), "recall": ([4], [3, 4, 5])}
OTHER_RATES = {"yes ratio": ([0, 3], ALL), "other": ([2, 5], ALL)}
TINY = 1e-12  # what to divide by instead of zero


def counted(units: list, parse: Callable[[str], str]) -> np.ndarray:
    """(replies, 6): which of the six cases each reply is."""
    cases = [
        3 * (truth.label == "no") + ("yes", "no", "other").index(parse(reply))
        for unit in units
        for truth, reply in unit
    ]
    return np.eye(6)[cases]


def rate(counts: np.ndarray, part: list[int], whole: list[int], eps: float) -> np.ndarray:
    return counts[..., part].sum(-1) / np.maximum(counts[..., whole].sum(-1) + eps, TINY)


def f1(counts: np.ndarray, eps: float, rates: dict = RATES) -> np.ndarray:
    """(...,6) -> (...,), 0 where nothing is positive. eps: POPE's 1e-5 is part of R-Bench's definition."""
    p, r = (rate(counts, *rates[name], eps) for name in ("precision", "recall"))
    return 2 * p * r / np.maximum(p + r + eps, TINY)


def yes_no(cases: np.ndarray, eps: float = 0.0) -> dict[str, Figure]:
    counts = cases.sum(0)

    def shares(rates: dict) -> dict[str, Figure]:
        return {name: share(counts[p].sum(), counts[w].sum() + eps) for name, (p, w) in rates.items()}

    def score(rates: dict) -> Figure:
        return bootstrap([cases], lambda means: 100 * f1(len(cases) * means[0], eps, rates))

    return shares(RATES) | {"F1": score(RATES), "F1 of no": score(RATES_OF_NO)} | shares(OTHER_RATES)


def score_mme(items: list[Item], answers: dict[str, str]) -> list[dict]:
    """Accuracy + accuracy over pictures with both questions right, each up to 100; summed over subtasks."""

    def points(units: list) -> np.ndarray:  # (pictures, 2)
        right = [[mme_reply(reply) == truth.label for truth, reply in unit] for unit in units]
        return np.array([(100 * np.mean(unit), 100 * all(unit)) for unit in right])

    def cells(units: list) -> dict[str, Figure]:
        both = points(units)
        figures = yes_no(counted(units, mme_reply))
        plus = share((both[:, 1] > 0).sum(), len(both))
        score = bootstrap([both], lambda means: means[0].sum(-1))
        return {"score": score, "accuracy": figures.pop("accuracy"), "accuracy+": plus, **figures}

    rows, sums = gather(items, answers), []
    for name, subtasks in {"perception": PERCEPTION, "cognition": COGNITION}.items():
        have = [points(rows[task].units) for task in subtasks if task in rows and rows[task].units]
        if have:
            score = bootstrap(have, lambda means: sum(mean.sum(-1) for mean in means))
            title = f"{name}: {len(have)} of {len(subtasks)} subtasks"
            sums.append({"": title, "n": score.n, "score": score})
    return sums + table(rows, cells)


def score_rbench(items: list[Item], answers: dict[str, str]) -> list[dict]:
    """Per id list, and the mean of the lists: F1 is averaged, not made from the mean precision and recall."""
    rows = gather(items, answers)
    found = table(rows, lambda units: yes_no(counted(units, pope_reply), eps=1e-5))
    lists = sorted(name for name in rows if name.startswith("list ") and rows[name].units)
    if not lists:
        return found
    units = rows["all ids"].units
    members = np.array([[name in unit[0][0].rows for name in lists] for unit in units])
    cases = counted(units, pope_reply)[:, None, :] * members[:, :, None]  # (ids, lists, 6)

    def over_lists(function: Callable[..., np.ndarray], *args) -> Figure:
        def statistic(means: list[np.ndarray]) -> np.ndarray:
            counts = len(units) * means[0].reshape(-1, len(lists), 6)
            return 100 * function(counts, *args, 1e-5).mean(-1)

        return bootstrap([cases.reshape(len(units), -1)], statistic)

    top = {"": f"mean of {len(lists)} lists", "n": int(members.any(1).sum()), "F1": over_lists(f1)}
    top |= {name: over_lists(rate, *parts) for name, parts in (RATES | OTHER_RATES).items()}
    return [top, *found]


def score_reefknot(items: list[Item], answers: dict[str, str]) -> list[dict]:
    """Yes/no: all rates. Choices: accuracy. The authors' hallucination rate is 100 - accuracy."""

    def cells(units: list) -> dict[str, Figure]:
        if units[0][0][0].label in YES_NO:
            return yes_no(counted(units, first_word))
        said = [(option(reply, "ABCD"), truth.label) for unit in units for truth, reply in unit]
        accuracy = share(sum(letter == label for letter, label in said), len(said))
        return {"accuracy": accuracy, "no option": share(sum(x is None for x, _ in said), len(said))}

    return table(gather(items, answers), cells)


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
    if name == "textvqa":
        notes.append(f"prompts {'with' if OCR in items[0].question else 'without'} OCR tokens")
    if replaced := sum(item.answer.replaced for item in items):
        notes.append(f"{replaced} records share their id with a later one and do not count")
    if missing:
        notes.append(
            f"{missing} of {len(items)} questions have no answer; they, and what is counted together with "
            "them, are left out: not a score of the whole benchmark"
        )
    return Summary(name, BENCHMARKS[name].column, rows, notes)


def score_pairs(name: str, pairs: list[Pair], scores: dict[str, Sequence[float]]) -> Summary:
    """{key: one score per caption, in their order} -> table. A pair is right if the true caption has more
    than every other; ties are wrong. Of a square, the four single comparisons are BiVLC's ("T0 to I": caption
    0 has more with picture 0 than with picture 1); I2T is Winoground's text score, T2I its image score.
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

    def cells(units: list) -> dict[str, Figure]:
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


def read_answers(name: str, items: list[Item], file: str | Path) -> tuple[dict[str, str], list[str]]:
    """A file of JSON lines {"question_id", "prompt", "text"}, ours or LLaVA's -> {key: reply}, notes.

    A line belongs to the item that has its question_id as key (R-Bench: to the later record), else to the
    only one with its picture, which LLaVA's question_id is for TextVQA and MME, and with the first line of
    its prompt. Raises BadInput for a line that is cut, repeats an answer, or answers something else.
    """
    file, whole_prompt = Path(file), benchmark(name).pairs
    by_key, by_prompt = {item.key: item for item in items}, {}
    for item in items:
        place = item.group, first_line(item.question)
        by_prompt[place] = None if place in by_prompt else item
    comparable = (lambda text: tidy(text).lower()) if whole_prompt else first_line
    answers, unknown = {}, 0
    if not file.is_file():
        raise BadInput(f"{file}: no such file of answers; give JSON lines with question_id, prompt and text")
    for where, record in load_lines(file, "; remove that line, its question is then asked again"):
        if (theirs := record.get("benchmark", name)) != name:
            raise BadInput(f"{where} answers {theirs}, not {name}; score the file with its own benchmark")
        key, text, prompt = identity(record, "question_id", where), record.get("text"), record.get("prompt")
        if not isinstance(text, str) or not isinstance(prompt, str | None):
            raise BadInput(f"{where}: text or prompt is no text; remove that line")
        group = key
        if name == "mme":  # artwork/images/1.jpg -> artwork/1
            group = f"{key.split('/')[0]}/{Path(key).stem}"
        item = by_key.get(key) or by_prompt.get((group, first_line(prompt or "")))
        if item is None:
            unknown += 1
            continue
        if prompt is not None and comparable(prompt) != comparable(item.question):
            if item.answer.replaced:
                continue  # the answer to the earlier record
            raise BadInput(
                f"{where} answers another question than {name} has under {item.key!r}; score it with the "
                "annotations that it was made from"
            )
        if item.key in answers and not item.answer.replaced:
            raise BadInput(f"{where} answers {item.key!r} once more; remove one of the two lines")
        answers[item.key] = text
    if not answers:
        raise BadInput(f"{file}: no line answers a question of {name}; give the file of its answers")
    return answers, [f"{unknown} lines answer no question of these annotations"] if unknown else []


def score_file(
    name: str, annotations: str | Path, answers_file: str | Path, as_released: bool = False
) -> Summary:
    """Scores a file of answers, see read_answers; needs neither pictures nor a model."""
    items = read(name, annotations, as_released=as_released)
    answers, notes = read_answers(name, items, answers_file)
    summary = score(name, items, answers, as_released)
    return summary._replace(notes=summary.notes + notes)


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
        "chance is 50; a liking for one letter shows in the two orders", max_new_tokens=32, average=True),
    "sade": Benchmark(
        sade, "sade.json in the form of benchmarks.sade, Winoground's examples.jsonl, or a folder of both",
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
        vizwiz, "val.json", "a split with public answers; published figures are mostly of test",
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
