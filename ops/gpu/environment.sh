#!/usr/bin/env bash
# The environment of the GPU machine that these scripts were written for, in a folder of its own: Python 3.12 where
# there is one, PyPI's torch 2.11 (a CUDA build; it is imported without a GPU too), Triton 3.6, what the product and its
# tests need. About 5 GB. A folder with a file READY is left as it is.
#
#   ops/gpu/environment.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/../.."
FOLDER=$1
if [ -f "$FOLDER/READY" ]; then exit; fi

# The first that runs: a python3.12 in PATH, pyenv's, the one the project is developed with.
python() {
  local one
  for one in python3.12 "$(pyenv prefix 3.12 2>/dev/null)/bin/python3.12" python3.11 python3; do
    if "$one" -c 'import venv' 2>/dev/null; then echo "$one" && return; fi
  done
}

echo "making the environment of a GPU machine in $FOLDER (some minutes; 3 GB are downloaded where pip has no copy)"
"$(python)" -m venv --clear "$FOLDER"
needs=$("$FOLDER/bin/python" - <<'END'
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")
END
)
mapfile -t needs <<<"$needs"
"$FOLDER/bin/python" -m pip install --disable-pip-version-check --quiet "torch==2.11.*" "triton==3.6.*" "${needs[@]}" \
  "setuptools>=77" wheel ninja pytest pytest-timeout hypothesis psutil
touch "$FOLDER/READY"
