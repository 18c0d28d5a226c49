#!/bin/bash
# Submits target and draft as two jobs, which fail apart. With the number of a target job: one more draft job for it.
# Written by: ssd slurm render
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-$(sbatch --parsable "$here/ssd-target.sbatch")}
target=${target%%;*} # JOB;CLUSTER where there are several clusters
draft=$(sbatch --parsable --dependency="after:$target" --export="ALL,SSD_TARGET_JOB=$target" "$here/ssd-draft.sbatch")
echo "target $target draft ${draft%%;*}"
