"""A real JupyterLab in a real browser: what the tests of widgets and notebooks share."""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SHOTS = Path(os.environ.get('TWOCET_SHOTS', ROOT/'build'/'screenshots'))
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
CONNECTED = '() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus === "connected"'
# Lab drops a run that is asked for before its kernel has answered, so ask the kernel something first.
RUN_ALL = '''async () => {
    const context = jupyterapp.shell.currentWidget.sessionContext;
    await context.ready;
    await context.session.kernel.info;
    await context.session.kernel.requestKernelInfo();
    await jupyterapp.commands.execute('notebook:run-all-cells');
}'''


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def write_notebook(path, *cells):
    """A notebook of code cells at `path`. It names its kernel, or Lab would ask for one."""
    metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=metadata), path)


@contextmanager
def lab(work):
    """JupyterLab on a free port, serving the folder `work`, with settings of its own; yields its address."""
    port, own = free_port(), work/'.jupyter-of-the-test'
    variables = {key: value for key, value in os.environ.items() if key not in ('IN_TEST', 'MPLBACKEND')}
    variables |= {f'JUPYTER_{name}_DIR': str(own/name.lower()) for name in ('CONFIG', 'DATA', 'RUNTIME')}
    variables |= {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'IPYTHONDIR': str(own/'ipython')}
    (own/'config'/'labconfig').mkdir(parents=True)
    (own/'config'/'labconfig'/'page_config.json').write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    log = own/'log'
    with log.open('w') as output:
        server = subprocess.Popen(
            [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--IdentityProvider.token=', f'--port={port}',
             '--ServerApp.port_retries=0', '--LabApp.expose_app_in_browser=True', f'--ServerApp.root_dir={work}'],
            env=variables, cwd=work, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(f'http://127.0.0.1:{port}/api', server, log)
        yield f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        server.wait(20)


def wait_for(address, server, log, seconds=60):
    """Wait until `address` answers; fail with the end of the log when it does not, or when the server has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=2).close()
        except OSError:
            time.sleep(.2)
    pytest.fail(f'{address} does not answer:\n{log.read_text()[-3000:]}')


@contextmanager
def chromium(width=1200, height=1000):
    """A page of the Chromium of this machine; skips where there is none."""
    playwright = pytest.importorskip('playwright.sync_api')
    if not CHROMIUM:
        pytest.skip('no Chromium here')
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser.new_page(viewport={'width': width, 'height': height})
        finally:
            browser.close()


def run_all(page, address, timeout=60):
    """Open a notebook (`address` of the lab + '/doc/tree/NAME.ipynb') and start all its cells."""
    page.goto(address)
    page.wait_for_function(CONNECTED, timeout=1000 * timeout)
    page.evaluate(RUN_ALL)


def shot(page, name):
    """Save a screenshot of a page, or of an element in it, for people to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS/f'{name}.png')
