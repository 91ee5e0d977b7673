"""Pictures of where models look: the picture, bright where the attention is.

Shown is the answering position, which predicts the first word of the answer: of the rows that VAT aligns the
one in which the question shows best (README).

Shapes: P visual tokens.
"""

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

import data
import distill
import lean
import model
from evals.scorers import Ask, batches, prompt, replies
from support.errors import BadInput, one_line
from support.world import caption_question, tiny_items


class Case(NamedTuple):
    """What is drawn in a row: a question about a picture, and its right answer, where that is known."""

    picture: Path
    question: str
    answer: str | None = None


def tiny_cases(models: dict[str, model.VLM], world: Path) -> list[Case]:
    """The captions of the tiny world that are drawn: the first of three kinds that "teacher" judges rightly
    and "kd" wrongly, or else the first, of 100 pairs; each of another picture, where there is one.
    """
    _, pairs = tiny_items(world, 100)
    chosen = []
    for kind in ("swap_obj", "replace_rel", "swap_att"):
        cases = [
            Case(picture, caption_question(caption), answer)
            for picture, true, wrong in pairs[kind]
            for caption, answer in ((true, "yes"), (wrong, "no"))
        ]
        shown = [case.picture for case in chosen]
        cases = [case for case in cases if case.picture not in shown] or cases
        asks = [Ask(case.picture, case.question) for case in cases]
        right = {
            name: [reply == case.answer for reply, case in zip(replies(models[name], asks), cases)]
            for name in ("teacher", "kd")
            if name in models
        }
        apart = [case for case, *ours in zip(cases, *right.values()) if ours == [True, False]]
        chosen.append((apart or cases)[0])
    return chosen


@torch.no_grad()
def question_attention(
    vlm: model.VLM,
    picture: Image.Image | Path,
    question: str,
    which: str = "intermediate",
    teacher: bool = False,
) -> np.ndarray:
    """Where the answering position looks -> (side, side), the attention that falls on each patch.

    Mean over heads and layers: `which`, as distill.choose_layers has them.
    """
    (batch,) = batches([prompt(vlm, picture, question)], vlm.device)
    T = batch["input_ids"].shape[1]
    attend = lean.VisualAttention(slice(T - 1, T), batch["visual_columns"])
    layers = distill.choose_layers(which, vlm.config.text.num_hidden_layers, teacher)
    inputs = batch["input_ids"], batch["pixel_values"]
    out = vlm(*inputs, attention=dict.fromkeys(layers, attend), logits=False)
    maps = torch.cat(list(out.attentions.values()))  # (k,1,P)
    return on_patches(vlm, maps.mean((0, 1)))


def on_patches(vlm: model.VLM, attention: Tensor) -> np.ndarray:
    """(P,) -> (side, side) as the patches lie in the picture; one that the model drops gets 0."""
    side = vlm.config.vision.image_size // vlm.config.vision.patch_size
    attention = F.pad(attention.float().cpu(), (int(vlm.config.drop_first_patch), 0))
    return attention.view(side, side).numpy()


SIDE, GAP, LINE, LETTERS = 240, 14, 24, 20  # pixels: a picture's side, space between, a line, its letters


def enlarge(picture: Image.Image) -> Image.Image:
    """To SIDE x SIDE; small pictures keep their pixels visible."""
    resample = Image.Resampling.NEAREST if picture.width < 100 else Image.Resampling.BICUBIC
    return picture.resize((SIDE, SIDE), resample)


def heat(picture: Image.Image, attention: np.ndarray, brightest: float) -> Image.Image:
    """The picture, as bright as the attention (side, side) is high; `brightest` leaves it as it is."""
    weight = enlarge(Image.fromarray((255 * attention / max(brightest, 1e-12)).astype(np.uint8)))
    bright = enlarge(picture)
    dark = Image.blend(bright, Image.new("RGB", bright.size, (25, 25, 45)), 0.75)
    return Image.composite(bright, dark, weight)


class Panel(NamedTuple):
    """A picture (SIDE x SIDE) between two texts."""

    above: str
    image: Image.Image
    below: str = ""
    right: bool | None = None  # marks the text below; None: no mark


def attention_picture(
    models: dict[str, model.VLM], cases: list[Case], file: Path, which: str = "intermediate"
) -> list[tuple[Path, str, str, np.ndarray]]:
    """Draw a row per case: the picture, then where each model looks, below it its answer, right or wrong.

    What is drawn is each patch's share of the attention on the picture, on one scale for all panels of a row:
    the brightest patch of the row is as bright as the picture.
    Returns (picture, question, model, attention (side, side)) of all that was drawn.
    """
    rows, drawn = [], []
    for path, question, answer in cases:
        picture = data.open_picture(path)
        truth = "" if answer is None else f"right: {answer}"
        rows.append([Panel(fit(question, 3), enlarge(picture), truth)])
        seen = {}
        for name, vlm in models.items():
            seen[name] = question_attention(vlm, picture, question, which, name == "teacher")
        shares = {name: grid / max(grid.sum(), 1e-12) for name, grid in seen.items()}
        for name, vlm in models.items():
            said = vlm.answer(picture, question, max_new_tokens=16)
            right = None if answer is None else said == answer
            below = said if right is None else f"{said}: {'right' if right else 'wrong'}"
            short = name if len(name) <= 24 else f"...{name[-21:]}"  # folders differ at their ends
            above = f"{short}\n{100 * seen[name].sum():.0f} % on the picture"
            image = heat(picture, shares[name], max(map(np.max, shares.values())))
            rows[-1].append(Panel(above, image, fit(below, 2), right))
            drawn.append((path, question, name, seen[name]))
    sheet(rows, file)
    return drawn


MADE = b"Software\0nanocompodistill"  # a text in every PNG that we write: these may be replaced


def fit(text: str, lines: int = 1) -> str:
    """A text over a picture, cut to so many lines."""
    return "\n".join(textwrap.wrap(text, 24, max_lines=lines, placeholder=" ..."))


FONTS = "/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/Library/Fonts"
FONTS += "/System/Library/Fonts", "C:/Windows/Fonts"


def draws(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font has a letter: one that it lacks is drawn as its box, which stands for U+FFFF, too."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def font_for(letters: str) -> tuple[ImageFont.FreeTypeFont, str]:
    """A font, and those of the letters that it lacks: Pillow's own, or the system's that lacks the fewest."""
    best, lacking = ImageFont.load_default(LETTERS), "".join(sorted({*letters}))
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
                yield ImageFont.truetype(str(file), LETTERS)
            except OSError:
                pass  # of a kind that Pillow does not read


def within(line: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """As much of a line as has room, in pixels."""
    while font.getlength(line) > room:
        line = line[:-1]
    return line


def mark(pen: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A tick or a cross, 16 pixels high: told apart without their colours."""
    if right:
        pen.line([(x, y + 9), (x + 6, y + 15), (x + 16, y + 2)], fill="#007A5E", width=4)
    else:
        pen.line([(x + 1, y + 2), (x + 15, y + 15)], fill="#B34700", width=4)
        pen.line([(x + 1, y + 15), (x + 15, y + 2)], fill="#B34700", width=4)


def sheet(rows: list[list[Panel]], file: Path) -> None:
    """Rows of panels, as a PNG."""
    font, lacking = font_for("".join(panel.above + panel.below for row in rows for panel in row))

    def written(text: str, room: int = SIDE) -> str:
        text = "".join(f"U+{ord(letter):X} " if letter in lacking else letter for letter in text)
        return "\n".join(within(line, font, room) for line in text.split("\n"))

    def height(texts: Iterable[str]) -> int:
        return LINE * max(text.count("\n") + bool(text) for text in texts) + 4

    heads = [height(panel.above for panel in row) for row in rows]
    feet = [height(panel.below for panel in row) for row in rows]
    width = (SIDE + GAP) * max(map(len, rows)) + GAP
    page = Image.new("RGB", (width, sum(heads) + sum(feet) + (SIDE + 2 * GAP) * len(rows)), "white")
    pen, top = ImageDraw.Draw(page), GAP
    for row, head, foot in zip(rows, heads, feet):
        for column, panel in enumerate(row):
            x, y = GAP + column * (SIDE + GAP), top + head + SIDE
            pen.multiline_text((x, top), written(panel.above), fill="black", font=font)
            page.paste(panel.image, (x, top + head))
            if panel.right is not None:
                mark(pen, x, y + 4, panel.right)
            shift = 0 if panel.right is None else LINE
            pen.multiline_text((x + shift, y), written(panel.below, SIDE - shift), fill="black", font=font)
        top += head + SIDE + foot + 2 * GAP
    made = PngImagePlugin.PngInfo()
    made.add_text(*MADE.decode().split("\0"))
    try:
        page.save(file, pnginfo=made)
    except (OSError, ValueError) as error:  # ValueError: no ending that names a format
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{file} could not be written ({reason}); give the name of a new .png") from None
