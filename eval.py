"""Evaluation: the eleven benchmarks and the tiny world's for any checkpoint, and where a model looks.

    python eval.py bench sugarcrepe --model DIR --annotations DIR --images DIR    # answers.py, also torchrun
    python eval.py tiny --model out/KD/stage3    # scores, and similarity to the teacher
    python eval.py attention --model tiny/teacher --image FILE --question "What colour is the circle?"
    python eval.py analyse | story | chat        # analyses.py, story.py, chat.py

How a reply or a caption is scored stands in scorers.py, what is right in benchmarks.py and metrics.py.
"""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import distill
import model
from checkpoint import sentence
from evals import analyses, answers, chat, story
from evals.benchmarks import markdown
from evals.pictures import attention_picture
from evals.scorers import SCORERS, batches, exact_answers, load, prompt
from qwen import Look
from tiny.world import COMPOSITION, RECOGNITION, caption_question, make_world, tiny_items
from training import recipes
from training.recipes import TINY


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


def table(rows: dict[str, dict[str, float]]) -> str:
    """{method: scores} -> a Markdown table: the two averages, every composition kind, similarity to the
    teacher.
    """
    columns = ["recognition", "compositional", *COMPOSITION, "similarity"]
    lines = []
    for name, scores in rows.items():
        cells = [f"{scores[column]:.1f}" for column in columns[:-1]]
        cells.append(f"{scores['similarity']:.2f}" if "similarity" in scores else "")
        lines.append([name, *cells])
    return markdown(["", *columns], lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("tiny", help="scores on the tiny world, similarity to the teacher").add_argument
    add("--model", required=True, help="checkpoint folder or hub name")
    add("--teacher", default=str(TINY / "teacher"), help="to compare attention with (default: %(default)s)")
    add("--world", type=Path, default=Path("out/world"), help="made if missing (default: %(default)s)")
    add("--scorer", choices=list(SCORERS), default="yes", help="of caption pairs (default: %(default)s)")
    add("--limit", type=recipes.number(int, 1), metavar="N", help="items per kind (default: all)")
    add = commands.add_parser("attention", help="a picture of where models look").add_argument
    add("--model", nargs="+", required=True, help="one or several checkpoint folders or hub names")
    add("--image", type=Path, required=True)
    add("--question", required=True)
    add("--save", type=Path, default=Path("attention.png"), help="PNG to write (default: %(default)s)")
    answers.add_arguments(commands)
    analyses.add_arguments(commands)
    chat.add_arguments(commands)
    args = parser.parse_args(argv)
    if args.command == "bench" and not args.score_only and not (args.model and args.images):
        parser.error("bench asks a model about pictures: give --model and --images, or --score-only")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.command == "tiny":
            vlm, teacher = load(args.model), load(args.teacher)
            world = make_world(args.world)
            scores = tiny_scores(vlm, world, args.scorer, args.limit)
            try:
                scores["similarity"] = attention_similarity(vlm, teacher, world, args.limit or 100)
            except ValueError as error:  # of another size or depth than this teacher: it has scores
                print(f"no similarity to {args.teacher}: {error}")
            print(table({str(args.model): scores}))
        elif args.command == "bench":
            if "RANK" in os.environ:  # started by torchrun
                dist.init_process_group("gloo", timeout=timedelta(days=7))  # ranks wait at barriers
            answers.bench(args)
        elif args.command == "chat":
            chat.run(args)
        elif args.command == "analyse":
            analyses.run(args)
        elif args.command == "story":
            story.story(args)
        else:
            models = {name: load(name) for name in args.model}
            attention_picture(models, [(args.image, args.question)], args.save)
            print(args.save)
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError) as error:  # BadInput among them
        sys.exit(f"error: {sentence(error)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
