"""Draws and measures effective receptive fields: which part of the input the centre of a feature map depends on.

    python erf.py -model=replknet_31b_1k_224 -images=ImageNet/val_list.txt -output=erf/31b
    python erf.py -model=output/RUN -compare output/OTHER configs/replknet_31b.yaml -images=photos -output=erf/compare
    python erf.py -model=output/RUN -stage=0-3 -images=photos -output=erf/stages
    python erf.py -model=output/RUN -checkpoints -images=photos -output=erf/training
    python erf.py -model=output/RUN -without_small_kernel -images=photos -output=erf/small_kernel

A model is a zoo name, a run folder (for its best checkpoint) or a file of weights; a settings file (.yaml) stands for
the untrained network. The output folder gets NAME.npy (the map, float32 [size, size]) and NAME.png for each map,
areas.csv, and erf.png with all maps side by side. NAME.sums.npz holds the sums over the images so far: after an
interruption, the same command continues. docs/erf.md explains the definition and common misreadings.
"""
from errors import default_interrupt

if __name__ == '__main__':
    default_interrupt()
import paddle_env  # noqa: I001 - sets the environment, so before paddle

import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from tqdm import tqdm

import utils
from atomic_file import atomic_file
from config import get_config
from deploy.layout import is_export
from deploy.predictor import model_settings
from errors import ArgumentParser, Interrupted, UserError, exit_status, one_line
from evaluation.figures import draw_receptive_fields, require_matplotlib
from evaluation.receptive_field import (
    THRESHOLDS,
    FieldSum,
    area_ratios,
    contributions,
    drop_small_kernels,
    log_scaled,
    stage_layers,
)
from fuse import fuse, is_merged
from image_files.decode import DataError, decode_image
from image_files.find import find_images
from image_files.generated import generated_image
from replknet import MIN_SIZE
from run_folder.layout import CONFIG, NUMBERED_GLOB
from transforms import eval_transform
from zoo import ZOO, build_model, pretrained_weights, require_path, resolve_weights

SYNTHETIC = 'synthetic'
PUBLISHED_SIZE = 1024
SAVE_SECONDS = 10  # between two saves of the sums


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__)

    def add(flag, **options):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)

    add('model', required=True, metavar='MODEL', help='zoo name, run folder, file of weights, or settings file (.yaml) '
        'for the untrained network')
    add('cfg', metavar='FILE', help='settings file of -model, if there is none next to the weights')
    add('compare', nargs='+', default=[], metavar='MODEL', help='further models, drawn side by side')
    add('checkpoints', action='store_true', help='-model is a run: draw all its numbered checkpoints (SAVE_FREQ)')
    add('without_small_kernel', action='store_true', help='also draw each model without its small kernels')
    add('stage', metavar='N', help='stages, such as 3, 0,2 or 0-3 (default: the last one)')
    add('images', nargs='+', default=[SYNTHETIC], metavar='FOLDER|LIST', help='images, folders and lists (.txt), or '
        f'{SYNTHETIC} (default): random colours with the spectrum of photographs')
    add('num_images', type=int, default=50, metavar='N', help='number of images, evenly spaced (default %(default)s)')
    add('size', type=int, default=PUBLISHED_SIZE, metavar='PIXELS', help='images are resized to this square (default '
        '%(default)s, as for published figures)')
    add('output', default='output/erf', metavar='DIR', help='folder to write (default %(default)s)')
    add('device', default='auto', help='auto, gpu, cpu, npu or xpu')
    args = parser.parse_args(argv)
    if args.stage is not None:
        args.stage = _stages(args.stage)
    if args.size < MIN_SIZE:
        raise UserError(f'-size={args.size}: must be at least {MIN_SIZE} pixels')
    if args.num_images < 1:
        raise UserError(f'-num_images={args.num_images}: must be at least 1')
    return args


def _stages(text):
    stages = []
    for part in text.split(','):
        if not re.fullmatch(r'\d{1,3}(-\d{1,3})?', part):
            raise UserError(f'-stage={text}: name stages by their numbers from 0, such as 3, 0,2 or 0-3')
        first, last = (part.split('-') * 2)[:2]
        stages += range(int(first), int(last) + 1)
    if not stages:
        raise UserError(f'-stage={text}: the range is empty')
    return sorted(set(stages))


# ---- the models

@dataclass
class Source:
    """A model to draw: its name, its settings, and whether it keeps its random weights."""
    label: str
    config: Any
    untrained: bool = False

    def load(self):
        """The network, in eval mode."""
        if self.untrained:
            paddle.seed(self.config.SEED)
            network = build_model(self.config)
        else:
            network = build_model(self.config, *pretrained_weights(self.config.MODEL.PRETRAINED))
        network.eval()
        return network


def find_sources(args):
    """The models of the command line, in order, with different labels.

    Raises:
        UserError, FileNotFoundError: one of them cannot be used.
    """
    models = [(args.model, args.cfg)]
    if args.checkpoints:
        found = sorted(glob.glob(os.path.join(glob.escape(args.model), NUMBERED_GLOB)))
        if not found:
            raise UserError(f'-checkpoints: {args.model} is not a run folder with numbered checkpoints, '
                            'epoch_*.pdparams; train with -opts SAVE_FREQ 1 to keep one of each epoch')
        models = [(path, args.cfg) for path in found]
    sources, taken = [], set()
    for model, cfg in [*models, *((model, None) for model in args.compare)]:
        source = _source(model, cfg)
        stages = len(source.config.MODEL.LAYERS)
        if args.without_small_kernel and not source.config.MODEL.SMALL_KERNEL:
            raise UserError(f'-without_small_kernel: {model} has no small kernels (MODEL.SMALL_KERNEL)')
        if args.stage and args.stage[-1] >= stages:
            raise UserError(f'-stage: {model} has the stages 0 to {stages - 1}, not {args.stage[-1]}')
        label, number = source.label, 1
        while source.label in taken:
            number += 1
            source.label = f'{label}_{number}'
        taken.add(source.label)
        sources.append(source)
    return sources


def _source(model, cfg):
    name = os.path.basename(os.path.abspath(model))
    if model.lower().endswith(('.yaml', '.yml')):
        require_path(model, 'no such file, and not')
        return Source(f'{os.path.splitext(name)[0]}-untrained', get_config(model), untrained=True)
    if is_export(model):
        raise UserError(f'{model}: is an exported program, which computes no gradients; name its weights instead')
    config = model_settings(model, cfg)
    resolve_weights(config.MODEL.PRETRAINED)
    if model in ZOO or os.path.isdir(model):
        return Source(name, config)
    folder = os.path.dirname(os.path.abspath(model))
    prefix = f'{os.path.basename(folder)}-' if os.path.isfile(os.path.join(folder, CONFIG)) else ''
    return Source(prefix + os.path.splitext(name)[0], config)


def networks(source, without_small_kernel):
    """Yields (whether it has its small kernels, the network without batch norms) of a model."""
    network = source.load()
    if without_small_kernel and is_merged(network):
        raise UserError(f'-without_small_kernel: the small kernels of {source.config.MODEL.PRETRAINED} are merged into '
                        'the large ones; name weights in the training form')
    fused = fuse(network)
    network = network if without_small_kernel else None  # its memory is needed
    yield True, fused
    if without_small_kernel:
        del fused
        drop_small_kernels(network)
        yield False, fuse(network)


# ---- the images

class Images:
    """The images of the command line; `decode(i)` is an RGB image, `names` has their paths."""

    def __init__(self, sources, count, size):
        self._size = size
        if sources == [SYNTHETIC]:
            self.names = [f'{SYNTHETIC} {index}' for index in range(count)]
        else:
            paths, _ = find_images(sources)
            self.names = [paths[i] for i in np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int)]
        self._synthetic = sources == [SYNTHETIC]

    def decode(self, index, exif):
        if self._synthetic:
            return generated_image(np.random.default_rng(index), self._size, self._size)
        return decode_image(self.names[index], exif)


# ---- the maps

class Field:
    """The map of one stage of one network, and its files in the output folder.

    Args:
        folder: the output folder.
        source, stage, small_kernel: what the map is of; `small_kernel` says whether the small kernels are present.
        args: arguments of the command line.
        images: `Images`.
    """

    def __init__(self, folder, source, stage, small_kernel, args, images):
        kernels = '' if small_kernel else '-no_small_kernel'
        self.name = f'{source.label}-stage{stage}{kernels}'
        self.title = f'{source.label}\nstage {stage}' + ('' if small_kernel else ', no small kernels')
        self.source, self.stage, self.small_kernel = source, stage, small_kernel
        self.size, self.state, self._images = args.size, FieldSum(), images
        self._root = os.path.join(folder, self.name)
        data = source.config.DATA
        self._transform = eval_transform(args.size, protocol='warp', interpolation=data.INTERPOLATION,
                                         mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD)

    def compute(self, network, weights):
        """Adds the images that are missing, then writes the map.

        Args:
            network: in eval mode.
            weights: digest of its weights.
        """
        data, count = self.source.config.DATA, len(self._images.names)
        identity = json.dumps({
            'weights': weights, 'stage': self.stage, 'size': self.size, 'exif': data.EXIF, 'images': hashlib.sha256(
                '\n'.join(self._images.names).encode('utf-8', 'surrogateescape')).hexdigest(),
            'mean': list(data.IMAGENET_MEAN), 'std': list(data.IMAGENET_STD), 'interpolation': data.INTERPOLATION})
        self.state = self._read(identity)
        layers, saved = stage_layers(network, self.stage), time.monotonic()
        try:
            with tqdm(total=count, initial=self.state.done, desc=self.name, unit='image',
                      disable=not os.isatty(2)) as progress:
                while self.state.done < count:
                    self.state = self._add(self.state, layers)
                    progress.update()
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save(identity)
                        saved = time.monotonic()
        except BaseException:  # what has been computed remains useful
            self._save(identity)
            raise
        self._save(identity)
        self.field = self._mean()
        with atomic_file(f'{self._root}.npy') as file:
            np.save(file, self.field)
        with atomic_file(f'{self._root}.png') as file:
            draw_receptive_fields([(self.title, self.field)], file)

    def _add(self, state, layers):
        name = self._images.names[state.done]
        try:
            image = self._images.decode(state.done, self.source.config.DATA.EXIF)
        except DataError as error:
            return state.leave_out(one_line(error))
        return state.add(contributions(layers, self._transform(image)), name)

    def _mean(self):
        try:
            field = self.state.mean()
        except UserError as error:
            raise UserError(f'{self.name}: {error}') from None
        if not field.any():
            print(f'{self.name}: the map is 0 everywhere: no output at the centre is positive, or depends on the input',
                  file=sys.stderr)
        return field

    def _save(self, identity):
        if self.state.done:
            with atomic_file(f'{self._root}.sums.npz') as file:
                np.savez(file, total=self.state.total, done=self.state.done, identity=identity,
                         left_out=np.array(self.state.left_out, dtype=str))

    def _read(self, identity):
        path = f'{self._root}.sums.npz'
        if not os.path.lexists(path):
            return FieldSum()
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file['identity']) == identity:
                    return FieldSum(file['total'], int(file['done']), tuple(map(str, file['left_out'])))
        except Exception as error:  # NumPy and zipfile raise many types for damaged files
            raise UserError(f'{path}: cannot be read: {one_line(error)}; delete it') from None
        raise UserError(f'{path}: belongs to other weights, images or sizes; delete it, or name another -output')

    def areas(self):
        """Yields (name of the scale, areas) of the log-scaled map and of the map itself."""
        yield 'log', area_ratios(log_scaled(self.field))
        yield 'raw', area_ratios(self.field)


def digest(network):
    """SHA-256 of the names and values of a network's weights."""
    sha256 = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        sha256.update(name.encode() + b'\0')
        sha256.update(np.ascontiguousarray(tensor.numpy()))
    return sha256.hexdigest()


def write_areas(path, fields):
    """Writes the areas of the maps as CSV: a row for each map, scale and threshold."""
    text = io.StringIO(newline='')
    rows = csv.writer(text, lineterminator='\n')
    rows.writerow(['map', 'weights', 'stage', 'small_kernel', 'size', 'images', 'left_out', 'scale', 'threshold',
                   'side', 'area_ratio'])
    for field in fields:
        config, state = field.source.config, field.state
        for scale, areas in field.areas():
            for threshold, area in areas.items():
                rows.writerow([field.name, '' if field.source.untrained else config.MODEL.PRETRAINED, field.stage,
                               int(field.small_kernel and bool(config.MODEL.SMALL_KERNEL)), field.size,
                               state.done - len(state.left_out), len(state.left_out), scale, threshold, area.side,
                               f'{area.ratio:.6f}'])
    with atomic_file(path) as file:
        file.write(text.getvalue().encode('utf-8', 'surrogateescape'))


def table(fields):
    """The area ratios as lines of text."""
    width = max(len(field.name) for field in fields)
    lines = [f'{"area with this share of the sum":{width}}  scale' + ''.join(f'{t:9.0%}' for t in THRESHOLDS)]
    lines += [f'{field.name:{width}}  {scale:5}' + ''.join(f'{100 * area.ratio:7.1f} %' for area in areas.values())
              for field in fields for scale, areas in field.areas()]
    return '\n'.join(lines)


def main():
    args = read_arguments()
    utils.setup_logging(verbose=False)
    require_matplotlib()
    sources, images = find_sources(args), Images(args.images, args.num_images, args.size)
    device = utils.resolve_device(args.device)
    paddle.set_device(device)
    if device == 'cpu':
        paddle_env.set_threads()
    if args.size < PUBLISHED_SIZE:
        print(f'-size={args.size}: the field may be cut off at the border; published figures are for {PUBLISHED_SIZE} '
              'pixels', file=sys.stderr)
    if os.path.lexists(args.output) and not os.path.isdir(args.output):
        raise UserError(f'-output={args.output}: is a file; name a folder')
    os.makedirs(args.output, exist_ok=True)
    fields = []
    try:
        for source in sources:
            for small_kernel, network in networks(source, args.without_small_kernel):
                weights = digest(network)
                for stage in args.stage or [len(source.config.MODEL.LAYERS) - 1]:
                    field = Field(args.output, source, stage, small_kernel, args, images)
                    field.compute(network, weights)
                    fields.append(field)
                    write_areas(os.path.join(args.output, 'areas.csv'), fields)
    except Interrupted as error:
        raise Interrupted(error.signal, f'{error}: {args.output} keeps the sums so far; the same command continues'
                          ) from None
    with atomic_file(os.path.join(args.output, 'erf.png')) as file:
        draw_receptive_fields([(field.title, field.field) for field in fields], file)
    print(table(fields))
    print(f'\nmaps, areas.csv and erf.png are in {args.output}')
    left_out = [f'{field.name}: left out: {reason}' for field in fields for reason in field.state.left_out]
    for line in left_out:
        print(line, file=sys.stderr)
    return 1 if left_out else 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
