"""model.py, exports: what transformers makes of folders that VLM.save wrote, dtypes, the command line."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_model import CLOSE, GOLDEN, PICTURE, PIXELS, tiny, tiny_tokenizer

import data
import model
from data import IMAGE_TOKEN
from support.errors import BadInput
from support.world import DESCRIBE, draw, random_scene

ROOT = Path(model.__file__).parent
TEACHER = ROOT / "tiny/teacher"
IDS, WORD = 257, 257  # tiny_tokenizer's ids are 0 to 256, so that <image> becomes 257
LAYOUTS = ["native", "released", "hf"]


def exported(vlm, folder) -> Path:
    vlm.save(folder, "hf")
    return folder


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def llava_of(folder, **options):
    """What transformers reads, and that it neither missed nor left over a tensor."""
    transformers = pytest.importorskip("transformers")
    llava, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return llava.eval()


def processor_of(folder):
    return pytest.importorskip("transformers").AutoProcessor.from_pretrained(folder, use_fast=False)  # Pillow


def pictures() -> list[Image.Image]:
    """Wide, tall, of the right size, grey, transparent: noise, where every step of resizing shows."""
    noise = [Image.effect_noise(size, 90) for size in ((91, 50), (33, 70), (28, 28), (40, 41), (64, 30))]
    colours = [Image.merge("RGB", [one, one.rotate(180), one.transpose(0)]) for one in noise]
    return [*colours[:3], noise[3], colours[4].convert("RGBA")]


# ---------------------------------------------------------------- Hugging Face LLaVA: the model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_a_llama_inside(tied, tmp_path):
    """Every layout says so, and is read as the same model; that of Hugging Face by transformers, too."""
    text = dict(qkv_bias=False, tie_word_embeddings=tied, rope_theta=5e4)
    vlm = tiny(tiny_tokenizer(), text)
    assert not any(name.endswith("q_proj.bias") for name in vlm.lm.state_dict())
    ours = torch.tensor([[5, *PICTURE, 7, 8], [*PICTURE, 9, 10, 11]])
    expected = vlm(ours, PIXELS[:2]).logits
    for layout in LAYOUTS:
        vlm.save(tmp_path / layout, layout)
        assert read(tmp_path / layout / "config.json")["text_config"]["model_type"] == "llama"
        got = model.load(tmp_path / layout)(ours, PIXELS[:2]).logits
        torch.testing.assert_close(got[..., : expected.shape[-1]], expected, **CLOSE)
    theirs = ours.masked_fill(ours == IMAGE_TOKEN, WORD)
    got = llava_of(tmp_path / "hf")(input_ids=theirs, pixel_values=PIXELS[:2]).logits
    torch.testing.assert_close(got[..., : expected.shape[-1]], expected, **CLOSE)


@pytest.mark.parametrize("layer", [-2, -1])
@pytest.mark.parametrize("drop", [False, True], ids=["all patches", "first patch dropped"])
@pytest.mark.parametrize("vocabulary", [IDS, 270], ids=["no row free", "rows free"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_transformers_gives_the_same_logits(tied, vocabulary, drop, layer, tmp_path):
    """Two rows with a picture each. So does our own loader. rope_theta is no default, and SigLIP's
    post_layernorm is random: hidden_states[-1] must be what stands before it.
    """
    text = dict(tie_word_embeddings=tied, vocab_size=vocabulary, rope_theta=5e4)
    vlm = tiny(tiny_tokenizer(), text, drop_first_patch=drop, vision_layer=layer)
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    folder = exported(vlm, tmp_path / "hf")
    P = vlm.num_image_tokens
    ours = torch.tensor([[5, *PICTURE[:P], 7, 8], [*PICTURE[:P], 9, 10, 11]])
    theirs = ours.masked_fill(ours == IMAGE_TOKEN, WORD)
    expected = vlm(ours, PIXELS[:2]).logits
    got = llava_of(folder)(input_ids=theirs, pixel_values=PIXELS[:2]).logits
    assert got.shape[-1] == max(vocabulary, WORD + 1)
    torch.testing.assert_close(got[..., :vocabulary], expected, rtol=1e-5, atol=1e-5)
    again = model.load(folder)
    for ids in (ours, theirs):
        assert torch.equal(again(ids, PIXELS[:2]).logits[..., :vocabulary], expected)
    assert again.config.drop_first_patch == drop and again.config.vision_layer == layer
    after = vlm.state_dict()  # saving changed nothing in memory
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert vlm.tokenizer.token_to_id(data.IMAGE_MARK) is None and vlm.config.image_token_index == IMAGE_TOKEN


def test_the_golden_checkpoint_is_written_as_it_was_read(tmp_path):
    """The file's names of 2024, and the words of a config.json that transformers wrote."""
    vlm = model.load(GOLDEN / "hf_llava_layout_2024")
    vlm.tokenizer = tiny_tokenizer()
    folder = exported(vlm, tmp_path / "hf")
    theirs = load_file(GOLDEN / "hf_llava_layout_2024/model.safetensors")
    theirs = {name: tensor for name, tensor in theirs.items() if ".vision_model.head." not in name}
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    theirs, ours = read(GOLDEN / "hf_llava_layout/config.json"), read(folder / "config.json")
    del theirs["image_token_index"], theirs["dtype"], theirs["transformers_version"]
    for part in ("text_config", "vision_config"):
        shared = {name: value for name, value in theirs.pop(part).items() if name in ours[part]}
        shared.pop("vision_use_head", None)  # theirs has a head, which nothing reads
        assert shared.items() <= ours[part].items() and {"model_type", "hidden_size"} <= shared.keys()
    assert theirs.items() <= ours.items()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_config_says_twice_whether_the_head_is_tied(layout, tied, tmp_path):
    """transformers 4 reads it in text_config, transformers 5 on top."""
    tiny(tiny_tokenizer(), dict(tie_word_embeddings=tied)).save(tmp_path / "saved", layout)
    config = read(tmp_path / "saved/config.json")
    assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == tied


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_row_that_is_lacking_is_the_mean_row(tied, tmp_path):
    """Only then, and in embedding and head alike; a tied file has one of the two."""
    names = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"][: 2 - tied]
    for vocabulary in (IDS, 270):
        text = dict(tie_word_embeddings=tied, vocab_size=vocabulary)
        vlm = tiny(tiny_tokenizer(), text)
        tensors = load_file(exported(vlm, tmp_path / str(vocabulary)) / "model.safetensors")
        matrices = [vlm.lm.model.embed_tokens.weight, vlm.lm.head_weight]
        assert {name for name in tensors if len(tensors[name]) >= vocabulary} == set(names)
        for name, matrix in zip(names, matrices):
            assert torch.equal(tensors[name][:vocabulary], matrix)
            assert len(tensors[name]) == max(vocabulary, WORD + 1)
            if vocabulary == IDS:
                torch.testing.assert_close(tensors[name][WORD], matrix.mean(0))


@torch.no_grad()
def test_the_new_word_is_never_the_answer(tmp_path):
    """Not even where every logit is negative, so that a row of zeros would win."""
    vlm, prompt = tiny(tiny_tokenizer(), dict(vocab_size=IDS)), torch.tensor([[1, 2, 3]])
    hidden = vlm.lm(prompt).hidden[0, -1]
    vlm.lm.lm_head.weight.copy_(-(0.1 + torch.rand(IDS, 1)) * hidden)
    expected = vlm.generate(prompt, max_new_tokens=1)
    assert vlm(prompt).logits[0, -1].max() < 0
    folder = exported(vlm, tmp_path / "hf")
    assert torch.equal(model.load(folder).generate(prompt, max_new_tokens=1), expected)
    theirs = llava_of(folder).generate(input_ids=prompt, max_new_tokens=1, do_sample=False)
    assert torch.equal(theirs[:, 3:], expected)


def test_an_export_exported_again_is_the_same(tmp_path):
    """The word for a picture, once there, is not added a second time."""
    first = exported(tiny(tiny_tokenizer(), dict(vocab_size=IDS)), tmp_path / "first")
    second = exported(model.load(first), tmp_path / "second")
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))
    for name in os.listdir(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_what_hugging_faces_layout_cannot_hold_is_refused(tmp_path):
    for vlm, why in (
        (tiny(tiny_tokenizer(), taf_width=40), "no P_s.*save as released or native"),
        (tiny(), "tokenizer.json"),
    ):
        with pytest.raises(BadInput, match=why):
            vlm.save(tmp_path / "hf", "hf")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- Hugging Face LLaVA: the processor


@pytest.mark.parametrize("drop", [False, True], ids=["all patches", "first patch dropped"])
def test_the_processor_makes_our_pixels_and_our_ids(drop, tmp_path):
    """And its chat template our prompt, of one turn and of several, with and without a picture."""
    vlm = tiny(tiny_tokenizer(), drop_first_patch=drop)
    processor, P = processor_of(exported(vlm, tmp_path / "hf")), vlm.num_image_tokens
    text = "USER: <image>\nWhat? ASSISTANT:"
    for picture in pictures():
        got = processor(images=picture, text=text, return_tensors="pt")
        assert set(got) == {"input_ids", "attention_mask", "pixel_values"}  # what generate takes
        torch.testing.assert_close(got["pixel_values"][0], data.preprocess(picture, 28), rtol=0, atol=1e-6)
    turns = ["<image>\n Is it red? ", " no", "What <b>is</b> it?", 'it\'s "blue"']
    for given in (turns[:1], turns, [turns[0].replace("<image>", "")], turns[:3]):
        messages, conversation = [], []
        for i, text in enumerate(given):
            mark = [{"type": "image"}] if data.IMAGE_MARK in text else []
            words = {"type": "text", "text": text.replace(data.IMAGE_MARK, "")}
            messages.append({"role": ("user", "assistant")[i % 2], "content": [*mark, words]})
            conversation.append({"from": ("human", "gpt")[i % 2], "value": text})
        if len(given) % 2:
            expected = data.encode_prompt(conversation, vlm.tokenizer, P)
        else:
            expected = data.encode(conversation, vlm.tokenizer, P)[0]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=len(given) % 2 == 1)
        picture = pictures()[0] if data.IMAGE_MARK in given[0] else None
        ids = processor(images=picture, text=prompt, return_tensors="pt")["input_ids"][0].tolist()
        assert [IMAGE_TOKEN if id == WORD else id for id in ids] == expected


def test_the_chat_template_takes_texts_and_a_system(tmp_path):
    """Contents as texts or as parts, as clients send them; a system's words stand in SYSTEM's place."""
    transformers = pytest.importorskip("transformers")
    exported(tiny(tiny_tokenizer()), tmp_path / "hf")
    written = partial(
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").apply_chat_template, tokenize=False
    )
    turns = [("user", "Is it <b>red</b>?"), ("assistant", " no"), ("user", "Why? ")]
    plain = [{"role": role, "content": text} for role, text in turns]
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    said = "USER: Is it <b>red</b>? ASSISTANT: no<|endoftext|>USER: Why? "
    assert written(plain) == written(parts) == written([*plain[:1], *parts[1:]]) == data.SYSTEM + said
    for content in ("Be brief. ", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]):
        assert written([{"role": "system", "content": content}, *plain]) == "Be brief. " + said
    for strange in ([*plain, {"role": "system", "content": "x"}], [{"role": "tool", "content": "x"}]):
        with pytest.raises(Exception, match="turns are user and assistant"):
            written(strange)


def test_transformers_answers_as_we_do(tmp_path):
    """The shipped teacher, whose tied embedding has no row free: a batch of questions of unequal length."""
    vlm = model.load(TEACHER)
    folder = exported(vlm, tmp_path / "hf")
    llava, processor = llava_of(folder), processor_of(folder)
    assert (llava.config.text_config.vocab_size, llava.config.image_token_index) == (479, 478)
    scenes = [random_scene(random.Random(i), "test") for i in range(4)]
    questions = DESCRIBE, "What colour is the circle?", "Is there a red square?"
    asked = [(draw(scene), question) for scene in scenes for question in questions]
    prompts = [f"{data.SYSTEM}USER: <image>\n{question} ASSISTANT:" for _, question in asked]
    batch = processor(
        images=[picture for picture, _ in asked], text=prompts, padding=True, return_tensors="pt"
    )
    new = llava.generate(**batch, max_new_tokens=24)[:, batch["input_ids"].shape[1] :]
    theirs = [answer.strip() for answer in processor.batch_decode(new, skip_special_tokens=True)]
    ours = [vlm.answer(picture, question, max_new_tokens=24) for picture, question in asked]
    assert theirs == ours and len(set(ours)) > 2


# ---------------------------------------------------------------- the released layout


@pytest.mark.parametrize("variant", [{}, dict(taf_width=40), dict(drop_first_patch=True)], ids=str)
def test_the_files_beside_a_released_checkpoint(variant, tmp_path):
    """Read by transformers' own classes: SigLIP's pictures, and the tokenizer as it is."""
    vlm = tiny(tiny_tokenizer(), **variant)
    vlm.save(tmp_path / "released", "released")
    assert read(tmp_path / "released/preprocessor_config.json") == {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": 28, "width": 28},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "released", use_fast=False)
    for picture in pictures():
        got = processor(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(got, data.preprocess(picture, 28), rtol=0, atol=1e-6)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "released")
    text = "USER: What , is it ? ASSISTANT: red"
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}  # what a model takes
    assert tokenizer(text)["input_ids"] == vlm.tokenizer.encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # no spaces cleaned up
    assert tokenizer.model_max_length == 256
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.padding_side == read(tmp_path / "released/config.json")["tokenizer_padding_side"]


@torch.no_grad()
def test_from_released_to_hugging_face_and_back(tmp_path):
    """The golden LLaVA checkpoint through all three layouts; only its own word for a picture may change."""
    vlm = model.load(GOLDEN / "hf_llava_layout")
    vlm.tokenizer = tiny_tokenizer()
    given = load_file(GOLDEN / "hf_llava_expected.safetensors")
    ids = given["input_ids"].masked_fill(given["input_ids"] == 319, IMAGE_TOKEN)
    for i, layout in enumerate(["released", "hf", "native", "hf", "released"]):
        vlm.save(tmp_path / str(i), layout)
        vlm = model.load(tmp_path / str(i))
        torch.testing.assert_close(vlm(ids, given["pixel_values"]).logits, given["logits"], rtol=0, atol=1e-4)
    theirs = llava_of(tmp_path / "3")(
        input_ids=ids.masked_fill(ids == IMAGE_TOKEN, WORD), pixel_values=given["pixel_values"]
    )
    torch.testing.assert_close(theirs.logits, given["logits"], rtol=0, atol=1e-4)


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_in_another_dtype(layout, tmp_path):
    """Every tensor rounded, config.json says so, and the model in memory stays as it was."""
    vlm = tiny(tiny_tokenizer())
    vlm.save(tmp_path / "exact", layout)
    vlm.save(tmp_path / "rounded", layout, dtype=torch.bfloat16)
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    assert rounded.keys() == exact.keys()
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact[name].to(torch.bfloat16))
    configs = [read(tmp_path / name / "config.json") for name in ("exact", "rounded")]
    assert configs[1] == configs[0] | {"torch_dtype": "bfloat16"} != configs[0]
    assert {tensor.dtype for tensor in vlm.state_dict().values()} == {torch.float32}
    if layout == "hf":
        assert llava_of(tmp_path / "rounded", torch_dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_different_dtypes_are_saved_and_loaded_as_they_are(layout, tmp_path):
    """Frozen parts in bfloat16, a trained language model in float32: config.json names the latter."""
    vlm = tiny(tiny_tokenizer())
    vlm.vision.to(torch.bfloat16)
    vlm.save(tmp_path / "saved", layout)
    assert read(tmp_path / "saved/config.json")["torch_dtype"] == "float32"
    loaded, once = model.load(tmp_path / "saved", dtype=None), model.load(tmp_path / "saved")
    for name, tensor in vlm.state_dict().items():
        same = loaded.state_dict()[name]
        assert same.dtype == tensor.dtype == (torch.bfloat16 if "vision" in name else torch.float32)
        assert torch.equal(same, tensor) and torch.equal(once.state_dict()[name], tensor.float())
    assert loaded.config == replace(vlm.config, image_token_index=loaded.config.image_token_index)


# ---------------------------------------------------------------- python model.py


def convert(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "model.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@torch.no_grad()
def test_the_command_line_converts(tmp_path):
    """In a process of its own: the shipped teacher for transformers, in bfloat16."""
    done = convert(TEACHER, "--out", tmp_path / "hf", "--layout", "hf", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "hf") in done.stdout and "model.safetensors" in done.stdout
    assert os.listdir(tmp_path) == ["hf"]
    ids = torch.tensor([[1, *[478] * 16, 2]])
    pixels = torch.randn(1, 3, 40, 40)
    expected = model.load(TEACHER, dtype=torch.bfloat16)(ids.masked_fill(ids == 478, IMAGE_TOKEN), pixels)
    again = model.load(tmp_path / "hf", dtype=None)
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.bfloat16}
    torch.testing.assert_close(again(ids, pixels).logits[..., :478], expected.logits, **CLOSE)


def test_the_command_line_says_what_is_wrong_in_one_sentence(tmp_path):
    done = convert(tmp_path / "nothing", "--out", tmp_path / "out", "--layout", "native")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'nothing'}: no such folder")
    assert done.stderr.count("\n") == 1 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_the_command_line_keeps_dtypes_unless_told(dtype, tmp_path, capsys):
    vlm = tiny(taf_width=40)
    vlm.vision.to(torch.bfloat16)
    vlm.save(tmp_path / "given")
    flags = [] if dtype is None else ["--dtype", dtype]
    model.main([str(tmp_path / "given"), "--out", str(tmp_path / "out"), "--layout", "released", *flags])
    written = {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()}
    assert written == ({torch.float32, torch.bfloat16} if dtype is None else {getattr(torch, dtype)})
    printed = capsys.readouterr().out
    assert all(name in printed for name in os.listdir(tmp_path / "out"))


@pytest.mark.parametrize(
    "out, layout, why", [("taken", "native", "exists already"), ("new", "hf", "no P_s")], ids=["taken", "taf"]
)
def test_what_cannot_be_converted_leaves_nothing_behind(out, layout, why, tmp_path):
    tiny(tiny_tokenizer(), taf_width=40).save(tmp_path / "given")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/keep.txt").write_text("precious")
    with pytest.raises(SystemExit, match=f"error: .*{out}.*{why}"):
        model.main([str(tmp_path / "given"), "--out", str(tmp_path / out), "--layout", layout])
    assert sorted(os.listdir(tmp_path)) == ["given", "taken"]
    assert os.listdir(tmp_path / "taken") == ["keep.txt"]
