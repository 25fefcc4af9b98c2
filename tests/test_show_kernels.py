"""tools/show_kernels.py: the numbers against closed forms, and the files."""
import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.predictor import load_model
from errors import UserError

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('show_kernels', ROOT / 'tools' / 'show_kernels.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_reach_of_known_kernels():
    np.testing.assert_allclose(tool.reach(np.ones((3, 5, 5))), [1 / 25, 9 / 25, 1])
    spike = np.zeros((2, 7, 7))
    spike[:, 3, 3] = -4  # absolute weights
    np.testing.assert_allclose(tool.reach(spike), 1)
    corner = np.zeros((1, 7, 7))
    corner[0, 0, 6] = 1
    np.testing.assert_allclose(tool.reach(corner), [0, 0, 0, 1])
    np.testing.assert_allclose(tool.reach(np.zeros((1, 3, 3))), 0)


def test_spectrum_of_known_kernels():
    spike = np.zeros((2, 9, 9))
    spike[0, 4, 4], spike[1, 0, 2] = 3, -1
    np.testing.assert_allclose(tool.spectrum(spike), 2)  # wherever a single weight is, its spectrum is flat
    np.testing.assert_allclose(tool.radial_mean(tool.spectrum(spike)), 2)
    frequencies = np.fft.fftshift(np.fft.fftfreq(tool.GRID))
    box = tool.spectrum(np.ones((1, 3, 3)))
    expected = np.abs(1 + 2 * np.cos(2 * np.pi * frequencies))  # of three ones in a row
    np.testing.assert_allclose(box, expected[:, None] * expected[None], atol=1e-9)
    wave = np.tile(np.cos(2 * np.pi * 0.25 * np.arange(31)), (31, 1))[None]
    means = tool.radial_mean(tool.spectrum(wave))
    assert means.argmax() == tool.GRID // 4


def test_merged_kernels_are_the_sum_of_the_branches(random_run):
    kernels = {(k.stage, k.block, k.form): k.weight for k in tool.kernels_of(load_model(str(random_run))[0], 'tiny')}
    assert {key[:2] for key in kernels} == {(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)}
    for stage, block in ((0, 0), (2, 1)):
        large, small, merged = (kernels[stage, block, form] for form in tool.FORMS)
        margin = (large.shape[-1] - small.shape[-1]) // 2
        padded = np.pad(small, [(0, 0), (margin, margin), (margin, margin)])
        np.testing.assert_allclose(merged, large + padded, rtol=1e-5, atol=1e-7)


def test_the_command_writes_figures_and_tables(random_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    monkeypatch.setattr(tool, 'CHANNELS', 1)  # each panel takes time to draw
    monkeypatch.setattr('sys.argv', ['show_kernels.py', f'-model={random_run}', '-compare=initial',
                                     f'-output={tmp_path / "kernels"}'])
    assert tool.main() == 0
    assert 'stage 0, block 0: 9x9, half of the absolute weights within distance' in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / 'kernels').iterdir()) == [
        'reach.csv', 'reach.png', 'spectrum.csv', 'stage0.png', 'stage1.png', 'stage2.png', 'stage3.png']
    with open(tmp_path / 'kernels' / 'reach.csv') as file:
        rows = list(csv.DictReader(file))
    assert {row['model'] for row in rows} == {'initial', random_run.name}
    large = [float(row['share']) for row in rows if (row['model'], row['stage'], row['form']) == (
        'initial', '0', 'large')]
    assert len(large) == 5 and large[-1] == 1 and large == sorted(large)
    assert np.asarray(Image.open(tmp_path / 'kernels' / 'stage0.png').convert('RGB')).std() > 10


def test_the_same_model_twice_has_rows_of_its_own(random_run, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    monkeypatch.setattr(tool, 'draw_stage', lambda kernels, path: None)
    monkeypatch.setattr(tool, 'draw_reach', lambda kernels, path: None)
    monkeypatch.setattr('sys.argv', ['show_kernels.py', f'-model={random_run}', f'-compare={random_run}',
                                     f'-output={tmp_path / "kernels"}'])
    assert tool.main() == 0
    with open(tmp_path / 'kernels' / 'reach.csv') as file:
        shares = {name: [] for name in (f'{random_run} (-compare)', f'{random_run} (-model)')}
        for row in csv.DictReader(file):
            shares[row['model']].append(row['share'])
    first, second = shares.values()
    assert first == second != []


@pytest.mark.parametrize(('flags', 'message'), [
    (['-model=nothing'], '-model=nothing: no such file or folder'),
    (['-model={run}', '-compare=nothing'], 'nothing: no such file or folder'),
    (['-model={run}', '-output={run}'], 'is not empty')])
def test_mistakes_are_one_line(random_run, tmp_path, monkeypatch, flags, message):
    pytest.importorskip('matplotlib')
    flags = [flag.format(run=random_run) for flag in (f'-output={tmp_path / "new"}', *flags)]
    monkeypatch.setattr('sys.argv', ['show_kernels.py', *flags])
    with pytest.raises((UserError, FileNotFoundError), match=message):
        tool.main()
    assert not (tmp_path / 'new').exists()
