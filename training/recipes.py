"""Recipes: what each stage is trained with, and the command line that overrides it.

    method   which losses: SFT, vanilla KD, CompoDistill, the released code's form
    recipe   with which numbers: `tiny` (a laptop, minutes) or `paper` (its table; LoRA, bf16)

A flag on the command line comes first, then the method's or recipe's value. The README has both tables.
"""

import argparse
import copy
import math
from pathlib import Path

from checkpoint import BadInput

TINY = Path(__file__).parent.parent / "tiny"  # the models that ship with the repository

METHODS = {
    "sft": dict(taf=False, kl_weight=0.0, vat_loss="none"),
    "kd": dict(taf=False, kl_weight=1.0, vat_loss="none"),
    "compodistill": dict(taf=True, kl_weight=1.0, vat_loss="cosine"),
    "released": dict(  # as the released code has it
        taf=True, kl_weight=1.0, kl_shifted=False, vat_loss="released", layers="released"
    ),
}
DEFAULTS = {"layers": "intermediate", "kl_shifted": True}  # where a method does not say

RECIPES = {  # recipe -> stage -> flags; "all" stages first
    "tiny": {
        "all": dict(batch_size=32, max_length=2048, tune="full", precision="fp32", workers=0),
        "0a": dict(steps=300, lr=2e-3),
        "0b": dict(steps=4000, lr=2e-3),
        "1": dict(steps=100, lr=2e-3),
        "2": dict(steps=1500, lr=2e-3),
        "3": dict(steps=100, lr=5e-4),
    },
    "paper": {
        "all": dict(
            batch_size=4, epochs=1, tune="lora", precision="bf16", workers=4, gradient_checkpointing=True
        ),
        "0a": dict(lr=1e-3, global_batch=256, max_length=2048),
        "0b": dict(lr=2e-4, global_batch=128, max_length=2048, lora_dropout=0.05),
        "1": dict(lr=2e-4, global_batch=256, max_length=1536),
        "2": dict(lr=2e-4, global_batch=128, max_length=1536),
        "3": dict(lr=2e-4, global_batch=192, max_length=1536, lora_dropout=0.05),
    },
}
FULL_LR = 2e-5  # of the paper's recipe where the whole language model is tuned (as LLaVA-KD does)


def for_stage(stage: str, args: argparse.Namespace, ranks: int) -> argparse.Namespace:
    """A copy of args in which the stage's recipe has filled what the command line left open.

    The global batch is ranks x batch_size x accumulation: of it and accumulation one may be open.
    """
    args, recipe = copy.copy(args), RECIPES[args.recipe]
    if args.epochs or args.steps:  # one of them given: the recipe's other one does not count
        recipe = {**recipe, "all": {**recipe["all"], "epochs": None}, stage: {**recipe[stage], "steps": None}}
    given_lr, shared = args.lr is not None, args.batch_size is None
    for flag, value in {**recipe["all"], **recipe[stage]}.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.recipe == "paper" and not given_lr and args.tune == "full" and stage in ("0b", "2", "3"):
        args.lr = FULL_LR
    args.lora_dropout = args.lora_dropout or 0.0
    if shared and args.global_batch is None:  # the tiny recipe's batch is that of all ranks together
        args.batch_size = max(1, args.batch_size // ranks)
    per_pass = ranks * args.batch_size
    if args.accumulation is None:
        args.accumulation = max(1, (args.global_batch or per_pass) // per_pass)
    product = per_pass * args.accumulation
    if args.global_batch not in (None, product):
        raise BadInput(
            f"stage {stage}: {ranks} ranks x --batch-size {args.batch_size} x --accumulation "
            f"{args.accumulation} = {product}, not the global batch of {args.global_batch}; "
            f"if {product} is meant, give --global-batch {product}"
        )
    args.global_batch = product
    return args


# What may change between a run and its resumption: where things lie, how the work is cut, how often it is
# shown. All other flags are a run's identity; models and data are known by what is in them (train.identity).
NO_IDENTITY = {
    *("stage", "out", "name", "make_tiny", "quiet", "log_every", "save_every", "keep", "stop_after"),
    *("student", "teacher", "vision", "data", "images", "recipe", "epochs", "batch_size", "accumulation"),
    *("workers", "parallel", "gradient_checkpointing", "compile", "skip_bad_samples", "max_bad_share"),
}


def has_teacher(stage: str, args: argparse.Namespace) -> bool:
    """Whether the stage loads one: to distil from, to fetch its adapter, or to see with its eyes."""
    return stage in ("1", "2") and (args.taf or args.kl_weight > 0 or args.vat_loss != "none")


def number(kind: type, least: float):
    """An argparse type: a finite number of this kind that is at least `least`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number") from None
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range, at least {least} is asked for")
        return value

    return convert


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    # fmt: off
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--stage STAGE] [flags], which --help lists",
    )
    whole, positive, fraction = number(int, 1), number(float, 1e-12), number(float, 0)
    switch = {"action": "store_true"}

    add = parser.add_argument_group("run").add_argument
    add("--stage", choices=["0", "0a", "0b", "1", "2", "3"], help="one stage; without it: the tiny world")
    add("--recipe", choices=list(RECIPES), default="tiny", help="the defaults (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder of all outputs (default: %(default)s)")
    add("--name", help="folder of this student under --out (default: the method, in stage 0 'teacher')")
    add("--seed", type=int, default=0, help="of data order, new weights, dropout (default: %(default)s)")
    add("--make-tiny", **switch, help="make the shipped tiny models again, into --out")
    add("--log-every", type=whole, default=10, help="steps between log lines (default: %(default)s)")
    add("--save-every", type=whole, default=500, help="steps between saves (default: %(default)s)")
    add("--keep", type=whole, default=2, help="how many of them to keep (default: %(default)s)")
    add("--stop-after", type=whole, help="stop at this step as SIGTERM would: save, to go on later")

    add = parser.add_argument_group("models: folders or hub names").add_argument
    add("--teacher", help="multimodal checkpoint (default: tiny/teacher)")
    add("--student", help="what the stage starts from (default: the previous stage's output; in stage 1 "
        "the plain language model tiny/student, in stage 0 tiny/teacher-lm)")
    add("--vision", help="SigLIP of a model trained without a teacher: stage 0 and --method sft "
        "(default: tiny/vision)")

    add = parser.add_argument_group(
        "method: one flag per row of the paper's ablation tables (default: the method's own)"
    ).add_argument
    add("--method", choices=list(METHODS), default="compodistill", help="(default: %(default)s)")
    add("--taf", action=argparse.BooleanOptionalAction, help="fetch the teacher's adapter")
    add("--kl-weight", type=fraction, help="weight of L_KL")
    add("--vat-loss", choices=["none", "cosine", "mse", "kl", "released"], help="attention loss")
    add("--vat-weight", type=fraction, default=1.0, help="weight of L_ADL (default: %(default)s)")
    add("--vat-queries", choices=["all", "image", "text"], default="all", help="(default: %(default)s)")
    add("--vat-rows", **switch, help="cosine of each query row instead of the whole matrix")
    add("--layers", choices=["intermediate", "early", "later", "all", "released"], help="aligned layers")
    add("--matching", choices=["group", "simple", "adaptive"], default="group", help="(default: %(default)s)")

    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, nargs="+",
        help="LLaVA JSON or JSONL, one or several (default: the tiny world's, made under --out)")
    add("--images", type=Path, help="folder that picture paths start from")
    add("--max-length", type=whole, help="tokens; longer samples are cut at the end (default: the recipe's)")
    add("--group-by-length", **switch, help="samples of like length into the same batch: less padding")
    add("--skip-bad-samples", **switch, help="count, log and replace samples that cannot be read")
    add("--max-bad-share", type=fraction, default=0.01,
        help="of samples so far, or of 1000, above which it stops all the same (default: %(default)s)")
    add("--workers", type=number(int, 0), help="processes that prepare batches (default: the recipe's)")

    add = parser.add_argument_group("optimisation (default: the recipe's)").add_argument
    add("--epochs", type=whole, help="passes over the data")
    add("--steps", type=whole, help="optimizer steps instead of epochs; without --stage: of stage 2, the "
        "other stages in proportion")
    add("--lr", type=positive, help="peak learning rate, after 3 %% warm-up, then cosine to 0 (recipe "
        "paper with --tune full: 2e-5)")
    add("--batch-size", type=whole, help="samples per device and micro-batch")
    add("--accumulation", type=whole, help="micro-batches per step (default: what the global batch asks for)")
    add("--global-batch", type=whole, help="ranks x batch size x accumulation; checked")
    add("--tune", choices=["full", "lora"], help="the whole language model, or LoRA on its linear layers")
    add("--lora-rank", type=whole, default=128, help="(default: %(default)s)")
    add("--lora-alpha", type=positive, default=256.0, help="(default: %(default)s)")
    add("--lora-dropout", type=fraction, help="(default: 0; recipe paper: 0.05 in stages 0b and 3)")

    add = parser.add_argument_group("machine").add_argument
    add("--precision", choices=["fp32", "bf16"], help="bf16: compute and frozen weights; what is trained "
        "stays float32 (default: the recipe's)")
    add("--parallel", choices=["ddp", "fsdp"], default="ddp", help="under torchrun: whole models on every "
        "device, or their layers sharded (default: %(default)s)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="keep only the inputs of the "
        "student's layers and compute the rest again: less memory, slower")
    add("--compile", **switch, help="torch.compile the layers: a minute or two once, then less memory and "
        "perhaps less time; needs a C++ compiler")
    # fmt: on
    args = parser.parse_args(argv)
    given = {flag for flag, value in vars(args).items() if value != parser.get_default(flag)}
    needless = given - {"out", "seed", "steps", "teacher", "make_tiny"}
    if args.stage is None and needless:
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in sorted(needless))
        parser.error(f"{flags}: only with --stage; the four students have their own")
    if (args.data is None) != (args.images is None):
        parser.error("--data and --images go together")
    if args.recipe == "paper" and args.data is None:
        parser.error("--recipe paper is for data of your own: --data and --images")
    if args.data and args.stage == "0":
        parser.error("--stage 0 is for the tiny world; with --data run --stage 0a and 0b, each on its own")
    if args.steps and args.epochs:
        parser.error("--steps and --epochs exclude each other")
    if args.make_tiny and args.stage:
        parser.error("--make-tiny and --stage exclude each other")
    if args.lora_dropout and args.lora_dropout >= 1:
        parser.error("--lora-dropout is a share below 1")
    for flag, value in {**DEFAULTS, **METHODS[args.method]}.items():
        if getattr(args, flag, None) is None:
            setattr(args, flag, value)
    if args.vat_rows and args.vat_loss != "cosine":
        parser.error(f"--vat-rows is about the cosine, not about --vat-loss {args.vat_loss}")
    if args.vat_queries != "all" and args.vat_loss == "released":
        parser.error("--vat-loss released has queries of its own, the visual tokens")
    if args.recipe == "paper":  # else a tiny model would quietly take the place of a real one
        asked = {"student": args.stage in ("0a", "1"), "teacher": has_teacher(args.stage, args)}
        asked["vision"] = asked["student"] and not asked["teacher"]
        for flag, needed in asked.items():
            if needed and flag not in given:
                parser.error(f"--recipe paper --stage {args.stage} --method {args.method}: give --{flag}")
    args.teacher = args.teacher or str(TINY / "teacher")
    args.name = args.name or ("teacher" if (args.stage or "").startswith("0") else args.method)
    args.quiet = False
    return args
