"""The report of an evaluation: a folder with report.html, tables as CSV files, figures and contact sheets.

    report.html               everything on one page, without other files
    classes.csv               accuracy (recall), precision, F1 and number of images of each class
    confusion.csv             the confusion matrix, for up to 2,000 classes
    confused_pairs.csv        its cells off the diagonal, most images first
    mistakes.csv              the images that are predicted wrongly, most confident first
    calibration.csv           accuracy and confidence in 15 bins of confidence
    confusion.png, calibration.png
    mistakes/sheet_0001.png   the 60 most confident mistakes
"""
import os
from functools import partial

import numpy as np
import paddle

import utils
from atomic_file import atomic_folder, refuse_taken
from datasets import EvalBatchSampler, eval_protocol
from deploy.contact_sheets import ContactSheets
from deploy.predictor import Prediction
from errors import UserError
from evaluation import metrics
from evaluation.figures import draw_calibration, draw_confusion, require_matplotlib
from evaluation.multi_label import Scores
from evaluation.multi_label_report import write_multi_label_files
from evaluation.page import Content, write_page
from evaluation.tables import digits, write_table

SHOWN_MISTAKES = 60  # two contact sheets
WHOLE_MATRIX_UP_TO = 2000  # classes


def check_report(folder):
    """Makes sure before an evaluation that its report can be written.

    Raises:
        UserError: the folder has contents or cannot be created, or matplotlib is not installed.
    """
    refuse_taken(folder, 'report')
    require_matplotlib()


def report_of_run(config, predictions, accuracy, origin, data):
    """Gathers the predictions of all processes; rank 0 writes the report. Every rank calls it.

    Args:
        config: settings of the run; EVAL_REPORT is the folder.
        predictions: `Predictions` of this rank's share of the validation set; with DATA.MULTI_LABEL the
            `multi_label.Scores` of all of it.
        accuracy: result of `engine.evaluate`.
        origin: where the weights come from.
        data: `training.data.RunData`.
    """
    size = len(data.val)
    outcome = predictions
    if not config.DATA.MULTI_LABEL:
        sampler = EvalBatchSampler(size, config.DATA.BATCH_SIZE_EVAL, utils.rank(), utils.world_size())
        outcome = predictions.gather([index for batch in sampler for index in batch], size)
    if utils.is_main():
        names = data.names or [str(number) for number in range(config.MODEL.NUM_CLASSES)]
        facts = {'weights': origin, 'images': data.val.list_file, **_protocol(config, config.EVAL_TTA),
                 'precision': f'{config.AMP_DTYPE} {config.AMP_LEVEL}' if config.AMP else 'float32'}
        paths = [data.val.path(index) for index in range(size)]
        write_report(config.EVAL_REPORT, outcome, paths, names, accuracy, facts)


def report_of_predictions(folder, predictions, paths, accuracy, predictor, facts):
    """Writes the report of predictions by a `Predictor`.

    Args:
        folder: see `write_report`.
        predictions: `Predictions` or `multi_label.Scores` of the images whose label is known.
        paths: their paths.
        accuracy: result of `utils.accuracy_metrics` or `multi_label.Scores.metrics`.
        predictor: the `Predictor`.
        facts: {name: text}, also shown.
    """
    facts = {'weights': predictor.origin, **facts, **_protocol(predictor.settings, predictor.tta)}
    outcome = predictions if predictor.multi_label else predictions.outcome()
    write_report(folder, outcome, paths, predictor.names, accuracy, facts)


def _protocol(config, tta):
    protocol = eval_protocol(config)
    crop = f', centre crop of {config.DATA.CROP_PCT:g}' if protocol == 'crop' else ', whole image'
    views = 'each image and its mirror image' if tta == 'flip' else 'one view per image'
    return {'preprocessing': f'{config.DATA.IMAGE_SIZE} pixels, {protocol}{crop}', 'prediction': views,
            'Paddle': paddle.__version__}


def write_report(folder, outcome, paths, names, accuracy, facts):
    """Writes a report into a folder, which appears when it is complete.

    Args:
        folder: a folder that is empty or does not exist.
        outcome: `metrics.Outcome` of n images, or `multi_label.Scores` after its `metrics`.
        paths: paths of the n images.
        names: names of all classes.
        accuracy: dict of acc1, acc5 and loss; for `Scores` the result of its `metrics`.
        facts: {name: text}, shown at the head of the page.
    Raises:
        UserError: the folder cannot be written, or logits are not finite.
    """
    several = isinstance(outcome, Scores)
    finite = np.isfinite(outcome.logits).all(1) if several else np.isfinite(outcome.confidence)
    broken = np.flatnonzero(~finite)
    if len(broken):
        raise UserError(f'-report={folder}: the logits of {len(broken)} of {len(paths)} images are not finite, first '
                        f'those of {paths[broken[0]]}; evaluate without -amp, or check the weights')
    try:
        with atomic_folder(folder) as scratch:
            write = write_multi_label_files if several else _write_files
            write(scratch, outcome, paths, names, accuracy, facts)
    except OSError as error:
        raise UserError(f'-report={folder}: cannot be written: {error.strerror or error}') from None


def _write_files(folder, outcome, paths, names, accuracy, facts):
    classes, curve = metrics.class_metrics(outcome, len(names)), metrics.calibration(outcome)
    wrong = metrics.mistakes(outcome)
    pairs = metrics.confused_pairs(outcome, len(names))

    table = partial(write_table, folder)
    table('classes.csv', ['class', 'name', 'accuracy', 'precision', 'f1', 'images', 'predictions', 'correct'], (
        [number, names[number], *map(digits, (classes.recall[number], classes.precision[number], classes.f1[number])),
         classes.support[number], classes.predictions[number], classes.correct[number]]
        for number in range(len(names))))
    table('confused_pairs.csv', ['label', 'label_name', 'predicted', 'predicted_name', 'images'], (
        [label, names[label], guess, names[guess], images] for label, guess, images in zip(*pairs)))
    if len(names) <= WHOLE_MATRIX_UP_TO:
        table('confusion.csv', ['label', 'name', *range(len(names))], _matrix_rows(outcome, names))
    table('mistakes.csv', ['picture', 'label', 'label_name', 'predicted', 'predicted_name', 'probability',
                           'label_probability'], (
        [paths[index], label, names[label], guess, names[guess], digits(outcome.confidence[index]),
         digits(outcome.label_probability[index])]
        for index, label, guess in zip(wrong, outcome.labels[wrong], outcome.predicted[wrong])))
    table('calibration.csv', ['above', 'up_to', 'images', 'confidence', 'accuracy'], (
        [digits(low), digits(high), images, digits(confidence), digits(share)]
        for low, high, images, confidence, share in zip(curve.edges, curve.edges[1:], curve.images, curve.confidence,
                                                        curve.accuracy)))
    draw_confusion(outcome, names, os.path.join(folder, 'confusion.png'))
    draw_calibration(curve, os.path.join(folder, 'calibration.png'))
    shown = wrong[:SHOWN_MISTAKES]
    if len(shown):
        with ContactSheets(os.path.join(folder, 'mistakes'), names) as sheets:
            for index in shown:
                label, guess = outcome.labels[index], outcome.predicted[index]
                sheets.add(Prediction(paths[index], [guess], [names[guess]], [outcome.confidence[index]]), label,
                           names[label])
    write_page(folder, Content(outcome, paths, names, accuracy, facts, classes, curve, pairs, shown))


def _matrix_rows(outcome, names):
    labels, predicted, counts = metrics.confusion_cells(outcome, len(names))
    starts = np.searchsorted(labels, range(len(names) + 1))
    for number, name in enumerate(names):
        row, cells = np.zeros(len(names), int), slice(starts[number], starts[number + 1])
        row[predicted[cells]] = counts[cells]
        yield [number, name, *row]
