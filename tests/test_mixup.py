"""Mixup and cutmix against a plain per-sample computation."""
import numpy as np
import paddle
import pytest

from mixup import MODES, Mixup

stats = pytest.importorskip('scipy.stats', reason='it has the distributions; scikit-learn brings it')


def batch_of(n, classes, height=12, width=10):
    generator = np.random.default_rng(n)
    return (generator.standard_normal((n, 3, height, width)).astype(np.float32),
            generator.integers(0, classes, n).astype(np.int64))


def mix(mixup, images, labels, seed=0):
    mixed, targets = mixup(paddle.to_tensor(images), paddle.to_tensor(labels), np.random.default_rng(seed))
    return mixed.numpy(), targets.numpy()


def smooth_targets(labels, classes, smoothing):
    targets = np.full((len(labels), classes), smoothing / classes)
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    return targets


def own_share(mixed, own, partner):
    """Weight of `own` in a mixed sample: a constant for mixup, of each pixel's ownership for cutmix."""
    return np.mean((mixed - partner) / (own - partner))


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('n', [1, 2, 5, 8])
@pytest.mark.parametrize('mode', MODES)
def test_mixup_is_a_convex_combination_with_the_mirrored_partner(mode, n, smoothing):
    images, labels = batch_of(n, 4)
    mixed, targets = mix(Mixup(0.8, 0, mode=mode, label_smoothing=smoothing, num_classes=4), images, labels)
    shares = [own_share(mixed[i], images[i], images[n - 1 - i]) if i != n - 1 - i else 0.5 for i in range(n)]
    smooth = smooth_targets(labels, 4, smoothing)
    for i, share in enumerate(shares):
        j = n - 1 - i
        np.testing.assert_allclose(mixed[i], share * images[i] + (1 - share) * images[j], atol=1e-4)
        np.testing.assert_allclose(targets[i], share * smooth[i] + (1 - share) * smooth[j], atol=1e-4)
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-5)
    distinct = {round(float(share), 3) for i, share in enumerate(shares) if i != n - 1 - i}
    if n > 1:
        assert len(distinct) == {'batch': 1, 'pair': n // 2, 'elem': n // 2 * 2}[mode]
    if mode != 'elem':
        np.testing.assert_allclose(shares, shares[::-1], atol=1e-3)


@pytest.mark.parametrize('n', [1, 4, 7])
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('minmax', [None, (0.2, 0.8)])
def test_cutmix_pastes_a_box_of_the_partner_and_weights_targets_by_area(mode, n, minmax):
    images, labels = batch_of(n, 5, height=16, width=24)
    smooth = smooth_targets(labels, 5, 0.1)
    boxes = set()
    for seed in range(20):
        mixed, targets = mix(Mixup(0, 1.0, minmax, mode=mode, num_classes=5), images, labels, seed)
        for i in range(n):
            j = n - 1 - i
            if i == j:
                assert np.array_equal(mixed[i], images[i])
                np.testing.assert_allclose(targets[i], smooth[i], atol=1e-6)
                continue
            pasted = (mixed[i] == images[j]).all(0)
            assert np.array_equal(mixed[i], np.where(pasted, images[j], images[i])), 'each pixel is from one image'
            rows, columns = pasted.any(1), pasted.any(0)
            assert (pasted == rows[:, None] & columns).all(), 'a box'
            assert np.ptp(np.flatnonzero(rows)) + 1 == rows.sum() if rows.any() else True
            if minmax:
                assert 3 <= rows.sum() < 12 and 4 <= columns.sum() < 19
            share = 1 - pasted.mean()
            np.testing.assert_allclose(targets[i], share * smooth[i] + (1 - share) * smooth[j], atol=1e-6)
            boxes.add(pasted.tobytes())
            if mode != 'elem':
                assert np.array_equal(pasted, (mixed[j] == images[i]).all(0)), 'partners share their box'
    assert n == 1 or len(boxes) > 10


def test_cutmix_without_correction_keeps_the_drawn_weight():
    images, labels = np.random.default_rng(1).random((2, 1, 64, 64), np.float32), np.array([0, 1])
    differences = []
    for seed in range(30):
        mixed, targets = mix(Mixup(0, 1.0, correct_lam=False, label_smoothing=0, num_classes=2), images, labels, seed)
        differences.append(targets[0, 0] - (mixed[0] == images[0]).mean())
    assert max(np.abs(differences)) > 0.1, 'boxes clipped at the border are smaller than 1 - lam'
    assert max(differences) < 0.04, 'no box is larger than 1 - lam, rounding aside'


def kolmogorov_smirnov(values, cdf):
    """Largest distance of the distribution functions x sqrt(n); above 2.2 once in 10,000 samples of any size."""
    return stats.kstest(values, cdf).statistic * np.sqrt(len(values))


@pytest.mark.parametrize('alpha', [0.2, 0.8, 1.0])
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_weights_follow_their_beta_distribution(kind, alpha):
    """The first half of the batch is of class 0, its partners of class 1: targets are the weights."""
    n = 3000
    images, labels = np.zeros((n, 1, 1, 1), np.float32), np.arange(n) // (n // 2)
    alphas = (alpha, 0) if kind == 'mixup' else (0, alpha)
    _, targets = mix(Mixup(*alphas, mode='elem', correct_lam=False, label_smoothing=0, num_classes=2), images, labels)
    assert kolmogorov_smirnov(targets[np.arange(n), labels], stats.beta(alpha, alpha).cdf) < 2.2


def test_cutmix_boxes_have_the_drawn_area_and_a_uniform_centre():
    """arXiv 1905.04899: the box has the share 1 - lam of the image, its centre is uniform, the border clips it."""
    n, size = 3000, 200
    _, columns, lam = Mixup(0, 1.0, mode='elem', correct_lam=False)._draw(n, size, size, np.random.default_rng(0))
    columns = columns[:, 0, 0].astype(bool)
    left, right = columns.argmax(1), size - columns[:, ::-1].argmax(1)
    side = size * np.sqrt(1 - lam[:, 0])
    inside = columns.any(1) & (left > 0) & (right < size)
    np.testing.assert_allclose((right - left)[inside], side[inside], atol=2)
    assert kolmogorov_smirnov((left + right)[inside & (side < 40)] / 2, stats.uniform(20, 160).cdf) < 2.2
    clipped = columns.any(1) & ~inside & (side > 4)
    expected = np.minimum(side, size) / size  # chance that a centre is within half a side of either border
    assert abs(clipped.sum() - expected[side > 4].sum()) < 5 * np.sqrt(n) / 2


@pytest.mark.parametrize('mode', MODES)
def test_probabilities_of_mixing_and_of_switching(mode):
    images, labels = batch_of(40, 3)
    mixup = Mixup(0.8, 1.0, (0.3, 0.6), prob=0.6, switch_prob=0.25, mode=mode, num_classes=3)
    kinds = {'none': 0, 'cutmix': 0, 'mixup': 0}
    seeds = 400 if mode == 'batch' else 20
    for seed in range(seeds):
        mixed, _ = mix(mixup, images, labels, seed)
        for i in range(1 if mode == 'batch' else 20):
            own, partner = mixed[i] == images[i], mixed[i] == images[39 - i]
            kinds['none' if own.all() else 'cutmix' if (own | partner).all() else 'mixup'] += 1
    assert sum(kinds.values()) == 400
    assert 0.30 < kinds['none'] / 400 < 0.50
    assert 0.09 < kinds['cutmix'] / 400 < 0.21 and 0.36 < kinds['mixup'] / 400 < 0.54


@pytest.mark.parametrize('mode', MODES)
def test_prob_zero_leaves_the_images_and_smooths_the_targets(mode):
    images, labels = batch_of(3, 6)
    for minmax in (None, (0.2, 0.8)):
        mixed, targets = mix(Mixup(prob=0, cutmix_minmax=minmax, mode=mode, num_classes=6), images, labels)
        assert np.array_equal(mixed, images)
        np.testing.assert_allclose(targets, smooth_targets(labels, 6, 0.1), atol=1e-6)


def test_the_same_generator_state_gives_the_same_batch():
    images, labels = batch_of(6, 4)
    mixup = Mixup(mode='elem', num_classes=4)
    first, again, other = mix(mixup, images, labels, 3), mix(mixup, images, labels, 3), mix(mixup, images, labels, 4)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_one_pixel_images_one_class_and_many_classes():
    for minmax in (None, (0.2, 0.8), (0, 0), (1, 1)):
        for seed in range(10):
            mixed, targets = mix(Mixup(0.8, 1.0, minmax, mode='elem', num_classes=1),
                                 np.ones((3, 3, 1, 1), np.float32), np.zeros(3, np.int64), seed)
            np.testing.assert_allclose(mixed, 1, atol=1e-6)
            np.testing.assert_allclose(targets, 1, atol=1e-6)
    labels = np.array([0, 1, 2, 21840])
    _, targets = mix(Mixup(num_classes=21841), np.ones((4, 3, 8, 8), np.float32), labels)
    assert targets.shape == (4, 21841) and (targets.argmax(1) == labels).sum() in (0, 2, 4)


@pytest.mark.parametrize('arguments, words', [
    ({'mixup_alpha': 0, 'cutmix_alpha': 0}, 'both 0'), ({'mixup_alpha': -1}, 'negative'), ({'mode': 'half'}, "'half'"),
    ({'prob': 1.1}, 'probabilities'), ({'switch_prob': -0.1}, 'probabilities'), ({'label_smoothing': 1}, 'smoothing'),
    ({'num_classes': 0}, 'num_classes'), ({'cutmix_minmax': (0.8, 0.2)}, 'minmax'),
    ({'cutmix_minmax': (0.5,)}, 'minmax'),
])
def test_refuses_arguments_out_of_range(arguments, words):
    with pytest.raises(ValueError, match=words):
        Mixup(**arguments)


def test_minmax_alone_turns_cutmix_on():
    images, labels = batch_of(2, 2)
    mixed, _ = mix(Mixup(0, 0, (0.4, 0.6), num_classes=2), images, labels)
    assert 0 < (mixed[0] == images[1]).mean() < 0.5
