"""Controls of VAT (--vat-control): the teacher's maps without what they say of the picture.

If a student that is aligned with these learns as much, it does not matter where the teacher looks: the loss
and its scale are the same. Each row looks nowhere that causality forbids, and keeps how much it looks at the
picture; with `other` it has that of the row it gets.

    shuffled   its columns in a random order, for every sample always the same
    other      the map of the next sample of the micro-batch with a picture, row by row from the picture on,
               at its end its last row again; without such a sample as uniform. So it depends on how a global
               batch is cut
    uniform    each column that it sees alike

Shapes: B batch, R query rows, P visual tokens, H heads.
"""

import zlib

import torch
from torch import Tensor

CONTROLS = ("shuffled", "other", "uniform")  # --vat-control


def control_maps(
    teacher_maps: dict[int, Tensor], batch: dict, control: str, rows: Tensor, first: int = 0
) -> dict[int, Tensor]:
    """{layer: (B,R,P)}, or with heads (B,H,R,P), of the R tokens from `first` on -> the same of a control.

    rows (B,R): which of them count.
    """
    if not rows.any():
        return teacher_maps
    columns, R = batch["visual_columns"], rows.shape[1]
    position = torch.arange(R, device=columns.device)  # (R,)
    visible = columns[:, None, :] <= (first + position)[:, None]  # (B,R,P)
    if control == "shuffled":
        order = torch.stack([random_order(ids, columns.shape[1]) for ids in batch["input_ids"]])  # (B,P)
        order = order[:, None].masked_fill(~visible, columns.shape[1])  # (B,R,P), unseen ones go last
        order = order.argsort(-1)
        return {i: A.gather(-1, with_heads(order, A).expand_as(A)) for i, A in teacher_maps.items()}
    share = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    even = {i: A.sum(-1, keepdim=True) * with_heads(share, A) for i, A in teacher_maps.items()}
    if control == "uniform":
        return even
    if control != "other":
        raise ValueError(f"control {control!r} is not known; choose one of {', '.join(CONTROLS)}")
    having = rows.any(1)  # a map that says something
    seeing, source = having.nonzero()[:, 0], torch.arange(len(columns), device=columns.device)
    source[seeing] = seeing.roll(-1)  # (B,): whose map
    moved = columns[source, :1] - columns[:, :1]  # (B,1): where its picture begins, relative to ours
    begin, end = (
        index[source, None] for index in (rows.int().argmax(1), R - 1 - rows.flip(1).int().argmax(1))
    )
    row = (position + moved).clamp(begin, end)[..., None]  # (B,R,1)
    alone = (source == torch.arange(len(source), device=source.device))[:, None, None]
    theirs = {i: A[source].gather(-2, with_heads(row, A).expand_as(A)) for i, A in teacher_maps.items()}
    return {i: torch.where(with_heads(alone, A), even[i], A) for i, A in theirs.items()}


def random_order(ids: Tensor, number: int) -> Tensor:
    """A random order of `number` columns that follows from a sample's ids (T,), whatever pads them."""
    seed = zlib.crc32(ids[ids != 0].cpu().numpy().tobytes())
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).to(ids.device)


def with_heads(x: Tensor, maps: Tensor) -> Tensor:
    """(B,R,n) -> (B,1,R,n) where the maps have heads."""
    return x if maps.dim() == 3 else x[:, None]
