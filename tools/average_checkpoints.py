"""Averages the weights of several checkpoints of a run, and estimates the statistics of its batch norms anew.

    python tools/average_checkpoints.py output/RUN/epoch_00{26,28,30}.pdparams -output=output/RUN/average.pdparams
    python main_single_gpu.py -eval -pretrained=output/RUN/average.pdparams

Keep checkpoints of several epochs for it with SAVE_LATEST_K or SAVE_FREQ. Averages of running statistics are not those
of the averaged weights, so these are computed from training images, without drop path.
"""
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import paddle_env  # noqa: E402, I001 - sets the environment, so before paddle

import numpy as np  # noqa: E402
import paddle  # noqa: E402
from tqdm import tqdm  # noqa: E402

import utils  # noqa: E402
from config import config_text, get_config  # noqa: E402
from datasets import get_dataloader, get_dataset  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from port_weights.safe_load import find_weights, read_checkpoint  # noqa: E402
from replknet import NORMS  # noqa: E402
from run_folder.checkpoint import model_arrays, save_checkpoint  # noqa: E402
from zoo import build_model, require_settings_file  # noqa: E402


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('checkpoints', nargs='+', metavar='FILE', help='checkpoint of a run')
    for flag, options in (
            ('output', {'required': True, 'metavar': 'FILE', 'help': 'checkpoint to write (.pdparams)'}),
            ('key', {'choices': ('auto', 'model', 'model_ema'), 'default': 'auto',
                     'help': 'the weights in the checkpoints to average; auto: those that evaluations use'}),
            ('images', {'type': int, 'default': 2000, 'help': 'training images for the statistics (%(default)s)'}),
            ('cfg', {'metavar': 'FILE', 'help': 'settings file (YAML), if there is none next to the first checkpoint'}),
            ('data_path', {'metavar': 'DIR', 'help': 'data folder (DATA.DATA_PATH)'}),
            ('device', {'default': 'auto', 'help': 'auto, gpu, cpu, npu or xpu'})):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)
    args = parser.parse_args(argv)
    if len(args.checkpoints) < 2:
        raise UserError('name at least two checkpoints to average')
    if args.images < 1:
        raise UserError(f'-images={args.images}: must be at least 1')
    if os.path.exists(args.output):
        raise UserError(f'-output={args.output}: exists; name a new file')
    if not os.path.isdir(os.path.dirname(args.output) or '.'):
        raise UserError(f'-output={args.output}: there is no folder {os.path.dirname(args.output)}')
    return args


def average(files, key='auto'):
    """The mean of the weights in several files, {name: array}; integers are those of the first file.

    Raises:
        UserError, FileNotFoundError: a file cannot be read, or does not fit the first.
    """
    total = None
    for file in files:
        weights, _ = find_weights(read_checkpoint(file), key, file)
        if total is None:
            total = {name: array.astype(np.float64) if array.dtype.kind == 'f' else array
                     for name, array in weights.items()}
            continue
        different = [name for name in {*total, *weights}
                     if name not in total or name not in weights or total[name].shape != weights[name].shape]
        if different:
            raise UserError(f'{file}: is not of the same model as {files[0]}: {min(different)} differs')
        for name, array in weights.items():
            if array.dtype.kind == 'f':
                total[name] += array
    return {name: (array / len(files)).astype(np.float32) if array.dtype == np.float64 else array
            for name, array in total.items()}


@paddle.no_grad()
def estimate_statistics(model, loader, batches):
    """Sets the running statistics of a model to the mean over `batches` batches, with its drop path rates at 0."""
    norms = [layer for layer in model.sublayers() if isinstance(layer, NORMS)]
    momenta = [norm._momentum for norm in norms]
    model.train()
    for index, (images, _) in enumerate(tqdm(loader, 'statistics', total=batches, unit='batch',
                                             disable=not os.isatty(2))):
        for norm in norms:
            norm._momentum = index / (index + 1)  # running = momentum * running + (1 - momentum) * batch
        model(images)
        if index + 1 == batches:
            break
    model.eval()
    for norm, momentum in zip(norms, momenta):
        norm._momentum = momentum


def main():
    args = read_arguments()
    weights = average(args.checkpoints, args.key)
    config = get_config(require_settings_file(args.cfg, args.checkpoints[0]), (), {'data_path': args.data_path})
    device = utils.resolve_device(args.device)
    paddle.set_device(device)
    if device == 'cpu':
        paddle_env.set_threads()
    saved = config_text(config)
    config.MODEL.DROPPATH = 0.0
    model = build_model(config, weights, f'the average of {len(args.checkpoints)} checkpoints')
    loader = get_dataloader(config, get_dataset(config, 'train'), 'train')
    loader.set_epoch(0)
    batches = min(len(loader), math.ceil(args.images / config.DATA.BATCH_SIZE))
    estimate_statistics(model, loader, batches)
    save_checkpoint(args.output, {'model': model_arrays(model), 'weights_key': 'model', 'epoch': 0, 'best': {},
                                  'config': saved})
    print(f'{args.output}: average of {len(args.checkpoints)} checkpoints, statistics from '
          f'{batches * config.DATA.BATCH_SIZE} training images')
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
