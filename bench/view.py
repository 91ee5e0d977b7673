"""Which row of attention shows the question: how often its brightest patch is the object that is asked for.

    python bench/view.py --model tiny/teacher tiny/compodistill

"What colour is ...", "What shape ...", "Where is ..." and "Is there ..." (of objects that are there), 60
scenes of the tiny world's test each; beside it the object's share of the attention on the picture. Rows: the
answering position, the mean of all text rows, the row of the object's last word.
"""

import argparse
import random
import sys
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
        named = [a for a in scene if a[1] in words or (kind == "shape" and a[0] in words)]
        named = [a for a in named if kind in ("colour", "shape") or a[0] in words]
        if len(named) == 1:
            return scene, made[0], named[0]


@torch.no_grad()
def rows_of(vlm: model.VLM, scene: world.Scene, question: str, thing: world.Kind) -> dict[str, torch.Tensor]:
    """{row: (layers, H, P)}, its attention on the picture."""
    (batch,) = batches([prompt(vlm, world.draw(scene), question)], vlm.device)
    ids, columns, layers = batch["input_ids"], batch["visual_columns"], vlm.config.text.num_hidden_layers
    asked_for = dict.fromkeys(range(layers), explicit_attention)
    heads = torch.cat(
        list(vlm(ids, batch["pixel_values"], attention=asked_for, logits=False).attentions.values())
    )
    maps = torch.stack([distill.visual_map(A[:, None], columns.expand(len(A), -1)) for A in heads])
    words = [vlm.tokenizer.decode([i]).strip() if i >= 0 else "" for i in ids[0].tolist()]
    word = max(i for i, text in enumerate(words) if text in thing)
    text = maps[:, :, int(columns.max()) + 1 :]  # (layers,H,R,P)
    return {
        "answering position": text[:, :, -1],
        "text rows, mean": text.mean(2),
        "object's word": maps[:, :, word],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["tiny/teacher"], help="(default: tiny/teacher)")
    add("--scenes", type=number(int, 1), default=60, help="of each kind of question (default: %(default)s)")
    add("--single", action="store_true", help="single layers and heads, too")
    with one_sentence():
        args = parse(parser, None)
        lines = []
        for name in args.model:
            vlm, rng, found = load(name), random.Random(5), {}
            depth, H = vlm.config.text.num_hidden_layers, vlm.config.text.num_attention_heads
            which = distill.understanding_layers(depth)
            views = {"understanding layers": (which, range(H)), "all layers": (range(depth), range(H))}
            if args.single:
                views |= {f"layer {i}": ([i], range(H)) for i in range(depth)}
                views |= {f"layer {i}, head {h}": ([i], [h]) for i in range(depth) for h in range(H)}
            for kind in KINDS:
                for _ in range(args.scenes):
                    scene, question, thing = asked(kind, rng)
                    x, y = scene[thing]
                    patch = y * world.GRID + x
                    for where, maps in rows_of(vlm, scene, question, thing).items():
                        for view, (layers, heads) in views.items():
                            seen = maps[list(layers)][:, list(heads)].mean((0, 1))  # (P,)
                            hit, share = float(seen.argmax() == patch), float(seen[patch] / seen.sum())
                            found.setdefault((where, view), {}).setdefault(kind, []).append((hit, share))
            for (where, view), kinds in found.items():
                means = [np.mean(kinds[kind], 0) for kind in KINDS]
                row = [f"{100 * hit:.0f} % ({share:.2f})" for hit, share in means]
                lines.append([name, where, view, *row, f"{100 * np.mean([hit for hit, _ in means]):.0f} %"])
        print(markdown(["model", "row", "mean over", *KINDS, "all"], lines))


if __name__ == "__main__":
    main()
