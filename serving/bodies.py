"""What a request contains: images and options, from a multipart form or from JSON with base64."""
import base64
import binascii
import json
import re

from starlette.formparsers import MultiPartParser

from serving.limits import Refusal

TRUE, FALSE = ('true', '1', 'on', 'yes'), ('false', '0', 'off', 'no', '')  # in forms, where all values are strings


class Parser(MultiPartParser):
    """Keeps files in memory: the body is there already, and no writable disk is needed."""
    spool_max_size = 2**40


async def read_body(request, most, held):
    """The body of a request.

    Args:
        request: `starlette.requests.Request`.
        most: bytes.
        held: `Held`, which counts it.
    Raises:
        Refusal: it is too large, or there is no memory for it.
        ClientDisconnect: the client closed the connection.
    """
    length = request.headers.get('content-length', '')
    too_large = Refusal(413, f'the request has more than {most / 2**20:.3g} MiB')
    if length.isdigit() and int(length) > most:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_large
        held.add(len(part))
        parts.append(part)
    return b''.join(parts)


async def parse(request, body, field, most):
    """Images and options of a body.

    Args:
        request: `starlette.requests.Request`, for its headers.
        body: its body.
        field: name of the field with the images, 'image' for one and 'images' for several.
        most: number of images.
    Returns:
        (list of bytes, dict of the options as they were sent).
    Raises:
        Refusal: the body cannot be used.
    """
    kind = request.headers.get('content-type', '').split(';')[0].strip().lower()
    if kind == 'multipart/form-data':
        images, options = await _form(request.headers, body, field, most)
    elif kind == 'application/json':
        images, options = _json(body, field)
    else:
        raise Refusal(415, 'send multipart/form-data, or application/json with images in base64')
    if not images:
        raise Refusal(400, f'there is no image; send it in the field {field}')
    if len(images) > most:
        raise Refusal(413, f'{len(images)} images; send at most {most}' + (
            '' if field == 'images' else ', or several to /batch'))
    return images, options


async def _form(headers, body, field, most):
    async def stream():
        yield body

    try:
        form = await Parser(headers, stream(), max_files=most, max_fields=8, max_part_size=4096).parse()
    except Exception:  # several types for malformed bodies, too many files among them
        raise Refusal(400, f'the form is malformed, or has more than {most} files') from None
    images, options = [], {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, str):
                if name == field or name == 'url':
                    raise Refusal(400, _no_file(field, value))
                options[name] = value
            elif name == field:
                images.append(value.file.read())
            else:
                raise Refusal(400, f'send files in the field {field}')
    finally:
        await form.close()
    return images, options


def _json(body, field):
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, 'the body is not JSON') from None
    if not isinstance(values, dict):
        raise Refusal(400, f'the JSON is not an object with the key {field}')
    if 'url' in values:
        raise Refusal(400, _no_file(field, 'http:'))
    texts = values.pop(field, [])
    texts = [texts] if field == 'image' else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, f'{field} is not {"a list of strings" if field == "images" else "a string"} in base64')
    return [_from_base64(text, field) for text in texts], values


def _from_base64(text, field):
    data = re.sub(r'^data:image/[\w.+-]+;base64,', '', text)  # what a browser's canvas gives
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, _no_file(field, text)) from None


def _no_file(field, value):
    if re.match(r'\s*\w+:', value):
        return 'URLs are not fetched; send the image itself'
    return f'{field} is not {"a file" if len(value) < 2**12 else "an image"}; send base64 in JSON, files in forms'


def read_options(values, model):
    """Checks the options of a request.

    Args:
        values: dict as it was sent: JSON values, or strings of a form.
        model: description of the model, see `serving.worker.Worker.description`.
    Returns:
        dict with topk, cam, features and upright.
    Raises:
        Refusal: an option is unknown, or the model does not have it.
    """
    if set(values) - {'topk', 'cam', 'features', 'upright'}:
        raise Refusal(400, 'unknown option; the options are topk, cam, features and upright')
    topk = values.get('topk', 5)
    if isinstance(topk, str) and re.fullmatch('[0-9]{1,9}', topk):
        topk = int(topk)
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise Refusal(400, 'topk must be a whole number of at least 1')
    options = {'topk': min(topk, len(model['classes']))}
    for name, what in (('cam', 'class activation maps'), ('features', 'features'), ('upright', '')):
        value = values.get(name, name == 'upright' and model['exif'])
        if isinstance(value, str):
            value = True if value.lower() in TRUE else False if value.lower() in FALSE else None
        if not isinstance(value, bool):
            raise Refusal(400, f'{name} is neither true nor false')
        if value and what and not model[name]:
            raise Refusal(400, f'this model does not provide {what}')
        options[name] = value
    return options


class Held:
    """Counts the bytes of the bodies that are held. A context manager for one request."""

    def __init__(self, total, most):
        self._total, self._most, self._own = total, most, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._total['bytes'] -= self._own

    def add(self, count):
        self._own += count
        self._total['bytes'] += count
        if self._total['bytes'] > self._most:
            raise Refusal(503, 'too many requests at the same time; try again later', retry_after=1)
