#!/usr/bin/env bash
usage() {
  cat <<'END'
Everything that needs a GPU, in one command, on a machine without network:

    bash bench/gpu.sh [STAGE ...]

    unverified   what the design assumes of a GPU, measured (bench/unverified.py)
    build        the extension in place, with CUDA where there is a GPU
    tests        every test of the ops on the GPU, of graphs, and of a model
    memcheck     compute-sanitizer's memcheck and racecheck on small shapes
    ops          the benchmark suite's ops, --set gpu
    models       its whole models
    train        the paper's tables on ESC-50 (fastast reproduce), AST-small from scratch
    report       tables and pictures of it; the model with the ceilings that were measured; which
                 of an op's two kernels is the default from now on (fastast_kernels/winners.json)

All stages run unless some are named, each under its own time limit and nine minutes together. One
that fails does not stop the next. A stage that is done in $OUT is not repeated unless it is named.
Without a GPU the stages that need one are reported as absent.

Environment:
    OUT      folder of results and log, default gpu_output: gpu.log, stages.txt, unverified.json,
             ops.json.gz, models.json.gz, winners.json, results.tar.gz, train.tar.gz
    PYTHON   default python3
    BUDGET   seconds for all stages together, default 540
    DATA     folder with esc50/ and teacher_mn04/, for train (carry it in an ignored folder)
    FOLDS    test folds of train, default 1

Exits 1 if a stage failed or found no time, 2 for a stage that there is not.
END
}
set -uo pipefail
all=(unverified build tests memcheck ops models train report)
for name in "$@"; do
  case $name in
    -h | --help) usage; exit 0 ;;
  esac
  if [[ " ${all[*]} " != *" $name "* ]]; then
    echo "no stage is called $name: ${all[*]}" >&2
    exit 2
  fi
done
named=" $* "
mkdir -p "${OUT:-gpu_output}"
out=$(cd "${OUT:-gpu_output}" && pwd)
cd "$(dirname "$0")/.." || exit 1
log=$out/gpu.log
python=${PYTHON:-python3}
budget=${BUDGET:-540}
begin=$(mktemp)
trap 'rm -f "$begin"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
SECONDS=0

declare -A status took
if [ -f "$out/stages.txt" ]; then
  while read -r name result seconds; do
    status[$name]=$result took[$name]=$seconds
  done <"$out/stages.txt"
fi

say() { printf '%s\n' "$*" | tee -a "$log"; }

record() { # stage, result, seconds
  status[$1]=$2 took[$1]=$3
  local name
  for name in "${all[@]}"; do
    [ -z "${status[$name]:-}" ] || echo "$name ${status[$name]} ${took[$name]}"
  done >"$out/stages.txt"
}

wanted() { # Is the stage to be run?
  if [ "$named" != "  " ]; then
    [[ $named == *" $1 "* ]]
  else
    [ "${status[$1]:-}" != ok ] || { say "== $1: done before"; false; }
  fi
}

# The limit is a stage's own or what is left of the whole, which always leaves some for the report.
stage() { # name, seconds, lines of the log to show, command ...
  local name=$1 limit=$2 lines=$3 left code start=$SECONDS signal=TERM
  shift 3
  [ "$name" = report ] || unset 'status[report]' # it was about older results
  left=$((budget - SECONDS))
  [ "$name" = report ] || left=$((left - 30))
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 10 ]; then
    say "== $name: no time left; run again with: bash bench/gpu.sh $name"
    record "$name" late 0
    return 1
  fi
  # pytest writes what it has when it is interrupted, and nothing when it is terminated.
  case $name in ops | models) signal=INT ;; esac
  say "== $name, at most $limit s: $*"
  local from
  from=$(wc -l <"$log")
  timeout -s $signal -k 10 "$limit" "$@" >>"$log" 2>&1
  code=$?
  [ $code -eq 0 ] || lines=40
  tail -n "+$((from + 1))" "$log" | tail -n "$lines"
  case $code in
    0) record "$name" ok $((SECONDS - start)) ;;
    124 | 137) record "$name" timeout $((SECONDS - start)) ;;
    *) record "$name" "failed:$code" $((SECONDS - start)) ;;
  esac
  say "== $name: ${status[$name]}, ${took[$name]} s"
  [ $code -eq 0 ]
}

absent() { # stage, why
  say "== $1: absent, $2"
  record "$1" absent 0
}

: >>"$log"
say "commit $(git describe --always --dirty 2>/dev/null || echo unknown), $(date -u +%FT%TZ)"
gpu=$("$python" -c 'import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>>"$log")
say "device: ${gpu:-absent}, $("$python" --version 2>&1), $(nproc --all) cores"
[ -z "$gpu" ] || nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu \
  --format=csv,noheader >>"$log" 2>&1

if wanted unverified; then
  stage unverified 225 45 "$python" bench/unverified.py --out "$out/unverified.json" \
    && [ -z "$gpu" ] && absent unverified "torch finds no CUDA device"
fi

if wanted build; then
  # On a GPU machine a build without the CUDA kernels is a failure, not a smaller success.
  [ -z "$gpu" ] || export FASTAST_BUILD=cuda
  stage build 150 3 "$python" setup.py build_ext --inplace
fi

if wanted tests; then
  if [ -n "$gpu" ]; then
    stage tests 240 3 "$python" -m pytest -q -n 8 --dist worksteal -p no:cacheprovider \
      tests/test_cuda.py tests/test_shapes.py tests/test_match.py tests/test_merge.py \
      tests/test_attention.py tests/test_errors.py tests/test_registration.py \
      tests/test_inference.py
  else
    absent tests "torch finds no CUDA device"
  fi
fi

# shellcheck disable=SC2329 # by name, through bash -c: timeout runs commands, not functions
checked() { # Both tools over the tests of the kernels that are small enough to wait for.
  local tool code=0
  local small="146-64 or 1-1-1 or (cuda and (N3- or N63- or no_batch or 63-130 or 3-16 or 63-80))"
  for tool in memcheck racecheck; do
    local options=(--tool "$tool" --error-exitcode 9)
    # PyTorch probes the driver with calls that fail; what is looked for are bad accesses.
    [ "$tool" = racecheck ] || options+=(--report-api-errors no)
    # Each tensor by itself: inside one large block an overrun would hit a neighbour unseen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 120 "$checker" "${options[@]}" \
      "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py tests/test_shapes.py \
      -k "$small" || code=$?
    echo "$tool: exit $code"
  done
  return "$code"
}
if wanted memcheck; then
  checker=$(command -v compute-sanitizer)
  for found in /usr/local/cuda*/bin/compute-sanitizer; do
    [ -n "$checker" ] || [ ! -x "$found" ] || checker=$found
  done
  if [ -z "$gpu" ]; then
    absent memcheck "torch finds no CUDA device"
  elif [ -z "$checker" ]; then
    absent memcheck "there is no compute-sanitizer"
  else
    export checker python
    export -f checked
    lines=$(wc -l <"$log")
    if ! stage memcheck 245 12 bash -c checked \
      && tail -n "+$lines" "$log" | grep -q "Device not supported"; then
      absent memcheck "compute-sanitizer cannot work on this machine"
    fi
  fi
fi

for suite in ops models; do
  if wanted $suite; then
    if [ -n "$gpu" ]; then
      json=$out/$suite.json
      rm -f "$json" "$json.gz"
      limit=240
      [ $suite = ops ] || limit=480
      stage $suite $limit 30 "$python" -m pytest bench/test_$suite.py -q --benchmark-enable \
        --benchmark-only --set=gpu "--benchmark-json=$json" -p no:cacheprovider
    else
      absent $suite "torch finds no CUDA device"
    fi
  fi
done

# shellcheck disable=SC2329
trained() { # Table 2 trains the CNN teacher's head, and distils from it and from the plain model.
  local table code=0 student=(--size small --batch-size 48 --precision bf16 --epochs 40)
  local teacher=(--cnn mn04 --cnn-fit head --cnn-weights "$DATA"/teacher_mn04/*.safetensors)
  for table in table1 table2; do
    "$python" -m fastast reproduce $table --data "$DATA/esc50" --dataset esc50 \
      --folds "${FOLDS:-1}" --out "$runs" "${student[@]}" "${teacher[@]}" || code=$?
  done
  tar czf "$out/train.tar.gz" -C "$runs" $(cd "$runs" && find . -type f ! -name '*.pt' \
    ! -name '*.safetensors' ! -path '*/cache/*')
  return "$code"
}
if wanted train; then
  if [ -z "$gpu" ]; then
    absent train "torch finds no CUDA device"
  elif [ ! -d "${DATA:-}/esc50" ]; then
    absent train "DATA names no folder with esc50/"
  else
    runs=/tmp/fastast_runs
    mkdir -p "$runs"
    export out python runs DATA FOLDS
    export -f trained
    stage train 480 40 bash -c trained
  fi
fi

# shellcheck disable=SC2329
reported() {
  local code=0
  if [ -f "$out/unverified.json" ] && grep -q '"copy"' "$out/unverified.json"; then
    "$python" bench/roofline.py --ceilings "$out/unverified.json" || code=$?
  fi
  "$python" bench/report.py "$@" || code=$?
  if [ -s "$out/ops.json" ]; then
    {
      "$python" bench/winners.py "$out/ops.json" && cp fastast_kernels/winners.json "$out/"
    } || code=$?
  fi
  return "$code"
}
if wanted report; then
  runs=()
  for suite in ops models; do
    json=$out/$suite.json
    [ -s "$json" ] || [ ! -f "$json.gz" ] || gunzip -kf "$json.gz"
    [ ! -s "$json" ] || runs+=("$json")
  done
  if [ ${#runs[@]} -gt 0 ]; then
    export out python
    export -f reported
    # shellcheck disable=SC2016
    stage report 60 30 bash -c 'reported "$@"' report "${runs[@]}"
  else
    absent report "there is no ops.json or models.json"
  fi
fi

# What comes back from a lent machine is few files of limited size.
for suite in ops models; do
  [ ! -s "$out/$suite.json" ] || gzip -f "$out/$suite.json"
done
changed=()
while IFS= read -r file; do changed+=("$file"); done \
  < <(find bench/results assets README.md fastast_kernels/winners.json -type f -newer "$begin" 2>/dev/null)
if [ ${#changed[@]} -gt 0 ]; then
  tar czf "$out/results.tar.gz" "${changed[@]}" && say "results.tar.gz: ${changed[*]}"
fi

say ""
say "$(printf '%-12s %-12s %s' stage result seconds)"
failed=0
for name in "${all[@]}"; do
  result=${status[$name]:-not run}
  say "$(printf '%-12s %-12s %s' "$name" "$result" "${took[$name]:-}")"
  case $result in
    ok | absent | "not run") ;;
    *) failed=1 ;;
  esac
done
say "$SECONDS s in all; log and results are in $out"
exit $failed
