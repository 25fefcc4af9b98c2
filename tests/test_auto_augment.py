"""Policies of operations against their published definitions: what is drawn, how often, how strongly."""
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import auto_augment
from auto_augment import build_auto_augment
from errors import UserError

stats = pytest.importorskip('scipy.stats', reason='it has the distributions; scikit-learn brings it')


def rng(seed=0):
    return np.random.default_rng(seed)


INCREASING = {'AutoContrast', 'Equalize', 'Invert', 'Rotate', 'PosterizeIncreasing', 'SolarizeIncreasing',
              'SolarizeAdd', 'ColorIncreasing', 'ContrastIncreasing', 'BrightnessIncreasing', 'SharpnessIncreasing',
              'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel'}


def test_rand_augment_strings():
    official = build_auto_augment('rand-m9-mstd0.5-inc1')
    assert (official.magnitude, official.noise, official.count, official.prob) == (9, 0.5, 2, 0.5)
    assert set(official.names) == INCREASING and official.weights is None
    mindspore = build_auto_augment('randaug-m9-mstd0.5')
    assert (mindspore.magnitude, mindspore.noise, mindspore.count) == (9, 0.5, 2)
    assert set(mindspore.names) == {name.replace('Increasing', '') for name in INCREASING}
    other = build_auto_augment('rand-inc0-p0.9-n3-mmax12-m11-w0')
    assert (other.magnitude, other.count, other.prob, other.max_magnitude) == (11, 3, 0.9, 12)
    assert other.weights.sum() == pytest.approx(1) and 'Posterize' in other.names
    assert build_auto_augment('rand').magnitude == 10


@pytest.mark.parametrize('spec', [
    'rand-m9-inc', 'rnd-m9', 'rand-x3', 'rand-m', 'rand--m9', 'rand-m9-inc2', 'rand-n0', 'rand-n1.5', 'rand-p2',
    'rand-w1', 'rand-m1e3', 'rand m9', 'rand-m-9', 'rand-n14-w0', 'original-m9', 'v0-mstd', 'v0-n2', 'v1',
    'autoaugment', 'augmix-w0', 'augmix-w1.5', 'augmix-d0.5', 'augmix-m0', 'augmix-m11', 'augmix-a0', 'augmix-mstd1'])
def test_malformed_strings_are_named_in_one_line(spec):
    with pytest.raises(UserError, match=f"'{spec}'") as error:
        build_auto_augment(spec)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, level, expected', [
    ('Rotate', 1, {-30, 30}), ('Rotate', 0.9, {-27, 27}), ('ShearX', 0.9, {-0.27, 0.27}), ('ShearY', 1, {-0.3, 0.3}),
    ('TranslateXRel', 0.9, {-0.405, 0.405}), ('TranslateYRel', 0, {0}),
    ('PosterizeIncreasing', 0, {4}), ('PosterizeIncreasing', 0.9, {1}), ('PosterizeIncreasing', 1, {0}),
    ('PosterizeOriginal', 0, {4}), ('PosterizeOriginal', 0.8, {7}), ('PosterizeOriginal', 1, {8}),
    ('TranslateXThird', 0.3, {-0.1, 0.1}), ('TranslateYThird', 0.9, {-0.3, 0.3}),
    ('Posterize', 0.9, {3}), ('Posterize', 0, {0}), ('SolarizeIncreasing', 0, {256}), ('SolarizeIncreasing', 0.9, {26}),
    ('Solarize', 0.9, {230}), ('SolarizeAdd', 0.9, {99}), ('SolarizeAdd', 1, {110}),
    ('ColorIncreasing', 0.9, {0.19, 1.81}), ('SharpnessIncreasing', 1, {0.1, 1.9}), ('ContrastIncreasing', 0, {1}),
    ('BrightnessIncreasing', 0.5, {0.55, 1.45}), ('Color', 0, {0.1}), ('Brightness', 1, {1.9}), ('Contrast', 0.5, {1}),
])
def test_magnitudes_are_the_published_ones(name, level, expected):
    drawn = Counter(round(auto_augment.OPS[name].argument(level, rng(seed)), 9) for seed in range(200))
    assert set(drawn) == expected
    assert min(drawn.values()) > 60, 'both signs alike'


@pytest.fixture
def draws(monkeypatch):
    """draws(spec, count): what the policy draws for each of `count` images, a tuple of (operation, level)."""
    def record(name):
        def argument(level, generator):
            drawn[-1].append((name, level))
        return auto_augment.Op(argument, lambda image, *_: image)

    def run(spec, count):
        drawn.clear()
        augment, generator = build_auto_augment(spec), rng()
        for _ in range(count):
            drawn.append([])
            augment(Image.new('RGB', (1, 1)), generator)
        return [tuple(each) for each in drawn]

    drawn = []
    monkeypatch.setattr(auto_augment, 'OPS', {name: record(name) for name in auto_augment.OPS})
    return run


def assert_frequencies(drawn, expected):
    """How often each outcome was drawn, within 5 standard deviations of its probability; nothing else was."""
    counts, n = Counter(drawn), len(drawn)
    assert sum(expected.values()) == pytest.approx(1) and set(counts) <= {key for key in expected if expected[key] > 0}
    for outcome, p in expected.items():
        assert abs(counts[outcome] - n * p) <= 5 * np.sqrt(n * p * (1 - p)), outcome


def assert_distributed(values, distribution):
    """Kolmogorov-Smirnov: the largest distance of the distribution functions, which sqrt(n) scales."""
    assert stats.kstest(values, distribution.cdf).statistic < 2.2 / np.sqrt(len(values))


@pytest.mark.parametrize(('spec', 'count', 'prob'), [
    ('rand-m9-mstd0.5-inc1', 2, 0.5), ('randaug-m9-mstd0.5', 2, 0.5), ('rand-n3-p0.7', 3, 0.7), ('rand-n1-p1', 1, 1)])
def test_rand_augment_applies_each_of_n_operations_with_probability_p(draws, spec, count, prob):
    drawn = draws(spec, 4000)
    assert_frequencies([len(each) for each in drawn],
                       {k: stats.binom.pmf(k, count, prob) for k in range(count + 1)})
    names = {name if 'inc1' in spec else name.replace('Increasing', '') for name in INCREASING}
    assert_frequencies([name for each in drawn for name, _ in each], dict.fromkeys(names, 1 / 15))
    if count > 1:
        same = [pair[0][0] == pair[1][0] for pair in drawn if len(pair) > 1]
        assert_frequencies(same, {True: 1 / 15, False: 14 / 15})  # with replacement


def test_rand_augment_with_weights(draws):
    weights = dict(zip(('AutoContrast', 'Equalize', 'Rotate', 'Solarize', 'SolarizeAdd', 'Color', 'Contrast',
                        'Brightness', 'Sharpness', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel'),
                       (0.025, 0.005, 0.3, 0.005, 0.005, 0.025, 0.005, 0.005, 0.025, 0.2, 0.2, 0.1, 0.1)))
    total = sum(weights.values())
    assert_frequencies([each[0][0] for each in draws('rand-n1-w0-p1', 4000)],
                       {name: weight / total for name, weight in weights.items()})
    assert all(len({name for name, _ in each}) == 6 for each in draws('rand-n6-w0-p1', 300)), 'without replacement'


def levels(drawn):
    return np.array([level for each in drawn for _, level in each])


def test_noise_of_the_magnitude(draws):
    assert set(levels(draws('rand-m7-p1', 200))) == {0.7}
    for spec, mean, deviation, highest in (
            ('rand-m9-mstd0.5-p1', 0.9, 0.05, 1), ('rand-m5-mstd1.5-p1', 0.5, 0.15, 1),
            ('rand-m9-mstd2-mmax12-p1', 0.9, 0.2, 1.2), ('rand-m1-mstd1-p1', 0.1, 0.1, 1)):
        drawn = levels(draws(spec, 3000))
        assert min(drawn) >= 0 and max(drawn) <= highest
        low, high = -mean / deviation, (highest - mean) / deviation
        assert_distributed(drawn[(drawn > 0) & (drawn < highest)], stats.truncnorm(low, high, mean, deviation))
        assert_frequencies([level == 0 for level in drawn], {True: stats.norm.cdf(low), False: stats.norm.sf(low)})
        assert_frequencies([level == highest for level in drawn],
                           {True: stats.norm.sf(high), False: stats.norm.cdf(high)})
    assert_distributed(levels(draws('rand-m8-mstd101-p1', 2000)), stats.uniform(0, 0.8))


# Table 9 of arXiv 1805.09501, and the policy of EfficientNet's TPU code: operation, probability, magnitude
PUBLISHED = {'original': """
    Posterize .4 8 Rotate .6 9; Solarize .6 5 AutoContrast .6 5; Equalize .8 8 Equalize .6 3;
    Posterize .6 7 Posterize .6 6; Equalize .4 7 Solarize .2 4; Equalize .4 4 Rotate .8 8; Solarize .6 3 Equalize .6 7;
    Posterize .8 5 Equalize 1 2; Rotate .2 3 Solarize .6 8; Equalize .6 8 Posterize .4 6; Rotate .8 8 Color .4 0;
    Rotate .4 9 Equalize .6 2; Equalize 0 7 Equalize .8 8; Invert .6 4 Equalize 1 8; Color .6 4 Contrast 1 8;
    Rotate .8 8 Color 1 2; Color .8 8 Solarize .8 7; Sharpness .4 7 Invert .6 8; ShearX .6 5 Equalize 1 9;
    Color .4 0 Equalize .6 3; Equalize .4 7 Solarize .2 4; Solarize .6 5 AutoContrast .6 5; Invert .6 4 Equalize 1 8;
    Color .6 4 Contrast 1 8; Equalize .8 8 Equalize .6 3""", 'v0': """
    Equalize .8 1 ShearY .8 4; Color .4 9 Equalize .6 3; Color .4 1 Rotate .6 8; Solarize .8 3 Equalize .4 7;
    Solarize .4 2 Solarize .6 2; Color .2 0 Equalize .8 8; Equalize .4 8 SolarizeAdd .8 3; ShearX .2 9 Rotate .6 8;
    Color .6 1 Equalize 1 2; Invert .4 9 Rotate .6 0; Equalize 1 9 ShearY .6 3; Color .4 7 Equalize .6 0;
    Posterize .4 6 AutoContrast .4 7; Solarize .6 8 Color .6 9; Solarize .2 4 Rotate .8 9; Rotate 1 7 TranslateY .8 9;
    ShearX 0 0 Solarize .8 4; ShearY .8 0 Color .6 4; Color 1 0 Rotate .6 2; Equalize .8 4 Equalize 0 8;
    Equalize 1 4 AutoContrast .6 2; ShearY .4 7 SolarizeAdd .6 7; Posterize .8 2 Solarize .6 10;
    Solarize .6 8 Equalize .6 1; Color .8 6 Rotate .4 5"""}
CODE_NAMES = {('original', 'Posterize'): 'PosterizeOriginal', ('v0', 'TranslateY'): 'TranslateYRel'}


@pytest.mark.parametrize('name', PUBLISHED)
def test_auto_augment_draws_the_published_sub_policies(draws, name):
    """Every outcome, that is the operations applied to one image with their magnitudes, has its probability."""
    expected = Counter()
    for sub_policy in PUBLISHED[name].split(';'):
        words = sub_policy.split()
        first, second = ((CODE_NAMES.get((name, op), op), float(p), int(magnitude) / 10)
                         for op, p, magnitude in (words[:3], words[3:]))
        for used in itertools.product((True, False), repeat=2):
            outcome = tuple((op, level) for (op, _, level), use in zip((first, second), used) if use)
            expected[outcome] += np.prod([p if use else 1 - p for (_, p, _), use in zip((first, second), used)]) / 25
    assert_frequencies(draws(name, 60_000), expected)


def test_auto_augment_with_noise(draws):
    drawn = [pair for each in draws('original-mstd0.5', 20_000) for pair in each]
    shear = [level for name, level in drawn if name == 'ShearX']
    assert_distributed(shear, stats.norm(0.5, 0.05))
    colour = [level for name, level in drawn if name == 'Color' and level < 0.1]  # magnitude 0 in two sub-policies
    assert_frequencies([level == 0 for level in colour], {True: 0.5, False: 0.5})
    assert max(level for _, level in drawn) == 1


AUGMIX = {'AutoContrast', 'Equalize', 'PosterizeIncreasing', 'Rotate', 'SolarizeIncreasing', 'ShearX', 'ShearY',
          'TranslateXThird', 'TranslateYThird'}


def test_augmix_draws_chains_of_operations_as_published(draws):
    drawn = draws('augmix-m3-w1', 4000)
    assert_frequencies([len(each) for each in drawn], {1: 1 / 3, 2: 1 / 3, 3: 1 / 3})
    assert_frequencies([name for each in drawn for name, _ in each], dict.fromkeys(AUGMIX, 1 / 9))
    assert_distributed(levels(drawn), stats.uniform(0.01, 0.29))
    assert {len(each) for each in draws('augmix', 2000)} == set(range(3, 10))
    assert {len(each) for each in draws('augmix-w4-d2', 20)} == {8}
    assert_distributed(levels(draws('augmix-m8', 500)), stats.uniform(0.01, 0.79))


@pytest.mark.parametrize('alpha', [1, 2])
def test_augmix_mixes_with_beta_and_dirichlet_weights(monkeypatch, alpha):
    """A black image whose three chains make it red, green and blue shows the weights."""
    colours = itertools.cycle([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    paint = auto_augment.Op(lambda level, rng: None, lambda image, *_: Image.new('RGB', image.size, next(colours)))
    monkeypatch.setattr(auto_augment, 'OPS', dict.fromkeys(AUGMIX, paint))
    augment, generator, black = build_auto_augment(f'augmix-w3-d1-a{alpha}'), rng(), Image.new('RGB', (1, 1))
    weights = np.array([np.asarray(augment(black, generator))[0, 0] for _ in range(1500)]) / 255
    share = weights.sum(1)
    assert_distributed(share, stats.beta(alpha, alpha))
    for channel in (weights[share > 0.2] / share[share > 0.2, None]).T:
        assert_distributed(channel, stats.beta(alpha, 2 * alpha))


def test_augmix_keeps_an_image_that_no_operation_changes(monkeypatch, photo):
    monkeypatch.setattr(auto_augment, 'OPS', dict.fromkeys(AUGMIX, auto_augment.Op(lambda *_: None, lambda x, *_: x)))
    assert np.array_equal(np.asarray(build_auto_augment('augmix')(photo, rng())), np.asarray(photo))


@pytest.mark.parametrize('spec', ['rand-m9-mstd0.5-inc1', 'original-mstd0.5', 'v0', 'augmix-m3-w3'])
def test_policies_depend_on_the_generator_only_and_keep_the_size(photo, spec):
    augment = build_auto_augment(spec)
    results = [augment(photo, rng(seed)) for seed in range(30)]
    assert {(result.size, result.mode) for result in results} == {(photo.size, 'RGB')}
    again = pickle.loads(pickle.dumps(augment))
    for seed in reversed(range(30)):
        assert again(photo, rng(seed)).tobytes() == results[seed].tobytes()
    assert len({result.tobytes() for result in results}) > 10


@pytest.mark.parametrize('name', sorted(auto_augment.OPS))
def test_operations_change_the_image_and_keep_its_form(photo, name):
    op = auto_augment.OPS[name]
    photo = photo.point(lambda value: 80 + value * 2 // 3)  # leaves AutoContrast something to do
    result = op.apply(photo, op.argument(0.9, rng()), (1, 2, 3), Image.BICUBIC)
    assert result.size == photo.size and result.mode == 'RGB'
    assert not np.array_equal(np.asarray(result), np.asarray(photo))


def test_operations_by_their_meaning():
    ops = auto_augment.OPS
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
