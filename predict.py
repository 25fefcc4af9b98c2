"""Labels pictures: `python predict.py PICTURES... | FOLDER | LIST -model=MODEL`.

    python predict.py cat.jpg dog.png -model=replknet_31b_1k_224
    python predict.py data/digits/val_list.txt -model=output/RUN -output=digits.csv -save_images=sheets

A folder is searched for pictures, subfolders too; a list (.txt) has a 'relative/path' or 'relative/path label' a line.
Results come in the order of the pictures. Those that cannot be read are told at the end, with exit status 1.
"""
import os

os.environ.setdefault('GLOG_minloglevel', '2')  # Paddle has a warning, of no use here, for each program it traces
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import contextlib
import csv
import io
import json
import sys

import numpy as np
from PIL import Image
from tqdm import tqdm

from deploy.contact_sheets import ContactSheets
from datasets import DataError, read_list
from utils import accuracy_line
from errors import ArgumentParser, UserError
from atomic_file import atomic_file
from errors import exit_status
from deploy.predictor import BACKENDS, Prediction, Predictor
from utils import logger

__all__ = ['Prediction', 'Predictor']

OUTPUTS = ('.csv', '.jsonl')


def find_pictures(sources):
    """Paths of all pictures that the sources mean, and their labels or -1.

    Raises:
        UserError: a folder without pictures, or a list that cannot be used.
    """
    paths, labels = [], []
    for source in sources:
        if os.path.isdir(source):
            found = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names
                     if os.path.splitext(name)[1].lower() in Image.registered_extensions()]
            if not found:
                raise UserError(f'{source}: no pictures in this folder')
            found, marks = sorted(found), [-1] * len(found)
        elif source.lower().endswith('.txt'):
            names, marks = read_list(source, unlabelled=True)
            found = [os.path.join(os.path.dirname(source), os.fsdecode(name)) for name in names]
        else:
            found, marks = [source], [-1]
        paths += found
        labels += map(int, marks)
    return paths, labels


@contextlib.contextmanager
def results_file(path, topk, features):
    """Yields the function that writes a prediction and its label; the file appears when all are written.

    CSV has a row for each picture, and features go to a file NAME.npz beside it; JSON lines hold them.
    """
    with atomic_file(path) as binary:
        text = io.TextIOWrapper(binary, 'utf-8', errors='surrogateescape', newline='')
        if path.endswith('.jsonl'):
            yield lambda prediction, label: text.write(_json_line(prediction, label))
        else:
            rows = csv.writer(text, lineterminator='\n')
            rows.writerow(['picture', 'label', 'error'] + [
                f'{column}_{k}' for k in range(1, topk + 1) for column in ('class', 'name', 'score')])
            kept = []

            def write(prediction, label):
                best = zip(prediction.classes, prediction.names, (f'{score:.6f}' for score in prediction.scores))
                rows.writerow([prediction.picture, '' if label < 0 else label, prediction.error or '',
                               *(value for entry in best for value in entry)])
                if prediction.features is not None:
                    kept.append((prediction.picture, prediction.features))

            yield write
            if features and kept:
                names, arrays = zip(*kept)
                with atomic_file(os.path.splitext(path)[0] + '.npz') as file:
                    np.savez(file, pictures=np.array(names), features=np.stack(arrays))
        text.flush()
        text.detach()  # atomic_file closes it


def _json_line(prediction, label):
    record = {'picture': prediction.picture}
    if label >= 0:
        record['label'] = label
    if prediction.error:
        record['error'] = prediction.error
    else:
        record['top'] = [{'class': number, 'name': name, 'score': score} for number, name, score in
                         zip(prediction.classes, prediction.names, prediction.scores)]
        if prediction.features is not None:
            record['features'] = prediction.features.tolist()
    return json.dumps(record) + '\n'


class Accuracy:
    """Counts what `-eval` counts, over the pictures whose label is known."""

    def __init__(self):
        self.images, self.sums = 0, np.zeros(3)

    def add(self, logits, label):
        rank = np.argsort(-logits, kind='stable').tolist().index(label)
        loss = np.logaddexp.reduce(logits.astype(np.float64)) - logits[label]
        self.sums += 100 * (rank < 1), 100 * (rank < 5), loss
        self.images += 1

    def metrics(self):
        return {**dict(zip(('acc1', 'acc5', 'loss'), self.sums / self.images)), 'images': self.images}


def arguments_of(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('pictures', nargs='+', metavar='PICTURE', help='picture, folder or list (.txt)')
    parser.add_argument('-model', '--model', required=True, help='name of the zoo, run folder, checkpoint or export')
    for flag, default, text in (
            ('cfg', None, 'YAML file of settings, for weights that have none beside them'),
            ('output', None, 'file of results, .csv or .jsonl; without, they are printed'),
            ('save_images', None, 'new folder for contact sheets: frames are green where right, red where wrong'),
            ('topk', 5, 'classes told for each picture'),
            ('batch_size', 16, 'pictures computed at once'),
            ('num_workers', None, 'decoding threads'),
            ('device', 'auto', 'auto, gpu, cpu, npu or xpu'),
            ('backend', 'auto', f'one of {", ".join(BACKENDS)}; auto: the faster one')):
        kind = int if flag in ('topk', 'batch_size', 'num_workers') else str
        parser.add_argument(f'-{flag}', f'--{flag}', default=default, type=kind, help=text)
    parser.add_argument('-features', '--features', action='store_true', help='tell the pooled features as well')
    args = parser.parse_args(argv)
    if args.output and not args.output.endswith(OUTPUTS):
        raise UserError(f'-output={args.output}: name a file that ends with {" or ".join(OUTPUTS)}')
    if args.output and not os.path.isdir(os.path.dirname(args.output) or '.'):
        raise UserError(f'-output={args.output}: there is no folder {os.path.dirname(args.output)}')
    if args.features and not args.output:
        raise UserError('-features: name a file for them, with -output=NAME.jsonl or -output=NAME.csv')
    return args


def main():
    args = arguments_of()
    paths, labels = find_pictures(args.pictures)
    logger.setLevel('WARNING')
    predictor = Predictor(args.model, args.cfg, args.device, args.batch_size, args.topk, args.features, args.backend,
                          args.num_workers)
    print(f'weights of {predictor.origin}, {predictor.backend}', file=sys.stderr)
    for path, label in zip(paths, labels):
        if label >= len(predictor.names):
            raise DataError(f'{path}: label {label}, but the model has {len(predictor.names)} classes')
    failed, accuracy = [], Accuracy()
    with contextlib.ExitStack() as stack:
        sheets = stack.enter_context(ContactSheets(args.save_images)) if args.save_images else None
        write = _print
        if args.output:
            write = stack.enter_context(results_file(args.output, min(args.topk, len(predictor.names)), args.features))
        progress = tqdm(predictor.stream(paths), total=len(paths), unit='picture', disable=not os.isatty(2))
        for prediction, label in zip(progress, labels):
            write(prediction, label)
            if sheets is not None:
                sheets.add(prediction, *((label, predictor.names[label]) if label >= 0 else ()))
            if prediction.error:
                failed.append(prediction.error)
            elif label >= 0:
                accuracy.add(prediction.logits, label)
    if accuracy.images:
        print(accuracy_line(accuracy.metrics()))
    for error in failed:
        print(error, file=sys.stderr)
    if failed:
        print(f'{len(failed)} of {len(paths)} pictures could not be read', file=sys.stderr)
    return 1 if failed else 0


def _print(prediction, label):
    if not prediction.error:
        best = ', '.join(f'{name} {score:.1%}' for name, score in zip(prediction.names, prediction.scores))
        tqdm.write(f'{prediction.picture}: {best}', file=sys.stdout)


if __name__ == '__main__':
    sys.exit(exit_status(main))
