"""Which row of attention shows the question: how often its brightest patch is the object that is asked for.

    python bench/view.py --model tiny/teacher tiny/compodistill

"What colour is ...", "What shape ...", "Where is ..." and "Is there ..." (of objects that are there), 60
scenes of the tiny world's test each; beside it the object's share of the attention on the picture. Rows: the
answering position, the mean of all text rows, the row of the object's last word.
"""

import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402
import model  # noqa: E402
from evals.benchmarks import markdown  # noqa: E402
from evals.scorers import batches, load, prompt  # noqa: E402
from qwen import explicit_attention  # noqa: E402
from support import world  # noqa: E402
from support.program import number, one_sentence, parse  # noqa: E402

KINDS = ("colour", "shape", "where", "exists")


def asked(kind: str, rng: random.Random) -> tuple[world.Scene, str, world.Kind]:
    """A scene of the test, a question about one of its objects, and which."""
    while True:
        scene = world.random_scene(rng, "test")
        made = world.recognition_question(kind, scene, rng)
        if made is None or made == (made[0], "no"):
            continue
        words = made[0].rstrip("?").split()
        for colour, shape in scene:  # the question names both, but for the one that it asks for
            if (kind == "colour" or colour in words) and (kind == "shape" or shape in words):
                return scene, made[0], (colour, shape)


@torch.no_grad()
def rows_of(vlm: model.VLM, scene: world.Scene, question: str, thing: world.Kind) -> dict[str, torch.Tensor]:
    """{row: (layers, H, P)}, its attention on the picture."""
    (batch,) = batches([prompt(vlm, world.draw(scene), question)], vlm.device)
    ids, columns, layers = batch["input_ids"], batch["visual_columns"], vlm.config.text.num_hidden_layers
    asked_for = dict.fromkeys(range(layers), explicit_attention)
    out = vlm(ids, batch["pixel_values"], attention=asked_for, logits=False)
    heads = torch.cat(list(out.attentions.values()))  # (layers,H,T,S)
    maps = torch.stack([distill.visual_map(A[:, None], columns.expand(len(A), -1)) for A in heads])
    words = [vlm.tokenizer.decode([i]).strip() if i >= 0 else "" for i in ids[0].tolist()]
    word = max(i for i, text in enumerate(words) if text in thing)
    text = maps[:, :, int(columns.max()) + 1 :]  # (layers,H,R,P)
    return {
        "answering position": text[:, :, -1],
        "text rows, mean": text.mean(2),
        "object's word": maps[:, :, word],
    }


def views_of(vlm: model.VLM, single: bool) -> dict[str, tuple[slice | list[int], slice]]:
    """{name: (layers, heads)}, over which a mean is taken."""
    depth, H, every = vlm.config.text.num_hidden_layers, vlm.config.text.num_attention_heads, slice(None)
    views = {
        "understanding layers": (distill.understanding_layers(depth), every),
        "all layers": (every, every),
    }
    if single:
        views |= {f"layer {i}": ([i], every) for i in range(depth)}
        views |= {f"layer {i}, head {h}": ([i], slice(h, h + 1)) for i in range(depth) for h in range(H)}
    return views


def hits(vlm: model.VLM, kind: str, scenes: int, views: dict, rng: random.Random) -> dict[tuple, np.ndarray]:
    """{(row, view): (how often the brightest patch is the object, the object's mean share)}."""
    found = defaultdict(list)
    for _ in range(scenes):
        scene, question, thing = asked(kind, rng)
        x, y = scene[thing]
        patch = y * world.GRID + x
        for row, maps in rows_of(vlm, scene, question, thing).items():
            for view, (layers, heads) in views.items():
                seen = maps[layers][:, heads].mean((0, 1))  # (P,)
                found[row, view].append((float(seen.argmax() == patch), float(seen[patch] / seen.sum())))
    return {where: np.mean(pairs, 0) for where, pairs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["tiny/teacher"], help="(default: tiny/teacher)")
    add("--scenes", type=number(int, 1), default=60, help="of each kind of question (default: %(default)s)")
    add("--single", action="store_true", help="single layers and heads, too")
    with one_sentence():
        args = parse(parser)
        lines = []
        for name in args.model:
            vlm, rng = load(name), random.Random(5)  # the same scenes for every model
            views = views_of(vlm, args.single)
            kinds = [hits(vlm, kind, args.scenes, views, rng) for kind in KINDS]
            for where in kinds[0]:
                cells = [f"{100 * hit:.0f} % ({share:.2f})" for hit, share in (kind[where] for kind in kinds)]
                lines.append(
                    [name, *where, *cells, f"{100 * np.mean([kind[where][0] for kind in kinds]):.0f} %"]
                )
        print(markdown(["model", "row", "mean over", *KINDS, "all"], lines))


if __name__ == "__main__":
    main()
