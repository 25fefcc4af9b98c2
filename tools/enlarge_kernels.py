"""Pads the large kernels of a trained network with zeros to larger ones, as a start for fine-tuning.

    python tools/enlarge_kernels.py -model=output/RUN -kernels=31,29,27,13 -output=output/enlarged
    python main_single_gpu.py -cfg=output/enlarged/config.yaml -pretrained=output/enlarged -data_path=...

The new network computes the same function: a zero tap contributes nothing. Its logits differ only by the rounding of
another summation order. Merged weights and weights in training form both work. Small kernels stay as they are.
"""
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import numpy as np  # noqa: E402

from atomic_file import atomic_file  # noqa: E402
from config import config_text, get_config  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from image_files.lists import CLASSES  # noqa: E402
from port_weights.load import load_weights  # noqa: E402
from replknet import build_replknet  # noqa: E402
from run_folder.checkpoint import model_arrays, save_checkpoint  # noqa: E402
from run_folder.layout import BEST, CONFIG  # noqa: E402
from zoo import class_names_file, pretrained_weights, require_settings_file  # noqa: E402

LARGE = re.compile(r'stages\.(\d+)\.blocks\.\d+\.large_kernel\.'
                   r'(?:large_kernel_origin\.conv|large_kernel_reparam)\.weight')


def enlarge(weights, sizes):
    """Pads the large kernels of each stage with zeros.

    Args:
        weights: {name: array} of a RepLKNet, merged or not.
        sizes: odd kernel size of each stage.
    Returns:
        {name: array}; all but the large kernels are the same arrays.
    Raises:
        UserError: a size is smaller than the kernel.
    """
    enlarged = dict(weights)
    for name, array in weights.items():
        found = LARGE.fullmatch(name)
        if found:
            stage, old = int(found[1]), array.shape[-1]
            margin, odd = divmod(sizes[stage] - old, 2)
            if margin < 0 or odd:
                raise UserError(f'-kernels: {sizes[stage]} for stage {stage}, whose kernel is {old}x{old}; give an odd '
                                f'size from {old} up')
            enlarged[name] = np.pad(array, [(0, 0), (0, 0), (margin, margin), (margin, margin)])
    return enlarged


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__)
    for flag, options in (
            ('model', {'required': True, 'help': 'zoo name, run folder or checkpoint'}),
            ('kernels', {'required': True, 'metavar': 'K,...', 'help': 'new size of each stage, or one for all'}),
            ('output', {'required': True, 'metavar': 'DIR', 'help': 'new folder'}),
            ('cfg', {'metavar': 'FILE', 'help': 'settings file (YAML), if there is none next to the weights'})):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)
    args = parser.parse_args(argv)
    try:
        args.kernels = [int(size) for size in args.kernels.split(',')]
    except ValueError:
        raise UserError(f'-kernels={args.kernels}: give whole numbers, separated by commas') from None
    if os.path.exists(args.output) and (not os.path.isdir(args.output) or os.listdir(args.output)):
        raise UserError(f'-output={args.output}: is not empty; name a new folder')
    return args


def main():
    args = read_arguments()
    cfg = require_settings_file(args.cfg, args.model)
    old = get_config(cfg)
    stages = len(old.MODEL.LAYERS)
    sizes = args.kernels * stages if len(args.kernels) == 1 else args.kernels
    if len(sizes) != stages:
        raise UserError(f'-kernels: {len(sizes)} sizes, but the model has {stages} stages')
    config = get_config(cfg, ['MODEL.LARGE_KERNEL_SIZES', sizes, 'MODEL.PRETRAINED', ''])
    weights, origin = pretrained_weights(args.model)
    merged = any('large_kernel_reparam' in name for name in weights)
    load_weights(build_replknet(old, merged), weights, origin)  # refuses weights of another model
    model = build_replknet(config, merged)
    load_weights(model, enlarge(weights, sizes), origin)
    os.makedirs(args.output, exist_ok=True)
    text = config_text(config)
    folder = args.model if os.path.isdir(args.model) else os.path.dirname(origin.split(' (')[0])
    old.MODEL.PRETRAINED = args.model  # names of ImageNet's classes belong to models of the zoo
    names = class_names_file(old, folder, args.cfg)
    if names:
        shutil.copyfile(names, os.path.join(args.output, CLASSES))
    with atomic_file(os.path.join(args.output, CONFIG)) as file:
        file.write(text.encode())
    save_checkpoint(os.path.join(args.output, BEST['model']), {
        'model': model_arrays(model), 'weights_key': 'model', 'epoch': 0, 'best': {}, 'config': text})
    print(f'{args.output}: large kernels {old.MODEL.LARGE_KERNEL_SIZES} -> {sizes}')
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
