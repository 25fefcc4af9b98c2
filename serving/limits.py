"""What the service accepts, and how it refuses the rest."""
from dataclasses import dataclass


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: one line for the client; it reveals nothing about this machine.
        retry_after: seconds after which the client may try again, or None.
    """

    def __init__(self, status, message, retry_after=None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class Limits:
    """Limits of the service; the defaults are those of serve.py.

    Attributes:
        image_bytes: size of an encoded image.
        pixels: pixels of a decoded image.
        images: images in a request to /batch.
        queue: images that are accepted and not yet answered.
        requests: concurrent requests; `connections` is the limit of open connections.
        timeout: seconds from the last byte of a request to its response.
        slow: seconds for a client to send the headers, to send the body, and to read the response.
    """
    image_bytes: int = 10 * 2**20
    pixels: int = 25_000_000
    images: int = 32
    queue: int = 64
    requests: int = 64
    timeout: float = 60
    slow: float = 20

    @property
    def connections(self):
        return 4 * self.requests

    def body_bytes(self, images):
        """Largest body of a request: base64 adds a third; a batch may have up to 8 images of the largest size."""
        return min(images, 8) * self.image_bytes * 4 // 3 + 65536

    @property
    def memory(self):
        """Bytes of all bodies that are held at the same time."""
        return 4 * self.body_bytes(self.images)
