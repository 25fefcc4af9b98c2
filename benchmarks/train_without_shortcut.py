"""Trains a RepLKNet whose RepLKBlocks have no identity shortcut, for the ablation in docs/large_kernels.md.

    python benchmarks/train_without_shortcut.py -cfg=configs/replknet_nano_digits.yaml -data_path=data/digits \
        -opts MODEL.DROPPATH 0

The flags are those of main_single_gpu.py. The ConvFFNs keep their shortcuts. Drop path would drop all of an image.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import replknet  # noqa: E402
from errors import exit_status  # noqa: E402
from launcher import run_single  # noqa: E402


def without_shortcut(self, x):
    """`RepLKBlock.forward` without the sum: [N, channels, H, W] -> the same shape."""
    return self.pw_conv_2(self.large_kernel(self.pw_conv_1(x, self.pre_large_kernel_bn)))


if __name__ == '__main__':
    replknet.RepLKBlock.forward = without_shortcut
    sys.exit(exit_status(run_single, __doc__))
