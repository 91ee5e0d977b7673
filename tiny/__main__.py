"""The tiny world on one command: four students trained and scored in minutes, on a laptop.

    python -m tiny                                   # the main job: train, score, a table and a picture
    python -m tiny score --model tiny/compodistill   # scores of a checkpoint, and similarity to the teacher
    python -m tiny systems                           # the paper's table: all systems, trained and scored
    python -m tiny story                             # does the paper's argument hold? analyses and a report
    python -m tiny study --out FOLDER                # every variant of the method, with five seeds each
    python -m tiny report                            # its lines as tables in README and RESULTS
    python -m tiny make --out FOLDER                 # the models that ship in tiny/, again from nothing

The main job, `systems`, `study` and `make`, when they were stopped, go on with the same command.
"""

import argparse
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported: no traceback

from evals.analyses import add_common_arguments
from evals.scorers import load
from support.errors import one_line
from support.program import number, one_sentence, parse
from support.world import TINY, make_world
from tiny.make import make_tiny
from tiny.report import INTO, LINES, report
from tiny.scores import attention_similarity, table, tiny_scores
from tiny.story import story
from tiny.students import train_students
from tiny.study import OTHERS, TABLES, named_folder, study
from tiny.systems import train_systems


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("--") and argv[0] != "--help":
        argv = ["students", *argv]  # the main job needs no name
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tiny", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    whole, teacher = number(int, 1), str(TINY / "teacher")

    jobs = {
        "students": "the main job; the same without this word",
        "systems": "the systems of the paper's table",
    }
    for name, text in jobs.items():
        add = commands.add_parser(name, help=text).add_argument
        add("--out", type=Path, default=Path("out"), help="folder of all outputs (default: %(default)s)")
        add(
            "--seed", type=number(int, 0), default=0, help="of data order, new weights (default: %(default)s)"
        )
        add(
            "--steps",
            type=whole,
            help="of CompoDistill's stage 2, all else in proportion (default: the recipe's)",
        )
        add("--teacher", default=teacher, help="(default: %(default)s)")

    add = commands.add_parser("score", help="scores, and similarity to the teacher").add_argument
    add("--model", required=True, help="checkpoint folder or hub name")
    add("--teacher", default=teacher, help="to compare attention with (default: %(default)s)")
    add("--world", type=Path, default=Path("out/world"), help="made if missing (default: %(default)s)")
    add("--limit", type=whole, metavar="N", help="items per kind (default: all)")

    add_common_arguments(commands.add_parser("story", help="all analyses, and what holds"), "out/story")

    add = commands.add_parser("study", help="the trainings behind RESULTS.md").add_argument
    add("--out", type=Path, required=True, help="folder of all outputs")
    add(
        "--only",
        nargs="+",
        choices=list(TABLES),
        default=list(TABLES),
        metavar="TABLE",
        help=f"{', '.join(TABLES)} (default: all)",
    )
    add(
        "--seeds",
        nargs="+",
        type=number(int, 0),
        default=[0, 1, 2, 3, 4],
        metavar="N",
        help="(default: 0 to 4)",
    )
    add("--steps", type=whole, help="of stage 2, all else in proportion (default: the recipe's)")
    add("--teacher", default=teacher, help="(default: %(default)s)")
    add(
        "--teachers",
        nargs="+",
        type=named_folder,
        default=[],
        metavar="NAME=FOLDER",
        help=f"of the rows that have others: {', '.join(OTHERS)} (make --other, make --layers N)",
    )

    add = commands.add_parser("report", help="what README and RESULTS say of the study").add_argument
    add("--lines", nargs="+", type=Path, default=[LINES], help="files of lines (default: the repository's)")
    add("--into", nargs="+", type=Path, default=INTO, help="Markdown files (default: README, RESULTS)")

    add = commands.add_parser("make", help="the models that ship, again from nothing").add_argument
    add("--out", type=Path, required=True, help="folder of all outputs")
    add("--seed", type=number(int, 0), default=0, help="(default: %(default)s)")
    add("--steps", type=whole, help="of each of the teacher's stages (default: the recipe's)")
    add("--other", action="store_true", help="a teacher of another family, shape and tokenizer")
    add("--layers", type=whole, help="of the teacher's language model (default: its size's own)")
    return parse(parser, argv)


def score(args: argparse.Namespace) -> None:
    """Print the row of one model."""
    vlm, teacher, world = load(args.model), load(args.teacher), make_world(args.world)
    scores = tiny_scores(vlm, world, args.limit)
    try:
        scores["similarity"] = attention_similarity(vlm, teacher, world, args.limit or 100)
    except ValueError as error:  # of another size or depth than this teacher: it has scores
        print(one_line(f"no similarity to {args.teacher}: {error}"))
    print(table({str(args.model): scores}))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    again = not {"score", "story", "report"} & set(argv[:1])
    with one_sentence("stopped; the same command goes on" if again else "stopped"):
        args = parse_args(argv)
        run = {
            "students": train_students,
            "systems": train_systems,
            "score": score,
            "story": story,
            "study": study,
            "report": report,
            "make": make_tiny,
        }
        run[args.command](args)


if __name__ == "__main__":
    main()
