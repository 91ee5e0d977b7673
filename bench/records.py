"""What the data of a real run costs: seconds until the first batch, memory of a rank and of each worker.

    python bench/records.py                    # 665,298 records, about a gigabyte in a temporary folder
    python bench/records.py --records 20000

With the tokenizer of Qwen1.5 where the environment variable SHARED names its folder, else the tiny teacher's.
USS is what would be free if the process ended: Private_Clean + Private_Dirty of /proc/PID/smaps_rollup.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORDS = "the a red cat dog on of in street two people café 東京 bus is “left” behind table naïve 😀".split()
PICTURES, SIDE, PATCHES, BATCH = 64, 384, 729, 4


def write_pictures(folder: Path) -> None:
    from PIL import Image

    for i in range(PICTURES):  # smooth noise: JPEGs of about 60 kB, as COCO has them
        pixels = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")


def write_records(file: Path, number: int) -> None:
    """A list as LLaVA's mix665k: 1.5 kB a record, 1 to 8 pairs of turns, 6 % without a picture."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(4, 30))) for _ in range(5000)]
    with open(file, "w", encoding="utf-8") as out:
        for i in range(number):
            pairs = rng.choice([1, 1, 2, 3, 5, 8])
            values = rng.choices(sentences, k=2 * pairs)
            values[1] += " ".join(rng.choices(sentences, k=rng.randint(1, 11)))
            record = {"id": f"{i:012}"}
            if rng.random() >= 0.06:
                record["image"], values[0] = f"{i % PICTURES}.jpg", "<image>\n" + values[0]
            turns = [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]
            text = json.dumps({**record, "conversations": turns}, ensure_ascii=i % 2 == 0)
            out.write(("[" if i == 0 else ",\n") + text)
        out.write("]\n")


def uss(pid: int) -> float:
    """MB of a process that no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = [line for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))]
    return sum(int(line.split()[1]) for line in private) * 1024 / 1e6


def measure(file: Path, start_method: str) -> dict:
    """In a process of its own: scan, then load 200 batches with two workers."""
    import torch

    import data

    shared = os.environ.get("SHARED")
    tokenizer = Path(shared) / "data/qwen1.5-tokenizer" if shared else ROOT / "tiny/teacher"
    tokenizer = data.load_tokenizer(tokenizer)
    before, started = uss(os.getpid()), time.perf_counter()
    dataset = data.LlavaDataset(file, file.parent, tokenizer, PATCHES, SIDE, max_length=1536)
    scanned = time.perf_counter() - started
    batches = data.batches_of(len(dataset), 200, 1, BATCH, 0, 1, seed=0, lengths=dataset.lengths)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=data.collate,
        num_workers=2,
        prefetch_factor=4,
        multiprocessing_context=start_method,
    )
    batches, workers = iter(loader), []
    next(batches)
    first = time.perf_counter() - started
    for _ in batches:
        alive = [worker.pid for worker in batches._workers if worker.is_alive()]
        workers += [uss(pid) for pid in alive[:1]]
    rank, started = uss(os.getpid()) - before, time.perf_counter()
    for i in random.Random(0).choices(range(len(dataset)), k=1000):
        dataset.records[i]
    read = (time.perf_counter() - started) / 1000 * 1e6
    worker, most = float(np.median(workers)), max(workers)
    return {"scan": scanned, "first": first, "rank": rank, "worker": worker, "most": most, "read": read}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=665_298, help="(default: %(default)s)")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "START_METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return
    print("| records | MB | workers by | scan, s | first, s | rank, MB | worker, MB | most | read, us |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        for number in (1000, options.records):
            file = Path(folder) / f"{number}.json"
            write_records(file, number)
            for how in ("fork", "spawn"):
                command = [sys.executable, __file__, "--measure", str(file), how]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                row = json.loads(done.stdout.splitlines()[-1])
                cells = [f"{number:,}", f"{file.stat().st_size / 1e6:.0f}", how]
                cells += [f"{row[name]:.1f}" for name in ("scan", "first")]
                cells += [f"{row[name]:.0f}" for name in ("rank", "worker", "most", "read")]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
