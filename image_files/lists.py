"""Reads list files and the names of the classes."""
import codecs
import re

import numpy as np

from image_files.decode import DataError


def read_list(path, num_classes=None, unlabelled=False):
    """Reads a list file of 'relative/path label' lines.

    Args:
        path: path of the list file.
        num_classes: labels must be in [0, num_classes); None for no limit.
        unlabelled: whether lines may have no label.

    Returns:
        paths (bytes array) and labels (int64 array, -1 where there is none), one element per line.

    Raises:
        FileNotFoundError: the list does not exist.
        DataError: a line is blank or malformed, or its label is out of range.
    """
    try:
        file = open(path, 'rb')
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such list file; the data folder (-data_path) must contain train_list.txt '
                                'and val_list.txt') from None
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from None
    paths, labels = [], []
    with file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        for number, line in enumerate(file, 1):
            name, label = line.strip(), -1
            fields = name.rsplit(None, 1)
            if len(fields) == 2 and re.fullmatch(rb'-?\d+', fields[1]):
                name, label = fields[0], int(fields[1])
                if label < 0 or (num_classes is not None and label >= num_classes):
                    limit = '' if num_classes is None else f', must be 0 to {num_classes - 1} for {num_classes} classes'
                    raise DataError(f'{path}:{number}: label {label} is out of range{limit}')
            elif not (unlabelled and name):
                text = line.decode(errors='replace').strip()[:80]
                raise DataError(f"{path}:{number}: expected 'relative/path label', got {text!r}")
            paths.append(name)
            labels.append(label)
    if not paths:
        raise DataError(f'{path}: the list is empty')
    return np.array(paths), np.array(labels, dtype=np.int64)


def read_class_names(path):
    """Reads class names from a text file with one name per line, class 0 first.

    Raises:
        DataError: a line is blank, or the file is not readable as text.
    """
    try:
        with open(path, encoding='utf-8-sig') as file:
            names = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{path}: cannot be read: {error}') from None
    if not all(names):
        raise DataError(f'{path}:{names.index("") + 1}: blank line; each line names a class, the first line class 0')
    return names
