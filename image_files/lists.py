"""Reads list files and the names of the classes."""
import codecs
import contextlib
import hashlib
import os
import re

import numpy as np

from atomic_file import atomic_file
from image_files.decode import DataError
from image_files.entries import Paths, own_memory, parse_entries

CLASSES = 'classes.txt'  # names of the classes in a data folder, and in what is made from it
IMAGENET_NAMES = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'imagenet1k.txt')
_SYNSETS = {0: b'n01440764', 999: b'n15075141'}  # the first and the last of ImageNet-1K, {label: synset}
_UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


def read_list(path, num_classes=None, unlabelled=False, multi_label=False):
    """Reads a list file of 'relative/path label' lines. Blank lines at its end are ignored.

    Args:
        path: path of the list file.
        num_classes: labels must be in [0, num_classes); None for no limit.
        unlabelled: whether lines may have no label; not with `multi_label`.
        multi_label: whether an image may have several labels, '1,4,7', or none, '-'.

    Returns:
        paths (`entries.Paths` [n]) and labels: int64 array [n], -1 where there is none; with `multi_label` uint8 array
        [n, num_classes], 1 for each label of an image (without `num_classes` as wide as the highest label needs).

    Raises:
        FileNotFoundError: the list does not exist.
        DataError: a line is blank or malformed, or a label of it is out of range or repeated.
    """
    if multi_label:
        entries = list(_multi_label_entries(path, num_classes))
        width = num_classes or 1 + max((label for _, labels in entries for label in labels), default=0)
        targets = np.zeros([len(entries), width], np.uint8)
        for row, (_, labels) in zip(targets, entries):
            row[list(labels)] = 1
        return Paths.of([name for name, _ in entries]), targets

    def read_line(line, number):
        return _entry(f'{path}:{number}', line, _label, num_classes, unlabelled, "'relative/path label'")

    content, start = _content(path)
    paths, labels = parse_entries(content, start, read_line, num_classes)
    if not len(paths):
        raise DataError(f'{path}: the list is empty')
    return paths, labels


def read_any_list(path):
    """Reads a list of which it is not known whether images may have several labels, or whether all have one.

    Returns:
        paths (`entries.Paths`) and a sequence of labels: -1 where there is none; with several labels per image,
        tuples of them.
    Raises:
        see `read_list`.
    """
    if not is_multi_label(path):
        return read_list(path, unlabelled=True)
    names, labels = zip(*_multi_label_entries(path, None, unlabelled=True))
    return Paths.of(names), labels


def is_multi_label(path):
    """Whether a line of a list has several labels, or '-' for none; raises like `read_list`."""
    content, start = _content(path)
    return re.search(rb'[^\s][^\S\n]+(-|\d+(,\d+)+)[^\S\n]*(\n|\Z)', content[start:]) is not None


def _multi_label_entries(path, num_classes, unlabelled=False):
    """Yields (path, tuple of labels) of each line; -1 where it has none, if it may be `unlabelled`."""
    content, start = _content(path)
    lines = content[start:].tobytes().rstrip().splitlines()
    if not lines:
        raise DataError(f'{path}: the list is empty')
    for number, line in enumerate(lines, 1):
        yield _entry(f'{path}:{number}', line, _labels, num_classes, unlabelled,
                     "'relative/path 1,4,7', or '-' for no label")


def _entry(where, line, parse, num_classes, unlabelled, expected):
    """(path, label or labels) of a line, -1 where it has none."""
    name = line.strip()
    fields = name.rsplit(None, 1)
    found = parse(where, *fields) if len(fields) == 2 else None
    if found is None:
        if unlabelled and name:
            return name, -1
        raise DataError(f'{where}: expected {expected}, got {line.decode(errors="replace").strip()[:80]!r}')
    for label in found if isinstance(found, tuple) else (found,):
        if label < 0 or label >= (2**63 if num_classes is None else num_classes):
            limit = '' if num_classes is None else f', must be 0 to {num_classes - 1} for {num_classes} classes'
            raise DataError(f'{where}: label {label} is out of range{limit}')
    return fields[0], found


def _label(where, _, text):
    """The label of a line, or None if its last field is none."""
    if re.fullmatch(rb'\d+(,\d+)+', text):
        raise DataError(f'{where}: labels {text.decode()}: several labels for an image need DATA.MULTI_LABEL True')
    return int(text) if re.fullmatch(rb'-?\d+', text) else None


def _labels(where, name, text):
    """The labels of a line as a tuple, or None if its last field is not the labels."""
    if text == b'-':
        return ()
    if not re.fullmatch(rb'-?\d+(,-?\d+)*', text):
        return None
    labels = tuple(map(int, text.split(b',')))
    if name.endswith(b','):
        raise DataError(f'{where}: write the labels without spaces between them, such as 1,4,7')
    if len(set(labels)) < len(labels):
        raise DataError(f'{where}: labels {text.decode()}: a label is repeated')
    return labels


def _content(path):
    """The contents of a list, uint8 [bytes] in memory that can be written to, and the position of its first line.

    Raises:
        see `read_list`.
    """
    try:
        with open(path, 'rb') as file:
            content = own_memory(os.fstat(file.fileno()).st_size, np.uint8)
            count = file.readinto(content)
            rest = file.read()  # of a pipe, which has no size, or of a file that has grown
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such list file; the data folder (-data_path) must contain train_list.txt '
                                'and val_list.txt') from None
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from None
    if count != len(content) or rest:
        content = np.concatenate([content[:count], np.frombuffer(rest, np.uint8)])
    beginning = content[:3].tobytes()
    _refuse_utf16(path, beginning)
    return content, len(codecs.BOM_UTF8) if beginning.startswith(codecs.BOM_UTF8) else 0


def read_class_names(path, num_classes=None):
    """Reads class names from a text file with one name per line, class 0 first. Blank lines at its end are ignored.

    Args:
        path: path of the file.
        num_classes: number of names that it must have; None for any.

    Raises:
        DataError: a line is blank, the file is not readable as UTF-8, or it has another number of names.
    """
    try:
        with open(path, 'rb') as file:
            content = file.read()
        _refuse_utf16(path, content)
        names = [line.strip() for line in content.decode('utf-8-sig').rstrip().split('\n')]
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from None
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b'\n') + 1
        raise DataError(f'{path}:{line}: is not UTF-8 text; if it is in GBK, for example, convert it with '
                        'iconv -f GBK -t UTF-8') from None
    if not all(names):
        raise DataError(f'{path}:{names.index("") + 1}: blank line; each line names a class, the first line class 0')
    if num_classes is not None and len(names) != num_classes:
        raise DataError(f'{path}: names {len(names)} classes, but the model has {num_classes}; put one name on each '
                        'line, class 0 first')
    return names


def _refuse_utf16(path, content):
    if content.startswith(_UTF16):
        raise DataError(f'{path}: is UTF-16 text; save it as UTF-8, for example with iconv -f UTF-16 -t UTF-8')


def list_identity(paths, labels):
    """What a list contains, to tell whether it has changed; line ends and spaces around the entries do not count.

    Args:
        paths, labels: the result of `read_list`.
    Returns:
        {'digest': SHA-256 of the entries in their order, in hexadecimal, 'length': number of entries}.
    """
    digest = hashlib.sha256(Paths.of(paths).joined())
    digest.update(np.ascontiguousarray(labels, dtype='<i8' if labels.ndim == 1 else np.uint8).ravel())
    return {'digest': digest.hexdigest(), 'length': len(labels)}


def paths_identity(paths):
    """The same as `list_identity` for the paths alone."""
    paths = Paths.of(paths)
    return {'digest': hashlib.sha256(paths.joined()).hexdigest(), 'length': len(paths)}


def names_identity(names):
    """The same as `list_identity` for the names of the classes."""
    return {'digest': hashlib.sha256('\n'.join(names).encode()).hexdigest(), 'length': len(names)}


def names_file(folder, num_classes):
    """The file that names the classes of a data folder.

    Args:
        folder: the data folder, '' for none.
        num_classes: outputs of the model.
    Returns:
        its classes.txt; ImageNet's names if its lists are those of ImageNet-1K; or None.
    """
    path = os.path.join(folder, CLASSES)
    if folder and os.path.isfile(path):
        return path
    if folder and num_classes == 1000:
        for name in ('val_list.txt', 'train_list.txt'):
            with contextlib.suppress(DataError, FileNotFoundError):
                return IMAGENET_NAMES if is_imagenet_1k(*read_list(os.path.join(folder, name))) else None
    return None


def is_imagenet_1k(paths, labels):
    """Whether a list is of ImageNet-1K's images under their own names, with labels in the order of the synsets.

    Args:
        paths, labels: the result of `read_list`.
    """
    chosen = np.linspace(0, len(paths) - 1, min(len(paths), 1000)).astype(int)
    ends = [index for label in _SYNSETS for index in np.flatnonzero(labels == label)[:1]]
    synsets = {}
    for index in (*chosen, *ends):
        path, label = paths[index], int(labels[index])
        if re.search(rb'ILSVRC2012_val_\d{8}\.', path):  # the flat folder of validation images
            continue
        found = re.search(rb'(?:^|/)(n\d{8})/', path)
        if found is None or synsets.setdefault(found[1], label) != label:
            return False
    in_order = [synsets[name] for name in sorted(synsets)]
    return in_order == sorted(set(in_order)) and all(
        name == _SYNSETS.get(label, name) for name, label in synsets.items())


def list_entry(path, folder):
    """How a list in `folder` names an image: relative to it, or absolute if the image is elsewhere; bytes.

    Raises:
        DataError: the path has a line break, so no list can hold it.
    """
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    inside = os.path.commonpath([path, folder]) == folder
    entry = os.fsencode(os.path.relpath(path, folder).replace(os.sep, '/') if inside else path)
    if len(entry.splitlines()) != 1:
        raise DataError(f'{path!r}: rename this file: a path in a list cannot contain a line break')
    return b'./' + entry if entry[:1].isspace() else entry  # `read_list` ignores spaces around a line


def write_list(path, images, labels):
    """Writes a list file that `read_list` reads, all of it or nothing.

    Args:
        path: the list file.
        images: paths of the images.
        labels: their labels, below 0 for none; or tuples of labels.
    Raises:
        DataError: see `list_entry`.
        OSError: the file cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    lines = [list_entry(image, folder) + (b' ' + label_text(label).encode()).rstrip() + b'\n'
             for image, label in zip(images, labels)]
    with atomic_file(path) as file:
        file.writelines(lines)


def label_text(label):
    """A label, or a tuple of them, as in a list; '' for an unknown one."""
    if isinstance(label, tuple):
        return ','.join(map(str, label)) or '-'
    return str(label) if label >= 0 else ''
