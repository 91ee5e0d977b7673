"""How a multimodal model lies in a folder: config.json, names of tensors, and the small files beside them.

    native     our own
    released   CompoDistill's and TinyLLaVA's
    hf         Hugging Face LLaVA's: read in its forms of 2024 and of transformers 5, written in that of 2024

Inside: VLMConfig and read_config; rename_foreign, the names that we read; written, all that we write; and
template_of, how a checkpoint wants to be asked.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

import data
from checkpoint import BadInput, read_json, tensor_names
from data import IMAGE_TOKEN
from qwen import QwenConfig
from siglip import SiglipConfig
from siglip import rename as rename_siglip


@dataclass(frozen=True)
class VLMConfig:
    vision: SiglipConfig
    text: QwenConfig
    vision_layer: int = -2  # which hidden state of the vision encoder is z
    drop_first_patch: bool = (
        False  # True in released checkpoints: meant for a CLS token, which SigLIP does not have
    )
    image_token_index: int = IMAGE_TOKEN  # accepted in input_ids beside IMAGE_TOKEN
    taf_width: int | None = None  # width of the fetched teacher adapter; None = an adapter of one's own
    taf_gelu: bool = False


# How a question is put to a model. "chat": data.encode's USER / ASSISTANT, in which we train. "chatml", that
# of llava-interleave-qwen, each turn followed by a line break:
#     <|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n
TEMPLATES = "chat", "chatml"
CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"


def template_of(folder: Path, tokenizer: Tokenizer) -> str:
    """chatml for a checkpoint in Hugging Face LLaVA's layout whose tokenizer has its tokens, unless its
    tokenizer_config.json ends a text with <|endoftext|>, as Qwen1.5's base models and our exports do. Our own
    layout and the released one are chat: so were they trained.
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

# Reading. How a tensor's name begins in a file -> how it begins in Adapter.
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
    if (
        kind not in (MODEL_TYPE, "compodistill", "llava")
        or not {"text_config", "vision_config"} <= config.keys()
    ):
        raise BadInput(
            f"{file}: model_type {kind!r} is no multimodal checkpoint (nanocompodistill, compodistill or "
            "llava, with text_config and vision_config); plain: qwen.Qwen.load, siglip.Siglip.load"
        )
    base = VLMConfig(vision=SiglipConfig.from_hf(config, file), text=QwenConfig.from_hf(config, file))
    if config.get("tie_word_embeddings") and not any(
        n.endswith("lm_head.weight") for n in tensor_names(folder)
    ):
        # transformers 5 says it on top only
        base = replace(base, text=replace(base.text, tie_word_embeddings=True))
    select, layer = (
        config.get("vision_feature_select_strategy", "default"),
        config.get("vision_feature_layer", -2),
    )
    depth = base.vision.num_hidden_layers
    if not isinstance(select, str) or select not in SELECT or layer not in range(-depth - 1, depth + 1):
        raise BadInput(
            f"{file}: vision_feature_select_strategy {select!r} with layer {layer!r} is not supported"
        )
    if (
        config.get("multimodal_projector_bias") is False
        or config.get("connector_type", "mlp2x_gelu") != "mlp2x_gelu"
    ):
        raise BadInput(f"{file}: only the two-layer adapter with biases (mlp2x_gelu) is supported")
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise BadInput(
            f"{file}: projector_hidden_act {config['projector_hidden_act']!r} is not supported, only gelu"
        )
    taf = config.get("post_connector_use", False)
    if taf and not isinstance(config.get("connector_hidden_size"), int):
        raise BadInput(
            f"{file}: post_connector_use without connector_hidden_size, the width of the teacher's adapter"
        )
    return replace(
        base,
        vision_layer=layer,
        drop_first_patch=SELECT[select],
        image_token_index=config.get("image_token_index", IMAGE_TOKEN),
        taf_width=config["connector_hidden_size"] if taf else None,
        taf_gelu=config.get("post_connector_gelu", False),
    )


# Does the word drop the first patch? "patch" and "cls_patch" are the released code's, the others HF LLaVA's.
SELECT = {"patch": True, "default": True, "cls_patch": False, "full": False}


def rename_foreign(c: VLMConfig):
    """-> rename(name in a released or HF LLaVA file) -> name in VLM, or None for what is dropped on purpose:
    SigLIP's pooling head and text tower, and a tied language model's copy of the embedding.
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


# Writing. How a tensor's name begins in VLM -> how it begins in a file; with TAF, P_t is adapter.teacher.
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
    """A VLM's state dict -> tensors, config and small files, as checkpoint.write_folder takes them."""
    if layout not in NAMES:
        raise BadInput(f"layout {layout!r} is not known; choose {', '.join(NAMES)}")
    if layout == "released" and c.taf_gelu:
        raise BadInput("the released layout has no field for the GELU before P_s; save as native")
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
    text = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
    return {
        "text_config": text | asdict(c.text),
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
    """-> config, tokenizer, tensors with `<image>` as a word of the vocabulary: transformers embeds every id
    before it writes the visual tokens, and cannot look up our IMAGE_TOKEN, -200.

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


# data.SYSTEM and data.pieces as transformers' chat template: the picture is at the front of its question.
CHAT_TEMPLATE = (
    "{{ " + json.dumps(data.SYSTEM) + " }}{% for turn in messages %}"
    "{% set text = (turn.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join) %}"
    "{% if turn.role == 'assistant' %}ASSISTANT: {{ text | trim }}<|endoftext|>{% else %}USER: "
    "{% for part in turn.content if part.type == 'image' %}<image>{{ '\\n' }}{% endfor %}{{ text | trim }} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _companions(layout: str, c: VLMConfig, tokenizer: Tokenizer | None) -> dict[str, str]:
    """The small files beside config.json: {name: text}. In the layouts of others they let transformers
    prepare pictures as data.preprocess does, and texts as data.encode_prompt does.
    """
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
