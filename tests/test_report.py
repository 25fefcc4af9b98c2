"""The report of an evaluation: its numbers against scikit-learn, its files, and that all ways to it agree."""
import csv
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import paddle
import pytest
from PIL import Image

import predict
from atomic_file import atomic_folder, refuse_taken
from config import get_config
from deploy.flip import FlipAveraged, mean_of_two
from deploy.predictor import Predictor, load_model
from errors import UserError, exit_status
from evaluation import metrics, predictions
from evaluation.metrics import BINS, Outcome
from evaluation.predictions import Predictions
from evaluation.report import check_report, write_report
from utils import accuracy_sums

FILES = {'report.html', 'classes.csv', 'confusion.csv', 'confused_pairs.csv', 'mistakes.csv', 'calibration.csv',
         'confusion.png', 'calibration.png', 'mistakes'}


def outcome(labels, predicted, confidence=0.5):
    confidence = np.broadcast_to(np.asarray(confidence, 'float64'), [len(labels)])
    return Outcome(np.array(labels), np.array(predicted), confidence, confidence / 2)


@pytest.fixture(params=['all classes', 'missing classes', 'one class', 'a perfect model'])
def case(request):
    """(outcome, number of classes); some classes have no images, some are never predicted, some neither."""
    rng = np.random.default_rng(0)
    if request.param == 'one class':
        return outcome([0, 0], [0, 0], [0.3, 1]), 1
    labels, predicted = rng.integers(0, 6, [2, 200])
    predicted = np.where(rng.random(200) < 0.5, labels, predicted)
    if request.param == 'missing classes':  # 2: no images, 4: no predictions, 7 and 8: neither
        labels, predicted = np.where(labels == 2, 3, labels), np.where(predicted == 4, 5, predicted)
        return outcome(labels, predicted, rng.random(200)), 9
    return outcome(labels, labels if request.param == 'a perfect model' else predicted, rng.random(200)), 6


def test_class_metrics_are_those_of_scikit_learn(case):
    from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support
    result, classes = case
    found = metrics.class_metrics(result, classes)
    precision, recall, f1, support = precision_recall_fscore_support(
        result.labels, result.predicted, labels=range(classes), zero_division=np.nan)
    np.testing.assert_array_equal(found.support, support)
    np.testing.assert_allclose(found.precision, precision, rtol=1e-15)
    np.testing.assert_allclose(found.recall, recall, rtol=1e-15)
    np.testing.assert_allclose(found.f1, f1, rtol=1e-15)
    with np.errstate(all='ignore'):
        assert np.nanmean(found.f1) == pytest.approx(
            f1_score(result.labels, result.predicted, labels=range(classes), average='macro', zero_division=np.nan))
    if len(set(result.predicted) - set(result.labels)) == 0:  # scikit-learn warns of the others
        assert np.nanmean(found.recall) == pytest.approx(balanced_accuracy_score(result.labels, result.predicted))


def test_confusion_is_that_of_scikit_learn(case):
    from sklearn.metrics import confusion_matrix
    result, classes = case
    matrix = confusion_matrix(result.labels, result.predicted, labels=range(classes))
    found = np.zeros([classes, classes], int)
    labels, predicted, counts = metrics.confusion_cells(result, classes)
    found[labels, predicted] = counts
    np.testing.assert_array_equal(found, matrix)
    assert (counts > 0).all()
    labels, predicted, counts = metrics.confused_pairs(result, classes)
    assert (labels != predicted).all() and (np.diff(counts) <= 0).all()
    assert counts.sum() == (result.labels != result.predicted).sum() == len(metrics.mistakes(result))


def test_calibration_is_that_of_scikit_learn(case):
    from sklearn.calibration import calibration_curve
    result, _ = case
    edges = np.linspace(0, 1, BINS + 1)
    result = result._replace(confidence=np.concatenate([result.confidence[len(edges):], edges])[-len(result.labels):])
    found, correct = metrics.calibration(result), result.labels == result.predicted
    filled = found.images > 0
    accuracy, confidence = calibration_curve(correct, result.confidence, n_bins=BINS)
    np.testing.assert_allclose(found.accuracy[filled], accuracy, rtol=1e-12)
    np.testing.assert_allclose(found.confidence[filled], confidence, rtol=1e-12)
    assert np.isnan(found.accuracy[~filled]).all() and found.images.sum() == len(correct)
    assert found.ece == pytest.approx((abs(accuracy - confidence) * found.images[filled]).sum() / len(correct))


def test_mistakes_are_ordered_by_confidence():
    found = metrics.mistakes(outcome([0, 1, 1, 0, 2], [0, 0, 2, 1, 1], [1, 0.5, 0.9, 0.5, 0.7]))
    assert found.tolist() == [2, 4, 1, 3]


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_predictions_count_ties_like_the_accuracy(dtype):
    rng = np.random.default_rng(0)
    logits = paddle.to_tensor(rng.integers(-2, 3, [50, 7]).astype('float32') * 20).astype(dtype)  # ties in most rows
    labels = paddle.to_tensor(rng.integers(0, 7, 50))
    collected = Predictions()
    assert not collected
    for start in (0, 20, 40):
        collected.add(logits[start:start + 20], labels[start:start + 20])
    result = collected.outcome()
    assert (result.labels == result.predicted).sum() == int(accuracy_sums(logits, labels)[0])
    softmax = paddle.nn.functional.softmax(logits.astype('float64'), axis=1).numpy()
    np.testing.assert_allclose(result.confidence, softmax.max(1), atol=1e-12)
    np.testing.assert_allclose(result.label_probability, softmax[np.arange(50), labels.numpy()], atol=1e-12)


def test_predictions_of_all_processes_come_in_the_order_of_the_list(monkeypatch):
    rng = np.random.default_rng(0)
    logits, labels = paddle.to_tensor(rng.standard_normal([5, 3], 'float32')), paddle.to_tensor([0, 1, 2, 1, 0])
    together = Predictions()
    together.add(logits, labels)
    shares, sent = [[0, 1, 4], [2, 3], []], []
    monkeypatch.setattr(predictions, 'all_reduce_sum', lambda values: sent.append(np.array(values)) or list(values))
    for share in shares:
        mine = Predictions()
        if share:
            mine.add(logits[share], labels[share])
        mine.gather(share, 5)
    monkeypatch.setattr(predictions, 'all_reduce_sum', lambda values: sum(sent).tolist())
    for one, other in zip(together.outcome(), Predictions().gather([], 5)):
        assert one.dtype == other.dtype and np.array_equal(one, other)


class _Page(HTMLParser):
    """Checks that tags are closed in their order and that nothing is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.images = [], [], 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ('link', 'iframe', 'object', 'a')
        assert attributes.get('src', 'data:').startswith('data:image/png;base64,') or 'src' not in attributes
        self.images += tag == 'img'
        if tag not in ('meta', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == 'td':
            self.cells.append(text)


def write(folder, result, names, paths=None):
    correct = float(np.mean(result.labels == result.predicted))
    write_report(folder, result, paths or [f'{i}.png' for i in range(len(result.labels))], names,
                 {'acc1': 100 * correct, 'acc5': 100.0, 'loss': 1.0}, {'weights': 'w <&> "x"'})
    return _Page((folder / 'report.html').read_text())


def rows(path):
    with open(path, newline='', errors='surrogateescape') as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings('error::UserWarning')
@pytest.mark.parametrize('classes', [4, 60])
def test_a_report_with_odd_names_and_paths(tmp_path, classes):
    names = ['<b>', 'a $x^ and $y_', '类别', 'a name that is far too long for a figure of this size', *map(str, range(
        4, classes))]
    image = tmp_path / 'a, "b" <i>.png'
    Image.new('RGB', (30, 20), 'red').save(image)
    paths = [str(image), f'{tmp_path}/no\udce9.png', str(image), str(image)]
    page = write(tmp_path / 'new/report', outcome([0, 1, 3, 3], [1, 2, 3, 0], [0.5, 0.9, 1, 0.7]), names, paths)
    folder = tmp_path / 'new/report'
    assert {path.name for path in folder.iterdir()} == FILES
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['report']
    assert page.images == 3 and '<b>' in page.cells and '2 类别' in page.cells and str(image) in page.cells
    assert 'w <&> "x"' not in (folder / 'report.html').read_text()
    assert [row['picture'] for row in rows(folder / 'mistakes.csv')] == [paths[1], paths[3], paths[0]]
    assert [(row['label'], row['predicted'], row['images']) for row in rows(folder / 'confused_pairs.csv')] == [
        ('0', '1', '1'), ('1', '2', '1'), ('3', '0', '1')]
    table = rows(folder / 'classes.csv')
    assert [row['name'] for row in table] == names
    assert [table[3][key] for key in ('accuracy', 'precision', 'f1', 'images')] == ['0.500000', '1.000000', '0.666667',
                                                                                  '2']
    assert table[2]['accuracy'] == '' and table[2]['precision'] == '0.000000'
    assert [row['3'] for row in rows(folder / 'confusion.csv')][:4] == ['0', '0', '0', '1']
    assert Image.open(folder / 'mistakes/sheet_0001.png').size == (3 * 180, 228)


def test_a_report_without_mistakes(tmp_path):
    for classes in (3, 60):
        page = write(tmp_path / str(classes), outcome([0, 1], [0, 1]), [str(i) for i in range(classes)])
        assert page.images == 2 and not (tmp_path / str(classes) / 'mistakes').exists()


def test_a_report_is_complete_or_absent(tmp_path, monkeypatch):
    names, result = ['0', '1'], outcome([0, 1], [0, 0])
    (tmp_path / 'empty').mkdir()
    write(tmp_path / 'empty', result, names)
    assert FILES == {path.name for path in (tmp_path / 'empty').iterdir()}
    with pytest.raises(UserError, match='first those of 1.png'):
        write(tmp_path / 'new', outcome([0, 1], [0, 0], [1, np.nan]), names)

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('evaluation.report.draw_calibration', full)
    (tmp_path / 'other').mkdir()
    for name in ('new', 'other'):
        with pytest.raises(UserError, match=f'-report=.*{name}: cannot be written: No space left'):
            write(tmp_path / name, result, names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['empty', 'other']
    assert not list((tmp_path / 'other').iterdir())


def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    check_report(tmp_path / 'new/folder')
    for path, words in ((tmp_path, 'is not empty'), (tmp_path / 'file', 'is a file'),
                        (tmp_path / 'file/new', 'cannot be created in')):
        with pytest.raises(UserError, match=f'-report={path}: {words}'):
            check_report(path)
        with pytest.raises(UserError, match='-cam='):
            refuse_taken(path, 'cam')
    assert [path.name for path in tmp_path.iterdir()] == ['file']
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(UserError, match='pip install matplotlib'):
        check_report(tmp_path / 'new')


def test_an_atomic_folder_that_is_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / 'a/b') as folder:
        assert not (tmp_path / 'a/b').exists()
        open(f'{folder}/file', 'w').close()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob('*')] == ['a']


def test_the_mean_of_two_views():
    rng = np.random.default_rng(0)
    one, other = (paddle.to_tensor(rng.normal(0, 20, [5, 4]).astype('float32')) for _ in range(2))
    softmax = paddle.nn.functional.softmax
    found = mean_of_two(one, other)
    np.testing.assert_allclose(softmax(found).numpy(), (softmax(one) + softmax(other)).numpy() / 2, atol=1e-6)
    np.testing.assert_allclose(paddle.exp(found).sum(1).numpy(), 1, rtol=1e-5)
    np.testing.assert_allclose(mean_of_two(one, one).numpy(), np.log(softmax(one.astype('float64')).numpy()), atol=1e-5)


def test_flip_averages_an_image_and_its_mirror_image(random_run):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 50, 3), dtype=np.uint8))
    mirrored = image.transpose(Image.FLIP_LEFT_RIGHT)
    plain = Predictor(str(random_run), device='cpu')([image, mirrored])
    expected = np.mean([np.exp(p.logits) / np.exp(p.logits).sum() for p in plain], 0)
    for arguments in ({}, {'features': True}, {'backend': 'inference', 'batch_size': 1}):
        found = Predictor(str(random_run), device='cpu', tta='flip', **arguments)([image, mirrored])
        for one in found:
            np.testing.assert_allclose(np.exp(one.logits), expected, atol=1e-5)
            np.testing.assert_allclose(one.scores, expected[one.classes], atol=1e-5)
        if arguments.get('features'):
            plain = Predictor(str(random_run), device='cpu', features=True)([image])
            assert np.array_equal(found[0].features, plain[0].features)
    model = load_model(str(random_run))[0]
    images = paddle.randn([2, 3, 32, 32])
    with paddle.no_grad():
        one, other = FlipAveraged(model)(images), FlipAveraged(model)(paddle.flip(images, axis=[3]))
    np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-5)
    with pytest.raises(UserError, match='-tta=rotate'):
        Predictor(str(random_run), tta='rotate')


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('tta', ['', pytest.param('flip', marks=pytest.mark.long)])
def test_all_ways_to_a_report_agree(run_script, random_run, list_dataset, tmp_path, tta):
    lines, ways = {}, [('one', 'main_single_gpu.py', ()), ('two', 'main_multi_gpu.py', ('-nprocs=2',))]
    if tta:
        ways.append(('idle', 'main_multi_gpu.py', ('-nprocs=2', '-batch_size_eval=20')))  # a process without a batch
    for name, script, more in ways:
        done = run_script(script, '-eval', f'-pretrained={random_run}', f'-data_path={list_dataset}', '-device=cpu',
                          f'-output={tmp_path}/run {name}', f'-report={tmp_path}/{name}', f'-tta={tta}', *more)
        assert done.returncode == 0, done.stderr
        lines[name] = done.stdout.splitlines()[-1]
        record = json.loads((tmp_path / f'run {name}/metrics.jsonl').read_text())
        assert record.get('tta', '') == tta
    done = run_script('predict.py', list_dataset / 'val_list.txt', f'-model={random_run}', '-device=cpu',
                      f'-report={tmp_path}/predict', f'-tta={tta}', f'-output={tmp_path}/o.csv')
    assert done.returncode == 0, done.stderr
    lines['predict'] = done.stdout.splitlines()[-1]
    assert len(set(lines.values())) == 1
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
    for other in {*lines} - {'one', 'two'}:  # other batches, other programs: the probabilities may differ by rounding
        for name in ('classes.csv', 'confusion.csv', 'confused_pairs.csv'):
            assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / other / name).read_bytes()
    correct = sum(int(row['correct']) for row in rows(tmp_path / 'one/classes.csv'))
    assert f'Acc@1 {100 * correct / 11:.3f} ' in lines['one']
    page = (tmp_path / 'one/report.html').read_text()
    assert ('its mirror image' in page) == bool(tta) and f'{random_run}/best.pdparams' in page


def test_mistakes_on_the_command_line(random_run, list_dataset, tmp_path, monkeypatch, capsys):
    for arguments, words in (({'report': 'new'}, 'EVAL_REPORT is used only with -eval'),
                             ({'tta': 'flip'}, 'EVAL_TTA is used only with -eval'),
                             ({'tta': 'rotate', 'eval': True}, "EVAL_TTA is 'rotate'"),
                             ({'report': './x', 'output': 'x', 'eval': True}, 'which is also the run folder')):
        with pytest.raises(UserError, match=words):
            get_config(flags=arguments)
    image, = list((list_dataset / 'val' / 'class 1').glob('1.jpg'))
    (tmp_path / 'list.txt').write_text(f'{image} 1\n{tmp_path}/none.jpg 0\n')
    listed = tmp_path / 'list.txt'
    for source, flags, status, words in (
            (image, [f'-report={tmp_path}/report'], 2, 'no image has a label'),
            (image, [f'-report={tmp_path}/x', f'-cam={tmp_path}/x/'], 2, 'a folder of its own'),
            (image, ['-tta=rotate'], 2, 'choose flip'),
            (listed, [f'-report={list_dataset}'], 2, 'is not empty'),
            (listed, [f'-report={tmp_path}/report'], 1, '1 of 2 images could not be read')):
        monkeypatch.setattr('sys.argv', ['predict.py', str(source), f'-model={random_run}', '-device=cpu', *flags])
        assert exit_status(predict.main) == status
        assert words in capsys.readouterr().err
    page = (tmp_path / 'report/report.html').read_text()
    assert re.search('unreadable images, left out</dt><dd>1<', page)


def test_a_run_that_cannot_write_its_report_ends_before_the_evaluation(run_script, random_run, list_dataset, tmp_path):
    done = run_script('main_single_gpu.py', '-eval', f'-pretrained={random_run}', f'-data_path={list_dataset}',
                      '-device=cpu', f'-output={tmp_path}/run', f'-report={list_dataset}')
    assert done.returncode == 2 and done.stderr == (
        f'-report={list_dataset}: is not empty; choose another folder\n')
    assert not (tmp_path / 'run').exists()


def test_nothing_of_it_is_imported_unless_used(run_script, tmp_path):
    (tmp_path / 'check.py').write_text(
        'import sys; sys.path.insert(0, sys.argv[1])\nimport paddle_env, launcher, predict\n'
        'print([m for m in sys.modules if m.split(".")[0] in ("evaluation", "matplotlib", "sklearn")])\n')
    done = run_script(tmp_path / 'check.py', predict.__file__.rsplit('/', 1)[0])
    assert done.stdout.splitlines()[-1] == '[]', done.stderr
