"""Decodes all images of lists or folders, and reports what is wrong or unusual about them.

    python tools/check_images.py data/photos                             # the lists in it, or its folders
    python tools/check_images.py train_list.txt val_list.txt -output=findings.csv
    python tools/check_images.py data/photos -write_clean=data/clean     # lists without what spoils a training

The exit status is 1 if images cannot be decoded, are under two labels, or are in several lists, also as near copies
(image_files/duplicates.py says what that means). -write_clean leaves these out, and further copies within a list; of an
image in several lists, it keeps that of the validation list. Images that are only unusual stay.
"""
import contextlib
import csv
import io
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from atomic_file import atomic_file  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from image_files.decode import ImageInside  # noqa: E402
from image_files.find import find_images  # noqa: E402
from image_files.folders import class_folders, images_by_class, subfolders  # noqa: E402
from image_files.histogram import class_rows  # noqa: E402
from image_files.inspection import HUGE, THIN, TINY, groups_of, inspect_images  # noqa: E402
from image_files.lists import CLASSES, label_text, read_class_names, write_list  # noqa: E402

LISTS = ('train_list.txt', 'val_list.txt')
EXAMPLES = 10  # printed of each kind
SERIOUS = {
    'missing': 'there is no such file', 'truncated': 'ends too early', 'broken': 'cannot be decoded',
    'two labels': 'the same image under two labels', 'in two lists': 'the same image in several lists',
    'near copy in two lists': 'nearly the same image in several lists'}
UNUSUAL = {
    'copy': 'the same image again in one list', 'near copy': 'nearly the same image in one list',
    'near copy, two labels': 'nearly the same image under two labels',
    'extension': "does not fit the file's format", 'CMYK': 'converted to RGB', 'palette': 'converted to RGB',
    '16-bit': 'more than 8 bits per value', 'float': 'floating-point values', 'EXIF': 'to be turned for display',
    'tiny': f'a side below {TINY} pixels', 'thin': f'one side over {THIN} times the other',
    'huge': f'over {HUGE / 1e6:.0f} million pixels'}


@dataclass(frozen=True)
class Source:
    """The images of a list or folder.

    Attributes:
        name: what the user calls it.
        list_name: file name of a list with the same images.
        paths, labels: of the images; a label is -1 where it is unknown, and a tuple where an image may have several.
        names: names of the classes, or None.
        classes_file: the file that they are from, or None.
    """
    name: str
    list_name: str
    paths: list
    labels: list
    names: Optional[list] = None
    classes_file: Optional[str] = None


def sources_of(path):
    """The sources that an argument names: a list, the lists in a folder, its class folders, or just its images."""
    if not os.path.isdir(path):
        if not path.lower().endswith('.txt'):
            raise UserError(f'{path}: is neither a folder nor a list (.txt)')
        return [_list(path)]
    lists = [os.path.join(path, name) for name in LISTS if os.path.isfile(os.path.join(path, name))]
    if lists:
        return [_list(file) for file in lists]
    present = subfolders(path)
    if {'train', 'val'} <= set(present):
        classes = class_folders(os.path.join(path, 'train'))
        return [Source(folder, f'{part}_list.txt', *images_by_class(folder, classes), classes)
                for part, folder in ((part, os.path.join(path, part)) for part in ('train', 'val'))]
    if present:
        with contextlib.suppress(UserError):  # not a folder for each class
            return [Source(path, 'list.txt', *images_by_class(path, present), present)]
    return [Source(path, 'list.txt', *find_images([path]))]


def _list(path):
    file = os.path.join(os.path.dirname(path), CLASSES)
    paths, labels = find_images([path])
    names = read_class_names(file) if os.path.isfile(file) else None
    if names and highest(labels) >= len(names):
        raise UserError(f'{path}: has the label {highest(labels)}, but {file} names {len(names)} classes')
    return Source(path, os.path.basename(path), paths, labels, names, file if names else None)


def highest(labels):
    """The highest of labels that may be tuples; -1 for none."""
    return max(max(label, default=-1) if isinstance(label, tuple) else label for label in labels)


def multi_hot(labels, classes):
    """Tuples of labels as uint8 [images, classes]; images with an unknown label are left out."""
    known = [label for label in labels if isinstance(label, tuple)]
    targets = np.zeros([len(known), classes], np.uint8)
    for row, label in zip(targets, known):
        row[list(label)] = 1
    return targets


class Check:
    """The findings about the images of several sources, which are numbered through.

    Attributes:
        labels: of the images, as in their sources.
        label_ids: int array, equal for equal labels, -1 where it is unknown.
        findings: {kind: {index of an image: detail}}.
        bad: bool array, which images a clean list leaves out.
    """

    def __init__(self, sources, workers):
        self.sources = sources
        self.paths = [path for source in sources for path in source.paths]
        self.labels = [label for source in sources for label in source.labels]
        ids = {-1: -1}
        self.label_ids = np.array([ids.setdefault(tuple(sorted(label)) if isinstance(label, tuple) else label, len(ids))
                                   for label in self.labels])
        self.source = np.repeat(np.arange(len(sources)), [len(source.paths) for source in sources])
        self.findings, self.bad = {}, np.zeros(len(self.paths), bool)
        inspections = list(tqdm(inspect_images(self.paths, workers), total=len(self.paths), unit='image',
                                disable=not os.isatty(2)))
        for index, found in enumerate(inspections):
            for kind, detail in found.findings.items():
                self._add(kind, index, detail)
            self.bad[index] = found.error is not None
        good = np.flatnonzero(~self.bad)
        if len(good):
            self._compare(good, [inspections[index] for index in good])

    def _add(self, kind, index, detail):
        self.findings.setdefault(kind, {})[int(index)] = detail

    def _compare(self, good, inspections):
        """Looks for copies among the images that can be decoded."""
        exact = {}
        for index, found in zip(good, inspections):
            exact.setdefault(found.digest, []).append(index)
        for images in exact.values():
            self._compare_copies(np.array(images))
        # of equal images, one stands for all in the comparison of near copies
        first, near = {found.digest: index for index, found in zip(good[::-1], inspections[::-1])}, {}
        for index, group, found in zip(good, groups_of(inspections), inspections):
            near.setdefault(group, {}).setdefault(first[found.digest], []).append(index)
        for group in near.values():
            if len(group) > 1:
                self._compare_near_copies(np.array([index for images in group.values() for index in images]))

    def _compare_copies(self, images):
        if self._differ(self.label_ids[images]):
            self._name('two labels', images)
            self.bad[images] = True
        if self._differ(self.source[images]):
            self._name('in two lists', images)
        keeper = min(images, key=lambda index: (self._rank(index), index))
        self.bad[images[images != keeper]] = True
        for source in np.unique(self.source[images]):
            own = images[self.source[images] == source]
            for index in own[1:]:
                first, path = self.paths[own[0]], self.paths[index]
                self._add('copy', index, 'is listed more than once' if path == first else f'is a copy of {first}')

    def _compare_near_copies(self, images):
        across = self._differ(self.source[images])
        self._name('near copy in two lists' if across else 'near copy', images)
        if self._differ(self.label_ids[images]):
            self._name('near copy, two labels', images)
        best = min(map(self._rank, images))
        self.bad[[index for index in images if self._rank(index) > best]] = True

    @staticmethod
    def _differ(values):
        return len(set(values[values >= 0])) > 1

    def _rank(self, index):
        """Position of the image's list among those that may keep a copy: validation lists first."""
        name = os.path.basename(self.sources[self.source[index]].list_name)
        return not name.startswith(('val', 'test')), self.source[index]

    def _name(self, kind, images):
        """Adds a finding about each of the images, which names another one of them."""
        for index in images:
            other = next((o for o in images if self.source[o] != self.source[index]),
                         next((o for o in images if self.label_ids[o] != self.label_ids[index]),
                              next(o for o in images if o != index)))
            facts = [self.sources[self.source[other]].name] if self.source[other] != self.source[index] else []
            if self.label_ids[other] != self.label_ids[index]:
                facts.append(f'label {label_text(self.labels[other])}')
            self._add(kind, index, f'as {self.paths[other]}' + (f' ({", ".join(facts)})' if facts else ''))

    def lines(self):
        """The report, as lines of text."""
        for source in self.sources:
            several = any(isinstance(label, tuple) for label in source.labels)
            if not several and highest(source.labels) < 0:
                yield f'{source.name}: {len(source.labels):,} images without labels'
                continue
            classes = len(source.names) if source.names else highest(source.labels) + 1
            labels = (multi_hot(source.labels, classes) if several else
                      np.array([label for label in source.labels if label >= 0]))
            for label, text in class_rows(f'{source.name}:', labels, classes, names=source.names, known='all classes'):
                yield f'{label} {text}' if label.endswith(':') else f'{label:<22}{text}'
        for title, kinds in (('serious', SERIOUS), ('unusual', UNUSUAL)):
            found = [kind for kind in kinds if kind in self.findings]
            yield f'\n{title}: {"" if found else "nothing"}'.rstrip()
            for kind in found:
                entries = self.findings[kind]
                yield f'  {kind:<24}{len(entries):>8,}   {kinds[kind]}'
                for index, detail in list(sorted(entries.items()))[:EXAMPLES]:
                    path = self.paths[index]
                    yield f'      {detail if detail.startswith(path) else f"{path}: {detail}"}'
                if len(entries) > EXAMPLES:
                    yield f'      ... and {len(entries) - EXAMPLES:,} more'

    def write(self, path):
        """Writes all findings as CSV."""
        with atomic_file(path) as binary:
            text = io.TextIOWrapper(binary, 'utf-8', errors='surrogateescape', newline='')
            rows = csv.writer(text, lineterminator='\n')
            rows.writerow(['image', 'list', 'label', 'kind', 'serious', 'detail'])
            for kind, entries in self.findings.items():
                for index, detail in sorted(entries.items()):
                    rows.writerow([self.paths[index], self.sources[self.source[index]].name,
                                   label_text(self.labels[index]), kind, int(kind in SERIOUS), detail])
            text.flush()
            text.detach()

    def write_clean(self, folder):
        """Writes the lists without the bad images; returns lines that say so."""
        kept = [np.flatnonzero(~self.bad & (self.source == number)) for number in range(len(self.sources))]
        for source, indices in zip(self.sources, kept):
            if not len(indices):
                raise UserError(f'{source.name}: no image would be left in the clean list')
        for source, indices in zip(self.sources, kept):
            path = os.path.join(folder, source.list_name)
            write_list(path, [self.paths[index] for index in indices], [self.labels[index] for index in indices])
            yield f'{path}: {len(indices):,} of {len(source.paths):,} images'
        names, file = self.sources[0].names, self.sources[0].classes_file
        if file:
            shutil.copyfile(file, os.path.join(folder, CLASSES))
        elif names:
            with atomic_file(os.path.join(folder, CLASSES)) as output:
                output.write(''.join(f'{name}\n' for name in names).encode())


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument('sources', nargs='+', metavar='LIST|FOLDER', help='list (.txt), or folder with lists or images')
    for flag, kind, text in (
            ('output', str, 'file for all findings, .csv'),
            ('write_clean', str, 'folder for the lists without bad images; existing lists are not replaced'),
            ('num_workers', int, 'number of decoding threads (default: one per core, at most 16)')):
        parser.add_argument(f'-{flag}', f'--{flag}', type=kind, help=text)
    args = parser.parse_args(argv)
    if args.num_workers is not None and args.num_workers < 1:
        raise UserError('-num_workers must be at least 1')
    if args.output and not args.output.endswith('.csv'):
        raise UserError(f'-output={args.output}: name a file that ends with .csv')
    if args.output and not os.path.isdir(os.path.dirname(args.output) or '.'):
        raise UserError(f'-output={args.output}: there is no folder {os.path.dirname(args.output)}')
    return args


def main():
    args = read_arguments()
    sources = [source for path in args.sources for source in sources_of(path)]
    if args.write_clean:
        for source in sources:
            if isinstance(source.paths[0], ImageInside):
                raise UserError(f'-write_clean={args.write_clean}: the images of {source.name} are in shards; clean '
                                'the list that these were made from, and write its shards anew')
        names = [source.list_name for source in sources]
        if len(set(names)) < len(names):
            raise UserError(f'-write_clean={args.write_clean}: two of the lists have the same name; check them one by '
                            'one')
        for name in (*names, CLASSES):
            if os.path.exists(os.path.join(args.write_clean, name)):
                raise UserError(f'{os.path.join(args.write_clean, name)}: exists; name another folder with '
                                '-write_clean')
        os.makedirs(args.write_clean, exist_ok=True)
    warnings.filterwarnings('ignore', module='PIL')  # the report says it better
    check = Check(sources, args.num_workers)
    for line in check.lines():
        print(line.encode(errors='replace').decode())  # a file name may contain arbitrary bytes
    if args.output:
        check.write(args.output)
        print(f'\n{args.output}: all findings')
    if args.write_clean:
        print()
        for line in check.write_clean(args.write_clean):
            print(line)
    return int(any(kind in SERIOUS for kind in check.findings))


if __name__ == '__main__':
    sys.exit(exit_status(main))
