"""The widgets as people use them: mouse, keyboard and files in a real JupyterLab, and what the kernel hears of it."""
import io
import json
import struct
import zlib

import numpy as np
import pytest
from browser import chromium, lab, run_all, shot, write_notebook
from PIL import Image

from twocet_nb.data import FaceFolder, bundled, to_pil, to_tensor

# Whatever the kernel hears is said in a label of its own, and so can be read in the page.
NOTEBOOK = '''
import json, time
import numpy as np, torch, ipywidgets as W
from twocet_nb.data import FaceFolder, bundled, to_tensor
from twocet_nb.widgets import *

def heard(name):
    label = W.Label('null')
    label.add_class('heard-' + name)
    return label

def part(name, *widgets):
    box = W.VBox(widgets)
    box.add_class('part-' + name)
    return box
''', '''
pixels = (np.arange(16 * 16 * 3) * 7 % 256).astype(np.uint8).reshape(16, 16, 3)
picture = Picture('exact', other_label='reversed', scale=8)
picture.show(pixels, pixels[::-1].copy())
views = W.ToggleButtons(options=['one', 'blink', 'beside'])
W.link((views, 'value'), (picture, 'view'))
part('picture', W.HBox([picture, views]))
''', '''
emotional = FaceFolder(bundled('faces-64'), 'test', 1)
faces = [to_tensor(emotional[k]) for k in range(0, 200, 5)]
names = [f'face {k}' for k in range(40)]
thumbnails, index = Thumbnails(faces, names, columns=8, label='reference'), heard('index')
thumbnails.observe(lambda change: setattr(index, 'value', json.dumps(change.new)), 'index')
part('thumbnails', thumbnails, index)
''', '''
amount, said = Slider('Amount', .5, max=1.5, width=400), heard('amount')
amount.observe(lambda change: setattr(said, 'value', json.dumps(change.new)), 'value')
told = W.Button(description='tell it 2.345')
told.on_click(lambda _: setattr(amount, 'value', 2.345))
scrub = Slider('Step', max=2, step=1, texts=['none', 'some', 'all'], width=300)
part('slider', amount, scrub, told, said)
''', '''
points = np.random.default_rng(0).random((40, 2))
plane = Plane(points, names, [k % 8 for k in range(40)], [f'group {k}' for k in range(8)], faces, label='a map', side=400)
place = heard('position')
def slow(change):
    time.sleep(.08)
    plane.near = plane.nearest(3)
    place.value = json.dumps(change.new)
plane.observe(slow, 'position')
pad = Plane(TRIANGLE, ['one', 'two', 'three'], faces=faces[:3], triangle=True, thumbnails=True, label='a mixture', side=260, thumb=64)
weights = heard('weights')
pad.observe(lambda change: setattr(weights, 'value', json.dumps(triangle_weights(change.new).tolist())), 'position')
mixed = Picture('mixed', scale=2)
latest = Latest(lambda position: sum(weight * face for weight, face in zip(triangle_weights(position).tolist(), faces)), mixed.show)
pad.observe(lambda change: latest.ask(change.new), 'position')
part('plane', W.HBox([plane, pad]), mixed, place, weights)
''', '''
upload, size = Upload('Your photograph'), heard('size')
def receive(name, content):
    face = open_upload(content, name, 64)
    size.value = json.dumps([name, list(face.shape), len(content)])
    upload.say(f'{name}: thank you.')
upload.on_upload(receive)
part('upload', upload, size)
''', '''
# Notebooks 08c and 08d show this (front-light.png) and the map (map-light.png).
before, after = to_tensor(FaceFolder(bundled('faces-64'), 'test', 0)[0]), faces[0]
front = Picture('happy', other_label='neutral', view='beside')
front.show(after, before)
part('front', W.HBox([Thumbnails(faces[:20], names[:20], columns=5, label='reference', index=6), W.VBox([front, Upload('Your photograph')])]))
'''


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """The notebook above, run; all its widgets are there."""
    work = tmp_path_factory.mktemp('widgets')
    write_notebook(work/'parts.ipynb', *NOTEBOOK)
    with chromium(1100, 2600) as page, lab(work) as address:
        run_all(page, address + '/doc/tree/parts.ipynb')
        page.locator('.part-front input').wait_for(timeout=60_000)
        yield page


def part(page, name):
    """One widget of the notebook, on the screen."""
    found = page.locator(f'.part-{name}').first
    found.scroll_into_view_if_needed()
    return found


def heard(page, name, wanted, seconds=10):
    """Wait until the kernel has heard what `wanted` is true of; returns it."""
    find = '''([name, wanted]) => { const text = document.querySelector('.heard-' + name)?.textContent || 'null', value = JSON.parse(text); return (eval(wanted))(value) ? [value] : false; }'''
    return page.wait_for_function(find, arg=[name, wanted], timeout=1000 * seconds).json_value()[0]


def read_canvas(canvas):
    """The pixels of a canvas as an (H, W, 4) uint8 array."""
    width, height, values = canvas.evaluate('''canvas => [canvas.width, canvas.height,
        [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]]''')
    return np.array(values, np.uint8).reshape(height, width, 4)


SENT = (np.arange(16 * 16 * 3) * 7 % 256).astype(np.uint8).reshape(16, 16, 3)


def test_picture_shows_exact_pixels(page):
    canvas = part(page, 'picture').locator('canvas')
    shown = read_canvas(canvas)
    assert (shown[..., :3] == SENT).all() and (shown[..., 3] == 255).all()
    assert canvas.get_attribute('role') == 'img' and canvas.get_attribute('aria-label') == 'exact'
    assert canvas.get_attribute('data-serial') == '1' and float(canvas.get_attribute('data-drawn')) > 0
    box = canvas.bounding_box()
    assert (box['width'], box['height']) == (128, 128), 'stretched by its neighbour'


def test_picture_blinks_and_stands_beside(page):
    box = part(page, 'picture')
    canvas = box.locator('canvas')
    box.get_by_text('beside').click()
    left, right = box.get_by_role('img', name='reversed'), box.get_by_role('img', name='exact')
    left.wait_for()
    assert (read_canvas(left)[..., :3] == SENT[::-1]).all() and (read_canvas(right)[..., :3] == SENT).all()
    assert left.bounding_box()['x'] < right.bounding_box()['x']
    shot(box, 'picture-beside')
    box.get_by_text('blink').click()
    page.wait_for_function('box => box.querySelectorAll("canvas").length == 1', arg=box.element_handle())
    first = canvas.evaluate('canvas => canvas.getContext("2d").getImageData(0, 0, 1, 1).data[1]')
    other = page.wait_for_function('([canvas, first]) => canvas.getContext("2d").getImageData(0, 0, 1, 1).data[1] != first',
                                   arg=[canvas.element_handle(), first], timeout=5000)
    assert other and box.locator('figcaption').inner_text() in ('exact', 'reversed')
    canvas.press(' ')
    held = box.locator('figcaption').inner_text()
    page.wait_for_timeout(1300)
    assert box.locator('figcaption').inner_text() == held, 'space holds it'
    canvas.press(' ')
    assert box.locator('figcaption').inner_text() != held
    shot(box, 'picture-blink')


def test_less_motion_is_respected(page):
    box = part(page, 'picture')
    page.emulate_media(reduced_motion='reduce')
    box.get_by_text('one').click()
    box.get_by_text('blink').click()
    page.wait_for_timeout(1300)
    assert box.locator('figcaption').inner_text() == 'exact'
    box.locator('canvas').press(' ')
    assert box.locator('figcaption').inner_text() == 'reversed'
    page.emulate_media(reduced_motion='no-preference')


def test_slider_has_a_name_and_keys(page):
    box = part(page, 'slider')
    amount, scrub = box.get_by_role('slider', name='Amount', exact=True), box.get_by_role('slider', name='Step', exact=True)
    assert amount.count() == scrub.count() == 1, 'the name is the label, without the number'
    for key, value in (('ArrowRight', .51), ('End', 1.5), ('ArrowLeft', 1.49), ('Home', 0), ('ArrowUp', .01)):
        amount.press(key)
        heard(page, 'amount', f'value => value == {value}')
        assert amount.get_attribute('aria-valuetext') == f'{value:.2f}'
    place = amount.bounding_box()
    page.mouse.click(place['x'] + place['width'] / 2, place['y'] + place['height'] / 2)
    heard(page, 'amount', 'value => Math.abs(value - .75) < .02')
    box.get_by_role('button').click()
    box.get_by_text('2.35').or_(box.get_by_text('2.34')).first.wait_for()
    assert heard(page, 'amount', 'value => value > 2') == 2.345, 'told a number, it does not answer with its own'
    scrub.press('End')
    assert scrub.get_attribute('aria-valuetext') == 'all' and box.get_by_text('all', exact=True).count() == 1
    assert box.locator('label').first.bounding_box()['width'] == 400, 'as wide as it was told'
    shot(box, 'slider')


def test_thumbnails_with_mouse_and_keyboard(page):
    box = part(page, 'thumbnails')
    options, listbox = box.get_by_role('option'), box.get_by_role('listbox', name='reference')
    assert options.count() == 40
    options.nth(3).click()
    heard(page, 'index', 'index => index == 3')
    for key, index in (('ArrowRight', 4), ('ArrowDown', 12), ('ArrowUp', 4), ('ArrowLeft', 3), ('ArrowUp', 3), ('End', 39), ('Home', 0), ('ArrowLeft', 0)):
        listbox.press(key)
        heard(page, 'index', f'index => index == {index}')
    listbox.press('End')
    chosen = box.get_by_role('option', selected=True)
    assert chosen.count() == 1 and chosen.get_attribute('aria-label') == 'face 39'
    assert listbox.get_attribute('aria-activedescendant') == chosen.get_attribute('id')
    assert listbox.evaluate('list => list.scrollTop > 0 && list.scrollTop + list.clientHeight >= list.lastChild.offsetTop + list.lastChild.offsetHeight')
    shot(box, 'thumbnails')


def spot(canvas, x, y):
    """Where on the page the place (x, y) of a plane is: 24 px of margin, and 1 px of border."""
    box = canvas.bounding_box()
    room = box['width'] - 2 - 48
    return box['x'] + 25 + x * room, box['y'] + 25 + (1 - y) * room


def near(x, y):
    return f'p => p && Math.hypot(p[0] - {x}, p[1] - {y}) < .004'


def test_plane_click_and_keys(page):
    box = part(page, 'plane')
    canvas = box.get_by_role('application', name='a map')
    page.mouse.click(*spot(canvas, .3, .7))
    heard(page, 'position', near(.3, .7))
    for key, x, y in (('ArrowRight', .31, .7), ('ArrowUp', .31, .71), ('Shift+ArrowDown', .31, .61), ('Shift+ArrowLeft', .21, .61)):
        canvas.press(key)
        heard(page, 'position', near(x, y))
    assert 'nearest: face' in box.locator('[aria-live]').first.inner_text()
    for _ in range(20): canvas.press('Shift+ArrowLeft')
    heard(page, 'position', near(0, .61))
    shot(box, 'plane')


def test_the_last_place_of_a_fast_drag_arrives(page):
    """The kernel needs 80 ms for each place and a hundred come within a second or two: no queue, and the last one is there soon."""
    canvas = part(page, 'plane').get_by_role('application', name='a map')
    page.mouse.move(*spot(canvas, .1, .1))
    page.mouse.down()
    for k in range(100):
        page.mouse.move(*spot(canvas, .1 + .008 * k, .1 + .006 * k))
    page.mouse.move(*spot(canvas, .9, .8))
    page.mouse.up()
    heard(page, 'position', near(.9, .8), seconds=1.5)


def test_triangle_keeps_the_cursor_inside(page):
    pad = part(page, 'plane').get_by_role('application', name='a mixture')
    page.mouse.click(*spot(pad, .5, .4))
    weights = heard(page, 'weights', 'w => w && w.every(v => Math.abs(v - 1/3) < .02)')
    assert abs(sum(weights) - 1) < 1e-6
    page.mouse.click(*spot(pad, 0, 0))
    heard(page, 'weights', 'w => w[0] < 1e-6 && w[1] > .95')


def test_a_thread_draws_the_latest(page):
    """What the worker of `Latest` shows arrives in the page, pixel by pixel."""
    box = part(page, 'plane')
    page.mouse.click(*spot(box.get_by_role('application', name='a mixture'), .45, .35))
    weights = heard(page, 'weights', 'w => w && Math.abs(w[0] - .27) < .01')
    page.wait_for_timeout(500)
    emotional = FaceFolder(bundled('faces-64'), 'test', 1)
    mixture = sum(weight * to_tensor(emotional[5 * k]) for k, weight in enumerate(weights))
    shown = read_canvas(box.get_by_role('img', name='mixed'))[..., :3].astype(int)
    assert np.abs(shown - np.asarray(to_pil(mixture))).max() <= 1


def png(size=(90, 120)):
    file = io.BytesIO()
    Image.new('RGB', size, '#7a5').save(file, 'PNG')
    return file.getvalue()


def bomb(side=60_000):
    """A PNG of a hundred bytes that says it has `side` x `side` pixels."""
    def chunk(kind, content): return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')


def test_upload(page, tmp_path):
    box = part(page, 'upload')
    choose, says = box.get_by_label('Your photograph'), box.get_by_role('status')

    def send(name, content, words):
        (tmp_path/name).write_bytes(content)
        choose.set_input_files(tmp_path/name)
        says.get_by_text(words).or_(says.filter(has_text=words)).first.wait_for(timeout=15_000)
        return says.inner_text()
    send('me.png', png(), 'me.png: thank you.')
    assert heard(page, 'size', 'seen => seen') == ['me.png', [3, 64, 64], len(png())]
    assert 'mend: copy it again' in send('half.png', png()[:-40], 'half.png: not a readable image')
    assert 'mend: save it smaller' in send('large.png', bytes(40_000_000), 'large.png: 40.0 MB')
    shot(box, 'upload-too-large')
    assert 'mend: save it smaller' in send('bomb.png', bomb(), 'bomb.png: too large to open')
    send('again.png', png(), 'again.png: thank you.')   # the connection is alive
    heard(page, 'size', 'seen => seen[0] == "again.png"')
    assert '<b>' in send('<b>x.png', b'no picture', 'no PNG, JPEG or WebP'), 'a name is text'


def test_screenshots(page):
    """For people: everything, in the light and in the dark theme, with faces on the map and a narrow window."""
    page.locator('.part-plane canvas').first.focus()
    for theme in ('Light', 'Dark'):
        page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})")
        page.wait_for_timeout(1500)
        for name in ('picture', 'thumbnails', 'plane', 'upload', 'front'):
            shot(part(page, name), f'{name}-{theme.lower()}')
        shot(page.locator('.part-plane .widget-hbox').first, f'map-{theme.lower()}')
