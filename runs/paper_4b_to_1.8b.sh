#!/usr/bin/env bash
# The paper's recipe for its pair, Qwen1.5-4B -> Qwen1.5-1.8B: stages 1, 2, 3, one epoch each, LoRA
# (low-rank adaptation), bf16.
#
#   TEACHER=ptkjw1997/CompoDistill-Teacher-4B PRETRAIN=blip_laion_cc_sbu_558k.json PRETRAIN_IMAGES=LLaVA-Pretrain \
#   TUNE=llava_v1_5_mix665k.json IMAGES=LLaVA-Finetune GPUS=8 runs/paper_4b_to_1.8b.sh [flags of train.py]
#
# Killed, out of time, or Ctrl-C: run it again, and it goes on where it stopped. For full tuning instead of LoRA add
# --tune full --parallel fsdp.
#
# Memory of a GPU: 17.0 GB of tensors, measured on an H200 held to 24 GB (random weights; python bench/gpu.py, part budget),
# at 11 samples/s. It was estimated from counts, for 4 samples of 1,536 tokens and gradient checkpointing, as
#    7.9 GB   teacher, 3.95 B parameters x 2 bytes          3.7 GB   student, 1.84 B x 2
#    0.9 GB   so400m and P_t, 0.44 B x 2                     2.4 GB   LoRA, 120 M x (4 weight + 8 AdamW + 4 gradient + 4 in transit)
#    1.6 GB   student: 24 layer inputs, 4 x 1536 x 2048 x 2 bytes each, and one layer computed again
#    0.5 GB   attention alignment: 2 x 9 maps of 4 x 1505 x 729 x 4 bytes, and 128 rows of one layer with heads
#    0.7 GB   one layer of the teacher, 64 rows of logits of both models
#   about 18 GB in all. 40 or 80 GB cards hold a larger --batch-size.
# Full tuning instead (--tune full), an estimate: 1.84 B x 18 bytes = 33 GB in the place of 6.1, over the GPUs with fsdp.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
: "${TEACHER:?the teacher: a folder or a hub name}" "${PRETRAIN:?the 558k captions}" "${TUNE:?the 665k instructions}"
: "${IMAGES:?folder of the pictures of TUNE}" "${PRETRAIN_IMAGES:=$IMAGES}" "${STUDENT:=Qwen/Qwen1.5-1.8B}"
: "${GPUS:=8}" "${OUT:=out/4b_to_1.8b}" "${PYTHON:=python}"

stage() {
  "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" "$ROOT/train.py" --recipe paper \
    --out "$OUT" --stage "$@" --name student
  [ -d "$OUT/student/stage$1" ] || exit 0  # it was asked to stop
}
stage 1 --teacher "$TEACHER" --student "$STUDENT" --data "$PRETRAIN" --images "$PRETRAIN_IMAGES" "$@"
stage 2 --teacher "$TEACHER" --data "$TUNE" --images "$IMAGES" "$@"
stage 3 --data "$TUNE" --images "$IMAGES" "$@"
[ -e "$OUT/released" ] || "$PYTHON" "$ROOT/model.py" "$OUT/student/stage3" --out "$OUT/released" --layout released --dtype bfloat16
