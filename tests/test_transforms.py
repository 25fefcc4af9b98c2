"""Evaluation transforms against the golden pictures, training transforms against their published definitions."""
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import transforms
from transforms import RandAugment, eval_geometry, eval_transform, train_transform

PROTOCOLS = {'crop224': (224, 'crop'), 'crop320': (320, 'crop'), 'warp384': (384, 'warp')}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def picture():
    noise = np.random.default_rng(7).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 72), Image.BICUBIC)


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('name', ['rocket.jpg', 'coffee.png', 'camera_gray.png'])
def test_eval_equals_golden_pictures_bit_for_bit(golden, name, protocol):
    size, mode = PROTOCOLS[protocol]
    image = Image.open(golden / 'preprocess' / name).convert('RGB')
    expected = np.asarray(Image.open(golden / 'preprocess' / f'{name.split(".")[0]}_{protocol}.png').convert('RGB'))
    assert np.array_equal(np.asarray(eval_geometry(image, size, protocol=mode)), expected)

    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.5])
    result = eval_transform(size, protocol=mode, mean=mean, std=std)(image)
    assert result.dtype == np.float32 and result.shape == (3, size, size) and result.flags.c_contiguous
    np.testing.assert_allclose(result.transpose(1, 2, 0), (expected / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (9, 1), (31, 33), (500, 20), (224, 224)])
@pytest.mark.parametrize('protocol', ['crop', 'warp'])
def test_eval_takes_pictures_of_any_size(size, protocol):
    image = Image.new('RGB', size, (255, 0, 127))
    result = eval_transform(32, protocol=protocol, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert result.shape == (3, 32, 32)
    np.testing.assert_allclose(result[:, 5, 7], [1, 0, 127 / 255], atol=1e-6)


def test_centre_crop_rounds_its_offset_half_to_even():
    """(h - size) / 2 is 0.5 and 1.5: offsets 0 and 2, as torchvision's round."""
    columns = np.arange(15, dtype=np.uint8)
    for width, offset in ((13, 0), (15, 2)):
        image = Image.fromarray(np.tile(columns[:width, None], (12, 1, 3)))
        assert np.asarray(eval_geometry(image, 12, crop_pct=1.0))[0, 0, 0] == offset


@pytest.mark.parametrize('arguments', [{'protocol': 'resize'}, {'crop_pct': 0}, {'crop_pct': 1.2}, {'std': (1, 1, 0)},
                                       {'mean': (0.5,)}, {'interpolation': 'cubic'}])
def test_eval_refuses_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match='.'):
        eval_transform(224, **arguments)
    with pytest.raises(ValueError, match='image_size'):
        eval_transform(0)


@pytest.mark.parametrize('arguments', [{'scale': (0, 1)}, {'scale': (0.5, 0.1)}, {'scale': (0.5, 1.5)}, {'hflip': 1.1},
                                       {'ratio': (1,)}, {'re_mode': 'blur'}, {'re_count': 0}, {'color_jitter': -1}])
def test_train_refuses_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments)).split('_')[-1]):
        train_transform(32, **arguments)


def test_train_depends_on_the_generator_only(picture):
    transform = train_transform(40)
    again = pickle.loads(pickle.dumps(transform))
    results = [transform(picture, rng(seed)) for seed in range(20)]
    for seed in reversed(range(20)):
        assert np.array_equal(again(picture, rng(seed)), results[seed])
    assert results[0].shape == (3, 40, 40) and results[0].dtype == np.float32
    assert len({result.tobytes() for result in results}) == 20


def test_train_with_all_off_is_the_evaluation_of_the_whole_picture(picture):
    transform = train_transform(40, scale=(1, 1), ratio=(4 / 3, 4 / 3), hflip=0, color_jitter=0, auto_augment='',
                                re_prob=0)
    assert np.array_equal(transform(picture, rng()), eval_transform(40, protocol='warp')(picture))


def test_flips(picture):
    off = dict(scale=(1, 1), ratio=(4 / 3, 4 / 3), color_jitter=0, auto_augment='', re_prob=0, hflip=0)
    plain = train_transform(40, **off)(picture, rng())
    assert np.array_equal(train_transform(40, **{**off, 'hflip': 1})(picture, rng()), plain[:, :, ::-1])
    assert np.array_equal(train_transform(40, **{**off, 'vflip': 1})(picture, rng()), plain[:, ::-1])
    flipped = sum(np.array_equal(train_transform(40, **{**off, 'hflip': 0.3})(picture, rng(seed)), plain[:, :, ::-1])
                  for seed in range(400))
    assert 85 < flipped < 155


def test_colour_jitter_only_without_rand_augment(picture):
    off = dict(scale=(1, 1), ratio=(4 / 3, 4 / 3), hflip=0, re_prob=0)
    never = dict(off, auto_augment='rand-p0')
    assert np.array_equal(train_transform(40, color_jitter=0.4, **never)(picture, rng()),
                          train_transform(40, color_jitter=0.0, **never)(picture, rng()))
    jittered = train_transform(40, color_jitter=0.4, auto_augment='', **off)(picture, rng())
    assert not np.array_equal(jittered, train_transform(40, color_jitter=0.0, auto_augment='', **off)(picture, rng()))


def test_colour_jitter_factors_stay_in_range():
    grey = Image.new('RGB', (8, 8), (100, 100, 100))
    values = [np.asarray(transforms.jitter_color(grey, rng(seed), 0.4))[0, 0, 0] for seed in range(300)]
    assert 59 <= min(values) < 70 and 130 < max(values) <= 140


def test_random_resized_crop_draws_area_and_aspect_as_published():
    """Positions are encoded in the picture, so the crop's box can be read from its corners."""
    y, x = np.mgrid[0:200, 0:240].astype(np.uint8)
    image = Image.fromarray(np.stack([y, x, 0 * x], axis=-1))
    areas, aspects = [], []
    for seed in range(600):
        crop = np.asarray(transforms.random_resized_crop(image, 64, rng(seed), interpolation='nearest'))
        height, width = (int(crop[-1, -1, i]) - int(crop[0, 0, i]) for i in (0, 1))
        areas.append(height * width / (200 * 240))
        aspects.append(width / height)
    assert 0.06 < min(areas) and max(areas) <= 1 and 0.70 < min(aspects) and max(aspects) < 1.42
    assert 0.45 < np.mean(areas) < 0.56  # uniform in 0.08..1, large boxes that do not fit are redrawn
    assert abs(np.mean(np.log(aspects))) < 0.04


def test_random_resized_crop_of_a_thin_picture_is_the_largest_centred_box():
    image = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 4, 3)))
    crop = np.asarray(transforms.random_resized_crop(image, 5, rng(), scale=(0.9, 1.0), interpolation='nearest'))
    assert crop[..., 0].min() >= 97 and crop[..., 0].max() <= 102  # 4 wide, so 4 / (3/4) = 5 high
    assert transforms.random_resized_crop(Image.new('RGB', (1, 1)), 8, rng()).size == (8, 8)


@pytest.mark.parametrize('mode', ['const', 'rand', 'pixel'])
def test_random_erasing_modes(mode):
    seen = 0
    for seed in range(200):
        pixels = np.full((3, 60, 40), 9, np.float32)
        transforms.random_erasing(pixels, rng(seed), mode=mode)
        erased = pixels != 9
        rows, columns = erased[0].any(1), erased[0].any(0)
        height, width = rows.sum(), columns.sum()
        assert (erased == (rows[:, None] & columns)).all(), 'one box, the same in all channels'
        assert 0.015 < height * width / 2400 < 0.35 and 0.25 < height / width < 4
        box = pixels[:, rows][:, :, columns]
        if mode == 'const':
            assert (box == 0).all()
        elif mode == 'rand':
            assert (box == box[:, :1, :1]).all() and len(np.unique(box[:, 0, 0])) == 3
        else:
            assert len(np.unique(box)) > 0.99 * box.size
            seen += box.mean() / 200
    assert abs(seen) < 0.02  # standard normal


def test_random_erasing_probability_and_count(picture):
    off = dict(scale=(1, 1), ratio=(4 / 3, 4 / 3), hflip=0, color_jitter=0, auto_augment='')
    plain = train_transform(40, re_prob=0, **off)(picture, rng())
    changed = sum(not np.array_equal(train_transform(40, re_prob=0.25, **off)(picture, rng(seed)), plain)
                  for seed in range(400))
    assert 65 < changed < 140
    share = []
    for seed in range(50):
        pixels = np.ones((3, 90, 90), np.float32)
        transforms.random_erasing(pixels, rng(seed), mode='const', count=3)
        share.append((pixels == 0).mean())
    assert max(share) < 0.36, 'the area is shared by the boxes'


INCREASING = {'AutoContrast', 'Equalize', 'Invert', 'Rotate', 'PosterizeIncreasing', 'SolarizeIncreasing',
              'SolarizeAdd', 'ColorIncreasing', 'ContrastIncreasing', 'BrightnessIncreasing', 'SharpnessIncreasing',
              'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel'}


def test_rand_augment_strings():
    official = RandAugment('rand-m9-mstd0.5-inc1')
    assert (official.magnitude, official.noise, official.count, official.prob) == (9, 0.5, 2, 0.5)
    assert set(official.names) == INCREASING and official.weights is None
    mindspore = RandAugment('randaug-m9-mstd0.5')
    assert (mindspore.magnitude, mindspore.noise, mindspore.count) == (9, 0.5, 2)
    assert set(mindspore.names) == {name.replace('Increasing', '') for name in INCREASING}
    other = RandAugment('rand-inc0-p0.9-n3-mmax12-m11-w0')
    assert (other.magnitude, other.count, other.prob, other.max_magnitude) == (11, 3, 0.9, 12)
    assert other.weights.sum() == pytest.approx(1) and 'Posterize' in other.names
    assert RandAugment('rand').magnitude == 10


@pytest.mark.parametrize('spec', ['rand-m9-inc', 'rnd-m9', 'rand-x3', 'rand-m', 'rand--m9', 'rand-m9-inc2', 'rand-n0',
                                  'rand-n1.5', 'rand-p2', 'rand-w1', 'rand-m1e3', 'rand m9', 'rand-m-9', 'rand-n14-w0'])
def test_malformed_rand_augment_strings_are_named(spec):
    with pytest.raises(ValueError, match=f"'{spec}'"):
        train_transform(32, auto_augment=spec)


@pytest.mark.parametrize('name, level, expected', [
    ('Rotate', 1, {-30, 30}), ('Rotate', 0.9, {-27, 27}), ('ShearX', 0.9, {-0.27, 0.27}), ('ShearY', 1, {-0.3, 0.3}),
    ('TranslateXRel', 0.9, {-0.405, 0.405}), ('TranslateYRel', 0, {0}),
    ('PosterizeIncreasing', 0, {4}), ('PosterizeIncreasing', 0.9, {1}), ('PosterizeIncreasing', 1, {0}),
    ('Posterize', 0.9, {3}), ('Posterize', 0, {0}), ('SolarizeIncreasing', 0, {256}), ('SolarizeIncreasing', 0.9, {26}),
    ('Solarize', 0.9, {230}), ('SolarizeAdd', 0.9, {99}), ('SolarizeAdd', 1, {110}),
    ('ColorIncreasing', 0.9, {0.19, 1.81}), ('SharpnessIncreasing', 1, {0.1, 1.9}), ('ContrastIncreasing', 0, {1}),
    ('BrightnessIncreasing', 0.5, {0.55, 1.45}), ('Color', 0, {0.1}), ('Brightness', 1, {1.9}), ('Contrast', 0.5, {1}),
])
def test_rand_augment_magnitudes_are_the_published_ones(name, level, expected):
    drawn = Counter(round(transforms._OPS[name].argument(level, rng(seed)), 9) for seed in range(200))
    assert set(drawn) == expected
    assert min(drawn.values()) > 60, 'both signs alike'


def test_rand_augment_draws_magnitudes_and_operations_as_published(monkeypatch):
    applied, levels = [], []

    def record(name):
        def argument(level, generator):
            applied[-1].append(name)
            levels.append(level)
        return transforms._Op(argument, lambda image, *_: image)

    monkeypatch.setattr(transforms, '_OPS', {name: record(name) for name in transforms._OPS})
    augment, generator = RandAugment('rand-m9-mstd0.5-inc1'), rng()
    for _ in range(4000):
        applied.append([])
        augment(None, generator)
    counts = Counter(name for names in applied for name in names)
    assert set(counts) == INCREASING
    assert all(200 < count < 340 for count in counts.values())  # 4000 * 2 * 0.5 / 15 = 267
    lengths = Counter(map(len, applied))
    assert abs(lengths[0] / 4000 - 0.25) < 0.04 and abs(lengths[1] / 4000 - 0.5) < 0.04
    assert any(len(names) == 2 and names[0] == names[1] for names in applied), 'with replacement'
    assert np.mean(levels) == pytest.approx(0.9, abs=0.01) and max(levels) == 1.0  # clipped at magnitude 10
    assert np.std(levels) == pytest.approx(0.05, abs=0.005)

    applied.clear()
    augment = RandAugment('rand-n6-w0-p1')
    for _ in range(300):
        applied.append([])
        augment(None, generator)
    assert all(len(set(names)) == 6 for names in applied), 'weighted choice is without replacement'
    assert not {'Invert', 'Posterize'} & {name for names in applied for name in names}
    levels.clear()
    augment = RandAugment('rand-m8-mstd101-p1')
    for _ in range(500):
        applied.append([])
        augment(None, generator)
    assert 0 <= min(levels) < 0.05 and 0.75 < max(levels) <= 0.8 and np.mean(levels) == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize('name', sorted(transforms._OPS))
def test_rand_augment_operations_change_the_picture_and_keep_its_form(picture, name):
    op = transforms._OPS[name]
    picture = picture.point(lambda value: 80 + value * 2 // 3)  # leaves AutoContrast something to do
    result = op.apply(picture, op.argument(0.9, rng()), (1, 2, 3), Image.BICUBIC)
    assert result.size == picture.size and result.mode == 'RGB'
    assert not np.array_equal(np.asarray(result), np.asarray(picture))


def test_rand_augment_operations_by_their_meaning():
    ops = transforms._OPS
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (4, 1, 3)))
    values = np.arange(256)

    def row(name, argument, image=ramp):
        return np.asarray(ops[name].apply(image, argument, (1, 2, 3), Image.BICUBIC))[0].astype(int)

    assert np.array_equal(row('SolarizeAdd', 99)[:, 0], np.where(values < 128, np.minimum(values + 99, 255), values))
    assert np.array_equal(row('Solarize', 26)[:, 1], np.where(values < 26, values, 255 - values))
    assert np.array_equal(row('Solarize', 256)[:, 1], values)
    assert np.array_equal(row('Posterize', 1)[:, 2], values // 128 * 128)
    assert (row('Posterize', 0) == 0).all() and np.array_equal(row('Posterize', 8)[:, 0], values)
    assert np.array_equal(row('Invert', None)[:, 0], 255 - values)
    moved = row('TranslateXRel', 0.25)
    assert np.array_equal(moved[:192, 0], values[64:]) and (moved[192:] == (1, 2, 3)).all()
    assert (np.asarray(ops['Rotate'].apply(Image.new('RGB', (9, 9)), 45, (1, 2, 3), Image.BICUBIC))[0, 0]
            == (1, 2, 3)).all()


def test_rand_augment_fills_with_the_mean(picture):
    transform = train_transform(40, mean=(0.5, 0.25, 1.0), auto_augment='rand')
    assert transform.keywords['augment'].fill == (128, 64, 255)
