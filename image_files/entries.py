"""The entries of a list in a few arrays, since an object for each of 14 million lines would take gigabytes."""
import mmap

import numpy as np

_BLOCK = 1 << 20  # bytes of a list that are parsed at a time
_ROWS = 1 << 18  # paths that are hashed at a time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, without a pattern in its bits: 2^64 divided by the golden ratio
_BREAK = 2
_KIND = np.zeros(256, np.uint8)
_KIND[:33] = 3  # other white space, and control characters
_KIND[[9, 32]], _KIND[10] = 1, _BREAK  # blanks, line breaks


def own_memory(length, dtype):
    """A new array outside the heap. Its memory returns to the system when freed; paddle_env keeps that of the heap."""
    flags = {'flags': mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, 'MAP_ANONYMOUS') else {}
    dtype = np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, max(1, length) * dtype.itemsize, **flags), dtype, length)


class Paths:
    """A sequence of paths (bytes) in one buffer.

    Args:
        text: uint8 array, the paths, each followed by a line break.
        ends: unsigned array [paths], the positions of these line breaks.
    """

    def __init__(self, text, ends):
        self._text, self._ends = text, ends

    @classmethod
    def of(cls, paths):
        """`Paths` of any sequence of bytes objects."""
        if isinstance(paths, cls):
            return paths
        text = b''.join(bytes(path) + b'\n' for path in paths)
        lengths = np.fromiter((len(path) + 1 for path in paths), np.uint64, len(paths))
        return cls(np.frombuffer(text, np.uint8), np.cumsum(lengths, dtype=np.uint64) - np.uint64(1))

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index):
        index = range(len(self))[index]  # raises IndexError if out of range
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self._text[start:int(self._ends[index])].tobytes()

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def tolist(self):
        """The paths as a list of bytes."""
        return list(self)

    def joined(self):
        """All paths, separated by line breaks, as a buffer of bytes."""
        return memoryview(self._text)[:int(self._ends[-1])] if len(self) else b''

    def hashes(self):
        """A number for each path, uint64 [paths], the same for equal paths.

        The probability that two of 14 million different paths have the same number is about 1 in 200,000.
        """
        result = np.empty(len(self), np.uint64)
        for first in range(0, len(self), _ROWS):
            ends = self._ends[first:first + _ROWS].astype(np.int64)
            begin = int(self._ends[first - 1]) + 1 if first else 0
            starts = np.concatenate([[0], ends[:-1] + 1 - begin])
            lengths = ends - begin - starts
            text = np.concatenate([self._text[begin:int(ends[-1])], np.zeros(8, np.uint8)])
            words = np.ndarray(len(text) - 7, '<u8', text, strides=(1,))  # the eight bytes from each position on
            found = lengths.astype(np.uint64)
            for offset in range(0, int(lengths.max()), 8):
                rows = np.flatnonzero(lengths > offset)
                unused = 8 * np.maximum(0, offset + 8 - lengths[rows]).astype(np.uint64)  # bits of the next path
                mixed = (found[rows] ^ (words[starts[rows] + offset] << unused)) * _FACTOR
                found[rows] = mixed ^ (mixed >> np.uint64(32))
            result[first:first + _ROWS] = found
        return result


def parse_entries(content, start, read_line, num_classes=None):
    """Parses the lines of a list. Blank lines at its end are ignored.

    Args:
        content: uint8 array, the text of the list; its memory is used for the paths.
        start: position of the first line.
        read_line: function (line, its number) -> (path, label), which may raise an error; it reads the blocks that
            contain an unusual line.
        num_classes: labels from this number on are unusual; None for no limit.
    Returns:
        (`Paths`, labels int64 [lines]).
    """
    end, blank = len(content), b' \t\n\r\x0b\x0c'
    while end > start and content[end - 1] in blank:
        end -= 1
    most = 1 + sum(np.count_nonzero((part == 10) | (part == 13)) for part in (
        content[first:first + _BLOCK] for first in range(start, end, _BLOCK)))  # lines
    ends = own_memory(most, np.uint32 if len(content) < 1 << 32 else np.uint64)
    labels, count, used = own_memory(most, np.int64), 0, 0
    # paths can only become shorter, so they never overtake the text that is still to be read
    while start < end:
        block, size = content[start:min(start + _BLOCK, end)].tobytes(), _BLOCK
        while start + len(block) < end and b'\n' not in block:
            size *= 2
            block = content[start:min(start + size, end)].tobytes()
        start += len(block)
        if start < end:
            rest = len(block) - block.rfind(b'\n') - 1
            start -= rest
            block = block[:len(block) - rest]
        else:
            block += b'\n'
        text, breaks, values = _regular(block, num_classes) or _any(block, read_line, count + 1)
        content[used:used + len(text)] = text[:len(content) - used]
        rows = slice(count, count + len(values))
        ends[rows], labels[rows] = used + breaks, values
        used, count = used + len(text), count + len(values)
    return Paths(content[:used], ends[:count]), labels[:count]


def _any(block, read_line, number):
    """(paths with a line break after each, positions of the line breaks, labels) of a block of whole lines."""
    entries = [read_line(line, index) for index, line in enumerate(block.splitlines(), number)]
    text = b''.join(path + b'\n' for path, _ in entries)
    lengths = np.fromiter((len(path) + 1 for path, _ in entries), np.int64, len(entries))
    return (np.frombuffer(text, np.uint8), np.cumsum(lengths) - 1,
            np.array([label for _, label in entries], dtype=np.int64))


def _regular(block, num_classes):
    """The same if each line is a path, a space or tab and a valid label of up to nine digits; None otherwise."""
    text = np.frombuffer(block.replace(b'\r\n', b'\n'), np.uint8)
    spaces = np.flatnonzero(text <= 32)
    kinds = _KIND[text[spaces]]
    is_break = kinds == _BREAK
    breaks, separators = spaces[is_break], spaces[:-1][is_break[1:]]
    # every line break comes after a blank on its line, and no other kind of space is in the text
    if kinds.max() > _BREAK or is_break[0] or np.any(is_break[1:] & is_break[:-1]):
        return None
    starts = np.concatenate([[0], breaks[:-1] + 1])
    widths = breaks - separators  # of a label with one blank before it
    if (np.any(separators == starts) or _KIND[text[separators - 1]].any() or _KIND[text[starts]].any()
            or not 2 <= widths.min() <= widths.max() <= 10):
        return None
    kept, labels = np.ones(len(text), bool), np.zeros(len(breaks), np.int64)
    for place in range(widths.max()):
        rows = slice(None) if place < widths.min() else np.flatnonzero(widths > place)
        position = separators[rows] + place
        kept[position] = False
        if place:
            digits = text[position] - np.uint8(48)
            if digits.max() > 9:
                return None
            labels[rows] = labels[rows] * 10 + digits
    if num_classes is not None and labels.max() >= num_classes:
        return None
    return text[kept], breaks - np.cumsum(widths), labels
