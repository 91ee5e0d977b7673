"""train.py and eval.py as people run them: real processes, the shipped tiny models, a small tiny world."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import eval as evaluation
import model
import train

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small tiny world, shared by the runs of this file."""
    return data.make_world(tmp_path_factory.mktemp("tiny") / "world", tune=64, pretrain=64, per_kind=4)


def run(*command, ranks=1):
    """A command in a process of its own -> (exit code, output)."""
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *map(str, command)], capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout + done.stderr


def stage(out, world, *flags, ranks=1, stage=1):
    files = "pretrain.json" if stage in (1, "0a") else "tune.json"
    where = ["--data", world / files, "--images", world / "images", "--out", out, "--log-every", 1]
    code, text = run(ROOT / "train.py", "--stage", stage, "--lr", 2e-4, *where, *flags, ranks=ranks)
    assert code == 0, text
    return read_log(out / "student" / f"stage{stage}.jsonl")


def read_log(file):
    return [json.loads(line) for line in file.read_text().splitlines()]
