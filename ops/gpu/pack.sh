#!/usr/bin/env bash
# What a GPU machine without a network lacks, in parts that travel (carry.py): the extension built for its torch and for
# sm_90, wheels of packages it does not have, and the embedded model, or for third.sh an NCCL that lets two ranks share
# a GPU (241 MiB).
#
#   ops/gpu/pack.sh ENVIRONMENT CARRY        ENVIRONMENT is environment.sh's; CARRY/part-1, CARRY/part-2, ... are made
#
# CARRIES is model (the default) or nccl. WHEELS names the packages (default pyzmq gguf msgspec), GPU_PYTHON the Python
# they are for (default 3.12). The extension is built in a copy of the tree, ENVIRONMENT/tree, since the tree has one for
# its own torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
ENVIRONMENT=$(realpath "$1") CARRY=$2
PYTHON=$ENVIRONMENT/bin/python TREE=$ENVIRONMENT/tree BUILT=$ENVIRONMENT/built

find "$TREE" -mindepth 1 -delete 2>/dev/null || mkdir -p "$TREE"
tar c --exclude-vcs --exclude='*.so' --exclude=__pycache__ --exclude='./.[a-z]*' --exclude=./build . | tar x -C "$TREE"

echo "building the extension for sm_90 in $TREE (a minute or two)"
mkdir -p "$BUILT"
export TORCH_CUDA_ARCH_LIST=9.0
(cd "$TREE" && "$PYTHON" setup.py build_ext --inplace --build-temp "$BUILT" >"$BUILT/log" 2>&1) ||
  { tail -5 "$BUILT/log" >&2 && echo "the extension could not be built; $BUILT/log says why" >&2 && exit 1; }

# bring FOLDER PACKAGE: its wheel for the GPU machine, whichever this one is.
bring() {
  local glibc platforms=(--platform manylinux2014_x86_64)
  for glibc in 17 18 24 26 27 28; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
  "$PYTHON" -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "${GPU_PYTHON:-3.12}" "${platforms[@]}" -d "$ENVIRONMENT/$1" "$2"
}

rm -rf "$ENVIRONMENT/wheels" "$ENVIRONMENT/nccl"
for package in ${WHEELS:-pyzmq gguf msgspec}; do bring wheels "$package"; done
if [ "${CARRIES:-model}" = nccl ]; then bring nccl "nvidia-nccl-cu13>=2.31"; fi

files=("_C.abi3.so=$TREE/cuda_ext/_C.abi3.so")
for wheel in "$ENVIRONMENT"/{wheels,nccl}/*.whl; do
  if [ -f "$wheel" ]; then files+=("${wheel#"$ENVIRONMENT"/}=$wheel"); fi
done
export PYTHONPATH=$TREE
if [ "${CARRIES:-model}" = model ]; then
  "$PYTHON" -m launcher.cli fetch smollm2-135m-instruct
  model=$("$PYTHON" -c "from ssd_runtime.model.files.catalogue import resolve; print(resolve('smollm2-135m-instruct'))")
  files+=("models/${model##*/}=$model")
fi
"$PYTHON" -m ops.gpu.carry pack "$CARRY" "${files[@]}"
