"""What only a GPU can say, in one run of minutes: is it right there, how fast, how much memory.

    python bench/gpu.py --out gpu.jsonl                               # all parts, one GPU
    python bench/gpu.py --out gpu.jsonl --parts real kernels          # some of them
    python bench/gpu.py --out cpu.jsonl --device cpu --shape small    # whether it would run, without a GPU

Nothing is fetched: random weights of the real sizes, the tiny models, synthetic pictures. Each part is a
process with a time limit; it adds a row of JSON to --out as soon as it has it, so that a part that fails (its
traceback is a row) or is stopped loses no other. In the order of what they are worth:

    right     golden checkpoints and losses, plain and lean steps, 50 steps beside the CPU's, chat, resuming
    ranks     torchrun with one rank: DDP and FSDP train what no torchrun trains, save, and go on
    real      Qwen1.5-4B -> 1.8B: seconds, memory, MFU (model FLOPs utilization) of ours and of the
              straightforward way with transformers (bench/step.py), at batch 1, 4 and the largest that fits
    budget    the scripts in runs/, with the memory of one 24 GB card
    repeat    whether the real pair's steps repeat to the bit
    kernels   where the time of a step goes, with and without attention alignment
    scoring   items a second of eval.py at the size of the 1.8B student, beside one answer at a time
    compiled  torch.compile beside none
    tiny      python -m tiny, then its story: minutes

Shapes: B samples, T tokens. A GPU's memory is what torch's allocator held at most.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402
import model  # noqa: E402
from bench import scoring  # noqa: E402
from bench.step import SHAPES, Shape, Variant, count, make_batch, matmul_rate, most_common, qwen  # noqa: E402
from data import IMAGE_TOKEN  # noqa: E402
from model import DTYPES  # noqa: E402
from support.program import number  # noqa: E402
from support.world import TINY, make_world  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
QUESTIONS = ("What colour is the circle?", "How many shapes are there?", "Is there a red square?")


def command(*words, cpu: bool = False, stdin: str = "") -> str:
    """The output of a program of ours. RuntimeError with the end of what it said where it fails."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    environment = os.environ | hidden | {"OMP_NUM_THREADS": "2", "COLUMNS": "80"}
    argv = [sys.executable, *map(str, words)]
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv[1:])}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}")
    return done.stdout


def losses_of(run: Path) -> dict[int, list[float]]:
    """The log of a stage -> {step: its losses and gradient norm}."""
    rows = [json.loads(line) for line in run.with_suffix(".jsonl").read_text().splitlines()]
    return {
        row["step"]: [row[name] for name in ("lm", "kl", "adl", "grad_norm") if name in row] for row in rows
    }


def largest_difference(a: dict, b: dict) -> float:
    """Of the losses of two runs, relative."""
    return max(abs(x - y) / abs(y) for step in b for x, y in zip(a[step], b[step]))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, computed on the CPU in float64."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------- right: the same numbers as elsewhere


def right(o: argparse.Namespace) -> Iterator[dict]:
    yield from golden_logits(o.device)
    yield from golden_losses(o.device)
    yield from forms(o.device)
    with tempfile.TemporaryDirectory() as folder:
        yield from trained(Path(folder))
        yield from answered(Path(folder), o.device)


@torch.no_grad()
def golden_logits(device: str) -> Iterator[dict]:
    """Checkpoints whose logits transformers and the released code computed on a CPU in float32."""
    released = load_file(GOLDEN / "released_layout_expected.safetensors")
    llava = load_file(GOLDEN / "hf_llava_expected.safetensors")
    places = torch.full((1, 8), IMAGE_TOKEN)
    released["input_ids"] = torch.cat([released["ids_before_image"], places, released["ids_after_image"]], 1)
    golden = {"released_layout": released, "hf_llava_layout": llava, "hf_llava_layout_2024": llava}
    for layout, expected in golden.items():
        for precision, dtype in DTYPES.items():
            vlm = model.load(GOLDEN / layout, dtype, device)
            logits = vlm(expected["input_ids"].to(device), expected["pixel_values"].to(device)).logits
            worst = (logits.float().cpu() - expected["logits"]).abs().max().item()
            share = relative(logits, expected["logits"])
            ok = worst < 1e-4 if precision == "fp32" else share < 3e-2
            yield {"what": f"{layout}, {precision}", "max_abs": worst, "relative": share, "ok": ok}


def golden_losses(device: str) -> Iterator[dict]:
    """tests/test_distill.py's golden values of the losses."""
    expected = json.loads((GOLDEN / "losses.json").read_text())
    for precision, dtype in DTYPES.items():
        given = load_file(GOLDEN / "losses.safetensors")
        given = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in given.items()}
        columns, mask = torch.arange(4, 16, device=device).repeat(2, 1), torch.ones(2, 23, dtype=torch.bool)
        mask[1, 20:] = False
        whole = {"attention_mask": mask.to(device), "visual_columns": columns}
        batch = whole | {"has_image": torch.ones(2, dtype=torch.bool, device=device)}
        maps = [
            {i: distill.visual_map(A, columns) for i, A in enumerate(given[name])}
            for name in ("student_maps", "teacher_maps")
        ]
        rows = distill.query_rows(batch, "all")
        targets = distill.matched_targets(*maps, rows, "group")
        labels, logits = given["labels"], (given["student_logits"], given["teacher_logits"])
        terms = {
            "vat_cosine_paper_padded": ("cosine", "all"),
            "vat_rowwise_all": ("cosine-rows", "all"),
            "vat_rowwise_text": ("cosine-rows", "text"),
            "vat_kl_rows_all": ("kl", "all"),
            "vat_mse_rows_all": ("mse", "all"),
        }
        terms = {
            name: distill.visual_attention_loss(
                maps[0].values(), targets, distill.query_rows(batch, which), kind
            )
            for name, (kind, which) in terms.items()
        }
        terms["lm_cross_entropy"] = distill.lm_loss(logits[0], labels)
        terms["kl_shifted"] = distill.kl_loss(*logits, labels)
        off = {name: abs((x.sum / x.count).item() - expected[name]) for name, x in terms.items()}
        tolerance = 1e-4 if precision == "fp32" else 2e-2
        yield {"what": f"golden losses, {precision}", "off": off, "ok": max(off.values()) < tolerance}


def forms(device: str) -> Iterator[dict]:
    """One step of a small pair: lean, plain and transformers; and what has no deterministic kernel."""
    for precision in DTYPES:
        ways = {"lean": [], "plain": ["--plain"], "transformers": "answers"}
        losses = {
            name: Variant(how, SHAPES["small"], device, precision, "full").step()["losses"]
            for name, how in ways.items()
        }
        off = {
            other: max(abs(losses["lean"][k] - v) / abs(v) for k, v in losses[other].items())
            for other in ("plain", "transformers")
        }
        ok = max(off.values()) < (1e-4 if precision == "fp32" else 5e-2)
        yield {"what": f"a step in three forms, {precision}", "off": off, "losses": losses["lean"], "ok": ok}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        for precision in DTYPES:
            Variant([], SHAPES["small"], device, precision, "full").step()
        torch.use_deterministic_algorithms(False)
    kernels = sorted({str(w.message).split(" does not")[0] for w in said if "determinis" in str(w.message)})
    yield {"what": "kernels of a step without a deterministic form", "kernels": kernels}


def trained(folder: Path) -> Iterator[dict]:
    """The tiny world, stage 2: this device beside the CPU; a stopped run beside one in one piece."""
    make_world(folder / "world", tune=600, pretrain=300, per_kind=2)
    command("train.py", "--stage", 1, "--out", folder, "--name", "first", "--steps", 20)

    def stage2(name: str, *flags, cpu: bool = False) -> Path:
        start = ["--student", folder / "first/stage1", "--out", folder, "--name", name, "--log-every", 10]
        command("train.py", "--stage", 2, *start, *flags, cpu=cpu)
        return folder / name / "stage2"

    def stopped(name: str, *flags) -> Path:
        stage2(name, *flags, "--stop-after", 10)
        return stage2(name, *flags)

    bits, fifty = {}, {}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for precision in DTYPES:
            flags = "--precision", precision, "--steps", 50
            fifty[precision] = pool.submit(stage2, precision, *flags)
            flags = *flags[:3], 20
            bits[precision] = [
                pool.submit(stopped, f"stopped-{precision}", *flags),
                *(pool.submit(stage2, f"whole-{precision}-{i}", *flags) for i in (0, 1)),
            ]
        on_cpu = losses_of(pool.submit(stage2, "cpu", "--steps", 50, cpu=True).result())
        for precision, run in fifty.items():
            here = losses_of(run.result())
            off = largest_difference(here, on_cpu)
            ok = off < (1e-2 if precision == "fp32" else 0.2)
            yield {
                "what": f"50 steps beside the CPU's, {precision}",
                "off": off,
                "here": here,
                "cpu": on_cpu,
            } | {"ok": ok}
        for precision, runs in bits.items():
            digests = [sha256((run.result() / "model.safetensors").read_bytes()).hexdigest() for run in runs]
            names = {"stopped_is_whole": digests[0] == digests[1], "whole_is_whole": digests[1] == digests[2]}
            weights = [load_file(run.result() / "model.safetensors") for run in runs]
            off = max((weights[0][k] - v).abs().max().item() for k, v in weights[1].items())
            yield {"what": f"resumed, {precision}", **names, "max_abs": off, "ok": names["stopped_is_whole"]}


def answered(folder: Path, device: str) -> Iterator[dict]:
    """The shipped student's words, here and on the CPU, and through the chat program."""
    pictures = sorted((folder / "world/images").glob("test-*.png"))[:8]
    words = []
    for where in (device, "cpu"):
        vlm = model.load(TINY / "compodistill", device=where)
        words.append([vlm.answer(picture, text) for picture in pictures for text in QUESTIONS])
    yield {
        "what": "greedy answers",
        "of": len(words[0]),
        "same": sum(map(str.__eq__, *words)),
        "ok": words[0] == words[1],
    }
    words = ["eval.py", "chat", "--model", TINY / "compodistill", "--image", pictures[0]]
    said = [command(*words, cpu=cpu, stdin="\n".join(QUESTIONS) + "\n") for cpu in (False, True)]
    yield {"what": "chat", "said": said[0][-400:], "ok": said[0] == said[1]}


# ---------------------------------------------------------------- ranks


def ranks(o: argparse.Namespace) -> Iterator[dict]:
    """Without torchrun, and with one rank: losses, weights, saving and going on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_world(folder / "world", tune=600, pretrain=300, per_kind=2)
        command("train.py", "--stage", 1, "--out", folder, "--name", "first", "--steps", 10)
        start = ["--stage", 2, "--student", folder / "first/stage1", "--out", folder, "--log-every", 5]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]

        def go(name: str, *flags) -> dict:
            words = ["train.py", *start, "--name", name, "--steps", 20, *flags]
            if not name.startswith("alone"):
                words = [*torchrun, *words]
                command(*words, "--stop-after", 10)
            command(*words)
            return losses_of(folder / name / "stage2")

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
            runs = {
                (kind, precision): pool.submit(go, f"{kind}-{precision}", "--precision", precision, *flags)
                for kind, flags in (
                    ("alone", ()),
                    ("ddp", ("--parallel", "ddp")),
                    ("fsdp", ("--parallel", "fsdp")),
                )
                for precision in DTYPES
            }
            for (kind, precision), run in runs.items():
                if kind != "alone":
                    off = largest_difference(run.result(), runs["alone", precision].result())
                    what = f"{kind}, stopped and resumed, beside one process, {precision}"
                    yield {"what": what, "off": off, "ok": off < (1e-4 if precision == "fp32" else 5e-2)}


# ---------------------------------------------------------------- real: speed and memory of the real pair


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measured(variant: Variant, shape: Shape, warm_up: int = 1, seconds: float = 1.0) -> dict | None:
    """Steps of this batch: after the warm-up at least two -> a row; None where memory does not hold them."""
    release(variant.device)
    try:
        variant.batch = make_batch(shape, variant.device)
        if variant.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, *_ = [variant.step() for _ in range(warm_up)]
        steps = [variant.step(), variant.step()]
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


def rates(o: argparse.Namespace) -> tuple[dict, float]:
    """What this card multiplies a second -> a row, FLOP/s of a large product."""
    side, common = 8192 if o.device == "cuda" else 256, most_common(replace(o.shape, batch=4))
    large, often = (matmul_rate(*x, o.device, torch.bfloat16) for x in ((side,) * 3, common))
    name = torch.cuda.get_device_name() if o.device == "cuda" else "cpu"
    row = {"what": f"{name}, torch {torch.__version__}, {o.shape}", "large_matmul_tflops": large / 1e12}
    return row | {f"matmul_{'x'.join(map(str, common))}_tflops": often / 1e12}, large


CHECKPOINTING, NO_VAT, TEXT = ["--gradient-checkpointing"], ["--vat-loss", "none"], ["--vat-queries", "text"]


REAL = {
    "lora": {
        "ours": ([], (1, 4, 16, 32)),
        "transformers": ("all", (1, 4, 8, 16)),
        "transformers, answers": ("answers", (16, 32)),
        "ours, no VAT": (NO_VAT, (1, 4, 16, 32)),
        "ours, text rows": (TEXT, (16,)),
        "ours, checkpointing": (CHECKPOINTING, (4, 8, 32)),
    },
    "full": {
        "ours": ([], (1, 4, 8, 16, 32)),
        "transformers": ("all", (1, 4, 8, 16)),
        "ours, no VAT": (NO_VAT, (4, 16)),
        "ours, checkpointing": (CHECKPOINTING, (4, 8, 32)),
    },
}  # tuning -> variant -> flags, batches: up to the first that does not fit


def real(o: argparse.Namespace) -> Iterator[dict]:
    row, rate = rates(o)
    yield row
    for tune, ways in REAL.items():
        for name, (flags, batches) in ways.items():
            yield from points(f"{tune}, {name}", flags, batches, tune, rate, o)


def points(name: str, flags: list[str] | str, batches, tune: str, rate: float, o, warm_up: int = 1):
    """One variant at growing batches, up to the first that does not fit."""
    release(o.device)
    variant = Variant(flags, o.shape, o.device, "bf16", tune)
    for batch in batches if o.device == "cuda" else batches[:2]:
        shape = replace(o.shape, batch=batch)
        row = measured(variant, shape, warm_up)
        if row is None:
            yield {"what": name, "batch": batch, "fits": False}
            return
        parts = [part for part in count(shape, tune=tune) if flags != NO_VAT or "VAT" not in part[0]]
        flops = sum(part[1] for part in parts)
        yield {"what": name, "mfu": flops / row["s_per_step"] / rate, "tflop": flops / 1e12, **row}


def compiled(o: argparse.Namespace) -> Iterator[dict]:
    row, rate = rates(o)
    yield row
    for tune in ("lora", "full"):
        yield from points(f"{tune}, ours, eager", [], (32,), tune, rate, o)
        yield from points(f"{tune}, ours, compiled", ["--compile"], (32,), tune, rate, o, warm_up=2)


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
    if o.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(23.5e9 / total)
    long = o.shape
    if o.device == "cuda":
        long = replace(o.shape, text=1536 - o.shape.vision.num_patches, answers=500)
    half = replace(long, student=SMALL_STUDENT) if o.device == "cuda" else long
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
    for tune in ("full", "lora"):
        for name, flags in (("ours", []), ("ours, no VAT", NO_VAT)):
            release(o.device)
            variant = Variant(flags, shape, o.device, "bf16", tune)
            variant.step()
            on_gpu = [ProfilerActivity.CUDA] if o.device == "cuda" else []
            with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiled:
                seconds = variant.step()["seconds"]
            del variant
            kinds = [
                (
                    event.self_device_time_total if on_gpu else event.self_cpu_time_total,
                    event.count,
                    event.key,
                )
                for event in profiled.key_averages()
                if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA and "#" not in event.key
            ]
            busy = sum(kind[0] for kind in kinds)
            top = [
                {"ms": us / 1e3, "share": us / max(busy, 1), "calls": calls, "kernel": key[:110]}
                for us, calls, key in sorted(kinds, reverse=True)[:25]
            ]
            yield {
                "what": f"{tune}, {name}", "batch": shape.batch, "ms_profiled": 1e3 * seconds,
                "ms_of_kernels": busy / 1e3, "launches": sum(kind[1] for kind in kinds), "top": top,
            }  # fmt: skip


# ---------------------------------------------------------------- scoring


KINDS = ("captions", "yes/no")


def scored(o: argparse.Namespace) -> Iterator[dict]:
    """SugarCrepe-shaped items a second, random weights of the student's size, bf16."""
    shape = replace(o.shape, teacher=o.shape.student)
    vlm = scoring.random_model(shape, o.device, torch.bfloat16)
    many, few, sizes = (384, 8, (32, 128)) if o.device == "cuda" else (4, 2, (4,))
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world", tune=1, pretrain=1, per_kind=max(10, many // 7))
        for kind in KINDS:
            asked = scoring.questions(world, kind, many)
            ways = {
                "one answer at a time": (few, lambda some: scoring.one_at_a_time(vlm, some)),
                **{
                    f"choice, {size} at a time": (
                        many,
                        lambda some, size=size: scoring.batched(vlm, some, "choice", size),
                    )
                    for size in sizes
                },
            }
            for name, (items, way) in ways.items():
                way(asked[:2])  # warm-up
                started = time.perf_counter()
                way(asked[:items])
                rate = items / (time.perf_counter() - started)
                yield {"what": f"{kind}: {name}", "items": items, "items_per_s": rate}


# ---------------------------------------------------------------- tiny


def tiny(o: argparse.Namespace) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        few = ["--steps", 15] if o.device == "cpu" else []
        for words in ([], ["story"])[: 1 if few else 2]:
            started = time.perf_counter()
            out = ["--out", Path(folder) / "story", "--runs", folder] if words else ["--out", folder, *few]
            text = command("-m", "tiny", *words, *out)
            minutes = (time.perf_counter() - started) / 60
            yield {"what": " ".join(["python -m tiny", *words]), "minutes": minutes, "said": text[-1800:]}


# ---------------------------------------------------------------- command line

PARTS = {  # name: function, seconds it may take
    "right": (right, 110),
    "ranks": (ranks, 90),
    "real": (real, 130),
    "repeat": (repeatable, 25),
    "budget": (budget, 40),
    "kernels": (kernels, 45),
    "scoring": (scored, 40),
    "compiled": (compiled, 90),
    "tiny": (tiny, 110),
}


def add_row(o: argparse.Namespace, row: dict) -> None:
    with open(o.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
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


def side_by_side(names: list[str], o: argparse.Namespace) -> None:
    """Each part as a process, at the same time, until all have ended or their time is up."""
    own = ["--out", o.out, "--device", o.device, "--shape", o.shape_name]
    argv = [sys.executable, __file__, *own, "--inside", "--parts"]
    running = {name: subprocess.Popen([*map(str, argv), name], start_new_session=True) for name in names}
    started = time.perf_counter()
    for name, process in running.items():
        left = o.patience * PARTS[name][1] - (time.perf_counter() - started)
        try:
            process.wait(max(left, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            add_row(o, {"part": name, "error": f"stopped after {time.perf_counter() - started:.0f} s"})
    print(f"{', '.join(names)}: {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="rows are added to this file, JSON lines")
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="(default: all)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="(default: %(default)s)")
    add("--shape", choices=list(SHAPES), default="real", help="of part real (default: %(default)s)")
    add("--patience", type=number(float, 0.1), default=1.0, help="times each part's seconds (default: 1)")
    add("--inside", action="store_true", help="all in this process, without limits: no time to start others")
    o = parser.parse_args()
    o.shape_name, o.shape = o.shape, SHAPES[o.shape]
    if o.inside:
        for name in o.parts:
            one_part(name, o)
        return
    together = [
        name for name in ("right", "ranks") if name in o.parts
    ]  # tiny models, for which one is no load
    for names in ([together] if together else []) + [[name] for name in o.parts if name not in together]:
        side_by_side(names, o)


if __name__ == "__main__":
    main()
