"""Evaluation transforms against the golden images, training transforms against their published definitions."""
import pickle

import numpy as np
import pytest
from PIL import Image

import transforms
from image_files.decode import decode_image
from transforms import eval_geometry, eval_transform, train_transform

stats = pytest.importorskip('scipy.stats', reason='it has the distributions; scikit-learn brings it')

PROTOCOLS = {'crop224': (224, 'crop'), 'crop320': (320, 'crop'), 'warp384': (384, 'warp')}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('name', ['rocket.jpg', 'coffee.png', 'camera_gray.png'])
def test_eval_equals_golden_images_bit_for_bit(golden, name, protocol):
    size, mode = PROTOCOLS[protocol]
    image = decode_image(golden / 'preprocess' / name)
    expected = np.asarray(Image.open(golden / 'preprocess' / f'{name.split(".")[0]}_{protocol}.png').convert('RGB'))
    assert np.array_equal(np.asarray(eval_geometry(image, size, protocol=mode)), expected)

    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.5])
    result = eval_transform(size, protocol=mode, mean=mean, std=std)(image)
    assert result.dtype == np.float32 and result.shape == (3, size, size) and result.flags.c_contiguous
    np.testing.assert_allclose(result.transpose(1, 2, 0), (expected / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (9, 1), (31, 33), (500, 20), (224, 224)])
@pytest.mark.parametrize('protocol', ['crop', 'warp'])
def test_eval_takes_images_of_any_size(size, protocol):
    image = Image.new('RGB', size, (255, 0, 127))
    result = eval_transform(32, protocol=protocol, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert result.shape == (3, 32, 32)
    np.testing.assert_allclose(result[:, 5, 7], [1, 0, 127 / 255], atol=1e-6)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic', 'lanczos'])
def test_the_crop_is_that_of_the_whole_resized_image(interpolation):
    """Bit for bit, except for images so thin that the whole would take over 64 MB: there by rounding."""
    draw = rng()
    noise = Image.fromarray(draw.integers(0, 256, (600, 600, 3), dtype=np.uint8))
    sizes = [*np.exp(draw.uniform(2, 6, (12, 2))).astype(int).tolist(), (500, 6), (6, 500), (3, 300), (301, 3)]
    for width, height in sizes:
        image, side = noise.crop((0, 0, width, height)), 192
        factor = int(side / 0.8) / min(width, height)
        whole = image.resize((int(width * factor), int(height * factor)), transforms.INTERPOLATIONS[interpolation])
        left, top = round((whole.width - side) / 2), round((whole.height - side) / 2)
        expected = whole.crop((left, top, left + side, top + side))
        found = eval_geometry(image, side, crop_pct=0.8, interpolation=interpolation)
        assert np.array_equal(found, expected), (width, height)
        thin = transforms._resize_centre(image, whole.size, side, transforms.INTERPOLATIONS[interpolation])
        assert abs(np.asarray(thin).astype(int) - np.asarray(expected)).max() <= 2, (width, height)


@pytest.mark.parametrize('count', [25, pytest.param(1000, marks=pytest.mark.long)])
def test_leaving_out_what_the_crop_does_not_show_changes_no_bit(count):
    draw = rng(count)
    usual = [(500, 375), (375, 500), (500, 333), (640, 480), (300, 300), (256, 256), (257, 256)]
    filters = list(transforms.INTERPOLATIONS.values())
    for number in range(count):
        width, height = usual[number] if number < len(usual) else np.exp(draw.uniform(3, 6.9, 2)).astype(int)
        side, pct = ((224, 0.875), (320, 0.875), (224, 1.0), (96, 0.9), (64, 0.875))[number % 5]
        factor = int(side / pct) / min(width, height)
        resized = int(width * factor + 1e-9), int(height * factor + 1e-9)
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        resample = filters[number % 4] if number % 3 == 0 else Image.BICUBIC
        whole = transforms._centre_crop(image.resize(resized, resample), side, side)
        assert transforms._exact_centre(image, resized, side, resample).tobytes() == whole.tobytes(), (width, height)


def test_thin_images_take_memory_and_time_in_proportion(run_script, tmp_path):
    """Within 400 MB of new memory: the whole resized image would take 5 to 500 GB."""
    (tmp_path / 'thin.py').write_text("""
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from PIL import Image
import transforms
size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 400 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for size in (1, 20_000), (20_000, 1), (1, 2_000_000), (2_000_000, 1), (3, 4_000_000):
    image = Image.new('RGB', size, (255, 0, 127))
    for protocol in 'crop', 'warp':
        found = transforms.eval_geometry(image, 384, protocol=protocol)
        assert found.size == (384, 384) and found.getextrema() == ((255, 255), (0, 0), (127, 127))
    transforms.train_transform(384)(image, np.random.default_rng(0))
""")
    done = run_script(tmp_path / 'thin.py', transforms.__file__.rsplit('/', 1)[0])
    assert done.returncode == 0, done.stderr


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


def test_train_depends_on_the_generator_only(photo):
    transform = train_transform(40)
    again = pickle.loads(pickle.dumps(transform))
    results = [transform(photo, rng(seed)) for seed in range(20)]
    for seed in reversed(range(20)):
        assert np.array_equal(again(photo, rng(seed)), results[seed])
    assert results[0].shape == (3, 40, 40) and results[0].dtype == np.float32
    assert len({result.tobytes() for result in results}) == 20


def test_train_with_all_off_is_the_evaluation_of_the_whole_image(photo):
    transform = train_transform(40, scale=(1, 1), ratio=(4 / 3, 4 / 3), hflip=0, color_jitter=0, auto_augment='',
                                re_prob=0)
    assert np.array_equal(transform(photo, rng()), eval_transform(40, protocol='warp')(photo))


def test_flips(photo):
    off = dict(scale=(1, 1), ratio=(4 / 3, 4 / 3), color_jitter=0, auto_augment='', re_prob=0, hflip=0)
    plain = train_transform(40, **off)(photo, rng())
    assert np.array_equal(train_transform(40, **{**off, 'hflip': 1})(photo, rng()), plain[:, :, ::-1])
    assert np.array_equal(train_transform(40, **{**off, 'vflip': 1})(photo, rng()), plain[:, ::-1])
    flipped = sum(np.array_equal(train_transform(40, **{**off, 'hflip': 0.3})(photo, rng(seed)), plain[:, :, ::-1])
                  for seed in range(400))
    assert 85 < flipped < 155


def test_colour_jitter_only_without_rand_augment(photo):
    off = dict(scale=(1, 1), ratio=(4 / 3, 4 / 3), hflip=0, re_prob=0)
    never = dict(off, auto_augment='rand-p0')
    assert np.array_equal(train_transform(40, color_jitter=0.4, **never)(photo, rng()),
                          train_transform(40, color_jitter=0.0, **never)(photo, rng()))
    jittered = train_transform(40, color_jitter=0.4, auto_augment='', **off)(photo, rng())
    assert not np.array_equal(jittered, train_transform(40, color_jitter=0.0, auto_augment='', **off)(photo, rng()))


def test_colour_jitter_factors_stay_in_range():
    grey = Image.new('RGB', (8, 8), (100, 100, 100))
    values = [np.asarray(transforms.jitter_color(grey, rng(seed), 0.4))[0, 0, 0] for seed in range(300)]
    assert 59 <= min(values) < 70 and 130 < max(values) <= 140


class Recorded:
    """Replaces an image and records the box that is cropped out of it."""
    width, height = 2400, 2000

    def crop(self, box):
        self.box = box
        return self

    def resize(self, *_):
        return self.box


def kolmogorov_smirnov(values, cdf):
    """Largest distance of the distribution functions x sqrt(n); above 2.2 once in 10,000 samples of any size."""
    return stats.kstest(values, cdf).statistic * np.sqrt(len(values))


def fitting_area(low, high, limit, shape):
    """Distribution function of a uniform area when boxes (log-uniform aspect) that do not fit are drawn again.

    A box of share s and aspect a, in terms of its first side over the second, fits where s * a and s / a are at most
    the image's own aspect `shape` and its inverse.
    """
    area = np.linspace(low, high, 10_001)
    longest, shortest = np.minimum(np.log(shape / area), limit), np.maximum(np.log(area * shape), -limit)
    fits = np.clip(longest - shortest, 0, None)
    return lambda value: np.interp(value, area, np.cumsum(fits) / fits.sum())


def test_random_resized_crop_draws_area_and_aspect_as_published():
    left, top, right, bottom = np.array(
        [transforms.random_resized_crop(Recorded(), 64, rng(seed)) for seed in range(3000)]).T
    width, height = right - left, bottom - top
    area, aspect = width * height / (2400 * 2000), np.log(width / height)
    limit = np.log(4 / 3)
    assert area.min() > 0.079 and abs(aspect).max() < limit + 0.002
    assert kolmogorov_smirnov(area, fitting_area(0.08, 1, limit, 1.2)) < 2.2
    small = area < 0.6  # these always fit
    assert kolmogorov_smirnov(aspect[small], stats.uniform(-limit, 2 * limit).cdf) < 2.2
    assert kolmogorov_smirnov(left[small] / (2400 - width[small]), stats.uniform.cdf) < 2.2
    assert kolmogorov_smirnov(top[small] / (2000 - height[small]), stats.uniform.cdf) < 2.2


def test_random_resized_crop_of_a_thin_image_is_the_largest_centred_box():
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


class Canvas:
    """Replaces an array of pixels and records the boxes that are overwritten."""
    shape = 3, 2000, 2400

    def __init__(self):
        self.boxes = []

    def __setitem__(self, key, value):
        _, rows, columns = key
        self.boxes.append((rows.start, rows.stop, columns.start, columns.stop))


@pytest.mark.parametrize('count', [1, 3])
def test_random_erasing_draws_area_and_aspect_as_published(count):
    """arXiv 1708.04896: area uniform in 0.02 to 1/3 of the image, aspect 0.3 to 1/0.3, position uniform."""
    canvas = Canvas()
    for seed in range(3000 // count):
        transforms.random_erasing(canvas, rng(seed), mode='const', count=count)
    top, bottom, left, right = np.array(canvas.boxes).T
    height, width = bottom - top, right - left
    area, aspect = height * width / (2000 * 2400), np.log(height / width)
    limit = np.log(1 / 0.3)
    assert len(area) == 3000 // count * count
    assert 0.0195 < area.min() * count and area.max() * count < 1 / 3 + 1e-3 and abs(aspect).max() < limit + 0.01
    assert kolmogorov_smirnov(area, fitting_area(0.02 / count, 1 / 3 / count, limit, 2000 / 2400)) < 2.2
    assert kolmogorov_smirnov(aspect[area < 0.24], stats.uniform(-limit, 2 * limit).cdf) < 2.2  # these always fit
    assert kolmogorov_smirnov(top / (2000 - height), stats.uniform.cdf) < 2.2
    assert kolmogorov_smirnov(left / (2400 - width), stats.uniform.cdf) < 2.2


def test_random_erasing_probability_and_count(photo):
    off = dict(scale=(1, 1), ratio=(4 / 3, 4 / 3), hflip=0, color_jitter=0, auto_augment='')
    plain = train_transform(40, re_prob=0, **off)(photo, rng())
    changed = sum(not np.array_equal(train_transform(40, re_prob=0.25, **off)(photo, rng(seed)), plain)
                  for seed in range(400))
    assert 65 < changed < 140
    share = []
    for seed in range(50):
        pixels = np.ones((3, 90, 90), np.float32)
        transforms.random_erasing(pixels, rng(seed), mode='const', count=3)
        share.append((pixels == 0).mean())
    assert max(share) < 0.36, 'the area is shared by the boxes'


def test_rand_augment_fills_with_the_mean(photo):
    transform = train_transform(40, mean=(0.5, 0.25, 1.0), auto_augment='rand')
    assert transform.augment.fill == (128, 64, 255)


@pytest.mark.parametrize('settings', [{}, {'auto_augment': 'augmix'}, {'auto_augment': '', 're_prob': 1}])
def test_views_share_the_crop_and_the_first_is_clean(photo, settings):
    clean = train_transform(40, auto_augment='', color_jitter=0, re_prob=0)
    for views in (2, 3):
        transform = pickle.loads(pickle.dumps(train_transform(40, views=views, **settings)))
        changed = 0
        for seed in range(20):
            result = transform(photo, rng(seed))
            assert result.shape == (views, 3, 40, 40) and result.dtype == np.float32
            assert np.array_equal(result[0], clean(photo, rng(seed)))
            assert np.array_equal(result, transform(photo, rng(seed)))
            changed += len({view.tobytes() for view in result}) == views
        assert changed >= 8
    nothing = train_transform(40, views=3, auto_augment='rand-p0', re_prob=0)(photo, rng())
    assert np.array_equal(nothing[1], nothing[0]) and np.array_equal(nothing[2], nothing[0])
    with pytest.raises(ValueError, match='views'):
        train_transform(40, views=0)
