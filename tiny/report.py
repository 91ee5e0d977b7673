"""`python -m tiny report`: the tables of RESULTS.md, from the lines that `python -m tiny study` wrote.

    python -m tiny report --lines results/study.jsonl --into RESULTS.md

Of every row the mean over seeds, and its 95 % interval, Student's t over these seeds: it says how far another
seed may be, not another set of test items, of which there are 640 a kind. Differences are taken seed by seed.
Of fewer than three seeds their values stand there; a variant without a line is not in its table.
"""

import argparse
from math import sqrt

import numpy as np

from evals.analyses import spearman
from evals.benchmarks import markdown
from support.errors import BadInput, one_line
from support.files import read_text, write_atomically
from support.world import COMPOSITION, TINY
from tiny.study import KD, KD_TAF, PAPER, SFT, TABLES, Variant, read_lines

RESULTS = TINY.parent / "RESULTS.md"
LINES = TINY.parent / "results/study.jsonl"
BEGIN, END = "<!-- python -m tiny report: begin -->", "<!-- python -m tiny report: end -->"
# Student's t, two-sided 95 %, of 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
TITLES = {
    "systems": "The systems (the paper's Table 1)",
    "modules": "VAT and TAF (its Table 2)",
    "loss": "The distance of two maps (its Table 3)",
    "layers": "Which layers are aligned (its Table 3)",
    "matching": "How layers are matched (its Table 3)",
    "rows": "Which rows of the maps are compared, and how",
    "weight": "The weight of L_ADL",
    "heads": "Heads one by one (--vat-heads)",
    "controls": "Does it matter where the teacher looks? (--vat-control)",
    "vocabularies": "A teacher of another family, shape and tokenizer (--tokenizers aligned)",
    "freezing": "Layers of the language model that stay as they were (--freeze-layers)",
    "pairs": "One of the matched pairs (--align-layers)",
    "budget": "Eight times the steps",
}
Lines = dict[tuple[Variant, int], dict]


def report(args: argparse.Namespace) -> None:
    """Write what lies between the two marks of a Markdown file anew."""
    text = read_text(args.into)
    if [text.count(BEGIN), text.count(END)] != [1, 1] or text.index(BEGIN) > text.index(END):
        raise BadInput(f"{args.into}: {BEGIN} and {END} must stand there once each, in this order")
    lines = {}
    for file in args.lines:
        if not file.exists():
            raise BadInput(f"{file} is not there; python -m tiny study writes such lines")
        for run, line in read_lines(file).items():
            if run in lines:
                raise BadInput(f"{file}: {run[0].flags}, seed {run[1]} stands in another file, too")
            lines[run] = line
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    write_atomically(args.into, f"{before}{BEGIN}\n\n{tables(lines)}\n\n{after}")
    print(f"{one_line(args.into)}: tables of {len(lines)} trainings")


def tables(lines: Lines) -> str:
    """All sections that have lines, as Markdown."""
    parts = []
    for name, rows in TABLES.items():
        if sum(bool(seeds_of(lines, variant)) for variant in rows.values()) > 1:
            kinds = COMPOSITION if name == "systems" else ()
            text = budget(lines, rows) if name == "budget" else scores(lines, rows, kinds)
            parts.append(f"### {TITLES[name]}\n\n{text}")
    return "\n\n".join([*parts, *forcing(lines), *chain(lines)])


def seeds_of(lines: Lines, variant: Variant) -> list[int]:
    return sorted(seed for known, seed in lines if known == variant)


def interval(values: list[float]) -> tuple[float, float]:
    """Their mean, and half the length of its 95 % interval."""
    n = len(values)
    if n - 1 > len(T95):
        raise BadInput(f"{n} seeds are more than the {len(T95) + 1} that intervals are made for")
    return float(np.mean(values)), T95[n - 2] * float(np.std(values, ddof=1)) / sqrt(n)


def said(values: list[float], digits: int = 1, signed: bool = False) -> str:
    """ "98.2 ± 1.3"; of one or two values "97.9, 98.5"."""

    def text(value: float) -> str:
        return f"{round(value, digits) + 0.0:{'+' * signed}.{digits}f}"  # no -0.0

    if len(values) < 3:
        return ", ".join(map(text, values))
    mean, half = interval(values)
    return f"{text(mean)} ± {half:.{digits}f}"


def scores(lines: Lines, rows: dict[str, Variant], kinds: tuple[str, ...]) -> str:
    """A table of variants, each beside the paper's form or, where that is not in it, the first row; with the
    means of these kinds of caption pairs, or with the least of all.
    """
    ours = next((name for name, variant in rows.items() if variant == Variant(PAPER)), next(iter(rows)))
    cells, flags, others = [], [], {"tiny": "", "other": " --teacher OTHER"}
    for name, variant in rows.items():
        own = {seed: lines[variant, seed] for seed in seeds_of(lines, variant)}
        if not own:
            continue
        paired = [seed for seed in own if (rows[ours], seed) in lines]
        change = [own[seed]["compositional"] - lines[rows[ours], seed]["compositional"] for seed in paired]
        flags.append(f"{name}: `{variant.flags}{others[variant.teacher]}`")
        means = {kind: np.mean([line[kind] for line in own.values()]) for kind in COMPOSITION}
        least = min(means, key=means.get)
        cells.append(
            [
                name,
                str(len(own)),
                said([line["recognition"] for line in own.values()]),
                said([line["compositional"] for line in own.values()]),
                *([f"{means[kind]:.1f}" for kind in kinds] or [f"{means[least]:.1f} ({least})"]),
                said([line["similarity"] for line in own.values() if "similarity" in line], 2),
                "" if name == ours else said(change, signed=True),
            ]
        )
    columns = kinds or ("least kind",)
    head = ["", "seeds", "recognition", "compositional", *columns, "similarity", f"minus {ours}"]
    return f"{markdown(head, cells)}\n\n{'; '.join(flags)}"


def budget(lines: Lines, rows: dict[str, Variant]) -> str:
    """Scores on few items on the way, of each seed: recognition / compositional."""
    cells = []
    for name, variant in rows.items():
        for seed in seeds_of(lines, variant):
            line = lines[variant, seed]
            points = sorted(line["curve"].items(), key=lambda point: int(point[0]))
            steps = [int(step) for step, _ in points]
            path = [f"{point['recognition']:.0f} / {point['compositional']:.0f}" for _, point in points]
            cells.append([name, str(seed), *path, f"{line['recognition']:.1f} / {line['compositional']:.1f}"])
    return markdown(["steps", "seed", *(f"{step:,}" for step in steps), "end, all items"], cells)


def forcing(lines: Lines) -> list[str]:
    """The intervention: the teacher's attention mixed into a finished student, and the control."""
    cells = []
    for name, variant in {"SFT": SFT, "KD": KD, "KD, TAF": KD_TAF, "CompoDistill": PAPER}.items():
        known = [lines[Variant(variant), seed] for seed in seeds_of(lines, Variant(variant))]
        own = [line["forced"] for line in known if "forced" in line]
        if own:
            changes = [
                said([forced[way] - forced["as it is"] for forced in own], signed=True)
                for way in ("mean", "own mean", "other picture")
            ]
            cells.append([name, str(len(own)), said([forced["as it is"] for forced in own]), *changes])
    head = ["", "seeds", "as it is", "teacher's map", "control: own head mean", "control: of another picture"]
    title = "### Forcing the teacher's attention on a student (the paper's section 3)"
    return [f"{title}\n\n{markdown(head, cells)}"] if cells else []


def chain(lines: Lines) -> list[str]:
    """Similarity of attention against accuracy, over all students of the recipe's length."""
    runs = [(v.flags, line) for (v, _), line in lines.items() if v.times == 1 and "similarity" in line]
    if len(runs) < 10:
        return []
    flags = np.array([flag for flag, _ in runs])
    x = np.array([line["similarity"] for _, line in runs])
    y = np.array([line["compositional"] for _, line in runs])
    text = (
        f"Rank correlation (Spearman) of similarity and compositional accuracy over {len(runs)} students: "
        f"{correlation(x, y)}; within variants, each value minus its variant's mean: "
        f"{correlation(within(x, flags), within(y, flags))}. Intervals: 2,000 resamples of students."
    )
    return [f"### Attention and accuracy, over all students\n\n{text}"]


def within(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each value minus the mean of its group."""
    rest = values - np.array([values[groups == group].mean() for group in groups])
    return rest.round(9)  # equal ones stay equal


def correlation(x: np.ndarray, y: np.ndarray) -> str:
    """ "0.71 [0.52, 0.83]" """
    draws = np.random.default_rng(0).integers(0, len(x), (2000, len(x)))
    low, high = np.percentile([spearman(x[draw], y[draw]) for draw in draws], [2.5, 97.5])
    return f"{spearman(x, y):.2f} [{low:.2f}, {high:.2f}]"
