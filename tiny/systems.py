"""`python -m tiny systems`: the paper's table of systems on the tiny world, trained and scored.

Teacher, SFT, LLaVA-KD, LLaVADI, LLaVA-MoD, CompoDistill: from the same text-only language model, on the same
data, with the same number of steps after stage 1. The cost of a step stands beside the scores. Students that
the main job has made in the same --out are taken as they are.
"""

import argparse
import json
from pathlib import Path

import torch

import data
import model
import rivals
from support.files import check_output, check_writable, write_atomically
from support.world import make_pairs, make_world, tiny_items
from tiny.scores import table, tiny_scores
from tiny.students import run_students, scores_in
from training import recipes

SYSTEMS = ("sft", "llava-kd", "llavadi", "llava-mod", "compodistill")


def train_systems(args: argparse.Namespace) -> None:
    """Train and score all systems, as many at a time as there are cores; then the table."""
    check_writable(args.out)
    check_output(args.out / "systems.md", b"| ")
    check_output(args.out / "systems.json", b"{")
    teacher, world = model.load(args.teacher), make_world(args.out / "world")
    print(f"tiny world: {world}")
    tiny_items(world)
    make_pairs(world), make_pairs(world, "val")
    run_students(args, {name: steps_of(name, args.steps) for name in SYSTEMS})
    rows = {"teacher": tiny_scores(teacher, world)}
    for name in SYSTEMS:
        rows[name] = scores_in(args.out / name / "scores.json")
    text = table(rows)
    for stage, when in (("3", "before"), ("4", "after")):
        share = preferred(model.load(args.out / f"llava-mod/stage{stage}"), teacher, world)
        text += f"\n\nllava-mod, {when} preferences: {100 * share:.0f} % of pairs have r_w > r_l"
    write_atomically(args.out / "systems.md", text + "\n")
    write_atomically(args.out / "systems.json", json.dumps(rows, indent=1))
    print(f"\n{text}\n\n{args.out}/systems.md, systems.json")


def steps_of(name: str, second: int | None) -> dict[str, int]:
    """{stage: steps} of a method: its recipe's, or in proportion to `second` of CompoDistill's stage 2."""
    args = recipes.parse_args("", ["--method", name, "--student", "any"])
    steps = {stage: recipes.configure(stage, args, ranks=1).steps for stage in args.method.weights}
    whole = recipes.RECIPES["tiny"]["2"]["steps"]
    return {stage: max(1, round(number * (second or whole) / whole)) for stage, number in steps.items()}


@torch.no_grad()
def preferred(student: model.VLM, teacher: model.VLM, world: Path) -> float:
    """The share of held-out pairs with r_w > r_l, log p_s - log p_t of the chosen and of the other answer."""
    dataset = data.LlavaDataset(
        make_pairs(world, "val"),
        world / "images",
        student.tokenizer,
        student.num_image_tokens,
        student.config.vision.image_size,
        pairs=True,
    )
    batch, log_p = dataset.batch(list(range(len(dataset)))), []
    for vlm in (student, teacher):
        pixels = batch["pixel_values"].repeat(2, 1, 1, 1)
        hidden = vlm(batch["input_ids"], pixels, logits=False).hidden
        log_p.append(rivals.log_p_of_states(hidden, vlm.lm.head_weight, batch["labels"]))
    chosen, rejected = (log_p[0] - log_p[1]).chunk(2)
    return (chosen > rejected).float().mean().item()
