"""The tiny world: small pictures of coloured shapes, and questions about them, that a laptop can learn from.

Scenes are drawn at run time and written as real data comes: PNG files, LLaVA JSON, test captions in
SugarCrepe's form. Everything then goes through data.py, like the 665k records of the real run.
"""

import json
import random
import re
import zlib
from pathlib import Path

from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data import END_OF_TEXT, IMAGE_MARK, SYSTEM, encode, inside, pieces
from support.errors import BadInput
from support.files import field, read_json, texts, whole_folder, write_atomically

TINY = Path(__file__).parent.parent / "tiny"  # the models that ship: teacher, student, ...

COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 230), "yellow": (240, 200, 30)}
SHAPES = ("circle", "square", "triangle")
GRID, CELL = 4, 10  # a picture is 4 x 4 cells of 10 x 10 pixels: one patch of the vision encoder each
RELATIONS = {
    "left of": lambda a, b: a[0] < b[0],
    "right of": lambda a, b: a[0] > b[0],
    "above": lambda a, b: a[1] < b[1],
    "below": lambda a, b: a[1] > b[1],
}  # of cells (column, row), row 0 on top
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RECOGNITION = ("colour", "shape", "exists", "where")
COMPOSITION = ("swap_obj", "swap_att", "replace_obj", "replace_rel", "replace_att", "add_obj", "add_att")

Kind = tuple[str, str]  # (colour, shape)
Scene = dict[Kind, tuple[int, int]]  # each thing in the picture -> its cell (column, row)


def random_scene(rng: random.Random, split: str) -> Scene:
    """Two or three different objects in different cells.

    Every scene belongs to exactly one split, by a checksum of what is where, and a picture is a function of
    its scene: train and test pictures can never coincide.
    """
    while True:
        kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], rng.choice((2, 3)))
        cells = rng.sample([(column, row) for column in range(GRID) for row in range(GRID)], len(kinds))
        scene = dict(zip(kinds, cells))
        if (split == "test") == (zlib.crc32(repr(sorted(scene.items())).encode()) % 8 == 0):
            return scene


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, 40 x 40 pixels."""
    image = Image.new("RGB", (GRID * CELL, GRID * CELL), (235, 235, 235))
    pen = ImageDraw.Draw(image)
    for (colour, shape), (column, row) in scene.items():
        x, y = column * CELL, row * CELL
        box = (x + 1, y + 1, x + CELL - 2, y + CELL - 2)
        if shape == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            left, top, right, bottom = box
            pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=COLOURS[colour])
    return image


def cell_name(cell: tuple[int, int]) -> str:
    """As on a chess board, but counted from the top: column a to d, row 1 to 4."""
    return "abcd"[cell[0]] + str(cell[1] + 1)


def recognition_question(kind: str, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """(question, answer) with one right answer, or None where this scene admits none."""
    colour, shape = rng.choice(list(scene))
    if kind == "colour":
        unique = [s for s in SHAPES if sum(s == other for _, other in scene) == 1]
        if not unique:
            return None
        shape = rng.choice(unique)
        return f"What colour is the {shape}?", next(c for c, s in scene if s == shape)
    if kind == "shape":
        unique = [c for c in COLOURS if sum(c == other for other, _ in scene) == 1]
        if not unique:
            return None
        colour = rng.choice(unique)
        return f"What shape is the {colour} one?", next(s for c, s in scene if c == colour)
    if kind == "exists":
        if rng.random() < 0.5:
            colour, shape = _absent(scene, rng)
        return f"Is there a {colour} {shape}?", "yes" if (colour, shape) in scene else "no"
    if kind == "at":
        return f"What is at {cell_name(scene[colour, shape])}?", f"{colour} {shape}"
    if kind == "where":
        return f"Where is the {colour} {shape}?", cell_name(scene[colour, shape])
    if kind in ("column", "row"):  # of two objects, where one right answer exists
        first, second = ("left", "right") if kind == "column" else ("above", "below")
        a, b = rng.sample(list(scene), 2)
        difference = scene[a][kind == "row"] - scene[b][kind == "row"]
        of = " of" if kind == "column" else ""
        question = f"Is the {' '.join(a)} {first} or {second}{of} the {' '.join(b)}?"
        return (question, first if difference < 0 else second) if difference else None
    raise ValueError(kind)


def caption_pair(kind: str, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """(true caption, its hard negative) of one of SugarCrepe's seven kinds, or None: this scene admits none.

    What is added in the add_ kinds makes the caption longer; in half of their pairs it is true and the
    shorter caption is false, so that nobody can judge by length.
    """
    longer_is_true = rng.random() < 0.5
    a, b = rng.sample(list(scene), 2)
    true_relations = [name for name, holds in RELATIONS.items() if holds(scene[a], scene[b])]
    relation = rng.choice(true_relations)
    absent = _absent(scene, rng)

    def related(a: Kind, b: Kind, relation: str) -> str:
        return f"the {' '.join(a)} is {relation} the {' '.join(b)}"

    def listed(*kinds: Kind | tuple[str]) -> str:
        return "there is a " + " and a ".join(" ".join(kind) for kind in kinds)

    if kind == "swap_obj":
        return related(a, b, relation), related(b, a, relation)
    if kind == "replace_rel":
        return related(a, b, relation), related(a, b, OPPOSITE[relation])
    if kind == "swap_att":
        swapped = (b[0], a[1]), (a[0], b[1])
        if swapped[0] in scene or swapped[1] in scene:  # also where both have the same colour or shape
            return None
        return listed(a, b), listed(*swapped)
    if kind in ("replace_obj", "replace_att"):
        same = int(kind == "replace_att")  # what the wrong object has in common with a: colour (0) or shape
        wrong = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in scene and (c, s)[same] == a[same]]
        return (related(a, b, relation), related(rng.choice(wrong), b, relation)) if wrong else None
    if kind == "add_obj":
        return (listed(a, b), listed(absent)) if longer_is_true else (listed(a), listed(a, absent))
    if kind == "add_att":
        if a[1] == b[1]:
            return None
        wrong = rng.choice([c for c in COLOURS if (c, a[1]) not in scene]), a[1]
        if longer_is_true:
            return listed(a, b), listed(a[1:], absent)
        return listed(a[1:], b), listed(wrong, b)
    raise ValueError(kind)


def caption_question(caption: str) -> str:
    """How a model is asked whether a caption is true."""
    return f"True? {caption}"


def _absent(scene: Scene, rng: random.Random) -> Kind:
    return rng.choice([(c, s) for c in COLOURS for s in SHAPES if (c, s) not in scene])


def training_record(name: str, scene: Scene, rng: random.Random, turns: int) -> dict:
    """A LLaVA record about one picture: turns of recognition, relations, captions that are true or false."""
    conversations = []
    while len(conversations) < 2 * turns:
        kind = rng.choices(list(MIX), MIX.values())[0]
        if kind in COMPOSITION:
            pair = caption_pair(kind, scene, rng)
            wrong = rng.random() < 0.5
            turn = pair and (caption_question(pair[wrong]), "no" if wrong else "yes")
        else:
            turn = recognition_question(kind, scene, rng)
        if turn:
            mark = "" if conversations else IMAGE_MARK + "\n"
            conversations += [{"from": "human", "value": mark + turn[0]}, {"from": "gpt", "value": turn[1]}]
    return {"id": name, "image": f"{name}.png", "conversations": conversations}


# How often each question is asked in training, of 39. Much of "where", "column" and "row" lets space be
# learned soon; captions about relations, the hardest, come three times as often as others.
MIX = {"where": 8, "at": 2, "colour": 2, "shape": 2, "exists": 2, "column": 6, "row": 6}
MIX |= dict.fromkeys(COMPOSITION, 1) | {"swap_obj": 3, "replace_rel": 3}
DESCRIBE = "Describe the picture."
VALIDATION = 100  # records in val.json


def describe(scene: Scene) -> str:
    """The caption of a whole picture."""
    return " and ".join(f"a {' '.join(kind)} at {cell_name(cell)}" for kind, cell in scene.items())


def make_world(
    folder: Path, seed: int = 0, tune: int = 8000, pretrain: int = 2000, per_kind: int = 640
) -> Path:
    """Write the tiny world, unless it is there -> its folder.

    pretrain.json (captions), tune.json (conversations) and val.json (of test scenes) in LLaVA's form,
    test/recognition.json, test/<kind>.json in SugarCrepe's form, and images/*.png.
    """
    if (folder / "world.json").exists():
        return folder
    if folder.exists():
        raise BadInput(f"{folder} exists and is not a tiny world; choose another folder")
    try:
        with whole_folder(folder) as temporary:
            (temporary / "images").mkdir()
            (temporary / "test").mkdir()
            _write_world(temporary, seed, tune, pretrain, per_kind)
    except (OSError, BadInput):
        if not (folder / "world.json").exists():  # else another process has made it meanwhile
            raise
    return folder


def _write_world(folder: Path, seed: int, tune: int, pretrain: int, per_kind: int) -> None:
    rng = random.Random(seed)

    def write(name: str, content: list | dict) -> None:
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    def picture(name: str, split: str) -> Scene:
        scene = random_scene(rng, split)
        draw(scene).save(folder / "images" / f"{name}.png")
        return scene

    captions = []
    for i in range(pretrain):
        caption = describe(picture(f"pretrain-{i}", "train"))
        turns = [{"from": "human", "value": f"{IMAGE_MARK}\n{DESCRIBE}"}, {"from": "gpt", "value": caption}]
        captions.append({"id": f"pretrain-{i}", "image": f"pretrain-{i}.png", "conversations": turns})
    write("pretrain.json", captions)

    def conversations(name: str, split: str, number: int) -> None:
        records = (
            training_record(f"{name}-{i}", picture(f"{name}-{i}", split), rng, turns=6) for i in range(number)
        )
        write(f"{name}.json", list(records))

    conversations("tune", "train", tune)

    recognition = {kind: [] for kind in RECOGNITION}
    composition: dict[str, dict] = {kind: {} for kind in COMPOSITION}
    number = 0
    while any(len(items) < per_kind for items in composition.values()):
        name, number = f"test-{number}", number + 1
        scene = picture(name, "test")
        for kind, items in recognition.items():
            if len(items) < per_kind and (turn := recognition_question(kind, scene, rng)):
                items.append({"image": f"{name}.png", "kind": kind, "question": turn[0], "answer": turn[1]})
        for kind, items in composition.items():
            if len(items) < per_kind and (pair := caption_pair(kind, scene, rng)):
                true, negative = pair
                items[str(len(items))] = {
                    "filename": f"{name}.png",
                    "caption": true,
                    "negative_caption": negative,
                }
    write("test/recognition.json", [item for items in recognition.values() for item in items])
    for kind, items in composition.items():
        write(f"test/{kind}.json", items)
    conversations("val", "test", VALIDATION)
    write("world.json", {"seed": seed, "tune": tune, "pretrain": pretrain, "per_kind": per_kind})


# Answers of one kind each: another one of the kind is wrong.
FAMILIES = (
    ("yes", "no"),
    ("left", "right"),
    ("above", "below"),
    tuple(COLOURS),
    SHAPES,
    tuple(cell_name((column, row)) for column in range(GRID) for row in range(GRID)),
    tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
)


def make_pairs(folder: Path, name: str = "tune") -> Path:
    """Write name-pairs.json, unless it is there -> the file: of each record of name.json a turn, two answers.

    "chosen" has the right one, "rejected" another one of the same kind. No question is new.
    """
    file = folder / f"{name}-pairs.json"
    if file.exists():
        return file
    rng, records = random.Random(0), []
    for record in read_json(folder / f"{name}.json", list):
        try:
            turns = record["conversations"]
            i = 2 * rng.randrange(len(turns) // 2)
            question, answer = (turn["value"] for turn in turns[i : i + 2])
            question = f"{IMAGE_MARK}\n{question.removeprefix(IMAGE_MARK).strip()}"
            wrong = rng.choice([x for family in FAMILIES if answer in family for x in family if x != answer])
            pair = {"id": record["id"], "image": record["image"]}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):  # it was edited
            raise BadInput(
                f"{folder / name}.json: a record is none of the tiny world's; choose another --out"
            ) from None
        for which, value in (("chosen", answer), ("rejected", wrong)):
            pair[which] = [{"from": "human", "value": question}, {"from": "gpt", "value": value}]
        records.append(pair)
    write_atomically(file, json.dumps(records))
    return file


def make_tokenizer(words: bool = True) -> Tokenizer:
    """Make a byte-level byte-pair encoding of Qwen's class for the world's text: a token a word.

    Without `words` it has too few merges for that, and cuts some of them in two.
    """
    units = rf"{re.escape(SYSTEM.strip())}| ?USER:| ?ASSISTANT:"  # said in every conversation: one token each
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{units}|{pattern}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000 if words else 440,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    rng = random.Random(0)
    spans = (pieces(text_conversation(rng), "chat") for _ in range(3000))
    texts = ("".join(text for text, _ in conversation if text is not END_OF_TEXT) for conversation in spans)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def text_conversation(rng: random.Random) -> list[dict]:
    """The tiny world's language without its pictures: a conversation about a picture that nobody shows."""
    scene = random_scene(rng, "train")
    if rng.random() < 0.25:
        return [{"from": "human", "value": DESCRIBE}, {"from": "gpt", "value": describe(scene)}]
    turns = training_record("", scene, rng, turns=6)["conversations"]
    return [{**turns[0], "value": turns[0]["value"].removeprefix(f"{IMAGE_MARK}\n")}, *turns[1:]]


def text_sample(rng: random.Random, tokenizer: Tokenizer) -> dict:
    """Such a conversation for the pre-training of a language model: every token is supervised."""
    ids, _ = encode(text_conversation(rng), tokenizer, 0)
    return {"input_ids": ids, "labels": ids}


def tiny_items(world: Path, limit: int | None = None) -> tuple[dict, dict]:
    """The test: by kind [(picture, question, answer)], and by kind [(picture, true caption, negative)].

    BadInput: a file of it that is no longer as make_world wrote it.
    """
    recognition = {kind: [] for kind in RECOGNITION}
    composition = {kind: [] for kind in COMPOSITION}

    def read(name: str, form: type, rows: dict[str, list], *columns: str) -> None:
        file = world / "test" / f"{name}.json"
        remedy = f"; remove {world}, and it is made again"
        try:
            content = read_json(file, form, remedy="")
            for key, item in content.items() if form is dict else enumerate(content):
                where = f"{file}, record {key!r}"
                kind = field(item, "kind", str, where) if form is list else name
                if kind not in rows:
                    raise BadInput(f"{where}: there is no kind {kind!r}")
                picture, *words = texts(item, where, *columns)
                rows[kind].append((inside(world / "images", picture), *words))
            if not all(rows[kind] for kind in (rows if form is list else [name])):
                raise BadInput(f"{file} does not have records of every kind")
        except BadInput as error:
            where = "" if str(file) in str(error) else f"{file}: "
            raise BadInput(f"{where}{error}{remedy}") from None

    read("recognition", list, recognition, "image", "question", "answer")
    for kind in COMPOSITION:
        read(kind, dict, composition, "filename", "caption", "negative_caption")
    recognition = {kind: rows[:limit] for kind, rows in recognition.items()}
    return recognition, {kind: rows[:limit] for kind, rows in composition.items()}
