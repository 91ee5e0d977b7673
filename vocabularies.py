"""Two vocabularies: a student learns from a teacher that reads other tokens (--tokenizers aligned).

The paper's L_KL needs one vocabulary for both models. Here each reads the text in tokens of its own, and a
token is known by the bytes of the text that it covers (data.spans):

    text      ...r e d   c i r c l e
    student   ...[red   ][circle    ]
    teacher   ...[r][ed ][cir][cle  ]

    visual tokens   are the same: the columns of two attention maps, and the rows of a picture's tokens
    rows of text    a student token's row is compared with the mean of the teacher rows that overlap it
    answers         L_KL stands where both have a boundary, before the same text, over the words that both
                    vocabularies have, and all others as one (distill.shared_kl_divergence)

So the teacher's output is moved to the student's tokens, and the losses stay as they are. With one tokenizer
for both nothing moves, and the numbers are those of --tokenizers same.

Shapes: B batch, T student tokens, S teacher tokens, P visual tokens, H heads, C width, V vocabulary.
"""

import json
import re

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from distill import IGNORE, SharedWords, next_tokens
from qwen import Output
from support.errors import BadInput

# ---------------------------------------------------------------- tokens, by what they cover


BYTE = re.compile("<0x[0-9A-F]{2}>$")  # a word that is one byte, of tokenizers that are not byte-level


def covered_bytes(text: str, encoding: Encoding) -> list[tuple[int, int]]:
    """The bytes that each token covers, without gaps, from the first token to the end of the text.

    The library has characters: all of one that several tokens are bytes of, and not those that a tokenizer
    trims or normalises away. A space that was trimmed goes to the token after it, an accent that was composed
    to the one before.
    """
    characters, end = [], 0  # [first, last) of each token
    for start, stop in encoding.offsets:
        if start > end and characters and (characters[-1][0] == end or not text[end:start].isspace()):
            characters[-1] = (characters[-1][0], start)
        elif start > end:
            start = end
        characters.append((start, stop))
        end = max(end, stop)
    if characters:
        characters[-1] = (characters[-1][0], len(text))
    byte = np.cumsum([0, *(len(letter.encode()) for letter in text)]).tolist()  # where each character begins
    covered, end = [], 0
    following = [start for start, _ in characters[1:]] + [len(text)]
    for (start, stop), token, after in zip(characters, encoding.tokens, following):
        start = max(end, byte[start])  # in a character that the token before has begun: where that one ends
        length = 1 if BYTE.match(token) else len(token)  # a letter stands for a byte
        end = byte[stop] if after >= stop else min(start + length, byte[stop])
        covered.append((start, end))
    return covered


def overlap(student: Tensor, teacher: Tensor) -> Tensor:
    """Spans (B,T,2) and (B,S,2) -> (B,T,S): of each student token the teacher tokens that overlap it, each
    with the same weight; their sum is 1, or 0 where there is none."""
    s, t = student[:, :, None], teacher[:, None]
    both = ((s[..., 0] < t[..., 1]) & (t[..., 0] < s[..., 1])).float()
    return both / both.sum(-1, keepdim=True).clamp(min=1)


def match_tokens(student: dict, teacher: dict) -> dict:
    """Two batches of the same samples (data.collate), each in one model's tokens -> what joins them.

    position (B,T): the teacher token with the same end, where L_KL stands. kl_labels (B,T): the student's
    labels, but only of tokens that begin where a token of the teacher begins. covered (B,T): student tokens
    that some teacher token overlaps; others are there only if one of the two was cut.
    """
    ends = [batch["spans"][..., 1] for batch in (student, teacher)]
    # an answer's token begins, and not one of which nothing is left
    after = [next_tokens(batch["labels"]) != IGNORE for batch in (student, teacher)]
    after = [some & F.pad(end[:, 1:] > end[:, :-1], (0, 1)) for some, end in zip(after, ends)]
    same = (ends[0][:, :, None] == ends[1][:, None]) & after[0][:, :, None] & after[1][:, None]  # (B,T,S)
    begins = F.pad(same.any(-1)[:, :-1], (1, 0))  # of the token after
    return {
        "position": same.int().argmax(-1),
        "kl_labels": student["labels"].masked_fill(~begins, IGNORE),
        "covered": overlap(student["spans"], teacher["spans"]).any(-1),
    }


def as_the_student_reads(teacher: Output, batch: dict, some: tuple[slice, slice] | None) -> Output:
    """The teacher's output as if it had read the student's tokens.

    Hidden states and logits (B,S,...) -> (B,T,...) at `position`. Attention: maps (B,R,P) or with heads
    (B,H,R,P), of `some` rows, the student's and the teacher's -> of the student's rows; without `some` it is
    whole, (B,H,S,S) -> (B,H,T,T), of which the visual columns are filled.
    """
    rows, teacher_rows = some or (slice(None), slice(None))

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.gather(1, batch["position"][..., None].expand(-1, -1, x.shape[-1]))

    own, maps = batch["teacher"], {}
    weights = overlap(batch["spans"][:, rows], own["spans"][:, teacher_rows])  # (B,R,R of the teacher)
    for layer, A in teacher.attentions.items():
        w = weights if A.dim() == 3 else weights[:, None]
        if some:
            maps[layer] = w @ A
            continue
        columns = [b["visual_columns"][:, None, None].expand(-1, A.shape[1], -1, -1) for b in (own, batch)]
        seen = w @ A.gather(3, columns[0].expand(-1, -1, A.shape[2], -1))  # (B,H,T,P)
        empty = A.new_zeros(*seen.shape[:3], seen.shape[2])
        maps[layer] = empty.scatter(3, columns[1].expand(-1, -1, seen.shape[2], -1), seen)
    return teacher._replace(hidden=moved(teacher.hidden), logits=moved(teacher.logits), attentions=maps)


# ---------------------------------------------------------------- words, by their spelling

PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are written as themselves
BYTES = {chr(b): b for b in PRINTED}  # of byte-level tokenizers: letter -> byte, as GPT-2 has them
BYTES |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTED}))}


def spelling(tokenizer: Tokenizer) -> dict[bytes, int]:
    """{the bytes of a word: its id}. Spaces are spaces, whether a vocabulary writes them as Ġ or as ▁."""
    added, parts = tokenizer.get_added_tokens_decoder(), json.loads(tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps([parts["pre_tokenizer"], parts["decoder"]])
    words = {}
    # of two words with one spelling an added one wins, then one that is no single byte, then the first
    order = sorted(
        tokenizer.get_vocab().items(), key=lambda x: (x[1] not in added, bool(BYTE.match(x[0])), x[1])
    )
    for word, i in order:
        if i in added:
            spelled = word.encode()
        elif BYTE.match(word):
            spelled = bytes.fromhex(word[3:5])
        elif byte_level and all(letter in BYTES for letter in word):
            spelled = bytes(BYTES[letter] for letter in word)
        else:
            spelled = word.replace("▁", " ").encode()
        words.setdefault(spelled, i)
    return words


SAMPLE = " yes, the red circle is left of it.\nno"


def check_spelling(tokenizer: Tokenizer) -> None:
    """BadInput where the words of a text do not make it up, letter by letter."""
    of_id = {i: word for word, i in spelling(tokenizer).items()}
    ids = tokenizer.encode(SAMPLE, add_special_tokens=False).ids
    if b"".join(of_id.get(i, b"") for i in ids) != SAMPLE.encode():
        some = [tokenizer.id_to_token(i) for i in ids[:4]]
        raise BadInput(
            f"one of their tokenizers does not spell {SAMPLE!r} as it is ({some} ...), so that words cannot "
            "be compared; choose models with byte-level tokenizers, as Qwen1.5 and SmolLM2 have"
        )


def shared_words(tokenizers: tuple[Tokenizer, Tokenizer], sizes: tuple[int, int]) -> SharedWords:
    """The words that both vocabularies have, by their ids in the student's and in the teacher's.

    sizes: of the two output matrices. Rows that are no word in either are the same padding; what the larger
    one has of it beyond the smaller one's size is in neither list. BadInput: there is no such word.
    """
    ours, theirs = (spelling(tokenizer) for tokenizer in tokenizers)
    pairs = [(i, theirs[word]) for word, i in ours.items() if word in theirs]
    special = tokenizers[0].get_added_tokens_decoder()
    if all(i in special for i, _ in pairs):
        raise BadInput("their tokenizers have no word in common: there are no answers that could be compared")
    known = [{*tokenizer.get_vocab().values()} for tokenizer in tokenizers]
    pairs += [(i, i) for i in sorted({*range(min(sizes))} - known[0] - known[1])]
    ids = torch.tensor(sorted(pairs)).view(-1, 2).unbind(1)
    ends = [max(min(sizes), 1 + max(own)) for own in known]
    rest = [sorted({*range(end)} - {*own.tolist()}) for end, own in zip(ends, ids)]
    return SharedWords(*ids, *(torch.tensor(i, dtype=torch.long) for i in rest))
