"""data.py: ids and labels, pictures, batches, files of records, the order of samples.

Every tokenizer test runs with a small tokenizer made here, and with the real one of Qwen1.5 where the
environment variable SHARED names the folder that holds it.
"""

import io
import json
import os
import pickle
import struct
import tracemalloc
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import data
from data import (
    IGNORE,
    IMAGE_TOKEN,
    LlavaDataset,
    batches_of,
    collate,
    cut,
    encode,
    encode_prompt,
    load_tokenizer,
    open_picture,
    preprocess,
)
from siglip import SiglipConfig
from support import records as record_files
from support.errors import BadInput
from support.records import Records
from support.world import TINY, make_world

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


def test_truncation_saved_with_a_tokenizer_is_no_limit(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = encode(TALKS["many turns"], small_tokenizer(), 4)
    assert encode(TALKS["many turns"], load_tokenizer(tmp_path), 4) == expected


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


def picture_of(rows, mode):
    """Rows of pixels, numbers or tuples -> a picture of that mode."""
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode, np.uint8)
    pixels = np.array(rows, dtype=kind)
    return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), pixels.tobytes())


PALETTE = picture_of([[0, 1], [2, 1]], "P")
PALETTE.putpalette([0, 0, 0, 200, 100, 50, 1, 2, 3])
WHITE, BROWN = (255, 255, 255), (200, 100, 50)
TIFF = {"format": "TIFF"}
KINDS = {  # picture, how it is saved, pixels asked for, row by row
    "grey": (picture_of([[0, 77], [200, 255]], "L"), {}, [(v,) * 3 for v in (0, 77, 200, 255)]),
    "palette": (PALETTE, {}, [(0, 0, 0), BROWN, (1, 2, 3), BROWN]),
    "palette with a transparent colour": (PALETTE, {"transparency": 0}, [WHITE, BROWN, (1, 2, 3), BROWN]),
    "palette with alphas": (
        PALETTE, {"transparency": bytes([0, 255, 51])}, [WHITE, BROWN, (204, 204, 205), BROWN],
    ),
    "gif with a transparent colour": (
        PALETTE, {"format": "GIF", "transparency": 0}, [WHITE, BROWN, (1, 2, 3), BROWN],
    ),
    "grey with a transparent value": (
        picture_of([[0, 77]], "L"), {"transparency": 0}, [WHITE, (77, 77, 77)],
    ),
    "RGB with a transparent colour": (
        picture_of([[(0, 0, 0), BROWN]], "RGB"), {"transparency": (0, 0, 0)}, [WHITE, BROWN],
    ),
    "RGBA": (
        picture_of([[(0, 0, 0, 0), (0, 0, 0, 255), (0, 255, 100, 51)]], "RGBA"), {},
        [WHITE, (0, 0, 0), (204, 255, 224)],
    ),
    "LA": (picture_of([[(0, 0), (90, 255), (0, 51)]], "LA"), {}, [WHITE, (90,) * 3, (204,) * 3]),
    "CMYK": (
        picture_of([[(0, 0, 0, 0), (255, 0, 0, 0), (51, 102, 0, 51)]], "CMYK"), {"format": "TIFF"},
        [WHITE, (0, 255, 255), (163, 122, 204)],  # (255 - C)(255 - K) / 255
    ),
    "CMYK jpeg": (
        picture_of([[(255, 0, 0, 0)] * 2] * 2, "CMYK"), {"format": "JPEG", "quality": 100},
        [(0, 255, 255)] * 4,
    ),
    "16-bit grey": (
        picture_of([[0, 255, 256, 0x8000, 0xFFFF]], "I;16"), {}, [(v,) * 3 for v in (0, 0, 1, 128, 255)],
    ),
    "16-bit grey tiff": (
        picture_of([[0, 0x1234, 0xFFFF]], "I;16"), {"format": "TIFF"}, [(v,) * 3 for v in (0, 0x12, 255)],
    ),
    "32-bit grey": (
        picture_of([[0, 0x1234, 0xFFFF]], "I"), {"format": "TIFF"}, [(v,) * 3 for v in (0, 0x12, 255)],
    ),
    # by the first of the ranges 0..1, 0..255 and 0..65535 that holds all values
    "32-bit grey to 255": (picture_of([[0, 51, 200]], "I"), TIFF, [(v,) * 3 for v in (0, 51, 200)]),
    "floats to 1": (picture_of([[0, 0.2, 1]], "F"), TIFF, [(v,) * 3 for v in (0, 51, 255)]),
    "floats to 255": (picture_of([[0, 1.4, 254.6]], "F"), TIFF, [(v,) * 3 for v in (0, 1, 255)]),
    "floats to 65535": (picture_of([[0, 2570, 65535]], "F"), TIFF, [(v,) * 3 for v in (0, 10, 255)]),
    "dark 16-bit png": (picture_of([[0, 1, 255]], "I;16"), {}, [(v,) * 3 for v in (0, 0, 1)]),
    "floats, white is 0": (
        picture_of([[0, 0.2]], "F"), {**TIFF, "tiffinfo": {262: 0}}, [(255,) * 3, (204,) * 3],
    ),
    "bits": (picture_of([[0, 255]], "L").convert("1"), {}, [(0, 0, 0), WHITE]),
}  # fmt: skip


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_colours_of_pictures_as_they_come(tmp_path, name, opened):
    """Real files of every kind; over white where they are transparent. Also where the caller opened them."""
    picture, options, expected = KINDS[name]
    picture.save(tmp_path / "a", **{"format": "PNG", **options})
    with Image.open(tmp_path / "a") as image:
        if "JPEG" not in options.values():
            assert image.mode == picture.mode, "the file is not of the kind that is tested"
        image = open_picture(image if opened else tmp_path / "a")
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image).reshape(-1, 3), expected, atol=1)
    pixels = preprocess(tmp_path / "a", 8)
    assert pixels.mean() == pytest.approx(np.mean(expected) / 127.5 - 1, abs=0.15)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation, format):
    """EXIF orientation n says where the first row and column of the file belong (EXIF 2.3, tag 0x0112)."""
    rows = np.zeros((16, 24, 3), dtype=np.uint8)
    rows[:8, :8], rows[8:, 16:] = (255, 0, 0), (0, 0, 255)  # in blocks of 8, which JPEG keeps apart
    upright = {
        1: rows, 2: rows[:, ::-1], 3: rows[::-1, ::-1], 4: rows[::-1], 5: rows.transpose(1, 0, 2),
        6: np.rot90(rows, -1), 7: rows[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(rows),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    Image.fromarray(rows).save(tmp_path / "a", format, exif=exif, **options)
    np.testing.assert_allclose(np.asarray(open_picture(tmp_path / "a")).astype(int), upright, atol=4)
    with Image.open(tmp_path / "a") as image:
        assert image.getexif()[0x0112] == orientation
        np.testing.assert_allclose(np.asarray(open_picture(image)).astype(int), upright, atol=4)


def test_floats_of_a_portable_float_map(tmp_path):
    values = np.array([[0.2, 1.0]], dtype="<f4")
    (tmp_path / "a.pfm").write_bytes(b"Pf\n2 1\n-1.0\n" + values.tobytes())
    assert np.asarray(open_picture(tmp_path / "a.pfm"))[0, :, 0].tolist() == [51, 255]


@pytest.mark.parametrize("value", [-1, 65536, float("nan"), float("inf")])
def test_grey_of_no_known_range_is_refused(tmp_path, value):
    Image.fromarray(np.array([[0, value]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadInput, match="a.tif .*its grey is .*not within 0 to 65535"):
        open_picture(tmp_path / "a.tif")


ODD_EXIF = {
    "a negative number": b"MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"  # orientation 6
    b"\xa0\x02\0\x09\0\0\0\x01\xff\xff\xff\xff\0\0\0\0",
    "cut": b"MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0",
}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("name", ODD_EXIF)
def test_other_tags_do_not_cost_the_picture(tmp_path, name, format):
    noise(16, 8).save(tmp_path / "a", format, exif=b"Exif\0\0" + ODD_EXIF[name])
    assert open_picture(tmp_path / "a").size == (8, 16)  # upright


@pytest.mark.filterwarnings(
    "ignore:Truncated File Read", "ignore:Corrupt EXIF data", "ignore:Possibly corrupt"
)
@pytest.mark.parametrize("exif", [b"", b"nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"])
def test_an_exif_that_cannot_be_read_has_no_orientation(tmp_path, exif):
    noise(16, 8).save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (16, 8)


def test_metadata_of_any_size_does_not_cost_the_picture(tmp_path):
    """Compressed texts of 5 MB, of several keywords, a profile; in a JPEG many segments of comments."""
    picture, texts = noise(6, 5), PngImagePlugin.PngInfo()
    for keyword in ("Description", "XML:com.adobe.xmp", "Raw profile type exif"):
        texts.add_itxt(keyword, "x" * 5_000_000, zip=True)
    picture.save(tmp_path / "a.png", pnginfo=texts, icc_profile=b"profile " * 400_000)
    np.testing.assert_array_equal(open_picture(tmp_path / "a.png"), picture)
    content = (tmp_path / "a.png").read_bytes()
    short = b"\0\0\0\1gAMA\0" + struct.pack(">I", zlib.crc32(b"gAMA\0"))  # of four bytes
    (tmp_path / "gamma.png").write_bytes(content[:33] + short + content[33:])
    np.testing.assert_array_equal(open_picture(tmp_path / "gamma.png"), picture)
    (tmp_path / "cut.png").write_bytes(content[:-30])
    with pytest.raises(BadInput, match="cut.png cannot be read"):  # still no picture
        open_picture(tmp_path / "cut.png")
    picture.save(tmp_path / "a.jpg", quality=100, subsampling=0, icc_profile=bytes(2_000_000))
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:2] + (b"\xff\xfe\xff\xff" + bytes(65_533)) * 40 + content[2:])
    np.testing.assert_allclose(np.asarray(open_picture(tmp_path / "a.jpg")).astype(int), picture, atol=40)


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_first_frame_of_several(tmp_path, format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(tmp_path / "a", format, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / "a") as image:
        assert image.n_frames == 3
    assert set(open_picture(tmp_path / "a").get_flattened_data()) == {(255, 0, 0)}


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


def broken_png(kind, width=2, height=2):
    """A PNG with a right checksum on a wrong header, or with bytes that are no chunk among its data."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    size = struct.pack(">II", width, height) + bytes([8, 2, 0, 0, 0])
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


@pytest.mark.parametrize("width, height", [(30_000, 30_000), (13_378, 13_378), (178_956_971, 1)])
def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, width, height):
    """More than 178,956,970 pixels: 537 MB and more in memory, from a few bytes."""
    (tmp_path / "huge.png").write_bytes(broken_png(None, width, height))
    with pytest.raises(BadInput, match=f"huge.png cannot be read .*{width * height} pixels"):
        preprocess(tmp_path / "huge.png", 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_are_refused_at_pillows_second_limit_not_at_its_first(tmp_path, monkeypatch):
    """Pillow warns at its first limit and refuses at twice that. In small, by a small limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    noise(10, 20).save(tmp_path / "between.png")
    np.testing.assert_array_equal(open_picture(tmp_path / "between.png"), noise(10, 20))
    noise(67, 3).save(tmp_path / "above.png")
    with pytest.raises(BadInput, match="above.png .*201 pixels"):
        open_picture(tmp_path / "above.png")


def test_formats_that_run_other_programs_are_refused(tmp_path):
    noise(8, 8).save(tmp_path / "a.png", "EPS")  # Pillow would start Ghostscript
    with pytest.raises(BadInput, match="a.png cannot be read as a picture .*it is none of JPEG, PNG"):
        open_picture(tmp_path / "a.png")


def test_damaged_picture_that_the_caller_opened_is_bad_input_too(tmp_path):
    (tmp_path / "a.jpg").write_bytes(saved("JPEG")[:-200])
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises(BadInput, match="a.jpg cannot be read"):
        preprocess(image, 8)


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


# ---------------------------------------------------------------- records on disk

RECORDS = [
    {"id": "a", "image": "x.jpg", "conversations": talk("<image>\nWhat?", "A cat.")},
    {"id": 7, "image": "", "conversations": talk('"quoted" \\ [{]}', "tab\t, line\n, nul\u0000")},
    {"conversations": talk("東京 😀 é", "e\u0301 \u2028 \ud7ff"), "image": None, "more": [1, {"b": [True]}]},
    {"id": "d", "conversations": "none"},
    {},
]


def lines(records, **options):
    return "\n".join(json.dumps(record, **options) for record in records)


LAYOUTS = {
    "list": json.dumps(RECORDS),
    "list, indented": json.dumps(RECORDS, indent=2),
    "list, UTF-8": json.dumps(RECORDS, ensure_ascii=False),
    "list, byte order mark": "\ufeff" + json.dumps(RECORDS, ensure_ascii=False),
    "list, space around": " \n\n" + json.dumps(RECORDS, separators=(" \n, ", " : ")) + "\r\n \n",
    "lines": lines(RECORDS),
    "lines, UTF-8": lines(RECORDS, ensure_ascii=False) + "\n",
    "lines, blank ones between": "\ufeff\n" + lines(RECORDS).replace("\n", "\r\n\n \n") + "\n\n",
}


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("name", LAYOUTS)
def test_records_are_what_json_reads(tmp_path, monkeypatch, name, block):
    """Wherever the windows cut the file: in a record, in a letter of several bytes, between records."""
    monkeypatch.setattr(record_files, "BLOCK", block)
    file = tmp_path / "data.json"
    file.write_bytes(LAYOUTS[name].encode())
    records = Records([file])
    assert len(records) == len(RECORDS) and list(records) == RECORDS and records[-1] == RECORDS[-1]
    content = file.read_bytes()
    for offset, size, record in zip(records.offset, records.size, RECORDS):
        assert json.loads(content[offset : offset + size]) == record
        assert content[offset : offset + 1] + content[offset + size - 1 : offset + size] == b"{}"
    assert records.has_image.tolist() == [True, False, False, False, False]
    assert records.characters[0] == len("<image>\nWhat?A cat.") and not records.characters[3:].any()


def test_records_of_several_files_follow_each_other(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[:2]))
    (tmp_path / "b.jsonl").write_text(lines(RECORDS[2:]))
    records = Records([tmp_path / "a.json", str(tmp_path / "b.jsonl"), tmp_path / "a.json"])
    assert list(records) == RECORDS + RECORDS[:2]
    assert [records.files[records.number_of_file(i)].name[0] for i in range(7)] == list("aabbbaa")
    with pytest.raises(IndexError):
        records[7]
    assert list(pickle.loads(pickle.dumps(records))) == list(records)


BROKEN = {  # content -> the byte that the sentence names
    "empty": (b"", 0),
    "blank": (b" \n", 2),
    "empty list": (b" []", 2),
    "cut in a record": (b'[{"id": 1}, {"id": "ab', 19),
    "cut between records": (b'[{"id": 1}, ', 12),
    "cut before the end": (b'[{"id": 1}', 10),
    "no comma": (b'[{"id": 1} {"id": 2}]', 11),
    "a comma too many": (b'[{"id": 1}, ]', 12),
    "something after the list": (b'[{"id": 1}]\n[', 12),
    "a list of numbers": (b"[1, 2]", 1),
    "a number among the records": (b'[{"id": 1}, 17]', 12),
    "a list in a line": (b'{"id": 1}\n[{"id": 2}]', 10),
    "no JSON": (b"<html>404</html>", 0),
    "a name without quotes": (b'[{"id": 1}, {id: 2}]', 13),
    "not UTF-8": (b'[{"id": "\xc3\xa9"}, {"id": "\xff\xfe"}]', 23),
    "UTF-16": ('[{"id": 1}]'.encode("utf-16"), 0),
    "a bare line end in a text": (b'[{"id": "a\nb"}]', 10),
    "nested too deep": (b'[{"a": ' + b"[" * 100_000, 1),
}


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_bad_input_that_names_the_byte(tmp_path, monkeypatch, name, block):
    content, byte = BROKEN[name]
    monkeypatch.setattr(record_files, "BLOCK", block if len(content) < 1000 else 1 << 16)
    good, file = tmp_path / "good.json", tmp_path / "broken.json"
    good.write_text(json.dumps(RECORDS))
    file.write_bytes(content)
    with pytest.raises(BadInput, match=f"broken.json, byte {byte}: .*mend the file or fetch it") as error:
        Records([good, file])
    assert "\n" not in str(error.value)


def test_no_file_of_records_is_bad_input(tmp_path):
    for files in ([tmp_path / "missing.json"], [tmp_path], []):
        with pytest.raises(BadInput, match="--data"):
            Records(files)


@pytest.mark.parametrize("whole", [True, False])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, whole):
    """Neither where all is well nor where a record does not end."""
    monkeypatch.setattr(record_files, "BLOCK", 10_000)
    monkeypatch.setattr(record_files, "LONGEST_RECORD", 40_000)
    file = tmp_path / "data.json"
    record = json.dumps(RECORDS[0])
    content = "[" + ", ".join([record] * 50_000) + "]"  # 5 MB
    file.write_text(content if whole else '[{"id": "' + content.replace('"', ""))
    tracemalloc.start()
    if whole:
        records = Records([file])
        assert len(records) == 50_000
        assert len(pickle.dumps(records)) < 18 * 50_000  # 8 + 4 + 4 + 1 bytes a record
    else:
        with pytest.raises(BadInput, match="byte 8: Unterminated string"):
            Records([file])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (3e6 if whole else 5e5)


@pytest.mark.parametrize("change", ["content", "size", "gone"])
def test_a_file_that_changed_is_an_error_not_another_record(tmp_path, change):
    file, images = tmp_path / "data.json", tmp_path / "images"
    images.mkdir()
    records = [{"id": i, "conversations": talk("What?", "yes")} for i in range(3)]
    file.write_text(json.dumps(records))
    dataset = LlavaDataset(file, images, small_tokenizer(), PATCHES, 24, skip_bad=True)
    assert dataset[1]["id"] == 1
    time = file.stat().st_mtime_ns
    if change == "gone":
        file.unlink()
    else:
        text = json.dumps(records)
        file.write_text(text + "\n" if change == "size" else text.replace("yes", "abc"))
        os.utime(file, ns=(time, time + (change == "content")))
    with pytest.raises(BadInput, match="data.json has changed since"):
        dataset[1]


def test_a_file_that_was_only_touched_goes_on(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"id": i, "conversations": talk("What?", "yes")} for i in range(3)]))
    records = Records([file])
    os.utime(file, ns=(1, 1))
    assert [record["id"] for record in records] == [0, 1, 2]
    file.write_text(file.read_text().replace("yes", "not"))
    with pytest.raises(BadInput, match="data.json has changed since .*other content"):
        records[0]


# ---------------------------------------------------------------- the data set


@pytest.fixture
def llava(tmp_path):
    """records, options -> LlavaDataset with the picture a.png in its folder."""

    def make(records, tokenizer=None, **options):
        (tmp_path / "images").mkdir(exist_ok=True)
        noise(30, 20).save(tmp_path / "images/a.png")
        (tmp_path / "data.json").write_text(json.dumps(records))
        options = {"tokenizer": tokenizer or small_tokenizer(), "num_image_tokens": PATCHES, **options}
        return LlavaDataset(tmp_path / "data.json", tmp_path / "images", image_size=24, **options)

    return make


def record_of(conversation, **more):
    image = any("<image>" in turn["value"] for turn in conversation[::2])
    return {**({"image": "a.png"} if image else {}), "conversations": conversation, **more}


def test_batches_of_the_data_set_supervise_the_answers(tokenizer, llava):
    """Files -> batch: in every row the answers and their ends are supervised, and the rest is the prompt."""
    dataset = llava([record_of(conversation, id=name) for name, conversation in ALL_TALKS.items()], tokenizer)
    batch = collate([dataset[i] for i in range(len(dataset))])
    assert batch["ids"] == list(ALL_TALKS) and batch["replaced"] == []
    rows = zip(ALL_TALKS.items(), *(batch[key].tolist() for key in ("input_ids", "labels", "attention_mask")))
    for (name, conversation), ids, labels, mask in rows:
        assert supervised_answers(tokenizer, ids, labels) == [
            " " + nfc(turn["value"].strip()) for turn in conversation[1::2]
        ]
        ids = ids[: sum(mask)]
        assert ids.count(tokenizer.token_to_id(END)) == len(conversation) / 2
        text = compose(conversation)
        assert decode(tokenizer, [i for i in ids if i != IMAGE_TOKEN]) == nfc(text.replace(PICTURE, ""))
        if name in TALKS:  # ids of the whole text; without control words in it, which would be read as such
            tokenizer.encode_special_tokens = False
            sides = [tokenizer.encode(side, add_special_tokens=False).ids for side in text.split(PICTURE)]
            assert ids == sum([[*side, *[IMAGE_TOKEN] * PATCHES] for side in sides], [])[:-PATCHES]
    pictures = batch["has_image"].sum()
    assert len(batch["pixel_values"]) == pictures == sum(PICTURE in compose(t) for t in ALL_TALKS.values())
    assert (batch["input_ids"] == IMAGE_TOKEN).sum() == pictures * PATCHES
    picture = preprocess(noise(30, 20), 24)
    assert all(torch.equal(pixels, picture) for pixels in batch["pixel_values"])


def test_prompt_of_a_batch_is_thirty_one_tokens_with_the_real_tokenizer(llava):
    if "SHARED" not in os.environ:
        pytest.skip("SHARED is not set: no real tokenizer")
    real = load_tokenizer(Path(os.environ["SHARED"]) / "data" / "qwen1.5-tokenizer")
    dataset = llava([record_of(TALKS[name]) for name in ("one question", "image in the middle")], real)
    batch = collate([dataset[0], dataset[1]])
    assert batch["visual_columns"].tolist() == [list(range(31, 31 + PATCHES))] * 2


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": ""}])
def test_no_picture_is_text_only(llava, image):
    sample = llava([{**record_of(TALKS["text only"]), **image}])[0]
    assert "pixel_values" not in sample and sample["id"] == 0  # and without an id its number is its name


@pytest.mark.parametrize("template", ["chat", "pretrain"])
@pytest.mark.parametrize("name", ["one question", "image in a later turn", "many turns", "text only"])
def test_long_samples_are_cut_at_the_end_never_in_the_picture(tokenizer, llava, name, template):
    if (name, template) == ("image in a later turn", "pretrain"):
        pytest.skip("a caption has one turn")
    ids, labels = encode(TALKS[name], tokenizer, PATCHES, template)
    first = ids.index(IMAGE_TOKEN) if IMAGE_TOKEN in ids else 10_000
    prompt = [] if template == "pretrain" else tokenizer.encode(SYSTEM + "USER: ").ids
    least = len(prompt) + PATCHES + 1
    for limit in range(1, len(ids) + 2):
        end = first if first < limit < first + PATCHES else limit
        short = cut(*encode(TALKS[name], tokenizer, PATCHES, template), PATCHES, limit)
        assert short == (ids[:end], labels[:end])
        assert short[0].count(IMAGE_TOKEN) in (0, PATCHES)
        if limit < least or limit % 5:
            continue
        options = {"template": template, "max_length": limit}
        dataset = llava([record_of(TALKS[name])], tokenizer, **options)
        if set(short[1]) <= {IGNORE}:
            with pytest.raises(BadInput, match=f"record 0: nothing of an answer is within {limit} tokens"):
                dataset[0]
            continue
        sample = dataset[0]
        assert (sample["input_ids"], sample["labels"]) == short and sample["cut"] == (limit < len(ids))
        assert ("pixel_values" in sample) == (IMAGE_TOKEN in short[0])
        collate([sample])


@pytest.mark.parametrize("template", ["chat", "pretrain"])
def test_a_limit_without_room_for_prompt_and_picture_is_bad_input(llava, template):
    ids, _ = encode(TALKS["one question"], small_tokenizer(), PATCHES, template)
    least = ids.index(IMAGE_TOKEN) + PATCHES + 1
    records = [record_of(TALKS["one question"])]
    llava(records, template=template, max_length=least)
    with pytest.raises(BadInput, match=f"limit of {least - 1} tokens.*{least} is the least"):
        llava(records, template=template, max_length=least - 1)


def test_lengths_are_an_estimate_of_the_tokens(llava):
    records = [record_of(talk("<image>" + "a" * 100, "b" * 293)), record_of(talk("a" * 4000, "b" * 4000))]
    assert llava(records).lengths.tolist() == [100 + PATCHES, 2000]
    assert llava(records, max_length=1536).lengths.tolist() == [100 + PATCHES, 1536]


GOOD = record_of(TALKS["one question"])
BAD_RECORDS = {  # record -> a word of the reason
    "no turns": ({"image": "a.png"}, "conversations"),
    "one turn": ({"conversations": talk("hello")}, "even number"),
    "a text that is a number": ({"conversations": talk("hello", 5)}, "conversations"),
    "half a letter": ({"conversations": talk("hello", "\ud83d")}, "not UTF-8 text"),
    "mark without picture": ({"conversations": TALKS["one question"]}, "go together"),
    "picture without mark": ({"conversations": TALKS["text only"], "image": "a.png"}, "go together"),
    "missing picture": ({**GOOD, "image": "b.png"}, "b.png cannot be read"),
    "no picture": ({**GOOD, "image": "broken.jpg"}, "broken.jpg cannot be read"),
    "a folder": ({**GOOD, "image": "."}, "cannot be read"),
    "a list of pictures": ({**GOOD, "image": ["a.png", "b.png"]}, '"image" is .*not the name of one'),
    "a list of a number": ({**GOOD, "image": [7]}, '"image" is 7, not the name of one'),
    "a number": ({**GOOD, "image": 5}, '"image" is 5, not the name of one'),
    "an object": ({**GOOD, "image": {"bytes": "", "path": "a.png"}}, '"image" is .*not the name of one'),
    "a path with a nul": ({**GOOD, "image": "a\0.png"}, "no name of a picture"),
    "a path with half a letter": ({**GOOD, "image": "a\udc80.png"}, "no name of a picture"),
    "a path steering the terminal": ({**GOOD, "image": "\x1b[2J\nerror: all is well"}, r"x1b\[2J.nerror"),
    "a long path": ({**GOOD, "image": "a" * 5000}, "long"),
    "a path upwards": ({**GOOD, "image": "../a.png"}, "leads out"),
    "an absolute path": ({**GOOD, "image": "/etc/passwd"}, "leads out"),
    "a link out of the folder": ({**GOOD, "image": "link.png"}, "leads out"),
    "a linked folder deeper down": ({**GOOD, "image": "deeper/linked/out.png"}, "leads out"),
    "out of a linked folder": ({**GOOD, "image": "linked/../a.png"}, "leads out"),
    "a link to itself": ({**GOOD, "image": "loop.png"}, "(Symlink loop|symbolic links)"),
}


def add_bad_pictures(folder):
    (folder / "images").mkdir()
    (folder / "images/broken.jpg").write_bytes(saved("JPEG")[:-200])
    (folder / "outside").mkdir()
    for file in (folder / "a.png", folder / "outside/out.png"):  # sound, so that only their place is wrong
        noise(9, 9).save(file)
    (folder / "images/link.png").symlink_to(folder / "a.png")
    (folder / "images/linked").symlink_to(folder / "outside")
    (folder / "images/deeper").mkdir()
    (folder / "images/deeper/linked").symlink_to(folder / "outside")
    (folder / "images/loop.png").symlink_to(folder / "images/loop.png")


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_stops_or_is_replaced_by_the_next_good_one(tmp_path, llava, name):
    record, reason = BAD_RECORDS[name]
    add_bad_pictures(tmp_path)
    records = [{**GOOD, "id": "first"}, {**record, "id": "the bad one"}]
    with pytest.raises(BadInput, match=f"data.json, record 'the bad one': .*{reason}") as error:
        llava(records)[1]
    assert "\n" not in str(error.value)
    sample, good = llava(records, skip_bad=True)[1], llava(records)[0]  # after the last comes the first
    hint = " (--skip-bad-samples passes over such records)"
    assert [reason + hint for reason in sample.pop("replaced")] == [str(error.value)]
    assert good.pop("replaced") == []
    assert sample["id"] == "first" and torch.equal(sample.pop("pixel_values"), good.pop("pixel_values"))
    assert sample == good


def test_a_linked_folder_right_in_the_folder_is_followed(tmp_path, llava):
    """So people put several data sets together."""
    add_bad_pictures(tmp_path)
    assert llava([{**GOOD, "image": "linked/out.png"}])[0]["pixel_values"].shape == (3, 24, 24)


def test_what_stands_in_does_not_depend_on_workers(llava):
    bad = {"conversations": [], "id": "bad"}
    records = [bad if i in (2, 3, 9) else record_of(TALKS["text only"]) for i in range(10)]
    dataset = llava(records, skip_bad=True)
    batches = [
        list(torch.utils.data.DataLoader(dataset, 4, collate_fn=collate, num_workers=workers))
        for workers in (0, 2)
    ]
    for loaded in batches:
        assert [batch["ids"] for batch in loaded] == [[0, 1, 4, 4], [4, 5, 6, 7], [8, 0]]
        assert [len(batch["replaced"]) for batch in loaded] == [3, 0, 1]  # records 2 and 3, 3; 9
    with pytest.raises(IndexError):
        dataset[10]


def test_nothing_but_bad_records_is_bad_input(llava, monkeypatch):
    with pytest.raises(BadInput, match="3 records in a row are bad, .*data.json, record 0: "):
        llava([{}] * 3, skip_bad=True)[1]
    monkeypatch.setattr(data, "MOST_REPLACED", 5)
    records = [{}] * 5 + [GOOD]
    assert llava(records, skip_bad=True)[1]["id"] == 5
    with pytest.raises(BadInput, match="5 records in a row are bad"):
        llava(records, skip_bad=True)[0]


def test_data_set_of_several_files(tmp_path, llava):
    llava([GOOD])
    (tmp_path / "more.jsonl").write_text(lines([{}, record_of(TALKS["text only"], id="x")]))
    files = [tmp_path / "data.json", tmp_path / "more.jsonl"]
    dataset = LlavaDataset(files, tmp_path / "images", small_tokenizer(), PATCHES, 24)
    assert len(dataset) == 3 and dataset[0]["id"] == 0 and dataset[2]["id"] == "x"
    with pytest.raises(BadInput, match="more.jsonl, record 1: "):
        dataset[1]
    with pytest.raises(BadInput, match="nowhere: no such folder of pictures; give it with --images"):
        LlavaDataset(files, tmp_path / "nowhere", small_tokenizer(), PATCHES, 24)


# ---------------------------------------------------------------- the order of samples


def flat(batches):
    return [index for batch in batches for index in batch]


def like_real_lengths(number):
    """Tokens, about as in mix665k: most have a picture (729) and some hundred of text, 6 % have none."""
    rng = np.random.default_rng(0)
    text = rng.lognormal(5.3, 0.8, number).astype(int) + 5
    return np.minimum(text + 729 * (rng.random(number) > 0.06), 1536)


def test_order_is_a_permutation_an_epoch():
    """The documented seed of each epoch; global batches may begin in one epoch and end in the next."""
    ours = flat(batches_of(10, steps=6, accumulation=1, size=4, rank=0, ranks=1, seed=3))
    generators = [torch.Generator().manual_seed(1_000_003 * 3 + epoch) for epoch in range(3)]
    assert ours == torch.cat([torch.randperm(10, generator=g) for g in generators]).tolist()[:24]


@pytest.mark.parametrize("lengths", [None, like_real_lengths(50)], ids=["plain", "grouped"])
@pytest.mark.parametrize("ranks, accumulation, size", [(1, 8, 1), (2, 1, 4), (2, 2, 2), (4, 2, 1)])
def test_global_batches_are_the_same_however_they_are_cut(lengths, ranks, accumulation, size):
    whole = list(batches_of(50, 20, 1, 8, 0, 1, seed=3, lengths=lengths))
    parts = [
        list(batches_of(50, 20, accumulation, size, rank, ranks, seed=3, lengths=lengths))
        for rank in range(ranks)
    ]
    for step, expected in enumerate(whole):
        micros = range(step * accumulation, (step + 1) * accumulation)
        assert flat(parts[rank][micro] for micro in micros for rank in range(ranks)) == expected
    again = batches_of(50, 20, accumulation, size, ranks - 1, ranks, seed=3, start=7, lengths=lengths)
    assert list(again) == parts[-1][7 * accumulation :]  # resumed


@pytest.mark.parametrize("number, size", [(50, 8), (64, 8), (5, 8), (1, 3), (700, 2), (129, 1), (1300, 10)])
def test_grouped_by_length_every_sample_comes_once_an_epoch(number, size):
    lengths = like_real_lengths(number)
    steps = 4 * number // size + 1
    order = flat(batches_of(number, steps, 1, size, 0, 1, seed=0, lengths=lengths))
    epochs = [order[i * number : (i + 1) * number] for i in range(4)]
    assert all(sorted(epoch) == list(range(number)) for epoch in epochs)
    if number > 8:
        assert epochs[0] != epochs[1]
    other = flat(batches_of(number, steps, 1, size, 0, 1, seed=1, lengths=lengths))
    assert number == 1 or order != other


def test_groups_are_sorted_blocks_of_64_global_batches_shuffled():
    """Against the description, written out: 130 global batches are blocks of 64, 64 and 2; 8 more are cut by
    the end of the epoch, as they are when nothing is grouped.
    """
    number, G, lengths = 130 * 10 + 8, 10, like_real_lengths(130 * 10 + 8)
    order = flat(batches_of(number, 262, 1, G, 0, 1, seed=0, lengths=lengths))
    for epoch, head in ((0, 0), (1, 2)):  # 2 samples of epoch 1 complete the batch that epoch 0 began
        generator = torch.Generator().manual_seed(epoch)
        permutation = torch.randperm(number, generator=generator).tolist()
        whole, expected = permutation[head : head + 1300], []
        for at in (0, 640, 1280):
            block = sorted(whole[at : at + 640], key=lambda i: lengths[i])
            expected += [tuple(block[i : i + G]) for i in range(0, len(block), G)]
        ours = order[epoch * number : (epoch + 1) * number]
        assert ours[:head] == permutation[:head] and ours[head + 1300 :] == permutation[head + 1300 :]
        ours = [tuple(ours[i : i + G]) for i in range(head, head + 1300, G)]
        assert sorted(ours) == sorted(expected) and ours != expected
        means = np.array([lengths[list(batch)].mean() for batch in ours])
        assert abs(np.corrcoef(means, np.arange(130))[0, 1]) < 0.3  # short and long ones are mixed in time


def test_grouping_by_length_saves_padding():
    """The share of padding in micro-batches of 4, of a global batch of 128, by an estimate 20 % off."""
    lengths, share = like_real_lengths(20_000), {}
    text = lengths % 729  # of a picture's tokens the estimate is exact
    estimate = lengths - text + text * np.random.default_rng(1).uniform(0.8, 1.2, len(text))
    for name, grouping in (("plain", None), ("grouped", estimate)):
        batches = batches_of(20_000, 156, 8, 4, 1, 4, seed=0, lengths=grouping)
        sums = np.array([[lengths[batch].sum(), 4 * lengths[batch].max()] for batch in batches]).sum(0)
        share[name] = 1 - sums[0] / sums[1]
    print(share)
    assert share["plain"] > 0.15 and share["grouped"] < 0.06, share


# ---------------------------------------------------------------- samples that are kept


def test_samples_that_are_kept_are_those_that_would_be_made(tmp_path, monkeypatch):
    """As many as fit, each made once; the others again and again."""
    world = make_world(tmp_path / "world", tune=10, pretrain=1, per_kind=1)
    tokenizer = data.load_tokenizer(TINY / "student")
    fresh, keeping = (
        LlavaDataset(world / "tune.json", world / "images", tokenizer, 16, 40) for _ in range(2)
    )
    made, plain = [], LlavaDataset.sample
    monkeypatch.setattr(LlavaDataset, "sample", lambda self, *these: made.append(self) or plain(self, *these))
    size = 4 * 3 * 40 * 40 + 72 * max(len(fresh[i]["input_ids"]) for i in range(10))
    keeping.room = 4 * size
    for _ in range(3):
        for i in range(10):
            one, other = fresh[i], keeping[i]
            assert one["input_ids"] == other["input_ids"] and one["labels"] == other["labels"]
            assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert len(keeping.kept) == 4 and keeping.room >= 0
    assert sum(dataset is keeping for dataset in made) == 4 + 3 * 6
