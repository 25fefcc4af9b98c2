"""Pads the large kernels of a trained network with zeros to larger ones, as a start for fine-tuning.

    python tools/enlarge_kernels.py -pretrained=output/RUN -kernels=31,29,27,13 -output=output/enlarged
    python main_single_gpu.py -cfg=output/enlarged/config.yaml -pretrained=output/enlarged -data_path=photos

The enlarged network computes the same function, up to the rounding of float32, which is measured and printed. The new
outer weights are zero, but have gradients like all others. The output folder has the files of a run folder: it can
be evaluated, exported and fine-tuned.
"""
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import paddle_env  # noqa: E402, I001 - sets the environment, so before paddle

import numpy as np  # noqa: E402
import paddle  # noqa: E402

import utils  # noqa: E402
from atomic_file import atomic_file, refuse_taken  # noqa: E402
from config import config_text, get_config  # noqa: E402
from deploy.equivalence import Difference  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from image_files.lists import CLASSES  # noqa: E402
from run_folder.checkpoint import model_arrays, save_checkpoint  # noqa: E402
from run_folder.layout import BEST, CONFIG  # noqa: E402
from zoo import build_model, class_names_file, pretrained_weights, require_settings_file  # noqa: E402

TOLERANCE = 1e-4  # of the largest logit: other kernels sum in another order
IMAGES = 2  # random images that both networks classify


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    for flag, options in (
            ('pretrained', {'required': True, 'metavar': 'X', 'help': 'weights: a zoo name, a file, or a run folder'}),
            ('cfg', {'metavar': 'FILE', 'help': 'settings file (YAML), if there is none next to the weights'}),
            ('kernels', {'required': True, 'metavar': 'K,K,...', 'help': 'new large kernel of each stage, odd'}),
            ('output', {'required': True, 'metavar': 'DIR', 'help': 'new folder'}),
            ('device', {'default': 'auto', 'help': 'auto, gpu, cpu, npu or xpu'})):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)
    args = parser.parse_args(argv)
    if not re.fullmatch(r'\d+(,\d+)*', args.kernels):
        raise UserError(f'-kernels={args.kernels}: give the kernel of each stage, separated by commas, such as '
                        '31,29,27,13')
    args.kernels = [int(size) for size in args.kernels.split(',')]
    refuse_taken(args.output, 'output')
    return args


def larger_settings(path, kernels, flags):
    """The settings in the file `path` with other large kernels.

    Raises:
        UserError: a kernel is even, too large or smaller than now, or there is not one for each stage.
    """
    old = get_config(path, (), flags).MODEL.LARGE_KERNEL_SIZES
    given = f"-kernels={','.join(map(str, kernels))}"
    if len(kernels) != len(old):
        raise UserError(f'{given}: the model has {len(old)} stages, with the kernels {old}; give as many')
    smaller = [f'{new} for stage {stage}' for stage, (new, size) in enumerate(zip(kernels, old)) if new < size]
    if smaller:
        raise UserError(f"{given}: {', '.join(smaller)} is smaller than now ({old}); a kernel can only be enlarged")
    if kernels == old:
        raise UserError(f'{given}: these are the kernels of the model; give larger ones')
    try:
        return get_config(path, ('MODEL.LARGE_KERNEL_SIZES', kernels), flags)
    except UserError as error:
        raise UserError(str(error).replace('-opts: MODEL.LARGE_KERNEL_SIZES', f'{given}:')) from None


def enlarge_kernels(weights, kernels):
    """Pads the large kernels of every stage with zeros on all sides.

    Args:
        weights: {name: array} of a RepLKNet, in training form or merged.
        kernels: new size of each stage, odd and not smaller than the current one.
    Returns:
        {name: array}; only the large kernels, [C, 1, K, K], are new arrays.
    """
    def enlarged(name, array):
        found = re.fullmatch(r'stages\.(\d+)\..*\.(large_kernel_origin\.conv|large_kernel_reparam)\.weight', name)
        if not found:
            return array
        margin = (kernels[int(found[1])] - array.shape[-1]) // 2
        return np.pad(array, [(0, 0), (0, 0), (margin, margin), (margin, margin)])

    return {name: enlarged(name, array) for name, array in weights.items()}


@paddle.no_grad()
def compare(model, enlarged, size):
    """`Difference` of the logits that two models compute for random images of `size` x `size` pixels."""
    images = np.random.default_rng(0).standard_normal((IMAGES, model.in_channels, size, size)).astype('float32')
    difference = Difference()
    for network in (model, enlarged):
        network.eval()
    difference.add(*(network(paddle.to_tensor(images)).numpy() for network in (model, enlarged)))
    return difference


def main():
    args = read_arguments()
    path = require_settings_file(args.cfg, args.pretrained)
    flags = {'eval': True, 'pretrained': args.pretrained}
    config = larger_settings(path, args.kernels, flags)
    device = utils.resolve_device(args.device)
    paddle.set_device(device)
    if device == 'cpu':
        paddle_env.set_threads()
    weights, origin = pretrained_weights(args.pretrained)
    model = build_model(get_config(path, (), flags), weights, origin)
    enlarged = build_model(config, enlarge_kernels(weights, args.kernels), origin)
    difference = compare(model, enlarged, config.DATA.IMAGE_SIZE)
    if not difference.relative <= TOLERANCE:
        raise UserError(f'{origin}: the enlarged network computes other logits: they differ by '
                        f'{difference.relative:.1e} of the largest; nothing is written')
    folder = args.pretrained if os.path.isdir(args.pretrained) else os.path.dirname(args.pretrained)
    names = class_names_file(config, folder, args.cfg)
    config.MODEL.PRETRAINED = ''
    text = config_text(config)
    os.makedirs(args.output, exist_ok=True)
    save_checkpoint(os.path.join(args.output, BEST['model']), {
        'model': model_arrays(enlarged), 'weights_key': 'model', 'epoch': 0, 'config': text, 'best': {}})
    if names:
        shutil.copyfile(names, os.path.join(args.output, CLASSES))
    with atomic_file(os.path.join(args.output, CONFIG)) as file:
        file.write(text.encode())
    print(f'{args.output}: {enlarged.num_parameters():,} parameters instead of {model.num_parameters():,}; the logits '
          f'of {IMAGES} random images differ by at most {difference.relative:.1e} of the largest')
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
