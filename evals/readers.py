"""The native files of the eleven benchmarks -> what is asked, with what scoring needs to know of it.

    (annotations, images) -> Pair, a picture and its captions, or Item, one question to one picture

Inside: one reader and prompt per benchmark. Left out on purpose: evaluation servers (test splits), R-Bench's
instance level (masks), Reefknot's open questions (they need a judge).
"""

import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from data import inside
from support.errors import BadInput
from support.files import field, parse_json, read_bytes, read_json, read_text, texts

LETTERS = "ABCDEF"
YES_NO = ("yes", "no")
SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA's suffix for short answers


class Truth(NamedTuple):
    """What scoring needs of one question; the model never sees it."""

    label: Any  # the letter, "yes" or "no", the word, or all human answers
    rows: tuple[str, ...]  # rows of the table that it counts in, in one named twice it counts twice (R-Bench)
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


# ---------------------------------------------------------------- files


def load(file: Path, kind: type) -> Any:
    """A JSON file that holds a `kind`; what to do about it is said by benchmarks.read."""
    return read_json(file, kind, remedy="")


def load_lines(file: Path, may_be_cut: bool = False) -> Iterator[tuple[str, dict]]:
    """The objects of a file of JSON lines, or of one JSON list, each with file and number to name it by.

    may_be_cut: a last line without its end, which a killed run leaves, is dropped.
    """
    content = read_bytes(file)
    is_list = content.lstrip().startswith(b"[")
    for number, line in enumerate([content] if is_list else content.splitlines(keepends=True), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            parsed = parse_json(line, where)
        except BadInput:
            if may_be_cut and not is_list and not line.endswith(b"\n"):
                return
            raise
        for i, record in enumerate(parsed if is_list else [parsed]):
            where = f"{file}, record {i}" if is_list else where
            if not isinstance(record, dict):
                raise BadInput(f"{where} is no JSON object")
            yield where, record


# What others call the fields of an answer: LLaVA's scripts for GQA and VQAv2, VizWiz's server, Reefknot.
ANSWER_FIELDS = {
    "question_id": ("questionId", "image"),
    "prompt": ("query_prompt",),
    "text": ("prediction", "response", "answer"),
}


def answer_lines(file: Path) -> Iterator[tuple[str, dict]]:
    """The lines of an answers file; a last one that a killed run has cut is dropped."""
    try:
        for number, (where, row) in enumerate(load_lines(file, may_be_cut=True)):
            for ours, theirs in ANSWER_FIELDS.items():
                if names := [name for name in theirs if name in row]:
                    row.setdefault(ours, row[names[0]])
            if "query_prompt" in row:  # Reefknot's own records have no id, so their position stands for it
                row.setdefault("question_id", number)
            identity(row, "question_id", where)
            yield where, row
    except BadInput as error:
        form = "JSON lines, or one JSON list, of objects with question_id, prompt and text"
        raise BadInput(f"{error}; remove what is wrong, or give another file: {form}") from None


def identity(record: Any, name: str, where: str) -> str:
    """A text or whole number that names a record."""
    number = isinstance(record, dict) and type(record.get(name)) is int
    return str(field(record, name, int if number else str, where))


def human_answers(record: dict, where: str) -> tuple[str, ...]:
    """A record's answers: texts, or objects with a text under "answer"; one may be empty."""
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
    found = [file for name in names if os.path.lexists(file := annotations / name)]
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

SUGARCREPE = "swap_obj swap_att replace_obj replace_rel replace_att add_obj add_att".split()
SUGARCREPE = [f"{kind}.json" for kind in SUGARCREPE]


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
            "unpack the rows into bivlc.jsonl and a folder of pictures (the form is in evals/readers.py)"
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
    # not write_atomically, which looks through the folder each time: there are thousands of pictures
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.writing")
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


OCR = "Reference OCR token:"  # optical character recognition: the texts that were found in the picture


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
        image, question = texts(record, where, "image", "question")
        if "answers" not in record:
            raise BadInput(f"{where} has no answers to score by, like all of test.json; give val.json")
        (kind,) = texts(record, where, "answer_type")
        prompt = question.capitalize() + UNANSWERABLE + SHORT
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
            for number, line in enumerate(read_text(file).splitlines(), 1):
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
    figures are means over these. As in the official code, an id that is twice in an id list counts twice, and
    of records that share an id (95 do) the later one counts.
    """
    file = one(annotations, "image-level_*.json")
    lists = {}
    for path in sorted(file.parent.glob("*image-level_rel_ids_[1-5].json")):
        lists[f"list {path.stem[-1]}"] = Counter(map(str, load(path, list)))
    records: dict[str, list[dict]] = {}
    for number, record in enumerate(load(file, list)):
        key = identity(record, "question_id", f"{file}, record {number}")
        records.setdefault(key, []).append(record)
    if strange := [name for name, ids in lists.items() if not ids.keys() & records.keys()]:
        raise BadInput(f"{file}: id {strange[0]} beside it has none of its ids")
    for key, same in records.items():
        where, record = f"{file}, question {key}", same[-1]
        name, text, label = texts(record, where, "image", "text", "label")
        rows = ("all ids", *(name for name in lists for _ in range(lists[name][key])))
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


# ---------------------------------------------------------------- texts


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
