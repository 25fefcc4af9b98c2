"""The report of an evaluation with several labels per image; see report.py for the folder.

    report.html               everything on one page, without other files
    classes.csv               average precision of each class; precision, recall and F1 at the threshold 0.5
    mistakes.csv              images with a wrong label at this threshold, most confident mistake first
    mistakes/sheet_0001.png   the 60 most confident mistakes
"""
import os

import numpy as np

from deploy.contact_sheets import ContactSheets
from deploy.predictor import Prediction
from evaluation.multi_label import class_metrics
from evaluation.page import headed, mean, mistake_sheets, percent, table, write_body
from evaluation.tables import digits, write_table
from utils import sigmoid

THRESHOLD = 0.5
SHOWN_MISTAKES = 60  # two contact sheets
SHOWN_LABELS = 5  # of an image on a contact sheet


def mistakes(scores, targets):
    """Images with a class that is predicted wrongly at the threshold.

    Args:
        scores, targets: probabilities and 0 or 1, [n, K].
    Returns:
        their indices, most confident mistake first; how wrong the worst class of each of the n images is, |score -
        target|; and the number of this class.
    """
    wrong = np.where((scores >= THRESHOLD) != (targets > 0), np.abs(scores - targets), 0)
    worst = wrong.argmax(1)
    size = wrong[np.arange(len(wrong)), worst]
    order = np.argsort(-size, kind='stable')
    return order[size[order] > 0], size, worst


def write_multi_label_files(folder, collected, paths, names, metrics, facts):
    """Writes the files of a report into a folder.

    Args:
        folder: a folder that exists.
        collected: `multi_label.Scores` after its `metrics`, of n images.
        paths: paths of the n images.
        names: names of all classes.
        metrics: result of `Scores.metrics`.
        facts: {name: text}, shown at the head of the page.
    """
    scores, targets = sigmoid(collected.logits), collected.targets
    classes = class_metrics(collected.logits, targets, THRESHOLD)
    wrong, _, worst = mistakes(scores, targets)
    write_table(folder, 'classes.csv', ['class', 'name', 'average_precision', 'precision', 'recall', 'f1', 'images',
                                        'predictions', 'correct'], (
        [number, names[number], *map(digits, (classes.ap[number], classes.precision[number], classes.recall[number],
                                                  classes.f1[number])),
         classes.support[number], classes.predictions[number], classes.correct[number]]
        for number in range(len(names))))
    write_table(folder, 'mistakes.csv', ['picture', 'labels', 'predicted', 'worst', 'worst_name', 'score'], (
        [paths[index], _numbers(targets[index] > 0), _numbers(scores[index] >= THRESHOLD), worst[index],
         names[worst[index]], digits(scores[index, worst[index]])] for index in wrong))
    shown = wrong[:SHOWN_MISTAKES]
    if len(shown):
        with ContactSheets(os.path.join(folder, 'mistakes'), names) as sheets:
            for index in shown:
                sheets.add(_prediction(paths[index], scores[index], names), tuple(np.flatnonzero(targets[index])),
                           _names(targets[index] > 0, names), multi_label=True)
    write_body(folder, '\n'.join((_head(metrics, classes, names, len(wrong), facts),
                                  _mistakes(folder, shown, wrong, paths, names, scores, targets, worst),
                                  _classes(classes, names))))


def _numbers(chosen):
    return ','.join(map(str, np.flatnonzero(chosen))) or '-'


def _names(chosen, names):
    return ', '.join(names[number] for number in np.flatnonzero(chosen)) or 'no label'


def _prediction(path, scores, names):
    """What the model predicts for an image, most probable first."""
    classes = [int(number) for number in np.argsort(-scores, kind='stable') if scores[number] >= THRESHOLD]
    return Prediction(path, classes, [names[number] for number in classes], scores[classes].tolist())


def _head(metrics, classes, names, wrong, facts):
    micro = 2 * classes.correct.sum() / max(1, classes.support.sum() + classes.predictions.sum())
    figures = [('mAP', f"{metrics['mAP']:.3f} %"), ('mean F1 of the classes', percent(mean(classes.f1))),
               ('F1 of all labels', percent(micro)), ('binary cross-entropy', f"{metrics['loss']:.4f}"),
               ('images', f"{metrics['images']:,}"),
               ('images with every label right', f"{metrics['images'] - wrong:,}"), ('classes', f'{len(names):,}')]
    without = np.count_nonzero(classes.support == 0)
    if without:
        figures.append(('classes without images', f'{without:,}'))
    return headed(figures, {**facts, 'labels': f'several per image; F1, precision and recall at {THRESHOLD}'})


def _mistakes(folder, shown, wrong, paths, names, scores, targets, worst):
    if not len(shown):
        return '<h2>Most confident mistakes</h2>\n<p>All labels of all images are predicted rightly.</p>'
    rows = ([(paths[index],), (_names(targets[index] > 0, names),), (_names(scores[index] >= THRESHOLD, names),),
             (names[worst[index]],), percent(scores[index, worst[index]])] for index in shown)
    return (f'<h2>Most confident mistakes</h2>\n<p>The {len(shown)} of {len(wrong):,} images with a wrong label whose '
            'worst class has the highest score without being a label, or the lowest with being one. Missing labels are '
            'often among them. mistakes.csv has all.</p>\n' + mistake_sheets(folder)
            + table(['image', 'labels', 'predicted', 'worst class', '#its score'], rows))


def _classes(classes, names):
    rows = ([str(number), (name,), *map(percent, (classes.ap[number], classes.precision[number], classes.recall[number],
                                                  classes.f1[number])),
             str(classes.support[number]), str(classes.predictions[number])] for number, name in enumerate(names))
    return ('<h2>Classes</h2>\n<p>Average precision (AP) summarises precision and recall over all thresholds; the mAP '
            f'is its mean over the classes with images. The other columns are for the threshold {THRESHOLD}. A dash '
            'means that there are no such images. Click a heading to sort.</p>\n'
            + table(['#class', 'name', '#AP', '#precision', '#recall', '#F1', '#images', '#predictions'], rows))
