"""A mixture of experts in the place of an MLP, as LLaVA-MoD's student has it (arXiv 2408.15881).

    g = softmax(router x)                            (E,), in float32
    y = (g_a MLP_a(x) + g_b MLP_b(x)) / (g_a + g_b)  the two experts a, b of a token with the largest g

Up-cycling makes every expert a copy of the dense MLP, so that at first y = MLP(x), whatever the router says.

Unlike the released code there is no capacity, beyond which tokens are dropped, and no noise on the second
choice: a token's output depends on that token alone, not on its batch, its padding or chance. So training,
generation with a cache and every number of ranks agree.

Shapes: B batch, T tokens, C width, E experts, n the tokens of one expert.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHOSEN = 2  # experts of a token


def is_sparse(layer: int, num_experts: int) -> bool:
    """Whether this layer, counted from 0, has experts: every other one has, the first among them."""
    return num_experts > 0 and layer % 2 == 0


class Router(nn.Linear):
    """x (B,T,C) -> g (B,T,E): the share of each expert. In float32, whatever x is held in.

    (FSDP in bfloat16 gathers the layer's weights in that dtype, the router's, too.)
    """

    def __init__(self, width: int, num_experts: int):
        super().__init__(width, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float()).softmax(-1)


class Experts(nn.Module):
    """x (B,T,C) -> y (B,T,C), and the router's g (B,T,E), which the balance loss reads."""

    def __init__(self, mlps: Sequence[nn.Module], width: int):
        super().__init__()
        self.router = Router(width, len(mlps))
        self.experts = nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        g = self.router(x)
        largest, chosen = g.flatten(0, 1).topk(min(CHOSEN, g.shape[-1]), -1)  # (B*T,2)
        shares = largest / largest.sum(-1, keepdim=True)
        tokens = x.flatten(0, 1)  # (B*T,C)
        y = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            # an expert of no token runs on 0 of them: its gradient is 0 and not missing, for which DDP waits
            which, place = (chosen == e).nonzero(as_tuple=True)  # (n,), ascending: a token once at most
            out = expert(tokens[which]) * shares[which, place, None]  # (n,C)
            y = y.index_add(0, which, out.to(y.dtype))
        return y.view_as(x), g


def upcycle(layers: nn.ModuleList, width: int, num_experts: int) -> None:
    """Put `num_experts` copies of its dense MLP into every other layer, in place."""
    for i, layer in enumerate(layers):
        if is_sparse(i, num_experts):
            experts = Experts([deepcopy(layer.mlp) for _ in range(num_experts)], width)
            layer.mlp = experts.to(next(layer.mlp.parameters()))  # its device and dtype
