"""The benchmark scripts: they run, their files can be read, and their counts are right. Timings are not tested."""
import csv
import gzip
import importlib.util
import itertools
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

import benchmark
from config import get_config
from datasets import get_dataset
from deploy.equivalence import dygraph_program
from errors import UserError
from replknet import RepLKNet

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import bench_dwconv  # noqa: E402
import harness  # noqa: E402
import prepare_fashion  # noqa: E402

TORCH = importlib.util.find_spec('torch') is not None


def read(path):
    header, rows = harness.read_csv(path)
    assert {'command', 'date', 'machine', 'cores', 'threads', 'versions'} <= set(header) and all(header.values())
    with open(path, newline='') as file:
        assert len({len(line) for line in csv.reader(file) if not line[0].startswith('#')}) == 1, 'rows of one length'
    return header, rows


def test_bench_dwconv(run_script, tmp_path):
    shapes, output = tmp_path / 'shapes.txt', tmp_path / 'new folder' / 'dwconv.csv'
    shapes.write_text('# a comment\n1 3 6 5 7 1 forward\n\n2 4 5 5 3 2 training  # stride 2\n')
    systems = ['custom', 'fft', 'native', 'torch', 'torch-channels-last']
    done = run_script('benchmarks/bench_dwconv.py', f'-shapes={shapes}', f'-output={output}', '-rounds=2', '-threads=1',
                      '-patience=0', f'-systems={",".join(systems)}')
    assert done.returncode == 0, done.stderr
    assert 'differ' not in done.stderr, done.stderr
    _, rows = read(output)
    expected = systems if TORCH else systems[:3]
    assert [(r['system'], r['mode']) for r in rows] == list(itertools.chain(
        ((name, 'forward') for name in expected), ((name, 'training') for name in expected)))
    for row in rows:
        assert float(row['median_ms']) >= float(row['min_ms']) > 0 and int(row['calls']) >= 2
        assert row['peak_gflops'] == '' or 0 <= float(row['share_of_peak']) < 3
    assert done.stdout.count('| forward 1x3x6x5 k7 s1') >= 1


@pytest.mark.parametrize(('height', 'width', 'kernel', 'stride'), [(6, 5, 7, 1), (5, 9, 3, 2), (1, 1, 31, 1)])
def test_useful_flop_counts_the_taps_inside_the_image(height, width, kernel, stride):
    taps = sum(0 <= y + dy < height and 0 <= x + dx < width
               for y in range(0, height, stride) for x in range(0, width, stride)
               for dy in range(-(kernel // 2), kernel // 2 + 1) for dx in range(-(kernel // 2), kernel // 2 + 1))
    case = {'mode': 'forward', 'batch': 2, 'channels': 3, 'height': height, 'width': width, 'kernel': kernel,
            'stride': stride}
    assert bench_dwconv.useful_flop(case) == 2 * 2 * 3 * taps
    assert bench_dwconv.useful_flop({**case, 'mode': 'training'}) == 3 * 2 * 2 * 3 * taps


@pytest.mark.parametrize('suite', [pytest.param('inference', marks=pytest.mark.long), 'training'])
def test_bench_model(run_script, tiny_yaml, tmp_path, suite):
    output = tmp_path / 'model.csv'
    systems = ['custom', 'stock', 'inference', 'torch'] if suite == 'inference' else ['custom', 'stock', 'torch']
    done = run_script('benchmarks/bench_model.py', f'-cfg={tiny_yaml}', f'-suites={suite}', '-rounds=2',
                      '-threads=1', '-patience=0', f'-systems={",".join(systems)}', f'-output={output}')
    assert done.returncode == 0, done.stderr
    assert 'differ' not in done.stderr, done.stderr
    header, rows = read(output)
    assert header['model'] == 'tiny'
    expected = systems if TORCH else systems[:-1]
    assert [r['system'] for r in rows] == expected * (3 if suite == 'inference' else 1)
    for row in rows:
        assert float(row['images_per_s']) == pytest.approx(int(row['batch']) / float(row['median_ms']) * 1000, 1e-2)
        assert int(row['peak_mb']) > 50


@pytest.mark.long
def test_bench_model_in_bfloat16_and_int8(run_script, tiny_yaml, tmp_path):
    done = run_script('benchmarks/bench_model.py', f'-cfg={tiny_yaml}', '-suites=rounded,rounded-training',
                      '-rounds=0', '-threads=1', '-patience=0', f'-output={tmp_path}/model.csv',
                      '-systems=inference,inference-bf16,inference-int8,custom,custom-bf16')
    assert done.returncode == 0 and 'left out' not in done.stderr, done.stderr
    assert [row['system'] for row in read(tmp_path / 'model.csv')[1]] == [
        *['inference', 'inference-bf16', 'inference-int8'] * 2, 'custom', 'custom-bf16']


def test_benchmark_of_one_form_in_both_backends(run_script, tiny_yaml, tmp_path):
    done = run_script('benchmark.py', f'-model={tiny_yaml}', '-image_size=64', '-batch_size=2', '-form=fused',
                      '-threads=1', '-budget=1', '-patience=0', f'-output={tmp_path}/b.json', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'differ' not in done.stderr and 'left out' not in done.stderr, done.stderr
    results = json.loads((tmp_path / 'b.json').read_text())
    assert results['model'] == str(tiny_yaml) and results['threads'].startswith('1,') and results['paddle']
    assert [r['backend'] for r in results['results']] == ['dygraph', 'inference']
    for row in results['results']:
        assert 0 < row['p50_ms'] <= row['p90_ms'] <= row['p99_ms'] and row['calls'] >= 3 and row['peak_mb'] > 50
        assert 2000 / row['p99_ms'] <= row['images_per_s']
        assert not row['shares'] or sum(row['shares'].values()) == pytest.approx(1, abs=1e-3)
    assert len(re.findall(r'^\| fused +\| (?:dygraph|inference) ', done.stdout, re.M)) == 4


@pytest.mark.skipif(paddle.version.full_version < '3', reason='its profiler needs a GPU driver')
def test_time_is_attributed_to_the_kinds_of_layers(monkeypatch):
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3)
    model.eval()
    images, kinds = np.zeros((1, 3, 64, 64), np.float32), []
    with benchmark.marked(kinds):
        model(paddle.to_tensor(images))
    # stem, stages (two pointwise around the depthwise ones, two in the FFN), transitions; two kernels of 5 are small
    assert Counter(kinds) == {'dense conv': 1, 'pointwise': 1 + 4 * 4 + 3, 'small depthwise': 2 + 4 + 2 + 3,
                              'large depthwise': 2}
    assert kinds[:7] == ['dense conv', 'small depthwise', 'pointwise', 'small depthwise', 'pointwise',
                         'large depthwise', 'small depthwise']
    run = dygraph_program(model)
    run(images)
    slow = model.stages[0].blocks[0].large_kernel.large_kernel_origin.conv
    slow.register_forward_post_hook(lambda *_: None)  # a layer with a hook is computed and counted on its own
    monkeypatch.setattr(slow, 'forward', lambda x, forward=slow.forward: time.sleep(0.2) or forward(x))
    shares = benchmark.time_shares(lambda: run(images))
    assert set(shares) == set(benchmark.KINDS) and sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert min(shares.values()) > 0 and shares['large depthwise'] == max(shares.values())
    assert benchmark.time_shares(lambda: np.tanh(images), kinds) == {}  # no such convolutions in the trace


@pytest.mark.skipif(not importlib.util.find_spec('matplotlib'), reason='it draws the charts')
def test_report_fills_its_sections_and_keeps_the_others(run_script, tmp_path):
    results, page = tmp_path / 'model.csv', tmp_path / 'page.md'
    row = {'system': 'custom', 'suite': 'kernel', 'merged': True, 'batch': 2, 'size': 224, 'kernels': '3 3 3 3',
           'median_ms': 12.5, 'min_ms': 12, 'calls': 3, 'images_per_s': 160, 'peak_mb': 700}
    harness.write_csv(results, {'command': 'python x', 'machine': 'a: b'}, [row, {**row, 'kernels': '51 51 51 51'}])
    page.write_text('above\n<!-- kernel -->\nold\n<!-- end -->\nbetween\n<!-- size -->\nkept\n<!-- end -->\n')
    done = run_script('benchmarks/report.py', results, f'-page={page}')
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert 'old' not in text and 'machine: a: b' in text and re.search(r'\| 51 +\| 12 \(700\)', text), text
    assert text.startswith('above\n') and text.endswith('between\n<!-- size -->\nkept\n<!-- end -->\n')
    assert (tmp_path / 'page_growth.png').stat().st_size > 1000
    harness.write_csv(results, {'command': 'python x', 'model': 'tiny'}, [{**row, 'suite': 'inference'}])
    page.write_text('<!-- inference -->\nkept\n<!-- end -->\n<!-- inference-tiny -->\nold\n<!-- end -->\n')
    done = run_script('benchmarks/report.py', results, f'-page={page}')
    assert done.returncode == 0 and 'kept' in page.read_text() and 'old' not in page.read_text(), done.stderr
    harness.write_csv(results, {'command': 'python x'}, [row])
    page.write_text('nothing to fill')
    done = run_script('benchmarks/report.py', results, f'-page={page}')
    assert done.returncode == 2 and '<!-- kernel -->' in done.stderr and page.read_text() == 'nothing to fill'


@pytest.mark.skipif(not importlib.util.find_spec('matplotlib'), reason='it draws the chart')
def test_the_chart_of_the_readme_is_drawn_from_the_recorded_results(run_script, tmp_path):
    done = run_script('benchmarks/draw_speed.py', f'-output={tmp_path}/speed.png')
    assert done.returncode == 0, done.stderr
    assert 10_000 < (tmp_path / 'speed.png').stat().st_size < 150_000


def test_systems_whose_results_differ_are_found():
    answers = {'peak': {'sample': []}, 'a': {'sample': [[1.0, -2.0], [3.0]]}, 'b': {'sample': [[1.0, -2.003], [3.001]]},
               'c': {'sample': [[1.0, -2.0], [float('nan')]]}, 'd': {'sample': [[1.1, -2.0], [3.0]]}}
    assert harness.disagreement(answers) == ['c', 'd']


def test_a_process_that_ends_is_reported_with_its_last_line(tmp_path):
    script = tmp_path / 'dies.py'
    script.write_text('import sys\nsys.stdin.readline()\nsys.exit("out of luck")\n')
    system = harness.System('dying', [str(script)], 1, {})
    with pytest.raises(harness.SystemFailed, match='status 1, out of luck'):
        system.ask(setup={})
    system.close()


def test_bench_data_measures_pipelines_and_stages(run_script):
    done = run_script('benchmarks/bench_data.py', '-rounds=1', '-count=1', '-size=32', '-width=64', '-height=48')
    assert done.returncode == 0, done.stderr
    for name in ('DATA.BACKEND pil', 'this project', 'read and decode', 'evaluation: resize and crop', 'erase'):
        assert re.search(rf'^  {name} +\d+ +\(\d+, \d+\) +[\d.]+ ms$', done.stdout, re.M), name
    if not TORCH:
        assert "timm is left out: No module named 'timm'" in done.stdout


@pytest.mark.parametrize(('line', 'words'), [
    ('1 3 6 6 4 1', 'kernel odd'), ('1 3 6 6 5', 'batch channels'), ('1 3 0 6 5 1', 'found "1 3 0 6 5 1"'),
    ('1 3 6 6 5 1 sideways', 'forward|training'), ('one 3 6 6 5 1', 'batch channels'), ('# none', 'contains no shape')])
def test_mistakes_in_the_shapes_file_are_one_line_errors(run_script, tmp_path, line, words):
    shapes = tmp_path / 'shapes.txt'
    shapes.write_text(line + '\n')
    done = run_script('benchmarks/bench_dwconv.py', f'-shapes={shapes}')
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1, done.stderr
    assert str(shapes) in done.stderr


@pytest.mark.parametrize(('script', 'flag', 'words'), [
    ('bench_dwconv.py', '-systems=custom,tensorflow', '"tensorflow" is not one of custom, fft'),
    ('bench_dwconv.py', '-shapes=nowhere.txt', 'nowhere.txt'),
    ('bench_model.py', '-suites=speed', '"speed" is not one of inference, training'),
    ('bench_model.py', '-cfg=nowhere.yaml', 'nowhere.yaml'),
    ('report.py', 'nowhere.csv', 'nowhere'),
    ('../benchmark.py', '-form=folded', '"folded" is not one of training, merged, fused'),
    ('../benchmark.py', '-threads=0', '-threads')])
def test_wrong_flags_are_one_line_errors(run_script, script, flag, words):
    done = run_script(f'benchmarks/{script}', flag)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_fashion_mnist_becomes_a_data_folder(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in 'train', 't10k':
        (tmp_path / f'{part}-images-idx3-ubyte.gz').write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (tmp_path / f'{part}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(bytes(8) + bytes([7, 0, 9])))
    assert prepare_fashion.main([f'-output={tmp_path}/data', f'-source={tmp_path}', '-train=2']) == 0
    assert capsys.readouterr().out == f'2 images to train on and 3 to evaluate in {tmp_path}/data\n'
    config = get_config(None, ['DATA.DATA_PATH', f'{tmp_path}/data', 'MODEL.NUM_CLASSES', 10])
    assert [get_dataset(config, mode).labels.tolist() for mode in ('train', 'val')] == [[7, 0], [7, 0, 9]]
    np.testing.assert_array_equal(Image.open(tmp_path / 'data/val/00002.png'), images[2])
    with pytest.raises(UserError, match='exists'):
        prepare_fashion.main([f'-output={tmp_path}/data', f'-source={tmp_path}'])
    with pytest.raises(UserError, match='no such file; install'):
        prepare_fashion.main([f'-output={tmp_path}/other', f'-source={tmp_path}/none'])
