#!/usr/bin/env bash
# What is still untested or unmeasured on a GPU, in one command under 10 minutes.
#
#   bash benchmarks/gpu_agenda.sh [OUT_DIR]      default: benchmarks/results
#
# First the GPU tests, then what the hardware gives, then the graphs back end against its bars on two
# true shapes, the mechanism track and the built-in model last. Needs CUDA, torch >= 2.11, transformers >= 5.17 and this package's other
# requirements, already installed: nothing is fetched. Writes OUT_DIR/gpu-tests.log and
# OUT_DIR/<date>-<device>*.json. A step that fails or takes too long does not stop the next one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "${1:-benchmarks/results}"
out="$(cd "${1:-benchmarks/results}" && pwd)"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
BENCH_COMMIT="$(git log -1 --format=%h 2>/dev/null || true)"
export BENCH_COMMIT

site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" .
export PYTHONPATH="$site"

# The clone's own adaptive_gen/ would hide the installed one, which has train and calibrate inside.
cp -r tests benchmarks "$site"
cd "$site"
status=0

timeout 120 python3 -m pytest tests -m gpu -q -o addopts= \
    -o markers="gpu: needs a CUDA device" -p no:cacheprovider --ignore=tests/test_repo.py \
    2>&1 | tee "$out/gpu-tests.log" || status=$?

suite() {  # SECONDS OPTIONS...
    timeout "$1" python3 -m benchmarks.suite --device cuda --out "$out" "${@:2}" || status=$?
}
suite 45 --track micro
for shape in Llama-3.2-1B Llama-2-13B; do
    suite 90 --track gpu --shape "$shape" --tokens 64 --rounds 3
done
suite 150 --track mechanism --shape Llama-3.2-1B --tokens 48 --rounds 2 --no-compile
suite 75 --track end_to_end --prompts 4 --tokens 32 --rounds 1 --no-compile

exit "$status"
