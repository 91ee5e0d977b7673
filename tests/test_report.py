"""tiny/report.py: means, intervals and paired differences by hand; what it writes, and where."""

import json
import re
import shutil

import numpy as np
import pytest

from support.errors import BadInput
from tiny import report, study
from tiny.__main__ import main
from tiny.study import KD, PAPER, SFT, TABLES, Variant

PRINTS = {"tiny": "t", "world": "w"}


def line(flags, seed, compositional, **more):
    """A line of `study`: every kind of pair has this score."""
    scores = dict.fromkeys(study.SCORES, compositional) | {"recognition": 90.0}
    forced = {"as it is": 50.0, "mean": 53.0, "full": 52.0, "own mean": 50.5, "other picture": 49.0}
    whole = {"flags": flags, "times": 1, "teacher": "tiny", "seed": seed, "method": study.METHOD}
    return whole | scores | {"similarity": 0.5, "forced": forced, "prints": PRINTS} | more


def write(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_intervals_by_hand():
    """Of 1, 2, 3: the mean 2, the deviation 1, t of two degrees of freedom 4.303, by the root of 3."""
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5, rel=3e-4)
    assert report.said([1.0, 2.0, 3.0], signed=True) == "+2.0 ± 2.5"
    assert report.said([7.0]) == "7.0" and report.said([]) == "" and report.said([7.0, -0.01]) == "7.0, 0.0"


def test_the_quantiles_of_t():
    """As published (two-sided 95 %, of 1 to 30 degrees of freedom); and of samples of n normal numbers 95 %
    have an interval that holds the true mean.
    """
    for n, t in ((2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262), (31, 2.042)):
        values = np.arange(float(n))
        assert report.interval(values)[1] == pytest.approx(t * values.std(ddof=1) / n**0.5, rel=3e-4)
        assert report.t_chance(t, 1, n) == pytest.approx(0.05, rel=2e-3)
    assert report.t_chance(0, 1, 5) == 1 and report.t_chance(-9, 0, 5) == pytest.approx(0, abs=1e-12)
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 10, 16, 30):
        samples = rng.standard_normal((4_000, n))
        half = np.array([report.interval(sample)[1] for sample in samples])
        assert np.mean(np.abs(samples.mean(1)) < half) == pytest.approx(0.95, abs=0.012)


def test_differences_are_taken_seed_by_seed(tmp_path):
    """KD has seeds 0 and 1, the paper's form 1 and 2: only seed 1 is a pair. The least kind is named."""
    lines = [line(KD, 0, 40.0), line(KD, 1, 60.0, swap_obj=10.0), line(PAPER, 1, 99.0), line(PAPER, 2, 80.0)]
    read = study.read_lines(write(tmp_path / "lines.jsonl", lines))
    head, _, kd, ours = report.scores(read, TABLES["modules"], ()).splitlines()[:4]
    assert head.endswith("| relations | similarity | minus VAT and TAF |")
    assert kd == "| KD | 2 | 90.0, 90.0 | 40.0, 60.0 | 25.0 (swap_obj) | 0 of 2 | 0.50, 0.50 | -39.0 (of 1) |"
    assert ours == "| VAT and TAF | 2 | 90.0, 90.0 | 99.0, 80.0 | 89.5 | 1 of 2 | 0.50, 0.50 |  |"


def test_who_knows_the_relations(tmp_path):
    """A seed with 90 in both of the two relational kinds."""
    kinds = [(90.0, 90.0), (89.9, 100.0), (100.0, 89.9), (99.0, 91.0)]
    lines = [line(KD, i, 95.0, swap_obj=one, replace_rel=two) for i, (one, two) in enumerate(kinds)]
    read = study.read_lines(write(tmp_path / "lines.jsonl", lines))
    assert " | 2 of 4 | " in report.scores(read, TABLES["modules"], ())


def test_holms_correction():
    """Of 4 the least is to be below 0.0125, the next 0.0167, 0.025, 0.05; after one that is not, none."""
    assert report.holm([0.04, 0.012, 0.024, 0.016]) == 4
    assert report.holm([0.04, 0.012, 0.024, 0.017]) == 1
    assert report.holm([0.013, 0.013, 0.013, 0.013]) == 0 == report.holm([])


PLACES = "<!-- python -m tiny report: {0} -->{1}<!-- end of {0} -->"


def test_places_are_written_anew(tmp_path, capsys):
    """Tables of one row are left out; what stands around the places stays; twice is the same."""
    file = tmp_path / "RESULTS.md"
    file.write_text(f"# Before\n{PLACES.format('claims', 'former')}\n{PLACES.format('tables', '')}\nafter\n")
    lines = write(tmp_path / "lines.jsonl", [line(KD, 0, 40.0), line(PAPER, 0, 99.0)])
    argv = ["report", "--lines", str(lines), "--into", str(file)]
    main(argv)
    text = file.read_text()
    assert text.startswith("# Before\n<!-- python -m tiny report: claims -->\n\n| ")
    assert text.endswith("\n\n<!-- end of tables -->\nafter\n")
    assert "former" not in text and "### VAT and TAF" in text and "-59.0" in text
    assert "--layers" not in text and "### The weight" not in text
    main(argv)
    assert file.read_text() == text
    assert "| KD | 1 | 50.0 | +3.0 | +2.0 | +0.5 | -1.0 |" in text
    new = tmp_path / "NEW.md"
    main([*argv[:-1], str(new)])
    assert new.read_text() == text[text.index("<!-- python -m tiny report: tables") : text.index("after")]
    with pytest.raises(SystemExit, match="seed 0 stands in another file, too"):
        main(["report", "--lines", str(lines), str(lines), "--into", str(file)])
    with pytest.raises(SystemExit, match="none.jsonl is not there; python -m tiny study writes"):
        main(["report", "--lines", str(tmp_path / "none.jsonl"), "--into", str(file)])
    for bad, said in {
        "no place": "RESULTS.md: <!-- python -m tiny report: NAME --> and after it .* must stand there",
        PLACES.format("tables", "")[:-3]: "must stand there",
        PLACES.format("tables", "") + "<!-- python -m tiny report: claims -->": "must stand there",
        PLACES.format("figures", ""): "figures is no part of the report, which are headline, questions",
    }.items():
        file.write_text(bad)
        with pytest.raises(SystemExit, match=said):
            main(argv)
        assert file.read_text() == bad


def test_a_claim_holds_where_its_interval_says_so(tmp_path):
    """By hand: the differences 10, 11, 12 are 11 +- 2.5; -10, 0, 10 are 0 +- 24.8."""
    better, worse = TABLES["matching"]["group"], TABLES["matching"]["simple"]
    for other, said in {
        (40.0, 39.0, 38.0): "| +1.1 | +11.0 ± 2.5 | 3 | 0.003 | holds |",
        (60.0, 61.0, 62.0): "| +1.1 | -11.0 ± 2.5 | 3 | 0.003 | the opposite |",
        (60.0, 50.0, 40.0): "| +1.1 | +0.0 ± 24.8 | 3 | 1.000 | not told apart |",
    }.items():
        lines = [line(better.flags, seed, 50.0) for seed in range(3)]
        lines += [line(worse.flags, seed, score) for seed, score in enumerate(other)]
        read = study.read_lines(write(tmp_path / "lines.jsonl", lines))
        row, _, text = report.claims(read).splitlines()[-3:]
        assert row == f"| matching | group over simple {said}"
        apart = int("not" not in said)
        assert f"Of the paper's 1 different claims {apart} are told apart" in text
        assert text.endswith(f"correction for all 1, {apart}.")


def test_a_claim_that_one_is_worse(tmp_path):
    """The paper has LLaVADI 0.5 below SFT."""
    rows = TABLES["systems"]
    lines = [line(rows["LLaVADI"].flags, seed, 90.0) for seed in range(3)]
    lines += [line(SFT, seed, 60.0 + seed) for seed in range(3)]
    text = report.claims(study.read_lines(write(tmp_path / "lines.jsonl", lines)))
    assert "| systems | LLaVADI over SFT | -0.5 | +29.0 ± 2.5 | 3 | < 0.001 | the opposite |" in text


def test_a_comparison_of_ours(tmp_path):
    """The paper has no figure for it, and it is none of the paper's claims."""
    rows = TABLES["controls"]
    lines = [line(rows["uniform"].flags, seed, 90.0) for seed in range(3)]
    lines += [line(rows["none"].flags, seed, 60.0 + seed) for seed in range(3)]
    text = report.claims(study.read_lines(write(tmp_path / "lines.jsonl", lines)))
    assert "| controls | uniform over none |  | +29.0 ± 2.5 | 3 | < 0.001 | told apart |" in text
    assert "Of the paper's" not in text


def test_the_headline_has_the_teacher_and_the_best_rates(tmp_path):
    """In this order, and each row once; the teacher is one model, and is compared with nothing."""
    best = TABLES["rates"]["SFT, 1.5e-3"].flags
    lines = [line(best, 0, 60.0), line(KD, 0, 50.0), line(PAPER, 0, 99.0), line(SFT, 0, 50.0)]
    teacher = line(study.TEACHER, 0, 98.0)
    del teacher["similarity"], teacher["forced"]
    rows = report.headline(study.read_lines(write(tmp_path / "lines.jsonl", [*lines, teacher]))).splitlines()
    names = ["| teacher", "| SFT", "| SFT, 1.5e-3", "| KD", "| CompoDistill"]
    assert [row.split(" | ")[0] for row in rows[2:]] == names
    assert rows[2] == "| teacher |  | 90.0 | 98.0 | 98.0 | 1 of 1 |  |  |"
    assert rows[4].endswith("| -39.0 |")
    assert set(report.HEADLINE) == (TABLES["systems"] | TABLES["rates"]).keys()
    names = [name for name, *_ in (row.split(" | ") for row in rows)]
    assert len(names) == len(set(names))


def test_a_curve_of_a_long_training(tmp_path):
    """Of 40 points a tenth stands in the table, and the last one among them."""
    points = {str(step): {"recognition": step / 100, "compositional": 50} for step in range(100, 4001, 100)}
    rows = list(TABLES["budget"].values())[:2]
    lines = [line(row.flags, 0, 70.0, times=8, curve=points) for row in rows]
    read = study.read_lines(write(tmp_path / "lines.jsonl", lines))
    text = report.tables(read).splitlines()
    steps = [f"{step:,}" for step in range(400, 4001, 400)]
    assert text[2] == f"| steps | seed | {' | '.join(steps)} | end, all items | 98 / 95 from |"
    assert text[4].startswith("| SFT | 0 | 4 / 50 | 8 / 50 | 12 / 50 |")
    assert text[4].endswith("| 40 / 50 | 90.0 / 70.0 |  |")


def test_since_when_a_curve_has_nearly_everything():
    """From the point after the last one below, of either score: what was there and was lost counts not."""

    def curve(*points):
        return {
            str(step): {"recognition": r, "compositional": c}
            for step, (r, c) in zip((800, 1600, 2400, 10_000), points)
        }

    assert report.learned(curve((98, 95), (99, 96), (100, 100), (100, 100))) == "800"
    assert report.learned(curve((98, 95), (97.9, 96), (100, 100), (100, 95))) == "2,400"
    assert report.learned(curve((98, 95), (98, 95), (98, 94.9), (98, 95))) == "10,000"
    assert report.learned(curve((98, 95), (98, 95), (98, 95), (98, 94.9))) == ""


def test_figures(tmp_path):
    """Drawn beside the Markdown file from real lines, and again over themselves; a mark for each student."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from evals import figures

    points = {str(step): {"recognition": step / 2, "compositional": 50} for step in (100, 200)}
    lines = [line(KD, 0, 40.0), line(KD, 1, 44.0), line(PAPER, 0, 99.0)]
    lines += [line(f"{PAPER} --vat-weight 3", 0, 98.0)]
    lines += [line(TABLES["budget"]["KD"].flags, 0, 70.0, times=8, curve=points)]
    read = study.read_lines(write(tmp_path / "lines.jsonl", lines))
    for _ in range(2):
        report.draw_figures(tmp_path, read)
    assert {file.name for file in tmp_path.glob("*.png")} == {"study.png", "budget.png"}
    figure, (students, budget) = Figure(), report.figure_rows(read)
    figures.study_panels(figure, students)
    marks = [sum(len(dots.get_offsets()) for dots in axes.collections) for axes in figure.axes]
    assert marks == [3, 4] and figure.axes[0].get_xticklabels()[0].get_text() == "KD"
    figure = Figure()
    figures.budget_panels(figure, budget)
    assert [list(axes.lines[0].get_ydata()) for axes in figure.axes] == [[50, 100], [50, 50]]


def test_similarity_and_accuracy(tmp_path):
    """Between variants they rise together; within each of them they fall."""
    flags = [variant.flags for variant in TABLES["loss"].values()]
    lines = [
        line(flag, seed, 50.0 + 10 * i - seed, similarity=0.1 * i + 0.01 * seed)
        for i, flag in enumerate(flags)
        for seed in range(3)
    ]
    text = report.chain(study.read_lines(write(tmp_path / "lines.jsonl", lines)))[0]
    assert "over 12 students of 4 variants: 0." in text and "variant's mean: -1.00 (p = 0.00" in text
    assert (
        "means of the variants: 1.00 [" in text and "over those 4 whose mean accuracy is below 95: " in text
    )
    best = [known | {"compositional": 96.0 + known["seed"]} for known in lines]
    text = report.chain(study.read_lines(write(tmp_path / "lines.jsonl", best)))[0]
    assert "below 95" not in text
    assert not report.chain({(Variant(KD), 0): lines[0]})


def test_what_is_left_within_variants():
    """By hand: of one group the ranks are those of its values; of equal groups there is nothing left. p is
    the share of all orders that are as far from 0: of 3 values in one group 2 of 6."""
    x, y = np.array([1.0, 2.0, 3.0]), np.array([5.0, 7.0, 6.0])
    rho, p = report.within(x, y, [np.arange(3)])
    assert rho == pytest.approx(0.5) and p == 1
    rho, p = report.within(x, np.array([5.0, 6.0, 7.0]), [np.arange(3)])
    assert rho == 1 and p == pytest.approx(2 / 6, abs=0.04)
    assert report.within(x, np.ones(3), [np.arange(3)]) == (0, 1)


@pytest.mark.parametrize("file", report.INTO, ids=lambda file: file.name)
def test_the_report_that_ships_is_of_the_lines_that_ship(file):
    text = file.read_text()
    assert report.filled(text, study.read_lines(report.LINES), file) == text


def test_intervals_in_the_text_are_those_of_the_tables():
    """Who writes "+38.9 ± 4.2" in the text of RESULTS.md or README.md has it from a table."""
    form = r"[+-]?\d+\.\d+ ± \d+\.\d+"
    lines = study.read_lines(report.LINES)
    generated = {n for section in report.SECTIONS.values() for n in re.findall(form, section(lines))}
    for file in report.INTO:
        own = set(re.findall(form, report.PLACE.sub("", file.read_text())))
        assert own and own <= generated, file.name


def test_lines_of_two_kinds_make_no_report(tmp_path, monkeypatch):
    """Of two worlds, of two teachers, of two recipes; and of none."""
    steps = {"1": 200, "2": 4000, "3": 100}
    first = line(PAPER, 0, 99.0, steps=steps)
    for other, said in {
        "made with another world": dict(prints=PRINTS | {"world": "x"}, steps=steps),
        "made with another teacher": dict(prints=PRINTS | {"tiny": "x"}, steps=steps),
        "trained for other steps": dict(steps=steps | {"2": 30}),
    }.items():
        file = write(tmp_path / "lines.jsonl", [first, line(KD, 3, 40.0, **said)])
        with pytest.raises(BadInput, match=f"lines.jsonl: --method kd, seed 3 was {other} .*; take it out"):
            report.lines_of([file])
    assert len(report.lines_of([write(file, [first, line(KD, 3, 40.0, steps=steps)])])) == 2
    with pytest.raises(BadInput, match="no line of method 1; python -m tiny study writes"):
        report.lines_of([write(file, [])])


def test_differences_have_a_base_of_the_same_teacher(tmp_path):
    """And say of how many seeds they are, where these are not the row's."""
    rows = list(TABLES["depth"].values())
    prints = PRINTS | {"layers-8": "8", "layers-12": "12"}
    lines = [
        line(row.flags, seed, 60.0 + 10 * i, teacher=row.teacher, prints=prints)
        for i, (row, seeds) in enumerate([(rows[3], [0]), (rows[4], [0, 1]), (rows[7], [0, 1, 2])])
        for seed in seeds
    ]
    text = report.scores(study.read_lines(write(tmp_path / "lines.jsonl", lines)), TABLES["depth"], ())
    ends = [row.split(" | ")[-1] for row in text.splitlines()]
    assert ends[0] == "minus the first row of its teacher |"
    assert ends[2:] == [" |", "+10.0 (of 1) |", " |"]


def test_nothing_of_others_is_written_over(tmp_path):
    """A picture of another's making, a folder that is none: one sentence, and the text is as it was."""
    file, lines = tmp_path / "NEW.md", write(tmp_path / "lines.jsonl", [line(PAPER, 0, 99.0)])
    argv = ["report", "--lines", str(lines), "--into", str(file)]
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/study.png").write_text("mine")
    with pytest.raises(SystemExit, match="assets/study.png was not written by this program; choose another"):
        main(argv)
    shutil.rmtree(tmp_path / "assets")
    (tmp_path / "assets").write_text("")
    with pytest.raises(SystemExit, match="assets cannot be written .*; choose another folder"):
        main(argv)
    assert not file.exists()
