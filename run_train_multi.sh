#!/bin/sh
# Trains with one process per device. All arguments go to main_multi_gpu.py, after -resume=auto: the same command again
# continues a run that was stopped, and begins another one when that is over.
#   sh run_train_multi.sh -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -batch_size=64 -amp
# Without arguments: the demo. Prepares the environment and a dataset of handwritten digits, trains a small RepLKNet on
# it in two CPU processes and prints its accuracy and where the run lies.
set -e
root=$(cd "$(dirname "$0")" && pwd)
. "$root/setup_env.sh"
if [ $# -gt 0 ]; then
    exec "$PYTHON" "$root/main_multi_gpu.py" -resume=auto "$@"
fi
cd "$root"
"$PYTHON" tools/prepare_digits.py -output data/digits
exec "$PYTHON" main_multi_gpu.py -resume=auto -cfg=./configs/replknet_nano_digits.yaml -data_path=./data/digits -device=cpu -nprocs=2
