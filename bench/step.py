"""What a distillation step costs, in seconds and gigabytes, beside the straightforward way with transformers.

    python bench/step.py step       # transformers, ours in its variants, matmul floor
    python bench/step.py vat        # the three of ours alone, for more rounds
    python bench/step.py systems    # the other systems of the paper's table (rivals.py), beside plain KD
    python bench/step.py floor      # FLOPs and bytes of a step, counted from the shape; runs nothing
    python bench/step.py scaling    # over visual tokens, batch and matched layers: what VAT adds
    python bench/step.py data       # samples per second that decoding and resizing deliver

VAT is the method's visual attention alignment, TAF its adapter fetched from the teacher (distill.py). Random
weights, the same in every variant; so is the batch. Each variant is a process of its own and its first
step is a warm-up (AdamW's state is made there). On the CPU the variants take turns, step by step, so that
what else the machine does meets all of them; on cuda they run one after another, alone on the GPU. Peak
memory is the process's largest resident set (CPU, libraries included) or torch's largest allocation (cuda).

Shapes: B samples, T tokens, P visual tokens, C width, V vocabulary, L layers, k and m matched layers.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import distill  # noqa: E402
import rivals  # noqa: E402
import train  # noqa: E402
from model import DTYPES, VLM  # noqa: E402
from qwen import Qwen, QwenConfig  # noqa: E402
from siglip import SiglipConfig  # noqa: E402
from support.errors import BadInput  # noqa: E402
from support.files import check_output  # noqa: E402
from support.layouts import VLMConfig  # noqa: E402
from support.program import number, one_sentence, parse  # noqa: E402
from training import recipes  # noqa: E402
from training.log import peak_memory  # noqa: E402
from training.lora import add_lora  # noqa: E402
from training.models import add_experts, compile_layers, prepare_student  # noqa: E402
from training.parallel import compute_dtype  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """The models and the batch. A sample is `text` tokens and a picture; the last `answers` are supervised,
    and of the other text tokens half stand before the picture.
    """

    vision: SiglipConfig
    student: QwenConfig
    teacher: QwenConfig
    text: int = 121
    answers: int = 100
    batch: int = 2

    @property
    def tokens(self) -> int:
        return self.vision.num_patches + self.text

    @property
    def before(self) -> int:
        return (self.text - self.answers) // 2

    def __str__(self) -> str:
        names = {"student": self.student, "teacher": self.teacher, "SigLIP": self.vision}
        sizes = ", ".join(f"{name} {c.num_hidden_layers} x {c.hidden_size}" for name, c in names.items())
        batch = f"{self.batch} x {self.tokens} tokens, {self.vision.num_patches} visual"
        return f"{batch}, {self.answers} answered; layers x width: {sizes}"


def qwen(width: int, layers: int, heads: int, ffn: int, vocabulary: int = 151936) -> QwenConfig:
    return QwenConfig(vocabulary, width, ffn, layers, heads, heads)


SO400M = SiglipConfig(1152, 4304, 27, 16, 384, 14)
SHAPES = {
    "cpu": Shape(SiglipConfig(384, 1536, 12, 6, 384, 14), qwen(256, 24, 4, 688), qwen(320, 40, 5, 864)),
    "small": Shape(
        SiglipConfig(48, 96, 3, 3, 64, 16), qwen(32, 10, 2, 64, 999), qwen(48, 14, 3, 96, 999), 30, 9
    ),
    "real": Shape(SO400M, qwen(2048, 24, 16, 5504), qwen(2560, 40, 20, 6912), 131),  # Qwen1.5, 4B -> 1.8B
}

VARIANTS = {  # name -> flags of train.py, or of the straightforward way: losses of all tokens, or of answers
    "transformers": "all",
    "transformers, answers": "answers",
    "ours": [],
    "ours, plain": ["--plain"],
    "ours, text rows": ["--vat-queries", "text"],
    "ours, no VAT": ["--vat-loss", "none"],
    "ours, checkpointing": ["--gradient-checkpointing"],
    "ours, compiled": ["--compile"],
}

SYSTEMS = {  # the same, of a stage that tells them apart
    "kd": ["--method", "kd"],
    "compodistill": [],
    "llava-kd, stage 2": ["--method", "llava-kd"],
    "llavadi, stage 2": ["--method", "llavadi"],
    "llava-mod, stage 2": ["--method", "llava-mod"],
    "llava-mod, stage 3": ["--method", "llava-mod", "--stage", "3"],
    "llava-mod, stage 4": ["--method", "llava-mod", "--stage", "4"],
}

# ---------------------------------------------------------------- models and batch


def build(
    shape: Shape, device: str, frozen: torch.dtype, tune: str = "full", taf: bool = True
) -> tuple[VLM, VLM]:
    """Student (with TAF, or an adapter of its own) and frozen teacher, with seeded random weights.

    What is trained is float32, P_s and the language model (full) or its low-rank adaptation (lora); `frozen`
    is the dtype of all else.
    """
    with torch.device("meta"):
        teacher, lm = VLM(VLMConfig(shape.vision, shape.teacher)), Qwen(shape.student)
    teacher = teacher.to(frozen).to_empty(device=device)
    lm = lm.to(torch.float32 if tune == "full" else frozen).to_empty(device=device)
    student = VLM.assemble(teacher.vision, lm, None, teacher, taf=taf)
    adapter = (student.adapter.student if taf else student.adapter).float()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in (teacher, lm, adapter):
            for name, tensor in module.named_parameters():
                if "norm" in name:
                    tensor.fill_(float(name.endswith("weight")))
                else:  # activations and logits of size 1, so that attention is not uniform
                    std = 0.02 if tensor.dim() == 1 else tensor[0].numel() ** -0.5
                    tensor.normal_(0, std, generator=generator)
    teacher.requires_grad_(False)
    student.requires_grad_(False).train()
    adapter.requires_grad_(True)
    if tune == "full":
        lm.requires_grad_(True)
    return student, teacher


def make_batch(shape: Shape, device: str, pairs: bool = False) -> dict:
    """A batch of data.collate: text, picture, text, answers; or as many rows of pairs of answers."""
    generator, samples = torch.Generator().manual_seed(0), []
    size, vocabulary = shape.vision.image_size, min(shape.student.vocab_size, shape.teacher.vocab_size)
    for _ in range(shape.batch):
        ids = torch.randint(vocabulary, (shape.tokens,), generator=generator)
        ids[shape.before : shape.before + shape.vision.num_patches] = data.IMAGE_TOKEN
        labels = ids.clone()
        labels[: -shape.answers] = data.IGNORE
        pixels = torch.rand(3, size, size, generator=generator) * 2 - 1
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    if pairs:  # the other answer of a pair is about the same picture
        half = len(samples) // 2
        samples = [a | {"rejected": b} for a, b in zip(samples[:half], samples[half:])]
    return data.to_device(data.collate(samples), device)


# ---------------------------------------------------------------- the straightforward way


def to_transformers(vlm: VLM) -> tuple[nn.Module, nn.Module]:
    """transformers' SigLIP (weights of its own) and Qwen2 (eager attention) with the weights of a model."""
    import transformers

    vision_config = transformers.SiglipVisionConfig(**asdict(vlm.config.vision), vision_use_head=False)
    text_config = transformers.Qwen2Config(**asdict(vlm.config.text), attn_implementation="eager")
    if hasattr(text_config, "rope_parameters"):  # transformers 5
        text_config.rope_parameters = {"rope_type": "default", "rope_theta": vlm.config.text.rope_theta}
    with vlm.device:
        vision = transformers.SiglipVisionModel(vision_config)
        lm = transformers.Qwen2ForCausalLM(text_config)
    prefix = "" if "post_layernorm.weight" in vision.state_dict() else "vision_model."  # 5, else 4
    weights = {prefix + name: tensor.clone() for name, tensor in vlm.vision.state_dict().items()}
    vision.load_state_dict(weights, assign=True)
    lm.load_state_dict(vlm.lm.state_dict(), assign=True)
    return vision.requires_grad_(False), lm


def forward(vlm: VLM, batch: dict, labels: Tensor | None = None):
    """One model with transformers' parts -> .loss, .logits (B,T,V), .attentions: L of (B,H,T,T)."""
    ids, pixels = batch["input_ids"], batch["pixel_values"].to(vlm.lm.dtype)
    with torch.no_grad():
        z = vlm.vision(pixels, output_hidden_states=True).hidden_states[vlm.config.vision_layer]
    placeholder = ids == data.IMAGE_TOKEN
    embeds = vlm.lm.get_input_embeddings()(ids.masked_fill(placeholder, 0))
    embeds = embeds.masked_scatter(placeholder[..., None], vlm.adapter(z).to(embeds.dtype))
    return vlm.lm(
        inputs_embeds=embeds,
        attention_mask=batch["attention_mask"],
        labels=labels,
        output_attentions=True,
        use_cache=False,
    )


def visual_maps(attentions: tuple[Tensor, ...], columns: Tensor) -> Tensor:
    """All layers' (B,H,T,T), stacked; head mean; visual columns (B,P) -> (L,B,T,P)."""
    maps = torch.stack(attentions).mean(2)
    return maps.gather(3, columns[None, :, None, :].expand(len(maps), -1, maps.shape[2], -1))


def plain_losses(student: VLM, teacher: VLM, batch: dict, losses_of: str) -> dict[str, Tensor]:
    """The losses of a step, the way that one would write first."""
    with torch.no_grad():
        t = forward(teacher, batch)
    labels, columns = batch["labels"], batch["visual_columns"]
    s = forward(student, batch, labels if losses_of == "all" else None)
    student_layers = distill.understanding_layers(student.config.text.num_hidden_layers)
    teacher_layers = distill.understanding_layers(teacher.config.text.num_hidden_layers)
    s_maps = visual_maps(s.attentions, columns)[student_layers]  # (k,B,T,P)
    t_maps, groups = visual_maps(t.attentions, columns), distill.match_layers(student_layers, teacher_layers)
    t_maps = torch.stack([t_maps[group].mean(0) for group in groups])  # (k,B,T,P)
    rows = distill.query_rows(batch, "all")
    if losses_of == "all":  # every token's, the others masked: transformers' own L_LM, the textbook's L_KL
        log_s = s.logits[:, :-1].log_softmax(-1)
        log_t = t.logits[:, :-1].log_softmax(-1)
        divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)  # (B,T-1)
        lm, kl = s.loss, divergence[labels[:, 1:] != data.IGNORE].mean()
    else:  # of the answers, picked from the whole logits
        lm, number = distill.lm_loss(s.logits, labels)
        kl, _ = distill.kl_loss(s.logits, t.logits, labels)
        lm, kl = lm / number, kl / number
    adl, count = distill.visual_attention_loss(s_maps, t_maps, rows)
    return {"lm": lm, "kl": kl, "adl": adl / count}


def their_losses(
    student: VLM, teacher: VLM, precision: str, losses_of: str, batch: dict
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step of the straightforward way, and its terms."""
    with compute_dtype(precision, batch["input_ids"].device):
        losses = plain_losses(student, teacher, batch, losses_of)
    return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}


def our_losses(module: train.Step, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """The same as train.py computes them on one device."""
    loss, terms = module(batch, rivals.loss_counts(batch, module.method, module.weights))
    return loss, {name: term.sum.detach() / term.count for name, term in terms.items()}


# ---------------------------------------------------------------- measuring


class Variant:
    """Models, batch and optimizer of one variant, ready for steps; everything on the device is in here.

    flags: of train.py, or of the straightforward way. k: match only the first k of the student's layers,
    0 = all that the flags say.
    """

    def __init__(
        self, flags: list[str] | str, shape: Shape, device: str, precision: str, tune: str, k: int = 0
    ):
        straightforward = isinstance(flags, str)
        if k:  # no flag says how many; Step asks here
            choose = distill.choose_layers
            distill.choose_layers = lambda *which, teacher: choose(*which, teacher)[: None if teacher else k]
        ours = ["--tune", tune, "--precision", precision, *([] if straightforward else flags)]
        args = recipes.parse_args("", ["--stage", "2", "--student", "in memory", *ours])
        c = recipes.configure(args.stage, args, ranks=1)
        self.device, self.pairs = device, "preference" in c.weights
        self.batch = make_batch(shape, device, self.pairs)
        student, teacher = build(shape, device, DTYPES[precision], tune, c.method.taf)
        self.student, self.teacher = student, teacher
        if straightforward:
            teacher.vision, teacher.lm = to_transformers(teacher)
            student.vision, student.lm = to_transformers(student)  # its own copy of the vision encoder
            student.adapter.teacher = copy.deepcopy(teacher.adapter)
            teacher.requires_grad_(False)
        torch.manual_seed(0)  # the same adaptation in every variant
        if not straightforward:
            if c.stage in c.method.sparse:
                add_experts(student)
            prepare_student(student, teacher, c)
        elif tune == "lora":
            student.lm.requires_grad_(False)  # transformers' part is new, embeddings and head trainable
            add_lora(student.lm.model.layers, c.lora_rank, c.lora_alpha, 0.0)
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-5, weight_decay=0.0, fused=True)
        if straightforward:
            self.losses = partial(their_losses, student, teacher, precision, flags)
        else:
            module = train.Step(student, teacher, c.method, c.weights, c.plain, precision)
            self.losses = partial(our_losses, module)
            student.lm.checkpointing = c.gradient_checkpointing
            if c.compile:
                compile_layers(student, teacher)
        weights = {tensor for vlm in (student, teacher) for tensor in vlm.parameters()}
        self.static = sum(tensor.nbytes * (3 if tensor.requires_grad else 1) for tensor in weights)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what is measured begins with models that are built

    def step(self) -> dict:
        """One optimizer step: forward, backward, clipping, AdamW -> seconds, losses, bytes."""
        started = clock(self.device)
        loss, losses = self.losses(self.batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        losses = {name: loss.item() for name, loss in (losses | {"norm": norm}).items()}
        seconds = clock(self.device) - started
        return {
            "seconds": seconds, "losses": losses, "peak": peak_memory(self.device), "static": self.static
        }  # fmt: skip


def worker(pipe, flags: list[str] | str, shape: Shape, options: argparse.Namespace, k: int) -> None:
    """A process that builds one variant and does a step for every message."""
    torch.set_num_threads(options.threads)
    variant = Variant(flags, shape, options.device, options.precision, options.tune, k)
    pipe.send("ready")
    while pipe.recv():
        pipe.send(variant.step())


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(variants: dict[str, tuple], options: argparse.Namespace, between=lambda: None) -> dict[str, dict]:
    """{name: (flags, shape, k)} -> {name: result}; the variants take turns, and each runs `between` first."""
    spawn, workers, replies = torch.multiprocessing.get_context("spawn"), {}, {}

    def answer(name: str):
        try:
            return workers[name][1].recv()
        except EOFError:
            sys.exit(f"{name}: its process stopped, out of memory unless there is a traceback above")

    for name, (flags, shape, k) in variants.items():
        pipe, theirs = spawn.Pipe()
        process = spawn.Process(target=worker, args=(theirs, flags, shape, options, k), daemon=True)
        process.start()
        theirs.close()
        workers[name] = process, pipe
        answer(name)
    for step in range(1 + options.rounds):
        for name, (_, pipe) in workers.items():
            between()
            pipe.send(True)
            replies.setdefault(name, []).append(answer(name))
            print(f"  step {step}, {name}: {replies[name][-1]['seconds']:.3f} s", file=sys.stderr)
    for process, pipe in workers.values():
        pipe.send(False)
        process.join()
    results = {}
    for name, (warm_up, *rows) in replies.items():  # the warm-up's losses are those of the common start
        times, last = [row["seconds"] for row in rows], rows[-1]
        result = {"seconds": statistics.median(times), "times": times, "losses": warm_up["losses"]}
        memory = {"peak_gb": last["peak"] / 1e9, "above_gb": (last["peak"] - last["static"]) / 1e9}
        results[name] = result | memory
    return results


def matmul_rate(M: int, K: int, N: int, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of (M,K) @ (N,K)^T, as nn.Linear multiplies: the median of half a second."""
    x, weight = torch.randn(M, K, device=device, dtype=dtype), torch.randn(N, K, device=device, dtype=dtype)
    repeats, times, end = 20 if device == "cuda" else 1, [], clock(device) + 0.5
    while len(times) < 5 or clock(device) < end:
        started = clock(device)
        for _ in range(repeats):
            F.linear(x, weight)
        times.append((clock(device) - started) / repeats)
    return 2 * M * K * N / statistics.median(times)


def ratio(row: dict, other: dict) -> float:
    """Of their times: the median over the rounds, in each of which the two ran one after the other."""
    return statistics.median(a / b for a, b in zip(row["times"], other["times"]))


def show(rows: list[list[str]]) -> None:
    """A fixed-width table, the first column on the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *cells in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:]))]))


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def about(options: argparse.Namespace) -> str:
    where = f"torch {torch.__version__}, {machine(options.device)}, {options.threads} threads"
    return f"shape {options.shape_name}: {where}, {options.precision}; median of {options.rounds} steps"


def write(options: argparse.Namespace, **results) -> None:
    if options.out:
        names = ("device", "precision", "tune", "threads", "rounds", "shape_name")
        settings = {name: getattr(options, name) for name in names} | {"torch": torch.__version__}
        options.out.write_text(json.dumps(settings | {"shape": asdict(options.shape)} | results, indent=1))


# ---------------------------------------------------------------- step: the main table


def step(options: argparse.Namespace) -> None:
    """Every variant beside ours: in the same rounds on the CPU, one after the other on cuda."""
    shape, rates = options.shape, []
    common, flops = most_common(shape), sum(row[1] for row in count(shape, tune=options.tune))

    def between() -> None:
        rates.append(matmul_rate(*common, options.device, DTYPES[options.precision]))

    def run(*names: str) -> dict[str, dict]:
        return measure({name: (VARIANTS[name], shape, 0) for name in names}, options, between)

    plain, picked, ours, *others = VARIANTS
    if options.device == "cpu":
        groups = [run(plain, ours), run(picked, ours), run(ours, *others)]
    else:
        alone = {name: row for variant in VARIANTS for name, row in run(variant).items()}
        groups = [alone, alone, alone]
    rate = statistics.median(rates)
    floor = flops / rate

    print(f"{about(options)}\n{shape}\nx: as a multiple of ours, round by round")
    table, rows = [["", "s/step", "min-max", "samples/s", "peak GB", "above*", "x time", "x memory"]], {}
    for name in VARIANTS:
        group = next(group for group in reversed(groups) if name in group)
        row = group[name]
        cells = [f"{row['seconds']:.3f}", f"{min(row['times']):.3f}-{max(row['times']):.3f}"]
        cells += [f"{shape.batch / row['seconds']:.3f}", f"{row['peak_gb']:.3f}", f"{row['above_gb']:.3f}"]
        times = ratio(row, group[ours]), row["peak_gb"] / group[ours]["peak_gb"]
        table.append([name, *cells, *(f"{x:.3f}" for x in times)])
        rows[name] = row | dict(zip(("times_ours_time", "times_ours_memory"), times))
    seconds = [f"{floor:.3f}", "", f"{shape.batch / floor:.3f}", "", ""]
    show([*table, ["matmul floor", *seconds, f"{floor / rows[ours]['seconds']:.3f}", ""]])
    print("* above weights and AdamW's moments; on the CPU with what Python and torch hold")
    show_vat(groups[-1])
    product, times = "x".join(map(str, common)), [rows[name]["seconds"] / floor for name in (ours, plain)]
    print(f"floor: {flops / 1e9:,.1f} GFLOP at {rate / 1e9:,.1f} GFLOP/s (matmul {product});", end=" ")
    print(f"ours {times[0]:.2f} times the floor, transformers {times[1]:.2f}")

    agree, tolerance = True, 1e-4 if options.precision == "fp32" else 2e-2
    print(f"first step{'':6}transformers        ours  difference")
    for name, value in rows[plain]["losses"].items():
        other = rows[ours]["losses"][name]
        agree &= math.isclose(value, other, rel_tol=tolerance, abs_tol=tolerance)
        print(f"  {name:12}{value:14.7f}{other:12.7f}{abs(value - other) / abs(value):12.1e}")
    print(f"transformers and ours agree to {tolerance}: {'yes' if agree else 'NO'}")
    write(options, rows=rows, flops=flops, matmul=common, matmul_rates=rates, floor=floor, agree=agree)
    if not agree:
        sys.exit("transformers and ours compute different losses")


def show_vat(rows: dict[str, dict]) -> None:
    none = rows["ours, no VAT"]
    for name, queries in (("ours", "all"), ("ours, text rows", "text")):
        time, memory = ratio(rows[name], none) - 1, rows[name]["peak_gb"] / none["peak_gb"] - 1
        least = min(rows[name]["times"]) / min(none["times"]) - 1
        print(f"VAT adds, {queries} rows: time {time:+.1%} (of the fastest steps {least:+.1%}),", end=" ")
        print(f"memory {memory:+.1%}")


def vat(options: argparse.Namespace) -> None:
    """What VAT adds, and nothing else: a few per cent take many rounds to see."""
    jobs = {name: (VARIANTS[name], options.shape, 0) for name in ("ours", "ours, text rows", "ours, no VAT")}
    rows = measure(jobs, options)
    print(f"{about(options)}\n{options.shape}")
    for name, row in rows.items():
        times = f"{row['seconds']:.3f} s/step, {min(row['times']):.3f} to {max(row['times']):.3f}"
        print(f"  {name:16} {times}, peak {row['peak_gb']:.3f} GB")
    show_vat(rows)
    write(options, rows=rows)


def systems(options: argparse.Namespace) -> None:
    """A step of each other system beside plain KD's, and beside its own with whole matrices (--plain)."""
    table, rows = [["", "s/step", "fastest", "peak GB", "time / KD", "memory / KD"]], {}
    for name, flags in SYSTEMS.items():  # one at a time: together they would not fit
        group = {"kd": SYSTEMS["kd"], name: flags, f"{name}, plain": [*flags, "--plain"]}
        found = measure({name: (flags, options.shape, 0) for name, flags in group.items()}, options)
        for name, row in found.items():
            times = ratio(row, found["kd"]), row["peak_gb"] / found["kd"]["peak_gb"]
            if name not in rows:
                cells = [row["seconds"], min(row["times"]), row["peak_gb"], *times]
                table.append([name, *(f"{x:.3f}" for x in cells)])
                rows[name] = row | dict(zip(("times_kd_time", "times_kd_memory"), times))
    print(f"{about(options)}\n{options.shape}")
    show(table)
    write(options, rows=rows)


# ---------------------------------------------------------------- counting

RANK = 128  # of the low-rank adaptation, recipes' default


def matmuls(shape: Shape, tune: str = "full") -> list[tuple[str, int, int, int, int]]:
    """The matrix products of a step but for attention: (part, M, K, N, times), (M,K) @ (K,N), 2MKN FLOPs."""
    v, s, t = shape.vision, shape.student, shape.teacher
    patches, rows = shape.batch * v.num_patches, shape.batch * shape.tokens
    answers = shape.batch * shape.answers

    def layers(c: QwenConfig) -> list[tuple[int, int, int]]:
        kv = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
        widths = [(c.hidden_size, c.hidden_size, 2), (c.hidden_size, kv, 2)]
        widths += [(c.hidden_size, c.intermediate_size, 2), (c.intermediate_size, c.hidden_size, 1)]
        return [(K, N, times * c.num_hidden_layers) for K, N, times in widths]

    blocks, C, wide = v.num_hidden_layers - 1, v.hidden_size, v.intermediate_size  # z is state -2
    vision = [(v.num_channels * v.patch_size**2, C, 1), (C, C, 4 * blocks)]
    vision += [(C, wide, blocks), (wide, C, blocks)]
    p_t = [(C, t.hidden_size, 1), (t.hidden_size, t.hidden_size, 1)]
    head, teacher_head = [(s.hidden_size, s.vocab_size, 1)], [(t.hidden_size, t.vocab_size, 1)]
    forward = [
        (f"SigLIP, {blocks} of {v.num_hidden_layers} blocks, once", patches, vision),
        ("P_t, once", patches, p_t),
        ("P_s", patches, [(t.hidden_size, s.hidden_size, 1)]),
        ("teacher layers", rows, layers(t)),
        ("student layers", rows, layers(s)),
        ("teacher head, answers only", answers, teacher_head),
        ("student head, answers only", answers, head),
    ]
    products = [(part, M, K, N, times) for part, M, widths in forward for K, N, times in widths]
    if tune == "lora":
        for K, N, times in layers(s):
            products += [("LoRA", rows, K, RANK, times), ("LoRA", rows, RANK, N, times)]
    trained = ("student", "P_s") if tune == "full" else ("LoRA", "P_s")
    for part, M, K, N, times in list(products):
        if part.startswith(trained):
            products.append((f"{part}, backward", K, M, N, times))  # of the weights
        if part.startswith(("student", "LoRA")):
            products.append((f"{part}, backward", M, N, K, times))  # of the input
    return products


def attention(shape: Shape, queries: str = "all") -> list[tuple[str, int, int, int]]:
    """Attention: (part, FLOPs of what is seen, FLOPs if causality saves nothing, bytes without maps)."""
    v, s, t, B, T = shape.vision, shape.student, shape.teacher, shape.batch, shape.tokens
    P = v.num_patches
    first = {"all": shape.before, "text": shape.before + P}[queries]  # the first row that VAT looks at
    k = len(distill.understanding_layers(s.num_hidden_layers))
    m = len(distill.understanding_layers(t.num_hidden_layers))

    def term(part: str, width: int, layers: int, products: int, units: int, start: int = 0, maps: int = 0):
        full, seen = (T - start) * T, (T * (T + 1) - start * (start + 1)) // 2  # pairs of query and key
        moved = T * width * units + maps * (T - start) * P
        return part, *(2 * B * n * width * layers * products for n in (seen, full)), 4 * B * layers * moved

    blocks = v.num_hidden_layers - 1
    siglip = 4 * B * P * P * v.hidden_size * blocks
    return [  # products of (T,D) and (D,T), or the like; units: (T,C) matrices read and written
        ("SigLIP attention", siglip, siglip, 16 * B * P * v.hidden_size * blocks),
        term("teacher attention", t.hidden_size, t.num_hidden_layers, 2, 4),
        term("student attention", s.hidden_size, s.num_hidden_layers, 2, 4),
        term("student attention, backward", s.hidden_size, s.num_hidden_layers, 4, 8),
        term("VAT teacher, QK^T", t.hidden_size, m, 1, 2, first, maps=1),
        term("VAT student, QK^T, again, 2 backward", s.hidden_size, k, 4, 8, first, maps=3),
    ]


def count(shape: Shape, queries: str = "all", tune: str = "full") -> list[tuple[str, int, int, int]]:
    """Matmuls by part, then attention: (part, FLOPs, FLOPs if causality saves nothing, bytes). A matmul's
    operands are read once and its result is written once.
    """
    flops, moved = Counter(), Counter()
    for part, M, K, N, times in matmuls(shape, tune):
        flops[part] += 2 * M * K * N * times
        moved[part] += 4 * (M * K + K * N + M * N) * times
    return [(part, flops[part], flops[part], moved[part]) for part in flops] + attention(shape, queries)


def most_common(shape: Shape) -> tuple[int, int, int]:
    """The (M,K,N) on which a step spends most FLOPs."""
    flops = Counter()
    for _, M, K, N, times in matmuls(shape):
        flops[M, K, N] += M * K * N * times
    return flops.most_common(1)[0][0]


def trained(shape: Shape, tune: str = "full") -> int:
    """Parameters of P_s, and of the student's language model or its low-rank adaptation."""
    with torch.device("meta"):
        modules = Qwen(shape.student), nn.Linear(shape.teacher.hidden_size, shape.student.hidden_size)
    lm, p_s = (sum(p.numel() for p in module.parameters()) for module in modules)
    if tune == "lora":
        lm = sum(K * N * times for part, _, K, N, times in matmuls(shape, tune) if part == "LoRA")
    return lm + p_s


def floor(options: argparse.Namespace) -> None:
    """FLOPs (two per multiply-add) and bytes (float32) of a step, in a table."""
    shape, rows = options.shape, count(options.shape, tune=options.tune)
    s, t, B, T = shape.student, shape.teacher, shape.batch, shape.tokens
    total, full, moved = [sum(column) for column in list(zip(*rows))[1:]]
    unit, scale = ("TFLOP", 1e12) if total > 1e13 else ("GFLOP", 1e9)
    flops = {part: seen / scale for part, seen, _, _ in rows}
    parameters = trained(shape, options.tune)
    print(f"{shape}; {parameters:,} parameters trained")
    table = [[p, f"{seen / scale:.2f}", f"{seen / total:.1%}", f"{n / 1e9:.2f}"] for p, seen, _, n in rows]
    table.append(["total, the causal half of attention", f"{total / scale:.2f}", "", f"{moved / 1e9:.2f}"])
    table.append(["total, attention counted whole", f"{full / scale:.2f}", "", ""])
    again = total / scale + flops["student layers"] + flops["student attention"]
    table.append(["total, student layers computed again", f"{again:.2f}", "", ""])
    show([["", unit, "share", "GB moved"], *table])
    vat = [sum(row[1] for row in count(shape, q) if row[0].startswith("VAT")) for q in ("all", "text")]
    print(f"VAT: all rows {vat[0] / total:.1%} of the total, text rows {vat[1] / total:.1%}")
    print(f"AdamW, beside it: {28 * parameters / 1e9:.2f} GB moved (7 x 4 bytes a trained parameter)")
    print(f"most FLOPs in one shape of matmul: {'x'.join(map(str, most_common(shape)))}")
    twice = sum(value for part, value in flops.items() if part.startswith(("SigLIP", "P_t")))
    heads = sum(value for part, value in flops.items() if "head" in part) * (T / shape.answers - 1)
    maps = [4 * B * c.num_hidden_layers * c.num_attention_heads * T * T / 1e9 for c in (s, t)]
    logits = [4 * B * T * c.vocab_size / 1e9 for c in (s, t)]
    print("the way of whole maps and whole logits would add (float32; student, teacher):")
    print(f"  SigLIP and P_t again {twice:.2f} {unit}, heads on all tokens {heads:.2f} {unit}")
    print(f"  maps (L,B,H,T,T) {maps[0]:.2f}, {maps[1]:.2f} GB, as much again where they are stacked")
    print(f"  logits (B,T,V) {logits[0]:.2f}, {logits[1]:.2f} GB")


# ---------------------------------------------------------------- scaling


def scaling(options: argparse.Namespace) -> None:
    """What VAT adds (all rows) as visual tokens, batch and matched student layers grow, one at a time.

    With and without it take turns. Freed memory goes back to the system at once here (glibc's setting below,
    which costs time in both), so that the largest resident set is the most that was in use.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    shape, depth = options.shape, options.shape.student.num_hidden_layers
    usual = len(distill.understanding_layers(depth))
    sides = (14, 27, 40) if options.shape_name != "small" else (2, 4, 8)  # in patches
    names = ["s/step", "no VAT", "VAT adds s", "peak GB", "no VAT, GB", "VAT adds GB"]
    series = {
        "visual tokens": [(side**2, shape.batch, usual) for side in sides],
        "batch": [(sides[1] ** 2, batch, usual) for batch in (1, 2, 4)],
        "matched layers": [(sides[1] ** 2, shape.batch, k) for k in sorted({1, 3, usual, depth})],
    }
    points = {}
    for P, B, k in dict.fromkeys(sum(series.values(), [])):
        size = shape.vision.patch_size * math.isqrt(P)
        at, name = replace(shape, vision=replace(shape.vision, image_size=size), batch=B), f"P {P}, B {B}"
        flags = ["--layers", "all"] if k == depth else []
        jobs = {f"{name}, k {k}": (flags, at, k), f"{name}, no VAT": (["--vat-loss", "none"], at, 0)}
        row, without = measure(jobs, options).values()
        pairs = [(row[key], without[key]) for key in ("seconds", "peak_gb")]
        points[P, B, k] = dict(zip(names, [x for vat, none in pairs for x in (vat, none, vat - none)]))

    print(f"{about(options)}\n{shape}\nP visual tokens, B samples, k matched layers of the student")
    cells = [[*map(str, point), *(f"{v:.3f}" for v in row.values())] for point, row in points.items()]
    show([["P", "B", "k", *names], *cells])
    print("growth: exponents, the slope in log-log (-: VAT adds nothing measurable somewhere)")
    table = [["over", *(names[i] for i in (0, 2, 3, 5))]]
    for axis, (name, keys) in enumerate(series.items()):
        x = [key[axis] for key in keys]
        fits = [slope(x, [points[key][column] for key in keys]) for column in table[0][1:]]
        table.append([f"{name} {', '.join(map(str, x))}", *("-" if e is None else f"{e:.2f}" for e in fits)])
    show(table)
    rows = [{"P": P, "B": B, "k": k, **row} for (P, B, k), row in points.items()]
    write(options, points=rows, exponents=table)


def slope(x: list[float], y: list[float]) -> float | None:
    """The exponent a of y ~ x^a by least squares, None where something is not positive (noise)."""
    if len(x) < 2 or min(y) <= 0:
        return None
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


# ---------------------------------------------------------------- data


def data_rate(options: argparse.Namespace) -> None:
    """JPEGs of 640x480 -> samples/s of LlavaDataset and collate, with 0, 1 and 2 workers."""
    from PIL import Image

    number, generator = 64, torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        records, ramp = [], torch.linspace(0, 160, 640).expand(480, 640)
        for i in range(number):
            noise = torch.rand(480, 640, 3, generator=generator) * 90
            pixels = (noise + torch.stack([ramp, ramp.flip(1), 160 - ramp], -1)).byte()
            Image.fromarray(pixels.numpy()).save(Path(folder) / f"{i}.jpg", quality=90)
            question = {"from": "human", "value": "<image>\nWhat is in the picture?"}
            answer = {"from": "gpt", "value": "A grey and noisy picture. " * 15}
            records.append({"id": i, "image": f"{i}.jpg", "conversations": [question, answer]})
        (Path(folder) / "data.json").write_text(json.dumps(records))
        tokenizer, P = data.load_tokenizer(ROOT / "tiny" / "student"), (options.size // 14) ** 2
        dataset = data.LlavaDataset(Path(folder) / "data.json", folder, tokenizer, P, options.size)
        print(f"{number} JPEGs of 640x480 to {options.size}x{options.size}, batches of 8")
        for workers in (0, 1, 2):
            loader = torch.utils.data.DataLoader(
                dataset, 8, collate_fn=data.collate, num_workers=workers, persistent_workers=workers > 0
            )
            rates = []
            for _ in range(4):  # the first starts the workers
                started = time.perf_counter()
                for _ in loader:
                    pass
                rates.append(number / (time.perf_counter() - started))
            print(f"{workers} workers: {statistics.median(rates[1:]):.1f} samples/s")


# ---------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rounds in ("step", 3), ("vat", 8), ("systems", 3), ("scaling", 2), ("floor", 0):
        command = commands.add_parser(name)
        command.add_argument("--shape", choices=list(SHAPES), default="cpu", help="(default: %(default)s)")
        command.add_argument("--batch", type=number(int, 1), help="samples (default: the shape's)")
        command.add_argument("--tune", choices=["full", "lora"], default="full", help="(default: full)")
        if rounds:
            command.add_argument(
                "--rounds", type=number(int, 1), default=rounds, help="(default: %(default)s)"
            )
            command.add_argument("--threads", type=number(int, 1, 1024), default=torch.get_num_threads())
            command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
            command.add_argument("--precision", choices=list(DTYPES), default="fp32")
            command.add_argument("--out", type=Path, help="write all numbers there, JSON")
    commands.add_parser("data").add_argument(
        "--size", type=number(int, 14, 1e4), default=384, help="(default: %(default)s)"
    )
    with one_sentence("stopped"):
        options = parse(parser)
        if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            raise BadInput("torch sees no GPU here; leave --device out")
        if getattr(options, "out", None):
            check_output(options.out, b"{")
        run(options)


def run(options: argparse.Namespace) -> None:
    if options.command != "data":
        shape = SHAPES[options.shape]
        options.shape_name, options.shape = options.shape, replace(shape, batch=options.batch or shape.batch)
    if "threads" in options:
        torch.set_num_threads(options.threads)
    commands = {"step": step, "vat": vat, "systems": systems, "floor": floor, "scaling": scaling}
    (commands | {"data": data_rate})[options.command](options)


if __name__ == "__main__":
    main()
