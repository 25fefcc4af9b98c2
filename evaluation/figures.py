"""The figures of a report, as PNG files, drawn with matplotlib."""
import warnings

import numpy as np

from errors import UserError
from evaluation.metrics import confused_pairs, confusion_cells
from evaluation.receptive_field import area_ratios, log_scaled
from image_files.fonts import prepare_texts

MATRIX_UP_TO = 50  # classes; with more, the most confused pairs are drawn
NUMBERS_UP_TO = 25  # classes; with more, the cells of the matrix are too small for numbers
PAIRS = 30
LONGEST_NAME = 24  # characters
WRONG = '#cd4444'


def require_matplotlib():
    """Raises UserError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError('matplotlib, which draws the figures, is not installed: pip install matplotlib') from None


def class_label(number, names):
    """'number name', where the name may be cut; only the number where the class has no other name."""
    name = names[number]
    if name == str(number):
        return name
    return f'{number} {name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME - 1] + "…"}'


def _figure(width, height):
    from matplotlib.figure import Figure  # pyplot would need a display and keep global state
    return Figure(figsize=(width, height), layout='constrained')


def _save(figure, path):
    prepare_texts(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # the number tells classes apart whose name the font cannot draw
        figure.savefig(path, format='png', dpi=110)


def draw_confusion(outcome, names, path):
    """Draws the confusion matrix, or with more than MATRIX_UP_TO classes the most confused pairs of them.

    Args:
        outcome: `metrics.Outcome`.
        names: names of all classes.
        path: PNG file to write.
    """
    if len(names) <= MATRIX_UP_TO:
        _draw_matrix(outcome, names, path)
    else:
        _draw_pairs(outcome, names, path)


def _draw_matrix(outcome, names, path):
    from matplotlib.colors import PowerNorm
    count = len(names)
    matrix = np.zeros([count, count], int)
    labels, predicted, images = confusion_cells(outcome, count)
    matrix[labels, predicted] = images
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure = _figure(3 + 0.32 * count, 2.6 + 0.3 * count)
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, cmap='Blues', norm=PowerNorm(0.5, 0, 1))  # so that rare mistakes are visible
    if count <= NUMBERS_UP_TO:
        for row, column in zip(*np.nonzero(matrix)):
            axes.text(column, row, str(matrix[row, column]), ha='center', va='center', fontsize=8,
                      color='white' if shares[row, column] > 0.3 else 'black')
    texts = [class_label(number, names) for number in range(count)]
    axes.set_xticks(range(count), texts, rotation=90, fontsize=8)
    axes.set_yticks(range(count), texts, fontsize=8)
    axes.set_xlabel('predicted class')
    axes.set_ylabel('label')
    figure.colorbar(drawn, label="share of the label's images", shrink=min(1, 6 / (1 + 0.3 * count)), pad=0.02)
    _save(figure, path)


def _draw_pairs(outcome, names, path):
    labels, predicted, images = (values[:PAIRS] for values in confused_pairs(outcome, len(names)))
    figure = _figure(9, 1.2 + 0.26 * max(1, len(images)))
    axes = figure.add_subplot()
    axes.barh(range(len(images)), images, color=WRONG)
    axes.set_yticks(range(len(images)), [f'{class_label(label, names)}  →  {class_label(guess, names)}'
                                         for label, guess in zip(labels, predicted)], fontsize=8)
    for row, (label, number) in enumerate(zip(labels, images)):
        axes.text(number, row, f' {number} of {np.sum(outcome.labels == label)}', va='center', fontsize=8)
    axes.margins(x=0.12, y=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
    axes.set_xlabel('images')
    axes.set_title('most confused pairs: label → predicted class' if len(images) else 'no image is predicted wrongly',
                   fontsize=11)
    axes.spines[['top', 'right']].set_visible(False)
    _save(figure, path)


def draw_calibration(curve, path):
    """Draws accuracy over confidence, and below it the number of images in each bin.

    Args:
        curve: `metrics.Calibration`.
        path: PNG file to write.
    """
    figure = _figure(5, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={'height_ratios': [3, 1]})
    left, width = curve.edges[:-1], np.diff(curve.edges)
    filled = curve.images > 0
    upper.bar(left[filled], curve.accuracy[filled], width[filled], align='edge', color='#9ec5e8', edgecolor='#4a7fb0',
              label='accuracy')
    upper.plot(curve.confidence[filled], curve.accuracy[filled], 'o', color='#1d4e80', markersize=4,
               label='at mean confidence')
    upper.plot([0, 1], [0, 1], '--', color='grey', linewidth=1, label='perfectly calibrated')
    upper.set_ylabel('accuracy')
    upper.set_xlim(0, 1)
    upper.set_ylim(0, 1)
    upper.set_title(f'calibration, ECE {100 * curve.ece:.2f} %', fontsize=11)
    figure.legend(fontsize=8, loc='outside lower center', ncols=3)
    lower.bar(left, curve.images, width, align='edge', color='#c9c9c9', edgecolor='#8a8a8a')
    lower.set_ylabel('images')
    lower.set_xlabel('confidence (probability of the predicted class)')
    for axes in (upper, lower):
        axes.spines[['top', 'right']].set_visible(False)
    _save(figure, path)


def draw_receptive_fields(fields, file):
    """Draws effective receptive fields side by side, the log-scaled maps of the paper above the maps themselves.

    Args:
        fields: [(title, array [H, W])].
        file: PNG file to write, a path or a binary file.
    """
    figure = _figure(0.6 + 2.5 * len(fields), 6 if len(fields) < 7 else 6.4)  # wide figures have larger panels
    rows = figure.subplots(2, len(fields), squeeze=False)
    for axes, name, scaled in zip(rows, ('log10(x + 1), as published', 'x, the map itself'),
                                  (log_scaled, lambda field: field / (field.max() or 1))):
        axes[0].set_ylabel(name, fontsize=9)
        for panel, (_, field) in zip(axes, fields):
            values = scaled(field)
            panel.imshow(values, cmap='YlGn', vmin=0, vmax=1)  # dark where pixels contribute much, as in the paper
            panel.set_xticks([])
            panel.set_yticks([])
            areas = [f'{threshold:.0%}: {100 * area.ratio:.1f}' for threshold, area in area_ratios(values).items()]
            panel.set_xlabel(f'{", ".join(areas[:2])}\n{", ".join(areas[2:])}', fontsize=8)
    for panel, (title, _) in zip(rows[0], fields):
        panel.set_title(title, fontsize=9)
    figure.supxlabel('share of the sum: area of the image, %', fontsize=8)
    _save(figure, file)
