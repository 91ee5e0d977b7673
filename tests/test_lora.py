"""LoRA: merged and unmerged are the same map, only the low rank is trained, dropout is where it belongs."""

import pytest
import torch
from torch import nn

import model
from helpers import config
from support.world import TINY
from training import lora, models


@pytest.fixture
def student():
    return model.load(TINY / "teacher")


def add(vlm, rank=4, alpha=8.0, dropout=0.0):
    vlm.requires_grad_(False)
    lora.add_lora(vlm.lm.model.layers, rank, alpha, dropout)
    for name, parameter in vlm.named_parameters():  # B starts at 0: give it something to say
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.05)
    return vlm


IDS = torch.arange(1, 25).view(2, 12)


def test_a_linear_map_by_hand():
    """W = [[1, 2]], b = 3, A = [[1, 1]], B = [[2]], alpha / r = 8 / 1: y = W x + b + 8 * 2 * (x1 + x2)."""
    linear = nn.Linear(2, 1)
    linear.weight.data, linear.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    low = lora.LoRALinear(linear, rank=1, alpha=8.0, dropout=0.0)
    low.lora_A.data, low.lora_B.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0]])
    assert low(torch.tensor([1.0, 10.0])).tolist() == [1 + 20 + 3 + 16 * 11]


def test_it_starts_as_the_model_it_is_put_on(student):
    before = student.lm(IDS).logits
    lora.add_lora(student.lm.model.layers, 4, 8.0, 0.0)
    assert torch.equal(student.lm(IDS).logits, before)


def test_merged_and_unmerged_agree(student):
    plain = student.lm(IDS).logits
    add(student)
    unmerged = student.lm(IDS).logits
    assert (unmerged - plain).abs().max() > 0.1
    merged = model.load(TINY / "teacher")
    merged.load_state_dict(lora.merge(student.state_dict(), 4, 8.0), strict=True)
    torch.testing.assert_close(merged.lm(IDS).logits, unmerged, rtol=1e-5, atol=1e-5)
    assert lora.merge(merged.state_dict(), 4, 8.0).keys() == merged.state_dict().keys()


def test_all_linear_layers_have_it_and_the_head_has_not(student):
    add(student)
    with_lora = {name.rsplit(".", 1)[0] for name, _ in student.named_parameters() if "lora_" in name}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(with_lora) == 7 * len(student.lm.model.layers)
    assert {name.rsplit(".", 1)[1] for name in with_lora} == set(names)
    assert all(name.startswith("lm.model.layers.") for name in with_lora)


def test_what_is_trained(student):
    """With LoRA the adapter and the two low-rank matrices; with full tuning the adapter and all of the LM."""
    models.choose_trained(student, config("--tune", "lora", "--lora-rank", 4))
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("adapter.") for name in trained)
    assert sum("lora_A" in name for name in trained) == 7 * len(student.lm.model.layers)
    full = model.load(TINY / "teacher")
    models.choose_trained(full, config())
    trained = {name for name, parameter in full.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in full.named_parameters() if not name.startswith("vision.")}


def test_dropout_is_on_the_low_rank_input_only():
    torch.manual_seed(0)
    low = lora.LoRALinear(nn.Linear(1000, 1, bias=False), rank=1, alpha=1.0, dropout=0.25)
    low.weight.data.zero_()
    low.lora_A.data.fill_(1.0)
    low.lora_B.data.fill_(1.0)
    x = torch.ones(1000)
    assert low.eval()(x).item() == 1000
    kept = low.train()(x).item() * 0.75  # what is kept is scaled by 1 / 0.75
    assert kept == pytest.approx(750, abs=60) and kept != 1000
    low.lora_B.data.zero_()
    low.weight.data.fill_(1.0)
    assert low(x).item() == 1000  # W sees all of x
