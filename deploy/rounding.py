"""What computing in bfloat16 or int8 costs, and which layers int8 leaves to a wider precision.

A program in a lower precision cannot match the float32 model to within float32's rounding. What counts is whether it
decides the same on real images: for nearly all of them the top-1 class, or where images have several labels, every
class. Images that the float32 model itself does not decide (near-ties) are reported but do not count, because any
rounding may change them.
"""
import copy
import os

import numpy as np
from tqdm import tqdm

from deploy.comparison_images import evenly_spaced
from deploy.equivalence import CertificateError, Difference, dygraph_program
from deploy.predictor import class_scores
from errors import UserError
from fuse import pack
from large_kernel import PackedConv2D, fastest_precision
from large_kernel.quantise import quantisable, quantise

AGREEMENT = {'bf16': 0.995, 'int8': 0.99}  # least share of images with the same decision
NEAR_TIE = 0.02  # difference of two scores (probabilities); fixed, so that a large error cannot excuse itself
MOST_IMAGES, MOST_BYTES = 1000, 2**30  # compared images: at most this many, and of this size in memory
CALIBRATION_IMAGES, RANKING_IMAGES = 64, 16
# Features, and logits of inputs of other sizes, may differ from float32's by this share of their size (2-norms of a
# batch): there are no decisions to compare. Correct programs stay far below it.
DISTANCE = {'bf16': 0.25, 'int8': 0.5}


def decisions(logits, multi_label=False):
    """What a classifier decides, and where it does so clearly.

    Args:
        logits: [N, K].
        multi_label: whether each class is decided by itself.
    Returns:
        (classes [N], bool [N]): the top-1 classes, and whether the second best has a score lower by NEAR_TIE or more.
        With `multi_label` (bool [N, K], bool [N, K]): scores over 0.5, and whether they differ from it by half of that.
    """
    scores = np.stack([class_scores(row, multi_label) for row in logits])
    if multi_label:
        return scores > 0.5, np.abs(scores - 0.5) >= NEAR_TIE / 2
    ordered = np.sort(scores, axis=1)
    second = ordered[:, -2] if scores.shape[1] > 1 else 0
    return logits.argmax(1), ordered[:, -1] - second >= NEAR_TIE


def rounding_cost(expected, found, labels=None, multi_label=False):
    """What a program in a lower precision changes, a dict for the certificate.

    Args:
        expected, found: logits [N, K] of the float32 model and of the program.
        labels: the true classes [N], for the accuracy of both; None if they are unknown.
        multi_label: see `decisions`; there is then no accuracy.
    """
    difference = Difference()
    difference.add(expected, found)
    (before, clear), (after, _) = decisions(expected, multi_label), decisions(found, multi_label)
    changed, decided = before != after, int(clear.sum())
    cost = {'images': len(expected), 'max_difference': float(difference.largest),
            'mean_difference': float(difference.mean), 'largest_logit': float(difference.scale),
            'decided': decided, 'changed': int((changed & clear).sum()),
            'near_ties': clear.size - decided, 'near_ties_changed': int((changed & ~clear).sum()),
            'agreement': 1 - float((changed & clear).sum()) / max(1, decided),
            'agreement_with_near_ties': 1 - float(changed.mean())}
    if labels is not None and not multi_label:
        cost['accuracy'] = {'fp32': float((before == labels).mean()), 'rounded': float((after == labels).mean())}
    return cost


def _distance(expected, found):
    """The 2-norm of a difference, as a share of that of the expected values."""
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1))


class Rounding:
    """Measures programs in a lower precision by the float32 model, on as many images as there are, up to 1,000.

    Args:
        model: the float32 model in eval mode.
        images: `ComparisonImages`.
        precision: 'bf16' or 'int8'.
        agreement: least share of the decisions that must be the same; None for AGREEMENT.
        multi_label: see `decisions`.
        original: the function that the programs compute, if it is not the model: with features after the logits.
    Attributes:
        calibration: batches of images to quantise on. They are not compared, unless there are too few others.
        description: of the compared images.
    Raises:
        UserError: int8, and there are no images.
    """

    def __init__(self, model, images, precision, agreement=None, multi_label=False, original=None):
        source = images.source
        if precision == 'int8' and source.name == 'generated':
            raise UserError('-precision=int8: needs images to calibrate on; name a folder of typical ones with '
                            '-pictures=DIR, or the data folder with -data_path=DIR for its validation list')
        most = max(CALIBRATION_IMAGES, min(MOST_IMAGES, MOST_BYTES // images.one.nbytes))
        indices, self.calibration, name = evenly_spaced(len(source), most), None, source.name
        if precision == 'int8':
            chosen = indices[evenly_spaced(len(indices), CALIBRATION_IMAGES)]
            self.calibration = source.batches(chosen)
            rest = np.setdiff1d(indices, chosen)
            indices = rest if len(rest) >= len(chosen) else indices
            name += '' if indices is rest else ', also calibrated on'
        self._labels = None if source.labels is None else source.labels[indices]
        self._batches, self._multi_label, self._classes = source.batches(indices), multi_label, model.num_classes
        self.precision, self.agreement = precision, AGREEMENT[precision] if agreement is None else agreement
        self.description = f'{len(indices)} images ({name})'
        self._expected = self._logits(dygraph_program(model), 'float32')
        # random inputs, which exceed the ranges of int8, and an image, enlarged to the other size if there is one
        sizes, self._size = {batch.shape[2:] for batch in images.batches}, images.one.shape[2:]
        self._inputs = [np.pad(images.one, [(0, 0), (0, 0), *((0, n - m) for n, m in zip(size, self._size))], 'wrap')
                        for size in sizes]
        self._inputs += images.batches if precision == 'bf16' else []
        original = original or dygraph_program(model)
        self._outputs = [original(batch) for batch in self._inputs]

    def _logits(self, program, name):
        batches = tqdm(self._batches, name, unit='batch', leave=False, disable=not os.isatty(2))
        return np.concatenate([program(batch)[:, :self._classes] for batch in batches])

    def cost(self, program, name='program'):
        """`rounding_cost` of a function of images, or None if an output is not finite."""
        found = self._logits(program, name)
        return rounding_cost(self._expected, found, self._labels, self._multi_label) if np.isfinite(
            found).all() else None

    def holds(self, cost):
        """Whether a program of this cost may be exported."""
        return cost is not None and cost['changed'] <= (1 - self.agreement) * cost['decided'] + 1e-9

    def check(self, name, program):
        """The entry of a program in the certificate.

        Raises:
            CertificateError: too many decisions change, or an output is not finite or far from float32's.
        """
        cost, distances = self.cost(program, name), self._distances(program)
        if cost is None or distances is None:
            raise CertificateError(f'nothing is exported: in {self.precision}, outputs of {name} are not finite')
        if not self.holds(cost):
            raise CertificateError(
                f'nothing is exported: in {self.precision}, {name} decides {cost["changed"]} of {cost["decided"]} '
                f'{"classes of images" if self._multi_label else "images"} otherwise than float32, an agreement of '
                f'{cost["agreement"]:.2%}; at least {self.agreement:.2%} is required (-agreement)')
        for what, distance in distances.items():
            if distance > DISTANCE[self.precision]:
                raise CertificateError(f'nothing is exported: in {self.precision}, {what} of {name} differ from '
                                       f"float32's by {distance:.0%} of their size, over the limit of "
                                       f'{DISTANCE[self.precision]:.0%}')
        return {'precision': self.precision, 'max_difference': cost['max_difference'],
                'mean_difference': cost['mean_difference'], 'top1_agreement': cost['agreement_with_near_ties'],
                'rounding': {**cost, 'distances': distances}}

    def _distances(self, program):
        """{what: the largest distance from float32's} of outputs without decisions; None if a value is not finite."""
        found = {}
        for inputs, expected in zip(self._inputs, self._outputs):
            outputs = program(inputs)
            if not np.isfinite(outputs).all():
                return None
            compared = {'features': slice(self._classes, None)} if expected.shape[1] > self._classes else {}
            if inputs.shape[2:] != self._size:
                compared['logits at another size'] = slice(self._classes)
            for what, columns in compared.items():
                distance = _distance(expected[:, columns], outputs[:, columns])
                found[what] = max(distance, found.get(what, 0))
        return found


def choose_int8_layers(twin, rounding):
    """Chooses which 1x1 convolutions of a fused model are computed in int8: all, or all but the most harmful ones.

    The layers are ranked by what each of them alone, in int8, changes in the logits. As few as possible are left in
    the wider precision (bisection), such that `rounding.holds`.

    Returns:
        ({name: Quantised}, dict for the certificate)
    Raises:
        CertificateError: the agreement does not even hold without any layer in int8.
    """
    wide = fastest_precision()
    quantised = quantise(twin, rounding.calibration)
    if not quantised:
        raise UserError('-precision=int8: the model has no 1x1 convolution whose width is a multiple of 16')

    def holds(names):
        packed = pack(copy.deepcopy(twin), wide, {name: quantised[name] for name in names})
        return rounding.holds(rounding.cost(dygraph_program(packed), f'{len(names)} layers in int8'))

    kept, order = 0, list(quantised)
    effects = {}
    if not holds(order):
        effects = layer_effects(twin, wide, quantised, rounding.calibration)
        order = sorted(effects, key=effects.get, reverse=True)
        failing, kept = 0, len(order)
        while kept - failing > 1:
            middle = (failing + kept) // 2
            if holds(order[middle:]):
                kept = middle
            else:
                failing = middle
        if kept == len(order):
            raise CertificateError(f'nothing is exported: with any 1x1 convolution in int8, the agreement with float32 '
                                   f'is below {rounding.agreement:.2%} (-agreement); use -precision=bf16 or fp32')
    report = {'layers': len(order) - kept, 'of': len(order), 'otherwise': wide,
              'calibrated_on': f'{sum(map(len, rounding.calibration))} images',
              'kept': [{'layer': name, 'effect': effects[name]} for name in order[:kept]]}
    return {name: quantised[name] for name in order[kept:]}, report


def layer_effects(twin, wide, quantised, calibration):
    """{name: mean absolute change of a logit} when only this convolution is computed in int8."""
    batches = [batch for batch in calibration][:max(1, RANKING_IMAGES // len(calibration[0]))]
    model, convolutions = pack(copy.deepcopy(twin), wide), {name: conv for conv, name in quantisable(twin).items()}
    layers, program = dict(model.named_sublayers()), dygraph_program(model)
    expected, effects = [program(batch) for batch in batches], {}
    for name in tqdm(quantised, 'layers one by one', unit='layer', leave=False, disable=not os.isatty(2)):
        parent, _, child = name.rpartition('.')
        inner = layers[parent]._sub_layers
        inner[child] = PackedConv2D(convolutions[name], wide, quantised[name])
        difference = Difference()
        for batch, logits in zip(batches, expected):
            difference.add(logits, program(batch))
        inner[child], effects[name] = layers[name], float(np.nan_to_num(difference.mean, nan=np.inf))
    return effects


def rounding_table(certificate):
    """The lines of text about rounding in a certificate, none for float32."""
    about, lines = certificate.get('rounding', {}), []
    if 'int8' in about:
        int8 = about['int8']
        lines += ['', f"{int8['layers']} of {int8['of']} 1x1 convolutions are in int8, calibrated on "
                  f"{int8['calibrated_on']}"]
        lines += [f"  in {int8['otherwise']}: {entry['layer']} (in int8, it changes a logit by "
                  f"{entry['effect']:.2g} on average)" for entry in int8['kept']]
    for name, program in certificate['programs'].items():
        cost = program.get('rounding')
        if not cost:
            continue
        lines += ['', f"{name}, in {program['precision']}, compared with float32 on {about['compared_on']}:",
                  f"  logits differ by up to {cost['max_difference']:.2g}, {cost['mean_difference']:.2g} on average "
                  f"(largest logit {cost['largest_logit']:.3g})",
                  f"  the same decision for {cost['decided'] - cost['changed']} of {cost['decided']} "
                  f"({cost['agreement']:.2%}); for {cost['near_ties'] - cost['near_ties_changed']} of the "
                  f"{cost['near_ties']} near-ties, which do not count"]
        if not cost['decided']:
            lines.append('  float32 decides none of these images clearly, so this comparison says nothing; name '
                         'typical ones with -pictures')
        if 'accuracy' in cost:
            lines.append(f"  top-1 accuracy {cost['accuracy']['rounded']:.2%}, in float32 "
                         f"{cost['accuracy']['fp32']:.2%}")
    return lines
