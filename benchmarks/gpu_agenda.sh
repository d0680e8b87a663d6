#!/usr/bin/env bash
# What is still untested or unmeasured on a GPU, in one command under 10 minutes.
#
#   bash benchmarks/gpu_agenda.sh [OUT_DIR]      default: benchmarks/results
#
# Needs CUDA, torch >= 2.11, transformers >= 5.17 and this package's other requirements, already
# installed: nothing is fetched. Writes OUT_DIR/gpu-tests.log and OUT_DIR/<device>-*.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-benchmarks/results}"
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" .
export PYTHONPATH="$site"

device="$(python3 -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')"
# The clone's own adaptive_gen/ would hide the installed one, which has train and calibrate inside.
cp -r tests "$site/tests"
status=0
(cd "$site" && timeout 240 python3 -m pytest tests -m gpu -q -o addopts= \
    -o markers="gpu: needs a CUDA device" -p no:cacheprovider) 2>&1 | tee "$out/gpu-tests.log" || status=$?


(cd "$site" && timeout 240 python3 -c "from adaptive_gen.cli import main; main()" bench --rounds 3 --json) \
    | tail -n 1 > "$out/$device-bench.json" || status=$?

exit "$status"
