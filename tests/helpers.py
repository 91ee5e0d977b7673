"""What several test files use."""

import torch

from qwen import explicit_attention
from training import recipes


def in_full(*layers: int) -> dict:
    """The request for the whole maps (B,H,T,S) of these layers."""
    return dict.fromkeys(layers, explicit_attention)


def same_weights(ours: dict, theirs: dict) -> None:
    """After ten steps at rate 1e-4, of which the sums were cut differently.

    The gradient of a key's bias is almost 0 (softmax does not see a shift of all scores), and Adam makes
    steps of full size from its rounding: there a run may be a full step away.
    """
    assert ours.keys() == theirs.keys()
    for name in ours:
        atol = 1e-4 if name.endswith("k_proj.bias") else 1e-5
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=1e-5, msg=name)


def config(*flags, stage: str = "2", ranks: int = 1):
    """The Config of a stage, which starts from a folder that need not be there."""
    argv = ["--stage", stage, "--student", "nowhere", *map(str, flags)]
    return recipes.configure(stage, recipes.parse_args("", argv), ranks)
