"""The multimodal model: SigLIP -> adapter -> Qwen1.5, and its checkpoints.

    picture (N,3,S,S) -> vision features z (N,P,C_vision) -> adapter -> visual tokens (N,P,C)
    ids (B,T), P placeholders where a picture stands -> embeddings (B,T,C), visual tokens written in -> Qwen

The alphabet of shapes, used in every file: B batch, T tokens, N pictures, P visual tokens of a picture, H
heads, D head dim, C width, V vocabulary, S side of the picture in pixels (in qwen.py and lean.py key tokens).

Inside: VLM, the vision-language model (forward, stream, generate, answer, save), and load. How a model lies
in a folder, in our layout and in those of others, is in support/layouts.py and exports.py. As a program it
converts: python model.py FOLDER --out OUT --layout hf
"""

import argparse
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported: no traceback

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

import data
from data import IMAGE_TOKEN
from distill import TeacherAdapterFetch
from qwen import AttentionFunction, Cache, Output, Qwen
from siglip import Siglip
from support import exports, layouts
from support.checkpoint import find, load_weights, write_folder
from support.errors import BadInput, one_line
from support.files import read_json
from support.layouts import VLMConfig
from support.program import one_sentence, parse


class Adapter(nn.Module):
    """The two-layer adapter ("mlp2x_gelu"): Linear, GELU (erf), Linear. z (N,P,C_vision) -> (N,P,C)."""

    def __init__(self, vision_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(z.to(self.linear_1.weight.dtype))))


class VLM(nn.Module):
    """The vision-language model: vlm(input_ids (B,T), pixel_values (N,3,S,S)) -> Output."""

    def __init__(self, config: VLMConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        c, self.config, self.tokenizer = config, config, tokenizer
        self.name = "the model"  # for sentences about it: the folder that it was loaded from
        self.template = "chat"  # how a question is put to it: one of layouts.TEMPLATES
        self.vision = Siglip(c.vision)
        self.adapter = Adapter(c.vision.hidden_size, c.taf_width or c.text.hidden_size)
        if c.taf_width:  # what was made is P_t, the teacher's; P_s comes after it
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
        # the teacher's image_token_index may be a word of this vocabulary
        parts = dict(vision=vision.config, text=lm.config, image_token_index=IMAGE_TOKEN)
        config = replace(base, **parts, taf_width=width, taf_gelu=False)
        with torch.device("meta"):  # no memory for weights that the next lines replace
            vlm = cls(config, tokenizer)
        vlm.vision, vlm.lm = vision, lm
        if taf:
            vlm.adapter = TeacherAdapterFetch(teacher.adapter, width, lm.config.hidden_size)
        else:
            vlm.adapter = Adapter(vision.config.hidden_size, lm.config.hidden_size)
        (vlm.adapter.student if taf else vlm.adapter).to(lm.model.norm.weight)  # its device and dtype
        return vlm

    def special(self, word: str) -> int:
        """The id of a special token."""
        token = self.require_tokenizer().token_to_id(word)
        if token is None:
            raise BadInput(
                f"the checkpoint's tokenizer.json has no token {word}, which the template {self.template} is "
                "made of; choose another template"
            )
        return token

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer, first the one that does in this model's template."""
        end = self.special(data.END_OF_TEXT)
        return [end] if self.template == "chat" else [self.special(layouts.CHATML_END), end]

    def question_ids(self, question: str, picture: bool, first: bool = True) -> list[int]:
        """A question -> ids up to where its answer begins, in this model's template.

        picture: P placeholders stand before the question. Unless it is the conversation's first, the ids
        begin with what ends the answer before.
        """
        if data.IMAGE_MARK in question:
            raise BadInput(f"{data.IMAGE_MARK} stands in a question; say it without, the picture goes before")
        ids = self._question_ids(question.strip(), picture, first)
        self.check_length(len(ids), f"the question {f'{question!r}':.60}")
        return ids

    def check_length(self, tokens: int, what: str) -> None:
        """BadInput where the model cannot hold so many tokens and one more, which is written."""
        most = self.config.text.max_position_embeddings
        if tokens >= most:
            raise BadInput(
                f"{what} has {tokens} tokens with what stands before it, and {self.name} holds {most} "
                "(max_position_embeddings); ask less or begin anew"
            )

    def _question_ids(self, question: str, picture: bool, first: bool) -> list[int]:
        tokenizer, P = self.require_tokenizer(), self.num_image_tokens
        if self.template == "chat":  # the one we train in: data.encode_prompt writes it
            turn = {"from": "human", "value": f"{data.IMAGE_MARK}\n{question}" if picture else question}
            # a later turn follows an empty one, of which only its end of text is kept
            before = [] if first else [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}]
            ids = data.encode_prompt([*before, turn], tokenizer, P)
            return ids if first else ids[ids.index(self.special(data.END_OF_TEXT)) :]

        encode = partial(data.text_ids, tokenizer)
        start, end = self.special(layouts.CHATML_START), self.special(layouts.CHATML_END)
        newline = encode("\n")
        asked = encode(f"user\n{question}")
        if picture:
            asked = encode("user\n") + [IMAGE_TOKEN] * P + encode(f"\n{question}")
        before = [] if first else [end, *newline]
        return [*before, start, *asked, end, *newline, start, *encode("assistant\n")]

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer, or one sentence where the checkpoint had none."""
        if self.tokenizer is None:
            raise BadInput("there is no tokenizer.json; copy that of its language model beside config.json")
        return self.tokenizer

    @property
    def num_image_tokens(self) -> int:
        """P, the visual tokens of a picture."""
        return self.config.vision.num_patches - self.config.drop_first_patch

    @property
    def device(self) -> torch.device:
        return self.lm.model.norm.weight.device

    def image_features(self, pixel_values: Tensor | None) -> Tensor:
        """What the adapter reads: pixel_values (N,3,S,S), or None where N = 0 -> z (N,P,C_vision).

        In the dtype of the vision encoder: frozen parts may be bfloat16 beside a language model in float32.
        """
        weight = self.vision.post_layernorm.weight
        if pixel_values is None:
            return weight.new_zeros(0, self.num_image_tokens, self.config.vision.hidden_size)
        z = self.vision(pixel_values.to(weight.dtype), layer=self.config.vision_layer).features
        # released checkpoints lose a patch: their code was made for encoders with a CLS token
        return z[:, 1:] if self.config.drop_first_patch else z

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention: Mapping[int, AttentionFunction] | None = None,
        logits: bool = True,
    ) -> Output:
        """input_ids (B,T) with P placeholders per picture, in the order of pixel_values (N,3,S,S) -> Output.

        attention_mask, attention (of which layers to return it, and how) and logits are Qwen.forward's.
        """
        embeds = self.embed(input_ids, pixel_values)
        return self.lm(None, attention_mask, attention, inputs_embeds=embeds, logits=logits)

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, visual_tokens: Tensor | None = None
    ) -> Tensor:
        """Token embeddings (B,T,C), with the visual tokens written into the placeholders: the length stays.

        visual_tokens (N,P,C), the adapter's output, may stand in for pixel_values.
        """
        if visual_tokens is None and pixel_values is not None:
            visual_tokens = self.adapter(self.image_features(pixel_values))
        self.check_length(input_ids.shape[1] - 1, "a text")
        placeholder = (input_ids == IMAGE_TOKEN) | (input_ids == self.config.image_token_index)
        N, P = (0, self.num_image_tokens) if visual_tokens is None else visual_tokens.shape[:2]
        per_row = placeholder.sum(1)
        whole_pictures = bool(((per_row == 0) | (per_row == P)).all())
        if P != self.num_image_tokens or per_row.sum() != N * P or not whole_pictures:
            raise ValueError(
                f"the rows have {per_row.tolist()} image placeholders, but {N} pictures of {P} visual "
                f"tokens each were given, and this model has {self.num_image_tokens} a picture"
            )
        words = input_ids.masked_fill(placeholder, 0)  # any id will do: its embedding is overwritten below
        embeds = self.lm.model.embed_tokens(words)
        if visual_tokens is not None:  # in the order of the rows, as the pictures come
            embeds = embeds.masked_scatter(placeholder[..., None], visual_tokens.to(embeds.dtype))
        return embeds

    @torch.no_grad()
    def stream(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        stop_ids: Sequence[int] | None = None,
        cache: Cache | None = None,
    ) -> Iterator[Tensor]:
        """The tokens of `generate` as they come, (B,) each.

        cache: of what stands before input_ids, and is not computed again; it grows with every token but the
        last, which nothing has read. It ends where the model can hold no more.
        """
        if stop_ids is None:
            stop_ids = [] if self.tokenizer is None else self.stop_ids
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=input_ids.device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.bool()
        last = mask.long().cumsum(1).argmax(1)  # each row's last real token
        rows = torch.arange(len(last), device=last.device)
        cache = Cache(len(self.lm.model.layers)) if cache is None else cache
        embeds = self.embed(input_ids, pixel_values)
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        read = 0 if cache.visible is None else cache.visible.shape[1]
        room = self.config.text.max_position_embeddings - read - input_ids.shape[1]
        for _ in range(min(max_new_tokens, room)):
            out = self.lm(attention_mask=mask, inputs_embeds=embeds, cache=cache, logits=False)
            logits = self.lm.head(out.hidden[rows, last]).float()  # (B,V), at one position a row
            finite(logits, self.name)
            token = logits.argmax(-1) if temperature == 0 else _sample(logits / temperature)
            if len(stops):
                token = torch.where(done, stops[0], token)  # rows that have ended are filled up
                done = done | torch.isin(token, stops)
            yield token
            if bool(done.all()):
                break
            embeds = self.lm.model.embed_tokens(token[:, None])  # the cache holds all before
            mask, last = torch.ones_like(token[:, None], dtype=torch.bool), torch.zeros_like(token)

    def generate(self, input_ids: Tensor, *args, **kwargs) -> Tensor:
        """The prompt's continuation, (B, new) ids: greedy at temperature 0, sampled above it.

        Takes what `stream` takes. A row ends with any of `stop_ids` (default: those of the template) and is
        filled up with the first of them. Rows of unequal length, padded on either side, give the same tokens
        as alone.
        """
        new = list(self.stream(input_ids, *args, **kwargs))
        return torch.stack(new, 1) if new else input_ids[:, :0]

    def answer(self, image: Image.Image | str | Path | None, question: str, max_new_tokens: int = 128) -> str:
        """One question, about one picture or none, answered greedily."""
        ids = torch.tensor([self.question_ids(question, image is not None)], device=self.device)
        pixels = None
        if image is not None:
            pixels = data.preprocess(image, self.config.vision.image_size)[None].to(self.device)
        new = self.generate(ids, pixels, max_new_tokens=max_new_tokens)[0].tolist()
        return self.tokenizer.decode(new, skip_special_tokens=True).strip()

    def save(self, folder: str | Path, layout: str = "native", dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder, whole or not at all, in `dtype` (None: each tensor as it is in memory).

        layout: native (ours), released (CompoDistill / TinyLLaVA) or hf (Hugging Face LLaVA, which has no
        place for a fetched adapter).
        """
        try:
            tokenizer = self.require_tokenizer() if layout == "hf" else self.tokenizer  # gets a new word
            files = exports.written(layout, self.config, tokenizer, self.state_dict(), dtype)
        except BadInput as error:
            raise BadInput(f"{folder}: {error}") from None
        write_folder(folder, *files)


def finite(values: Tensor, name: str) -> Tensor:
    """The values; BadInput where one is NaN or infinite, whose argmax would look like an answer."""
    if not values.isfinite().all():
        raise BadInput(f"{name} gives numbers that are not finite; train or fetch its checkpoint again")
    return values


def _sample(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


# ---------------------------------------------------------------- checkpoints

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # --precision


def pick_device() -> str:
    """The GPU, under torchrun this rank's, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def load(path_or_hub_name: str | Path, dtype: torch.dtype | None = torch.float32, device: str = "cpu") -> VLM:
    """A multimodal checkpoint in any layout that we know, from a folder or the hub, in eval mode.

    dtype: of all tensors; None leaves each as it is in the file.
    """
    folder = find(path_or_hub_name)
    config = layouts.read_config(folder)
    with torch.device("meta"):
        vlm = VLM(config)
    native = read_json(folder / "config.json").get("model_type") == layouts.MODEL_TYPE
    rename = (lambda name: name) if native else layouts.rename_foreign(config)
    load_weights(vlm, folder, rename, dtype, device)
    vlm.name = str(path_or_hub_name)
    if (folder / "tokenizer.json").exists():
        vlm.tokenizer = data.load_tokenizer(folder, config.text.vocab_size)
        vlm.template = layouts.template_of(folder, vlm.tokenizer)
        i = config.image_token_index
        if i >= 0 and vlm.tokenizer.id_to_token(i) not in (None, data.IMAGE_MARK):
            raise BadInput(f"{folder}/config.json: image_token_index {i} is the id of another word")
    return vlm.eval()


def load_lm(path_or_hub_name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Qwen:
    """A plain Qwen1.5, Qwen2 or Llama checkpoint: a folder or a hub name, one file or shards."""
    folder = find(path_or_hub_name)
    config = layouts.qwen_config(read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        lm = Qwen(config)
    drop = "lm_head." if config.tie_word_embeddings else ()  # some tied files still carry a copy of it
    load_weights(lm, folder, lambda name: None if name.startswith(drop) else name, dtype, device)
    return lm.eval()


def load_vision(
    path_or_hub_name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Siglip:
    """A plain SigLIP checkpoint: a whole SiglipModel, or a vision model with or without that prefix."""
    folder = find(path_or_hub_name)
    config = layouts.siglip_config(read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        vision = Siglip(config)
    load_weights(vision, folder, layouts.rename_siglip, dtype, device)
    return vision.eval()


# ---------------------------------------------------------------- python model.py


def main(argv: list[str] | None = None) -> None:
    """Convert a checkpoint from any layout that we read into one that we write."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    given = parser.add_argument_group("what is read")
    given.add_argument("folder", help="a multimodal checkpoint: a folder or a hub name, owner/name")
    add = parser.add_argument_group("what is written").add_argument
    add("--out", required=True, help="a new folder, which appears whole or not at all")
    add("--layout", required=True, choices=exports.NAMES, help="ours, CompoDistill's or HF LLaVA's (no TAF)")
    add("--dtype", choices=["float32", "bfloat16"], help="default: each tensor as it is read")
    with one_sentence(less="a smaller --dtype needs less"):
        args = parse(parser, argv)
        vlm = load(args.folder, dtype=args.dtype and getattr(torch, args.dtype))
        vlm.save(args.out, args.layout)
        print(f"{one_line(args.out)}, layout {args.layout}:")
        for file in sorted(Path(args.out).iterdir()):
            print(f"{file.stat().st_size / 1e6:12.3f} MB  {file.name}")


if __name__ == "__main__":
    main()
