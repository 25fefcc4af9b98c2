"""The published RepLKNet checkpoints: `python zoo.py` prints them.

    -pretrained=replknet_31b_1k_224

takes the weights from ./weights/, where they may lie as `replknet_31b_1k_224.safetensors` or `.pdparams`, or as the
official file under its own name, or as `replknet_31b_1k_224.pth`; these are converted once.
"""
import logging
import os
import re
from dataclasses import dataclass
from typing import Optional

from errors import UserError
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
        name: what `-pretrained` takes; `config`: its settings, relative to this file.
        variant: see `replknet.VARIANTS`.
        classes: outputs of the head; None where they are not published.
        image_size: pixels a side; `protocol`: how published evaluations prepared the images.
        top1, port_top1, port_top5: percent on the ImageNet-1K validation set, by the official code and by the
            earlier Paddle port (whose figures at 384 come from a crop in place of the protocol's warp); None: none.
        official_file: its name as the official code published it; `head`: which of its heads, None where it has one.
        official_drive, official_baidu, paddle_drive, paddle_baidu: links to the official file and to a converted one.
    """
    name: str
    variant: str
    classes: Optional[int]
    image_size: int
    protocol: str
    top1: Optional[float]
    port_top1: Optional[float]
    port_top5: Optional[float]
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
    Checkpoint('replknet_31b_1k_224', 'replknet_31b', 1000, 224, _CROP_224, 83.5, 83.48, 96.57,
               'RepLKNet-31B_ImageNet-1K_224.pth',
               '1azQUiCxK9feYVkkrPqwVPBtNsTzDrX7S', '1gspbbfqooMtegt_DO1TUeA?pwd=lknt',
               '1w1-CUZekxJSeNdsdY_TkjUS4WobpXpU5', '1zPU2J3bI49OiMGl7kzLRCQ?pwd=yi5k'),
    Checkpoint('replknet_31b_1k_384', 'replknet_31b', 1000, 384, _WARP_384, 84.8, 84.58, 97.23,
               'RepLKNet-31B_ImageNet-1K_384.pth',
               '1vo-P3XB6mRLUeDzmgv90dOu73uCeLfZN', '1WhLaCKKv4NuKc3qMYECOIQ?pwd=lknt',
               '1BZBeIq0SuQdj4w4REynS8UgDNGopMJVh', '1o5wt4l01my7zNzXZvpvpEA?pwd=8x5q'),
    Checkpoint('replknet_31b_22k1k_224', 'replknet_31b', 1000, 224, _CROP_224, 85.2, 85.20, 97.56,
               'RepLKNet-31B_ImageNet-22K-to-1K_224.pth',
               '1DslZ2voXZQR1QoFY9KnbsHAeF84hzS0s', '169wDunCdop-jQM8K-AX27g?pwd=lknt',
               '1HamtzvO_QbC4qQrLaEc7yz-OMOCmrCuG', '1jHw0dF4jfD_UcFk5IHA-aw?pwd=bve2'),
    Checkpoint('replknet_31b_22k1k_384', 'replknet_31b', 1000, 384, _WARP_384, 86.0, 85.77, 97.68,
               'RepLKNet-31B_ImageNet-22K-to-1K_384.pth',
               '1Sc46BWdXXm2fVP-K_hKKU_W8vAB-0duX', '11-F3JIKEzSOU7KUhebUWEQ?pwd=lknt',
               '1wyaL3Bxd_JILwVtsQRJQEpVMAom7lx77', '18bnQeqaZHx8wU2DkNNFWrA?pwd=ytfc'),
    Checkpoint('replknet_31l_22k1k_384', 'replknet_31l', 1000, 384, _WARP_384, 86.6, 86.38, 97.88,
               'RepLKNet-31L_ImageNet-22K-to-1K_384.pth',
               '1JYXoNHuRvC33QV1pmpzMTKEni1hpWfBl', '1MWIsPXJJV4mTEtgcKv3F3w?pwd=lknt',
               '1WuYif9niWr8qyOaPfFzChoGw869AmHI1', '1CzacWWjzy1XZqTpeU6lGBg?pwd=nrtq'),
    Checkpoint('replknet_xl_73m1k_320', 'replknet_xl', 1000, 320, _CROP_320, 87.8, None, None,
               'RepLKNet-XL_MegData73M_ImageNet1K.pth',
               '1tPC60El34GntXByIRHb-z-Apm4Y5LX1T', '1C1bJJLz9O28ChZ4NcxjUsw?pwd=lknt',
               '1dpSE2lujUbnVMANhSwZ6HbW7mEEIuilK', '1EIVGq3Fc4my0DCPqXyjSZw?pwd=rf9t'),
    Checkpoint('replknet_31b_22k', 'replknet_31b', 21841, 224, _CROP_224, None, None, None,
               'RepLKNet-31B_ImageNet-22K.pth',
               '1PYJiMszZYNrkZOeYwjccvxX8UHMALB7z', '1YiQSn7VJDiNWX1IWg19O6g?pwd=lknt',
               '1uoQ9chuwOgKAnYxXzK0Tn0Euka7NoR5q', '1biQu9uAPc460utWC91cUpw?pwd=tbpe'),
    Checkpoint('replknet_31l_22k', 'replknet_31l', 21841, 224, _CROP_224, None, None, None,
               'RepLKNet-31L_ImageNet-22K.pth',
               '16jcPsPwo5rko7ojWS9k_W-svHX-iFknY', '1KWazk_cOVYoLuuVJc_9HxA?pwd=lknt',
               '1ALUmkYpt4JhFFKgWvMYwRcpceiHRlyct', '1aya0SUpKz8WazeP1M9d0eg?pwd=dypx'),
    Checkpoint('replknet_xl_73m', 'replknet_xl', None, 320, _CROP_320, None, None, None,
               'RepLKNet-XL_MegData73M.pth',
               '1CBHAEUlCzoHfiAQmMIjZhDMAIyHUmAAj', '168Wb2P3rSp23-DCpNG3aCQ?pwd=lknt', head='cls_22k'),
)}


def resolve_weights(name_or_path, weights_dir='./weights'):
    """The file of weights that `-pretrained` means.

    Args:
        name_or_path: a file, or a name of the zoo.
        weights_dir: where the files of the zoo lie; an official one is converted there, once. Several processes may
            do so at the same time.
    Returns:
        path of a file for `safe_load.read_checkpoint`; of a zoo name, with the published model and class count.
    Raises:
        UserError: an official file that is not what its name says.
        FileNotFoundError: neither a file nor a name of the zoo, or nothing of it in `weights_dir`.
    """
    if name_or_path not in ZOO or os.path.isfile(name_or_path):
        if not os.path.exists(name_or_path):
            raise FileNotFoundError(f'{name_or_path}: no such file, and no name that `python zoo.py` lists')
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
        f'{name_or_path}: not in {weights_dir}; put there {checkpoint.official_file} from '
        f'{_DRIVE.format(checkpoint.official_drive)} or {_BAIDU.format(checkpoint.official_baidu)}'
        + (f', or {checkpoint.name}.pdparams from {_DRIVE.format(checkpoint.paddle_drive)}'
           if checkpoint.paddle_drive else ''))


def pretrained_weights(name_or_path, weights_dir='./weights'):
    """The weights that `-pretrained` means, in the names and layout of this project.

    Returns:
        ({name: array}, where they come from), which `checkpoint.load_weights` takes after the model.
    Raises:
        UserError, FileNotFoundError: see `resolve_weights` and `safe_load`.
    """
    path = resolve_weights(name_or_path, weights_dir)
    weights, key = find_weights(read_checkpoint(path), path=path)
    return to_paddle_names(weights, path), f'{path} ({key})' if key else path


def load_pretrained(model, name_or_path, weights_dir='./weights'):
    """Loads weights into a RepLKNet whatever its head.

    A head of another class count and the norms of feature maps keep their initial values; a model without a head
    takes the rest.
    Returns:
        names of the model's tensors that keep their initial values.
    Raises:
        UserError, FileNotFoundError: see `pretrained_weights` and `checkpoint.load_weights`.
    """
    from port_weights.load import load_weights  # the table of the zoo is there without Paddle
    weights, origin = pretrained_weights(name_or_path, weights_dir)
    own = model.state_dict()
    if model.num_classes is None:
        weights = {name: array for name, array in weights.items() if not name.startswith(('norm.', 'head.'))}
    fresh = [name for name in own if name not in weights and re.match(r'stages\.\d+\.norm\.', name)]
    weights.update({name: own[name].numpy() for name in fresh})
    return fresh + load_weights(model, weights, origin, drop_head=True)


def settings_file(weights):
    """The settings of a name of the zoo, or those beside a checkpoint of a run; None where there are none."""
    if weights in ZOO:
        return os.path.join(ROOT, ZOO[weights].config)
    return config_beside(weights) if weights else None


def require_settings_file(cfg, weights):
    """The settings file to use: `cfg` if it is given, else the one that `settings_file` finds for the weights.

    Raises:
        UserError: there is neither.
    """
    path = cfg or settings_file(weights)
    if not path:
        raise UserError('-cfg is missing: name a settings file, such as -cfg=./configs/replknet_31b.yaml')
    return path


def build_model(config, weights=None, origin=None, drop_head=False):
    """A RepLKNet of the settings, with `weights` in place of its initial ones; merged weights build the merged form.

    Args:
        config: settings.
        weights: {name: array}, and `origin`, where they come from, see `pretrained_weights`; None keeps the initial
            ones.
        drop_head: keep the initial head where the class counts differ.
    Raises:
        UserError: see `port_weights.load.load_weights`.
    """
    from port_weights.load import load_weights  # the table of the zoo is there without Paddle
    from replknet import build_replknet
    model = build_replknet(config, merged=any('large_kernel_reparam' in name for name in weights or ()))
    if weights is not None:
        dropped = load_weights(model, weights, origin, drop_head)
        logger.info(f'weights of {origin}')
        if dropped:
            logger.info(f"its head of {len(weights['head.bias'])} classes is dropped; the head of "
                        f'{config.MODEL.NUM_CLASSES} classes starts afresh')
    return model


def table():
    """The zoo as lines of text."""
    rows = [('name', 'classes', 'size', 'top-1', "port's top-1", 'top-5', 'protocol', 'config', 'official file')]
    for c in ZOO.values():
        figures = ['-' if v is None else f'{v:g}' for v in (c.classes, c.image_size)]
        figures += ['-' if v is None else f'{v:.{digits}f}'
                    for v, digits in ((c.top1, 1), (c.port_top1, 2), (c.port_top5, 2))]
        rows.append((c.name, *figures, c.protocol, c.config, c.official_file))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


if __name__ == '__main__':
    print('\n'.join(table()))
    print('\ntop-1: official; the port is an earlier one to Paddle, which cropped at 384 instead of warping.')
    print('docs/weights.md says where the files are and how to convert them.')
