#!/bin/sh
# Usage: [OUT=folder] [CIFAR=folder] sh bench/gpu.sh [build] [test] [sanitize] [bench] [train]   (default: all but train)
#
# On a machine with a GPU whose own python3 holds torch; needs no network. Each part fits into ten minutes and leaves
# its files under $OUT (default: gpu-results). CIFAR is a folder with cifar-100-python in it, for `train`.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-gpu-results}
mkdir -p "$out"
[ $# -gt 0 ] || set -- build test sanitize bench
python=${PYTHON:-python3}
failed=""

part() {
  echo "== $*" >&2
  "$@" || failed="$failed $1"
}

build() {
  FREEZEOUT_CUDA=1 $python -m pip install --no-build-isolation --no-deps --editable . >"$out/build.log" 2>&1 || {
    tail -n 30 "$out/build.log"
    return 1
  }
  $python -c 'import json, freezeout_ext; print(json.dumps(freezeout_ext.build_info(), indent=1))' | tee "$out/build.json"
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv >"$out/device.csv"
}

tests() {
  $python -m pytest -q --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.log" | tail -n 40
  grep -Eq '[0-9]+ passed' "$out/tests.log" && ! grep -Eq '[0-9]+ (failed|error)' "$out/tests.log"
}

# The tools that find a kernel's wild reads, races and use of memory that nobody wrote.
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer was not found; it comes with the CUDA toolkit"; return 1; }
  status=0
  for tool in memcheck racecheck initcheck; do
    # torch's caching allocator would hide reads beyond a tensor.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
      $python -m pytest -q -m "native_cuda or cuda" tests/test_csrc_fused_sgd.py tests/test_prefix_cuda.py \
      >"$out/sanitize-$tool.log" 2>&1 || status=1
    tail -n 3 "$out/sanitize-$tool.log"
  done
  return $status
}

benchmarks() {
  status=0
  for name in fused_sgd kernels prefix transition; do
    $python -m pytest -q "bench/bench_$name.py" --benchmark-json="$out/$name.json" >"$out/bench-$name.log" 2>&1 || status=1
    tail -n 25 "$out/bench-$name.log"
  done
  return $status
}

train() {
  [ -n "${CIFAR:-}" ] || { echo "train needs CIFAR=folder with cifar-100-python in it"; return 1; }
  # Ends after ten minutes at the most and goes on where it stopped when it is called again.
  timeout 580 $python -m freezeout_ext compare --data cifar100 --data-dir "$CIFAR" --model wrn-40-4 --epochs 100 \
      --batch-size 128 --arms full freezeout short --seeds 3 --resume --out "$out/wrn-40-4"
}

for name in "$@"; do
  case $name in
    build | sanitize | train) part "$name" ;;
    test) part tests ;;
    bench) part benchmarks ;;
    *) echo "part must be one of build, test, sanitize, bench, train, got $name" >&2; exit 2 ;;
  esac
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
echo "all parts passed; files are in $out"
