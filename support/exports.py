"""How a model is written: in our own layout, the released one (CompoDistill's, TinyLLaVA's), or HF LLaVA's.

Hugging Face LLaVA's is written with the names of 2024, which transformers of then, 4.52 and 5 all read.
Beside config.json and the tensors lie small files, with which transformers prepares pictures as
data.preprocess does, and texts as data.encode_prompt does.
"""

import json
from dataclasses import asdict, replace

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

import data
from support.errors import BadInput
from support.layouts import MODEL_TYPE, VLMConfig, qwen_fields

# How a tensor's name begins in VLM -> how it begins in a file. With TAF (teacher adapter fetch) P_t, the
# teacher's adapter, is adapter.teacher.
NAMES = {
    "native": {"": ""},
    "released": {
        "lm.": "language_model.",
        "vision.": "vision_tower._vision_tower.vision_model.",
        "adapter.linear_1.": "connector._connector.0.",
        "adapter.linear_2.": "connector._connector.2.",
        "adapter.teacher.linear_1.": "connector._connector.0.",
        "adapter.teacher.linear_2.": "connector._connector.2.",
        "adapter.student.": "connector.post_connector.",
    },
    "hf": {  # the names of 2024, which transformers of then, 4.52 and 5 all read
        "lm.": "language_model.",
        "vision.": "vision_tower.vision_model.",
        "adapter.": "multi_modal_projector.",
    },
}


def written(
    layout: str,
    c: VLMConfig,
    tokenizer: Tokenizer | None,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], dict, dict[str, str]]:
    """What write_folder writes: a VLM's state dict -> tensors, config.json, {name: text} of small files."""
    if layout not in NAMES:
        raise BadInput(f"layout {layout!r} is not known; choose {', '.join(NAMES)}")
    if layout == "released" and c.taf_gelu:
        raise BadInput("the released layout has no field for the GELU before P_s; save as native")
    if layout != "native" and c.text.num_experts:
        raise BadInput(f"the {layout} layout has no place for experts; save as native")
    if layout == "hf" and c.taf_width:
        raise BadInput(
            "a model with TAF does not fit Hugging Face LLaVA, whose adapter has no P_s and the language "
            "model's width; save as released or native"
        )
    lm_dtype = dtype or tensors["lm.model.norm.weight"].dtype
    if layout == "hf":
        c, tokenizer, tensors = _with_image_word(c, tokenizer, tensors)
    config = CONFIGS[layout](c) | {"torch_dtype": str(lm_dtype).removeprefix("torch.")}
    tensors = {_name(name, layout): x.to(dtype or x.dtype) for name, x in tensors.items()}
    return tensors, config, _companions(layout, c, tokenizer)


def _name(name: str, layout: str) -> str:
    return next(t + name.removeprefix(o) for o, t in NAMES[layout].items() if name.startswith(o))


def _parts_config(c: VLMConfig) -> dict:
    """What every layout says in the same words."""
    text = {"architectures": ["LlamaForCausalLM"]}
    if c.text.qkv_bias:
        text = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
    return {
        "text_config": text | qwen_fields(c.text),
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False} | asdict(c.vision),
        "tie_word_embeddings": c.text.tie_word_embeddings,
        "vision_feature_layer": c.vision_layer,
        "image_token_index": c.image_token_index,
    }


def _released_config(c: VLMConfig) -> dict:
    return _parts_config(c) | {
        "architectures": ["CompoDistillForConditionalGeneration"],
        "model_type": "compodistill",
        "hidden_size": c.text.hidden_size,
        "vocab_size": c.text.vocab_size,
        "vision_hidden_size": c.vision.hidden_size,
        "connector_type": "mlp2x_gelu",
        "connector_hidden_size": c.taf_width or c.text.hidden_size,
        "post_connector_use": c.taf_width is not None,
        "vision_feature_select_strategy": "patch" if c.drop_first_patch else "cls_patch",
        "image_aspect_ratio": "square",
        "ignore_index": data.IGNORE,
        "tokenizer_padding_side": "right",
    }


def _native_config(c: VLMConfig) -> dict:
    """Our own config.json: the released fields, under our model_type, plus what those cannot say."""
    config = _released_config(c) | {"model_type": MODEL_TYPE, "post_connector_gelu": c.taf_gelu}
    del config["architectures"]
    return config


def _hf_config(c: VLMConfig) -> dict:
    return _parts_config(c) | {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_feature_select_strategy": "default" if c.drop_first_patch else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "image_seq_length": c.vision.num_patches - c.drop_first_patch,
    }


CONFIGS = {"native": _native_config, "released": _released_config, "hf": _hf_config}


def _with_image_word(c: VLMConfig, tokenizer: Tokenizer, tensors: dict[str, Tensor]):
    """Config, tokenizer and tensors with `<image>` as a word of the vocabulary.

    transformers embeds every id before it writes the visual tokens, and cannot look up our IMAGE_TOKEN, -200.

    Where the matrices (V,C) have no row for the word, they get their mean row: its logit is the mean of the
    others, never the greatest. A row of zeros would win wherever all others are negative.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy
    tokenizer.add_special_tokens([data.IMAGE_MARK])
    word = tokenizer.token_to_id(data.IMAGE_MARK)
    if (lacking := word + 1 - c.text.vocab_size) > 0:
        for name in tensors.keys() & {"lm.model.embed_tokens.weight", "lm.lm_head.weight"}:
            mean = tensors[name].mean(0, keepdim=True, dtype=torch.float32).to(tensors[name])
            tensors[name] = torch.cat([tensors[name], mean.expand(lacking, -1)])
        c = replace(c, text=replace(c.text, vocab_size=word + 1))
    return replace(c, image_token_index=word), tokenizer, tensors


# data.SYSTEM and data.pieces as transformers' chat template: the picture is at the front of its question. As
# in other chat models' templates contents are texts or lists of parts, and a system's turn replaces SYSTEM.
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ " + json.dumps(data.SYSTEM) + " }}{% endif %}"
    "{% for turn in messages %}{% set plain = turn.content is string %}"
    "{% set parts = [] if plain else turn.content %}"
    "{% for part in parts if part.type != 'text' and (part.type != 'image' or turn.role != 'user') %}"
    "{{ raise_exception('a content is texts and, of a user, images') }}{% endfor %}"
    "{% set text = (turn.content if plain else "
    "parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join) | trim %}"
    "{% if turn.role == 'assistant' %}ASSISTANT: {{ text }}<|endoftext|>"
    "{% elif turn.role == 'user' %}USER: "
    "{% for part in parts if part.type == 'image' %}<image>{{ '\\n' }}{% endfor %}{{ text }} "
    "{% elif turn.role == 'system' and loop.first %}{{ text }} "
    "{% else %}{{ raise_exception('turns are user and assistant; one of system may stand first') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _companions(layout: str, c: VLMConfig, tokenizer: Tokenizer | None) -> dict[str, str]:
    """The small files beside config.json: {name: text}."""
    files = {} if tokenizer is None else {"tokenizer.json": tokenizer.to_str(pretty=True)}
    if layout == "native":
        return files
    side, hf = c.vision.image_size, layout == "hf"
    jsons = {
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": Image.Resampling.BICUBIC,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
    }
    if tokenizer is not None:
        jsons["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it stands
            "model_input_names": ["input_ids", "attention_mask"],
            "eos_token": data.END_OF_TEXT,
            "pad_token": data.END_OF_TEXT,
            "padding_side": "left" if hf else "right",  # left: to generate in batches
            "clean_up_tokenization_spaces": False,
            "model_max_length": c.text.max_position_embeddings,
        }
    if hf:
        end = tokenizer.token_to_id(data.END_OF_TEXT)
        jsons["generation_config.json"] = {"eos_token_id": end, "pad_token_id": end}
        jsons["processor_config.json"] = {
            "processor_class": "LlavaProcessor",
            "patch_size": c.vision.patch_size,
            "num_additional_image_tokens": 0,  # SigLIP has no CLS token
            "vision_feature_select_strategy": _hf_config(c)["vision_feature_select_strategy"],
        }
        files["chat_template.jinja"] = CHAT_TEMPLATE
    return files | {name: json.dumps(content, indent=1) + "\n" for name, content in jsons.items()}
