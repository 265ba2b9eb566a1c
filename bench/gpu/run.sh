#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network:
#
#     bench/gpu/run.sh OUT_FOLDER [quick|full] [--seconds N] [--only STEP[,STEP...]] [--commit ID] [--device cpu]
#
# Steps: build, versions, tests, sanitizer, bench. A step that fails is reported and the others go on; the exit status is
# 1 if a test, the sanitizer or one of our bench rows failed. --seconds (540) is for the benches alone: the most
# important rows come first, and what was left out is said. --commit names what is measured where git is not at hand.
# --device cpu is a dry run of the plumbing on small sizes.
# Written to OUT_FOLDER: a log of each step, rows.csv (row by row, so a run cut short keeps them), bench.json, table.txt.
set -uo pipefail

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
}

[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
grid=quick seconds=540 device=cuda commit="" only=build,versions,tests,sanitizer,bench
while [[ $# -gt 0 ]]; do
    case $1 in
    quick | full) grid=$1 ;;
    --seconds) seconds=${2:?} && shift ;;
    --only) only=${2:?} && shift ;;
    --commit) commit=${2:?} && shift ;;
    --device) device=${2:?} && shift ;;
    *) usage ;;
    esac
    shift
done

cd "$(dirname "$0")/../.." || exit 2
root=$PWD
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
summary=()
failed=0

# step NAME FATAL COMMAND...: run it, log it, remember how it went; FATAL "yes" makes its failure the exit status.
step() {
    local name=$1 fatal=$2 began=$SECONDS status
    shift 2
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    local verdict=ok
    if [[ $status -ne 0 ]]; then
        verdict="FAILED with status $status"
        [[ $fatal == yes ]] && failed=1
    fi
    summary+=("$name: $verdict, $((SECONDS - began)) s")
    return "$status"
}

wanted() {
    [[ ",$only," == *",$1,"* ]]
}

build() {
    "$PYTHON" setup.py build_ext --inplace
}

versions() {
    "$PYTHON" - <<'PY'
import platform
import sys

import torch

print("python", sys.version.split()[0], "on", platform.platform())
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
for name in ("triton", "numpy", "pytest", "pytest_benchmark", "flash_attn", "flash_attn_interface", "xformers"):
    try:
        print(name, getattr(__import__(name), "__version__", "?"))
    except ImportError as error:
        print(name, "absent:", error)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
PY
    local status=$?
    echo "commit ${commit:-$(git rev-parse HEAD 2>/dev/null || echo unknown: no git history here)}"
    command -v nvidia-smi >/dev/null && nvidia-smi
    return $status
}

# The kernels' own tests, compiled, in float32, float16 and bfloat16; and whatever else is marked for a GPU.
gpu_tests() {
    local kernels others
    timeout 900 "$PYTHON" -m pytest tests/kernels --durations=5 -p no:cacheprovider
    kernels=$?
    timeout 600 "$PYTHON" -m pytest tests -m gpu --ignore=tests/kernels -p no:cacheprovider
    others=$?
    # 5: nothing is marked there.
    [[ $kernels -eq 0 && ($others -eq 0 || $others -eq 5) ]]
}

cpu_tests() {
    TRITON_INTERPRET=1 timeout 900 "$PYTHON" -m pytest tests/kernels/test_kernel_configs.py -p no:cacheprovider
}

find_sanitizer() {
    local candidate
    for candidate in "$(command -v compute-sanitizer)" /usr/local/cuda*/bin/compute-sanitizer \
        /usr/local/cuda*/compute-sanitizer/compute-sanitizer /opt/nvidia/*/compute-sanitizer; do
        [[ -x $candidate && ! -d $candidate ]] && echo "$candidate" && return
    done
    return 1
}

# Without torch's caching every tensor is an allocation of its own, whose bounds memcheck then knows.
sanitize() {
    local tool status=0
    for tool in memcheck racecheck; do
        echo "-- $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 240 "$1" --tool "$tool" --error-exitcode 9 --print-limit 20 \
            "$PYTHON" -m bench.gpu.small_cases --widths 64 --dtypes bf16 fp32 || status=1
    done
    return $status
}

bench() {
    local size=$grid impls=()
    [[ $device == cpu ]] && size=smoke impls=(--bench-impls torch)
    # A peer that hangs is not waited for; rows.csv has what came before.
    timeout --signal=INT --kill-after=30 "$((seconds + 90))" "$PYTHON" -m pytest bench/gpu --bench-device "$device" --bench-grid "$size" --bench-seconds "$seconds" \
        --bench-csv "$out/rows.csv" --benchmark-json "$out/bench.json" --benchmark-columns=median,iqr,rounds \
        --bench-commit "$commit" -p no:cacheprovider ${impls[@]+"${impls[@]}"}
}

wanted build && step build no build
wanted versions && step versions no versions
if wanted tests; then
    if [[ $device == cuda ]]; then step tests yes gpu_tests; else step tests yes cpu_tests; fi
fi
if wanted sanitizer; then
    if [[ $device == cpu ]]; then
        step sanitizer yes "$PYTHON" -m bench.gpu.small_cases --device cpu --impl torch --widths 32 --dtypes fp32
    elif tool=$(find_sanitizer); then
        step sanitizer yes sanitize "$tool"
    else
        step sanitizer yes "$PYTHON" -m bench.gpu.small_cases
        summary+=("sanitizer: compute-sanitizer is not on this machine; the small cases ran without it")
    fi
fi
wanted bench && step bench yes bench

{
    [[ -s $out/rows.csv ]] && wanted bench && "$PYTHON" -m bench.gpu.record "$out/rows.csv"
    echo
    printf '%s\n' ${summary[@]+"${summary[@]}"}
} | tee "$out/table.txt"
exit $failed
