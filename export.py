"""Exports a trained model for inference, with a certificate that the exported programs match it.

    python export.py -pretrained=replknet_31b_1k_224 -output=export/31b            # or a run folder, or a checkpoint
    python export.py -cfg=./configs/replknet_31b.yaml -pretrained=W.pdparams -output=export/31b -format=paddle,onnx
    python export.py -pretrained=output/RUN -output=export/run -form=merged -dynamic
    python export.py -pretrained=output/RUN -output=export/int8 -precision=int8 -pictures=typical_images

The output folder contains `model`, a Paddle program that uses the large-kernel operator; `model_native`, a Paddle
program that uses standard operators only; `model.onnx` with `-format=onnx`; and `certificate.json`. If a program
differs from the original model by more than the tolerance, nothing is exported and the exit status is 1. With
`-precision=bf16` or `int8`, `model` is rounded, and must decide nearly all images as float32 does.
docs/export.md describes how to use the files.
"""
from errors import default_interrupt

if __name__ == '__main__':
    default_interrupt()
import paddle_env  # noqa: I001 - sets the environment, so before paddle

import contextlib
import copy
import json
import os
import platform
import shutil
import sys
import tempfile
from argparse import ArgumentTypeError
from dataclasses import dataclass, replace
from typing import Optional, Tuple

import numpy as np
import paddle

import utils
from atomic_file import atomic_file
from config import config_text, get_config
from deploy.comparison_images import comparison_images
from deploy.equivalence import (
    CertificateError,
    compare_groups,
    compare_outputs,
    dygraph_program,
    latency_ms,
    multiply_accumulates,
)
from deploy.layout import CERTIFICATE, FORMS, PRECISIONS, is_export
from deploy.onnx_graph import write_onnx
from deploy.onnx_int8 import write_onnx_int8
from deploy.rounding import Rounding, choose_int8_layers, rounding_table
from deploy.runtimes import load_onnx_program, load_paddle_program, save_paddle_program
from errors import ArgumentParser, Interrupted, UserError, exit_status
from fuse import WithFeatures, in_form, is_merged, pack
from image_files.lists import CLASSES, read_class_names
from large_kernel import fastest_precision, load_operator
from large_kernel.build import OPERATORS, BuildError, reason_unavailable
from run_folder.layout import CONFIG
from run_folder.metrics import best_checkpoint
from zoo import ZOO, build_model, class_names_file, pretrained_weights, require_settings_file

FORMATS = ('paddle', 'onnx', 'onnx-int8')


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how to check it.

    Attributes:
        form: 'fused' (no batch norm is left), 'merged' (small kernels are merged into the large ones) or 'training'.
        formats: of FORMATS.
        features: the programs also return the pooled features, [N, num_classes + C].
        dynamic: leave the height and width of the input free; otherwise they are DATA.IMAGE_SIZE.
        tolerance: largest difference of a logit, and of a feature map relative to its largest value.
        pictures: folder of images to compare and to calibrate on; None for images of the validation list, or
            generated ones.
        overwrite: replace an export in the output folder.
        cfg: settings file that was named for the model, or None; it tells a published model, see `class_names_file`.
        precision: of the program `model`: one of PRECISIONS, or 'auto' for the fastest of fp32 and bf16 here.
        agreement: least share of images that a program in bf16 or int8 must decide as float32 does; None for
            `deploy.rounding.AGREEMENT`.
    """
    form: str = 'fused'
    formats: Tuple[str, ...] = ('paddle',)
    features: bool = False
    dynamic: bool = False
    tolerance: float = 1e-4
    pictures: Optional[str] = None
    overwrite: bool = False
    cfg: Optional[str] = None
    precision: str = 'fp32'
    agreement: Optional[float] = None


def read_arguments(argv=None):
    """Settings and the other arguments of `export`, from the command line."""
    parser = ArgumentParser(__doc__)

    def add(flag, to=parser, **options):
        to.add_argument(f'-{flag}', f'--{flag}', **options)

    add('cfg', metavar='FILE', help='settings file (YAML); not needed for zoo names, runs and their checkpoints')
    add('pretrained', metavar='X', help='weights: a zoo name, a file, or a run folder for its best checkpoint')
    add('output', metavar='DIR', required=True, help='folder to write')
    add('form', choices=FORMS, default='fused', help='fused (default): no batch norm is left; merged: the small '
        'kernels are merged into the large ones; training: unchanged')
    add('format', type=_formats, default=['paddle'], metavar='X,Y', help='paddle (default), onnx, onnx-int8 (with '
        '-precision=int8), or several')
    add('precision', choices=(*PRECISIONS, 'auto'), default='fp32', help='of `model`: fp32 (default), bf16, int8, or '
        'auto for the fastest of fp32 and bf16 on this processor; the other programs are in fp32')
    add('agreement', type=_share, metavar='X', help='least share of the images that bf16 or int8 must decide as fp32 '
        'does (default 0.995 for bf16, 0.99 for int8)')
    add('features', action='store_true', help='append the pooled features to the logits, [N, classes + C], for '
        'predict.py -features')
    size = parser.add_mutually_exclusive_group()
    add('image_size', size, type=int, metavar='N', help='side of the input, pixels (DATA.IMAGE_SIZE)')
    add('dynamic', size, action='store_true', help='leave the height and width of the input free')
    add('tolerance', type=float, default=1e-4, help='largest difference of a logit, and of a feature map relative to '
        'its largest value (default 1e-4)')
    add('pictures', metavar='DIR', help='folder of images to compare, and for int8 to calibrate on, instead of '
        'the validation list')
    add('data_path', metavar='DIR', help='data folder, for its validation list (DATA.DATA_PATH)')
    add('overwrite', action='store_true', help='replace an export in the output folder')
    add('opts', nargs='+', default=[], metavar='KEY VALUE', help='any key of config.py')
    args = vars(parser.parse_args(argv))
    if args['pretrained'] and os.path.isdir(args['pretrained']):
        args['pretrained'] = best_checkpoint(args['pretrained'])
    config = get_config(require_settings_file(args['cfg'], args['pretrained']), args.pop('opts'), {
        'eval': True, **{flag: args.pop(flag) for flag in ('pretrained', 'image_size', 'data_path')}})
    if not config.MODEL.PRETRAINED:
        raise UserError('-pretrained is missing: give a file of weights, a run folder, or a name that '
                        '`python zoo.py` lists')
    config.freeze()
    return config, {'formats': args.pop('format'), **args}


def _formats(text):
    formats = text.split(',')
    if not set(formats) <= set(FORMATS):
        raise ArgumentTypeError(f'{text!r}: choose from {", ".join(FORMATS)}')
    return formats


def _share(text):
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise ArgumentTypeError(f'{text}: a share is a number from 0 to 1')


# ---- the export

def export(config, output, **options):
    """Writes the programs and the certificate of a model into a folder. On an error, nothing is written.

    Args:
        config: settings of the model, its weights and its data, with EVAL on.
        output: the folder.
        options: fields of `ExportOptions`.
    Returns:
        the certificate, a dict.
    Raises:
        CertificateError: a difference from the original model exceeds the tolerance.
        UserError, FileNotFoundError: an argument or a file cannot be used.
    """
    options = ExportOptions(**options)
    output = os.path.abspath(output)
    if os.path.exists(output):
        if not options.overwrite:
            raise UserError(f'-output={output}: exists; name another folder, or replace an export with -overwrite')
        if not is_export(output):
            raise UserError(f'-output={output}: contains no {CERTIFICATE}; -overwrite replaces exports only')
    options = replace(options, precision=_checked_precision(options))
    model = build_model(config, *pretrained_weights(config.MODEL.PRETRAINED))
    model.eval()
    twin = in_form(model, options.form, final_norm=options.features)
    images = comparison_images(config, options)
    weights = config.MODEL.PRETRAINED
    names = class_names_file(config, None if weights in ZOO else os.path.dirname(weights) or '.', options.cfg)
    if names:
        read_class_names(names, config.MODEL.NUM_CLASSES)  # refuses a file that does not fit
    with _complete_or_absent(output) as folder:
        certificate = _write_programs(folder, config, options, model, twin, images)
        for name, text in ((CERTIFICATE, json.dumps(certificate, indent=2, allow_nan=False)),
                           (CONFIG, config_text(config))):
            with atomic_file(os.path.join(folder, name)) as file:
                file.write(text.encode())
        if names:
            shutil.copyfile(names, os.path.join(folder, CLASSES))
    return certificate


def _checked_precision(options):
    """The precision of `model`, one of PRECISIONS. Raises UserError for options that do not go together."""
    precision, formats = options.precision, options.formats
    if options.features and set(formats) != {'paddle'}:
        raise UserError('-features: needs -format=paddle; the ONNX file returns logits only')
    reason = reason_unavailable() if precision != 'fp32' else None
    if precision == 'auto':
        precision = fastest_precision() if not reason and 'paddle' in formats and options.form != 'training' else 'fp32'
    if 'onnx-int8' in formats and precision != 'int8':
        raise UserError('-format=onnx-int8: add -precision=int8, which chooses its layers')
    if precision == 'fp32':
        if options.agreement is not None:
            raise UserError('-agreement: for -precision=bf16 or int8; float32 is checked with -tolerance')
        return precision
    if reason:
        raise UserError(f'-precision={precision}: needs the C++ operator: {reason}')
    if 'paddle' not in formats and 'onnx-int8' not in formats:
        raise UserError(f'-precision={precision}: needs -format=paddle; model.onnx is in float32')
    if precision == 'int8' and options.form != 'fused':
        raise UserError(f'-precision=int8: needs -form=fused, not {options.form}')
    if options.form == 'training':
        raise UserError(f'-precision={precision}: needs -form=fused or merged, since branches are added in float32')
    return precision


@contextlib.contextmanager
def _complete_or_absent(output):
    """Yields a temporary folder that replaces `output` when the block ends without an error."""
    parent, name = os.path.split(output)
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{name}.', dir=parent) as scratch:
            folder = os.path.join(scratch, 'new')
            os.mkdir(folder)
            yield folder
            old = os.path.join(scratch, 'old')
            try:
                if os.path.exists(output):
                    os.rename(output, old)
                os.rename(folder, output)
            except BaseException:
                if os.path.exists(old) and not os.path.exists(output):
                    os.rename(old, output)
                raise
    except OSError as error:
        raise UserError(f'-output={output}: cannot be written: {error.strerror}') from None


def _write_programs(folder, config, options, model, twin, images):
    """Writes and checks the programs of `twin`, the model in the exported form; returns the certificate."""
    threads, size = paddle_env.set_threads(), config.DATA.IMAGE_SIZE
    rounding, about, quantised = None, {}, None
    original = dygraph_program(WithFeatures(model) if options.features else model)
    if options.precision != 'fp32':
        rounding = Rounding(model, images, options.precision, options.agreement, config.DATA.MULTI_LABEL,
                            original)
        about = {'rounding': {'compared_on': rounding.description, 'required_agreement': rounding.agreement}}
    comparison = Comparison(model, images, options, original)
    groups = comparison.check_groups(twin)
    before = {'form': 'merged' if is_merged(model) else 'training', **_costs(model, size, images.one)}
    after = {'form': options.form, **_costs(twin, size, images.one)}
    sides = None if options.dynamic else (size, size)
    if options.precision == 'int8':
        quantised, about['rounding']['int8'] = choose_int8_layers(twin, rounding)
    programs = {}
    for program in _programs(twin, options, quantised, rounding):
        files = program.save(folder, sides)
        run = program.load(folder, threads)
        check = comparison.check_program if program.precision == 'fp32' else rounding.check
        programs[program.name] = {
            'files': files, 'needs': program.needs, **check(program.name, run),
            'bytes': sum(os.path.getsize(os.path.join(folder, file)) for file in files),
            'latency_ms': latency_ms(run, images.one)}
        del run  # before the next program is loaded
    return {
        'model': config.MODEL.NAME, 'weights': config.MODEL.PRETRAINED, 'form': options.form,
        'features': options.features, 'scores': 'sigmoid' if config.DATA.MULTI_LABEL else 'softmax',
        'image_size': list(sides) if sides else 'dynamic',
        'tolerance': options.tolerance, 'compared_on': images.description, 'groups': groups, 'programs': programs,
        'before': before, 'after': after, 'operators': OPERATORS, 'precision': options.precision, **about,
        'environment': {'paddle': paddle.__version__, 'threads': threads,
                        'processor': paddle_env.cpu_info().get('model name', platform.machine())}}


def _costs(model, size, image):
    return {'parameters': model.num_parameters(), 'gmacs': multiply_accumulates(model, size, size) / 1e9,
            'bytes': sum(4 * tensor.size for tensor in model.state_dict().values()),
            'latency_ms': latency_ms(dygraph_program(model), image)}


# ---- the programs

@dataclass(frozen=True)
class PaddleProgram:
    """A Paddle program and its weights.

    Attributes:
        name: of the program; its files are NAME.json (Paddle 2.6: NAME.pdmodel) and NAME.pdiparams.
        needs: what it needs to run, for the certificate.
        model: layer to trace, in eval mode.
        implementation: of the depthwise convolutions, see `save_paddle_program`.
        precision: one of PRECISIONS.
    """
    name: str
    needs: str
    model: paddle.nn.Layer
    implementation: str
    precision: str = 'fp32'

    def save(self, folder, size):
        """Writes the program into a folder for inputs of `size` (H, W), None for any; returns the new files."""
        before = set(os.listdir(folder))
        save_paddle_program(self.model, os.path.join(folder, self.name), size, self.implementation)
        return sorted(set(os.listdir(folder)) - before)

    def load(self, folder, threads):
        """The saved program as a function of images."""
        return load_paddle_program(os.path.join(folder, self.name), threads)


@dataclass(frozen=True)
class OnnxProgram:
    """An ONNX file; attributes and methods are those of `PaddleProgram`."""
    model: paddle.nn.Layer
    name: str = 'model.onnx'
    needs: str = 'standard operators of ONNX'
    precision: str = 'fp32'

    def save(self, folder, size):
        write_onnx(self.model, os.path.join(folder, self.name), size)
        return [self.name]

    def load(self, folder, threads):
        return load_onnx_program(os.path.join(folder, self.name), threads)


@dataclass(frozen=True)
class OnnxInt8Program(OnnxProgram):
    """An ONNX file whose 1x1 convolutions are in int8; attributes are those of `PaddleProgram`, and:

    Attributes:
        layers: names of these convolutions.
        batches: arrays of images to calibrate on.
    """
    name: str = 'model_int8.onnx'
    precision: str = 'int8'
    layers: Tuple[str, ...] = ()
    batches: Tuple[np.ndarray, ...] = ()

    def save(self, folder, size):
        with tempfile.TemporaryDirectory() as scratch:
            source = os.path.join(scratch, 'model.onnx')
            write_onnx(self.model, source, size)
            write_onnx_int8(source, os.path.join(folder, self.name), self.layers, self.batches)
        return [self.name]


def _programs(twin, options, quantised, rounding):
    """Yields the programs to export; the packed copy of the model exists only while its program is in use.

    Args:
        quantised: {name of a convolution: Quantised} of those in int8, or None.
        rounding: `deploy.rounding.Rounding`, or None for float32.
    """
    def traced(model):
        return WithFeatures(model) if options.features else model

    if 'paddle' in options.formats:
        wide = fastest_precision() if options.precision == 'int8' else options.precision
        try:
            load_operator()
        except BuildError as error:
            print(f'`model` is not exported, because the operator is not available: {error}', file=sys.stderr)
        else:
            yield PaddleProgram('model', 'large_kernel.load_operator() before it is loaded',
                                traced(pack(copy.deepcopy(twin), wide, quantised)), 'custom', options.precision)
        yield PaddleProgram('model_native', 'standard operators of Paddle', traced(twin), 'native')
    if 'onnx' in options.formats:
        yield OnnxProgram(twin)
    if 'onnx-int8' in options.formats:
        yield OnnxInt8Program(twin, layers=tuple(quantised), batches=rounding.calibration)


# ---- the comparison

class Comparison:
    """Checks other forms of a model against it. A difference over the tolerance raises CertificateError."""

    def __init__(self, model, images, options, original):
        self._model, self._batches, self._tolerance = model, images.batches, options.tolerance
        self._expected = [original(batch) for batch in images.batches]
        if not all(np.isfinite(values).all() for values in self._expected):
            raise CertificateError("nothing is exported: the original model's logits are not finite; check its weights")

    def check_groups(self, twin):
        """Entry of the certificate for each group of layers of another form of the model."""
        groups = compare_groups(self._model, twin, self._batches)
        self._check({name: difference.relative for name, difference in groups.items()})
        return {name: {'max_difference': float(d.largest), 'mean_difference': float(d.mean),
                       'largest_value': float(d.scale)} for name, d in groups.items()}

    def check_program(self, name, run):
        """Differences of a program, a function of images, for its entry of the certificate."""
        logits, features, agreement = compare_outputs(self._expected, run, self._batches, self._model.num_classes)
        self._check({f'logits of {name}': logits.largest, f'features of {name}': features.relative})
        return {'precision': 'fp32', 'max_difference': float(logits.largest), 'mean_difference': float(logits.mean),
                'top1_agreement': agreement}

    def _check(self, differences):
        worst = max(differences, key=lambda name: np.nan_to_num(differences[name], nan=np.inf))
        if not differences[worst] <= self._tolerance:
            raise CertificateError(f'nothing is exported: {worst} differs from the original by '
                                   f'{differences[worst]:.2g}, over the tolerance of {self._tolerance:g}')


def table(certificate):
    """The certificate as lines of text."""
    lines = [f"{certificate['model']}, {certificate['form']} form, compared with the {certificate['before']['form']} "
             f"form on {certificate['compared_on']}", '',
             f"{'layers':16}{'max difference':>16}{'mean':>12}{'largest value':>16}"]
    lines += [f"{name:16}{g['max_difference']:16.1e}{g['mean_difference']:12.1e}{g['largest_value']:16.3g}"
              for name, g in certificate['groups'].items()]
    lines += ['', f"{'program':16}{'max difference':>16}{'mean':>12}{'same top-1':>12}{'MB':>8}{'ms':>9}"]
    lines += [f"{name:16}{p['max_difference']:16.1e}{p['mean_difference']:12.1e}{p['top1_agreement']:12.1%}"
              f"{p['bytes'] / 1e6:8.1f}{p['latency_ms']:9.1f}" for name, p in certificate['programs'].items()]
    lines += ['', f"{'in Python':16}{'parameters':>16}{'GMACs':>12}{'':12}{'MB':>8}{'ms':>9}"]
    lines += [f"{name:16}{c['parameters']:16,}{c['gmacs']:12.3f}{'':12}{c['bytes'] / 1e6:8.1f}{c['latency_ms']:9.1f}"
              for name, c in (('before', certificate['before']), ('after', certificate['after']))]
    return '\n'.join(lines + rounding_table(certificate))


def main():
    config, arguments = read_arguments()
    paddle.set_device('cpu')
    utils.setup_logging(verbose=False)
    try:
        certificate = export(config, **arguments)
    except CertificateError as error:
        print(error, file=sys.stderr)
        return 1
    except Interrupted as error:
        raise Interrupted(error.signal, f'{error}; nothing is exported') from None
    print(table(certificate))
    print(f"\nwritten to {arguments['output']}; these figures are in its {CERTIFICATE}")
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
