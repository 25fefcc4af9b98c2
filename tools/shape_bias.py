"""Shape bias of an ImageNet-1K classifier on the cue-conflict images of Geirhos et al. (arXiv 1811.12231).

    python tools/shape_bias.py cue-conflict -model=replknet_31b_1k_224 -output=shape_bias.csv
    python tools/shape_bias.py cue-conflict -predictions=logits.npz

The images are named after the classes of their shape and of their texture, as in airplane/airplane1-bicycle2.png. The
probability of each of the 16 classes is the mean over its ImageNet classes, and the most probable class is the
decision, as in the authors' code (github.com/bethgelab/model-vs-human). The shape bias is the share of the decisions
for the shape among those for the shape or the texture, over the images where these differ. logits.npz has `paths`, file
names, and `logits` [N, 1000].
"""
import csv
import io
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402

from atomic_file import atomic_file  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from image_files.find import images_in  # noqa: E402

# ImageNet-1K classes of each of the 16 classes: ranges 'first-last', both included, and single numbers.
CLASSES = {
    'airplane': '404', 'bear': '294-297', 'bicycle': '444 671',
    'bird': '8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145',
    'boat': '472 554 625 814 914', 'bottle': '440 720 737 898 899 901 907', 'car': '436 511 817', 'cat': '281-286',
    'chair': '423 559 765 857', 'clock': '409 530 892',
    'dog': '152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268',
    'elephant': '385 386', 'keyboard': '508 878', 'knife': '499', 'oven': '766',
    'truck': '555 569 656 675 717 734 864 867'}
NAMES = list(CLASSES)


def members(name):
    """Numbers of the ImageNet-1K classes of one of the 16 classes."""
    ranges = (part.split('-') for part in CLASSES[name].split())
    return [number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)]


def decisions(logits):
    """Names of the most probable of the 16 classes for logits [N, 1000]."""
    logits = np.asarray(logits, np.float64)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    means = np.stack([probabilities[:, members(name)].mean(1) for name in NAMES], 1)
    return [NAMES[number] for number in means.argmax(1)]


def cues(path):
    """(shape, texture) of an image, from its name.

    Raises:
        UserError: the name has another form, or a class that is none of the 16.
    """
    found = re.fullmatch(r'(?:.*_)?([a-z]+)\d+-([a-z]+)\d+\.\w+', os.path.basename(path))
    if not found or found[1] not in CLASSES or found[2] not in CLASSES:
        raise UserError(f'{path}: is not named like airplane1-bicycle2.png, after two of the classes '
                        f'{", ".join(NAMES)}')
    return found[1], found[2]


def shape_bias(paths, decided):
    """Rows (class of the shape or 'all', images, decisions for the shape, for the texture, shape bias or None).

    Only images whose shape and texture differ are counted.
    """
    counts = {name: np.zeros(3, int) for name in NAMES}
    for path, decision in zip(paths, decided):
        shape, texture = cues(path)
        if shape != texture:
            counts[shape] += [1, decision == shape, decision == texture]
    counts['all'] = sum(counts.values())
    return [(name, *count.tolist(), float(count[1] / count[1:].sum()) if count[1:].any() else None)
            for name, count in counts.items()]


def read_logits(file, paths):
    """Logits of the images from an .npz file, matched by file name."""
    try:
        with np.load(file, allow_pickle=False) as data:
            logits = dict(zip(map(os.path.basename, map(str, data['paths'])), data['logits']))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise UserError(f'{file}: cannot be read as an .npz file with paths and logits: {error}') from None
    missing = [path for path in paths if os.path.basename(path) not in logits]
    if missing:
        raise UserError(f'{file}: has no logits of {missing[0]} and {len(missing) - 1} others')
    return np.stack([logits[os.path.basename(path)] for path in paths])


def compute_logits(model, cfg, paths):
    """Logits of the images by a model, see `deploy.predictor.Predictor`."""
    from tqdm import tqdm

    from deploy.predictor import Predictor  # imports Paddle, which predictions do not need
    predictor = Predictor(model, cfg)
    rows = []
    for prediction in tqdm(predictor.stream(paths), total=len(paths), unit='image', disable=not os.isatty(2)):
        if prediction.error:
            raise UserError(prediction.error)
        rows.append(prediction.logits)
    return np.stack(rows)


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument('images', metavar='FOLDER', help='folder of the cue-conflict images')
    for flag, text in (('model', 'zoo name, run folder, checkpoint or exported model'),
                       ('predictions', 'file of logits, .npz, instead of a model'),
                       ('cfg', 'settings file (YAML), if there is none next to the weights'),
                       ('output', 'file for the table, .csv')):
        parser.add_argument(f'-{flag}', f'--{flag}', help=text)
    args = parser.parse_args(argv)
    if bool(args.model) == bool(args.predictions):
        raise UserError('name either -model or -predictions')
    if args.output and not args.output.endswith('.csv'):
        raise UserError(f'-output={args.output}: name a file that ends with .csv')
    if not os.path.isdir(args.images):
        raise UserError(f'{args.images}: no such folder')
    return args


def main():
    args = read_arguments()
    paths = images_in(args.images)
    for path in paths:
        cues(path)  # refuses other images before the model runs
    logits = read_logits(args.predictions, paths) if args.predictions else compute_logits(args.model, args.cfg, paths)
    if logits.ndim != 2 or logits.shape[1] != 1000:
        raise UserError(f'{args.predictions or args.model}: logits of shape {list(logits.shape)}; the classes must be '
                        'the 1000 of ImageNet-1K')
    if not np.isfinite(logits).all():
        raise UserError(f'{args.predictions or args.model}: some logits are not finite')
    rows = shape_bias(paths, decisions(logits))
    print(f'{"shape":<10}{"images":>8}{"shape":>8}{"texture":>9}{"shape bias":>12}')
    for name, images, shape, texture, bias in rows:
        print(f'{name:<10}{images:>8}{shape:>8}{texture:>9}{"-" if bias is None else f"{bias:.1%}":>12}')
    if args.output:
        text = io.StringIO()
        table = csv.writer(text, lineterminator='\n')
        table.writerows([('shape', 'images', 'shape_decisions', 'texture_decisions', 'shape_bias'), *rows])
        with atomic_file(args.output) as file:
            file.write(text.getvalue().encode())
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
