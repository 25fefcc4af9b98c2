"""Several labels per image, from the list to the report."""
import csv
import json
import sys

import numpy as np
import paddle
import pytest
from PIL import Image

import predict
from config import get_config
from datasets import get_dataset
from deploy.flip import mean_of_two
from deploy.predictor import Predictor
from errors import UserError, exit_status
from evaluation import multi_label
from evaluation.multi_label import Scores, average_precision, average_precisions, class_metrics
from evaluation.multi_label_report import mistakes
from image_files.decode import DataError
from image_files.find import find_images
from image_files.lists import is_multi_label, list_identity, read_list, write_list
from losses import AsymmetricLoss, BinaryCrossEntropyLoss, build_loss
from mixup import Mixup
from tools import check_images, show_images
from utils import sigmoid

HOT = np.array([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], np.uint8)


def test_a_list_has_several_labels_one_or_none(tmp_path):
    file = tmp_path / 'list.txt'
    file.write_text('a b.png 1,4\nc.png -\nd 7.png 0\n')
    assert is_multi_label(file)
    paths, labels = read_list(file, 5, multi_label=True)
    assert paths.tolist() == [b'a b.png', b'c.png', b'd 7.png']
    np.testing.assert_array_equal(labels, HOT)
    assert find_images([str(file)])[1] == [(1, 4), (), (0,)]
    other = labels.copy()
    other[1, 2] = 1
    assert list_identity(paths, labels)['digest'] != list_identity(paths, other)['digest']
    write_list(tmp_path / 'again.txt', [tmp_path / 'a b.png', tmp_path / 'c.png', tmp_path / 'd 7.png'],
               [(1, 4), (), (0,)])
    assert (tmp_path / 'again.txt').read_text() == file.read_text()
    file.write_text('a.png 1\nb 2.png\n')  # one label, and none given
    assert not is_multi_label(file) and find_images([str(file)])[1] == [1, -1]


@pytest.mark.parametrize(('line', 'words'), [
    ('a.png', "expected 'relative/path 1,4,7', or '-' for no label"), ('a.png 1, 4', 'without spaces'),
    ('a.png 1,5', 'label 5 is out of range, must be 0 to 4'), ('a.png 1,-2', 'label -2 is out of range'),
    ('a.png 3,1,3', 'a label is repeated'), ('a.png 1,,4', 'expected'), ('a.png 1,4,', 'expected')])
def test_a_wrong_line_is_named(tmp_path, line, words):
    (tmp_path / 'list.txt').write_text(f'b.png 1,2\n{line}\n')
    with pytest.raises(DataError, match='list.txt:2: ') as error:
        read_list(tmp_path / 'list.txt', 5, multi_label=True)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_several_labels_need_the_setting(tmp_path):
    (tmp_path / 'list.txt').write_text('b.png 1,2\n')
    with pytest.raises(DataError, match='list.txt:1: labels 1,2: .*DATA.MULTI_LABEL True'):
        read_list(tmp_path / 'list.txt', 5)


@pytest.mark.parametrize(('opts', 'words'), [
    (['TRAIN.LOSS', 'label_smoothing', 'TRAIN.MIXUP_PROB', 0], 'with DATA.MULTI_LABEL use bce or asymmetric'),
    (['TRAIN.LOSS', 'asymmetric_single', 'TRAIN.MIXUP_PROB', 0], 'with DATA.MULTI_LABEL use bce or asymmetric'),
    (['TRAIN.CLASS_WEIGHTS', 'sqrt'], 'TRAIN.CLASS_WEIGHTS is sqrt, for one label'),
    (['TRAIN.SAMPLER', 'balanced'], 'TRAIN.SAMPLER is balanced, for one label'),
    (['DATA.DATASET', 'image_folder'], 'DATA.MULTI_LABEL needs lists')])
def test_settings_for_one_label_are_refused(opts, words):
    with pytest.raises(UserError, match=words):
        get_config(None, ['DATA.MULTI_LABEL', True, *opts])


def test_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score
    rng = np.random.default_rng(0)
    for case in range(60):
        size = int(rng.integers(1, 40))
        targets = (rng.random(size) < rng.choice([0.1, 0.5, 1])).astype(np.uint8)
        scores = rng.integers(-3, 4, size).astype('float32') if case % 2 else rng.standard_normal(size, 'float32')
        found = average_precision(scores, targets)
        if targets.any():
            assert found == pytest.approx(average_precision_score(targets, scores), rel=1e-12)
            shuffled = rng.permutation(size)
            assert average_precision(scores[shuffled], targets[shuffled]) == found
        else:
            assert np.isnan(found)


@pytest.fixture
def results():
    """logits [30, 4] and targets of which the third class has no positives."""
    rng = np.random.default_rng(1)
    targets = (rng.random([30, 4]) < 0.3).astype(np.uint8)
    targets[:, 2] = 0
    return rng.standard_normal([30, 4]).astype('float32') + targets, targets


def test_map_is_the_mean_over_classes_with_positives(results):
    from sklearn.metrics import average_precision_score, log_loss, precision_recall_fscore_support
    logits, targets = results
    scores, loss = Scores(), 0
    for start in (0, 20):
        loss += float(scores.add(*map(paddle.to_tensor, (logits[start:start + 20], targets[start:start + 20])))[0])
    metrics = scores.metrics(loss, 30)
    kept = [0, 1, 3]
    assert metrics['mAP'] == pytest.approx(100 * average_precision_score(targets[:, kept], logits[:, kept]))
    assert (metrics['classes'], metrics['images']) == (3, 30)
    probabilities = sigmoid(logits)
    assert metrics['loss'] == pytest.approx(log_loss(targets.ravel(), probabilities.ravel()), rel=1e-5)
    found = class_metrics(logits, targets)
    precision, recall, f1, support = precision_recall_fscore_support(targets, probabilities >= 0.5,
                                                                     zero_division=np.nan)
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_allclose(found.f1[kept], f1[kept])
    np.testing.assert_array_equal(found.support, support)
    order, size, worst = mistakes(probabilities, targets)
    assert set(order) == set(np.flatnonzero(((probabilities >= 0.5) != targets).any(1)))
    assert (np.diff(size[order]) <= 0).all()
    assert all((probabilities[i, worst[i]] >= 0.5) != targets[i, worst[i]] for i in order)


def test_scores_of_all_processes_come_in_the_order_of_the_list(results, monkeypatch):
    logits, targets = results
    shares = [[*range(8), *range(16, 24)], [*range(8, 16), *range(24, 30)], []]  # the last has no batch

    def process(share, reduce):
        monkeypatch.setattr(multi_label, 'all_reduce_array', reduce)
        scores = Scores()
        if share:
            scores.add(paddle.to_tensor(logits[share]), paddle.to_tensor(targets[share]))
        return scores.metrics(1.0, 30, share), scores

    sent = []
    for share in shares:
        mine = []
        sent.append(mine)
        queue = [np.array([4])]  # the width
        with pytest.raises(UserError) if not share else np.errstate():
            process(share, lambda array, largest=False, mine=mine, queue=queue:
                    queue.pop() if largest else mine.append(array) or array)
    sums = [sum(arrays) for arrays in zip(*sent)]
    answers = iter([np.array([4]), *sums])
    metrics, scores = process([], lambda array, largest=False: next(answers))
    np.testing.assert_array_equal(scores.logits, logits)
    np.testing.assert_array_equal(scores.targets, targets)
    assert metrics['mAP'] == 100 * np.nanmean(average_precisions(logits, targets))


@pytest.mark.parametrize('name', ['auto', 'asymmetric'])
def test_targets_are_smoothed_once_with_and_without_mixup(name):
    logits = paddle.randn([3, 5])
    targets = HOT.astype('float32') * 0.8 + 0.2 / 5
    loss = {'auto': BinaryCrossEntropyLoss(), 'asymmetric': AsymmetricLoss()}[name]
    expected = loss(logits, paddle.to_tensor(targets))
    plain = build_loss(name, smoothing=0.2, multi_label=True)(logits, paddle.to_tensor(HOT.astype('float32')))
    assert float(plain) == pytest.approx(float(expected), rel=1e-6)
    mixup = Mixup(prob=0.0, label_smoothing=0.2, num_classes=5)
    _, mixed = mixup(paddle.zeros([3, 3, 8, 8]), paddle.to_tensor(HOT.astype('float32')), np.random.default_rng(0))
    after = build_loss(name, smoothing=0.2, mixup=True, multi_label=True)(logits, mixed)
    assert float(after) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match='one label per image'):
        build_loss('jsd', aug_splits=2, multi_label=True)


def test_mixup_mixes_the_labels_of_both_images():
    mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=0.0, label_smoothing=0.0, num_classes=5)
    images = paddle.to_tensor(np.arange(3, dtype='float32').reshape([3, 1, 1, 1]) * np.ones([3, 3, 8, 8], 'float32'))
    mixed, targets = mixup(images, paddle.to_tensor(HOT.astype('float32')), np.random.default_rng(0))
    lam = 1 - float(mixed[0, 0, 0, 0]) / 2
    assert 0 < lam < 1
    np.testing.assert_allclose(targets.numpy(), lam * HOT + (1 - lam) * HOT[::-1], atol=1e-6)


def test_the_mean_of_two_views_is_that_of_their_sigmoids():
    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal([4, 3]).astype('float32') * 30 for _ in range(2))
    found = mean_of_two(paddle.to_tensor(one), paddle.to_tensor(other), multi_label=True).numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(sigmoid(found), (sigmoid(one) + sigmoid(other)) / 2, rtol=1e-5)


@pytest.fixture(scope='session')
def several(tmp_path_factory):
    """A data folder of 14 training and 6 validation images with some of four labels."""
    folder = tmp_path_factory.mktemp('several labels')
    rng = np.random.default_rng(0)
    for mode, count in (('train', 14), ('val', 6)):
        lines = []
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f'{mode} {index}.png')
            labels = [k for k in range(4) if (index + 1) >> k & 1]
            lines.append(f'{mode} {index}.png {",".join(map(str, labels[:3])) if index else "-"}\n')
        (folder / f'{mode}_list.txt').write_text(''.join(lines))
    (folder / 'classes.txt').write_text('one\ntwo\nfour\neight\n')
    return folder


def test_an_undecodable_image_is_replaced_by_one_with_the_most_similar_labels(several, tiny_yaml):
    dataset = get_dataset(get_config(tiny_yaml, ['DATA.MULTI_LABEL', True], {'data_path': str(several)}), 'train')
    pixels, labels = dataset[5]
    assert pixels.shape == (3, 32, 32) and labels.dtype == np.uint8 and labels.tolist() == [0, 1, 1, 0]
    keys = dataset.stand_ins((3, 5))
    distances = [(dataset.labels[index] != labels).sum() for _, index in keys]
    assert len(keys) == 10 and distances == sorted(distances) and (3, 5) not in keys
    assert keys == dataset.stand_ins((3, 5))


def run_tool(monkeypatch, capsys, main, *args):
    monkeypatch.setattr(sys, 'argv', ['tool', *map(str, args)])
    return (exit_status(main), *capsys.readouterr())


def test_the_tools_for_images_take_several_labels(several, tiny_yaml, tmp_path, monkeypatch, capsys):
    lines = (several / 'train_list.txt').read_text().replace('train', f'{several}/train')
    (tmp_path / 'train_list.txt').write_text(f'{lines}{several}/train 2.png 2\n')
    status, out, _ = run_tool(monkeypatch, capsys, check_images.main, tmp_path, f'-write_clean={tmp_path}/clean',
                              f'-output={tmp_path}/found.csv')
    assert status == 1 and 'under two labels' in out and '(label 2)' in out and 'labels per image: mean' in out
    lines = (tmp_path / 'clean/train_list.txt').read_text().splitlines()
    assert len(lines) == 13 and lines[0].endswith('train 0.png -') and lines[-1].endswith('train 13.png 1,2,3')
    assert {row['label'] for row in csv.DictReader(open(tmp_path / 'found.csv'))} >= {'0,1', '2'}
    status, _, err = run_tool(monkeypatch, capsys, show_images.main, f'-cfg={tiny_yaml}', f'-data_path={several}',
                              f'-output={tmp_path}', '-opts', 'DATA.MULTI_LABEL', 'True')
    assert status == 0 and (tmp_path / 'train.png').exists() and (tmp_path / 'val.png').exists(), err


@pytest.fixture(scope='session')
def trained(run_script, several, tiny_yaml, tmp_path_factory):
    """The folder of a run on `several`, and its output."""
    folder = tmp_path_factory.mktemp('run') / 'run'
    done = run_script('main_single_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={several}', f'-output={folder}',
                      '-device=cpu', '-opts', 'DATA.MULTI_LABEL', 'True', 'TRAIN.LOSS', 'asymmetric', 'SAVE_TOP_K', 1)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_keeps_the_checkpoint_with_the_best_map_and_predicts_sigmoids(trained, several, tmp_path, monkeypatch,
                                                                            capsys):
    from sklearn.metrics import average_precision_score
    folder, out = trained
    records = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    best = max(record['mAP'] for record in records if record['event'] == 'eval')
    assert f'mAP {best:.3f}' in out and 'Acc@1' not in out
    targets = read_list(several / 'val_list.txt', 4, multi_label=True)[1]
    images = [str(several / f'val {index}.png') for index in range(6)]
    found = Predictor(str(folder), device='cpu', threshold=0.0)(images)
    logits = np.stack([prediction.logits for prediction in found])
    positive = targets.any(0)
    assert 100 * average_precision_score(targets[:, positive], logits[:, positive]) == pytest.approx(best, abs=0.01)
    for prediction in found:
        np.testing.assert_allclose(prediction.scores, sigmoid(prediction.logits)[prediction.classes])
        assert len(prediction.classes) == 4
    assert Predictor(str(folder), device='cpu', threshold=1.0)(images)[0].classes == []

    status, out, err = run_tool(
        monkeypatch, capsys, predict.main, several / 'val_list.txt', f'-model={folder}', '-threshold=0.4',
        f'-output={tmp_path}/found.jsonl', f'-save_images={tmp_path}/sheets', f'-report={tmp_path}/report',
        f'-cam={tmp_path}/cam', '-device=cpu')
    assert status == 0, err
    assert out.splitlines()[-1].startswith(f'mAP {best:.2f}'[:-1])
    lines = [json.loads(line) for line in open(tmp_path / 'found.jsonl')]
    assert lines[0]['label'] == [] and lines[2]['label'] == [0, 1]
    assert all(entry['score'] >= 0.4 for line in lines for entry in line['top'])
    rows = list(csv.DictReader(open(tmp_path / 'report/classes.csv')))
    assert [row['name'] for row in rows] == ['one', 'two', 'four', 'eight']
    assert 100 * np.mean([float(row['average_precision']) for row in rows if row['average_precision']]) == \
        pytest.approx(best, abs=0.01)
    assert 'mAP' in (tmp_path / 'report/report.html').read_text()


def test_labels_that_do_not_fit_the_model_are_refused(random_run, several, monkeypatch, capsys):
    status, _, err = run_tool(monkeypatch, capsys, predict.main, several / 'val_list.txt', f'-model={random_run}',
                              '-device=cpu')
    assert status == 2 and 'has the labels' in err and 'one label per image' in err
    with pytest.raises(UserError, match='-threshold=0.5: .*one label per image'):
        Predictor(str(random_run), device='cpu', threshold=0.5)


@pytest.mark.long
@pytest.mark.parametrize('more', [(), ('-batch_size_eval=20',)])  # the second: a process without a batch
def test_map_and_report_do_not_depend_on_the_number_of_processes(trained, several, run_script, tmp_path, more):
    lines = []
    for number, script in ((1, 'main_single_gpu.py'), (2, 'main_multi_gpu.py')):
        done = run_script(script, '-eval', f'-pretrained={trained[0]}', f'-data_path={several}', '-device=cpu',
                          f'-report={tmp_path}/{number}', *more, *(('-nprocs=2',) if number == 2 else ()))
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.splitlines()[-1])
    assert lines[0] == lines[1] and lines[0].startswith('mAP ')
    for name in ('classes.csv', 'mistakes.csv'):
        assert (tmp_path / f'1/{name}').read_bytes() == (tmp_path / f'2/{name}').read_bytes()
