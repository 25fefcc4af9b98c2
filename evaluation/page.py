"""report.html: one page that needs no other files, in a light and a dark form."""
import base64
import glob
import os
from html import escape
from typing import List, NamedTuple

import numpy as np

from evaluation.figures import MATRIX_UP_TO
from evaluation.metrics import Calibration, ClassMetrics, Outcome

SHOWN_PAIRS = 100  # rows; confused_pairs.csv has all


class Content(NamedTuple):
    """What the page shows.

    Attributes:
        outcome, paths, names, accuracy, facts: see `report.write_report`.
        classes: `metrics.ClassMetrics`.
        curve: `metrics.Calibration`.
        pairs: result of `metrics.confused_pairs`.
        mistakes: indices of the mistakes on the contact sheets.
    """
    outcome: Outcome
    paths: List[str]
    names: List[str]
    accuracy: dict
    facts: dict
    classes: ClassMetrics
    curve: Calibration
    pairs: tuple
    mistakes: np.ndarray


_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --faint: #62686e; --back: #fff; --card: #f3f5f7; --line: #d8dce0;
  --accent: #1f66ad }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --faint: #9aa2aa; --back: #16191c; --card: #22272c;
  --line: #3a4148; --accent: #7db7ef } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1160px;
  margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.6rem; margin: 0 0 1rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
p { max-width: 70ch } p, dt, .tile span { color: var(--faint) } a { color: var(--accent) }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0 }
.tile { background: var(--card); border-radius: 8px; padding: .6rem 1rem; min-width: 7rem }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 } dd { margin: 0;
  overflow-wrap: anywhere }
img { max-width: 100%; background: #fff; border-radius: 8px; display: block; margin: .6rem 0 }
.scroll { max-height: 32rem; overflow: auto; border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; width: 100% }
th { position: sticky; top: 0; background: var(--card); text-align: left; white-space: nowrap }
th[onclick] { cursor: pointer } th[onclick]::after { content: " \\2195"; color: var(--faint) }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line) } td { overflow-wrap: anywhere }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
"""

# Sorts by the clicked column, the other way round at the next click; cells without a number stay last.
_SCRIPT = """
function sortBy(head) {
  const body = head.closest('table').tBodies[0], column = head.cellIndex, numeric = head.className == 'n';
  const sign = head.dataset.order = head.dataset.order == 1 ? -1 : 1;
  const key = row => numeric ? parseFloat(row.cells[column].textContent) : row.cells[column].textContent;
  const compare = (a, b) => !numeric ? sign * a.localeCompare(b, undefined, {numeric: true})
    : isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : sign * (a - b);
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
}
"""


def write_page(folder, content):
    """Writes report.html into the folder of a report, whose figures and contact sheets exist already.

    Args:
        folder: the folder.
        content: `Content`.
    """
    write_body(folder, '\n'.join((_head(content), _mistakes(folder, content), _confusion(folder, content),
                                  _classes(content), _calibration(folder, content))))


def write_body(folder, body):
    """Writes report.html with this content of its body, HTML."""
    page = (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Evaluation</title>\n'
            f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n'
            f'<script>{_SCRIPT}</script>\n</head>\n<body>\n{body}\n</body>\n</html>\n')
    with open(os.path.join(folder, 'report.html'), 'w', encoding='utf-8', errors='replace') as file:
        file.write(page)


def _head(content):
    accuracy, classes = content.accuracy, content.classes
    figures = [('top-1 accuracy', f"{accuracy['acc1']:.3f} %")]
    if len(content.names) > 5:
        figures.append(('top-5 accuracy', f"{accuracy['acc5']:.3f} %"))
    figures += [('mean accuracy of the classes', percent(mean(classes.recall))),
                ('mean F1', percent(mean(classes.f1))), ('cross-entropy', f"{accuracy['loss']:.4f}"),
                ('ECE', percent(content.curve.ece)), ('images', f'{len(content.paths):,}'),
                ('classes', f'{len(content.names):,}')]
    without = np.count_nonzero(classes.support == 0)
    if without:
        figures.append(('classes without images', f'{without:,}'))
    return headed(figures, content.facts)


def headed(figures, facts):
    """The head of the page: tiles of (name, text), and a list of the facts {name: text}."""
    tiles = ''.join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in figures)
    facts = ''.join(f'<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>' for name, value in facts.items())
    return f'<h1>Evaluation</h1>\n<div class="tiles">{tiles}</div>\n<dl>{facts}</dl>'


def _mistakes(folder, content):
    outcome, names = content.outcome, content.names
    if not len(content.mistakes):
        return '<h2>Most confident mistakes</h2>\n<p>No image is predicted wrongly.</p>'
    sheets = mistake_sheets(folder)
    rows = ([(content.paths[index],), (named(outcome.labels[index], names),),
             (named(outcome.predicted[index], names),), percent(outcome.confidence[index]),
             percent(outcome.label_probability[index])] for index in content.mistakes)
    wrong = np.count_nonzero(outcome.labels != outcome.predicted)
    return (f'<h2>Most confident mistakes</h2>\n<p>The {len(content.mistakes)} of {wrong:,} mistakes with the highest '
            'probability of the wrong class. Wrong labels are often among them. mistakes.csv has all.</p>\n' + sheets
            + table(['image', 'label', 'predicted', '#probability', '#of the label'], rows))


def mistake_sheets(folder):
    """The contact sheets of mistakes of a report."""
    return ''.join(_image(path, 'contact sheet of mistakes')
                   for path in sorted(glob.glob(os.path.join(glob.escape(folder), 'mistakes', '*.png'))))


def _confusion(folder, content):
    names, support = content.names, content.classes.support
    rows = ([(named(label, names),), (named(guess, names),), f'{images}', percent(images / support[label])]
            for label, guess, images in zip(*(values[:SHOWN_PAIRS] for values in content.pairs)))
    what = 'Confusion matrix' if len(names) <= MATRIX_UP_TO else 'Most confused pairs of classes'
    pairs = table(['label', 'predicted', '#images', "#share of the label's images"], rows) if len(
        content.pairs[0]) else ''
    return f"<h2>Confusion</h2>\n{_image(os.path.join(folder, 'confusion.png'), what)}\n{pairs}"


def _classes(content):
    classes, names = content.classes, content.names
    often = {}
    for label, guess, images in zip(*content.pairs):  # most images first
        often.setdefault(label, f'{named(guess, names)} ({images})')
    rows = ([str(number), (name,), *map(percent, (classes.recall[number], classes.precision[number],
                                                   classes.f1[number])),
             str(classes.support[number]), str(classes.predictions[number]), (often.get(number, ''),)]
            for number, name in enumerate(names))
    return ('<h2>Classes</h2>\n<p>Accuracy is the share of the images of a class that are predicted to be of it '
            '(recall); precision is the share of the images predicted to be of a class that are. A dash means that '
            'there are no such images. Click a heading to sort.</p>\n'
            + table(['#class', 'name', '#accuracy', '#precision', '#F1', '#images', '#predictions',
                      'most often taken for'], rows))


def _calibration(folder, content):
    curve = content.curve
    rows = ([f'{low:.3f} to {high:.3f}', str(images), percent(confidence), percent(share)]
            for low, high, images, confidence, share in
            zip(curve.edges, curve.edges[1:], curve.images, curve.confidence, curve.accuracy))
    return ('<h2>Calibration</h2>\n<p>Of the images predicted with a probability near 80 %, 80 % should be right. The '
            'expected calibration error (ECE) is the mean distance between the two, over 15 bins of equal width.</p>\n'
            + _image(os.path.join(folder, 'calibration.png'), 'calibration curve')
            + table(['#confidence', '#images', '#mean confidence', '#accuracy'], rows))


def table(columns, rows):
    """A sortable table. A column whose heading starts with # has numbers; cells of text are tuples of one string."""
    head = ''.join(f'<th onclick="sortBy(this)"{_KIND[column[0] == "#"]}>{escape(column.lstrip("#"))}</th>'
                   for column in columns)
    body = '\n'.join('<tr>' + ''.join(f'<td>{escape(cell[0])}</td>' if isinstance(cell, tuple) else
                                      f'<td class="n">{cell}</td>' for cell in row) + '</tr>' for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


_KIND = {True: ' class="n"', False: ''}


def _image(path, description):
    with open(path, 'rb') as file:
        data = base64.b64encode(file.read()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{description}">'


def named(number, names):
    return names[number] if names[number] == str(number) else f'{number} {names[number]}'


def mean(values):
    """Mean over the classes for which the value is defined."""
    return np.nanmean(values) if np.isfinite(values).any() else np.nan


def percent(share):
    return '–' if np.isnan(share) else f'{100 * share:.2f} %'
