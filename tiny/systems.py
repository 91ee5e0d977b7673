"""`python -m tiny systems`: the paper's table of systems on the tiny world, trained and scored.

Teacher, SFT, LLaVA-KD, LLaVADI, LLaVA-MoD, CompoDistill: from the same text-only language model, on the same
data, with the same number of steps after stage 1. The cost of a step stands beside the scores. Students that
the main job has made in the same --out are taken as they are.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

import data
import model
import rivals
from support.errors import BadInput, one_line
from support.files import check_output, check_writable, read_text, write_atomically
from support.world import make_pairs
from tiny.scores import table, tiny_scores
from tiny.students import (
    check_students,
    configs_of,
    load_teacher,
    make_test_world,
    refuse_ranks,
    run_students,
    scores_in,
    steps_of,
)
from training.log import step_of

# {method: flags}. With its paper's weight of KL_img, 1, LLaVA-KD learns less here (RESULTS.md).
SYSTEMS = {
    "sft": [],
    "llava-kd": ["--weights", "image_kl=0.03"],
    "llavadi": [],
    "llava-mod": [],
    "compodistill": [],
}


def train_systems(args: argparse.Namespace) -> None:
    """Train and score all systems, as many at a time as there are cores; then the table."""
    refuse_ranks()
    steps = {name: steps_of(f"--method {name}", args.steps) for name in SYSTEMS}
    check_students(args, steps)
    results = args.out / "systems.json"
    if results.exists():
        rows = {name: scores_in(results, name) for name in ("teacher", *SYSTEMS)}
        print(f"finished already, {one_line(args.out)}; systems.md has the pairs, too\n\n{table(rows)}")
        return
    check_writable(args.out)
    check_output(args.out / "systems.md", b"| ")
    check_output(results, b"{")
    teacher, world = load_teacher(args.teacher), make_test_world(args.out)
    for name in ("tune", "val"):
        make_pairs(world, name)
    run_students(args, steps, SYSTEMS)
    rows = {"teacher": tiny_scores(teacher, world)}
    for name in SYSTEMS:
        scores, cost = scores_in(args.out / name / "scores.json"), step_ms(args.out, name, steps[name])
        rows[name] = scores | {"step_ms": cost}
    text = table(rows) + "\n"
    for stage, when in (("3", "before"), ("4", "after")):
        shares = preferred(model.load(args.out / f"llava-mod/stage{stage}"), teacher, world)
        text += f"\nllava-mod, {when} preferences: p(chosen) > p(rejected) in {shares[0]:.0f} % of held-out "
        text += f"pairs; more so than in the teacher (r_w > r_l) in {shares[1]:.0f} %"
    write_atomically(args.out / "systems.md", text + "\n")
    write_atomically(results, json.dumps(rows, indent=1))
    print(f"\n{text}\n\n{one_line(args.out)}/systems.md, systems.json")


def step_ms(out: Path, name: str, steps: dict[str, int]) -> float:
    """Milliseconds of a step after stage 1, beside the other students: of each stage the median logged."""
    configs, total = configs_of(f"--method {name}"), 0.0
    for stage in list(steps)[1:]:
        log = out / name / f"stage{stage}.jsonl"
        lines = read_text(log).splitlines() if log.exists() else []
        rates = [json.loads(line).get("samples_per_s") for line in lines if step_of(line)]
        if not (rates := [rate for rate in rates if isinstance(rate, float) and rate > 0]):
            raise BadInput(f"{log} says nothing of how fast its steps were; choose another --out")
        total += steps[stage] * 1000 * configs[stage].global_batch / statistics.median(rates)
    return total / sum(list(steps.values())[1:])


@torch.no_grad()
def preferred(student: model.VLM, teacher: model.VLM, world: Path) -> list[float]:
    """% of held-out pairs with p_s(chosen) > p_s(rejected), and with r_w > r_l, as the loss asks for.

    r is log p_s - log p_t: where the teacher is surer of the right answer, a student has few of those.
    """
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
    pairs = [x.chunk(2) for x in (log_p[0], log_p[0] - log_p[1])]
    return [100 * (chosen > rejected).float().mean().item() for chosen, rejected in pairs]
