"""How a program begins and ends: its flags, its streams, the signals, one sentence for what went wrong."""

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from support.errors import BadInput, one_line, told

# ---------------------------------------------------------------- flags


def number(kind: type, least: float, most: float = 1e9) -> Callable[[str], float]:
    """An argparse type: a number of this kind (int or float) from `least` to `most`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r:.60} is no {'whole ' * (kind is int)}number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text:.60} is out of range, {least} to {most:g} is asked for")
        return value

    return convert


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """parser.parse_args, which would take an empty value (a variable that is not set) for none at all."""
    argv = sys.argv[1:] if argv is None else argv
    flag, say = "an argument", parser.error
    parser.error = lambda text: say(one_line(text))
    for word in argv:
        flag, given, value = word.partition("=") if word.startswith("--") else (flag, True, word)
        if given and not value.strip():
            parser.error(f"{flag} is empty: give it a value, or leave it out")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- streams, signals, the end


class Stream:
    """stdout or stderr, which may end before the program does: what is written to it then is dropped.

    Unless the work goes on without a reader, one who goes away ends the program.
    """

    def __init__(self, stream: IO[str], goes_on: bool):
        self.stream, self.goes_on, self.lost = stream, goes_on, None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, do: Callable, *args) -> None:
        try:
            do(*args)
        except OSError as error:  # whoever reads has seen enough, as `head` does; or the disk is full
            self.lost = self.lost or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            if isinstance(error, BrokenPipeError) and not self.goes_on:
                sys.exit(0)


@contextmanager
def tolerant_streams(goes_on: bool) -> Iterator[None]:
    """Make stdout and stderr outlive whoever reads them, and letters that they do not know harmless.

    At the end one sentence, and status 1, where something printed was lost but for a reader who went away.
    """
    before = sys.stdout, sys.stderr
    goes = goes_on, True  # stderr has no reader whom we wait for
    streams = [Stream(stream or open(os.devnull, "w"), x) for stream, x in zip(before, goes)]  # None: closed
    for stream in streams:
        if hasattr(stream.stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(streams[1].stream, "reconfigure"):  # with PYTHONUNBUFFERED, too: ranks say their lines whole
        streams[1].reconfigure(line_buffering=True, write_through=False)
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.goes_on = True  # no reader is missed any more, and an error on its way is not to be lost
            stream.flush()
        sys.stdout, sys.stderr = before
    lost = streams[0].lost
    if lost and not isinstance(lost, BrokenPipeError):
        sys.exit(f"error: the output could not be written ({lost.strerror}); the rest of the work is done")


@contextmanager
def one_sentence(
    stopped: str = "stopped",
    less: str = "a smaller --batch-size needs less",
    going_on: Callable[[], str] = lambda: "",
    without_reader: bool = True,
) -> Iterator[None]:
    """Around a whole program: what the user or the machine has to mend becomes `error: SENTENCE`, status 1.

    That is BadInput, what the system says of files (OSError), and support.errors.MACHINE, after which `less`
    names the flags that ask for less, and going_on() what the same command goes on from. Ctrl-C and SIGTERM
    end it with `stopped`, and without_reader=False a reader of stdout who goes away. Any other error is ours,
    or of a change that somebody is trying out, and keeps its traceback. No process that was started outlives
    the program.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as programs have it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(stopped))
    try:
        with tolerant_streams(without_reader):
            yield
    except KeyboardInterrupt:
        sys.exit(stopped)
    except Exception as error:
        if (said := told(error)) is None:
            raise
        if not isinstance(error, (BadInput, OSError)):
            said += f"; {less}" * ("memory" in said.partition(" (")[0]) + going_on()
        sys.exit(f"error: {said}")
    finally:
        signal.signal(signal.SIGTERM, before)
        of_torch = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # raises where a worker is killed
        for process in multiprocessing.active_children():  # workers that prepare batches ignore SIGTERM
            process.kill()
            process.join()
        signal.signal(signal.SIGCHLD, of_torch)


def commit() -> str:
    """Of the code that runs, as far as git knows."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"
