"""Pictures in memory: each has its own error and stays as it is; and logits that are not finite."""
import io
import json

import numpy as np
import paddle
import pytest
from PIL import Image

import predict
from config import config_text, get_config
from deploy.contact_sheets import ContactSheets
from deploy.predictor import NOT_FINITE
from errors import TrainingStopped, exit_status
from export import CertificateError, export
from predict import Predictor
from replknet import build_replknet
from run_folder.checkpoint import model_arrays, save_checkpoint
from training.amp import Amp
from training.engine import evaluate


@pytest.fixture(scope='module')
def run(tmp_path_factory, tiny_yaml):
    """A run folder of random weights, where huge.pdparams has finite weights whose logits overflow."""
    folder, config = tmp_path_factory.mktemp('run'), get_config(tiny_yaml)
    (folder / 'config.yaml').write_text(config_text(config))
    paddle.seed(0)
    arrays = model_arrays(build_replknet(config))
    # the last norm gives 1 for every image, so that the logits are sums of ten weights
    arrays.update({'norm.weight': np.zeros(10, 'f4'), 'norm.bias': np.ones(10, 'f4')})
    for name, scale in (('best', 1), ('huge', 3e38)):
        weights = {**arrays, 'head.weight': np.full((10, 4), scale, 'f4')}
        save_checkpoint(folder / f'{name}.pdparams', {
            'model': weights, 'weights_key': 'model', 'optimizer': {}, 'epoch': 1, 'step': 1, 'best': {}, 'config': ''})
    return folder


@pytest.fixture(scope='module')
def predictor(run):
    return Predictor(str(run), device='cpu', backend='dygraph', batch_size=3)


@pytest.fixture(scope='module')
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def png(image, **options):
    data = io.BytesIO()
    image.save(data, 'png', **options)
    return data.getvalue()


def test_each_picture_has_its_own_error(predictor, picture, tmp_path):
    truncated, closed = (Image.open(io.BytesIO(data)) for data in (png(picture)[:900], png(picture)))
    closed.close()
    pictures = [picture, truncated, Image.new('RGB', (0, 5)), np.zeros((5, 0, 3), np.uint8), closed, picture,
                tmp_path / 'none.png', picture]
    found = predictor(pictures)
    assert [p.picture is given for p, given in zip(found, pictures)] == [True] * len(pictures)
    assert [bool(p.error) for p in found] == [False, True, True, True, True, False, True, False]
    for prediction, words in zip(found[1:5], ('truncated', 'no pixels', 'no pixels', 'cannot read')):
        assert words in prediction.error and prediction.names == [] and '\n' not in prediction.error
    assert found[1].error.startswith('Pillow image of mode RGB, (50, 40): cannot read the image: ')
    with ContactSheets(tmp_path / 'sheets') as sheets:
        for prediction in found:
            sheets.add(prediction)
    sheet = Image.open(tmp_path / 'sheets' / 'sheet_0001.png').convert('RGB')
    assert sheet.getpixel((90, 90)) != (255, 255, 255) == sheet.getpixel((270, 90))  # drawn, and blank


def test_the_pictures_of_the_caller_stay_as_they_are(predictor, picture):
    palette = Image.open(io.BytesIO(png(picture.quantize(16), transparency=3)))
    file = io.BytesIO(png(picture))
    lazy = Image.open(file)
    before = dict(palette.info)
    array = np.asarray(picture).copy()
    found = predictor([lazy, lazy, palette, array, picture])  # one object twice, for two threads
    assert not any(p.error for p in found)
    assert palette.info == before and 'transparency' in before and palette.mode == 'P'
    assert lazy.fp is file and lazy.tile and not file.closed  # still waiting to be loaded
    assert np.array_equal(array, picture)
    assert np.array_equal(lazy, picture)  # and it still can be


def test_a_picture_may_change_after_it_was_handed_over(predictor, picture):
    buffer = np.asarray(picture).copy()

    def frames():
        yield buffer
        buffer[:] = 0
        yield picture
        with Image.open(io.BytesIO(png(picture))) as image:
            yield image

    assert not any(p.error for p in predictor.stream(frames()))


def test_arrays_are_images(predictor, picture):
    array = np.asarray(picture)
    transform = predictor.transform
    seen = []
    predictor.transform = lambda image: seen.append(np.asarray(image)) or transform(image)
    try:
        for pictures, count in ((array, 1), ([array, picture], 2), (np.stack([array, array]), 2), (array[:, ::-1], 1)):
            found = predictor(pictures)
            assert len(found) == count and not any(p.error for p in found)
    finally:
        predictor.transform = transform
    assert all(np.array_equal(image, array) for image in seen[:5]) and np.array_equal(seen[5], array[:, ::-1])


@pytest.mark.parametrize(('wrong', 'advice'), [
    (3, 'this is: int'), (None, 'NoneType'), (b'cat.jpg', 'os.fsdecode'), (io.BytesIO(b''), 'PIL.Image.open(file)'),
    (np.zeros((4, 4, 3)), '.astype(np.uint8)'), (np.zeros((3, 4, 4), np.uint8), 'transpose(1, 2, 0)'),
    (np.zeros((4, 4), np.uint8), 'PIL.Image.fromarray'), (np.zeros((4, 4, 4), np.uint8), 'PIL.Image.fromarray'),
    (paddle.zeros([4, 4, 3]), 'tensor.numpy()')], ids=lambda value: type(value).__name__)
def test_other_types_say_what_is_accepted(predictor, picture, wrong, advice):
    for pictures in (wrong, [picture, wrong]):
        with pytest.raises(TypeError, match='a picture is a path .*, a Pillow image, or an RGB array') as raised:
            predictor(pictures)
        assert advice in str(raised.value)
    stream, done = predictor.stream(iter([picture, wrong])), []
    with pytest.raises(TypeError):
        done.extend(prediction.error for prediction in stream)
    assert done == [None]  # the prediction before was not lost


def test_logits_that_are_not_finite_are_errors(run, picture, tmp_path, monkeypatch, capsys):
    picture.save(tmp_path / 'a.png')
    (tmp_path / 'list.txt').write_text('a.png 0\nnone.png 1\n')
    monkeypatch.setattr('sys.argv', ['predict.py', str(tmp_path / 'list.txt'), f'-model={run}/huge.pdparams',
                                     f'-output={tmp_path}/o.jsonl', '-device=cpu', '-features'])
    assert exit_status(predict.main) == 1
    out, err = capsys.readouterr()
    assert out == '' and f'1 of 2 images have no prediction: {NOT_FINITE}' in err and '1 of 2 images could not' in err
    first, _ = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / 'o.jsonl').open()]
    assert first == {'picture': f'{tmp_path}/a.png', 'label': 0, 'error': f'{tmp_path}/a.png: {NOT_FINITE}'}
    config = get_config(run / 'config.yaml', flags={'eval': True, 'pretrained': str(run / 'huge.pdparams')})
    with pytest.raises(CertificateError, match='not finite'):
        export(config, tmp_path / 'export')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.png', 'list.txt', 'o.jsonl']


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_an_evaluation_refuses_logits_that_are_not_finite(value):
    logits = paddle.to_tensor([[1.0, 0.0], [0.0, 1.0], [2.0, value]])
    with pytest.raises(TrainingStopped, match='eval: the logits of 1 of 3 images are not finite; check the weights'):
        evaluate(paddle.nn.Identity(), [(logits, paddle.to_tensor([0, 1, 0]))], 3, Amp(get_config(), 'cpu'))
