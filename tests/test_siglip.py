"""siglip.py: equal to transformers at every hidden state, and loadable from every form of checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from siglip import Siglip, SiglipConfig
from support import layouts
from support.errors import BadInput

SHAPES = {
    "4 patches": dict(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=3, image_size=28, patch_size=14
    ),
    "2 pixels left over": dict(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, image_size=30, patch_size=7
    ),
    "one patch": dict(hidden_size=16, num_attention_heads=1, num_hidden_layers=1, image_size=9, patch_size=8),
}
PATCHES = {"4 patches": 4, "2 pixels left over": 16, "one patch": 1}
CLOSE = dict(rtol=1e-4, atol=2e-5)


def config_of(shape) -> dict:
    return {"intermediate_size": 40, **SHAPES[shape]}


def randomize(module):
    """Every parameter away from its default, so that no bias or norm weight can go missing unnoticed."""
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.2 + ("norm" in name and name.endswith("weight")))
    return module.eval()


def tiny(shape="4 patches") -> Siglip:
    torch.manual_seed(0)
    return randomize(Siglip(SiglipConfig(**config_of(shape))))


def pictures(shape, number=2):
    size = config_of(shape)["image_size"]
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


def random_transformers_model(shape):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return randomize(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config_of(shape))))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_hidden_state_equals_transformers(shape, tmp_path):
    theirs, pixels = random_transformers_model(shape), pictures(shape)
    theirs.save_pretrained(tmp_path)
    ours = model.load_vision(tmp_path)
    expected = theirs(pixel_values=pixels, output_hidden_states=True)
    states = expected.hidden_states
    assert len(states) == ours.config.num_hidden_layers + 1
    assert ours.config.num_patches == states[0].shape[1] == PATCHES[shape]
    for layer in range(-len(states), len(states)):
        torch.testing.assert_close(ours(pixels, layer=layer).features, states[layer], **CLOSE)
    torch.testing.assert_close(ours(pixels, layer=None).features, expected.last_hidden_state, **CLOSE)
    assert torch.equal(
        ours(pixels).features, ours(pixels, layer=-2).features
    )  # the method's choice is the default


@torch.no_grad()
def test_whole_siglip_checkpoint_loads_without_its_text_tower(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = dict(
        vocab_size=20, hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = transformers.SiglipConfig(text_config=text, vision_config=config_of("4 patches"))
    theirs, pixels = randomize(transformers.SiglipModel(config)), pictures("4 patches")
    theirs.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"logit_scale", "logit_bias"} <= names and any(name.startswith("text_model.") for name in names)
    expected = theirs.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(model.load_vision(tmp_path)(pixels, layer=None).features, expected, **CLOSE)


@pytest.mark.parametrize("head", [False, True], ids=["no head", "head"])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
@torch.no_grad()
def test_vision_only_checkpoint_loads_with_and_without_prefix(prefix, head, tmp_path):
    """transformers 4 writes `vision_model.` before every name, 5 does not. The pooling head is dropped."""
    vision, pixels = tiny(), pictures("4 patches")
    tensors = {prefix + name: tensor for name, tensor in vision.state_dict().items()}
    tensors |= {f"{prefix}head.probe": torch.ones(1, 1, 24)} if head else {}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "siglip_vision_model", **config_of("4 patches")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = model.load_vision(tmp_path)
    assert loaded.config == vision.config and not loaded.training
    assert torch.equal(loaded(pixels).features, vision(pixels).features)


def test_config_fields_that_a_file_leaves_out_have_transformers_defaults(tmp_path):
    """google/siglip-base-patch16-224 writes nothing but the model type of its vision part."""
    transformers = pytest.importorskip("transformers")
    file = tmp_path / "config.json"
    ours = layouts.siglip_config(
        {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}, file
    )
    theirs = transformers.SiglipVisionConfig().to_dict()
    for name, value in vars(ours).items():
        assert theirs[name] == value, name
    assert ours.num_patches == 196


def test_so400m_sizes():
    """384 pixels in patches of 14: 27 x 27, and 6 pixels left over."""
    assert SiglipConfig(image_size=384, patch_size=14).num_patches == 729


@pytest.mark.parametrize("bad", [{"model_type": "clip_vision_model"}, {"hidden_act": "quick_gelu"}], ids=str)
def test_config_that_is_not_supported_is_refused(bad, tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(BadInput, match="config.json"):
        layouts.siglip_config({"model_type": "siglip_vision_model", **bad}, file)


@pytest.mark.parametrize("shape", [(2, 3, 30, 30), (2, 3, 28, 27), (2, 1, 28, 28), (3, 28, 28)], ids=str)
def test_wrong_picture_size_is_a_clear_error(shape):
    with pytest.raises(ValueError, match="takes .*28,28") as error:
        tiny()(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_transformers_and_changes_nothing(shape, tmp_path):
    """The maps of all blocks that run; features and gradients as with the fused kernel."""
    theirs, pixels = random_transformers_model(shape), pictures(shape)
    theirs.save_pretrained(tmp_path)
    theirs.config._attn_implementation = "eager"
    ours, L = model.load_vision(tmp_path), SHAPES[shape]["num_hidden_layers"]
    expected = theirs(pixel_values=pixels, output_attentions=True).attentions
    fused, explicit = ours(pixels, layer=-1), ours(pixels, layer=-1, attention_layers=range(L))
    assert fused.attentions == {} and list(explicit.attentions) == list(range(L))
    for layer, maps in explicit.attentions.items():
        torch.testing.assert_close(maps, expected[layer], **CLOSE)
    torch.testing.assert_close(explicit.features, fused.features, **CLOSE)
    parameters = list(ours.encoder.parameters())
    gradients = [torch.autograd.grad(out.features.square().sum(), parameters) for out in (fused, explicit)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer, asked", [(-2, 2), (-1, 3), (0, 0)])
def test_attention_of_a_block_that_is_not_run_is_an_error(layer, asked):
    with pytest.raises(ValueError, match=f"attention of layers .{asked}"):
        tiny()(pictures("4 patches"), layer=layer, attention_layers=[asked])


@pytest.mark.parametrize("layer", [4, -5])
def test_a_hidden_state_that_is_not_there_is_an_error(layer):
    with pytest.raises(ValueError, match=f"layer {layer}"):
        tiny()(pictures("4 patches"), layer=layer)


def test_blocks_above_the_asked_one_are_not_run():
    vision, pixels = tiny(), pictures("4 patches")
    expected = vision(pixels, layer=-2).features
    torch.nn.init.constant_(vision.encoder.layers[-1].mlp.fc2.bias, float("nan"))
    assert torch.equal(vision(pixels, layer=-2).features, expected)
    assert vision(pixels, layer=-1).features.isnan().any()


def test_pixels_left_over_at_the_edge_are_not_seen():
    vision, pixels = tiny("2 pixels left over"), pictures("2 pixels left over")
    changed = pixels.clone()
    changed[:, :, 28:] = changed[:, :, :, 28:] = 9
    assert torch.equal(vision(changed).features, vision(pixels).features)
    changed[:, :, 27] = 9
    assert not torch.allclose(vision(changed).features, vision(pixels).features)


def test_patches_are_numbered_row_by_row():
    """A change in the upper right quarter of a 2 x 2 picture is patch 1 of the embeddings, and no other."""
    vision, pixels = tiny(), pictures("4 patches", 1)
    changed = pixels.clone()
    changed[:, :, :14, 14:] += 1
    moved = (vision(changed, layer=0).features - vision(pixels, layer=0).features).abs().amax(-1)[0] > 0
    assert moved.tolist() == [False, True, False, False]
