#!/usr/bin/env bash
# A call of its own, about 120 s on an H100, once the first two have succeeded: NCCL between two processes on one GPU.
# That takes NCCL 2.31 or newer, which is carried as a wheel (README.md). REHEARSE=1: Gloo stands in for it, on a CPU.
. "$(dirname "$0")/steps.sh"
begin third 300
export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0
for wheel in "$CARRIED"/nccl/*.whl; do
  if [ -f "$wheel" ]; then
    "$PYTHON" -m zipfile -e "$wheel" "$CARRIED/nccl" && export LD_PRELOAD=$CARRIED/nccl/nvidia/nccl/lib/libnccl.so.2
  fi
done
step 30 versions
step 180 nccl_link
step 90 nccl_target
table
