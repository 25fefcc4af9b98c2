"""Messages between the service and a worker: the lengths of a JSON header and of a body, then both.

JSON and not pickle, because a worker decodes untrusted files: even if one takes it over, its messages are only data.
"""
import json
import struct

LENGTHS = struct.Struct('>II')


def frame(header, body=b''):
    """The bytes of a message."""
    text = json.dumps(header).encode()
    return LENGTHS.pack(len(text), len(body)) + text + body


def read_frame(file):
    """The next (header, body) from a binary file; EOFError where it ends."""
    lengths = _exactly(file, LENGTHS.size)
    header, body = LENGTHS.unpack(lengths)
    return json.loads(_exactly(file, header)), _exactly(file, body)


def _exactly(file, count):
    data = file.read(count)
    if len(data) < count:
        raise EOFError
    return data


async def receive_frame(stream):
    """The next (header, body) from an asyncio.StreamReader; asyncio.IncompleteReadError where it ends."""
    header, body = LENGTHS.unpack(await stream.readexactly(LENGTHS.size))
    return json.loads(await stream.readexactly(header)), await stream.readexactly(body)
