"""Trains or evaluates RepLKNet in this process, on one device.

    python main_single_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -batch_size=64 -amp
    python main_single_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -eval -pretrained=W.pdparams
"""
import paddle_env  # noqa: F401, I001 - sets the environment, so before paddle

import signal

from training.signals import stop

if __name__ == '__main__':
    stop.listen(signal.SIGTERM, signal.SIGINT)  # before the imports that take long and start threads
    from errors import exit_status
    from launcher import end_process, run_single
    end_process(exit_status(run_single, __doc__))
