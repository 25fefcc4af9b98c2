"""Chromium without a window, driven over its DevTools protocol through a pipe, so that no further package is needed.

    python tests/browser.py http://127.0.0.1:8000 cat.jpg page.png [width height language]
"""
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


class Browser:
    """A page in a browser; a context manager.

    Args:
        url: of the page.
        width, height: of the window, in CSS pixels.
        language: what the browser asks for.
        touch: whether it is a phone.
    """

    def __init__(self, url, width=900, height=900, language='en-GB', touch=False):
        self._folder = tempfile.mkdtemp()
        own_in, self._to = os.pipe()
        self._from, own_out = os.pipe()

        def descriptors():  # the pipe of the protocol: 3 to read, 4 to write
            os.dup2(own_in, 100), os.dup2(own_out, 101), os.dup2(100, 3), os.dup2(101, 4)

        self._process = subprocess.Popen(
            [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe', '--disable-extensions',
             f'--user-data-dir={self._folder}', f'--accept-lang={language}', f'--lang={language}', 'about:blank'],
            preexec_fn=descriptors, pass_fds=(3, 4), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(own_in), os.close(own_out)
        self._buffer, self._number, self._session, self.log = b'', 0, None, []
        target = self._call('Target.createTarget', url='about:blank')['targetId']
        self._session = self._call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'DOM', 'Log', 'Network', 'Accessibility'):
            self._call(f'{domain}.enable')
        self._call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self._call('Emulation.setTouchEmulationEnabled', enabled=touch)
        self._call('Emulation.setUserAgentOverride', userAgent='test', acceptLanguage=language)
        self._call('Page.navigate', url=url)
        self.until('document.readyState == "complete" && document.querySelector("#model")')

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        os.close(self._to), os.close(self._from)
        shutil.rmtree(self._folder, ignore_errors=True)  # processes of the browser may still write there

    def _call(self, method, **parameters):
        self._number += 1
        message = {'id': self._number, 'method': method, 'params': parameters}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._to, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._next()
            if answer.get('id') == self._number:
                if 'error' in answer:
                    raise RuntimeError(f'{method}: {answer["error"]["message"]}')
                return answer['result']
            self.log.append(answer)

    def _next(self):
        while b'\0' not in self._buffer:
            part = os.read(self._from, 2**20)
            if not part:
                raise RuntimeError('the browser ended')
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b'\0')
        return json.loads(message)

    def value(self, script):
        """What a JavaScript expression gives, or the promise it returns."""
        result = self._call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in result:
            raise RuntimeError(result['exceptionDetails']['exception'].get('description'))
        return result['result'].get('value')

    def until(self, script, seconds=90):
        """Waits for an expression to be true."""
        deadline = time.monotonic() + seconds
        while not self.value(f'!!({script})'):
            if time.monotonic() > deadline:
                raise TimeoutError(script)
            time.sleep(0.05)

    def choose(self, selector, *files):
        """Gives files to an input, as its user does."""
        root = self._call('DOM.getDocument')['root']['nodeId']
        node = self._call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
        self._call('DOM.setFileInputFiles', nodeId=node, files=[str(file) for file in files])

    def drop(self, selector, *files):
        """Drags files onto an element."""
        x, y = self.value(f'(r => [r.x + r.width / 2, r.y + r.height / 2])'
                          f'(document.querySelector("{selector}").getBoundingClientRect())')
        for kind in ('dragEnter', 'dragOver', 'drop'):
            self._call('Input.dispatchDragEvent', type=kind, x=x, y=y, data={
                'items': [], 'files': [str(file) for file in files], 'dragOperationsMask': 1})

    def press(self, key):
        """Presses and releases a key, such as Tab."""
        for kind in ('keyDown', 'keyUp'):
            self._call('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode={
                'Tab': 9, 'Enter': 13, ' ': 32}[key], **({'text': '\r'} if key == 'Enter' else {}))

    def accessible(self):
        """[(role, name)] of what a screen reader finds."""
        nodes = self._call('Accessibility.getFullAXTree')['nodes']
        return [(node['role']['value'], node.get('name', {}).get('value', '')) for node in nodes if not node['ignored']]

    def screenshot(self, path):
        height = self.value('document.documentElement.scrollHeight')
        width = self.value('document.documentElement.clientWidth')
        data = self._call('Page.captureScreenshot', captureBeyondViewport=True, clip={
            'x': 0, 'y': 0, 'width': width, 'height': height, 'scale': 1})['data']
        with open(path, 'wb') as file:
            file.write(base64.b64decode(data))


def main():
    url, images, output = sys.argv[1:4]
    width, height, language = sys.argv[4:] or ('900', '900', 'en')
    with Browser(url, int(width), int(height), language, touch=int(width) < 600) as browser:
        for count, image in enumerate(images.split(','), 1):
            browser.choose('#files', os.path.abspath(image))
            browser.until(f'document.querySelectorAll("article ol, article .error").length == {count}')
        time.sleep(0.5)
        browser.screenshot(output)


if __name__ == '__main__':
    main()
