#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, runs the tests and the microbenchmark, and leaves its JSON.
#
#   benchmarks/gpu_check.sh [build] [tests] [bench]     default: all three, each if the one before succeeded
#
# OUT is the folder for results (default benchmarks/results), PYTHON the Python that has torch (python3).
# Nothing is installed or downloaded: it needs torch, ninja, pybind11, a C++ compiler, for the tests pytest.
# Exits 2 where there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
parts=${*:-build tests bench}

for part in $parts; do
  case $part in
    build | tests | bench) ;;
    *) echo "gpu_check: unknown part '$part' (build, tests, bench)" >&2; exit 1 ;;
  esac
done

if ! gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null); then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "gpu_check: there is a GPU, but $python has no torch that can use it:" >&2
    "$python" -c 'import torch; torch.cuda.get_device_name()' 2>&1 | tail -n 1 >&2
    exit 1
  fi
  echo "gpu_check: no NVIDIA GPU here, nothing checked"
  exit 2
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
name=$(tr -cs 'A-Za-z0-9\n' '-' <<<"$gpu" | tr 'A-Z' 'a-z')
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

for part in $parts; do
  echo "== $part ($gpu)"
  case $part in
    build)
      "$python" setup.py -q build_ext --inplace
      "$python" -m senet_fused doctor
      ;;
    tests)
      workers=()
      if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
      OMP_NUM_THREADS=2 "$python" -m pytest "${workers[@]}"
      ;;
    bench)
      "$python" -m senet_fused bench --problem senet154 --batch 64 \
        --dtype bfloat16 float32 --layout contiguous channels_last --direction forward forward+backward \
        --providers eager compile fused --device cuda --json "$out/microbenchmark-$name.json"
      ;;
  esac
done
echo "== done: $parts; results in $out"
