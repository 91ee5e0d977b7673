"""distill.py: golden values, cases worked by hand, and the properties that a training rests on.

Shapes: B batch, T tokens, P visual tokens, k matched layers, m teacher layers, V vocabulary.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import distill
import lean
from distill import (
    DISTANCES,
    IGNORE,
    METHODS,
    TeacherAdapterFetch,
    adaptive_match,
    choose_layers,
    group_mean,
    kl_loss,
    lm_loss,
    loss_counts,
    match_layers,
    matched_targets,
    query_rows,
    understanding_layers,
    visual_attention_loss,
    visual_map,
)
from model import VLM
from qwen import Output, QwenConfig
from siglip import SiglipConfig
from support.layouts import VLMConfig

GOLDEN = Path(__file__).parent / "golden"

MAP_LOSSES = {"cosine": "cosine", "cosine-rows": "cosine-rows", "mse": "mse", "kl of rows": "kl"}
MAP_LOSSES["released"] = "released"
LOGIT_LOSSES = ["kl", "kl unshifted", "lm"]
ALL_LOSSES = [*MAP_LOSSES, *LOGIT_LOSSES]


def mean(loss):
    """(sum, count) -> the mean, as a number."""
    total, count = loss
    return (total / count).item()


def mask(*rows):
    """One string of 0 and 1 per sample -> (B,T) bool."""
    return torch.tensor([[character == "1" for character in row] for row in rows])


def evaluate(name, student, teacher, rows):
    """Any loss by its name -> (sum, count), batch first: maps (B,k,T,P) or logits (B,T,V), rows (B,T)."""
    if name in MAP_LOSSES:
        return visual_attention_loss(student.unbind(1), teacher.unbind(1), rows, MAP_LOSSES[name])
    answer = torch.arange(rows.shape[1]).expand_as(rows)  # token t is answered with t, any fixed ids would do
    labels = torch.where(rows, answer, IGNORE)
    if name == "lm":
        return lm_loss(student, labels)
    return kl_loss(student, teacher, labels, shifted=name == "kl")


def example(name, seed=0):
    """Six samples for `evaluate`: student, teacher, rows. Sample 2 has no row at all, the others 1 to 6."""
    rows = mask("0111111", "0000010", "0000000", "0111000", "0001111", "0100000")
    random = torch.Generator().manual_seed(seed)
    if name in LOGIT_LOSSES:
        student, teacher = torch.randn(2, 6, 7, 11, generator=random)
    elif name == "released":  # entries that are 0 are dropped, and of few rows all may be
        rows = mask("1111111", "0111111", "0000000", "0011111", "0001111", "1111110")
        student, teacher = (torch.rand(2, 6, 3, 7, 7, generator=random) + 1e-3).tril()
    else:
        student, teacher = torch.rand(2, 6, 3, 7, 5, generator=random)
    return student, teacher, rows


def value_and_gradient(name, student, teacher, rows):
    student = student.clone().requires_grad_()
    total, count = evaluate(name, student, teacher, rows)
    total.backward()
    return total.detach(), count, student.grad


def test_every_distance_has_its_tests():
    """Add a new one to MAP_LOSSES, and a case worked by hand to test_attention_loss_by_hand. (Of maps with
    heads: tests/test_variants.py.)
    """
    assert set(MAP_LOSSES.values()) == {name for name, distance in DISTANCES.items() if not distance.heads}


# ---------------------------------------------------------------- golden values


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "losses.safetensors"), json.loads((GOLDEN / "losses.json").read_text())


@pytest.fixture(scope="module")
def golden_maps(golden):
    """Head mean, visual columns 4..15, teacher layers matched in groups: twice k=3 of (B=2,T=23,P=12)."""
    columns = torch.arange(4, 16).repeat(2, 1)
    student = {i: visual_map(A, columns) for i, A in enumerate(golden[0]["student_maps"])}
    teacher = {i: visual_map(A, columns) for i, A in enumerate(golden[0]["teacher_maps"])}
    return list(student.values()), matched_targets(student, teacher, GOLDEN_ROWS["padded"], "group")


GOLDEN_ROWS = {
    "nothing padded": mask("1" * 23, "1" * 23),
    "padded": mask("1" * 23, "1" * 20 + "000"),
}


@pytest.mark.parametrize(
    "name, kind, which, padding",
    [
        ("vat_cosine_paper", "cosine", "all", "nothing padded"),
        ("vat_cosine_paper_padded", "cosine", "all", "padded"),
        ("vat_rowwise_all", "cosine-rows", "all", "padded"),
        ("vat_rowwise_text", "cosine-rows", "text", "padded"),
        ("vat_kl_rows_all", "kl", "all", "padded"),
        ("vat_mse_rows_all", "mse", "all", "padded"),
    ],
)
def test_attention_loss_golden(golden, golden_maps, name, kind, which, padding):
    rows = query_rows(batch_of(torch.arange(4, 16).repeat(2, 1), GOLDEN_ROWS[padding]), which)
    loss = visual_attention_loss(*golden_maps, rows, kind)
    assert mean(loss) == pytest.approx(golden[1][name], abs=1e-5)


def test_attention_loss_golden_cosines(golden, golden_maps):
    """The golden file also gives the cosine of every layer and sample."""
    student, teacher = golden_maps
    rows = GOLDEN_ROWS["nothing padded"]
    for j in range(3):
        for b in range(2):
            one = [[maps[j][b : b + 1]] for maps in (student, teacher)]
            cosine = 1 - mean(visual_attention_loss(*one, rows[b : b + 1]))
            assert cosine == pytest.approx(golden[1]["vat_cosine_paper_per_layer_batch"][j][b], abs=1e-5)


def test_attention_mse_golden_over_all_entries(golden, golden_maps):
    """Over all rows, those without visual mass among them, it is the plain MSE."""
    total, count = visual_attention_loss(*golden_maps, GOLDEN_ROWS["nothing padded"], "mse")
    expected = golden[1]["vat_mse_over_all_entries_no_padding"]
    assert (total / count).item() == pytest.approx(expected, abs=1e-5) and count == 2 * 23


def test_released_attention_loss_golden(golden, golden_maps):
    """Queries and columns are both the visual tokens."""
    rows = query_rows(batch_of(torch.arange(4, 16).repeat(2, 1), GOLDEN_ROWS["nothing padded"]), "image")
    loss = visual_attention_loss(*golden_maps, rows, "released")
    assert mean(loss) == pytest.approx(golden[1]["vat_released_code"], abs=1e-5)
    assert loss.count == 2  # samples, not layers


def test_token_losses_golden(golden):
    tensors, expected = golden
    student, teacher, labels = tensors["student_logits"], tensors["teacher_logits"], tensors["labels"]
    unshifted = mean(kl_loss(student, teacher, labels, shifted=False))
    assert mean(lm_loss(student, labels)) == pytest.approx(expected["lm_cross_entropy"], abs=1e-5)
    assert mean(kl_loss(student, teacher, labels)) == pytest.approx(expected["kl_shifted"], abs=1e-5)
    assert unshifted == pytest.approx(expected["kl_unshifted_as_released"], abs=1e-5)
    p = teacher[labels != IGNORE].softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item()  # what the released soft cross-entropy has on top
    assert unshifted + entropy == pytest.approx(expected["released_soft_cross_entropy_unshifted"], abs=1e-5)


def test_matching_golden(golden):
    student, teacher, expected = [0, 1, 2], [0, 1, 2, 3, 4], golden[1]
    assert {len(group) for group in match_layers(student, teacher)} == {expected["group_n"]}
    assert match_layers(student, teacher, "simple") == [[i] for i in expected["simple_teacher_index"]]


# ---------------------------------------------------------------- every loss: zero at equality


@pytest.mark.parametrize("name", [name for name in ALL_LOSSES if name != "lm"])
def test_zero_at_equality(name):
    _, teacher, rows = example(name)
    total, count, gradient = value_and_gradient(name, teacher, teacher, rows)
    assert count > 0
    assert total.item() == pytest.approx(0, abs=1e-5)
    assert gradient.abs().max() < 1e-5


def test_zero_of_cosine_ignores_scale():
    """A student that looks half as much, but at the same places, has nothing to learn from the cosine."""
    _, teacher, rows = example("cosine")
    assert evaluate("cosine", teacher / 2, teacher, rows)[0].item() == pytest.approx(0, abs=1e-5)
    assert evaluate("mse", teacher / 2, teacher, rows)[0] > 1


def test_lm_loss_of_uniform_logits_is_log_of_vocabulary():
    total, count = lm_loss(torch.full((2, 4, 50), 0.7), torch.randint(50, (2, 4)))
    assert count == 6
    assert total.item() / 6 == pytest.approx(math.log(50), abs=1e-6)


# ---------------------------------------------------------------- every loss: by hand

# Two layers, one sample, three rows, three visual tokens. Row 0 stands before the image.
# In layer 1 student and teacher differ in scale only.
BY_HAND_STUDENT = [[[0.0, 0.0, 0.0], [0.3, 0.1, 0.0], [0.2, 0.2, 0.0]], [[0, 0, 0], [0, 0.2, 0], [0, 0, 0.4]]]
BY_HAND_TEACHER = [[[0.0, 0.0, 0.0], [0.1, 0.1, 0.0], [0.0, 0.2, 0.0]], [[0, 0, 0], [0, 0.1, 0], [0, 0, 0.2]]]


@pytest.mark.parametrize(
    "name, total, count",
    [
        # layer 0: s.t = .03 + .01 + .04 = .08, |s|^2 = .09 + .01 + .04 + .04 = .18,
        #          |t|^2 = .01 + .01 + .04 = .06, cos = .08 / sqrt(.0108) = .769800
        # layer 1: cos 1;  1 - mean = .115100 for the one sample
        ("cosine", 0.115100, 1),
        # layer 0, row 1: .04 / sqrt(.10 * .02) = .894427; row 2: .04 / sqrt(.08 * .04) = .707107
        # layer 1: 1 and 1;  (4 - .894427 - .707107 - 1 - 1) / 2 layers = .199233 in two rows
        ("cosine-rows", 0.199233, 2),
        # layer 0: .2^2 + 0 + .2^2 + 0 = .08;  layer 1: .1^2 + .2^2 = .05
        # .13 / 2 layers / 3 tokens = .021667 in two rows
        ("mse", 0.021667, 2),
        # layer 0, row 1: t = (1/2,1/2), s = (3/4,1/4): 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3) = .143841
        # layer 0, row 2: t = (0,1), s = (1/2,1/2): ln 2 = .693147
        # layer 1: 0;  together .836988 / 2 layers = .418494 in two rows
        ("kl of rows", 0.418494, 2),
    ],
)
def test_attention_loss_by_hand(name, total, count):
    student, teacher = torch.tensor([BY_HAND_STUDENT]), torch.tensor([BY_HAND_TEACHER])
    got, number = evaluate(name, student, teacher, mask("011"))
    assert got.item() == pytest.approx(total, abs=2e-6)
    assert number == count


def test_released_attention_loss_by_hand():
    """Both maps sum to 9 over 3 x 3 entries: mean 1.

    student  1 0 0   squared deviations 0 1 1 / 1 1 1 / 1 9 1 = 16, / 8 = 2,   std 1.414: 4 > 2.414 is dropped
             0 2 0
             2 4 0
    teacher  1 0 0   squared deviations 0 1 1 / 9 0 1 / 0 0 0 = 12, / 8 = 1.5, std 1.225: 4 > 2.225 is dropped
             4 1 0   and the three entries where the teacher is 0
             1 1 1
    kept: column 0 rows 0, 2; column 1 row 1; column 2 row 2
    student  (1 + 2) / 2 = 1.5,  2,  0        teacher  (1 + 1) / 2 = 1,  1,  1
    cos = 3.5 / (2.5 * sqrt(3)) = .808290; the loss .191710 is summed over the layers, counted per sample
    """
    rest = [[9.0, 0, 9], [0, 9, 9]]  # rows that are not visual: they count for nothing
    student = torch.tensor([[1.0, 0, 0], [0, 2, 0], [2, 4, 0], *rest]).expand(2, 1, 5, 3)  # two layers
    teacher = torch.tensor([[1.0, 0, 0], [4, 1, 0], [1, 1, 1], *rest]).expand(2, 1, 5, 3)
    total, count = visual_attention_loss(student, teacher, mask("11100"), "released")
    assert total.item() == pytest.approx(2 * 0.191710, abs=1e-6)
    assert count == 1


@pytest.mark.parametrize("shifted", [True, False])
def test_kl_loss_by_hand(shifted):
    """Two answer tokens, V = 2, probabilities (teacher | student):

    position 0:  1/2 1/2 | 3/4 1/4   KL 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3)           = .143841
    position 1:  1/4 3/4 | 1/2 1/2   KL 1/4 ln(1/2) + 3/4 ln(3/2) = -.173287 + .304099 = .130812
    position 2:  3/4 1/4 | 1/2 1/2   KL the same, mirrored                             = .130812
    The answer is tokens 1 and 2: shifted .143841 + .130812, unshifted .130812 + .130812.
    """
    teacher = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.75, 0.25]]]).log()
    student = torch.tensor([[[0.75, 0.25], [0.5, 0.5], [0.5, 0.5]]]).log()
    logits = student + 3, teacher - 2  # any constant may be added
    total, count = kl_loss(*logits, torch.tensor([[IGNORE, 0, 1]]), shifted)
    assert total.item() == pytest.approx(0.274653 if shifted else 0.261624, abs=2e-6)
    assert count == 2


def test_lm_loss_by_hand():
    """p(token 1 = 0) = 3/4 stands at 0, p(token 2 = 1) = 1/4 at 1: ln(4/3) + ln 4 = .287682 + 1.386294."""
    logits = torch.tensor([[[0.75, 0.25], [0.75, 0.25], [0.01, 0.99]]]).log()
    total, count = lm_loss(logits, torch.tensor([[1, 0, 1]]))  # token 0 is predicted by nothing
    assert total.item() == pytest.approx(1.673976, abs=2e-6)
    assert count == 2


# ---------------------------------------------------------------- every loss: what is masked is inert


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("garbage", [0.0, 1e4])
@pytest.mark.parametrize("name", MAP_LOSSES)
def test_masked_rows_are_inert(name, garbage, side):
    """Padding, rows not asked for, sample 2, which has no image: neither value nor gradient knows them."""
    student, teacher, rows = example(name)
    before = value_and_gradient(name, student, teacher, rows)
    changed = {"student": student, "teacher": teacher}
    changed[side] = torch.where(rows[:, None, :, None], changed[side], garbage)
    after = value_and_gradient(name, changed["student"], changed["teacher"], rows)
    torch.testing.assert_close(after, before)
    assert after[2].transpose(1, 2)[~rows].abs().max() == 0
    assert after[2].transpose(1, 2)[rows].abs().max() > 0


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_unsupervised_positions_are_inert(name, garbage, side):
    student, teacher, rows = example(name)
    at = rows if name == "kl unshifted" else rows.roll(-1, 1)  # where a supervised token is predicted
    before = value_and_gradient(name, student, teacher, rows)
    changed = {"student": student, "teacher": teacher}
    changed[side] = torch.where(at[..., None], changed[side], garbage)
    after = value_and_gradient(name, changed["student"], changed["teacher"], rows)
    torch.testing.assert_close(after, before)
    assert after[2][~at].abs().max() == 0
    assert after[2][at].abs().max() > 0


def test_released_loss_ignores_the_students_sinks():
    """An entry above mean + std of its map is dropped on both sides, however large it grows."""
    student, teacher, _ = example("released")
    rows = torch.ones(6, 7, dtype=torch.bool)
    student[:, :, 5, 2] = 50.0
    sink = value_and_gradient("released", student, teacher, rows)
    assert sink[2][:, :, 5, 2].abs().max() == 0
    student[:, :, 5, 2] = 60.0
    torch.testing.assert_close(value_and_gradient("released", student, teacher, rows), sink)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_nothing_to_learn_from_is_zero_and_not_nan(name):
    """Text-only samples alone, or no answer token at all: the sum, the count and the gradient are 0."""
    student, teacher, rows = example(name)
    total, count, gradient = value_and_gradient(name, student, teacher, torch.zeros_like(rows))
    assert total == 0 and count == 0 and gradient.abs().max() == 0


def batch_of(columns, padding, has_image=None):
    """What query_rows reads of a batch: columns (B,P), padding (B,T)."""
    has_image = torch.ones(len(columns), dtype=torch.bool) if has_image is None else has_image
    return {"visual_columns": columns, "attention_mask": padding, "has_image": has_image}


@pytest.mark.parametrize("which", ["all", "image", "text"])
@pytest.mark.parametrize("name", MAP_LOSSES)
def test_attention_count_is_known_before_the_forward_pass(name, which):
    """From the batch alone it is what the loss counts afterwards; text-only samples are in neither."""
    random = torch.Generator().manual_seed(0)
    columns = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 0, 0], [3, 4, 5, 6, 7]])
    batch = batch_of(columns, mask("111111100", "1" * 9, "1" * 9), torch.tensor([True, False, True]))
    student, teacher = torch.rand(2, 3, 3, 9, 5, generator=random)
    _, count = evaluate(name, student, teacher, query_rows(batch, which))
    method = distill.Method({}, distance=MAP_LOSSES[name], rows=which)
    counts = loss_counts(batch | {"labels": torch.full((3, 9), IGNORE)}, method, {"lm": 1.0, "adl": 1.0})
    assert counts == {"lm": 0, "adl": count} and count > 0


@pytest.mark.parametrize("shifted", [True, False])
def test_answer_count_is_known_before_the_forward_pass(shifted):
    """A first token that is supervised is predicted by nothing; unshifted KL compares at it all the same."""
    labels, logits = torch.tensor([[5, IGNORE, 6, 7], [IGNORE, 8, 9, IGNORE]]), torch.randn(2, 4, 12)
    method = distill.Method({}, kl_shifted=shifted)
    counts = loss_counts({"labels": labels}, method, {"lm": 1.0, "kl": 1.0})
    assert counts["lm"] == lm_loss(logits, labels).count == 4
    assert counts["kl"] == kl_loss(logits, logits, labels, shifted).count == (4 if shifted else 5)


# ---------------------------------------------------------------- every loss: who learns, in which precision


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_gradient_reaches_the_student_and_never_the_teacher(name):
    student, teacher, rows = example(name)
    student.requires_grad_(), teacher.requires_grad_()
    evaluate(name, student, teacher, rows)[0].backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_losses_are_computed_in_float32(name):
    student, teacher, rows = example(name)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    low, high = evaluate(name, student, teacher, rows), evaluate(name, student.float(), teacher.float(), rows)
    assert low[0].dtype == torch.float32
    assert torch.equal(low[0], high[0])


# ---------------------------------------------------------------- every loss: sums and counts add up


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_sums_and_counts_of_micro_batches_add_up(name):
    """Micro-batches of 1, 3 and 2 samples: totals, divided once, give the whole batch's loss and gradient."""
    student, teacher, rows = example(name)
    total, count, gradient = value_and_gradient(name, student, teacher, rows)
    sizes = [1, 3, 2]
    parts = zip(*(x.split(sizes) for x in (student, teacher, rows)))
    sums, counts, gradients = zip(*(value_and_gradient(name, *part) for part in parts))
    assert sum(counts) == count
    torch.testing.assert_close(sum(sums) / sum(counts), total / count)
    torch.testing.assert_close(torch.cat(gradients) / sum(counts), gradient / count)

    mean_of_means = sum(part / number for part, number in zip(sums, counts)) / len(sizes)
    assert abs(mean_of_means - total / count) > 1e-4 * total / count  # the wrong average is seen to be wrong
    wrong = torch.cat([part / number / len(sizes) for part, number in zip(gradients, counts)])
    assert (wrong - gradient / count).norm() > 0.1 * (gradient / count).norm()


# ---------------------------------------------------------------- KL: the shift, the vocabularies


@pytest.mark.parametrize(
    "position, shifted_moves, unshifted_moves",
    [
        (1, False, False),  # before "ASSISTANT:"
        (2, True, False),  # "ASSISTANT:", which predicts the first answer token
        (3, True, True),  # the first answer token
        (4, False, True),  # the last answer token, which predicts what follows it
        (5, False, False),
    ],
)
def test_kl_shift(position, shifted_moves, unshifted_moves):
    """The answer is tokens 3 and 4 of 6."""
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 6, 9, generator=random)
    labels = torch.tensor([[IGNORE, IGNORE, IGNORE, 7, 8, IGNORE]])
    moved = teacher.clone()
    moved[:, position] = moved[:, position].flip(-1)
    for shifted, moves in ((True, shifted_moves), (False, unshifted_moves)):
        before, after = (kl_loss(student, logits, labels, shifted)[0] for logits in (teacher, moved))
        assert (before != after) == moves


@pytest.mark.parametrize("student_size, teacher_size", [(8, 12), (12, 8)])
@pytest.mark.parametrize("shifted", [True, False])
def test_kl_of_vocabularies_of_different_size(student_size, teacher_size, shifted):
    """Both are cut to the smaller before the softmax: what lies beyond is padding, whatever it holds."""
    student, teacher, rows = example("kl")
    labels = torch.where(rows, 3, IGNORE)

    def padded(logits, size):
        return F.pad(logits[..., :8], (0, size - 8), value=30.0)

    total, count = kl_loss(padded(student, student_size), padded(teacher, teacher_size), labels, shifted)
    expected = kl_loss(student[..., :8], teacher[..., :8], labels, shifted)
    torch.testing.assert_close((total, count), expected)
    assert not torch.allclose(kl_loss(student, teacher, labels, shifted)[0], total)  # 11 words are not 8


def test_kl_and_soft_cross_entropy_have_the_same_gradient():
    """What the released code minimises, -sum p_t log p_s, differs from the KL by a constant."""
    student, teacher, rows = example("kl unshifted")
    _, _, gradient = value_and_gradient("kl unshifted", student, teacher, rows)
    student.requires_grad_()
    F.cross_entropy(student[rows], teacher[rows].softmax(-1), reduction="sum").backward()
    torch.testing.assert_close(gradient, student.grad)


# ---------------------------------------------------------------- which layers


@pytest.mark.parametrize("depth, first, last", [(24, 8, 16), (40, 12, 27)])
def test_understanding_layers_of_the_paper(depth, first, last):
    assert understanding_layers(depth) == list(range(first, last + 1))


@pytest.mark.parametrize("teacher", [False, True])
def test_layer_choices_follow_exact_integer_arithmetic(teacher):
    """Where 0.3 * L or 0.7 * L is a whole number, no rounding error may move the border."""
    for depth in range(1, 201):
        names = ("early", "intermediate", "later", "all")
        early, intermediate, later, whole = (choose_layers(name, depth, teacher) for name in names)
        assert early == [i for i in range(depth) if 10 * i < 3 * depth]
        assert intermediate == [i for i in range(depth) if 3 * depth <= 10 * i < 7 * depth]
        assert later == [i for i in range(depth) if 10 * i >= 7 * depth]
        assert early + intermediate + later == whole == list(range(depth))


@pytest.mark.parametrize(
    "depth, student, teacher",
    [(24, (8, 14), (8, 15)), (28, (9, 15), (9, 17)), (32, (11, 17), (11, 19)), (40, (13, 19), (13, 23))],
)
def test_released_layers(depth, student, teacher):
    """The first and last layer, by depth of the language model; the teacher's window has m - k + 1 layers."""
    for is_teacher, (first, last) in ((False, student), (True, teacher)):
        assert choose_layers("released", depth, is_teacher) == list(range(first, last + 1))


def test_released_layers_of_an_unknown_depth():
    with pytest.raises(ValueError, match="26"):
        choose_layers("released", 26, False)


# ---------------------------------------------------------------- who matches whom


def test_group_matching_of_the_released_pair():
    """1.8B (24 layers, 8..14) from 4B (40 layers, 13..23): windows of n = 11 - 7 + 1 = 5."""
    groups = match_layers(choose_layers("released", 24, False), choose_layers("released", 40, True))
    assert groups[0] == [13, 14, 15, 16, 17]
    assert groups[-1] == [19, 20, 21, 22, 23]
    assert [len(group) for group in groups] == [5] * 7


@pytest.mark.parametrize("k, m", [(1, 1), (1, 6), (3, 5), (6, 6), (9, 16)])
def test_group_matching_uses_every_teacher_layer_in_order(k, m):
    teacher = list(range(20, 20 + m))
    groups = match_layers(list(range(k)), teacher)
    assert len(groups) == k
    assert {len(group) for group in groups} == {m - k + 1}
    assert sorted({layer for group in groups for layer in group}) == teacher
    assert [group[0] for group in groups] == teacher[:k]  # each window starts one layer later
    assert all(group == list(range(group[0], group[-1] + 1)) for group in groups)


@pytest.mark.parametrize(
    "k, teacher, matched",
    [
        (5, range(1, 11), [1, 3, 5, 7, 9]),
        (7, range(13, 24), [13, 14, 16, 17, 19, 20, 22]),
        (3, range(4, 7), [4, 5, 6]),
    ],
)
def test_simple_matching(k, teacher, matched):
    assert match_layers(list(range(k)), list(teacher), "simple") == [[layer] for layer in matched]


@pytest.mark.parametrize("student, teacher", [([3, 4, 5], [7, 8]), ([], [7, 8])])
@pytest.mark.parametrize("how", ["group", "simple"])
def test_matching_that_is_impossible_names_the_layers(student, teacher, how):
    with pytest.raises(ValueError) as error:
        match_layers(student, teacher, how)
    assert str(student) in str(error.value) and str(teacher) in str(error.value)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="nearest"):
        match_layers([1], [1], "nearest")
    with pytest.raises(ValueError, match="l1"):
        visual_attention_loss(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2), mask("11"), "l1")
    with pytest.raises(ValueError, match="middle"):
        choose_layers("middle", 24, False)
    with pytest.raises(ValueError, match="none of them"):
        query_rows(batch_of(torch.zeros(1, 2, dtype=torch.long), mask("11")), "none of them")


def test_group_mean_by_hand():
    maps = {5: torch.tensor([[[1.0, 0.0]]]), 6: torch.tensor([[[0.0, 3.0]]]), 7: torch.tensor([[[2.0, 3.0]]])}
    expected = torch.tensor([[[[0.5, 1.5]]], [[[1.0, 3.0]]], [[[2.0, 3.0]]]])  # (k=3,B=1,T=1,P=2)
    assert torch.equal(torch.stack(group_mean(maps, [[5, 6], [6, 7], [7]])), expected)


LEFT, RIGHT = [1.0, 0.0], [0.0, 1.0]  # where a row looks, with P = 2


def maps_of(*layers):
    """Two rows per layer, the same in both samples -> {10: (B=2,T=2,P=2), 11: ...}"""
    return {10 + i: torch.tensor(layer).repeat(2, 1, 1) for i, layer in enumerate(layers)}


def test_adaptive_match_by_hand():
    """Teacher, flattened: A (1,0,1,0), B (1,0,0,1), C (0,1,0,1). Student:

    layer 0 is C, only fainter: C.   layer 1 is B: B.
    layer 2 is A in sample 0: cosine 1, 1/2, 0.
               100 * (0,1,0,2) in sample 1: cosine 0, 2/sqrt(10) = .63, 3/sqrt(10) = .95.
    Together 1, 1.13, .95: B, which neither sample alone prefers, and however strongly sample 1 looks.
    """
    teacher = maps_of([LEFT, LEFT], [LEFT, RIGHT], [RIGHT, RIGHT])
    student = maps_of([[0.0, 0.1], [0.0, 0.1]], [LEFT, RIGHT], [LEFT, LEFT])
    student[12][1] = torch.tensor([[0.0, 100.0], [0.0, 200.0]])
    assert adaptive_match(student, teacher, mask("11", "11")) == [[12], [11], [11]]
    targets = matched_targets(student, teacher, mask("11", "11"), "adaptive")
    assert torch.equal(torch.stack(targets), torch.stack([teacher[12], teacher[11], teacher[11]]))


@pytest.mark.parametrize("rows, chosen", [("10", 0), ("11", 1)])
@pytest.mark.parametrize(
    "teacher, student",
    [
        # row 0 looks left, row 1 nine times as much right
        (maps_of([LEFT, LEFT], [RIGHT, RIGHT]), maps_of([LEFT, [0.0, 9.0]])),
        # the first teacher layer agrees in row 0, and would lose by the length that a loud row 1 gives it
        (maps_of([LEFT, [0.0, 9.0]], [[1.0, 1.0], [0.0, 0.0]]), maps_of([LEFT, [0.0, 0.0]])),
        # sample 1, clearly left, outvotes sample 0, faintly right: unless a loud row 1 makes its row 0 small
        (
            maps_of([LEFT, [0.0, 0.0]], [RIGHT, [0.0, 0.0]]),
            {10: torch.tensor([[[0.9, 1.0], [0.0, 0.0]], [LEFT, [0.0, 99.0]]])},
        ),
    ],
    ids=["student", "teacher", "weight of a sample"],
)
def test_adaptive_match_ignores_masked_rows(teacher, student, rows, chosen):
    """Masked, row 1 has no say in the choice; unmasked it decides."""
    assert adaptive_match(student, teacher, mask(rows, rows)) == [[10 + chosen]]


# ---------------------------------------------------------------- which queries


@pytest.mark.parametrize(
    "which, rows",
    [
        ("all", ["01111100", "00001111", "00000000"]),
        ("image", ["01100000", "00001100", "00000000"]),
        ("text", ["00011100", "00000011", "00000000"]),
    ],
)
def test_query_rows(which, rows):
    """Image at once, then padding; image in a later turn; no image, columns as collate has them."""
    columns = torch.tensor([[1, 2], [4, 5], [0, 0]])
    has_image = torch.tensor([True, True, False])
    padding = mask("11111100", "11111111", "11111110")
    assert torch.equal(query_rows(batch_of(columns, padding, has_image), which), mask(*rows))


def test_image_and_text_rows_are_all_rows():
    columns, padding = torch.tensor([[2, 3, 4], [0, 1, 2]]), mask("11111110", "11110000")
    whole, image, text = (query_rows(batch_of(columns, padding), name) for name in ("all", "image", "text"))
    assert torch.equal(image | text, whole) and not (image & text).any()
    assert image.sum(1).tolist() == [3, 3] and text.sum(1).tolist() == [2, 1]


# ---------------------------------------------------------------- TAF


def test_taf_trains_the_student_map_alone():
    teacher = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 5))
    taf = TeacherAdapterFetch(teacher, 5, 4)
    z = torch.randn(2, 6, 3)
    out = taf(z)
    assert out.shape == (2, 6, 4)
    assert torch.equal(out, taf.fetch(teacher(z)))
    out.square().sum().backward()
    trained = {name for name, p in taf.named_parameters() if p.requires_grad}
    assert trained == {"student.weight", "student.bias"}
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.abs().max() > 0 for p in taf.student.parameters())


@pytest.mark.parametrize("gelu, expected", [(False, [1.0, -1.0]), (True, [0.8413447, -0.1586553])])
def test_taf_gelu_by_hand(gelu, expected):
    """x Phi(x), the erf form: Phi(1) = .8413447, Phi(-1) = .1586553 (the tanh form would give .841192)."""
    taf = TeacherAdapterFetch(nn.Identity(), 2, 2, gelu)
    taf.student.weight.data = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    taf.student.bias.data = torch.tensor([0.0, 1.0])
    got = taf(torch.tensor([1.0, -1.0]))
    assert got.tolist() == pytest.approx([expected[0], 10 * expected[1] + 1], abs=1e-5)


def test_taf_parameter_count_of_the_paper():
    """Teacher 4B, student 1.8B: 2560 * 2048 + 2048 = 5.24 M."""
    with torch.device("meta"):
        taf = TeacherAdapterFetch(nn.Linear(1, 1), 2560, 2048)
    assert sum(p.numel() for p in taf.parameters() if p.requires_grad) == 5_244_928


# ---------------------------------------------------------------- maps, and the whole method


def test_visual_map_by_hand():
    """Two heads, two queries, three keys; the columns 2 and 0."""
    attention = torch.tensor([[[[1.0, 0, 0], [0.2, 0.8, 0]], [[0.5, 0.5, 0], [0.4, 0, 0.6]]]])
    expected = torch.tensor([[[0.0, 0.75], [0.3, 0.3]]])
    torch.testing.assert_close(visual_map(attention, torch.tensor([[2, 0]])), expected)


def test_the_methods_are_the_papers_table():
    """method.md, sections 5 and 6: which losses in which stage, whose adapter."""
    table = {
        name: {stage: set(terms) for stage, terms in method.weights.items()}
        for name, method in METHODS.items()
    }
    kd = {"1": {"lm", "kl"}, "2": {"lm", "kl"}, "3": {"lm"}}
    vat = kd | {"2": {"lm", "kl", "adl"}}
    assert table == {
        "sft": {"1": {"lm"}, "2": {"lm"}, "3": {"lm"}}, "kd": kd,
        "compodistill": vat, "compodistill-rows": vat, "released": vat,
    }  # fmt: skip
    assert {name for name, method in METHODS.items() if method.taf} == {
        "compodistill",
        "compodistill-rows",
        "released",
    }
    weights = [w for method in METHODS.values() for terms in method.weights.values() for w in terms.values()]
    assert set(weights) == {1.0}
    paper = METHODS["compodistill"]
    assert (paper.distance, paper.rows, paper.layers, paper.matching) == (
        "cosine",
        "all",
        "intermediate",
        "group",
    )


def test_distillation_loss_is_the_weighted_sum_of_its_terms():
    """Each divided by its count, or by given totals; a term without a weight is not computed."""
    torch.manual_seed(0)
    real, columns = mask("11111111", "11111110"), torch.tensor([[1, 2, 3], [2, 3, 4]])
    batch = batch_of(columns, real) | {"labels": torch.full((2, 8), IGNORE)}
    batch["labels"][:, 6:] = torch.tensor([[3, 4], [5, IGNORE]])
    student, teacher = (
        Output(None, torch.randn(2, 8, 9), {i: torch.rand(2, 2, 8, 8).tril() for i in layers}, {})
        for layers in ((1, 2), (1, 2, 3))
    )
    method, weights = distill.Method({}, matching="simple"), {"lm": 2.0, "kl": 0.5, "adl": 3.0}
    loss, terms = distill.distillation_loss(student, teacher, batch, method, weights)
    expected = 2 * mean(lm_loss(student.logits, batch["labels"]))
    expected += 0.5 * mean(kl_loss(student.logits, teacher.logits, batch["labels"]))
    maps = [
        [visual_map(out.attentions[i], columns) for i in (1, 2)] for out in (student, teacher)
    ]  # 1, 1 + 3 // 2
    expected += 3 * mean(visual_attention_loss(*maps, query_rows(batch, "all")))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert [terms[name].count.item() for name in ("lm", "kl", "adl")] == [3, 3, 2]
    totals = {name: 10 * term.count for name, term in terms.items()}
    tenth, _ = distill.distillation_loss(student, teacher, batch, method, weights, totals)
    torch.testing.assert_close(10 * tenth, loss)
    loss, terms = distill.distillation_loss(student, None, batch, method, {"lm": 1.0})
    assert terms.keys() == {"lm"} and loss.item() == pytest.approx(
        mean(lm_loss(student.logits, batch["labels"]))
    )


def test_a_distance_has_values_of_what_it_counts(monkeypatch):
    """Samples with a picture, or rows; values of another shape are refused, and so are no maps at all."""
    maps, rows = torch.rand(1, 2, 4, 3), mask("0111", "0011")
    assert visual_attention_loss(maps, maps, rows, "cosine").count == 2
    assert visual_attention_loss(maps, maps, rows, "cosine-rows").count == 5
    by_row = DISTANCES["cosine-rows"].function
    for function in (lambda s, t, rows: F.l1_loss(s, t), lambda s, t, rows: s - t, by_row):  # a number, a map
        monkeypatch.setitem(DISTANCES, "new", distill.Distance(function, "samples"))
        with pytest.raises(ValueError, match=r"its entry in DISTANCES counts samples: \(2,\)"):
            visual_attention_loss(maps, maps, rows, "new")
    with pytest.raises(ValueError, match="no attention map"):
        visual_attention_loss([], [], rows)


def test_maps_and_rows_must_fit_each_other():
    """Maps with heads, where there are as many heads as samples, would be masked by the wrong dimension."""
    with_heads, rows = torch.rand(1, 2, 2, 4, 3), mask("0111", "0011")
    with pytest.raises(ValueError, match="do not fit rows"):
        visual_attention_loss(with_heads, with_heads, rows)
    maps = torch.rand(2, 2, 4, 3)
    with pytest.raises(ValueError, match="zip"):
        visual_attention_loss(maps, maps[:1], rows)


# ---------------------------------------------------------------- the whole path


def test_attention_gradient_stops_at_the_highest_matched_layer():
    """Layers 1 and 2 of 5 are matched: the loss teaches them and layer 0, and layers 3 and 4 hear nothing."""
    torch.manual_seed(0)
    vision = SiglipConfig(16, 32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    text = QwenConfig(50, 32, 48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2)
    student = VLM(VLMConfig(vision, text, taf_width=24))
    teacher = VLM(VLMConfig(vision, text))
    ids = torch.tensor([[3, -200, -200, -200, -200, 5, 6, 7], [3, 4, -200, -200, -200, -200, 8, 0]])
    real, columns = mask("11111111", "11111110"), torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5]])
    rows = query_rows(batch_of(columns, real), "all")
    batch = dict(pixel_values=torch.randn(2, 3, 16, 16), attention_mask=real)
    request = lean.VisualAttention(lean.shortest_slice(rows), columns)
    ours = student(ids, attention=dict.fromkeys([1, 2], request), **batch).attentions
    with torch.no_grad():
        theirs = teacher(ids, attention=dict.fromkeys([1, 2, 3], request), **batch).attentions
    targets = group_mean(theirs, match_layers([1, 2], [1, 2, 3]))
    total, count = visual_attention_loss(ours.values(), targets, rows[:, request.rows])
    (total / count).backward()

    def silent(module):
        return all(p.grad is None or p.grad.abs().max() == 0 for p in module.parameters())

    for i, layer in enumerate(student.lm.model.layers):
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            assert silent(projection) == (i > 2)
        assert silent(layer.mlp) == silent(layer.self_attn.v_proj) == (i > 1)  # after layer 2's own attention
    assert silent(student.lm.lm_head) and silent(student.lm.model.norm) and silent(student.adapter.teacher)
    assert not silent(student.adapter.student)  # P_s learns where to put the picture's tokens
    assert silent(teacher)


def test_taf_of_an_adapter_kept_in_bfloat16():
    """P_t frozen in bfloat16, P_s trained in float32: P_s maps what P_t gave, in its own precision."""
    torch.manual_seed(0)
    taf = distill.TeacherAdapterFetch(torch.nn.Linear(6, 5).bfloat16(), 5, 4)
    z = torch.randn(2, 3, 6, dtype=torch.bfloat16)
    assert taf(z).dtype == torch.float32
    torch.testing.assert_close(taf(z), F.linear(taf.teacher(z).float(), taf.student.weight, taf.student.bias))
