"""`python -m tiny story`: does the paper's argument hold on the tiny world? One report of our own figures.

The argument is a chain of four links: attention is misaligned -> alignment goes with accuracy -> forcing
alignment helps -> training for it helps most. Each link is a list of claims, each that a number is above 0.
Whether a claim holds is read off its 95 % interval, and no sentence says more than the numbers of this run.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evals.analyses import (
    ALIGNED,
    ANALYSES,
    FAMILIES,
    PAPER,
    PLAIN,
    WAYS,
    Study,
    analyse,
    estimate,
    find_students,
    load_models,
    output_folder,
    pair_hits,
    resamples,
    understanding_cosine,
    world_questions,
    write_rows,
)
from evals.benchmarks import markdown
from evals.figures import FIGURES, NO_PLOTS
from evals.pictures import tiny_cases
from support.errors import one_line
from support.world import make_world
from tiny.scores import exact_answers

# ---------------------------------------------------------------- claims, and what they say together


class Claim(NamedTuple):
    """One measurable sentence: it says that a number is above 0."""

    text: str
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "holds" if self.low > 0 else "the opposite holds" if self.high < 0 else "not shown"

    def __str__(self) -> str:
        return f"{self.text}: {self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}], {self.verdict}"


def link_verdict(claims: list[Claim]) -> str:
    """What several claims say together."""
    if not claims:
        return "not tested"
    verdicts = [claim.verdict for claim in claims]
    if len(set(verdicts)) == 1:
        return verdicts[0]
    holds, opposite = verdicts.count("holds"), verdicts.count("the opposite holds")
    against = f", the opposite of {opposite}" if opposite else ""
    return f"in part: {holds} of {len(claims)} claims hold{against}" if holds else f"not shown{against}"


def present(names: tuple[str, ...], study: Study) -> list[str]:
    """Those of the students that the study has."""
    return [name for name in names if name in study.observed["compositional"]]


def misaligned(study: Study) -> list[Claim]:
    """Link 1: students that were not trained for it share the teacher's view of text more than of image."""
    claims, drawn = [], resamples(study.questions["compositional"])
    for name in present(PLAIN, study):
        seen = study.observed["compositional"][name]
        gap = understanding_cosine(seen, "text") - understanding_cosine(seen, "image")
        claims.append(Claim(f"{name}: cosine over text minus over image tokens", *estimate(gap, drawn)))
    return claims


def goes_with_accuracy(study: Study) -> list[Claim]:
    """Link 2: within a student and a kind, pairs at which it looks as its teacher are answered better."""
    return [
        Claim(f"{row['model']}: rho within kinds", row["rho"], row["low"], row["high"])
        for row in study.rows["correlation"]
        if (row["items"], row["over"]) == ("compositional", "within kinds")
    ]


def forcing_helps(study: Study) -> list[Claim]:
    """Link 3: the teacher's visual attention, mixed in at inference, helps the students without alignment."""
    rows = [row for row in study.rows["intervention"] if row["kind"] == "all"]
    rows = {(row["model"], row["attention"]): row for row in rows}
    return [
        Claim(f"{name}: mean minus as it is, points", *(rows[name, "mean"][key] for key in CHANGE))
        for name in present(PLAIN, study)
        if rows[name, "as it is"]["low"] > 50  # at chance there is nothing to help or to lose
    ]


CHANGE = ("change", "change_low", "change_high")


def training_helps_most(study: Study) -> list[Claim]:
    """Link 4: aligned students are nearer to the teacher and better than the best plain one, also forced."""
    if not present(PLAIN, study):
        return []
    claims, pairs = [], study.questions["compositional"]
    drawn, seen = resamples(pairs), study.observed["compositional"]
    hits = {name: {way: pair_hits(x) for way, x in ways.items()} for name, ways in study.intervened.items()}
    best = max(present(PLAIN, study), key=lambda name: hits[name]["as it is"].mean())
    forced = max(present(PLAIN, study), key=lambda name: hits[name]["mean"].mean())
    for name in present(ALIGNED, study):
        nearer = understanding_cosine(seen[name]) - understanding_cosine(seen[best])
        claims.append(Claim(f"{name} minus {best}: cosine over image tokens", *estimate(nearer, drawn)))
        gain = hits[name]["as it is"] - hits[best]["as it is"]
        claims.append(Claim(f"{name} minus {best}, points", *estimate(gain, drawn[:, ::2])))
        gain = hits[name]["as it is"] - hits[forced]["mean"]
        text = f"{name} minus {forced} with the teacher's attention mixed in, points"
        claims.append(Claim(text, *estimate(gain, drawn[:, ::2])))
    return claims


LINKS = {
    "1. attention is misaligned": misaligned,
    "2. alignment goes with accuracy": goes_with_accuracy,
    "3. forcing alignment helps": forcing_helps,
    "4. training for it helps most": training_helps_most,
}


def tested(study: Study) -> dict[str, list[Claim]]:
    """The claims of every link, with what the study found."""
    return {link: claims(study) for link, claims in LINKS.items()}


# ---------------------------------------------------------------- tables


def spread(value: float, low: float, high: float, digits: int = 1) -> str:
    """A value and its interval."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def score_table(study: Study, recognised: dict[str, np.ndarray]) -> str:
    """Scores of the models as they are, in %, with intervals."""
    lines = []
    for name, right in recognised.items():
        rows = [row for row in study.rows["intervention"] if row["attention"] == "as it is"]
        own = [row for row in rows if row["model"] == name]
        cells = {row["kind"]: spread(row["score"], row["low"], row["high"]) for row in own}
        first = spread(*estimate(100 * right, resamples(study.questions["recognition"])))
        lines.append([name, first, cells["all"], *(cells[family] for family in FAMILIES)])
    return markdown(["%", "recognition", "compositional", *FAMILIES], lines)


def cosine_table(study: Study) -> str:
    """Similarity of each student to the teacher over image and text tokens, in the understanding layers."""
    lines = []
    for name, first in study.observed["compositional"].items():
        if first.cosine:
            lines.append([name])
            for tokens in ("image", "text"):
                for items, models in study.observed.items():
                    cosine = understanding_cosine(models[name], tokens)
                    lines[-1].append(spread(*estimate(cosine, resamples(study.questions[items])), 2))
    head = [f"{tokens}, {items}" for tokens in ("image", "text") for items in study.observed]
    return markdown(["cosine to the teacher", *head], lines)


def correlation_table(study: Study) -> str:
    """Spearman's rho of similarity and the probability of the right answer."""
    rows, lines = study.rows["correlation"], []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [spread(row["rho"], row["low"], row["high"], 2) for row in rows if row["model"] == name]
        lines.append([name, *own])
    head = [f"{row['items']}, {row['over']}" for row in rows if row["model"] == rows[0]["model"]]
    return markdown(["rho", *head], lines)


def intervention_table(study: Study) -> str:
    """Caption pairs right with visual attention as it is, mixed and replaced, and how that changes them.

    The last two columns: the mean with the teacher's map against the same mean with the two controls' maps.
    """
    lines, drawn = [], resamples(study.questions["compositional"][::2])
    for name in [name for name in study.intervened if name != "teacher"]:
        hits = {way: pair_hits(odds) for way, odds in study.intervened[name].items()}
        for way in WAYS:
            rows = study.rows["intervention"]
            own = [row for row in rows if (row["model"], row["attention"]) == (name, way)]
            cells = ["", "", ""]
            if way != "as it is":
                cells[0] = spread(*(own[-1][key] for key in CHANGE))
            if way == "mean":
                controls = [hits["mean"] - hits[control] for control in ("own mean", "other picture")]
                cells[1:] = [spread(*estimate(gain, drawn)) for gain in controls]
            lines.append([name, way, *(f"{row['score']:.1f}" for row in own), *cells])
    head = ["student", "visual attention", *FAMILIES, "all", "change", "against its own mean"]
    return markdown([*head, "against another picture's"], lines)


# ---------------------------------------------------------------- the report


def report(
    study: Study,
    links: dict[str, list[Claim]],
    recognised: dict[str, np.ndarray],
    missing: str,
    figures: bool,
) -> str:
    """The text of report.md, whose every verdict follows from this run's numbers and their intervals."""
    numbers = [len(asked) for asked in study.questions.values()]
    held = sum(link_verdict(claims) == "holds" for claims in links.values())
    nobody = "its students are missing, or at chance"

    def figure(name: str, text: str) -> str:
        files = f"[CSV]({name}.csv), [JSON]({name}.json)"
        if not figures and name in FIGURES:
            return f"*{text} Numbers: {files}; {NO_PLOTS}.*"
        return f"![{text}]({name}.png)\n\n*{text} Numbers: {files}.*"

    summary = [[name, link_verdict(own), "<br>".join(map(str, own)) or nobody] for name, own in links.items()]
    first, second, third, _ = links
    parts = [
        "# Does attention carry the argument here?",
        f"CompoDistill argues in four links, tested here on the tiny world: {numbers[0]} recognition "
        f"questions, {numbers[1] // 2} caption pairs. **{held} of {len(links)} links hold.**",
        missing,
        markdown(["link", "here", "claims: each says that its number is above 0"], summary),
        "*Numbers: [CSV](links.csv), [JSON](links.json).*",
        "Intervals hold 95 % (bootstrap over pictures); *holds* means that the whole interval is above 0, "
        "*not shown* that it includes 0. They are about other test pictures, not about other training runs: "
        "another seed can change a student by more than its interval, and every student here is one run.",
        "## What the models score",
        score_table(study, recognised),
        "*Recognition: answered word for word. Compositional: P(yes) is higher for the true caption than for "
        "its hard negative; chance is 50.*",
        figure("attention", "Attention of the answering position over picture and text, by depth."),
        f"## {first}",
        figure("similarity", "Cosine of student and teacher attention, by depth of the student's layer."),
        cosine_table(study),
        f"## {second}",
        figure("groups", "Items in groups by similarity, each with the same mix of kinds."),
        correlation_table(study),
        '*Spearman\'s rho. "All" mixes kinds, of which some are easier and looked at more alike; "within '
        "kinds\" is the mean of each kind's own. Numbers: [CSV](correlation.csv), [JSON](correlation.json).*",
        f"## {third}",
        figure("intervention", "Caption pairs, with the visual attention as it is, mixed and replaced."),
        intervention_table(study),
        "*% of pairs right; the rest in points. A mean mixes one map into all heads: a student's own head "
        "mean shows what that alone does, the teacher's map for another picture what a wrong place does.*",
        "## For the eye",
        figure("picture", "Where the answering position looks (bright = much attention), and answers."),
    ]
    return "\n\n".join(part for part in parts if part)


def story(args: argparse.Namespace) -> None:
    """All analyses and scores of what is there, and report.md about them."""
    students, missing = find_students(args)
    args.out = args.out or Path("out/story")
    with output_folder(args.out) as folder:
        method = replace(PAPER, layers=args.layers)
        models = load_models(args.teacher, students, method)
        world = make_world(args.world or args.runs / "world")
        questions = world_questions(world, args.limit)
        items = [(question.picture, question.text, question.answer) for question in questions["recognition"]]
        recognised = {name: np.array(exact_answers(vlm, items)) for name, vlm in models.items()}
        cases = tiny_cases(models, world)
        study = analyse(models, questions, cases, list(ANALYSES), folder, args.batch_size, method)
        links = tested(study)
        text = report(study, links, recognised, missing, (folder / "attention.png").exists())
        (folder / "report.md").write_text(text + "\n", encoding="utf-8")
        rows = [
            {"link": name, **claim._asdict(), "verdict": claim.verdict}
            for name, claims in links.items()
            for claim in claims
        ]
        write_rows(folder, "links", rows)
    for name, claims in links.items():
        print(f"{name}: {link_verdict(claims)}")
    print(f"{missing}\n{one_line(args.out / 'report.md')}".strip())
