"""benchmarks.py: native files, prompts, parsers, normalisations, metrics, intervals, files of answers.

Records are our own, in the native form, but for a few of SugarCrepe's (MIT, in samples/). Published figures
are reproduced from the real files where the environment variable SHARED names the folder that holds them.
"""

import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals import metrics
from evals.benchmarks import BENCHMARKS, match_answers, read, read_pairs, score, score_file, score_pairs
from evals.metrics import (
    bootstrap,
    f1,
    first_word,
    mme_reply,
    normalise_evalai,
    normalise_official,
    official_accuracy,
    option,
    pope_reply,
    released_option,
    share,
    soft_accuracy,
)
from support.errors import BadInput

SAMPLES = Path(__file__).parent / "samples"
SHORT = "\nAnswer the question using a single word or phrase."
SUBSETS = "swap_obj swap_att replace_obj replace_rel replace_att add_obj add_att".split()


@pytest.fixture(scope="module")
def real() -> Path:
    if "SHARED" not in os.environ:
        pytest.skip("SHARED is not set: no real annotation files")
    return Path(os.environ["SHARED"]) / "data"


def put(file: Path, content) -> Path:
    """A JSON file; a .jsonl of the list's objects, a text as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        text = content
    elif file.suffix == ".jsonl":
        text = "".join(json.dumps(record) + "\n" for record in content)
    else:
        text = json.dumps(content)
    file.write_text(text, encoding="utf-8")
    return file


def sentence(error) -> str:
    """A message for the user is one sentence: one line that ends in a remedy."""
    text = str(error.value)
    assert "\n" not in text and re.search("; (mend|give|remove|score|let|choose|use|without)", text), text
    return text


def row(summary, name: str) -> dict:
    (found,) = [row for row in summary.rows if row[""] == name]
    return found


# ---------------------------------------------------------------- records of our own


def ten(*counts: tuple[str, int]) -> list[dict]:
    """Ten human answers without ids, equal ones as equal objects: VizWiz's form."""
    return [{"answer": text, "answer_confidence": "yes"} for text, n in counts for _ in range(n)]


WINOGROUND = [
    {
        "id": i,
        "caption_0": f"a cat chases {i} dogs",
        "caption_1": f"{i} dogs chase  a cat ",
        "image_0": f"ex_{i}_img_0",
        "image_1": f"ex_{i}_img_1",
        "tag": "",
        "secondary_tag": "",
        "num_main_preds": 1,
        "collapsed_tag": ("Relation", "Object")[i % 2],
    }
    for i in (0, 7)
]
SADE = [
    {
        "id": "r1",
        "branch": "Relation",
        "source": "VG",
        "image": "VG_100K/1.jpg",
        "references": ["the cat on the mat", "the mat on the cat"],
    },
    {
        "id": "a1",
        "branch": "Atomic",
        "source": "VG",
        "image": "VG_100K/2.jpg",
        "references": [f"a {color} cat" for color in "red blue green black white grey".split()],
    },
]
BIVLC = [
    {
        "caption": f"a man with {i} balls",
        "negative_caption": f"a ball with {i} men",
        "image": f"{i}.jpg",
        "negative_image": f"{i}_negative.jpg",
        "type": ("add", "swap")[i % 2],
        "subtype": "obj",
    }
    for i in range(3)
]
VQA = {262148000: ("Where is he looking?", "other", "where"), 7: ("Is it?", "yes/no", "is it")}
GQA = {
    "02930152": ("Is the sky dark?", "yes", "2354786", "verify", True),
    "20903190": ("What is it?", "train", "n411121", "query", True),
    "3": ("Who?", "man", "n411121", "query", False),
}
MME = {
    "existence": [("1.jpg", "Is there a dog?", "Yes"), ("1.jpg", "Is there a cat?", "No")],
    "artwork": [("9.jpg", 'Is this "A, b"?  ', "Yes"), ("9.jpg", "Is this  c?", "No")],
    "code_reasoning": [("1.png", "Is it python?", "Yes"), ("1.png", "Is it c?", "No")],
}
RBENCH = [
    {"question_id": i, "qtype": "Positive", "image": f"{i}.jpg", "text": text, "label": label}
    for i, text, label in [
        (0, "Is the child wearing a hat?", "Yes"),
        (1, "Is the dog on a boat?", "No."),
        (5, "Is the old question?", "Yes"),
        (5, "Is the new question?", "No"),
        (9, "w", "o"),
    ]
]
REEFKNOT = {
    "YESNO": [("1", "Is the man on bus? Please answer yes or no.", "yes", "perception")] * 2
    + [("1", "Is the man off bus? Please answer yes or no. ", "no", "cognitive")],
    "Multichoice": [("2", "Which? A. behind B. onto C. on D. into, please choose.", "D", "perception")],
}


def write_native(name: str, folder: Path) -> list[str]:
    """The benchmark's files in the folder -> names of the pictures that it asks for."""
    if name == "sugarcrepe":
        shutil.copytree(SAMPLES / "sugarcrepe", folder, dirs_exist_ok=True)
        files = [json.loads((folder / f"{subset}.json").read_text()) for subset in SUBSETS]
        return sorted({record["filename"] for file in files for record in file.values()})
    if name in ("winoground", "sade"):
        put(folder / "data/examples.jsonl", WINOGROUND)
        names = [f"ex_{i}_img_{k}.png" for i in (0, 7) for k in (0, 1)]
        if name == "sade":
            put(folder / "sade.json", SADE)
            names += [record["image"] for record in SADE]
        return names
    if name == "bivlc":
        put(folder / "bivlc.jsonl", BIVLC)
        return [record[key] for record in BIVLC for key in ("image", "negative_image")]
    if name == "vqav2":
        ids = {key: 262148 if key > 7 else 7 for key in VQA}
        questions = [{"image_id": ids[k], "question": q, "question_id": k} for k, (q, *_) in VQA.items()]
        truths = [
            {
                "question_id": key,
                "answer_type": kind,
                "question_type": start,
                "answers": [a | {"answer_id": i} for i, a in enumerate(ten(("down", 8), ("Up", 2)))],
            }
            for key, (_, kind, start) in VQA.items()
        ]
        content = {"data_subtype": "val2014", "questions": questions}
        put(folder / "v2_OpenEnded_mscoco_val2014_questions.json", content)
        put(folder / "v2_mscoco_val2014_annotations.json", {"annotations": truths[::-1]})
        return ["COCO_val2014_000000262148.jpg", "val2014/COCO_val2014_000000000007.jpg"]
    if name == "gqa":
        records = {
            key: {"question": q, "answer": a, "imageId": i, "isBalanced": b, "types": {"structural": s}}
            for key, (q, a, i, s, b) in GQA.items()
        }
        put(folder / "testdev_balanced_questions.json", records)
        return ["2354786.jpg", "images/n411121.jpg"]
    if name == "textvqa":
        data = [
            {"question": q, "image_id": "003a", "question_id": i, "answers": ["dakota"] * 4 + ["nikon"] * 6}
            for i, q in ((34602, "what is the brand?"), (34603, "who made it?"))
        ]
        put(folder / "TextVQA_0.5.1_val.json", {"data": data})
        return ["train_images/003a.jpg"]
    if name == "vizwiz":
        answers = {"answers": ten(("unsuitable", 4), ("unanswerable", 6))}
        records = [
            {"image": f"VizWiz_val_{i}.jpg", "question": " What's this? ", "answer_type": t} | answers
            for i, t in ((0, "unanswerable"), (1, "other"))
        ]
        put(folder / "val.json", records)
        return ["VizWiz_val_0.jpg", "val/VizWiz_val_1.jpg"]
    if name == "mme":
        for subtask, lines in MME.items():
            text = "".join(f"{i}\t{q} Please answer yes or no.\t{a}\n" for i, q, a in lines)
            put(folder / f"{subtask}.txt", text)
        return ["existence/1.jpg", "artwork/images/9.jpg", "code_reasoning/1.png"]
    if name == "rbench":
        put(folder / "image-level_filterd.json", RBENCH)
        for i, ids in enumerate(([0, 1], [0, 5], [1, 9, 777], [0, 1, 5], [0, 1, 5, 9]), 1):
            put(folder / f"nocaps_image-level_rel_ids_{i}.json", ids)
        return [f"{i}.jpg" for i in (0, 1, 5, 9)]
    for stem, lines in REEFKNOT.items():
        fields = "image_id", "query_prompt", "label", "relation_type"
        put(folder / f"{stem}.jsonl", [dict(zip(fields, line)) for line in lines])
    return ["VG_100K/1.jpg", "VG_100K_2/2.jpg"]


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Each benchmark's annotations and pictures."""
    folders = {}
    for name in BENCHMARKS:
        annotations, images = (tmp_path_factory.mktemp(f"{name}_{kind}") for kind in ("files", "images"))
        for picture in write_native(name, annotations):
            (images / picture).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(images / picture)
        folders[name] = annotations, images
    return folders


def perfect(items) -> dict[str, str]:
    """A reply to each item that is as right as can be."""
    return {
        item.key: item.answer.label
        if isinstance(item.answer.label, str)
        else max(item.answer.label, key=item.answer.label.count)
        for item in items
    }


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_read_with_its_pictures_and_scored(name, native):
    items = read(name, *native[name])
    assert all(item.image.is_file() for item in items)
    assert len({item.key for item in items}) == len(items)
    without = read(name, native[name][0])
    assert [item._replace(image=None) for item in items] == without
    summary = score(name, items, perfect(items))
    assert summary.headline.value == pytest.approx(400 if name == "mme" else 100, abs=2e-3)
    assert json.loads(json.dumps(summary.json()))["headline"]["value"] == summary.headline.value
    assert str(summary).count("\n| ") == len(summary.rows) + 2


PROMPTS = {  # one key of each, with its question
    "sugarcrepe": (
        "swap_obj/14/B",
        "Which caption best describes the image?\n"
        "(A) A woman with a cell phone and a black dress looks at her large black tear drop earrings.\n"
        " (B) A woman with large black tear drop earrings and a black dress looks at her cell phone.\n"
        "Answer with the option's alphabet from the given choices directly.",
    ),
    "sade": (
        "a1/C",
        "Which caption best describes the image?\n(A) a blue cat\n (B) a green cat\n (C) a red cat\n"
        " (D) a black cat\n (E) a white cat\n (F) a grey cat\n"
        "Answer with the option's alphabet from the given choices directly.",
    ),
    "winoground": (
        "7/1/A",
        "Which caption best describes the image?\n(A) 7 dogs chase a cat\n (B) a cat chases 7 dogs\n"
        "Answer with the option's alphabet from the given choices directly.",
    ),
    "bivlc": (
        "2/1/A",
        "Which caption best describes the image?\n(A) a ball with 2 men\n (B) a man with 2 balls\n"
        "Answer with the option's alphabet from the given choices directly.",
    ),
    "vqav2": ("262148000", "Where is he looking?" + SHORT),
    "gqa": ("02930152", "Is the sky dark?" + SHORT),
    "textvqa": ("34602", "What is the brand?" + SHORT),
    "vizwiz": (
        "VizWiz_val_1.jpg",
        " what's this? \nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
    ),
    "mme": ('artwork/9/Is this "A, b"?', 'Is this "A, b"?' + SHORT),
    "rbench": ("5", "Is the new question?"),
    "reefknot": ("Multichoice/0", "Which? A. behind B. onto C. on D. into, please choose."),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_keys_and_prompts(name, native):
    items = {item.key: item for item in read(name, native[name][0])}
    key, question = PROMPTS[name]
    assert items[key].question == question


def test_groups_share_a_picture(native):
    for name in BENCHMARKS:
        groups = {}
        for item in read(name, *native[name]):
            groups.setdefault(item.group, set()).add(item.image)
        assert all(len(pictures) == 1 for pictures in groups.values()), name
        assert len(groups) == len(set.union(*groups.values())), name


def test_options_are_what_a_first_token_may_choose(native):
    options = {name: {item.options for item in read(name, native[name][0])} for name in BENCHMARKS}
    two, yes_no = ("A", "B"), ("yes", "no")
    assert options["sugarcrepe"] == options["winoground"] == options["bivlc"] == {two}
    assert options["sade"] == {two, tuple("ABCDEF")}
    assert options["mme"] == options["rbench"] == {yes_no}
    assert options["reefknot"] == {yes_no, tuple("ABCD")}
    assert all(options[name] == {()} for name in ("vqav2", "gqa", "textvqa", "vizwiz"))


def test_captions_are_stripped_and_collapsed_unless_as_released(native):
    files = native["winoground"][0]
    captions = {pair.key: pair.captions for pair in read_pairs("winoground", files)}
    assert captions["0/0"] == ("a cat chases 0 dogs", "0 dogs chase a cat")
    released = {pair.key: pair.captions for pair in read_pairs("winoground", files, as_released=True)}
    assert released["0/1"] == ("0 dogs chase  a cat ", "a cat chases 0 dogs")
    items = {item.key: item for item in read("winoground", files, as_released=True)}
    assert "\n(A) 0 dogs chase  a cat \n (B) a cat chases 0 dogs\n" in items["0/1/A"].question


def test_textvqa_with_ocr_tokens_where_llavas_file_lies_beside(tmp_path):
    write_native("textvqa", tmp_path)
    text = "Reference OCR token: DAKOTA" + SHORT
    ocr = [{"question_id": "003a", "text": f"{q}\n{text}"} for q in ("Who made it?", "What is the brand?")]
    put(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", ocr)
    items = read("textvqa", tmp_path)
    assert [item.question.split("\n")[0] for item in items] == ["What is the brand?", "Who made it?"]
    assert all("OCR token: DAKOTA" in item.question for item in items)
    without = read("textvqa", tmp_path / "TextVQA_0.5.1_val.json")
    assert all("OCR" not in item.question for item in without)
    put(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", ocr[:1])
    with pytest.raises(BadInput, match="not in") as error:
        read("textvqa", tmp_path)
    sentence(error)


@pytest.mark.parametrize("folder", ["", "questions_answers_YN/"])
def test_mme_in_the_release_layout(folder, native, tmp_path):
    for subtask, lines in MME.items():
        text = "".join(f"{q} Please answer yes or no.\t{a}\n" for _, q, a in lines)
        put(tmp_path / subtask / f"{folder}{Path(lines[0][0]).stem}.txt", text)
    annotations, images = native["mme"]
    assert read("mme", tmp_path, images) == read("mme", annotations, images)


def test_gqa_counts_balanced_questions_only(native, tmp_path):
    folder = native["gqa"][0]
    assert [item.key for item in read("gqa", folder)] == ["02930152", "20903190"]
    file = shutil.copy(folder / "testdev_balanced_questions.json", tmp_path / "ood_testdev_head.json")
    assert read("gqa", file) == read("gqa", folder)  # GQA-OOD's files have the same form


def test_vizwiz_asks_as_llava_does(native, tmp_path):
    """Python's str.capitalize: the first letter upper, all others lower, nothing stripped."""
    (record, *_) = json.loads((native["vizwiz"][0] / "val.json").read_text())
    asked = {"is THIS Dr Pepper or Coke?": "Is this dr pepper or coke?", " Is it RED? ": " is it red? "}
    put(tmp_path / "val.json", [record | {"image": f"{q}.jpg", "question": q} for q in asked])
    found = [item.question.split("\n")[0] for item in read("vizwiz", tmp_path)]
    assert found == list(asked.values())


def test_vizwiz_test_split_cannot_be_scored(tmp_path):
    file = put(tmp_path / "test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What is this?"}])
    with pytest.raises(BadInput, match="record 0 has no answers .* test.json; give val.json") as error:
        read("vizwiz", file)
    sentence(error)


def test_files_with_a_byte_order_mark(native, tmp_path):
    for name in ("sugarcrepe", "winoground", "mme", "reefknot"):
        shutil.copytree(native[name][0], tmp_path / name)
        for file in (file for file in (tmp_path / name).glob("**/*") if file.is_file()):
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        items = read(name, tmp_path / name)
        assert items == read(name, native[name][0])
        answers = put(tmp_path / f"{name}.jsonl", ours(items, perfect(items), name))
        answers.write_bytes(b"\xef\xbb\xbf" + answers.read_bytes())
        assert match_answers(name, items, answers) == (perfect(items), [])


def test_bivlc_from_parquet(native, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    annotations, images = native["bivlc"]
    rows = [
        record | {key: {"bytes": (images / record[key]).read_bytes(), "path": None} for key in keys}
        for record in BIVLC
        for keys in [("image", "negative_image")]
    ]
    (tmp_path / "images").mkdir()
    for shard, some in enumerate((rows[:2], rows[2:])):
        parquet.write_table(arrow.Table.from_pylist(some), tmp_path / f"test-{shard}.parquet")
    pairs = read_pairs("bivlc", tmp_path, tmp_path / "images")
    theirs = read_pairs("bivlc", annotations, images)
    assert [(p.key, p.captions, p.rows) for p in pairs] == [(p.key, p.captions, p.rows) for p in theirs]
    assert [p.image.read_bytes() for p in pairs] == [p.image.read_bytes() for p in theirs]
    assert len(list((tmp_path / "images").iterdir())) == 6
    assert [p.key for p in read_pairs("bivlc", tmp_path)] == [p.key for p in theirs]
    put(tmp_path / "test-0.parquet", "no parquet")
    with pytest.raises(BadInput, match="cannot be read") as error:
        read("bivlc", tmp_path)
    sentence(error)


def test_parquet_without_pyarrow_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    put(tmp_path / "test.parquet", "")
    with pytest.raises(BadInput, match=r"pip install pyarrow.*bivlc\.jsonl") as error:
        read("bivlc", tmp_path)
    sentence(error)


# ---------------------------------------------------------------- wrong files


def changed(record: dict, **fields) -> dict:
    return {key: value for key, value in (record | fields).items() if value is not None}


PAIR = {"filename": "1.jpg", "caption": "a", "negative_caption": "b"}
WRONG = {  # benchmark, file, content, what the sentence names
    "no such name in folder": ("sugarcrepe", "other.json", {}, "swap_obj.json"),
    "no JSON": ("sugarcrepe", "swap_obj.json", '{"0": ', "not valid JSON"),
    "a list": ("sugarcrepe", "swap_obj.json", [PAIR], "list, not a dict"),
    "no records": ("sugarcrepe", "swap_obj.json", {}, "no record"),
    "a record of another kind": ("sugarcrepe", "swap_obj.json", {"0": 5}, "record '0'"),
    "a key twice": ("sugarcrepe", "swap_obj.json", '{"3": 1, "4": 1, "3": 1}', "'3' is there twice"),
    "an empty caption": ("sugarcrepe", "add_att.json", {"5": PAIR | {"caption": " \n"}}, "caption is empty"),
    "a number as caption": ("sugarcrepe", "add_att.json", {"5": PAIR | {"caption": 5}}, "caption is 5"),
    "Winoground twice": ("winoground", "examples.jsonl", [WINOGROUND[0]] * 2, "'0/0' is there twice"),
    "Winoground cut": ("winoground", "examples.jsonl", '{"id": 0', "line 1 is not valid JSON"),
    "SADE twice": ("sade", "sade.json", [SADE[0]] * 2, "'r1' is there twice"),
    "one reference": ("sade", "sade.json", [SADE[0] | {"references": ["a"]}], "1 references, not two to six"),
    "seven references": ("sade", "sade.json", [SADE[0] | {"references": list("abcdefg")}], "7 references"),
    "an empty reference": ("sade", "sade.json", [SADE[0] | {"references": ["a", ""]}], "reference is empty"),
    "nothing of SADE": ("sade", "other.txt", "", "no record"),
    "GQA twice": ("gqa", "testdev_balanced_questions.json", '{"1": {}, "1": {}}', "'1' is there twice"),
    "TextVQA without answers": ("textvqa", "TextVQA_0.5.1_val.json", {"data": [
        {"question": "q", "image_id": "i", "question_id": 1}]}, "answers is None"),
    "TextVQA twice": ("textvqa", "TextVQA_0.5.1_val.json", {"data": [
        {"question": "q", "image_id": "i", "question_id": 1, "answers": ["a"]}] * 2}, "'1' is there twice"),
    "no file of VizWiz": ("vizwiz", "test.json", [], "0 files *val.json"),
    "answers that are numbers": ("vizwiz", "val.json", [
        {"image": "1.jpg", "question": "q", "answer_type": "other", "answers": [1]}], "no list of texts"),
    "VizWiz twice": ("vizwiz", "val.json", [
        {"image": "1.jpg", "question": "q", "answer_type": "other", "answers": ["a"]}] * 2, "twice"),
    "MME without label": ("mme", "existence.txt", "1.jpg\tIs it?\n", "line 1 is not: picture, question"),
    "MME twice": ("mme", "existence.txt", "1.jpg\tIs it?\tYes\n" * 2, "is there twice"),
    "an id list of others": ("rbench", "nocaps_image-level_rel_ids_1.json", [12345], "none of its ids"),
    "Reefknot's labels": ("reefknot", "YESNO.jsonl", [
        dict(image_id="1", query_prompt="q", label="D", relation_type="cognitive")], "'D', not one of yes"),
    "a truth value as number": ("vqav2", "x_annotations.json", {"annotations": []}, "image_id is True"),
    "two files": ("textvqa", "TextVQA_0.5.1_val.json", {"data": []}, "has 2 files TextVQA_"),
    "other annotations": ("vqav2", "x_questions.json", {}, "0 files *annotations.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_sentence(case, tmp_path):
    name, file, content, says = WRONG[case]
    if name == "rbench":
        put(tmp_path / "image-level_filterd.json", RBENCH)
    if "image_id" in says:
        questions = [{"image_id": True, "question_id": 1, "question": "q"}]
        put(tmp_path / "x_questions.json", {"data_subtype": "val2014", "questions": questions})
    if "has 2 files" in says:
        put(tmp_path / "TextVQA_0.6_val.json", content)
    put(tmp_path / file, content)
    with pytest.raises(BadInput) as error:
        read(name, tmp_path)
    text = sentence(error)
    assert says in text and str(tmp_path) in text and f"{name} is read from" in text


def test_vqav2_joins_its_two_files(native, tmp_path):
    shutil.copytree(native["vqav2"][0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "v2_mscoco_val2014_annotations.json"
    records = json.loads(file.read_text())["annotations"]
    for wrong, says in ((records[:1], "no answers in"), (records * 2, "twice")):
        put(file, {"annotations": wrong})
        with pytest.raises(BadInput, match=says) as error:
            read("vqav2", tmp_path)
        sentence(error)
    with pytest.raises(BadInput, match="annotations is None"):
        read("vqav2", tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json")


@pytest.mark.parametrize("name", ["../1.jpg", "/etc/passwd", "a\0b", "x" * 5000])
def test_pictures_stay_in_their_folder(name, tmp_path):
    (tmp_path / "images").mkdir()
    file = put(tmp_path / "swap_obj.json", {"0": PAIR | {"filename": name}})
    with pytest.raises(BadInput) as error:
        read("sugarcrepe", file, tmp_path / "images")
    assert "picture" in sentence(error)


def test_a_picture_that_was_missing_is_found_by_the_next_read(tmp_path):
    write_native("textvqa", tmp_path)
    (tmp_path / "images" / "train_images").mkdir(parents=True)
    with pytest.raises(BadInput, match="1 of 1 pictures are missing"):
        read("textvqa", tmp_path, tmp_path / "images")
    (tmp_path / "images" / "train_images" / "003a.jpg").touch()
    assert read("textvqa", tmp_path, tmp_path / "images")[0].image.is_file()


def test_missing_pictures_and_folders(native, tmp_path):
    annotations, images = native["sugarcrepe"]
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "000000222235.jpg").unlink()
    with pytest.raises(BadInput, match=r"1 of \d+ pictures are missing.*000000222235\.jpg") as error:
        read("sugarcrepe", annotations, tmp_path / "images")
    sentence(error)
    with pytest.raises(BadInput, match="no such folder of pictures") as error:
        read("sugarcrepe", annotations, tmp_path / "none")
    sentence(error)
    with pytest.raises(BadInput, match="does not exist") as error:
        read("sugarcrepe", tmp_path / "none")
    sentence(error)
    with pytest.raises(BadInput, match="no benchmark 'sugarcreep'") as error:
        read("sugarcreep", annotations)
    sentence(error)
    with pytest.raises(BadInput, match="no captions") as error:
        read_pairs("gqa", annotations)
    sentence(error)


# ---------------------------------------------------------------- what a reply says


@pytest.mark.parametrize(
    "reply, ours, released",
    [
        ("A", "A", "A"),
        (" b", "B", "B"),
        ("(b)", "B", "B"),
        ("A.", "A", "A"),
        ("A. A cat on B street", "A", "A"),
        ("**B**", "B", "B"),
        ("B\n (A) a cat", "B", "B"),
        ("Option A", "A", "A"),
        ("A is the best caption.", "A", "A"),
        ("It is a dog: (B)", "B", "A"),  # the released rule finds the article
        ("B is right, not a dog", "B", "B"),
        ("A cat sits on the plant.", None, "A"),
        ("It is a cat.", None, "A"),
        ("The answer is a dog", None, "A"),
        ("Neither (A) nor (B)", None, "A"),
        ("The U.S.A. team", None, "A"),
        ("An A-frame house", None, "A"),
        ("C", None, None),
        ("", None, None),
        ("Both", None, None),
        ("Both A and B", None, "A"),
        ("A best describes the image", "A", "A"),
        ("B best describes the image", "B", "B"),
        ("Option A best matches the picture.", "A", "A"),
        ("A matches the image", "A", "A"),
        ("A fits better", "A", "A"),
        ("A most accurately depicts the scene", "A", "A"),
        ("A would be the right choice", "A", "A"),
        ("A can be seen in the picture", "A", "A"),
        ("A, because it is a dog", "A", "A"),
        ("A) and a dog", "A", "A"),
        ("A\n(A) a cat\n(B) a dog", "A", "A"),
        ("The answer is (a).", "A", "A"),
        ("B. A cat sits", "B", "B"),
        ("B, a cat sits", "B", "B"),
        ("A can of soda", None, "A"),
        ("A sports car", None, "A"),
        ("A bus is parked", None, "A"),
        ("A family sits on the beach", None, "A"),
        ("A best friend", None, "A"),
        ("A brightly lit room", None, "A"),
        ("A behind", None, "A"),
        ("(A) or (B)", None, "A"),
        ("(A) (B)", None, "A"),
        ("a) or b)", None, "A"),
        ("A or B", None, "A"),
        ("A. or B.", None, "A"),
        ("A, or B is right", None, "A"),
        ("A and B", None, "A"),
        ("A, B", None, "A"),
        ("A, maybe B", None, "A"),
        ("A, but the picture is dark", "A", "A"),
        ("A, not B", "A", "A"),
        ("a, b", None, "A"),
        ("A. B.", None, "A"),
        ("A\nB", None, "A"),
        ("A B", None, "A"),
        ("A/B", None, "A"),
        ("A vs. B", None, "A"),
        ("A rather than B", None, "A"),
        ("**A** or **B**", None, "A"),
    ],
)
def test_the_letter_of_a_reply(reply, ours, released):
    assert (option(reply), released_option(reply)) == (ours, released)


def test_letters_beyond_b():
    assert [option(reply, "ABCD") for reply in ("D", "d. into", "C is right", "E", "A or D")] == [
        "D", "D", "C", None, None,
    ]  # fmt: skip
    assert option("F", "ABCDEF") == "F"
    several = "B, C", "(B), (C) and (D)", "c) or d)", "B. C. D.", "D/B", "Either B or D", "A, B, C, D"
    assert [option(reply, "ABCD") for reply in several] == [None] * len(several)
    for letter in "AB":  # an option written out, which begins with an article of its own
        replies = (f"{letter} A cat sits", f"{letter} The cat", f"{letter} an owl")
        assert [option(reply) for reply in replies] == [letter] * 3
    assert option("B", "AC") is None


def test_mme_rule():
    replies = {"Yes": "yes", "no": "no", " Yes, it": "yes", "No.": "no", "Not": "no", "1. Yes": "other"}
    replies |= {"": "other", "Absolutely yes": "other", "NO": "no", "noyes": "yes", "It is no": "other"}
    assert {reply: mme_reply(reply) for reply in replies} == replies | {"noyes": "no"}  # its "yes" ends at 5


def test_pope_rule():
    """A reply that is odd counts as yes; so do NO and what stands after the first period."""
    no = ["No", "no", "No, there is", "There is not a dog", "well no, sir"]
    yes = ["Yes", "", "NO", "no\nyes", "I see. No", "Nothing", "nothing at all"]
    assert [pope_reply(reply) for reply in no + yes] == ["no"] * len(no) + ["yes"] * len(yes)


def test_first_word_rule():
    replies = {"Yes": "yes", "**no**": "no", "'Yes, it is": "yes", "NO.": "no", "I say yes": "other"}
    replies |= {"": "other", "...": "other", "Yesterday": "other"}
    assert {reply: first_word(reply) for reply in replies} == replies


# ---------------------------------------------------------------- short answers

N1 = {
    "Two dogs.": "2 dogs",
    "a red, white and blue flag": "red white and blue flag",
    "$1,000": "$1000",
    "3.5": "3.5",
    "3.": "3",
    "p.m.": "pm",
    "stop-sign": "stop sign",
    "a - b": "b",
    "Dont": "don't",
    "6:30 PM": "6:30 pm",
    "it's a dog's": "it 's dog 's",
    "1,5-2": "15 2",
    " None\tof the\nTen ": "0 of 10",
    "what?": "what",
    "50% (off)": "50% off",
    "x?y": "xy",
    "x -y-z": "x yz",  # a mark beside a space goes everywhere
    "x;-y-z": "x y z",  # judged by the text before any mark went
}


@pytest.mark.parametrize("text, wanted", N1.items())
def test_normalisation_n1(text, wanted):
    assert normalise_evalai(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [("1,5-2", "152"), ("it's a dog's", "it's dog's"), ("Two dogs.", "2 dogs"), ("Yes?", "yes")]
    + [("red,blue", "red blue"), ("red, blue", "red blue"), ("'ow'sat", "'ow's'at"), ("x\ty ", "x y")],
)
def test_normalisation_n2(text, wanted):
    assert normalise_official(text) == wanted


def test_apostrophes():
    """114 of the published 120: four have capitals and cannot match, two change nothing."""
    assert len(metrics.APOSTROPHES) == 114
    mended = dict(
        dont="don't", oclock="o'clock", twas="'twas", weve="we've", shant="shan't", maam="ma'am", yall="y'all"
    )
    mended |= {"couldnt've": "couldn't've", "couldn'tve": "couldn't've", "yall'd've": "y'all'd've"}
    mended |= {"somebody'd": "somebodyd", "shed've": "she'd've"}
    alone = "its well were wed shed id ill hell shell lets couldntve somebodyd im ive".split()
    for text, wanted in {**mended, **{word: word for word in alone}}.items():
        assert normalise_evalai(text) == wanted


def leave_one_out(said: str, answers: list[str]) -> float:
    """The definition, by position."""
    found = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        found.append(min(1.0, others.count(said) / 3))
    return sum(found) / len(found)


@pytest.mark.parametrize("n, wanted", list(enumerate([0, 0.3, 0.6, 0.9] + 7 * [1.0])))
def test_soft_accuracy(n, wanted):
    answers = ["cat"] * n + [f"dog {i}" for i in range(10 - n)]
    assert soft_accuracy("Cat.", answers) == pytest.approx(wanted)
    assert leave_one_out("cat", answers) == pytest.approx(wanted)


def test_soft_accuracy_of_other_numbers_of_answers():
    for k, n in itertools.combinations(range(9), 2):
        answers = ["cat"] * k + ["dog"] * (n - k)
        assert soft_accuracy("cat", answers) == pytest.approx(leave_one_out("cat", answers))


def test_official_accuracy_is_raw_where_all_agree():
    assert official_accuracy("Yes", ["yes"] * 10) == 0
    assert official_accuracy("yes\n", ["yes"] * 9 + ["yes "]) == 1
    assert official_accuracy("Yes", ["yes"] * 9 + ["yes "]) == 0
    assert official_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("hits, n", [(8, 10), (0, 10), (10, 10), (61, 100), (1, 9740)])
def test_wilson_is_where_the_share_is_just_1_96_deviations_away(hits, n):
    figure = share(hits, n)
    assert figure.value == 100 * hits / n and (figure.n, figure.interval) == (n, "Wilson")
    for bound in (figure.low / 100, figure.high / 100):
        assert abs(hits / n - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / n) ** 0.5, abs=1e-7)
    assert 0 <= figure.low <= figure.value <= figure.high + 1e-9 <= 100 + 2e-9


def test_wilson_of_nothing():
    assert share(0, 0)[:4] == (0, 0, 100, 0)


def test_bootstrap_is_the_plain_one():
    """Against drawing units one by one, from two strata of different sizes, for a ratio of means."""
    random = np.random.default_rng(5)
    strata = [random.integers(0, 4, (60, 2)).astype(float), random.integers(0, 4, (20, 2)).astype(float)]

    def statistic(means):
        return sum(m[..., 0] / (m[..., 1] + 1) for m in means)

    drawn = [
        statistic([units[random.integers(0, len(units), len(units))].mean(0) for units in strata])
        for _ in range(4000)
    ]
    figure = bootstrap(strata, statistic)
    assert figure.value == pytest.approx(statistic([units.mean(0) for units in strata]))
    assert (figure.low, figure.high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.05)
    assert figure.high - figure.low > 0.3
    assert (figure.n, figure.interval) == (80, "bootstrap") and bootstrap(strata, statistic) == figure


# ---------------------------------------------------------------- metrics

GPT4V = {  # sugar-crepe's gpt-4v-results: items, right with the positive first, with the negative first
    "swap_att": (666, 607, 593),
    "swap_obj": (246, 211, 198),
    "add_att": (692, 604, 666),
    "add_obj": (2062, 1859, 1918),
    "replace_att": (788, 734, 740),
    "replace_obj": (1652, 1578, 1604),
    "replace_rel": (1406, 1240, 1298),
}


def test_sugarcrepe_as_gpt_4v_was_scored(tmp_path):
    for subset, (n, _, _) in GPT4V.items():
        put(tmp_path / f"{subset}.json", {str(i): PAIR for i in range(n)})
    answers = {}
    for item in read("sugarcrepe", tmp_path):
        subset, i, letter = item.key.split("/")
        right = int(i) < GPT4V[subset]["?AB".index(letter)]
        answers[item.key] = letter if right else "BA"["AB".index(letter)]
    items = read("sugarcrepe", tmp_path)
    summary = score("sugarcrepe", items, answers)
    wanted = dict(
        swap_att=90.09, swap_obj=83.13, add_att=91.76, add_obj=91.59,
        replace_att=93.53, replace_obj=96.31, replace_rel=90.26,
    )  # fmt: skip
    for subset, (n, first, second) in GPT4V.items():
        found = row(summary, subset)
        assert found["accuracy"].value == pytest.approx(wanted[subset], abs=0.006)
        assert found["truth is A"].value == pytest.approx(100 * first / n)
        assert found["truth is B"].value == pytest.approx(100 * second / n)
    assert summary.headline.value == pytest.approx(90.95, abs=0.006)
    assert row(summary, "mean of 7 subsets")["n"] == sum(n for n, _, _ in GPT4V.values())


def test_replies_that_choose_nothing_are_counted_apart(native):
    items = read("sugarcrepe", native["sugarcrepe"][0] / "swap_obj.json")
    answers = {item.key: "A cat sits there." for item in items}
    found = row(score("sugarcrepe", items, answers), "swap_obj")
    assert (found["accuracy"].value, found["no option"].value) == (0, 100)
    found = row(score("sugarcrepe", items, answers, as_released=True), "swap_obj")
    assert (found["truth is A"].value, found["truth is B"].value, found["no option"].value) == (100, 0, 0)


def test_winoground_choices(native):
    """I2T asks for both pictures of an example, right in both orders."""
    items = read("winoground", native["winoground"][0])
    answers = {item.key: item.answer.label for item in items} | {"7/1/B": "A"}
    summary = score("winoground", items, answers)
    assert summary.headline.value == 87.5
    assert (row(summary, "all")["I2T"].value, row(summary, "Object")["I2T"].value) == (50, 0)
    assert row(summary, "Relation")["I2T"].value == 100


def test_sade_averages_sources_within_a_branch_then_branches(tmp_path):
    record = SADE[0] | {"image": "1.jpg"}
    sade = [record | {"id": i, "source": source} for i, source in enumerate(["VG", "VG", "VL-CheckList"])]
    put(tmp_path / "sade.json", sade + [SADE[1]])
    pairs = read_pairs("sade", tmp_path)
    scores = {"0": [1, 0], "1": [0, 1], "2": [1, 0], "a1": [1, 2, 0, 0, 0, 0]}
    summary = score_pairs("sade", pairs, scores)
    assert row(summary, "Relation, mean")["accuracy"].value == 75
    assert summary.headline.value == 37.5
    items = read("sade", tmp_path)
    answers = {item.key: "A" for item in items}
    assert row(score("sade", items, answers), "Atomic/VG")["accuracy"].value == pytest.approx(100 / 6)


def test_squares_by_hand(native):
    """Winoground's text, image and group scores; ties are wrong."""
    pairs = read_pairs("winoground", native["winoground"][0])
    # id 0: s(c0,i0)=3 s(c1,i0)=2, s(c1,i1)=1 s(c0,i1)=0: text right; image wrong, since c1 prefers i0
    # id 7: s(c0,i0)=3 s(c1,i0)=1, s(c1,i1)=2 s(c0,i1)=2: a tie in picture 1; image right
    scores = {"0/0": [3, 2], "0/1": [1, 0], "7/0": [3, 1], "7/1": [2, 2]}
    found = score_pairs("winoground", pairs, scores).rows[0]
    values = {key: figure.value for key, figure in found.items() if key not in ("", "n", "missing")}
    assert values == {
        "accuracy": 75, "I0 to T": 100, "I1 to T": 50, "T0 to I": 100, "T1 to I": 50,
        "I2T": 50, "T2I": 50, "group": 0,
    }  # fmt: skip


def test_squares_of_random_scores(tmp_path):
    """Chance, which is known: 25 for text and image, 1 in 6 for both."""
    put(tmp_path / "examples.jsonl", [WINOGROUND[0] | {"id": i} for i in range(4000)])
    pairs = read_pairs("winoground", tmp_path)
    random = np.random.default_rng(0)
    found = score_pairs("winoground", pairs, {pair.key: random.random(2) for pair in pairs}).rows[0]
    wanted = {"accuracy": 50, "I2T": 25, "T2I": 25, "group": 100 / 6}
    assert {key: found[key].value for key in wanted} == pytest.approx(wanted, abs=2)


def test_scores_that_are_no_numbers(native):
    pairs = read_pairs("winoground", native["winoground"][0])
    for bad in ([1.0], [float("nan"), 0.0], [1, 2, 3]):
        with pytest.raises(BadInput, match="pair 0/0") as error:
            score_pairs("winoground", pairs, {"0/0": bad})
        sentence(error)
    with pytest.raises(BadInput, match="no pair has scores") as error:
        score_pairs("winoground", pairs, {})
    sentence(error)
    some = score_pairs("winoground", pairs, {"0/0": [1, 0]})
    assert some.rows[0]["n"] == 1 and some.rows[0]["missing"] == 3 and "3 of 4 pairs" in some.notes[-1]
    assert "I2T" not in some.rows[0]


def yes_no_by_hand(truths: list[str], said: list[str], positive: str = "yes") -> dict[str, float]:
    tp = sum(t == s == positive for t, s in zip(truths, said))
    p, r = tp / max(said.count(positive), 1), tp / truths.count(positive)
    accuracy = sum(t == s for t, s in zip(truths, said)) / len(said)
    f = 2 * p * r / (p + r) if tp else 0
    ratio, other = said.count("yes") / len(said), said.count("other") / len(said)
    values = {"accuracy": accuracy, "precision": p, "recall": r, "F1": f, "yes ratio": ratio, "other": other}
    return {name: 100 * value for name, value in values.items()}


def test_yes_no_rates_of_random_replies(tmp_path):
    random = np.random.default_rng(1)
    truths, said = (random.choice(values, 300, p=p).tolist() for values, p in (
        (["yes", "no"], [0.6, 0.4]), (["yes", "no", "other"], [0.5, 0.3, 0.2])))  # fmt: skip
    record = dict(image_id="1", query_prompt="q", relation_type="perception")
    put(tmp_path / "YESNO.jsonl", [record | {"label": truth} for truth in truths])
    items = read("reefknot", tmp_path)
    replies = {"yes": "Yes.", "no": "No", "other": "Maybe"}
    summary = score("reefknot", items, {f"YESNO/{i}": replies[reply] for i, reply in enumerate(said)})
    found = {name: figure.value for name, figure in summary.rows[0].items() if hasattr(figure, "value")}
    other_class = yes_no_by_hand(truths, said, "no")["F1"]
    assert found == pytest.approx(yes_no_by_hand(truths, said) | {"F1 of no": other_class})
    figures = [summary.rows[0][name] for name in found]
    assert all(figure.low < figure.value < figure.high for figure in figures)


def test_rbench_averages_its_lists_and_takes_the_later_record(native):
    items = read("rbench", native["rbench"][0])
    assert {item.key: item.answer.label for item in items} == {"0": "yes", "1": "no", "5": "no", "9": "yes"}
    replies = {"0": "Yes, it is.", "1": "No", "5": "", "9": "There is not"}
    summary = score("rbench", items, replies)
    said = {"0": "yes", "1": "no", "5": "yes", "9": "no"}
    truth = {item.key: item.answer.label for item in items}
    lists = [["0", "1"], ["0", "5"], ["1", "9"], ["0", "1", "5"], ["0", "1", "5", "9"]]
    each = [yes_no_by_hand([truth[k] for k in some], [said[k] for k in some]) for some in lists]
    for name, value in each[0].items():
        assert summary.rows[0][name].value == pytest.approx(np.mean([one[name] for one in each]), abs=2e-3)
        assert row(summary, "list 2")[name].value == pytest.approx(each[1][name], abs=2e-3), value
    assert summary.rows[0][""] == "mean of 5 lists" and row(summary, "all ids")["n"] == 4
    assert "1 records share their id" in " ".join(summary.notes)
    counts = np.array([3.0, 1, 0, 2, 4, 0])
    assert f1(counts, 1e-5) == 2 * (3 / 5.00001) * (3 / 4.00001) / (3 / 5.00001 + 3 / 4.00001 + 1e-5)


def test_rbench_lists_are_multisets(tmp_path):
    """An id counts as often as the list has it; accuracy and yes ratio have no 1e-5 in the divisor."""
    labels = {0: "Yes.", 1: "no", 2: "No.", 3: "yes"}
    record = {"qtype": "Positive", "image": "1.jpg"}
    records = [record | {"question_id": i, "text": f"Is it {i}?", "label": x} for i, x in labels.items()]
    put(tmp_path / "image-level_filterd.json", records)
    put(tmp_path / "nocaps_image-level_rel_ids_1.json", [1, 2, 2, 0, 0, 0])
    put(tmp_path / "nocaps_image-level_rel_ids_2.json", [1, 0, "3", 777])
    items = read("rbench", tmp_path)
    replies = {"0": "Yes", "1": "Yes", "2": "No", "3": "No"}
    summary = score("rbench", items, replies)
    # list 1: 3 true yes, 1 false yes, 2 true no -> P 3/4, R 3/3, F1 2 * 3/4 / (7/4) = 6/7, 5 of 6 right
    # list 2: 1 true yes, 1 false yes, 1 false no -> P 1/2, R 1/2, F1 1/2, 1 of 3 right
    wanted = {
        "list 1": (6, 6 / 7, 5 / 6, 4 / 6, 3 / 4, 1),
        "list 2": (3, 1 / 2, 1 / 3, 2 / 3, 1 / 2, 1 / 2),
        "mean of 2 lists": (4, (6 / 7 + 1 / 2) / 2, (5 / 6 + 1 / 3) / 2, 2 / 3, 5 / 8, 3 / 4),
    }
    for name, (n, f, accuracy, yes, p, r) in wanted.items():
        found = row(summary, name)
        assert found["n"] == n and found["F1"].value == pytest.approx(100 * f, abs=2e-3)
        exact = found["accuracy"].value, found["yes ratio"].value
        assert exact == pytest.approx((100 * accuracy, 100 * yes), abs=1e-9)
        assert found["precision"].value == pytest.approx(100 * p, abs=1e-3)
        assert found["recall"].value == pytest.approx(100 * r, abs=1e-3)
    p, r = 3 / 4.00001, 3 / 3.00001
    assert row(summary, "list 1")["precision"].value == pytest.approx(100 * p, abs=1e-9)
    assert row(summary, "list 1")["F1"].value == pytest.approx(100 * 2 * p * r / (p + r + 1e-5), abs=1e-9)
    del replies["2"]  # an entry without an answer is missing as often as it is listed
    summary = score("rbench", items, replies)
    counts = [(row(summary, name)["n"], row(summary, name)["missing"]) for name in ("all ids", "list 1")]
    assert counts == [(3, 1), (4, 2)]
    assert row(summary, "list 1")["accuracy"].value == pytest.approx(75)
    assert "1 of 4 questions have no answer" in summary.notes[-1]


def test_rbench_without_id_lists_is_over_all_ids(native):
    items = read("rbench", native["rbench"][0])
    items = [item._replace(answer=item.answer._replace(rows=("all ids",))) for item in items]
    assert score("rbench", items, perfect(items)).rows[0][""] == "all ids"


def test_mme_by_hand(native):
    items = read("mme", native["mme"][0])
    said = dict.fromkeys((item.key for item in items), "Yes") | {"existence/1/Is there a cat?": "no"}
    summary = score("mme", items, said)
    points = {name: row(summary, name)["score"].value for name in MME}
    assert points == {"existence": 200, "artwork": 50, "code_reasoning": 50}
    assert row(summary, "perception: 2 of 10 subtasks")["score"].value == 250 == summary.headline.value
    assert row(summary, "cognition: 1 of 4 subtasks")["score"].value == 50
    assert row(summary, "existence")["accuracy+"].value == 100


def test_mme_leaves_other_replies_out_of_recall(tmp_path):
    """By hand, as the official calculation.py counts."""
    lines = [f"{i}.jpg\tIs it a {x}?\t{x}\n" for i in "123" for x in ("Yes", "No")]
    put(tmp_path / "existence.txt", "".join(lines))
    replies = ["Yes", "Maybe", "Perhaps", "Yes", "No", "No"]
    # truth yes: yes, other, no; truth no: other, yes, no -> 1 of each
    items = read("mme", tmp_path)
    summary = score("mme", items, {item.key: reply for item, reply in zip(items, replies)})
    found = row(summary, "existence")
    half = {name: found[name].value for name in ("precision", "recall", "F1", "F1 of no")}
    assert half == dict.fromkeys(half, 50)  # 1 / (1 + 1); over all replies recall would be 1 / 3
    third = [found[name].value for name in ("accuracy", "other", "yes ratio", "accuracy+")]
    assert third == pytest.approx([100 / 3, 100 / 3, 100 / 3, 0])
    silent = row(score("mme", items, {item.key: "Maybe" for item in items}), "existence")
    assert [silent[name].value for name in ("accuracy", "recall", "F1", "F1 of no")] == [0] * 4


def test_gqa_is_exact_match_after_llavas_rule(native):
    items = read("gqa", native["gqa"][0])
    summary = score("gqa", items, {"02930152": " Yes. ", "20903190": "a train"})
    assert {r[""]: r["accuracy"].value for r in summary.rows} == {"all": 50, "binary": 100, "open": 0}


def test_vqa_rows(native):
    items = read("vqav2", native["vqav2"][0])
    summary = score("vqav2", items, {"262148000": "Down.", "7": "up"})
    values = {r[""]: r["N1"].value for r in summary.rows}
    assert values == pytest.approx(
        {"all": 80, "other": 100, "yes/no": 60, "type: where": 100, "type: is it": 60}
    )


# ---------------------------------------------------------------- missing answers, files of answers


def test_a_unit_without_all_answers_is_left_out_and_said(native):
    items = read("sugarcrepe", native["sugarcrepe"][0] / "swap_obj.json")
    answers = {item.key: item.answer.label for item in items}
    del answers["swap_obj/14/B"]
    answers["swap_obj/14/A"] = "B"  # wrong, but its pair is not complete
    summary = score("sugarcrepe", items, answers)
    found = row(summary, "swap_obj")
    assert (found["n"], found["missing"], found["accuracy"].value) == (3, 1, 100)
    assert "1 of 8 questions have no answer" in summary.notes[-1]
    with pytest.raises(BadInput, match="none of 8 questions has an answer") as error:
        score("sugarcrepe", items, {})
    sentence(error)


def test_a_table_of_incomplete_pairs_only(native):
    items = read("sugarcrepe", native["sugarcrepe"][0])
    summary = score("sugarcrepe", items, {"swap_obj/14/B": "B"})
    assert summary.headline is None and summary.json()["headline"]["column"] == "accuracy"
    assert str(summary)


def ours(items, replies: dict[str, str], name: str) -> list[dict]:
    return [
        {"question_id": item.key, "prompt": item.question, "text": replies[item.key], "benchmark": name}
        for item in items
    ]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_our_answers_file(name, native, tmp_path):
    items = read(name, native[name][0])
    file = put(tmp_path / "answers.jsonl", ours(items[::-1], perfect(items), name))
    expected = score(name, items, perfect(items))
    expected.notes.extend(["0 of 2 prompts had OCR tokens"] * (name == "textvqa"))
    assert score_file(name, native[name][0], file) == expected


LLAVA = {  # question ids and prompts as in LLaVA's files
    "textvqa": [
        ("003a", f"Who made it?\nReference OCR token: X{SHORT}"),
        ("003a", "What is the Brand?" + SHORT),
    ],
    "mme": [
        ("artwork/images/9.jpg", "Is this  c?" + SHORT),
        ("artwork/images/9.jpg", 'Is this "A, b"?' + SHORT),
        ("code_reasoning/1.png", "Is it c?" + SHORT),
    ],
    "vqav2": [(262148000, "Where is he looking?" + SHORT)],
    "gqa": [("20903190", "What is it?" + SHORT)],
    "vizwiz": [("VizWiz_val_1.jpg", "What's this?")],
    "rbench": [(5, "Is the old question?"), (5, "Is the new question?"), (0, "Is the child wearing a hat?")],
}
JOINED = {
    "textvqa": ["34603", "34602"],
    "mme": ["artwork/9/Is this  c?", 'artwork/9/Is this "A, b"?', "code_reasoning/1/Is it c?"],
    "vqav2": ["262148000"],
    "gqa": ["20903190"],
    "vizwiz": ["VizWiz_val_1.jpg"],
    "rbench": [None, "5", "0"],
}


@pytest.mark.parametrize("name", LLAVA)
def test_llavas_answers_file(name, native, tmp_path):
    lines = [{"question_id": i, "prompt": q, "text": f"reply {n}"} for n, (i, q) in enumerate(LLAVA[name])]
    file = put(tmp_path / "answers.jsonl", lines)
    answers, notes = match_answers(name, read(name, native[name][0]), file)
    assert answers == {key: f"reply {n}" for n, key in enumerate(JOINED[name]) if key} and not notes


def test_an_answer_that_could_be_to_two_questions_is_to_none(native, tmp_path):
    items = read("reefknot", native["reefknot"][0])  # its first two rows are the same
    lines = [{"question_id": item.group, "prompt": item.question, "text": "x"} for item in items]
    answers, notes = match_answers("reefknot", items, put(tmp_path / "a.jsonl", lines))
    assert answers == {"YESNO/2": "x", "Multichoice/0": "x"}
    assert notes == ["2 lines answer no question of these annotations"]


def test_rbench_answers_are_of_the_later_record(native, tmp_path):
    """Whatever the order of the two lines; without prompts the later line."""
    items, (first, second) = read("rbench", native["rbench"][0]), LLAVA["rbench"][:2]
    both = [{"question_id": i, "prompt": q, "text": q} for i, q in (second, first)]
    assert match_answers("rbench", items, put(tmp_path / "a.jsonl", both))[0] == {"5": "Is the new question?"}
    both = [{"question_id": 5, "text": text} for text in ("1", "2")]
    assert match_answers("rbench", items, put(tmp_path / "a.jsonl", both))[0] == {"5": "2"}


VIZWIZ = " What's THIS? ", "Is it red?", "What's this?"


@pytest.fixture
def vizwiz(tmp_path) -> list:
    record = {"answer_type": "other", "answers": ten(("can", 10))}
    records = [record | {"image": f"VizWiz_val_{i}.jpg", "question": q} for i, q in enumerate(VIZWIZ)]
    put(tmp_path / "val.json", records)
    return read("vizwiz", tmp_path)


def test_vizwiz_answers_of_llava_are_joined_by_position(vizwiz, tmp_path):
    """Its lines have the number of the question and no picture."""
    prompts = ["Is it red?\nWhen the", "What's this?\nWhen the", " what's this? \nWhen the"]
    lines = [{"question_id": i, "prompt": q, "text": f"reply {i}"} for i, q in zip((1, 2, 0, 7), prompts)]
    file = put(tmp_path / "a.jsonl", [*lines, {"question_id": 7, "prompt": "Is it red?", "text": "x"}])
    answers, notes = match_answers("vizwiz", vizwiz, file)
    assert answers == {f"VizWiz_val_{i}.jpg": f"reply {i}" for i in (0, 1, 2)}
    assert notes == [
        "1 lines answer no question of these annotations",
        "3 answers were joined by their position in the annotations",
    ]
    assert notes[1] in score_file("vizwiz", tmp_path / "val.json", file).notes
    without = put(tmp_path / "b.jsonl", [{"question_id": 2, "text": "x"}])
    assert match_answers("vizwiz", vizwiz, without)[0] == {"VizWiz_val_2.jpg": "x"}
    for wrong in ({"question_id": 0, "prompt": "Is it red?"}, lines[0] | {"image": "VizWiz_test_1.jpg"}):
        file = put(tmp_path / "c.jsonl", [wrong | {"text": "x"}])
        with pytest.raises(
            BadInput, match="another question than vizwiz has under 'VizWiz_val_[01]"
        ) as error:
            match_answers("vizwiz", vizwiz, file)
        sentence(error)


def test_vizwiz_submissions_and_answers_that_name_a_picture(vizwiz, tmp_path):
    file = put(
        tmp_path / "a.json", [{"image": f"VizWiz_val_{i}.jpg", "answer": f"reply {i}"} for i in (2, 0)]
    )
    wanted = {"VizWiz_val_2.jpg": "reply 2", "VizWiz_val_0.jpg": "reply 0"}
    assert match_answers("vizwiz", vizwiz, file) == (wanted, [])
    lines = [  # the picture goes before the position; a path to it does no harm
        {"question_id": 0, "image": "VizWiz_val_2.jpg", "prompt": "What's this?", "text": "reply 2"},
        {"question_id": "VizWiz_val_0.jpg", "image": "/data/VizWiz_val_0.jpg", "text": "reply 0"},
    ]
    assert match_answers("vizwiz", vizwiz, put(tmp_path / "b.jsonl", lines)) == (wanted, [])


@pytest.mark.parametrize("name", LLAVA)
def test_a_picture_beside_the_id_does_no_harm(name, native, tmp_path):
    """Even where it looks like the id of another question; answers under other names are read, too."""
    items = read(name, native[name][0])
    lines = [{"question_id": i, "prompt": q, "text": f"reply {n}"} for n, (i, q) in enumerate(LLAVA[name])]
    plain = match_answers(name, items, put(tmp_path / "a.jsonl", lines))
    pictures = {"vqav2": 7, "gqa": "02930152", "rbench": "0", "mme": "9.jpg", "textvqa": "003a.jpg"}
    some = [line for line in lines if not str(line["question_id"]).startswith("code")]
    seen = [line | {"image": pictures.get(name, "VizWiz_val_1.jpg")} for line in some]
    assert match_answers(name, items, put(tmp_path / "b.jsonl", seen))[0].items() <= plain[0].items()
    other = {"question_id": "questionId", "prompt": "prompt", "text": "prediction"}
    renamed = [{other[key]: value for key, value in line.items()} for line in lines]
    renamed = [line | {"answer": "the truth"} for line in renamed]
    assert match_answers(name, items, put(tmp_path / "c.json", renamed)) == plain
    if name in ("vqav2", "gqa"):  # of a question that is not here
        strange = put(tmp_path / "d.jsonl", [{"question_id": "4", "image": pictures[name], "text": "x"}])
        with pytest.raises(BadInput, match="no line answers a question"):
            match_answers(name, items, strange)


def test_reefknots_own_files_are_joined_by_position(native, tmp_path):
    """Its records with a filled response: no id, and the first two of YESNO are the same."""
    folder = native["reefknot"][0]
    items, replies = read("reefknot", folder), iter(["Yes", "no", "No.", "D. into"])
    for stem, keys in (("YESNO", ["YESNO/0", "YESNO/1", "YESNO/2"]), ("Multichoice", ["Multichoice/0"])):
        records = [json.loads(line) for line in (folder / f"{stem}.jsonl").read_text().splitlines()]
        filled = [record | {"mllm_name": "m", "response": next(replies)} for record in records]
        file = put(tmp_path / f"{stem}.jsonl", filled)
        answers, notes = match_answers("reefknot", items, file)
        assert answers == dict(zip(keys, (record["response"] for record in filled)))
        assert notes == [f"{len(keys)} answers were joined by their position in the annotations"]
        summary = score_file("reefknot", folder, file)
        assert row(summary, stem)["accuracy"].value == pytest.approx(100 * 2 / 3 if len(keys) > 1 else 100)
        for change in ({"image_id": "3"}, {"query_prompt": "Is it?"}):
            wrong = put(tmp_path / "wrong.jsonl", [filled[0] | change, *filled[1:]])
            with pytest.raises(BadInput, match="under 'YESNO/0' or 'Multichoice/0'; score") as error:
                match_answers("reefknot", items, wrong)
            assert "wrong.jsonl, line 1 answers another question" in sentence(error)
        empty = put(tmp_path / "empty.jsonl", [record | {"response": ""} for record in records])
        with pytest.raises(BadInput, match="no line answers a question of reefknot; give") as error:
            match_answers("reefknot", items, empty)
        sentence(error)
    bare = put(tmp_path / "bare.jsonl", [{"question_id": i, "text": f"{i}"} for i in range(3)])
    answers, notes = match_answers("reefknot", items, bare)  # 0 could be of either file
    assert answers == {"YESNO/1": "1", "YESNO/2": "2"} and "1 lines answer no question" in notes[0]


def test_reefknots_positions_are_no_pictures(tmp_path):
    """Line 1 asks about picture 2 what line 0 asks about picture 1."""
    record = dict(query_prompt="Is it?", label="yes", relation_type="cognitive")
    records = [record | {"image_id": str(i)} for i in (1, 2, 2)]
    items = read("reefknot", put(tmp_path / "YESNO.jsonl", records))
    file = put(tmp_path / "a.json", [record | {"response": f"{i}"} for i, record in enumerate(records)])
    assert match_answers("reefknot", items, file)[0] == {f"YESNO/{i}": f"{i}" for i in range(3)}


@pytest.mark.parametrize(
    "content, says",
    [
        ([], "no line answers a question of vqav2; give"),
        ([7], "record 0 is no JSON object"),
        ([{"question_id": 7, "answer": "x"}, ["a"]], "record 1 is no JSON object"),
        ([{"question_id": 7, "answer": 5}], "record 0: text or prompt is no text"),
        ([{"answer": "x"}], "record 0: question_id is None"),
        ([{"question_id": [7], "answer": "x"}], r"record 0: question_id is \[7\]"),
        ([{"question_id": 7, "answer": "x"}] * 2, "record 1 answers '7' once more"),
        ('[{"question_id": 7, "answer": "x"},', "line 1 is not valid JSON"),
        ('[{"question_id": 7, "question_id": 7}]', "'question_id' is there twice"),
        ("[" * 100_000, "line 1 is not valid JSON"),
        ("[1]\n{}", "line 1 is not valid JSON"),
    ],
)
def test_a_list_of_predictions(content, says, native, tmp_path):
    items = read("vqav2", native["vqav2"][0])
    for good in ([{"questionId": 7, "prediction": "x"}], [{"question_id": 7, "answer": "x"}]):
        assert match_answers("vqav2", items, put(tmp_path / "a.json", good)) == ({"7": "x"}, [])
    with pytest.raises(BadInput, match=says) as error:
        match_answers("vqav2", items, put(tmp_path / "a.json", content))
    assert "a.json" in sentence(error)


BAD_ANSWERS = {
    "of another benchmark": ({"benchmark": "winoground"}, "line 1 answers winoground"),
    "another question": ({"prompt": "Which?"}, "answers another question"),
    "other captions": (
        {"prompt": "Which caption best describes the image?\n(A) a\n (B) b"},
        "another question",
    ),
    "no text": ({"text": None}, "no text"),
    "a number as text": ({"text": 5}, "no text"),
    "a number as prompt": ({"prompt": 5}, "no text"),
    "no id": ({"question_id": None}, "question_id is None"),
    "an empty id": ({"question_id": ""}, "question_id is empty"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_bad_line_of_answers_is_one_sentence(case, native, tmp_path):
    items = read("sugarcrepe", native["sugarcrepe"][0])
    lines, (change, says) = ours(items, perfect(items), "sugarcrepe"), BAD_ANSWERS[case]
    file = put(tmp_path / "answers.jsonl", [changed(lines[0], **change) | change, *lines[1:]])
    with pytest.raises(BadInput, match=says) as error:
        score_file("sugarcrepe", native["sugarcrepe"][0], file)
    assert "answers.jsonl" in sentence(error)


def test_bad_files_of_answers(native, tmp_path):
    files = native["sugarcrepe"][0]
    items = read("sugarcrepe", files)
    lines = ours(items, perfect(items), "sugarcrepe")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for content, says in [
        (text[:-40] + "\n", f"line {len(lines)} is not valid JSON "),
        (text + "[1]\n", f"line {len(lines) + 1} is no JSON object; remove what is wrong, or give"),
        (text + json.dumps(lines[3]), f"answers {lines[3]['question_id']!r} once more; remove one"),
        ("", "no line answers a question of sugarcrepe; give"),
        (json.dumps({"question_id": "1234", "text": "x"}), "no line answers"),
    ]:
        with pytest.raises(BadInput, match=re.escape(says)) as error:
            score_file("sugarcrepe", files, put(tmp_path / "answers.jsonl", content))
        sentence(error)
    (tmp_path / "answers.jsonl").write_bytes(b'{"text": "\xff"}\n')
    os.mkfifo(tmp_path / "pipe")  # to open it would be to wait
    for name, says in (
        ("answers.jsonl", "line 1 is not valid JSON"),
        ("none.jsonl", "is missing or cannot be read .No such file"),
        ("", "it is a folder"),
        ("pipe", "it is a pipe"),
    ):
        with pytest.raises(BadInput, match=f"{says}.*; .*give another file") as error:
            score_file("sugarcrepe", files, tmp_path / name)
        sentence(error)
    cut = text[:-40].encode(), (text[:-40] + "é").encode()[:-1]  # by a kill: the question has no answer yet
    for content in cut:
        (tmp_path / "answers.jsonl").write_bytes(content)
        assert "1 of" in score_file("sugarcrepe", files, tmp_path / "answers.jsonl").notes[-1]
    put(tmp_path / "answers.jsonl", text)
    summary = score_file("sugarcrepe", files / "swap_obj.json", tmp_path / "answers.jsonl")
    assert summary.rows[0]["n"] == 4 and f"{len(lines) - 8} lines answer no question" in summary.notes[-1]


def test_answers_to_released_texts_are_joined(native, tmp_path):
    """Stray white space makes no other question: either parser scores them."""
    files = native["sugarcrepe"][0]
    items = read("sugarcrepe", files, as_released=True)
    assert items != read("sugarcrepe", files)
    replies = dict.fromkeys((item.key for item in items), "a cat")
    file = put(tmp_path / "a.jsonl", ours(items, replies, "sugarcrepe"))
    assert score_file("sugarcrepe", files, file).headline.value == 0
    assert score_file("sugarcrepe", files, file, as_released=True).headline.value == pytest.approx(50)


# ---------------------------------------------------------------- the published figures, from the real files


def test_textvqa_llava_1_5_13b(real):
    file = real / "textvqa" / "llava-v1.5-13b.answers.jsonl"
    summary = score_file("textvqa", real / "textvqa", file)
    assert (summary.headline.n, round(summary.headline.value, 3)) == (5000, 61.254)
    assert round(summary.rows[0]["N2"].value, 2) == 49.09
    assert summary.notes[-1] == "5000 of 5000 prompts had OCR tokens"
    items = read("textvqa", real / "textvqa" / "TextVQA_0.5.1_val.json")  # without OCR tokens
    answers, notes = match_answers("textvqa", items, file)
    assert len(answers) == 5000 and not notes

    def with_normalisation(normalise) -> float:
        points = [soft_accuracy(answers[item.key], item.answer.label, normalise) for item in items]
        return round(100 * sum(points) / len(points), 2)

    assert with_normalisation(lambda text: text.strip().lower()) == 59.82
    assert with_normalisation(str.strip) == 12.31
    assert with_normalisation(normalise_official) == 61.25


def test_vizwiz_constants(real):
    items = read("vizwiz", real / "vizwiz")
    found = {
        text: round(score("vizwiz", items, {item.key: text for item in items}).headline.value, 2)
        for text in ("Unanswerable", "yes", "no")
    }
    assert found == {"Unanswerable": 33.10, "yes": 3.02, "no": 4.93}
    summary = score("vizwiz", items, {item.key: "no" for item in items})
    assert (
        sum(item.question.split("\n")[0].islower() for item in items) < 200
    )  # those that begin with a space
    assert round(summary.rows[0]['always "Unanswerable"'].value, 2) == 33.10


def test_mme_always_yes_and_llavas_questions(real, tmp_path):
    items = read("mme", real / "mme")
    lines = [json.loads(line) for line in (real / "mme" / "llava_mme.jsonl").read_text().splitlines()]
    assert sorted(line["text"] for line in lines) == sorted(item.question for item in items)
    assert len(items) == 2374
    lines = [{"question_id": line["question_id"], "prompt": line["text"], "text": "Yes"} for line in lines]
    summary = score_file("mme", real / "mme", put(tmp_path / "answers.jsonl", lines))
    sums = {row[""]: (row["n"], row["score"].value) for row in summary.rows[:2]}
    assert sums == {"perception: 10 of 10 subtasks": (1057, 500), "cognition: 4 of 4 subtasks": (130, 200)}
    assert all(row["yes ratio"].value == 100 and row["missing"] == 0 for row in summary.rows[2:])


def test_vizwiz_answers_by_position(real, tmp_path):
    items = read("vizwiz", real / "vizwiz")
    lines = [{"question_id": i, "prompt": x.question, "text": "Unanswerable"} for i, x in enumerate(items)]
    summary = score_file("vizwiz", real / "vizwiz", put(tmp_path / "a.jsonl", lines))
    assert round(summary.headline.value, 2) == 33.10 and summary.headline.n == 3172
    assert summary.notes[-1].startswith("3172 answers were joined by their position")


@pytest.mark.parametrize(
    "stem, reply, accuracy", [("YESNO", "Yes.", 50), ("Multichoice", "A. behind", 24.96)]
)
def test_reefknots_files_filled_with_a_constant(real, tmp_path, stem, reply, accuracy):
    lines = (real / "reefknot" / f"{stem}.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"response": reply} for line in lines]
    summary = score_file("reefknot", real / "reefknot", put(tmp_path / "a.jsonl", records))
    found = row(summary, stem)
    assert (found["n"], round(found["accuracy"].value, 2)) == (len(records), accuracy)
    assert f"{len(records)} answers were joined by their position in the annotations" in summary.notes


def test_no_caption_of_sugarcrepe_is_an_option(real):
    """A caption as a reply chooses nothing, though most begin with A; one begins "A sideways view"."""
    captions = [c.strip() for p in read_pairs("sugarcrepe", real / "sugarcrepe") for c in p.captions]
    chosen = [caption for caption in captions if option(caption[:1].upper() + caption[1:])]
    assert len(captions) == 15022 and chosen == ["A sideways view of a pizza on a pizza stone."]


def test_reefknot_constants(real):
    items = read("reefknot", real / "reefknot")
    constant = {("yes", "no"): "yes", tuple("ABCD"): "A"}
    summary = score("reefknot", items, {item.key: constant[item.options] for item in items})
    found, names = row(summary, "YESNO"), ("accuracy", "precision", "recall", "F1", "yes ratio")
    assert [round(found[name].value, 2) for name in names] == [50, 50, 100, 66.67, 100]
    assert summary.headline == found["F1"] and found["n"] == 9740
    assert round(row(summary, "Multichoice")["accuracy"].value, 2) == 24.96
    assert {row(summary, name)["n"] for name in ("YESNO perception", "YESNO cognitive")} == {4300, 5440}
    seen = {}  # best of any answerer: one reply to each (picture, question)
    for item in items[:9740]:
        seen.setdefault((item.group, item.question), []).append(item.answer.label)
    assert sum(max(labels.count("yes"), labels.count("no")) for labels in seen.values()) == 9706


@pytest.mark.parametrize("letter", "AB")
def test_sugarcrepe_constants(real, letter):
    items = read("sugarcrepe", real / "sugarcrepe")
    summary = score("sugarcrepe", items, {item.key: letter for item in items})
    assert [row["accuracy"].value for row in summary.rows] == pytest.approx([50] * 8)
    sizes = [245, 666, 1652, 1406, 788, 2062, 692]
    assert [row["n"] for row in summary.rows] == [7511, *sizes]
    assert "swap_obj/245/A" in {item.key for item in items} > {"swap_obj/107/B"}


def test_sugarcrepe_white_space_leaks_the_answer_as_released(real):
    """1,074 positives and no negative carry stray white space; read by default, none does."""
    released = read_pairs("sugarcrepe", real / "sugarcrepe", as_released=True)
    stray = [[caption != caption.strip() for caption in pair.captions] for pair in released]
    assert (sum(true for true, _ in stray), sum(negative for _, negative in stray)) == (1074, 0)
    pairs = read_pairs("sugarcrepe", real / "sugarcrepe")
    captions = [caption for pair in pairs for caption in pair.captions]
    assert not any(re.search(r"^\s|\s\s|\n|\s$", caption) for caption in captions)
    assert len({pair.group for pair in pairs}) == 1560


def test_samples_are_the_real_records(real):
    for subset in SUBSETS:
        whole = json.loads((real / "sugarcrepe" / f"{subset}.json").read_text())
        sample = json.loads((SAMPLES / "sugarcrepe" / f"{subset}.json").read_text())
        assert sample.items() <= whole.items()
