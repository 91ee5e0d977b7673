"""tiny/report.py: means, intervals and paired differences by hand; what it writes, and where."""

import json

import numpy as np
import pytest

from support.errors import BadInput
from tiny import report, study
from tiny.__main__ import main
from tiny.study import KD, PAPER, TABLES, Variant


def line(flags, seed, compositional, **more):
    """A line of `study`: every kind of pair has this score."""
    scores = dict.fromkeys(study.SCORES, compositional) | {"recognition": 90.0}
    forced = {"as it is": 50.0, "mean": 53.0, "full": 52.0, "own mean": 50.5, "other picture": 49.0}
    whole = {"flags": flags, "times": 1, "teacher": "tiny", "seed": seed, "method": study.METHOD}
    return whole | scores | {"similarity": 0.5, "forced": forced, "prints": {"world": "w"}} | more


def write(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_intervals_by_hand():
    """Of 1, 2, 3: the mean 2, the deviation 1, t of two degrees of freedom 4.303, by the root of 3."""
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5)
    assert report.said([1.0, 2.0, 3.0], signed=True) == "+2.0 ± 2.5"
    assert report.said([7.0]) == "7.0" and report.said([]) == "" and report.said([7.0, -0.01]) == "7.0, 0.0"
    with pytest.raises(BadInput, match="11 seeds are more than the 10"):
        report.interval([0.0] * 11)


def test_the_quantiles_of_t():
    """Of samples of n normal numbers 95 % have an interval that holds the true mean."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 10):
        samples = rng.standard_normal((40_000, n))
        half = report.T95[n - 2] * samples.std(1, ddof=1) / n**0.5
        assert np.mean(np.abs(samples.mean(1)) < half) == pytest.approx(0.95, abs=0.004)


def test_differences_are_taken_seed_by_seed(tmp_path):
    """KD has seeds 0 and 1, the paper's form 1 and 2: only seed 1 is a pair. The least kind is named."""
    lines = [line(KD, 0, 40.0), line(KD, 1, 60.0, swap_obj=10.0), line(PAPER, 1, 99.0), line(PAPER, 2, 80.0)]
    read = study.read_lines(write(tmp_path / "lines.jsonl", lines))
    head, _, kd, ours = report.scores(read, TABLES["modules"], ()).splitlines()[:4]
    assert head.endswith("| similarity | minus VAT and TAF |")
    assert kd == "| KD | 2 | 90.0, 90.0 | 40.0, 60.0 | 25.0 (swap_obj) | 0.50, 0.50 | -39.0 |"
    assert ours == "| VAT and TAF | 2 | 90.0, 90.0 | 99.0, 80.0 | 89.5 (swap_obj) | 0.50, 0.50 |  |"


def test_what_stands_between_the_marks_is_written_anew(tmp_path, capsys):
    """Tables of one row are left out; what stands before and after stays; twice is the same."""
    file = tmp_path / "RESULTS.md"
    file.write_text(f"# Before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    lines = write(tmp_path / "lines.jsonl", [line(KD, 0, 40.0), line(PAPER, 0, 99.0)])
    argv = ["report", "--lines", str(lines), "--into", str(file)]
    main(argv)
    text = file.read_text()
    assert text.startswith(f"# Before\n{report.BEGIN}\n\n### ") and text.endswith(
        f"\n\n{report.END}\nafter\n"
    )
    assert "old" not in text and "### VAT and TAF" in text and "-59.0" in text
    assert "--layers" not in text and "### The weight" not in text
    main(argv)
    assert file.read_text() == text
    assert "| KD | 1 | 50.0 | +3.0 | +0.5 | -1.0 |" in text
    with pytest.raises(SystemExit, match="seed 0 stands in another file, too"):
        main(["report", "--lines", str(lines), str(lines), "--into", str(file)])
    with pytest.raises(SystemExit, match="none.jsonl is not there; python -m tiny study writes"):
        main(["report", "--lines", str(tmp_path / "none.jsonl"), "--into", str(file)])
    file.write_text(f"{report.END}{report.BEGIN}")
    with pytest.raises(SystemExit, match="must stand there once each, in this order"):
        main(argv)


def test_a_curve_of_a_long_training(tmp_path):
    points = {str(step): {"recognition": step / 100, "compositional": 50} for step in (400, 1200, 800)}
    lines = [line(KD, 0, 70.0, times=8, curve=points), line(PAPER, 0, 70.0, times=8, curve=points)]
    read = study.read_lines(write(tmp_path / "lines.jsonl", lines))
    text = report.tables(read).splitlines()
    assert text[2] == "| steps | seed | 400 | 800 | 1,200 | end, all items |"
    assert text[4] == "| KD | 0 | 4 / 50 | 8 / 50 | 12 / 50 | 90.0 / 70.0 |"


def test_similarity_and_accuracy(tmp_path):
    """Between variants they rise together; within each of them they fall."""
    flags = [variant.flags for variant in TABLES["loss"].values()]
    lines = [
        line(flag, seed, 50.0 + 10 * i - seed, similarity=0.1 * i + 0.01 * seed)
        for i, flag in enumerate(flags)
        for seed in range(3)
    ]
    text = report.chain(study.read_lines(write(tmp_path / "lines.jsonl", lines)))[0]
    assert "over 12 students: 0." in text and "variant's mean: -1.00 [-1.00, -1.00]" in text
    assert not report.chain({(Variant(KD), 0): lines[0]})


def test_the_report_that_ships_is_of_the_lines_that_ship():
    text = report.RESULTS.read_text()
    shipped = text[text.index(report.BEGIN) + len(report.BEGIN) : text.index(report.END)].strip()
    assert shipped == report.tables(study.read_lines(report.LINES))
