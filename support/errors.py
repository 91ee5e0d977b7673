"""What a user is told: one sentence for everything that a user can mend, never a traceback."""

import argparse
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class BadInput(ValueError):
    """Something the user gave is wrong. The message is one sentence that names the file and the remedy."""


def sentence(error: Exception) -> str:
    """What to tell the user: the last line, without the trace that a DataLoader's worker puts before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix("support.errors.BadInput: ")


@contextmanager
def one_sentence(stopped: str = "stopped") -> Iterator[None]:
    """Around a whole program: what the user can mend becomes `error: SENTENCE` and exit status 1.

    That is BadInput, and what the system says of files (OSError). Ctrl-C and SIGTERM end it with `stopped`.
    Any other error is ours, or of a change that somebody is trying out, and keeps its traceback.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(stopped))
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(stopped)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {sentence(error)}")
    finally:
        signal.signal(signal.SIGTERM, before)


def at_least(kind: type, least: float):
    """An argparse type: a finite number of this kind that is at least `least`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number") from None
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range, at least {least} is asked for")
        return value

    return convert
