"""Trains or evaluates RepLKNet with one process per device; on a machine without any, with -nprocs CPU processes.

    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -batch_size=64 -amp
    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -eval -pretrained=W.pdparams

Paddle's launcher starts the processes as well, on several machines too:

    python -m paddle.distributed.launch --nnodes 2 --master HOST:PORT main_multi_gpu.py -cfg=... -data_path=...
"""
import paddle_env  # noqa: F401, I001 - sets the environment, so before paddle

import os
import sys

from launcher import exit_status, read_settings, run_in_processes, run_in_this_process


def main():
    settings = read_settings(__doc__)
    if 'PADDLE_TRAINER_ID' in os.environ:  # Paddle's launcher has started this process
        run_in_this_process(*settings)
    else:
        sys.exit(run_in_processes(*settings))


if __name__ == '__main__':
    sys.exit(exit_status(main))
