"""predict.py and Predictor, with a run of random weights and images in every mode and format."""
import csv
import json
import re
import shutil

import numpy as np
import paddle
import pytest
from PIL import Image

import predict
from config import config_text, get_config
from datasets import read_class_names
from deploy.contact_sheets import MARGIN, RIGHT, SIDE, UNKNOWN, WRONG, ContactSheets
from errors import UserError, exit_status
from export import export
from image_files.lists import IMAGENET_NAMES
from large_kernel import build
from predict import Prediction, Predictor
from replknet import build_replknet
from run_folder.checkpoint import model_arrays, save_checkpoint
from run_folder.metrics import best_checkpoint


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """A data folder of 12 images in 4 classes: every mode, sizes from 1 pixel, paths with spaces."""
    folder = tmp_path_factory.mktemp('all kinds')
    rng = np.random.default_rng(0)
    colours = np.kron(rng.integers(0, 256, (5, 7, 3)), np.ones((9, 9, 1))).astype(np.uint8)
    rgb = Image.fromarray(colours)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    made = {'rgb.png': rgb, 'a b.jpg': rgb.rotate(90), 'palette.gif': rgb.quantize(16), 'grey.bmp': rgb.convert('L'),
            'alpha.webp': rgb.convert('RGBA'), 'cmyk.jpg': rgb.convert('CMYK'), 'bits.png': rgb.convert('1'),
            'exif.jpg': rgb, 'sixteen.png': Image.fromarray(colours[:, :, 0].astype(np.uint16) * 257),
            'pixel.png': rgb.resize((1, 1)), 'wide.tif': rgb.resize((300, 40)), 'grey alpha.png': rgb.convert('LA')}
    (folder / 'sub folder').mkdir()
    lines = []
    for index, (name, image) in enumerate(made.items()):
        path = f'sub folder/{name}' if index % 2 else name
        image.save(folder / path, **({'exif': rotated} if name == 'exif.jpg' else {}))
        lines.append(f'{path} {index % 4}\n')
    (folder / 'val_list.txt').write_text(''.join(lines))
    (folder / 'classes.txt').write_text('ant\nbee\ncow\ndoe\n')
    return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory, tiny_yaml, data_dir):
    """A run folder where the EMA had the best accuracy; its weights differ from those of the model."""
    folder = tmp_path_factory.mktemp('run')
    config = get_config(tiny_yaml, ['DATA.DATA_PATH', str(data_dir)])
    (folder / 'config.yaml').write_text(config_text(config))
    rest = {'optimizer': {}, 'epoch': 2, 'step': 4, 'best': {}, 'config': config_text(config)}
    for seed, (key, name) in enumerate((('model', 'best.pdparams'), ('model_ema', 'best_ema.pdparams'))):
        paddle.seed(seed)
        model = build_replknet(config)
        for layer in model.sublayers():
            if isinstance(layer, paddle.nn.BatchNorm2D):  # statistics of one batch, so that signals do not fade
                layer._momentum = 0.0
        model(paddle.randn([8, 3, 32, 32]))
        arrays = model_arrays(model)
        save_checkpoint(folder / name, {'model': arrays, key: arrays, 'weights_key': key, **rest})
    (folder / 'metrics.jsonl').write_text(''.join(
        json.dumps({'event': 'eval', 'weights': weights, 'acc1': acc1}) + '\n'
        for weights, acc1 in (('model', 60), ('model_ema', 70), ('model', 65), ('model_ema', 50))))
    return folder


@pytest.fixture(scope='module')
def exported(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp('exports') / 'export'
    export(get_config(run / 'config.yaml', flags={'eval': True, 'pretrained': str(run / 'best_ema.pdparams')}), folder)
    return folder


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory, run_script, run, data_dir):
    """The last line that main_single_gpu.py prints when it evaluates the best weights, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp('evaluations') / 'new'
    done = run_script('main_single_gpu.py', f'-data_path={data_dir}', '-device=cpu', '-eval', f'-output={folder}',
                      f'-pretrained={run}/best_ema.pdparams')
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], folder


def listed(data_dir):
    return [f'{data_dir}/{line.rsplit(" ", 1)[0]}' for line in (data_dir / 'val_list.txt').read_text().splitlines()]


def call(monkeypatch, capsys, *arguments):
    """Runs predict.py in this process; returns its status, standard output and standard error."""
    monkeypatch.setattr('sys.argv', ['predict.py', *map(str, arguments)])
    status = exit_status(predict.main)
    return (status, *capsys.readouterr())


@pytest.mark.parametrize('backend', ['dygraph', 'inference'])
def test_the_metrics_match_those_of_an_evaluation(run_script, run, data_dir, evaluated, tmp_path, backend):
    expected, _ = evaluated
    done = run_script('predict.py', data_dir / 'val_list.txt', f'-model={run}', f'-output={tmp_path}/out.csv',
                      f'-backend={backend}', '-batch_size=5')
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + '\n'
    assert f'{run}/best_ema.pdparams, {backend}' in done.stderr
    with open(tmp_path / 'out.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['picture'] for row in rows] == listed(data_dir)
    correct = sum(row['class_1'] == row['label'] for row in rows)
    assert 0 < correct < 12 and f'Acc@1 {100 * correct / 12:.3f} ' in expected
    assert all(row['name_1'] == ['ant', 'bee', 'cow', 'doe'][int(row['class_1'])] for row in rows)
    assert all(sum(float(row[f'score_{k}']) for k in (1, 2, 3, 4)) == pytest.approx(1, abs=1e-5) for row in rows)


def test_all_backends_and_exports_agree_and_features_give_the_logits(run, exported, data_dir, tmp_path):
    paths = listed(data_dir)
    expected = Predictor(str(run), device='cpu', backend='dygraph', batch_size=1)(paths)
    tops = [p.classes for p in expected]
    assert len({tuple(top) for top in tops}) > 1
    for kind, arguments in (('inference', {}), ('dygraph', {'features': True}), ('inference', {'features': True})):
        predictor = Predictor(str(run), device='cpu', backend=kind, batch_size=5, **arguments)
        found = predictor(paths)
        assert [p.picture for p in found] == paths and [p.classes for p in found] == tops
        assert np.allclose([p.logits for p in found], [p.logits for p in expected], atol=1e-4)
        if arguments:
            from deploy.predictor import load_model
            head = load_model(str(run))[0].head
            logits = np.stack([p.features for p in found]) @ head.weight.numpy() + head.bias.numpy()
            assert np.allclose(logits, [p.logits for p in expected], atol=1e-4)
        else:
            assert all(p.features is None for p in found)
    config = get_config(run / 'config.yaml', flags={'eval': True, 'pretrained': str(run / 'best_ema.pdparams')})
    export(config, tmp_path / 'export', features=True)
    for features in (True, False):
        again = Predictor(str(tmp_path / 'export'), batch_size=5, features=features)(paths)
        assert np.allclose([p.logits for p in again], [p.logits for p in expected], atol=1e-4)
        for one, other in zip(again, found):
            assert np.allclose(one.features, other.features, atol=1e-4) if features else one.features is None
    predictor = Predictor(str(exported), batch_size=5)
    assert predictor.origin.startswith(str(exported / 'model')) and predictor.names == ['ant', 'bee', 'cow', 'doe']
    assert np.allclose([p.logits for p in predictor(paths)], [p.logits for p in expected], atol=1e-4)


def test_images_in_memory_and_single_images(run, data_dir):
    predictor = Predictor(str(run), device='cpu', backend='dygraph', topk=2)
    path = f'{data_dir}/sub folder/a b.jpg'
    from_file, = predictor(path)
    from_memory, = predictor(Image.open(path))
    assert np.array_equal(from_file.logits, from_memory.logits)
    assert len(from_file.names) == len(from_file.scores) == 2 and from_file.scores[0] >= from_file.scores[1]
    assert predictor([]) == []


def test_unreadable_images_are_listed_at_the_end(run, data_dir, tmp_path, monkeypatch, capsys):
    for name in ('1.png', '3.png'):
        (tmp_path / name).write_bytes((data_dir / 'rgb.png').read_bytes())
    (tmp_path / '2.png').write_bytes((data_dir / 'rgb.png').read_bytes()[:60])
    (tmp_path / 'list.txt').write_text('1.png 0\n2.png 0\n3.png\nnone.png 1\n')
    (tmp_path / 'notes.md').write_text('no image')
    status, out, err = call(monkeypatch, capsys, tmp_path / 'list.txt', f'-model={run}', f'-output={tmp_path}/o.jsonl',
                            '-features', '-batch_size=1', f'-save_images={tmp_path}/sheets', '-device=cpu')
    assert status == 1
    assert re.search(r'2.png: cannot read .*\n.*none.png: no such image\n2 of 4 images could not be read\n$', err)
    assert re.fullmatch(r'Acc@1 \S+ Acc@5 100.000 loss \S+ images 1\n', out)
    records = [json.loads(line) for line in (tmp_path / 'o.jsonl').read_text().splitlines()]
    assert [r['picture'][-5:] for r in records] == ['1.png', '2.png', '3.png', 'e.png']
    assert [sorted(set(r) - {'picture'}) for r in records] == [
        ['features', 'label', 'top'], ['error', 'label'], ['features', 'top'], ['error', 'label']]
    assert records[0]['top'] == records[2]['top'] and len(records[0]['features']) == 10
    status, out, err = call(monkeypatch, capsys, tmp_path, f'-model={run}', '-device=cpu', '-topk=1')
    assert status == 1 and err.endswith('1 of 4 images could not be read\n')
    assert [line.split(':')[0] for line in out.splitlines()] == [
        f'{tmp_path}/{name}' for name in ('1.png', '3.png', 'sheets/sheet_0001.png')]


def test_features_next_to_a_csv(run, data_dir, tmp_path, monkeypatch, capsys):
    status, *_ = call(monkeypatch, capsys, data_dir / 'rgb.png', data_dir / 'none.png', f'-model={run}', '-features',
                      f'-output={tmp_path}/o.csv', '-device=cpu')
    assert status == 1
    with np.load(tmp_path / 'o.npz') as arrays:
        assert arrays['pictures'].tolist() == [f'{data_dir}/rgb.png'] and arrays['features'].shape == (1, 10)


def test_mistakes_are_one_line_errors_with_status_2(run, exported, data_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / 'list.txt').write_text(f'{data_dir}/rgb.png 4\n')
    (tmp_path / 'empty').mkdir()
    bare = tmp_path / 'bare.pdparams'
    bare.write_bytes((run / 'best.pdparams').read_bytes())
    image, model = data_dir / 'rgb.png', f'-model={run}'
    for arguments, words in (
            ([image, '-model=none'], '-model=none: no such file or folder'),
            ([image, f'-model={bare}'], 'name its settings file with -cfg'),
            ([image, f'-model={tmp_path}/empty'], 'no checkpoint'),
            ([image, model, '-output=out.txt'], 'ends with .csv or .jsonl'),
            ([image, model, f'-output={tmp_path}/none/o.csv'], 'there is no folder'),
            ([image, model, '-features'], '-output=NAME.jsonl'),
            ([image, model, '-backend=onnx'], 'choose from auto, dygraph, inference'),
            ([image, model, '-topk=0'], 'must be at least 1'),
            ([image, f'-model={exported}', '-features', f'-output={tmp_path}/o.csv'], 'export it with -features'),
            ([tmp_path / 'list.txt', model], 'label 4, but the model has 4 classes'),
            ([tmp_path / 'none.txt', model], 'no such list'),
            ([tmp_path / 'empty', model], 'no images'),
            ([image, model, f'-save_images={data_dir}'], 'is not empty')):
        status, _, err = call(monkeypatch, capsys, *arguments)
        lines = [line for line in err.splitlines() if not line.startswith('weights of')]
        assert status == 2 and len(lines) == 1 and words in lines[0], (words, err)
    (tmp_path / 'classes.txt').write_text('one\ntwo\n')
    status, _, err = call(monkeypatch, capsys, image, f'-model={bare}', f'-cfg={run}/config.yaml')
    assert status == 2 and 'names 2 classes, but the model has 4' in err


def test_the_best_checkpoint_of_a_run(run, tmp_path):
    assert best_checkpoint(run) == str(run / 'best_ema.pdparams')
    with pytest.raises(UserError, match='no checkpoint'):
        best_checkpoint(tmp_path)
    for name in ('last.pdparams', 'best.pdparams'):
        (tmp_path / name).touch()
        assert best_checkpoint(tmp_path) == str(tmp_path / name)


def test_a_run_keeps_its_class_names(evaluated):
    assert (evaluated[1] / 'classes.txt').read_text() == 'ant\nbee\ncow\ndoe\n'


def test_imagenet_class_names():
    names = read_class_names(IMAGENET_NAMES)
    assert len(set(names)) == 1000
    known = {0: 'tench', 1: 'goldfish', 65: 'sea snake', 207: 'golden retriever', 281: 'tabby', 340: 'zebra',
             388: 'giant panda', 404: 'airliner', 463: 'bucket', 555: 'fire engine', 620: 'laptop', 701: 'parachute',
             817: 'sports car', 864: 'tow truck', 920: 'traffic light', 954: 'banana', 980: 'volcano',
             999: 'toilet tissue'}
    assert {index: names[index] for index in known} == known


def test_contact_sheets_mark_right_and_wrong(data_dir, tmp_path):
    def predicted(number):
        return Prediction(f'{data_dir}/rgb.png', [number], ['a name that is far too long for its place'], [0.5])

    with ContactSheets(tmp_path / 'sheets') as sheets:
        sheets.add(predicted(1), 1, 'bee')
        sheets.add(predicted(1), 2, 'cow')
        sheets.add(predicted(1))
        sheets.add(Prediction(f'{data_dir}/no\udce9.png', error='no such image'), 1, 'bee')
        for _ in range(27):
            sheets.add(predicted(1), 1, 'bee')
    assert sorted(path.name for path in (tmp_path / 'sheets').iterdir()) == ['sheet_0001.png', 'sheet_0002.png']
    sheet = Image.open(tmp_path / 'sheets/sheet_0001.png')
    frames = [sheet.getpixel((index * (SIDE + 2 * MARGIN) + MARGIN - 2, MARGIN + 40)) for index in range(4)]
    assert frames == [RIGHT, WRONG, UNKNOWN, UNKNOWN]
    assert sheet.width > 5 * Image.open(tmp_path / 'sheets/sheet_0002.png').width


@pytest.mark.parametrize(('model', 'missing', 'expected'), [
    ('run', None, 'dygraph'), ('run', 'no compiler', 'inference'), ('exported', None, 'inference')])
def test_auto_chooses_the_faster_backend(request, monkeypatch, data_dir, model, missing, expected):
    monkeypatch.delenv('LARGE_KERNEL_CONV_IMPL', raising=False)
    monkeypatch.setattr(build, 'reason_unavailable', lambda: missing)
    predictor = Predictor(str(request.getfixturevalue(model)), device='cpu')
    assert predictor.backend == expected
    assert predictor(f'{data_dir}/rgb.png')[0].error is None


def test_an_export_for_another_version_of_the_operators_runs_its_native_program(exported, data_dir, tmp_path):
    for keeps, folder in ((['model', 'model_native'], tmp_path / 'both'), (['model'], tmp_path / 'one')):
        shutil.copytree(exported, folder)
        certificate = json.loads((folder / 'certificate.json').read_text())
        programs = {name: certificate['programs'][name] for name in keeps}
        (folder / 'certificate.json').write_text(json.dumps({**certificate, 'operators': 1, 'programs': programs}))
    predictor = Predictor(str(tmp_path / 'both'))
    assert predictor.origin.endswith('model_native') and predictor(f'{data_dir}/rgb.png')[0].error is None
    with pytest.raises(UserError, match='export it again'):
        Predictor(str(tmp_path / 'one'))
