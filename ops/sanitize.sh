#!/usr/bin/env bash
# The kernels' tests under AddressSanitizer and UBSan: the CPU kernels of the extension, and the emulated CUDA kernels.
# Native reports must reach the terminal, hence --capture=sys. The sanitized extension lives under build/sanitize; the one in use is left alone.
#
#   ops/sanitize.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
compiler=${CXX:-g++}
out=build/sanitize
if ! command -v "$compiler" >/dev/null || ! runtime=$("$compiler" -print-file-name=libasan.so) || [ ! -e "$runtime" ]; then
  echo "sanitize: $compiler has no libasan.so; the kernels have not been checked" >&2
  exit 2
fi
flags=(-std=c++17 -O1 -g1 -fPIC -fno-omit-frame-pointer -ffp-contract=off -Wno-psabi -Wno-unknown-pragmas
  -fsanitize=address,undefined -fno-sanitize-recover=undefined)
mapfile -t torch < <("$python" -c '
from setup import STABLE_ABI
from torch.utils import cpp_extension
print(STABLE_ABI)
print(*(f"-isystem{path}" for path in cpp_extension.include_paths()), sep="\n")
print(*(f"-L{path}" for path in cpp_extension.library_paths()), sep="\n")')

rm -rf "$out/cuda_ext"
mkdir -p "$out/cuda_ext"
cp -r cuda_ext/*.py cuda_ext/reference "$out/cuda_ext/"
for source in cuda_ext/csrc/*.cpp; do
  object=$out/$(basename "$source" .cpp).o
  if [ ! "$object" -nt "$source" ] || [ -n "$(find cuda_ext/csrc ops/sanitize.sh -newer "$object" \( -name '*.h' -o -name '*.inc' -o -name '*.sh' \))" ]; then
    echo "$source"
  fi
done | xargs -r -P "$(nproc)" -I{} bash -c '
  source=$1; out=$2; shift 2
  "$@" -c "$source" -o "$out/$(basename "$source" .cpp).o"' _ {} "$out" "$compiler" "${flags[@]}" "${torch[@]}"
"$compiler" "${flags[@]}" -shared "$out"/*.o -o "$out/cuda_ext/_C.abi3.so" "${torch[@]}" -ltorch -ltorch_cpu -lc10

# Python and torch leak by design, and torch throws through a runtime that was not there when it was linked.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
export SSD_SANITIZE=1 PYTHONPATH=$PWD/$out HYPOTHESIS_STORAGE_DIRECTORY=$out/hypothesis
LD_PRELOAD="$runtime $("$compiler" -print-file-name=libstdc++.so.6)" timeout 600 "$python" -m pytest -q --capture=sys \
  --import-mode=importlib -o "pythonpath=$out ." -p no:cacheprovider \
  --deselect tests/unit/test_cuda_ext_cache.py::test_opcheck_passes \
  tests/unit/test_cuda_ext_sampling.py tests/unit/test_cuda_ext_cache.py tests/unit/test_cuda_ext_layers.py \
  tests/unit/test_cuda_ext_linear.py tests/unit/test_cuda_emulated.py
