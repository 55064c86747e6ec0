#!/usr/bin/env bash
# One command for everything:
#   ./run.sh               train, export, read back and evaluate on whatever machine this is
#   ./run.sh test [...]    the tests; arguments go to pytest
#   ./run.sh data [...]    the published FineWeb shards; arguments go to data/prepare.py fineweb
#   ./run.sh data --verify [FOLDER...]   whether shards are what they say, and what validation and training share
#   ./run.sh bench [...]   the speed of each part here, or against another script; arguments go to tools/bench.py
#   ./run.sh sweep [...]   many runs and their table and plot: TTT_LR=1e-4,3e-4 SEED=13,1337; see tools/sweep.py
#   ./run.sh show [...]    table and plots of runs and of published logs; see tools/show.py
#   ./run.sh inspect FILE  what an artifact holds, tensor by tensor; see tools/inspect_artifact.py
#   ./run.sh measure [...] what a new machine, a GPU above all, can tell, in eight minutes; see tools/measure.py
#   ./run.sh audit RUN...  whether an evaluation learns before it scores, or peeks; see tools/audit.py. AUDIT=1 ./run.sh
#                          and AUDIT=1 ./run.sh sweep [...] audit each run when it ends
#   ./run.sh record [...]  a folder that is ready to submit, of runs that differ in the seed; see tools/record.py
#   ./run.sh check-record FOLDER...  what speaks against a record, of anybody's script; see tools/check_record.py
# Variables of train_gpt.py pass through: SEED=7 ITERATIONS=500 ./run.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { echo "error: $*" >&2; exit 2; }

export PYTHONUTF8=1  # names, texts and output are UTF-8 whatever the locale

# The Python to use: .venv if we made one, else the one on the PATH.
py=${PYTHON:-python3}
[ -x "$here/.venv/bin/python" ] && py=$here/.venv/bin/python
command -v "$py" >/dev/null || fail "no $py on the PATH; install Python 3.10 or newer, or set PYTHON"
"$py" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$py is older than Python 3.10; set PYTHON"

# Whether every module given can be found. Nothing is imported, so it costs no time.
has() { "$py" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; }

# Whether pip may write into this Python's environment.
writable() {
  "$py" -c 'import os, sys, sysconfig as s
ours = os.access(s.get_path("purelib"), os.W_OK)
managed = sys.prefix == sys.base_prefix and os.path.exists(os.path.join(s.get_path("stdlib"), "EXTERNALLY-MANAGED"))
sys.exit(not ours or managed)' && "$py" -m pip --version >/dev/null 2>&1
}

make_venv() {
  echo "making $here/.venv" >&2
  "$py" -m venv "$@" "$here/.venv" || { rm -rf "$here/.venv"; fail "$py cannot make a virtual environment; install its venv module"; }
  py=$here/.venv/bin/python
}

# Make the modules "$2 ..." importable, from the pinned list in file $1. A torch that is there is kept.
need() {
  local list=$1 module missing=(); shift
  for module in "$@"; do has "$module" || missing+=("$module"); done
  [ ${#missing[@]} -eq 0 ] && return
  if ! has torch; then
    [ "$py" = "$here/.venv/bin/python" ] || make_venv
    echo "installing requirements.txt" >&2
    "$py" -m pip install -q -r "$here/requirements.txt" || fail "installation failed; see above"
    need "$list" "$@"
    return
  fi
  writable || make_venv --system-site-packages
  local lines=()
  for module in "${missing[@]}"; do
    while read -r line; do lines+=("$line"); done < <(grep -E "^(pytest-)?$module\b" "$list")
  done
  echo "installing ${missing[*]}" >&2
  "$py" -m pip install -q "${lines[@]}" || fail "installing ${missing[*]} failed; see above"
}

job=${1:-train}
[ $# -gt 0 ] && shift
case $job in
  -h | --help | help) sed -n '2,16s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
  train | test | data | bench | measure | sweep | show | inspect | audit | record | check-record) ;;
  *=*) fail "$job: variables come before the command, as in $job ./run.sh" ;;
  *) fail "no job named $job; the jobs are: (none), test, data, bench, measure, sweep, show, inspect, audit, record, check-record; variables and --check: python train_gpt.py --help" ;;
esac
prepare=fineweb  # what of data/prepare.py is meant
if [ "$job" = data ] && [ "${1:-}" = --verify ]; then prepare=verify; shift; fi
case " $* " in *" --help "* | *" -h "*)  # of what can answer without a package
  [ "$job" != data ] || exec "$py" "$here/data/prepare.py" "$prepare" "$@"
  [ "$job" != measure ] || exec "$py" "$here/tools/measure.py" "$@" ;;
esac
need "$here/requirements.txt" torch numpy sentencepiece zstandard

# The command by which this was started, for those that jobs print; only what is started for them has it.
LAUNCHED_BY=$(printf %q "$0")
case $0 in */*) ;; *) LAUNCHED_BY="bash $LAUNCHED_BY" ;; esac
[ "$py" != "${PYTHON:-}" ] || LAUNCHED_BY="PYTHON=$(printf %q "$py") $LAUNCHED_BY"

# How many GPUs torch can use; to ask it takes seconds. Without any the script takes PRESET=demo.
count_gpus() {
  gpus=0
  if [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || [ -e /dev/kfd ]; then
    gpus=$("$py" -c 'import torch; print(torch.cuda.device_count())')
    [ "$gpus" -gt 0 ] || export CUDA_VISIBLE_DEVICES=
  fi
}

# The script's --check on so many ranks. Where it finds no data and names the embedded corpus, that is made.
check() {
  local said code size
  { said=$("$py" "$here/train_gpt.py" --check --ranks "$1" 2>&1 >&3) && code=0 || code=$?; } 3>&1
  size=$(sed -n 's/^error: DATA_PATH is not set.*prepare.py embedded --vocab-size \([0-9]*\) makes it)$/\1/p' <<<"$said")
  if [ -n "$size" ]; then
    "$py" "$here/tools/corpus.py" "$size"
    exec "$py" "$here/train_gpt.py" --check --ranks "$1"
  fi
  [ -z "$said" ] || echo "$said" >&2
  return "$code"
}

# Run a command, pass signals on to it, and set `code` to its exit code.
follow() {
  "$@" &
  local child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  trap 'kill -HUP "$child" 2>/dev/null || true' HUP
  trap 'kill -INT "$child" 2>/dev/null || true' INT  # a terminal sends it to the command too, which takes both for one
  while wait "$child" && code=0 || code=$?; kill -0 "$child" 2>/dev/null; do :; done
  trap - TERM HUP INT
}

# Whether the run in a folder has come to its end.
finished() { grep -qs '"finished": true' "$1/summary.json"; }

case $job in
  train)
    case ${AUDIT:-0} in 0 | 1) ;; *) fail "AUDIT=$AUDIT: accepts 0 or 1" ;; esac
    audit=${AUDIT:-0}
    unset AUDIT  # which is ours and not the script's
    [ "$audit" = 0 ] || LAUNCHED_BY="AUDIT=1 $LAUNCHED_BY"
    export LAUNCHED_BY
    count_gpus
    ranks=$((gpus > 0 ? gpus : 1))
    (check "$ranks")
    launch=("$py")
    if [ "$ranks" -gt 1 ]; then
      # A loopback address, because a host name may not resolve. Under nohup torchrun shall not heed SIGHUP either.
      launch+=(-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node="$ranks")
      [ -z "$(trap -p HUP)" ] || export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
    fi
    launch+=("$here/train_gpt.py" "$@")
    [ "$audit" = 1 ] || exec "${launch[@]}"
    export RUN_ID=${RUN_ID:-$(date +%Y%m%d-%H%M%S)_seed${SEED:-1337}_$$}  # to know the folder
    folder=${LOG_DIR:-logs}/$RUN_ID
    follow "${launch[@]}"
    finished "$folder" || exit "$code"
    worst=$code
    follow "$py" "$here/tools/audit.py" "$folder"
    exit $((code > worst ? code : worst)) ;;
  audit)
    export LAUNCHED_BY
    exec "$py" "$here/tools/audit.py" "$@" ;;
  bench)
    count_gpus
    exec "$py" "$here/tools/bench.py" "$@" ;;
  inspect)
    exec "$py" "$here/tools/inspect_artifact.py" "$@" ;;
  measure)  # finds its own data
    case " $* " in *" --report "*)
      (need "$here/tools/requirements.txt" matplotlib) || echo "warning: no matplotlib, so no plot; the tables come" >&2
      [ ! -x "$here/.venv/bin/python" ] || py=$here/.venv/bin/python ;;
    esac
    exec "$py" "$here/tools/measure.py" "$@" ;;
  check-record)
    case " $* " in *" --reference-bpb"*) need "$here/tools/requirements.txt" scipy ;; esac
    exec "$py" "$here/tools/check_record.py" "$@" ;;
  sweep | show | record)
    (need "$here/tools/requirements.txt" matplotlib) || echo "warning: no matplotlib, so no plot; the tables come" >&2
    [ ! -x "$here/.venv/bin/python" ] || py=$here/.venv/bin/python  # where that had to make one
    case " $* " in *" --reference-bpb"*) need "$here/tools/requirements.txt" scipy ;; esac
    [ "$job" != sweep ] || count_gpus
    export LAUNCHED_BY
    exec "$py" "$here/tools/$job.py" "$@" ;;
  test)
    need "$here/tests/requirements.txt" pytest xdist huggingface_hub
    (need "$here/tests/requirements.txt" triton) || echo "warning: no Triton, so the MLP's kernel is not tested" >&2
    (need "$here/tools/requirements.txt" brotli) || echo "warning: no brotli, so tools/equal_bytes.py is not tested" >&2
    need "$here/tools/requirements.txt" matplotlib scipy
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    cd "$here" && exec "$py" -m pytest -q -n auto --maxprocesses 4 "$@" tests ;;
  data)
    [ "$prepare" = verify ] || need "$here/data/requirements.txt" huggingface_hub
    exec "$py" "$here/data/prepare.py" "$prepare" "$@" ;;
esac
