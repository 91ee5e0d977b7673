"""Training: the three stages of CompoDistill, its baselines, and the tiny world on one command.

    python train.py                                  # the tiny world: four students, a table and a picture
    torchrun --nproc-per-node 2 train.py --stage 2   # one stage; the stage before is found under --out

    stage   trains                     loss                  what it makes
    0a, 0b  adapter; adapter + LM      L_LM                  a teacher (--stage 0 runs both)
    1 DPT   adapter (with TAF: P_s)    L_LM + L_KL           a student that reads the teacher's visual tokens
    2 DFT   adapter + LM               L_LM + L_KL + L_ADL   a student that looks where the teacher looks
    3 SFT   adapter + LM               L_LM                  the student, finished

Read top to bottom: one step (class Step), the models of a stage, precision and ranks, one optimizer step, one
stage (train_stage). Flags and their defaults are in training/recipes.py, what a run saves in
training/resume.py, the tiny world in tiny/.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import data
import distill
import model
from checkpoint import BadInput, find, read_json, sentence
from qwen import Look, Qwen
from siglip import Siglip
from tiny.world import make_world
from training import lora, recipes, resume
from training.log import Log
from training.recipes import TINY


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return recipes.parse_args(__doc__, argv)


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
        t = None
        with compute_dtype(args.precision, ids.device):
            # no attention mask: causality hides padding on the right
            with torch.no_grad():
                z = student.image_features(batch["pixel_values"])  # the same frozen encoder in both models
                if teacher is not None:
                    teacher_tokens = teacher.adapter(z)
                    t, t_maps = teacher.hidden(ids, visual_tokens=teacher_tokens, look=teacher_look)
            fetch = args.taf and teacher is not None
            student_tokens = student.adapter.fetch(teacher_tokens) if fetch else student.adapter(z)
            s, s_maps = student.hidden(ids, visual_tokens=student_tokens, look=student_look)

        answers, aligned = totals.clamp(min=1)
        distilled = teacher is not None and args.kl_weight > 0
        loss, lm, kl = distill.answer_losses(
            (s.to(DTYPES[args.precision]), student.lm.head_weight),
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


# ---------------------------------------------------------------- the models of a stage


def load_models(stage: str, args: argparse.Namespace, device: str) -> tuple[model.VLM, model.VLM | None]:
    """-> the student that this stage starts from, and its frozen teacher (None: nothing is distilled)."""
    start = find(args.student or previous_output(stage, args))
    frozen = DTYPES[args.precision]
    teacher = None
    if recipes.has_teacher(stage, args):
        teacher = model.load(args.teacher, dtype=frozen, device=device).requires_grad_(False)
    if args.vision and (teacher is not None or stage not in ("0a", "1")):
        raise BadInput("--vision is only for stages 0a and 1 without a teacher")
    if stage in ("0a", "1"):  # a plain language model gets eyes and an adapter
        if "vision_config" in read_json(start / "config.json"):
            raise BadInput(f"{start} is multimodal; stage {stage} starts from a plain language model")
        vision = teacher.vision if teacher else Siglip.load(args.vision or TINY / "vision", device=device)
        lm, tokenizer = Qwen.load(start, device=device), data.load_tokenizer(start)
        student = model.VLM.assemble(vision, lm, tokenizer, teacher, taf=args.taf and teacher is not None)
    else:
        student = model.load(start, device=device)
    student.require_tokenizer()
    if teacher is not None:
        try:
            check_pair(student, teacher, args.taf)
        except BadInput as error:
            raise BadInput(f"student {start}, teacher {args.teacher}: {error}") from None
        student.vision = teacher.vision  # one copy in memory, and Step runs it once for both
        if args.taf:
            student.adapter.teacher = teacher.adapter
    choose_trained(stage, student, args)
    for parameter in student.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen)
    read = args.kl_weight > 0 or (stage == "2" and args.vat_loss != "none")
    return student, teacher if read else None


def choose_trained(stage: str, student: model.VLM, args: argparse.Namespace) -> None:
    """All is frozen but the adapter (with TAF only P_s) and, after stages 0a and 1, the language model:
    whole, or through LoRA. A new stage starts a new LoRA; the one before was merged when its stage was saved.
    """
    student.requires_grad_(False).train()
    taf = isinstance(student.adapter, distill.TeacherAdapterFetch)
    (student.adapter.student if taf else student.adapter).requires_grad_(True)
    if stage not in ("0a", "1"):
        student.lm.requires_grad_(args.tune == "full")
        if args.tune == "lora":
            lora.add_lora(student.lm.model.layers, args.lora_rank, args.lora_alpha, args.lora_dropout)


def check_pair(student: model.VLM, teacher: model.VLM, taf: bool) -> None:
    """Both must read the same ids and the same visual tokens, or the losses compare nothing."""
    ours, theirs = student.config, teacher.config
    if (ours.vision_layer, ours.drop_first_patch) != (theirs.vision_layer, theirs.drop_first_patch):
        raise BadInput(
            "they read other layers or patches of their vision encoders; run stage 1 with this --teacher"
        )
    words = student.tokenizer.get_vocab()
    other = teacher.tokenizer.get_vocab() if teacher.tokenizer else words
    if (
        any(other.get(word) != i for word, i in words.items())
        or max(words.values()) >= theirs.text.vocab_size
    ):
        raise BadInput(
            "their tokenizers differ; distillation needs models of one family"
        )
    if taf != isinstance(student.adapter, distill.TeacherAdapterFetch):
        has, flag = ("an adapter of its own", "--no-taf") if taf else ("the teacher's adapter", "--taf")
        raise BadInput(f"the student has {has}; give {flag}")

    def close(a: Tensor, b: Tensor) -> bool:  # either may have been kept in bfloat16
        return torch.equal(a.bfloat16(), b.bfloat16())

    pairs = [("vision encoder", student.vision, teacher.vision)]
    pairs += [("fetched adapter", student.adapter.teacher, teacher.adapter)] if taf else []
    for name, ours, theirs in pairs:
        ours, theirs = ours.state_dict(), theirs.state_dict()
        same = ours.keys() == theirs.keys() and all(close(ours[key], theirs[key]) for key in ours)
        if not same:
            raise BadInput(
                f"the student's {name} is not this teacher's; give the --teacher of its stage 1"
            )


def previous_output(stage: str, args: argparse.Namespace) -> str:
    """The folder that a stage starts from when --student does not say."""
    if stage in ("0a", "1"):
        return str(TINY / ("teacher-lm" if stage == "0a" else "student"))
    before = {"0b": "0a", "2": "1", "3": "2"}[stage]
    folder = args.out / args.name / f"stage{before}"
    if not folder.is_dir():
        raise BadInput(f"{folder} is missing; run --stage {before} first")
    return str(folder)


# ---------------------------------------------------------------- precision and ranks


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(precision: str, device: torch.device):
    """What --precision means. load_models and spread follow it.

    bf16: products in bfloat16 (autocast). Frozen weights are held in it, too: they are only read. Trained
    weights and AdamW's moments stay float32, because a step of 2e-4 is smaller than the distance of two
    neighbours in bfloat16 (2^-8 of the weight) and would be rounded away; a next stage that freezes them
    rounds them once. The softmax of attention, norms and losses are float32 in any case.
    """
    return torch.autocast(device.type, DTYPES[precision]) if precision == "bf16" else nullcontext()


def pick_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def spread(step_module: Step, args: argparse.Namespace) -> nn.Module:
    """The step on many ranks: DDP, or FSDP2 with the layers of student and teacher sharded apart.

    Outside the layers FSDP shards what is trained; what is frozen there (vision encoder, P_t, with LoRA
    embedding and head) stays whole on every rank, since it is needed in every step and has no optimizer.
    """
    if args.parallel == "ddp":
        return DistributedDataParallel(step_module)
    policy = MixedPrecisionPolicy(DTYPES[args.precision], torch.float32, cast_forward_inputs=False)
    student, teacher = step_module.student, step_module.teacher[0]
    for root, vlm in ((step_module, student), (teacher and teacher.lm, teacher)):
        if vlm is None:
            continue
        for layer in vlm.lm.model.layers:
            fully_shard(layer, mp_policy=policy)
        layers = set(vlm.lm.model.layers.parameters())
        whole = {p for p in root.parameters() if not p.requires_grad and p not in layers}
        fully_shard(root, mp_policy=policy, ignored_params=whole)
    if teacher is not None:
        register_fsdp_forward_method(teacher.lm, "hidden")  # Step calls it instead of forward
    return step_module


@contextmanager
def signals_ask_to_stop():
    """-> a list that is empty until SIGTERM or SIGINT arrives. A second signal, a second later or more, ends
    the process at once. (Launchers may pass one Ctrl-C on twice.)
    """
    asked = []

    def ask(number: int, _) -> None:
        if asked and time.time() - asked[0] > 1:
            os._exit(128 + number)
        asked.append(time.time())

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(_: int) -> None:
    """In a DataLoader's worker: schedulers signal all processes, and the batches are still needed to stop
    well.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Stopped(Exception):
    """A run was asked to stop, and has saved."""


# ---------------------------------------------------------------- one optimizer step


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine to 0."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def optimizer_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict],
    totals: Tensor,
    ranks: int,
    asked: Sequence = (),
) -> tuple[dict[str, float], float] | None:
    """One step over all micro-batches of all ranks -> this rank's share of each loss, and the gradient norm;
    None, and nothing is changed, where a rank is asked to stop between two micro-batches (`asked`).

    Sums are divided once, by `totals` over everything (Step.counts), because a mean of means is another
    gradient where the number of answer tokens varies. DDP and FSDP average gradients over the ranks, hence
    `ranks *`. Where a loss or the gradient is not finite, nothing is changed, and the caller sees it in what
    is returned.
    """
    terms = {}
    for i, batch in enumerate(micro_batches):
        # a large step can take a minute, and a scheduler waits for half of one
        if i and all_reduce(torch.tensor(len(asked), device=totals.device)) > 0:
            return None
        last = i == len(micro_batches) - 1  # gradients travel between the ranks once, with the last one
        if hasattr(module, "set_requires_gradient_sync"):  # FSDP
            module.set_requires_gradient_sync(last)
        with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext():
            loss, parts = module(batch, totals)
            (ranks * loss).backward()
        terms = {name: terms.get(name, 0) + part for name, part in parts.items()}
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    *values, norm = torch.stack([*terms.values(), norm]).tolist()
    if math.isfinite(norm) and all(map(math.isfinite, values)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return dict(zip(terms, values)), norm


# ---------------------------------------------------------------- one stage


def train_stage(stage: str, args: argparse.Namespace) -> Path:
    """Train one stage, on one device or under torchrun, and save the model -> its folder, out/name/stageN.

    A stage that was stopped goes on from its last save, to the same bits; one that has finished stays as it
    is.
    """
    (rank, ranks), device = resume.rank_and_ranks(), pick_device()
    args = recipes.for_stage(stage, args, ranks)
    out = args.out / args.name / f"stage{stage}"
    run = out.with_suffix(".run")  # what is needed to go on
    say = print if rank == 0 and not args.quiet else lambda *_: None
    resume.check_writable(run)
    lock = resume.lock(run) if rank == 0 else None  # held until this function ends

    torch.manual_seed(args.seed)  # the same new weights on every rank
    student, teacher = load_models(stage, args, device)
    step_module = Step(student, teacher, stage, args)
    dataset = open_data(stage, student, args)
    args.steps = args.steps or max(1, args.epochs * len(dataset) // args.global_batch)
    if resume.open_run(run, out, identity(stage, args, dataset)):
        say(f"stage {stage}: finished already, {out}")
        return out
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    size, total = (sum(p.numel() for p in ps) for ps in (parameters, student.parameters()))
    resume.check_writable(run, needed=12 * size * (args.keep + 1) + 4 * total)

    module = spread(step_module, args) if dist.is_initialized() else step_module
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]  # FSDP's, now
    optimizer = torch.optim.AdamW(parameters, args.lr, (0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    state = resume.load(run, student, optimizer) or {"step": 0, "samples": 0, "bad": 0}
    say(f"stage {stage}: {args.student or previous_output(stage, args)} on {device}, {args.precision}")
    say(f"teacher: {args.teacher if teacher else 'none'}")
    say(f"trained: {size:,} parameters ({args.tune if stage not in ('0a', '1') else 'adapter'})")
    say(f"global batch: {ranks} ranks x {args.batch_size} x {args.accumulation} = {args.global_batch}")
    say(f"steps: {args.steps}, of which {state['step']} are done; {len(dataset):,} samples")
    order = data.batches_of(
        len(dataset), args.steps, args.accumulation, args.batch_size, rank, ranks, args.seed, state["step"],
        dataset.lengths if args.group_by_length else None,
    )  # fmt: skip
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=data.collate,
        num_workers=args.workers,
        worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if args.workers and sys.platform == "linux" else None,  # shares memory
        prefetch_factor=4 if args.workers else None,  # batches that each worker is ahead
        pin_memory=device != "cpu",
    )
    with signals_ask_to_stop() as asked:
        run_steps(step_module, module, optimizer, loader, state, run, args, asked)
        save_model(student, args, out)
        resume.remove_saves(run)
    if lock:
        lock.close()
    return out


def run_steps(
    step_module: Step,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    state: dict,
    run: Path,
    args: argparse.Namespace,
    asked: list,
) -> None:
    """The steps that are left, with their log rows and saves. `asked` is empty until somebody wants a stop.
    """
    (rank, ranks), device = resume.rank_and_ranks(), pick_device()
    student, batches = step_module.student, iter(loader)
    with Log(run, state["step"], args) as log:
        for step in range(state["step"], args.steps):
            # every random number of a step (dropout) follows from seed, step and rank: no generator is saved
            torch.manual_seed((args.seed * 1_000_003 + step) * 8191 + rank)
            lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)
            micro_batches = [data.to_device(next(batches), device) for _ in range(args.accumulation)]
            totals, samples, tokens, padded_tokens, bad, stop = tally(
                step_module, micro_batches, bool(asked) or step == args.stop_after
            )
            done = None if stop else optimizer_step(module, optimizer, micro_batches, totals, ranks, asked)
            if done is None:  # all ranks know it at the same place
                resume.save(run, student, optimizer, state, args.keep)
                same = "the same command" + " without --stop-after" * (step == args.stop_after)
                raise Stopped(f"stopped after step {step}, saved in {run}; {same} goes on")
            losses, norm = done
            log.bad_samples(micro_batches, step + 1)
            state = {"step": step + 1, "samples": state["samples"] + samples, "bad": state["bad"] + bad}
            if state["bad"] > args.max_bad_share * max(state["samples"], 1000):
                raise BadInput(
                    f"{state['bad']} of {state['samples']} samples are bad, more than --max-bad-share "
                    f"{args.max_bad_share:g} allows; {log.bad_file} lists them"
                )
            if not math.isfinite(norm + sum(losses.values())):
                raise BadInput(log.not_finite(step + 1, losses, norm, micro_batches))
            log.count(samples, tokens, padded_tokens)
            if (step + 1) % args.log_every == 0 or step in (0, args.steps - 1):
                values = all_reduce(torch.tensor(list(losses.values()), dtype=torch.float64, device=device))
                log.row(step + 1, dict(zip(losses, values.tolist())), lr, norm, state["bad"])
            if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
                resume.save(run, student, optimizer, state, args.keep)


def tally(step_module: Step, batches: list[dict], stop: bool) -> tuple[Tensor, int, int, int, int, int]:
    """One all_reduce for all that a step has to know of all ranks: what the losses are divided by (2,), how
    many samples, tokens, tokens with padding, bad samples, and whether anyone was asked to stop.
    """
    counts = torch.stack([step_module.counts(batch) for batch in batches]).sum(0)
    masks = [batch["attention_mask"] for batch in batches]
    rest = [
        sum(len(mask) for mask in masks),
        sum(mask.sum() for mask in masks),
        sum(mask.numel() for mask in masks),
        sum(len(batch["replaced"]) for batch in batches),
        int(stop),
    ]
    counts = all_reduce(torch.cat([counts, torch.stack([torch.as_tensor(x).to(counts) for x in rest])]))
    return counts[:2], *counts[2:].tolist()


def all_reduce(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def open_data(stage: str, student: model.VLM, args: argparse.Namespace) -> data.LlavaDataset:
    """--data, or the tiny world's, which rank 0 makes."""
    world = args.out / "world"
    if args.data is None and resume.rank_and_ranks()[0] == 0:
        make_world(world)
    resume.barrier()
    return data.LlavaDataset(
        args.data or world / ("pretrain.json" if stage in ("0a", "1") else "tune.json"),
        args.images or world / "images",
        student.tokenizer,
        student.num_image_tokens,
        student.config.vision.image_size,
        template="pretrain" if stage == "0a" else "chat",
        max_length=args.max_length,
        skip_bad=args.skip_bad_samples,
    )


def identity(stage: str, args: argparse.Namespace, dataset: data.LlavaDataset) -> dict:
    """What makes a run this run: all that its weights depend on, whatever the files are called."""
    flags = {name: value for name, value in vars(args).items() if name not in recipes.NO_IDENTITY}
    models = {"student": args.student or previous_output(stage, args)}
    if recipes.has_teacher(stage, args):
        models["teacher"] = args.teacher
    elif stage in ("0a", "1"):
        models["vision"] = args.vision or TINY / "vision"
    return {
        "stage": stage,
        **flags,
        **{name: resume.fingerprint(find(folder)) for name, folder in models.items()},
        "data": [[file.name, file.stat().st_size] for file in dataset.records.files],
        "samples": len(dataset),
    }


def save_model(student: model.VLM, args: argparse.Namespace, out: Path) -> None:
    """The finished model as a checkpoint folder: shards put together, LoRA merged. All ranks call."""
    tensors = lora.merge(resume.whole_state(student), args.lora_rank, args.lora_alpha)
    if resume.rank_and_ranks()[0] == 0:
        with torch.device("meta"):
            plain = model.VLM(student.config, student.tokenizer)
        plain.load_state_dict(tensors, assign=True)
        plain.eval().save(out)
    resume.barrier()


def run_stages(args: argparse.Namespace) -> None:
    """`--stage`: one stage, on one device or on as many as torchrun started."""
    device = pick_device()
    if "RANK" in os.environ:  # started by torchrun
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    elif args.parallel == "fsdp":
        raise BadInput("--parallel fsdp shards over processes: start train.py with torchrun")
    try:
        for stage in ("0a", "0b") if args.stage == "0" else (args.stage,):
            folder = train_stage(stage, args)
            args.student = args.vision = None  # of stage 0, part b goes on from part a
            if resume.rank_and_ranks()[0] == 0:
                print(f"stage {stage} done: {folder}")
    except Stopped as stopped:
        if resume.rank_and_ranks()[0] == 0:
            print(stopped)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.make_tiny:
            from tiny.make import make_tiny

            make_tiny(args)
        elif args.stage:
            run_stages(args)
        elif "RANK" in os.environ:
            raise BadInput("without --stage it is no work for torchrun; start it with python")
        else:
            from tiny.students import train_students

            train_students(args)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except (ValueError, OSError) as error:  # BadInput, what distill.py says of layers, a full disk
        sys.exit(f"error: {sentence(error)}")


if __name__ == "__main__":
    main()
