"""Tables of the rows that bench/gpu.py wrote: python bench/gpu_report.py results/h200.jsonl

Prints Markdown, which stands in RESULTS.md; every ratio in it is computed here, from rows of one call. A row
with a note (put there by hand: what disturbed it) is shown with it, and no ratio is made of it.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.errors import BadInput  # noqa: E402
from support.files import read_text  # noqa: E402
from support.program import one_sentence, parse  # noqa: E402


def report(rows: list[dict]) -> str:
    """The rows of several calls of bench/gpu.py, each of which begins with a row `start` -> Markdown."""
    calls = []
    for row in rows:
        if row["part"] == "start" or not calls:
            calls.append([])
        calls[-1].append(row)
    return "\n\n".join(text for number, call in enumerate(calls, 1) for text in sections(number, call)) + "\n"


def sections(number: int, rows: list[dict]) -> list[str]:
    """One call's rows -> its headline, and a section for each part that has rows."""
    found = {}
    for row in rows:
        found.setdefault("cut" if "error" in row else row["part"], []).append(row)
    start = found.get("start", [{}])[0]
    texts = [f"### Call {number}: {start.get('card', 'a card')}, commit {start.get('commit', 'unknown')}"]
    parts = {
        ("right", "ranks"): right,
        ("real", "compiled"): real,
        ("systems",): systems,
        ("budget",): budget,
        ("scoring",): scoring,
        ("kernels",): kernels,
        ("repeat", "tiny", "cut"): rest,
    }
    for names, section in parts.items():
        if some := [row for name in names for row in found.get(name, [])]:
            texts.append(section(some))
    return texts


def table(head: list[str], cells: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------- sections


def right(rows: list[dict]) -> str:
    cells, lines = [], []
    for row in rows:
        off = row.get("off", row.get("max_abs"))
        off = max(off.values()) if isinstance(off, dict) else off
        if "kernels" in row:
            names = " and ".join(kernel.split(" defaults")[0] for kernel in row["kernels"])
            lines.append(f"{row['what']}, says torch: {names or 'none'}")
            continue
        found = f"{row['same']} of {row['of']} the same" if "same" in row else ""
        if "stopped_is_whole" in row:
            found = "the same bits" if row["stopped_is_whole"] else f"not the same bits, {off:.1e} apart"
        elif off is not None:
            found = f"{off:.1e}"
        cells.append([row["what"], found, "yes" if row["ok"] else "NO"])
    return "\n\n".join([table(["right, ranks", "largest difference", "holds"], cells), *lines])


def real(rows: list[dict]) -> str:
    """Steps of the real pair, and the ratios that they give."""
    rate = max(row["large_matmul_tflops"] for row in rows if "large_matmul_tflops" in row)
    cells = []
    for row in rows:
        if "fits" in row:
            cells.append([row["what"], str(row["batch"]), "does not fit", *[""] * 6])
        if "s_per_step" not in row:
            continue
        seconds = [f"{row[name]:.3f}" for name in ("s_per_step", "fastest", "slowest")]
        mfu = f"{100 * row['tflop'] / row['s_per_step'] / rate:.0f} %"
        numbers = [seconds[0], "-".join(seconds[1:]), f"{row['samples_per_s']:.1f}", mfu]
        memory = [f"{row['peak_gb']:.1f}", f"{row['above_gb']:.1f}"]
        cells.append([row["what"], str(row["batch"]), *numbers, *memory, row.get("note", "")])
    steps = {(r["what"], r["batch"]): r for r in rows if "s_per_step" in r and "note" not in r}
    heads = ["real, compiled", "batch", "s a step", "from-to", "samples/s", "MFU", "peak GB", "above", ""]
    about = f"{rows[0]['what']}; bf16, MFU of {rate:.0f} TFLOP/s, above: weights and moments"
    lines = "\n".join(line for tune in ("lora", "full") for line in ratios(steps, tune))
    return "\n\n".join([about, table(heads, cells), lines])


def ratios(steps: dict[tuple[str, int], dict], tune: str) -> list[str]:
    """What {(variant, batch): row} of one call say of alignment, and of ours beside transformers."""
    ours, plain, none, checkpointing = (
        {batch: row for (what, batch), row in steps.items() if what == f"{tune}, {name}"}
        for name in ("ours", "transformers", "ours, no VAT", "ours, checkpointing")
    )
    lines = []
    if more := {b: ours[b]["s_per_step"] / none[b]["s_per_step"] - 1 for b in none if b in ours}:
        added = ", ".join(f"{100 * share:.0f} % at batch {b}" for b, share in more.items())
        lines.append(f"- {tune}: alignment (VAT, all rows) adds {added} to the time of a step")
    if ours and plain:
        best, other = (max(row["samples_per_s"] for row in some.values()) for some in (ours, plain))
        times = f"{best / other:.1f} times the samples/s of transformers"
        lines.append(f"- {tune}: {times}, each at its best batch")
    for name, some in (tune, ours), (f"{tune} with checkpointing", checkpointing):
        for b in sorted(some.keys() & plain.keys()):
            speed, whole, above = (
                some[b][key] / plain[b][key] for key in ("samples_per_s", "peak_gb", "above_gb")
            )
            share = f"{whole:.2f} of its memory, {above:.2f} above weights and moments"
            lines.append(f"- {name}, batch {b}: {speed:.1f} times the samples/s of transformers, {share}")
    return lines


def systems(rows: list[dict]) -> str:
    """Steps with the losses of each system, as multiples of lean KD's at the same batch."""
    kd = {(row["what"].split(",")[0], row["batch"]): row for row in rows if row["what"].endswith(", kd")}
    cells = []
    for row in rows:
        if "fits" in row:
            cells.append([row["what"], str(row["batch"]), "does not fit", *[""] * 4])
        if "s_per_step" not in row:
            continue
        other = kd.get((row["what"].split(",")[0], row["batch"]), {})
        times = [f"{row[key] / other[key]:.2f}" if key in other else "" for key in ("s_per_step", "peak_gb")]
        numbers = [f"{row[key]:.3f}" for key in ("s_per_step", "fastest")]
        cells.append([row["what"], str(row["batch"]), *numbers, times[0], f"{row['peak_gb']:.1f}", times[1]])
    heads = ["systems", "batch", "s a step", "fastest", "x kd", "peak GB", "x kd"]
    return "\n\n".join([f"{rows[0]['what']}; bf16", table(heads, cells)])


def budget(rows: list[dict]) -> str:
    cells = [
        [r["what"], str(r["batch"]), f"{r['peak_gb']:.1f}", f"{r['samples_per_s']:.1f}", r.get("note", "")]
        if "peak_gb" in r
        else [r["what"], str(r["batch"]), "does not fit", "", ""]
        for r in rows
    ]
    heads = ["budget: 24 GB, 1,536 tokens, checkpointing, bf16", "batch", "peak GB", "samples/s", ""]
    return table(heads, cells)


def scoring(rows: list[dict]) -> str:
    cells, slow = [], {}
    for r in rows:
        kind, _, way = r["what"].partition(": ")
        rate = r["items_per_s"]
        slow.setdefault(kind, rate)  # one at a time comes first
        times = f"{rate / slow[kind]:.0f}"
        cells.append([kind, way, str(r["items"]), f"{rate:.1f}", times, r.get("note", "")])
    return table(["scoring: 1.8B, bf16", "", "items", "items/s", "times", ""], cells)


def kernels(rows: list[dict]) -> str:
    texts = []
    for r in rows:
        cells = [
            [f"{t['ms']:.2f}", f"{100 * t['share']:.1f} %", str(t["calls"]), f"`{brief(t['kernel'])}`"]
            for t in r["top"]
        ]
        about = f"{r['what']}, batch {r['batch']}: {r['ms_of_kernels']:.0f} ms in {r['launches']:,} kernels"
        texts += [about, table(["ms", "share", "calls", "kernel"], cells)]
    return "\n\n".join(texts)


def brief(kernel: str) -> str:
    for word in ("void ", "at::native::", "(anonymous namespace)::"):
        kernel = kernel.replace(word, "")
    return kernel[:70]


def rest(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        if "error" in r:
            text = r["error"].strip().splitlines()[-1]
        elif r["part"] == "repeat":
            text = (
                f"{r['same']} of {r['tensors']} trained tensors have the same bits in two runs of three steps"
            )
            text = f"{r['what']}, {text}; {r['s_per_step']:.3f} s a step"
        else:
            share = f", {r['steps']:,} of {r['of']:,} steps" if "steps" in r else ""
            text = f"{r['what']}: {r['seconds']:.0f} s{share}"
        note = f" ({r['note']})" if "note" in r else ""
        lines.append(f"- {r['part']}: {text}{note}")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line


def read_rows(file: Path) -> list[dict]:
    """The rows in a file of bench/gpu.py. BadInput: it is none, or its end is cut off."""
    rows, number, text = [], 0, read_text(file)
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("part"), str):
            raise BadInput(
                f"{file}, line {number}, is no row of bench/gpu.py; remove it or choose another file"
            )
        rows.append(row)
    if not rows or not text.endswith("\n"):
        raise BadInput(f"{file} ends after {number} rows without a whole line; choose another file")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="what bench/gpu.py --out has written")
    with one_sentence(without_reader=False):
        print(report(read_rows(parse(parser).rows)), end="")


if __name__ == "__main__":
    main()
