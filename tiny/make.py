"""Makes the models that ship in tiny/, from nothing: `python -m tiny make --out FOLDER`.

    tokenizer            byte-level byte-pair encoding of the tiny world's words
    vision               SigLIP, pre-trained to say what is in each patch and where the patch is; then frozen
    teacher-lm, student  plain Qwen language models, pre-trained on the tiny world's text without any picture
    teacher              stages 0a and 0b of train.py on vision and teacher-lm, 0b until it has learned it all

The students that ship are what `python -m tiny` then leaves in out/NAME/stage3. With --other it makes another
teacher, of another family (Llama), shape and tokenizer than its students will be, for
`train.py --teacher FOLDER/teacher --tokenizers aligned`; with --layers a teacher of another depth, for
`eval.py analyse layers`.

A part that is there already is not made again, so that a command that was stopped goes on. The README has the
time that it takes, and the teacher's scores.
"""

import argparse
import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

import data
import model
from qwen import Qwen, QwenConfig
from siglip import Siglip, SiglipConfig
from support import world
from support.checkpoint import write_folder
from support.errors import BadInput
from support.files import check_writable, read_json, write_atomically
from support.layouts import qwen_fields
from tiny.scores import table, tiny_scores
from train import learning_rate, train
from training import recipes
from training.signals import Stopped

VISION = SiglipConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=40,
    patch_size=10,
)
SIZES = {  # understanding layers: teacher 2, 3, 4 of 6; student 2, 3 of 5; so two groups of two
    "teacher-lm": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=2),
    "student": dict(hidden_size=48, intermediate_size=96, num_hidden_layers=5, num_attention_heads=2),
}
OTHER = {  # --other: understanding layers 3, 4, 5 of 8
    "teacher-lm": dict(
        hidden_size=80,
        intermediate_size=160,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rope_theta=1e4,
        qkv_bias=False,
    )
}


def make_tiny(args: argparse.Namespace) -> None:
    """Write vision, teacher-lm, student and teacher into args.out, those that are not there yet."""
    check_writable(args.out)
    file, made = args.out / "make.json", {"seed": args.seed, "steps": args.steps}
    made |= {"other": True} if args.other else {}
    made |= {"layers": args.layers} if args.layers else {}
    if file.exists() and read_json(file) != made:
        raise BadInput(f"{args.out} has models of {read_json(file)}, not of {made}; choose another --out")
    if not file.exists() and (args.out / "vision").exists():
        raise BadInput(f"{args.out / 'vision'} is there, and {file} is not; choose another --out")
    write_atomically(file, json.dumps(made))
    tokenizer, sizes = world.make_tokenizer(words=not args.other), OTHER if args.other else SIZES
    if args.layers:
        sizes = sizes | {"teacher-lm": sizes["teacher-lm"] | {"num_hidden_layers": args.layers}}
    if not (args.out / "vision").exists():
        torch.manual_seed(args.seed)
        make_vision(args.out / "vision", args.seed)
    for name, size in sizes.items():
        if not (args.out / name).exists():
            torch.manual_seed(args.seed)
            make_lm(args.out / name, tokenizer, args.seed, size)
    if not (args.out / "teacher").exists():
        try:
            scenes = make_teacher(args.out, made)
        except Stopped as stopped:
            return print(stopped)
        print(f"the teacher has learned from {scenes:,} scenes")
    print(f"{args.out}: vision, {', '.join(sizes)}, teacher")


def make_vision(folder: Path, seed: int) -> None:
    """The vision encoder, as a plain SigLIP checkpoint."""
    vision = Siglip(VISION)
    pretrain_vision(vision, seed)
    tensors = {f"vision_model.{name}": tensor for name, tensor in vision.state_dict().items()}
    write_folder(folder, tensors, {"model_type": "siglip_vision_model", **asdict(VISION)})


def make_lm(folder: Path, tokenizer: Tokenizer, seed: int, size: dict) -> None:
    """A language model of a size, as a plain Qwen (or Llama) checkpoint."""
    usual = dict(num_key_value_heads=size["num_attention_heads"], rope_theta=1e6, tie_word_embeddings=True)
    words = tokenizer.get_vocab_size()
    config = QwenConfig(vocab_size=words, max_position_embeddings=1024, **usual | size)
    lm = Qwen(config)
    pretrain_text(lm, tokenizer, seed, folder.name)
    files = {"tokenizer.json": tokenizer.to_str(pretty=True)}
    write_folder(folder, lm.state_dict(), qwen_fields(config), files)


SCENES = 40_000  # of a round of the teacher's; its students are shown make_world's 8,000
ROUNDS = 4


def make_teacher(out: Path, made: dict) -> int:
    """Stages 0a and 0b, as train.py runs them; then 0b again, each time on new scenes, until the teacher has
    learned its world -> the number of scenes.

    How long relations take depends on how sums round, and so on the machine. With --steps there is one round,
    whatever comes of it. BadInput: not learned in ROUNDS.
    """
    teacher = None
    for number in range(1, ROUNDS + 1):
        where = out if teacher is None else out / f"round{number}"
        world.make_world(where / "world", made["seed"] + number, tune=SCENES)
        start = ["--student", teacher or out / "teacher-lm"]
        start += [] if teacher else ["--vision", out / "vision"]
        flags = ["--stage", "0", "--out", where, "--name", "stages", "--seed", made["seed"], *start]
        flags += ["--steps", made["steps"]] if made["steps"] else []
        args = recipes.parse_args("", [str(flag) for flag in flags])
        if teacher is None:
            train(recipes.configure("0a", args, ranks=1))
            args.student = args.vision = None  # part b goes on from part a
        teacher = train(recipes.configure("0b", args, ranks=1))
        if not made["steps"]:
            scores = tiny_scores(model.load(teacher), out / "world", 100)
            print(table({f"round {number}": scores}))
            if min(scores.values()) < 98 or scores["recognition"] < 99:
                continue
        shutil.move(teacher, out / "teacher")
        return number * SCENES
    raise BadInput(f"{teacher} has not learned its world in {ROUNDS} rounds; try another --seed and --out")


def init_weights(module: nn.Module) -> None:
    """Weights of standard deviation 1 / sqrt(inputs), biases 0: learns faster than from 0.02."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def pretrain_vision(vision: Siglip, seed: int, steps: int = 400) -> None:
    """Train a vision encoder to say what is in each patch (one of 12 objects, or none), and where that is.

    Content, column and row are read from the features that models read (hidden state -2).
    """
    init_weights(vision)
    rng, kinds = random.Random(seed), [(colour, shape) for colour in world.COLOURS for shape in world.SHAPES]
    none, side = len(kinds), world.GRID
    head = nn.Linear(VISION.hidden_size, none + 1 + 2 * side)
    parameters = [*vision.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    patches = torch.arange(side * side)
    for step in tqdm(range(steps), desc="vision", dynamic_ncols=True):
        scenes = [world.random_scene(rng, "train") for _ in range(64)]
        target = torch.full((len(scenes), side * side), none)
        for row, scene in zip(target, scenes):
            for kind, (column, line) in scene.items():
                row[line * side + column] = kinds.index(kind)
        pixels = torch.stack([data.preprocess(world.draw(scene), VISION.image_size) for scene in scenes])
        content, column, line = head(vision(pixels).features).split([none + 1, side, side], -1)  # (64,P,...)
        where = [
            F.cross_entropy(logits.transpose(1, 2), (index % side).expand(len(scenes), -1))
            for logits, index in ((column, patches), (line, patches // side))
        ]
        loss = F.cross_entropy(content.transpose(1, 2), target) + sum(where)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    seen = target != none
    right = (content.argmax(-1) == target)[seen].float().mean()
    print(f"vision: {100 * right:.1f} % of the last batch's objects named")


def pretrain_text(lm: Qwen, tokenizer, seed: int, name: str, steps: int = 500) -> None:
    """Next-token prediction on conversations without pictures: the world's language, none of its facts."""
    init_weights(lm)
    optimizer = torch.optim.AdamW(lm.parameters(), weight_decay=0.0)
    rng = random.Random(seed + 1)
    for step in tqdm(range(steps), desc=name, dynamic_ncols=True):
        samples = [world.text_sample(rng, tokenizer) for _ in range(32)]
        batch = data.collate(samples)
        logits = lm(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=data.IGNORE)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    print(f"{name}: text loss {loss.item():.3f} nats per token")
