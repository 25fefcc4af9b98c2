"""Converts RepLKNet weights between PyTorch, safetensors and Paddle, and proves that nothing was lost.

    python port_weights/convert.py RepLKNet-31B_ImageNet-1K_224.pth weights/replknet_31b_1k_224.safetensors -verify
    python port_weights/convert.py output/run/best.pdparams replknet_31b.pth -key=model_ema   # back to PyTorch

SRC may be any of: .pth of the official code, mmpretrain, a detector or segmentor; .safetensors with any of these
names; .pdparams of this project or of the earlier Paddle port. Its content tells which, not its extension. The
extension of DST chooses what is written: .safetensors (also without extension), .pdparams (for `paddle.load`), both
with this project's names, or .pth with the official ones. Every tensor of SRC is accounted for; a missing, surplus or
misshapen one is an error, and then nothing is written.
"""
import contextlib
import os
import sys
import zipfile
from dataclasses import dataclass
from typing import Dict, List, Optional

import numpy as np

if not __package__:  # run as a script
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import paddle_env  # noqa: E402, F401 - before paddle, which -verify imports
from atomic_file import atomic_file  # noqa: E402
from errors import (  # noqa: E402
    ArgumentParser,
    CheckpointError,  # noqa: E402
    UserError,
)
from port_weights import names as naming  # noqa: E402
from port_weights.safe_load import find_weights, read_checkpoint  # noqa: E402
from port_weights.writers import write_paddle, write_safetensors, write_torch  # noqa: E402

_WRITERS = {'.safetensors': write_safetensors, '.pdparams': write_paddle, '.pth': write_torch}


@dataclass
class Report:
    """What became of every tensor.

    Attributes:
        key: entry of the file that the weights were taken from, or None.
        variant: published variant they belong to, such as 'replknet_31b', or None.
        architecture: arguments of `RepLKNet`.
        mapped: {name here: name in the source}; dropped: {name in the source: reason}.
        missing: names here; surplus: names in the source; misshapen: descriptions. All empty in a good conversion.
        checks: what was verified, a line each.
    """
    key: Optional[str]
    variant: Optional[str]
    architecture: dict
    mapped: Dict[str, str]
    dropped: Dict[str, str]
    missing: List[str]
    surplus: List[str]
    misshapen: List[str]
    checks: List[str]

    def problems(self):
        """One line, or '' when all tensors fit."""
        return '; '.join(f'{len(items)} {kind}: {", ".join(items[:4])}'
                         + (', ... (-report=FILE lists them)' if len(items) > 4 else '')
                         for kind, items in (('missing', self.missing), ('surplus', self.surplus),
                                             ('of a wrong shape', self.misshapen)) if items)

    def listing(self):
        """All tensors, a line each."""
        return [*(f'mapped     {source} -> {name}' for name, source in self.mapped.items()),
                *(f'dropped    {source}: {reason}' for source, reason in self.dropped.items()),
                *(f'missing    {name}' for name in self.missing), *(f'surplus    {name}' for name in self.surplus),
                *(f'misshapen  {text}' for text in self.misshapen)]

    def summary(self):
        """What the model is and what became of the tensors, a few lines."""
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


def convert(source, destination, model=None, key='auto', head=None, names='auto', verify=False, reference=None,
            report=None, num_classes=None):
    """Converts one file of weights.

    Args:
        source, destination: file names; the extension of `destination` chooses the format, none: .safetensors.
        model, num_classes: variant the weights must be of, such as 'replknet_31b', and outputs of their head.
        key: entry of the file with the weights, see `safe_load.find_weights`.
        head: which of several heads to keep, 'none' for none.
        names: 'paddle' for this project's names, 'official' for PyTorch's, 'auto': official in .pth.
        verify: load the result into the Paddle model, run it, and go to the official names and back.
        reference: .npz with logits of the source's model to compare with, see `_check_reference`; implies `verify`.
        report: text file for the fate of every tensor, written in case of an error too.
    Returns:
        Report.
    Raises:
        CheckpointError: anything that does not fit; no file is written then.
        FileNotFoundError: no such source.
    """
    root, extension = os.path.splitext(destination)
    if not extension:
        destination, extension = f'{destination}.safetensors', '.safetensors'
    if extension not in _WRITERS:
        raise CheckpointError(f'{destination}: unknown kind of file; use {", ".join(_WRITERS)}')
    only = {'.pdparams': 'paddle', '.pth': 'official'}.get(extension)
    if names not in ('auto', only) and only:
        raise CheckpointError(f'{destination}: {extension} is written with {only} names only')
    official = (only or names) == 'official'
    if os.path.exists(destination) and os.path.exists(source) and os.path.samefile(source, destination):
        raise CheckpointError(f'{destination}: is the source itself')
    if not os.path.isdir(os.path.dirname(os.path.abspath(destination))):
        raise FileNotFoundError(f'{os.path.dirname(destination)}: no such folder')

    tensors, result, half = _load(source, model, num_classes, key, head)
    if report:
        with open(report, 'w', encoding='utf-8') as file:
            file.write('\n'.join([*result.summary(), *result.listing(), '']))
    if result.problems():
        raise CheckpointError(f'{source}: {result.problems()}; nothing was written')
    with atomic_file(destination) as file:
        _WRITERS[extension](file, naming.official_names(tensors) if official else tensors)
        if verify or reference is not None:
            file.flush()
            result.checks += _verify(file.name, tensors, result, reference, half, source)
    return result


def _load(source, model, num_classes, key, head):
    """Tensors by this project's names, their Report, and whether any was of half precision."""
    state, found = find_weights(read_checkpoint(source), key, source)
    half = any(array.dtype == np.float16 for array in state.values())
    try:
        mapping = naming.map_names(state, head)
        del state
        architecture = naming.infer_architecture(mapping.tensors)
        expected = naming.expected_shapes(architecture)
    except CheckpointError as error:
        raise CheckpointError(f'{source}: {error}') from None
    variant = naming.variant_name(architecture)
    if model is not None and model != variant:
        raise CheckpointError(f"{source}: is {variant or 'of a custom size'}, not {model}: layers "
                              f"{architecture['layers']}, channels {architecture['channels']}, large kernels "
                              f"{architecture['large_kernel_sizes']}")
    if num_classes is not None and num_classes != architecture['num_classes']:
        raise CheckpointError(f"{source}: is for {architecture['num_classes'] or 'no'} classes, not {num_classes}")
    tensors, sources = mapping.tensors, mapping.sources
    result = Report(
        found, variant, architecture, {}, mapping.dropped, [name for name in expected if name not in tensors],
        [sources[name] for name in tensors if name not in expected],
        [f'{sources[name]} {list(tensors[name].shape)}, not {list(shape)}' for name, shape in expected.items()
         if name in tensors and tensors[name].shape != shape], [])
    result.mapped.update({name: sources[name] for name, shape in expected.items()
                          if name in tensors and tensors[name].shape == shape})
    return tensors, result, half


def _verify(written, tensors, report, reference, half, source):
    """Checks the written file: loads strictly, runs, survives a round trip. Returns lines; raises CheckpointError."""
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
            raise CheckpointError(f'{source}: the model gives outputs that are not finite; nothing was written')
    lines.append('verified: loads strictly, outputs are finite')
    if reference is not None:
        lines.append(_check_reference(model, reference, report.key, half, source))
    return lines


def _check_reference(model, reference, key, half, source):
    """Compares the model's logits with those in the .npz file `reference`.

    They stand under 'logits', or under the source's file name without extension (and '_' and the key, where there are
    several sets of weights); the images [N, 3, H, W] under 'input', or in input.npy beside the file.
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
    wanted = next((arrays[name] for name in ('logits', f'{stem}_{key}', stem) if name in arrays), None)
    if wanted is None:
        raise CheckpointError(f"{reference}: has neither 'logits' nor {stem!r}")
    with paddle.no_grad():
        logits = model(paddle.to_tensor(images.astype(np.float32))).numpy()
    if logits.shape != wanted.shape:
        raise CheckpointError(f'{reference}: logits of shape {list(wanted.shape)}, the model gives '
                              f'{list(logits.shape)}')
    difference, limit = float(np.abs(logits - wanted).max()), 2e-3 if half else 1e-4
    if not difference <= limit:
        raise CheckpointError(f'{source}: logits differ from {reference} by {difference:.2g}, more than {limit:g}; '
                              'nothing was written')
    return f'verified: logits agree with {reference} to {difference:.2g}'


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = ArgumentParser(__doc__.split('\n')[0])
    parser.add_argument('source', metavar='SRC')
    parser.add_argument('destination', metavar='DST', help='.safetensors, .pdparams or .pth')
    parser.add_argument('-model', '--model', metavar='NAME', help='variant it must be, such as replknet_31b')
    parser.add_argument('-key', '--key', default='auto', help='model, model_ema, state_dict, another entry, or auto')
    parser.add_argument('-head', '--head', metavar='NAME', help='head to keep where there are several, or none')
    parser.add_argument('-names', '--names', choices=('auto', 'paddle', 'official'), default='auto',
                        help='names to write; auto: official in .pth, else those of this project')
    parser.add_argument('-verify', '--verify', action='store_true', help='load and run the result')
    parser.add_argument('-reference', '--reference', metavar='NPZ', help='logits to compare with; implies -verify')
    parser.add_argument('-report', '--report', metavar='FILE', help='write what became of every tensor')
    args = parser.parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Paddle's notes
            result = convert(args.source, args.destination, args.model, args.key, args.head, args.names,
                             args.verify, args.reference, args.report)
    except (UserError, OSError) as error:
        print(f'convert.py: {error}', file=sys.stderr)
        return 2
    print('\n'.join(result.summary()))
    return 0


if __name__ == '__main__':
    sys.exit(main())
