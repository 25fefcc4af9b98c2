"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) with the semantics of timm."""
import numpy as np
import paddle
import paddle.nn.functional as F

from utils import to_device

MODES = ('batch', 'pair', 'elem')


class Mixup:
    """Mixes each sample with its partner, the sample at the mirrored position in the batch.

    The middle sample of a batch of odd size is its own partner. Random numbers are drawn with NumPy from the given
    generator; the mixing takes a few operations on the device of the images.

    Args:
        mixup_alpha: parameter of mixup's Beta(alpha, alpha); 0 turns mixup off.
        cutmix_alpha: parameter of cutmix's Beta(alpha, alpha); 0 turns cutmix off.
        cutmix_minmax: (min, max) share of each side of the box, or None; it turns cutmix on and replaces the size drawn
            with cutmix_alpha.
        prob: probability of mixing.
        switch_prob: probability of cutmix where both are on.
        mode: which samples share a draw: 'batch' (all), 'pair' (two partners) or 'elem' (each has its own).
        correct_lam: whether to weight the targets by the box's area after clipping at the border.
        label_smoothing: s of the targets: off = s / num_classes, on = 1 - s + off.
        num_classes: length of a target.

    Raises:
        ValueError: an argument is out of range, or neither mixup nor cutmix is on.
    """

    def __init__(self, mixup_alpha=0.8, cutmix_alpha=1.0, cutmix_minmax=None, prob=1.0, switch_prob=0.5, mode='batch',
                 correct_lam=True, label_smoothing=0.1, num_classes=1000):
        if mixup_alpha < 0 or cutmix_alpha < 0:
            raise ValueError(f'mixup and cutmix alpha must not be negative, got {mixup_alpha} and {cutmix_alpha}')
        if cutmix_minmax is not None:
            if len(cutmix_minmax) != 2 or not 0 <= cutmix_minmax[0] <= cutmix_minmax[1] <= 1:
                raise ValueError(f'cutmix minmax must be (min, max) with 0 <= min <= max <= 1, got {cutmix_minmax}')
            cutmix_alpha = cutmix_alpha or 1.0
        if mixup_alpha == 0 and cutmix_alpha == 0:
            raise ValueError('mixup and cutmix alpha are both 0: use a loss with hard labels instead of Mixup')
        if not 0 <= prob <= 1 or not 0 <= switch_prob <= 1:
            raise ValueError(f'prob and switch_prob are probabilities, got {prob} and {switch_prob}')
        if mode not in MODES:
            raise ValueError(f'unknown mixup mode {mode!r}: use one of {", ".join(MODES)}')
        if not 0 <= label_smoothing < 1:
            raise ValueError(f'label smoothing must be in [0, 1), got {label_smoothing}')
        if num_classes < 1:
            raise ValueError(f'num_classes must be at least 1, got {num_classes}')
        self.mixup_alpha, self.cutmix_alpha, self.cutmix_minmax = mixup_alpha, cutmix_alpha, cutmix_minmax
        self.prob, self.switch_prob, self.mode, self.correct_lam = prob, switch_prob, mode, correct_lam
        self.label_smoothing, self.num_classes = label_smoothing, num_classes

    def __call__(self, images, labels, rng):
        """Mixes one batch.

        Args:
            images: float32 tensor [N, C, H, W] on the current device.
            labels: int64 tensor [N], or [N, num_classes] with 1 for each of several labels of an image.
            rng: np.random.Generator.

        Returns:
            images [N, C, H, W] and targets [N, num_classes], float32.
        """
        batch, _, height, width = images.shape
        draws = self._draw(batch, height, width, rng)
        flat = to_device(np.concatenate([array.ravel() for array in draws]))  # one copy
        parts = paddle.split(flat, [array.size for array in draws])
        rows, columns, lam = (part.reshape(array.shape) for part, array in zip(parts, draws))
        weight = rows * columns  # the partner's weight at each pixel, [1 or N, 1, H, W]
        images = images * (1 - weight) + paddle.flip(images, axis=0) * weight

        targets = labels.astype('float32') if labels.ndim == 2 else F.one_hot(labels, self.num_classes)
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        return images, targets * lam + paddle.flip(targets, axis=0) * (1 - lam)

    def _draw(self, batch, height, width, rng):
        """Draws the random numbers for one batch.

        Returns:
            rows [n, 1, H, 1] and columns [n, 1, 1, W], whose product is the partner's weight at each pixel, and
            lam [n, 1], the sample's weight in its own target; float32, n = 1 in mode 'batch', else N.
        """
        count = {'batch': 1, 'pair': (batch + 1) // 2, 'elem': batch}[self.mode]
        use_cutmix = rng.random(count) < self.switch_prob
        if self.mixup_alpha == 0 or self.cutmix_alpha == 0:
            use_cutmix[:] = self.mixup_alpha == 0
        alpha = np.where(use_cutmix, self.cutmix_alpha, self.mixup_alpha)
        lam = np.where(rng.random(count) < self.prob, rng.beta(alpha, alpha), 1.0)

        top, bottom = self._box_side(lam, height, rng)
        left, right = self._box_side(lam, width, rng)
        y, x = np.arange(height), np.arange(width)
        rows = (y >= top[:, None]) & (y < bottom[:, None])
        columns = (x >= left[:, None]) & (x < right[:, None])
        # mixup is a box that covers the whole image with a weight below 1
        rows = np.where(use_cutmix[:, None], rows, (1 - lam)[:, None])
        columns = np.where(use_cutmix[:, None], columns, 1.0)
        if self.correct_lam or self.cutmix_minmax is not None:
            lam = np.where(use_cutmix, 1 - (bottom - top) * (right - left) / (height * width), lam)

        if self.mode == 'pair':
            index = np.arange(batch)
            index = np.minimum(index, batch - 1 - index)
            rows, columns, lam = rows[index], columns[index], lam[index]
        return (rows[:, None, :, None].astype(np.float32), columns[:, None, None, :].astype(np.float32),
                lam[:, None].astype(np.float32))

    def _box_side(self, lam, length, rng):
        """Extent [low, high) of the cutmix box along one side for each lam; empty where lam is 1."""
        if self.cutmix_minmax is not None:
            shortest, longest = (int(length * share) for share in self.cutmix_minmax)
            size = rng.integers(shortest, max(shortest + 1, longest), lam.shape)
            low = rng.integers(0, length - size + 1)
            return low, np.where(lam < 1, low + size, low)
        half = (length * np.sqrt(1 - lam)).astype(int) // 2
        centre = rng.integers(0, length, lam.shape)
        return np.clip(centre - half, 0, length), np.clip(centre + half, 0, length)
