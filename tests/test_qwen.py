"""qwen.py: equal to transformers, the two ways through attention, positions, padding, cache; its config."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model
from helpers import in_full
from qwen import Cache, Qwen, QwenConfig, explicit_attention, rope_angles, rotate
from support import layouts
from support.errors import BadInput

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, rope_theta=1e4, max_position_embeddings=64,
)  # fmt: skip
IDS = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([9, 6, 4])
RIGHT = torch.arange(9) < LENGTHS[:, None]  # right padding, True = real
LEFT = RIGHT.flip(1)
CLOSE = dict(rtol=1e-4, atol=2e-5)


def randomize(module):
    """Every parameter away from its default, so that no bias or norm weight can go missing unnoticed."""
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.2 + ("norm" in name))
    return module.eval()


def tiny(**changes) -> Qwen:
    torch.manual_seed(0)
    return randomize(Qwen(QwenConfig(**{**SIZES, **changes})))


def hidden(lm, ids, mask=None, cache=None):
    out = lm(ids, mask, cache=cache, logits=False)
    assert out.logits is None
    return out.hidden


def gradients(lm, loss):
    """-> {name: gradient, or None}"""
    lm.zero_grad(set_to_none=True)
    loss.backward()
    return {name: tensor.grad for name, tensor in lm.named_parameters()}


# ---------------------------------------------------------------- transformers

SHAPES = {
    "untied": dict(num_key_value_heads=4),
    "tied": dict(num_key_value_heads=4, tie_word_embeddings=True),
    "grouped keys": dict(num_key_value_heads=2, rope_theta=1e6),
    "one key head, tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "one wide head, large eps": dict(
        num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, rms_norm_eps=1e-2
    ),
    "llama": dict(family="Llama", num_key_value_heads=2, rope_theta=5e5),
    "llama, tied": dict(family="Llama", num_key_value_heads=4, tie_word_embeddings=True),
}


def random_transformers_model(family="Qwen2", **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theta = changes.pop("rope_theta", SIZES["rope_theta"])
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "rope_theta": theta, **changes})
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    config._attn_implementation = "eager"
    return randomize(getattr(transformers, f"{family}ForCausalLM")(config))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_and_attention_equal_transformers(shape, tmp_path):
    theirs = random_transformers_model(**SHAPES[shape])
    theirs.save_pretrained(tmp_path)
    ours = model.load_lm(tmp_path)
    assert (ours.lm_head is None) == SHAPES[shape].get("tie_word_embeddings", False)
    assert ("model.layers.0.self_attn.q_proj.bias" in ours.state_dict()) == ("llama" not in shape)
    layers = range(len(ours.model.layers))
    for mask in (torch.ones_like(RIGHT), RIGHT):
        expected = theirs(IDS, attention_mask=mask.long(), output_attentions=True)
        out = ours(IDS, mask, attention=in_full(*layers))
        torch.testing.assert_close(out.logits[mask], expected.logits[mask], **CLOSE)
        torch.testing.assert_close(ours(IDS, mask).logits[mask], expected.logits[mask], **CLOSE)
        assert list(out.attentions) == list(layers)
        for layer in layers:  # (B,H,T,S) -> the rows of real queries
            got, want = (maps[layer].transpose(1, 2)[mask] for maps in (out.attentions, expected.attentions))
            torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_sharded_checkpoint_loads(tied, tmp_path):
    theirs = random_transformers_model(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(model.load_lm(tmp_path)(IDS).logits, theirs(IDS).logits, **CLOSE)


@torch.no_grad()
def test_a_tied_files_own_copy_of_the_head_is_dropped(tmp_path):
    theirs = random_transformers_model(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    ours = model.load_lm(tmp_path)
    assert ours.lm_head is None
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, **CLOSE)


@torch.no_grad()
def test_loads_in_the_dtype_asked_for(tmp_path):
    """bfloat16 computes as transformers does in bfloat16, up to a few roundings."""
    theirs = random_transformers_model()
    theirs.save_pretrained(tmp_path)
    ours = model.load_lm(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.bfloat16}
    expected = theirs.to(torch.bfloat16)(IDS).logits
    out = ours(IDS, attention=in_full(0))
    assert out.logits.dtype == torch.bfloat16 and out.attentions[0].dtype == torch.float32
    difference = (out.logits.float() - expected.float()).abs().mean() / expected.float().abs().mean()
    assert difference < 0.02


# ---------------------------------------------------------------- two ways through attention


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["unpadded", "right", "left"])
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_explicit_path_equals_sdpa(kv_heads, mask, layers):
    """Logits at real positions and the gradients of all parameters."""
    lm = tiny(num_key_value_heads=kv_heads)
    real = torch.ones_like(RIGHT) if mask is None else mask
    weight = torch.randn(3, 9, 61)
    fast, looked = lm(IDS, mask), lm(IDS, mask, attention=in_full(*layers))
    assert fast.attentions == {} and set(looked.attentions) == set(layers)
    torch.testing.assert_close(looked.logits[real], fast.logits[real], **CLOSE)
    expected = gradients(lm, (fast.logits * weight)[real].sum())
    got = gradients(lm, (looked.logits * weight)[real].sum())
    for name in expected:
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_an_error(layer):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        tiny()(IDS, attention=in_full(0, layer))


# ---------------------------------------------------------------- positions, causality, padding


def test_rotary_by_hand():
    """D = 4, theta = 100, position 1: the pair (0, 2) turns by 1, the pair (1, 3) by 100^(-2/4) = 0.1."""
    x = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4)
    got = rotate(x, *rope_angles(torch.tensor([[1]]), 4, 100.0)).flatten().tolist()
    (c, s), (d, t) = (math.cos(1), math.sin(1)), (math.cos(0.1), math.sin(0.1))
    assert got == pytest.approx([1 * c - 3 * s, 2 * d - 4 * t, 3 * c + 1 * s, 4 * d + 2 * t])


def test_rotary_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)

    def product(i, j):
        turned = [rotate(x, *rope_angles(torch.tensor([[p]]), 8, 1e4)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(7, 3), product(14, 10), rtol=1e-4, atol=1e-5)
    assert (product(7, 3) - product(7, 4)).abs() > 1e-3


def test_explicit_attention_by_hand():
    """Equal scores are shared among the keys that may be seen; log 3 more weighs three times as much."""
    q = torch.tensor([[[[2.0, 0, 0, 0]] * 3]])  # (1,1,3,4), 1/sqrt(D) = 1/2
    k = torch.tensor([[[[0.0, 0, 0, 0], [math.log(3), 0, 0, 0], [9.0, 0, 0, 0]]]])
    v = torch.tensor([[[[4.0], [8.0], [100.0]]]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()[None, None]
    out, attention = explicit_attention(q, k, v, mask)
    torch.testing.assert_close(attention[0, 0], torch.tensor([[1, 0, 0], [0.25, 0.75, 0], [0, 0, 1]]))
    torch.testing.assert_close(out.flatten(), torch.tensor([4.0, 7.0, 100.0]))


@pytest.mark.parametrize("layers", [(), (0, 1, 2)], ids=["sdpa", "explicit"])
@torch.no_grad()
def test_a_token_changes_nothing_before_it(layers):
    lm, changed = tiny(), IDS.clone()
    changed[:, 5] = (IDS[:, 5] + 1) % 61
    before, after = (lm(ids, attention=in_full(*layers)).logits for ids in (IDS, changed))
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-6)
    assert ((after - before)[:, 5:].abs().amax(-1) > 1e-3).all()  # at its place and at every later one


@pytest.mark.parametrize("layers", [(), (0, 1, 2)], ids=["sdpa", "explicit"])
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
@torch.no_grad()
def test_padding_is_never_read(mask, layers):
    """Other padding tokens change nothing at real positions, and each row is as it is alone."""
    lm = tiny()
    changed = torch.where(mask, IDS, (IDS + 7) % 61)
    logits = lm(IDS, mask, in_full(*layers)).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(
        lm(changed, mask, in_full(*layers)).logits[mask], logits[mask], rtol=0, atol=1e-6
    )
    for row in range(3):
        alone = lm(IDS[row][mask[row]][None], None, in_full(*layers)).logits[0]
        torch.testing.assert_close(logits[row][mask[row]], alone, **CLOSE)


@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["unpadded", "right", "left"])
@torch.no_grad()
def test_attention_rows_are_distributions_over_what_may_be_seen(mask):
    out = tiny()(IDS, mask, attention=in_full(0, 1, 2))
    real = torch.ones_like(RIGHT) if mask is None else mask
    for maps in out.attentions.values():
        torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4, 9))
        assert (maps >= 0).all() and (maps.triu(1) == 0).all()
        to_padding = maps.transpose(1, 2)[real].transpose(0, 1) * ~real.repeat_interleave(real.sum(1), 0)
        assert (to_padding == 0).all()


def test_embeddings_may_stand_in_for_ids():
    lm = tiny()
    embeds = lm.model.embed_tokens(IDS)
    assert torch.equal(lm(None, RIGHT, inputs_embeds=embeds).logits, lm(IDS, RIGHT).logits)


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("pieces", [[1] * 9, [5, 1, 1, 1, 1], [4, 3, 2], [9]], ids=str)
@torch.no_grad()
def test_cache_equals_the_full_forward(pieces):
    lm, cache = tiny(), Cache(3)
    got = torch.cat([hidden(lm, ids, cache=cache) for ids in IDS.split(pieces, 1)], 1)
    torch.testing.assert_close(got, hidden(lm, IDS), **CLOSE)
    assert cache.layers[0][0].shape == (3, 2, 9, 8)  # keys are kept once per group, not once per head


@pytest.mark.parametrize("side", [RIGHT, LEFT], ids=["right", "left"])
@torch.no_grad()
def test_cache_with_rows_of_unequal_length(side):
    """Padded prompts of 9, 6 and 4 tokens, then four tokens one by one: as each row alone in one forward."""
    lm, cache = tiny(), Cache(3)
    new = torch.randint(0, 61, (3, 4))
    prompt = hidden(lm, IDS, side, cache)
    steps = torch.cat([hidden(lm, ids, None, cache) for ids in new.split(1, 1)], 1)
    for row in range(3):
        real = side[row]
        alone = hidden(lm, torch.cat([IDS[row][real], new[row]])[None])[0]
        torch.testing.assert_close(torch.cat([prompt[row][real], steps[row]]), alone, **CLOSE)


# ---------------------------------------------------------------- config.json

FILE = Path("somewhere/config.json")
PLAIN = {
    "model_type": "qwen2",
    **{k: v for k, v in SIZES.items() if k != "rope_theta"},
    "tie_word_embeddings": True,
}
WRITTEN_BY = {
    4: {"rope_theta": 5e6, "torch_dtype": "bfloat16", "rope_scaling": None, "sliding_window": 32768},
    5: {
        "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"},
        "dtype": "bfloat16",
        "sliding_window": None,
    },
}


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "inside text_config"])
@pytest.mark.parametrize("version", WRITTEN_BY)
def test_config_of_transformers_4_and_5(version, nested):
    config = {**PLAIN, "use_sliding_window": False, **WRITTEN_BY[version]}
    config = {"model_type": "llava", "text_config": config, "vocab_size": 1} if nested else config
    assert layouts.qwen_config(config, FILE) == QwenConfig(
        **{**SIZES, "rope_theta": 5e6, "tie_word_embeddings": True}
    )


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_config_fields_that_a_file_leaves_out_have_transformers_defaults(family):
    transformers = pytest.importorskip("transformers")
    ours = layouts.qwen_config({"model_type": family.lower()}, FILE)
    theirs = getattr(transformers, f"{family}Config")().to_dict()
    theirs = {"rope_theta": (theirs.get("rope_parameters") or {}).get("rope_theta"), **theirs}
    own = {"num_experts": 0, "qkv_bias": family == "Qwen2"}  # what theirs have no field for
    for name, value in vars(ours).items():
        assert theirs.get(name, own.get(name)) == value, name
    some = {"model_type": family.lower(), "num_attention_heads": 8, "hidden_size": 64, "head_dim": 8}
    theirs = getattr(transformers, f"{family}Config")(**some)
    if family == "Llama":  # as many key heads as heads
        assert layouts.qwen_config(some, FILE).num_key_value_heads == theirs.num_key_value_heads == 8
    assert layouts.qwen_config(layouts.qwen_fields(ours), FILE) == ours


@pytest.mark.parametrize(
    "bad",
    [
        {"use_sliding_window": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}},
        {"hidden_act": "gelu"},
        {"model_type": "mistral"},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"model_type": "llama", "attention_bias": True},
        {"model_type": "llama", "mlp_bias": True},
        {"model_type": "llama", "pretraining_tp": 2},
        {"model_type": "llama", "head_dim": 64},
        {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    ],
    ids=json.dumps,
)
def test_config_that_is_not_supported_is_refused(bad):
    with pytest.raises(BadInput, match=str(FILE)):
        layouts.qwen_config({**PLAIN, **bad}, FILE)


# ---------------------------------------------------------------- recomputation


class Calls(TorchDispatchMode):
    """Counts the operations that really run, forward, backward and recomputed."""

    def __init__(self):
        super().__init__()
        self.number = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def test_checkpointing_runs_layers_again_and_changes_no_number():
    lm, silu = tiny(), "aten.silu.default"
    weight, results, calls = torch.randn(3, 9, 61), [], []
    for lm.checkpointing in (False, True):
        with Calls() as mode:
            out = lm(IDS, attention=in_full(1))
            loss = (out.logits * weight).sum() + out.attentions[1].square().sum()
            results.append((loss, gradients(lm, loss)))
        calls.append(mode.number[silu])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert calls == [3, 6]  # once a layer; with checkpointing once more, backward
    with torch.no_grad(), Calls() as mode:
        lm(IDS)
    assert mode.number[silu] == 3  # no gradient, nothing to recompute
