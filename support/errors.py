"""What a user is told: one sentence, on one line, for all that a user or the machine has to mend."""

import errno
import re


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
    return not re.search("[\ud800-\udfff]", text)


class BadInput(ValueError):
    """Something the user gave is wrong. The message is one sentence that names the file and the remedy."""

    def __init__(self, sentence: object = ""):
        super().__init__(one_line(sentence))


REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or give fewer --workers",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that you may use",
    errno.ENAMETOOLONG: "choose a shorter name",
}
RANKS = "the connection to the other ranks is lost"
# Errors of the machine: what is said, and what their type and text have.
MACHINE = {
    "--compile does not work here; leave it out": r"^torch\._(dynamo|inductor)(?!.*TorchRuntimeError)",
    "the memory of the GPU is used up": "OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC",
    "the memory of this machine is used up": "MemoryError|DefaultCPUAllocator|t allocate memory",
    "the shared memory in which --workers hand over batches is used up": "</torch_",
    "no batch came from --workers, for want of shared memory or a faster disk": "DataLoader timed out",
    "one of --workers was killed, perhaps for want of memory": "DataLoader worker",
    RANKS: "^torch.distributed|/gloo/|NCCL",
}


def told(error: BaseException) -> str | None:
    """The sentence for an error that the user or the machine has to mend.

    None for all others: they are ours, or of a change that somebody is trying out, and keep their traceback.
    """
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return one_line(f"{error.filename or 'a file'}: {error.strerror}; {REMEDIES[error.errno]}")
    if isinstance(error, (BadInput, OSError)):
        return one_line(error)
    if not isinstance(error, (RuntimeError, MemoryError)):
        return None
    text = str(error).strip()
    whole, reason = f"{type(error).__module__}.{type(error).__name__}: {text}", one_line(text.split("\n")[0])
    said = next((said for said, part in MACHINE.items() if re.search(part, whole)), None)
    return said and f"{said}{f' ({reason:.200})' * bool(reason)}"
