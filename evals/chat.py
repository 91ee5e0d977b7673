"""Talk to a model about a picture, in a terminal.

    python eval.py chat --model tiny/compodistill --image out/world/images/test-3.png
    python eval.py chat --model tiny/teacher --image FILE --question "What colour is the circle?"

A conversation keeps its ids and, in a cache, the keys and values of what the model has read: every token, and
the picture, is computed once, however many turns follow. Answers are greedy. Words appear as they come:
without half characters, special tokens, and control characters, which could steer the terminal.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

import data
import model
from evals import scorers
from model import DTYPES
from qwen import Cache
from support import layouts
from support.errors import BadInput, one_line
from support.program import number

HELP = """A line is a question. Besides there are
  /image FILE   talk about another picture, in a new conversation
  /new          a new conversation about the same picture
  /help         this
  /quit         end, as Ctrl-D and Ctrl-C do; while it answers Ctrl-C stops the answer"""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line break


class Conversation:
    """Turns about one picture, a file or opened already, or about none. BadInput: no picture in that file."""

    def __init__(self, vlm: model.VLM, picture: Image.Image | Path | None = None):
        self.vlm = vlm
        self.picture = None if picture is None else data.open_picture(picture)
        self.ids: list[int] = []  # of all turns; what ends an answer comes with the next question
        self.cache = Cache(len(vlm.lm.model.layers))  # of the first of these
        self.start = 0  # ids[start:] are the last answer

    @torch.no_grad()
    def ask(self, question: str, max_new_tokens: int = 512) -> Iterator[str]:
        """The answer, piece by piece. Left early, it stays as far as it came, and the next question follows.

        BadInput, and nothing has changed: a question that is no text, or beyond what the model can hold.
        """
        vlm, first = self.vlm, not self.ids
        ids = self.ids + vlm.question_ids(question, first and self.picture is not None, first)
        start = len(ids)
        vlm.check_length(start, "the conversation")
        self.cache, read = beginning(self.cache, len(self.ids))
        unread, pixels = ids[read:], None
        if data.IMAGE_TOKEN in unread:
            pixels = data.preprocess(self.picture, vlm.config.vision.image_size)[None].to(vlm.device)
        unread = torch.tensor([unread], device=vlm.device)
        for token in vlm.stream(unread, pixels, max_new_tokens=max_new_tokens, cache=self.cache):
            if self.ids is not ids:  # the model has read the question: from here on it counts
                self.ids, self.start, shown = ids, start, ""
            if token.item() in vlm.stop_ids:
                break
            ids.append(token.item())
            text = vlm.tokenizer.decode(ids[start:], skip_special_tokens=True)
            text = CONTROL.sub("", text).rstrip("\ufffd").strip()  # U+FFFD: the first bytes of a letter
            yield text[len(shown) :]
            shown = text


def beginning(cache: Cache, tokens: int) -> tuple[Cache, int]:
    """The first `tokens` of a cache, or as many as all layers hold, and how many that is.

    An answer's last token has not been read, and Ctrl-C may come between two layers.
    """
    tokens = min([tokens, *(layer[0].shape[2] if layer else 0 for layer in cache.layers)])
    part = Cache(len(cache.layers))
    if tokens:
        part.layers = [[x[:, :, :tokens] for x in layer] for layer in cache.layers]
        part.visible = cache.visible[:, :tokens]
    return part, tokens


def say(pieces: Iterator[str]) -> None:
    """Print the pieces of an answer as they come."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def talk(vlm: model.VLM, picture: Path | None, max_new_tokens: int) -> None:
    """The prompt loop, to Ctrl-D, Ctrl-C or /quit; while a model answers Ctrl-C only stops its answer."""
    try:
        import readline  # noqa: F401 (input() then has arrow keys and a history)
    except ImportError:
        pass
    if sys.stdin is None:
        raise BadInput("standard input is closed, from which questions are read; give one with --question")
    sys.stdin.reconfigure(errors="replace")
    chat = Conversation(vlm, picture)
    print(f"{one_line(picture or 'No picture')}. Ask, or /help.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/image":
                if not rest:
                    raise BadInput("/image needs the name of a file")
                rest = rest.strip().strip("'\"")  # terminals paste paths in quotes
                chat = Conversation(vlm, Path(rest).expanduser())
                print(f"{one_line(rest)}. A new conversation.")
            elif command == "/new":
                chat = Conversation(vlm, chat.picture)
                print("A new conversation" + (", about the same picture." if chat.picture else "."))
            elif command.startswith("/"):
                print(HELP if command == "/help" else f"{one_line(command)} is no command; /help lists them")
            elif line:
                say(chat.ask(line, max_new_tokens))
        except KeyboardInterrupt:
            print("\n(stopped)")
        except ValueError as error:  # BadInput among them: the conversation goes on
            print(f"error: {one_line(error)}")


# ---------------------------------------------------------------- python eval.py chat


def add_arguments(commands) -> None:
    command = commands.add_parser("chat", help="talk to a model about a picture, turn by turn")
    add = command.add_argument
    add("--model", required=True, help="checkpoint folder or hub name")
    add("--image", type=Path, help="the picture to talk about (default: none)")
    add("--question", help="only this: prints the answer and ends")
    add("--template", choices=layouts.TEMPLATES, help="of the prompt (default: what fits the checkpoint)")
    add("--precision", choices=list(DTYPES), default="fp32", help="(default: %(default)s)")
    length = dict(type=number(int, 1), metavar="N")
    add("--max-new-tokens", default=512, help="of an answer (default: %(default)s)", **length)


def run(args: argparse.Namespace) -> None:
    """What the command line asks for. BadInput: one sentence for it to print."""
    vlm = scorers.load(args.model, args.precision)
    vlm.template = args.template or vlm.template
    vlm.question_ids("", False)  # BadInput where its tokenizer lacks the template's tokens
    if args.question is None:
        talk(vlm, args.image, args.max_new_tokens)
    else:
        say(Conversation(vlm, args.image).ask(args.question, args.max_new_tokens))
