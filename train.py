"""Training: the three stages of CompoDistill, its baselines, and the tiny world on one command.

    python train.py                                  # the tiny world: four students, a table and a picture
    torchrun --nproc-per-node 2 train.py --stage 2   # one stage; the stage before is found under --out

    stage   trains                     loss                  what it makes
    0a, 0b  adapter; adapter + LM      L_LM                  a teacher (--stage 0 runs both)
    1 DPT   adapter (with TAF: P_s)    L_LM + L_KL           a student that reads the teacher's visual tokens
    2 DFT   adapter + LM               L_LM + L_KL + L_ADL   a student that looks where the teacher looks
    3 SFT   adapter + LM               L_LM                  the student, finished

Read top to bottom: arguments, one step (class Step), one stage (train_stage). Without --stage:
tiny/students.py.
"""

import argparse
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import distill
import model
from checkpoint import BadInput, find, sentence
from qwen import Look, Qwen
from siglip import Siglip
from tiny.world import make_world

TINY = Path(__file__).parent / "tiny"  # the models that ship with the repository

# Each method is a set of flags; a flag on the command line overrides it.
METHODS = {
    "sft": dict(taf=False, kl_weight=0.0, vat_loss="none"),
    "kd": dict(taf=False, kl_weight=1.0, vat_loss="none"),
    "compodistill": dict(taf=True, kl_weight=1.0, vat_loss="cosine"),
    "released": dict(  # as the released code has it
        taf=True, kl_weight=1.0, kl_shifted=False, vat_loss="released", layers="released"
    ),
}
# Defaults of the tiny world; the README's stage table has the paper's.
STAGES = {
    "0a": dict(data="pretrain", steps=300, lr=2e-3),
    "0b": dict(data="tune", steps=4000, lr=2e-3),
    "1": dict(data="pretrain", steps=100, lr=2e-3),
    "2": dict(data="tune", steps=1500, lr=2e-3),
    "3": dict(data="tune", steps=100, lr=5e-4),
}


def number(kind: type, least: float):
    """An argparse type: a finite number of this kind that is at least `least`."""

    def convert(text: str):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range, at least {least} is asked for")
        return value

    return convert


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--stage", choices=["0", "0a", "0b", "1", "2", "3"], help="one stage; without it: the tiny world"
    )
    run.add_argument(
        "--out", type=Path, default=Path("out"), help="folder of all outputs (default: %(default)s)"
    )
    run.add_argument(
        "--name", help="folder of this student under --out (default: the method, in stage 0 'teacher')"
    )
    run.add_argument(
        "--seed", type=int, default=0, help="of the data order and new weights (default: %(default)s)"
    )
    run.add_argument(
        "--make-tiny", action="store_true", help="make the shipped tiny models again, into --out"
    )
    run.add_argument(
        "--log-every", type=number(int, 1), default=10, help="steps between log lines (default: %(default)s)"
    )

    models = parser.add_argument_group("models: folders or hub names")
    models.add_argument(
        "--teacher", default=str(TINY / "teacher"), help="multimodal checkpoint (default: %(default)s)"
    )
    models.add_argument(
        "--student",
        help="what the stage starts from (default: the previous stage's output; in stage 1 the "
        "plain language model tiny/student, in stage 0 tiny/teacher-lm)",
    )
    models.add_argument(
        "--vision",
        help="SigLIP of a model trained without a teacher: stage 0 and --method sft (default: tiny/vision)",
    )

    method = parser.add_argument_group(
        "method: one flag per row of the paper's ablation tables (default: the method's own)"
    )
    method.add_argument(
        "--method", choices=list(METHODS), default="compodistill", help="(default: %(default)s)"
    )
    method.add_argument("--taf", action=argparse.BooleanOptionalAction, help="fetch the teacher's adapter")
    method.add_argument("--kl-weight", type=number(float, 0), help="weight of L_KL")
    method.add_argument(
        "--vat-loss", choices=["none", "cosine", "mse", "kl", "released"], help="attention loss"
    )
    method.add_argument(
        "--vat-weight", type=number(float, 0), default=1.0, help="weight of L_ADL (default: %(default)s)"
    )
    method.add_argument(
        "--vat-queries", choices=["all", "image", "text"], default="all", help="(default: %(default)s)"
    )
    method.add_argument(
        "--vat-rows", action="store_true", help="cosine of each query row instead of the whole matrix"
    )
    method.add_argument(
        "--layers", choices=["intermediate", "early", "later", "all", "released"], help="aligned layers"
    )
    method.add_argument(
        "--matching", choices=["group", "simple", "adaptive"], default="group", help="(default: %(default)s)"
    )

    optim = parser.add_argument_group("data and optimisation")
    optim.add_argument("--data", type=Path, help="LLaVA JSON (default: the tiny world's, made under --out)")
    optim.add_argument("--images", type=Path, help="folder that its picture paths start from")
    optim.add_argument(
        "--steps",
        type=number(int, 1),
        help="optimizer steps (default: the stage's; without --stage: of stage 2, "
        "the other stages in proportion)",
    )
    optim.add_argument(
        "--lr",
        type=number(float, 1e-12),
        help="peak learning rate, after 3 %% warm-up, then cosine to 0 (default: the stage's)",
    )
    optim.add_argument(
        "--batch-size",
        type=number(int, 1),
        default=32,
        help="samples per device and micro-batch (default: %(default)s)",
    )
    optim.add_argument(
        "--accumulation",
        type=number(int, 1),
        default=1,
        help="micro-batches per optimizer step (default: %(default)s)",
    )
    optim.add_argument(
        "--workers",
        type=number(int, 0),
        default=0,
        help="processes that prepare batches (default: %(default)s)",
    )
    optim.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="keep only the inputs of the student's layers and compute the rest again: less memory, slower",
    )
    optim.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the layers: a minute or two once, then less memory and perhaps less time; "
        "needs a C++ compiler",
    )
    args = parser.parse_args(argv)
    given = {flag for flag, value in vars(args).items() if value != parser.get_default(flag)}
    needless = given - {"out", "seed", "steps", "teacher", "make_tiny"}
    if args.stage is None and needless:
        parser.error(f"{', '.join(sorted(needless))}: only with --stage")
    for flag, value in {"layers": "intermediate", "kl_shifted": True, **METHODS[args.method]}.items():
        if getattr(args, flag, None) is None:
            setattr(args, flag, value)
    args.name = args.name or ("teacher" if (args.stage or "").startswith("0") else args.method)
    args.quiet = False
    if (args.data is None) != (args.images is None):
        parser.error("--data and --images go together")
    return args


# ---------------------------------------------------------------- one step of the method


class Step(nn.Module):
    """Teacher and student on one batch -> the loss. Frozen parts run once, for both; attention is looked at
    only in the layers, rows and columns that L_ADL reads, and logits are made only where there is an answer.
    """

    def __init__(self, student: model.VLM, teacher: model.VLM | None, stage: str, args: argparse.Namespace):
        super().__init__()
        self.student, self.args = student, args
        self.teacher = [teacher]  # in a list, so that it is no part of what is trained, wrapped or saved
        student.lm.checkpointing = args.gradient_checkpointing
        if args.compile:
            for tower in [student.vision.encoder, *(vlm.lm.model for vlm in (student, teacher) if vlm)]:
                for layer in tower.layers:
                    layer.compile()
        self.vat_loss = args.vat_loss if stage == "2" else "none"
        if self.vat_loss != "none":
            student_layers, teacher_layers = (
                distill.choose_layers(args.layers, len(vlm.lm.model.layers), teacher=vlm is teacher)
                for vlm in (student, teacher)
            )
            adaptive = args.matching == "adaptive"  # it chooses from all layers, when it sees their maps
            how = "group" if adaptive else args.matching
            groups = distill.match_layers(student_layers, teacher_layers, how)
            self.student_groups = [[layer] for layer in student_layers]
            self.teacher_groups = [[layer] for layer in teacher_layers] if adaptive else groups

    def forward(self, batch: dict, totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """totals: what `counts` gives, summed over the global batch -> the loss and, to show, its terms."""
        student, teacher, args = self.student, self.teacher[0], self.args
        ids, labels = batch["input_ids"], batch["labels"]
        student_look = teacher_look = None
        if self.vat_loss != "none":
            queries = self.queries(batch)
            rows, columns = distill.span(queries), batch["visual_columns"]
            student_look, teacher_look = (
                Look(groups, rows, columns) for groups in (self.student_groups, self.teacher_groups)
            )
        # no attention mask: causality hides padding on the right
        t = None
        with torch.no_grad():
            z = student.image_features(batch["pixel_values"])  # the same frozen encoder in both models
            if teacher is not None:
                teacher_tokens = teacher.adapter(z)
                t, t_maps = teacher.hidden(ids, visual_tokens=teacher_tokens, look=teacher_look)
        student_tokens = student.adapter.fetch(teacher_tokens) if args.taf and teacher else student.adapter(z)
        s, s_maps = student.hidden(ids, visual_tokens=student_tokens, look=student_look)

        answers, aligned = totals.clamp(min=1)
        distilled = teacher is not None and args.kl_weight > 0
        loss, lm, kl = distill.answer_losses(
            (s, student.lm.head_weight),
            (t, teacher.lm.head_weight) if distilled else None,
            labels,
            args.kl_weight,
            args.kl_shifted,
        )
        loss, terms = loss / answers, {"lm": lm / answers}
        if distilled:
            terms["kl"] = kl / answers
        if self.vat_loss != "none":
            terms["adl"] = self.attention_loss(s_maps, t_maps, queries, rows, batch) / aligned
            loss = loss + args.vat_weight * terms["adl"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def attention_loss(
        self, s: list[Tensor], t: list[Tensor], queries: Tensor, rows: slice, batch: dict
    ) -> Tensor:
        """VAT: the student's k maps (B,R,P) and the teacher's k means (or, with adaptive matching, all its
        maps), queries (B,T) -> the sum of L_ADL.
        """
        args, queries = self.args, queries[:, rows]
        if args.matching == "adaptive":
            t = distill.adaptive_match(torch.stack(s), torch.stack(t), queries)
        if self.vat_loss == "released":  # visual rows only, too: (k,N,P,P)
            index = (batch["visual_columns"] - rows.start)[batch["has_image"], :, None]  # (N,P,1)
            s, t = (
                torch.stack([m[batch["has_image"]].take_along_dim(index, 1) for m in maps]) for maps in (s, t)
            )
            return distill.released_attention_loss(s, t)[0]
        return distill.visual_attention_loss(s, t, queries, args.vat_loss, args.vat_rows)[0]

    def queries(self, batch: dict) -> Tensor:
        """(B,T): the query rows that are aligned."""
        which = "image" if self.vat_loss == "released" else self.args.vat_queries
        return distill.query_rows(which, batch["visual_columns"], batch["has_image"], batch["attention_mask"])

    def counts(self, batch: dict) -> Tensor:
        """By what the sums of this batch are to be divided: (answer tokens, what L_ADL counts). Needs no
        forward pass.
        """
        answers = (batch["labels"][:, 1:] != data.IGNORE).sum()
        if self.vat_loss == "none":
            return torch.stack([answers, torch.zeros_like(answers)])
        if self.vat_loss == "released":
            return torch.stack([answers, batch["has_image"].sum()])
        k, P = len(self.student_groups), batch["visual_columns"].shape[1]
        return torch.stack(
            [answers, distill.attention_count(self.queries(batch), k, P, self.vat_loss, self.args.vat_rows)]
        )


# ---------------------------------------------------------------- one stage


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine to 0."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def batches_of(num_samples: int, steps: int, accumulation: int, size: int, rank: int, ranks: int, seed: int):
    """The sample indices of each of this rank's micro-batches. A global batch is the same samples whatever
    the number of ranks and micro-batches is; every epoch is a new permutation.
    """
    epoch, order = -1, []
    for micro in range(steps * accumulation):
        first = (micro * ranks + rank) * size
        indices = []
        for position in range(first, first + size):
            if position // num_samples != epoch:
                epoch = position // num_samples
                generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
                order = torch.randperm(num_samples, generator=generator).tolist()
            indices.append(order[position % num_samples])
        yield indices


def load_models(stage: str, args: argparse.Namespace, device: str) -> tuple[model.VLM, model.VLM | None]:
    """-> the student that this stage starts from, and its frozen teacher (None: nothing is distilled)."""
    start = find(args.student or previous_output(stage, args))
    distilled = args.kl_weight > 0 or args.vat_loss != "none"
    teacher = None
    if stage in ("1", "2") and (args.taf or distilled):
        teacher = model.load(args.teacher, device=device).requires_grad_(False)
    if args.vision and (teacher is not None or stage not in ("0a", "1")):
        raise BadInput("--vision is for a model that gets its eyes here, stages 0 and 1 without a teacher")
    if stage in ("0a", "1"):  # a plain language model gets eyes and an adapter
        vision = teacher.vision if teacher else Siglip.load(args.vision or TINY / "vision", device=device)
        lm, tokenizer = Qwen.load(start, device=device), data.load_tokenizer(start)
        student = model.VLM.assemble(vision, lm, tokenizer, teacher, taf=args.taf and teacher is not None)
    else:
        student = model.load(start, device=device)
    student.require_tokenizer()
    if teacher is not None:
        check_pair(student, teacher, args.taf)
        student.vision = teacher.vision  # one copy in memory, and Step runs it once for both
        if args.taf:
            student.adapter.teacher = teacher.adapter
    return student, teacher if distilled else None


def check_pair(student: model.VLM, teacher: model.VLM, taf: bool) -> None:
    """Both must read the same ids and the same visual tokens, or the losses compare nothing."""
    ours, theirs = student.config, teacher.config
    if (ours.vision_layer, ours.drop_first_patch) != (theirs.vision_layer, theirs.drop_first_patch):
        raise BadInput(
            "student and teacher read other vision layers or patches; train both from one --vision setting"
        )
    words = student.tokenizer.get_vocab()
    other = teacher.tokenizer.get_vocab() if teacher.tokenizer else words
    if (
        any(other.get(word) != i for word, i in words.items())
        or max(words.values()) >= theirs.text.vocab_size
    ):
        raise BadInput(
            "student and teacher have different tokenizers; distillation needs models of one family"
        )
    if taf and not isinstance(student.adapter, distill.TeacherAdapterFetch):
        raise BadInput("this student has an adapter of its own; give --no-taf, or run its stage 1 with --taf")
    pairs = [("vision encoder", student.vision, teacher.vision)]
    pairs += [("fetched adapter", student.adapter.teacher, teacher.adapter)] if taf else []
    for name, ours, theirs in pairs:
        ours, theirs = ours.state_dict(), theirs.state_dict()
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            raise BadInput(
                f"the student's {name} is not the teacher's: both must come from the same --teacher"
            )


def previous_output(stage: str, args: argparse.Namespace) -> str:
    """The folder that a stage starts from when --student does not say."""
    if stage in ("0a", "1"):
        return str(TINY / ("teacher-lm" if stage == "0a" else "student"))
    before = {"0b": "0a", "2": "1", "3": "2"}[stage]
    folder = args.out / args.name / f"stage{before}"
    if not folder.is_dir():
        raise BadInput(f"{folder} is missing: run --stage {before} first, or name a folder with --student")
    return str(folder)


def optimizer_step(
    module: nn.Module,
    step_module: Step,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict],
    ranks: int,
) -> tuple[dict[str, Tensor], float]:
    """One step over all micro-batches of all ranks -> this rank's share of each loss, and the gradient norm.

    Sums are divided once, by counts over everything, because a mean of means is another gradient where the
    number of answer tokens varies. DDP averages gradients over the ranks, hence `ranks *`. `module` is
    step_module, or DDP around it.
    """
    counts = torch.stack([step_module.counts(batch) for batch in micro_batches]).sum(0)
    if ranks > 1:
        dist.all_reduce(counts)
    terms = {}
    for i, batch in enumerate(micro_batches):
        last = (
            i == len(micro_batches) - 1
        )  # gradients travel between the ranks once, with the last micro-batch
        with nullcontext() if ranks == 1 or last else module.no_sync():
            loss, parts = module(batch, counts)
            (ranks * loss).backward()
        terms = {name: terms.get(name, 0) + part for name, part in parts.items()}
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return terms, norm.item()


def train_stage(stage: str, args: argparse.Namespace) -> Path:
    """Train one stage, on one device or under torchrun, and save the model -> its folder, out/name/stageN."""
    rank, ranks, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), pick_device()
    steps, peak = args.steps or STAGES[stage]["steps"], args.lr or STAGES[stage]["lr"]
    out = args.out / args.name / f"stage{stage}"
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} exists already; remove it, or choose another --out or --name")

    # models: all is frozen but the adapter (with TAF only P_s) and, after stages 0a and 1, the language model
    torch.manual_seed(args.seed)
    student, teacher = load_models(stage, args, device)
    student.requires_grad_(False).train()
    taf = isinstance(student.adapter, distill.TeacherAdapterFetch)
    (student.adapter.student if taf else student.adapter).requires_grad_(True)
    student.lm.requires_grad_(stage not in ("0a", "1"))
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if rank == 0 and not args.quiet:
        start, size = args.student or previous_output(stage, args), sum(p.numel() for p in parameters)
        batch = args.accumulation * args.batch_size
        print(f"stage {stage}: {start}, {size:,} parameters trained on {device}")
        print(f"teacher: {args.teacher if teacher else 'none'}")
        print(f"global batch: {ranks} ranks x {args.accumulation} x {args.batch_size} = {ranks * batch}")
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    step_module = Step(student, teacher, stage, args)
    module = DistributedDataParallel(step_module) if ranks > 1 else step_module

    # data
    world = args.out / "world"
    if args.data is None and rank == 0:
        make_world(world)
    if ranks > 1:
        dist.barrier()
    dataset = data.LlavaDataset(
        args.data or world / f"{STAGES[stage]['data']}.json",
        args.images or world / "images",
        student.tokenizer,
        student.num_image_tokens,
        student.config.vision.image_size,
        template="pretrain" if stage == "0a" else "chat",
    )
    indices = batches_of(len(dataset), steps, args.accumulation, args.batch_size, rank, ranks, args.seed)
    loader = DataLoader(
        dataset,
        batch_sampler=list(indices),
        collate_fn=data.collate,
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,  # batches that each worker is ahead
        pin_memory=device != "cpu",
    )
    batches = iter(loader)

    # loop
    out.parent.mkdir(parents=True, exist_ok=True)
    log = open(out.parent / f"stage{stage}.jsonl", "w") if rank == 0 else None
    bar = tqdm(
        total=steps, desc=f"{args.name} stage {stage}", disable=rank != 0 or args.quiet, dynamic_ncols=True
    )
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        micro_batches = [data.to_device(next(batches), device) for _ in range(args.accumulation)]
        losses, norm = optimizer_step(module, step_module, optimizer, micro_batches, ranks)
        bar.update()
        if (step + 1) % args.log_every and step not in (0, steps - 1):
            continue
        values = torch.stack(list(losses.values()))
        if ranks > 1:
            dist.all_reduce(values)
        losses = dict(zip(losses, values.tolist()))
        if not math.isfinite(sum(losses.values())):
            raise BadInput(
                f"{out}: a loss is not finite at step {step + 1} ({losses}); lower --lr, look at the data"
            )
        if rank == 0:
            row = {"step": step + 1, **losses, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            log.write(json.dumps(row | {"seconds": round(time.time() - started, 2)}) + "\n")
            log.flush()
            if not args.quiet:
                terms = "  ".join(f"{name} {value:8.4f}" for name, value in losses.items())
                tqdm.write(f"step {step + 1:>6}/{steps}  {terms}  lr {row['lr']:.2e}  norm {norm:8.3f}")
    bar.close()
    if rank == 0:
        log.close()
        student.eval().save(out)
    if ranks > 1:
        dist.barrier()
    return out


def pick_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def run_stages(args: argparse.Namespace) -> None:
    """`--stage`: one stage, on one device or on as many as torchrun started."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        device = pick_device()
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        for stage in ("0a", "0b") if args.stage == "0" else (args.stage,):
            folder = train_stage(stage, args)
            args.student = args.vision = None  # of stage 0, part b goes on from part a
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"stage {stage} done: {folder}")
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.make_tiny:
            from tiny.make import make_tiny

            make_tiny(args)
        elif args.stage:
            run_stages(args)
        else:
            from tiny.students import train_students

            train_students(args)
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError) as error:  # BadInput, what distill.py says of layers, a full disk
        sys.exit(f"error: {sentence(error)}")


if __name__ == "__main__":
    main()
