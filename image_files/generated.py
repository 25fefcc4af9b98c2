"""Generated images, for where none are given."""
import numpy as np
from PIL import Image


def generated_image(rng, height=320, width=400):
    """Random colours whose amplitude spectrum falls with 1 / frequency, as in photographs: an RGB image."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((2, 3, *frequency.shape))
    pixels = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency, (height, width))
    pixels = 128 + 48 * pixels / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype('uint8').transpose(1, 2, 0))
