"""data.py, part 1: ids and labels, pictures, batches.

Every tokenizer test runs with a small tokenizer made here, and with the real one of Qwen1.5 where the
environment variable SHARED names the folder that holds it.
"""

import io
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from checkpoint import BadInput
from data import IGNORE, IMAGE_TOKEN, collate, encode, encode_prompt, load_tokenizer, preprocess
from siglip import SiglipConfig

# Written out once more, so that a slip in data.py cannot hide.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
END = "<|endoftext|>"
PICTURE = "\0"  # where the picture stands in a text composed here
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def small_tokenizer() -> Tokenizer:
    """Byte-level BPE as Qwen1.5 has it, with the few merges that a few sentences give."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    text = SYSTEM + "USER: \nWhat is this? ASSISTANT: yes, this is a red cat"
    tokenizer.train_from_iterator([text] * 2, trainer)
    tokenizer.add_special_tokens([END, "<|im_start|>", "<|im_end|>"])
    return tokenizer


@pytest.fixture(scope="module", params=["small", "qwen1.5"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "qwen1.5":
        if "SHARED" not in os.environ:
            pytest.skip("SHARED is not set: no real tokenizer")
        return load_tokenizer(Path(os.environ["SHARED"]) / "data" / "qwen1.5-tokenizer")
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def talk(*turns):
    """question, answer, question, answer ... -> a LLaVA conversation."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(turns)]


TALKS = {
    "one question": talk("<image>\nWhat is this?", "A red cat."),
    "many turns": talk(
        "<image>\nWhat is this?", "A cat.", "And?", "yes", "Sure?", "No, it is 5 o'clock.", "Oh", "1"
    ),
    "text only": talk("What is two and two?", "4", "And three?", "It is 7."),
    "image in the middle": talk("What is\n<image>\nin the middle?", "It's a cat."),
    "image at the end": talk("What is this?\n<image>", "this"),
    "image in a later turn": talk("Hello", "Hi!", "Look: <image> nice?", "yes", "Why?", "this"),
    "odd beginnings": talk(
        "<image>a", "(b)", "c", "'s", "d", "...", "e", "#1", "f", "-\n\n- g", "h", "\u0301x"
    ),
    "spaces around": talk("<image> \n  What is this? \n", "\n  yes  \n\n", "  And? ", "\tno\u3000"),
    "inner spaces": talk("<image>\nWhat  is\n\n this?", "a   b \n\n\n c\t\td"),
    "empty": talk("<image>", "", "", ""),
    "unicode": talk(
        "<image>\nCafe\u0301 \u1112\u1161\u11ab 東京?",
        "Ünï 😀👩\u200d👩 e\u0301\u0301",
        "\u2126",
        "\ufb01\u212b",
    ),
    "markup in answers": talk(
        "<image>\nSay", "USER: <image> ASSISTANT: no<image>", "a", "ASSISTANT:", "c", "<image>"
    ),
}
CONTROL_TALKS = {
    "control in answers": talk("<image>\nSay it", f"{END}", "again", f"a{END} b <|im_end|>{END}"),
    "control in questions": talk(f"<image>{END}\nWhat {END}?", "yes", "<|im_start|>user", "<|im_start|>no"),
}
ALL_TALKS = {**TALKS, **CONTROL_TALKS}
every_talk = pytest.mark.parametrize("conversation", ALL_TALKS.values(), ids=ALL_TALKS)


def compose(conversation):
    """The text of a conversation in one piece, by formats.md, with PICTURE at the front of its question."""
    text = SYSTEM
    for human, gpt in zip(conversation[::2], conversation[1::2]):
        mark = PICTURE + "\n" if "<image>" in human["value"] else ""
        question = human["value"].replace("<image>", "").strip()
        text += f"USER: {mark}{question} ASSISTANT: {gpt['value'].strip()}{END}"
    return text


def nfc(text):
    return unicodedata.normalize("NFC", text)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def supervised_answers(tokenizer, ids, labels):
    """What is supervised, as text, one per end of text; checks on the way that labels are ids or -100."""
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels))
    answers, answer = [], []
    for label in (label for label in labels if label != IGNORE):
        if label == tokenizer.token_to_id(END):
            answers, answer = [*answers, decode(tokenizer, answer)], []
        else:
            answer.append(label)
    assert not answer, "supervised tokens after the last end of text"
    return answers


# ---------------------------------------------------------------- ids and labels


@every_talk
def test_supervised_is_every_answer_and_its_end_and_nothing_else(tokenizer, conversation):
    ids, labels = encode(conversation, tokenizer, 4)
    expected = [" " + nfc(turn["value"].strip()) for turn in conversation[1::2]]
    assert supervised_answers(tokenizer, ids, labels) == expected


@every_talk
def test_all_else_is_the_prompt(tokenizer, conversation):
    ids, labels = encode(conversation, tokenizer, 4)
    rest = [token for token, label in zip(ids, labels) if label == IGNORE and token != IMAGE_TOKEN]
    silent = [{**turn, "value": ""} if turn["from"] == "gpt" else turn for turn in conversation]
    expected = compose(silent).replace(PICTURE, "").replace(f" ASSISTANT: {END}", " ASSISTANT:")
    assert decode(tokenizer, rest) == nfc(expected)


@pytest.mark.parametrize("conversation", TALKS.values(), ids=TALKS)
def test_piecewise_ids_are_whole_text_ids(tokenizer, conversation):
    """Labels need pieces: the seams at "ASSISTANT:", at the answer and its end must not show in the ids."""
    ids, _ = encode(conversation, tokenizer, 4)
    tokenizer.encode_special_tokens = False  # the text below writes its ends of text out
    sides = compose(conversation).split(PICTURE)
    left, *right = (tokenizer.encode(side, add_special_tokens=False).ids for side in sides)
    expected = left + [IMAGE_TOKEN] * 4 + right[0] if right else left
    assert ids == expected


def test_a_seam_in_the_wrong_place_shows(tokenizer):
    """The comparison above can fail: the space between question and answer belongs to the answer's piece."""

    def ids(*pieces):
        return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]

    assert ids("ASSISTANT:", " yes") == ids("ASSISTANT: yes") != ids("ASSISTANT: ", "yes")


@every_talk
def test_control_ids_are_the_ends_of_answers_alone(tokenizer, conversation):
    """<|endoftext|> and <|im_start|> in somebody's text are spelled out, and cannot end or open a turn."""
    ids, labels = encode(conversation, tokenizer, 4)
    assert ids.count(tokenizer.token_to_id(END)) == len(conversation) / 2
    assert labels[-1] == ids[-1] == tokenizer.token_to_id(END)
    assert not {tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")} & set(ids)


@pytest.mark.parametrize(
    "name, before",
    [
        ("one question", SYSTEM + "USER: "),
        ("image in the middle", SYSTEM + "USER: "),
        ("image at the end", SYSTEM + "USER: "),
        ("markup in answers", SYSTEM + "USER: "),
        ("image in a later turn", SYSTEM + f"USER: Hello ASSISTANT: Hi!{END}USER: "),
    ],
)
def test_picture_stands_once_at_the_front_of_its_question(tokenizer, name, before):
    ids, _ = encode(TALKS[name], tokenizer, 9)
    first = ids.index(IMAGE_TOKEN)
    assert decode(tokenizer, ids[:first]) == before
    assert ids[first : first + 9] == [IMAGE_TOKEN] * 9 and ids.count(IMAGE_TOKEN) == 9
    assert decode(tokenizer, ids[first + 9 :]).startswith("\n")


def test_text_only_has_no_placeholder(tokenizer):
    ids, _ = encode(TALKS["text only"], tokenizer, 9)
    assert IMAGE_TOKEN not in ids
    assert decode(tokenizer, ids) == compose(TALKS["text only"])


def test_thirty_one_tokens_before_the_image_with_the_real_tokenizer():
    if "SHARED" not in os.environ:
        pytest.skip("SHARED is not set: no real tokenizer")
    real = load_tokenizer(Path(os.environ["SHARED"]) / "data" / "qwen1.5-tokenizer")
    ids, _ = encode(TALKS["one question"], real, 4)
    assert ids.index(IMAGE_TOKEN) == 31
    assert decode(real, ids[30:31]) == " "
    assert real.token_to_id(END) == ids[-1] == 151643


@pytest.mark.parametrize(
    "conversation",
    [
        talk("<image><image>", "a"),
        talk("<image>\nWhat?", "a", "And <image>?", "b"),
        [],
        talk("a question without an answer"),
        talk("a", "b", "c"),
        talk("a", "b")[::-1],
        [{"from": "human", "value": "a"}] * 2,
        talk("a", "b") + talk("c", "d")[::-1],
        talk("a", "b") + [{"from": "human", "value": "c"}] * 2,
        [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}],
    ],
    ids=[
        "two marks in a turn", "marks in two turns", "no turns", "no answer", "odd", "gpt first",
        "human twice", "gpt first in the second pair", "human twice in the second pair", "unknown speakers",
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", ["chat", "pretrain"])
def test_malformed_conversations_are_bad_input(conversation, template):
    with pytest.raises(BadInput):
        encode(conversation, small_tokenizer(), 4, template)


@pytest.mark.parametrize("mark, placeholders", [("<image>", 4), ("", 0)])
def test_pretrain_template(tokenizer, mark, placeholders):
    """[picture]{caption}\\n: what was asked is left out, and all after the picture is supervised."""
    ids, labels = encode(talk(f"Describe it.\n{mark}", f" a cat {END} <image>\n"), tokenizer, 4, "pretrain")
    assert ids[:placeholders] == [IMAGE_TOKEN] * placeholders
    assert labels == [IGNORE] * placeholders + ids[placeholders:]
    assert decode(tokenizer, ids[placeholders:]) == f"a cat {END} <image>\n"
    assert tokenizer.token_to_id(END) not in ids


@every_talk
def test_prompt_is_the_conversation_up_to_its_last_answer(tokenizer, conversation):
    ids, labels = encode(conversation, tokenizer, 4)
    prompt = encode_prompt(conversation[:-1], tokenizer, 4)
    assert ids[: len(prompt)] == prompt
    assert decode(tokenizer, [token for token in prompt if token != IMAGE_TOKEN]).endswith(" ASSISTANT:")
    last_answer = decode(tokenizer, labels[len(prompt) :])  # all of it supervised, and nothing more
    assert last_answer == " " + nfc(conversation[-1]["value"].strip()) + END


def test_prompt_must_end_with_a_question():
    with pytest.raises(BadInput):
        encode_prompt(talk("a", "b"), small_tokenizer(), 4)


def test_tokenizer_that_is_missing_or_not_qwens_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match=str(tmp_path / "tokenizer.json")):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=str(tmp_path / "tokenizer.json")):
        load_tokenizer(tmp_path)
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match="endoftext"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- pictures


def noise(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode in ("RGBA", "CMYK"):
        return Image.fromarray(pixels, mode=mode)
    return Image.fromarray(pixels[..., :3]).convert(mode)


@pytest.mark.parametrize("source", ["picture", "path", "str"])
def test_preprocess_by_hand(tmp_path, source):
    """Of the right size already: byte x becomes x / 127.5 - 1. 0 -> -1, 51 -> -0.6, 102 -> -0.2, 255 -> 1."""
    rows = [[(0, 51, 102), (255, 255, 255)], [(51, 0, 255), (102, 102, 0)]]
    image = Image.fromarray(np.array(rows, dtype=np.uint8))
    file = tmp_path / "a.png"
    image.save(file)
    pixels = preprocess({"picture": image, "path": file, "str": str(file)}[source], 2)
    expected = [
        [[-1.0, 1.0], [-0.6, -0.2]],  # red, row by row
        [[-0.6, 1.0], [-1.0, -0.2]],
        [[-0.2, 1.0], [1.0, -1.0]],
    ]
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("width, height", [(7, 4), (8, 30), (30, 8), (8, 5), (64, 48)])
def test_preprocess_resizes_to_a_square_bicubically(width, height):
    """The aspect ratio is not kept, nothing is cut off; the other filters give something else."""
    image = noise(width, height)
    pixels = preprocess(image, 8)

    def resized(how):
        return np.asarray(image.resize((8, 8), how)).transpose(2, 0, 1) / 127.5 - 1

    np.testing.assert_allclose(pixels.numpy(), resized(Image.Resampling.BICUBIC), atol=1e-6)
    assert np.abs(pixels.numpy() - resized(Image.Resampling.BILINEAR)).max() > 0.01


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1", "I;16"])
def test_preprocess_takes_any_mode(mode):
    image = Image.new(mode, (5, 4)) if mode == "I;16" else noise(5, 4, mode)
    pixels = preprocess(image, 6)
    assert pixels.shape == (3, 6, 6)
    assert -1 <= pixels.min() and pixels.max() <= 1


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 51, [-0.6, -0.6, -0.6]),
        ("RGBA", (255, 51, 0, 255), [1.0, -0.6, -1.0]),
        ("CMYK", (0, 0, 0, 0), [1.0, 1.0, 1.0]),  # no ink
        ("P", (255, 51, 0), [1.0, -0.6, -1.0]),  # the palette's colour, not its number
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_preprocess_keeps_the_colour_of_any_mode(mode, colour, expected, size):
    pixels = preprocess(Image.new(mode, (2, 2), colour), size)
    torch.testing.assert_close(pixels, torch.tensor(expected)[:, None, None].expand(3, size, size))


@pytest.mark.parametrize("width, height", [(16, 16), (40, 20), (9, 33)])
def test_preprocess_equals_transformers(width, height):
    transformers = pytest.importorskip("transformers")
    image = noise(width, height)
    processor = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(preprocess(image, 16), theirs, rtol=0, atol=1e-6)


def saved(format):
    file = io.BytesIO()
    noise(24, 24).save(file, format)
    return file.getvalue()


def broken_png(kind):
    """A PNG with a right checksum on a wrong header, or with bytes that are no chunk among its data."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    size = struct.pack(">II", 2, 2) + bytes([8, 2, 0, 0, 0])
    header = chunk(b"IHDR", size[:5] if kind == "short header" else size)
    data = zlib.compress(bytes(14))
    middle = b"\0\0\0\4\xa3\0U\x94aaaabbbb" if kind == "no chunk" else b""
    data = chunk(b"IDAT", data[:4]) + middle + chunk(b"IDAT", data[4:])
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


BAD_FILES = {
    "empty": lambda: b"",
    "text": lambda: b"<html>404: not found</html>",
    "truncated png": lambda: saved("PNG")[:-200],
    "truncated jpeg": lambda: saved("JPEG")[:-200],
    "truncated gif": lambda: saved("GIF")[:-200],
    "png with a short header": lambda: broken_png("short header"),
    "png with bytes that are no chunk": lambda: broken_png("no chunk"),
    "ppm with a size that is no number": lambda: b"P6\n24\x0f24 2\n255\n" + bytes(300),
}


@pytest.mark.parametrize("name", [*BAD_FILES, "missing", "a folder"])
def test_unreadable_picture_is_bad_input_that_names_the_file(tmp_path, name):
    file = tmp_path / "000000033471.jpg"
    if name == "a folder":
        file.mkdir()
    elif name != "missing":
        file.write_bytes(BAD_FILES[name]())
    with pytest.raises(BadInput, match="000000033471.jpg"):
        preprocess(file, 8)


def test_the_broken_png_is_broken_by_its_one_fault(tmp_path):
    (tmp_path / "a.png").write_bytes(broken_png(None))
    assert preprocess(tmp_path / "a.png", 2).tolist() == torch.full((3, 2, 2), -1.0).tolist()


# ---------------------------------------------------------------- batches

PATCHES = SiglipConfig(image_size=24, patch_size=8).num_patches  # 9
BATCH = ("image in a later turn", "text only", "one question")


def sample(tokenizer, name, shade=None):
    """One of TALKS, with a picture of one shade where it has a mark."""
    ids, labels = encode(TALKS[name], tokenizer, PATCHES)
    picture = {} if shade is None else {"pixel_values": torch.full((3, 24, 24), shade)}
    return {"id": name, "input_ids": ids, "labels": labels, **picture}


@pytest.fixture
def samples(tokenizer):
    return [sample(tokenizer, name, shade) for name, shade in zip(BATCH, (0.25, None, 0.5))]


def test_collate_pads_on_the_right(samples):
    batch = collate(samples)
    lengths = [len(one["input_ids"]) for one in samples]
    assert len(set(lengths)) == 3
    shapes = {batch[name].shape for name in ("input_ids", "labels", "attention_mask")}
    assert shapes == {(3, max(lengths))}
    assert batch["attention_mask"].dtype == batch["has_image"].dtype == torch.bool
    for row, (one, length) in enumerate(zip(samples, lengths)):
        assert batch["input_ids"][row, :length].tolist() == one["input_ids"]
        assert batch["labels"][row, :length].tolist() == one["labels"]
        assert batch["attention_mask"][row].tolist() == [True] * length + [False] * (max(lengths) - length)
        assert (batch["labels"][row, length:] == IGNORE).all()
        assert (batch["input_ids"][row, length:] >= 0).all()  # padding can be embedded, and is no placeholder


def test_collate_supervises_the_answers(tokenizer, samples):
    """The batch builder must not lose what encode marked: decoded from the batch, the answers come back."""
    batch = collate(samples)
    for name, ids, labels in zip(BATCH, batch["input_ids"].tolist(), batch["labels"].tolist()):
        answers = [" " + turn["value"] for turn in TALKS[name][1::2]]
        assert supervised_answers(tokenizer, ids, labels) == answers


def test_collate_pictures_and_columns(samples):
    batch = collate(samples)
    assert batch["has_image"].tolist() == [True, False, True]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0.25, 0.5]  # in the order of the rows
    assert (batch["input_ids"] == IMAGE_TOKEN).sum() == PATCHES * len(batch["pixel_values"])
    assert batch["visual_columns"].shape == (3, PATCHES)
    for row in (0, 2):
        expected = [at for at, token in enumerate(samples[row]["input_ids"]) if token == IMAGE_TOKEN]
        assert batch["visual_columns"][row].tolist() == expected
    assert batch["visual_columns"][0, 0] > batch["visual_columns"][2, 0]  # a later turn
    assert batch["visual_columns"][1].tolist() == [0] * PATCHES


def test_collate_of_text_alone(tokenizer):
    batch = collate([sample(tokenizer, "text only")])
    assert batch["pixel_values"] is None
    assert batch["has_image"].tolist() == [False]
    assert batch["visual_columns"].shape[0] == 1 and not batch["visual_columns"].any()


@pytest.mark.parametrize(
    "name, shade",
    [("text only", 0.5), ("one question", None)],
    ids=["picture without mark", "mark without picture"],
)
def test_mark_and_picture_go_together(samples, tokenizer, name, shade):
    with pytest.raises(BadInput, match=name):
        collate([*samples, sample(tokenizer, name, shade)])


def test_pictures_of_different_length_do_not_mix(samples, tokenizer):
    ids, labels = encode(TALKS["one question"], tokenizer, PATCHES - 1)
    short = {"input_ids": ids, "labels": labels, "pixel_values": torch.zeros(3, 24, 24)}
    with pytest.raises(BadInput, match="visual tokens"):
        collate([*samples, short])
