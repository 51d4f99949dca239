#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, tests, and measures, and leaves what it measured as JSON and pictures.
#
#   benchmarks/gpu_check.sh first         at most eight minutes, the most valuable first: builds for this GPU alone, doctor,
#                                         every kernel against float64, SE and tails of SENet-154, a training step of two
#                                         networks; see gpu_first.py, whose parts may follow
#   benchmarks/gpu_check.sh [PART...]     a longer stay; default: all, in this order
#
#   build                 compiles the CPU kernels and the CUDA kernels, and says what runs here; fails without nvcc
#   tests                 all tests; those of GPU kernels run on the GPU
#   sanitize-cuda         every strategy and form of the CUDA plans once under each tool of compute-sanitizer: memcheck,
#   sanitize-triton       racecheck, synccheck, initcheck (skipped without it); the same for the Triton plans, and for
#   sanitize-tail-cuda    block tails, by the batch's and by given statistics, with a gate and without
#   sanitize-tail-triton
#   bench-bf16            SENet-154's layers at batch 64: both layouts, forward and forward+backward, cold and warm L2,
#   bench-float32         device time by graph replay and wall time; eager, compile, max-autotune, fused, cuda, triton,
#                         fused+compile
#   bench-tail-bf16       the block tails around them, by the same: forward, and backward alone
#   bench-tail-float32
#   launches              the GPU kernels of one forward and one backward of each layer, or tail, with either backend;
#   launches-tail         fails if there are more than planned
#   models                whole networks, a training step in bfloat16 by autocast at batch 64, channels_last: stock, fused
#                         and tails, stock and tails as one CUDA graph, and without SE (skipped without timm)
#   models-compile        the same networks: stock, compile, tails, tails+compile, without SE
#   models-max-autotune   stock, max-autotune, tails, without SE
#   models-largest        legacy_senet154 and legacy_seresnext101_32x4d at the largest batch that fits: as in models, and
#                         compile, tails+compile
#   train                 senet-fused train on the GPUs of this machine by torchrun: SENet-154 with synchronised tails in
#                         bfloat16, stopped and resumed
#   table                 tables of what is measured, and the pictures
#
# Every part is meant to end within ten minutes on an H200. If build fails nothing else runs; the other parts run
# whatever became of those before. Exits 1 if a part failed, or PYTHON has no torch for the GPU that is here, 2 where
# there is no GPU.
#
# OUT is the folder for results (default benchmarks/results, of first build/gpu_check), PYTHON the Python that has torch (python3), WORKERS the
# number of test processes (12), TESTS_LIMIT the seconds after which they are ended (590), BUDGET the seconds of samples
# per case and cache mode (1), TIME_LIMIT the seconds after which the benchmark begins no further case (500; what is
# done is kept). MODELS are the networks of the models' parts, in order, each in a process of its own, and MODELS_LIMIT
# the seconds after which a part of them is interrupted (560): the networks that are done are kept, a further call with
# the others in MODELS adds them. Nothing is installed or downloaded: it needs torch, triton, ninja, pybind11, a C++
# compiler, nvcc, for the models timm, for the tests pytest, for the pictures matplotlib.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
all="build tests sanitize-cuda sanitize-triton sanitize-tail-cuda sanitize-tail-triton"
all="$all bench-bf16 bench-float32 bench-tail-bf16 bench-tail-float32 launches launches-tail"
all="$all models models-compile models-max-autotune models-largest train table"
parts=
if [ "${1:-}" != first ]; then parts=${*:-$all}; fi

for part in $parts; do
  case " $all " in
    *" $part "*) ;;
    *) echo "gpu_check: unknown part '$part' (first; ${all// /, })" >&2; exit 1 ;;
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

if [ "${1:-}" = first ]; then
  exec "$python" benchmarks/gpu_first.py --out "${OUT:-build/gpu_check}" "${@:2}"
fi
out=${OUT:-benchmarks/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
name=$(tr -cs 'A-Za-z0-9\n' '-' <<<"$gpu" | tr 'A-Z' 'a-z')-senet154-batch64
models=${name%-senet154-batch64}-models
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

build() {
  SENET_FUSED_CUDA=1 "$python" setup.py -q build_ext --inplace
  "$python" -m senet_fused doctor
}

tests() {
  local workers=()
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "${WORKERS:-12}" --dist=worksteal); fi
  OMP_NUM_THREADS=2 timeout "${TESTS_LIMIT:-590}" "$python" -m pytest "${workers[@]}"
}

sanitize() {
  local backend=${1#tail-} op=() sanitizer tool log status failed=0
  if [ "$backend" != "$1" ]; then op=(--op tail); fi
  sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer || true)
  if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not installed: skipped"
    return
  fi
  # By itself first: Triton compiles, which the sanitizer need not watch.
  "$python" benchmarks/gpu_kernels.py --backend "$backend" "${op[@]}"
  for tool in memcheck racecheck synccheck initcheck; do
    status=0 log=$out/sanitize-$1-$tool.log
    # Without PyTorch's allocator, each tensor is an allocation of its own, with an end that can be overrun.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 130 "$sanitizer" --tool "$tool" --error-exitcode 3 \
      "$python" benchmarks/gpu_kernels.py --backend "$backend" "${op[@]}" >"$log" 2>&1 || status=$?
    if [ "$status" = 124 ] && [ "$tool" != memcheck ]; then
      echo "$tool: not done within 130 seconds, nothing said"
    elif [ "$status" != 0 ]; then
      echo "$tool: exit status $status"
      tail -n 30 "$log"
      failed=1
    else
      echo "$tool: $(tail -n 1 "$log")"
    fi
  done
  return "$failed"
}

# How long 16 cases of one dtype take is an estimate, not a measurement: inputs and oracle 30 seconds, torch.compile
# 2 minutes and max-autotune 4 while their caches are empty, triton and fused+compile 1, samples BUDGET x 2 (cold and
# warm) x 16 cases, all providers together: about 8 minutes, less the second time.
bench() {
  local op=$1 dtype=$2 suffix="" directions=(forward forward+backward)
  if [ "$op" = tail ]; then suffix=-tail directions=(forward backward); fi
  # torch.compile's autotuning writes pages to standard error: they go to the log.
  "$python" -m senet_fused bench --op "$op" --problem senet154 --batch 64 --dtype "$dtype" \
    --layout contiguous channels_last --direction "${directions[@]}" --device cuda \
    --providers eager compile max-autotune fused cuda triton fused+compile \
    --budget "${BUDGET:-1}" --time-limit "${TIME_LIMIT:-500}" --json "$out/$name$suffix-$dtype.json" \
    2> >(tee "$out/bench$suffix-$dtype.log" | grep --line-buffered -E '^\[[0-9]+/|^senet-fused|Error' >&2)
}

launches() {
  "$python" benchmarks/gpu_launches.py --op "$1" --problem senet154 --batch 64 --dtype bfloat16 float32 \
    --backend cuda triton | tee "$out/$name-launches${2:-}.txt"
}

# WHAT VARIANT...
models() {
  local what=$1 batch=64 end=$((SECONDS + ${MODELS_LIMIT:-560})) known=() network left status worst=0
  local asked=${MODELS:-legacy_senet154 seresnet50 legacy_seresnext101_32x4d senet154 seresnext101_32x4d}
  if [ "$what" = largest ]; then batch=max asked=${MODELS:-legacy_senet154 legacy_seresnext101_32x4d}; fi
  shift
  # shellcheck disable=SC2086
  if ! known=($("$python" -c 'import sys, timm; print(*filter(timm.is_model, sys.argv[1:]))' $asked 2>/dev/null)); then
    echo "timm is not installed: skipped"
    return
  fi
  if [ ${#known[@]} = 0 ]; then
    echo "timm has none of $asked"
    return 1
  fi
  for network in "${known[@]}"; do
    left=$((end - SECONDS)) status=0
    if [ "$left" -lt 45 ]; then
      echo "$network: out of time, not begun"
      worst=130
      continue
    fi
    # What takes longer is interrupted as by Ctrl-C: torch.compile has no limit of its own.
    timeout -s INT -k 25 "$left" "$python" -m senet_fused bench model "$network" --mode training --batch "$batch" \
      --dtype bfloat16 --amp --layout channels_last --device cuda --providers "$@" --budget 5 \
      --time-limit "${TIME_LIMIT:-$((left * 2 / 3))}" --plain --json "$out/$models-batch$batch-$what-$network.json" \
      2> >(tee "$out/models-$what-$network.log" | grep --line-buffered -E '^\[[0-9]+/|^senet-fused|Error' >&2) || status=$?
    if [ "$status" != 0 ]; then worst=$status; fi
  done
  return "$worst"
}

train() {
  local work gpus run
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  work=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  run=(timeout "${TRAIN_LIMIT:-500}" "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus"
    -m senet_fused train --model senet154 --data "synthetic:10,$((1024 * gpus)),$((128 * gpus))" --epochs 2
    --batch-size 32 --amp bf16 --fuse tails --sync-batchnorm --ema 0.99 --workers 4 --device cuda
    --tensorboard off --output "$work/run")
  "${run[@]}" --max-steps 40
  "${run[@]}" --resume
  cp "$work/run/log.csv" "$out/${name%-senet154-batch64}-train.csv"
}

table() {
  local suffix dtype file files any=0 failed=0
  for suffix in "" -tail; do
    files=()
    for dtype in bfloat16 float32; do
      file=$out/$name$suffix-$dtype.json
      if [ -f "$file" ]; then files+=("$file"); fi
    done
    if [ ${#files[@]} = 0 ]; then continue; fi
    any=1
    "$python" -m senet_fused bench --from "${files[@]}" --plain --plot "$out/$name$suffix.png" \
      --roofline "$out/$name$suffix-roofline.png" || failed=1
  done
  files=()
  for file in "$out/$models"-*.json; do
    if [ -f "$file" ]; then files+=("$file"); fi
  done
  if [ ${#files[@]} != 0 ]; then
    any=1
    "$python" -m senet_fused bench --from "${files[@]}" --plain || failed=1
  fi
  if [ "$any" = 0 ]; then
    echo "nothing is measured yet in $out"
    return 1
  fi
  return "$failed"
}

failed=()
for part in $parts; do
  echo "== $part ($gpu)"
  start=$SECONDS
  set +e
  (
    set -e
    case $part in
      sanitize-*) sanitize "${part#sanitize-}" ;;
      bench-bf16) bench se bfloat16 ;;
      bench-float32) bench se float32 ;;
      bench-tail-bf16) bench tail bfloat16 ;;
      bench-tail-float32) bench tail float32 ;;
      launches) launches se ;;
      launches-tail) launches tail -tail ;;
      models) models eager stock graph fused tails tails+graph no-se ;;
      models-compile) models compile stock compile tails tails+compile no-se ;;
      models-max-autotune) models max-autotune stock max-autotune tails no-se ;;
      models-largest) models largest stock graph fused tails tails+graph compile tails+compile no-se ;;
      *) "$part" ;;
    esac
  )
  status=$?
  set -e
  echo "== $part: exit status $status after $((SECONDS - start)) s"
  if [ "$status" != 0 ]; then
    failed+=("$part")
    if [ "$part" = build ]; then break; fi
  fi
done
if [ ${#failed[@]} != 0 ]; then
  echo "== failed: ${failed[*]}; results in $out"
  exit 1
fi
echo "== done: $parts; results in $out"
