#!/usr/bin/env bash
# Everything that a machine can tell about this script, in one folder: what to run first on a new GPU.
#   ./run.sh measure [OTHER/train_gpt.py ...]     others of this field are timed beside ours, in turn
# Variables pass through as to a run (DATA_PATH, NUM_LAYERS, ...); MINUTES (10) is the training of each whole run, STEPS
# (40) that of the runs beside others. A part's output is kept in LOG_DIR/measure_<time>/; a part that fails does not
# stop the others, and makes the exit code 1.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
py=$1; shift
minutes=${MINUTES:-10} short=${STEPS:-40}
export PYTHON=$py
unset MINUTES STEPS  # the runs do not know them
[[ $minutes =~ ^[0-9]+([.][0-9]+)?$ ]] || { echo "error: MINUTES=$minutes: must be a number" >&2; exit 2; }
for other in "$@"; do
  [ -f "$other" ] || { echo "error: $other: no such script; give the train_gpt.py of another entry" >&2; exit 2; }
done
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
short="ITERATIONS=$short WARMDOWN_ITERS=10 MAX_WALLCLOCK_SECONDS=0 TRAIN_LOG_EVERY=10 VAL_TOKEN_LIMIT=262144 TTT_ENABLED=0"
part tests "$here/run.sh" test -k "on_a_gpu or graph_breaks or fp32_copy or summed_by_bucket"
part run env RUN_ID=run MAX_WALLCLOCK_SECONDS="$seconds" AUDIT=1 SAVE_FLOAT=1 "$here/run.sh"
part bench "$here/run.sh" bench
part trials "$py" "$here/tools/trials.py"
for width in ${WINDOWS:-512 1024 2048}; do  # keys and values carried, against the sliding windows of `run`
  part "window_$width" env RUN_ID=window_$width TRAIN_ENABLED=0 MODEL_PATH="$out/run/final_model.int6.ptz" TTT_ENABLED=0 \
    FINAL_EVAL_ENABLE=0 EVAL_WINDOW=$width "$here/run.sh"
done
number=0
for other in "$@"; do
  number=$((number + 1))
  # shellcheck disable=SC2086  # words on purpose
  part "against_$number" env $short "$here/run.sh" bench --against "$(realpath "$other")" --repeats 3
done
part seed_or_frontier "$here/run.sh" sweep PRESET=seed,frontier SEED=13,1337 MAX_WALLCLOCK_SECONDS="$seconds" --name presets
echo "all of it: $out"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
