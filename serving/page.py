"""The page of the service: serving/page.html, which needs no other files."""
import base64
import hashlib
import json
import os
import re
from html import escape

FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'page.html')


def page(model, limits, key):
    """The page, and the policy that lets a browser run only what is in it.

    Args:
        model: description of the model.
        limits: `Limits`.
        key: whether clients must send an API key.
    Returns:
        (HTML, value of the header Content-Security-Policy).
    """
    with open(FILE, encoding='utf-8') as file:
        html = file.read()
    settings = {'cam': model['cam'], 'key': key, 'bytes': limits.image_bytes, 'name': model['name'],
                'classes': len(model['classes'])}
    html = html.replace('{{settings}}', escape(json.dumps(settings)))

    def hashed(tag):
        text = re.search(f'<{tag}>(.*?)</{tag}>', html, re.DOTALL).group(1)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return html, (f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; "
                  "connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; "
                  "frame-ancestors 'none'")
