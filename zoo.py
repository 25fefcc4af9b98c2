"""The published RepLKNet checkpoints: `python zoo.py` prints them.

    -pretrained=replknet_31b_1k_224

loads `replknet_31b_1k_224.safetensors` or `.pdparams` from ./weights/. If there is only the official file, under its
own name or as `replknet_31b_1k_224.pth`, it is converted first, once.
"""
import errno
import logging
import os
import re
from dataclasses import dataclass
from typing import Optional

from errors import UserError, why_unreadable
from port_weights.convert import convert
from port_weights.names import to_paddle_names
from port_weights.safe_load import find_weights, read_checkpoint
from run_folder.layout import config_beside

ROOT = os.path.dirname(os.path.abspath(__file__))
logger = logging.getLogger('replknet')
_DRIVE = 'https://drive.google.com/file/d/{}/view?usp=sharing'
_BAIDU = 'https://pan.baidu.com/s/{}'


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        name: value for `-pretrained`; `config` is the path of its settings, relative to this file.
        variant: see `replknet.VARIANTS`.
        classes: outputs of the head; None if they are not published.
        image_size: side length in pixels; `protocol`: how the images of published evaluations were prepared.
        top1: accuracy on the ImageNet-1K validation set in percent, as published with the official code, or None.
        remeasured_top1: the same as measured independently by mmpretrain, or None.
        official_file: its name as published; `head`: the head of that file to keep, None if it has only one.
        official_drive, official_baidu, paddle_drive, paddle_baidu: links to the official file and to a converted one.
    """
    name: str
    variant: str
    classes: Optional[int]
    image_size: int
    protocol: str
    top1: Optional[float]
    remeasured_top1: Optional[float]
    official_file: str
    official_drive: str
    official_baidu: str
    paddle_drive: Optional[str] = None
    paddle_baidu: Optional[str] = None
    head: Optional[str] = None

    @property
    def config(self):
        return f'configs/{self.name}.yaml'


_CROP_224 = 'resize 256, centre crop 224'
_WARP_384 = 'warp to 384x384'
_CROP_320 = 'resize 365, centre crop 320, mean and std 0.5'

ZOO = {checkpoint.name: checkpoint for checkpoint in (
    Checkpoint('replknet_31b_1k_224', 'replknet_31b', 1000, 224, _CROP_224, 83.5, 83.48,
               'RepLKNet-31B_ImageNet-1K_224.pth',
               '1azQUiCxK9feYVkkrPqwVPBtNsTzDrX7S', '1gspbbfqooMtegt_DO1TUeA?pwd=lknt',
               '1w1-CUZekxJSeNdsdY_TkjUS4WobpXpU5', '1zPU2J3bI49OiMGl7kzLRCQ?pwd=yi5k'),
    Checkpoint('replknet_31b_1k_384', 'replknet_31b', 1000, 384, _WARP_384, 84.8, 84.84,
               'RepLKNet-31B_ImageNet-1K_384.pth',
               '1vo-P3XB6mRLUeDzmgv90dOu73uCeLfZN', '1WhLaCKKv4NuKc3qMYECOIQ?pwd=lknt',
               '1BZBeIq0SuQdj4w4REynS8UgDNGopMJVh', '1o5wt4l01my7zNzXZvpvpEA?pwd=8x5q'),
    Checkpoint('replknet_31b_22k1k_224', 'replknet_31b', 1000, 224, _CROP_224, 85.2, 85.20,
               'RepLKNet-31B_ImageNet-22K-to-1K_224.pth',
               '1DslZ2voXZQR1QoFY9KnbsHAeF84hzS0s', '169wDunCdop-jQM8K-AX27g?pwd=lknt',
               '1HamtzvO_QbC4qQrLaEc7yz-OMOCmrCuG', '1jHw0dF4jfD_UcFk5IHA-aw?pwd=bve2'),
    Checkpoint('replknet_31b_22k1k_384', 'replknet_31b', 1000, 384, _WARP_384, 86.0, 85.99,
               'RepLKNet-31B_ImageNet-22K-to-1K_384.pth',
               '1Sc46BWdXXm2fVP-K_hKKU_W8vAB-0duX', '11-F3JIKEzSOU7KUhebUWEQ?pwd=lknt',
               '1wyaL3Bxd_JILwVtsQRJQEpVMAom7lx77', '18bnQeqaZHx8wU2DkNNFWrA?pwd=ytfc'),
    Checkpoint('replknet_31l_22k1k_384', 'replknet_31l', 1000, 384, _WARP_384, 86.6, 86.63,
               'RepLKNet-31L_ImageNet-22K-to-1K_384.pth',
               '1JYXoNHuRvC33QV1pmpzMTKEni1hpWfBl', '1MWIsPXJJV4mTEtgcKv3F3w?pwd=lknt',
               '1WuYif9niWr8qyOaPfFzChoGw869AmHI1', '1CzacWWjzy1XZqTpeU6lGBg?pwd=nrtq'),
    Checkpoint('replknet_xl_73m1k_320', 'replknet_xl', 1000, 320, _CROP_320, 87.8, 87.57,
               'RepLKNet-XL_MegData73M_ImageNet1K.pth',
               '1tPC60El34GntXByIRHb-z-Apm4Y5LX1T', '1C1bJJLz9O28ChZ4NcxjUsw?pwd=lknt',
               '1dpSE2lujUbnVMANhSwZ6HbW7mEEIuilK', '1EIVGq3Fc4my0DCPqXyjSZw?pwd=rf9t'),
    Checkpoint('replknet_31b_22k', 'replknet_31b', 21841, 224, _CROP_224, None, None,
               'RepLKNet-31B_ImageNet-22K.pth',
               '1PYJiMszZYNrkZOeYwjccvxX8UHMALB7z', '1YiQSn7VJDiNWX1IWg19O6g?pwd=lknt',
               '1uoQ9chuwOgKAnYxXzK0Tn0Euka7NoR5q', '1biQu9uAPc460utWC91cUpw?pwd=tbpe'),
    Checkpoint('replknet_31l_22k', 'replknet_31l', 21841, 224, _CROP_224, None, None,
               'RepLKNet-31L_ImageNet-22K.pth',
               '16jcPsPwo5rko7ojWS9k_W-svHX-iFknY', '1KWazk_cOVYoLuuVJc_9HxA?pwd=lknt',
               '1ALUmkYpt4JhFFKgWvMYwRcpceiHRlyct', '1aya0SUpKz8WazeP1M9d0eg?pwd=dypx'),
    Checkpoint('replknet_xl_73m', 'replknet_xl', None, 320, _CROP_320, None, None,
               'RepLKNet-XL_MegData73M.pth',
               '1CBHAEUlCzoHfiAQmMIjZhDMAIyHUmAAj', '168Wb2P3rSp23-DCpNG3aCQ?pwd=lknt', head='cls_22k'),
)}


def settings_file(weights):
    """Settings of the model that `-pretrained` names: those of the zoo, or of the run that saved the checkpoint.

    Args:
        weights: a file, a zoo name, or None.
    Returns:
        path of a YAML file, or None if there is none.
    """
    if weights in ZOO:
        return os.path.join(ROOT, ZOO[weights].config)
    return config_beside(weights) if weights else None


def require_settings_file(cfg, weights):
    """Path of the settings file to use: `cfg` if it is given, else the result of `settings_file`.

    Raises:
        FileNotFoundError: `weights` is neither a path nor a zoo name.
        UserError: there are no settings.
    """
    path = cfg or settings_file(weights)
    if not path:
        if weights:
            require_path(weights)
        raise UserError('-cfg is missing: name a settings file, such as -cfg=./configs/replknet_31b.yaml')
    return path


def require_path(path, problem='no such file or folder, and not', flag=''):
    """Raises FileNotFoundError if a path that might also be a zoo name is not there, UserError if it cannot be read."""
    reason = why_unreadable(path)
    if reason == os.strerror(errno.ENOENT):
        raise FileNotFoundError(f'{flag}{path}: {problem} a name that `python zoo.py` lists')
    if reason:
        raise UserError(f'{flag}{path}: cannot be read: {reason}')


def resolve_weights(name_or_path, weights_dir='./weights'):
    """Finds the file of weights that `-pretrained` names.

    Args:
        name_or_path: a file, or a zoo name.
        weights_dir: folder of the files of the zoo. An official file in it is converted, once; several processes may
            do so at the same time.
    Returns:
        path of a file for `safe_load.read_checkpoint`.
    Raises:
        UserError: an official file that is not the model, or does not have the class count, of its name.
        FileNotFoundError: neither a file nor a zoo name, or its file is not in `weights_dir`.
    """
    if name_or_path not in ZOO or os.path.isfile(name_or_path):
        require_path(name_or_path, 'neither a file nor')
        return name_or_path
    checkpoint = ZOO[name_or_path]
    root = os.path.join(weights_dir, checkpoint.name)
    for extension in ('.safetensors', '.pdparams'):
        if os.path.isfile(root + extension):
            return root + extension
    official = os.path.join(weights_dir, os.path.splitext(checkpoint.official_file)[0])
    for source in (f'{official}.pth', f'{official}.safetensors', f'{root}.pth'):
        if os.path.isfile(source):
            report = convert(source, f'{root}.safetensors', model=checkpoint.variant, head=checkpoint.head,
                             num_classes=checkpoint.classes)
            logger.info(f'{source}: converted to {root}.safetensors, {len(report.mapped)} tensors')
            return f'{root}.safetensors'
    raise FileNotFoundError(
        f'{name_or_path}: not in {weights_dir}; put {checkpoint.official_file} there, from '
        f'{_DRIVE.format(checkpoint.official_drive)} or {_BAIDU.format(checkpoint.official_baidu)}'
        + (f', or {checkpoint.name}.pdparams from {_DRIVE.format(checkpoint.paddle_drive)}'
           if checkpoint.paddle_drive else ''))


def pretrained_weights(name_or_path, weights_dir='./weights'):
    """Reads the weights that `-pretrained` names.

    Returns:
        ({name: array} with the names and layout of this project, their origin for messages), which are arguments of
        `build_model` and of `port_weights.load.load_weights`.
    Raises:
        UserError, FileNotFoundError: see `resolve_weights` and `safe_load.read_checkpoint`.
    """
    path = resolve_weights(name_or_path, weights_dir)
    weights, key = find_weights(read_checkpoint(path), path=path)
    return to_paddle_names(weights, path), f'{path} ({key})' if key else path


def build_model(config, weights=None, origin=None, drop_head=False):
    """Builds the RepLKNet of a config. Merged weights give a model in merged form.

    Args:
        config: settings.
        weights, origin: see `pretrained_weights`; None keeps the initial weights.
        drop_head: keep the initial head if the class counts differ.
    Returns:
        `replknet.RepLKNet`.
    Raises:
        UserError: see `port_weights.load.load_weights`.
    """
    from port_weights.load import load_weights  # imports Paddle, which the table does not need
    from replknet import build_replknet
    model = build_replknet(config, merged=any('large_kernel_reparam' in name for name in weights or ()))
    if weights is not None:
        dropped = load_weights(model, weights, origin, drop_head)
        logger.info(f'weights from {origin}')
        if dropped:
            logger.info(f"their head of {len(weights['head.bias'])} classes is dropped; the new head of "
                        f'{config.MODEL.NUM_CLASSES} classes keeps its initial weights')
    return model


def load_pretrained(model, name_or_path, weights_dir='./weights'):
    """Loads weights into a RepLKNet with any head, or without one.

    A head with another class count and the norms of feature maps keep their initial values. For a model without a
    head, the head and the final norm of the weights are ignored.

    Returns:
        names of the model's tensors that keep their initial values.
    Raises:
        UserError, FileNotFoundError: see `pretrained_weights` and `port_weights.load.load_weights`.
    """
    from port_weights.load import load_weights  # imports Paddle, which the table does not need
    weights, origin = pretrained_weights(name_or_path, weights_dir)
    own = model.state_dict()
    if model.num_classes is None:
        weights = {name: array for name, array in weights.items() if not name.startswith(('norm.', 'head.'))}
    fresh = [name for name in own if name not in weights and re.match(r'stages\.\d+\.norm\.', name)]
    weights.update({name: own[name].numpy() for name in fresh})
    return fresh + load_weights(model, weights, origin, drop_head=True)


def table():
    """The zoo as a table, a list of lines."""
    rows = [('name', 'classes', 'size', 'top-1', 're-measured', 'protocol', 'config', 'official file')]
    for c in ZOO.values():
        figures = ['-' if v is None else f'{v:g}' for v in (c.classes, c.image_size)]
        figures += ['-' if v is None else f'{v:.{digits}f}' for v, digits in ((c.top1, 1), (c.remeasured_top1, 2))]
        rows.append((c.name, *figures, c.protocol, c.config, c.official_file))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


if __name__ == '__main__':
    print('\n'.join(table()))
    print('\ntop-1: as published with the official code; re-measured: by mmpretrain, which warps to 384x384 as well.')
    print('docs/weights.md has the links to the files and the commands to convert them.')
