"""Data: conversations and pictures made into batches.

    conversation + picture -> encode, preprocess -> sample {"input_ids", "labels", "pixel_values"} -> collate
    -> batch

Inside: prompt template, labels, pictures, batches, LLaVA JSON. The tiny world, which makes such data for a
laptop, is in tiny/world.py.

Shapes: B samples, T tokens (padded on the right), N pictures, P visual tokens of a picture, S side in pixels.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
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
    return _encode_pieces(pieces(conversations, template), tokenizer, num_image_tokens)


def _encode_pieces(spans: Iterable[tuple[str, bool]], tokenizer: Tokenizer, num_image_tokens: int):
    ids, labels = [], []
    for text, supervised in spans:
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
    spans = list(pieces([*conversations, {"from": "gpt", "value": ""}], "chat"))[:-2]  # no answer, no end
    return _encode_pieces(spans, tokenizer, num_image_tokens)[0]


def pieces(conversations: list[dict], template: str) -> Iterable[tuple[str, bool]]:
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
        except (BadInput, TypeError, AttributeError) as error:  # a record or an image of the wrong type
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
