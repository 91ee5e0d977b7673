"""The story: does the paper's argument hold on the tiny world? One report (Markdown) of our own figures.

    python eval.py story --out FOLDER

The argument is a chain of four links: attention is misaligned -> alignment goes with accuracy -> forcing
alignment helps -> training for it helps most. Each link is a list of claims, each that a number is above 0.
Whether a claim holds is read off its 95 % interval, and no sentence says more than the numbers of this run.
Shapes: n questions or pairs, L layers.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

import distill
from evals import scorers
from evals.analyses import (
    ALIGNED,
    ANALYSES,
    FAMILIES,
    GROUPS,
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
    spearman,
    understanding_cosine,
    world_questions,
    write_rows,
)  # fmt: skip
from evals.benchmarks import markdown
from evals.figures import FIGURES, NO_PLOTS
from tiny.world import make_world, tiny_cases


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
    counts = {word: sum(claim.verdict == word for claim in claims) for word in VERDICTS}
    for word, count in counts.items():
        if count == len(claims):
            return word
    opposite = counts["the opposite holds"]
    against = f", the opposite of {opposite}" if opposite else ""
    if not counts["holds"]:
        return "not shown" + against
    return f"in part: {counts['holds']} of {len(claims)} claims hold{against}"


VERDICTS = ("holds", "not shown", "the opposite holds")


def misaligned(study: Study) -> list[Claim]:
    """Link 1: students that were not trained to look where the teacher looks share its view of the text more
    than its view of the picture.
    """
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
    claims, pairs = [], study.questions["compositional"]
    drawn, seen = resamples(pairs), study.observed["compositional"]
    hits = {
        (name, share): pair_hits(odds) for name, x in study.intervened.items() for share, odds in x.items()
    }
    rivals = {
        share: max(present(PLAIN, study), key=lambda name: hits[name, share].mean(), default=None)
        for share in ("as it is", "mean")
    }
    for name in present(ALIGNED, study) if rivals["mean"] else []:
        plain = rivals["as it is"]
        gain = understanding_cosine(seen[name]) - understanding_cosine(seen[plain])
        claims.append(Claim(f"{name} minus {plain}: cosine over image tokens", *estimate(gain, drawn)))
        for share, text in (("as it is", ""), ("mean", " with the teacher's attention mixed in")):
            gain = hits[name, "as it is"] - hits[rivals[share], share]
            title = f"{name} minus {rivals[share]}{text}, points"
            claims.append(Claim(title, *estimate(gain, drawn[:, ::2])))
    return claims


def present(names: tuple[str, ...], study: Study) -> list[str]:
    return [name for name in names if name in study.observed["compositional"]]


NOBODY = "its students are missing, or at chance"
LINKS = {
    "1. attention is misaligned": misaligned,
    "2. alignment goes with accuracy": goes_with_accuracy,
    "3. forcing alignment helps": forcing_helps,
    "4. training for it helps most": training_helps_most,
}


def spread(value: float, low: float, high: float, digits: int = 1) -> str:
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def score_table(study: Study, recognised: dict[str, np.ndarray]) -> str:
    """Scores of the models as they are, in %, with intervals."""
    rows, lines = study.rows["intervention"], []
    for name, right in recognised.items():
        own = [row for row in rows if (row["model"], row["attention"]) == (name, "as it is")]
        cells = {row["kind"]: spread(row["score"], row["low"], row["high"]) for row in own}
        first = spread(*estimate(100 * right, resamples(study.questions["recognition"])))
        lines.append([name, first, cells["all"], *(cells[family] for family in FAMILIES)])
    return markdown(["%", "recognition", "compositional", *FAMILIES], lines)


def picture_share(study: Study) -> str:
    """How much of the answering position's attention falls on the picture, inside and outside."""
    lines = []
    for name in study.observed["compositional"]:
        cells = [name]
        for items in study.observed:
            mass = study.observed[items][name].mass["image"].mean(0)  # (L,)
            inside = np.isin(np.arange(len(mass)), distill.understanding_layers(len(mass)))
            cells += [f"{100 * mass[inside].mean():.0f}", f"{100 * mass[~inside].mean():.0f}"]
            cells.append(f"{mass.argmax()} ({100 * mass.max():.0f})")
        lines.append(cells)
    head = [f"{items}: {what}" for items in study.observed for what in ("understanding", "other", "most in")]
    return markdown(["% on the picture", *head], lines)


def cosine_table(study: Study) -> str:
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


def kd_against_sft(study: Study) -> str:
    """Does plain distillation bring attention nearer? The paper says: on recognition, not on composition."""
    if len(present(PLAIN, study)) < 2:
        return ""
    said = []
    for items, models in study.observed.items():
        gain = understanding_cosine(models["KD"]) - understanding_cosine(models["SFT"])
        claim = Claim("", *estimate(gain, resamples(study.questions[items])))
        word = {"holds": "nearer", "not shown": "neither nearer nor farther", "the opposite holds": "farther"}
        said.append(
            f"on {items} items KD is {word[claim.verdict]} than SFT "
            f"({claim.value:+.2f} [{claim.low:+.2f}, {claim.high:+.2f}])"
        )
    return "Distilling the answers alone: " + ", ".join(said) + "."


def across_students(study: Study) -> str:
    """Similarity beside score, one point a student: an order, no test."""
    names = [name for name in study.intervened if name != "teacher"]
    cosine = np.array([understanding_cosine(study.observed["compositional"][name]).mean() for name in names])
    score = np.array([pair_hits(study.intervened[name]["as it is"]).mean() for name in names])
    if len(names) < 3:
        return ""
    return (
        f"Between the {len(names)} students, similarity and compositional score have rho = "
        f"{spearman(cosine, score):.2f}; so few points are an order, not a test, and training for alignment "
        "changes more than alignment."
    )


def correlation_table(study: Study) -> str:
    rows = study.rows["correlation"]
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [spread(row["rho"], row["low"], row["high"], 2) for row in rows if row["model"] == name]
        lines.append([name, *own])
    head = [f"{row['items']}, {row['over']}" for row in rows if row["model"] == rows[0]["model"]]
    return markdown(["rho", *head], lines)


def intervention_table(study: Study) -> str:
    lines = []
    for name in [name for name in study.intervened if name != "teacher"]:
        for way, (_, share) in WAYS.items():
            own = [
                row for row in study.rows["intervention"] if (row["model"], row["attention"]) == (name, way)
            ]
            change = spread(*(own[-1][key] for key in CHANGE)) if share else ""
            lines.append([name, way, *(f"{row['score']:.1f}" for row in own), change])
    return markdown(["student", "visual attention", *FAMILIES, "all", "change"], lines)


def full_against_mean(study: Study) -> str:
    """The paper reports that full replacement hurts."""
    said = []
    for row in study.rows["intervention"]:
        if (row["attention"], row["kind"]) == ("full", "all"):
            claim = Claim("", *(row[key] for key in CHANGE))
            word = {"holds": "helps", "not shown": "changes nothing that can be told from chance in",
                    "the opposite holds": "hurts"}[claim.verdict]  # fmt: skip
            said.append(f"{word} {row['model']} ({claim.value:+.1f} [{claim.low:+.1f}, {claim.high:+.1f}])")
    return "Full replacement " + ", ".join(said) + "."


CONTROLS = {"own mean": "its own head mean", "other picture": "the teacher's of another picture"}


def against_controls(study: Study) -> str:
    """Is it the teacher's map of this picture that matters? The mean against the same mean with others."""
    lines, drawn = [], resamples(study.questions["compositional"][::2])
    for name in [name for name in study.intervened if name != "teacher"]:
        hits = {way: pair_hits(odds) for way, odds in study.intervened[name].items()}
        lines.append([name, *(spread(*estimate(hits["mean"] - hits[way], drawn)) for way in CONTROLS)])
    head = [f"the teacher's rather than {text}" for text in CONTROLS.values()]
    return markdown(["mean with", *head], lines)


def report(study: Study, recognised: dict[str, np.ndarray], missing: str, figures: bool) -> str:
    """report.md. Every verdict follows from the numbers of this run and their intervals."""
    links = {name: claims(study) for name, claims in LINKS.items()}
    numbers = [len(asked) for asked in study.questions.values()]
    students = ", ".join(name for name in recognised if name != "teacher")
    held = sum(link_verdict(claims) == "holds" for claims in links.values())

    def figure(name: str, text: str) -> str:
        files = f"[CSV]({name}.csv), [JSON]({name}.json)"
        if not figures and name in FIGURES:
            return f"*{text} Numbers: {files}; {NO_PLOTS}.*"
        return f"![{text}]({name}.png)\n\n*{text} Numbers: {files}.*"

    def claim_list(name: str) -> str:
        found = [f"- {claim}" for claim in links[name]] or [f"- not tested: {NOBODY}"]
        return "\n".join([*found, "", f"**Verdict: {link_verdict(links[name])}.**"])

    summary = [
        [name, link_verdict(own), "<br>".join(map(str, own)) or NOBODY]
        for name, own in links.items()
    ]
    first, second, third, fourth = links
    return "\n\n".join(
        part
        for part in [
            "# Does attention carry the argument here?",
            f"CompoDistill argues in four links. Each is tested here on the tiny world, with the teacher and "
            f"its students {students}: {numbers[0]} recognition questions and {numbers[1] // 2} caption "
            f"pairs. **{held} of {len(links)} links hold.**",
            missing,
            markdown(["link", "here", "claims: each says that its number is above 0"], summary),
            "*Numbers: [CSV](links.csv), [JSON](links.json).*",
            "Intervals hold 95 % (bootstrap over pictures); *holds* means that the whole interval is above "
            "0, *not shown* that it includes 0. They are about other test pictures, not about other training "
            "runs: another seed can change a student by more than its interval, and every student here is "
            "one run.",
            "## What the models score",
            score_table(study, recognised),
            "*Recognition: answered word for word. Compositional: P(yes) is higher for the true caption than "
            "for its hard negative; chance is 50.*",
            "## Where the answer comes from",
            figure("attention", "Attention of the answering position over picture and text, by depth."),
            picture_share(study),
            "*In % of the answering position's attention; \"most in\": the layer with the largest share.*",
            f"## {first}",
            figure("similarity", "Cosine of student and teacher attention, by depth of the student's layer."),
            "In the understanding layers, mean over text rows:",
            cosine_table(study),
            claim_list(first),
            "Cosines over different numbers of tokens are not quite on one scale: compare students with one "
            "another first.",
            kd_against_sft(study),
            f"## {second}",
            figure(
                "groups", f"Items in {GROUPS} groups by similarity, each with the same mix of kinds."
            ),
            correlation_table(study),
            "*Spearman's rho of similarity (image tokens, understanding layers) and the probability of the "
            "right answer. \"All\" mixes kinds, of which some are easier and looked at more alike; \"within "
            "kinds\" is the mean of each kind's own rho, and what the verdict rests on. "
            "Numbers: [CSV](correlation.csv), [JSON](correlation.json).*",
            claim_list(second),
            across_students(study),
            f"## {third}",
            figure("intervention", "Caption pairs, with the visual attention as it is, mixed and replaced."),
            intervention_table(study),
            "*% of pairs right; change: against the same student as it is, all pairs, in points.*",
            against_controls(study),
            "*In points of all pairs. A mean mixes one map into all heads: a student's own head mean shows "
            "what that alone does; the teacher's map for the same words and another picture shows what it "
            "does to look in a wrong place.*",
            claim_list(third),
            full_against_mean(study),
            f"## {fourth}",
            claim_list(fourth),
            "## For the eye",
            figure("picture", "Where the words of a question look (bright = much attention), and answers."),
        ]
        if part
    )


def story(args: argparse.Namespace) -> None:
    """All analyses and scores of what is there, and report.md about them."""
    students, missing = find_students(args)
    args.out = args.out or Path("out/story")
    with output_folder(args.out) as folder:
        models, world = load_models(args.teacher, students), make_world(args.world or args.runs / "world")
        questions = world_questions(world, args.limit)
        items = [(question.picture, question.text, question.answer) for question in questions["recognition"]]
        recognised = {name: np.array(scorers.exact_answers(vlm, items)) for name, vlm in models.items()}
        study = analyse(
            models, questions, tiny_cases(world), list(ANALYSES), folder, args.batch_size
        )
        text = report(study, recognised, missing, (folder / "attention.png").exists())
        (folder / "report.md").write_text(text + "\n", encoding="utf-8")
        links = {name: claims(study) for name, claims in LINKS.items()}
        rows = [
            {"link": name, **claim._asdict(), "verdict": claim.verdict}
            for name, claims in links.items()
            for claim in claims
        ]
        write_rows(folder, "links", rows)
    for name, claims in links.items():
        print(f"{name}: {link_verdict(claims)}")
    print(f"{missing}\n{args.out / 'report.md'}".strip())
