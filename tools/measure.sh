#!/usr/bin/env bash
# Everything that a machine can tell about this script, in one folder: what to run first on a new GPU.
#   ./run.sh measure [OTHER/train_gpt.py ...]     others of this field are timed beside ours, in turn
# Variables pass through as to a run (DATA_PATH, NUM_LAYERS, ...); MINUTES (10) is the training of each whole run, STEPS
# (40) that of the runs beside others. A part's output is kept in LOG_DIR/measure_<time>/; a part that fails does not
# stop the others, and makes the exit code 1. Presets are compared at equal time and bytes, with warmdown and momentum's
# warm-up at their shares of the steps that fit, which a short run on one GPU has fewer of than the published one.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
py=$1; shift
minutes=${MINUTES:-10} steps=${STEPS:-40}
export PYTHON=$py
unset MINUTES STEPS RESUME NLL_DUMP RUN_ID  # the parts have their own, or none
fail() { echo "error: $*" >&2; exit 2; }
[[ $minutes =~ ^[0-9]+([.][0-9]+)?$ && $minutes =~ [1-9] ]] || fail "MINUTES=$minutes: must be a number above 0"
[[ $steps =~ ^[0-9]+$ && $steps -gt 11 ]] || fail "STEPS=$steps: must be a whole number above 11"
for other in "$@"; do
  [ -f "$other" ] || fail "$other: no such script; give the train_gpt.py of another entry"
done
if [ "${PRESET:-}" = demo ] && [ -z "${TRAIN_BATCH_TOKENS:-}" ]; then
  fail "no GPU here: set MODEL_DIM, NUM_HEADS, NUM_KV_HEADS, TRAIN_SEQ_LEN and TRAIN_BATCH_TOKENS to a size for this CPU"
fi
out=$(realpath -m "${LOG_DIR:-logs}")/measure_$(date +%Y%m%d-%H%M%S)
mkdir -p "$out" || exit 2
export LOG_DIR=$out
failed=()

part() {  # part NAME COMMAND...: run it, keep what it prints
  local name=$1 began=$SECONDS; shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.txt" | tail -n 25 || failed+=("$name")
  echo "== $name: $((SECONDS - began)) s"
}

seconds=$(awk "BEGIN { print 60 * $minutes }")
short="ITERATIONS=$steps WARMDOWN_ITERS=10 MAX_WALLCLOCK_SECONDS=0 TRAIN_LOG_EVERY=10 VAL_TOKEN_LIMIT=262144 TTT_ENABLED=0"
part tests "$here/run.sh" test -k "on_a_gpu or graph_breaks or fp32_copy"
part run env RUN_ID=run MAX_WALLCLOCK_SECONDS="$seconds" AUDIT=1 SAVE_FLOAT=1 "$here/run.sh"
part bench "$here/run.sh" bench
part trials "$py" "$here/tools/trials.py"
number=0
for other in "$@"; do
  number=$((number + 1))
  # shellcheck disable=SC2086  # words on purpose
  part "against_$number" env $short "$here/run.sh" bench --against "$(realpath "$other")" --repeats 3
done
fit=$("$py" -c 'import json, sys; print(json.load(open(sys.argv[1]))["train"]["steps"])' "$out/run/summary.json") || fit=
if [ -n "${fit:-}" ]; then
  for preset in "seed WARMDOWN_ITERS=$((fit * 53 / 100))" "frontier WARMDOWN_ITERS=$((fit * 80 / 100))"; do
    echo "PRESET=$preset MUON_MOMENTUM_WARMUP_STEPS=$((fit * 27 / 100))"
  done > "$out/presets.txt"
  part presets env -u PRESET MAX_WALLCLOCK_SECONDS="$seconds" EXPORT_FILL=1 "$here/run.sh" sweep --list "$out/presets.txt" \
    SEED=13,1337 --name presets
else
  failed+=("presets, which need a finished run")
fi
echo "all of it: $out"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
