"""What a user is told: one sentence, on one line, for all that a user or the machine has to mend."""

import torch
from torch import distributed as dist


def one_line(text: object) -> str:
    """A text as a terminal may show it. Files may come from strangers, and what is in them may steer it.

    Line breaks, control characters, marks that turn the direction of writing and lone surrogates become
    escapes like \\x1b.
    """
    letters = str(text)
    if letters.isprintable():
        return letters
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in letters)


def is_utf8(text: str) -> bool:
    """False where it has lone surrogates, as JSON and terminals can give them: no tokenizer takes these."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


class BadInput(ValueError):
    """Something the user gave is wrong. The message is one sentence that names the file and the remedy."""

    def __init__(self, sentence: object = ""):
        super().__init__(one_line(sentence))


MEMORY, GPU_MEMORY = "the memory of this machine is used up", "the memory of the GPU is used up"
RANKS = "the connection to the other ranks is lost"
# Errors of the machine: (type, what its text has, what is said). Other RuntimeErrors are ours, or of a change
# that somebody is trying out, and keep their traceback.
MACHINE = (
    (MemoryError, "", MEMORY),
    (RuntimeError, "DefaultCPUAllocator", MEMORY),
    (RuntimeError, "t allocate memory", MEMORY),
    (torch.OutOfMemoryError, "", GPU_MEMORY),
    (RuntimeError, "CUDA error: out of memory", GPU_MEMORY),
    (RuntimeError, "CUBLAS_STATUS_ALLOC_FAILED", GPU_MEMORY),
    (RuntimeError, "</torch_", "the shared memory in which --workers hand over batches is used up"),
    (RuntimeError, "DataLoader timed out", "no batch came from --workers, perhaps for want of shared memory"),
    (RuntimeError, "DataLoader worker", "one of --workers was killed, perhaps for want of memory"),
    (dist.DistError, "", RANKS),
    (RuntimeError, "/gloo/", RANKS),
    (RuntimeError, "NCCL", RANKS),
)


def of_machine(error: BaseException) -> str | None:
    """What an error of the machine says, in words of ours and its own; None for all other errors."""
    text = str(error).strip()
    found = [said for kind, part, said in MACHINE if isinstance(error, kind) and part in text]
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        found = ["--compile does not work here; leave it out"]
    reason = one_line((text.splitlines() or [""])[0])
    return f"{found[0]}{f' ({reason:.200})' * bool(reason)}" if found else None
