"""Which layers need to see: a model's answers when one layer's attention on the picture is made uniform.

    python eval.py analyse layers --model tiny/teacher tiny/compodistill

In that one layer every head of every query keeps how much it looks at the picture, and spreads it evenly over
the visual tokens that it may see: where it looked is gone, and nothing else. The accuracy that is lost is the
layer's weight. Where it is high are layers to align; the paper takes those at 30 to 70 % of the depth,
whatever the model. Losing one layer says nothing of what two do together.

Shapes: B questions, T tokens, S keys, P visual tokens, H heads, L layers.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import distill
import model
from evals import figures, scorers
from evals.analyses import (
    PAPER,
    TEACHER,
    Question,
    answered,
    benchmark_questions,
    estimate,
    output_folder,
    resamples,
    world_questions,
    write_rows,
    yes_over_no,
)
from qwen import probabilities
from support.errors import BadInput, one_line
from support.world import make_world

SHARE = 0.8  # of all that is lost: what the suggested window is to hold


@dataclass(frozen=True)
class Blind:
    """An AttentionFunction (qwen.py): attention on the visual columns is the same on all that are seen."""

    columns: Tensor  # (B,P) key tokens: the visual tokens; every sample has a picture

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        return self.evened(probabilities(q, k, mask)).to(v.dtype) @ v, None

    def evened(self, attention: Tensor) -> Tensor:
        """A (B,H,T,S) -> (B,H,T,S): each row keeps its sum over the visual columns."""
        T, S = attention.shape[2:]
        columns = self.columns[:, None, None].expand(*attention.shape[:3], -1)  # (B,H,T,P)
        visible = columns <= torch.arange(S - T, S, device=columns.device)[:, None]
        mass = attention.gather(3, columns).sum(-1, keepdim=True)
        even = mass * visible / visible.sum(-1, keepdim=True).clamp(min=1)
        return attention.scatter(3, columns, even)


@torch.no_grad()
def right_answers(
    vlm: model.VLM, questions: list[Question], layers: list[int], size: int, pairs: bool
) -> np.ndarray:
    """(1+L,n): whether each item is answered rightly, by the model as it is and with each layer `Blind`.

    A question: every token of the right answer is the likeliest. Caption pairs (true caption first, see
    Question): P(yes) is higher after the true one; n is then half as many.
    """
    options = scorers.option_tokens(vlm, ("yes", "no")) if pairs else None
    found = []
    samples = (answered(vlm, question) for question in questions)
    for batch in scorers.batches(samples, vlm.device, size):
        embeds = vlm.embed(batch["input_ids"], batch["pixel_values"])
        targets = distill.next_tokens(batch["labels"])
        here = targets != data.IGNORE
        last = here.long().argmax(1) + (len(options.lead) if pairs else 0)
        rows = []
        for layer in [None, *layers]:
            attention = {} if layer is None else {layer: Blind(batch["visual_columns"])}
            hidden = vlm.lm(inputs_embeds=embeds, attention=attention, logits=False).hidden
            if pairs:
                rows.append(model.finite(yes_over_no(vlm, hidden, last, options), vlm.name))
                continue
            logits = model.finite(vlm.lm.head(hidden[here]), vlm.name)
            hit = torch.ones_like(here)
            hit[here] = logits.argmax(-1) == targets[here]
            rows.append(hit.all(1))
        found.append(torch.stack(rows).float().cpu())
    values = torch.cat(found, 1).numpy()  # (1+L,n)
    return (values[:, ::2] > values[:, 1::2]).astype(float) if pairs else values


def layer_rows(models: dict[str, model.VLM], questions: dict[str, list[Question]], size: int) -> list[dict]:
    """By model, items and layer: the accuracy that it costs to blind it, in points, with its interval."""
    rows = []
    for name, vlm in models.items():
        depth = vlm.config.text.num_hidden_layers
        for items, asked in questions.items():
            hits = 100 * right_answers(vlm, asked, list(range(depth)), size, items == "compositional")
            drawn = resamples(asked[:: len(asked) // hits.shape[1]])
            for layer in range(depth):
                row = dict(model=name, items=items, layer=layer, layers=depth)
                row |= dict(zip(("loss", "low", "high"), estimate(hits[0] - hits[1 + layer], drawn)))
                rows.append(row | dict(accuracy=float(hits[0].mean()), n=hits.shape[1]))
    return rows


def window(losses: list[float], share: float = SHARE) -> tuple[int, int]:
    """The shortest run of layers that holds this share of all losses -> its first layer and its last.

    Layers without which a model is better lose nothing. BadInput: no layer loses anything.
    """
    losses = np.maximum(losses, 0)
    if not losses.any():
        raise BadInput("no layer needs its visual attention: there is nothing to suggest a window from")
    ends = [
        (last - first, first, last)
        for first in range(len(losses))
        for last in range(first, len(losses))
        if losses[first : last + 1].sum() >= share * losses.sum() - 1e-9
    ]
    return min(ends)[1:]


def suggestions(rows: list[dict]) -> list[str]:
    """A sentence for each model and kind of items: the window, and what the paper's holds.

    Of layers whose interval has 0 in it nothing is counted.
    """
    said = []
    for name, items in dict.fromkeys((row["model"], row["items"]) for row in rows):
        own = [row for row in rows if (row["model"], row["items"]) == (name, items)]
        losses, depth = [row["loss"] * (row["low"] > 0) for row in own], own[0]["layers"]
        papers = distill.understanding_layers(depth)
        begin = f"{name}, {items} ({own[0]['accuracy']:.1f} %): "
        try:
            first, last = window(losses)
        except BadInput as error:
            said.append(f"{begin}{error}")
            continue
        whole = np.maximum(losses, 0)
        held = 100 * whole[papers].sum() / whole.sum()
        run = f"layer {first} of 0-{depth - 1} holds" if first == last else f"layers {first}-{last} hold"
        named = f"{papers[0]}-{papers[-1]}" if len(papers) > 1 else f"{papers[0]}" if papers else "none"
        said.append(
            f"{begin}{run} {SHARE:.0%} of what is lost; those at 30 to 70 % of the depth, {named}, "
            f"hold {held:.0f} %"
        )
    return said


def run(args: argparse.Namespace) -> None:
    """`analyse layers`, as parsed. ValueError (BadInput among them): one sentence for the user."""
    if args.which != ["layers"] or not args.model or args.students or args.image:
        raise BadInput("analyse layers is about single models and goes alone: give them with --model")
    if args.teacher != TEACHER or args.layers != PAPER.layers:
        raise BadInput("analyse layers looks at each layer of each --model: without --teacher and --layers")
    args.out = args.out or Path("out/layers")
    with output_folder(args.out) as folder:
        if args.sugarcrepe or args.gqa:
            questions = benchmark_questions(args.sugarcrepe, args.gqa, args.limit)
        else:
            questions = world_questions(make_world(args.world or args.runs / "world"), args.limit)
        rows = layer_rows({name: scorers.load(name) for name in args.model}, questions, args.batch_size)
        write_rows(folder, "layers", rows)
        if not figures.draw(folder / "layers.png", *figures.FIGURES["layers"], rows):
            print(figures.NO_PLOTS, file=sys.stderr)
    print("\n".join([*suggestions(rows), one_line(args.out)]))
