#!/usr/bin/env bash
# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, exercised by the kernel tests.
#
#   tests/sanitize/run.sh [pytest's arguments]      default: the CPU's kernel tests, and the CUDA kernels' on the host
#
# PYTHON names the environment's Python (default python3), SANITIZE_ISAS the instruction sets to go through
# (default: the widest that this CPU has, and the baseline). SANITIZE=subset goes through the widest alone, and takes
# the tests that end within vectors, blocks and tiles, where a kernel reaches too far if it does anywhere: some minutes.
# Needs g++: the runtime preloaded into Python is gcc's.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$(command -v "${PYTHON:-python3}")
built=$PWD/build/sanitize
export CXX=${CXX:-g++}
sanitizers=address,undefined

checked=tests/sanitize/checked_intrinsics.h

case ${SANITIZE:=all} in
  all) subset= on_host='not samples_that_lie and not refuses and not senet154' ;;
  subset)
    subset='ends_of or layouts or weights_in_any_form or mixed_dtypes or only_wanted or every_element or fresh_memory'
    on_host='every_kernel_runs or break_alignment or wide_bottlenecks or odd_shapes'
    ;;
  *)
    echo "SANITIZE=$SANITIZE: expected all or subset" >&2
    exit 2
    ;;
esac

# Instructions that touch memory and that gcc does not instrument: masked, streaming, gather, scatter.
unseen='_mm[0-9]*_(mask\w*_\w*(load|store)|maskload|maskstore|stream|\w*gather|\w*scatter|mask_compressstore)\w*'
for name in $(grep -rhoE "$unseen" csrc | sort -u); do
  grep -q "#define $name(" $checked || { echo "$checked has no entry for $name"; exit 1; }
done

echo "== building with -fsanitize=$sanitizers"
SENET_FUSED_SANITIZE=$sanitizers SENET_FUSED_CUDA=0 SENET_FUSED_CXXFLAGS="-include $checked" \
  "$python" setup.py -q build --build-lib "$built"
"$CXX" -std=c++17 -O1 -g -fPIC -shared -fsanitize=$sanitizers -fno-sanitize-recover=all \
  -include $checked tests/sanitize/planted.cpp -o "$built/planted.so"

# Leaks are not looked for: Python and torch keep much until the process ends.
export ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1
# Kernels with two threads, that sleep while they wait: pytest's workers share the cores as well.
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
# In front of any installed senet_fused.
export PYTHONPATH=$built
# libstdc++ comes along because the runtime looks for the functions that throw when it starts.
preload="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libstdc++.so)"

sanitized() { LD_PRELOAD=$preload "$python" "$@"; }
# Without the current folder on the path, where the checkout's own senet_fused would come first.
outside='import sys; sys.path[:] = [p for p in sys.path if p]'

echo "== planted faults"
sanitized tests/sanitize/check_planted.py "$built/planted.so"

sanitized -c "$outside
import senet_fused
from senet_fused.backends import native
assert senet_fused.__file__.startswith('$built'), senet_fused.__file__
assert native.problem() is None, native.problem()"
nm -D "$built/senet_fused/_cpu.so" | grep __asan_report_store >/dev/null || {
  echo "_cpu.so is not instrumented"
  exit 1
}

widest=$(sanitized -c "$outside
from senet_fused.backends import native
print(native.instruction_set())")
usual=$(printf '%s\n' "$widest" baseline | sort -u)
[ "$SANITIZE" = all ] || usual=$widest
isas=${SANITIZE_ISAS:-$usual}
tests=("$@")
[ $# -gt 0 ] || tests=(tests/test_cpu_kernels.py tests/test_tail_kernels.py ${subset:+-k "$subset"})
for isa in $isas; do
  echo "== kernel tests, $isa"
  export SENET_FUSED_ISA=$isa
  # Reports go to the terminal: an error ends the process, and what pytest captured would go down with it.
  sanitized -c "$outside
import pytest
sys.exit(pytest.main(sys.argv[1:]))" -p no:cacheprovider -p no:faulthandler --capture=sys \
    -n auto --maxprocesses=8 --dist=worksteal "${tests[@]}"
done
# The CUDA kernels, run on the host. What tests/test_cuda_host.py plants has been found by then, if it is run as well.
reason=$(sanitized -c "import sys; sys.path[:] = [p for p in sys.path if p] + ['tests/cuda_host']; import build; print(build.problem() or '')")
if [ $# -gt 0 ]; then
  : # other tests were asked for
elif [ -n "$reason" ]; then
  echo "== CUDA kernels: skipped, $reason"
else
  echo "== CUDA kernels on the host"
  # Without LD_PRELOAD, for the compiler's sake.
  "$python" tests/cuda_host/build.py --sanitize
  # Every CUDA thread is a fibre here, and following up on returned stacks makes switching them ten times slower.
  export ASAN_OPTIONS=$ASAN_OPTIONS:detect_stack_use_after_return=0
  # As in the tests' own run: they are held to stock PyTorch's error, which depends on its threads.
  export OMP_NUM_THREADS=1
  SENET_HOST_SANITIZE=1 sanitized -c "$outside
import pytest
sys.exit(pytest.main(sys.argv[1:]))" -p no:cacheprovider -p no:faulthandler --capture=sys \
    -n auto --maxprocesses=8 --dist=worksteal tests/test_cuda_kernels.py tests/test_cuda_prims.py \
    tests/test_cuda_tail.py -k "$on_host"
fi
echo "== no error under -fsanitize=$sanitizers: $(echo $isas)"
