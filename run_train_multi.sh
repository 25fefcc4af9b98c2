#!/bin/sh
# Trains with one process per device. All arguments are passed to main_multi_gpu.py, after -resume=auto: running the same
# command again continues a run that was stopped, and starts a new one if that run is complete.
#   sh run_train_multi.sh -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -batch_size=64 -amp
# Without arguments it runs the demo: it prepares the environment and a dataset of handwritten digits, trains a small
# RepLKNet on them in two CPU processes, and prints the accuracy and the run folder.
set -e
root=$(cd "$(dirname "$0")" && pwd)
. "$root/setup_env.sh"
if [ $# -gt 0 ]; then
    exec "$PYTHON" "$root/main_multi_gpu.py" -resume=auto "$@"
fi
cd "$root"
"$PYTHON" tools/prepare_digits.py -output data/digits
exec "$PYTHON" main_multi_gpu.py -resume=auto -cfg=./configs/replknet_nano_digits.yaml -data_path=./data/digits -device=cpu -nprocs=2
