"""How models lie in a folder, for reading: config.json, and the names of tensors. exports.py writes.

    native     our own
    released   CompoDistill's and TinyLLaVA's
    hf         Hugging Face LLaVA's, in its forms of 2024 and of transformers 5
    plain      a SigLIP or a Qwen alone, as Hugging Face has them

What a network cannot do (sliding windows, another activation) is refused here, where its config is read.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer

import data
from data import IMAGE_TOKEN
from qwen import QwenConfig
from siglip import SiglipConfig
from support.checkpoint import tensor_names
from support.errors import BadInput
from support.files import read_json

# ---------------------------------------------------------------- config.json of the two networks


# Type and range of every field of a config.json that is read: some ten times what any published model has, so
# that a damaged number, or a stranger's, is refused before anything of its size is made.
FIELDS: dict[str, tuple[type, float, float]] = {
    "vocab_size": (int, 1, 1e7),
    "hidden_size": (int, 1, 1e5),
    "intermediate_size": (int, 1, 1e6),
    "num_hidden_layers": (int, 1, 1000),
    "num_attention_heads": (int, 1, 1000),
    "num_key_value_heads": (int, 1, 1000),
    "rms_norm_eps": (float, 1e-15, 0.1),
    "layer_norm_eps": (float, 1e-15, 0.1),
    "rope_theta": (float, 1, 1e12),
    "max_position_embeddings": (int, 1, 1e9),
    "image_size": (int, 1, 1e4),  # pixels
    "patch_size": (int, 1, 1e4),
    "num_channels": (int, 3, 3),  # pictures are RGB
    "connector_hidden_size": (int, 1, 1e5),
    "vision_feature_layer": (int, -1001, 1000),
    "image_token_index": (int, -1e7, 1e7),
    "head_dim": (int, 1, 1e4),
    "num_experts": (int, 0, 1000),  # of our own layout alone
}
# Fields that must have one of these values, or be absent: the networks and the pictures are made for them.
ONLY: dict[str, tuple] = {
    "tie_word_embeddings": (True, False),
    "post_connector_use": (True, False),
    "post_connector_gelu": (True, False),
    "use_sliding_window": (False,),
    "attention_bias": (False,),  # of llama
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "use_qk_norm": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "connector_type": ("mlp2x_gelu",),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "image_aspect_ratio": ("square",),  # "pad": to a square before they are resized
    "vision_feature_select_strategy": ("patch", "default", "cls_patch", "full"),
    # of preprocessor_config.json: data.preprocess has no other way
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_center_crop": (False,),
    "do_pad": (False,),
    "do_convert_rgb": (True,),
    "image_processor_type": ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"),
    "resample": (Image.Resampling.BICUBIC,),
    "rescale_factor": (1 / 255,),
    "image_mean": (0.5, [0.5] * 3),
    "image_std": (0.5, [0.5] * 3),
    # of tokenizer_config.json: data.text_ids adds nothing
    "add_bos_token": (False,),
    "add_eos_token": (False,),
    "add_prefix_space": (False,),
    "do_lower_case": (False,),
}


def value(config: dict, name: str, file: Path, default: Any = None) -> Any:
    """config[name], as FIELDS and ONLY have it; the default where it is absent or null."""
    found = config.get(name)
    if found is None:
        return default
    if name in ONLY:
        same = [x for x in ONLY[name] if x == found and isinstance(x, bool) == isinstance(found, bool)]
        if not same:  # (in Python True == 1)
            only = ", only " * bool(ONLY[name]) + " or ".join(map(json.dumps, ONLY[name]))
            raise BadInput(f"{file}: {name} {f'{found!r}':.60} is not supported{only}")
        return found
    kind, least, most = FIELDS[name]
    right = isinstance(found, (int, float) if kind is float else int) and not isinstance(found, bool)
    if not right or not least <= found <= most:
        what = f"a {'whole ' * (kind is int)}number from {least:g} to {most:g}"
        raise BadInput(f"{file}: {name} is {f'{found!r}':.60}, not {what}; fetch or write it again")
    return found


def check_only(config: dict, file: Path) -> None:
    """BadInput where a field that ONLY names has another value."""
    for name in config.keys() & ONLY.keys():
        value(config, name, file)


def section(config: dict, name: str, file: Path) -> dict:
    """config[name], or config itself where there is no such part."""
    part = config.get(name, config)
    if not isinstance(part, dict):
        raise BadInput(f"{file}: {name} is {f'{part!r}':.60}, not a JSON object; fetch or write it again")
    return part


def to_dataclass(cls: type, config: dict, file: Path):
    """The fields of dataclass `cls` that config.json gives, checked; the others keep their defaults."""
    names = [field.name for field in fields(cls) if field.name in FIELDS or field.name in ONLY]
    values = {name: value(config, name, file) for name in names}
    return cls(**{name: x for name, x in values.items() if x is not None})


# model_type -> fields that are others than QwenConfig's, which are those of transformers' Qwen2, by default
FAMILIES = {
    "qwen2": {},
    "llama": {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
    },
}


def qwen_config(config: dict, file: Path) -> QwenConfig:
    """From a config.json of transformers 4 or 5, whole (`text_config` inside) or the language part alone."""
    config = section(config, "text_config", file)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise BadInput(
            f"{file}: model_type {f'{family!r}':.60} is not qwen2, the family of Qwen1.5, nor llama"
        )
    # transformers 5 writes rope_theta into rope_parameters, 4.x beside it
    rope = section({"rope_parameters": config.get("rope_parameters") or {}}, "rope_parameters", file)
    scaling = section({"rope_scaling": config.get("rope_scaling") or rope}, "rope_scaling", file)
    activation = config.get("hidden_act", QwenConfig.hidden_act)
    only = {"rope_theta", "rope_type", "type"}
    scaled = any(part.keys() - only for part in (rope, scaling)) or any(
        part.get(name, "default") != "default" for part in (rope, scaling) for name in ("rope_type", "type")
    )
    windows = set(config.get("layer_types") or ()) - {"full_attention"}
    if windows or scaled or activation != "silu":
        raise BadInput(
            f"{file}: sliding windows, rope scaling and activations other than silu are not supported"
        )
    if len({x for x in (rope.get("rope_theta"), config.get("rope_theta")) if x is not None}) > 1:
        raise BadInput(f"{file}: rope_theta and that of rope_parameters differ; leave the right one")
    check_only(config, file)
    given = {name: x for name, x in config.items() if x is not None}
    if family == "llama" and "num_attention_heads" in given:
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
    c = to_dataclass(QwenConfig, {"rope_theta": rope.get("rope_theta"), **FAMILIES[family], **given}, file)
    c = replace(c, qkv_bias=family == "qwen2")
    if c.hidden_size % c.num_attention_heads or c.num_attention_heads % c.num_key_value_heads:
        raise BadInput(
            f"{file}: width {c.hidden_size}, {c.num_attention_heads} heads and {c.num_key_value_heads} "
            "key heads do not divide one another"
        )
    head = c.hidden_size // c.num_attention_heads
    if head % 2 or value(config, "head_dim", file, head) != head:
        raise BadInput(
            f"{file}: a head is {head} wide (hidden_size / num_attention_heads); that must be even, since "
            f"rotary positions turn pairs, and equal head_dim, if there is one"
        )
    return c


def qwen_fields(c: QwenConfig) -> dict:
    """What a config.json says of a language model: of experts, which no Qwen2 has, only where there are."""
    family = "qwen2" if c.qkv_bias else "llama"
    fields = {name: x for name, x in asdict(c).items() if name != "qkv_bias" and (name != "num_experts" or x)}
    return {"model_type": family} | fields


def siglip_config(config: dict, file: Path) -> SiglipConfig:
    """From a config.json, whole (`vision_config` inside) or the vision part alone."""
    config = section(config, "vision_config", file)
    if config.get("model_type") not in ("siglip_vision_model", "siglip"):
        raise BadInput(f"{file}: model_type {config.get('model_type')!r} is not a SigLIP vision model")
    activation = config.get("hidden_act", SiglipConfig.hidden_act)
    if activation != SiglipConfig.hidden_act:
        raise BadInput(f"{file}: hidden_act {activation!r} is not supported, only {SiglipConfig.hidden_act}")
    c = to_dataclass(SiglipConfig, config, file)
    if c.hidden_size % c.num_attention_heads:
        raise BadInput(f"{file}: {c.num_attention_heads} heads do not divide a width of {c.hidden_size}")
    if c.patch_size > c.image_size:
        raise BadInput(f"{file}: patch_size {c.patch_size} is larger than image_size {c.image_size}")
    return c


def rename_siglip(name: str) -> str | None:
    """A tensor's name in a plain SigLIP file -> its name in Siglip; None for what is left out on purpose."""
    name = name.removeprefix("vision_model.")
    return None if name.startswith(("head.", "text_model.", "logit_scale", "logit_bias")) else name


# ---------------------------------------------------------------- a multimodal model


@dataclass(frozen=True)
class VLMConfig:
    """SigLIP, an adapter, Qwen, and how they are put together."""

    vision: SiglipConfig
    text: QwenConfig
    vision_layer: int = -2  # which hidden state of the vision encoder is z
    drop_first_patch: bool = False  # released checkpoints: meant for a CLS token, which SigLIP does not have
    image_token_index: int = IMAGE_TOKEN  # accepted in input_ids beside IMAGE_TOKEN
    taf_width: int | None = None  # width of the fetched teacher adapter; None = an adapter of one's own
    taf_gelu: bool = False


# How a question is put to a model. "chat": data.encode's USER / ASSISTANT, in which we train. "chatml", that
# of llava-interleave-qwen, each turn followed by a line break:
#     <|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n
TEMPLATES = "chat", "chatml"
CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"


def template_of(folder: Path, tokenizer: Tokenizer) -> str:
    """Which template a checkpoint wants to be asked in.

    chatml for Hugging Face LLaVA's layout where the tokenizer has its tokens, unless tokenizer_config.json
    ends a text with <|endoftext|>, as Qwen1.5's base models and our exports do. Our own layout and the
    released one are chat: so were they trained.
    """
    if read_json(folder / "config.json").get("model_type") != "llava":
        return "chat"
    if None in (tokenizer.token_to_id(CHATML_START), tokenizer.token_to_id(CHATML_END)):
        return "chat"
    file = folder / "tokenizer_config.json"
    end = read_json(file).get("eos_token") if file.exists() else None
    end = end.get("content") if isinstance(end, dict) else end  # older files describe the token
    return "chat" if end == data.END_OF_TEXT else "chatml"


MODEL_TYPE = "nanocompodistill"
MULTIMODAL = MODEL_TYPE, "compodistill", "tinyllava", "llava"  # the model_types that are read

# How a tensor's name begins in a file -> how it begins in Adapter.
ADAPTER_LAYOUTS = {
    "connector._connector.0.": "linear_1.",
    "connector._connector.2.": "linear_2.",
    "multi_modal_projector.": "",
}
VISION_PREFIXES = ("vision_tower._vision_tower.", "vision_tower.")  # released, HF; then as in a plain SigLIP


def read_config(folder: Path) -> VLMConfig:
    """config.json in our own, the released or Hugging Face LLaVA's form -> VLMConfig."""
    file = folder / "config.json"
    config = read_json(file)
    kind = config.get("model_type")
    whole = {"text_config", "vision_config"} <= config.keys()
    if not whole or kind not in MULTIMODAL:
        raise BadInput(
            f"{file}: model_type {f'{kind!r}':.60} is no multimodal checkpoint ({', '.join(MULTIMODAL)}, "
            "with text_config and vision_config); plain: model.load_lm, model.load_vision"
        )
    vision, text = siglip_config(config, file), qwen_config(config, file)
    if value(config, "tie_word_embeddings", file):  # transformers 5 says it on top only
        own_head = any(name.endswith("lm_head.weight") for name in tensor_names(folder))
        text = replace(text, tie_word_embeddings=text.tie_word_embeddings or not own_head)
    check_only(config, file)
    layer, depth = value(config, "vision_feature_layer", file, -2), vision.num_hidden_layers
    if not -depth - 1 <= layer <= depth:
        raise BadInput(f"{file}: vision_feature_layer {layer} of an encoder with {depth} layers")
    taf = value(config, "post_connector_use", file, False)
    width = value(config, "connector_hidden_size", file)
    if taf and width is None:
        raise BadInput(
            f"{file}: post_connector_use without connector_hidden_size, the width of the teacher's adapter"
        )
    check_companions(folder, vision.image_size)
    return VLMConfig(
        vision,
        text,
        vision_layer=layer,
        drop_first_patch=SELECT[value(config, "vision_feature_select_strategy", file, "default")],
        image_token_index=value(config, "image_token_index", file, IMAGE_TOKEN),
        taf_width=width if taf else None,
        taf_gelu=value(config, "post_connector_gelu", file, False),
    )


def check_companions(folder: Path, side: int) -> None:
    """BadInput where files beside config.json want other pixels or tokens than data.py makes."""
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        file = folder / name
        config = read_json(file) if os.path.lexists(file) else {}
        config = section(config, "image_processor", file)  # where transformers 5 has it
        check_only(config, file)
        size = config.get("size")
        if size not in (None, side, {"height": side, "width": side}):
            raise BadInput(f"{file}: size {f'{size!r}':.60} is not the encoder's, {side} x {side}")


# Does the word drop the first patch? "patch" and "cls_patch" are the released code's, the others HF LLaVA's.
SELECT = {"patch": True, "default": True, "cls_patch": False, "full": False}


def rename_foreign(c: VLMConfig) -> Callable[[str], str | None]:
    """A function: a tensor's name in a released or HF LLaVA file -> its name in VLM.

    None for what is left out on purpose: SigLIP's pooling head and text tower, and a tied language model's
    copy of the embedding.
    """
    adapter = "adapter.teacher." if c.taf_width else "adapter."

    def rename(name: str) -> str | None:
        if name.startswith("language_model."):
            tied_copy = c.text.tie_word_embeddings and name.startswith("language_model.lm_head.")
            return None if tied_copy else "lm." + name.removeprefix("language_model.")
        if name.startswith("connector.post_connector."):
            return "adapter.student." + name.removeprefix("connector.post_connector.")
        for theirs, ours in ADAPTER_LAYOUTS.items():
            if name.startswith(theirs):
                return adapter + ours + name.removeprefix(theirs)
        for prefix in VISION_PREFIXES:
            if name.startswith(prefix):
                inner = rename_siglip(name.removeprefix(prefix))
                return inner and "vision." + inner
        return name  # unknown: the strict load names it

    return rename
