"""Classifies images with a trained model: `python predict.py IMAGE... | FOLDER | LIST -model=MODEL`.

    python predict.py cat.jpg dog.png -model=replknet_31b_1k_224
    python predict.py data/digits/val_list.txt -model=output/RUN -output=digits.csv -save_images=sheets

A folder is searched recursively for images; a list (.txt) has a 'relative/path' or 'relative/path label' per line.
The results are in the order of the images. If there are labels, the accuracy is printed. Unreadable images are listed
at the end; the exit status is then 1.
"""
import os

os.environ.setdefault('GLOG_minloglevel', '2')  # hides a warning about each program that Paddle traces
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import contextlib
import csv
import io
import json
import sys

import numpy as np
import paddle
from tqdm import tqdm

from atomic_file import atomic_file
from deploy.contact_sheets import ContactSheets
from deploy.predictor import BACKENDS, Prediction, Predictor
from errors import ArgumentParser, UserError, exit_status
from image_files.decode import DataError
from image_files.find import find_images
from utils import accuracy_line, accuracy_metrics, accuracy_sums, logger

__all__ = ['Prediction', 'Predictor']

OUTPUTS = ('.csv', '.jsonl')


@contextlib.contextmanager
def results_file(path, topk, features):
    """Opens a file of results, .csv or .jsonl, which appears when the block ends without an error.

    A CSV file has one row per image; the features are written to NAME.npz next to it. JSON lines include them.

    Args:
        path: the file.
        topk: number of classes in each prediction.
        features: whether the predictions have features.
    Yields:
        function that writes a prediction and its label.
    """
    with atomic_file(path) as binary:
        text = io.TextIOWrapper(binary, 'utf-8', errors='surrogateescape', newline='')
        if path.endswith('.jsonl'):
            yield lambda prediction, label: text.write(_json_line(prediction, label))
        else:
            rows = csv.writer(text, lineterminator='\n')
            rows.writerow(['picture', 'label', 'error'] + [
                f'{column}_{k}' for k in range(1, topk + 1) for column in ('class', 'name', 'score')])
            paths, arrays = [], []

            def write(prediction, label):
                rows.writerow(_csv_row(prediction, label))
                if prediction.features is not None:
                    paths.append(prediction.picture)
                    arrays.append(prediction.features)

            yield write
            if features and arrays:
                with atomic_file(os.path.splitext(path)[0] + '.npz') as file:
                    np.savez(file, pictures=np.array(paths), features=np.stack(arrays))
        text.flush()
        text.detach()  # atomic_file closes the binary file


def _csv_row(prediction, label):
    top = zip(prediction.classes, prediction.names, (f'{score:.6f}' for score in prediction.scores))
    return [prediction.picture, '' if label < 0 else label, prediction.error or '',
            *(cell for entry in top for cell in entry)]


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
    """The metrics of an evaluation (`-eval`), over the images whose label is known."""

    def __init__(self):
        self.images, self.sums = 0, np.zeros(3)

    def add(self, logits, label):
        sums = accuracy_sums(paddle.to_tensor(logits[None]), paddle.to_tensor([label]))
        self.sums += [float(value) for value in sums]
        self.images += 1

    def metrics(self):
        return accuracy_metrics(*self.sums.tolist(), self.images)


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image, folder or list (.txt)')
    parser.add_argument('-model', '--model', required=True, help='zoo name, run folder, checkpoint or exported model')
    for flag, default, text in (
            ('cfg', None, 'settings file (YAML), if there is none next to the weights'),
            ('output', None, 'file of results, .csv or .jsonl; without it, they are printed'),
            ('save_images', None, 'new folder for contact sheets: frames are green where right, red where wrong'),
            ('topk', 5, 'number of classes in each prediction'),
            ('batch_size', 16, 'images per forward pass'),
            ('num_workers', None, 'number of decoding threads'),
            ('device', 'auto', 'auto, gpu, cpu, npu or xpu'),
            ('backend', 'auto', f'one of {", ".join(BACKENDS)}; auto chooses the faster one')):
        kind = int if flag in ('topk', 'batch_size', 'num_workers') else str
        parser.add_argument(f'-{flag}', f'--{flag}', default=default, type=kind, help=text)
    parser.add_argument('-features', '--features', action='store_true', help='also write the pooled features')
    args = parser.parse_args(argv)
    if args.output and not args.output.endswith(OUTPUTS):
        raise UserError(f'-output={args.output}: name a file that ends with {" or ".join(OUTPUTS)}')
    if args.output and not os.path.isdir(os.path.dirname(args.output) or '.'):
        raise UserError(f'-output={args.output}: there is no folder {os.path.dirname(args.output)}')
    if args.features and not args.output:
        raise UserError('-features: name a file for them, with -output=NAME.jsonl or -output=NAME.csv')
    return args


def main():
    args = read_arguments()
    paths, labels = find_images(args.images)
    logger.setLevel('WARNING')
    predictor = Predictor(args.model, args.cfg, device=args.device, batch_size=args.batch_size, topk=args.topk,
                          features=args.features, backend=args.backend, workers=args.num_workers)
    print(f'weights of {predictor.origin}, {predictor.backend}', file=sys.stderr)
    for path, label in zip(paths, labels):
        if label >= len(predictor.names):
            raise DataError(f'{path}: label {label}, but the model has {len(predictor.names)} classes')
    errors, accuracy = [], Accuracy()
    with contextlib.ExitStack() as stack:
        sheets = (stack.enter_context(ContactSheets(args.save_images, predictor.exif))
                  if args.save_images else None)
        write = _print
        if args.output:
            write = stack.enter_context(results_file(args.output, min(args.topk, len(predictor.names)), args.features))
        progress = tqdm(predictor.stream(paths), total=len(paths), unit='image', disable=not os.isatty(2))
        for prediction, label in zip(progress, labels):
            write(prediction, label)
            if sheets is not None:
                sheets.add(prediction, *((label, predictor.names[label]) if label >= 0 else ()))
            if prediction.error:
                errors.append(prediction.error)
            elif label >= 0:
                accuracy.add(prediction.logits, label)
    if accuracy.images:
        print(accuracy_line(accuracy.metrics()))
    for error in errors:
        print(error, file=sys.stderr)
    if errors:
        print(f'{len(errors)} of {len(paths)} images could not be read', file=sys.stderr)
    return 1 if errors else 0


def _print(prediction, label):
    if not prediction.error:
        top = ', '.join(f'{name} {score:.1%}' for name, score in zip(prediction.names, prediction.scores))
        tqdm.write(f'{prediction.picture}: {top}', file=sys.stdout)


if __name__ == '__main__':
    sys.exit(exit_status(main))
