"""Talk to a model about a picture, in a terminal.

    python eval.py chat --model tiny/compodistill --image out/world/images/test-3.png
    python eval.py chat --model tiny/teacher --image FILE --question "What colour is the circle?"

A conversation keeps its ids and, in a cache, the keys and values of what the model has read: every token, and
the picture, is computed once, however many turns follow. Answers are greedy. Words appear as they come:
without half characters, special tokens, and control characters, which could steer the terminal.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import distill
import model
from evals import pictures, scorers
from lean import VisualAttention
from model import DTYPES
from qwen import Cache
from support import layouts
from support.errors import BadInput, at_least, sentence

HELP = """A line is a question. Besides there are
  /image FILE   talk about another picture, in a new conversation
  /attention    save a picture of where the model looked for its last answer
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
        self.question, self.answer, self.start = "", "", 0  # of the last turn; ids[start:] are the answer

    @torch.no_grad()
    def ask(self, question: str, max_new_tokens: int = 512) -> Iterator[str]:
        """The answer, piece by piece. Left early, it stays as far as it came, and the next question follows.

        BadInput, and nothing has changed: a question that is no text, or beyond what the model can hold.
        """
        vlm, first = self.vlm, not self.ids
        if any("\ud800" <= letter <= "\udfff" for letter in question):
            raise BadInput("the question is not UTF-8 text; set the terminal to UTF-8")
        ids = self.ids + vlm.question_ids(question, first and self.picture is not None, first)
        start, longest = len(ids), vlm.config.text.max_position_embeddings
        if start >= longest:
            raise BadInput(
                f"the conversation has {start} tokens and this model holds {longest}, which leaves none "
                "for an answer; begin another with /new, or ask less"
            )
        self.cache, read = beginning(self.cache, len(self.ids))
        unread, pixels = ids[read:], None
        if data.IMAGE_TOKEN in unread:
            pixels = data.preprocess(self.picture, vlm.config.vision.image_size)[None].to(vlm.device)
        unread = torch.tensor([unread], device=vlm.device)
        room = min(max_new_tokens, longest - start)
        for token in vlm.stream(unread, pixels, max_new_tokens=room, cache=self.cache):
            if self.ids is not ids:  # the model has read the question: from here on it counts
                self.ids, self.start, self.question, self.answer = ids, start, question, ""
            if token.item() in vlm.stop_ids:
                break
            ids.append(token.item())
            text = vlm.tokenizer.decode(ids[start:], skip_special_tokens=True)
            text = CONTROL.sub("", text).rstrip("\ufffd").strip()  # U+FFFD: the first bytes of a letter
            shown, self.answer = self.answer, text
            yield text[len(shown) :]

    @torch.no_grad()
    def attention(self) -> np.ndarray:
        """Where the model looked while it wrote the last answer -> (side, side), what falls on each patch.

        The mean over heads, understanding layers and the positions that wrote the answer's tokens: from the
        last of the question to the last but one of the answer. Only these are read again.
        """
        if self.picture is None or not self.ids:
            raise BadInput("there is no answer about a picture yet; give one with /image FILE, and ask")
        vlm, before = self.vlm, self.start - 1
        rows = self.ids[before:-1] or self.ids[before:]  # an empty answer: the position that ended it
        columns = (torch.tensor(self.ids) == data.IMAGE_TOKEN).nonzero().T.to(vlm.device)  # (1,P)
        layers = distill.understanding_layers(vlm.config.text.num_hidden_layers)
        out = vlm.lm(
            inputs_embeds=vlm.embed(torch.tensor([rows], device=vlm.device)),
            cache=beginning(self.cache, before)[0],
            requests=dict.fromkeys(layers, VisualAttention(slice(0, len(rows)), columns)),
            logits=False,
        )
        maps = torch.cat(list(out.attentions.values()))  # k of (1,R,P) -> (k,R,P)
        return pictures.on_patches(vlm, maps.mean((0, 1)))

    def save_attention(self) -> Path:
        """The picture under the question, and where the model looked under its answer -> a new PNG's name."""
        seen = pictures.heat(self.picture, self.attention())
        file = next(file for i in count(1) if not (file := Path(f"attention-{i}.png")).exists())
        row = [(self.question, pictures.enlarge(self.picture)), (self.answer, seen)]
        pictures.sheet([[(pictures.fit(text, 2), image) for text, image in row]], file)
        return file


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
    sys.stdin.reconfigure(errors="replace")
    chat = Conversation(vlm, picture)
    print(f"{picture or 'No picture'}. Ask, or /help.")
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
                print(f"{rest}. A new conversation.")
            elif command == "/new":
                chat = Conversation(vlm, chat.picture)
                print("A new conversation" + (", about the same picture." if chat.picture else "."))
            elif command == "/attention":
                print(chat.save_attention())
            elif command.startswith("/"):
                print(HELP if command == "/help" else f"{command} is no command; /help lists them")
            elif line:
                say(chat.ask(line, max_new_tokens))
        except KeyboardInterrupt:
            print("\n(stopped)")
        except ValueError as error:  # BadInput among them: the conversation goes on
            print(f"error: {sentence(error)}")


# ---------------------------------------------------------------- python eval.py chat


def add_arguments(commands) -> None:
    command = commands.add_parser("chat", help="talk to a model about a picture, turn by turn")
    add = command.add_argument
    add("--model", required=True, help="checkpoint folder or hub name")
    add("--image", type=Path, help="the picture to talk about (default: none)")
    add("--question", help="only this: prints the answer and ends")
    add("--template", choices=layouts.TEMPLATES, help="of the prompt (default: what fits the checkpoint)")
    add("--precision", choices=list(DTYPES), default="fp32", help="(default: %(default)s)")
    length = dict(type=at_least(int, 1), metavar="N")
    add("--max-new-tokens", default=512, help="of an answer (default: %(default)s)", **length)


def run(args: argparse.Namespace) -> None:
    """What the command line asks for. BadInput: one sentence for it to print."""
    sys.stdout.reconfigure(errors="replace")  # a letter that a terminal does not know is no reason to end
    vlm = scorers.load(args.model, args.precision)
    vlm.template = args.template or vlm.template
    vlm.question_ids("", False)  # BadInput where its tokenizer lacks the template's tokens
    try:
        if args.question is None:
            talk(vlm, args.image, args.max_new_tokens)
        else:
            say(Conversation(vlm, args.image).ask(args.question, args.max_new_tokens))
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does; at its exit Python tries again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
