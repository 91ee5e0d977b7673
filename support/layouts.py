"""How models lie in a folder, for reading: config.json, and the names of tensors. exports.py writes.

    native     our own
    released   CompoDistill's and TinyLLaVA's
    hf         Hugging Face LLaVA's, in its forms of 2024 and of transformers 5
    plain      a SigLIP or a Qwen alone, as Hugging Face has them

What a network cannot do (sliding windows, another activation) is refused here, where its config is read.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tokenizers import Tokenizer

import data
from data import IMAGE_TOKEN
from qwen import QwenConfig
from siglip import SiglipConfig
from support.checkpoint import read_json, tensor_names
from support.errors import BadInput

# ---------------------------------------------------------------- config.json of the two networks


def section(config: dict, name: str, file: Path) -> dict:
    """config[name], or config itself where there is no such part."""
    part = config.get(name, config)
    if not isinstance(part, dict):
        raise BadInput(f"{file}: {name} is {part!r}, not a JSON object; fetch or write it again")
    return part


def to_dataclass(cls: type, config: dict, file: Path):
    """The fields of dataclass `cls` that config.json gives, type-checked; the others keep their defaults."""
    values = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
    for field in fields(cls):
        value, kind = values.get(field.name, field.default), field.type
        right = isinstance(value, (int, float) if kind is float else kind)
        right = right and isinstance(value, bool) == (kind is bool)  # in Python True is an int, too
        if not right or (kind is int and value < 1):
            what = "a positive whole number" if kind is int else f"a {kind.__name__}"
            raise BadInput(f"{file}: {field.name} is {value!r}, not {what}; fetch or write it again")
    return cls(**values)


def qwen_config(config: dict, file: Path) -> QwenConfig:
    """From a config.json of transformers 4 or 5, whole (`text_config` inside) or the language part alone."""
    config = section(config, "text_config", file)
    if config.get("model_type") != "qwen2":
        raise BadInput(f"{file}: model_type {config.get('model_type')!r} is not qwen2, the family of Qwen1.5")
    # transformers 5 writes rope_theta into rope_parameters, 4.x beside it
    rope = section({"rope_parameters": config.get("rope_parameters") or {}}, "rope_parameters", file)
    scaling = section({"rope_scaling": config.get("rope_scaling") or rope}, "rope_scaling", file)
    scaled = scaling.get("rope_type", scaling.get("type", "default")) != "default"
    if config.get("use_sliding_window") or scaled or config.get("hidden_act", "silu") != "silu":
        raise BadInput(
            f"{file}: sliding windows, rope scaling and activations other than silu are not supported"
        )
    c = to_dataclass(QwenConfig, {"rope_theta": rope.get("rope_theta"), **config}, file)
    if c.hidden_size % c.num_attention_heads or c.num_attention_heads % c.num_key_value_heads:
        raise BadInput(
            f"{file}: width {c.hidden_size}, {c.num_attention_heads} heads and {c.num_key_value_heads} "
            "key heads do not divide one another"
        )
    return c


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
    if not whole or kind not in (MODEL_TYPE, "compodistill", "llava"):
        raise BadInput(
            f"{file}: model_type {kind!r} is no multimodal checkpoint (nanocompodistill, compodistill or "
            "llava, with text_config and vision_config); plain: model.load_lm, model.load_vision"
        )
    vision, text = siglip_config(config, file), qwen_config(config, file)
    if config.get("tie_word_embeddings"):  # transformers 5 says it on top only
        own_head = any(name.endswith("lm_head.weight") for name in tensor_names(folder))
        text = replace(text, tie_word_embeddings=text.tie_word_embeddings or not own_head)
    select = config.get("vision_feature_select_strategy", "default")
    layer = config.get("vision_feature_layer", -2)
    depth = vision.num_hidden_layers
    if not isinstance(select, str) or select not in SELECT or layer not in range(-depth - 1, depth + 1):
        raise BadInput(
            f"{file}: vision_feature_select_strategy {select!r} with layer {layer!r} is not supported"
        )
    connector = config.get("connector_type", "mlp2x_gelu")
    if connector != "mlp2x_gelu" or config.get("multimodal_projector_bias") is False:
        raise BadInput(f"{file}: only the two-layer adapter with biases (mlp2x_gelu) is supported")
    activation = config.get("projector_hidden_act", "gelu")
    if activation != "gelu":
        raise BadInput(f"{file}: projector_hidden_act {activation!r} is not supported, only gelu")
    taf = config.get("post_connector_use", False)
    if taf and not isinstance(config.get("connector_hidden_size"), int):
        raise BadInput(
            f"{file}: post_connector_use without connector_hidden_size, the width of the teacher's adapter"
        )
    return VLMConfig(
        vision,
        text,
        vision_layer=layer,
        drop_first_patch=SELECT[select],
        image_token_index=config.get("image_token_index", IMAGE_TOKEN),
        taf_width=config["connector_hidden_size"] if taf else None,
        taf_gelu=config.get("post_connector_gelu", False),
    )


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
