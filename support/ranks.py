"""Processes that work together (ranks), as torchrun starts them; or one alone, which is rank 0 of 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def ranks_of_torchrun(backend: str, timeout: timedelta | None = None) -> Iterator[None]:
    """Join the other ranks where torchrun started this process, and leave them at the end."""
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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
