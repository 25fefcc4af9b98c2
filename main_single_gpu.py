"""Trains or evaluates RepLKNet in this process, on one device.

    python main_single_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -batch_size=64 -amp
    python main_single_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -eval -pretrained=W.pdparams
"""
import paddle_env  # noqa: F401, I001 - sets the environment, so before paddle

import sys

from launcher import exit_status, read_settings, run_in_this_process


def main():
    run_in_this_process(*read_settings(__doc__))


if __name__ == '__main__':
    sys.exit(exit_status(main))
