"""LoRA, low-rank adaptation (arXiv 2106.09685): a frozen linear map and a trained one of low rank beside it.

    y = W x + b + (alpha / r) B A dropout(x)        W (out,in) and b frozen, A (r,in) and B (out,r) trained

B starts at 0, so that training starts from the model as it was. On export B A is added to W, and nothing of
LoRA is left in the file. Left out on purpose: embeddings and the output head, which the method does not
touch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """An nn.Linear that keeps its parameters' names and gets two more, lora_A and lora_B."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias  # the same tensors, no copy
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (..., r)
        return super().forward(x) + F.linear(self.scale * low, self.lora_B)  # the narrow side is scaled


def add_lora(layers: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Freeze `layers` and put a LoRALinear in the place of every linear map in it."""
    layers.requires_grad_(False)
    for module in list(layers.modules()):  # a list, since modules are exchanged on the way
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, LoRALinear(child, rank, alpha, dropout))


def merge(state: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """A state dict with LoRA -> one without, W + (alpha / r) B A in float32. One without stays as it is."""
    plain = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    for name in state:
        if name.endswith(".lora_A"):
            path = name.removesuffix("lora_A")
            delta = state[path + "lora_B"].float() @ state[name].float()
            plain[path + "weight"] = plain[path + "weight"].float() + alpha / rank * delta
    return plain
