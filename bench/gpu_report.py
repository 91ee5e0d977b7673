"""Tables of the rows that bench/gpu.py wrote: python bench/gpu_report.py results/h200.jsonl

Prints Markdown, which stands in RESULTS.md; every ratio in it is computed here from rows of one call.
"""

import json
import sys
from pathlib import Path


def report(rows: list[dict]) -> str:
    """Rows of one card, from several calls of bench/gpu.py -> Markdown."""
    calls = list(dict.fromkeys(row["call"] for row in rows))
    return "\n\n".join([right(rows), *(real(rows, call) for call in calls), others(rows)]) + "\n"


def table(head: list[str], cells: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of(rows: list[dict], *parts: str, call: int | None = None) -> list[dict]:
    """The rows of these parts, without those that say what failed or was cut off."""
    return [r for r in rows if r["part"] in parts and call in (None, r["call"]) and "error" not in r]


def right(rows: list[dict]) -> str:
    cells = []
    for row in of(rows, "right", "ranks"):
        off = row.get("off", row.get("max_abs"))
        off = max(off.values()) if isinstance(off, dict) else off
        if "kernels" in row:
            continue
        found = f"{row['same']} of {row['of']} the same" if "same" in row else ""
        if "stopped_is_whole" in row:
            found = "the same bits" if row["stopped_is_whole"] else f"not the same bits, {off:.1e} apart"
        elif off is not None:
            found = f"{off:.1e}"
        cells.append([row["what"], found, "yes" if row["ok"] else "NO"])
    return "### The same numbers as elsewhere\n\n" + table(["what", "largest difference", "holds"], cells)


def real(rows: list[dict], call: int) -> str:
    """One call's steps of the real pair, and the ratios that they give."""
    some = [r for r in of(rows, "real", "compiled", call=call) if "beside" not in r]
    head, *_ = of(some, "real")
    rate = head["large_matmul_tflops"]
    steps = {(r["what"], r["batch"]): r for r in some if "s_per_step" in r}
    cells = []
    for (what, batch), r in steps.items():
        mfu = f"{100 * r['tflop'] / r['s_per_step'] / rate:.0f} %"
        numbers = [f"{r['s_per_step']:.3f}", f"{r['samples_per_s']:.1f}", mfu, f"{r['peak_gb']:.1f}"]
        cells.append([what, str(batch), *numbers, f"{r['above_gb']:.1f}"])
    cells += [[r["what"], str(r["batch"]), "does not fit", "", "", "", ""] for r in some if "fits" in r]
    heads = ["", "batch", "s a step", "samples/s", "MFU", "peak GB", "above weights"]
    title = f"### A step of the real pair (call {call}, commit {head['commit']})"
    about = f"{head['what']}; bf16, {rate:.0f} TFLOP/s in a large matmul"
    lines = "\n".join([*ratios(steps, "lora"), *ratios(steps, "full")])
    return "\n\n".join([title, about, table(heads, cells), lines])


def ratios(steps: dict[tuple[str, int], dict], tune: str) -> list[str]:
    """What {(variant, batch): row} of one call say of ours beside transformers, and of alignment."""
    ours, plain, none, checkpointing = (
        {batch: row for (what, batch), row in steps.items() if what == f"{tune}, {name}"}
        for name in ("ours", "transformers", "ours, no VAT", "ours, checkpointing")
    )
    more = {b: ours[b]["s_per_step"] / none[b]["s_per_step"] - 1 for b in none if b in ours}
    added = ", ".join(f"{100 * share:.0f} % at batch {b}" for b, share in more.items())
    best, other = (max(row["samples_per_s"] for row in some.values()) for some in (ours, plain))
    lines = [
        f"- {tune}: alignment (VAT, all rows) adds {added} to the time of a step",
        f"- {tune}: {best / other:.1f} times the samples/s of transformers, each at its best batch",
    ]
    for name, some in (tune, ours), (f"{tune} with checkpointing", checkpointing):
        if b := max(some.keys() & plain.keys(), default=0):
            whole, above = (some[b][key] / plain[b][key] for key in ("peak_gb", "above_gb"))
            share = f"{whole:.2f} of transformers' memory, {above:.2f} above weights and moments"
            lines.append(f"- {name}, batch {b}: {share}")
    return lines


def others(rows: list[dict]) -> str:
    parts = []
    cells = [
        [r["what"], str(r["batch"]), f"{r['peak_gb']:.1f}", f"{r['samples_per_s']:.1f}", f"call {r['call']}"]
        for r in of(rows, "budget")
    ]
    heads = ["1,536 tokens, checkpointing, bf16", "batch", "peak GB", "samples/s", ""]
    parts.append("### With the memory of one 24 GB card\n\n" + table(heads, cells))
    cells = []
    for r in of(rows, "scoring"):
        if "one answer" in r["what"]:
            slow = r["items_per_s"]
        cells.append(
            [r["what"], str(r["items"]), f"{r['items_per_s']:.1f}", f"{r['items_per_s'] / slow:.0f}"]
        )
    parts.append("### Scoring, 1.8B, bf16\n\n" + table(["", "items", "items/s", "times"], cells))
    for r in of(rows, "kernels")[:2]:
        cells = [
            [f"{t['ms']:.2f}", f"{100 * t['share']:.1f} %", str(t["calls"]), f"`{brief(t['kernel'])}`"]
            for t in r["top"]
        ]
        head = f"### Kernels of a step: {r['what']}, batch {r['batch']}, call {r['call']}\n\n"
        head += f"{r['ms_of_kernels']:.0f} ms in {r['launches']:,} kernels\n\n"
        parts.append(head + table(["ms", "share", "calls", "kernel"], cells))
    lines = []
    for r in of(rows, "repeat"):
        same = f"{r['same']} of {r['tensors']} trained tensors have the same bits"
        lines.append(
            f"- three steps of the real pair, twice, {r['what']}: {same}; {r['s_per_step']:.3f} s a step"
        )
    for r in of(rows, "tiny"):
        share = f", {r['steps']:,} of {r['of']:,} steps" if "steps" in r else ""
        lines.append(f"- {r['what']}: {r['seconds']:.0f} s{share}")
    for r in of(rows, "right"):
        if "kernels" in r:
            names = " and ".join(kernel.split(" defaults")[0] for kernel in r["kernels"])
            lines.append(f"- {r['what']}, says torch: {names or 'none'}")
    cut = [f"{r['part']} (call {r['call']})" for r in rows if "error" in r]
    lines.append(
        f"- cut off by their limits, rows so far above: {', '.join(cut)}" if cut else "- nothing was cut off"
    )
    return "\n\n".join([*parts, "### The rest\n\n" + "\n".join(lines)])


def brief(kernel: str) -> str:
    for word in ("void ", "at::native::", "(anonymous namespace)::"):
        kernel = kernel.replace(word, "")
    return kernel[:70]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/gpu_report.py ROWS.jsonl")
    print(report([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]), end="")


if __name__ == "__main__":
    main()
