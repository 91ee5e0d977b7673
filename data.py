"""Data: conversations and pictures made into batches.

    conversation + picture -> encode, preprocess -> sample {"input_ids", "labels", "pixel_values"} -> collate
    -> batch

Inside: prompt template, labels, batches, LLaVA files, the order of samples. How a picture becomes RGB is in
support/images.py; the tiny world, which makes such data for a laptop, in support/world.py.

Shapes: B samples, T tokens (padded on the right), N pictures, P visual tokens of a picture, S side in pixels.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from distill import IGNORE  # the label of a token that is not supervised
from support.errors import BadInput, is_utf8, one_line
from support.files import read_text
from support.images import open_picture
from support.records import Records
from vocabularies import covered_bytes, match_tokens

IMAGE_TOKEN = -200  # placeholder id, one per visual token; the model writes the visual tokens there
IMAGE_MARK = "<image>"  # where a LLaVA record says that its picture stands
END_OF_TEXT = "<|endoftext|>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer.json of a checkpoint folder, whose embedding has vocab_size rows (None: not known)."""
    file, remedy = Path(folder) / "tokenizer.json", "; copy the language model's here"
    text = read_text(file, remedy)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{file} is no tokenizer ({error}){remedy}") from None
    word, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if vocab_size is not None and number >= vocab_size:
        raise BadInput(
            f"{file}: {word!r} has id {number}, but the model has {vocab_size} words, counted from 0{remedy}"
        )
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise BadInput(
            f"{file} has no token {END_OF_TEXT}, which ends every answer; use a model that has it, as Qwen1.5"
        )
    if getattr(tokenizer.model, "dropout", None):
        raise BadInput(f"{file} has a dropout, by which tokens are random; use the Qwen1.5 tokenizer")
    tokenizer.no_truncation()  # a file may have been saved with either, which is no property of the model
    tokenizer.no_padding()
    return tokenizer


def encode(
    conversations: list[dict],
    tokenizer: Tokenizer,
    num_image_tokens: int,
    template: str = "chat",
) -> tuple[list[int], list[int]]:
    """A LLaVA conversation -> ids, labels (equally long lists; labels are -100 where nothing is supervised).

        chat:      {SYSTEM}USER: [picture]\\n{question} ASSISTANT: {answer}<|endoftext|>USER: {question} ...
        pretrain:  [picture]{caption}\\n

    Supervised are " {answer}" and <|endoftext|>, with pretrain all after the picture. [picture] is
    num_image_tokens placeholders at the front of the turn in which <image> stood; marks in answers are plain
    text. BadInput: turns that are no such conversation.
    """
    return _encode_pieces(pieces(conversations, template), tokenizer, num_image_tokens)


def cut(
    ids: list[int], labels: list[int], num_image_tokens: int, max_length: int
) -> tuple[list[int], list[int]]:
    """At most max_length of ids and labels: the end goes.

    A picture is never cut in two: where it would be, all of it goes, too.
    """
    first = ids.index(IMAGE_TOKEN) if IMAGE_TOKEN in ids else len(ids)
    end = first if first < max_length < first + num_image_tokens else max_length
    return ids[:end], labels[:end]


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a plain text: "<|endoftext|>" or "<|im_end|>" in it are text, too."""
    if not is_utf8(text):
        raise BadInput(f"{f'{text!r}':.60} is not UTF-8 text: it has a lone surrogate")
    return _encoding(tokenizer, text).ids


def _encoding(tokenizer: Tokenizer, text: str) -> Encoding:
    tokenizer.encode_special_tokens = True
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{f'{text!r}':.60} is beyond this tokenizer.json ({error}); use Qwen1.5's") from None


def _encode_pieces(spans: Iterable[tuple[str, bool]], tokenizer: Tokenizer, num_image_tokens: int):
    ids, labels = [], []
    for text, supervised in spans:
        if text is IMAGE_MARK:
            new = [IMAGE_TOKEN] * num_image_tokens
        elif text is END_OF_TEXT:
            new = [tokenizer.token_to_id(END_OF_TEXT)]
        else:
            new = text_ids(tokenizer, text)
        ids += new
        labels += new if supervised else [IGNORE] * len(new)
    return ids, labels


def encode_prompt(conversations: list[dict], tokenizer: Tokenizer, num_image_tokens: int) -> list[int]:
    """A conversation that ends with a question -> ids that end in "ASSISTANT:", ready for generate."""
    spans = list(pieces([*conversations, {"from": "gpt", "value": ""}], "chat"))[:-2]  # no answer, no end
    return _encode_pieces(spans, tokenizer, num_image_tokens)[0]


def pieces(conversations: list[dict], template: str) -> Iterable[tuple[str, bool]]:
    """The conversation from left to right as (text, supervised), with IMAGE_MARK and END_OF_TEXT."""
    turns = conversations if isinstance(conversations, list) else []
    if not turns or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise BadInput('a conversation is a list of {"from": ..., "value": text}')
    if [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise BadInput("a conversation is an even number of turns, human and gpt alternating, human first")
    if sum(turn["value"].count(IMAGE_MARK) for turn in turns[::2]) > 1:
        raise BadInput(f"a conversation has more than one {IMAGE_MARK}; a sample holds none or one picture")
    if template == "pretrain":
        if IMAGE_MARK in conversations[0]["value"]:
            yield IMAGE_MARK, False
        yield conversations[1]["value"].strip() + "\n", True
        return
    before = SYSTEM  # stands once, before the first turn
    for human, gpt in zip(conversations[::2], conversations[1::2]):
        question = human["value"].replace(IMAGE_MARK, "").strip()
        if IMAGE_MARK in human["value"]:
            yield before + "USER: ", False
            yield IMAGE_MARK, False
            yield f"\n{question} ASSISTANT:", False
        else:
            yield f"{before}USER: {question} ASSISTANT:", False
        yield " " + gpt["value"].strip(), True
        yield END_OF_TEXT, True
        before = ""


def spans(
    conversations: list[dict], tokenizer: Tokenizer, num_image_tokens: int, template: str = "chat"
) -> Tensor:
    """Which bytes of the conversation, as it is written in UTF-8, each of encode's ids covers -> (T,2).

    [start, end) each; a visual token and <|endoftext|> count as one byte. (For vocabularies.py.)
    """
    found, at = [], 0
    for text, _ in pieces(conversations, template):
        if text is IMAGE_MARK or text is END_OF_TEXT:
            length = num_image_tokens if text is IMAGE_MARK else 1
            found += [(i, i + 1) for i in range(at, at + length)]
        else:
            length = len(text.encode())
            found += [(at + a, at + b) for a, b in covered_bytes(text, _encoding(tokenizer, text))]
        at += length
    return torch.tensor(found, dtype=torch.int32).view(-1, 2)


def preprocess(image: Image.Image | str | Path, size: int) -> Tensor:
    """A picture -> (3,S,S) in [-1, 1]: RGB, resized to a square without keeping the aspect ratio, bicubic."""
    image = open_picture(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # (S,S,3) bytes -> (3,S,S)


def collate(samples: list[dict]) -> dict:
    """Samples {"input_ids", "labels", "pixel_values" (3,S,S) or absent} -> batch, padded on the right.

    Samples for a teacher with other tokens have "spans" and "teacher" besides, the same in its tokens: the
    batch then has "teacher", another batch, and what joins the two (vocabularies.match_tokens).

    Samples of pairs have "rejected" besides, another such sample of the same picture: the batch then has
    twice as many rows, first the chosen answers, then the rejected ones, and each picture once.

    input_ids, labels (B,T), attention_mask (B,T) bool, pixel_values (N,3,S,S) or None, has_image (B,) bool,
    visual_columns (B,P): where in its row each visual token of a sample stands (0 where it has no picture);
    pairs: whether its rows are pairs; ids: the samples' "id" (None where there is none), replaced: the
    sentences of all samples, in one list; cut, mended: of how many rows it is said.
    """
    pairs = "rejected" in samples[0]
    pictures = [sample["pixel_values"] for sample in samples if sample.get("pixel_values") is not None]
    samples = [*samples, *(sample["rejected"] for sample in samples)] if pairs else samples
    B, T = len(samples), max(len(sample["input_ids"]) for sample in samples)
    input_ids, labels = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), IGNORE)
    attention_mask = torch.zeros(B, T, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        input_ids[row, :length] = torch.as_tensor(sample["input_ids"])
        labels[row, :length] = torch.as_tensor(sample["labels"])
        attention_mask[row, :length] = True
    placeholder = input_ids == IMAGE_TOKEN  # (B,T)
    has_image = placeholder.any(1)
    for sample, marked in zip(samples, has_image.tolist()):
        if marked != (sample.get("pixel_values") is not None):
            raise BadInput(
                f"sample {sample.get('id', '?')}: {IMAGE_MARK} in its text and a picture go together"
            )
    P = max(int(placeholder.sum(1).max()), 1)  # a batch of texts alone has one column, which nobody reads
    if bool((placeholder.sum(1)[has_image] != P).any()):
        raise BadInput(
            "the pictures of a batch have different numbers of visual tokens; encode all for one model"
        )
    visual_columns = torch.zeros(B, P, dtype=torch.long)
    visual_columns[has_image] = placeholder.nonzero()[:, 1].view(-1, P)  # row by row, from left to right
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": attention_mask,
        "pixel_values": torch.stack(pictures) if pictures else None,
        "has_image": has_image,
        "visual_columns": visual_columns,
        "pairs": pairs,
        "ids": [sample.get("id") for sample in samples[: B // (1 + pairs)]],
        "replaced": [sentence for sample in samples for sentence in sample.get("replaced", [])],
        "cut": sum(sample.get("cut", False) for sample in samples),
        "mended": sum(sample.get("mended", False) for sample in samples),
    }
    if "spans" in samples[0]:  # (B,T,2)
        batch["spans"] = torch.stack(
            [F.pad(sample["spans"], (0, 0, 0, T - len(sample["spans"]))) for sample in samples]
        )
    if "teacher" in samples[0]:
        own = [sample["teacher"] | {"pixel_values": sample.get("pixel_values")} for sample in samples]
        batch["teacher"] = collate(own) | {"pixel_values": None}  # it sees what the student sees
        batch |= match_tokens(batch, batch["teacher"])
    return batch


def to_device(batch: dict, device: torch.device | str) -> dict:
    """The batch with its tensors on the device."""

    def moved(value):
        if isinstance(value, dict):  # what the teacher reads
            return to_device(value, device)
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in batch.items()}


# ---------------------------------------------------------------- LLaVA files


class NothingToLearn(BadInput):
    """A record of which no token is supervised."""


KEPT = 1 << 28  # bytes of prepared samples that a rank keeps of one data set


class LlavaDataset(torch.utils.data.Dataset):
    """LLaVA files, records {"id", "image" or none, "conversations"} -> samples for collate.

    files: one or several; images: the folder that picture paths start from, one for all or one for each file.
    template and max_length are encode's; a sample whose picture is cut off has no "pixel_values".

    A record that cannot be used (turns, picture, <image> without a picture or the other way round) is
    BadInput with its file, id and reason. With skip_bad the next good one stands in for it: the same for
    every order, rank and worker. So it does in any case for a record without a supervised token, from which
    nothing can be learned; with only_pictures (an adapter alone is trained) records without a picture are
    left out. "replaced" of a sample lists what was passed over, in sentences; "cut" and "mended" say whether
    it was longer than max_length, and whether as_llava_reads changed it.

    pairs: records have "chosen" and "rejected" in the place of "conversations", with the same questions, and
    samples a second one, "rejected", with the same picture.

    teacher_tokenizer: samples have "spans" and "teacher", the same record in its tokens.

    room: bytes that samples may take which are kept as they were made, for the next epoch (default: none is).
    """

    def __init__(
        self,
        files: str | Path | Iterable[str | Path],
        images: str | Path | Sequence[str | Path],
        tokenizer: Tokenizer,
        num_image_tokens: int,
        image_size: int,
        template: str = "chat",
        max_length: int | None = None,
        skip_bad: bool = False,
        only_pictures: bool = False,
        pairs: bool = False,
        teacher_tokenizer: Tokenizer | None = None,
    ):
        files = [files] if isinstance(files, (str, Path)) else list(files)
        images = [images] if isinstance(images, (str, Path)) else list(images)
        if len(images) not in (1, len(files)):
            raise BadInput(f"{len(images)} --images, {len(files)} --data: give one for all, or one for each")
        images = images * len(files) if len(images) == 1 else images
        self.images = [*map(Path, images)]
        self.tokenizer, self.teacher_tokenizer, self.template = tokenizer, teacher_tokenizer, template
        self.num_image_tokens, self.image_size = num_image_tokens, image_size
        self.max_length, self.skip_bad, self.pairs = max_length, skip_bad, pairs
        self.room, self.kept = 0, {}
        self.remedy = " (--skip-bad-samples passes over such records)"
        if missing := [folder for folder in self.images if not folder.is_dir()]:
            raise BadInput(f"{missing[0]}: no such folder of pictures; give it with --images")
        picture = [{"from": "human", "value": IMAGE_MARK}, {"from": "gpt", "value": ""}]
        both = [
            encode(picture, one, num_image_tokens, template)[0]
            for one in (tokenizer, teacher_tokenizer)
            if one
        ]
        least = max(ids.index(IMAGE_TOKEN) for ids in both) + num_image_tokens + 1
        if max_length is not None and max_length < least:
            raise BadInput(
                f"a limit of {max_length} tokens a sample has no room for prompt, picture and text; "
                f"{least} is the least, and useful are many more"
            )
        self.records = Records(files)
        some = [self.records[i] for i in range(min(20, len(self.records)))] if pairs else []
        if pairs and not any("chosen" in record for record in some):
            raise BadInput(f'{files[0]}: no pairs of answers; give records with "chosen" and "rejected"')
        self.places = np.arange(len(self.records))  # of the records that are used
        if only_pictures:
            self.places = np.flatnonzero(self.records.has_image)
            if not len(self.places):
                raise BadInput(
                    f"{files[0]}: no record has a picture, and an adapter alone is trained; give others"
                )

    def __len__(self) -> int:
        return len(self.places)

    @property
    def lengths(self) -> np.ndarray:
        """(len,) int: about how many tokens each sample has, to group like with like."""
        tokens = self.records.characters // 4 + self.num_image_tokens * self.records.has_image
        tokens = tokens if self.max_length is None else np.minimum(tokens, self.max_length)
        return tokens[self.places]

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        if index in self.kept:
            return self.kept[index]
        sample = self.prepare(index)
        pixels = sample.get("pixel_values")
        answers = [sample, *(sample[name] for name in ("rejected", "teacher") if name in sample)]
        # an id and its label: 72 bytes, and 8 for a span
        size = (80 if "spans" in sample else 72) * sum(len(answer["input_ids"]) for answer in answers)
        size += 0 if pixels is None else pixels.nbytes
        if size <= self.room:
            self.room -= size
            self.kept[index] = sample
        return sample

    def prepare(self, index: int) -> dict:
        """The sample of a record, or of the next good one."""
        replaced = []
        for place in range(index, index + min(len(self), MOST_REPLACED)):
            place = int(self.places[place % len(self)])
            record = self.records[place]  # a file that changed is no bad record: it stops the run
            name, number = record.get("id", place), self.records.number_of_file(place)
            file, images = self.records.files[number], self.images[number]
            try:
                return {"id": name, **self.sample(record, images), "replaced": replaced}
            except (ValueError, TypeError, RuntimeError) as error:  # no path, a loop of links
                reason = f"{file}, record {f'{name!r}':.60}: {error}"
                if not self.skip_bad and not isinstance(error, NothingToLearn):
                    raise BadInput(reason + self.remedy) from None
                replaced.append(one_line(reason))
        raise BadInput(f"{len(replaced)} records in a row are bad, the last of them {replaced[-1]}")

    def sample(self, record: dict, images: Path) -> dict:
        """One record -> {"input_ids", "labels", "pixel_values" unless it is cut off, "cut", "mended"}."""
        image = record.get("image")
        if isinstance(image, list) and len(image) == 1:  # as LLaVA-OneVision's files have it
            image = image[0]
        if image and not isinstance(image, str):
            raise BadInput(f'"image" is {f"{image!r}":.60}, not the name of one picture')
        names = ("chosen", "rejected") if self.pairs else ("conversations",)
        sample, *others = samples = [self.text_of(record, name, image, self.tokenizer) for name in names]
        if self.teacher_tokenizer:
            sample["teacher"] = self.text_of(record, names[0], image, self.teacher_tokenizer)
            sample["cut"] |= sample["teacher"]["cut"]
            samples.append(sample["teacher"])
        if others and questions(record["chosen"]) != questions(record["rejected"]):
            raise BadInput('"chosen" and "rejected" do not have the same questions')
        if len({IMAGE_TOKEN in one["input_ids"] for one in samples}) > 1:
            where = "before one of the two answers" if others else "for one of the two tokenizers"
            raise NothingToLearn(f"the picture is cut off {where}")
        if others and sample["input_ids"] == others[0]["input_ids"]:
            within = f" within {self.max_length} tokens" * bool(sample["cut"])
            raise NothingToLearn(f'"chosen" and "rejected" are the same{within}')
        if IMAGE_TOKEN in sample["input_ids"]:
            pixel_values = preprocess(inside(images, image), self.image_size)
            for one in samples:
                one["pixel_values"] = pixel_values
        return sample | ({"rejected": others[0]} if others else {})

    def text_of(self, record: dict, name: str, image: str | None, tokenizer: Tokenizer) -> dict:
        """record[name], a conversation -> {"input_ids", "labels", "cut", "mended"}; "spans", too, where a
        teacher has a tokenizer of its own."""
        turns, how = as_llava_reads(record.get(name)), (self.num_image_tokens, self.template)
        try:
            ids, labels = encode(turns, tokenizer, *how)
        except BadInput as error:
            raise BadInput(f'"{name}": {error}') from None
        if (IMAGE_TOKEN in ids) != bool(image):
            raise BadInput(f"{IMAGE_MARK} in its text and a picture go together")
        cut_off = self.max_length is not None and len(ids) > self.max_length
        if cut_off:
            ids, labels = cut(ids, labels, self.num_image_tokens, self.max_length)
        if all(label == IGNORE for label in labels):
            raise NothingToLearn(f"nothing of an answer is within {self.max_length} tokens")
        sample = {"input_ids": ids, "labels": labels, "cut": cut_off, "mended": turns is not record[name]}
        if self.teacher_tokenizer:
            sample["spans"] = spans(turns, tokenizer, *how)[: len(ids)].clone()
        return sample

    def batch(self, indices: list[int]) -> dict:
        """The batch of these samples."""
        return collate([self[index] for index in indices])


def questions(turns: list[dict]) -> list[str]:
    """What is asked in a conversation, and answered."""
    return [turn["value"] for turn in as_llava_reads(turns)[::2]]


def as_llava_reads(turns: list[dict]) -> list[dict]:
    """Without a first turn of gpt and a last question without answer, as LLaVA's code reads its own files.

    The same list where there is neither; what is no list of turns is left to `pieces` to say.
    """
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        if turns and turns[0].get("from") == "gpt":
            turns = turns[1:]
        if len(turns) % 2 and len(turns) > 1 and turns[-1].get("from") == "human":
            turns = turns[:-1]
    return turns


MOST_REPLACED = 1000  # in a row; so many bad records are a wrong folder


def inside(folder: Path, name: str) -> Path:
    """folder / name, refused where it leads out of the folder (data may come from strangers).

    One way out is the user's own: a link to a folder that stands right in it, which puts data sets together.
    """
    if not is_utf8(name) or "\0" in name:
        raise BadInput(f"{name!r} is no name of a picture")
    path, roots = Path(os.path.realpath(folder / name)), [folder]
    first = folder.joinpath(*Path(name).parts[:1])
    if os.path.islink(first) and first.is_dir():
        roots.append(first)
    if not any(path.is_relative_to(root.resolve()) for root in roots):
        raise BadInput(f"picture path {name!r} leads out of {folder}")
    return path


# ---------------------------------------------------------------- the order of samples

BLOCK_OF_BATCHES = 64  # global batches that are sorted by length together


def batches_of(
    num_samples: int,
    steps: int,
    accumulation: int,
    size: int,
    rank: int,
    ranks: int,
    seed: int,
    start: int = 0,
    lengths: np.ndarray | None = None,
) -> Iterator[list[int]]:
    """The sample indices of each of this rank's micro-batches, from optimizer step `start` up to `steps`.

    A global batch is the same samples whatever the number of ranks and micro-batches is; every epoch is a new
    permutation. With lengths (num_samples,), the samples of a global batch have like lengths and stand in
    their order, so that a micro-batch is padded little.
    """
    epoch, order = -1, None
    for micro in range(start * accumulation, steps * accumulation):
        first = (micro * ranks + rank) * size
        indices = []
        for position in range(first, first + size):
            if position // num_samples != epoch:
                epoch = position // num_samples
                order = epoch_order(num_samples, epoch, seed, accumulation * size * ranks, lengths)
            indices.append(int(order[position % num_samples]))
        yield indices


def epoch_order(
    num_samples: int, epoch: int, seed: int, global_batch: int, lengths: np.ndarray | None
) -> np.ndarray:
    """A permutation. With lengths its global batches, 64 at a time, are sorted by length, then shuffled."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(num_samples, generator=generator).numpy()
    if lengths is None:
        return order
    # Epochs follow each other without a gap: the first samples may complete a global batch of the epoch
    # before, and the last begin one of the next. Between them lie whole global batches.
    head = -epoch * num_samples % global_batch
    number = max(num_samples - head, 0) // global_batch
    whole = order[head : head + number * global_batch]
    for at in range(0, len(whole), BLOCK_OF_BATCHES * global_batch):
        block = whole[at : at + BLOCK_OF_BATCHES * global_batch]  # a view: writing to it writes into order
        block[:] = block[np.argsort(lengths[block], kind="stable")]
    shuffled = torch.randperm(number, generator=generator).numpy()
    whole[:] = whole.reshape(number, global_batch)[shuffled].ravel()
    return order
