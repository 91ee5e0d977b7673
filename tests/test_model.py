"""model.py: golden checkpoints in every layout, saving and loading, placeholders, and generation."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import data
import model
from data import IMAGE_TOKEN
from helpers import in_full
from model import VLM
from qwen import QwenConfig
from siglip import SiglipConfig
from support.errors import BadInput
from support.layouts import VLMConfig

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = ["released_layout", "hf_llava_layout", "hf_llava_layout_2024"]
RELEASED = load_file(GOLDEN / "released_layout_expected.safetensors")
RELEASED_IDS = torch.cat(
    [RELEASED["ids_before_image"], torch.full((1, 8), IMAGE_TOKEN), RELEASED["ids_after_image"]], 1
)
LLAVA = load_file(GOLDEN / "hf_llava_expected.safetensors")
GOLDEN_CLOSE = dict(rtol=0, atol=1e-4)
CLOSE = dict(rtol=1e-4, atol=2e-5)
VISION = SiglipConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)  # 4 patches
TEXT = QwenConfig(
    vocab_size=270, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
PICTURE = [IMAGE_TOKEN] * 4
PIXELS = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def randomize(module):
    """Every parameter away from its default, and far enough from 0 that the picture and each token matter."""
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.3 + ("norm" in name and name.endswith("weight")))
    return module.eval()


def tiny(tokenizer=None, text=None, **changes) -> VLM:
    torch.manual_seed(0)
    return randomize(VLM(VLMConfig(vision=VISION, text=replace(TEXT, **(text or {})), **changes), tokenizer))


def tiny_tokenizer() -> Tokenizer:
    """One token per byte, and the end of text: 257 ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([data.END_OF_TEXT])
    return tokenizer


def padded(rows: list[list[int]], side: str):
    """Rows of unequal length -> ids (B,T), mask (B,T)."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    right = side == "right"
    ids = [row + pad if right else pad + row for row, pad in zip(rows, fill)]
    mask = [[1] * len(row) + pad if right else pad + [1] * len(row) for row, pad in zip(rows, fill)]
    return torch.tensor(ids), torch.tensor(mask).bool()


def golden_copy(layout: str, to: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / layout, to / layout))


# ---------------------------------------------------------------- golden checkpoints


@torch.no_grad()
def test_golden_released_layout():
    """Vision features, visual tokens through P_t and P_s, one attention map, and logits."""
    vlm, pixels = model.load(GOLDEN / "released_layout"), RELEASED["pixel_values"]
    assert vlm.config.drop_first_patch and vlm.num_image_tokens == 8 and vlm.config.taf_width == 96
    torch.testing.assert_close(
        vlm.vision(pixels, layer=-2).features, RELEASED["penultimate_features"], **GOLDEN_CLOSE
    )
    torch.testing.assert_close(vlm.vision(pixels, layer=-1).features, RELEASED["last_hidden"], **GOLDEN_CLOSE)
    features = vlm.image_features(pixels)
    assert torch.equal(features, vlm.vision(pixels, layer=-2).features[:, 1:])
    torch.testing.assert_close(vlm.adapter(features), RELEASED["visual_tokens"], **GOLDEN_CLOSE)
    out = vlm(RELEASED_IDS, pixels, attention=in_full(1))
    torch.testing.assert_close(out.logits, RELEASED["logits"], **GOLDEN_CLOSE)
    torch.testing.assert_close(out.attentions[1], RELEASED["attention_layer1"], **GOLDEN_CLOSE)
    torch.testing.assert_close(vlm(RELEASED_IDS, pixels).logits, RELEASED["logits"], **GOLDEN_CLOSE)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@torch.no_grad()
def test_golden_llava_layouts(layout):
    """The config's own image_token_index and IMAGE_TOKEN are both placeholders."""
    vlm = model.load(GOLDEN / layout)
    assert not vlm.config.drop_first_patch and vlm.config.vision_layer == -1 and vlm.config.taf_width is None
    ids = LLAVA["input_ids"]
    assert (ids == vlm.config.image_token_index).sum() == vlm.num_image_tokens == 9
    logits = vlm(ids, LLAVA["pixel_values"]).logits
    torch.testing.assert_close(logits, LLAVA["logits"], **GOLDEN_CLOSE)
    ours = ids.masked_fill(ids == vlm.config.image_token_index, IMAGE_TOKEN)
    assert torch.equal(vlm(ours, LLAVA["pixel_values"]).logits, logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_in_eval_mode_and_in_the_dtype_asked_for(layout):
    vlm = model.load(GOLDEN / layout, dtype=torch.bfloat16)
    assert not any(module.training for module in vlm.modules())
    assert {tensor.dtype for tensor in vlm.state_dict().values()} == {torch.bfloat16}
    expected = RELEASED if layout == "released_layout" else LLAVA
    ids = RELEASED_IDS if layout == "released_layout" else LLAVA["input_ids"]
    logits = vlm(ids, expected["pixel_values"]).logits.detach().float()  # float32 pixels are accepted
    assert (logits - expected["logits"]).abs().mean() < 0.03 * expected["logits"].abs().mean()


@pytest.mark.parametrize("select, layer", [("full", -1), ("default", -2)])
@pytest.mark.parametrize("in_text, on_top", [(False, False), (True, True), (True, False), (False, True)])
@torch.no_grad()
def test_equals_transformers_llava(in_text, on_top, select, layer, tmp_path):
    """A random model of transformers, saved by it; the head is tied if either of the two fields says so."""
    transformers = pytest.importorskip("transformers", minversion="5")
    text = {
        name: value for name, value in vars(TEXT).items() if name not in ("rope_theta", "tie_word_embeddings")
    }
    config = transformers.LlavaConfig(
        text_config=transformers.Qwen2Config(**text, tie_word_embeddings=in_text),
        vision_config=transformers.SiglipVisionConfig(**vars(VISION)),
        image_token_index=269,
        vision_feature_select_strategy=select,
        vision_feature_layer=layer,
        tie_word_embeddings=on_top,
    )
    theirs = randomize(transformers.LlavaForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("language_model.lm_head.weight" in names) == (not in_text and not on_top)
    ids = torch.tensor([[5, 6] + [269] * (4 if select == "full" else 3) + [7, 8, 9]])
    expected = theirs(input_ids=ids, pixel_values=PIXELS[:1]).logits
    torch.testing.assert_close(model.load(tmp_path)(ids, PIXELS[:1]).logits, expected, **CLOSE)


# ---------------------------------------------------------------- saving and loading

VARIANTS = {
    "plain": {},
    "taf": dict(taf_width=40),
    "first patch dropped": dict(taf_width=40, drop_first_patch=True),
    "last layer, own image token": dict(vision_layer=-1, image_token_index=269),
    "tied": dict(text=dict(tie_word_embeddings=True, rope_theta=5e6)),
    "gelu": dict(taf_width=40, taf_gelu=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["native", "released"])
@torch.no_grad()
def test_saved_and_loaded_again_is_the_same_model(layout, variant, tmp_path):
    vlm = tiny(tiny_tokenizer(), **VARIANTS[variant])
    if vlm.config.taf_gelu and layout == "released":
        with pytest.raises(BadInput, match="released layout has no field"):
            vlm.save(tmp_path / "saved", layout)
        assert os.listdir(tmp_path) == []
        return
    vlm.save(tmp_path / "saved", layout)
    assert os.listdir(tmp_path) == ["saved"]  # and nothing temporary beside it
    files = {"config.json", "model.safetensors", "tokenizer.json"}
    theirs = {"preprocessor_config.json", "tokenizer_config.json"} if layout == "released" else set()
    assert set(os.listdir(tmp_path / "saved")) == files | theirs
    loaded = model.load(tmp_path / "saved")
    assert loaded.config == vlm.config
    assert loaded.tokenizer.to_str() == vlm.tokenizer.to_str()
    ids = torch.tensor([[1, 2] + PICTURE[: vlm.num_image_tokens] + [3, 4]])
    assert torch.equal(loaded(ids, PIXELS[:1]).logits, vlm(ids, PIXELS[:1]).logits)


@pytest.mark.parametrize("layout", ["native", "released"])
@pytest.mark.parametrize("golden", LAYOUTS)
@torch.no_grad()
def test_golden_saved_and_loaded_again_gives_the_same_logits(golden, layout, tmp_path):
    vlm = model.load(GOLDEN / golden)
    vlm.save(tmp_path / "saved", layout)
    ids, given = (RELEASED_IDS, RELEASED) if golden == "released_layout" else (LLAVA["input_ids"], LLAVA)
    again = model.load(tmp_path / "saved")(ids, given["pixel_values"]).logits
    assert torch.equal(again, vlm(ids, given["pixel_values"]).logits)


def test_bfloat16_is_saved_as_bfloat16(tmp_path):
    vlm = tiny().to(torch.bfloat16)
    vlm.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "bfloat16"
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == vlm.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in vlm.state_dict().items())


def test_released_layout_is_written_as_it_was_read(tmp_path):
    """Names, shapes and values of the golden file, but for the unused head; and its config's words."""
    model.load(GOLDEN / "released_layout").save(tmp_path / "saved", "released")
    theirs = load_file(GOLDEN / "released_layout/model.safetensors")
    theirs = {name: tensor for name, tensor in theirs.items() if ".vision_model.head." not in name}
    ours = load_file(tmp_path / "saved/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    theirs = json.loads((GOLDEN / "released_layout/config.json").read_text())
    ours = json.loads((tmp_path / "saved/config.json").read_text())
    for part in ("text_config", "vision_config"):
        inner = {name: value for name, value in theirs.pop(part).items() if name in ours[part]}
        assert (
            inner.items() <= ours[part].items()
            and {"model_type", "hidden_size", "hidden_act"} <= inner.keys()
        )
    del theirs["tokenizer_model_max_length"]  # says nothing about the model
    assert theirs.items() <= ours.items()


def test_released_config_words(tmp_path):
    """patch drops the first patch, cls_patch keeps all: the released code rejects LLaVA's words for them."""
    written = {}
    for drop in (True, False):
        tiny(drop_first_patch=drop).save(tmp_path / str(drop), "released")
        config = json.loads((tmp_path / str(drop) / "config.json").read_text())
        written[drop] = config["vision_feature_select_strategy"]
    assert written == {True: "patch", False: "cls_patch"}
    assert not any("post_connector." in name for name in load_file(tmp_path / "True/model.safetensors"))


@pytest.mark.parametrize(
    "word, drops", [("patch", True), ("default", True), ("cls_patch", False), ("full", False)]
)
def test_all_four_words_are_read(word, drops, tmp_path):
    folder = golden_copy("released_layout", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_select_strategy": word}))
    assert model.load(folder).num_image_tokens == (8 if drops else 9)


@pytest.mark.parametrize("layout", ["native", "released"])
def test_saving_over_something_is_an_error_and_leaves_it_untouched(layout, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/keep.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for taken in ("full", "file"):
        with pytest.raises(BadInput, match=f"{tmp_path / taken} exists already"):
            tiny().save(tmp_path / taken, layout)
    assert sorted(os.listdir(tmp_path)) == ["file", "full"] and os.listdir(tmp_path / "full") == ["keep.txt"]
    assert (tmp_path / "full/keep.txt").read_text() == (tmp_path / "file").read_text() == "precious"


def test_saving_into_an_empty_or_a_new_nested_folder_works(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new/nested"):
        tiny().save(folder)
        assert model.load(folder).config == tiny().config


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(BadInput, match="'llava'"):
        tiny().save(tmp_path / "saved", "llava")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "layout, change, named",
    [
        (
            "released_layout",
            {"vision_feature_select_strategy": "cls"},
            "vision_feature_select_strategy 'cls'",
        ),
        ("released_layout", {"vision_feature_layer": [-2, -1]}, r"\[-2, -1\]"),
        ("released_layout", {"connector_type": "linear"}, "mlp2x_gelu"),
        ("released_layout", {"connector_hidden_size": None}, "connector_hidden_size"),
        ("hf_llava_layout", {"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ("hf_llava_layout", {"multimodal_projector_bias": False}, "multimodal_projector_bias"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_config_that_is_not_supported_is_refused(layout, change, named, tmp_path):
    folder = golden_copy(layout, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(BadInput, match=f"config.json: .*{named}"):
        model.load(folder)


def test_a_tied_files_own_copy_of_the_head_is_dropped(tmp_path):
    tiny(text=dict(tie_word_embeddings=True)).save(tmp_path / "saved", "released")
    file = tmp_path / "saved/model.safetensors"
    tensors = load_file(file)
    head = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file({**tensors, "language_model.lm_head.weight": head}, file)
    assert model.load(tmp_path / "saved").lm.lm_head is None


@pytest.mark.parametrize("drop", [False, True], ids=["all patches", "first patch dropped"])
@pytest.mark.parametrize("with_teacher", [False, True], ids=["own adapter", "taf"])
@torch.no_grad()
def test_assembled_of_parts(with_teacher, drop, tmp_path):
    """Of a narrower teacher: the parts are those given, and it is saved and loaded like any other."""
    teacher = tiny(drop_first_patch=drop, text=dict(hidden_size=16)) if with_teacher else None
    parts = tiny(drop_first_patch=drop)
    vlm = VLM.assemble(parts.vision, parts.lm, tiny_tokenizer(), teacher, taf=with_teacher).eval()
    assert vlm.vision is parts.vision and vlm.lm is parts.lm
    assert vlm.config.drop_first_patch == (drop and with_teacher)  # the adapter's habit
    ids = torch.tensor([[1, 2] + PICTURE[: vlm.num_image_tokens] + [3, 4]])
    logits = vlm(ids, PIXELS[:1]).logits
    if with_teacher:
        visual = teacher.adapter(vlm.image_features(PIXELS[:1]))
        fetched = vlm.adapter.student(visual)
        assert fetched.shape == (1, vlm.num_image_tokens, 32)
        assert torch.equal(logits, vlm.lm(inputs_embeds=vlm.embed(ids, visual_tokens=fetched)).logits)
    vlm.save(tmp_path / "saved")
    assert torch.equal(model.load(tmp_path / "saved")(ids, PIXELS[:1]).logits, logits)


# ---------------------------------------------------------------- the picture among the tokens


@pytest.mark.parametrize("token", [IMAGE_TOKEN, 269])
@torch.no_grad()
def test_visual_tokens_stand_where_the_placeholders_stood(token):
    vlm = tiny(image_token_index=269)
    rows = [[1, *[token] * 4, 2, 3], [4, 5, 6, *[token] * 4], [7] * 7]
    embeds = vlm.embed(torch.tensor(rows), PIXELS[:2])
    visual = vlm.adapter(vlm.vision(PIXELS[:2], layer=-2).features)
    assert torch.equal(embeds[0, 1:5], visual[0]) and torch.equal(embeds[1, 3:], visual[1])
    table = vlm.lm.model.embed_tokens.weight
    assert torch.equal(embeds[0, [0, 5, 6]], table[[1, 2, 3]]) and torch.equal(embeds[2], table[[7] * 7])


@torch.no_grad()
def test_visual_tokens_may_stand_in_for_pixels():
    vlm, ids = tiny(), torch.tensor([[1, *PICTURE, 2], [*PICTURE, 3, 4]])
    visual = vlm.adapter(vlm.image_features(PIXELS[:2]))
    assert torch.equal(
        vlm.lm(inputs_embeds=vlm.embed(ids, visual_tokens=visual)).logits, vlm(ids, PIXELS[:2]).logits
    )
    assert not torch.allclose(
        vlm.lm(inputs_embeds=vlm.embed(ids, visual_tokens=visual.flip(0))).logits, vlm(ids, PIXELS[:2]).logits
    )


def test_gradients_reach_adapter_and_real_tokens_only():
    """The embedding that the placeholders borrow (id 0) learns nothing, adapter and real tokens do."""
    vlm = tiny()
    vlm(torch.tensor([[1, *PICTURE, 2]]), PIXELS[:1]).logits.square().sum().backward()
    table = vlm.lm.model.embed_tokens.weight.grad.abs().sum(1)
    assert table.nonzero().flatten().tolist() == [1, 2]
    assert vlm.adapter.linear_1.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "rows, pictures",
    [
        ([[1, *PICTURE[:3], 2]], 1),
        ([[1, *PICTURE, IMAGE_TOKEN, 2]], 1),
        ([[1, 2, 3]], 1),
        ([[1, *PICTURE, 2]], 0),
        ([[1, *PICTURE, 2]], 2),
        ([[1, *PICTURE], [2] * 5], 2),
        ([[*PICTURE, *PICTURE], [2] * 8], 2),
        ([[1, *PICTURE[:2]], [*PICTURE[:2], 3]], 1),
    ],
    ids=[
        "too few",
        "too many",
        "no placeholder",
        "no picture",
        "two pictures",
        "one lacks",
        "both in one row",
        "torn apart",
    ],
)
def test_placeholders_and_pictures_must_match(rows, pictures):
    vlm, pixels = tiny(), PIXELS[:pictures] if pictures else None
    for call in (vlm.forward, vlm.generate):
        with pytest.raises(ValueError, match="placeholders"):
            call(torch.tensor(rows), pixels)


@pytest.mark.parametrize("number", [3, 5])
def test_visual_tokens_of_another_number_are_an_error(number):
    """For instance those of a teacher that keeps all patches, given to a student that drops the first."""
    with pytest.raises(ValueError):
        tiny().embed(torch.tensor([[1, *PICTURE, 2]]), visual_tokens=torch.randn(1, number, 32))


# A frozen part in bfloat16 beside a trained one in float32, and the other way about.
MIXED = {
    "vision, adapter": dict(vision=torch.bfloat16, adapter=torch.bfloat16),
    "vision": dict(vision=torch.bfloat16),
    "language model": dict(lm=torch.bfloat16),
    "adapter": dict(adapter=torch.bfloat16),
}


@pytest.mark.parametrize("mixed", MIXED)
@torch.no_grad()
def test_each_part_computes_in_its_own_dtype(mixed, tmp_path):
    """Against each part called alone on what the one before gave, cast."""
    vlm = tiny(tiny_tokenizer())
    for name, dtype in MIXED[mixed].items():
        getattr(vlm, name).to(dtype)
    vision, adapter, lm = (next(part.parameters()).dtype for part in (vlm.vision, vlm.adapter, vlm.lm))
    z = vlm.vision(PIXELS[:1].to(vision), layer=-2).features
    for given in (PIXELS[:1], PIXELS[:1].to(torch.bfloat16).to(vision)):
        assert vlm.image_features(given).dtype == vlm.image_features(None).dtype == vision
    assert torch.equal(vlm.image_features(PIXELS[:1]), z)
    tokens = vlm.adapter.linear_2(torch.nn.functional.gelu(vlm.adapter.linear_1(z.to(adapter))))
    assert tokens.dtype == adapter
    table = vlm.lm.model.embed_tokens.weight
    embeds = torch.cat([table[[1, 2]], tokens[0].to(lm), table[[3, 4]]])[None]
    ids = torch.tensor([[1, 2, *PICTURE, 3, 4]])
    logits = vlm(ids, PIXELS[:1]).logits
    assert logits.dtype == lm and torch.equal(logits, vlm.lm(inputs_embeds=embeds).logits)
    first = vlm.generate(ids, PIXELS[:1], max_new_tokens=NEW)[:, 0]
    assert first.tolist() == logits[:, -1].argmax(-1).tolist()
    Image.effect_noise((40, 20), 90).save(tmp_path / "noise.png")
    assert isinstance(vlm.answer(tmp_path / "noise.png", "What?", max_new_tokens=2), str)


# ---------------------------------------------------------------- generation

ROWS = [[1, *PICTURE, 2, 3, 4, 5], [6, 7, 8], [9, 10, *PICTURE, 11], [12]]  # pictures in rows 0 and 2
NEW = 8


def greedy_alone(vlm, row, pixels) -> list[int]:
    """The argmax of one full forward per token, without a cache."""
    row, start = list(row), len(row)
    for _ in range(NEW):
        row.append(vlm(torch.tensor([row]), pixels).logits[0, -1].argmax().item())
    return row[start:]


@torch.no_grad()
def expected_rows(vlm) -> list[list[int]]:
    return [
        greedy_alone(vlm, row, pixels) for row, pixels in zip(ROWS, (PIXELS[:1], None, PIXELS[1:2], None))
    ]


@pytest.mark.parametrize(
    "changes", [{}, dict(taf_width=40), dict(text=dict(tie_word_embeddings=True))], ids=str
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_greedy_rows_of_unequal_length_are_as_each_alone(side, changes):
    """Mixed rows with and without a picture, against repeated full forwards."""
    vlm = tiny(**changes)
    ids, mask = padded(ROWS, side)
    expected = expected_rows(vlm)
    assert vlm.generate(ids, PIXELS[:2], mask, max_new_tokens=NEW).tolist() == expected
    assert len({tuple(row) for row in expected}) == len(ROWS)  # four different answers, or nothing was tested


def test_greedy_depends_on_the_picture_and_needs_no_mask():
    vlm, ids = tiny(), torch.tensor(ROWS[:1])
    first, second = (vlm.generate(ids, PIXELS[i : i + 1], max_new_tokens=NEW) for i in (0, 1))
    assert first[0].tolist() == greedy_alone(vlm, ROWS[0], PIXELS[:1]) != second[0].tolist()
    assert vlm.generate(ids, PIXELS[:1], max_new_tokens=3).tolist() == first[:, :3].tolist()
    assert vlm.generate(ids, PIXELS[:1], max_new_tokens=0).shape == (1, 0)


@torch.no_grad()
def test_greedy_equals_transformers():
    """A text prompt through transformers' own generate."""
    transformers = pytest.importorskip("transformers")
    vlm = tiny()
    text = {name: value for name, value in vars(TEXT).items() if name != "rope_theta"}
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text)).eval()
    theirs.load_state_dict(vlm.lm.state_dict())
    ids = torch.tensor([[6, 7, 8]])
    expected = theirs.generate(ids, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    assert vlm.generate(ids, max_new_tokens=NEW).tolist() == expected[:, 3:].tolist()


def test_stop_ids_end_a_row_and_fill_it_up():
    vlm = tiny()
    ids, mask = padded(ROWS, "right")
    free = expected_rows(vlm)
    stop = free[0][2]
    expected = [row if stop not in row else (row[: row.index(stop)] + [stop] * NEW)[:NEW] for row in free]
    assert expected != free and any(stop not in row for row in free)
    assert vlm.generate(ids, PIXELS[:2], mask, NEW, stop_ids=[stop]).tolist() == expected


def test_generation_ends_when_every_row_has_stopped():
    """Several stop ids: each row ends with its own, and what fills it up are stop ids."""
    vlm = tiny()
    ids, mask = padded(ROWS, "right")
    free = expected_rows(vlm)
    stops = [row[2] for row in free]
    lengths = [next(i for i, token in enumerate(row) if token in stops) + 1 for row in free]
    got = vlm.generate(ids, PIXELS[:2], mask, NEW, stop_ids=stops).tolist()
    assert len(got[0]) == max(lengths) <= 3 < NEW
    for row, alone, length in zip(got, free, lengths):
        assert row[:length] == alone[:length] and set(row[length:]) <= set(stops)


def test_the_tokenizers_end_of_text_is_the_default_stop():
    vlm = tiny(tiny_tokenizer())
    end = vlm.tokenizer.token_to_id(data.END_OF_TEXT)
    with torch.no_grad():  # the end of text gets the logit |h|^2 after [1, 2], everything else 0
        hidden = vlm.lm(torch.tensor([[1, 2]])).hidden[0, -1]
        vlm.lm.lm_head.weight.zero_()[end] = hidden
    assert vlm.generate(torch.tensor([[1, 2]]), max_new_tokens=NEW).tolist() == [[end]]
    assert vlm.generate(torch.tensor([[1, 2]]), max_new_tokens=NEW, stop_ids=[]).shape == (1, NEW)


def test_temperature():
    """The same seed gives the same tokens, other seeds give others, and a temperature near 0 is greedy."""
    vlm = tiny()
    ids, mask = padded(ROWS, "right")

    def sample(seed, temperature):
        torch.manual_seed(seed)
        return vlm.generate(ids, PIXELS[:2], mask, NEW, temperature=temperature).tolist()

    assert sample(1, 1.0) == sample(1, 1.0) != sample(2, 1.0)
    assert sample(1, 1e-4) == expected_rows(vlm) != sample(1, 2.0)


def test_sampling_follows_the_distribution():
    """Many samples of one token: as frequent as softmax(logits / temperature) says."""
    vlm = tiny()
    ids = torch.tensor([[6, 7, 8]] * 4000)
    with torch.no_grad():
        expected = (vlm(ids[:1]).logits[0, -1] / 1.5).softmax(-1)
    got = vlm.generate(ids, max_new_tokens=1, temperature=1.5)[:, 0].bincount(minlength=270) / 4000
    assert (got - expected).abs().max() < 0.04 < expected.max()


def test_answer_is_the_decoded_greedy_continuation(tmp_path):
    vlm = tiny(tiny_tokenizer())
    Image.effect_noise((40, 20), 90).convert("RGB").save(tmp_path / "noise.png")
    pixels = data.preprocess(tmp_path / "noise.png", 28)[None]
    prompts = {
        None: data.SYSTEM + "USER: What?" + " ASSISTANT:",
        tmp_path / "noise.png": data.SYSTEM + "USER: <image>\nWhat? ASSISTANT:",
    }
    for image, prompt in prompts.items():
        pieces = [vlm.tokenizer.encode(piece).ids for piece in prompt.split(data.IMAGE_MARK)]
        ids = pieces[0] if image is None else pieces[0] + PICTURE + pieces[1]
        new = vlm.generate(torch.tensor([ids]), None if image is None else pixels, max_new_tokens=5)[
            0
        ].tolist()
        expected = vlm.tokenizer.decode(new).strip()
        assert vlm.answer(image, "What?", max_new_tokens=5) == expected
    assert vlm.answer(Image.open(tmp_path / "noise.png"), "What?", max_new_tokens=5) == expected


def test_answer_without_a_tokenizer_is_an_error():
    with pytest.raises(BadInput, match="tokenizer.json"):
        tiny().answer(None, "What?")
