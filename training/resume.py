"""The state of an unfinished run: saved while it trains, and found again after whatever stopped it.

    out/name/stage2.run/run.json        which run this is: its arguments, models and data
                        step-00000500/  trained weights, AdamW's moments, run.json, and state.json: step,
                                        counters, the digests of all files (a save counts if they hold)
                        latest          the name of the newest save, for whoever looks
    out/name/stage2/                    the finished model, a checkpoint folder; the saves are then removed

A save is written under a temporary name by all ranks, then renamed: it is there whole or not at all. Nothing
else has to be kept: the learning rate, the order of the data and every random number are functions of the
seed and the step (train.py).

Tensors go through torch.distributed.checkpoint, so that what 4 ranks saved 2 can load. Its .metadata file is
a pickle, which can run code when it is opened: saves are read only from this program's own run folder. Do not
take over a run folder from a stranger; finished models are safetensors and safe.
"""

import fcntl
import io
import json
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model import pick_device
from support import layouts
from support.checkpoint import weight_files
from support.errors import BadInput, one_line
from support.files import digest, lock_file, open_file, read_json, remove, write_atomically
from support.ranks import any_rank, barrier, of_all_ranks, rank_and_ranks

# ---------------------------------------------------------------- which run is this


def check_space(run: Path, student: nn.Module, keep: int) -> None:
    """One sentence where the disk has no room for `keep` saves, one more while it is written, and the model.

    Saves that lie there already count as free: new ones take their place.
    """
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in student.parameters())
    needed = 12 * trained * (keep + 1) + 4 * whole  # bytes: a weight and its two moments; a weight
    free = shutil.disk_usage(run).free + sum(file.stat().st_size for file in run.glob("step-*/*"))
    if free < needed:
        raise BadInput(
            f"{run} has {free / 1e9:.2g} GB free, and this run's saves and model need {needed / 1e9:.2g}; "
            "free space"
        )


def lock_run(run: Path) -> IO | None:
    """Lock a run's folder (rank 0) until the returned file is closed: one process at a time trains it."""
    if rank_and_ranks()[0] > 0:
        return None
    if (run / "lock").exists():
        open_file(run / "lock").close()  # a pipe would be waited for
    file = open(run / "lock", "w")
    lock_file(file, fcntl.LOCK_EX, f"{run} is being trained by another process; choose another --name")
    return file


def open_run(run: Path, model_folder: Path, identity: dict) -> bool:
    """Make or enter a run's folder -> whether the run has finished. One of another run is refused."""
    file, other = run / "run.json", None
    for copy in [file, *(folder / file.name for folder in saves(run))]:  # which counts where it is damaged
        with suppress(BadInput):
            other = other or read_json(copy)
    if other is None and model_folder.exists():
        raise BadInput(f"{model_folder} exists, and {file} is missing or damaged; choose another --name")
    names = {**(other or identity), **identity}
    if different := [name for name in names if (other or identity).get(name) != identity.get(name)]:
        there, here = ({name: x.get(name) for name in different} for x in (other, identity))
        raise BadInput(
            f"{run} exists already and belongs to another run ({there} there, {here} here); "
            "repeat its arguments to go on with it, or choose another --name"
        )
    finished = is_finished(model_folder)
    barrier()
    if rank_and_ranks()[0] == 0:
        write_atomically(file, json.dumps(identity, indent=1))
        for leftover in [*run.glob(".*.writing"), *(saves(run) if finished else ())]:
            remove(leftover)
    return finished


def is_finished(folder: Path) -> bool:
    """Whether the model of a run is there. BadInput: something else has its name."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return False
    try:
        weight_files(folder)
        layouts.read_config(folder)
    except (BadInput, OSError) as error:
        raise BadInput(f"{folder} is no model of this run ({error}); choose another --name") from None
    return True


# ---------------------------------------------------------------- saves


def state_tensors(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, dict[str, Tensor]]:
    """Everything that training changes, by name; AdamW's moments are made (0) where they do not exist yet."""
    tensors = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors["weights"][name] = parameter.detach()
        tensors["exp_avg"][name] = state["exp_avg"]
        tensors["exp_avg_sq"][name] = state["exp_avg_sq"]
    return tensors


def save(run: Path, module: nn.Module, optimizer: torch.optim.AdamW, state: dict, keep: int) -> None:
    """Save what `load` needs to go on from state["step"]; keep the newest `keep` saves. All ranks call."""
    rank, ranks = rank_and_ranks()
    folder = run / f"step-{state['step']:08}"
    if as_rank_0_sees(folder.exists()) and whole(folder):
        return
    temporary = run / f".{folder.name}.writing"
    try:
        if rank == 0:
            for old in (temporary, folder):
                remove(old)
            temporary.mkdir()
            shutil.copy(run / "run.json", temporary)
        barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "not distributed, assuming one process": indeed
            dcp.save(state_tensors(module, optimizer), checkpoint_id=temporary, no_dist=ranks == 1)
        own = (f"__{rank}_*", *((".metadata", "run.json") if rank == 0 else ()))  # what this rank has written
        parts = of_all_ranks({file.name: digest_of(file) for x in own for file in temporary.glob(x)})
        if rank == 0:
            digests = {name: digest for part in parts for name, digest in part.items()}
            state = {**state, "digests": digests}
            write_atomically(
                temporary / "state.json", json.dumps({**state, "own digest": digest_of_state(state)})
            )
            os.replace(temporary, folder)
            write_atomically(run / "latest", folder.name)
            older = [other for other in saves(run) if other.name <= folder.name]
            for other in saves(run):  # a later one is damaged: `load` passed it over
                if other not in older[:keep]:
                    remove(other)
    except (OSError, dcp.api.CheckpointException) as error:
        reason = str(error).strip().split("\n")[-1]
        raise BadInput(
            f"{folder} could not be written ({reason}); free space and repeat the command: "
            "it goes on from the save before"
        ) from None
    barrier()


def saves(run: Path) -> list[Path]:
    """All saves of a run, the newest first."""
    return sorted(run.glob("step-" + 8 * "[0-9]"), reverse=True)


def as_rank_0_sees(what: Any) -> Any:
    """What rank 0 found in a folder, which a shared file system may show the others later. All ranks call."""
    return of_all_ranks({"seen": what})[0]["seen"]


def digest_of(file: Path) -> str:
    with open_file(file) as handle:
        return digest(handle)


def digest_of_state(state: dict) -> str:
    return digest(io.BytesIO(json.dumps(state).encode()))


def whole(folder: Path) -> dict | None:
    """The state in a save of this run, of which every file is what was written; None for any other.

    All ranks call, and share the reading.
    """
    rank, ranks = rank_and_ranks()
    try:
        state = read_json(folder / "state.json")
        right = state.pop("own digest") == digest_of_state(state)
        right = right and f"step-{state['step']:08}" == folder.name
        digests = sorted(state["digests"].items())
        right = right and all(digest_of(folder / name) == digest for name, digest in digests[rank::ranks])
        right = right and read_json(folder / "run.json") == read_json(folder.parent / "run.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        right = False
    return None if any_rank(not right, pick_device()) else state


def load(run: Path, module: nn.Module, optimizer: torch.optim.AdamW) -> dict | None:
    """Fill module and optimizer from the newest whole save -> its state, or None where there is none."""
    for folder in as_rank_0_sees(saves(run)):
        if (state := whole(folder)) is not None:
            break
        if rank_and_ranks()[0] == 0:
            print(one_line(f"{folder} is damaged, or of another run, and is passed over"))
    else:
        return None
    tensors = state_tensors(module, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, checkpoint_id=folder, no_dist=rank_and_ranks()[1] == 1)
    for values in optimizer.state.values():
        values["step"].fill_(state["step"])
    return state


def remove_saves(run: Path) -> None:
    """Remove the saves of a run whose model has been written."""
    if rank_and_ranks()[0] == 0:
        for folder in saves(run):
            remove(folder)
        (run / "latest").unlink(missing_ok=True)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU of rank 0, shards put together; empty on the others. All ranks call."""
    whole = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank_and_ranks()[0] == 0:
            whole[name] = tensor.detach().cpu()
    return whole
