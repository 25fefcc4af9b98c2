"""Classifies images with a trained model: `python predict.py IMAGE... | FOLDER | LIST -model=MODEL`.

    python predict.py cat.jpg dog.png -model=replknet_31b_1k_224
    python predict.py data/digits/val_list.txt -model=output/RUN -output=digits.csv -save_images=sheets
    python predict.py data/digits/val_list.txt -model=output/RUN -report=report -cam=maps

A folder is searched recursively for images; a list (.txt) has a 'relative/path' or 'relative/path label' per line.
The results are in the order of the images. If there are labels, the accuracy is printed. Images without a prediction,
such as unreadable ones, are listed at the end; the exit status is then 1. After Ctrl-C or SIGTERM, the results so far
are kept.
"""
import os

os.environ.setdefault('GLOG_minloglevel', '2')  # hides a warning about each program that Paddle traces
from errors import default_interrupt  # noqa: E402, I001
if __name__ == '__main__':
    default_interrupt()
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import contextlib
import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import paddle
from tqdm import tqdm

from atomic_file import append_whole, atomic_file
from deploy.contact_sheets import ContactSheets
from deploy.predictor import BACKENDS, NOT_FINITE, Prediction, Predictor
from errors import ArgumentParser, Interrupted, UserError, exit_status
from image_files.decode import DataError
from image_files.find import find_images
from image_files.lists import label_text
from utils import accuracy_line, accuracy_metrics, accuracy_sums, logger

__all__ = ['Prediction', 'Predictor']

OUTPUTS = ('.csv', '.jsonl')


@contextlib.contextmanager
def results_file(path, topk, features):
    """Opens a file of results, .csv or .jsonl, which appears when the block ends, with the results so far.

    A CSV file has one row per image; the features are written to NAME.npz next to it. JSON lines include them.

    Args:
        path: the file.
        topk: number of classes in each prediction.
        features: whether the predictions have features.
    Yields:
        function that writes a prediction and its label. A result that no longer fits on the disk raises OSError and is
        left out whole.
    """
    count, ended_by, paths, arrays = 0, None, [], []

    def write_and_count(prediction, label):
        nonlocal count
        write(prediction, label)
        count += 1
        if features and path.endswith('.csv') and prediction.features is not None:
            paths.append(prediction.picture)
            arrays.append(prediction.features)

    with atomic_file(path) as file:
        write = _writer(file.raw, path, topk)
        try:
            yield write_and_count
        except BaseException as error:  # an interruption, a full disk, a defect: what is done remains useful
            if not count:
                raise
            ended_by = error
    if arrays:
        with atomic_file(os.path.splitext(path)[0] + '.npz') as file:
            np.savez(file, pictures=np.array(paths), features=np.stack(arrays))
    if ended_by is not None:
        raise ended_by


def _writer(file, path, topk):
    """Function that writes a prediction and its label to an unbuffered binary file in the format of `path`."""
    def append(text):
        try:
            append_whole(file, text.encode('utf-8', 'surrogateescape'))  # a file name may be any bytes
        except OSError as error:
            error.filename = path
            raise

    if path.endswith('.jsonl'):
        return lambda prediction, label: append(_json_line(prediction, label))
    rows = csv.writer(SimpleNamespace(write=append), lineterminator='\n')
    rows.writerow(['picture', 'label', 'error'] + [
        f'{column}_{k}' for k in range(1, topk + 1) for column in ('class', 'name', 'score')])
    return lambda prediction, label: rows.writerow(_csv_row(prediction, label))


def _csv_row(prediction, label):
    top = zip(prediction.classes, prediction.names, (f'{score:.6f}' for score in prediction.scores))
    return [prediction.picture, label_text(label), prediction.error or '', *(cell for entry in top for cell in entry)]


def _json_line(prediction, label):
    record = {'picture': prediction.picture}
    if label != -1:
        record['label'] = label
    if prediction.error:
        record['error'] = prediction.error
    else:
        record['top'] = [{'class': number, 'name': name, 'score': score} for number, name, score in
                         zip(prediction.classes, prediction.names, prediction.scores)]
        if prediction.features is not None:
            record['features'] = prediction.features.tolist()
    return json.dumps(record, allow_nan=False) + '\n'


class Accuracy:
    """The metrics of an evaluation (`-eval`), over the images whose label is known."""
    scores = None

    def __init__(self):
        self.images, self.sums = 0, np.zeros(3)

    def add(self, logits, label):
        *sums, _ = accuracy_sums(paddle.to_tensor(logits[None]), paddle.to_tensor([label]))
        self.sums += [float(value) for value in sums]
        self.images += 1

    def metrics(self):
        return accuracy_metrics(*self.sums.tolist(), self.images)


class MultiLabelAccuracy:
    """The same where images have several labels.

    Attributes:
        scores: `evaluation.multi_label.Scores` of these images.
    """

    def __init__(self):
        from evaluation.multi_label import Scores  # imported only where used
        self.images, self.loss, self.scores = 0, 0.0, Scores()

    def add(self, logits, label):
        targets = np.zeros([1, len(logits)], np.float32)
        targets[0, list(label)] = 1
        loss, _ = self.scores.add(paddle.to_tensor(logits[None]), paddle.to_tensor(targets))
        self.loss += float(loss)
        self.images += 1

    def metrics(self):
        return self.scores.metrics(self.loss, self.images)


def fitting_labels(predictor, paths, labels):
    """The labels of images for a model: numbers, or tuples for one with several labels per image; -1 for unknown.

    Raises:
        DataError: an image has several labels, but the model has one per image; or a class that the model lacks.
    """
    for path, label in zip(paths, labels):
        several = isinstance(label, tuple)
        if several and not predictor.multi_label:
            raise DataError(f'{path}: has the labels {label_text(label)}, but the model has one label per image '
                            '(DATA.MULTI_LABEL False)')
        for number in label if several else (label,):
            if number >= len(predictor.names):
                raise DataError(f'{path}: label {number}, but the model has {len(predictor.names)} classes')
    return [(label,) if predictor.multi_label and not isinstance(label, tuple) and label >= 0 else label
            for label in labels]


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image, folder or list (.txt)')
    parser.add_argument('-model', '--model', required=True, help='zoo name, run folder, checkpoint or exported model')
    for flag, default, text in (
            ('cfg', None, 'settings file (YAML), if there is none next to the weights'),
            ('output', None, 'file of results, .csv or .jsonl; without it, they are printed'),
            ('save_images', None, 'new folder for contact sheets: frames are green where right, red where wrong'),
            ('font', None, 'font file for the names of the classes on contact sheets'),
            ('report', None, 'new folder for a report on the images with labels, with report.html; needs matplotlib'),
            ('cam', None, 'new folder for class activation maps, a PNG file for each image'),
            ('cam_stage', None, 'with -cam: Grad-CAM of this stage, from 0, instead of the exact maps of the last one'),
            ('tta', '', "'flip' averages the probabilities of each image and its mirror image"),
            ('threshold', None, 'least score of a class to be predicted, for models with several labels per image '
             '(default: 0.5)'),
            ('topk', 5, 'number of classes in each prediction, at most'),
            ('batch_size', 16, 'images per forward pass'),
            ('num_workers', None, 'number of decoding threads'),
            ('device', 'auto', 'auto, gpu, cpu, npu or xpu'),
            ('backend', 'auto', f'one of {", ".join(BACKENDS)}; auto chooses the faster one'),
            ('precision', None, 'fp32 (default), bf16, or auto for the fastest of both on this CPU; an export is '
             'computed in its own, which may be int8')):
        kind = (float if flag == 'threshold' else
                int if flag in ('topk', 'batch_size', 'num_workers', 'cam_stage') else str)
        parser.add_argument(f'-{flag}', f'--{flag}', default=default, type=kind, help=text)
    parser.add_argument('-features', '--features', action='store_true', help='also write the pooled features')
    args = parser.parse_args(argv)
    if args.output and not args.output.endswith(OUTPUTS):
        raise UserError(f'-output={args.output}: name a file that ends with {" or ".join(OUTPUTS)}')
    if args.output and not os.path.isdir(os.path.dirname(args.output) or '.'):
        raise UserError(f'-output={args.output}: there is no folder {os.path.dirname(args.output)}')
    if args.features and not args.output:
        raise UserError('-features: name a file for them, with -output=NAME.jsonl or -output=NAME.csv')
    folders = [os.path.realpath(folder) for folder in (args.save_images, args.report, args.cam) if folder]
    if len(set(folders)) < len(folders):
        raise UserError('-save_images, -report and -cam: name a folder of its own for each')
    if args.cam_stage is not None and not args.cam:
        raise UserError(f'-cam_stage={args.cam_stage}: name a folder for the maps, with -cam=FOLDER')
    return args


class Report:
    """Collects the predictions whose labels are known, and writes a report on them: see evaluation/report.py."""

    def __init__(self, folder, labels):
        from evaluation.predictions import Predictions  # imported only where used
        from evaluation.report import check_report
        if all(label == -1 for label in labels):
            raise UserError(f'-report={folder}: no image has a label; give a list with a label on each line')
        check_report(folder)
        self._folder, self._predictions, self._paths = folder, Predictions(), []

    def add(self, prediction, label):
        self._paths.append(prediction.picture)
        if not isinstance(label, tuple):  # the scores of those with several labels are in `MultiLabelAccuracy`
            self._predictions.add(paddle.to_tensor(prediction.logits[None]), paddle.to_tensor([label]))

    def write(self, predictor, accuracy, sources, errors):
        from evaluation.report import report_of_predictions
        facts = {'images': ', '.join(sources), **({'unreadable images, left out': errors} if errors else {})}
        report_of_predictions(self._folder, accuracy.scores or self._predictions, self._paths, accuracy.metrics(),
                              predictor, facts)


def main():
    args = read_arguments()
    paths, labels = find_images(args.images)
    logger.setLevel('WARNING')
    report = Report(args.report, labels) if args.report else None
    predictor = Predictor(args.model, args.cfg, device=args.device, batch_size=args.batch_size, topk=args.topk,
                          features=args.features, backend=args.backend, workers=args.num_workers, tta=args.tta,
                          threshold=args.threshold, precision=args.precision)
    maps = None
    if args.cam:
        from evaluation.activation_maps import ActivationMaps  # imported only where used
        maps = ActivationMaps(args.cam, args.model, args.cfg, args.cam_stage)
    in_precision = '' if predictor.precision == 'fp32' else f', {predictor.precision}'
    print(f'weights of {predictor.origin}, {predictor.backend}{in_precision}', file=sys.stderr)
    labels = fitting_labels(predictor, paths, labels)
    errors, accuracy, done = [], MultiLabelAccuracy() if predictor.multi_label else Accuracy(), 0
    try:
        with contextlib.ExitStack() as stack:
            sheets = stack.enter_context(ContactSheets(
                args.save_images, predictor.names, args.font, predictor.exif)) if args.save_images else None
            write = _print
            if args.output:
                write = stack.enter_context(
                    results_file(args.output, min(args.topk, len(predictor.names)), args.features))
            predictions = stack.enter_context(contextlib.closing(predictor.stream(paths)))
            progress = tqdm(predictions, total=len(paths), unit='image', disable=not os.isatty(2))
            for prediction, label in zip(progress, labels):
                write(prediction, label)
                done += 1
                if sheets is not None:
                    sheets.add(prediction, *_named(label, predictor.names), multi_label=predictor.multi_label)
                if maps is not None:
                    maps.add(prediction, None if label == -1 else label, predictor.names)
                if prediction.error:
                    errors.append(prediction.error)
                elif label != -1:
                    accuracy.add(prediction.logits, label)
                    if report is not None:
                        report.add(prediction, label)
    except Interrupted as error:
        where = f' are in {args.output}' if args.output and done else ' were done'
        raise Interrupted(error.signal, f'{error}: {done} of {len(paths)} images{where}') from None
    if accuracy.images:
        print(accuracy_line(accuracy.metrics()))
        if report is not None:
            report.write(predictor, accuracy, args.images, len(errors))
    for error in errors:
        print(error, file=sys.stderr)
    broken = sum(error.endswith(NOT_FINITE) for error in errors)
    for count, what in ((len(errors) - broken, 'images could not be read'),
                        (broken, f'images have no prediction: {NOT_FINITE}; check the weights')):
        if count:
            print(f'{count} of {len(paths)} {what}', file=sys.stderr)
    return 1 if errors else 0


def _named(label, names):
    """(label, its name), or nothing for an unknown one."""
    if isinstance(label, tuple):
        return label, ', '.join(names[number] for number in label) or 'no label'
    return (label, names[label]) if label >= 0 else ()


def _print(prediction, label):
    if not prediction.error:
        top = ', '.join(f'{name} {score:.1%}' for name, score in zip(prediction.names, prediction.scores)) or 'no label'
        tqdm.write(f'{prediction.picture}: {top}', file=sys.stdout)


if __name__ == '__main__':
    sys.exit(exit_status(main))
