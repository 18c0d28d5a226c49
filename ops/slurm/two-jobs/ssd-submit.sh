#!/bin/bash
# Submits the target and each draft as a job of its own: they fail apart. With the number of a target job: one more draft
# job for it.
# Written by: ssd slurm render
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
drafts=1
if [ $# -gt 0 ]; then drafts=1; fi
target=${1:-$(sbatch --parsable "$here/ssd-target.sbatch")}
target=${target%%;*} # JOB;CLUSTER where there are several clusters
submitted="target $target"
for _ in $(seq "$drafts"); do
  draft=$(sbatch --parsable --dependency="after:$target" --export="ALL,SSD_TARGET_JOB=$target" "$here/ssd-draft.sbatch")
  submitted+=" draft ${draft%%;*}"
done
echo "$submitted"
