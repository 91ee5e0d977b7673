"""Evaluation: the tiny world's benchmark for any checkpoint, scorers of caption pairs, where a model looks.

    python eval.py tiny --model out/KD/stage3    # scores, and similarity to the teacher
    python eval.py attention --model tiny/teacher --image FILE --question "What colour is the circle?"

A caption pair is (true caption, hard negative) of one picture. A pair is right
    yes         if P(yes | true caption) > P(yes | negative), each asked alone             paired_yes
    choice      as often as its letter is preferred, offered as (A) and as (B)             choice_ab
    likelihood  if the true caption is the likelier answer to "Describe the picture."      caption_likelihood
Shapes: B prompts, T tokens, P visual tokens, V vocabulary, k matched layers.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import data
import distill
import model
from checkpoint import BadInput, sentence
from qwen import Look
from tiny.world import COMPOSITION, DESCRIBE, RECOGNITION, caption_question, make_world

TINY = Path(__file__).parent / "tiny"  # the models that ship with the repository
BATCH = 256  # prompts scored at once

# ---------------------------------------------------------------- scorers


def prompt(vlm: model.VLM, picture: Path, question: str) -> dict:
    """A sample for collate: the picture and the question, ready to be answered."""
    turn = {"from": "human", "value": f"{data.IMAGE_MARK}\n{question}"}
    ids = data.encode_prompt([turn], vlm.tokenizer, vlm.num_image_tokens)
    pixels = data.preprocess(picture, vlm.config.vision.image_size)
    return {"input_ids": ids, "labels": [data.IGNORE] * len(ids), "pixel_values": pixels}


def batches(samples: Iterable[dict], device: torch.device, size: int = BATCH):
    """Samples, made one batch at a time -> batches on the device."""
    samples = iter(samples)
    while chunk := list(islice(samples, size)):
        yield data.to_device(data.collate(chunk), device)


@torch.no_grad()
def next_token_logits(vlm: model.VLM, samples: Iterable[dict]) -> Tensor:
    """What comes first after each prompt: -> (samples, V)."""
    rows = []
    for batch in batches(samples, vlm.device):
        hidden, _ = vlm.hidden(batch["input_ids"], batch["pixel_values"])  # (B,T,C)
        last = batch["attention_mask"].sum(1) - 1  # padding is on the right, where causality hides it
        last = hidden[torch.arange(len(hidden), device=hidden.device), last]  # (B,C)
        rows.append(vlm.lm.head(last).float())
    return torch.cat(rows)


def first_token(vlm: model.VLM, answer: str) -> int:
    """The first token of an answer, which begins with its space."""
    return vlm.tokenizer.encode(" " + answer, add_special_tokens=False).ids[0]


def paired_yes(vlm: model.VLM, pairs: list[tuple[Path, str, str]]) -> list[float]:
    """1.0 where P(yes) / (P(yes) + P(no)) is higher for the true caption; ties are wrong."""
    samples = (
        prompt(vlm, picture, caption_question(caption))
        for picture, *captions in pairs
        for caption in captions
    )
    logits = next_token_logits(vlm, samples)
    log_odds = logits[:, first_token(vlm, "yes")] - logits[:, first_token(vlm, "no")]
    yes = log_odds.view(-1, 2)  # (pairs, true and negative)
    return (yes[:, 0] > yes[:, 1]).float().tolist()


CHOICE = (
    "Which caption best describes the image?\n(A) {}\n (B) {}\n"
    "Answer with the option's alphabet from the given choices directly."
)  # SugarCrepe's question in the released code, with its space before (B)


def choice_ab(vlm: model.VLM, pairs: list[tuple[Path, str, str]]) -> list[float]:
    """Both orders: 1.0, 0.5 or 0.0 for how often the true caption's letter is the likelier of A and B."""
    samples = (
        prompt(vlm, picture, CHOICE.format(*order))
        for picture, true, wrong in pairs
        for order in ((true, wrong), (wrong, true))
    )
    logits = next_token_logits(vlm, samples)
    log_odds = logits[:, first_token(vlm, "A")] - logits[:, first_token(vlm, "B")]
    a_over_b = log_odds.view(-1, 2)  # (pairs, order)
    return ((a_over_b[:, 0] > 0).float() + (a_over_b[:, 1] < 0).float()).div(2).tolist()


@torch.no_grad()
def caption_likelihood(vlm: model.VLM, pairs: list[tuple[Path, str, str]], mean: bool = False) -> list[float]:
    """1.0 where log P(caption | picture, DESCRIBE) is higher for the true caption; `mean`: per token."""
    samples = (described(vlm, picture, caption) for picture, *captions in pairs for caption in captions)
    scores = []
    for batch in batches(samples, vlm.device, size=BATCH // 4):
        hidden, _ = vlm.hidden(batch["input_ids"], batch["pixel_values"])
        targets = distill.next_tokens(batch["labels"])
        rows, columns = (targets != data.IGNORE).nonzero(as_tuple=True)  # logits only of what is scored
        logits = vlm.lm.head(hidden[rows, columns]).float()  # (n,V)
        loss = F.cross_entropy(logits, targets[rows, columns], reduction="none")
        total = torch.zeros(len(hidden), device=loss.device).index_add_(0, rows, loss)
        scores.append(-total / (rows.bincount(minlength=len(hidden)) if mean else 1))
    scores = torch.cat(scores).view(-1, 2)
    return (scores[:, 0] > scores[:, 1]).float().tolist()


def described(vlm: model.VLM, picture: Path, caption: str) -> dict:
    """A sample for collate: the picture, the request to describe it, and the caption as the answer."""
    question = {"from": "human", "value": f"{data.IMAGE_MARK}\n{DESCRIBE}"}
    answer = {"from": "gpt", "value": caption}
    ids, labels = data.encode([question, answer], vlm.tokenizer, vlm.num_image_tokens)
    pixels = data.preprocess(picture, vlm.config.vision.image_size)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


SCORERS = {
    "yes": paired_yes,
    "choice": choice_ab,
    "likelihood": caption_likelihood,
    "likelihood-per-token": partial(caption_likelihood, mean=True),
}


def exact_answers(vlm: model.VLM, items: list[tuple[Path, str, str]]) -> list[float]:
    """1.0 where the greedy answer to (picture, question) is the expected one, letter for letter."""
    right = []
    samples = (prompt(vlm, picture, question) for picture, question, _ in items)
    answers = iter(items)
    for batch in batches(samples, vlm.device):
        new = vlm.generate(
            batch["input_ids"], batch["pixel_values"], batch["attention_mask"], max_new_tokens=4
        )
        for row in new.tolist():
            text = vlm.tokenizer.decode(row, skip_special_tokens=True).strip()
            right.append(float(text == next(answers)[2]))
    return right


# ---------------------------------------------------------------- the tiny world's benchmark


def tiny_items(world: Path, limit: int | None = None) -> tuple[dict, dict]:
    """-> two dicts by kind: of [(picture, question, answer)] and of [(picture, true caption, negative)]."""
    recognition = {kind: [] for kind in RECOGNITION}
    for item in data.read_records(world / "test" / "recognition.json"):
        recognition[item["kind"]].append((world / "images" / item["image"], item["question"], item["answer"]))
    composition = {}
    for kind in COMPOSITION:
        items = json.loads((world / "test" / f"{kind}.json").read_text(encoding="utf-8")).values()
        composition[kind] = [
            (world / "images" / i["filename"], i["caption"], i["negative_caption"]) for i in items
        ]
    return tuple({kind: rows[:limit] for kind, rows in items.items()} for items in (recognition, composition))


def tiny_scores(
    vlm: model.VLM, world: Path, scorer: str = "yes", limit: int | None = None
) -> dict[str, float]:
    """{kind: % right} with "recognition" and "compositional", the unweighted means over their kinds."""
    recognition, composition = tiny_items(world, limit)
    hits = {kind: exact_answers(vlm, items) for kind, items in recognition.items()}
    hits |= {kind: SCORERS[scorer](vlm, pairs) for kind, pairs in composition.items()}
    scores = {kind: 100 * sum(right) / len(right) for kind, right in hits.items()}
    scores["recognition"] = float(np.mean([scores[kind] for kind in RECOGNITION]))
    scores["compositional"] = float(np.mean([scores[kind] for kind in COMPOSITION]))
    return scores


@torch.no_grad()
def attention_similarity(
    student: model.VLM, teacher: model.VLM, world: Path, limit: int | None = 100
) -> float:
    """How much the student looks where its teacher looks, from -1 to 1.

    The mean cosine of attention over the picture, over the text queries of the first `limit` true captions of
    each kind and over the understanding layers, each against the mean of its teacher group.
    """
    layers = [distill.understanding_layers(len(vlm.lm.model.layers)) for vlm in (student, teacher)]
    groups = [[layer] for layer in layers[0]], distill.match_layers(*layers)
    _, composition = tiny_items(world, limit)
    pairs = [pair for kind in composition.values() for pair in kind]
    distance = count = 0
    samples = (prompt(student, picture, caption_question(true)) for picture, true, _ in pairs)
    for batch in batches(samples, student.device):
        queries = distill.query_rows(
            "text", batch["visual_columns"], batch["has_image"], batch["attention_mask"]
        )
        rows = distill.span(queries)
        looks = (Look(which, rows, batch["visual_columns"]) for which in groups)
        maps = (
            vlm.hidden(batch["input_ids"], batch["pixel_values"], look=look)[1]
            for vlm, look in zip((student, teacher), looks)
        )
        total, number = distill.visual_attention_loss(*maps, queries[:, rows], rowwise=True)
        distance, count = distance + total.item(), count + number.item()
    return 1 - distance / count


# ---------------------------------------------------------------- where does it look?


@torch.no_grad()
def question_attention(vlm: model.VLM, picture: Image.Image | Path, question: str) -> np.ndarray:
    """Where the text after the picture looks: mean over heads, understanding layers and text queries.

    -> (side, side), the attention that falls on each patch.
    """
    (batch,) = batches([prompt(vlm, picture, question)], vlm.device)
    text = distill.query_rows("text", batch["visual_columns"], batch["has_image"], batch["attention_mask"])
    layers = distill.understanding_layers(len(vlm.lm.model.layers))
    look = Look([layers], distill.span(text), batch["visual_columns"])
    _, (attention,) = vlm.hidden(batch["input_ids"], batch["pixel_values"], look=look)  # (1,R,P)
    mean = attention.mean((0, 1)).cpu()  # (P,)
    side = vlm.config.vision.image_size // vlm.config.vision.patch_size
    return F.pad(mean, (int(vlm.config.drop_first_patch), 0)).view(side, side).numpy()


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


def attention_picture(models: dict[str, model.VLM], cases: list[tuple[Path, str]], file: Path) -> None:
    """One row per (picture, question): the picture, then where each model looks, above it its answer."""
    width, height = (SIDE + GAP) * (len(models) + 1) + GAP, (HEAD + SIDE + GAP) * len(cases) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (path, question) in enumerate(cases):
        picture, y = data.open_picture(path), GAP + row * (HEAD + SIDE + GAP)
        columns = [("\n".join(textwrap.wrap(question, 42)), enlarge(picture))]
        for name, vlm in models.items():
            answer = vlm.answer(picture, question, max_new_tokens=16)
            columns.append((f"{name}\n{answer}", heat(picture, question_attention(vlm, picture, question))))
        for column, (text, image) in enumerate(columns):
            x = GAP + column * (SIDE + GAP)
            pen.multiline_text((x, y), text, fill="black", font_size=13)
            sheet.paste(image, (x, y + HEAD))
    try:
        sheet.save(file)
    except OSError as error:
        raise BadInput(f"{file} could not be written ({error.strerror or error})") from None


# ---------------------------------------------------------------- tables and command line


def tiny_cases(world: Path) -> list[tuple[Path, str]]:
    """The questions of the main job's picture: true captions of three kinds, of different pictures."""
    _, composition = tiny_items(world)
    items = [composition["swap_att"][0], composition["replace_obj"][5], composition["swap_obj"][10]]
    return [(picture, caption_question(true)) for picture, true, _ in items]


def table(rows: dict[str, dict[str, float]]) -> str:
    """{method: scores} -> a Markdown table: the two averages, every composition kind, similarity to the
    teacher.
    """
    columns = ["recognition", "compositional", *COMPOSITION, "similarity"]
    lines = ["| " + " | ".join(["", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in rows.items():
        cells = [f"{scores[column]:.1f}" for column in columns[:-1]]
        cells.append(f"{scores['similarity']:.2f}" if "similarity" in scores else "")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tiny = commands.add_parser(
        "tiny", help="scores on the tiny world, and the similarity of its attention to the teacher's"
    )
    tiny.add_argument("--model", required=True, help="checkpoint folder or hub name")
    tiny.add_argument(
        "--teacher",
        default=str(TINY / "teacher"),
        help="whose attention to compare with (default: %(default)s)",
    )
    tiny.add_argument(
        "--world", type=Path, default=Path("out/world"), help="made if it is not there (default: %(default)s)"
    )
    tiny.add_argument(
        "--scorer", choices=list(SCORERS), default="yes", help="of the caption pairs (default: %(default)s)"
    )
    tiny.add_argument(
        "--limit", type=int, choices=range(1, 10**6), metavar="N", help="items per kind (default: all)"
    )
    look = commands.add_parser("attention", help="a picture of where models look when they answer a question")
    look.add_argument(
        "--model", nargs="+", required=True, help="one or several checkpoint folders or hub names"
    )
    look.add_argument("--image", type=Path, required=True)
    look.add_argument("--question", required=True)
    look.add_argument(
        "--save", type=Path, default=Path("attention.png"), help="PNG to write (default: %(default)s)"
    )
    return parser.parse_args(argv)


def load(name: str) -> model.VLM:
    """A checkpoint that can be asked questions, on the GPU if there is one."""
    vlm = model.load(name, device="cuda" if torch.cuda.is_available() else "cpu")
    vlm.require_tokenizer()
    return vlm


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.command == "tiny":
            vlm, teacher = load(args.model), load(args.teacher)
            world = make_world(args.world)
            scores = tiny_scores(vlm, world, args.scorer, args.limit)
            try:
                scores["similarity"] = attention_similarity(vlm, teacher, world, args.limit or 100)
            except (
                ValueError
            ) as error:  # of another size or depth than this teacher: scores there are all the same
                print(f"no similarity to {args.teacher}: {error}")
            print(table({str(args.model): scores}))
        else:
            models = {name: load(name) for name in args.model}
            attention_picture(models, [(args.image, args.question)], args.save)
            print(args.save)
    except (ValueError, OSError) as error:  # BadInput among them
        sys.exit(f"error: {sentence(error)}")


if __name__ == "__main__":
    main()
