"""Batches that other processes prepare (--workers), and whose errors end the program with a sentence."""

import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from support.errors import BadInput, told

WAIT = 600  # seconds for one batch; then shared memory or the disk is at fault
AHEAD = 4  # batches that each worker prepares ahead
PAUSE = 0.1  # seconds before workers are forked


def batches_made(make: Callable[[Any], Any], keys: Iterable, workers: int, pin: bool = False) -> Iterator:
    """make(key), a tensor or a dict with tensors, of each key in their order; 0 workers: in this process.

    BadInput, as `make` raises it, whichever process it is in, or in words for an error of the machine.
    """
    if workers and dist.is_initialized():
        # A thread that has just passed on a message to other ranks may hold a lock of Python; before 3.12 a
        # worker that is forked in this moment waits for it for ever.
        time.sleep(PAUSE)
    loader = DataLoader(
        Making(make),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # shares memory
        prefetch_factor=AHEAD if workers else None,
        timeout=WAIT if workers else 0,
        pin_memory=pin,
    )
    return raised(iter(loader))  # made here: to make it draws a random number


def raised(batches: Iterator) -> Iterator:
    """The batches, up to an error among them."""
    for batch in batches:
        if isinstance(batch, BadInput):
            raise batch
        yield batch


def share(batch: Any) -> None:
    """The tensors of a batch, also of one within it, into shared memory."""
    if isinstance(batch, dict):
        for value in batch.values():
            share(value)
    elif isinstance(batch, Tensor):
        batch.share_memory_()


class Making(Dataset):
    """dataset[key] is make(key), or the BadInput that it raised, which would not leave a worker as it is."""

    def __init__(self, make: Callable[[Any], Any]):
        self.make = make

    def __getitem__(self, key: Any) -> Any:
        try:
            batch = self.make(key)
            if get_worker_info():
                share(batch)  # here, where an error is seen; torch does it in a thread, unseen
            return batch
        except BadInput as error:
            return error
        except Exception as error:
            if (said := told(error)) is None:
                raise
            return BadInput(f"{said}; fewer --workers or a smaller --batch-size need less")


def ignore_signals(_: int) -> None:
    """Keep a worker alive: schedulers signal all processes, and stopping well needs its batches."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
