"""What a stage is trained with: recipes, the command line that overrides them, and the Config of both.

    method   which losses: distill.METHODS, rivals.RIVALS
    recipe   with which numbers: `tiny` (a laptop, minutes) or `paper` (its table; bf16, low-rank adaptation)

A flag on the command line comes first, then the method's or the recipe's value. The README has both tables.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from controls import CONTROLS
from distill import DEPTH_RANGES, DISTANCES, LM, MATCHINGS, METHODS, ROWS, Method, numbered_layers
from rivals import RIVALS
from support.checkpoint import find, fingerprint
from support.errors import BadInput
from support.program import number, parse
from support.records import Records
from support.world import TINY

RECIPES = {  # recipe -> stage -> flags; "all" stages first
    "tiny": {
        "all": dict(batch_size=32, max_length=2048, tune="full", precision="fp32", workers=0),
        "0a": dict(steps=300, lr=2e-3),
        "0b": dict(steps=28000, lr=5e-4, batch_size=8),
        "1": dict(steps=200, lr=2e-3, batch_size=8),
        "2": dict(steps=4000, lr=2e-3, batch_size=8),
        "3": dict(steps=100, lr=5e-4, batch_size=16),
        "4": dict(steps=73, lr=2e-4, batch_size=8),
    },
    "paper": {
        "all": dict(
            batch_size=4, epochs=1, tune="lora", precision="bf16", gradient_checkpointing=True, workers=4
        ),
        "0a": dict(lr=1e-3, global_batch=256, max_length=2048),
        "0b": dict(lr=2e-4, global_batch=128, max_length=2048, lora_dropout=0.05),
        "1": dict(lr=2e-4, global_batch=256, max_length=1536),
        "2": dict(lr=2e-4, global_batch=128, max_length=1536),
        "3": dict(lr=2e-4, global_batch=192, max_length=1536, lora_dropout=0.05),
        "4": dict(lr=2e-5, global_batch=64, max_length=1536),
    },
}
# Of the other systems: together as many steps after stage 1 as ours. LLaVA-MoD's in the shares of its paper's
# samples; LLaVA-KD's, whose paper has halves, and its rate are the best that were tried (RESULTS.md).
OF_RIVALS = {
    "tiny": {
        "llava-kd": {"3": dict(steps=1025, lr=1e-3, batch_size=8), "2": dict(steps=3075, lr=1e-3)},
        "llavadi": {"2": dict(steps=4100)},
        "llava-mod": {"2": dict(steps=2560), "3": dict(steps=1467, lr=2e-3, batch_size=8)},
    },
    "paper": {name: {"3": dict(global_batch=128, lora_dropout=0.0)} for name in ("llava-kd", "llava-mod")},
}
ADAPTER_LR = 1e-3  # of the paper's recipe where a whole adapter is trained alone, and not only P_s
# of the paper's recipe where the whole language model is tuned (as LLaVA-KD does); LLaVA-MoD's last stage
FULL_LR = {"0b": 2e-5, "2": 2e-5, "3": 2e-5, "4": 2e-6}


@dataclass(frozen=True)
class Config:
    """All that one stage of training depends on. `configure` makes it, once; nothing changes it."""

    stage: str  # 0a, 0b, 1, 2, 3 or 4
    method: Method
    plain: bool  # losses from whole matrices (distill.py) instead of from parts of them (lean.py)
    # where things are: folders or hub names
    student: str  # what the stage starts from
    teacher: str | None  # None: nothing is distilled
    vision: str | None  # the SigLIP of a model that is put together without a teacher
    data: list[Path] | None  # LLaVA files; None: the tiny world's
    images: list[Path] | None  # their folders: one for all files, or one for each
    out: Path
    name: str
    # optimisation
    seed: int
    steps: int | None  # optimizer steps; None: as many as the epochs take
    epochs: int | None
    lr: float
    batch_size: int  # samples per device and micro-batch
    accumulation: int  # micro-batches per step
    global_batch: int  # ranks x batch_size x accumulation
    tokenizers: str  # of student and teacher: same or aligned
    tune: str  # full or lora
    freeze_layers: str | None  # of the student's language model, by number
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    # samples
    max_length: int  # tokens
    group_by_length: bool
    skip_bad_samples: bool
    max_bad_share: float
    workers: int
    # held-out records
    val_data: Path | None
    val_images: Path | None
    val_every: int  # steps
    # machine
    precision: str  # fp32 or bf16
    parallel: str  # ddp or fsdp
    gradient_checkpointing: bool
    compile: bool
    # what is said and saved
    log_every: int
    save_every: int
    keep: int
    stop_after: int | None  # a step
    quiet: bool

    @property
    def weights(self) -> Mapping[str, float]:
        """The terms of this stage's loss. A teacher (stage 0) learns from the answers alone."""
        return self.method.weights.get(self.stage, LM)

    @property
    def folder(self) -> Path:
        """The finished model, out/name/stageN."""
        return self.out / self.name / f"stage{self.stage}"

    @property
    def run(self) -> Path:
        """What an unfinished run needs to go on, out/name/stageN.run."""
        return self.folder.with_suffix(".run")


def configure(stage: str, args: argparse.Namespace, ranks: int) -> Config:
    """Flags, then the stage's recipe for what they leave open.

    The global batch is ranks x batch_size x accumulation: of it and accumulation one may be open.
    """
    flags, recipe = vars(args), RECIPES[args.recipe]
    of_rival = OF_RIVALS.get(args.recipe, {}).get(args.method_name, {})
    recipe = recipe["all"] | recipe[stage] | of_rival.get(stage, {})
    if args.epochs or args.steps:  # one of them given: the recipe's other one does not count
        recipe |= {"epochs": None, "steps": None}
    if args.recipe == "paper" and args.tune == "full" and stage in FULL_LR:
        recipe["lr"] = FULL_LR[stage]
    if args.recipe == "paper" and stage == "1" and not args.method.taf:
        recipe["lr"] = ADAPTER_LR
    values = {name: recipe.get(name) if value is None else value for name, value in flags.items()}
    # the tiny recipe's batch is that of all ranks, as far as they divide it
    if args.batch_size is None and values["global_batch"] is None:
        values["batch_size"] = max(1, values["batch_size"] // ranks)
    per_pass = ranks * values["batch_size"]
    if values["accumulation"] is None:
        values["accumulation"] = max(1, (values["global_batch"] or per_pass) // per_pass)
    product = per_pass * values["accumulation"]
    if values["global_batch"] not in (None, product):
        raise BadInput(
            f"stage {stage}: {ranks} ranks x --batch-size {values['batch_size']} x --accumulation "
            f"{values['accumulation']} = {product}, not the global batch of {values['global_batch']}; "
            f"if {product} is meant, give --global-batch {product}"
        )
    if args.method.control == "other" and "adl" in args.method.weights.get(stage, LM):
        if values["batch_size"] < 2:
            raise BadInput(
                f"--vat-control other takes another sample of the micro-batch, which is one of "
                f"{values['batch_size']}; give --batch-size 2 or more"
            )
    taught = has_teacher(stage, args.method)
    if args.vision and (taught or stage not in ("0a", "1")):
        raise BadInput("--vision is only for stages 0a and 1 without a teacher")
    values |= {
        "stage": stage,
        "student": args.student or previous_output(stage, args),
        "teacher": (args.teacher or str(TINY / "teacher")) if taught else None,
        "vision": (args.vision or str(TINY / "vision")) if stage in ("0a", "1") and not taught else None,
        "global_batch": product,
        "lora_dropout": values["lora_dropout"] or 0.0,
        "freeze_layers": args.freeze_layers if taught else None,
        "tokenizers": args.tokenizers if taught else "same",
        "gradient_checkpointing": bool(values["gradient_checkpointing"]),
    }
    return Config(**{field.name: values[field.name] for field in fields(Config)})


def before(stage: str, method: Method) -> str | None:
    """The stage that a stage starts from; None: from a plain language model."""
    order = ["0a", "0b"] if stage in ("0a", "0b") else list(method.weights)
    return order[order.index(stage) - 1] if stage in order[1:] else None


def distils(stage: str, method: Method) -> bool:
    """Whether the stage has a loss that a teacher takes part in."""
    return bool(method.weights.get(stage, LM).keys() - LM.keys())


def has_teacher(stage: str, method: Method) -> bool:
    """Whether the stage distils from one or, being the first, takes its eyes or its adapter."""
    any_stage = any(distils(which, method) for which in method.weights)
    return distils(stage, method) or (stage == "1" and (method.taf or any_stage))


def needed_models(stage: str, method: Method) -> list[str]:
    """The flags that name the models of a stage, but for what the stage before has made."""
    taught, first = has_teacher(stage, method), before(stage, method) is None
    return ["student"] * first + ["teacher"] * taught + ["vision"] * (first and not taught)


def previous_output(stage: str, args: argparse.Namespace) -> str:
    """The folder that a stage starts from when --student does not say."""
    earlier = before(stage, args.method)
    if earlier is None:
        return str(TINY / ("teacher-lm" if stage == "0a" else "student"))
    folder = args.out / args.name / f"stage{earlier}"
    if folder.is_dir():
        return str(folder)
    others = " or ".join(f"--student {other}" for other in sorted(args.out.glob(f"*/stage{earlier}")))
    others = f", or start from another: {others}" if others else ""
    raise BadInput(f"{folder} is missing; make it with `{command_of(earlier, args)}`{others}")


def command_of(stage: str, args: argparse.Namespace) -> str:
    """The command line of this program for another stage: the same flags, but for its models and data."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
    program = ["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]
    words, flag, terms = [*program, "train.py", "--stage", stage], "", args.method.weights.get(stage, LM)
    others = {"--stage", "--data", "--images", "--student", "--weights"}
    others |= {"--val-data", "--val-images", "--val-every", *(["--kl-weight"] if "kl" not in terms else [])}
    for word in args.argv:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        if flag not in others:
            words.append(word)
    if weights := [word for word in args.weights or () if word.partition("=")[0] in terms]:
        words += ["--weights", *weights]
    if args.data:
        file = {"0a": "CAPTIONS.json", "1": "CAPTIONS.json", "4": "PAIRS.json"}.get(stage, "TUNE.json")
        words += ["--data", file, "--images", "FOLDER"]
    if args.recipe == "paper":
        missing = [name for name in needed_models(stage, args.method) if f"--{name}" not in words]
        words += [word for name in missing for word in (f"--{name}", name.upper())]
    return shlex.join(words)


# What may change between a run and its resumption: where things lie, how the work is cut, how often it is
# shown. All else is a run's identity; models and data are known by what is in them.
NO_IDENTITY = {
    *("stage", "method", "out", "name", "log_every", "save_every", "keep", "stop_after", "quiet"),
    *("student", "teacher", "vision", "data", "images", "epochs", "batch_size", "accumulation"),
    *("workers", "parallel", "gradient_checkpointing", "compile", "skip_bad_samples", "max_bad_share"),
    *("val_data", "val_images", "val_every"),
}


LATER = {"tokenizers": "same", "freeze_layers": None}
LATER |= {"teacher_layers": None, "align_layer": None, "control": None}


def identity(c: Config, steps: int, records: Records) -> dict:
    """What makes a run this run: all that its weights depend on, whatever the files are called."""
    flags = {field.name: getattr(c, field.name) for field in fields(c) if field.name not in NO_IDENTITY}
    folders = {name: getattr(c, name) for name in ("student", "teacher", "vision")}
    whole = {
        "stage": c.stage,
        **flags,
        "steps": steps,
        **(asdict(c.method) | {"weights": dict(c.weights)}),
        **{name: fingerprint(find(folder)) for name, folder in folders.items() if folder},
        "data": [digest[:16] for digest in records.digests],
        "samples": len(records),
    }
    # runs that were begun before there were these go on
    return {name: x for name, x in whole.items() if name not in LATER or x != LATER[name]}


def command(c: Config) -> dict:
    """What must be the same on all ranks besides: what they do together, and when."""
    own = {"student", "teacher", "vision", "data", "images", "out", "method", "workers", "quiet"}
    own |= {"val_data", "val_images"}
    return {field.name: getattr(c, field.name) for field in fields(c) if field.name not in own}


# ---------------------------------------------------------------- the command line


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of train.py. `method` becomes a distill.Method, `argv` keeps the words."""
    # fmt: off
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [flags]",
    )
    whole, positive, fraction = number(int, 1), number(float, 1e-12), number(float, 0)
    size = number(int, 1, 1e5)
    switch = {"action": "store_true"}

    add = parser.add_argument_group("run").add_argument
    add("--stage", choices=["0", "0a", "0b", "1", "2", "3", "4"],
        help="one stage; 0 is 0a and 0b (default: all of the method, most often 1, 2 and 3, one after the "
        "other, on the tiny world)")
    add("--recipe", choices=list(RECIPES), default="tiny", help="the defaults (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder of all outputs (default: %(default)s)")
    add("--name", help="folder of this student under --out (default: the method, in stage 0 'teacher')")
    add("--seed", type=number(int, 0), default=0,
        help="of data order, new weights, dropout (default: %(default)s)")
    add("--log-every", type=whole, default=10, help="steps between log lines (default: %(default)s)")
    add("--save-every", type=whole, default=500, help="steps between saves (default: %(default)s)")
    add("--keep", type=whole, default=2, help="how many of them to keep (default: %(default)s)")
    add("--stop-after", type=whole, metavar="STEP", help="stop there as SIGTERM would, to go on later")

    add = parser.add_argument_group("models: folders or hub names").add_argument
    add("--teacher", help="multimodal checkpoint (default: tiny/teacher)")
    add("--student", help="what the stage starts from (default: the previous stage's output; in stage 1 "
        "the plain language model tiny/student, in stage 0 tiny/teacher-lm)")
    add("--vision", help="SigLIP of a model trained without a teacher: stage 0 and --method sft "
        "(default: tiny/vision)")

    add = parser.add_argument_group(
        "method: one flag per row of the paper's ablation tables (default: the method's own)"
    ).add_argument
    add("--method", choices=[*METHODS, *RIVALS], default="compodistill",
        help="sft: supervised fine-tuning alone; kd: vanilla knowledge distillation; compodistill: the "
        "paper's; compodistill-rows: ours, text rows one by one; released: as the released code has it; "
        "llava-kd (stages 1, 3, 2): L_LM, L_KL of answers and of visual tokens, relations of visual tokens, "
        "in stage 3 L_LM alone; llavadi (1, 2): L_LM, in 2 KL of z-scored logits and hidden states of all "
        "tokens, too; llava-mod (1, 2, 3, 4): L_LM; L_KL; experts, with L_LM, L_KL and balance; preferences "
        "(default: %(default)s)")
    add("--taf", action=argparse.BooleanOptionalAction, help="TAF, teacher adapter fetch: keep the teacher's "
        "adapter, train one linear map behind it")
    add("--kl-weight", type=fraction, help="weight of L_KL, the distillation of answers, in stages 1 and 2")
    distances = [name for name, distance in DISTANCES.items() if not distance.heads]
    add("--vat-loss", choices=["none", *distances], help="VAT, visual attention alignment: the distance of "
        "two maps, in stage 2")
    add("--vat-heads", choices=["mean", "matched"], help="their mean, or each head of the teacher beside "
        "the student's head that looks most like it, row by row")
    add("--vat-control", choices=CONTROLS, help="VAT with what the teacher looks at taken out of its maps: "
        "columns in a random order, the map of another sample, or all alike")
    add("--vat-weight", type=fraction, help="weight of L_ADL, the distillation of attention, in stage 2")
    add("--vat-queries", choices=ROWS, help="rows of the maps that are compared")
    names = ", ".join([*DEPTH_RANGES, "released"])
    add("--layers", type=layers, help=f"aligned layers: {names}, or by number from 0, as 8-16 or 2,5,7-9 "
        "(the same numbers in both models)")
    add("--student-layers", type=layers, metavar="LAYERS", help="the student's alone, in the same words")
    add("--teacher-layers", type=layers, metavar="LAYERS", help="the teacher's alone")
    add("--align-layers", type=number(int, 0), metavar="N", help="of the student's aligned layers this one, "
        "with the teacher layers that it is matched to, and no other")
    add("--matching", choices=MATCHINGS, help="of student and teacher layers")
    add("--weights", nargs="+", action="extend", metavar="TERM=X", help="weights of terms that the method "
        "has, in all of its stages that have them or in --stage: lm, kl, adl and, of the other systems, "
        "image_kl, relation, all_kl, hidden, aux, preference")
    add("--tokenizers", choices=["same", "aligned"], default="same", help="aligned: the teacher may read "
        "other tokens than the student; attention is compared by the characters that they cover, answers by "
        "the words that both vocabularies have (default: %(default)s)")
    add("--plain", **switch, help="train with distill.py's whole matrices, the readable form, instead of "
        "with lean.py's parts of them: the same losses, slower, more memory")

    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, nargs="+",
        help="LLaVA JSON or JSONL, one or several (default: the tiny world's, made under --out)")
    add("--images", type=Path, nargs="+",
        help="folder that picture paths start from, one for all --data or one for each")
    add("--max-length", type=whole, help="tokens; longer samples are cut at the end, and counted in the log "
        "(default: the recipe's, and what the models hold)")
    add("--group-by-length", **switch, help="samples of like length into the same batch: less padding")
    add("--skip-bad-samples", **switch, help="count, log and replace samples that cannot be read")
    add("--max-bad-share", type=fraction, default=0.01,
        help="of samples so far, or of 1000, above which it stops all the same (default: %(default)s)")
    add("--workers", type=number(int, 0, 1000), help="processes that prepare batches (default: the recipe's)")
    add("--val-data", type=Path, metavar="FILE", help="held-out records of the same form: the losses on them "
        "are logged, too, as val_lm and so on")
    add("--val-images", type=Path, metavar="DIR", help="the folder of their pictures (default: --images)")
    add("--val-every", type=whole, default=500, metavar="N", help="steps between that (default: %(default)s)")

    add = parser.add_argument_group("optimisation (default: the recipe's)").add_argument
    add("--epochs", type=whole, help="passes over the data; the last step is filled up from the next one")
    add("--steps", type=whole, help="optimizer steps of a stage, instead of epochs")
    add("--lr", type=positive, help="peak learning rate, after 3 %% warm-up, then cosine to 0 (recipe "
        "paper with --tune full: 2e-5, in stage 4 2e-6)")
    add("--batch-size", type=size, help="samples per device and micro-batch")
    add("--accumulation", type=size, help="micro-batches per step (default: what the global batch asks for)")
    add("--global-batch", type=whole, help="ranks x batch size x accumulation; checked")
    add("--tune", choices=["full", "lora"], help="the whole language model, or LoRA (low-rank "
        "adaptation) on its linear layers")
    add("--freeze-layers", type=numbers, metavar="LAYERS", help="layers of the student's language model that "
        "stay as they were (in bf16 rounded to it), by number, in the stages that distil")
    add("--lora-rank", type=number(int, 1, 1e4), default=128, help="(default: %(default)s)")
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
    argv = sys.argv[1:] if argv is None else argv
    args = parse(parser, argv)
    given = {flag for flag, value in vars(args).items() if value != parser.get_default(flag)}
    if (args.data is None) != (args.images is None):
        parser.error("--data and --images go together")
    if args.recipe == "paper" and args.data is None:
        parser.error("--recipe paper is for data of your own: --data and --images")
    if args.data and args.stage in (None, "0"):
        stages = ", ".join(["0a", "0b"] if args.stage else (METHODS | RIVALS)[args.method].weights)
        parser.error(f"--data is another for every stage: run --stage {stages} each on its own")
    if not args.val_data and given & {"val_images", "val_every"}:
        parser.error("--val-images and --val-every go with --val-data")
    if args.steps and args.epochs:
        parser.error("--steps and --epochs exclude each other")
    if args.name and (Path(args.name).name != args.name or args.name == ".."):
        parser.error(f"--name {args.name} is no name of a folder under --out")
    if args.lora_dropout and args.lora_dropout >= 1:
        parser.error("--lora-dropout is a share below 1")
    args.name = args.name or ("teacher" if (args.stage or "").startswith("0") else args.method)
    name = args.method_name = args.method
    args.method = method_of(args, parser)
    stages = [*args.method.weights, "0", "0a", "0b"]
    if args.stage and args.stage not in stages:
        parser.error(f"--method {name} has no stage {args.stage}, but {', '.join(args.method.weights)}")
    if args.recipe == "paper":  # else a tiny model would quietly take the place of a real one
        for flag in needed_models(args.stage, args.method):
            if flag not in given:
                parser.error(f"--recipe paper --stage {args.stage} --method {name}: give --{flag}")
    args.argv, args.quiet = argv, False
    return args


def method_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Method:
    """The named method with what the flags change of it."""
    rival = RIVALS.get(args.method)
    method = rival or METHODS[args.method]
    weights = {stage: dict(terms) for stage, terms in method.weights.items()}
    words = list(args.weights or ())
    if args.kl_weight is not None and rival:
        words.append(f"kl={args.kl_weight}")
    elif args.kl_weight is not None:
        for stage in ("1", "2"):
            weights.setdefault(stage, dict(LM))["kl"] = args.kl_weight
    if rival and args.taf:
        parser.error(f"--taf: the student of {args.method} has an adapter of its own")
    second = weights.setdefault("2", dict(LM))
    if args.vat_loss not in (None, "none"):
        second.setdefault("adl", 1.0)
    about_attention = ("vat_queries", "vat_heads", "vat_control", "layers", "student_layers")
    about_attention += ("teacher_layers", "align_layers", "matching")
    needless = [flag for flag in ("vat_weight", *about_attention) if getattr(args, flag) is not None]
    if needless and ("adl" not in second or args.vat_loss == "none"):
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in needless)
        parser.error(f"{flags}: nothing is aligned without an attention loss; give --vat-loss, too")
    if args.vat_weight is not None:
        second["adl"] = args.vat_weight
    if args.vat_loss == "none":
        second.pop("adl", None)
    if words:
        weigh(weights, words, args, parser)
    weights = {stage: {name: w for name, w in terms.items() if w} for stage, terms in weights.items()}
    off = [f"--{flag.replace('_', '-')}" for flag in needless if flag != "vat_weight"]
    if off and not any("adl" in terms for terms in weights.values()):
        parser.error(f"{', '.join(off)}: nothing is aligned with a weight of 0")
    for stage, terms in weights.items():
        if args.stage in (None, stage) and not terms.keys() - {"aux"}:
            parser.error(f"stage {stage} has no loss left{' but the balance of experts' * bool(terms)}")
    changes = {"taf": args.taf, "distance": args.vat_loss, "rows": args.vat_queries}
    changes |= {"layers": args.layers, "matching": args.matching}
    changes |= {"align_layer": args.align_layers, "control": args.vat_control}
    if args.vat_heads == "matched":
        changes["distance"] = "matched-heads"
    changes |= layers_of_both(args, method, parser)
    changes = {name: value for name, value in changes.items() if value not in (None, "none")}
    method = replace(method, weights=weights, **changes)
    check_variant(args, method, parser)
    return method


def numbers(text: str) -> str:
    """The type of flags that number layers."""
    try:
        numbered_layers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def layers(text: str) -> str:
    """The type of flags that name or number layers."""
    return text if text in (*DEPTH_RANGES, "released") else numbers(text)


def layers_of_both(args: argparse.Namespace, method: Method, parser: argparse.ArgumentParser) -> dict:
    """--student-layers and --teacher-layers -> fields of Method; the one that is not given stays."""
    given = [flag for flag in ("student_layers", "teacher_layers") if getattr(args, flag)]
    if args.layers and given:
        parser.error(f"--layers and --{given[0].replace('_', '-')} both name layers; give one of them")
    if not given:
        return {}
    return {
        "layers": args.student_layers or method.layers,
        "teacher_layers": args.teacher_layers or method.layers,
    }


def check_variant(args: argparse.Namespace, method: Method, parser: argparse.ArgumentParser) -> None:
    """One sentence for flags that exclude each other."""
    if args.vat_heads == "matched":
        if args.vat_loss not in (None, "cosine-rows"):
            parser.error(
                f"--vat-heads matched compares rows by their cosine, not by --vat-loss {args.vat_loss}"
            )
        if args.matching == "adaptive":
            parser.error(
                "--vat-heads matched and --matching adaptive: adaptive compares whole maps of one head"
            )
        if args.recipe == "paper" and method.rows != "text":
            parser.error(
                "--vat-heads matched keeps maps of every head: with --vat-queries "
                f"{method.rows} some 1.8 GB a sample at the real sizes; give --vat-queries text (0.22 GB)"
            )
    if args.tokenizers == "aligned" and (args.method in RIVALS or not method.kl_shifted):
        parser.error(f"--tokenizers aligned: the losses of {args.method} need one vocabulary")
    if args.tokenizers == "aligned" and not any(distils(stage, method) for stage in method.weights):
        parser.error(f"--tokenizers aligned: {args.method} distils nothing")
    if args.freeze_layers:
        if not any(distils(stage, method) for stage in method.weights if stage != "1"):
            parser.error(f"--freeze-layers: {args.method} distils nothing into the language model")


def weigh(weights: dict, words: list[str], args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Change weights {stage: {term: weight}} by the words TERM=X of --weights, in place, where TERM is."""
    if args.stage in ("0", "0a", "0b"):
        parser.error(f"--weights: stage {args.stage} makes a teacher, with L_LM alone")
    stages = [stage for stage in weights if args.stage in (None, stage)]
    given = [word.partition("=")[0] for word in words]
    if args.method in METHODS:  # whose other flags have said these
        given += ["kl"] * (args.kl_weight is not None) + ["adl"] * (args.vat_weight is not None)
    for word in words:
        term, _, text = word.partition("=")
        having = [weights[stage] for stage in stages if term in weights[stage]]
        if not having:
            where = f"stage {args.stage} of {args.method}" if args.stage else args.method
            known = ", ".join(dict.fromkeys(name for stage in stages for name in weights[stage]))
            parser.error(f"--weights {word}: {where} has no such term, but {known}")
        if given.count(term) > 1:
            parser.error(f"--weights {word}: this weight is given twice")
        try:
            weight = number(float, 0)(text)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--weights {word}: {error}; give TERM=X")
        for terms in having:
            terms[term] = weight
