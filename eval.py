"""Evaluation of any checkpoint: the eleven benchmarks, where a model looks, the paper's analyses, chat.

    python eval.py bench sugarcrepe --model DIR --annotations DIR --images DIR    # answers.py, also torchrun
    python eval.py attention --model tiny/teacher --image FILE --question "What colour is the circle?"
    python eval.py analyse similarity groups                                      # analyses.py
    python eval.py analyse layers --model tiny/compodistill                       # layers.py
    python eval.py chat --model tiny/compodistill --image FILE                    # chat.py

Here is the command line; the work is in evals/: how a reply or a caption is scored in scorers.py, what is
right in benchmarks.py and metrics.py. The tiny world is scored by `python -m tiny score`.
"""

import argparse
import signal
import sys
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported: no traceback

from evals import analyses, answers, chat, layers
from evals.pictures import MADE, Case, attention_picture
from evals.scorers import load
from support.errors import BadInput, one_line
from support.files import check_output
from support.program import one_sentence, parse
from support.ranks import ranks_of_torchrun


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    answers.add_arguments(commands)
    add = commands.add_parser("attention", help="a picture of where models look").add_argument
    add("--model", nargs="+", required=True, help="one or several checkpoint folders or hub names")
    add("--image", type=Path, required=True)
    add("--question", required=True)
    add("--save", type=Path, default=Path("attention.png"), help="PNG to write (default: %(default)s)")
    analyses.add_arguments(commands)
    chat.add_arguments(commands)
    args = parse(parser, argv)
    if args.command == "bench" and not args.score_only and not (args.model and args.images):
        parser.error("bench asks a model about pictures: give --model and --images, or --score-only")
    return args


def main(argv: list[str] | None = None) -> None:
    less = "a smaller --batch-size, fewer --workers or --precision bf16 need less"
    command = (sys.argv[1:] if argv is None else argv)[:1]
    going_on = "; the same command goes on with the answers so far" * (command == ["bench"])
    with one_sentence(less=less, going_on=lambda: going_on, without_reader=command != ["chat"]):
        args = parse_args(argv)
        if args.command == "bench":
            with ranks_of_torchrun("gloo", timeout=timedelta(days=7)):  # ranks wait at barriers
                answers.bench(args)
        elif args.command == "attention":
            if args.save.suffix != ".png":
                raise BadInput(f"{args.save}: give the name of a .png")
            check_output(args.save, MADE, [args.image])
            models = {name: load(name) for name in args.model}
            attention_picture(models, [Case(args.image, args.question)], args.save)
            print(one_line(args.save))
        elif args.command == "analyse":
            (layers if "layers" in args.which else analyses).run(args)
        else:
            chat.run(args)


if __name__ == "__main__":
    main()
