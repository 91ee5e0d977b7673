"""`python -m tiny report`: what README.md and RESULTS.md say of the study, from the lines that it wrote.

    python -m tiny report --lines results/study.jsonl --into README.md RESULTS.md

In such a file everything between `<!-- python -m tiny report: NAME -->` and `<!-- end of NAME -->` is written
anew, NAME one of SECTIONS, and a new file gets the tables; figures go to assets/ beside it. Of every row the
mean over seeds and its 95 % interval, Student's t over these seeds: it says how far another seed may be, not
another set of test items, of which there are 640 a kind. Differences are taken seed by seed. Of fewer than
three seeds their values stand there; a variant without a line is not in its table.
"""

import argparse
import re
from math import sqrt
from pathlib import Path

import numpy as np

from evals import figures
from evals.analyses import spearman
from evals.benchmarks import markdown
from support.errors import BadInput, one_line
from support.files import read_text, write_atomically
from support.world import COMPOSITION, TINY
from tiny.study import KD, KD_TAF, PAPER, ROWS, SFT, TABLES, Variant, read_lines

INTO = [TINY.parent / "README.md", TINY.parent / "RESULTS.md"]
LINES = TINY.parent / "results/study.jsonl"
PLACE = re.compile(r"<!-- python -m tiny report: (\w+) -->.*?<!-- end of \1 -->", re.DOTALL)
NEW = "<!-- python -m tiny report: tables -->\n<!-- end of tables -->\n"  # of a file that is not there
# Student's t, two-sided 95 %, of 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
TITLES = {
    "systems": "The systems (the paper's Table 1)",
    "modules": "VAT and TAF (its Table 2)",
    "loss": "The distance of two maps (its Table 3)",
    "layers": "Which layers are aligned (its Table 3)",
    "matching": "How layers are matched (its Table 3)",
    "rates": "Each at the best rate of stage 2 that was tried",
    "rows": "Which rows of the maps are compared, and how",
    "weight": "The weight of L_ADL",
    "heads": "Heads one by one (--vat-heads)",
    "controls": "Does it matter where the teacher looks? (--vat-control)",
    "vocabularies": "A teacher of another family, shape and tokenizer (--tokenizers aligned)",
    "depth": "Teachers of other depths, and the layer where their attention matters most",
    "freezing": "Layers of the language model that stay as they were (--freeze-layers)",
    "pairs": "One of the matched pairs (--align-layers)",
    "budget": "Eight times the steps",
}
# The paper's average over its compositional benchmarks, one seed: {table: {row: %}}
PUBLISHED = {
    "systems": {
        "teacher": 70.3,
        "SFT": 60.7,
        "KD": 62.9,  # "neither" of its Table 2
        "LLaVA-KD": 61.5,
        "LLaVADI": 60.2,
        "LLaVA-MoD": 62.6,
        "CompoDistill": 66.7,
    },
    "modules": {"KD": 62.9, "VAT": 65.0, "TAF": 63.8, "VAT and TAF": 66.7},
    "loss": {"none": 63.8, "MSE": 65.2, "KL": 65.5, "cosine": 66.7},
    "layers": {"early": 63.7, "later": 64.6, "all": 66.6, "intermediate": 66.7},
    "matching": {"simple": 65.6, "adaptive": 65.7, "group": 66.7},
}
CLAIMS = (  # of its tables: which row is better than which
    ("systems", "KD", "SFT"),
    *(("systems", "CompoDistill", row) for row in ("SFT", "LLaVA-KD", "LLaVADI", "LLaVA-MoD")),
    ("modules", "VAT", "KD"),
    ("modules", "TAF", "KD"),
    *(("modules", "VAT and TAF", row) for row in ("KD", "VAT", "TAF")),
    *(("loss", "cosine", row) for row in ("none", "MSE", "KL")),
    *(("layers", "intermediate", row) for row in ("early", "later", "all")),
    *(("matching", "group", row) for row in ("simple", "adaptive")),
)
QUESTIONS = ("controls", "heads", "vocabularies", "layers", "depth", "freezing", "pairs")  # README's
Lines = dict[tuple[Variant, int], dict]


def report(args: argparse.Namespace) -> None:
    """Write the places of the Markdown files, and the figures."""
    lines = {}
    for file in args.lines:
        if not file.exists():
            raise BadInput(f"{file} is not there; python -m tiny study writes such lines")
        for run, line in read_lines(file).items():
            if run in lines:
                raise BadInput(f"{file}: {run[0].flags}, seed {run[1]} stands in another file, too")
            lines[run] = line
    texts = {file: filled(read_text(file) if file.exists() else NEW, lines, file) for file in args.into}
    for file, text in texts.items():
        write_atomically(file, text)
        print(f"{one_line(file)}: what {len(lines)} lines say")
        draw_figures(file.parent / "assets", lines)


def filled(text: str, lines: Lines, file: Path) -> str:
    """The text of a Markdown file, its places written anew."""
    names = [place[1] for place in PLACE.finditer(text)]
    if not names or len(names) != text.count("<!-- python -m tiny report:"):
        raise BadInput(
            f"{file}: <!-- python -m tiny report: NAME --> and after it <!-- end of NAME --> must stand there"
        )
    if unknown := [name for name in names if name not in SECTIONS]:
        raise BadInput(f"{file}: {unknown[0]} is no part of the report, which are {', '.join(SECTIONS)}")
    begin, end = "<!-- python -m tiny report: {} -->", "<!-- end of {} -->"
    return PLACE.sub(
        lambda place: "\n\n".join([begin.format(place[1]), SECTIONS[place[1]](lines), end.format(place[1])]),
        text,
    )


# ---------------------------------------------------------------- numbers


def seeds_of(lines: Lines, variant: Variant) -> list[int]:
    return sorted(seed for known, seed in lines if known == variant)


def values_of(lines: Lines, variant: Variant, score: str) -> list[float]:
    """Of each seed that has it."""
    own = (lines[variant, seed] for seed in seeds_of(lines, variant))
    return [line[score] for line in own if score in line]


def paired(lines: Lines, one: Variant, other: Variant, score: str = "compositional") -> list[float]:
    """one - other, of each seed that both have."""
    both = [seed for seed in seeds_of(lines, one) if (other, seed) in lines]
    return [lines[one, seed][score] - lines[other, seed][score] for seed in both]


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


# ---------------------------------------------------------------- tables


def tables(lines: Lines) -> str:
    """All tables that have two rows with lines, and what is said of all students."""
    parts = []
    for name, rows in TABLES.items():
        if sum(bool(seeds_of(lines, variant)) for variant in rows.values()) > 1:
            kinds = COMPOSITION if name == "systems" else ()
            text = budget(lines, rows) if name == "budget" else scores(lines, rows, kinds)
            parts.append(f"### {TITLES.get(name, name)}\n\n{text}\n\n{flags_of(lines, rows)}")
    return "\n\n".join([*parts, *forcing(lines), *chain(lines)])


def headline(lines: Lines) -> str:
    """The systems, and the rivals at their best rates, too."""
    rows = TABLES["systems"] | TABLES["rates"]
    last = ("CompoDistill", "CompoDistill, row by row")
    names = sorted(rows, key=lambda name: (name in last, name.startswith("LLaVA"), name != "teacher"))
    return scores(lines, {name: rows[name] for name in names}, ())


def questions(lines: Lines) -> str:
    """One table of those of QUESTIONS."""
    cells = []
    for table in QUESTIONS:
        for name, variant in TABLES[table].items():
            row = [said(values_of(lines, variant, score)) for score in ("recognition", "compositional")]
            if seeds := len(seeds_of(lines, variant)):
                cells.append([table, name, f"`{variant.flags}`", str(seeds), *row])
    return markdown(["", "", "flags", "seeds", "recognition", "compositional"], cells)


def scores(lines: Lines, rows: dict[str, Variant], kinds: tuple[str, ...]) -> str:
    """A table of variants, each beside the paper's form or, where that is not in it, the first row; with the
    means of these kinds of caption pairs, or with the least of all.
    """
    ours = next((name for name, variant in rows.items() if variant == Variant(PAPER)), next(iter(rows)))
    cells = []
    for name, variant in rows.items():
        if not (n := len(seeds_of(lines, variant))):
            continue
        means = {kind: np.mean(values_of(lines, variant, kind)) for kind in COMPOSITION}
        least = min(means, key=means.get)
        change = paired(lines, variant, rows[ours]) if variant.trained and name != ours else []
        cells.append(
            [
                name,
                str(n) if variant.trained else "",
                said(values_of(lines, variant, "recognition")),
                said(values_of(lines, variant, "compositional")),
                *([f"{means[kind]:.1f}" for kind in kinds] or [f"{means[least]:.1f} ({least})"]),
                said(values_of(lines, variant, "similarity"), 2),
                said(change, signed=True),
            ]
        )
    columns = kinds or ("least kind",)
    return markdown(
        ["", "seeds", "recognition", "compositional", *columns, "similarity", f"minus {ours}"], cells
    )


def flags_of(lines: Lines, rows: dict[str, Variant]) -> str:
    """What was trained, of each row."""
    text = []
    for name, variant in rows.items():
        if variant.trained and seeds_of(lines, variant):
            teacher = f" --teacher {variant.teacher}" * (variant.teacher != "tiny")
            text.append(f"{name}: `{variant.flags}{teacher}`")
    return "; ".join(text)


def budget(lines: Lines, rows: dict[str, Variant]) -> str:
    """Scores on few items on the way, of each seed: recognition / compositional; a tenth of the points."""
    cells, steps = [], []
    for name, variant in rows.items():
        for seed in seeds_of(lines, variant):
            line = lines[variant, seed]
            steps = sorted(map(int, line["curve"]))
            steps = steps[len(steps) // 10 - 1 :: max(1, len(steps) // 10)] if len(steps) > 10 else steps
            points = [line["curve"][str(step)] for step in steps]
            path = [f"{point['recognition']:.0f} / {point['compositional']:.0f}" for point in points]
            cells.append([name, str(seed), *path, f"{line['recognition']:.1f} / {line['compositional']:.1f}"])
    return markdown(["steps", "seed", *(f"{step:,}" for step in steps), "end, all items"], cells)


def claims(lines: Lines) -> str:
    """Every difference that the paper claims, beside ours, in points of compositional accuracy."""
    cells = []
    for table, better, worse in CLAIMS:
        change = paired(lines, TABLES[table][better], TABLES[table][worse])
        verdict = ""
        if len(change) > 2:
            mean, half = interval(change)
            verdict = "holds" if mean > half else "the opposite" if -mean > half else "not told apart"
        if change:
            published = PUBLISHED[table][better] - PUBLISHED[table][worse]
            row = [f"{better} over {worse}", f"{published:+.1f}", said(change, signed=True)]
            cells.append([table, *row, str(len(change)), verdict])
    return markdown(["", "", "paper, one seed", "here", "seeds", "verdict"], cells)


def forcing(lines: Lines) -> list[str]:
    """The intervention: the teacher's attention mixed into a finished student, and the controls."""
    rows = {"SFT": SFT, "KD": KD, "KD with TAF": KD_TAF, "CompoDistill": PAPER}
    rows |= {"CompoDistill, row by row": ROWS}
    rows |= {name: v.flags for name, v in TABLES["rates"].items() if "--lr" in v.flags}
    ways, cells = ("mean", "own mean", "other picture"), []
    for name, flags in rows.items():
        if own := values_of(lines, Variant(flags), "forced"):
            changes = [[forced[way] - forced["as it is"] for forced in own] for way in ways]
            before = said([forced["as it is"] for forced in own])
            cells.append([name, str(len(own)), before, *(said(change, signed=True) for change in changes)])
    head = ["", "seeds", "as it is", "teacher's map", "control: own head mean", "control: of another picture"]
    title = "### Forcing the teacher's attention on a student (the paper's section 3)"
    return [f"{title}\n\n{markdown(head, cells)}"] if cells else []


def chain(lines: Lines) -> list[str]:
    """Similarity of attention against accuracy, over all students of the recipe's length."""
    runs = [(v, line) for (v, _), line in lines.items() if v.times == 1 and "similarity" in line]
    if len(runs) < 10:
        return []
    of = np.array([f"{v.flags} {v.teacher}" for v, _ in runs])
    x = np.array([line["similarity"] for _, line in runs])
    y = np.array([line["compositional"] for _, line in runs])
    means = [[values[of == one].mean() for one in dict.fromkeys(of)] for values in (x, y)]
    text = (
        f"Rank correlation (Spearman) of similarity and compositional accuracy over {len(runs)} students: "
        f"{correlation(x, y)}; over the means of their {len(means[0])} variants: "
        f"{correlation(*map(np.array, means))}; within variants, each value minus its variant's mean: "
        f"{correlation(within(x, of), within(y, of))}. Intervals: 2,000 resamples of what is correlated."
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


SECTIONS = {"headline": headline, "questions": questions, "claims": claims, "tables": tables}

# ---------------------------------------------------------------- figures


def draw_figures(folder: Path, lines: Lines) -> None:
    """study.png: each system's seeds, and attention against accuracy; budget.png: accuracy against steps."""
    folder.mkdir(exist_ok=True)
    students, points = figure_rows(lines)
    drawn = {
        "study.png": (figures.study_panels, "Every student of the study", students),
        "budget.png": (figures.budget_panels, "Eight times the steps: 40 test items a kind", points),
    }
    done = [
        figures.draw(folder / name, panels, (10, 4.5), title, rows)
        for name, (panels, title, rows) in drawn.items()
        if rows
    ]
    if not all(done):
        print('figures need matplotlib (the extra "plots"): install it, and give the same command again')


def figure_rows(lines: Lines) -> tuple[list[dict], list[dict]]:
    """Of every student its line, and every point of the curves; with "student", its name in the legend."""
    names = {variant: name for name, variant in TABLES["systems"].items()}
    students, points = [], []
    for (variant, seed), line in lines.items():
        if variant.times == 1 and variant.trained:
            students.append(line | {"student": group_of(variant), "row": names.get(variant)})
        for step, point in line.get("curve", {}).items():
            points.append(point | {"student": group_of(variant), "seed": seed, "step": int(step)})
    order = [None, *names.values()]
    return sorted(students, key=lambda line: order.index(line["row"])), points


def group_of(variant: Variant) -> str:
    """Its name in a figure's legend."""
    method = variant.flags.split()[1]
    if "--vat-control" in variant.flags:
        return "compodistill, controls"
    if method.startswith("llava"):
        return "other systems"
    return f"{method} --taf" if "--taf" in variant.flags.split() else method
