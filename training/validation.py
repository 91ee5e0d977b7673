"""Validation: the losses of a stage on held-out records (--val-data), while it trains."""

import math

import torch
from torch import Tensor, nn

import data
import rivals
from model import VLM
from support.errors import BadInput
from support.ranks import all_reduce, rank_and_ranks
from training.recipes import Config


def open_validation(c: Config, trained_on: data.LlavaDataset) -> data.LlavaDataset | None:
    """The held-out records, read as those that are trained on; None where there are none."""
    if c.val_data is None:
        return None
    if not c.val_data.is_file():
        raise BadInput(f"{c.val_data} is missing or no file; name another with --val-data, or leave it out")
    images = trained_on.images
    if c.val_images is None and len(set(images)) > 1:
        raise BadInput(f"--images are several: say with --val-images which is the folder of {c.val_data}")
    if c.val_images and not c.val_images.is_dir():
        raise BadInput(f"{c.val_images}: no such folder of pictures; give it with --val-images")
    held_out = data.LlavaDataset(
        c.val_data,
        c.val_images or images[0],
        trained_on.tokenizer,
        trained_on.num_image_tokens,
        trained_on.image_size,
        trained_on.template,
        trained_on.max_length,
        only_pictures=c.stage in ("0a", "1"),
        pairs=trained_on.pairs,
        teacher_tokenizer=trained_on.teacher_tokenizer,
    )
    held_out.room, held_out.remedy = data.KEPT, ""  # nothing is passed over in what is compared
    for i in range(len(held_out)):  # a bad one stops the run now, not after hundreds of steps
        held_out[i]
    return held_out


def is_due(step: int, steps: int, every: int) -> bool:
    """Whether to validate after so many steps: every so often, and after the last."""
    return step % every == 0 or step == steps


@torch.no_grad()
def validate(
    step: nn.Module, student: VLM, held_out: data.LlavaDataset, c: Config, device: str
) -> dict[str, float]:
    """The terms of the loss over all held-out records and all ranks -> {"val_lm": ...}.

    step: train.Step, wrapped or not. No dropout, no random number. A record without an answer is left out,
    and so is a term that nothing counts for. Every rank runs as many batches: FSDP waits for all ranks. Where
    its share is used up, a rank runs a sample that counts nothing.
    """
    rank, ranks = rank_and_ranks()
    numbers: dict[str, Tensor] = {}  # name -> sum and count
    student.eval()
    for i in range(math.ceil(len(held_out) / (ranks * c.batch_size))):
        first = (i * ranks + rank) * c.batch_size
        share = [held_out[j] for j in range(first, min(first + c.batch_size, len(held_out)))]
        share = [sample for sample in share if not sample["replaced"]]
        batch = data.to_device(data.collate(share or [held_out[0]]), device)
        if not share:
            for labels in batch.keys() & {"labels", "kl_labels"}:
                batch[labels].fill_(data.IGNORE)
            batch["has_image"].fill_(False)
            batch["attention_mask"].fill_(False)
        _, terms = step(batch, rivals.loss_counts(batch, c.method, c.weights))
        for name, term in terms.items():
            both = torch.stack([torch.as_tensor(x, device=device).double() for x in (term.sum, term.count)])
            numbers[name] = numbers.get(name, 0) + both
    student.train()
    if hasattr(step, "reshard"):  # FSDP gathers the root in a forward pass, and lets go after a backward one
        step.reshard()
    sums = all_reduce(torch.stack(list(numbers.values()))).tolist()  # [[sum, count], ...]
    return {f"val_{name}": total / count for name, (total, count) in zip(numbers, sums) if count}
