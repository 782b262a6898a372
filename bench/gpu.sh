#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine without network:
#
#     bash bench/gpu.sh [build] [tests] [memcheck]        all of them unless some are named
#
# Builds in place with the torch that is installed, runs the kernel tests there, and the memory
# checker on small shapes. Each stage has a time limit, under nine minutes together. The log goes to
# $OUT (default: gpu_output). Without a GPU the stages that need one are reported as absent.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu_output}
mkdir -p "$out"
log=$out/gpu.log
python=${PYTHON:-python3}
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build tests memcheck)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=0

say() { printf '%s\n' "$*" | tee -a "$log"; }
stage() { # name, seconds, command ...
  local name=$1 limit=$2
  shift 2
  [[ " ${stages[*]} " == *" $name "* ]] || return 0
  say "== $name: $*"
  timeout "$limit" "$@" >>"$log" 2>&1
  local status=$?
  tail -n 3 "$log"
  say "== $name: exit $status"
  [ $status -eq 0 ] || failed=1
}

: >"$log"
say "commit $(git describe --always --dirty 2>/dev/null || echo unknown), $(date -u +%FT%TZ)"
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
say "device: ${gpu:-absent}"
kernel_tests="tests/test_match.py tests/test_merge.py tests/test_attention.py tests/test_errors.py"

# On a GPU machine a build without the CUDA kernels is a failure, not a smaller success.
[ -z "$gpu" ] || export FASTAST_BUILD=cuda
stage build 200 "$python" setup.py build_ext --inplace
if [ -n "$gpu" ]; then
  # shellcheck disable=SC2086
  stage tests 200 "$python" -m pytest -q tests/test_cuda.py $kernel_tests
  checker=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
  if [ -n "$checker" ]; then
    stage memcheck 120 "$checker" --error-exitcode 9 "$python" -m pytest -q tests/test_cuda.py -k "146 or 1-1-1"
  else
    say "== memcheck: compute-sanitizer is absent"
  fi
else
  say "== tests and memcheck: absent, torch finds no CUDA device"
fi
exit $failed
