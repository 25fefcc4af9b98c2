"""Trains variants of a network with other kernels, without shortcuts or without re-parameterisation, and compares them.

    python benchmarks/ablation.py -cfg=configs/replknet_nano_digits.yaml -data_path=data/digits \
        -output=output/ablation -opts TRAIN.NUM_EPOCHS 3

The networks have two stages of two blocks, so that a run takes half a minute of one core. Every variant is trained
with the seeds 1, 2, ... The command of each run is printed, and can also be run by itself; runs
that have finished are not repeated. The output folder gets the runs, table.md, curves.png (top-1 accuracy after each
epoch) and erf.png (effective receptive fields of the last stage: log-scaled above, the maps themselves below, means
over the seeds). Accuracies are those of the last epoch's weights, not of the best epoch. Requires matplotlib.
"""
import argparse
import io
import os
import shlex
import statistics
import subprocess
import sys
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import replknet  # noqa: E402
from atomic_file import atomic_file  # noqa: E402
from config import get_config  # noqa: E402
from deploy.predictor import load_model  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from evaluation.figures import draw_receptive_fields, require_matplotlib  # noqa: E402
from evaluation.receptive_field import area_ratios, log_scaled, receptive_field, stage_layers  # noqa: E402
from image_files.decode import decode_image  # noqa: E402
from image_files.find import find_images  # noqa: E402
from run_folder.layout import LAST, METRICS  # noqa: E402
from run_folder.metrics import read_metrics  # noqa: E402
from train_without_shortcut import without_shortcut  # noqa: E402
from transforms import eval_transform  # noqa: E402


class Variant(NamedTuple):
    title: str
    folder: str
    kernel: int
    small_kernel: int
    shortcut: bool = True


VARIANTS = (
    Variant('3x3', 'k3', 3, 0),
    Variant('7x7', 'k7', 7, 5),
    Variant('13x13', 'k13', 13, 5),
    Variant('31x31', 'k31', 31, 5),
    Variant('31x31, no small kernel', 'k31_no_small', 31, 0),
    Variant('31x31, no shortcut', 'k31_no_shortcut', 31, 5, False),
    Variant('3x3, no shortcut', 'k3_no_shortcut', 3, 0, False))
NETWORK = ['MODEL.LAYERS', '[2, 2]', 'MODEL.CHANNELS', '[16, 32]', 'MODEL.DROPPATH', '0', 'CURVES', 'False']
ERF_IMAGES = 20
COLOURS = 8  # of erf.png, which is meant for a page of documentation


def train(variant, seed, args):
    """Trains one variant unless its run has finished; returns the records of its evaluations, one for each epoch."""
    run, kernel = os.path.join(args.output, f'{variant.folder}-seed{seed}'), variant.kernel
    opts = [*NETWORK, 'MODEL.LARGE_KERNEL_SIZES', f'[{kernel}, {kernel}]', 'MODEL.SMALL_KERNEL',
            str(variant.small_kernel), *args.opts, 'SEED', str(seed)]
    if len(evaluations(run)) < get_config(args.cfg, opts).TRAIN.NUM_EPOCHS:
        script = 'main_single_gpu.py' if variant.shortcut else 'benchmarks/train_without_shortcut.py'
        arguments = [f'-cfg={args.cfg}', f'-data_path={args.data_path}', f'-output={run}', '-opts', *opts]
        print(shlex.join(['python', script, *arguments]), flush=True)
        if subprocess.run([sys.executable, os.path.join(ROOT, script), *arguments],
                          stdout=subprocess.DEVNULL).returncode:
            raise UserError(f'{run}: the training failed, see above')
    return evaluations(run)


def evaluations(run):
    if not os.path.exists(os.path.join(run, METRICS)):
        return []
    return [record for record in read_metrics(run) if record['event'] == 'eval' and record['weights'] == 'model']


def field_of(variant, args):
    """The effective receptive field of the last stage, the mean over the seeds: float32 [size, size]."""
    fields, forward = [], replknet.RepLKBlock.forward
    for seed in range(1, args.seeds + 1):
        network, config = load_model(os.path.join(args.output, f'{variant.folder}-seed{seed}', LAST))
        data = config.DATA
        transform = eval_transform(args.erf_size, protocol='warp', interpolation=data.INTERPOLATION,
                                   mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD)
        paths, _ = find_images([os.path.join(args.data_path, 'val_list.txt')])
        chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, ERF_IMAGES).astype(int)]
        try:
            if not variant.shortcut:
                replknet.RepLKBlock.forward = without_shortcut
            fields.append(receptive_field(stage_layers(network, len(network.stages) - 1),
                                          (transform(decode_image(path, data.EXIF)) for path in chosen)))
        finally:
            replknet.RepLKBlock.forward = forward
    return np.mean(fields, 0)


def spread(values, form='.1f'):
    """Mean and sample standard deviation, as text."""
    deviation = f' ± {statistics.stdev(values):{form}}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{form}}{deviation}'


def table(results, fields):
    """Markdown: a row for each variant.

    Args:
        results: {variant: [the evaluations of each seed]}.
        fields: {variant: effective receptive field}.
    """
    lines = ['| kernel | top-1 after the last epoch, % | each seed | validation loss | 50 % of the ERF, log-scaled / '
             'raw, % of the area |', '|---|---|---|---|---|']
    for variant, runs in results.items():
        accuracies = [run[-1]['acc1'] for run in runs]
        areas = [100 * area_ratios(field)[0.5].ratio for field in (log_scaled(fields[variant]), fields[variant])]
        lines.append(f'| {variant.title} | {spread(accuracies)} | {", ".join(f"{a:.1f}" for a in accuracies)} | '
                     f'{spread([run[-1]["loss"] for run in runs], ".3f")} | {areas[0]:.1f} / {areas[1]:.1f} |')
    return '\n'.join(lines) + '\n'


def draw_accuracies(results, path):
    """Draws the mean top-1 accuracy of the seeds after each epoch, and the range of the seeds as bars."""
    from matplotlib.figure import Figure  # pyplot would need a display and keep global state
    figure = Figure(figsize=(7.5, 4.2), layout='constrained')
    axes = figure.add_subplot()
    for number, (variant, runs) in enumerate(results.items()):
        values = np.array([[record['acc1'] for record in run] for run in runs])
        epochs = np.arange(1, values.shape[1] + 1) + 0.02 * (number - len(results) / 2)  # the bars side by side
        mean = values.mean(0)
        axes.errorbar(epochs, mean, [mean - values.min(0), values.max(0) - mean], capsize=2, linewidth=1.3,
                      linestyle='-' if variant.shortcut else '--', label=variant.title)
    axes.set_xticks(range(1, values.shape[1] + 1))
    axes.set_xlabel('epoch')
    axes.set_ylabel('top-1 accuracy, %: mean and range of the seeds')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    drawn = io.BytesIO()
    figure.savefig(drawn, format='png', dpi=90)
    save_small(Image.open(drawn), path, 4 * COLOURS)


def draw_fields(fields, path):
    """Draws the fields side by side."""
    drawn = io.BytesIO()
    draw_receptive_fields([(variant.title.replace(', ', '\n'), field) for variant, field in fields.items()], drawn)
    image = Image.open(drawn)
    save_small(image.resize((image.width * 2 // 3, image.height * 2 // 3), Image.LANCZOS), path, COLOURS)


def save_small(image, path, colours):
    with atomic_file(path) as file:
        image.convert('RGB').quantize(colours, dither=0).save(file, format='png', optimize=True)


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    for flag, options in (
            ('cfg', {'required': True, 'metavar': 'FILE', 'help': 'settings of the network (YAML)'}),
            ('data_path', {'required': True, 'metavar': 'DIR', 'help': 'dataset with lists'}),
            ('output', {'required': True, 'metavar': 'DIR', 'help': 'folder to write, or to continue'}),
            ('seeds', {'type': int, 'default': 3, 'help': 'runs of each variant (%(default)s)'}),
            ('erf_size', {'type': int, 'default': 256, 'help': 'pixels of the images for the ERF (%(default)s)'}),
            ('opts', {'nargs': argparse.REMAINDER, 'default': [], 'metavar': 'KEY VALUE',
                      'help': 'settings of all runs; must be last'})):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)
    args = parser.parse_args()
    require_matplotlib()
    results = {variant: [train(variant, seed, args) for seed in range(1, args.seeds + 1)] for variant in VARIANTS}
    fields = {variant: field_of(variant, args) for variant in VARIANTS}
    text = table(results, fields)
    with atomic_file(os.path.join(args.output, 'table.md')) as file:
        file.write(text.encode())
    draw_accuracies(results, os.path.join(args.output, 'curves.png'))
    draw_fields(fields, os.path.join(args.output, 'erf.png'))
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
