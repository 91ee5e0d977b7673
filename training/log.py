"""What a run says: a line and a JSON row per logged step, bad samples, and the batch that gave NaN.

    out/name/stage2.jsonl            step, every loss term, lr, gradient norm, rates, padding, memory, ETA
             stage2.bad.jsonl        samples that --skip-bad-samples passed over
             stage2.nan-rank0.json   the batch after which a loss or the gradient was not finite

A run that goes on cuts its log back to the save from which it goes on.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from model import pick_device
from support.errors import BadInput, one_line
from support.files import open_file, write_atomically
from support.ranks import barrier, rank_and_ranks
from training.recipes import Config


class StepSize(NamedTuple):
    """How much was in a step, of all ranks together."""

    samples: int
    tokens: int  # without padding
    padded_tokens: int  # with it
    bad: int  # samples that others stood in for
    cut: int  # samples that were longer than --max-length
    mended: int  # samples of which data.as_llava_reads left turns out


class Log:
    """The log of one run from step `start` on. What an earlier process logged beyond that is cut off."""

    def __init__(self, run: Path, start: int, steps: int, c: Config):
        self.rank, self.quiet, self.start, self.steps = rank_and_ranks()[0], c.quiet, start, steps
        self.max_bad_share = c.max_bad_share
        self.file, self.bad_file = run.with_suffix(".jsonl"), run.with_suffix(".bad.jsonl")
        self.nan_file = run.with_suffix(f".nan-rank{self.rank}.json")
        if self.rank == 0:
            for file in (self.file, self.bad_file):
                drop_rows_after(file, start)
        barrier()
        self.bar = tqdm(
            total=steps,
            initial=start,
            desc=one_line(f"{c.name} {run.stem}"),
            disable=self.rank != 0 or c.quiet,
            dynamic_ncols=True,
        )
        self.began = self.since = time.time()
        self.samples = self.tokens = self.padded_tokens = 0

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()  # before anything else is printed

    def count(self, step: int, state: dict, size: StepSize) -> dict:
        """One step more -> the state after it. BadInput where too many samples so far were bad."""
        self.samples += size.samples
        self.tokens += size.tokens
        self.padded_tokens += size.padded_tokens
        self.bar.update()
        samples, bad = state["samples"] + size.samples, state["bad"] + size.bad
        if bad > self.max_bad_share * max(samples, 1000):
            raise BadInput(
                f"{bad} of {samples} samples are bad, more than --max-bad-share {self.max_bad_share:g} "
                f"allows; {self.bad_file} lists them"
            )
        more = {name: state.get(name, 0) + getattr(size, name) for name in ("cut", "mended")}
        return {"step": step, "samples": samples, "bad": bad, **more}

    def row(self, losses: dict[str, float], lr: float, norm: float, state: dict) -> None:
        """Write and print the row of state["step"]; rates are means since the row before."""
        step = state["step"]
        now = time.time()
        seconds, elapsed = max(now - self.since, 1e-9), now - self.began
        row = {
            "step": step,
            **losses,
            "lr": lr,
            "grad_norm": norm,
            "samples_per_s": round(self.samples / seconds, 2),
            "tokens_per_s": round(self.tokens / seconds, 1),
            "padding": round(1 - self.tokens / max(self.padded_tokens, 1), 4),
            "memory_gb": round(peak_memory(pick_device()) / 1e9, 3),
            **{name: state[name] for name in ("bad", "cut", "mended")},  # samples, since the first step
            "seconds": round(elapsed, 2),
            "eta": round(elapsed / (step - self.start) * (self.steps - step)),
        }
        self.since, self.samples, self.tokens, self.padded_tokens = now, 0, 0, 0
        if self.rank:
            return
        append(self.file, row)
        if not self.quiet:
            terms = "  ".join(f"{name} {value:8.4f}" for name, value in losses.items())
            tqdm.write(
                f"step {step:>6}/{self.steps}  {terms}  lr {lr:.2e}  norm {norm:8.3f}  "
                f"{row['samples_per_s']:7.1f} samples/s  {row['tokens_per_s']:9.0f} tokens/s  "
                f"padding {100 * row['padding']:4.1f} %  {row['memory_gb']:6.2f} GB  "
                f"eta {row['eta'] // 3600}:{row['eta'] // 60 % 60:02}:{row['eta'] % 60:02}"
            )

    def bad_samples(self, batches: list[dict], step: int) -> None:
        """Note what was passed over (every rank its own, in one file)."""
        for sentence in [text for batch in batches for text in batch["replaced"]]:
            tqdm.write(f"skipped: {sentence}", file=sys.stderr)
            append(self.bad_file, {"step": step, "skipped": sentence})

    def not_finite(self, step: int, losses: dict, norm: float, batches: list[dict]) -> str:
        """Write down which samples were in the step -> the sentence to stop with."""
        ids = [batch["ids"] for batch in batches]
        values = {name: str(value) for name, value in {**losses, "grad_norm": norm}.items()}
        write_atomically(self.nan_file, json.dumps({"step": step, **values, "ids": ids}, indent=1))
        return (
            f"a loss or the gradient is not finite at step {step} ({values}); {self.nan_file} has the "
            "samples of that step: look at them, or start again with a lower --lr and another --name"
        )


def peak_memory(device: str) -> int:
    """Bytes: the allocator's peak on a GPU, the process's largest resident set on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def append(file: Path, row: dict) -> None:
    """Add a row to a log."""
    try:
        with open(file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
    except OSError as error:
        reason = f"{file} could not be written ({error.strerror})"
        raise BadInput(f"{reason}; free space, and the same command goes on from the last save") from None


def drop_rows_after(file: Path, step: int) -> None:
    """Cut a log back to the step that a run goes on from. BadInput: a file that is no log."""
    if file.exists():
        with open_file(file) as handle:
            lines = handle.read().decode(errors="replace").splitlines()
        if lines and not lines[0].startswith('{"step"') and not any(map(step_of, lines)):
            raise BadInput(f"{file} is no log of this program; choose another --name")
        rows = [line for line in lines if (step_of(line) or step + 1) <= step]
        write_atomically(file, "".join(line + "\n" for line in rows))


def step_of(line: str) -> int | None:
    """The step of a row of a log; None for a line that was damaged or cut."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
