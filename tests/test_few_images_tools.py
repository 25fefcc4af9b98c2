"""tools/linear_probe.py and tools/average_checkpoints.py."""
import importlib.util
import os
import re
import shutil
import sys

import numpy as np
import paddle
import pytest

from config import config_text, get_config
from deploy.predictor import Predictor
from errors import UserError
from port_weights.safe_load import read_checkpoint
from replknet import build_replknet
from run_folder.checkpoint import model_arrays, save_checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def tool(name):
    spec = importlib.util.spec_from_file_location(name, f'{ROOT}/tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, tiny_yaml, list_dataset):
    """A folder with the settings and three checkpoints of a run, of weights that were never trained."""
    config = get_config(tiny_yaml, ['DATA.DATA_PATH', str(list_dataset)])
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'config.yaml').write_text(config_text(config))
    for seed in range(3):
        paddle.seed(seed)
        model = build_replknet(config)
        save_checkpoint(folder / f'{seed}.pdparams', {'model': model_arrays(model), 'weights_key': 'model'})
    return folder


# ---- the linear probe

@pytest.mark.parametrize('classes', [2, 3])
def test_the_head_is_the_logistic_regression_of_scikit_learn(classes):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 60)
    features = (rng.standard_normal((60, 5)) + 2 * labels[:, None] * [1, 0, 3, 0, 0]).astype('float32')
    features[:, 4] = 7  # a feature that never changes
    weight, bias = tool('linear_probe').fit_head(features, labels, 0.5)
    scaler = StandardScaler().fit(features)
    expected = LogisticRegression(C=0.5, max_iter=2000).fit(scaler.transform(features), labels)
    logits = features @ weight + bias
    found = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(found / found.sum(1, keepdims=True), expected.predict_proba(scaler.transform(features)),
                               atol=2e-4)


def test_a_probe_is_a_run_folder_that_predicts(run, run_script, list_dataset, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(list_dataset, data)
    (data / 'classes.txt').write_text('a\nb\nc\nd\n')
    done = run_script('tools/linear_probe.py', f'-pretrained={run}/0.pdparams', f'-data_path={data}',
                      f'-output={tmp_path}/probe', '-c=1,0.01', '-device=cpu', '-batch_size=4')
    assert done.returncode == 0, done.stderr
    rows = re.findall(r'^C (\S+) +training Acc@1 +(\S+) +validation Acc@1 +(\S+)', done.stdout, re.M)
    assert [float(c) for c, *_ in rows] == [0.01, 1]
    best = max(float(acc1) for *_, acc1 in rows)
    assert done.stdout.splitlines()[-1].startswith(f'Acc@1 {best:.3f} ')
    predictor = Predictor(str(tmp_path / 'probe'))
    lines = (list_dataset / 'val_list.txt').read_text().splitlines()
    predictions = predictor([str(list_dataset / line[:-2]) for line in lines])
    hits = [p.classes[0] == int(line[-1]) for p, line in zip(predictions, lines)]
    assert 100 * np.mean(hits) == pytest.approx(best, abs=1e-3) and predictor.names == ['a', 'b', 'c', 'd']
    before, after = (read_checkpoint(file)['model'] for file in (run / '0.pdparams', tmp_path / 'probe/best.pdparams'))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {'head.weight', 'head.bias'}


def test_mistakes_of_the_probe_are_user_errors(run, tmp_path, list_dataset):
    probe = tool('linear_probe')
    arguments = ['-pretrained=x', '-data_path=y', f'-output={tmp_path}/new']
    for flags, words in (([f'-output={run}'], 'is not empty'), (['-c=1,x'], '-c=1,x: give numbers'),
                         (['-c=0'], 'must be above 0')):
        with pytest.raises(UserError, match=words):
            probe.read_arguments([*arguments, *flags])
    (tmp_path / 'train_list.txt').write_text(f'{list_dataset}/train/class 0/0.jpg 0\n')
    (tmp_path / 'val_list.txt').write_text(f'{list_dataset}/train/class 0/0.jpg 2\n')
    train, val = probe.read_datasets(get_config(None, ['DATA.DATA_PATH', str(tmp_path)]))
    with pytest.raises(UserError, match='train_list.txt has no image of class 1 and of 1 others'):
        probe.count_classes(train, val, tmp_path)
    (tmp_path / 'val_list.txt').write_text(f'{list_dataset}/train/class 0/0.jpg 0,2\n')
    with pytest.raises(UserError, match='val_list.txt: has images with several labels'):
        probe.read_datasets(get_config(None, ['DATA.DATA_PATH', str(tmp_path)]))


# ---- averages

def test_the_average_has_the_mean_weights_and_new_statistics(run, run_script, tmp_path):
    files = [str(run / f'{seed}.pdparams') for seed in range(3)]
    done = run_script('tools/average_checkpoints.py', *files, f'-output={run}/average.pdparams', '-device=cpu',
                      '-images=8')
    assert done.returncode == 0, done.stderr
    assert 'average of 3 checkpoints, statistics from 8 training images' in done.stdout
    result = read_checkpoint(run / 'average.pdparams')['model']
    parts = [read_checkpoint(file)['model'] for file in files]
    for name, array in result.items():
        mean = np.mean([part[name].astype(np.float64) for part in parts], axis=0)
        if not name.endswith(('._mean', '._variance')):
            np.testing.assert_allclose(array, mean, atol=1e-7, err_msg=name)
    assert not np.allclose(result['stem.0.norm._variance'], 1, atol=0.1)  # that of weights that were never trained
    assert Predictor(str(run / 'average.pdparams')).names == ['0', '1', '2', '3']


def test_estimated_statistics_are_the_mean_over_the_batches():
    layer = paddle.nn.BatchNorm2D(3)
    rng = np.random.default_rng(0)
    batches = [paddle.to_tensor(rng.standard_normal((4, 3, 5, 5)).astype('float32') + 3) for _ in range(3)]
    model = paddle.nn.Sequential(layer)
    tool('average_checkpoints').estimate_statistics(model, [(batch, None) for batch in batches], 3)
    np.testing.assert_allclose(layer._mean.numpy(), np.mean([b.numpy().mean((0, 2, 3)) for b in batches], axis=0),
                               rtol=1e-5)
    np.testing.assert_allclose(layer._variance.numpy(), np.mean([b.numpy().var((0, 2, 3)) for b in batches], axis=0),
                               rtol=1e-4)
    assert layer._momentum == 0.9 and not layer.training


def test_checkpoints_of_other_models_are_refused(run, tiny_yaml):
    other = build_replknet(get_config(tiny_yaml, ['MODEL.NUM_CLASSES', 3]))
    save_checkpoint(run / 'other.pdparams', {'model': model_arrays(other), 'weights_key': 'model'})
    averages = tool('average_checkpoints')
    with pytest.raises(UserError, match='other.pdparams: is not of the same model as .*0.pdparams: head.bias differs'):
        averages.average([str(run / '0.pdparams'), str(run / 'other.pdparams')])
    for arguments, words in ((['a', '-output=b'], 'at least two'), (['a', 'b', f'-output={run}/0.pdparams'], 'exists'),
                             (['a', 'b', '-output=no/such/folder.pdparams'], 'there is no folder no/such')):
        with pytest.raises(UserError, match=words):
            averages.read_arguments(arguments)
    assert 'average_checkpoints' not in sys.modules
