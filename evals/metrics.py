"""What replies are worth: parsers, the two published normalisations of short answers, scores, intervals.

    [Item], {key: reply} -> rows of a table

Intervals are 95 %: Wilson for shares of things that count once; for all else (means of several orders, soft
accuracies, F1, sums over subsets) a percentile bootstrap, 1,000 resamples, seed 0, which draws whole units
(a pair of captions in all orders, an MME picture, else a question), each subset in its own size. It has no
width where all units agree. Questions to one picture count as independent.
Missing answers: a unit that lacks one is left out of every figure; "missing" counts them and a note says so.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from evals.readers import COGNITION, LETTERS, PERCEPTION, YES_NO, Item, Truth


class Estimate(NamedTuple):
    """A measured number with its 95 % interval: percent, except MME's scores."""

    value: float
    low: float
    high: float
    n: float  # of the things counted
    interval: str  # "Wilson" or "bootstrap"

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.1f}, {self.high:.1f}]"


# ---------------------------------------------------------------- what a reply says


# What follows the letter A, but no article: adverbs and a verb ("best matches", "would"), and other words.
ADVERBS = r"(?:(?:best|better|more|most|only|(?!family|butterfly)\w{4,}ly)\s+)*"
VERB = r"(?:is|was|has|would|should|could|(?:can|may|might|must|will)\s+be|[a-z]+[b-hj-nprtv-z]s)"
NO_NOUN = rf"(?!series|species|sports)(?:{ADVERBS}{VERB}|because|and|or|nor|but|as|[Tt]he|[Aa]n?)\b"


def option(reply: str, letters: Sequence[str] = "AB") -> str | None:
    """The letter that a reply chooses, or None: no letter, or several of them.

    A reply chooses what it is or begins with ("B", "(b)", "A. A cat"), unless another letter or a word like
    "or" comes next; else the only letter in it that stands alone. An "A" before a word is the article, unless
    a verb follows ("A best matches it"), another word that follows no article ("A because") or, at most two
    words on, another letter ("A over B"): so "B behind" chooses B and "A behind" nothing.
    """
    some = f"[{''.join(letters)}]"
    end = r"(?:\W*$|[).:,\]\"'])"
    more = rf"[^\w\n]*(?:(?:and|or|nor|but|also|maybe|perhaps|possibly)\b|{some}{end})"
    if match := re.match(rf"\W*({some})(?:\n(?!\W*{some}\W*$)|{end}(?!{more}))", reply, re.IGNORECASE):
        return match[1].upper()
    article = rf"(?!\s+(?!{NO_NOUN}|(?:\w+\.?\s+){{0,2}}(?!A){some}\b)\w)"
    alone = rf"\((?i:({some}))\)|(?<![\w.'-])(?:(?!A)({some})|(A){article})(?![\w'-])"
    found = {"".join(groups).upper() for groups in re.findall(alone, reply)} & set(letters)
    return found.pop() if len(found) == 1 else None


def released_option(reply: str, letters: Sequence[str] = "AB") -> str | None:
    """The letter that a reply chooses by CompoDistill's released code, which takes the article "a" for A."""
    match = re.search(rf"\b([{''.join(letters)}])\b", reply.strip().upper())
    return match[1] if match else None


def mme_reply(reply: str) -> str:
    """yes, no or other by MME's official rule: within the first four characters, yes looked for first."""
    start = reply.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def pope_reply(reply: str) -> str:
    """yes or no by POPE's rule, which R-Bench has: what is not no is yes, an empty reply and "NO" too."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def first_word(reply: str) -> str:
    """Our rule for Reefknot, which documents none."""
    word = re.search(r"[^\W_]+", reply.lower())
    return word[0] if word and word[0] in YES_NO else "other"


# ---------------------------------------------------------------- short answers

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
# A word with one of its apostrophes missing is mended. Words that are also others (its, were, hell) are not
# in the published table, nor is a form with two missing.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've"""
APOSTROPHES = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTIONS.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round, as published


@lru_cache(maxsize=1 << 18)
def normalise_evalai(text: str) -> str:
    """Normalise an answer as LLaVA's m4c_evaluator and lmms-eval do (N1)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(text)


@lru_cache(maxsize=1 << 18)
def normalise_official(text: str) -> str:
    """Normalise an answer as GT-Vision-Lab's vqaEval does (N2), where it does; see official_accuracy."""
    return _words(text)


def plain(text: str) -> str:
    """A text on one line, without white space at its ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _words(text: str) -> str:
    text = out = plain(text)
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        drop = beside_space or re.search(r"\d,\d", text)
        out = out.replace(mark, "" if drop else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # only 32, by a slip of the originals
    words = (NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


def soft_accuracy(
    reply: str, answers: Sequence[str], normalise: Callable[[str], str] = normalise_evalai
) -> float:
    """min(1, matches / 3) among the other answers, mean over leaving out each answer in turn, by position.

    In closed form: with n of k answers matching, n times it is one of them that is left out.
    """
    said, k = normalise(reply), len(answers)
    n = sum(normalise(answer) == said for answer in answers)
    return (n * min(1, (n - 1) / 3) + (k - n) * min(1, n / 3)) / k


def official_accuracy(reply: str, answers: Sequence[str]) -> float:
    """soft_accuracy as vqaEval has it: when all answers are the same text, only ends are stripped."""
    differ = len(set(map(plain, answers))) > 1
    return soft_accuracy(reply, answers, normalise_official if differ else plain)


# ---------------------------------------------------------------- intervals

Z, RESAMPLES = 1.959964, 1000  # Z: 95 % of the normal distribution lie within


def share(hits: float, n: float) -> Estimate:
    """100 * hits / n with its Wilson interval; of nothing it is 0 with all of [0, 100]."""
    if n < 1:
        return Estimate(0.0, 0.0, 100.0, 0, "Wilson")
    p, z = hits / n, Z * Z / n
    centre, half = (p + z / 2) / (1 + z), (z * p * (1 - p) + z * z / 4) ** 0.5 / (1 + z)
    low, high = max(0.0, centre - half), min(1.0, centre + half)  # rounding alone leads out of it
    return Estimate(100 * p, 100 * low, 100 * high, int(n), "Wilson")


def bootstrap(strata: list[np.ndarray], statistic: Callable[[list[np.ndarray]], np.ndarray]) -> Estimate:
    """A statistic of means and its 95 % interval, by resampling the units of each stratum.

    strata: (units, k) each; statistic: the means (R,k) of each stratum -> (R,), for R samples at once.

    Drawing units with replacement is drawing how often each kind of unit comes: the multinomial does it for
    any number of units at the price of the few kinds that there are.
    """
    random, means = np.random.default_rng(0), []
    for units in strata:
        kinds, counts = np.unique(units, axis=0, return_counts=True)
        n = len(units)
        means.append(random.multinomial(n, counts / n, size=RESAMPLES) @ kinds / n)
    value = statistic([units.mean(0, keepdims=True) for units in strata])
    low, high = np.percentile(statistic(means), [2.5, 97.5])
    return Estimate(float(value[0]), float(low), float(high), sum(map(len, strata)), "bootstrap")


def mean(values: Sequence[float]) -> Estimate:
    """The mean in percent, and its interval, of one value in 0..1 per unit."""
    return bootstrap([100 * np.array(values, dtype=float)[:, None]], lambda means: means[0][:, 0])


def averages(strata: dict[str, list[float]], column: str) -> list[dict]:
    """Unweighted means: subsets ("swap_obj") count the same, in a branch its sources ("Relation/VG") do."""
    branches: dict[str, list[np.ndarray]] = {}
    for row, values in strata.items():
        if values:
            branches.setdefault(row.split("/")[0], []).append(100 * np.array(values, dtype=float)[:, None])

    def row(name: str, branches: list[list[np.ndarray]]) -> dict:
        weights = [1 / len(branches) / len(sources) for sources in branches for _ in sources]
        figure = bootstrap(
            [units for sources in branches for units in sources],
            lambda means: sum(weight * m[:, 0] for weight, m in zip(weights, means)),
        )
        return {"": name, "n": figure.n, column: figure}

    rows = [row(f"mean of {len(branches)} subsets", list(branches.values()))] if branches else []
    return rows + [row(f"{name}, mean", [sources]) for name, sources in branches.items() if len(sources) > 1]


# ---------------------------------------------------------------- scores: (items, answers) -> rows


class Row(NamedTuple):
    units: list[list[tuple[Truth, str]]]  # the complete ones: their truths and replies
    missing: int  # answers


def gather(items: list[Item], answers: dict[str, str]) -> dict[str, Row]:
    """Each row of the table with its units; rows with many units ("all") come before their parts."""
    units: dict[str, list[Item]] = {}
    for item in items:
        units.setdefault(item.answer.unit or item.key, []).append(item)
    rows, depth = {}, {}
    for unit in units.values():
        missing = sum(item.key not in answers for item in unit)
        for level, name in enumerate(unit[0].answer.rows):
            depth.setdefault(name, level)
            row = rows.get(name, Row([], 0))
            if not missing:
                row.units.append([(item.answer, answers[item.key]) for item in unit])
            rows[name] = row._replace(missing=row.missing + missing)
    return {name: rows[name] for name in sorted(rows, key=depth.get)}


def table(rows: dict[str, Row], cells: Callable[[list], dict[str, Estimate]]) -> list[dict]:
    """The rows of a table, with `cells` of the complete units of each."""
    return [
        {"": name, "n": len(row.units), **(cells(row.units) if row.units else {}), "missing": row.missing}
        for name, row in rows.items()
    ]


def squares(hits: Iterable[tuple[str, bool]]) -> dict[str, list[bool]]:
    """The two results of each square that has both, in the order of its pictures."""
    found: dict[str, list[bool]] = {}
    for key, hit in hits:
        if key:
            found.setdefault(key, []).append(hit)
    return {key: hits for key, hits in found.items() if len(hits) == 2}


def score_choice(items: list[Item], answers: dict[str, str], pick: Callable, average: bool) -> list[dict]:
    """Score written choices: the truth under each letter, mean over the letters.

    I2T: both pictures of a square right in all orders.
    """

    def right(unit: list) -> list[bool]:
        return [pick(reply, LETTERS[: len(unit)]) == truth.label for truth, reply in unit]

    def cells(units: list) -> dict[str, Estimate]:
        hits, none = {}, []
        for unit in units:
            for (truth, reply), hit in zip(unit, right(unit)):
                hits.setdefault(f"truth is {truth.label}", []).append(hit)
                none.append(pick(reply, LETTERS[: len(unit)]) is None)
        found = {"accuracy": mean([np.mean(right(unit)) for unit in units])}
        found |= {column: share(sum(hits[column]), len(hits[column])) for column in sorted(hits)}
        found["no option"] = share(sum(none), len(none))
        both = squares((unit[0][0].square, all(right(unit))) for unit in units).values()
        return found | ({"I2T": share(sum(map(all, both)), len(both))} if both else {})

    rows = gather(items, answers)
    means = {name: [float(np.mean(right(unit))) for unit in row.units] for name, row in rows.items()}
    return (averages(means, "accuracy") if average else []) + table(rows, cells)


def score_soft(items: list[Item], answers: dict[str, str], constant: str | None = None) -> list[dict]:
    """Score by VQA's soft accuracy with both normalisations, and one constant answer (by N1) beside it."""

    def cells(units: list) -> dict[str, Estimate]:
        pairs = [(reply, truth.label) for unit in units for truth, reply in unit]
        found = {
            "N1": mean([soft_accuracy(*pair) for pair in pairs]),
            "N2": mean([official_accuracy(*pair) for pair in pairs]),
        }
        if constant:
            found[f'always "{constant}"'] = mean([soft_accuracy(constant, label) for _, label in pairs])
        return found

    return table(gather(items, answers), cells)


def score_gqa(items: list[Item], answers: dict[str, str]) -> list[dict]:
    """Score by exact match, but for case and a full stop at the end."""

    def cells(units: list) -> dict[str, Estimate]:
        hits = [reply.strip().rstrip(".").lower() == truth.label for unit in units for truth, reply in unit]
        return {"accuracy": share(sum(hits), len(hits))}

    return table(gather(items, answers), cells)


# Counts of yes/no replies (..., 6): the truth is yes and the reply yes, no, other; then the truth is no.
ALL = [0, 1, 2, 3, 4, 5]
RATES = {"accuracy": ([0, 4], ALL), "precision": ([0], [0, 3]), "recall": ([0], [0, 1, 2])}
RATES_OF_NO = {"precision": ([4], [1, 4]), "recall": ([4], [3, 4, 5])}
OTHER_RATES = {"yes ratio": ([0, 3], ALL), "other": ([2, 5], ALL)}
# MME's calculation.py leaves replies that are neither yes nor no out of recall, not out of accuracy.
MME_RATES = RATES | {"recall": ([0], [0, 1])}
MME_RATES_OF_NO = RATES_OF_NO | {"recall": ([4], [3, 4])}


def counted(units: list, parse: Callable[[str], str]) -> np.ndarray:
    """Which of the six cases each reply is, one-hot (replies,6)."""
    cases = [
        3 * (truth.label == "no") + ("yes", "no", "other").index(parse(reply))
        for unit in units
        for truth, reply in unit
    ]
    return np.eye(6)[cases]


def rate(counts: np.ndarray, part: list[int], whole: list[int], eps: float) -> np.ndarray:
    """Some of the six counts (...,6) as a share of others -> (...,); shares of all replies have no eps."""
    return counts[..., part].sum(-1) / np.maximum(counts[..., whole].sum(-1) + eps * (whole != ALL), 1e-12)


def f1(counts: np.ndarray, eps: float, rates: dict = RATES) -> np.ndarray:
    """F1 of the six counts (...,6) -> (...,), 0 where nothing is positive; R-Bench has POPE's eps, 1e-5."""
    p, r = rate(counts, *rates["precision"], eps), rate(counts, *rates["recall"], eps)
    return 2 * p * r / np.maximum(p + r + eps, 1e-12)


def yes_no(
    cases: np.ndarray, eps: float = 0.0, rates: dict = RATES, of_no: dict = RATES_OF_NO
) -> dict[str, Estimate]:
    """All rates of yes/no replies, with intervals: cases (replies,6)."""
    counts = cases.sum(0)

    def shares(rates: dict) -> dict[str, Estimate]:
        return {
            name: share(counts[p].sum(), counts[w].sum() + eps * (w != ALL)) for name, (p, w) in rates.items()
        }

    def score(rates: dict) -> Estimate:
        return bootstrap([cases], lambda means: 100 * f1(len(cases) * means[0], eps, rates))

    return shares(rates) | {"F1": score(rates), "F1 of no": score(of_no)} | shares(OTHER_RATES)


def score_mme(items: list[Item], answers: dict[str, str]) -> list[dict]:
    """Accuracy + accuracy over pictures with both questions right, each up to 100; summed over subtasks."""

    def points(units: list) -> np.ndarray:  # (pictures, 2)
        right = [[mme_reply(reply) == truth.label for truth, reply in unit] for unit in units]
        return np.array([(100 * np.mean(unit), 100 * all(unit)) for unit in right])

    def cells(units: list) -> dict[str, Estimate]:
        both = points(units)
        figures = yes_no(counted(units, mme_reply), rates=MME_RATES, of_no=MME_RATES_OF_NO)
        plus = share((both[:, 1] > 0).sum(), len(both))
        score = bootstrap([both], lambda means: means[0].sum(-1))
        return {"score": score, "accuracy": figures.pop("accuracy"), "accuracy+": plus, **figures}

    rows, sums = gather(items, answers), []
    for name, subtasks in {"perception": PERCEPTION, "cognition": COGNITION}.items():
        have = [points(rows[task].units) for task in subtasks if task in rows and rows[task].units]
        if have:
            score = bootstrap(have, lambda means: sum(mean.sum(-1) for mean in means))
            title = f"{name}: {len(have)} of {len(subtasks)} subtasks"
            sums.append({"": title, "n": score.n, "score": score})
    return sums + table(rows, cells)


def score_rbench(items: list[Item], answers: dict[str, str]) -> list[dict]:
    """Per id list, and the mean of the lists: F1 is averaged, not made from the mean precision and recall.

    n of a list counts its entries, of which some have the same id; of the mean, the ids.
    """
    rows = gather(items, answers)
    found = table(rows, lambda units: yes_no(counted(units, pope_reply), eps=1e-5))
    lists = sorted(name for name in rows if name.startswith("list ") and rows[name].units)
    if not lists:
        return found
    units = rows["all ids"].units
    members = np.array([[unit[0][0].rows.count(name) for name in lists] for unit in units])
    cases = counted(units, pope_reply)[:, None, :] * members[:, :, None]  # (ids, lists, 6)

    def over_lists(function: Callable[..., np.ndarray], *args) -> Estimate:
        def statistic(means: list[np.ndarray]) -> np.ndarray:
            counts = len(units) * means[0].reshape(-1, len(lists), 6)
            return 100 * function(counts, *args, 1e-5).mean(-1)

        return bootstrap([cases.reshape(len(units), -1)], statistic)

    top = {"": f"mean of {len(lists)} lists", "n": int(members.any(1).sum()), "F1": over_lists(f1)}
    top |= {name: over_lists(rate, *parts) for name, parts in (RATES | OTHER_RATES).items()}
    return [top, *found]


def score_reefknot(items: list[Item], answers: dict[str, str]) -> list[dict]:
    """Yes/no: all rates. Choices: accuracy of all replies, those that choose nothing among them.

    The authors' hallucination rate is 100 - accuracy.
    """

    def cells(units: list) -> dict[str, Estimate]:
        if units[0][0][0].label in YES_NO:
            return yes_no(counted(units, first_word))
        said = [(option(reply, "ABCD"), truth.label) for unit in units for truth, reply in unit]
        accuracy = share(sum(letter == label for letter, label in said), len(said))
        return {"accuracy": accuracy, "no option": share(sum(x is None for x, _ in said), len(said))}

    return table(gather(items, answers), cells)
