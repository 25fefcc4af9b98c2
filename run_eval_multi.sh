#!/bin/sh
# Evaluates with one process per device. All arguments are passed to main_multi_gpu.py, with -eval:
#   sh run_eval_multi.sh -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -pretrained=replknet_31b_1k_224
# Without arguments it evaluates the best checkpoint of the newest demo run of run_train_multi.sh.
set -e
root=$(cd "$(dirname "$0")" && pwd)
. "$root/setup_env.sh"
if [ $# -gt 0 ]; then
    exec "$PYTHON" "$root/main_multi_gpu.py" -eval "$@"
fi
cd "$root"
best=$(ls -t output/replknet_nano_digits-*/best.pdparams 2>/dev/null | head -n 1)
if [ -z "$best" ]; then
    echo "run_eval_multi.sh: no demo run in $root/output yet; run sh run_train_multi.sh first" >&2
    exit 2
fi
echo "evaluating $best"
exec "$PYTHON" main_multi_gpu.py -eval -pretrained="$best" -device=cpu -nprocs=2
