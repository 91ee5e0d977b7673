"""The scorers: what a model answers, or how likely it finds an answer, for many prompts at once.

Prompts to one picture share the template, the picture and the beginning of the question: these run once, and
their keys and values serve every prompt (`prefill`). Logits are made only where a scorer reads them.

Shapes: R or B prompts, N pictures, T tokens, P visual tokens, C width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import data
import model
from qwen import Cache
from support.errors import BadInput
from support.loading import batches_made

BATCH = 256  # prompts scored at once


def load(name: str, precision: str = "fp32") -> model.VLM:
    """A checkpoint that can be asked questions, on the GPU (under torchrun this rank's) if there is one."""
    vlm = model.load(name, model.DTYPES[precision], model.pick_device())
    try:
        vlm.require_tokenizer()
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None
    return vlm


def prompt(vlm: model.VLM, picture: Path, question: str) -> dict:
    """A sample for collate: the picture and the question, ready to be answered."""
    ids = vlm.question_ids(question, picture=True)
    pixels = data.preprocess(picture, vlm.config.vision.image_size)
    return {"input_ids": ids, "labels": [data.IGNORE] * len(ids), "pixel_values": pixels}


def batches(samples: Iterable[dict], device: torch.device, size: int = BATCH):
    """Samples, made one batch at a time -> batches on the device."""
    samples = iter(samples)
    while chunk := list(islice(samples, size)):
        yield data.to_device(data.collate(chunk), device)


# ---------------------------------------------------------------- many prompts to few pictures


class Ask(NamedTuple):
    """One prompt."""

    picture: Path
    question: str  # what stands after "<image>\n"
    then: tuple[int, ...] = ()  # tokens put after the prompt: a caption to be scored, what options begin with


class Batch(NamedTuple):
    """R prompts of which all that they share has been read already."""

    ids: Tensor  # (R,T) the rest of each prompt and its `then`, padded on the right
    mask: Tensor  # (R,T) False = padding
    cache: Cache  # of what they share, R rows
    ends: list[int]  # R: which of T is the end of the prompt, which predicts what follows it
    thens: list[tuple[int, ...]]


def decoded(files: list[Path], size: int) -> Tensor:
    """Pictures (N,3,S,S)."""
    return torch.stack([data.preprocess(file, size) for file in files])


def words(vlm: model.VLM, text: str) -> list[int]:
    """The tokens of a reply, which begins with a space where the template has none before it."""
    space = " " if vlm.template == "chat" else ""
    return data.text_ids(vlm.tokenizer, space + text)


def by_picture(pictures: Sequence[Path], size: int) -> list[list[int]]:
    """The indices of prompts to these pictures in batches, those of one picture side by side."""
    place = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}
    order = sorted(range(len(pictures)), key=lambda i: place[pictures[i]])
    return [order[at : at + size] for at in range(0, len(order), size)]


def shared_once(
    vlm: model.VLM, asks: Sequence[Ask], chunks: list[list[int]], workers: int = 0
) -> Iterator[tuple[list[int], Batch]]:
    """The prompts in batches, each a list of their indices in `chunks`, pictures decoded by `workers`."""
    files = [list(dict.fromkeys(asks[i].picture for i in chunk)) for chunk in chunks]
    pictures = batches_made(partial(decoded, size=vlm.config.vision.image_size), files, workers)
    for chunk, some, pixels in zip(chunks, files, pictures):
        row_of = {file: row for row, file in enumerate(some)}
        yield chunk, prefill(vlm, [asks[i] for i in chunk], [row_of[asks[i].picture] for i in chunk], pixels)


@torch.no_grad()
def prefill(vlm: model.VLM, asks: list[Ask], owner: list[int], pixels: Tensor) -> Batch:
    """R prompts to N pictures (N,3,S,S); owner: which picture each prompt is about.

    Template, picture and the beginning of the question are the same tokens in all prompts. They run once a
    picture; their keys and values then serve all its prompts: both orders, both captions, every question.
    """
    prompts = [vlm.question_ids(ask.question, picture=True) for ask in asks]
    for ids, ask in zip(prompts, asks):
        vlm.check_length(len(ids) + len(ask.then), f"the answer to {f'{ask.question!r}':.60}")
    shared = min(common(prompts), min(map(len, prompts)) - 1)  # the end of each prompt is still to be read
    cache = Cache(len(vlm.lm.model.layers))
    ids = torch.tensor([prompts[0][:shared]], device=vlm.device).expand(len(pixels), -1)
    vlm.lm(inputs_embeds=vlm.embed(ids, pixels.to(vlm.device)), cache=cache, logits=False)
    rows = torch.tensor(owner, device=vlm.device)
    cache.visible = cache.visible[rows]
    for layer in cache.layers:
        layer[:] = [y[rows] for y in layer]  # (N,H,S,D) -> (R,H,S,D)
    rest = [torch.tensor([*ids[shared:], *ask.then]) for ids, ask in zip(prompts, asks)]
    mask = pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in rest], batch_first=True)
    ids = pad_sequence(rest, batch_first=True)
    ends = [len(ids) - shared - 1 for ids in prompts]
    return Batch(ids.to(vlm.device), mask.to(vlm.device), cache, ends, [ask.then for ask in asks])


def common(rows: list[list[int]]) -> int:
    """With how many equal tokens all rows begin."""
    first, last = min(rows), max(rows)  # in the order of a dictionary: what these two share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


@torch.no_grad()
def log_probabilities(vlm: model.VLM, batch: Batch) -> Iterator[Tensor]:
    """For each row (n+1,V): of what comes after the prompt, and after each of the n tokens of its `then`."""
    hidden = vlm.lm(batch.ids, batch.mask, cache=batch.cache, logits=False).hidden  # (R,T,C)
    # only there are logits needed
    rows = [row[end : end + len(then) + 1] for row, end, then in zip(hidden, batch.ends, batch.thens)]
    head = vlm.lm.head_weight.float()  # in bfloat16 near logits would tie
    for at in range(0, len(rows), 16):  # not all at once: V is 150,000
        some = rows[at : at + 16]
        logits = model.finite(F.linear(torch.cat(some).float(), head), vlm.name)
        yield from logits.log_softmax(-1).split([len(row) for row in some])


# ---------------------------------------------------------------- scorers of one batch


class Options(NamedTuple):
    """The written options of a question as tokens: what all of them begin with, then one token each."""

    names: tuple[str, ...]
    lead: tuple[int, ...]
    tokens: list[list[int]]  # of each option: "yes" and "Yes", but only "A", since "a" is an article


def option_tokens(vlm: model.VLM, names: tuple[str, ...]) -> Options:
    """Where " A" is a token of its own there is no lead; a tokenizer that splits it has the space as lead."""
    forms = [{name} if len(name) == 1 else {name, name.lower(), name.capitalize()} for name in names]
    encoded = [[words(vlm, form) for form in sorted(some)] for some in forms]
    tokens = [[ids[0] for ids in some if len(ids) == 1] for some in encoded]
    if all(tokens):
        return Options(names, (), tokens)
    plain = [words(vlm, name) for name in names]
    n = common(plain)
    if any(len(ids) == n for ids in plain) or len({ids[n] for ids in plain}) < len(names):
        raise BadInput(
            f"the options {', '.join(names)} begin alike in this checkpoint's tokens; use --scorer generate"
        )
    return Options(names, tuple(plain[0][:n]), [[ids[n]] for ids in plain])


def choose(vlm: model.VLM, batch: Batch, options: list[Options]) -> list[tuple[str, dict, bool]]:
    """The option that greedy writing would choose if it had to choose one.

    Of each row the option, log P of every option, and whether the model would have begun with it unasked.
    """
    chosen = []
    for log_p, some in zip(log_probabilities(vlm, batch), options):
        scores = {name: log_p[-1, ids].max().item() for name, ids in zip(some.names, some.tokens)}
        *path, last = log_p.argmax(-1).tolist()
        free = tuple(path) == some.lead and any(last in ids for ids in some.tokens)
        chosen.append((max(scores, key=scores.get), scores, free))
    return chosen


def yes_odds(vlm: model.VLM, batch: Batch) -> list[float]:
    """log P(yes) / P(no) of each row, each the sum over its forms."""
    yes, no = option_tokens(vlm, ("yes", "no")).tokens
    rows = log_probabilities(vlm, batch)
    return [(log_p[-1, yes].logsumexp(0) - log_p[-1, no].logsumexp(0)).item() for log_p in rows]


def likelihoods(vlm: model.VLM, batch: Batch) -> list[tuple[float, int]]:
    """(log P, number of tokens) of what follows each prompt."""
    return [
        (log_p[range(len(then)), list(then)].sum().item(), len(then))
        for log_p, then in zip(log_probabilities(vlm, batch), batch.thens)
    ]


def write(vlm: model.VLM, batch: Batch, max_new_tokens: int) -> list[str]:
    """The greedy reply to each prompt."""
    new = vlm.generate(batch.ids, None, batch.mask, max_new_tokens, cache=batch.cache)
    return [vlm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in new.tolist()]


def described(vlm: model.VLM, picture: Path, question: str, caption: str) -> Ask:
    """The prompt whose reply is the caption, to its end of text."""
    return Ask(picture, question, (*words(vlm, caption.strip()), vlm.stop_ids[0]))


def of_all(vlm: model.VLM, asks: list[Ask], score: Callable, size: int = BATCH) -> list:
    """score(vlm, batch) of all prompts, in their order."""
    results = [None] * len(asks)
    for chunk, batch in shared_once(vlm, asks, by_picture([ask.picture for ask in asks], size)):
        for i, result in zip(chunk, score(vlm, batch)):
            results[i] = result
    return results


def replies(vlm: model.VLM, asks: Sequence[Ask]) -> list[str]:
    """Greedy answers of at most four tokens: yes or no, a word, a place."""
    return of_all(vlm, asks, partial(write, max_new_tokens=4))
