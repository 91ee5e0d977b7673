"""What a model is worth on the tiny world: its scores, and how much it looks where its teacher looks.

recognition     colour, shape, existence, place: the greedy answer, letter for letter
compositional   SugarCrepe's seven kinds of caption pairs: right if P(yes | true caption) is higher than
                P(yes | hard negative), each asked alone; chance is 50
"""

from pathlib import Path

import numpy as np
import torch

import distill
import lean
from distill import METHODS
from evals import scorers
from evals.benchmarks import markdown
from evals.scorers import Ask, replies
from model import VLM, finite
from support.world import COMPOSITION, RECOGNITION, caption_question, tiny_items


def tiny_scores(vlm: VLM, world: Path, limit: int | None = None) -> dict[str, float]:
    """{kind: % right} with "recognition" and "compositional", the unweighted means over their kinds."""
    recognition, composition = tiny_items(world, limit)
    hits = {kind: exact_answers(vlm, items) for kind, items in recognition.items()}
    hits |= {kind: paired_yes(vlm, pairs) for kind, pairs in composition.items()}
    scores = {kind: 100 * sum(right) / len(right) for kind, right in hits.items()}
    scores["recognition"] = float(np.mean([scores[kind] for kind in RECOGNITION]))
    scores["compositional"] = float(np.mean([scores[kind] for kind in COMPOSITION]))
    return scores


def exact_answers(vlm: VLM, items: list[tuple[Path, str, str]]) -> list[float]:
    """1.0 where the greedy answer to (picture, question) is the expected one, letter for letter."""
    said = replies(vlm, [Ask(picture, question) for picture, question, _ in items])
    return [float(reply == answer) for reply, (_, _, answer) in zip(said, items)]


def paired_yes(vlm: VLM, pairs: list[tuple[Path, str, str]]) -> list[float]:
    """1.0 where P(yes) / (P(yes) + P(no)) is higher for the true caption; ties are wrong."""
    lead = scorers.option_tokens(vlm, ("yes", "no")).lead
    asks = [Ask(picture, caption_question(text), lead) for picture, *captions in pairs for text in captions]
    odds = scorers.of_all(vlm, asks, scorers.yes_odds)
    return [float(true > wrong) for true, wrong in zip(odds[::2], odds[1::2])]


@torch.no_grad()
def attention_similarity(student: VLM, teacher: VLM, world: Path, limit: int | None = 100) -> float:
    """How much the student looks where its teacher looks, from -1 to 1.

    The mean cosine of attention over the picture, over the text queries of the first `limit` true captions of
    each kind and over the layers that the paper aligns, each against the mean of its teacher layers.
    ValueError: compared_layers has none, or another number of visual tokens than this teacher has.
    """
    student_layers, teacher_layers = compared_layers(student, teacher)
    _, composition = tiny_items(world, limit)
    pairs = [pair for kind in composition.values() for pair in kind]
    samples = (scorers.prompt(student, picture, caption_question(true)) for picture, true, _ in pairs)
    distance = count = 0
    for batch in scorers.batches(samples, student.device):
        attend, rows = lean.visual_attention_of(batch, "text")
        inputs = dict(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], logits=False)
        ours = student(**inputs, attention=dict.fromkeys(student_layers, attend)).attentions
        theirs = teacher(**inputs, attention=dict.fromkeys(teacher_layers, attend)).attentions
        for vlm, maps in ((student, ours), (teacher, theirs)):
            finite(torch.cat(list(maps.values())), vlm.name)
        targets = distill.matched_targets(ours, theirs, rows, METHODS["compodistill"].matching)
        term = distill.visual_attention_loss(ours.values(), targets, rows, "cosine-rows")
        distance, count = distance + term.sum.item(), count + term.count.item()
    return 1 - distance / count


def compared_layers(student: VLM, teacher: VLM) -> tuple[list[int], list[int]]:
    """The layers of both that the paper aligns. ValueError: they read other tokens, or cannot be matched."""
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError("their tokenizers differ")
    depths = [vlm.config.text.num_hidden_layers for vlm in (student, teacher)]
    return distill.aligned_layers(METHODS["compodistill"], *depths)


def table(rows: dict[str, dict[str, float]]) -> str:
    """{method: scores} -> a Markdown table: both averages, every kind of pair, similarity to the teacher.

    With the cost of a step where one of them has it.
    """
    columns = ["recognition", "compositional", *COMPOSITION]
    more = {"similarity": ".2f"}
    if any("step_ms" in scores for scores in rows.values()):
        more["step_ms"] = ".0f"
    lines = []
    for name, scores in rows.items():
        cells = [f"{scores[column]:.1f}" for column in columns]
        cells += [f"{scores[column]:{form}}" if column in scores else "" for column, form in more.items()]
        lines.append([name, *cells])
    return markdown(["", *columns, *more], lines)
