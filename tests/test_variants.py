"""What the paper leaves open, as flags: heads, layers by number, maps that say nothing, frozen layers.

Shapes: B batch, T query tokens, P visual tokens, H heads.
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_distill import mask
from test_qwen import CLOSE, IDS, gradients, tiny
from test_run import rows, run, same_run

import distill
import lean
import train
from controls import CONTROLS, control_maps
from distill import METHODS, aligned_layers, matched_heads_distance, numbered_layers
from helpers import config, in_full, same_weights
from lean import VisualAttention
from support.errors import BadInput
from support.world import TINY, make_world
from training import recipes

PAPER = METHODS["compodistill"]

# ---------------------------------------------------------------- layers by number


@pytest.mark.parametrize(
    "text, layers", [("3", [3]), ("8-11", [8, 9, 10, 11]), ("2,5,7-9", [2, 5, 7, 8, 9]), ("0-0", [0])]
)
def test_layers_by_number(text, layers):
    assert numbered_layers(text) == layers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "3-",
        "-3",
        "5-3",
        "2,2",
        "3,2",
        "1-3,2",
        "1-2-3",
        "1,,2",
        "1.5",
        "0-99999999",
        "²",
        "1 ",
        "1,",
    ],
)
def test_what_is_no_layers(text):
    with pytest.raises(ValueError, match="rising numbers"):
        numbered_layers(text)


def test_student_and_teacher_by_number():
    """Group matching of two student layers to three of the teacher: windows of two."""
    method = replace(PAPER, layers="1,2", teacher_layers="3-5")
    assert aligned_layers(method, 4, 6) == ([1, 2], [3, 4, 5])
    assert aligned_layers(replace(method, teacher_layers=None), 4, 6) == ([1, 2], [1, 2])
    assert aligned_layers(replace(PAPER, teacher_layers="0-11"), 10, 12) == ([3, 4, 5, 6], list(range(12)))
    for depths, named in (((2, 6), "layers 0 to 1"), ((4, 5), "layers 0 to 4")):
        with pytest.raises(ValueError, match=named):
            aligned_layers(method, *depths)
    with pytest.raises(ValueError, match="cannot be matched"):
        aligned_layers(replace(method, layers="0-3"), 4, 6)


@pytest.mark.parametrize("matching, teacher", [("group", [4, 5]), ("simple", [4]), ("adaptive", [3, 4, 5])])
def test_one_of_the_matched_pairs(matching, teacher):
    """Of layers 1, 2 the second: its teacher layers are those that it has beside the other one."""
    method = replace(PAPER, layers="1,2", teacher_layers="3-5", matching=matching, align_layer=2)
    assert aligned_layers(method, 4, 6) == ([2], teacher)
    with pytest.raises(ValueError, match=r"layer 3 is not among .*\[1, 2\]"):
        aligned_layers(replace(method, align_layer=3), 4, 6)


def test_the_loss_of_one_pair_is_that_pairs_part_of_the_whole():
    """L_ADL is a mean over pairs: those of single pairs average to it."""
    torch.manual_seed(0)
    student = {i: torch.rand(2, 4, 3) for i in (1, 2)}
    teacher = {i: torch.rand(2, 4, 3) for i in (3, 4, 5)}
    rows = mask("1111", "1110")

    def loss(method):
        ours, theirs = aligned_layers(method, 4, 6)
        ours, theirs = {i: student[i] for i in ours}, {i: teacher[i].clone() for i in theirs}
        targets = distill.matched_targets(ours, theirs, rows, method.matching)
        return distill.visual_attention_loss(ours.values(), targets, rows, method.distance).sum

    method = replace(PAPER, layers="1,2", teacher_layers="3-5")
    parts = [loss(replace(method, align_layer=i)) for i in (1, 2)]
    torch.testing.assert_close(loss(method), sum(parts) / 2)
    assert abs(parts[0] - parts[1]) > 1e-3


# ---------------------------------------------------------------- heads


def test_matched_heads_by_hand():
    """P = 2, one row. Teacher heads look left, and both ways; of three student heads one looks left (cosine 1
    and 1/sqrt 2 with the two), one right (0, 1/sqrt 2), one in between, (3,4)/5 (0.6, 7/(5 sqrt 2) = 0.990).
    So the first has its best match in head 0, the second in head 2: 1 - (1 + 0.990) / 2.
    """
    target = torch.tensor([[[[2.0, 0.0]], [[1.0, 1.0]]]])  # (B=1,H_t=2,T=1,P=2)
    student = torch.tensor([[[[0.1, 0.0]], [[0.0, 9.0]], [[3.0, 4.0]]]], requires_grad=True)
    distance = matched_heads_distance(student, target, mask("1"))
    torch.testing.assert_close(distance, torch.tensor([[1 - (1 + 7 / 50**0.5) / 2]]))
    (gradient,) = torch.autograd.grad(distance.sum(), student)
    assert gradient[0, 1].abs().max() == 0  # nobody's best match: it is not pulled
    expected = -(torch.tensor([1.0, 1.0]) - 7 / 25 * torch.tensor([3.0, 4.0])) / (2 * 5 * 2**0.5)
    torch.testing.assert_close(gradient[0, 2, 0], expected)


def test_all_heads_of_a_group_are_matched():
    """Of two layers with two heads each four maps are the target: no mean of heads of different layers."""
    student = {1: torch.rand(2, 3, 4, 5)}
    teacher = {6: torch.rand(2, 2, 4, 5), 7: torch.rand(2, 2, 4, 5)}
    rows = mask("1111", "0111")
    (target,) = distill.matched_targets(student, teacher, rows, "group")
    assert torch.equal(target, torch.stack([*teacher[6].unbind(1), *teacher[7].unbind(1)], 1))
    (target,) = distill.matched_targets(student, teacher, rows, "simple")
    assert torch.equal(target, teacher[6])


def test_matched_heads_keep_little():
    """Of 64 heads of the teacher beside 2 of the student what stays for the backward pass is a few of 2."""
    student, target = torch.rand(1, 2, 5, 7, requires_grad=True), torch.rand(1, 64, 5, 7)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        matched_heads_distance(student, target, mask("11111"))
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) < 4 * student.nbytes


def test_matched_heads_beside_loops():
    """Every sample, row and head alone, by torch's own cosine; other numbers of heads on both sides."""
    student, target = torch.rand(2, 3, 5, 4), torch.rand(2, 2, 5, 4)
    got = matched_heads_distance(student, target, mask("11111", "11111"))
    for b in range(2):
        for t in range(5):
            best = [
                max(F.cosine_similarity(target[b, h, t], student[b, g, t], dim=0) for g in range(3))
                for h in range(2)
            ]
            assert got[b, t].item() == pytest.approx(1 - sum(best).item() / 2, abs=1e-6)


@pytest.mark.parametrize("kept", [0, 9999])
@pytest.mark.parametrize("rows", [slice(2, 9), slice(3, 7), slice(4, 4)])
def test_lean_maps_of_heads_are_those_of_whole_attention(monkeypatch, rows, kept):
    monkeypatch.setattr(lean, "QUERY_ROWS", 2)
    monkeypatch.setattr(lean, "SMALL", kept)
    lm, columns = tiny(num_key_value_heads=2), torch.tensor([[1, 2, 3], [5, 3, 4], [0, 2, 1]])
    part = lm(IDS, attention={1: VisualAttention(rows, columns, heads=True)})
    whole = lm(IDS, attention=in_full(1))
    expected = distill.visual_maps_of_heads(whole.attentions[1], columns)[:, :, rows]
    assert part.attentions[1].shape == expected.shape == (3, 4, rows.stop - rows.start, 3)
    torch.testing.assert_close(part.attentions[1], expected)
    torch.testing.assert_close(expected.mean(1), distill.visual_map(whole.attentions[1], columns)[:, rows])
    torch.testing.assert_close(part.logits, whole.logits, **CLOSE)
    if expected.numel():
        weight = torch.rand_like(expected)
        ours, theirs = (gradients(lm, (x * weight).sum()) for x in (part.attentions[1], expected))
        name = "model.layers.1.self_attn.q_proj.weight"
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- controls


def three():
    """Three samples of which the second has no picture -> batch, maps {7: (B=3,T=6,P=2)}, causal.

    The picture stands at tokens 1 and 2, in the third sample at 2 and 3, which is one token shorter.
    """
    batch = {
        "visual_columns": torch.tensor([[1, 2], [0, 0], [2, 3]]),
        "has_image": torch.tensor([True, False, True]),
        "attention_mask": mask("111111", "111100", "111110"),
        "input_ids": torch.tensor([[5, -200, -200, 6, 7, 8], [9, 9, 9, 9, 0, 0], [5, 5, -200, -200, 6, 0]]),
    }
    maps = torch.zeros(3, 6, 2)
    maps[0] = torch.tensor([[0, 0], [0.5, 0], [0.3, 0.2], [0.6, 0.2], [0.1, 0.4], [0.2, 0.7]])
    maps[2] = torch.tensor([[0, 0], [0, 0], [0.9, 0], [0.4, 0.1], [0.25, 0.5], [0.8, 0.1]])
    return batch, {7: maps}


def control(maps, batch, how, rows=None, first=0):
    """control_maps where all rows from the picture on count."""
    rows = distill.query_rows(batch, "all") if rows is None else rows
    return control_maps(maps, batch, how, rows, first)[7]


def test_uniform_by_hand():
    """Each row keeps its sum, spread over what it sees: row 1 of sample 0 sees the first patch alone."""
    batch, maps = three()
    got = control(maps, batch, "uniform")
    expected = [[0, 0], [0.5, 0], [0.25, 0.25], [0.4, 0.4], [0.25, 0.25], [0.45, 0.45]]
    torch.testing.assert_close(got[0], torch.tensor(expected))
    torch.testing.assert_close(
        got[2, :5], torch.tensor([[0, 0], [0, 0], [0.9, 0], [0.25, 0.25], [0.375, 0.375]])
    )


def test_the_other_samples_map_by_hand():
    """Row by row from the picture on: row 1 of sample 0 has row 2 of sample 2; its rows after the other's
    last have that one (row 4). And sample 2 has row 1 of sample 0 in its row 2. Sample 1 has no map to give.
    With no other one it is uniform; so it is where the other's rows do not count.
    """
    batch, maps = three()
    got = control(maps, batch, "other")
    assert torch.equal(got[0, 1:], maps[7][2][[2, 3, 4, 4, 4]])
    assert torch.equal(got[2, 2:], maps[7][0][[1, 2, 3, 4]])
    none = distill.query_rows(batch, "all")
    none[2] = False
    assert torch.equal(control(maps, batch, "other", none)[0], control(maps, batch, "uniform")[0])
    batch["has_image"] = torch.tensor([True, False, False])
    assert torch.equal(control(maps, batch, "other"), control(maps, batch, "uniform"))
    nothing = torch.zeros(3, 0, dtype=torch.bool)
    assert control({7: maps[7][:, :0]}, batch, "other", nothing).shape == (3, 0, 2)  # texts alone


def test_shuffled_columns():
    """A row has the same numbers in another order and none where it sees nothing; the rows that see all of a
    sample have one order, which depends on nothing but the sample.
    """
    P, T = 16, 40
    columns = torch.arange(4, 4 + P).expand(3, P)
    ids = torch.randint(1, 50, (3, T))
    ids[:, 4 : 4 + P] = -200
    batch = {"visual_columns": columns, "has_image": torch.ones(3, dtype=torch.bool), "input_ids": ids}
    visible = columns[:, None] <= torch.arange(T)[:, None]
    maps = torch.rand(3, T, P) * visible
    rows = torch.ones(3, T, dtype=torch.bool)
    got = control({7: maps}, batch, "shuffled", rows)
    torch.testing.assert_close(got.sort(-1).values, maps.sort(-1).values)
    assert not got[~visible].any()
    orders = []
    for b in range(3):
        after = slice(4 + P, T)
        order = [(maps[b, after] == got[b, after, p, None]).all(0).nonzero().item() for p in range(P)]
        assert sorted(order) == list(range(P)) and order != list(range(P))
        orders.append(tuple(order))
    assert len(set(orders)) == 3
    # padded by more, and in another batch
    alone = {name: F.pad(x[1:2], (0, 9)) if name == "input_ids" else x[1:2] for name, x in batch.items()}
    assert torch.equal(control({7: maps[1:2]}, alone, "shuffled", rows[1:2]), got[1:2])


@pytest.mark.parametrize("how", CONTROLS)
def test_a_control_of_heads_and_of_some_rows_is_that_of_all(how):
    """Each head as if it were alone; rows from `first` on as among all rows (those of all pictures' texts:
    what stands before a picture is never compared)."""
    batch, maps = three()
    whole, rows = control(maps, batch, how), distill.query_rows(batch, "all")
    heads = torch.stack([maps[7], 2 * maps[7]], 1)  # (B,H,T,P)
    got = control({7: heads}, batch, how)
    torch.testing.assert_close(got, torch.stack([whole, 2 * whole], 1))
    some = control({7: maps[7][:, 1:]}, batch, how, rows[:, 1:], first=1)
    seeing = batch["has_image"]
    torch.testing.assert_close(some[seeing, 1:], whole[seeing, 2:])


# ---------------------------------------------------------------- flags


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tiny") / "world", tune=24, pretrain=8, per_kind=1)


@pytest.mark.parametrize(
    "flags, changes",
    [
        ("--vat-heads matched", {"distance": "matched-heads"}),
        ("--vat-heads mean --vat-control other", {"control": "other"}),
        ("--layers 1-2", {"layers": "1-2"}),
        ("--student-layers 1", {"layers": "1", "teacher_layers": "intermediate"}),
        ("--teacher-layers all", {"teacher_layers": "all"}),
        ("--student-layers 1,2 --teacher-layers 2-4", {"layers": "1,2", "teacher_layers": "2-4"}),
        ("--align-layers 1", {"align_layer": 1}),
        ("--freeze-layers 0,1", {}),
    ],
)
def test_flags_make_the_variant(flags, changes):
    c = config(*flags.split())
    assert c.method == replace(PAPER, **changes)
    assert c.freeze_layers == ("0,1" if "--freeze" in flags else None)


def test_layers_are_frozen_in_the_stages_that_distil_alone():
    args = recipes.parse_args("", ["--freeze-layers", "1", "--student", "nowhere"])
    assert [recipes.configure(stage, args, 1).freeze_layers for stage in "123"] == ["1", "1", None]


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--layers middle", "rising numbers"),
        ("--layers 3-1", "rising numbers"),
        ("--layers 1-2 --student-layers 1", "both name layers"),
        ("--layers all --teacher-layers 1", "both name layers"),
        ("--method kd --student-layers 1", "without an attention loss"),
        ("--vat-loss none --vat-heads matched", "without an attention loss"),
        ("--method kd --vat-control uniform", "without an attention loss"),
        ("--method sft --align-layers 1", "without an attention loss"),
        ("--vat-heads matched --vat-loss mse", "--vat-loss mse"),
        ("--vat-heads matched --matching adaptive", "adaptive"),
        ("--vat-loss matched-heads", "invalid choice"),
        ("--freeze-layers early", "rising numbers"),
        ("--vat-weight 0 --vat-control other", "weight of 0"),
        ("--weights adl=0 --layers 1-2", "weight of 0"),
        ("--method sft --tokenizers aligned", "distils nothing"),
        ("--freeze-layers 2,1", "rising numbers"),
        ("--freeze-layers 1 --method sft", "sft distils nothing"),
        (
            "--recipe paper --stage 2 --data x --images x --teacher x --vat-heads matched",
            "--vat-queries text",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(flags, named, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--stage", "2", *flags.split()] if "--stage" not in flags else flags.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and named in error, error


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--layers 3-9", "layers 0 to"),
        ("--student-layers 9", "layers 0 to"),
        ("--teacher-layers 99", "layers 0 to"),
        ("--align-layers 0", "not among"),
    ],
)
def test_layers_that_do_not_exist_are_refused_in_stage_1(world, tmp_path, flags, named):
    where = ["--data", world / "pretrain.json", "--images", world / "images", "--out", tmp_path]
    with pytest.raises(SystemExit, match=named):
        train.main([*map(str, ["--stage", 1, *where]), *flags.split()])
    assert not list(tmp_path.glob("*/stage?"))


@pytest.mark.parametrize("flags, ranks", [(["--batch-size", "1"], 1), ([], 8)])
def test_another_sample_of_a_micro_batch_of_one(flags, ranks):
    """However it comes to that: the tiny recipe's batch of 8 is that of all ranks."""
    with pytest.raises(BadInput, match="which is one of 1; give --batch-size 2 or more"):
        config("--vat-control", "other", *flags, ranks=ranks)
    assert config("--vat-control", "other", stage="1", ranks=ranks).batch_size  # where nothing is aligned


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_frozen_layers_stay(world, tmp_path, tune):
    """In stage 2 layer 1 keeps its bits, and all others move; in stage 3 it moves, too."""
    where = ["--images", world / "images", "--out", tmp_path, "--name", "x", "--steps", 2, "--batch-size", 4]
    for n in "123":
        data = world / ("pretrain.json" if n == "1" else "tune.json")
        flags = ["--stage", n, "--data", data, *where, "--freeze-layers", "1", "--tune", tune]
        train.main([*map(str, flags)])
    before, after, last = (load_file(tmp_path / f"x/stage{n}/model.safetensors") for n in "123")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    weights = {
        name for name in before if name.startswith("lm.model.layers.") and name.endswith("proj.weight")
    }
    frozen = {name for name in weights if name.startswith("lm.model.layers.1.")}
    assert frozen and not {name for name in moved if name.startswith("lm.model.layers.1.")}
    assert weights - frozen <= moved
    assert all(not torch.equal(after[name], last[name]) for name in frozen)


def test_a_layer_to_freeze_that_does_not_exist(world, tmp_path):
    """In stage 1 already, before work that stage 2 could not go on with."""
    where = ["--data", world / "pretrain.json", "--images", world / "images", "--out", tmp_path]
    with pytest.raises(SystemExit, match="--freeze-layers 9: .* has layers 0 to"):
        train.main([*map(str, ["--stage", 1, *where, "--freeze-layers", 9])])
    assert not (tmp_path / "compodistill/stage1").exists()


def test_runs_begun_before_there_were_these_flags_go_on(world, tmp_path):
    """A run's identity has them only where they are given."""
    where = ["--data", world / "tune.json", "--images", world / "images", "--out", tmp_path, "--stage", 2]
    where += ["--student", TINY / "compodistill", "--steps", 3, "--batch-size", 4, "--stop-after", 1]
    for name, flags in (("plain", []), ("given", ["--align-layers", 2, "--tokenizers", "aligned"])):
        train.main([*map(str, [*where, "--name", name, *flags])])
    plain, given = (
        json.loads((tmp_path / n / "stage2.run/run.json").read_text()) for n in ("plain", "given")
    )
    later = {"tokenizers", "freeze_layers", "teacher_layers", "align_layer", "control"}
    assert not later & plain.keys() and later & given.keys() == {"tokenizers", "align_layer"}


@pytest.mark.parametrize(
    "variant", ["--vat-heads matched --vat-queries text", "--vat-control shuffled", "--freeze-layers 1"]
)
def test_bf16_and_gradient_checkpointing(world, tmp_path, variant):
    """The first step's losses are those of float32 without it, to the digits that bf16 has."""
    flags = ["--stage", 2, "--data", world / "tune.json", "--images", world / "images", "--out", tmp_path]
    flags += ["--student", TINY / "compodistill", "--steps", 1, "--log-every", 1, "--batch-size", 4]
    flags = [str(flag) for flag in flags] + variant.split()
    more = ["--precision", "bf16", "--gradient-checkpointing", "--tune", "lora"]
    train.main([*flags, "--name", "plain"])
    train.main([*flags, "--name", "both", *more])
    one, two = (json.loads((tmp_path / name / "stage2.jsonl").read_text()) for name in ("plain", "both"))
    for term in ("lm", "kl", "adl"):
        assert two[term] == pytest.approx(one[term], rel=0.03, abs=2e-3), term


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, ranks",
    [
        ("--vat-control shuffled", 2),
        ("--vat-control uniform", 2),
        ("--vat-control other", 1),  # depends on how a batch is cut
        ("--vat-heads matched --vat-queries text --freeze-layers 0", 2),
    ],
)
def test_ranks_and_a_stop_change_nothing(world, tmp_path, variant, ranks):
    """Layers by number, one pair of them, a variant: two ranks (FSDP) train what one does; a run that was
    stopped ends in the same bits.
    """
    flags = ["--stage", 2, "--data", world / "tune.json", "--images", world / "images", "--name", "x"]
    flags += ["--student", TINY / "compodistill", "--steps", 4, "--lr", 1e-4, "--log-every", 1]
    flags += ["--student-layers", "1-2", "--teacher-layers", "1-4", "--align-layers", 2]
    flags = [str(flag) for flag in flags] + variant.split()
    train.main([*flags, "--batch-size", "4", "--out", str(tmp_path / "one")])
    parts = [*flags, "--batch-size", "4", "--out", str(tmp_path / "parts")]
    train.main([*parts, "--stop-after", "2"])
    train.main(parts)
    same_run(tmp_path / "one", tmp_path / "parts")
    if ranks == 1:
        return
    run([*flags, "--batch-size", "2", "--parallel", "fsdp", "--out", str(tmp_path / "two")], 2)
    one, two = (load_file(tmp_path / out / "x/stage2/model.safetensors") for out in ("one", "two"))
    same_weights(one, two)
    for ours, theirs in zip(*(rows(tmp_path / out) for out in ("one", "two")), strict=True):
        assert ours["adl"] == pytest.approx(theirs["adl"], rel=1e-4) and ours["adl"] > 0
