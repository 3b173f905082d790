"""The explorer in a real browser: in Lab, with two pages at once and a new kernel; and served by `twocet explore`."""
import io
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from base64 import b64decode
from contextlib import contextmanager

import psutil
import pytest
from browser import ROOT, chromium, free_port, lab, run_all, shot, write_notebook
from PIL import Image

from twocet_nb.answers import LiveTruthView
from twocet_nb.codespace import embed
from twocet_nb.data import bundled, to_tensor
from twocet_nb.runs import SYNTHETIC
from twocet_nb.scene import Scene, Studio, expression, named_faces
from twocet_nb.trainer import Trainer, preset
from twocet_nb.transfer import TwoCET
from twocet_nb.truth import truth_pairs

CELL = 'from twocet_nb.explorer import Explorer\nexplorer = Explorer("faces-64")\nexplorer'
RESULT = '''() => [...document.querySelectorAll('.twocet-picture canvas')].filter(canvas => canvas.getAttribute('aria-label') == 'Result')[0]'''
PIXELS = f'''() => {{ const canvas = ({RESULT})(); const rgba = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data; return [canvas.width, ...rgba]; }}'''


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    work = tmp_path_factory.mktemp('explorer')
    write_notebook(work/'one.ipynb', CELL)
    write_notebook(work/'two.ipynb', CELL)
    Trainer(preset('tiny', data='faces-64', steps=2, save_every=1, keep=0), work/'run', quiet=True).fit()
    write_notebook(work/'run.ipynb', CELL.replace('"faces-64"', '"faces-64", run="run"'))
    with lab(work) as address:
        yield address


@pytest.fixture(scope='module')
def page(address):
    with chromium(1300, 1500) as page:
        open_explorer(page, f'{address}/doc/tree/one.ipynb')
        yield page


def open_explorer(page, address):
    run_all(page, address)
    page.wait_for_function(f'() => ({RESULT})()?.dataset.serial > 0', timeout=90_000)


def serial(page):
    return int(page.evaluate(f'() => ({RESULT})().dataset.serial'))


def wait_for_picture(page, before):
    page.wait_for_function(f'before => +({RESULT})().dataset.serial > before', arg=before, timeout=30_000)
    page.wait_for_timeout(400)      # the last of a drag


def pixels(page):
    "What the canvas of the result shows, as a PIL picture."
    width, *values = page.evaluate(PIXELS)
    return Image.frombytes('RGBA', (width, len(values) // 4 // width), bytes(values)).convert('RGB')


def tab(page, name):
    page.locator('.jupyter-widgets .lm-TabBar-tab', has_text=name).click()


def press(page, locator, key, times=1):
    before = serial(page)
    locator.focus()
    for _ in range(times):
        page.keyboard.press(key)
    wait_for_picture(page, before)


def strength(page):
    return page.get_by_role('slider', name='Strength')


def caption(page):
    return page.get_by_text('Expression:').first.inner_text()


class TestLab:
    def test_strength_by_keyboard(self, page):
        press(page, strength(page), 'End')
        assert 'strength 1.50' in caption(page)
        strong = pixels(page)
        press(page, strength(page), 'Home')
        assert 'strength 0.00' in caption(page)
        model, target = TwoCET.pretrained(), sorted((bundled('faces-64')/'test/a_n').iterdir())[0]
        assert pixels(page).tobytes() == model.neutralise(target).tobytes() != strong.tobytes(), 'the right pixels'
        press(page, strength(page), 'End')
        assert pixels(page).tobytes() == strong.tobytes()
        shot(page, 'explorer-transfer')

    def test_thumbnail_and_undo(self, page):
        before, was = pixels(page), serial(page)
        page.get_by_role('listbox', name='Target').get_by_role('option').nth(3).click()
        wait_for_picture(page, was)
        other, was = pixels(page), serial(page)
        assert other.tobytes() != before.tobytes()
        page.get_by_role('button', name='Undo').click()
        wait_for_picture(page, was)
        assert pixels(page).tobytes() == before.tobytes()

    def test_map_click_and_drag(self, page):
        tab(page, 'Map')
        plane = page.locator('.twocet-plane canvas').first
        plane.wait_for(timeout=60_000)
        page.wait_for_timeout(500)
        box, before, was = plane.bounding_box(), pixels(page), serial(page)
        page.mouse.click(box['x'] + .7 * box['width'], box['y'] + .3 * box['height'])
        wait_for_picture(page, was)
        assert pixels(page).tobytes() != before.tobytes() and 'map:' in caption(page)
        clicked, was = pixels(page), serial(page)
        page.mouse.down()
        for k in range(30):
            page.mouse.move(box['x'] + (.7 - .02 * k) * box['width'], box['y'] + .5 * box['height'])
        page.mouse.up()
        wait_for_picture(page, was)
        assert pixels(page).tobytes() != clicked.tobytes()
        assert float(re.search(r'([\d.]+) across', page.locator('.twocet-plane').first.inner_text())[1]) < .15, 'the last place of the drag'
        shot(page, 'explorer-map')

    def test_sliders_by_keyboard(self, page):
        page.locator('.jupyter-widgets .lm-TabBar-tab', has_text='Map').focus()
        page.keyboard.press('ArrowRight')
        page.keyboard.press('Enter')
        knob = page.get_by_role('slider').nth(1)
        knob.wait_for(timeout=30_000)
        names = [slider.get_attribute('aria-label') for slider in page.get_by_role('slider').all()]
        assert names[0] == 'Strength' and [name[:3] for name in names[1:]] == [f'{k}: ' for k in range(1, 9)], 'each says what it moves'
        before, was = pixels(page), caption(page)
        assert 'map:' in was, 'opening the tab pulls nothing'
        press(page, knob, 'ArrowRight', 30)
        assert pixels(page).tobytes() != before.tobytes() and 'sliders' in caption(page)
        shot(page, 'explorer-sliders')

    def test_uploads(self, page, tmp_path):
        tab(page, 'Transfer')
        field = page.locator('.twocet-upload input').nth(1)
        said = page.locator('.twocet-upload .twocet-words').nth(1)
        before = pixels(page)
        for name, content, answer in bad_files():
            (tmp_path/name).write_bytes(content)
            field.set_input_files(tmp_path/name)
            page.wait_for_function('([k, name]) => { const text = document.querySelectorAll(".twocet-upload .twocet-words")[k].textContent; return text.includes(name) && !text.includes("sending"); }',
                                   arg=[1, name], timeout=60_000)
            assert answer in said.inner_text(), said.inner_text()
        assert pixels(page).tobytes() == before.tobytes(), 'nothing was chosen'
        good, was = sorted((bundled('faces-64')/'test/b_e').iterdir())[40], serial(page)
        field.set_input_files(good)
        wait_for_picture(page, was)
        assert pixels(page).tobytes() != before.tobytes() and good.name in caption(page)

    def test_export(self, page):
        tab(page, 'Export')
        page.get_by_role('button', name='Picture').click()
        link = page.locator('a[download="face.png"]')
        link.wait_for(timeout=30_000)
        with page.expect_download() as download:
            link.click()
        picture = Image.open(download.value.path())
        assert picture.text['Comment'] == SYNTHETIC
        page.get_by_role('button', name='Strength sweep').click()
        link = page.locator('a[download="strength.gif"]')
        link.wait_for(timeout=60_000)
        film = Image.open(io.BytesIO(b64decode(link.get_attribute('href').partition(',')[2])))
        assert film.n_frames > 10 and SYNTHETIC in film.info['comment'].decode()
        line = page.locator('textarea').last.input_value()
        shot(page, 'explorer-export')
        from_line = eval(line, dict(TwoCET=TwoCET, bundled=lambda name: bundled(name)), {}) if 'bundled(' in line else None
        assert from_line is not None and from_line.tobytes() == pixels(page).tobytes(), 'the line of Python makes the picture'

    def test_a_hidden_view_rests(self, page):
        line = page.locator('textarea').last
        tab(page, 'Export')
        before = line.input_value()
        tab(page, 'Transfer')
        press(page, strength(page), 'ArrowLeft', 3)
        assert line.input_value() == before, 'hidden, it writes nothing'
        tab(page, 'Export')
        page.wait_for_function('([line, before]) => line.value != before', arg=[line.element_handle(), before], timeout=10_000)
        said = re.search('strength ([\\d.]+)', caption(page))[1]
        assert f'strength={float(said)}' in line.input_value(), 'shown again, it has caught up'

    def test_a_code_comes_back(self, page, tmp_path):
        tab(page, 'Export')
        page.get_by_role('button', name='Code', exact=True).click()
        link = page.locator('a[download="scene.json"]')
        link.wait_for(timeout=30_000)
        (tmp_path/'mine.json').write_bytes(b64decode(link.get_attribute('href').partition(',')[2]))
        (tmp_path/'diary.json').write_text('Dear model,')
        before = pixels(page)
        press(page, strength(page), 'Home')
        assert page.locator('textarea').last.input_value().count('strength=0.0') == 1 and pixels(page).tobytes() != before.tobytes()
        field = page.get_by_label('Bring back an exported code')
        field.set_input_files(tmp_path/'diary.json')
        page.get_by_text('diary.json: not a scene').wait_for(timeout=30_000)
        was = serial(page)
        field.set_input_files(tmp_path/'mine.json')
        wait_for_picture(page, was)
        assert pixels(page).tobytes() == before.tobytes() and 'mine.json' in caption(page)

    def test_checkpoints_by_keyboard(self, page, address):
        other = page.context.browser.new_page(viewport=dict(width=1300, height=1500))
        open_explorer(other, f'{address}/doc/tree/run.ipynb')
        tab(other, 'Checkpoints')
        step, drawn = other.get_by_role('slider', name='Step'), other.get_by_role('img', name='Checkpoint')
        drawn.wait_for(timeout=30_000)
        step.focus()
        shown = []
        for key, said in (('End', '2'), ('Home', '0'), ('ArrowRight', '1'), ('End', '2')):
            before = drawn.get_attribute('data-serial')
            other.keyboard.press(key)
            other.wait_for_function('([canvas, before]) => canvas.dataset.serial != before', arg=[drawn.element_handle(), before], timeout=30_000)
            assert step.get_attribute('aria-valuetext') == said
            shown.append(drawn.evaluate('canvas => canvas.toDataURL()'))
        assert len(set(shown)) == 3 and shown[0] == shown[3], 'three steps, three pictures, and the way back'
        shot(other, 'explorer-checkpoints')
        other.close()

    def test_two_pages_at_once(self, page, address):
        second = page.context.browser.new_page(viewport=dict(width=1300, height=1500))
        open_explorer(second, f'{address}/doc/tree/two.ipynb')
        mine = pixels(page)
        press(second, strength(second), 'Home')
        assert pixels(page).tobytes() == mine.tobytes() != pixels(second).tobytes(), 'each has its own'
        second.close()

    def test_kernel_restart(self, page):
        page.evaluate('async () => { const context = jupyterapp.shell.currentWidget.sessionContext; await context.session.kernel.restart(); await context.session.kernel.requestKernelInfo(); }')
        page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_timeout(3000)
        page.wait_for_function(f'() => ({RESULT})()?.dataset.serial > 0', timeout=90_000)
        press(page, strength(page), 'Home')
        assert 'strength 0.00' in caption(page)


def bad_files():
    "(name, content, what the page says) of a broken picture, one of 40 MB and a bomb."
    good = io.BytesIO()
    Image.new('RGB', (64, 64), 'red').save(good, 'png')

    def chunk(kind, data):
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    header = chunk(b'IHDR', (60_000).to_bytes(4, 'big') * 2 + bytes([8, 2, 0, 0, 0]))
    bomb = b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(bytes(10_000_000))) + chunk(b'IEND', b'')
    return ('broken.png', good.getvalue()[:60], 'mend'), ('large.png', good.getvalue() + bytes(40_000_000), '8.0 MB'), ('bomb.png', bomb, 'mend')


def test_truth_rendered_on_demand():
    """With the extra [faces] any target and reference of the bundled faces have a truth; the packed answer is the same picture."""
    pytest.importorskip('mitsuba')
    model, codes = TwoCET.pretrained(), embed(TwoCET.pretrained(), 'faces-64', 'test')
    faces = {face.path: face for face in named_faces(codes, 'faces-64', 64)}
    pair = next(pair for pair in truth_pairs('truth-64') if pair.kind == 'cross')
    target, reference = faces[str(pair.target)], faces[str(pair.reference)]
    view = LiveTruthView(Studio(model, Scene(target, **expression(model, reference))), [pair])
    view.render()
    assert view.artist.wait(300) and view.artist.error is None and 'picture' in view.words.value
    answer = Image.frombytes('RGB', (64, 64), view.pictures[3].pixels)
    assert (to_tensor(answer) - to_tensor(pair.answer)).abs().mean() < .02


@contextmanager
def served(folder):
    "`twocet explore` on a free port; yields its process and the address with the token. Ended with SIGTERM, it leaves nothing behind."
    variables = {key: value for key, value in os.environ.items() if key not in ('IN_TEST', 'MPLBACKEND')}
    variables |= {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'JUPYTER_CONFIG_DIR': str(folder/'config'), 'IPYTHONDIR': str(folder/'ipython')}
    log = folder/'log'
    with log.open('w') as output:
        server = subprocess.Popen([sys.executable, '-m', 'twocet_nb.cli', 'explore', '--port', str(free_port()), '--no-browser'],
                                  cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=variables)
        family = []
        try:
            yield server, served_at(log, server)
            family = psutil.Process(server.pid).children(recursive=True)
        finally:
            server.terminate()
            server.wait(30)
            _, alive = psutil.wait_procs(family, 30)
            for process in alive: process.kill()
        assert not alive, f'still there after SIGTERM: {alive}'


def test_served_to_this_computer_alone(tmp_path, page):
    """Voila: no page without the token; with it the same explorer."""
    page = page.context.browser.new_page(viewport=dict(width=1300, height=1500))
    with served(tmp_path) as (_, place):
        root = place.partition('?')[0]
        for door in ('', 'api/kernels'):
            with urllib.request.urlopen(root + door, timeout=60) as answer:
                assert '/login' in answer.url and b'twocet' not in answer.read().lower()
        with pytest.raises(urllib.error.HTTPError, match='403'):
            urllib.request.urlopen(f'{root}api/kernels', data=b'{}', timeout=60)
        page.goto(place, timeout=90_000)
        page.wait_for_function(f'() => ({RESULT})()?.dataset.serial > 0', timeout=90_000)
        before = pixels(page)
        press(page, strength(page), 'Home')
        assert pixels(page).tobytes() != before.tobytes()
        shot(page, 'explorer-served')


def test_what_ends_the_command_ends_its_server(tmp_path):
    """SIGTERM, as `kill` and service managers send it: Voila goes with the command, its kernel goes with Voila, and the port is free."""
    pytest.importorskip('voila')
    with served(tmp_path) as (server, place):
        urllib.request.urlopen(place, timeout=90).close()     # a visitor without a browser: there is a kernel now
        deadline = time.monotonic() + 60
        while len(psutil.Process(server.pid).children(recursive=True)) < 2 and time.monotonic() < deadline: time.sleep(.2)
        assert len(psutil.Process(server.pid).children(recursive=True)) >= 2, 'Voila and a kernel'
    assert server.returncode == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(place, timeout=10)


def served_at(log, server, seconds=90):
    "The address with the token, as soon as the server has written it."
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        if found := re.search(r'http://127\.0\.0\.1:\d+/\S*token=\w+', log.read_text()):
            return found[0]
        time.sleep(.3)
    pytest.fail(log.read_text()[-3000:])
