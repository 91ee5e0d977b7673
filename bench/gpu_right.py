"""Whether a GPU computes what the CPU and the golden values say: parts `right` and `ranks` of bench/gpu.py.

A part is a generator of rows; `ok` in a row says whether it holds. Tolerances: float32 1e-4, bfloat16 a few
per cent of float32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file

import distill
import model
import rivals
from bench.step import SHAPES, SYSTEMS, Variant
from data import IMAGE_TOKEN
from model import DTYPES
from qwen import Output
from rivals import OUTPUT_LOSSES
from support.world import TINY, make_pairs, make_world
from training.resume import digest_of

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
AT_ONCE = max(1, (os.cpu_count() or 1) // 2)  # processes of two threads
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
        row["step"]: [row[name] for name in ("grad_norm", *sorted(OUTPUT_LOSSES), "adl") if name in row]
        for row in rows
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
    yield from golden_rivals(o.device)
    yield from forms(o.device)
    with tempfile.TemporaryDirectory() as folder:
        whole = o.device == "cuda"  # beside itself a CPU tells nothing, but that all of this runs
        yield from trained(Path(folder), list(DTYPES) if whole else ["fp32"])
        yield from rivals_trained(Path(folder), list(rivals.RIVALS) if whole else ["llavadi"])
        yield from answered(Path(folder), o.device)
        if o.device == "cuda":
            yield full_memory(Path(folder))


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


def golden_rivals(device: str) -> Iterator[dict]:
    """tests/test_rivals.py's golden values of the other systems' losses, whole and lean."""
    expected = json.loads((GOLDEN / "baselines.json").read_text())["values"]
    names = {"image_kl": "llavakd_kl_image", "relation": "llavakd_relation", "all_kl": "llavadi_kl"}
    for precision, whole in product(DTYPES, (True, False)):
        given = {
            k: v.to(device, DTYPES[precision] if v.is_floating_point() else v.dtype)
            for k, v in load_file(GOLDEN / "baselines.safetensors").items()
        }
        batch = {k: given[k] for k in ("labels", "attention_mask", "has_image", "visual_columns")}
        heads, hidden = (
            [given[f"{who}_{what}"] for who in ("student", "teacher")] for what in ("head", "hidden")
        )
        logits = [x @ head.T if whole else None for x, head in zip(hidden, heads)]
        outputs = [Output(x, z, {}, {}) for x, z in zip(hidden, logits)]
        terms = rivals.rival_terms(*outputs, tuple(heads), None, batch, dict.fromkeys(names, 1.0), {})
        off = {name: abs((x.sum / x.count).item() / expected[names[name]] - 1) for name, x in terms.items()}
        what = f"golden losses of the other systems, {'whole' if whole else 'lean'}, {precision}"
        ok = max(off.values()) < (1e-4 if precision == "fp32" else 5e-2)
        yield {"what": what, "off": off, "ok": ok}


def forms(device: str) -> Iterator[dict]:
    """One step of a small pair: lean, plain and transformers; and what has no deterministic kernel."""
    for precision, (name, flags) in product(DTYPES, SYSTEMS.items()):
        lean, plain = (
            Variant([*flags, *more], SHAPES["small"], device, precision, "full").step()["losses"]
            for more in ([], ["--plain"])
        )
        off = {k: abs(lean[k] - v) / abs(v) for k, v in plain.items()}
        ok = max(off.values()) < TOLERANCE[precision]
        yield {"what": f"a step, lean and plain, {name}, {precision}", "off": off, "losses": lean, "ok": ok}
    for precision, tune in product(DTYPES, ("full", "lora")):
        ways = {"lean": [], "plain": ["--plain"], "transformers": "answers"}
        losses = {
            name: Variant(how, SHAPES["small"], device, precision, tune).step()["losses"]
            for name, how in ways.items()
        }
        off = {
            other: max(abs(losses["lean"][k] - v) / abs(v) for k, v in losses[other].items())
            for other in ("plain", "transformers")
        }
        ok = max(off.values()) < TOLERANCE[precision]
        what = f"a step in three forms, {tune}, {precision}"
        yield {"what": what, "off": off, "losses": losses["lean"], "ok": ok}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        for precision in DTYPES:
            Variant([], SHAPES["small"], device, precision, "full").step()
        torch.use_deterministic_algorithms(False)
    kernels = sorted({str(w.message).split(" does not")[0] for w in said if "determinis" in str(w.message)})
    yield {"what": "kernels of a step without a deterministic form", "kernels": kernels}


def trained(folder: Path, precisions: list[str]) -> Iterator[dict]:
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
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for precision in precisions:
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
            what = f"50 steps beside the CPU's, {precision}"
            yield {"what": what, "off": off, "here": here, "cpu": on_cpu, "ok": ok}
        for precision, runs in bits.items():
            files = [run.result() / "model.safetensors" for run in runs]
            digests = [digest_of(file) for file in files]
            names = {"stopped_is_whole": digests[0] == digests[1], "whole_is_whole": digests[1] == digests[2]}
            stopped_weights, whole_weights = (load_file(file) for file in files[:2])
            off = max((stopped_weights[k] - v).abs().max().item() for k, v in whole_weights.items())
            yield {"what": f"resumed, {precision}", **names, "max_abs": off, "ok": names["stopped_is_whole"]}


def rivals_trained(folder: Path, methods: list[str]) -> Iterator[dict]:
    """All stages of the other systems, 15 steps each, in float32: this device beside the CPU."""
    make_pairs(folder / "world")

    def train(method: str, cpu: bool) -> list[dict[int, list[float]]]:
        name = f"{method}-{'cpu' if cpu else 'here'}"
        argv = ["--method", method, "--out", folder, "--name", name, "--steps", 15, "--log-every", 5]
        losses = []
        for stage in rivals.RIVALS[method].weights:
            command("train.py", "--stage", stage, *argv, cpu=cpu)
            losses.append(losses_of(folder / name / f"stage{stage}"))
        return losses

    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = {name: [pool.submit(train, name, cpu) for cpu in (False, True)] for name in methods}
        for name, pair in runs.items():
            here, on_cpu = (run.result() for run in pair)
            off = [largest_difference(*stages) for stages in zip(here, on_cpu)]
            what = f"{name}, 15 steps of each stage beside the CPU's"
            yield {"what": what, "off": max(off), "ok": max(off) < 1e-2}


def answered(folder: Path, device: str) -> Iterator[dict]:
    """The shipped student's words, here and on the CPU, and through the chat program."""
    pictures = sorted((folder / "world/images").glob("test-*.png"))[:8]
    words = []
    for where in (device, "cpu"):
        vlm = model.load(TINY / "compodistill", device=where)
        words.append([vlm.answer(picture, text) for picture in pictures for text in QUESTIONS])
    same = sum(map(str.__eq__, *words))
    yield {"what": "greedy answers", "of": len(words[0]), "same": same, "ok": same == len(words[0])}
    words = ["eval.py", "chat", "--model", TINY / "compodistill", "--image", pictures[0]]
    said = [command(*words, cpu=cpu, stdin="\n".join(QUESTIONS) + "\n") for cpu in (False, True)]
    yield {"what": "chat", "said": said[0][-400:], "ok": said[0] == said[1]}


def full_memory(folder: Path) -> dict:
    """A GPU without memory left (0.25 % of it is 350 MB): one sentence, no traceback."""
    argv = ["--stage", "1", "--steps", "2", "--out", str(folder), "--name", "full", "--batch-size", "2000"]
    code = f"import torch, train; torch.cuda.set_per_process_memory_fraction(0.0025); train.main({argv})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said = done.stderr.strip().splitlines()[-1]
    ok = said.startswith("error: the memory of the GPU is used up") and "Traceback" not in done.stderr
    return {"what": "a full memory is one sentence", "said": said, "ok": ok and done.returncode == 1}


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

        with ThreadPoolExecutor(AT_ONCE) as pool:
            ways = {"alone": (), "ddp": ("--parallel", "ddp"), "fsdp": ("--parallel", "fsdp")}
            runs = {
                (kind, precision): pool.submit(go, f"{kind}-{precision}", "--precision", precision, *flags)
                for kind, flags in ways.items()
                for precision in DTYPES
            }
            for (kind, precision), run in runs.items():
                if kind != "alone":
                    off = largest_difference(run.result(), runs["alone", precision].result())
                    what = f"{kind}, stopped and resumed, beside one process, {precision}"
                    yield {"what": what, "off": off, "ok": off < TOLERANCE[precision]}
