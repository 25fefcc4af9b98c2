"""The data of a run: its lists and the names of its classes, and whether they are still those of its checkpoint."""
from dataclasses import dataclass
from typing import List, Optional

from datasets import ImageNet2012Dataset, get_dataset, source_name
from errors import UserError
from image_files.folders import class_names
from image_files.lists import CLASSES, list_identity, names_identity
from utils import logger


@dataclass(frozen=True)
class RunData:
    """What a run reads from its data folder.

    Attributes:
        train, val: datasets; None where the run does not use them.
        names: names of the classes, or None.
        identity: {'train', 'val' or 'classes': see `list_identity`} of those that there are. The images themselves are
            not part of it.
        sources: {the same keys: name of the file or folder in the data folder}.
    """
    train: Optional[ImageNet2012Dataset]
    val: Optional[ImageNet2012Dataset]
    names: Optional[List[str]]
    identity: dict
    sources: dict


def read_data(config):
    """Reads the lists and the names of the classes; returns `RunData`.

    Raises:
        UserError, FileNotFoundError: see `datasets.get_dataset` and `folders.class_names`.
    """
    val = get_dataset(config, 'val') if config.EVAL or config.VALIDATE_FREQ else None
    train = None if config.EVAL else get_dataset(config, 'train')
    if config.DATA.MULTI_LABEL and val and not val.labels.any():
        raise UserError(f'{val.list_file}: no image has a label, so the mAP is not defined')
    names = read_class_names_of(config)
    identity = {mode: list_identity(data.paths, data.labels) for mode, data in (('train', train), ('val', val)) if data}
    if names:
        identity['classes'] = names_identity(names)
    sources = {key: CLASSES if key == 'classes' else source_name(config, key) for key in identity}
    return RunData(train, val, names, identity, sources)


def read_class_names_of(config):
    """Names of the classes in the data folder, or None; raises UserError if they do not fit MODEL.NUM_CLASSES."""
    return class_names(config.DATA.DATA_PATH, config.DATA.DATASET, config.MODEL.NUM_CLASSES)


def refuse_other_data(config, data, state, path):
    """Compares the data with those of the checkpoint to resume.

    With DATA.ALLOW_CHANGES, changes are logged; results on another validation list are removed from `state`, since
    accuracies on different images do not compare.

    Args:
        data: RunData.
        state: contents of the checkpoint; those of earlier versions have no record of the data.
        path: its file, for messages.
    Returns:
        keys of `RunData.identity` that have changed.
    Raises:
        UserError: the data have changed, without DATA.ALLOW_CHANGES.
    """
    before = state.get('data', {})
    changed = [key for key in before if key in data.identity and before[key] != data.identity[key]]
    if not changed:
        return []
    what = '; '.join(_change(data.sources[key], before[key]['length'], data.identity[key]['length']) for key in changed)
    if not config.DATA.ALLOW_CHANGES:
        raise UserError(f'{path}: belongs to a run with other data: {what}; restore the data, start a new run from its '
                        'weights with -pretrained, or continue with -opts DATA.ALLOW_CHANGES True')
    logger.warning(f'data changed since the checkpoint: {what}')
    if 'train' in changed and state['sums']['steps']:
        logger.warning('the rest of this epoch is in another order: some images may be seen twice, others not at all')
    if 'val' in changed and state['best']:
        logger.warning('the best accuracies so far were measured on another val_list.txt and do not count any more')
        state['best'] = {}
        state['numbered'] = {name: {**entry, 'acc1': None} for name, entry in state['numbered'].items()}
    return changed


def _change(name, before, now):
    if before == now:
        return f'{name} has other entries, or the same in another order'
    return f'{name} had {before:,} entries and now has {now:,}'
