"""What several test files use."""

from qwen import explicit_attention
from training import recipes


def in_full(*layers: int) -> dict:
    """The request for the whole maps (B,H,T,S) of these layers."""
    return dict.fromkeys(layers, explicit_attention)


def config(*flags, stage: str = "2", ranks: int = 1):
    """The Config of a stage, which starts from a folder that need not be there."""
    argv = ["--stage", stage, "--student", "nowhere", *map(str, flags)]
    return recipes.configure(stage, recipes.parse_args("", argv), ranks)
