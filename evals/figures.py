"""The figures of the analyses: curves with intervals, for readers who may be colour-blind.

matplotlib is the optional extra "plots"; without it every number is written all the same.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from evals.pictures import MADE
from support.files import write_atomically

NO_PLOTS = 'the curves need matplotlib (the extra "plots"): pip install matplotlib, then another --out'

# Okabe and Ito's colours, told apart by colour-blind readers too; each model has a marker of its own besides.
STYLES = {
    "teacher": ("#000000", "o"),
    "sft": ("#E69F00", "s"),
    "kd": ("#56B4E9", "^"),
    "compodistill": ("#009E73", "D"),
    "compodistill-rows": ("#D55E00", "v"),
}
OTHERS = (("#0072B2", "P"), ("#CC79A7", "X"))
LAST = ("#F0E442", "*")  # yellow, the faintest


def styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each model: of eight none has another's."""
    new = [name for name in names if name not in STYLES]
    free = [*OTHERS, *(style for name, style in STYLES.items() if name not in names), LAST]
    return STYLES | {name: free[i % len(free)] for i, name in enumerate(new)}


def draw(file: Path, panels: Callable, size: tuple[float, float], title: str, rows: list[dict]) -> bool:
    """A figure of `rows`, written as PNG. False where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure  # the optional extra "plots"; no window, no global state
    except ImportError:
        return False
    figure = Figure(size, layout="constrained")
    panels(figure, rows)
    figure.suptitle(title)
    handles = {}  # one legend for all panels, outside them
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
        axes.grid(alpha=0.3)
    columns = 3 if sum(map(len, handles)) > 80 else 6
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    whole = io.BytesIO()
    figure.savefig(whole, dpi=130, metadata=dict([MADE.decode().split("\0")]))
    write_atomically(file, whole.getvalue())
    return True


def curves(axes, rows: list[dict], x: Callable, y: str) -> None:
    """One line with intervals for each model."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    for name in names:
        own, (colour, marker) = [row for row in rows if row["model"] == name], styles(names)[name]
        reach = [[row[y] - row["low"] for row in own], [row["high"] - row[y] for row in own]]
        axes.errorbar(
            [x(row) for row in own], [row[y] for row in own], reach, color=colour, marker=marker, ms=5,
            lw=1.4, capsize=2, label=name,
        )  # fmt: skip


def layer_panels(figure, rows: list[dict], y: str, title: str) -> None:
    """Panels of items x tokens over the depth of the layer; the understanding layers are shaded."""
    kinds = list(dict.fromkeys(row["items"] for row in rows))
    grid = figure.subplots(2, len(kinds), sharex=True, sharey="row", squeeze=False)
    for line, tokens in zip(grid, ("image", "text")):
        for axes, items in zip(line, kinds):
            own = [row for row in rows if (row["items"], row["tokens"]) == (items, tokens)]
            axes.axvspan(0.3, 0.7, color="#999999", alpha=0.18, lw=0, label="understanding layers")
            curves(axes, own, lambda row: row["layer"] / row["layers"], y)
            axes.set_title(f"{items} items, {tokens} tokens", fontsize=10)
        line[0].set_ylabel(title)
    for axes in grid[1]:
        axes.set_xlabel("depth: layer / number of layers (0 is the first)")


def attention_panels(figure, rows: list[dict]) -> None:
    layer_panels(figure, rows, "attention", "share of attention")


def similarity_panels(figure, rows: list[dict]) -> None:
    layer_panels(figure, rows, "cosine", "cosine to the teacher")


def group_panels(figure, rows: list[dict]) -> None:
    kinds = list(dict.fromkeys(row["items"] for row in rows))
    for axes, items in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        own = [row for row in rows if row["items"] == items]
        curves(axes, own, lambda row: row["similarity"], "probability")
        axes.set_title(f"{items} items", fontsize=10)
        axes.set_xlabel("cosine to the teacher (image tokens, understanding layers)")
        axes.set_ylabel("mean P(right answer)")
        if items == "compositional":
            axes.axhline(0.5, color="#555555", ls=":", lw=1.2, label="chance on caption pairs")


def intervention_panels(figure, rows: list[dict]) -> None:
    students = [name for name in dict.fromkeys(row["model"] for row in rows) if name != "teacher"]
    ways = {
        "as it is": ("as it is", "#000000", "o"),
        "mean": ("mean with the teacher's", "#0072B2", "s"),
        "full": ("the teacher's instead", "#D55E00", "^"),
        "own mean": ("control: own head mean", "#009E73", "D"),
        "other picture": ("control: other picture", "#CC79A7", "v"),
    }
    families = list(dict.fromkeys(row["kind"] for row in rows))
    panels = figure.subplots(1, len(students), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, students):
        axes.axhline(50, color="#555555", ls=":", lw=1.2, label="chance")
        for shift, (way, (label, colour, marker)) in zip(np.linspace(-0.3, 0.3, len(ways)), ways.items()):
            own = [row for row in rows if row["model"] == name and row["attention"] == way]
            y = [row["score"] for row in own]
            reach = [[row["score"] - row["low"] for row in own], [row["high"] - row["score"] for row in own]]
            axes.errorbar(
                np.arange(len(families)) + shift, y, reach, color=colour, marker=marker, ms=6,
                ls="", capsize=2, label=label,
            )  # fmt: skip
        axes.set_xticks(range(len(families)), families)
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("% of caption pairs right")


def training_panels(figure, rows: list[dict]) -> None:
    """Scores and losses against the steps of stage 2 (`python -m tiny`), a line for each student."""
    titles = {
        "recognition": "recognition, % right",
        "compositional": "compositional, % right",
        "lm": "L_LM",
        "adl": "L_ADL, each by its own distance",
    }
    names = list(dict.fromkeys(row["student"] for row in rows))
    for axes, (column, title) in zip(figure.subplots(2, 2, sharex=True).flat, titles.items()):
        if column == "compositional":
            axes.axhline(50, color="#555555", ls=":", lw=1.2, label="chance on caption pairs")
        for name in names:
            own = [row for row in rows if row["student"] == name and column in row]
            x, y = ([row[key] for row in own] for key in ("step", column))
            colour, marker = styles(names)[name]
            axes.plot(x, y, color=colour, marker=marker, ms=5, lw=1.4, label=name if own else None)
        axes.set_title(title, fontsize=10)
        if column in ("lm", "adl"):
            axes.set_xlabel("step of stage 2")


def loss_panels(figure, rows: list[dict]) -> None:
    """What each layer is worth over the depth, a panel for each kind of items; the paper's layers shaded."""
    kinds = list(dict.fromkeys(row["items"] for row in rows))
    for axes, items in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        axes.axvspan(0.3, 0.7, color="#999999", alpha=0.18, lw=0, label="30 to 70 % of the depth")
        own = [row for row in rows if row["items"] == items]
        curves(axes, own, lambda row: row["layer"] / row["layers"], "loss")
        axes.set_title(f"{items} items", fontsize=10)
        axes.set_xlabel("depth: layer / number of layers (0 is the first)")
        axes.set_ylabel("accuracy that is lost, points")


def study_panels(figure, rows: list[dict]) -> None:
    """Rows of `python -m tiny study`: the systems, seed by seed; attention and accuracy of all."""
    systems, chain = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["student"] for row in rows))
    places = list(dict.fromkeys(row["row"] for row in rows if row["row"]))
    for name in names:
        colour, marker = styles(names)[name]
        own = [row for row in rows if row["student"] == name]
        of_table = [row for row in own if row["row"]]
        how = dict(color=colour, marker=marker, s=26, alpha=0.75, label=name)
        systems.scatter(
            [places.index(row["row"]) for row in of_table], [row["compositional"] for row in of_table], **how
        )
        own = [row for row in own if "similarity" in row]
        chain.scatter([row["similarity"] for row in own], [row["compositional"] for row in own], **how)
    for axes in (systems, chain):
        axes.axhline(50, color="#555555", ls=":", lw=1.2, label="chance on caption pairs")
    labels = [place.replace(", ", ",\n") for place in places]
    systems.set_xticks(range(len(places)), labels, rotation=30, ha="right")
    systems.set_ylabel("compositional, % right")
    systems.set_title("the systems, a mark for each seed", fontsize=10)
    chain.set_xlabel("cosine of student and teacher attention over the picture")
    chain.set_title("all variants, a mark for each student", fontsize=10)


def budget_panels(figure, rows: list[dict]) -> None:
    """Scores against the steps of stage 2, a line for each training."""
    names = list(dict.fromkeys(row["student"] for row in rows))
    for axes, score in zip(figure.subplots(1, 2, sharey=True), ("recognition", "compositional")):
        for name in names:
            colour, marker = styles(names)[name]
            own = [row for row in rows if row["student"] == name]
            for seed in dict.fromkeys(row["seed"] for row in own):
                line = sorted((row["step"], row[score]) for row in own if row["seed"] == seed)
                axes.plot(*zip(*line), color=colour, marker=marker, ms=4, lw=1.2, alpha=0.8, label=name)
        axes.set_title(f"{score}, % right", fontsize=10)
        axes.set_xlabel("step of stage 2")


FIGURES = {  # name -> panels, inches, title
    "attention": (attention_panels, (9, 7), "Where the answering position looks"),
    "similarity": (similarity_panels, (9, 7), "Attention of student and teacher: cosine over text rows"),
    "groups": (group_panels, (10, 4.5), "Items grouped by similarity to the teacher, and their answers"),
    "intervention": (intervention_panels, (11, 4.5), "Visual attention replaced in the understanding layers"),
    "layers": (loss_panels, (10, 4.5), "Visual attention made uniform in one layer"),
}
