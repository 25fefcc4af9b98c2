"""Writes train_list.txt, val_list.txt and classes.txt for a folder of images with a folder for each class.

    python tools/make_lists.py photos                              # photos/cat/1.jpg, photos/dog/2.jpg, ...
    python tools/make_lists.py photos -output=lists -val=0.1 -seed=1
    python tools/make_lists.py imagenet -devkit=ILSVRC2012_devkit_t12 -no_check

The classes are the folders, sorted by name. Of each class a share, -val, is for validation. Copies and near copies of
an image are in the same list. Images that cannot be decoded are left out and named. Where there are folders train/ and
val/ that contain the class folders, the images stay in their part. For ImageNet, val/ may also contain all images
directly; their labels then come from the development kit.
"""
import os
import sys
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from atomic_file import atomic_file  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from image_files.devkit import flat_validation  # noqa: E402
from image_files.find import find_images  # noqa: E402
from image_files.folders import class_folders, images_by_class, names_of_folders, subfolders  # noqa: E402
from image_files.inspection import groups_of, inspect_images  # noqa: E402
from image_files.lists import CLASSES, list_entry, write_list  # noqa: E402
from image_files.split import stratified_split  # noqa: E402

PARTS = ('train', 'val')


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__)

    def add(flag, **options):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)

    parser.add_argument('folder', metavar='FOLDER', help='folder that contains the class folders, or train/ and val/')
    add('output', metavar='DIR', help='folder to write the lists into (default: FOLDER)')
    add('val', type=float, default=0.2, metavar='SHARE', help='share of each class for validation (default: 0.2)')
    add('seed', type=int, default=42, help='seed of the choice (default: 42)')
    add('devkit', metavar='DIR', help="ImageNet's development kit (default: FOLDER/ILSVRC2012_devkit_t12)")
    add('no_check', action='store_true', help='trust the files: decode none, and look for no copies')
    add('num_workers', type=int, help='number of decoding threads (default: one per core, at most 16)')
    add('overwrite', action='store_true', help='replace lists in the output folder')
    args = parser.parse_args(argv)
    args.output = args.output or args.folder
    if not 0 < args.val < 1:
        raise UserError(f'-val={args.val:g}: is a share of the images, above 0 and below 1')
    if args.seed < 0 or (args.num_workers is not None and args.num_workers < 1):
        raise UserError('-seed must be at least 0, and -num_workers at least 1')
    taken = [name for name in ('train_list.txt', 'val_list.txt', CLASSES)
             if os.path.exists(os.path.join(args.output, name))]
    if taken and not args.overwrite:
        raise UserError(f'{os.path.join(args.output, taken[0])}: exists; replace the lists with -overwrite, or name '
                        'another folder with -output')
    return args


def find_parts(folder, devkit):
    """The classes of a folder and its images.

    Returns:
        names of the class folders, and {'train', 'val' or 'all': (paths, labels)}.
    Raises:
        UserError: the folders are not as described above.
    """
    train, val = (os.path.join(folder, part) for part in PARTS)
    present = subfolders(folder)
    if set(PARTS) <= set(present):
        classes = class_folders(train)
        labelled = (images_by_class(val, classes) if subfolders(val) else
                    flat_validation(val, devkit or _default_devkit(folder), classes))
        print(f'{folder}: images stay in train/ and val/ as they are; -val and -seed are not used')
        _name_ignored(folder, sorted(set(present) - {*PARTS, 'ILSVRC2012_devkit_t12'}))
        return classes, {'train': images_by_class(train, classes), 'val': labelled}
    top = train if present == ['train'] and subfolders(train) else folder  # 'train' may also be a class
    classes = class_folders(top)
    if len(classes) < 2:
        raise UserError(f'{top}: has only one folder, {classes[0]}; there must be a folder for each of several classes')
    paths, labels = images_by_class(top, classes)
    stray = len(find_images([top])[0]) - len(paths)
    if stray:
        print(f'{top}: not used: {stray:,} images outside the class folders')
    return classes, {'all': (paths, labels)}


def _default_devkit(folder):
    path = os.path.join(folder, 'ILSVRC2012_devkit_t12')
    return path if os.path.isdir(path) else None


def _name_ignored(folder, names):
    if names:
        print(f'{folder}: not used: {", ".join(names)}')


def check_images(paths, workers):
    """Decodes all images; names those that cannot be.

    Returns:
        bool array [N], whether each can be decoded; int array [N] of groups of copies, see `duplicate_groups`.
    """
    inspections = list(tqdm(inspect_images(paths, workers), total=len(paths), unit='image', disable=not os.isatty(2)))
    good = np.array([found.error is None for found in inspections])
    for found in inspections:
        if found.error is not None:
            print(f'left out: {found.error}')
    groups = np.arange(len(paths))
    if good.any():
        where = np.flatnonzero(good)
        groups[good] = where[groups_of([inspections[index] for index in where])]
    return good, groups


def divide(parts, args):
    """Divides the images into {'train': (paths, labels), 'val': (paths, labels)} without those that are left out."""
    paths = [path for found, _ in parts.values() for path in found]
    labels = np.array([label for _, found in parts.values() for label in found], dtype=int)
    for path in paths:
        list_entry(path, args.output)  # refuses names that a list cannot hold
    good, groups = (np.ones(len(paths), bool), np.arange(len(paths))) if args.no_check else check_images(
        paths, args.num_workers)
    for label in np.setdiff1d(labels, labels[good]):
        folder = os.path.dirname(paths[np.flatnonzero(labels == label)[0]])
        raise UserError(f'{folder}: none of its images can be decoded; remove or replace this class')
    if 'all' in parts:
        is_val = np.zeros(len(paths), bool)
        is_val[good] = stratified_split(labels[good], groups[good], args.val, args.seed)
    else:
        is_val = np.arange(len(paths)) >= len(parts['train'][0])
    _describe_copies(labels, groups, is_val)
    return {part: ([paths[index] for index in np.flatnonzero(good & chosen)], labels[good & chosen])
            for part, chosen in (('train', ~is_val), ('val', is_val))}


def _describe_copies(labels, groups, is_val):
    """Prints how many images are copies, and where they contradict each other."""
    found, counts = np.unique(groups, return_counts=True)
    several = [np.flatnonzero(groups == group) for group in found[counts > 1]]
    if not several:
        return
    print(f'{len(several):,} groups of copies or near copies, {sum(map(len, several)):,} images')
    two_labels = sum(len(set(labels[group])) > 1 for group in several)
    across = sum(is_val[group].any() and not is_val[group].all() for group in several)
    if two_labels:
        print(f'warning: {two_labels:,} of them are in more than one class')
    if across:
        print(f'warning: {across:,} of them have images in train/ and in val/: the accuracy will be too high')
    if two_labels or across:
        print('tools/check_images.py names them')


def main():
    args = read_arguments()
    warnings.filterwarnings('ignore', module='PIL')  # about images that are unusual, which check_images.py names
    classes, parts = find_parts(args.folder, args.devkit)
    divided = divide(parts, args)
    for part, (paths, _) in divided.items():
        if not paths:
            raise UserError(f'{args.folder}: no image is left for {part}_list.txt; each class needs two different '
                            'images or more')
    os.makedirs(args.output, exist_ok=True)
    for part, (paths, labels) in divided.items():
        path = os.path.join(args.output, f'{part}_list.txt')
        write_list(path, paths, labels)
        missing = [classes[label] for label in np.setdiff1d(np.arange(len(classes)), labels)]
        print(f'{path}: {len(paths):,} images of {len(classes) - len(missing):,} classes' +
              (f'; none of {", ".join(missing[:5])}{", ..." * (len(missing) > 5)}' if missing else ''))
    path = os.path.join(args.output, CLASSES)
    with atomic_file(path) as file:
        file.write(''.join(f'{name}\n' for name in names_of_folders(classes)).encode())
    print(f'{path}: {len(classes):,} classes')


if __name__ == '__main__':
    sys.exit(exit_status(main))
