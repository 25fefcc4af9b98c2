"""Image files and the lists that name them: finding, reading and decoding. Nothing here needs Paddle."""
