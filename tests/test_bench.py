"""bench/: the FLOPs that MFU divides by, the parts of gpu.py, and the tables made of its rows."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
from bench import gpu as bench_gpu
from bench import gpu_report, view
from bench.step import SHAPES, Variant, attention, matmuls, trained
from evals.pictures import question_attention
from support.ranks import is_running
from support.world import TINY, draw

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_flops_are_those_that_torch_counts(tune):
    """Every matrix product of a step without attention alignment, and no other; attention by itself."""
    shape = replace(SHAPES["small"], batch=3)
    variant = Variant(["--vat-loss", "none"], shape, "cpu", "fp32", tune)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **kw: 2 * a[0] * a[1] * b[1]}  # torch passes it over
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter, sdpa_kernel(SDPBackend.MATH):  # attention as products, too
        variant.step()
    found = counter.get_flop_counts()["Global"]
    of_attention = found.pop(torch.ops.aten.bmm)
    assert sum(found.values()) == sum(2 * M * K * N * times for _, M, K, N, times in matmuls(shape, tune))
    assert of_attention == sum(whole for part, _, whole, _ in attention(shape) if "VAT" not in part)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_straightforward_way_trains_the_same_and_computes_the_same(tune):
    """As many parameters, from the same start: its losses and gradient norm are ours."""
    variants = [Variant(flags, SHAPES["small"], "cpu", "fp32", tune) for flags in ([], "answers", "all")]
    sizes = [sum(p.numel() for p in variant.parameters) for variant in variants]
    assert sizes == [trained(SHAPES["small"], tune)] * 3
    ours, *others = [variant.step()["losses"] for variant in variants]
    for losses in others:
        assert losses == pytest.approx(ours, rel=1e-5)


def test_the_rows_that_are_compared_are_those_of_the_pictures():
    """Another way to the map of the answering position; the object is the one in the question."""
    teacher, rng = model.load(TINY / "teacher"), random.Random(1)
    for kind, say in {"colour": "What colour is the {1}?", "where": "Where is the {0} {1}?"}.items():
        scene, question, thing = view.asked(kind, rng)
        assert question == say.format(*thing) and thing in scene
        maps = view.rows_of(teacher, scene, question, thing)["answering position"]
        seen = question_attention(teacher, draw(scene), question)
        assert maps[2:5].mean((0, 1)).numpy() == pytest.approx(seen.ravel(), abs=1e-6)


# ---------------------------------------------------------------- gpu.py


def gpu(*words, **kwargs) -> subprocess.CompletedProcess:
    argv = [sys.executable, ROOT / "bench/gpu.py", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, **kwargs)


def rows_in(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs(tmp_path):
    argv = ["--out", tmp_path / "rows", "--device", "cpu", "--shape", "small", "--parts", "compiled", "tiny"]
    done = gpu(*argv, "--patience", 0.04)  # 2 seconds each
    assert done.returncode == 1 and "says what failed or was stopped: compiled, tiny" in done.stderr
    stopped = [row["part"] for row in rows_in(tmp_path / "rows") if "stopped after" in row.get("error", "")]
    assert stopped == ["compiled", "tiny"]


def test_a_file_that_cannot_take_rows_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows").write_text("not json")
    for out in (tmp_path, tmp_path / "no/folder", tmp_path / "rows"):
        argv = ["--out", out, "--device", "cpu", "--shape", "small", "--parts", "tiny"]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, argv)])
        with pytest.raises(SystemExit, match=f"^error: {out}"):
            bench_gpu.main()
        assert capsys.readouterr().out == ""


def test_sigterm_ends_the_parts_too(tmp_path):
    argv = [sys.executable, ROOT / "bench/gpu.py", "--out", tmp_path / "rows", "--device", "cpu"]
    words = [*argv, "--shape", "small", "--parts", "tiny"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    parts = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    limit = time.time() + 60
    while not (children := parts.read_text().split()) and time.time() < limit:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == "stopped\n" and process.returncode == 1
    assert children and not any(is_running(int(child)) for child in children)


def test_a_part_that_fails_leaves_its_traceback_in_a_row(tmp_path):
    code = "from bench import gpu; gpu.PARTS['real'] = (lambda o: 1 / 0, 9); gpu.main()"
    argv = ["--out", tmp_path / "rows", "--device", "cpu", "--inside", "--parts", "real", "repeat"]
    done = subprocess.run([sys.executable, "-c", code, *argv, "--shape", "small"], cwd=ROOT)
    first, *others = rows_in(tmp_path / "rows")
    assert done.returncode == 0 and first["part"] == "real" and "ZeroDivisionError" in first["error"]
    assert [row["part"] for row in others] == ["repeat"] * 2 and all(
        r["same"] == r["tensors"] for r in others
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "rows")])
    with pytest.raises(SystemExit, match="^error: torch sees no GPU"):
        bench_gpu.main()
    assert not (tmp_path / "rows").exists()


@pytest.mark.slow
def test_everything_that_gpu_py_measures_runs_on_a_cpu(tmp_path):
    """What waits for a GPU has run: only sizes, device and time differ there."""
    parts = ["right", "real", "systems", "repeat", "budget", "kernels", "scoring"]
    argv = ["--out", tmp_path / "rows", "--device", "cpu", "--shape", "small", "--inside", "--parts", *parts]
    done = gpu(*argv)
    rows = rows_in(tmp_path / "rows")
    assert done.returncode == 0 and not [row for row in rows if "error" in row], rows
    assert {row["part"] for row in rows} == set(parts)
    assert all(row.get("ok", True) for row in rows), rows
    assert gpu_report.report(rows).count("\n| ") > 50


# ---------------------------------------------------------------- the tables


def test_results_md_has_the_tables_of_the_shipped_rows():
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert gpu_report.report(rows_in(ROOT / "results/h200.jsonl")) in text


def test_ratios_by_hand():
    def step(seconds, peak=10.0, above=4.0, batch=4):
        rate = batch / seconds
        return {"s_per_step": seconds, "samples_per_s": rate, "peak_gb": peak, "above_gb": above}

    steps = {
        ("lora, ours", 4): step(1.1),
        ("lora, ours", 8): step(2.0, batch=8),  # 4 samples/s, its best
        ("lora, transformers", 4): step(2.0, 40.0, 32.0),  # 2 samples/s
        ("lora, ours, no VAT", 4): step(1.0),
        ("lora, ours, checkpointing", 4): step(1.5, 8.0, 2.0),
    }
    assert gpu_report.ratios(steps, "lora") == [
        "- lora: alignment (VAT, all rows) adds 10 % at batch 4 to the time of a step",
        "- lora: 2.0 times the samples/s of transformers, each at its best batch",
        "- lora, batch 4: 1.8 times the samples/s of transformers, 0.25 of its memory, "
        "0.12 above weights and moments",
        "- lora with checkpointing, batch 4: 1.3 times the samples/s of transformers, 0.20 of its memory, "
        "0.06 above weights and moments",
    ]
    assert gpu_report.ratios(steps, "full") == []


@pytest.mark.parametrize(
    "part", [{"part": "budget", "what": "x", "batch": 4, "fits": False}, {"part": "start"}]
)
def test_tables_of_what_is_there(part):
    """One part alone, as the program wrote it."""
    assert gpu_report.report([part]).startswith("### Call 1")


@pytest.mark.parametrize("text", ["", "[1, 2]\n", "{", None])
def test_a_file_without_rows_is_one_sentence(tmp_path, text):
    file = tmp_path / "rows"
    if text is not None:
        file.write_text(text)
    argv = [sys.executable, ROOT / "bench/gpu_report.py", file]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and str(file) in done.stderr
