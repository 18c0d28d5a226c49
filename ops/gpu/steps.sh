# Sourced by the scripts of a GPU session: takes in what was carried, runs steps, prints the table. Knows no step.
#
# A step that fails or runs out of time is a line in the table and never ends the script. Read from the environment:
#   OUT         where results go (default build/gpu/results): SCRIPT.jsonl, a line for each step, SCRIPT.txt, the table,
#               SCRIPT.log, what all of them said
#   REHEARSE    1: on the CPU, with small shapes
#   PYTHON      the interpreter that has torch (default python3)
#   CARRY       what `make gpu-pack` made (default build/gpu/carry); taken in part by part, as far as it is there
#   CARRIED     where to (default build/gpu/carried)
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
OUT=${OUT:-build/gpu/results} PYTHON=${PYTHON:-python3} CARRY=${CARRY:-build/gpu/carry}
CARRIED=${CARRIED:-$PWD/build/gpu/carried}
DEVICE=cuda SMALL=() PATIENCE=1
if [ "${REHEARSE:-0}" = 1 ]; then
  DEVICE=cpu SMALL=(--small) PATIENCE=6
  export OMP_NUM_THREADS=1
fi

# begin SCRIPT SECONDS: start afresh; no step is begun, or goes on, so many seconds later.
begin() {
  SCRIPT=$1 LIMIT=$(($2 * PATIENCE)) SECONDS=0
  LOG=$OUT/$SCRIPT.log WORK=$(mktemp -d)
  mkdir -p "$OUT" && : >"$LOG"
  trap 'rm -rf "$WORK"' EXIT
  if compgen -G "$CARRY/part-*" >/dev/null; then
    "$PYTHON" -m ops.gpu.carry unpack "$CARRIED" "$CARRY"/part-* 2>&1 | tee -a "$LOG"
  fi
  if [ -f "$CARRIED/_C.abi3.so" ]; then cp "$CARRIED/_C.abi3.so" cuda_ext/; fi
  if compgen -G "$CARRIED/wheels/*.whl" >/dev/null && [ ! -d "$CARRIED/site" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$CARRIED/site" "$CARRIED"/wheels/*.whl \
      >>"$LOG" 2>&1 || echo "the carried wheels do not fit this Python, going on with what it has; $LOG says more"
  fi
  export PYTHONPATH=$PWD:$CARRIED/site${PYTHONPATH:+:$PYTHONPATH}
  if [ -d "$CARRIED/models" ]; then export SSD_CACHE=$CARRIED/models; fi
}

# step SECONDS MODULE [ARGUMENT...]: run ops.gpu.MODULE for at most so long.
step() {
  local seconds=$(($1 * PATIENCE)) name=$2 start=$SECONDS code said
  shift 2
  if ((seconds > LIMIT - SECONDS)); then seconds=$((LIMIT - SECONDS)); fi
  if ((seconds < 1)); then
    printf '%-16s %-8s %5s    %s\n' "$name" "NO TIME" - "" >>"$WORK/table"
    return
  fi
  said=$(timeout --kill-after=5 "$seconds" "$PYTHON" -m "ops.gpu.$name" --device "$DEVICE" --out "$WORK/$name.json" \
    --keep "$OUT" "${SMALL[@]}" "$@" 2>>"$LOG")
  code=$?
  echo "$said" >>"$LOG"
  said=$(tail -1 <<<"$said")
  if ((code == 124 || code == 137)); then said="stopped after $seconds s"; fi
  printf '%-16s %-8s %5d s  %s\n' "$name" "$( ((code == 0)) && echo OK || echo FAIL)" $((SECONDS - start)) "$said" |
    tee -a "$WORK/table"
  cat "$WORK"/*.json >"$OUT/$SCRIPT.jsonl" 2>/dev/null
}

# table: every step of the script, also as SCRIPT.txt, and whether all are well, which is its exit code too.
table() {
  wait
  echo
  { echo "== $SCRIPT on $DEVICE, $SECONDS s" && cat "$WORK/table"; } | tee "$OUT/$SCRIPT.txt"
  echo "results in $OUT/$SCRIPT.jsonl, what was said in $LOG"
  ! grep -qE '^\S+ +(FAIL|NO TIME) ' "$WORK/table"
}
