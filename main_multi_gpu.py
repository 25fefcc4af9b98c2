"""Trains or evaluates RepLKNet with one process per device; on a machine without any, with -nprocs CPU processes.

    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -batch_size=64 -amp
    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -eval -pretrained=W.pdparams

Paddle's launcher starts the processes as well, on several machines too:

    python -m paddle.distributed.launch --nnodes 2 --master HOST:PORT main_multi_gpu.py -cfg=... -data_path=...
"""
import paddle_env  # noqa: F401, I001 - sets the environment, so before paddle

import signal
import sys

from training.signals import stop

if __name__ == '__main__':
    stop.listen(signal.SIGTERM, signal.SIGINT)  # before what takes a while to import and starts threads
    from errors import exit_status
    from launcher import run_multi
    sys.exit(exit_status(run_multi, __doc__))
