"""Exports a trained model for use elsewhere, with a certificate that it is the same function.

    python export.py -pretrained=replknet_31b_1k_224 -output=export/31b            # or a run folder, or a checkpoint
    python export.py -cfg=./configs/replknet_31b.yaml -pretrained=W.pdparams -output=export/31b -format=paddle,onnx
    python export.py -pretrained=output/RUN -output=export/run -form=merged -dynamic

The folder gets `model`, a program that runs the large-kernel operator, `model_native`, one of standard operators only,
with `-format=onnx` `model.onnx`, and `certificate.json`. A program that differs from the training form by more than
the tolerance ends with status 1 and leaves nothing. docs/export.md says how to use what is written.
"""
import paddle_env  # noqa: I001 - sets the environment, so before paddle

import copy
import json
import os
import platform
import shutil
import sys
import tempfile
from argparse import ArgumentTypeError

import numpy as np
import paddle
from PIL import Image

import utils
from deploy.equivalence import compare_groups, compare_outputs, dygraph_program, latency_ms, multiply_accumulates
from config import config_text, get_config
from datasets import decode_image, get_dataset, get_transform
from errors import ArgumentParser, UserError
from fuse import WithFeatures, in_form, is_merged, pack
from large_kernel import load_operator
from large_kernel.build import OPERATORS, BuildError
from errors import exit_status
from deploy.onnx_graph import write_onnx
from deploy.runtimes import load_onnx_program, load_paddle_program, save_paddle_program
from zoo import build_model, pretrained_weights, settings_file
from run_folder.layout import find_classes
from run_folder.metrics import best_checkpoint

FORMS = ('fused', 'merged', 'training')
FORMATS = ('paddle', 'onnx')
CERTIFICATE, CONFIG = 'certificate.json', 'config.yaml'
IMAGES = 8  # pictures, and as many of random numbers
BATCH = 4


class CertificateError(RuntimeError):
    """What would be exported is not the same function; the text names the worst part."""


def read_arguments(argv=None):
    """Settings and the arguments of `export`, from the command line."""
    parser = ArgumentParser(__doc__)

    def add(flag, to=parser, **options):
        to.add_argument(f'-{flag}', f'--{flag}', **options)

    add('cfg', metavar='FILE', help='YAML file of settings; not needed with a run, its checkpoints and the zoo')
    add('pretrained', metavar='X', help='weights: a name of the zoo, a file, or a run folder for its best checkpoint')
    add('output', metavar='DIR', required=True, help='folder to write')
    add('form', choices=FORMS, default='fused', help='fused (default): no batch norm is left; merged: the small '
        'kernels are merged into the large ones; training: as it is')
    add('format', type=_formats, default=['paddle'], metavar='X,Y', help='paddle (default), onnx, or both')
    add('features', action='store_true', help='let the program give the pooled features behind the logits, '
        '[N, classes + C], for predict.py -features')
    size = parser.add_mutually_exclusive_group()
    add('image_size', size, type=int, metavar='N', help='side of the input, pixels (DATA.IMAGE_SIZE)')
    add('dynamic', size, action='store_true', help='leave height and width free')
    add('tolerance', type=float, default=1e-4, help='largest difference of a logit, and of a feature map over its '
        'largest value (default 1e-4)')
    add('pictures', metavar='DIR', help='pictures to compare on, instead of those of the validation list')
    add('data_path', metavar='DIR', help='data folder, for its validation list (DATA.DATA_PATH)')
    add('overwrite', action='store_true', help='replace an export in the output folder')
    add('opts', nargs='+', default=[], metavar='KEY VALUE', help='any key of config.py')
    args = vars(parser.parse_args(argv))
    if args['pretrained'] and os.path.isdir(args['pretrained']):
        args['pretrained'] = best_checkpoint(args['pretrained'])
    cfg = args.pop('cfg') or settings_file(args['pretrained'])
    if not cfg:
        raise UserError('-cfg is missing: name a file of settings, such as -cfg=./configs/replknet_31b.yaml')
    config = get_config(cfg, args.pop('opts'), {
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


def export(config, output, form='fused', formats=('paddle',), dynamic=False, tolerance=1e-4, pictures=None,
           overwrite=False, features=False):
    """Writes the programs and the certificate of a model into a new folder, all or nothing.

    Args:
        config: settings of the model, its weights and its pictures, with EVAL on.
        output, form, formats, dynamic, tolerance, pictures, overwrite, features: see `read_arguments`.
    Returns:
        the certificate, a dict.
    Raises:
        CertificateError: a difference to the training form is over the tolerance.
        UserError, FileNotFoundError: what the user gave cannot be used.
    """
    output = os.path.abspath(output)
    parent, name = os.path.split(output)
    if os.path.exists(output):
        if not overwrite:
            raise UserError(f'-output={output}: exists; name another folder, or replace an export with -overwrite')
        if not os.path.isfile(os.path.join(output, CERTIFICATE)):
            raise UserError(f'-output={output}: holds no {CERTIFICATE}; -overwrite replaces exports only')
    if features and 'onnx' in formats:
        raise UserError('-features: goes with -format=paddle; the ONNX file holds logits only')
    model = build_model(config, *pretrained_weights(config.MODEL.PRETRAINED))
    model.eval()
    twin = in_form(model, form, final_norm=features)
    size = config.DATA.IMAGE_SIZE
    batches, compared_on = _images(config, pictures, dynamic)
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{name}.', dir=parent) as scratch:
            folder = os.path.join(scratch, 'new')
            os.mkdir(folder)
            certificate = _write(folder, config, model, twin, form, formats, None if dynamic else (size, size),
                                 tolerance, batches, compared_on, features)
            if os.path.exists(output):
                os.rename(output, os.path.join(scratch, 'old'))
            os.rename(folder, output)
    except OSError as error:
        raise UserError(f'-output={output}: cannot be written: {error.strerror}') from None
    return certificate


def _images(config, pictures, dynamic):
    """Batches of preprocessed pictures and of random numbers, and a line that says which."""
    transform, size = get_transform(config, 'val'), config.DATA.IMAGE_SIZE
    rng = np.random.default_rng(0)
    listed = os.path.join(config.DATA.DATA_PATH, 'val_list.txt')
    if pictures:
        if not os.path.isdir(pictures):
            raise FileNotFoundError(f'-pictures={pictures}: no such folder')
        names = sorted(os.listdir(pictures))
        images = [transform(decode_image(os.path.join(pictures, names[i]))) for i in _spread(len(names))]
        source = pictures
    elif config.DATA.DATA_PATH and os.path.isfile(listed):
        dataset = get_dataset(config, 'val')
        images, source = [dataset[i][0] for i in _spread(len(dataset))], listed
    else:
        images, source = [transform(_generated_picture(rng)) for _ in range(IMAGES)], 'generated'
    if not images:
        raise UserError(f'-pictures={pictures}: the folder is empty')
    sizes = [(size, size)] + [(size + 13, size + 37)] * dynamic
    arrays = [np.stack(images), *(rng.standard_normal((IMAGES, 3, *s)).astype('float32') for s in sizes)]
    batches = [array[i:i + BATCH] for array in arrays for i in range(0, len(array), BATCH)]
    return batches, f'{len(images)} pictures ({source}) and {IMAGES * len(sizes)} of random numbers'


def _spread(count):
    return np.linspace(0, count - 1, min(count, IMAGES)).astype(int)


def _generated_picture(rng, height=320, width=400):
    """Random colours whose spectrum falls as that of photographs, with 1 / frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((2, 3, *frequency.shape))
    pixels = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency, (height, width))
    pixels = 128 + 48 * pixels / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype('uint8').transpose(1, 2, 0))


def _write(folder, config, model, twin, form, formats, size, tolerance, batches, compared_on, features):
    """Writes programs and certificate into `folder`; see `export`."""
    threads = paddle_env.set_threads()
    before, one = dygraph_program(WithFeatures(model) if features else model), batches[0][:1]
    expected = [before(images) for images in batches]
    groups = compare_groups(model, twin, batches)
    _refuse_over(tolerance, {name: d.largest / (d.scale or 1) for name, d in groups.items()})
    costs = {'before': {'form': 'merged' if is_merged(model) else 'training', **_costs(model, config, one)},
             'after': {'form': form, **_costs(twin, config, one)}}
    programs = {}
    for name, write, load, needs in _programs(twin, formats, size, threads, features):
        path = os.path.join(folder, name)
        already = set(os.listdir(folder))
        write(path)
        files = sorted(set(os.listdir(folder)) - already)
        program = load(path)
        difference, of_features, agreement = compare_outputs(expected, program, batches, model.num_classes)
        _refuse_over(tolerance, {f'logits of {name}': difference.largest,
                                 f'features of {name}': of_features.largest / (of_features.scale or 1)})
        programs[name] = {'files': files, 'needs': needs, 'max_difference': float(difference.largest),
                          'mean_difference': float(difference.mean), 'top1_agreement': agreement,
                          'bytes': sum(os.path.getsize(os.path.join(folder, file)) for file in files),
                          'latency_ms': latency_ms(program, one)}
        del program
    certificate = {
        'model': config.MODEL.NAME, 'weights': config.MODEL.PRETRAINED, 'form': form,
        'features': features, 'image_size': list(size) if size else 'dynamic', 'tolerance': tolerance,
        'compared_on': compared_on,
        'groups': {name: {'max_difference': float(d.largest), 'mean_difference': float(d.mean),
                          'largest_value': float(d.scale)} for name, d in groups.items()},
        'programs': programs, **costs,
        'operators': OPERATORS, 'environment': {'paddle': paddle.__version__, 'threads': threads,
                        'processor': paddle_env.cpu_info().get('model name', platform.machine())}}
    with open(os.path.join(folder, CERTIFICATE), 'w', encoding='utf-8') as file:
        json.dump(certificate, file, indent=2)
    with open(os.path.join(folder, CONFIG), 'w', encoding='utf-8') as file:
        file.write(config_text(config))
    classes = find_classes(os.path.dirname(config.MODEL.PRETRAINED), config.DATA.DATA_PATH)
    if classes:
        shutil.copy(classes, folder)
    return certificate


def _refuse_over(tolerance, measured):
    worst = max(measured, key=lambda name: np.nan_to_num(measured[name], nan=np.inf))
    if not measured[worst] <= tolerance:
        raise CertificateError(f'nothing is exported: {worst} differs from the original by '
                               f'{measured[worst]:.2g}, over the tolerance of {tolerance:g}')


def _programs(twin, formats, size, threads, features):
    """(name, function that writes it to a path, function that loads it, what it needs to run) of each program."""
    def save(model, implementation):
        return lambda path: save_paddle_program(WithFeatures(model) if features else model, path, size, implementation)

    if 'paddle' in formats:
        def load(path):
            return load_paddle_program(path, threads)
        try:
            load_operator()
            yield ('model', save(pack(copy.deepcopy(twin)), 'custom'), load,
                   'large_kernel.load_operator() before it is loaded')
        except BuildError as error:
            print(f'without `model`, which runs the operator: {error}', file=sys.stderr)
        yield 'model_native', save(twin, 'native'), load, 'standard operators of Paddle'
    if 'onnx' in formats:
        yield ('model.onnx', lambda path: write_onnx(twin, path, size), lambda path: load_onnx_program(path, threads),
               'standard operators of ONNX')


def _costs(model, config, one):
    size = config.DATA.IMAGE_SIZE
    return {'parameters': model.num_parameters(), 'gmacs': multiply_accumulates(model, size, size) / 1e9,
            'bytes': sum(4 * tensor.size for tensor in model.state_dict().values()),
            'latency_ms': latency_ms(dygraph_program(model), one)}


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
    return '\n'.join(lines)


def main():
    config, arguments = read_arguments()
    paddle.set_device('cpu')
    utils.setup_logging(verbose=False)
    try:
        certificate = export(config, **arguments)
    except CertificateError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(certificate))
    print(f"\nwritten to {arguments['output']}; {CERTIFICATE} there holds these figures")
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
