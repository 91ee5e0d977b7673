#!/usr/bin/env bash
# One GPU of 24 GB: Qwen1.5-4B -> Qwen1.5-0.5B, the paper's stages and numbers, LoRA (low-rank adaptation), bf16,
# one process.
#
#   TEACHER=ptkjw1997/CompoDistill-Teacher-4B PRETRAIN=blip_laion_cc_sbu_558k.json PRETRAIN_IMAGES=LLaVA-Pretrain \
#   TUNE=llava_v1_5_mix665k.json IMAGES=LLaVA-Finetune runs/one_24gb_gpu_0.5b.sh [flags of train.py]
#
# Killed, or Ctrl-C: run it again, and it goes on where it stopped. For a first try add --steps 500 and another OUT.
#
# Memory: 13.2 GB of tensors, measured on an H200 held to 24 GB (random weights; python bench/gpu.py, part budget); with
# --batch-size 32 it was 18.7 GB, at 16 samples/s (commit 948756a). It was estimated from counts, for 4 samples of 1,536 tokens and gradient
# checkpointing, as
#    7.9 GB   teacher, 3.95 B parameters x 2 bytes          0.9 GB   student, 0.46 B x 2
#    0.9 GB   so400m and P_t, 0.44 B x 2                     1.0 GB   LoRA, 61 M x (4 weight + 8 AdamW + 4 gradient)
#    0.8 GB   student: 24 layer inputs, 4 x 1536 x 1024 x 2 bytes each, and one layer computed again
#    0.5 GB   attention alignment: 2 x 9 maps of 4 x 1505 x 729 x 4 bytes, and 128 rows of one layer with heads
#    0.7 GB   one layer of the teacher, 64 rows of logits of both models
#   about 13 GB in all. Full tuning (--tune full): 0.46 B x 18 bytes = 8.4 GB in the place of 1.9, about 19 GB; measured: 18.1.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
: "${TEACHER:?the teacher: a folder or a hub name}" "${PRETRAIN:?the 558k captions}" "${TUNE:?the 665k instructions}"
: "${IMAGES:?folder of the pictures of TUNE}" "${PRETRAIN_IMAGES:=$IMAGES}" "${STUDENT:=Qwen/Qwen1.5-0.5B}"
: "${OUT:=out/4b_to_0.5b}" "${PYTHON:=python}"

stage() {
  "$PYTHON" "$ROOT/train.py" --recipe paper --group-by-length --save-every 100 --out "$OUT" --stage "$@" --name student
  [ -d "$OUT/student/stage$1" ] || exit 0  # it was asked to stop
}
stage 1 --teacher "$TEACHER" --student "$STUDENT" --data "$PRETRAIN" --images "$PRETRAIN_IMAGES" "$@"
stage 2 --teacher "$TEACHER" --data "$TUNE" --images "$IMAGES" "$@"
stage 3 --data "$TUNE" --images "$IMAGES" "$@"
[ -e "$OUT/released" ] || "$PYTHON" "$ROOT/model.py" "$OUT/student/stage3" --out "$OUT/released" --layout released --dtype bfloat16
