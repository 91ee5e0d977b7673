"""Precision, and one training step on many devices."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from model import DTYPES
from rivals import HEAD_LOSSES


def compute_dtype(precision: str, device: torch.device) -> AbstractContextManager:
    """The context that what is trained runs forward in: autocast for bf16, nothing for fp32.

    bf16: products in bfloat16. Frozen weights are held in it (load_models), since they are only read; teacher
    and vision encoder, all frozen, need no autocast. Trained weights and AdamW's moments stay float32,
    because a step of 2e-4 is smaller than the distance of two neighbours in bfloat16 (2^-8 of the weight) and
    would be rounded away; a next stage that freezes them rounds them once. Softmax and norms are computed,
    losses computed and kept in float32 in any case.
    """
    return torch.autocast(device.type, DTYPES[precision]) if precision == "bf16" else nullcontext()


def wrap_parallel(step: nn.Module, parallel: str, precision: str) -> nn.Module:
    """The step (train.Step) as it is or, on many ranks, wrapped: `ddp` or `fsdp`.

    DDP (distributed data parallel) has whole models on every rank. FSDP (fully sharded data parallel, torch's
    second one) shards the layers of student and teacher, and outside the layers what is trained; what is
    frozen there (vision encoder, P_t, with LoRA embedding and head) stays whole on every rank, since it is
    needed in every step and has no optimizer.
    """
    if not dist.is_initialized():
        return step
    if parallel == "ddp":
        # without a loss of logits nothing flows back to the head or, of attention alone, to the last layers
        of_head = step.weights.keys() & HEAD_LOSSES
        return DistributedDataParallel(step, find_unused_parameters=not of_head)
    policy = MixedPrecisionPolicy(DTYPES[precision], torch.float32, cast_forward_inputs=False)
    student, teacher = step.student, step.teacher[0]
    for root, vlm in ((step, student), (teacher and teacher.lm, teacher)):
        if vlm is None:
            continue
        for layer in vlm.lm.model.layers:
            fully_shard(layer, mp_policy=policy)
        layers = set(vlm.lm.model.layers.parameters())  # sharded already, a layer each
        whole = {p for p in root.parameters() if not p.requires_grad and p not in layers}
        fully_shard(root, mp_policy=policy, ignored_params=whole)
    return step


def local_gradients(module: nn.Module, last: bool) -> AbstractContextManager:
    """Around each micro-batch of a step: gradients travel between the ranks once, with the last one."""
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP
        module.set_requires_gradient_sync(last)
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()
