"""Odd, damaged and hostile image files: read as images, or refused in a line that names the file."""
import sys
import warnings
from pathlib import Path

import pytest

from image_files.decode import DataError, decode_image

sys.path.insert(0, str(Path(__file__).parent / 'fuzz'))
import fuzz_images  # noqa: E402
from odd_images import odd_images, ordinary_images, tiff  # noqa: E402


def test_hand_made_files_are_read_or_refused_as_they_should_be(tmp_path):
    files = odd_images()
    assert len(files) >= 40
    wrong = []
    for name, (data, expected) in files.items():
        (tmp_path / name).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # Pillow's, about metadata and sizes
                found = decode_image(tmp_path / name).size
        except DataError as error:
            found = str(error)
        if found != expected and not (isinstance(expected, str) and isinstance(found, str) and expected in found
                                      and found.startswith(f'{tmp_path / name}: ')):
            wrong.append(f'{name}: {found}, not {expected}')
    assert not wrong


def test_no_damaged_file_crashes_hangs_or_takes_memory_out_of_proportion():
    for arguments, expected in ((['-odd'], len(odd_images())), (['-count=200'], 200), (['-cut=397'], None)):
        counts, failures, outcomes = fuzz_images.fuzz(*arguments)
        assert not failures
        assert sum(counts.values()) == len(outcomes) and expected in (None, len(outcomes))
        assert {outcome for _, outcome in counts} == {'read', 'refused'}, 'both are tried'


def test_the_loader_drops_no_image_silently(tmp_path):
    outcomes = fuzz_images.fuzz('-count=20')[2]
    files = [file[1:3] for file in fuzz_images.mutants(0, 0, 20)]
    refused = [outcome == 'refused' for outcome in outcomes]
    assert not fuzz_images.load(tmp_path / 'a', files, refused)
    refused[refused.index(False)] = True
    training, evaluation = fuzz_images.load(tmp_path / 'b', files, refused)
    assert 'replaced of' in training and evaluation.endswith(': evaluated'), 'the check notices a difference'


def test_a_crash_and_a_wrong_image_are_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('a.png').write_bytes(ordinary_images()['rgb.png'])
    assert fuzz_images.read_image('a.png') == 'read'
    with pytest.raises(AssertionError, match='another image'):
        fuzz_images.read_image('a.png', whole='0')
    counts, failures, _ = fuzz_images.fuzz('-count=1', '-no-such-flag')
    assert not counts and 'the interpreter ended with status 2' in failures[0]


def test_16_bit_pixels_take_memory_in_proportion(tmp_path):
    side = 3000
    (tmp_path / 'a.tif').write_bytes(tiff(side, side, 16, bytes(2 * side * side)))
    before = fuzz_images._forget_peak()
    assert decode_image(tmp_path / 'a.tif').size == (side, side)
    assert fuzz_images._peak_memory() - before < 14 * side * side


@pytest.mark.long
def test_ten_thousand_damaged_files(tmp_path):
    _, failures, outcomes = fuzz_images.fuzz('-count=10000', '-seed=1')
    assert not failures and len(outcomes) == 10000
    files = [file[1:3] for file in fuzz_images.mutants(1, 0, 10000)]
    assert not fuzz_images.load(tmp_path, files, [outcome == 'refused' for outcome in outcomes])


@pytest.mark.long
def test_files_cut_after_every_byte():
    assert not fuzz_images.fuzz('-cut=1')[1]
