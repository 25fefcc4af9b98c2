"""Trains or evaluates RepLKNet with one process per device, or with -nprocs processes on the CPU.

    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -batch_size=64 -amp
    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -eval -pretrained=W.pdparams

Paddle's launcher can start the processes instead, also on several machines:

    python -m paddle.distributed.launch --nnodes 2 --rank 0 --master IP:PORT main_multi_gpu.py -cfg=...
"""
import paddle_env  # noqa: I001 - sets the environment, so before paddle

import signal

from training.signals import end_with_parent, stop

if __name__ == '__main__':
    if paddle_env.paddle_launcher():
        end_with_parent(paddle_env.paddle_launcher())
    stop.listen(signal.SIGTERM, signal.SIGINT)  # before the imports that take long and start threads
    from errors import exit_status
    from launcher import end_process, run_multi
    end_process(exit_status(run_multi, __doc__))
