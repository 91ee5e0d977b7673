"""A run that is asked to stop saves first: SIGTERM, as schedulers send it, and Ctrl-C."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """A run was asked to stop, and has saved."""


@contextmanager
def signals_ask_to_stop() -> Iterator[list[float]]:
    """A list that is empty until SIGTERM or SIGINT arrives: the times at which they did.

    A second signal ends the process at once, if it comes a second later: launchers may pass one on twice.
    """
    asked = []

    def ask(number: int, _) -> None:
        if asked and time.time() - asked[0] > 1:
            os._exit(128 + number)
        asked.append(time.time())

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
