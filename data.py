"""Data: conversations and pictures made into batches, and the tiny world that learns on a laptop.

    conversation + picture -> encode, preprocess -> sample {"input_ids", "labels", "pixel_values"} -> collate
    -> batch

Part 1 is what real data goes through: prompt template, labels, pictures, batches, LLaVA JSON. Part 2, the
tiny world, draws small pictures of coloured shapes and asks about them, in the same LLaVA JSON form.

Shapes: B samples, T tokens (padded on the right), N pictures, P visual tokens of a picture, S side in pixels.
"""

import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from checkpoint import BadInput

IMAGE_TOKEN = -200  # placeholder id, one per visual token; the model writes the visual tokens there
IGNORE = -100  # label of what is not supervised
IMAGE_MARK = "<image>"  # where a LLaVA record says that its picture stands
END_OF_TEXT = "<|endoftext|>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

# ================================================================ Part 1: what real data goes through


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer.json of a checkpoint folder."""
    file = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(
            f"{file} is missing or is no tokenizer ({error}); copy the language model's here"
        ) from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise BadInput(
            f"{file} has no token {END_OF_TEXT}, which ends every answer; use the Qwen1.5 tokenizer"
        )
    return tokenizer


def encode(
    conversations: list[dict], tokenizer: Tokenizer, num_image_tokens: int, template: str = "chat"
) -> tuple[list[int], list[int]]:
    """A LLaVA conversation -> ids, labels (equally long lists; labels are -100 where nothing is supervised).

        chat:      {SYSTEM}USER: [picture]\\n{question} ASSISTANT: {answer}<|endoftext|>USER: {question} ...
        pretrain:  [picture]{caption}\\n

    Supervised are " {answer}" and <|endoftext|>, with pretrain all after the picture. [picture] is
    num_image_tokens placeholders at the front of the turn in which <image> stood; marks in answers are plain
    text.
    """
    return _encode_pieces(_pieces(conversations, template), tokenizer, num_image_tokens)


def _encode_pieces(pieces: Iterable[tuple[str, bool]], tokenizer: Tokenizer, num_image_tokens: int):
    ids, labels = [], []
    for text, supervised in pieces:
        if text is IMAGE_MARK:
            new = [IMAGE_TOKEN] * num_image_tokens
        elif text is END_OF_TEXT:
            new = [tokenizer.token_to_id(END_OF_TEXT)]
        else:
            tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
            new = tokenizer.encode(text, add_special_tokens=False).ids
        ids += new
        labels += new if supervised else [IGNORE] * len(new)
    return ids, labels


def encode_prompt(conversations: list[dict], tokenizer: Tokenizer, num_image_tokens: int) -> list[int]:
    """A conversation that ends with a question -> ids that end in "ASSISTANT:", ready for generate."""
    pieces = list(_pieces([*conversations, {"from": "gpt", "value": ""}], "chat"))[:-2]  # no answer, no end
    return _encode_pieces(pieces, tokenizer, num_image_tokens)[0]


def _pieces(conversations: list[dict], template: str) -> Iterable[tuple[str, bool]]:
    """The conversation from left to right as (text, supervised), with IMAGE_MARK and END_OF_TEXT."""
    turns = conversations if isinstance(conversations, list) else []
    if not turns or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise BadInput('"conversations" is not a list of {"from": ..., "value": text}')
    if [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise BadInput("a conversation is an even number of turns, human and gpt alternating, human first")
    if sum(turn["value"].count(IMAGE_MARK) for turn in turns[::2]) > 1:
        raise BadInput(f"a conversation has more than one {IMAGE_MARK}; a sample holds none or one picture")
    if template == "pretrain":
        if IMAGE_MARK in conversations[0]["value"]:
            yield IMAGE_MARK, False
        yield conversations[1]["value"].strip() + "\n", True
        return
    before = SYSTEM
    for human, gpt in zip(conversations[::2], conversations[1::2]):
        question = human["value"].replace(IMAGE_MARK, "").strip()
        if IMAGE_MARK in human["value"]:
            yield before + "USER: ", False
            yield IMAGE_MARK, False
            yield f"\n{question} ASSISTANT:", False
        else:
            yield f"{before}USER: {question} ASSISTANT:", False
        yield " " + gpt["value"].strip(), True
        yield END_OF_TEXT, True
        before = ""


PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def open_picture(file: str | Path) -> Image.Image:
    """An RGB picture from a file."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except PILLOW_ERRORS as error:
        raise BadInput(f"{file} cannot be read as a picture ({error}); replace it or leave it out") from None


def preprocess(image: Image.Image | str | Path, size: int) -> Tensor:
    """A picture -> (3,S,S) in [-1, 1]: RGB, resized to a square without keeping the aspect ratio, bicubic."""
    image = image.convert("RGB") if isinstance(image, Image.Image) else open_picture(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # (S,S,3) bytes -> (3,S,S)


def collate(samples: list[dict]) -> dict:
    """Samples {"input_ids", "labels", "pixel_values" (3,S,S) or absent} -> batch, padded on the right.

    input_ids, labels (B,T), attention_mask (B,T) bool, pixel_values (N,3,S,S) or None, has_image (B,) bool,
    visual_columns (B,P): where in its row each visual token of a sample stands (0 where it has no picture).
    """
    B, T = len(samples), max(len(sample["input_ids"]) for sample in samples)
    input_ids, labels = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), IGNORE)
    attention_mask = torch.zeros(B, T, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        input_ids[row, :length] = torch.as_tensor(sample["input_ids"])
        labels[row, :length] = torch.as_tensor(sample["labels"])
        attention_mask[row, :length] = True
    placeholder = input_ids == IMAGE_TOKEN
    pictures = [sample["pixel_values"] for sample in samples if sample.get("pixel_values") is not None]
    has_image = placeholder.any(1)
    for sample, marked in zip(samples, has_image.tolist()):
        if marked != (sample.get("pixel_values") is not None):
            raise BadInput(
                f"sample {sample.get('id', '?')}: {IMAGE_MARK} in its text and a picture go together"
            )
    P = max(int(placeholder.sum(1).max()), 1)
    if bool((placeholder.sum(1)[has_image] != P).any()):
        raise BadInput(
            "the pictures of a batch have different numbers of visual tokens; encode all for one model"
        )
    visual_columns = torch.zeros(B, P, dtype=torch.long)
    visual_columns[has_image] = placeholder.nonzero()[:, 1].view(-1, P)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": attention_mask,
        "pixel_values": torch.stack(pictures) if pictures else None,
        "has_image": has_image,
        "visual_columns": visual_columns,
    }


def to_device(batch: dict, device: torch.device | str) -> dict:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


class LlavaDataset(torch.utils.data.Dataset):
    """LLaVA JSON, a list of {"id", "image" or none, "conversations"} -> samples for collate."""

    def __init__(
        self, file, images, tokenizer, num_image_tokens: int, image_size: int, template: str = "chat"
    ):
        self.file, self.images = Path(file), Path(images)
        self.tokenizer, self.num_image_tokens, self.image_size = tokenizer, num_image_tokens, image_size
        self.template = template
        self.records = read_records(self.file)
        if not self.images.is_dir():
            raise BadInput(f"{self.images}: no such folder of pictures; give it with --images")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record, name = self.records[index], index
        try:
            name, turns = record.get("id", index), record.get("conversations")
            ids, labels = encode(turns, self.tokenizer, self.num_image_tokens, self.template)
            sample = {"id": name, "input_ids": ids, "labels": labels}
            if record.get("image"):
                sample["pixel_values"] = preprocess(inside(self.images, record["image"]), self.image_size)
        except (
            BadInput,
            TypeError,
            AttributeError,
        ) as error:  # no record, or an image that is no text
            raise BadInput(f"{self.file}, record {name}: {error}; mend or remove it") from None
        return sample


def read_records(file: Path) -> list[dict]:
    """A JSON file that holds a non-empty list."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}); give a LLaVA JSON with --data") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is not valid JSON ({error})") from None
    if not isinstance(records, list) or not records or not isinstance(records[0], dict):
        raise BadInput(f"{file} is not a list of records, or an empty one")
    return records


def inside(folder: Path, name: str) -> Path:
    """folder / name, refused where it leads out of the folder (data may come from strangers)."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadInput(f"picture path {name!r} leads out of {folder}")
    return path


# ================================================================ Part 2: the tiny world

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
    """Two or three different objects in different cells. Every scene belongs to exactly one split, by a
    checksum of what is where, and a picture is a function of its scene: train and test pictures can never
    coincide.
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
            pen.polygon(
                [(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], fill=COLOURS[colour]
            )
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
    return f"True? {caption}"


def _absent(scene: Scene, rng: random.Random) -> Kind:
    return rng.choice([(c, s) for c in COLOURS for s in SHAPES if (c, s) not in scene])


def training_record(name: str, scene: Scene, rng: random.Random, turns: int) -> dict:
    """A LLaVA record about one picture: turns of recognition, relations, captions that are true or false."""
    conversations = []
    while len(conversations) < 2 * turns:
        kind = rng.choices(list(MIX), MIX.values())[0]
        if kind == "caption":
            pair = caption_pair(rng.choice(COMPOSITION), scene, rng)
            wrong = rng.random() < 0.5
            turn = pair and (caption_question(pair[wrong]), "no" if wrong else "yes")
        else:
            turn = recognition_question(kind, scene, rng)
        if turn:
            mark = "" if conversations else IMAGE_MARK + "\n"
            conversations += [{"from": "human", "value": mark + turn[0]}, {"from": "gpt", "value": turn[1]}]
    return {"id": name, "image": f"{name}.png", "conversations": conversations}


# How often each question is asked in training. Much of "where" and relations lets space be learned soon.
MIX = {"where": 4, "at": 1, "colour": 1, "shape": 1, "exists": 1, "column": 3, "row": 3, "caption": 6}
DESCRIBE = "Describe the picture."


def describe(scene: Scene) -> str:
    return " and ".join(f"a {' '.join(kind)} at {cell_name(cell)}" for kind, cell in scene.items())


def make_world(
    folder: Path, seed: int = 0, tune: int = 8000, pretrain: int = 2000, per_kind: int = 640
) -> Path:
    """Write the tiny world, unless it is there: pretrain.json (captions) and tune.json (conversations) in
    LLaVA's form, test/recognition.json, test/<kind>.json in SugarCrepe's form, and images/*.png. -> folder
    """
    if (folder / "world.json").exists():
        return folder
    if folder.exists():
        raise BadInput(f"{folder} exists and is not a tiny world; remove it or choose another --out")
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        (temporary / "images").mkdir(parents=True)
        (temporary / "test").mkdir()
        _write_world(temporary, seed, tune, pretrain, per_kind)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
    write(
        "tune.json",
        [training_record(f"tune-{i}", picture(f"tune-{i}", "train"), rng, turns=6) for i in range(tune)],
    )

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
    write("world.json", {"seed": seed, "tune": tune, "pretrain": pretrain, "per_kind": per_kind})


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of Qwen's class, trained on the tiny world's text: a token a word, else bytes."""
    units = rf"{re.escape(SYSTEM.strip())}| ?USER:| ?ASSISTANT:"  # said in every conversation: one token each
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{units}|{words}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    rng = random.Random(0)
    pieces = (_pieces(text_conversation(rng), "chat") for _ in range(3000))
    texts = ("".join(text for text, _ in conversation if text is not END_OF_TEXT) for conversation in pieces)
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
