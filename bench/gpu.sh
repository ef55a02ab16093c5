#!/bin/sh
# Usage: [NAME=value ...] sh bench/gpu.sh [PART ...]       default: build test sanitize optimizer adamw kernels step features report
#
# What a machine with a GPU is asked, in parts that each end within ten minutes. No network is needed: the machine's own
# python3 has torch with Triton, nvcc, cmake, ninja, pybind11, setuptools, numpy, pytest, pytest-benchmark, pytest-xdist
# (without it the tests take longer than their limits) and hypothesis, and scikit-learn, matplotlib, rich and pillow for
# `train`. Of what is missing there bring wheels, and put them on PYTHONPATH (python3 -m pip install --no-index --no-deps
# --target FOLDER WHEELS): expecttest is the likeliest; only the tests that torch's own helpers feed need it, and they
# skip without it.
#
#   build      installs as a user does, not editable, and copies the compiled module into the tree: the tests below run
#              with the tree in front, and must not find it uncompiled
#   test       what needs a GPU first, then the whole suite with the GPU in sight
#   sanitize   compute-sanitizer memcheck, racecheck, initcheck over a choice of optimizer and kernel tests
#   optimizer  bench_fused.py, SGD
#   adamw      bench_fused.py, AdamW
#   kernels    bench_kernels.py without torch.compile
#   compile    bench_kernels.py, torch.compile on the same prefixes: minutes of compiling
#   step       bench_training_step.py, one net after the other
#   features   bench_features.py: a cached step over its suffix, captured where it can be, and the rate of a gather
#   train      full training, cubic scaled 0.8 and the shortened cosine, WRN-40-4 on CIFAR-100, run by run: finished runs
#              are kept, an unfinished one goes on where WORK is still there
#   figure     one of the paper's figures (Brock et al. 2017, arXiv 1706.04983), run by run likewise: linear and cubic at five
#              t_0, with scaled rates and without. FIGURE (wrn-cifar100), SETTING (paper, or modern: batch 512)
#   report     OUT/DEVICE.json and a table, of all that WORK holds; also at the end of every call
#
# OUT (gpu-results)   few small files: DEVICE.json, logs.tar.gz, runs.tar.gz, compare.png, figure.html
# WORK (build/gpu)    everything else; keep it between calls on one machine
# RUNS                a runs.tar.gz of an earlier call, on another machine perhaps: its finished runs count
# NETS                for compile: ("wrn-40-4 densenet-76-12")
# COMMIT              for a tree without .git
# CIFAR               for train and figure: the folder with cifar-100-python in it
# Relative paths start at the top of the tree.
# MINUTES (9)         for train and figure; SEEDS (3), EPOCHS (100), BATCH (128), ARMS ("full freezeout short") too
set -u
cd "$(dirname "$0")/.."
out=${OUT:-gpu-results}
work=${WORK:-build/gpu}
mkdir -p "$out" "$work/logs" "$work/benchmarks"
[ $# -gt 0 ] || set -- build test sanitize optimizer adamw kernels step features
python=${PYTHON:-python3}
COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || true)}
given_path=${PYTHONPATH:-}
PYTHONPATH=$PWD${given_path:+:$given_path}
export COMMIT PYTHONPATH PYTHONUNBUFFERED=1
failed=""

say() { echo "== $(date +%H:%M:%S) $*"; }

# logged NAME SECONDS COMMAND...: its output to a log, the end of it here; a limit of its own, so that the rest still runs.
logged() {
  log=$work/logs/$1.log
  limit=$2
  shift 2
  # On SIGINT pytest still writes what it has.
  timeout -s INT -k 20 "$limit" "$@" >"$log" 2>&1
  code=$?
  tail -n "${LINES_SHOWN:-12}" "$log" | cut -c1-300
  [ $code != 124 ] || echo "stopped after $limit seconds"
  return $code
}

build() {
  "$python" - <<'PYTHON' || return 1
import sys
from importlib.metadata import version

found = version("setuptools")
if int(found.split(".")[0]) < 77:
    sys.exit(f"setuptools must be >= 77 for pyproject.toml's license, found {found}: bring its wheel")
PYTHON
  # What an earlier build left would be installed again.
  rm -rf freezeout_ext/_C*.so build/lib.* build/bdist.*
  logged build 120 env PYTHONPATH="$given_path" FREEZEOUT_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps --force-reinstall . ||
    return 1
  installed=$(cd / && PYTHONPATH=$given_path "$python" -c 'import freezeout_ext; print(freezeout_ext.build_info()["module"])') || return 1
  cp "$installed" freezeout_ext/ || return 1
  # The installed package by itself: compiled, with CUDA, and a step that runs.
  (cd / && PYTHONPATH=$given_path "$python" - <<'PYTHON'
import torch
from freezeout_ext import FusedSGD, build_info
from freezeout_ext.native import cuda_unavailable_reason

print(build_info())
assert cuda_unavailable_reason() is None, cuda_unavailable_reason()
p = torch.nn.Parameter(torch.ones(10_000, device="cuda"))
p.grad = torch.ones_like(p)
optimizer = FusedSGD([p], lr=0.5, momentum=0.9)
optimizer.step()
optimizer.step()
assert optimizer.native_report() == {} and torch.allclose(p, torch.full_like(p, 1 - 0.5 - 0.95)), p
print("FusedSGD ran on", torch.cuda.get_device_name())
PYTHON
  ) || return 1
  # And the tree, which the tests and benchmarks import, with the same module.
  "$python" - <<'PYTHON' || return 1
import os

from freezeout_ext import build_info

module = build_info()["module"]
assert module and os.path.dirname(module) == os.path.realpath("freezeout_ext"), module
PYTHON
  # That pytest and pytest-benchmark fit together, before their time is spent.
  run_tests tests-report 60 tests/test_gpu_report.py
}

# pytest over the tree, which holds the compiled module.
run_tests() { # NAME SECONDS ARGUMENTS...
  name=$1
  limit=$2
  shift 2
  logged "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --junitxml="$work/$name.xml" "$@"
}

tests() {
  status=0
  # Compiling the kernels' many variants is most of the time, and the processor's.
  parallel=$("$python" -c 'import importlib.util as u; print("-n 12" if u.find_spec("xdist") else "")')
  # shellcheck disable=SC2086
  LINES_SHOWN=40 run_tests tests-gpu 220 $parallel -m "cuda or native_cuda" tests || status=1
  # shellcheck disable=SC2086
  LINES_SHOWN=25 run_tests tests-kernels 70 $parallel tests/test_kernels.py || status=1
  # shellcheck disable=SC2086
  LINES_SHOWN=40 run_tests tests-all 120 $parallel -m "not cuda and not native_cuda" --deselect tests/test_build.py \
    --ignore tests/test_kernels.py tests || status=1
  return $status
}

sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer was not found; it comes with the CUDA toolkit"; return 1; }
  status=0
  # Nothing that captures: that needs the caching allocator.
  optimizer="grad_scale or swapped or several_devices or layouts or (equals_torch and (float32 or bfloat16))"
  kernels="in_place or several_blocks or slices_of_one_buffer or stride_2 or keeps_nan"
  for tool in memcheck racecheck initcheck; do
    # torch's caching allocator would hide reads beyond a tensor, and NaN in new memory reads of what nobody wrote.
    caching="PYTORCH_NO_CUDA_MEMORY_CACHING=1"
    run="compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 20"
    # shellcheck disable=SC2086
    LINES_SHOWN=4 logged "sanitize-$tool-optimizer" 100 env $caching FREEZEOUT_TESTS_FILL=0 $run \
      "$python" -m pytest -q -x -p no:cacheprovider -m native_cuda tests/test_fused_cuda.py -k "$optimizer" || status=1
    # shellcheck disable=SC2086
    LINES_SHOWN=4 logged "sanitize-$tool-kernels" 90 env $caching FREEZEOUT_TESTS_FILL=0 $run \
      "$python" -m pytest -q -x -p no:cacheprovider tests/test_kernels.py -k "$kernels" || status=1
  done
  return $status
}

bench() { # NAME SECONDS FILE ARGUMENTS...
  name=$1
  limit=$2
  file=$3
  shift 3
  logged "bench-$name" "$limit" "$python" -m pytest -q -p no:cacheprovider "bench/$file" \
    --benchmark-json="$work/benchmarks/$name.json" --benchmark-columns=median "$@"
}

optimizer() { bench fused_sgd 240 bench_fused.py -k "not adamw"; }
adamw() { bench fused_adamw 280 bench_fused.py -k adamw; }
kernels() { bench kernels 320 bench_kernels.py -k "not compiled"; }
compiled() {
  status=0
  nets=${NETS:-wrn-40-4 densenet-76-12}
  for net in $nets; do
    bench "compile-$net" $((560 / $(echo "$nets" | wc -w))) bench_kernels.py -k "compiled and $net" || status=1
  done
  return $status
}

step() {
  status=0
  bench step-densenet-76-12 280 bench_training_step.py -k densenet-76-12 || status=1
  bench step-wrn-40-4 160 bench_training_step.py -k wrn-40-4 || status=1
  bench step-vgg-16 120 bench_training_step.py -k vgg-16 || status=1
  return $status
}

features() { bench features 280 bench_features.py; }

# compared NAME END OUT FLAGS...: freezeout compare, seed by seed, so that what is done can be compared at any time. A stop at
# END (seconds of `date`) keeps the epochs that are done, and the same part goes on there. 124 where it was stopped.
compared() {
  name=$1
  end=$2
  shift 2
  for seeds in $(seq 1 "${SEEDS:-3}"); do
    left=$((end - $(date +%s)))
    [ "$left" -gt 0 ] || left=1
    LINES_SHOWN=30 logged "$name" "$left" "$python" -m freezeout_ext compare --data-dir "$CIFAR" --epochs "${EPOCHS:-100}" \
      --seeds "$seeds" --resume --out "$@"
    code=$?
    [ $code != 124 ] || echo "$((seeds - 1)) of ${SEEDS:-3} seeds are done; the same part goes on"
    [ $code = 0 ] || return $code
  done
  echo "all ${SEEDS:-3} seeds are done"
}

# What a part of training runs needs, and the moment at which it is stopped.
prepare_runs() {
  [ -n "${CIFAR:-}" ] || { echo "$1 needs CIFAR=folder with $2 in it"; return 1; }
  [ -z "${RUNS:-}" ] || tar xzf "$RUNS" -C "$work" || return 1
  end=$(($(date +%s) + 60 * ${MINUTES:-9}))
}

train() {
  prepare_runs train cifar-100-python || return 1
  # shellcheck disable=SC2086
  compared train "$end" "$work/claim" --data cifar100 --model wrn-40-4 --batch-size "${BATCH:-128}" --t0 0.8 \
    --how-scale cubic --arms ${ARMS:-full freezeout short}
  code=$?
  [ $code = 0 ] || [ $code = 124 ]
}

figure() {
  figure=${FIGURE:-wrn-cifar100}
  case $figure in
    wrn-cifar10 | wrn-cifar100) model=wrn-40-4 ;;
    densenet-cifar10 | densenet-cifar100) model=densenet-76-12 ;;
    vgg-cifar10 | vgg-cifar100) model=vgg-16 ;;
    *) echo "FIGURE must be wrn-, densenet- or vgg-, and cifar10 or cifar100, got $figure"; return 1 ;;
  esac
  case ${SETTING:-paper} in
    paper) setting="--batch-size 50 --lr 0.1" ;;
    modern) setting="--batch-size 512 --lr 0.4 --warmup-epochs 5" ;;
    *) echo "SETTING must be paper or modern, got $SETTING"; return 1 ;;
  esac
  prepare_runs figure "cifar-100-python, or cifar-10-batches-py," || return 1
  drawn="$work/paper/$figure-${SETTING:-paper}"
  for rates in scale-lr no-scale-lr; do
    # shellcheck disable=SC2086
    compared "figure-$rates" "$end" "$drawn/$rates" --data "${figure#*-}" --model $model $setting --$rates --how-scale linear cubic \
      --t0 0.5 0.6 0.7 0.8 0.9 --arms full freezeout
    code=$?
    [ $code != 124 ] || return 0
    [ $code = 0 ] || return $code
  done
  "$python" -m freezeout_ext report "$drawn/scale-lr" "$drawn/no-scale-lr" --out "$drawn/figure.html"
}

report() {
  "$python" bench/gpu_report.py --work "$work" --out "$out"
}

for part in "$@"; do
  say "$part"
  case $part in
    build | sanitize | optimizer | adamw | kernels | step | features | train | figure) $part || failed="$failed $part" ;;
    test) tests || failed="$failed $part" ;;
    compile) compiled || failed="$failed $part" ;;
    report) ;;
    *) echo "part must be one of build, test, sanitize, optimizer, adamw, kernels, compile, step, features, train, figure, report, got $part" >&2; exit 2 ;;
  esac
  # After every part: a call that is stopped leaves what it has.
  report >"$work/logs/report.log" 2>&1 || { cat "$work/logs/report.log"; failed="$failed report"; }
done
cat "$work/logs/report.log"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
