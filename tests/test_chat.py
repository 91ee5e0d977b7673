"""chat.py, and what model.py does for it: templates, streams of tokens, conversations that keep their cache,
and the prompt loop in real processes at a pseudo terminal.
"""

import argparse
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_model import PICTURE, tiny, tiny_tokenizer
from tokenizers import Tokenizer

import data
import model
from data import IMAGE_TOKEN
from evals import chat
from evals.chat import Conversation
from support import layouts
from support.errors import BadInput
from support.world import make_world

ROOT = Path(chat.__file__).parent.parent
TEACHER = ROOT / "tiny/teacher"
SYSTEM = (  # written out once more, so that a slip in data.py cannot hide
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
START, END, STOP = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
LONG = dict(max_position_embeddings=100_000)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tiny") / "world", tune=2, pretrain=2, per_kind=2)


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.merge("RGB", [Image.effect_noise((40, 20), 90) for _ in "RGB"]).save(file)
    return file


def chatml_tokenizer() -> Tokenizer:
    """One token per byte, and the special ones that llava-interleave-qwen has: 260 ids."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens([START, END, "<image>"])
    return tokenizer


def talker(template: str = "chat", **changes) -> model.VLM:
    vlm = tiny(chatml_tokenizer(), text=LONG, **changes)
    vlm.template = template
    return vlm


def ids_of(tokenizer: Tokenizer, text: str, pictures: list[int] = PICTURE) -> list[int]:
    """What the library makes of a whole prompt in which special tokens are special."""
    tokenizer.encode_special_tokens = False
    parts = [tokenizer.encode(part, add_special_tokens=False).ids for part in text.split("<image>")]
    return parts[0] if len(parts) == 1 else parts[0] + pictures + parts[1]


@torch.no_grad()
def fresh(vlm, ids: list[int], picture: Path | None, limit: int) -> list[int]:
    """The greedy answer without a cache: one forward of everything per token."""
    pixels = None if picture is None else data.preprocess(picture, vlm.config.vision.image_size)[None]
    new = []
    while len(new) < limit:
        token = vlm(torch.tensor([ids + new]), pixels).logits[0, -1].argmax().item()
        if token in vlm.stop_ids:
            break
        new.append(token)
    return new


def speaker(start: str, text: bytes, then: str | bytes, **changes) -> model.VLM:
    """A model that says `text`, then a special token, or a byte of the text and all from there, for ever.

    Its layers do nothing; its embeddings are one-hot, and the head has one successor for every token. So all
    bytes must be different, and `start` is the last character of the prompt.
    """
    vlm = tiny(chatml_tokenizer(), text=dict(vocab_size=264, hidden_size=264) | LONG, **changes)
    (last,) = vlm.tokenizer.encode(then).ids if isinstance(then, str) else [byte_id(then)]
    chain = [*vlm.tokenizer.encode(start).ids, *(byte_id(bytes([byte])) for byte in text), last]
    assert len(set(chain[:-1])) == len(chain) - 1
    with torch.no_grad():
        for layer in vlm.lm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        vlm.lm.model.norm.weight.fill_(1)
        vlm.lm.model.embed_tokens.weight.copy_(torch.eye(264))
        vlm.lm.lm_head.weight.zero_()
        for token, successor in zip(chain, chain[1:]):
            vlm.lm.lm_head.weight[successor, token] = 1
    return vlm


def byte_id(byte: bytes) -> int:
    """ByteLevel writes bytes that are no printing character as characters from 256 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printing}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printing)}
    return tiny_tokenizer().token_to_id(letters[byte[0]])


# ---------------------------------------------------------------- templates

CHATML = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
CHATML_BLIND = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
CHATML_NEXT = "<|im_end|>\n<|im_start|>user\nAnd é?<|im_end|>\n<|im_start|>assistant\n"
CHAT = SYSTEM + "USER: <image>\nWhat is it? ASSISTANT:"
CHAT_NEXT = "<|endoftext|>USER: And é? ASSISTANT:"


@pytest.fixture(scope="module", params=["bytes", "qwen1.5"])
def tokenizer(request) -> Tokenizer:
    if request.param == "bytes":
        return chatml_tokenizer()
    if "SHARED" not in os.environ:
        pytest.skip("SHARED is not set: no real tokenizer")
    return data.load_tokenizer(Path(os.environ["SHARED"]) / "data" / "qwen1.5-tokenizer")


def test_prompts_are_the_golden_texts(tokenizer):
    """Token by token what the library makes of the whole text."""
    vlm = tiny(tokenizer, text=LONG)
    assert vlm.template == "chat"
    assert vlm.question_ids(" What is it?\n", True) == ids_of(tokenizer, CHAT)
    assert vlm.question_ids("What is it?", False) == ids_of(tokenizer, CHAT.replace("<image>\n", ""))
    assert vlm.question_ids("And é?", False, first=False) == ids_of(tokenizer, CHAT_NEXT)
    assert vlm.stop_ids == ids_of(tokenizer, STOP)
    vlm.template = "chatml"
    assert vlm.question_ids(" What is it?\n", True) == ids_of(tokenizer, CHATML)
    assert vlm.question_ids("What is it?", False) == ids_of(tokenizer, CHATML_BLIND)
    assert vlm.question_ids("And é?", False, first=False) == ids_of(tokenizer, CHATML_NEXT)
    assert vlm.stop_ids == ids_of(tokenizer, END + STOP)


@pytest.mark.parametrize("template", layouts.TEMPLATES)
def test_special_tokens_in_a_question_are_text(template):
    vlm = talker(template)
    ids = vlm.question_ids(f"a{END}{STOP}b", True)
    specials = [id for id in ids if id > 255]
    assert len(specials) == (0 if template == "chat" else 3) and bytes_of(vlm, ids).count(END) == (
        1 if template == "chat" else 2
    )
    with pytest.raises(BadInput, match="<image> stands in a question"):
        vlm.question_ids("What is <image>?", True)


def bytes_of(vlm, ids: list[int]) -> str:
    return vlm.tokenizer.decode([id for id in ids if id != IMAGE_TOKEN], skip_special_tokens=False)


RULE = {  # layout, eos_token of tokenizer_config.json -> template
    ("native", None): "chat",
    ("released", END): "chat",
    ("hf", STOP): "chat",  # as we write it, and as Qwen1.5's base models have it
    ("hf", END): "chatml",
    ("hf", "object"): "chatml",
    ("hf", "no file"): "chatml",
}


@pytest.mark.parametrize("layout, end", RULE)
def test_the_checkpoint_says_which_template(layout, end, tmp_path):
    tiny(chatml_tokenizer()).save(tmp_path / "saved", layout)
    file = tmp_path / "saved/tokenizer_config.json"
    if end == "no file":
        file.unlink()
    elif end is not None:
        content = json.loads(file.read_text())
        assert content["eos_token"] == STOP
        file.write_text(json.dumps(content | {"eos_token": {"content": END} if end == "object" else end}))
    assert model.load(tmp_path / "saved").template == RULE[layout, end]


def test_without_its_tokens_there_is_no_chatml(tmp_path):
    tiny(tiny_tokenizer()).save(tmp_path / "saved", "hf")
    (tmp_path / "saved/tokenizer_config.json").unlink()
    vlm = model.load(tmp_path / "saved")
    assert vlm.template == "chat"
    vlm.template = "chatml"
    with pytest.raises(BadInput, match="no token <.im_start.>, which the template chatml"):
        vlm.question_ids("What?", False)


@pytest.mark.parametrize("drop", [False, True], ids=["all patches", "first patch dropped"])
def test_a_chatml_answer_is_that_of_transformers(drop, noise, tmp_path):
    """Its processor makes the ids from the golden text, its generate the answer, up to <|im_end|>."""
    transformers = pytest.importorskip("transformers")
    vlm = tiny(chatml_tokenizer(), drop_first_patch=drop)
    vlm.save(tmp_path / "hf", "hf")
    file = tmp_path / "hf/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": END}))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    batch = processor(images=Image.open(noise), text=CHATML, return_tensors="pt")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    prompt = batch["input_ids"].shape[1]
    free = theirs.generate(**batch, max_new_tokens=12, do_sample=False)[0, prompt:].tolist()
    assert len(set(free)) > 3  # no single token over and over
    assert model.load(tmp_path / "hf").answer(noise, "What is it?", 12) == processor.decode(free).strip()


@pytest.mark.parametrize("template, start", [("chat", ":"), ("chatml", "\n")])
def test_an_answer_ends_where_its_template_ends_it(template, start):
    """<|im_end|> ends chatml only: in chat it is a token without a meaning."""
    for end in (STOP, END):
        vlm = speaker(start, b"yes", end)
        vlm.template = template
        ids = torch.tensor([vlm.question_ids("What?", False)])
        stops = end == STOP or template == "chatml"
        got = vlm.generate(ids, max_new_tokens=9)[0].tolist()
        assert len(got) == (4 if stops else 9)
        assert vlm.answer(None, "What?", 4) == "".join(Conversation(vlm).ask("What?", 4)) == "yes"


# ---------------------------------------------------------------- a stream of tokens and of words


def test_generate_is_the_stream_collected(noise):
    vlm = talker()
    ids = torch.tensor([[1, *PICTURE, 2, 3]] * 2)
    pixels = torch.stack([data.preprocess(noise, 28)] * 2)
    stream = vlm.stream(ids, pixels, max_new_tokens=6)
    tokens = [next(stream), *stream]
    assert all(token.shape == (2,) and not token.requires_grad for token in tokens)
    assert torch.equal(torch.stack(tokens, 1), vlm.generate(ids, pixels, max_new_tokens=6))


def test_letters_come_whole_and_controls_never():
    """Spaces around the answer go, those inside come with the word behind them; an escape sequence is cut."""
    text = " n\u00e9 \U0001f600\x1b[\x9b2\nz".replace(" \U0001f600", "\t\U0001f600")
    vlm = speaker(":", text.encode(), STOP)
    pieces = list(Conversation(vlm).ask("What?", 50))
    assert [piece for piece in pieces if piece] == ["n", "\u00e9", "\t\U0001f600", "[", "2", "\nz"]
    for cut, said in ((3, "n"), (4, "n\u00e9"), (7, "n\u00e9"), (9, "n\u00e9\t\U0001f600")):
        assert "".join(Conversation(vlm).ask("What?", cut)) == said


def test_pieces_are_shown_at_once(tmp_path, monkeypatch):
    """Where a file or a pipe is written, too, which Python would rather write in blocks."""
    file = tmp_path / "shown"

    def pieces():
        for i in range(3):
            yield "ab"
            assert file.read_text() == "ab" * (i + 1)

    with open(file, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        chat.say(pieces())
    assert file.read_text() == "ababab\n"


# ---------------------------------------------------------------- conversations

QUESTIONS = "What is it?", "And é?", "  Where? "


@pytest.mark.parametrize("limit", [1, 7], ids=["one token", "seven"])
@pytest.mark.parametrize("blind", [False, True], ids=["picture", "no picture"])
@pytest.mark.parametrize("template", layouts.TEMPLATES)
def test_cached_turns_are_those_of_a_fresh_start(template, blind, limit, noise):
    """Ids as composed by hand, greedy tokens as without a cache; and every token and picture is read once."""
    vlm, picture = talker(template), None if blind else noise
    seen = {"tokens": 0, "pictures": 0}

    def count(module, arguments, keywords=None):
        what = "pictures" if module is vlm.vision else "tokens"
        seen[what] += arguments[0].shape[0 if what == "pictures" else 1]

    hooks = [part.register_forward_pre_hook(count) for part in (vlm.vision, vlm.lm.model.layers[0])]
    talk, turns = Conversation(vlm, picture), []
    for question in QUESTIONS:
        text = "".join(talk.ask(question, limit))
        turns.append((list(talk.ids), talk.start, text))
    for hook in hooks:
        hook.remove()
    assert seen == {"tokens": len(talk.ids) - 1, "pictures": 0 if blind else 1}  # the last is not read
    text = {"chat": CHAT, "chatml": CHATML}[template]
    ids = ids_of(vlm.tokenizer, text.replace("<image>\n", "") if blind else text)
    for (got, start, text), following in zip(turns, ("And é?", "Where?", None)):
        assert got[:start] == ids
        ids = ids + fresh(vlm, ids, picture, limit)
        assert got == ids and len(ids) == start + limit
        said = vlm.tokenizer.decode(ids[start:])
        assert text == re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", said).rstrip("\ufffd").strip()
        following = {"chat": CHAT_NEXT, "chatml": CHATML_NEXT}[template].replace("And é?", str(following))
        ids = ids + ids_of(vlm.tokenizer, following)
    assert len({tuple(got[start:]) for got, start, _ in turns}) == 3 or limit == 1


@pytest.mark.parametrize("name", ["teacher", "compodistill"])
def test_what_ships_answers_as_if_asked_at_once(world, name):
    """Turn after turn the same as the whole conversation, encoded as in training, and answered in one go."""
    vlm, picture = model.load(ROOT / "tiny" / name), world / "images/test-0.png"
    talk, conversation, answers = Conversation(vlm, picture), [], []
    questions = "What colour is the circle?", "Where is the circle?", "Is there a red square?"
    for i, question in enumerate(questions):
        conversation.append({"from": "human", "value": question if i else f"<image>\n{question}"})
        ids = data.encode_prompt(conversation, vlm.tokenizer, vlm.num_image_tokens)
        new = vlm.generate(torch.tensor([ids]), data.preprocess(picture, 40)[None])[0].tolist()
        answers.append("".join(talk.ask(question)))
        assert talk.ids[talk.start :] == new[:-1] and talk.ids[: talk.start] == ids
        conversation.append({"from": "gpt", "value": answers[-1]})
    assert len(set(answers)) == 3 and answers[0] == vlm.answer(picture, "What colour is the circle?")


def interrupt(vlm, layer: int, call: int) -> None:
    """Ctrl-C as it falls: when that layer is called for that time, before it computes anything."""
    calls = iter(range(1, 10**6))

    def hook(module, arguments):
        if next(calls) == call:
            handle.remove()
            raise KeyboardInterrupt

    handle = vlm.lm.model.layers[layer].register_forward_pre_hook(hook)


@pytest.mark.parametrize("turn", [0, 1], ids=["first turn", "second turn"])
@pytest.mark.parametrize("call", [1, 4], ids=["while it reads", "in the answer"])
@pytest.mark.parametrize("layer", [0, 1])
def test_after_ctrl_c_the_conversation_is_sound(layer, call, turn, noise):
    """Before the first token the question is forgotten; later the answer stays as far as it came."""
    vlm = talker()
    talk = Conversation(vlm, noise)
    for question in QUESTIONS[:turn]:
        list(talk.ask(question, 5))
    before = list(talk.ids)
    interrupt(vlm, layer, call)
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("Stop!", 9))
    if call == 1:
        assert talk.ids == before
    else:
        assert len(talk.ids) == talk.start + 3 and talk.ids[: len(before)] == before
    before = list(talk.ids)
    list(talk.ask("And é?", 5))
    asked = CHAT_NEXT if before else CHAT.replace("What is it?", "And é?")
    ids = before + ids_of(vlm.tokenizer, asked)
    assert talk.ids == ids + fresh(vlm, ids, noise, 5)


def test_an_answer_left_early_goes_on_as_it_stands(noise):
    vlm = talker()
    talk = Conversation(vlm, noise)
    for _ in zip(range(3), talk.ask("What is it?", 50)):
        pass
    ids = ids_of(vlm.tokenizer, CHAT)
    ids += fresh(vlm, ids, noise, 3) + ids_of(vlm.tokenizer, CHAT_NEXT)
    list(talk.ask("And é?", 5))
    assert talk.ids == ids + fresh(vlm, ids, noise, 5)


def test_the_models_length_is_the_end(noise):
    longest = len(ids_of(chatml_tokenizer(), CHAT)) + 3
    vlm = tiny(chatml_tokenizer(), text=dict(max_position_embeddings=longest))
    talk = Conversation(vlm, noise)
    list(talk.ask("What is it?"))
    assert len(talk.ids) == talk.start + 3
    before = list(talk.ids)
    with pytest.raises(BadInput, match="ask less or begin anew"):
        list(talk.ask("And é?"))
    assert talk.ids == before


@pytest.mark.parametrize("question", ["\udce4", "a <image> b"])
def test_a_question_that_cannot_be_put_changes_nothing(question, noise):
    talk = Conversation(talker(), noise)
    with pytest.raises(BadInput, match="UTF-8|<image>"):
        list(talk.ask(question))
    assert talk.ids == []


# ---------------------------------------------------------------- the command


def arguments(*argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser.add_subparsers(dest="command"))
    return parser.parse_args(["chat", *map(str, argv)])


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"--model": "nowhere"}, "nowhere: no such folder"),
        ({"--model": "no tokenizer"}, "no tokenizer.json"),
        ({"--image": "nothing.png"}, "nothing.png cannot be read as a picture"),
        ({"--template": "chatml"}, "no token <.im_start.>"),
        ({"--question": "a\udce4"}, "not UTF-8"),
    ],
    ids=lambda value: " ".join(*value.items()).replace("\udce4", "?") if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence(changes, why, noise, tmp_path):
    tiny(tiny_tokenizer(), text=LONG).save(tmp_path / "model")
    tiny().save(tmp_path / "no tokenizer")
    given = {"--model": "model", "--image": noise, "--question": "What?"} | changes
    given["--model"] = tmp_path / given["--model"]
    with pytest.raises(BadInput, match=why) as error:
        chat.run(arguments(*(word for pair in given.items() for word in pair)))
    assert "\n" not in str(error.value)


def test_the_template_can_be_chosen(tmp_path, capfd):
    speaker("\n", b"yes", END).save(tmp_path / "model")
    chat.run(arguments("--model", tmp_path / "model", "--question", "What?", "--template", "chatml"))
    assert capfd.readouterr().out == "yes\n"


def test_one_question_prints_its_answer_and_no_more(world, capfd):
    picture, question = world / "images/test-0.png", "What colour is the circle?"
    chat.run(arguments("--model", TEACHER, "--image", picture, "--question", question))
    assert capfd.readouterr() == (model.load(TEACHER).answer(picture, question) + "\n", "")


def test_a_prompt_without_a_terminal(noise, tmp_path, monkeypatch, capsys):
    """Lines from a pipe, which need not be UTF-8; what cannot be done is one line, and the chat goes on."""
    monkeypatch.chdir(tmp_path)
    vlm = speaker(":", b"yes", STOP)
    vlm.save(tmp_path / "model")
    (tmp_path / "broken.png").write_bytes(noise.read_bytes()[:300])
    lines = [
        b"What?", b"/image", b"/image nothing.png", b"/image broken.png", b"", b"/what", b"caf\xe9 <image>",
        b"caf\xe9", b"/image %s" % bytes(noise), b"/new", b"What?", b"/help",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8"))
    chat.run(arguments("--model", tmp_path / "model"))
    out = capsys.readouterr().out.removeprefix("No picture. Ask, or /help.\n")
    out = out.replace("<image>", "MARK").split("> ")
    expected = [
        "", "yes", "error: /image needs", "error: nothing.png", "error: broken.png cannot be read", "",
        "/what is no command", "error: MARK stands in a question", "yes", f"{noise}. A new conversation.",
        "A new conversation, about the same picture.", "yes", chat.HELP, "",
    ]  # fmt: skip
    assert len(out) == len(expected)
    for got, wanted in zip(out, expected):
        assert got.startswith(wanted) and (wanted == chat.HELP or got.count("\n") <= 1)


# ---------------------------------------------------------------- real processes

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}


def command(*argv) -> list[str]:
    return [sys.executable, str(ROOT / "eval.py"), "chat", *map(str, argv)]


class Terminal:
    """A program at a pseudo terminal of its own, on which Ctrl-C is a key like any other.

    Used in a `with` block, at whose end it is gone, whatever happens: what it computes it would compute for
    ever.
    """

    def __init__(self, folder: Path, *argv):
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(sys.executable, command(*argv), ENVIRONMENT)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.screen)

    def until(self, text: str) -> str:
        """What appears, up to this text, with the line breaks of a file."""
        seen, end = b"", time.monotonic() + 60
        while not seen.endswith(text.encode().replace(b"\n", b"\r\n")):
            assert time.monotonic() < end and select.select([self.screen], [], [], 60)[0], seen
            try:
                new = os.read(self.screen, 1)  # byte by byte: the next `until` gets all the rest
            except OSError:
                new = b""  # Linux says so when the program has ended
            assert new, seen
            seen += new
        return seen.decode().replace("\r", "")

    def type(self, keys: str) -> "Terminal":
        os.write(self.screen, keys.encode())
        return self

    def ctrl_c(self) -> "Terminal":
        """At a prompt. Python loses sight of one that comes just between readline's echo and its waiting for
        a key, until the next key: then once more.
        """
        time.sleep(0.2)
        os.write(self.screen, b"\x03")
        if not select.select([self.screen], [], [], 5)[0]:
            os.write(self.screen, b"\x03")
        return self

    def status(self) -> int:
        try:
            while os.read(self.screen, 4096):
                pass
        except OSError:
            pass
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return status


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """Says "yes, " and then "olé olé olé" to the end of its days."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    speaker(":", "yes, olé".encode(), b"o").save(folder)
    return folder


def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends(endless, noise, tmp_path):
    (tmp_path / "broken.png").write_bytes(noise.read_bytes()[:300])
    with Terminal(tmp_path, "--model", endless, "--image", noise, "--max-new-tokens", 90_000) as terminal:
        terminal.until(f"{noise}. Ask, or /help.\n> ")
        terminal.type("What is it?\r").until("yes, oléolé")  # the answer is being written
        terminal.type("\x03").until("(stopped)\n> ")
        terminal.type("/image broken.png\r").until("error: broken.png cannot be read as a picture")
        terminal.until("> ")
        terminal.type("And now?\r").until("yes, oléolé")  # the conversation goes on
        terminal.type("\x03").until("(stopped)\n> ")
        assert terminal.ctrl_c().status() == 0


def test_ctrl_d_ends_and_lines_have_a_history(endless, tmp_path):
    with Terminal(tmp_path, "--model", endless, "--max-new-tokens", 8) as terminal:
        terminal.until("No picture. Ask, or /help.\n> ")
        answered = terminal.type("What is it?\r").until("> ")
        assert answered.endswith("yes, ol\n> ")  # half a letter is not shown
        assert terminal.type("\x1b[A\r").until("> ").endswith("What is it?\nyes, ol\n> ")  # arrow up
        assert terminal.type("\x04").status() == 0


def test_closed_standard_input_is_one_sentence(endless):
    shell = ["sh", "-c", 'exec "$@" <&-', "sh", *map(str, command("--model", endless))]
    done = subprocess.run(shell, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: standard input is closed"), done.stderr


def test_a_reader_who_has_seen_enough(endless):
    """As `| head -c 8` does it: the program ends without a word."""
    argv = command("--model", endless, "--question", "What?", "--max-new-tokens", 90_000)
    with subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(8) == b"yes, ol\xc3"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
