"""Checkpoint folders, read strictly and written whole: config.json + safetensors.

Left out on purpose: pickle (.bin, .pt). Weights come from strangers, and a pickle runs code when it is
opened.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from support.errors import BadInput
from support.files import open_file, read_json, sync, whole_folder

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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors or, where there is none, all of its index.

    transformers looks in this order, too: an index may be left over from an older save.
    """
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists() and not (folder / names[0]).exists():
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise BadInput(f"{index} names no shard; fetch the checkpoint again")
        names = set(names)
        if outside := [name for name in names if Path(name).name != name]:
            raise BadInput(f"{index} points outside its folder ({outside[0]}); do not trust this checkpoint")
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
        open_file(file).close()  # a pipe would be waited for
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{file} is damaged or cut short ({reason}); fetch it again") from None


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
            if ours in state:
                raise BadInput(f"{file}: tensor {name} is there twice; remove what is left of another save")
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


SMALL = 64 << 20  # bytes: up to here the fingerprint reads a file whole


def fingerprint(folder: Path) -> str:
    """Tells one checkpoint folder from another: its config and tokenizer, some bytes of every tensor.

    Of a large file these are its header and four places of 1 KiB in each tensor.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} has no config.json; give a checkpoint folder")
    digest = hashlib.sha256()
    small = [folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    for file in [*(file for file in small if file.exists()), *weight_files(folder)]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open_file(file) as handle:
            whole = size <= SMALL or file.suffix == ".json"
            for begin, length in [(0, size)] if whole else places(file):
                digest.update(os.pread(handle.fileno(), length, begin))
    return digest.hexdigest()[:16]


def places(file: Path) -> list[tuple[int, int]]:
    """(first byte, number of bytes) of a safetensors file's header and of four places in each tensor."""
    _open(file)  # a sentence where the header is damaged
    with open_file(file) as handle:
        length = int.from_bytes(handle.read(8), "little")  # a number, a JSON object, then the tensors
        header = json.loads(handle.read(length))
    found = [(0, 8 + length)]
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in tensor["data_offsets"])
            step = max(0, end - begin - 1024) // 3
            found += [(begin + i * step, min(1024, end - begin)) for i in range(4)]
    return found


# ---------------------------------------------------------------- writing


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
            for file in temporary.iterdir():
                sync(file)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{folder} could not be written ({reason}); free space or choose another") from error
