"""Kinds of faults, each mended in one place: other people's files, other people's machines, and attack.

Faults of one file only (a config, a record, a benchmark) are tested beside what reads it.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import load_file as load

import data
import eval as evaluation
import model
import train
from evals import pictures
from support import checkpoint, files, loading, program, ranks, world
from support.errors import BadInput, one_line, told
from tiny import students
from training import log, recipes

ROOT = Path(model.__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
STEER = "\x1b[2J\nerror: all is well\u202e"  # clears the screen, fakes a line, turns the direction of writing


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return world.make_world(tmp_path_factory.mktemp("small") / "world", 0, 12, 4, 6)


def command(small, out, *flags):
    where = [
        "--student",
        ROOT / "tiny/compodistill",
        "--data",
        small / "tune.json",
        "--images",
        small / "images",
    ]
    return [str(x) for x in ("--stage", 3, *where, "--batch-size", 2, "--out", out, *flags)]


def refused(main, match, argv):
    """The one sentence that a program ends with."""
    with pytest.raises(SystemExit, match=match) as error:
        main([str(word) for word in argv])
    text = str(error.value)
    assert text.startswith("error: ") and text.isprintable(), text
    return text


def started(program_file, *argv, ranks=0, **streams):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    )
    words = [sys.executable, *launcher, str(program_file), *map(str, argv)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | streams
    return subprocess.Popen(words, env=ENVIRONMENT, cwd=ROOT, start_new_session=True, **streams)


def ended(process, folder, limit=60):
    """(exit status, what was printed) of a process that ends in time, and leaves nobody at work in folder."""
    try:
        text, _ = process.communicate(timeout=limit)
    finally:
        left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout.split()
        for number in left:
            os.kill(int(number), signal.SIGKILL)
    ours = [f'File "{ROOT}/{name}' for name in ("train.py", "eval.py", "support/", "training/", "tiny/")]
    assert not left and not any(line in text for line in ours), text
    return process.returncode, text


# ---------------------------------------------------------------- workers


def make(key):
    if key == "bad":
        raise BadInput(f"a bad one {STEER}")
    if key == "short":
        torch.empty(1 << 55)
    if key == "slow":
        time.sleep(60)
    if key == "bug":
        raise KeyError("ours")
    return {"x": torch.full((2,), float(key)), "name": str(key)}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_arrives_as_it_is(workers, monkeypatch):
    batches = loading.batches_made(make, [1, 2, "bad", 3], workers)
    assert [next(batches)["x"].tolist() for _ in range(2)] == [[1, 1], [2, 2]]
    with pytest.raises(BadInput) as error:
        next(batches)
    assert str(error.value) == r"a bad one \x1b[2J\nerror: all is well\u202e"
    with pytest.raises((BadInput, RuntimeError)) as error:
        next(loading.batches_made(make, ["short"], workers))
    assert "memory of this machine is used up" in str(error.value)
    with pytest.raises(KeyError), program.one_sentence():  # which ends all workers
        next(loading.batches_made(make, ["bug"], workers))
    assert not program.multiprocessing.active_children()


def test_waiting_for_a_batch_has_a_limit(monkeypatch):
    monkeypatch.setattr(loading, "WAIT", 1)
    with pytest.raises(SystemExit, match="error: no batch came from --workers.* shared memory"):
        with program.one_sentence():
            next(loading.batches_made(make, ["slow"], 1))


def test_a_worker_that_is_killed(monkeypatch):
    """One sentence, with what the same command goes on from; workers that ignore SIGTERM end, too."""

    def kill():
        time.sleep(0.5)
        os.kill(program.multiprocessing.active_children()[0].pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(SystemExit, match="error: one of --workers was killed.*; less; from step 7"):
        with program.one_sentence(less="less", going_on=lambda: "; from step 7"):
            list(loading.batches_made(make, [1, "slow", "slow"], 2))
    assert not program.multiprocessing.active_children()


MANY_FORKS = """
from support.loading import batches_made
from support.ranks import agree, ranks_of_torchrun

with ranks_of_torchrun("gloo"):
    for i in range(150):
        agree({"i": i})
        assert next(batches_made(str, [i], 1)) == str(i)
print("all came")
"""


@pytest.mark.slow
def test_workers_that_are_forked_right_after_a_message(tmp_path):
    """In Python 3.11 one of some 80 was forked holding a lock, and waited for it for ever."""
    (tmp_path / "many.py").write_text(MANY_FORKS)
    process = started(tmp_path / "many.py", ranks=2)
    status, text = ended(process, tmp_path, limit=120)
    assert status == 0 and text.count("all came") == 2, text


def test_bench_says_that_it_goes_on_after_a_worker_was_killed(small, tmp_path, monkeypatch):
    where = ["--annotations", small / "test", "--images", small / "images", "--workers", 1]
    where += ["--model", ROOT / "tiny/teacher", "--answers", tmp_path / "a.jsonl", "--batch-size", 2]

    def killed(*_):
        os.kill(program.multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(5)

    monkeypatch.setattr(evaluation.answers, "choose", killed)
    said = refused(evaluation.main, "one of --workers was killed", ["bench", "sugarcrepe", *where])
    assert said.endswith("; the same command goes on with the answers so far")


@pytest.mark.slow
def test_bench_ends_when_a_worker_does(small, tmp_path):
    """A picture that cannot be decoded, prepared by a worker; no process outlives it."""
    shutil.copytree(small, tmp_path / "w")
    for picture in (tmp_path / "w/images").glob("test-*.png"):
        picture.write_bytes(picture.read_bytes()[:60])
    where = ["--annotations", tmp_path / "w/test", "--images", tmp_path / "w/images", "--workers", 2]
    where += ["--model", ROOT / "tiny/teacher", "--answers", tmp_path / "a.jsonl"]
    code, text = ended(started("eval.py", "bench", "sugarcrepe", *where), tmp_path)
    assert code == 1 and text.count("error:") == 1 and "Traceback" not in text, text


# ---------------------------------------------------------------- the machine


def overflow(kind):
    if kind == "memory":
        torch.empty(1 << 55)
    if kind == "gpu":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    if kind == "numpy":
        np.empty((1 << 55,))
    if kind == "ranks":
        raise torch.distributed.DistBackendError("NCCL error in: x.cpp:1, unhandled system error")


@pytest.mark.parametrize(
    "kind, said",
    [
        ("memory", "memory of this machine"),
        ("numpy", "memory of this machine"),
        ("gpu", "memory of the GPU is used up .*2.00 GiB"),
        ("ranks", "connection to the other ranks"),
    ],
)
def test_errors_of_the_machine_are_one_sentence(kind, said):
    with pytest.raises(SystemExit, match=f"error: .*{said}.*") as error:
        with program.one_sentence():
            overflow(kind)
    assert str(error.value).isprintable()
    assert ("; a smaller --batch-size needs less" in str(error.value)) == (kind != "ranks")


def test_errors_of_our_own_keep_their_traceback():
    for error in (RuntimeError("The size of tensor a (3) must match"), KeyError("x"), AssertionError()):
        assert told(error) is None
        with pytest.raises(type(error)), program.one_sentence():
            raise error


@pytest.mark.slow
def test_compile_without_a_compiler(small, tmp_path):
    environment = {
        **ENVIRONMENT,
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    argv = [sys.executable, str(ROOT / "train.py"), *command(small, tmp_path, "--steps", 2, "--compile")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "error: --compile does not work here; leave it out" in done.stderr and "batch-size" not in done.stderr
    )


# ---------------------------------------------------------------- which model, which data


def test_a_fingerprint_reads_every_tensor_of_a_large_file(tmp_path, monkeypatch):
    """One number of one tensor in the middle, another tokenizer; but not a file that was only touched."""
    shutil.copytree(ROOT / "tiny/teacher", tmp_path / "m")
    monkeypatch.setattr(checkpoint, "SMALL", 1000)
    seen, file = [checkpoint.fingerprint(tmp_path / "m")], tmp_path / "m/model.safetensors"
    os.utime(file)
    assert checkpoint.fingerprint(tmp_path / "m") == seen[0]
    for name in (
        "lm.model.layers.3.mlp.up_proj.weight",
        "vision.post_layernorm.bias",
        "adapter.linear_1.weight",
    ):
        tensors = load(file)
        tensors[name].view(-1)[0] += 1
        checkpoint.save_file(tensors, file, metadata={"format": "pt"})
        seen.append(checkpoint.fingerprint(tmp_path / "m"))
    text = (tmp_path / "m/tokenizer.json").read_text()
    (tmp_path / "m/tokenizer.json").write_text(text.replace("circle", "cercle"))
    seen.append(checkpoint.fingerprint(tmp_path / "m"))
    assert len(set(seen)) == 5


# ---------------------------------------------------------------- runs that cannot learn


def talk(question, answer, **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def written(folder, records):
    (folder / "data.json").write_text(json.dumps(records))
    return ["--data", folder / "data.json"]


def last_row(out, stage=3):
    return json.loads((out / f"compodistill/stage{stage}.jsonl").read_text().splitlines()[-1])


def test_answers_that_are_cut_off_are_counted_and_replaced(small, tmp_path):
    """Of eight records three have questions beyond --max-length, two are cut in their answer; one has a first
    turn of gpt and a last question, which LLaVA passes over, too.
    """
    long = talk("why " * 200, "yes", id="long")
    records = [talk("What?", "no " * 200, id="cut")] * 2 + [talk("What?", "yes", id="good")] * 2 + [long] * 3
    odd = talk("What?", "yes")["conversations"]
    odd = [{"from": "gpt", "value": "Hello."}, *odd, {"from": "human", "value": "And?"}]
    records += [{"id": "odd", "conversations": odd}]
    argv = command(
        small, tmp_path, *written(tmp_path, records), "--max-length", 100, "--steps", 4, "--log-every", 1
    )
    train.main(argv)
    row, bad = last_row(tmp_path), (tmp_path / "compodistill/stage3.bad.jsonl").read_text().splitlines()
    order = [i for batch in data.batches_of(8, 4, 1, 2, 0, 1, 0) for i in batch]
    assert sorted(order) == list(range(8))  # each record once; for 4, 5 and 6 record 7 stands in
    assert (row["bad"], row["cut"], row["mended"]) == (3 + 2 + 1, 2, 4)
    assert len(bad) == 6 and all("'long': nothing of an answer is within 100 tokens" in line for line in bad)


def test_records_without_a_picture_are_left_out_where_the_adapter_alone_is_trained(small, tmp_path, capsys):
    records = [talk("What?", "yes")] * 5 + json.loads((small / "tune.json").read_text())[:3]
    argv = command(small, tmp_path, *written(tmp_path, records), "--steps", 2, "--stage", 1)
    argv[argv.index("--student") + 1] = str(ROOT / "tiny/student")
    train.main(argv)
    said = capsys.readouterr().out
    assert "2, of which 0 are done; 3 samples\n5 records without a picture are left out" in said
    assert last_row(tmp_path, 1)["bad"] == 0


def test_nothing_to_learn_stops_with_the_cause(small, tmp_path):
    """No picture in stage 1, whose adapter alone is trained; a loss of weight 0."""
    argv = command(small, tmp_path, *written(tmp_path, [talk("What?", "yes")] * 5), "--steps", 2)
    argv[argv.index("--student") + 1] = str(ROOT / "tiny/student")
    refused(
        train.main,
        "data.json: no record has a picture, and an adapter alone is trained",
        [*argv, "--stage", 1],
    )


def test_attention_without_a_picture_is_refused(small, tmp_path):
    argv = command(
        small, tmp_path, *written(tmp_path, [talk("What?", "yes")] * 5), "--steps", 2, "--stage", 2
    )
    refused(train.main, "no record has a picture, over which L_ADL compares attention", argv)


def test_a_gradient_of_nothing_stops(small, tmp_path, monkeypatch):
    def nothing(module, norm):
        for parameter in module:
            parameter.grad.zero_()
        return torch.zeros(())

    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", nothing)
    refused(train.main, "the gradient of step 1 is exactly 0", command(small, tmp_path, "--steps", 2))
    assert not (tmp_path / "compodistill/stage3").exists()


def test_every_record_of_an_epoch_is_seen(small, tmp_path, capsys):
    train.main(command(small, tmp_path, "--epochs", 1, "--batch-size", 5))
    assert "steps: 3, of which 0 are done; 12 samples" in capsys.readouterr().out


def test_data_sets_have_each_their_folder_of_pictures(tmp_path):
    """The same name in both, another picture; one folder for all still works, two for three do not."""
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "red")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / name / "x.png")
        (tmp_path / f"{name}.json").write_text(json.dumps([talk("<image>\nWhat?", "yes", image="x.png")]))
    tokenizer, sets = data.load_tokenizer(ROOT / "tiny/teacher"), [tmp_path / "a.json", tmp_path / "b.json"]

    def reds(images):
        dataset = data.LlavaDataset(sets, images, tokenizer, 16, 40)
        return [dataset[i]["pixel_values"][0].mean().item() > 0 for i in range(2)]

    assert reds([tmp_path / "a", tmp_path / "b"]) == [True, False] and reds(tmp_path / "b") == [False] * 2
    with pytest.raises(BadInput, match="3 --images, 2 --data"):
        reds([tmp_path / name for name in "abc"])


# ---------------------------------------------------------------- text on a terminal


def test_text_from_files_cannot_steer_the_terminal(small, tmp_path):
    assert one_line(STEER) == r"\x1b[2J\nerror: all is well\u202e" and one_line("é 中 ok") == "é 中 ok"
    assert one_line("\udc80\x00\u2028\x9b") == r"\udc80\x00\u2028\x9b"
    folder = shutil.copytree(ROOT / "tiny/teacher", tmp_path / f"m{STEER}")
    tensors = load(folder / "model.safetensors") | {STEER: torch.zeros(1)}
    checkpoint.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(evaluation.main, r"tensor \\x1b", ["chat", "--model", folder, "--question", "What?"])
    argv = command(small, tmp_path, *written(tmp_path, [talk("<image>", "yes", image="no.png", id=STEER)]))
    refused(train.main, r"record '\\\\?x1b", argv)
    table = evaluation.answers.benchmarks.markdown(["", "n"], [[STEER, 3]])
    assert len(table.splitlines()) == 3 and "\x1b" not in table


# ---------------------------------------------------------------- no regular files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(name, tmp_path):
    shutil.copytree(ROOT / "tiny/teacher", tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    os.mkfifo(tmp_path / "m" / name)
    with pytest.raises(BadInput, match=f"{name}.*a pipe or a device"):
        model.load(tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    (tmp_path / "m" / name).mkdir()
    with pytest.raises(BadInput, match=f"{name}.*a folder"):
        model.load(tmp_path / "m")


def test_a_pipe_as_picture_data_or_answers_is_not_waited_for(small, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    ask = ["chat", "--model", ROOT / "tiny/teacher", "--question", "What?", "--image", tmp_path / "pipe"]
    refused(evaluation.main, "a pipe or a device", ask)
    refused(train.main, "a pipe or a device", [*command(small, tmp_path), "--data", tmp_path / "pipe"])
    bench = ["bench", "sugarcrepe", "--annotations", small / "test", "--score-only", tmp_path / "pipe"]
    refused(evaluation.main, "a pipe or a device", bench)


def test_links_in_a_circle_are_one_sentence(small, tmp_path):
    folder, loop = shutil.copytree(small, tmp_path / "w"), tmp_path / "loop"
    loop.symlink_to(loop)
    (folder / "images/test-0.png").unlink()
    (folder / "images/test-0.png").symlink_to("test-0.png")
    where = ["--annotations", folder / "test", "--model", ROOT / "tiny/teacher", "--limit", 1]
    refused(
        evaluation.main,
        "pictures are missing",
        ["bench", "sugarcrepe", *where, "--images", folder / "images"],
    )
    bench = ["bench", "sugarcrepe", *where, "--images", small / "images", "--answers", tmp_path / "a.jsonl"]
    evaluation.main([*map(str, bench), "--out", str(loop)])
    assert json.loads(loop.read_text())["benchmark"] == "sugarcrepe"  # in place of the link
    with pytest.raises(BadInput, match="test-0.png cannot be read as a picture .*symbolic links"):
        data.open_picture(data.inside(folder / "images", "test-0.png"))
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(OSError, match="a pipe or a device"):
        log.drop_rows_after(tmp_path / "log.jsonl", 0)


def test_a_tokenizer_that_cannot_write_every_word(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "yes": 1}, unk_token="?"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match="'why' is beyond this tokenizer.json"):
        data.text_ids(data.load_tokenizer(tmp_path), "why")


def test_byte_order_marks_are_no_content(small, tmp_path):
    folder = shutil.copytree(ROOT / "tiny/teacher", tmp_path / "m")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    with_mark, without = model.load(folder), model.load(ROOT / "tiny/teacher")
    assert with_mark.config == without.config
    assert with_mark.tokenizer.get_vocab() == without.tokenizer.get_vocab()


# ---------------------------------------------------------------- flags


EMPTY = [
    (train.main, ["--stage", "2", "--student", "", "--recipe", "paper"], "--student"),
    (train.main, ["--out="], "--out"),
    (train.main, ["--data", "a.json", " ", "--images", "x"], "--data"),
    (evaluation.main, ["chat", "--model", "", "--question", "x"], "--model"),
    (evaluation.main, ["analyse", ""], "an argument"),
    (model.main, ["", "--out", "x", "--layout", "hf"], "an argument"),
]
ABSURD = "--seed 1000000000000000|--seed -1|--lora-rank 1000000000|--batch-size 1000000000|--lr inf|--lr nan|"
ABSURD += "--workers 100000|--steps 1e3|--kl-weight -1|--max-bad-share x|--accumulation 99999999999999999999"


@pytest.mark.parametrize("main, argv, flag", EMPTY, ids=str)
def test_an_empty_flag_is_not_a_missing_one(main, argv, flag, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert f"{flag} is empty: give it a value" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ABSURD.split("|"))
def test_absurd_numbers_are_refused_by_their_flag(flag, capsys):
    with pytest.raises(SystemExit):
        recipes.parse_args("", flag.split())
    said = capsys.readouterr().err
    assert f"argument {flag.split()[0]}: " in said and ("out of range" in said or "number" in said)


@pytest.mark.parametrize(
    "variable, value", [("RANK", "x"), ("RANK", "3"), ("WORLD_SIZE", "-1"), ("MASTER_PORT", "taken")]
)
def test_ranks_that_cannot_be_joined(variable, value, monkeypatch):
    with ranks.socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        given = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            variable: value,
        }
        for name, text in given.items():
            monkeypatch.setenv(name, text.replace("taken", port))
        with pytest.raises(BadInput, match="the ranks cannot be joined .*; start them with torchrun"):
            with ranks.ranks_of_torchrun("gloo"):
                pass


# ---------------------------------------------------------------- files that are written


def test_what_the_dead_left_is_removed_and_the_living_are_left_alone(tmp_path):
    """A process killed while it wrote, with the same process id as this one or not."""
    for left in (tmp_path / f".out.{os.getpid()}.writing", tmp_path / ".other.1.writing"):
        left.mkdir()
        (left / "half").write_text("x")
    (tmp_path / ".file.txt.0.writing").write_text("half")
    with files.temporary_beside(tmp_path / "out", folder=True) as mine:
        with files.temporary_beside(tmp_path / "out", folder=True) as other:
            assert mine.is_dir() and other.is_dir() and mine != other
        checkpoint.write_folder(tmp_path / "out", {"x": torch.zeros(1)}, {})
        assert mine.is_dir()
    files.write_atomically(tmp_path / "file.txt", "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.1.writing", "file.txt", "out"]


def test_two_makers_of_one_world(tmp_path):
    makers = [
        threading.Thread(target=world.make_world, args=(tmp_path / "w", 0, 40, 10, 20)) for _ in range(3)
    ]
    [maker.start() for maker in makers]
    [maker.join() for maker in makers]
    assert [file.name for file in tmp_path.iterdir()] == ["w"] and world.tiny_items(tmp_path / "w")


@pytest.mark.parametrize("what", ["input", "annotations", "text", "picture", "device", "folder"])
def test_outputs_are_not_written_over_what_is_not_ours(small, tmp_path, what):
    picture, text = tmp_path / "a.png", tmp_path / "notes.jsonl"
    shutil.copy(small / "images/test-0.png", picture)
    text.write_text("my notes, without an end of line")
    show = [
        "attention",
        "--model",
        ROOT / "tiny/teacher",
        "--question",
        "What?",
        "--image",
        picture,
        "--save",
    ]
    where = ["--annotations", small / "test", "--images", small / "images", "--model", ROOT / "tiny/teacher"]
    bench = ["bench", "sugarcrepe", *where, "--limit", 1]
    argv, file, why = {
        "input": ([*show, picture], picture, "is read by this command"),
        "annotations": (
            [*bench, "--out", small / "test/swap_obj.json"],
            small / "test/swap_obj.json",
            "was not written",
        ),
        "text": ([*bench, "--answers", text], text, "was not written by this program"),
        "picture": ([*show, small / "images/test-1.png"], small / "images/test-1.png", "was not written"),
        "device": (
            [*bench, "--answers", tmp_path / "b.jsonl", "--out", "/dev/null"],
            None,
            "a folder or a device",
        ),
        "folder": ([*show, tmp_path / "f.png"], None, "a folder or a device"),
    }[what]
    before = file and file.read_bytes()
    (tmp_path / "f.png").mkdir()
    refused(evaluation.main, why, argv)
    assert (file and file.read_bytes()) == before and Path("/dev/null").is_char_device()


def test_our_own_outputs_are_replaced(small, tmp_path):
    save = tmp_path / "a.png"
    show = ["attention", "--model", ROOT / "tiny/teacher", "--question", "What?", "--save", save, "--image"]
    for name in ("test-0.png", "test-1.png"):
        evaluation.main([*map(str, show), str(small / "images" / name)])
    refused(evaluation.main, "is read by this command", [*show, save])


# ---------------------------------------------------------------- the tiny world, edited


EDITS = {
    "empty list": ("swap_obj.json", "[]", "holds a list, not a dict"),
    "no records": ("add_att.json", "{}", "does not have records of every kind"),
    "missing": ("swap_att.json", None, "is missing"),
    "another kind": ("recognition.json", '[{"kind": "smell"}]', "there is no kind 'smell'"),
    "no caption": (
        "replace_rel.json",
        '{"0": {"filename": "a.png", "caption": 5}}',
        "caption is 5, not a str",
    ),
    "out of its folder": (
        "add_obj.json",
        '{"0": {"filename": "../x.png", "caption": "a", "negative_caption": "b"}}',
        "leads out",
    ),
    "cut": ("recognition.json", '[{"kind": "colour"', "is not valid JSON"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_world_is_one_sentence(small, tmp_path, edit):
    name, text, why = EDITS[edit]
    folder = shutil.copytree(small, tmp_path / "w")
    (folder / "test" / name).unlink()
    if text is not None:
        (folder / "test" / name).write_text(text)
    with pytest.raises(BadInput, match=f"{name}.*{why}.*; remove .*w, and it is made again"):
        world.tiny_items(folder)


OF_TINY = {"seed": 0, "steps": recipes.RECIPES["tiny"]["2"]["steps"]}
OF_TINY["teacher"] = checkpoint.fingerprint(world.TINY / "teacher")
RUN = {"kd/stage2.run/run.json": json.dumps(OF_TINY)}
OTHER_SEED, OTHER_TEACHER = (
    {"kd/stage2.run/run.json": json.dumps(OF_TINY | other)} for other in ({"seed": 7}, {"teacher": "x"})
)
RESULTS = {
    "no runs": ({"results.json": "{}"}, "run.json is missing"),
    "another seed": ({"results.json": "{}", **OTHER_SEED}, "of --seed 7"),
    "another teacher": ({"results.json": "{}", **OTHER_TEACHER}, "of another teacher than .*teacher;"),
    "no scores": ({"results.json": '{"teacher": {}}', **RUN}, "recognition is None, not a float"),
    "a list": ({"results.json": "[]", **RUN}, "holds a list"),
    "half a world": ({"world/world.json": "{}"}, "recognition.json"),
    "curves of mine": ({"curves.csv": "mine"}, "curves.csv was not written by this program"),
    "a report of mine": ({"results.md": "Dear diary"}, "results.md was not written by this program"),
}  # fmt: skip


@pytest.mark.parametrize("edit", RESULTS)
def test_edited_results_are_one_sentence(tmp_path, edit):
    written, why = RESULTS[edit]
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=why):
        students.train_students(
            program.argparse.Namespace(out=tmp_path, seed=0, steps=None, teacher=str(world.TINY / "teacher"))
        )


# ---------------------------------------------------------------- longer than the model


def test_questions_beyond_the_model_are_refused(teacher, small):
    vlm, long = teacher, "what " * 2000
    with pytest.raises(BadInput, match="the question 'what what .* has [0-9]+ tokens .* and .*holds 1024"):
        vlm.question_ids(long, picture=True)
    picture = small / "images/test-0.png"
    ask = evaluation.answers.described(vlm, picture, "What?", long)
    with pytest.raises(BadInput, match="the answer to 'What.' has [0-9]+ tokens"):
        list(evaluation.answers.shared_once(vlm, [ask], [[0]]))
    question = evaluation.analyses.Question(picture, "What?", long, "")
    with pytest.raises(BadInput, match="the answer 'what what"):
        evaluation.analyses.answered(vlm, question)


def test_writing_ends_where_the_model_can_hold_no_more(teacher):
    ids = torch.zeros(1, 1020, dtype=torch.long) + 300
    assert teacher.generate(ids, max_new_tokens=50, stop_ids=[]).shape[1] == 4


# ---------------------------------------------------------------- letters


@pytest.mark.parametrize("one, other", [("Где кошка", "Дом и лес"), ("סוס", "כלב"), ("한국어", "고양이")])
def test_words_of_other_alphabets_are_told_apart(one, other, tmp_path, capsys):
    """By a font of the system, or by numbers, and then with a sentence."""

    def drawn(text):
        pictures.sheet([[pictures.Panel(text, Image.new("RGB", (240, 240)))]], tmp_path / "a.png")
        return np.asarray(Image.open(tmp_path / "a.png"))[:36].copy()

    assert not np.array_equal(drawn(one), drawn(other)) and np.array_equal(drawn(one), drawn(one))
    font, lacking = pictures.font_for(one)
    assert bool(lacking) == ("no font here has" in capsys.readouterr().err)
    boxes = {bytes(font.getmask(letter)) for letter in {*one} - {*lacking, " "}}
    assert bytes(font.getmask("\uffff")) not in boxes


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("closed", ["a reader who goes", "a full disk", "no stderr"])
def test_a_training_outlives_its_output(small, tmp_path, closed):
    argv = command(small, tmp_path, "--steps", 12, "--log-every", 1)
    streams = {"stderr": subprocess.PIPE}
    if closed == "a full disk":
        streams["stdout"] = open("/dev/full", "w")
    if closed == "no stderr":
        argv = ["-c", 'exec "$@" 2>&-', "sh", sys.executable, str(ROOT / "train.py"), *argv]
        process = subprocess.Popen(["sh", *argv], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        assert "stage 3 done" in process.communicate()[0] and process.returncode == 0
    else:
        process = started("train.py", *argv, **streams)
        if process.stdout:
            process.stdout.readline()
            process.stdout.close()
        said, code = process.stderr.read(), process.wait()
        assert "Traceback" not in said and "Exception" not in said, said
        full = "error: the output could not be written (No space left on device)"
        assert (code, full in said) == ((1, True) if closed == "a full disk" else (0, False)), said
    assert last_row(tmp_path)["step"] == 12 and (tmp_path / "compodistill/stage3/config.json").exists()


@pytest.mark.parametrize(
    "words", [["train.py"], ["eval.py", "chat"], ["model.py"], ["-m", "tiny"]], ids=" ".join
)
def test_ctrl_c_while_python_imports(words):
    process = started(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    text = process.communicate()[0]
    assert process.returncode == -signal.SIGINT and text == "", text


@pytest.mark.slow
def test_sigterm_to_the_main_job_saves(tmp_path):
    process = started("-m", "tiny", "--out", tmp_path, "--steps", 300)
    limit = time.time() + 120
    while not any(students.last_step(tmp_path / name) > 20 for name in students.STUDENTS):
        assert process.poll() is None and time.time() < limit
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, text = ended(process, tmp_path)
    assert code == 1 and "stopped; the same command goes on" in text and "Traceback" not in text
    assert list(tmp_path.glob("*/stage?.run/step-*/state.json"))


@pytest.mark.slow
def test_a_killed_main_job_goes_on_to_the_same_files(tmp_path):
    """kill -9, twice, in the middle of stage 2; points that are reached again are those that were there."""
    outs = tmp_path / "whole", tmp_path / "killed"

    def job(out):
        return started("-m", "tiny", "--out", out, "--steps", 40)

    def points(out):
        return sum(file.read_text().count('"compositional"') for file in out.glob("*/curve.json"))

    for out in outs:
        world.make_world(out / "world", tune=200, pretrain=40, per_kind=8)
    for least in (3, 25):
        process, limit = job(outs[1]), time.time() + 120
        while points(outs[1]) < least:
            assert process.poll() is None and time.time() < limit
            time.sleep(0.05)
        process.kill()
        process.communicate()
        time.sleep(1)  # its students end soon after it
        assert points(outs[1]) >= least
    for out in outs:
        code, text = ended(job(out), out, limit=120)
        assert code == 0, text
    for name in ("curves.csv", "results.json", "results.md", "attention.png"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
    for name in students.STUDENTS:
        one, other = (load(out / name / "stage3/model.safetensors") for out in outs)
        assert all(torch.equal(one[key], other[key]) for key in one), name


# ---------------------------------------------------------------- ranks


def test_a_sentence_is_one_write():
    """Also where PYTHONUNBUFFERED asks for every piece at once: ranks share a terminal."""
    code = "from support import program, errors\nwith program.one_sentence():\n raise errors.BadInput('x; y')"
    ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)  # a message for each write
    with ours, theirs:
        environment = ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
        subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, cwd=ROOT)
        assert ours.recv(99) == b"error: x; y\n"


DISAGREE = """
import os, sys
sys.argv += ["--lr", "0.1"] * (os.environ["RANK"] == "1")
import train
train.main()
"""


@pytest.mark.slow
def test_ranks_that_were_started_otherwise_are_refused(small, tmp_path):
    (tmp_path / "other.py").write_text(DISAGREE)
    argv = command(small, tmp_path, "--steps", 2)
    code, text = ended(started(tmp_path / "other.py", *argv, ranks=2), tmp_path, 90)
    assert code == 1 and text.count("error: ") == 1, text  # the second rank that says the same does not
    assert (
        "error: rank 1 has {'lr': 0.1}, rank 0 {'lr': 0.0005}; start all ranks with the same command" in text
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "a bad picture"])
def test_when_a_rank_ends_the_others_name_it(small, tmp_path, how):
    """And every process ends within seconds, without a traceback."""
    folder = shutil.copytree(small, tmp_path / "w")
    if how == "a bad picture":  # which is read again: each record reads its own once, and keeps it
        records = json.loads((folder / "tune.json").read_text()) * 50
        (folder / "tune.json").write_text(json.dumps(records))
    argv = command(folder, tmp_path / "out", "--steps", 3000, "--workers", 1, "--save-every", 5)
    process = started(ROOT / "train.py", *argv, ranks=3)
    limit = time.time() + 120
    while not list(tmp_path.glob("out/*/stage3.run/step-*")):
        assert process.poll() is None and time.time() < limit
        time.sleep(0.2)
    if how == "killed":
        found = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        environments = {number: Path(f"/proc/{number}/environ").read_bytes().split(b"\0") for number in found}
        (number,) = [number for number, environment in environments.items() if b"RANK=1" in environment]
        os.kill(int(number), signal.SIGKILL)
    else:
        (folder / "images/tune-3.png").write_bytes(b"no picture")
    code, text = ended(process, tmp_path)
    assert code == 1 and "gloo" not in text and text.count("; the same command goes on\n") == 2, text
    if how == "killed":
        assert text.count(f"error: rank 1 has ended (process {number} was killed)") == 2, text


@pytest.mark.slow
def test_shared_memory_that_is_too_small(small, tmp_path):
    """In eval.py bench, too: a sentence, instead of waiting for ever."""
    where = [
        "--annotations",
        small / "test",
        "--images",
        small / "images",
        "--batch-size",
        64,
        "--workers",
        1,
    ]
    bench = [sys.executable, "eval.py", "bench", "sugarcrepe", *where, "--model", "tiny/teacher"]
    script = "mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 99; "
    script += " ".join(map(str, [*bench, "--answers", tmp_path / "a"]))
    process = subprocess.Popen(["unshare", "-rm", "bash", "-c", script], env=ENVIRONMENT, cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    text, _ = process.communicate(timeout=60)
    if process.returncode == 99 or "unshare" in text:
        pytest.skip("no user namespaces here")
    assert process.returncode == 1 and "error: the shared memory in which --workers hand over" in text, text
