"""`python -m tiny report`: what README.md and RESULTS.md say of the study, from the lines that it wrote.

    python -m tiny report --lines results/study.jsonl --into README.md RESULTS.md

In such a file everything between `<!-- python -m tiny report: NAME -->` and `<!-- end of NAME -->` is written
anew, NAME one of SECTIONS, and a new file gets the tables; figures go to assets/ beside it. Of every row the
mean over seeds and its 95 % interval, Student's t over these seeds: where the mean of all seeds may lie, were
they normal; not what another set of test items would do. Differences are taken seed by seed. Of fewer than
three seeds their values stand there; a variant without a line is not in its table.
"""

import argparse
import re
from math import atan2, cos, pi, sin, sqrt
from pathlib import Path

import numpy as np

from evals import figures
from evals.analyses import spearman
from evals.benchmarks import markdown
from evals.pictures import MADE
from support.errors import BadInput, one_line
from support.files import check_output, check_writable, read_text, write_atomically
from support.world import COMPOSITION, TINY
from tiny.students import ITEMS, steps_of
from tiny.study import FORCED, KD, KD_TAF, METHOD, PAPER, ROWS, SFT, TABLES, Variant, read_lines

INTO = [TINY.parent / "README.md", TINY.parent / "RESULTS.md"]
LINES = TINY.parent / "results/study.jsonl"
PLACE = re.compile(r"<!-- python -m tiny report: (\w+) -->.*?<!-- end of \1 -->", re.DOTALL)
NEW = "<!-- python -m tiny report: tables -->\n<!-- end of tables -->\n"  # of a file that is not there
LEVEL = 0.05  # of p: what is below is told apart, and intervals are of the rest, 95 %
RESAMPLES = 2000  # of a rank correlation
LEARNED = {"recognition": 98, "compositional": 95}  # in %
RELATIONAL, KNOWN = ("swap_obj", "replace_rel"), 90  # who is where; a seed knows it with so many % in each
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
    "budget": "Eight times the steps, on the same scenes",
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
    "rates": {"SFT, 1.5e-3": 60.7, "KD, 1e-3": 62.9, "KD with TAF, 1.5e-3": 63.8, "CompoDistill": 66.7},
}
CLAIMS = (  # of its tables: which row is better than which
    *(("systems", row, "SFT") for row in ("KD", "LLaVA-KD", "LLaVADI", "LLaVA-MoD", "CompoDistill")),
    *(("systems", "CompoDistill", row) for row in ("LLaVA-KD", "LLaVADI", "LLaVA-MoD")),
    ("modules", "VAT", "KD"),
    ("modules", "TAF", "KD"),
    *(("modules", "VAT and TAF", row) for row in ("KD", "VAT", "TAF")),
    *(("loss", "cosine", row) for row in ("none", "MSE", "KL")),
    *(("layers", "intermediate", row) for row in ("early", "later", "all")),
    *(("matching", "group", row) for row in ("simple", "adaptive")),
    ("rates", "KD, 1e-3", "SFT, 1.5e-3"),
    ("rates", "KD with TAF, 1.5e-3", "KD, 1e-3"),
    ("rates", "KD with TAF, 1.5e-3", "SFT, 1.5e-3"),
    *(("rates", "CompoDistill", row) for row in ("SFT, 1.5e-3", "KD, 1e-3", "KD with TAF, 1.5e-3")),
)
OURS = (  # as CLAIMS, of our own tables: beside what these say themselves
    *(("controls", row, "none") for row in ("shuffled", "of another sample", "uniform")),
    ("freezing", "layers 0, 1", "layers 2, 3"),
    ("depth", "4 layers: layer 0", "4 layers: layer 2"),
    ("depth", "8 layers: layer 6", "8 layers: 30 to 70 %"),
    ("depth", "12 layers: layer 0", "12 layers: 30 to 70 %"),
)
HEADLINE = (  # README's rows, of the tables `systems` and `rates`
    *("teacher", "SFT", "SFT, 1.5e-3", "KD", "KD, 1e-3", "KD with TAF", "KD with TAF, 1.5e-3"),
    *("LLaVA-KD", "LLaVADI", "LLaVA-MoD", "CompoDistill", "CompoDistill, row by row"),
)
QUESTIONS = ("controls", "heads", "vocabularies", "layers", "depth", "freezing", "pairs")  # README's
Lines = dict[tuple[Variant, int], dict]


def report(args: argparse.Namespace) -> None:
    """Write the places of the Markdown files, and the figures."""
    lines = lines_of(args.lines)
    texts = {}
    for file in dict.fromkeys(args.into):
        check_writable(file.parent)
        for name in FIGURES:
            check_output(file.parent / "assets" / name, MADE)
        text = read_text(file, "; choose a Markdown file") if file.exists() else NEW
        texts[file] = filled(text, lines, file)
    for file, text in texts.items():
        write_atomically(file, text)
        print(f"{one_line(file)}: what {len(lines)} lines say")
    for folder in dict.fromkeys(file.parent / "assets" for file in texts):
        draw_figures(folder, lines)


def lines_of(files: list[Path]) -> Lines:
    """All lines of the files. BadInput: of two worlds or teachers, or of two recipes."""
    lines, known = {}, {}  # known: what all lines have in common
    for file in files:
        if not file.exists():
            raise BadInput(f"{file} is not there; python -m tiny study writes such lines")
        for run, line in read_lines(file).items():
            (variant, seed), own = run, line["prints"]
            who = f"{file}: {variant.flags}, seed {seed}"
            if run in lines:
                raise BadInput(f"{who} stands in another file, too; take one of them out")
            facts = {
                variant.teacher: (own[variant.teacher], "made with another teacher"),
                "world": (own["world"], "made with another world"),
            }
            if variant.trained:
                as_recipe = line.get("steps") == steps_of(variant.flags, None, variant.times)
                facts["steps"] = as_recipe, "trained for other steps"
            for name, (value, differs) in facts.items():
                if known.setdefault(name, value) != value:
                    raise BadInput(f"{who} was {differs} than lines before; take it out")
            lines[run] = line
    if not lines:
        raise BadInput(f"{files[0]} has no line of method {METHOD}; python -m tiny study writes such lines")
    return lines


def filled(text: str, lines: Lines, file: Path) -> str:
    """The text of a Markdown file, its places written anew."""
    names = [place[1] for place in PLACE.finditer(text)]
    if not names or len(names) != len(re.findall(r"<!--\s*python -m tiny report", text)):
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


def moments(values: list[float]) -> tuple[float, float]:
    """Their mean, and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) / sqrt(len(values))


def interval(values: list[float]) -> tuple[float, float]:
    """Their mean, and half the length of its 95 % interval."""
    mean, error = moments(values)
    low, high = 0.0, 13.0  # 12.7 of two values, less of more
    for _ in range(50):  # the t whose p is LEVEL, by halving
        t = (low + high) / 2
        low, high = (t, high) if t_chance(t, 1, len(values)) > LEVEL else (low, t)
    return mean, low * error


def t_chance(mean: float, error: float, n: int) -> float:
    """Two-sided p of Student's t of n values (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    freedom, angle = n - 1, atan2(abs(mean), error * sqrt(n - 1))
    power, total = freedom % 2, 0.0
    term = cos(angle) ** power
    while power <= freedom - 2:
        total += term
        term *= cos(angle) ** 2 * (power + 1) / (power + 2)
        power += 2
    inside = sin(angle) * total
    return 1 - (2 / pi * (angle + inside) if freedom % 2 else inside)


def holm(chances: list[float]) -> int:
    """How many of these p stay below LEVEL with Holm's correction for all of them."""
    kept = [p * (len(chances) - i) < LEVEL for i, p in enumerate(sorted(chances))]
    return kept.index(False) if False in kept else len(kept)


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
    """The systems, and below rivals what they have at their best rates."""
    rows = TABLES["systems"] | TABLES["rates"]
    return scores(lines, {name: rows[name] for name in HEADLINE}, ())


def questions(lines: Lines) -> str:
    """One table of those of QUESTIONS."""
    cells = []
    for table in QUESTIONS:
        for name, variant in TABLES[table].items():
            row = [said(values_of(lines, variant, score)) for score in ("recognition", "compositional")]
            if seeds := len(seeds_of(lines, variant)):
                cells.append([table, name, words_of(variant), str(seeds), *row])
    return markdown(["", "", "flags", "seeds", "recognition", "compositional"], cells)


def scores(lines: Lines, rows: dict[str, Variant], kinds: tuple[str, ...]) -> str:
    """A table of variants, each beside the paper's form or, where that is not in it, the first row of its
    teacher; with the means of these kinds of caption pairs, or with the least of all.
    """
    ours = next((name for name, variant in rows.items() if variant == Variant(PAPER)), None)
    first = {variant.teacher: variant for variant in reversed(rows.values())}
    cells = []
    for name, variant in rows.items():
        if not (n := len(seeds_of(lines, variant))):
            continue
        means = {kind: np.mean(values_of(lines, variant, kind)) for kind in COMPOSITION}
        least = min(means, key=means.get)
        where = f" ({least})" * (f"{means[least]:.1f}" != f"{max(means.values()):.1f}")
        known = sum(min(both) >= KNOWN for both in zip(*(values_of(lines, variant, k) for k in RELATIONAL)))
        base = rows[ours] if ours else first[variant.teacher]
        change = paired(lines, variant, base) if variant.trained and variant != base else []
        cells.append(
            [
                name,
                str(n) if variant.trained else "",
                said(values_of(lines, variant, "recognition")),
                said(values_of(lines, variant, "compositional")),
                *([f"{means[kind]:.1f}" for kind in kinds] or [f"{means[least]:.1f}{where}"]),
                f"{known} of {n}",
                said(values_of(lines, variant, "similarity"), 2),
                said(change, signed=True) + f" (of {len(change)})" * (0 < len(change) != n),
            ]
        )
    minus = ours or f"the first row{' of its teacher' * (len(first) > 1)}"
    columns = *(kinds or ("least kind",)), "relations", "similarity", f"minus {minus}"
    return markdown(["", "seeds", "recognition", "compositional", *columns], cells)


def words_of(variant: Variant) -> str:
    """What it is trained with."""
    teacher = f" --teacher {variant.teacher}" * (variant.teacher != "tiny")
    return f"`{variant.flags}{teacher}`"


def flags_of(lines: Lines, rows: dict[str, Variant]) -> str:
    """What was trained, of each row that has lines."""
    trained = {name: v for name, v in rows.items() if v.trained and seeds_of(lines, v)}
    return "; ".join(f"{name}: {words_of(variant)}" for name, variant in trained.items())


def budget(lines: Lines, rows: dict[str, Variant]) -> str:
    """Scores on few items on the way, of each seed: recognition / compositional, at a tenth of the points;
    and the first of all points from which on both are as in LEARNED.
    """
    known = [(name, seed, lines[v, seed]) for name, v in rows.items() for seed in seeds_of(lines, v)]
    steps = sorted({int(step) for _, _, line in known for step in line["curve"]})
    every = max(1, len(steps) // 10)
    steps, cells = steps[every - 1 :: every], []
    for name, seed, line in known:
        points = [line["curve"].get(str(step)) for step in steps]
        path = [f"{p['recognition']:.0f} / {p['compositional']:.0f}" if p else "" for p in points]
        end = f"{line['recognition']:.1f} / {line['compositional']:.1f}"
        cells.append([name, str(seed), *path, end, learned(line["curve"])])
    both = " / ".join(str(least) for least in LEARNED.values())
    return markdown(
        ["steps", "seed", *(f"{step:,}" for step in steps), "end, all items", f"{both} from"], cells
    )


def learned(curve: dict[str, dict[str, float]]) -> str:
    """The first step from which on every point has LEARNED; "" where the last one has not."""
    first = ""
    for step in sorted(curve, key=int, reverse=True):
        if any(curve[step][score] < least for score, least in LEARNED.items()):
            break
        first = f"{int(step):,}"
    return first


def claims(lines: Lines) -> str:
    """Every difference that the paper claims, beside ours, in points of compositional accuracy; then OURS."""
    cells, chances = [], {}  # chances: of different claims of the paper
    for table, row, other in (*CLAIMS, *OURS):
        pair = TABLES[table][row], TABLES[table][other]
        if not (change := paired(lines, *pair)):
            continue
        published = PUBLISHED[table][row] - PUBLISHED[table][other] if table in PUBLISHED else None
        p = verdict = ""
        if len(change) > 2:
            mean, error = moments(change)
            chance = t_chance(mean, error, len(change))
            p, verdict = f"{chance:.3f}" if chance >= 0.001 else "< 0.001", "not told apart"
            if published is not None:
                chances[pair] = chance
            if chance < LEVEL:
                same = published is not None and mean * published > 0
                verdict = "told apart" if published is None else "holds" if same else "the opposite"
        paper = "" if published is None else f"{published:+.1f}"
        numbers = [paper, said(change, signed=True), str(len(change)), p]
        cells.append([table, f"{row} over {other}", *numbers, verdict])
    n, apart = len(chances), sum(p < LEVEL for p in chances.values())
    text = (
        "*Holds* or *the opposite*: the interval leaves out 0, with the mean on the paper's side or on the "
        f"other one; sizes are not compared. Of the paper's {n} different claims {apart} are told apart, "
        f"where {n * LEVEL:.1f} would be by chance; with Holm's correction for all {n}, "
        f"{holm(list(chances.values()))}."
    )
    rows = markdown(["", "", "paper, one seed", "here", "seeds", "p", "verdict"], cells)
    return f"{rows}\n\n{text}" if chances else rows


def forcing(lines: Lines) -> list[str]:
    """The intervention: the teacher's attention mixed into a finished student, and the controls."""
    rows = {"SFT": SFT, "KD": KD, "KD with TAF": KD_TAF, "CompoDistill": PAPER}
    rows |= {"CompoDistill, row by row": ROWS}
    rows |= {name: v.flags for name, v in TABLES["rates"].items() if "--lr" in v.flags}
    ways, cells = ("mean", "full", "own mean", "other picture"), []
    for name, flags in rows.items():
        if own := values_of(lines, Variant(flags), "forced"):
            changes = [[forced[way] - forced["as it is"] for forced in own] for way in ways]
            before = said([forced["as it is"] for forced in own])
            cells.append([name, str(len(own)), before, *(said(change, signed=True) for change in changes)])
    head = ["", "seeds", "as it is", "mean with the teacher's", "the teacher's instead"]
    head += ["control: own head mean", "control: of another picture"]
    title = "### Forcing the teacher's attention on a student (the paper's section 3)"
    text = f"{FORCED} pairs a kind; points that replacing the attention of the matched layers adds.\n\n"
    return [f"{title}\n\n{text}{markdown(head, cells)}"] if cells else []


def chain(lines: Lines) -> list[str]:
    """Similarity of attention against accuracy, over all students of the recipe's length."""
    runs = [(v, line) for (v, _), line in lines.items() if v.times == 1 and "similarity" in line]
    if len(runs) < 10:
        return []
    x, y = (np.array([line[score] for _, line in runs]) for score in ("similarity", "compositional"))
    variants = list(dict.fromkeys(v for v, _ in runs))
    groups = [np.array([i for i, (v, _) in enumerate(runs) if v == one]) for one in variants]
    means = [np.array([values[group].mean() for group in groups]) for values in (x, y)]
    rho, p = within(x, y, [group for group in groups if len(group) > 1])
    least = LEARNED["compositional"]
    below = [values[means[1] < least] for values in means]
    some = len(below[0])
    few = f"; over those {some} whose mean accuracy is below {least}: {over_means(*below)}" if some else ""
    text = (
        f"Rank correlation (Spearman) of similarity and compositional accuracy over {len(runs)} students of "
        f"{len(groups)} variants: {correlation(x, y, groups)}; over the means of the variants: "
        f"{over_means(*means)}{few}; within variants, each value minus its variant's mean: {rho:.2f} "
        f"(p = {p:.3f}: how often {RESAMPLES:,} shuffles within variants are as far from 0). "
        f"Intervals: {RESAMPLES:,} resamples of variants."
    )
    return [f"### Attention and accuracy, over all students\n\n{text}"]


def over_means(x: np.ndarray, y: np.ndarray) -> str:
    return correlation(x, y, [np.array([i]) for i in range(len(x))])


def correlation(x: np.ndarray, y: np.ndarray, groups: list[np.ndarray]) -> str:
    """ "0.71 [0.52, 0.83]": the interval from resamples of the groups of indices."""
    rng, rhos = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        rhos.append(spearman(x[drawn], y[drawn]))
    low, high = np.percentile(rhos, [2.5, 97.5])
    return f"{spearman(x, y):.2f} [{low:.2f}, {high:.2f}]"


def within(x: np.ndarray, y: np.ndarray, groups: list[np.ndarray]) -> tuple[float, float]:
    """Spearman's rho of what is left of x and y without the means of their groups, and its p by shuffles."""
    if not groups:
        return 0.0, 1.0
    # rounded: equal ones stay equal
    x, y = ([(values[group] - values[group].mean()).round(9) for group in groups] for values in (x, y))
    rng, x, rho = np.random.default_rng(0), np.concatenate(x), spearman(np.concatenate(x), np.concatenate(y))
    shuffles = (np.concatenate([rng.permutation(group) for group in y]) for _ in range(RESAMPLES))
    as_far = sum(abs(spearman(x, shuffled)) >= abs(rho) - 1e-12 for shuffled in shuffles)
    return rho, (1 + as_far) / (1 + RESAMPLES)


SECTIONS = {"headline": headline, "questions": questions, "claims": claims, "tables": tables}

# ---------------------------------------------------------------- figures


FIGURES = {  # file -> panels, title; what they show says figure_rows
    "study.png": (figures.study_panels, "Every student of the study"),
    "budget.png": (figures.budget_panels, f"Eight times the steps: {ITEMS} test items a kind"),
}


def draw_figures(folder: Path, lines: Lines) -> None:
    """study.png: each system's seeds, and attention against accuracy; budget.png: accuracy against steps."""
    folder.mkdir(exist_ok=True)
    drawn = [
        figures.draw(folder / name, panels, (10, 4.5), title, rows)
        for (name, (panels, title)), rows in zip(FIGURES.items(), figure_rows(lines))
        if rows
    ]
    if not all(drawn):
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
