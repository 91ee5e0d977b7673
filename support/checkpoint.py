"""Checkpoint folders, read strictly: config.json + safetensors; and whatever is written whole or not at all.

Left out on purpose: pickle (.bin, .pt). Weights come from strangers, and a pickle runs code when it is
opened.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from support.errors import BadInput

# ---------------------------------------------------------------- reading


def find(path_or_hub_name: str | Path) -> Path:
    """A local folder as it is; `owner/name` from the Hugging Face hub (safetensors and JSON only)."""
    path = Path(path_or_hub_name)
    if path.is_dir():
        return path
    if path.exists():
        raise BadInput(
            f"{path} is a file; give the checkpoint folder that holds config.json and *.safetensors"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_hub_name)):
        raise BadInput(f"{path}: no such folder, and not a hub name of the form owner/name either")
    from huggingface_hub import snapshot_download  # slow to import, and needed only here

    try:
        return Path(snapshot_download(str(path_or_hub_name), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # no network, no such repository, no permission: many types, one remedy
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"{path_or_hub_name}: no such folder here, and the hub did not give it ({reason})"
        ) from error


def read_json(file: Path) -> dict:
    """A JSON object; anything else is one sentence about that file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise BadInput(
            f"{file} is missing or cannot be read; is {file.parent} a checkpoint folder?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is not valid JSON ({error}); fetch or write it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: all shards of its index, or one model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or not all(isinstance(name, str) for name in names):
            raise BadInput(f"{index} names no shard; fetch the checkpoint again")
        if outside := [name for name in names if Path(name).name != name]:
            raise BadInput(f"{index} points outside its folder ({outside[0]}); do not trust this checkpoint")
    else:
        names = ["model.safetensors"]
    files = [folder / name for name in names]
    if missing := [file for file in files if not file.exists()]:
        if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
            raise BadInput(
                f"{pickles[0]} is a pickle, which can run code when opened, and is not read; if you trust "
                "it, torch.load it with weights_only=True and write it with safetensors.torch.save_file"
            )
        raise BadInput(f"{missing[0]} is missing; fetch the checkpoint again")
    return sorted(files)


def tensor_names(folder: Path) -> list[str]:
    """The name of every tensor in the folder, without reading any of them."""
    return [name for file in weight_files(folder) for name in _open(file).keys()]


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} is damaged or cut short ({error}); fetch it again") from None


def load_weights(
    module: nn.Module,
    folder: Path,
    rename: Callable[[str], str | None],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Strictly fill `module` (built on the meta device) from the safetensors files of `folder`.

    rename(name in the file) -> name in the module, or None for what is dropped on purpose. dtype None = as in
    the file.
    A missing, unexpected or wrongly shaped tensor raises BadInput naming file and tensor.
    """
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors = _open(file)
        for name in tensors.keys():
            ours = rename(name)
            if ours is None:
                continue
            if ours not in wanted:
                raise BadInput(
                    f"{file}: tensor {name} has no place in this model; check that config.json belongs to it"
                )
            shape = tuple(tensors.get_slice(name).get_shape())
            if shape != tuple(wanted[ours]):
                raise BadInput(
                    f"{file}: tensor {name} has shape {shape}, but config.json asks for {tuple(wanted[ours])}"
                )
            tensor = tensors.get_tensor(name)
            if not tensor.is_floating_point():
                raise BadInput(
                    f"{file}: tensor {name} is {tensor.dtype}; quantized weights are not supported"
                )
            state[ours] = tensor.to(device=device, dtype=dtype)
    if missing := sorted(wanted.keys() - state.keys()):
        raise BadInput(
            f"{folder}: no tensor for {missing[0]} ({len(missing)} missing); fetch the checkpoint again"
        )
    module.load_state_dict(state, strict=True, assign=True)


def fingerprint(folder: Path) -> str:
    """Tells one checkpoint folder from another: its config, and size, beginning and end of its weights."""
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} has no config.json; give a checkpoint folder")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        with open(file, "rb") as handle:
            digest.update(f"{file.name} {size}".encode() + handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- writing


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to write into, which takes the name `folder` at the end: all of it or nothing.

    A folder that exists and is not empty is an error: nothing already saved is ever overwritten.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} exists already and is not empty; choose another --out")
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)  # replaces an empty folder, too
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(
    folder: str | Path, tensors: dict[str, torch.Tensor], config: dict, extra: dict[str, str] | None = None
):
    """Write model.safetensors, config.json and `extra` text files; `folder` appears whole or not at all."""
    folder = Path(folder).absolute()
    try:
        with whole_folder(folder) as temporary:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            for name, text in {"config.json": json.dumps(config, indent=1) + "\n", **(extra or {})}.items():
                (temporary / name).write_text(text, encoding="utf-8")
            # on disk before the name is: a power cut leaves no empty file behind
            for file in temporary.iterdir():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{folder} could not be written ({reason}); free space or choose another") from error


def write_atomically(file: Path, text: str) -> None:
    """Replace a text file: after a crash the old one or the new one is there, whole."""
    temporary = file.with_name(f".{file.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def check_writable(folder: Path) -> None:
    """One sentence, before any work, for a folder that cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror}); choose another folder") from None


def lock_file(file: IO, how: int, taken: str) -> None:
    """Lock an open file (fcntl.LOCK_EX, LOCK_SH) until it is closed, however the process ends.

    Where another process has it, BadInput with the sentence `taken`.
    """
    try:
        fcntl.lockf(file, how | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(taken) from None
    except OSError:
        pass  # a file system without locks
