"""The labels of ImageNet's validation images in one folder, from the development kit of ILSVRC2012."""
import os
import re

import numpy as np

from errors import UserError
from image_files.decode import DataError

TRUTH = 'ILSVRC2012_validation_ground_truth.txt'
META = 'meta.mat'
NEEDED = (f'give -devkit=DIR with {TRUTH} and {META}, from ILSVRC2012_devkit_t12.tar.gz; in place of {META}, a text '
          'file synsets.txt with the synset of each ILSVRC2012_ID from 1 to 1000, one on each line')


def flat_validation(folder, devkit, classes):
    """The images of a flat folder of ILSVRC2012_val_00000001.JPEG and so on, with their labels.

    Args:
        folder: it contains the images.
        devkit: folder of the development kit, or its folder `data`; None if there is none.
        classes: synsets in the order of their labels, such as 'n01440764'.
    Returns:
        (list of paths in the order of their numbers, list of labels).
    Raises:
        DataError, UserError: a file is missing, or they do not fit each other.
    """
    names = sorted(name for name in os.listdir(folder) if re.fullmatch(r'ILSVRC2012_val_\d{8}\.JPEG', name))
    if not names:
        raise DataError(f'{folder}: has neither a folder for each class nor images of ImageNet '
                        '(ILSVRC2012_val_00000001.JPEG)')
    if devkit is None:
        raise UserError(f"{folder}: the images are in no class folders, so their labels are needed: {NEEDED}")
    data = os.path.join(devkit, 'data') if os.path.isdir(os.path.join(devkit, 'data')) else devkit
    label_of = {number: classes.index(synset) for number, synset in _synsets(data).items() if synset in classes}
    path = os.path.join(data, TRUTH)
    truth = _lines(path)
    labels = []
    for name in names:
        number = int(name[-13:-5])
        if not 1 <= number <= len(truth):
            raise DataError(f'{path}: has {len(truth):,} lines, none for {os.path.join(folder, name)}')
        try:
            labels.append(label_of[int(truth[number - 1])])
        except (ValueError, KeyError):
            raise DataError(f'{path}:{number}: {truth[number - 1]!r} is not the ILSVRC2012_ID of a synset that has a '
                            'folder of training images') from None
    return [os.path.join(folder, name) for name in names], labels


def _synsets(data):
    """{ILSVRC2012_ID: synset} of the 1,000 classes. These numbers are not in the order of the synsets."""
    path = os.path.join(data, 'synsets.txt')
    if os.path.isfile(path):
        return dict(enumerate(_lines(path), 1))
    path = os.path.join(data, META)
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such file; {NEEDED}')
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f'{path}: reading it needs SciPy: pip install scipy; or {NEEDED}') from None
    try:
        table = np.atleast_1d(loadmat(path, squeeze_me=True)['synsets'])
        return {int(row['ILSVRC2012_ID']): str(row['WNID']) for row in table if int(row['num_children']) == 0}
    except Exception as error:  # SciPy raises many types for other files
        raise DataError(f'{path}: is not the {META} of the development kit: {type(error).__name__}: {error}') from None


def _lines(path):
    try:
        with open(path, encoding='ascii', errors='replace') as file:
            return file.read().split()
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error.strerror}; {NEEDED}') from None
