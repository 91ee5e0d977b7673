"""What only a GPU can say, in one run of minutes: is it right there, how fast, how much memory.

    python bench/gpu.py --out gpu.jsonl                               # all parts, one GPU
    python bench/gpu.py --out gpu.jsonl --parts real kernels          # some of them
    python bench/gpu.py --out cpu.jsonl --device cpu --shape small    # whether it would run, without a GPU

Nothing is fetched: random weights of the real sizes, the tiny models, synthetic pictures. Each part is a
process with a time limit; it adds a row of JSON to --out as soon as it has it, so that a part that fails (its
traceback is a row) or is stopped loses no other. In the order of what they are worth:

    right     golden checkpoints and losses, plain and lean steps, 50 steps beside the CPU's, chat, resuming
              (bench/gpu_right.py)
    ranks     torchrun with one rank: DDP and FSDP train what no torchrun trains, save, and go on
    real      Qwen1.5-4B -> 1.8B: seconds, memory, MFU (model FLOPs utilization) of ours and of the
              straightforward way with transformers (bench/step.py), at batches up to 32 or what fits
    systems   steps of the paper's other systems at those sizes (rivals.py), lean and plain, beside KD's
    budget    the scripts in runs/, with the memory of one 24 GB card
    repeat    whether the real pair's steps repeat to the bit
    kernels   where the time of a step goes, with and without attention alignment
    scoring   items a second of eval.py at the size of the 1.8B student, beside one answer at a time
    compiled  torch.compile beside none
    tiny      python -m tiny with a quarter of its steps: seconds

A GPU's memory is what torch's allocator held at most. bench/gpu_report.py makes tables of the rows.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import scoring  # noqa: E402
from bench.gpu_report import read_rows  # noqa: E402
from bench.gpu_right import command, ranks, right  # noqa: E402
from bench.step import (  # noqa: E402
    SHAPES,
    SYSTEMS,
    Shape,
    Variant,
    count,
    machine,
    make_batch,
    matmul_rate,
    most_common,
    qwen,
)
from support.errors import BadInput  # noqa: E402
from support.program import commit, number, one_sentence, parse  # noqa: E402
from support.world import make_world  # noqa: E402
from training.log import append  # noqa: E402

# ---------------------------------------------------------------- real: speed and memory of the real pair


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measured(variant: Variant, shape: Shape, warm_up: int = 1) -> dict | None:
    """After the warm-up at least three steps of this batch, on a GPU for a second if they are short -> a row.

    None where memory does not hold them.
    """
    seconds = 1.0 if variant.device == "cuda" else 0.0
    release(variant.device)
    try:
        variant.batch = make_batch(shape, variant.device, variant.pairs)
        if variant.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, *_ = [variant.step() for _ in range(warm_up)]
        steps = [variant.step() for _ in range(3)]
        while sum(step["seconds"] for step in steps) < seconds and len(steps) < 10:
            steps.append(variant.step())
    except torch.OutOfMemoryError:
        return None
    finally:
        variant.optimizer.zero_grad(set_to_none=True)
    times, last = sorted(step["seconds"] for step in steps), steps[-1]
    middle = times[len(times) // 2]
    return {
        "batch": shape.batch, "s_per_step": middle, "fastest": times[0], "slowest": times[-1],
        "samples_per_s": shape.batch / middle, "peak_gb": last["peak"] / 1e9,
        "above_gb": (last["peak"] - last["static"]) / 1e9, "first_s": first["seconds"],
        "losses": first["losses"],
    }  # fmt: skip


def rates(o: argparse.Namespace) -> dict:
    """A row: what this card multiplies a second, in a large product and in the step's most common one."""
    side, common = 8192 if o.device == "cuda" else 256, most_common(replace(o.shape, batch=4))
    large, often = (matmul_rate(*x, o.device, torch.bfloat16) for x in ((side,) * 3, common))
    shape = str(o.shape).partition(" x ")[2]  # the batch varies
    return {
        "what": f"{machine(o.device)}, torch {torch.__version__}, {shape}",
        "large_matmul_tflops": large / 1e12,
        f"matmul_{'x'.join(map(str, common))}_tflops": often / 1e12,
    }


CHECKPOINTING, NO_VAT, TEXT = ["--gradient-checkpointing"], ["--vat-loss", "none"], ["--vat-queries", "text"]
REAL = {  # tuning -> variant -> flags, batches: up to the first that does not fit
    "lora": {
        "ours": ([], (1, 4, 16, 32)),
        "transformers": ("all", (1, 4, 8, 16)),
        "ours, no VAT": (NO_VAT, (1, 4, 16, 32)),
        "ours, checkpointing": (CHECKPOINTING, (4, 8, 32)),
        "transformers, answers": ("answers", (16, 32)),
        "ours, text rows": (TEXT, (16,)),
    },
    "full": {
        "ours": ([], (4, 8, 16, 32)),
        "transformers": ("all", (4, 8, 16)),
        "ours, no VAT": (NO_VAT, (4, 16)),
        "ours, checkpointing": (CHECKPOINTING, (8, 32)),
    },
}


def real(o: argparse.Namespace) -> Iterator[dict]:
    yield rates(o)
    for tune, ways in REAL.items():
        for name, (flags, batches) in ways.items():
            yield from points(o, tune, name, flags, batches)


def points(
    o: argparse.Namespace,
    tune: str,
    name: str,
    flags: list[str] | str,
    batches: tuple,
    warm_up: int = 1,
    counted: bool = True,
) -> Iterator[dict]:
    """One variant at growing batches, up to the first that does not fit; `counted`: with a step's FLOPs."""
    name = f"{tune}, {name}"
    release(o.device)
    try:
        variant = Variant(flags, o.shape, o.device, "bf16", tune)
    except torch.OutOfMemoryError:
        yield {"what": name, "batch": min(batches), "fits": False}
        return
    for batch in batches if o.device == "cuda" else batches[:2]:
        shape = replace(o.shape, batch=batch)
        row = measured(variant, shape, warm_up)
        if row is None:
            yield {"what": name, "batch": batch, "fits": False}
            return
        flops = {}
        if counted:
            parts = count(shape, "text" if flags == TEXT else "all", tune)
            parts = [part for part in parts if flags != NO_VAT or "VAT" not in part[0]]
            flops = {"tflop": sum(part[1] for part in parts) / 1e12}
        yield {"what": name, **flops, **row}


def systems(o: argparse.Namespace) -> Iterator[dict]:
    """Each method's steps at two batches, with LoRA also --plain; of pairs, both answers are in the batch."""
    yield rates(o)
    batches = (4, 16) if o.device == "cuda" else (2,)
    for name, flags in SYSTEMS.items():
        yield from points(o, "lora", name, flags, batches, counted=False)
        yield from points(o, "lora", f"{name}, plain", [*flags, "--plain"], batches, counted=False)
        yield from points(o, "full", name, flags, batches, counted=False)


def compiled(o: argparse.Namespace) -> Iterator[dict]:
    yield rates(o)
    yield from points(o, "lora", "ours, eager", [], (32,))
    yield from points(o, "lora", "ours, compiled", ["--compile"], (32,), warm_up=2)


def repeatable(o: argparse.Namespace) -> Iterator[dict]:
    """Whether three steps of the real pair give the same bits twice, and what it costs to make sure."""
    shape = replace(o.shape, batch=2)
    for sure in (False, True):
        torch.use_deterministic_algorithms(sure, warn_only=True)
        weights, seconds = [], []
        for _ in range(2):
            release(o.device)
            variant = Variant([], shape, o.device, "bf16", "lora")
            seconds += [variant.step()["seconds"] for _ in range(3)][1:]
            weights.append([parameter.detach().clone() for parameter in variant.parameters])
            del variant
        same = sum(map(torch.equal, *weights))
        how = "with torch.use_deterministic_algorithms" if sure else "as it is"
        yield {"what": how, "tensors": len(weights[0]), "same": same, "s_per_step": min(seconds)}
    torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------- budget: one card of 24 GB

SMALL_STUDENT = replace(qwen(1024, 24, 16, 2816), tie_word_embeddings=True)  # Qwen1.5-0.5B


def budget(o: argparse.Namespace) -> Iterator[dict]:
    """Steps of runs/*.sh: 1,536 tokens, gradient checkpointing, bf16, 24 GB less what CUDA itself takes."""
    long = half = o.shape
    if o.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(23.5e9 / total)
        long = replace(o.shape, text=1536 - o.shape.vision.num_patches, answers=500)
        half = replace(long, student=SMALL_STUDENT)
    for name, shape, tune, batches in (
        ("4B to 0.5B", half, "full", (4, 8)),
        ("4B to 1.8B", long, "lora", (4, 8)),
        ("4B to 0.5B", half, "lora", (4, 32)),
    ):
        release(o.device)
        variant = Variant(CHECKPOINTING, shape, o.device, "bf16", tune)
        for B in batches:
            row = measured(variant, replace(shape, batch=B))
            yield {"what": f"{name}, {tune}", **(row or {"batch": B, "fits": False})}
            if row is None or o.device == "cpu":
                break
        del variant
    if o.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---------------------------------------------------------------- kernels


def kernels(o: argparse.Namespace) -> Iterator[dict]:
    """The ten kernels that take most of a step, with and without attention alignment."""
    from torch.profiler import ProfilerActivity, profile

    shape = replace(o.shape, batch=4 if o.device == "cuda" else 1)
    for name, flags in (("ours", []), ("ours, no VAT", NO_VAT)):
        release(o.device)
        variant = Variant(flags, shape, o.device, "bf16", "full")
        variant.step()
        on_gpu = [ProfilerActivity.CUDA] if o.device == "cuda" else []
        with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiled:
            seconds = variant.step()["seconds"]
        del variant
        kinds = [
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
            for event in profiled.key_averages()
            if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA and "#" not in event.key
        ]
        busy = sum(kind[0] for kind in kinds)
        top = [
            {"ms": us / 1e3, "share": us / max(busy, 1), "calls": calls, "kernel": key[:110]}
            for us, calls, key in sorted(kinds, reverse=True)[:10]
        ]
        yield {
            "what": f"full, {name}", "batch": shape.batch, "ms_profiled": 1e3 * seconds,
            "ms_of_kernels": busy / 1e3, "launches": sum(kind[1] for kind in kinds), "top": top,
        }  # fmt: skip


# ---------------------------------------------------------------- scoring


def scored(o: argparse.Namespace) -> Iterator[dict]:
    """SugarCrepe-shaped items a second, random weights of the student's size, bf16."""
    shape = replace(o.shape, teacher=o.shape.student)
    vlm = scoring.random_model(shape, o.device, torch.bfloat16)
    many, few, sizes = (256, 4, (32, 128)) if o.device == "cuda" else (4, 2, (4,))
    ways = {"one answer at a time": (few, scoring.one_at_a_time)}
    for size in sizes:
        ways[f"choice, {size} at a time"] = many, partial(scoring.batched, scorer="choice", size=size)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world", tune=1, pretrain=1, per_kind=max(10, many // 7))
        for kind in ("captions", "yes/no"):
            asked = scoring.questions(world, kind, many)
            for name, (items, way) in ways.items():
                way(vlm, asked[:1])  # warm-up
                started = time.perf_counter()
                way(vlm, asked[:items])
                rate = items / (time.perf_counter() - started)
                yield {"what": f"{kind}: {name}", "items": items, "items_per_s": rate}


# ---------------------------------------------------------------- tiny


def tiny(o: argparse.Namespace) -> Iterator[dict]:
    """The main job with a quarter of its steps."""
    steps = 375 if o.device == "cuda" else 15
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        text = command("-m", "tiny", "--out", folder, "--steps", steps)
        seconds = time.perf_counter() - started
    yield {"what": f"python -m tiny --steps {steps}", "seconds": seconds, "said": text[-1800:]}


# ---------------------------------------------------------------- command line

PARTS = {  # name: function, seconds it may take; the first two run side by side
    "right": (right, 150),
    "ranks": (ranks, 75),
    "real": (real, 105),
    "repeat": (repeatable, 20),
    "systems": (systems, 270),
    "budget": (budget, 30),
    "kernels": (kernels, 30),
    "scoring": (scored, 30),
    "compiled": (compiled, 55),
    "tiny": (tiny, 55),
}


def add_row(o: argparse.Namespace, row: dict) -> None:
    append(o.out, row)
    print(" ".join(f"{name} {brief(value)}" for name, value in row.items()), flush=True)


def brief(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text:.300}".replace("\n", " | ")


def one_part(name: str, o: argparse.Namespace) -> None:
    started = time.perf_counter()
    try:
        for row in PARTS[name][0](o):
            add_row(o, {"part": name, "at": round(time.perf_counter() - started, 1), **row})
    except Exception:
        add_row(o, {"part": name, "error": traceback.format_exc()[-3000:]})


def side_by_side(names: list[str], o: argparse.Namespace, folder: str) -> None:
    """Each part as a process, at the same time, until all have ended or their time is up.

    folder: of what they write; some leave it when they are killed.
    """
    own = ["--out", o.out, "--device", o.device, "--shape", o.shape_name]
    argv = [sys.executable, __file__, *own, "--inside", "--parts"]
    how = {"start_new_session": True, "env": os.environ | {"TMPDIR": folder}}
    running = {name: subprocess.Popen([*map(str, argv), name], **how) for name in names}
    started = time.perf_counter()
    try:
        for name, process in running.items():
            left = o.patience * PARTS[name][1] - (time.perf_counter() - started)
            try:
                if code := process.wait(max(left, 0.1)):
                    add_row(o, {"part": name, "error": f"its process ended with {code}"})
            except subprocess.TimeoutExpired:
                add_row(o, {"part": name, "error": f"stopped after {time.perf_counter() - started:.0f} s"})
    finally:  # whatever ends this process, too
        for process in running.values():
            end(process)
    print(f"{', '.join(names)}: {time.perf_counter() - started:.0f} s", flush=True)


def end(process: subprocess.Popen) -> None:
    """End a part and all that it has started; torchrun ends its workers, which are in other sessions."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(3)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="rows are added to this file, JSON lines")
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="(default: all)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="(default: %(default)s)")
    add("--shape", choices=list(SHAPES), default="real", help="of the models (default: %(default)s)")
    add("--patience", type=number(float, 0.01), default=1.0, help="times each part's seconds (default: 1)")
    add("--inside", action="store_true", help="all in this process, without limits")
    with one_sentence("stopped"):
        measure_parts(parse(parser))


def measure_parts(o: argparse.Namespace) -> None:
    if o.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("torch sees no GPU here; --device cpu --shape small shows whether all of this runs")
    o.shape_name, o.shape = o.shape, SHAPES[o.shape]
    if o.inside:
        for name in o.parts:
            one_part(name, o)
        return
    before = len(read_rows(o.out)) if o.out.exists() else 0
    add_row(o, {"part": "start", "card": machine(o.device), "torch": torch.__version__, "commit": commit()})
    together = [name for name in ("right", "ranks") if name in o.parts]  # no load for a GPU
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for names in [together, *([name] for name in o.parts if name not in together)]:
            if names:
                side_by_side(names, o, folder)
    rows = read_rows(o.out)[before:]
    if bad := [row.get("what", row["part"]) for row in rows if "error" in row or not row.get("ok", True)]:
        raise BadInput(f"{o.out} says what failed or was stopped: {', '.join(bad)}")


if __name__ == "__main__":
    main()
