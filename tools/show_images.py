"""Draws what a model sees: the first training images of a run, augmented and mixed, and crops for evaluation.

    python tools/show_images.py -cfg=./configs/replknet_31b.yaml -data_path=data/photos -output=sheets

writes sheets/train.png and sheets/val.png. The training images are those of the first batch of a run in one process,
with its random draws; below each one are its labels and their weights. The evaluation crops are evenly spaced in the
validation list.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import numpy as np  # noqa: E402
import paddle  # noqa: E402
from PIL import Image  # noqa: E402

import utils  # noqa: E402
from atomic_file import atomic_file  # noqa: E402
from config import get_config  # noqa: E402
from datasets import get_dataloader, get_dataset  # noqa: E402
from deploy.contact_sheets import COLUMNS, ROWS, UNKNOWN, draw_sheet  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from training.data import read_class_names_of  # noqa: E402
from training.setup import build_mixup  # noqa: E402

COUNT = COLUMNS * ROWS  # images on a sheet


def to_image(pixels, config):
    """The RGB image of a normalised array [3, H, W]; values beyond the range, from random erasing, are clipped."""
    mean, std = (np.array(values)[:, None, None] for values in (config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD))
    levels = np.rint((pixels * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels.transpose(1, 2, 0))


def train_tiles(config, names, epoch):
    """Tiles for `draw_sheet` of the first batch of an epoch."""
    dataset = get_dataset(config, 'train')
    loader = get_dataloader(config, dataset, 'train')
    loader.set_epoch(epoch)
    paths = [dataset.path(key[1]) for key in next(iter(loader.batch_sampler))]
    images, labels = next(iter(loader))
    mixup = build_mixup(config)
    weights = labels.numpy() if labels.ndim == 2 else np.eye(config.MODEL.NUM_CLASSES)[labels.numpy()]
    if mixup is not None:
        mixup.label_smoothing = 0.0  # so that the weights are the shares of the images
        images, weights = mixup(images, labels, utils.random_generator(config.SEED, utils.STREAM_MIXUP, epoch, 0, 0))
        weights = weights.numpy()
    tiles = []
    for index in range(min(len(images), COUNT)):  # with TRAIN.AUG_SPLITS, first all images, then their other views
        number = index % len(paths)
        shown = [f'{names[label]} {weights[number, label]:.0%}' if mixup is not None else names[label]
                 for label in np.argsort(-weights[number], kind='stable') if weights[number, label] > 0]
        shown = [', '.join(shown) or 'no label'] if config.DATA.MULTI_LABEL else shown[:2]
        tiles.append((to_image(images[index].numpy(), config), [os.path.basename(paths[number]), *shown], UNKNOWN))
    return tiles


def val_tiles(config, names):
    """Tiles of evaluation crops."""
    dataset = get_dataset(config, 'val')
    chosen = np.linspace(0, len(dataset) - 1, min(COUNT, len(dataset))).astype(int).tolist()
    samples = ((index, *dataset[index]) for index in chosen)
    return [(to_image(pixels, config), [os.path.basename(dataset.path(index)), _named(label, names)], UNKNOWN)
            for index, pixels, label in samples]


def _named(label, names):
    """The name of a label, or of all labels [K] of an image."""
    return names[label] if label.ndim == 0 else ', '.join(names[k] for k in np.flatnonzero(label)) or 'no label'


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__)
    for flag, text in (('cfg', 'settings file of the run (YAML)'), ('data_path', 'data folder (DATA.DATA_PATH)'),
                       ('dataset', 'kind of data folder (DATA.DATASET)')):
        parser.add_argument(f'-{flag}', f'--{flag}', help=text, required=flag == 'cfg')
    parser.add_argument('-batch_size', '--batch_size', type=int, help='images per process (DATA.BATCH_SIZE)')
    parser.add_argument('-epoch', '--epoch', type=int, default=1, help='epoch to show, from 1 (default: 1)')
    parser.add_argument('-output', '--output', default='.', help='folder for train.png and val.png (default: .)')
    parser.add_argument('-opts', '--opts', nargs='+', default=[], metavar='KEY VALUE', help='any key of config.py')
    args = parser.parse_args(argv)
    if args.epoch < 1:
        raise UserError(f'-epoch={args.epoch}: must be at least 1')
    flags = {flag: getattr(args, flag) for flag in ('data_path', 'dataset', 'batch_size')}
    config = get_config(args.cfg, [*args.opts, 'DATA.NUM_WORKERS', 0], flags)
    if not config.DATA.DATA_PATH:
        raise UserError('-data_path is missing: name the data folder')
    return config, args


def main():
    config, args = read_arguments()
    paddle.set_device('cpu')
    names = read_class_names_of(config) or [f'class {label}' for label in range(config.MODEL.NUM_CLASSES)]
    sheets = {'train': train_tiles(config, names, args.epoch), 'val': val_tiles(config, names)}
    os.makedirs(args.output, exist_ok=True)
    for mode, tiles in sheets.items():
        path = os.path.join(args.output, f'{mode}.png')
        with atomic_file(path) as file:
            draw_sheet(tiles).save(file, 'PNG')
        print(path)


if __name__ == '__main__':
    sys.exit(exit_status(main))
