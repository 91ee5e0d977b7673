"""Data: from conversations and pictures to batches, and the tiny world in which the method can be watched on a laptop.

    conversation + picture -> encode, preprocess -> sample {"input_ids", "labels", "pixel_values"} -> collate -> batch

Part 1 is what real data goes through: prompt template, labels, pictures, batches, LLaVA JSON.
Part 2, the tiny world, draws small pictures of coloured shapes and asks about them, in the same LLaVA JSON form.

Shapes: B samples, T tokens (padded on the right), N pictures, P visual tokens of a picture, S side in pixels.
"""

import json
import random
from pathlib import Path
from typing import Iterable

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
    """tokenizer.json of a checkpoint folder. Special tokens written in a text are read as plain text, never as control."""
    file = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{file} is missing or is no tokenizer ({error}); copy the language model's here") from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise BadInput(f"{file} has no token {END_OF_TEXT}, which ends every answer; use the Qwen1.5 tokenizer")
    return tokenizer


def encode(
    conversations: list[dict], tokenizer: Tokenizer, num_image_tokens: int, template: str = "chat"
) -> tuple[list[int], list[int]]:
    """A LLaVA conversation -> ids, labels (equally long lists; labels are -100 where nothing is supervised).

        chat:      {SYSTEM}USER: [picture]\\n{question} ASSISTANT: {answer}<|endoftext|>USER: {question} ASSISTANT: ...
        pretrain:  [picture]{caption}\\n

    Supervised are " {answer}" and <|endoftext|>, with pretrain all after the picture. [picture] is num_image_tokens
    placeholders at the front of the turn in which <image> stood; marks in answers are plain text.
    """
    ids, labels, pieces = [], [], _pieces(conversations, template)
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
    ids, _ = encode([*conversations, {"from": "gpt", "value": None}], tokenizer, num_image_tokens)
    return ids


def _pieces(conversations: list[dict], template: str) -> Iterable[tuple[str, bool]]:
    """The conversation from left to right as (text, supervised). A picture is IMAGE_MARK itself, the end END_OF_TEXT."""
    if len(conversations) % 2 or [turn.get("from") for turn in conversations[:2]] != ["human", "gpt"]:
        raise BadInput("a conversation is an even number of turns, human and gpt alternating, human first")
    if sum(str(turn["value"]).count(IMAGE_MARK) for turn in conversations[::2]) > 1:
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
        if gpt["value"] is not None:  # None: a prompt, which ends here
            yield " " + gpt["value"].strip(), True
            yield END_OF_TEXT, True
        before = ""


def preprocess(image: Image.Image | str | Path, size: int) -> Tensor:
    """A picture -> (3,S,S) in [-1, 1]: RGB, resized to a square without keeping the aspect ratio, bicubic."""
    if not isinstance(image, Image.Image):
        try:
            with Image.open(image) as opened:
                image = opened.convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise BadInput(f"{image} cannot be read as a picture ({error}); replace or leave out the file") from None
    image = image.convert("RGB")
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
                f"sample {sample.get('id', '?')}: {IMAGE_MARK} in the text and a picture beside it go together, one is missing"
            )
    visual_columns = torch.zeros(B, max(int(placeholder.sum(1).max()), 1), dtype=torch.long)
    visual_columns[has_image] = placeholder[has_image].nonzero()[:, 1].view(int(has_image.sum()), -1)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": attention_mask,
        "pixel_values": torch.stack(pictures) if pictures else None,
        "has_image": has_image,
        "visual_columns": visual_columns,
    }
