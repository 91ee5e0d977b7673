"""Pictures of where models look: the picture, bright where the attention is.

Shapes: R text rows, P visual tokens.
"""

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

import data
import distill
import lean
import model
from evals.scorers import batches, prompt
from support.errors import BadInput, one_line


@torch.no_grad()
def question_attention(
    vlm: model.VLM,
    picture: Image.Image | Path,
    question: str,
    which: str = "intermediate",
    teacher: bool = False,
) -> np.ndarray:
    """Where the text after the picture looks -> (side, side), the attention that falls on each patch.

    Mean over heads, text queries and layers: `which`, as distill.choose_layers has them.
    """
    (batch,) = batches([prompt(vlm, picture, question)], vlm.device)
    attend, _ = lean.visual_attention_of(batch, "text")
    layers = distill.choose_layers(which, vlm.config.text.num_hidden_layers, teacher)
    inputs = batch["input_ids"], batch["pixel_values"]
    out = vlm(*inputs, attention=dict.fromkeys(layers, attend), logits=False)
    return on_patches(vlm, torch.cat(list(out.attentions.values())).mean((0, 1)))  # k of (1,R,P) -> (P,)


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


def attention_picture(
    models: dict[str, model.VLM], cases: list[tuple[Path, str]], file: Path, which: str = "intermediate"
) -> list[tuple[Path, str, str, np.ndarray]]:
    """Draw a row per (picture, question): the picture, then where each model looks, above it its answer.

    Returns (picture, question, model, attention (side, side)) of all that was drawn.
    """
    rows, drawn = [], []
    for path, question in cases:
        picture = data.open_picture(path)
        rows.append([(fit(question, 2), enlarge(picture))])
        for name, vlm in models.items():
            answer = vlm.answer(picture, question, max_new_tokens=16)
            attention = question_attention(vlm, picture, question, which, name == "teacher")
            rows[-1].append((f"{fit(name)}\n{fit(answer)}", heat(picture, attention)))
            drawn.append((path, question, name, attention))
    sheet(rows, file)
    return drawn


MADE = b"Software\0nanocompodistill"  # a text in every PNG that we write: these may be replaced


def fit(text: str, lines: int = 1) -> str:
    """A text over a picture, cut to so many lines."""
    return "\n".join(textwrap.wrap(text, 38, max_lines=lines, placeholder=" ..."))


FONTS = "/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/Library/Fonts"
FONTS += "/System/Library/Fonts", "C:/Windows/Fonts"


def draws(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font has a letter: one that it lacks is drawn as its box, which stands for U+FFFF, too."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def font_for(letters: str) -> tuple[ImageFont.FreeTypeFont, str]:
    """A font, and those of the letters that it lacks: Pillow's own, or the system's that lacks the fewest."""
    best, lacking = ImageFont.load_default(13), "".join(sorted({*letters}))
    for font in [best, *system_fonts()]:
        lacks = "".join(letter for letter in sorted({*letters}) if not draws(font, letter))
        if len(lacks) < len(lacking):
            best, lacking = font, lacks
        if not lacking:
            break
    if lacking:
        print(f"no font here has {one_line(lacking)}: the picture has U+ numbers instead", file=sys.stderr)
    return best, lacking


def system_fonts() -> Iterator[ImageFont.FreeTypeFont]:
    """The fonts that are installed."""
    for folder in FONTS:
        files = sorted(Path(folder).expanduser().rglob("*.[to]t[fc]"))
        for file in sorted(
            files, key=lambda file: bool(re.search("Bold|Italic|Oblique|Mono|Light", file.name))
        ):
            try:
                yield ImageFont.truetype(str(file), 13)
            except OSError:
                pass  # of a kind that Pillow does not read


def within(line: str, font: ImageFont.FreeTypeFont) -> str:
    """As much of a line as has room over a picture."""
    while font.getlength(line) > SIDE:
        line = line[:-1]
    return line


def sheet(rows: list[list[tuple[str, Image.Image]]], file: Path) -> None:
    """Rows of pictures (SIDE x SIDE), each under its text of at most two lines, as a PNG."""
    width, height = (SIDE + GAP) * max(map(len, rows)) + GAP, (HEAD + SIDE + GAP) * len(rows) + GAP
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    font, lacking = font_for("".join(text for columns in rows for text, _ in columns))
    for row, columns in enumerate(rows):
        for column, (text, image) in enumerate(columns):
            x, y = GAP + column * (SIDE + GAP), GAP + row * (HEAD + SIDE + GAP)
            text = "".join(f"U+{ord(letter):X} " if letter in lacking else letter for letter in text)
            text = "\n".join(within(line, font) for line in text.split("\n"))
            pen.multiline_text((x, y), text, fill="black", font=font)
            page.paste(image, (x, y + HEAD))
    made = PngImagePlugin.PngInfo()
    made.add_text(*MADE.decode().split("\0"))
    try:
        page.save(file, pnginfo=made)
    except (OSError, ValueError) as error:  # ValueError: no ending that names a format
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{file} could not be written ({reason}); give the name of a new .png") from None
