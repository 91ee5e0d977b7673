"""Processes that work together (ranks), as torchrun starts them; or one alone, which is rank 0 of 1.

A rank that ends says why in the store that all of them share; the others, whose messages then fail, name it.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from support.errors import RANKS, BadInput, one_line, told


@contextmanager
def ranks_of_torchrun(backend: str, timeout: timedelta | None = None) -> Iterator[None]:
    """Join the other ranks where torchrun started this process, and leave them at the end.

    BadInput: they cannot be joined; or another one has ended, which it names.
    """
    if "RANK" not in os.environ:
        yield
        return
    try:
        numbers = {name: int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
            raise ValueError(f"RANK={numbers['RANK']}, WORLD_SIZE={numbers['WORLD_SIZE']}")
        store, rank, ranks = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        store.set(f"process {rank}", f"{os.getpid()} {socket.gethostname()}")
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=ranks)
    except (ValueError, RuntimeError) as error:
        reason = one_line(str(error).strip().split("\n")[0])
        raise BadInput(
            f"the ranks cannot be joined ({reason}); start them with torchrun, which sets RANK, WORLD_SIZE, "
            "MASTER_ADDR and a free MASTER_PORT, or unset RANK"
        ) from None
    try:
        yield
    except Exception as error:
        said = told(error) or one_line(repr(error))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which ends the others when one has ended
        if said.startswith(RANKS):
            raise BadInput(f"{who_ended(store, ranks)}; the same command goes on") from None
        first, _, why = store.compare_set("ended", "", f"{rank} {said}").decode().partition(" ")
        if why == said and first != str(rank):
            sys.exit(1)  # that rank says it
        raise
    finally:
        dist.destroy_process_group()


def who_ended(store: dist.Store, ranks: int) -> str:
    """Which rank has ended, and why: by its own word or, if it was killed, because it runs no more."""
    try:
        for _ in range(10):
            if store.check(["ended"]):
                rank, _, why = store.get("ended").decode().partition(" ")
                return f"rank {rank} has ended ({why:.200})"
            for rank in range(ranks):
                process, host = store.get(f"process {rank}").decode().split(" ", 1)
                if host == socket.gethostname() and not is_running(int(process)):
                    return f"rank {rank} has ended (process {process} was killed)"
            time.sleep(0.2)
    except RuntimeError:
        pass
    return "another rank has ended"


def is_running(process: int) -> bool:
    """Whether there is such a process on this machine, and more of it than its exit status."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # of another user; or no Linux
        return True


def of_all_ranks(what: dict) -> list[dict]:
    """What each rank gives. All ranks call."""
    every = [what] * rank_and_ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(every, what)
    return every


def agree(what: dict) -> None:
    """BadInput on all ranks where one of them is about to do something else. All ranks call."""
    every = of_all_ranks(what)
    for rank, other in enumerate(every):
        names = [name for name in {**every[0], **other} if other.get(name) != every[0].get(name)]
        if names:
            here, there = ({name: x.get(name) for name in names} for x in (every[0], other))
            raise BadInput(f"rank {rank} has {there}, rank 0 {here}; start all ranks with the same command")


def rank_and_ranks() -> tuple[int, int]:
    """Which one this is, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_rank(here: bool, device: torch.device | str) -> bool:
    """Whether it is true on any rank. All ranks call."""
    if not dist.is_initialized():
        return here
    return all_reduce(torch.tensor(int(here), device=device)).item() > 0
