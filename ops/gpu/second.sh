#!/usr/bin/env bash
# The second call, about 290 s on an H100: a real model in every mode, and the deployments that one GPU allows.
# REHEARSE=1 runs the same steps on a CPU.
. "$(dirname "$0")/steps.sh"
begin second 400
step 100 engines
step 90 cpu_draft
step 110 shared_gpu
step 150 large_target
table
