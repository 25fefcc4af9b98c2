"""tools/shape_bias.py: the published protocol on decisions that are known."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import config_text, get_config
from deploy.predictor import Prediction
from errors import UserError
from image_files.lists import IMAGENET_NAMES
from replknet import build_replknet
from run_folder.checkpoint import model_arrays, save_checkpoint

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('shape_bias', ROOT / 'tools' / 'shape_bias.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def stimuli(tmp_path):
    """A folder in the published layout, of noise."""
    for name in ('airplane1-bicycle2', 'airplane2-airplane1', 'cat1-dog3', 'cat2-elephant1', 'oven10-knife2'):
        path = tmp_path / 'cue-conflict' / name.rstrip('0123456789').split('-')[0].rstrip('0123456789') / f'{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(len(name)).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return tmp_path / 'cue-conflict'


def run(monkeypatch, *flags):
    monkeypatch.setattr('sys.argv', ['shape_bias.py', *map(str, flags)])
    return tool.main()


def test_the_classes_of_imagenet_are_those_of_the_protocol():
    names = Path(IMAGENET_NAMES).read_text().splitlines()
    numbers = {name: tool.imagenet_classes(name) for name in tool.CLASSES}
    assert list(numbers) == sorted(numbers) and len(numbers) == 16
    assert {name: len(found) for name, found in numbers.items()} == {
        'airplane': 1, 'bear': 4, 'bicycle': 2, 'bird': 49, 'boat': 5, 'bottle': 7, 'car': 3, 'cat': 6, 'chair': 4,
        'clock': 3, 'dog': 109, 'elephant': 2, 'keyboard': 2, 'knife': 1, 'oven': 1, 'truck': 8}
    everything = [number for found in numbers.values() for number in found]
    assert len(set(everything)) == len(everything)
    assert names[404] == 'airliner' and 499 in numbers['knife'] and 'cleaver' in names[499]
    assert [names[k] for k in numbers['bear']] == ['brown bear', 'American black bear', 'ice bear', 'sloth bear']


def test_the_decision_is_the_largest_mean_and_not_the_largest_sum():
    probabilities = np.zeros(1000)
    probabilities[tool.imagenet_classes('dog')] = 0.6 / 109
    probabilities[404] = 0.1
    assert tool.decide(probabilities) == 'airplane'
    probabilities[404] = 0.005
    assert tool.decide(probabilities) == 'dog'


def test_published_decisions_give_the_published_definition(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'model.csv'
    rows = [('bicycle', '0001_s5n_dnn_0_airplane_00_airplane1-bicycle2.png'),  # texture
            ('airplane', 'airplane3-oven1.png'), ('airplane', 'airplane4-oven2.png'),  # shape
            ('airplane', 'airplane5-airplane6.png'),  # no conflict
            ('dog', 'cat1-dog3.png'), ('truck', 'cat2-dog1.png')]  # texture, other
    path.write_text('subj,object_response,category,condition,imagename\n' + ''.join(
        f'alexnet,{decision},,0,{name}\n' for decision, name in rows))
    assert run(monkeypatch, f'-predictions={path}') == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:4] == [['airplane', '3', '2', '1', '0', '66.7', '%'], ['cat', '2', '0', '1', '1', '0.0', '%'],
                          ['overall', '5', '2', '2', '1', '50.0', '%']]


def test_predictions_of_predict_py(stimuli, tmp_path, monkeypatch, capsys):
    path = tmp_path / 'predictions.jsonl'
    with open(path, 'w') as file:
        for image in tool.find_stimuli(str(stimuli)):
            shape, _ = tool.shape_and_texture(image)
            scores = np.full(1000, 1e-4)
            scores[tool.imagenet_classes(shape)] = 0.01
            file.write(json.dumps({'picture': image, 'top': [
                {'class': k, 'name': '', 'score': scores[k]} for k in range(1000)]}) + '\n')
    assert run(monkeypatch, stimuli, f'-predictions={path}', f'-output={tmp_path / "d.csv"}') == 0
    assert 'overall         4      4       0      0     100.0 %' in capsys.readouterr().out
    assert run(monkeypatch, f'-predictions={tmp_path / "d.csv"}') == 0  # what it writes, it reads
    assert '100.0 %' in capsys.readouterr().out
    path.write_text(path.read_text().splitlines()[0] + '\n')
    assert run(monkeypatch, stimuli, f'-predictions={path}') == 1
    assert 'cat1-dog3.png: has no prediction' in capsys.readouterr().err


def test_a_model_classifies_the_whole_image(stimuli, tmp_path, tiny_yaml, monkeypatch, capsys):
    """Runs a tiny model of 1000 classes, and checks that its decisions are those of a warped, uncropped image."""
    import paddle
    config = get_config(tiny_yaml, ['MODEL.NUM_CLASSES', 1000])
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'config.yaml').write_text(config_text(config))
    paddle.seed(0)
    model = build_replknet(config)
    save_checkpoint(folder / 'best.pdparams', {'model': model_arrays(model), 'weights_key': 'model'})
    seen = []
    stream = tool.Predictor.stream
    monkeypatch.setattr(tool.Predictor, 'stream', lambda self, paths: (
        seen.append((self.settings.DATA.EVAL_PROTOCOL, p)) or p for p in stream(self, paths)))
    pytest.importorskip('matplotlib')
    assert run(monkeypatch, stimuli, f'-model={folder}', f'-output={tmp_path / "d.csv"}',
               f'-figure={tmp_path / "f.png"}') == 0
    assert '5 images; the published set has 1280' in capsys.readouterr().out
    assert Image.open(tmp_path / 'f.png').size[0] > 100
    decisions = tool.decisions_in_file(str(tmp_path / 'd.csv'))
    assert len(seen) == len(decisions) == 5
    for protocol, prediction in seen:
        assert protocol == 'warp' and isinstance(prediction, Prediction)
        logits = prediction.logits.astype('float64')
        means = {name: np.exp(logits)[tool.imagenet_classes(name)].mean() for name in tool.CLASSES}
        assert decisions[Path(prediction.picture).name] == max(means, key=means.get)


def test_mistakes_are_one_line(stimuli, random_run, tmp_path, monkeypatch):
    def refused(message, *flags):
        with pytest.raises(UserError, match=message) as error:
            run(monkeypatch, *flags)
        assert '\n' not in str(error.value)

    refused('either -model=MODEL or -predictions', stimuli)
    refused('name the folder with the cue-conflict set', '-model=replknet_31b_1k_224')
    refused('has 4 classes; the shape bias is defined for the 1000', stimuli, f'-model={random_run}')
    refused('there is no such folder', tmp_path / 'none', f'-model={random_run}')
    refused('ends with .csv', stimuli, f'-model={random_run}', '-output=x.txt')
    (tmp_path / 'p.jsonl').write_text('{"picture": "cat1-dog3.png", "top": [{"class": 1, "score": 1.0}]}\n')
    refused('line 1 does not have the scores of 1000 classes', f'-predictions={tmp_path / "p.jsonl"}')
    (tmp_path / 'p.csv').write_text('picture,label\n')
    refused('has no columns object_response', f'-predictions={tmp_path / "p.csv"}')
    (tmp_path / 'cut.csv').write_text('object_response,category,imagename\ncat,cat,cat1-dog3.png\ncat,ca')
    refused('cut.csv: has a line without object_response', f'-predictions={tmp_path / "cut.csv"}')
    top = [{'class': k, 'score': 1e-3} for k in range(1000)]
    (tmp_path / 'number.jsonl').write_text(json.dumps({'picture': 5, 'top': top}) + '\n')
    refused('line 1 does not have the scores', f'-predictions={tmp_path / "number.jsonl"}')
    (stimuli / 'dog').mkdir()
    (stimuli / 'cat' / 'cat1-dog3.png').rename(stimuli / 'dog' / 'cat1-dog3.png')
    refused('has the shape cat, but is in the folder dog', stimuli, f'-model={random_run}')
    (stimuli / 'dog' / 'cat1-dog3.png').rename(stimuli / 'dog' / 'puppy.png')
    refused('is not named like the images of the cue-conflict set', stimuli, f'-model={random_run}')
