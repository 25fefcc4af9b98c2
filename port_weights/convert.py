"""Converts RepLKNet weights between PyTorch, safetensors and Paddle, and accounts for every tensor.

    python port_weights/convert.py RepLKNet-31B_ImageNet-1K_224.pth weights/replknet_31b_1k_224.safetensors -verify
    python port_weights/convert.py output/run/best.pdparams replknet_31b.pth -key=model_ema   # back to PyTorch

SRC is a .pth file of the official code, of mmpretrain, or of a detector or segmentor; a .safetensors file with any of
these names; or a .pdparams file of this project or of the earlier Paddle port. Its content decides, not its extension.
The extension of DST selects the format: .safetensors (the default without an extension) or .pdparams (for
`paddle.load`), both with this project's names, or .pth with the official ones. A missing, surplus or misshapen tensor
is an error, and then nothing is written.
"""
import contextlib
import os
import sys
import zipfile
from dataclasses import dataclass, field
from typing import Dict, List, Optional

import numpy as np

if not __package__:  # run as a script
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import paddle_env  # noqa: E402, F401 - before paddle, which -verify imports
from atomic_file import atomic_file  # noqa: E402
from errors import ArgumentParser, CheckpointError, Interrupted, exit_status  # noqa: E402
from port_weights import names as naming  # noqa: E402
from port_weights.safe_load import find_weights, read_checkpoint  # noqa: E402
from port_weights.writers import write_paddle, write_safetensors, write_torch  # noqa: E402

_WRITERS = {'.safetensors': write_safetensors, '.pdparams': write_paddle, '.pth': write_torch}
_NAMES = {'.pdparams': 'paddle', '.pth': 'official'}  # .safetensors files have either


@dataclass(frozen=True)
class Options:
    """Settings of `convert`.

    Attributes:
        model: variant that the weights must belong to, such as 'replknet_31b'; None accepts any.
        num_classes: number of outputs that their head must have; None accepts any.
        key: entry of the file that holds the weights, see `safe_load.find_weights`.
        head: the head to keep if there are several, 'none' for none.
        names: 'paddle' for this project's names, 'official' for PyTorch's, 'auto' for official ones in .pth only.
        verify: load the result into the Paddle model, run it, and convert to the official names and back.
        reference: .npz file with logits to compare with, see `_check_reference`; implies `verify`.
        report: text file to list every tensor in, which is also written in case of an error.
    """
    model: Optional[str] = None
    num_classes: Optional[int] = None
    key: str = 'auto'
    head: Optional[str] = None
    names: str = 'auto'
    verify: bool = False
    reference: Optional[str] = None
    report: Optional[str] = None


@dataclass
class Report:
    """What became of every tensor.

    Attributes:
        key: entry of the file that the weights were taken from, or None.
        variant: published variant they belong to, such as 'replknet_31b', or None.
        architecture: arguments of `RepLKNet`.
        half: whether any of the weights were stored as float16.
        mapped: {name here: name in the source}; dropped: {name in the source: reason}.
        missing: names here; surplus: names in the source; misshapen: descriptions. All are empty in a valid conversion.
        checks: what was verified, one line each.
    """
    key: Optional[str]
    variant: Optional[str]
    architecture: dict
    half: bool
    mapped: Dict[str, str]
    dropped: Dict[str, str]
    missing: List[str]
    surplus: List[str]
    misshapen: List[str]
    checks: List[str] = field(default_factory=list)

    def problems(self):
        """The tensors that do not fit, in one line; '' if there are none."""
        return '; '.join(f'{len(items)} {kind}: {", ".join(items[:4])}'
                         + (', ... (-report=FILE lists them)' if len(items) > 4 else '')
                         for kind, items in (('missing', self.missing), ('surplus', self.surplus),
                                             ('of the wrong shape', self.misshapen)) if items)

    def listing(self):
        """All tensors, one line each."""
        return [*(f'mapped     {source} -> {name}' for name, source in self.mapped.items()),
                *(f'dropped    {source}: {reason}' for source, reason in self.dropped.items()),
                *(f'missing    {name}' for name in self.missing), *(f'surplus    {name}' for name in self.surplus),
                *(f'misshapen  {text}' for text in self.misshapen)]

    def summary(self):
        """The model and the number of tensors, in a few lines."""
        a = self.architecture
        form = 'merged' if a['merged'] else 'training'
        reasons = sorted(set(self.dropped.values()))
        counts = ', '.join(f'{list(self.dropped.values()).count(reason)} dropped ({reason})' for reason in reasons)
        return [f"{self.variant or 'RepLKNet of a custom size'}, {form} form, "
                + (f"{a['num_classes']} classes" if a['num_classes'] else 'no head')
                + (f', weights under {self.key!r}' if self.key else ''),
                f"layers {a['layers']}, channels {a['channels']}, large kernels {a['large_kernel_sizes']}, "
                + ('' if a['merged'] else f"small kernel {a['small_kernel'] or 'none'}, ")
                + f"dw_ratio {a['dw_ratio']:g}, ffn_ratio {a['ffn_ratio']:g}",
                f'{len(self.mapped)} tensors mapped' + (f', {counts}' if counts else ''), *self.checks]


def convert(source, destination, **options):
    """Converts a file of weights.

    Args:
        source: file name.
        destination: file name; its extension selects the format, none means .safetensors.
        options: see `Options`.
    Returns:
        Report.
    Raises:
        CheckpointError: something does not fit; then no file is written.
        FileNotFoundError: `source` or the folder of `destination` does not exist.
    """
    options = Options(**options)
    root, extension = os.path.splitext(destination)
    if not extension:
        destination, extension = f'{destination}.safetensors', '.safetensors'
    if extension not in _WRITERS:
        raise CheckpointError(f'{destination}: unknown extension; use {", ".join(_WRITERS)}')
    only = _NAMES.get(extension)
    if only and options.names not in ('auto', only):
        raise CheckpointError(f'{destination}: {extension} is written with {only} names only')
    official = (only or options.names) == 'official'
    if os.path.exists(destination) and os.path.exists(source) and os.path.samefile(source, destination):
        raise CheckpointError(f'{destination}: is the source itself')
    if not os.path.isdir(os.path.dirname(os.path.abspath(destination))):
        raise FileNotFoundError(f'{os.path.dirname(destination)}: no such folder')

    tensors, report = _load(source, options)
    if options.report:
        with atomic_file(options.report) as file:
            file.write('\n'.join([*report.summary(), *report.listing(), '']).encode(errors='backslashreplace'))
    if report.problems():
        raise CheckpointError(f'{source}: {report.problems()}; nothing was written')
    with atomic_file(destination) as file:
        _WRITERS[extension](file, naming.official_names(tensors) if official else tensors)
        if options.verify or options.reference is not None:
            file.flush()
            report.checks += _verify(file.name, tensors, report, options.reference, source)
    return report


def _load(source, options):
    """Tensors with this project's names, and their Report."""
    state, key = find_weights(read_checkpoint(source), options.key, source)
    half = any(array.dtype == np.float16 for array in state.values())
    try:
        mapping = naming.map_names(state, options.head)
        del state  # the arrays that were converted to float32 are no longer needed
        architecture = naming.infer_architecture(mapping.tensors)
        expected = naming.expected_shapes(architecture)
    except CheckpointError as error:
        raise CheckpointError(f'{source}: {error}') from None
    variant, classes = naming.variant_name(architecture), architecture['num_classes']
    if options.model not in (None, variant):
        raise CheckpointError(f"{source}: is {variant or 'of a custom size'}, not {options.model}: layers "
                              f"{architecture['layers']}, channels {architecture['channels']}, large kernels "
                              f"{architecture['large_kernel_sizes']}")
    if options.num_classes not in (None, classes):
        raise CheckpointError(f"{source}: is for {classes or 'no'} classes, not {options.num_classes}")
    tensors, sources = mapping.tensors, mapping.sources
    fits = {name: tensors[name].shape == shape for name, shape in expected.items() if name in tensors}
    return tensors, Report(
        key=key, variant=variant, architecture=architecture, half=half,
        mapped={name: sources[name] for name, fit in fits.items() if fit}, dropped=mapping.dropped,
        missing=[name for name in expected if name not in tensors],
        surplus=[sources[name] for name in tensors if name not in expected],
        misshapen=[f'{sources[name]} {list(tensors[name].shape)}, not {list(expected[name])}'
                   for name, fit in fits.items() if not fit])


def _verify(written, tensors, report, reference, source):
    """Checks the written file: its tensors are those of the source, and the model loads and runs.

    Returns:
        what was verified, one line each.
    Raises:
        CheckpointError: a check failed.
    """
    import paddle

    from port_weights.load import load_weights
    from replknet import RepLKNet
    back = naming.map_names(find_weights(read_checkpoint(written))[0]).tensors
    again = naming.map_names(naming.official_names(back)).tensors
    for other in (back, again):
        if set(other) != set(tensors) or any(
                tensors[name].tobytes() != other[name].tobytes() for name in tensors):
            raise CheckpointError(f'{source}: the written tensors differ from the source; nothing was written')
    lines = ['verified: the written tensors and a round trip through the official names are identical bit by bit']
    model = RepLKNet(**report.architecture)
    load_weights(model, back, source)
    model.eval()
    images = np.random.RandomState(0).standard_normal((1, report.architecture['in_channels'], 64, 64))
    with paddle.no_grad():
        outputs = model(paddle.to_tensor(images.astype(np.float32)))
    for output in outputs if isinstance(outputs, list) else [outputs]:
        if not np.isfinite(output.numpy()).all():
            raise CheckpointError(f'{source}: the outputs of the model are not finite; nothing was written')
    lines.append('verified: loads strictly, outputs are finite')
    if reference is not None:
        lines.append(_check_reference(model, reference, report, source))
    return lines


def _check_reference(model, reference, report, source):
    """Compares the model's logits with those in the .npz file `reference`.

    The logits [N, classes] are its array 'logits', or one named like the source file without its extension, followed
    by '_' and the key if the source has several sets of weights. The images [N, 3, H, W] are its array 'input', or the
    file input.npy in the same folder.
    """
    import paddle
    if model.num_classes is None:
        raise CheckpointError(f'{source}: has no head, so there are no logits to compare with {reference}')
    stem = os.path.splitext(os.path.basename(source))[0]
    try:
        arrays = dict(np.load(reference, allow_pickle=False).items())
        images = arrays['input'] if 'input' in arrays else np.load(
            os.path.join(os.path.dirname(reference), 'input.npy'), allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error.filename}: no such file') from None
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile):
        raise CheckpointError(f'{reference}: is not an .npz file of logits') from None
    wanted = next((arrays[name] for name in ('logits', f'{stem}_{report.key}', stem) if name in arrays), None)
    if wanted is None:
        raise CheckpointError(f"{reference}: has neither 'logits' nor {stem!r}")
    with paddle.no_grad():
        logits = model(paddle.to_tensor(images.astype(np.float32))).numpy()
    if logits.shape != wanted.shape:
        raise CheckpointError(f'{reference}: its logits have shape {list(wanted.shape)}, those of the model '
                              f'{list(logits.shape)}')
    difference, limit = float(np.abs(logits - wanted).max()), 2e-3 if report.half else 1e-4
    if not difference <= limit:
        raise CheckpointError(f'{source}: logits differ from {reference} by {difference:.2g}, more than {limit:g}; '
                              'nothing was written')
    return f'verified: logits agree with {reference} to {difference:.2g}'


def main(argv=None):
    """Runs the command line; returns the exit status."""
    return exit_status(_run, argv)


def _run(argv):
    parser = ArgumentParser(__doc__.split('\n')[0])
    parser.add_argument('source', metavar='SRC')
    parser.add_argument('destination', metavar='DST', help='.safetensors, .pdparams or .pth')
    parser.add_argument('-model', '--model', metavar='NAME', help='variant that SRC must be, such as replknet_31b')
    parser.add_argument('-key', '--key', default='auto', help='model, model_ema, state_dict, another entry, or auto')
    parser.add_argument('-head', '--head', metavar='NAME', help='head to keep if there are several, or none')
    parser.add_argument('-names', '--names', choices=('auto', 'paddle', 'official'), default='auto',
                        help='names to write; auto: official in .pth, else those of this project')
    parser.add_argument('-verify', '--verify', action='store_true', help='load and run the result')
    parser.add_argument('-reference', '--reference', metavar='NPZ', help='compare with these logits; implies -verify')
    parser.add_argument('-report', '--report', metavar='FILE', help='list what became of every tensor')
    args = parser.parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Paddle prints notes
            report = convert(**vars(args))
    except Interrupted as error:
        raise Interrupted(error.signal, f'{error}; nothing was written') from None
    print('\n'.join(report.summary()))


if __name__ == '__main__':
    sys.exit(main())
