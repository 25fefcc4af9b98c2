"""Settings: their declaration, where values come from, which source wins, and what is refused."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from auto_augment import build_auto_augment
from config import KEYS, RETIRED_KEYS, ConfigError, config_changes, config_text, get_arguments, get_config, setting
from dry_run.recipes import RECIPES
from errors import ArgumentParser
from losses import build_loss

CONFIGS = Path(__file__).parents[1] / 'configs'


def write(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize('name', sorted(path.stem for path in CONFIGS.glob('*.yaml') if path.stem != 'finetune'))
def test_every_config_file_is_valid(name):
    get_config(CONFIGS / f'{name}.yaml')


# published recipes: global batch, lr, min lr, epochs, warm-up, drop path, weight decay, layer decay, classes, mixup
@pytest.mark.parametrize(('name', 'recipe'), [
    ('replknet_31b', (2048, 4e-3, 1e-6, 300, 10, 0.5, 0.05, 1.0, 1000, 1.0)),
    ('replknet_31b_mindspore', (512, 5e-4, 1e-6, 300, 20, 0.4, 0.05, 1.0, 1000, 1.0)),
    ('replknet_31b_22k_pretrain', (4096, 4e-3, 1e-6, 90, 5, 0.1, 0.05, 1.0, 21841, 1.0)),
    ('replknet_31l_22k_pretrain', (4096, 4e-3, 1e-6, 90, 5, 0.1, 0.05, 1.0, 21841, 1.0)),
    ('replknet_31b_1k_224_to_384', (1024, 4e-4, 1e-6, 30, 1, 0.8, 1e-8, 0.7, 1000, 0.0)),
    ('replknet_31b_22k_to_1k_224', (512, 4e-4, 1e-6, 30, 1, 0.2, 1e-8, 0.7, 1000, 0.0)),
    ('replknet_31b_22k_to_1k_384', (512, 4e-4, 3e-4, 30, 1, 0.3, 1e-8, 0.7, 1000, 0.0)),
    ('replknet_31l_22k_to_1k_384', (512, 4e-4, 3e-4, 30, 1, 0.3, 1e-8, 0.7, 1000, 0.0)),
])
def test_recipes_are_the_published_ones(name, recipe):
    config = get_config(CONFIGS / f'{name}.yaml')
    train, model = config.TRAIN, config.MODEL
    assert (train.RECIPE_BATCH_SIZE, train.BASE_LR, train.END_LR, train.NUM_EPOCHS, train.WARMUP_EPOCHS,
            model.DROPPATH, train.WEIGHT_DECAY, train.LAYER_DECAY, model.NUM_CLASSES, train.MIXUP_PROB) == recipe
    assert config.DATA.BATCH_SIZE * 8 * train.ACCUM_ITER == train.RECIPE_BATCH_SIZE  # on 8 devices
    assert train.LINEAR_SCALED_LR == 0  # the rate is for that batch already


@pytest.mark.parametrize(('name', 'size', 'protocol', 'crop_pct', 'mean'), [
    ('replknet_31b_1k_224', 224, 'crop', 0.875, 0.485), ('replknet_31b_1k_384', 384, 'warp', 0.875, 0.485),
    ('replknet_31b_22k1k_224', 224, 'crop', 0.875, 0.485), ('replknet_31b_22k1k_384', 384, 'warp', 0.875, 0.485),
    ('replknet_31l_22k1k_384', 384, 'warp', 0.875, 0.485), ('replknet_xl_73m1k_320', 320, 'crop', 0.875, 0.5)])
def test_evaluation_protocol_of_the_published_checkpoints(name, size, protocol, crop_pct, mean):
    from datasets import eval_protocol
    data = (config := get_config(CONFIGS / f'{name}.yaml')).DATA
    assert (data.IMAGE_SIZE, eval_protocol(config), data.CROP_PCT, data.IMAGENET_MEAN[0]) == (
        size, protocol, crop_pct, mean)


def documented_settings():
    text = ''.join((CONFIGS.parent / 'docs' / f'{page}.md').read_text() for page in ('augmentation', 'training'))
    return re.findall(r'(?:^\| `|-opts )((?:TRAIN\.[A-Z_.]+ [^ `]+ ?)+)`', text, re.M)


@pytest.mark.parametrize('opts', documented_settings())
def test_documented_losses_and_augmentations_are_accepted(opts):
    train = get_config(CONFIGS / 'replknet_31b.yaml', opts.split()).TRAIN
    build_auto_augment(train.AUTO_AUGMENT)
    build_loss(train.LOSS, mixup=train.MIXUP_PROB > 0, aug_splits=train.AUG_SPLITS)


def test_later_sources_win(tmp_path):
    write(tmp_path, 'base.yaml', 'SEED: 1\nTRAIN: {NUM_EPOCHS: 7, BASE_LR: 1.0e-3}\nDATA: {BATCH_SIZE: 5}\n')
    path = write(tmp_path, 'child.yaml', 'BASE: base.yaml\nSEED: 2\nTRAIN:\n  WARMUP_EPOCHS: 3\n')
    args = get_arguments('', [f'-cfg={path}', '--batch_size', '9', '-accum_iter=4', '-opts', 'TRAIN.BASE_LR',
                              '2e-3', 'SEED', '3', 'TRAIN.ACCUM_ITER', '5'])
    config = get_config(args.cfg, args.opts, args.flags)
    assert (config.SEED, config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS) == (3, 7, 3.0)
    assert (config.TRAIN.BASE_LR, config.DATA.BATCH_SIZE, config.TRAIN.ACCUM_ITER) == (2e-3, 9, 5)


def test_written_settings_are_read_back(tmp_path):
    config = get_config(CONFIGS / 'replknet_xl_73m1k_320.yaml', ['SAVE', 'x', 'EVAL', 'True'])
    config.freeze()
    again = get_config(write(tmp_path, 'config.yaml', config_text(config)))
    assert (again.SAVE, again.EVAL) == ('', False)  # they belong to one call of a script
    assert again.MODEL == config.MODEL and again.TRAIN == config.TRAIN and again.DATA == config.DATA


def test_settings_of_earlier_versions_are_read_and_runs_resumed(tmp_path):
    config = get_config(CONFIGS / 'replknet_31b.yaml')
    saved = yaml.safe_load(config_text(config))
    saved['DATA']['IMAGE_CHANNELS'], saved['MODEL']['TYPE'] = RETIRED_KEYS.values()
    text = yaml.safe_dump(saved)
    assert get_config(write(tmp_path, 'config.yaml', text), ['MODEL.TYPE', 'RepLKNet']) == config
    assert config_changes(text, config) == ([], [])
    assert config_changes(text.replace('IMAGE_CHANNELS: 3', 'IMAGE_CHANNELS: 1'), config)[0]


def test_what_may_change_when_a_run_is_resumed():
    text = config_text(get_config())
    changed = get_config(None, ['SEED', '1', 'DATA.NUM_WORKERS', '1', 'SAVE', 'x', 'MODEL.RESUME', 'x'])
    assert config_changes(text, changed) == (['SEED 42 -> 1'], ['DATA.NUM_WORKERS 4 -> 1'])


def test_the_declaration_is_all_there_is(capsys):
    assert KEYS['TRAIN.RECIPE'].choices == ('', *RECIPES)
    assert all(setting(get_config(), key) == declared.default for key, declared in KEYS.items())
    assert all(declared.default or declared.elements for declared in KEYS.values() if type(declared.default) is list)
    with pytest.raises(SystemExit):
        get_arguments('', ['-h'])
    text = ' '.join(capsys.readouterr().out.split())
    for key, declared in KEYS.items():
        assert not declared.flag or f'--{declared.flag}' in text and f'{declared.help} ({key})' in text


def test_it_is_imported_without_paddle():
    code = "import sys; sys.modules['paddle'] = None; import config"
    subprocess.run([sys.executable, '-c', code], cwd=CONFIGS.parent, check=True)


@pytest.mark.parametrize(('text', 'words'), [
    ('TRAIN: {BASE_LRR: 1.0}', 'unknown key TRAIN.BASE_LRR; did you mean TRAIN.BASE_LR'),
    ('MODEL: {LARGE_KERNEL_SIZES: [31, 28, 27, 13]}', 'MODEL.LARGE_KERNEL_SIZES has the even kernel 28'),
    ('MODEL: {LARGE_KERNEL_SIZES: [31, 29, 27]}', 'MODEL.LARGE_KERNEL_SIZES has 3 stages'),
    ('MODEL: {SMALL_KERNEL: 15}', 'MODEL.SMALL_KERNEL is 15, larger than'),
    ('MODEL: {SMALL_KERNEL: 4}', 'MODEL.SMALL_KERNEL is 4; it must be odd'),
    ('TRAIN: {MIXUP_ALPHA: 0, CUTMIX_ALPHA: 0}', 'set TRAIN.MIXUP_PROB to 0'),
    ('TRAIN: {LOSS: focal}', 'choose from auto, soft_target, label_smoothing, bce, jsd, asymmetric'),
    ('TRAIN: {LOSS: soft_target, MIXUP_PROB: 0}', 'TRAIN.LOSS is soft_target, for the targets of mixup'),
    ('TRAIN: {LOSS: asymmetric_single}', 'for one label per image; set TRAIN.MIXUP_PROB to 0'),
    ('TRAIN: {LOSS: jsd, AUG_SPLITS: 3}', 'for one label per image; set TRAIN.MIXUP_PROB to 0'),
    ('TRAIN: {LOSS: jsd, MIXUP_PROB: 0}', 'set TRAIN.AUG_SPLITS to 3, it is 0'),
    ('TRAIN: {LOSS: jsd, MIXUP_PROB: 0, AUG_SPLITS: 1}', 'set TRAIN.AUG_SPLITS to 3, it is 1'),
    ('TRAIN: {AUG_SPLITS: 3}', 'TRAIN.AUG_SPLITS is 3, for TRAIN.LOSS jsd; with auto use TRAIN.REPEATED_AUG'),
    ('TRAIN: {LOSS: jsd, MIXUP_PROB: 0, AUG_SPLITS: 3, AUTO_AUGMENT: "", COLOR_JITTER: 0, RANDOM_ERASE_PROB: 0}',
     'TRAIN.AUG_SPLITS is 3, for augmented views'),
    ('TRAIN: {BCE_THRESHOLD: 1.0}', 'TRAIN.BCE_THRESHOLD is 1.0'),
    ('TRAIN: {REPEATED_AUG: -1}', 'TRAIN.REPEATED_AUG is -1'),
    ('SEED: ten', "SEED takes a whole number, not 'ten'"),
    ('DATA: {IMAGE_SIZE: 224.0}', 'DATA.IMAGE_SIZE takes a whole number'),
    ('DATA: 3', 'DATA is a group of keys'),
    ('AMP: 1', 'AMP takes True or False'),
    ('AMP_DTYPE: float64', 'choose from float16, bfloat16'),
    ('DATA: {BATCH_SIZE: 0}', 'DATA.BATCH_SIZE is 0; it must be at least 1'),
    ('TRAIN: {BASE_LR: .nan}', 'TRAIN.BASE_LR takes a number'),
    ('TRAIN: {END_LR: 1.0}', 'TRAIN.END_LR is 1.0, above TRAIN.BASE_LR'),
    ('TRAIN: {NUM_EPOCHS: 5}', 'TRAIN.WARMUP_EPOCHS is 10.0, more than TRAIN.NUM_EPOCHS 5'),
    ('- 1', 'a config file holds KEY: value lines'),
    ('A: [', 'cannot be read as YAML'),
    ('TRAIN:\n  BASE_LR: 1.0\nSEED: 1\nTRAIN:\n  NUM_EPOCHS: 20\n', 'bad.yaml:4: TRAIN is set in line 1 already'),
    ('TRAIN: {BASE_LR: 1.0, BASE_LR: 1.0}', 'bad.yaml:1: BASE_LR is set in line 1 already'),
    ('BASE: nowhere.yaml', 'nowhere.yaml: no such config file'),
    ('BASE: bad.yaml', 'include each other'),
    ('BASE: 3', 'BASE takes a file name or a list of them'),
    ('BASE: {a: 1}', 'BASE takes a file name or a list of them'),
    ('TRAIN: {OPTIMIZER: {NAME: adan}}', 'TRAIN.OPTIMIZER.BETAS has 2 values; adan takes 3'),
    ('TRAIN: {OPTIMIZER: {EPS: -1}}', 'TRAIN.OPTIMIZER.EPS is -1.0'),
    ('MODEL: {DW_RATIO: 0.01, CHANNELS: [64, 64, 64, 64]}', 'MODEL.DW_RATIO is 0.01'),
    ('MODEL: {LARGE_KERNEL_SIZES: [65, 29, 27, 13]}', 'the largest is 63'),
    ('DATA: {IMAGENET_MEAN: [123.675, 116.28, 103.53]}', 'divide by 255, [0.485, 0.456, 0.406]'),
    ('DATA: {IMAGENET_STD: [58.395, 57.12, 57.375]}', 'divide by 255, [0.229, 0.224, 0.225]'),
    ('DATA: {IMAGENET_MEAN: [-0.5, 0.5, 0.5]}', 'it must be at least 0'),
    ('DATA: {CROP_PCT: 87.5}', 'CROP_PCT is 87.5; it must be from 0.01 to 1; it is a share, not a percentage: 0.875'),
    ('TRAIN: {HFLIP: 50}', 'it is a share, not a percentage: 0.5'),
    ('DATA: {IMAGE_CHANNELS: 4}', 'DATA.IMAGE_CHANNELS is 4; only 3 is supported, so leave it out'),
    ('MODEL: {TYPE: ViT}', "MODEL.TYPE is 'ViT'; only 'RepLKNet' is supported, so leave it out"),
])
def test_mistakes_are_refused_in_one_line_with_file_and_key(tmp_path, text, words):
    path = write(tmp_path, 'bad.yaml', text)
    with pytest.raises(ConfigError) as error:
        get_config(path)
    message = str(error.value)
    assert words in message and str(tmp_path) in message
    assert '\n' not in message


def test_the_file_that_set_the_key_is_named(tmp_path):
    write(tmp_path, 'base.yaml', 'MODEL: {SMALL_KERNEL: 15}')
    path = write(tmp_path, 'child.yaml', 'BASE: [base.yaml]\nSEED: 1')
    with pytest.raises(ConfigError, match='base.yaml: MODEL.SMALL_KERNEL'):
        get_config(path)


@pytest.mark.parametrize('opts', [['SEED'], ['SEED', 'x'], ['NO.SUCH', '1'], ['TRAIN', '1']])
def test_wrong_opts_name_the_flag(opts):
    with pytest.raises(ConfigError, match='^-opts: '):
        get_config(None, opts)


def test_the_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write(tmp_path, 'base.yaml', 'SEED: 7')
    write(tmp_path, 'a.yaml', 'BASE: ~/base.yaml\nDATA: {DATA_PATH: ~/data}\nMODEL: {NAME: ~x}\nSAVE: ~/runs/a')
    config = get_config('~/a.yaml', ['MODEL.PRETRAINED', '~/w.pdparams'], {'resume': '~/runs/b'})
    assert (config.SEED, config.MODEL.NAME) == (7, '~x')  # a name is not a path
    assert [config.DATA.DATA_PATH, config.SAVE, config.MODEL.PRETRAINED, config.MODEL.RESUME] == [
        str(tmp_path / name) for name in ('data', 'runs/a', 'w.pdparams', 'runs/b')]
    assert get_arguments('', ['-output=~/runs/a', '-cfg', '~/a.yaml']).flags['output'] == str(tmp_path / 'runs/a')
    args = ArgumentParser('')  # of every script
    args.add_argument('images', nargs='+')
    args.add_argument('-output', '--output')
    parsed = args.parse_args(['~/a.png', 'b~.png', 'x=~/c', '--output=~/out'])
    assert parsed.images == [str(tmp_path / 'a.png'), 'b~.png', 'x=~/c'] and parsed.output == str(tmp_path / 'out')


def test_null_means_no_small_kernel():
    assert get_config(None, ['MODEL.SMALL_KERNEL', 'null']).MODEL.SMALL_KERNEL == 0


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    assert get_config(write(tmp_path, 'a.yaml', 'TRAIN: {BASE_LR: 4e-3}')).TRAIN.BASE_LR == 4e-3


def test_an_unknown_flag_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        get_arguments('', ['-batchsize=3'])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count('\n') == 1
