"""Training: the stages of CompoDistill and of its baselines.

    python train.py                                  # a student of the tiny world: stages 1, 2 and 3
    torchrun --nproc-per-node 2 train.py --stage 2   # one stage; the stage before is found under --out

    stage                            trains                       loss
    0a, 0b (they make a teacher)     adapter; adapter and LM      L_LM
    1 DPT, distilled pre-training    adapter (with TAF only P_s)  L_LM + L_KL
    2 DFT, distilled fine-tuning     adapter and LM               L_LM + L_KL + L_ADL
    3 SFT, supervised fine-tuning    adapter and LM               L_LM

LM is the language model. L_LM is its loss on the answers, L_KL compares the student's answers with the
teacher's, L_ADL where the two look in the picture; with TAF (teacher adapter fetch) the student keeps the
teacher's adapter and trains one linear map P_s behind it. All of it is in distill.py; the other systems of
the paper's table, which have other losses and stages in another order, are in rivals.py.

Read on: one step of teacher and student (class Step), then one stage from top to bottom (train). Flags,
recipes and Config are in training/recipes.py, how models are loaded and frozen in training/models.py.
"""

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported: no traceback

import torch
from torch import Tensor, nn

import data
import distill
import lean
import rivals
import vocabularies
from distill import Method, Term
from model import DTYPES, VLM, pick_device
from qwen import explicit_attention
from support.errors import BadInput, one_line
from support.files import check_writable
from support.loading import batches_made
from support.program import one_sentence
from support.ranks import agree, all_reduce, any_rank, barrier, rank_and_ranks, ranks_of_torchrun
from support.world import make_pairs, make_world
from training import parallel, recipes, resume
from training.log import Log, StepSize
from training.models import load_models, save_model
from training.recipes import Config
from training.signals import Stopped, signals_ask_to_stop
from training.validation import is_due, open_validation, validate

# ---------------------------------------------------------------- one step of teacher and student


class Step(nn.Module):
    """Teacher and student on one batch -> the loss and its terms. What is frozen runs once, for both."""

    def __init__(
        self,
        student: VLM,
        teacher: VLM | None,
        method: Method,
        weights: Mapping[str, float],
        plain: bool = False,
        precision: str = "fp32",
        tokenizers: str = "same",
    ):
        super().__init__()
        known = lean.TERMS | rivals.TERMS
        unknown = {name for terms in method.weights.values() for name in terms} - known
        if unknown and not plain:
            raise BadInput(
                f"lean.py does not have the loss {', '.join(sorted(unknown))}: train with --plain "
                "(one of rivals.py stands in its TERMS)"
            )
        self.student, self.method, self.weights = student, method, weights
        self.teacher = [teacher]  # in a list, so that it is no part of what is trained, wrapped or saved
        self.plain, self.precision = plain, precision
        self.kept: dict[str, Tensor] = {}  # Gram matrices of frozen heads (rivals.py)
        self.words = None  # that two vocabularies have in common
        if tokenizers == "aligned" and teacher is not None:
            pair = [(vlm.tokenizer, vlm.config.text.vocab_size) for vlm in (student, teacher)]
            words = vocabularies.shared_words(*zip(*pair))
            self.words = distill.SharedWords(*(ids.to(student.device) for ids in words))
        self.student_layers, self.teacher_layers = [], []  # whose attention a loss may read
        if teacher is not None and weights.keys() - rivals.OUTPUT_LOSSES:
            depths = [vlm.config.text.num_hidden_layers for vlm in (student, teacher)]
            self.student_layers, self.teacher_layers = distill.aligned_layers(method, *depths)

    def forward(self, batch: dict, totals: dict[str, Tensor]) -> tuple[Tensor, dict[str, Term]]:
        """batch: data.collate's; totals: rivals.loss_counts, added up over the global batch."""
        student, teacher, ids = self.student, self.teacher[0], batch["input_ids"]
        t = rows = None
        read = batch.get("teacher", batch)  # by the teacher, whose tokens may be others
        attend = teacher_attend = explicit_attention  # whole maps (B,H,T,T)
        if self.student_layers and not self.plain:  # or of them what is read, (B,R,P)
            heads = distill.DISTANCES[self.method.distance].heads
            attend, rows = lean.visual_attention_of(batch, self.method.rows, heads)
            teacher_attend = attend
            if read is not batch:
                teacher_attend, _ = lean.visual_attention_of(read, self.method.rows, heads)
        # no attention mask: causality hides padding on the right
        with torch.no_grad():  # frozen, so held in the dtype of its products
            z = student.image_features(batch["pixel_values"])  # (N,P,C_vision), the same in both models
            if batch.get("pairs"):  # two answers about each picture: all chosen ones, then all rejected ones
                z = z.repeat(2, 1, 1)
            if teacher is not None:
                teacher_tokens = teacher.adapter(z)  # P_t(z) (N,P,C_t)
                t = teacher.lm(
                    inputs_embeds=teacher.embed(read["input_ids"], visual_tokens=teacher_tokens),  # (B,T,C_t)
                    attention=dict.fromkeys(self.teacher_layers, teacher_attend),
                    logits=self.plain,
                )
                if read is not batch:
                    some = None if rows is None else (attend.rows, teacher_attend.rows)
                    t = vocabularies.as_the_student_reads(t, batch, some)
                if not self.plain:
                    first = 0 if rows is None else attend.rows.start
                    t = lean.teacher_targets(t, self.student_layers, batch, rows, first, self.method)
        with parallel.compute_dtype(self.precision, ids.device):
            if self.method.taf and teacher is not None:
                visual_tokens = student.adapter.fetch(teacher_tokens)  # P_s(P_t(z)) (N,P,C_s)
            else:
                visual_tokens = student.adapter(z)
            embeds = student.embed(ids, visual_tokens=visual_tokens)  # (B,T,C_s)
            s = student.lm(
                inputs_embeds=embeds.to(DTYPES[self.precision]),  # what flows from layer to layer
                attention=dict.fromkeys(self.student_layers, attend),
                logits=self.plain,
            )
            projected = None
            if self.weights.keys() & rivals.PROJECTED:  # (B,T,C_s) -> (n,C_t), n tokens that are no padding
                projected = student.projector(s.hidden[batch["attention_mask"]])
        heads = student.lm.head_weight, None if teacher is None else teacher.lm.head_weight
        how = batch, self.method, self.weights, totals, self.words
        if self.plain:
            loss, terms = distill.distillation_loss(s, t, *how)
        else:
            loss, terms = lean.distillation_loss(s, t, heads, rows, *how)
        others = rivals.rival_terms(s, t, heads, projected, batch, self.weights, self.kept)
        for name, term in others.items():
            loss = loss + self.weights[name] * term.sum / totals[name].clamp(min=1)
        return loss, terms | others


# ---------------------------------------------------------------- one stage


def train(c: Config) -> Path:
    """Train one stage, on one device or under torchrun, and save the model -> its folder, out/name/stageN."""
    for _ in train_steps(c):
        pass
    return c.folder


def train_steps(c: Config) -> Iterator[tuple[int, VLM]]:
    """Train one stage and save the model; after each step (steps done, student), for who wants to look.

    One that was stopped goes on from its last save, to the same bits; one that has finished stays as it is.
    """
    (rank, ranks), device = rank_and_ranks(), pick_device()
    print0 = (lambda text: print(one_line(text))) if rank == 0 and not c.quiet else lambda *_: None
    run = c.run
    check_writable(run)
    _lock = resume.lock_run(run)  # held until this function ends

    # models and data
    torch.manual_seed(c.seed)  # the same new weights on every rank
    student, teacher = load_models(c, device)
    step_module = Step(student, teacher, c.method, c.weights, c.plain, c.precision, c.tokenizers)
    dataset = open_data(c, student, teacher)
    held_out = open_validation(c, dataset)
    steps = c.steps or math.ceil(c.epochs * len(dataset) / c.global_batch)
    identity = recipes.identity(c, steps, dataset.records)
    agree(identity | recipes.command(c) | {"val_data": held_out and held_out.records.digests})
    if resume.open_run(run, c.folder, identity):
        print0(f"stage {c.stage}: finished already, {c.folder} (for changed code take another --name)")
        return
    resume.check_space(run, student, c.keep)
    num_trained = sum(p.numel() for p in student.parameters() if p.requires_grad)

    # many devices, optimizer, and what an earlier process has saved
    module = parallel.wrap_parallel(step_module, c.parallel, c.precision)
    trained = [p for p in student.parameters() if p.requires_grad]  # sharded, they are others than before
    optimizer = torch.optim.AdamW(trained, c.lr, (0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    state = resume.load(run, student, optimizer) or {"step": 0, "samples": 0, "bad": 0}
    start = state["step"]
    batches = open_batches(c, dataset, steps, start, device)
    print0(f"stage {c.stage}: {c.student} on {device}, {c.precision}")
    print0(f"teacher: {c.teacher if teacher else 'none'}")
    print0(f"trained: {num_trained:,} parameters ({c.tune if c.stage not in ('0a', '1') else 'adapter'})")
    print0(f"global batch: {ranks} ranks x {c.batch_size} x {c.accumulation} = {c.global_batch}")
    print0(f"steps: {steps}, of which {start} are done; {len(dataset):,} samples")
    if len(dataset) < len(dataset.records):
        print0(f"{len(dataset.records) - len(dataset):,} records without a picture are left out")
    if dataset.max_length < c.max_length:
        print0(f"samples are cut at {dataset.max_length} tokens, all that these models hold")

    with signals_ask_to_stop() as stop_requests, Log(run, start, steps, c) as log:
        for step in range(start, steps):
            # every random number of a step (dropout) follows from seed, step and rank: no generator is saved
            # (the factors keep the three apart)
            torch.manual_seed((c.seed * 1_000_003 + step) * 8191 + rank)
            lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, c.lr)
            micro_batches = [data.to_device(next(batches), device) for _ in range(c.accumulation)]
            totals, size = reduce_counts(micro_batches, c)
            if step == start and not c.plain:
                check_forms(step_module, micro_batches[0], totals)

            # forward and backward: every loss is divided by the totals of all micro-batches and ranks
            sums, counts = {}, {}
            for i, batch in enumerate(micro_batches):
                # at once: a scheduler does not wait for a long step to end
                if any_rank(bool(stop_requests) or start < step == c.stop_after, device):
                    resume.save(run, student, optimizer, state, c.keep)
                    raise Stopped(f"stopped after step {step}, saved in {run}; the same command goes on")
                with parallel.local_gradients(module, last=i == len(micro_batches) - 1):
                    loss, terms = module(batch, totals)
                    (ranks * loss).backward()  # gradients are averaged over the ranks, and are to add up
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term.sum.detach()
                    counts[name] = counts.get(name, 0) + term.count
            if step == start:
                check_counts(counts, totals)
            norm = nn.utils.clip_grad_norm_(trained, 1.0)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all shards
            rank_losses = [sums[name] / totals[name].clamp(min=1) for name in sums]  # they add up over ranks
            *rank_losses, norm = torch.stack([*rank_losses, norm]).tolist()

            # the optimizer takes no step from numbers that are not finite
            log.bad_samples(micro_batches, step + 1)
            if not math.isfinite(norm + sum(rank_losses)):
                raise BadInput(log.not_finite(step + 1, dict(zip(sums, rank_losses)), norm, micro_batches))
            if norm == 0:
                raise BadInput(
                    f"the gradient of step {step + 1} is exactly 0: nothing of its losses reaches what is "
                    "trained; look at their weights, and at the samples of that step"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # log and save
            state = log.count(step + 1, state, size)
            validated = held_out is not None and is_due(step + 1, steps, c.val_every)
            if (step + 1) % c.log_every == 0 or step in (0, steps - 1) or validated:
                losses = all_reduce(torch.tensor(rank_losses, dtype=torch.float64, device=device)).tolist()
                began = time.time()
                more = validate(module, student, held_out, c, device) if validated else {}
                log.since += time.time() - began  # it is no part of the rates of training
                log.row(dict(zip(sums, losses)) | more, lr, norm, state)
            began = time.time()
            yield step + 1, student
            log.since += time.time() - began  # nor is what is done with the student between steps
            if (step + 1) % c.save_every == 0 and step + 1 < steps:
                resume.save(run, student, optimizer, state, c.keep)
        save_model(student, c)
        resume.remove_saves(run)
        if any_rank(bool(stop_requests), device):  # of several stages the next one is not begun
            raise Stopped(f"stage {c.stage} is finished, {c.folder}; stopped after it")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine to 0."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def reduce_counts(micro_batches: list[dict], c: Config) -> tuple[dict[str, Tensor], StepSize]:
    """What the losses of a step are divided by, and how much is in it: micro-batches and ranks added up."""
    here = [rivals.loss_counts(batch, c.method, c.weights) for batch in micro_batches]
    totals = {name: sum(counts[name] for counts in here) for name in here[0]}
    if totals.keys() != c.weights.keys():
        raise BadInput(
            f"stage {c.stage} has weights for {', '.join(c.weights)}, and loss_counts (distill.py, "
            f"rivals.py) counts {', '.join(totals)}: every loss needs both"
        )
    masks = [batch["attention_mask"] for batch in micro_batches]
    size = StepSize(
        samples=sum(len(batch["ids"]) for batch in micro_batches),
        tokens=sum(mask.sum() for mask in masks),
        padded_tokens=sum(mask.numel() for mask in masks),
        bad=sum(len(batch["replaced"]) for batch in micro_batches),
        cut=sum(batch["cut"] for batch in micro_batches),
        mended=sum(batch["mended"] for batch in micro_batches),
    )
    numbers = [torch.as_tensor(x, device=masks[0].device) for x in (*totals.values(), *size)]
    numbers = all_reduce(torch.stack(numbers))  # one message for all of them
    return dict(zip(totals, numbers)), StepSize(*numbers[len(totals) :].tolist())


def check_counts(counts: dict[str, Tensor], totals: dict[str, Tensor]) -> None:
    """Stop where a loss is missing, or counted something else than it was divided by."""
    for name, total in totals.items():
        if name not in counts:
            raise BadInput(
                f"there is a weight for the loss {name}, which distillation_loss (or rivals.rival_terms) has "
                "not returned"
            )
        counted = all_reduce(torch.as_tensor(counts[name], device=total.device).clone()).item()
        if counted != total.item():
            raise BadInput(
                f"the loss {name} counts {counted} items on the first step, but was divided by "
                f"{total.item()}: loss_counts and the function that gives this loss disagree"
            )


def check_forms(step: Step, batch: dict, totals: dict[str, Tensor]) -> None:
    """Stop where distill.py has been changed, and lean.py, which is to compute the same, has not.

    Compared are the losses of one micro-batch, and how strongly L pulls at the adapter, through which all of
    it flows back; only where the plain form needs little memory for its logits and maps.
    """
    (B, T), text = batch["input_ids"].shape, step.student.config.text
    layers = len(step.student_layers) + len(step.teacher_layers)
    whole = 4 * B * T * (2 * text.vocab_size + layers * text.num_attention_heads * T)  # bytes
    if any_rank(whole > 3e8, batch["input_ids"].device):
        return
    adapter = [p for p in step.student.adapter.parameters() if p.requires_grad]
    # sharded weights (FSDP) that are gathered here would stay so after a backward pass that is none of theirs
    backward = not any(hasattr(p, "full_tensor") for p in adapter)
    numbers = []  # of the plain form, of the lean one
    step.student.eval()  # no dropout: it would be another one in each form
    for plain in (True, False):
        step.plain = plain
        with torch.set_grad_enabled(backward):
            loss, terms = step(batch, totals)
        found = {f"the loss {name}": terms[name].sum for name in totals if name in terms} | {"L": loss}
        if backward:
            gradients = torch.autograd.grad(loss, adapter, allow_unused=True)
            gradients = [gradient for gradient in gradients if gradient is not None]
            found["the gradient norm of the adapter"] = nn.utils.get_total_norm(gradients)
        numbers.append({name: value.item() for name, value in found.items()})
    step.student.train()
    tolerance = {"fp32": 1e-3, "bf16": 0.1}[step.precision]
    for name, b in numbers[1].items():
        a = numbers[0].get(name, math.nan)
        if not math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) and math.isfinite(a + b):
            raise BadInput(
                f"{name} is {a:.6g} in distill.py and {b:.6g} in lean.py on the first step; where only "
                "distill.py is as it should be, train with --plain"
            )


def open_data(c: Config, student: VLM, teacher: VLM | None) -> data.LlavaDataset:
    """--data, or the tiny world's, which rank 0 makes; samples no longer than the models hold."""
    world, captions, pairs = c.out / "world", c.stage in ("0a", "1"), "preference" in c.weights
    if c.data is None and rank_and_ranks()[0] == 0:
        make_world(world)
        if pairs:
            make_pairs(world)
    barrier()
    held = [vlm.config.text.max_position_embeddings for vlm in (student, teacher) if vlm]
    dataset = data.LlavaDataset(
        c.data or [world / ("pretrain.json" if captions else "tune-pairs.json" if pairs else "tune.json")],
        c.images or [world / "images"],
        student.tokenizer,
        student.num_image_tokens,
        student.config.vision.image_size,
        template="pretrain" if c.stage == "0a" else "chat",
        max_length=min(c.max_length, *held),
        skip_bad=c.skip_bad_samples,
        only_pictures=captions,
        pairs=pairs,
        teacher_tokenizer=teacher.tokenizer if teacher and c.tokenizers == "aligned" else None,
    )
    of_attention, of_pictures = c.weights.keys() - rivals.OUTPUT_LOSSES, c.weights.keys() & rivals.OF_PICTURES
    if (of_attention or of_pictures) and not dataset.records.has_image.any():
        what = "over which L_ADL compares attention" if of_attention else "which this method distils"
        raise BadInput(f"{dataset.records.files[0]}: no record has a picture, {what}")
    return dataset


def open_batches(
    c: Config, dataset: data.LlavaDataset, steps: int, start: int, device: str
) -> Iterator[dict]:
    """This rank's micro-batches from step `start` on, in an order that follows from the seed."""
    rank, ranks = rank_and_ranks()
    lengths = dataset.lengths if c.group_by_length else None
    samples, size = len(dataset), c.batch_size
    if (steps - start) * c.global_batch >= samples + c.global_batch:  # more than an epoch: what fits is kept
        dataset.room = data.KEPT // max(1, c.workers)
    order = data.batches_of(samples, steps, c.accumulation, size, rank, ranks, c.seed, start, lengths)
    return batches_made(dataset.batch, order, c.workers, pin=device != "cpu")


# ---------------------------------------------------------------- python train.py


def main(argv: list[str] | None = None) -> None:
    """`--stage`, or the method's stages in their order, on one device or on as many as torchrun started."""
    run = None  # the folder of saves of the stage that is trained

    def going_on() -> str:
        last = resume.saves(run)[:1] if run else []
        return f"; the same command goes on from {last[0]}" if last else "; nothing is saved yet"

    with one_sentence("stopped; the same command goes on", LESS, going_on):
        args = recipes.parse_args(__doc__, argv)
        with ranks_of_torchrun("nccl" if torch.cuda.is_available() else "gloo"):
            if torch.cuda.is_available():
                torch.cuda.set_device(pick_device())
            if args.parallel == "fsdp" and "RANK" not in os.environ:
                raise BadInput("--parallel fsdp shards over processes: start train.py with torchrun")
            rank, ranks = rank_and_ranks()
            try:
                stages = {None: args.method.weights, "0": ("0a", "0b")}.get(args.stage, (args.stage,))
                for stage in stages:
                    c = recipes.configure(stage, args, ranks)
                    run = c.run
                    folder = train(c)
                    args.student = args.vision = None  # the next stage goes on from this one
                    if rank == 0:
                        print(one_line(f"stage {stage} done: {folder}"))
            except Stopped as stopped:
                if rank == 0:
                    print(one_line(stopped))


LESS = "a smaller --batch-size with more --accumulation, --gradient-checkpointing, fewer --workers need less"


if __name__ == "__main__":
    main()
