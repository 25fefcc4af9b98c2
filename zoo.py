"""The published RepLKNet checkpoints: `python zoo.py` prints them.

    python zoo.py -download replknet_31b_1k_224

downloads one to ./weights/, and

    -pretrained=replknet_31b_1k_224

loads `replknet_31b_1k_224.safetensors` or `.pdparams` from ./weights/. If there is only the official file, under its
own name or as `replknet_31b_1k_224.pth`, it is converted first, once.
"""
import errno
import logging
import os
import re
import sys
from dataclasses import dataclass
from typing import Optional

from errors import ArgumentParser, UserError, exit_status, why_unreadable
from image_files.lists import CLASSES, IMAGENET_NAMES, names_file
from port_weights.convert import convert
from port_weights.names import to_paddle_names
from port_weights.safe_load import find_weights, read_checkpoint
from run_folder.layout import config_beside
from run_folder.metrics import best_checkpoint

ROOT = os.path.dirname(os.path.abspath(__file__))
logger = logging.getLogger('replknet')
_DRIVE = 'https://drive.google.com/file/d/{}/view?usp=sharing'
_BAIDU = 'https://pan.baidu.com/s/{}'
_MMPRETRAIN = 'https://download.openmmlab.com/mmclassification/v0/replknet/{}_20221024-{}.pth'


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
        sha256: beginning of the SHA-256 of mmpretrain's copy of the official file, None if there is no copy.
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
    sha256: Optional[str] = None

    @property
    def config(self):
        return f'configs/{self.name}.yaml'

    @property
    def address(self):
        """Where mmpretrain's copy of the file can be downloaded, or None."""
        return _MMPRETRAIN.format(os.path.splitext(self.official_file)[0], self.sha256) if self.sha256 else None

    def where(self, weights_dir):
        """Where to get the file in a browser, and under which name it belongs into `weights_dir`."""
        return (f'put {self.official_file} into {weights_dir}, from {_DRIVE.format(self.official_drive)} or '
                f'{_BAIDU.format(self.official_baidu)}'
                + (f'; or {self.name}.pdparams, from {_DRIVE.format(self.paddle_drive)} or '
                   f'{_BAIDU.format(self.paddle_baidu)}' if self.paddle_drive else ''))


_CROP_224 = 'resize 256, centre crop 224'
_WARP_384 = 'warp to 384x384'
_CROP_320 = 'resize 365, centre crop 320, mean and std 0.5'

ZOO = {checkpoint.name: checkpoint for checkpoint in (
    Checkpoint('replknet_31b_1k_224', 'replknet_31b', 1000, 224, _CROP_224, 83.5, 83.48,
               'RepLKNet-31B_ImageNet-1K_224.pth',
               '1azQUiCxK9feYVkkrPqwVPBtNsTzDrX7S', '1gspbbfqooMtegt_DO1TUeA?pwd=lknt',
               '1w1-CUZekxJSeNdsdY_TkjUS4WobpXpU5', '1zPU2J3bI49OiMGl7kzLRCQ?pwd=yi5k', sha256='debd6715'),
    Checkpoint('replknet_31b_1k_384', 'replknet_31b', 1000, 384, _WARP_384, 84.8, 84.84,
               'RepLKNet-31B_ImageNet-1K_384.pth',
               '1vo-P3XB6mRLUeDzmgv90dOu73uCeLfZN', '1WhLaCKKv4NuKc3qMYECOIQ?pwd=lknt',
               '1BZBeIq0SuQdj4w4REynS8UgDNGopMJVh', '1o5wt4l01my7zNzXZvpvpEA?pwd=8x5q', sha256='3d05883f'),
    Checkpoint('replknet_31b_22k1k_224', 'replknet_31b', 1000, 224, _CROP_224, 85.2, 85.20,
               'RepLKNet-31B_ImageNet-22K-to-1K_224.pth',
               '1DslZ2voXZQR1QoFY9KnbsHAeF84hzS0s', '169wDunCdop-jQM8K-AX27g?pwd=lknt',
               '1HamtzvO_QbC4qQrLaEc7yz-OMOCmrCuG', '1jHw0dF4jfD_UcFk5IHA-aw?pwd=bve2', sha256='f68d7698'),
    Checkpoint('replknet_31b_22k1k_384', 'replknet_31b', 1000, 384, _WARP_384, 86.0, 85.99,
               'RepLKNet-31B_ImageNet-22K-to-1K_384.pth',
               '1Sc46BWdXXm2fVP-K_hKKU_W8vAB-0duX', '11-F3JIKEzSOU7KUhebUWEQ?pwd=lknt',
               '1wyaL3Bxd_JILwVtsQRJQEpVMAom7lx77', '18bnQeqaZHx8wU2DkNNFWrA?pwd=ytfc', sha256='ca9f04ca'),
    Checkpoint('replknet_31l_22k1k_384', 'replknet_31l', 1000, 384, _WARP_384, 86.6, 86.63,
               'RepLKNet-31L_ImageNet-22K-to-1K_384.pth',
               '1JYXoNHuRvC33QV1pmpzMTKEni1hpWfBl', '1MWIsPXJJV4mTEtgcKv3F3w?pwd=lknt',
               '1WuYif9niWr8qyOaPfFzChoGw869AmHI1', '1CzacWWjzy1XZqTpeU6lGBg?pwd=nrtq', sha256='6f8ee74d'),
    Checkpoint('replknet_xl_73m1k_320', 'replknet_xl', 1000, 320, _CROP_320, 87.8, 87.57,
               'RepLKNet-XL_MegData73M_ImageNet1K.pth',
               '1tPC60El34GntXByIRHb-z-Apm4Y5LX1T', '1C1bJJLz9O28ChZ4NcxjUsw?pwd=lknt',
               '1dpSE2lujUbnVMANhSwZ6HbW7mEEIuilK', '1EIVGq3Fc4my0DCPqXyjSZw?pwd=rf9t', sha256='664f2980'),
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


def class_names_file(config, folder, cfg=None):
    """The file with the names of a model's classes, or None if they are unknown.

    ImageNet's names are only for the published models and for those trained with ImageNet's own lists.

    Args:
        config: settings of the model; `config.MODEL.PRETRAINED` names its weights.
        folder: folder of the weights, which may have a classes.txt; None for the weights of the zoo.
        cfg: settings file that was named for it, or None.
    """
    beside = os.path.join(folder, CLASSES) if folder else ''
    if os.path.isfile(beside):
        return beside
    configs = [os.path.realpath(os.path.join(ROOT, checkpoint.config)) for checkpoint in ZOO.values()]
    published = config.MODEL.PRETRAINED in ZOO or (cfg and os.path.realpath(cfg) in configs)
    return names_file(config.DATA.DATA_PATH, config.MODEL.NUM_CLASSES) or (
        IMAGENET_NAMES if published and config.MODEL.NUM_CLASSES == 1000 else None)


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
        name_or_path: a file, a run folder for its best checkpoint, or a zoo name.
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
        return best_checkpoint(name_or_path) if os.path.isdir(name_or_path) else name_or_path
    checkpoint = ZOO[name_or_path]
    source = _file_of(checkpoint, weights_dir)
    if not source:
        raise FileNotFoundError(
            f'{name_or_path}: not in {weights_dir}; '
            + (f'download it with python zoo.py -download {name_or_path}, or ' if checkpoint.address else '')
            + checkpoint.where(weights_dir))
    root = os.path.join(weights_dir, checkpoint.name)
    if source in (f'{root}.safetensors', f'{root}.pdparams'):
        return source
    report = convert(source, f'{root}.safetensors', model=checkpoint.variant, head=checkpoint.head,
                     num_classes=checkpoint.classes)
    logger.info(f'{source}: converted to {root}.safetensors, {len(report.mapped)} tensors')
    return f'{root}.safetensors'


def _file_of(checkpoint, weights_dir):
    """The file in `weights_dir` that is used for a checkpoint of the zoo, or None."""
    root = os.path.join(weights_dir, checkpoint.name)
    official = os.path.join(weights_dir, os.path.splitext(checkpoint.official_file)[0])
    files = (f'{root}.safetensors', f'{root}.pdparams', f'{official}.pth', f'{official}.safetensors', f'{root}.pth')
    return next(filter(os.path.isfile, files), None)


def download_weights(name, weights_dir='./weights'):
    """Downloads a checkpoint of the zoo to `weights_dir`/`name`.pth, if no file of it is there; see `download`.

    Returns:
        path of the file that `-pretrained` uses.
    Raises:
        UserError: not a zoo name, the checkpoint has no address for direct downloads, or the download fails.
    """
    from port_weights.download import download
    if name not in ZOO:
        raise UserError(f'-download={name}: is not in the zoo; choose from {", ".join(ZOO)}')
    checkpoint, path = ZOO[name], os.path.join(weights_dir, f'{name}.pth')
    found = _file_of(checkpoint, weights_dir)
    if found and (found != path or not checkpoint.address):
        return found
    if not checkpoint.address:
        raise UserError(f'{name}: has no address for direct downloads; {checkpoint.where(weights_dir)}')
    download(checkpoint.address, path, checkpoint.sha256, checkpoint.where(weights_dir))
    return path


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
            theirs = (f"their head of {len(weights['head.bias'])} classes is dropped" if 'head.bias' in weights else
                      'they have no head')
            logger.info(f'{theirs}; the new head of {config.MODEL.NUM_CLASSES} classes keeps its initial '
                        'weights')
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


def main():
    parser = ArgumentParser('Lists the published checkpoints, or downloads one to ./weights.')
    parser.add_argument('-download', '--download', metavar='NAME', help='checkpoint to download')
    name = parser.parse_args().download
    if name is not None:
        print(f'{download_weights(name)}: used for -pretrained={name}')
        return
    print('\n'.join(table()))
    print('\ntop-1: as published with the official code; re-measured: by mmpretrain, which warps to 384x384 as well.')
    print('`python zoo.py -download NAME` downloads mmpretrain\'s copy of those with a re-measured accuracy.')
    print('docs/weights.md has the links to the files and the commands to convert them.')


if __name__ == '__main__':
    sys.exit(exit_status(main))
