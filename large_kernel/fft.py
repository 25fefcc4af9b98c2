"""Depthwise convolution with `paddle.fft`: any device, differentiable, cost almost independent of the kernel size."""
import paddle

_SIZES = sorted(2**a * 3**b * 5**c for a in range(13) for b in range(8) for c in range(6))


def _fast_size(n):
    """Smallest length >= n without prime factors above 5."""
    return next((s for s in _SIZES if s >= n), n)


def _crop(weight, axis, reach):
    """Drops the taps further than `reach` from the centre, which only ever see padding."""
    centre = weight.shape[axis] // 2
    if centre <= reach:
        return weight
    return paddle.slice(weight, [axis], [centre - reach], [centre + reach + 1])


def _rfft2(x, size):
    """FFT over the last two axes of x, zero-padded to `size`."""
    if not paddle.in_dynamic_mode():
        # Padding by concatenation: on Paddle's pad operator, Paddle Inference 3.3.1 with oneDNN corrupts its heap.
        for axis, length in zip((-2, -1), size):
            zeros = [paddle.zeros_like(x)] * (-(-length // x.shape[axis]) - 1)
            x = paddle.slice(paddle.concat([x, *zeros], axis), [x.ndim + axis], [0], [length])
    return paddle.fft.rfft2(x, size)


def conv_fft(x, weight, bias, stride):
    """x [N, C, H, W], weight [C, 1, K, K], bias [C] or None -> [N, C, ceil(H / stride), ceil(W / stride)].

    Computes in float32 for every dtype of x. A NaN or Inf spreads over its whole plane, not only to the outputs whose
    window contains it.
    """
    height, width = x.shape[2:]
    with paddle.amp.auto_cast(enable=False):
        kernel = _crop(_crop(weight.astype('float32')[:, 0], 1, height - 1), 2, width - 1)
        pad_h, pad_w = kernel.shape[1] // 2, kernel.shape[2] // 2
        # Outputs start at `pad`: with a period of H + pad, wrapped-around values land on outputs that are cropped.
        size = [_fast_size(height + pad_h), _fast_size(width + pad_w)]
        product = _rfft2(x.astype('float32'), size) * _rfft2(kernel.flip([1, 2]), size)
        y = paddle.fft.irfft2(product, size)
        y = y[:, :, pad_h:pad_h + height:stride, pad_w:pad_w + width:stride]
        if bias is not None:
            y = y + bias.astype('float32').reshape([1, -1, 1, 1])
        return y.astype(x.dtype)
