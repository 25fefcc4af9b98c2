"""Trains a RepLKNet whose large-kernel blocks have no shortcut, for the ablation in docs/large_kernels_guidelines.md.

    python tools/train_without_shortcuts.py -cfg=configs/replknet_nano_digits.yaml -data_path=data/digits

The flags are those of main_single_gpu.py. The weights fit the ordinary model, but compute something else in it: only
the metrics of such a run are of use. Drop path, which would drop a whole map here, does not apply to these blocks.
"""
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

from training.signals import stop  # noqa: E402


def without_shortcut(block, x):
    """The branch of a `RepLKBlock` alone: [N, channels, H, W] -> the same shape."""
    return block.pw_conv_2(block.large_kernel(block.pw_conv_1(x, block.pre_large_kernel_bn)))


if __name__ == '__main__':
    stop.listen(signal.SIGTERM, signal.SIGINT)  # before the imports that take long and start threads
    from errors import exit_status
    from launcher import run_single
    from replknet import RepLKBlock
    RepLKBlock.forward = without_shortcut
    sys.exit(exit_status(run_single, __doc__))
