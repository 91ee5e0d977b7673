"""Items a second: eval.py's way of answering beside one item at a time, on the same checkpoint and items.

    python bench/scoring.py                  # the tiny teacher on the tiny world
    python bench/scoring.py --shape cpu      # random weights in the shape of bench/step.py, SigLIP 384

    generate 32   picture, prompt and up to 32 greedy tokens, one item after another (the released code)
    generate      the same replies in batches, picture and shared prompt once            --scorer generate
    choice        one forward pass, no reply: the likeliest option                       --scorer choice
    plain choice  one forward pass of the whole prompt of each item, without sharing

Items: captions in both orders (SugarCrepe's question, `choice`), and yes/no questions to the same captions.
The ways take turns; a figure is the median of the rounds. With the tokenizer of Qwen1.5 where the environment
variable SHARED names its folder, else the tiny teacher's.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model  # noqa: E402
from bench import step as step_bench  # noqa: E402
from evals import answers, benchmarks, scorers  # noqa: E402
from evals.readers import YES_NO  # noqa: E402
from support.world import make_world  # noqa: E402


def random_model(
    shape: step_bench.Shape, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> model.VLM:
    _, vlm = step_bench.build(shape, device, dtype)
    folder = ROOT / "tiny" / "teacher"
    if "SHARED" in os.environ and shape.student.vocab_size > 151_000:
        folder = Path(os.environ["SHARED"]) / "data" / "qwen1.5-tokenizer"
    vlm.tokenizer = data.load_tokenizer(folder)
    return vlm.eval()


def questions(world: Path, kind: str, number: int) -> list[answers.Line]:
    pairs = benchmarks.read_pairs("sugarcrepe", world / "test", world / "images")
    pairs = answers.spread_out(pairs, number // 2)
    if kind == "captions":
        units = [item for pair in pairs for item in benchmarks.choices(pair)]
        return list(answers.questions_of(units, "choice").values())
    return [
        answers.Line({"prompt": f"True? {caption}"}, pair.image, YES_NO)
        for pair in pairs
        for caption in pair.captions
    ]


def one_at_a_time(vlm: model.VLM, questions: list[answers.Line], most: int = 32) -> list[str]:
    return [vlm.answer(question.picture, question.line["prompt"], most) for question in questions]


@torch.no_grad()
def plain_choice(vlm: model.VLM, questions: list[answers.Line]) -> list[str]:
    replies = []
    for question in questions:
        options = scorers.option_tokens(vlm, question.options)
        sample = scorers.prompt(vlm, question.picture, question.line["prompt"])
        ids = torch.tensor([[*sample["input_ids"], *options.lead]], device=vlm.device)
        hidden = vlm(ids, sample["pixel_values"][None].to(vlm.device), logits=False).hidden
        logits = vlm.lm.head(hidden[0, -1])
        replies.append(max(zip(options.tokens, options.names), key=lambda some: logits[some[0]].max())[1])
    return replies


def batched(vlm, questions, scorer: str, size: int) -> list[str]:
    chunks = scorers.by_picture([question.picture for question in questions], size)
    texts = {id(q): part["text"] for q, part in answers.answer(vlm, questions, scorer, 32, chunks, 0)}
    return [texts[id(question)] for question in questions]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(step_bench.SHAPES), help="random weights of this shape")
    parser.add_argument("--items", type=int, help="(default: 280, with a shape 8)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    args = parser.parse_args()
    vlm = random_model(step_bench.SHAPES[args.shape]) if args.shape else model.load(ROOT / "tiny" / "teacher")
    number = args.items or (8 if args.shape else 280)
    ways = {
        "generate 32": one_at_a_time,
        "plain choice": plain_choice,
        "generate": lambda vlm, some: batched(vlm, some, "generate", args.batch_size),
        "choice": lambda vlm, some: batched(vlm, some, "choice", args.batch_size),
    }
    print(f"{args.shape or 'tiny/teacher'}, {torch.get_num_threads()} threads, batches of {args.batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world", tune=1, pretrain=1, per_kind=max(10, number))
        for kind in ("captions", "yes/no"):
            asked, times, replies = questions(world, kind, number), {name: [] for name in ways}, {}
            for _ in range(args.rounds):
                for name, way in ways.items():
                    started = time.perf_counter()
                    replies[name] = way(vlm, asked)
                    times[name].append(time.perf_counter() - started)
            pictures = len({question.picture for question in asked})
            print(f"\n{kind}: {len(asked)} items, {pictures} pictures")
            slow = statistics.median(times["generate 32"])
            for name, some in times.items():
                seconds = statistics.median(some)
                print(f"  {name:<13} {len(asked) / seconds:8.2f} items/s  x {slow / seconds:.1f}")
            options = [set(question.options) for question in asked]
            are = [reply in some for reply, some in zip(replies["generate 32"], options)]
            agree = [a == b for a, b, option in zip(replies["generate 32"], replies["choice"], are) if option]
            print(f"  {sum(are)} of {len(are)} replies are an option; choice agrees in {sum(agree)} of them")
            for one, other in (("generate 32", "generate"), ("plain choice", "choice")):
                same = sum(a == b for a, b in zip(replies[one], replies[other]))
                print(f"  {one} = {other}: {same} of {len(asked)}")


if __name__ == "__main__":
    main()
