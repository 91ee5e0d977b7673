"""The multimodal model: SigLIP -> adapter -> Qwen1.5, and its checkpoints.

    picture (N,3,S,S) -> vision features z (N,P,C_vision) -> adapter -> visual tokens (N,P,C)
    ids (B,T), P placeholders where a picture stands -> embeddings (B,T,C), visual tokens written in -> Qwen

The alphabet of shapes, used in every file: B batch, T tokens, N pictures, P visual tokens of a picture, H
heads, D head dim, C width, V vocabulary, S side of the picture in pixels (in qwen.py also key tokens).

Inside: VLM (forward, generate, answer, save), load, and the file layouts: our own, the released CompoDistill
/ TinyLLaVA layout, and Hugging Face LLaVA's, which is read in its forms of 2024 and of transformers 5 and
written in that of 2024. As a program it converts: python model.py FOLDER --out OUT --layout hf
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

import data
from checkpoint import BadInput, find, load_weights, read_json, sentence, tensor_names, write_folder
from data import IMAGE_TOKEN
from distill import TeacherAdapterFetch
from qwen import Cache, Look, Output, Qwen, QwenConfig
from siglip import Siglip, SiglipConfig
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


class Adapter(nn.Module):
    """The two-layer adapter ("mlp2x_gelu"): Linear, GELU (erf), Linear. z (N,P,C_vision) -> (N,P,C)."""

    def __init__(self, vision_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(z.to(self.linear_1.weight.dtype))))


class VLM(nn.Module):
    """vlm(input_ids (B,T), pixel_values (N,3,S,S)) -> Output(logits (B,T,V), attentions)."""

    def __init__(self, config: VLMConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        c, self.config, self.tokenizer = config, config, tokenizer
        self.vision = Siglip(c.vision)
        self.adapter = Adapter(c.vision.hidden_size, c.taf_width or c.text.hidden_size)
        if c.taf_width:
            self.adapter = TeacherAdapterFetch(self.adapter, c.taf_width, c.text.hidden_size, c.taf_gelu)
        self.lm = Qwen(c.text)

    @classmethod
    def assemble(
        cls, vision: Siglip, lm: Qwen, tokenizer: Tokenizer, teacher: "VLM | None" = None, taf: bool = False
    ) -> "VLM":
        """A model of given parts and a new, random adapter: its own or, with `taf`, the teacher's plus P_s.
        With a teacher it reads the same visual tokens (layer, first patch) as the teacher does.
        """
        base = VLMConfig(vision.config, lm.config) if teacher is None else teacher.config
        width = teacher.config.text.hidden_size if taf else None
        config = replace(base, vision=vision.config, text=lm.config, taf_width=width, taf_gelu=False)
        config = replace(
            config, image_token_index=IMAGE_TOKEN
        )  # the teacher's may be a word of this vocabulary
        with torch.device("meta"):
            vlm = cls(config, tokenizer)
        vlm.vision, vlm.lm = vision, lm
        if taf:
            vlm.adapter = TeacherAdapterFetch(teacher.adapter, width, lm.config.hidden_size)
        else:
            vlm.adapter = Adapter(vision.config.hidden_size, lm.config.hidden_size)
        (vlm.adapter.student if taf else vlm.adapter).to(lm.model.norm.weight)  # its device and dtype
        return vlm

    def require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise BadInput("a checkpoint has no tokenizer.json; copy its language model's beside config.json")
        return self.tokenizer

    @property
    def num_image_tokens(self) -> int:
        return self.config.vision.num_patches - self.config.drop_first_patch

    @property
    def device(self) -> torch.device:
        return self.lm.model.norm.weight.device

    def image_features(self, pixel_values: Tensor | None) -> Tensor:
        """pixel_values (N,3,S,S), or None where N = 0 -> z (N,P,C_vision), what the adapter reads, in the
        dtype of the vision encoder: frozen parts may be bfloat16 beside a language model in float32.
        """
        weight = self.vision.post_layernorm.weight
        if pixel_values is None:
            return weight.new_zeros(0, self.num_image_tokens, self.config.vision.hidden_size)
        z = self.vision(pixel_values.to(weight.dtype), layer=self.config.vision_layer)
        return z[:, 1:] if self.config.drop_first_patch else z

    def forward(self, *args, **kwargs) -> Output:
        """What `hidden` takes -> logits (B,T,V) and attentions."""
        hidden, attentions = self.hidden(*args, **kwargs)
        return Output(self.lm.head(hidden), attentions)

    def hidden(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_layers: Sequence[int] = (),
        look: Look | None = None,
        visual_tokens: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor] | list[Tensor]]:
        """input_ids (B,T) with P placeholders per picture, in the order of pixel_values (N,3,S,S) -> final
        hidden states (B,T,C), attentions.

        attention_layers: whose attention to return whole (B,H,T,T); look: maps of some rows and columns, as
        means (B,R,P). visual_tokens (N,P,C), the adapter's output, stand in for pixel_values.
        """
        embeds = self.embed(input_ids, pixel_values, visual_tokens)
        return self.lm.hidden(None, attention_mask, attention_layers, look, inputs_embeds=embeds)

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, visual_tokens: Tensor | None = None
    ) -> Tensor:
        """-> (B,T,C): token embeddings, with the visual tokens written into the placeholders. The length
        never changes.
        """
        if visual_tokens is None and pixel_values is not None:
            visual_tokens = self.adapter(self.image_features(pixel_values))
        placeholder = (input_ids == IMAGE_TOKEN) | (input_ids == self.config.image_token_index)
        N, P = (0, self.num_image_tokens) if visual_tokens is None else visual_tokens.shape[:2]
        per_row = placeholder.sum(1)
        if (
            P != self.num_image_tokens
            or per_row.sum() != N * P
            or bool(((per_row != 0) & (per_row != P)).any())
        ):
            raise ValueError(
                f"the rows have {per_row.tolist()} image placeholders, but {N} pictures of {P} visual "
                f"tokens each were given, and this model has {self.num_image_tokens} a picture"
            )
        embeds = self.lm.model.embed_tokens(input_ids.masked_fill(placeholder, 0))
        if visual_tokens is not None:
            embeds = embeds.masked_scatter(placeholder[..., None], visual_tokens.to(embeds.dtype))
        return embeds

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        stop_ids: Sequence[int] | None = None,
    ) -> Tensor:
        """-> (B, new) ids: the prompt's continuation, greedy at temperature 0, sampled above it.

        A row ends with any of `stop_ids` (default: the tokenizer's end of text) and is filled up with the
        first of them. Rows of unequal length, padded on either side, give the same tokens as alone.
        """
        if stop_ids is None:
            stop_ids = [] if self.tokenizer is None else [self.tokenizer.token_to_id(data.END_OF_TEXT)]
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=input_ids.device)
        mask = (
            torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        )
        last = mask.long().cumsum(1).argmax(1)  # each row's last real token
        rows = torch.arange(len(last), device=last.device)
        cache, new = Cache(len(self.lm.model.layers)), []
        embeds = self.embed(input_ids, pixel_values)
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            hidden, _ = self.lm.hidden(attention_mask=mask, inputs_embeds=embeds, cache=cache)
            logits = self.lm.head(hidden[rows, last]).float()  # (B,V), read at one position a row
            token = logits.argmax(-1) if temperature == 0 else _sample(logits / temperature)
            if len(stops):
                token = torch.where(done, stops[0], token)
                done = done | torch.isin(token, stops)
            new.append(token)
            if bool(done.all()):
                break
            embeds = self.lm.model.embed_tokens(token[:, None])
            mask, last = torch.ones_like(token[:, None], dtype=torch.bool), torch.zeros_like(token)
        return torch.stack(new, 1) if new else input_ids[:, :0]

    def answer(self, image: Image.Image | str | Path | None, question: str, max_new_tokens: int = 128) -> str:
        """One question, about one picture or none, answered greedily."""
        tokenizer, mark = self.require_tokenizer(), "" if image is None else data.IMAGE_MARK + "\n"
        turn = {"from": "human", "value": mark + question}
        ids = torch.tensor([data.encode_prompt([turn], tokenizer, self.num_image_tokens)], device=self.device)
        pixels = None
        if image is not None:
            pixels = data.preprocess(image, self.config.vision.image_size)[None].to(self.device)
        new = self.generate(ids, pixels, max_new_tokens=max_new_tokens)[0].tolist()
        return tokenizer.decode(new, skip_special_tokens=True).strip()

    def save(self, folder: str | Path, layout: str = "native", dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder, whole or not at all, in `dtype` (None: each tensor as it is in memory).

        layout: native (ours), released (CompoDistill / TinyLLaVA) or hf (Hugging Face LLaVA; not with TAF).
        """
        c, tokenizer, tensors = self.config, self.tokenizer, self.state_dict()
        if layout not in NAMES:
            raise BadInput(f"layout {layout!r} is not known; choose {', '.join(NAMES)}")
        if layout == "released" and c.taf_gelu:
            raise BadInput(f"{folder}: the released layout has no field for P_s's GELU; save as native")
        if layout == "hf" and c.taf_width:
            raise BadInput(
                f"{folder}: a model with TAF does not fit Hugging Face LLaVA, whose adapter has no P_s and "
                "the language model's width; save as released or native"
            )
        if layout == "hf":
            c, tokenizer, tensors = _with_image_word(c, self.require_tokenizer(), tensors)
        tensors = {_written(name, layout): x.to(dtype or x.dtype) for name, x in tensors.items()}
        lm_dtype = dtype or self.lm.model.norm.weight.dtype
        config = CONFIGS[layout](c) | {"torch_dtype": str(lm_dtype).removeprefix("torch.")}
        write_folder(folder, tensors, config, _companions(layout, c, tokenizer))


def _sample(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


# ---------------------------------------------------------------- checkpoints

MODEL_TYPE = "nanocompodistill"

# Reading. How a tensor's name begins in a file -> how it begins in Adapter.
ADAPTER_LAYOUTS = {
    "connector._connector.0.": "linear_1.",
    "connector._connector.2.": "linear_2.",
    "multi_modal_projector.": "",
}
VISION_PREFIXES = (
    "vision_tower._vision_tower.",
    "vision_tower.",
)  # released, HF; then as in a plain SigLIP file


def load(path_or_hub_name: str | Path, dtype: torch.dtype | None = torch.float32, device: str = "cpu") -> VLM:
    """A multimodal checkpoint in any layout that we know, from a folder or the hub, in eval mode.

    dtype: of all tensors; None leaves each as it is in the file.
    """
    folder = find(path_or_hub_name)
    file = folder / "config.json"
    config = read_config(folder)
    with torch.device("meta"):
        vlm = VLM(config)
    native = read_json(file).get("model_type") == MODEL_TYPE
    load_weights(vlm, folder, (lambda name: name) if native else _from_foreign(config), dtype, device)
    vlm.tokenizer = data.load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    return vlm.eval()


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
        base = replace(
            base, text=replace(base.text, tie_word_embeddings=True)
        )  # transformers 5 says it on top only
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


def _from_foreign(c: VLMConfig):
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


def _written(name: str, layout: str) -> str:
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


# ---------------------------------------------------------------- python model.py


def main(argv: list[str] | None = None) -> None:
    """Convert a checkpoint from any layout that we read into one that we write."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    given = parser.add_argument_group("what is read")
    given.add_argument("folder", help="a multimodal checkpoint: a folder or a hub name, owner/name")
    wanted = parser.add_argument_group("what is written")
    wanted.add_argument("--out", required=True, help="a new folder, which appears whole or not at all")
    wanted.add_argument(
        "--layout", required=True, choices=NAMES, help="ours, CompoDistill's or Hugging Face LLaVA's (no TAF)"
    )
    wanted.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: each tensor as it is read")
    args = parser.parse_args(argv)
    try:
        vlm = load(args.folder, dtype=args.dtype and getattr(torch, args.dtype))
        vlm.save(args.out, args.layout)
        files = sorted(Path(args.out).iterdir())
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {sentence(error)}")
    print(f"{args.out}, layout {args.layout}:")
    print("\n".join(f"{file.stat().st_size / 1e6:12.3f} MB  {file.name}" for file in files))


if __name__ == "__main__":
    main()
