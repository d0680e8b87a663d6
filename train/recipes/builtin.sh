#!/bin/sh
# The built-in model, from data to directory: about two and a half hours on two CPU cores.
#   sh train/recipes/builtin.sh DATA_DIR RUN_DIR [OUT_DIR]
# On a GPU: leave torchrun away (adaptive-train sft ...), and raise --micro-batch.
set -eu
data=$1 run=$2 out=${3:-adaptive_gen/builtin} recipes=$(dirname "$0")
# One process per core: faster than one process with two threads, above all when other work runs.
export OMP_NUM_THREADS=1
adaptive_train() { torchrun --nproc-per-node 2 -m adaptive_gen.train.cli "$@"; }

python "$recipes/builtin_data.py" --data-dir "$data" --out "$run/data"

adaptive_train sft --from-config "$recipes/builtin_config.json" --vocab-size 4096 \
  --data "$run/data/train.txt" --out "$run/base" --seq-len 256 --batch-size 16 --micro-batch 8 \
  --lr 2.5e-3 --warmup 0.05 --max-steps 1250 --chunk-size 8192 --save-steps 100 --compile

adaptive_train soft "$run/base" --exit-layers 3,6,9,12 --objective distil:0.6+full:2 \
  --data "$run/data/soft.txt" --out "$run/soft" --seq-len 512 --batch-size 8 --micro-batch 4 \
  --lr 1.5e-3 --warmup 0.04 --max-steps 750 --chunk-size 4096 --save-steps 75 --compile

adaptive_train soft "$run/soft" --exit-layers 3,6,9,12 --objective distil:0.6+full:2 \
  --data "$run/data/long.txt" --out "$run/long" --seq-len 512 --batch-size 8 --micro-batch 4 \
  --lr 1.2e-3 --min-lr 0.02 --warmup 0.03 --max-steps 1800 --chunk-size 4096 --save-steps 150 --compile

adaptive-train eval "$run/base" --data "$run/data/eval.txt" --exit-layers 3,6,9,12
adaptive-train eval "$run/long" --data "$run/data/eval.txt"
python "$recipes/builtin_publish.py" --model "$run/long" --out "$out"
