"""Shape bias of a model: does it follow the shape or the texture if the two belong to different classes?

    python tools/shape_bias.py cue-conflict -model=replknet_31b_1k_224 -output=decisions.csv -figure=shape_bias.png
    python tools/shape_bias.py cue-conflict -predictions=predictions.jsonl      # predict.py -topk=1000
    python tools/shape_bias.py -predictions=decisions.csv                       # from this script, or published ones

The images are the cue-conflict set of "ImageNet-trained CNNs are biased towards texture; increasing shape bias improves
accuracy and robustness" (arXiv 1811.12231) as it is published: 16 folders named after the class of the shape, with
files such as airplane/airplane1-bicycle2.png (shape, then texture). Whole images are resized to the model's size,
without a crop. The decision is the class, of these 16, whose ImageNet-1K classes have the largest mean probability.
Images without a conflict are left out. Shape bias = decisions for the shape / decisions for the shape or the texture.
"""
import csv
import io
import json
import os
import re
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from tqdm import tqdm  # noqa: E402

from atomic_file import atomic_file  # noqa: E402
from deploy.predictor import Predictor  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from evaluation.figures import require_matplotlib  # noqa: E402
from image_files.find import images_in  # noqa: E402
from zoo import require_settings_file  # noqa: E402

# The ImageNet-1K classes of each of the 16, as in the code published with the paper, get_imagenet_indices_for_category.
CLASSES = {
    'airplane': '404', 'bear': '294-297', 'bicycle': '444 671',
    'bird': '8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145',
    'boat': '472 554 625 814 914', 'bottle': '440 720 737 898-899 901 907', 'car': '436 511 817', 'cat': '281-286',
    'chair': '423 559 765 857', 'clock': '409 530 892',
    'dog': '152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268',
    'elephant': '385-386', 'keyboard': '508 878', 'knife': '499', 'oven': '766',
    'truck': '555 569 656 675 717 734 864 867'}
COUNT = 1000  # classes of ImageNet-1K
PUBLISHED = 1280  # images in the published set, 80 of them without a conflict
COLUMNS = ('object_response', 'category', 'imagename')  # of the published decisions; they have others too


def imagenet_classes(name):
    """Numbers of the ImageNet-1K classes that belong to one of the 16 classes."""
    ranges = (part.split('-') for part in CLASSES[name].split())
    return [number for first, *last in ranges for number in range(int(first), int(last[0] if last else first) + 1)]


def decide(probabilities):
    """The class, one of CLASSES, with the largest mean probability.

    Args:
        probabilities: float [1000].
    """
    means = [probabilities[imagenet_classes(name)].mean() for name in CLASSES]
    return list(CLASSES)[int(np.argmax(means))]


def shape_and_texture(path):
    """The classes that the name of an image gives, such as '.../airplane1-bicycle2.png'; also with a prefix 'X_'.

    Raises:
        UserError: it does not give two of the 16 classes.
    """
    found = re.fullmatch(r'(?:.*_)?([a-z]+)\d+-([a-z]+)\d+\.\w+', os.path.basename(path))
    if not found or not {*found.groups()} <= set(CLASSES):
        raise UserError(f'{path}: is not named like the images of the cue-conflict set, such as airplane1-bicycle2.png '
                        f'with two of {", ".join(CLASSES)}')
    return found.groups()


def find_stimuli(folder):
    """Sorted paths of the images of the cue-conflict set.

    Raises:
        UserError: there are none, or a file's name or folder does not fit the set.
    """
    if not os.path.isdir(folder):
        raise UserError(f'{folder}: there is no such folder')
    paths = images_in(folder)
    for path in paths:
        shape, _ = shape_and_texture(path)
        parent = os.path.basename(os.path.dirname(path))
        if parent != shape:
            raise UserError(f'{path}: has the shape {shape}, but is in the folder {parent}; name the folder with the '
                            '16 folders of the cue-conflict set')
    return paths


def whole_image_settings(model, cfg, folder):
    """Writes the settings of a model with the evaluation protocol 'warp' into a folder; returns the file's path."""
    path = os.path.join(folder, 'whole_image.yaml')
    with open(path, 'w', encoding='utf-8') as file:
        yaml.safe_dump({'BASE': os.path.abspath(require_settings_file(cfg, model)),
                        'DATA': {'EVAL_PROTOCOL': 'warp'}}, file)
    return path


def decisions_of_model(paths, args):
    """Runs a model: ({path: decision}, errors of the images that it cannot classify)."""
    with tempfile.TemporaryDirectory() as folder:
        predictor = Predictor(args.model, whole_image_settings(args.model, args.cfg, folder), device=args.device,
                              batch_size=args.batch_size)
    if len(predictor.names) != COUNT:
        raise UserError(f'-model={args.model}: has {len(predictor.names)} classes; the shape bias is defined for the '
                        f'{COUNT} of ImageNet-1K')
    decisions, errors = {}, []
    with closing(predictor.stream(paths)) as predictions:
        for prediction in tqdm(predictions, total=len(paths), unit='image', disable=not os.isatty(2)):
            if prediction.error:
                errors.append(prediction.error)
                continue
            exponentials = np.exp(prediction.logits.astype(np.float64) - prediction.logits.max())
            decisions[prediction.picture] = decide(exponentials / exponentials.sum())
    return decisions, errors


def decisions_in_file(path):
    """Reads {image: decision} from a file of predict.py (.jsonl) or of decisions (.csv).

    Raises:
        UserError: a column or a score is missing.
    """
    decisions = {}
    with open(path, encoding='utf-8', errors='surrogateescape', newline='') as file:
        if path.endswith('.csv'):
            rows = csv.DictReader(file)
            if not {*COLUMNS} <= {*(rows.fieldnames or ())}:
                raise UserError(f'-predictions={path}: has no columns {", ".join(COLUMNS)}; name decisions from this '
                                'script or a .jsonl file from predict.py -topk=1000')
            rows, subjects = list(rows), 'subj' in rows.fieldnames
            if any(row[column] is None for row in rows for column in COLUMNS):
                raise UserError(f'-predictions={path}: has a line without {", ".join(COLUMNS)}; is it incomplete?')
            if subjects and len({row['subj'] for row in rows}) > 1:
                raise UserError(f'-predictions={path}: has decisions of several subjects; give a file with one')
            return {row['imagename']: row['object_response'] for row in rows}
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if 'error' in record:
                    continue
                scores = {entry['class']: entry['score'] for entry in record['top']}
                probabilities = np.array([scores[k] for k in range(COUNT)])
                picture = os.fspath(record['picture'])
            except (ValueError, KeyError, TypeError):
                raise UserError(f'-predictions={path}: line {number} does not have the scores of {COUNT} classes; '
                                'write the file with predict.py -topk=1000 -output=NAME.jsonl') from None
            decisions[picture] = decide(probabilities)
    return decisions


def count_decisions(decisions):
    """Counts the decisions for images with a conflict.

    Args:
        decisions: {image: decision}.
    Returns:
        {class of the shape: Counter of 'shape', 'texture' and 'other'}, only classes with images.
    """
    counts = {name: Counter() for name in CLASSES}
    for image, decision in decisions.items():
        shape, texture = shape_and_texture(image)
        if shape != texture:
            counts[shape]['shape' if decision == shape else 'texture' if decision == texture else 'other'] += 1
    return {name: count for name, count in counts.items() if count}


def shape_bias(count):
    """The shape bias of a Counter of decisions; NaN if there is none for a shape or a texture."""
    decided = count['shape'] + count['texture']
    return count['shape'] / decided if decided else float('nan')


def draw(counts, path):
    """Draws the shape bias of each class as a dot, and the overall one as a line."""
    from matplotlib.figure import Figure  # pyplot would need a display and keep global state
    overall = shape_bias(sum(counts.values(), Counter()))
    figure = Figure(figsize=(6, 5), layout='constrained')
    axes = figure.add_subplot()
    axes.axvline(100 * overall, color='C0', label=f'overall {100 * overall:.1f} %')
    axes.plot([100 * shape_bias(count) for count in counts.values()], range(len(counts)), 'o', color='C0')
    axes.set_yticks(range(len(counts)), list(counts))
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.grid(axis='y', linestyle=':')
    axes.set_xlabel('shape bias, %: 0 follows the texture, 100 the shape')
    axes.set_ylabel('class of the shape')
    axes.legend(fontsize=8)
    with atomic_file(path) as file:
        figure.savefig(file, format='png', dpi=110)


def write_decisions(decisions, path):
    """Writes a CSV file with the columns COLUMNS."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator='\n')
    rows.writerow(COLUMNS)
    for image, decision in decisions.items():
        rows.writerow([decision, shape_and_texture(image)[0], os.path.basename(image)])
    with atomic_file(path) as file:
        file.write(text.getvalue().encode('utf-8', 'surrogateescape'))


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('stimuli', nargs='?', metavar='FOLDER', help='the cue-conflict set; not with -predictions')
    for flag, options in (
            ('model', {'help': 'zoo name, run folder, checkpoint or export, with the 1000 classes of ImageNet'}),
            ('predictions', {'metavar': 'FILE', 'help': 'instead of -model: .jsonl of predict.py, or .csv'}),
            ('cfg', {'metavar': 'FILE', 'help': 'settings file (YAML), if there is none next to the weights'}),
            ('output', {'metavar': 'FILE.csv', 'help': 'file of decisions to write'}),
            ('figure', {'metavar': 'FILE.png', 'help': 'figure to write; needs matplotlib'}),
            ('batch_size', {'type': int, 'default': 16, 'help': 'images per forward pass (%(default)s)'}),
            ('device', {'default': 'auto', 'help': 'auto, gpu, cpu, npu or xpu'})):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)
    args = parser.parse_args(argv)
    if bool(args.model) == bool(args.predictions):
        raise UserError('give either -model=MODEL or -predictions=FILE')
    if args.model and not args.stimuli:
        raise UserError(f'-model={args.model}: name the folder with the cue-conflict set')
    for flag, extension in (('output', '.csv'), ('figure', '.png')):
        path = getattr(args, flag)
        if path and not path.endswith(extension):
            raise UserError(f'-{flag}={path}: name a file that ends with {extension}')
        if path and not os.path.isdir(os.path.dirname(path) or '.'):
            raise UserError(f'-{flag}={path}: there is no folder {os.path.dirname(path)}')
    if args.figure:
        require_matplotlib()
    return args


def main():
    args = read_arguments()
    paths = find_stimuli(args.stimuli) if args.stimuli else []
    if args.model:
        decisions, errors = decisions_of_model(paths, args)
    else:
        decisions, errors = decisions_in_file(args.predictions), []
        names = {os.path.basename(path) for path in decisions}
        errors += [f'{path}: has no prediction in {args.predictions}' for path in paths
                   if os.path.basename(path) not in names]
    counts = count_decisions(decisions)
    if not counts:
        raise UserError(f'{args.stimuli or args.predictions}: has no decision for an image with a conflict')
    print(f"{'class':10} {'images':>6} {'shape':>6} {'texture':>7} {'other':>6} {'shape bias':>11}")
    for name, count in (*counts.items(), ('overall', sum(counts.values(), Counter()))):
        print(f"{name:10} {sum(count.values()):6} {count['shape']:6} {count['texture']:7} {count['other']:6} "
              f'{100 * shape_bias(count):9.1f} %')
    if len(decisions) != PUBLISHED:
        print(f'{len(decisions)} images; the published set has {PUBLISHED}')
    if args.output:
        write_decisions(decisions, args.output)
    if args.figure:
        draw(counts, args.figure)
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
