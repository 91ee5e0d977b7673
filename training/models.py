"""The student and the teacher of a stage: loaded, checked against each other, and what is trained of them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

import data
import distill
import model
import moe
import rivals
import vocabularies
from distill import TeacherAdapterFetch, numbered_layers
from model import DTYPES, VLM
from support.checkpoint import find
from support.errors import BadInput
from support.files import read_json
from support.ranks import barrier, rank_and_ranks
from training import lora, resume
from training.recipes import Config, distils


def load_models(c: Config, device: str) -> tuple[VLM, VLM | None]:
    """The student that a stage starts from, and its frozen teacher (None: nothing is distilled)."""
    start, frozen = find(c.student), DTYPES[c.precision]
    teacher = None
    if c.teacher:
        teacher = model.load(c.teacher, dtype=frozen, device=device).requires_grad_(False)
    if c.stage in ("0a", "1"):  # a plain language model gets eyes and an adapter
        if "vision_config" in read_json(start / "config.json"):
            raise BadInput(f"{start} is multimodal; stage {c.stage} starts from a plain language model")
        vision = teacher.vision if teacher else model.load_vision(c.vision, device=device)
        lm = model.load_lm(start, device=device)
        tokenizer = data.load_tokenizer(start, lm.config.vocab_size)
        student = VLM.assemble(vision, lm, tokenizer, teacher, taf=c.method.taf and teacher is not None)
    else:
        student = model.load(start, device=device)
    student.require_tokenizer()
    if teacher is not None:
        try:
            check_pair(student, teacher, c.method.taf, c.tokenizers)
            if any(terms.keys() - rivals.OUTPUT_LOSSES for terms in c.method.weights.values()):
                # of a later stage, too: before work that it could not go on with
                depths = [vlm.config.text.num_hidden_layers for vlm in (student, teacher)]
                distill.aligned_layers(c.method, *depths)
        except ValueError as error:
            raise BadInput(f"student {start}, teacher {c.teacher}: {error}") from None
        student.vision = teacher.vision  # one copy in memory, and Step runs it once for both
        if c.method.taf:
            student.adapter.teacher = teacher.adapter
    prepare_student(student, teacher, c)
    for parameter in student.parameters():  # what is frozen may be held in bfloat16: it is only read
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen)
    student.lm.checkpointing = c.gradient_checkpointing
    if c.compile:
        compile_layers(student, teacher)
    return student, teacher if distils(c.stage, c.method) else None  # else only its adapter was fetched


def prepare_student(student: VLM, teacher: VLM | None, c: Config) -> None:
    """What a stage's losses and --tune ask for: experts, a projector, LoRA; and what of it all is trained."""
    if c.stage in c.method.sparse and not student.config.text.num_experts:
        if c.stage != c.method.sparse[0]:
            raise BadInput(f"{c.student} has no experts; run --stage {c.method.sparse[0]}, which makes them")
        add_experts(student)
    if c.weights.keys() & rivals.PROJECTED:
        widths = (vlm.config.text.hidden_size for vlm in (student, teacher))
        student.projector = rivals.Projector(*widths).to(student.device)
    choose_trained(student, c)


def add_experts(student: VLM, number: int = rivals.NUM_EXPERTS) -> None:
    """Up-cycle a dense student, in place: every other MLP becomes a mixture of experts."""
    text = student.config.text
    moe.upcycle(student.lm.model.layers, text.hidden_size, number)
    student.lm.config = replace(text, num_experts=number)
    student.config = replace(student.config, text=student.lm.config)


def compile_layers(student: VLM, teacher: VLM | None) -> None:
    """torch.compile every layer of vision encoder and language models, in place, but for those with experts.

    (How many tokens an expert has is another number every time; with FSDP and checkpointing torch gives up.)
    """
    towers = [student.vision.encoder, student.lm.model, *([teacher.lm.model] if teacher else [])]
    for tower in towers:
        for layer in tower.layers:
            if not isinstance(layer.mlp, moe.Experts):
                layer.compile()


def choose_trained(student: VLM, c: Config) -> None:
    """Freeze all but the adapter (of a fetched one P_s alone) and, after stages 0a and 1, the language model.

    That is trained whole, or through LoRA (low-rank adaptation). A new stage starts a new LoRA; the one
    before was merged when its stage was saved. In the stages with experts only the MLPs of the language model
    are trained, dense ones and experts, and the routers, those whole in any case. --freeze-layers stay.
    """
    student.requires_grad_(False).train()
    taf = isinstance(student.adapter, TeacherAdapterFetch)
    (student.adapter.student if taf else student.adapter).requires_grad_(True)
    if c.weights.keys() & rivals.PROJECTED:
        student.projector.requires_grad_(True)
    layers, sparse = student.lm.model.layers, c.stage in c.method.sparse
    frozen = numbered_layers(c.freeze_layers) if c.freeze_layers else []
    if frozen and frozen[-1] >= len(layers):
        raise BadInput(f"--freeze-layers {c.freeze_layers}: {c.student} has layers 0 to {len(layers) - 1}")
    if c.stage not in ("0a", "1"):
        free = [layer for i, layer in enumerate(layers) if i not in frozen]
        tuned = nn.ModuleList(layer.mlp for layer in free) if sparse else nn.ModuleList(free)
        (tuned if sparse else student.lm).requires_grad_(c.tune == "full")
        for i in frozen:
            layers[i].requires_grad_(False)
        if c.tune == "lora":
            lora.add_lora(tuned, c.lora_rank, c.lora_alpha, c.lora_dropout)
        for module in tuned.modules():
            if isinstance(module, moe.Router):
                module.requires_grad_(True)


def check_pair(student: VLM, teacher: VLM, taf: bool, tokenizers: str = "same") -> None:
    """Both must read the same ids and the same visual tokens, or the losses compare nothing.

    tokenizers: "aligned" where their ids may be others.
    """
    ours, theirs = student.config, teacher.config
    if (ours.vision_layer, ours.drop_first_patch) != (theirs.vision_layer, theirs.drop_first_patch):
        raise BadInput(
            "they read other layers or patches of their vision encoders; run stage 1 with this --teacher"
        )
    words = student.tokenizer.get_vocab()
    other = teacher.tokenizer.get_vocab() if teacher.tokenizer else words
    differ = any(other.get(word) != i for word, i in words.items())
    if tokenizers == "aligned":
        for vlm in (student, teacher):
            vocabularies.check_spelling(vlm.require_tokenizer())
    elif differ or max(words.values()) >= theirs.text.vocab_size:
        raise BadInput("their tokenizers differ; give --tokenizers aligned, or models of one family")
    if taf != isinstance(student.adapter, TeacherAdapterFetch):
        has, flag = ("an adapter of its own", "--no-taf") if taf else ("the teacher's adapter", "--taf")
        raise BadInput(
            f"the student has {has}; start from a student of this method's stage 1 (or give {flag}, "
            "which sft, kd and compodistill take)"
        )

    def close(a: Tensor, b: Tensor) -> bool:  # either may have been kept in bfloat16
        return torch.equal(a.bfloat16(), b.bfloat16())

    pairs = [("vision encoder", student.vision, teacher.vision)]
    pairs += [("fetched adapter", student.adapter.teacher, teacher.adapter)] if taf else []
    for name, ours, theirs in pairs:
        ours, theirs = ours.state_dict(), theirs.state_dict()
        same = ours.keys() == theirs.keys() and all(close(ours[key], theirs[key]) for key in ours)
        if not same:
            raise BadInput(f"the student's {name} is not this teacher's; give the --teacher of its stage 1")


def save_model(student: VLM, c: Config) -> None:
    """The finished model as a checkpoint folder: shards put together, LoRA merged. All ranks call.

    Of what only training needs, LoRA and the projector, nothing is left.
    """
    tensors = lora.merge(resume.whole_state(student), c.lora_rank, c.lora_alpha)
    tensors = {name: x for name, x in tensors.items() if not name.startswith("projector.")}
    if rank_and_ranks()[0] == 0:
        with torch.device("meta"):
            plain = VLM(student.config, student.tokenizer)
        plain.load_state_dict(tensors, assign=True)
        plain.eval().save(c.folder)
    barrier()
