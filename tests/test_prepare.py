"""What the notebooks 01a_portraits and 01b_prepare cannot test: other people, killed processes, full disks, hostile trees, and the commands on top."""
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from twocet_nb import data
from twocet_nb.data import (CFD_CLASSES, CFEE_TEST, RAFD_CLASSES, RAFD_GAZES, InputError, bundled, cfd_name, cfee_name, check_dataset, find_face,
                            prepare_cfd, prepare_cfee, prepare_folder, prepare_rafd, rafd_name, read_csv, read_face)
from twocet_nb.networks import NetworkConfig, build_networks, load_networks, read_card
from twocet_nb.trainer import Trainer, preset
from twocet_nb.transfer import TwoCET

FOLDER = dict(id_pattern=r'^(?P<id>[^/]+)/(?P<class>\w+)', neutral='calm')


def contents(folder):
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def photograph(path, model, cls, size=(640, 480)):
    """Save a rendered face as a photograph, in front of a wall."""
    face = read_face(bundled('faces-128')/'train'/('b_e' if cls > 1 else 'a_n')/f'{model}_{cls:02d}.webp', 300)
    picture = Image.new('RGB', size, face.getpixel((2, 2)))
    picture.paste(face, ((size[0] - 300)//2, (size[1] - 300)//2))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=92)


def noise(path, seed, size=(32, 32)):
    """Save a picture of noise: quickly made, never twice the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path, quality=95)


def album(root, people=('ann', 'bob', 'eve', 'joe'), size=(32, 32), suffix='png'):
    """ROOT/ann/calm.png, happy.png, sad.png and so on, of noise."""
    for seed, (person, word) in enumerate((person, word) for person in people for word in ('calm', 'happy', 'sad')):
        noise(root/person/f'{word}.{suffix}', seed, size)
    return root


def quickly(src, out, **options):
    """Prepare an album without looking for faces."""
    return prepare_folder(src, out, **FOLDER | dict(crop='centre', size=32, quiet=True) | options)


@pytest.fixture(scope='module')
def cfee(tmp_path_factory):
    """Five people as in CFEE, two of them among the authors' test people."""
    root = tmp_path_factory.mktemp('archive')/'CFEE'
    for i, (person, model) in enumerate({'185': '033', '272': '047', '3': '061', '44': '075', '190': '094'}.items()):
        for cls in (1, 3, 7):
            photograph(root/f'GROUP{i % 3}/Images{i}/{cls:02d}_{person}_{i + 30}.jpg', model, cls)
    return root


@pytest.fixture
def rafd(tmp_path):
    """Three people of RaFD, one in the test list, as tall pictures of noise."""
    for seed, (person, angle, emotion, gaze) in enumerate((p, a, e, g) for p in ('05', '15', '70') for a in ('045', '090', '135', '180')
                                                          for e in ('neutral', 'Happy', 'contemptuous') for g in ('frontal', 'right')):
        noise(tmp_path/f'RaFD/Rafd{angle}_{person}_Caucasian_female_{emotion}_{gaze}.JPG', seed, (681, 1024) if seed % 24 == 6 else (227, 341))
    return tmp_path/'RaFD'


# The four collections

def test_cfee(cfee, tmp_path):
    report = prepare_cfee(cfee, tmp_path/'out', quiet=True)
    assert report.ok and report.held_out == ['185', '272'] and not report.skipped
    assert report.counts == {('train', 0): 3, ('train', 1): 6, ('test', 0): 2, ('test', 1): 4}
    assert sorted(path.name for path in (tmp_path/'out/test/b_e').iterdir()) == ['185_30_03.png', '185_30_07.png', '272_31_03.png', '272_31_07.png']
    rows = json.loads((tmp_path/'out/prepared.json').read_text())['pictures']
    for row in rows:  # the head stands in the middle: the square is 1.9 faces high and 5 % of a face higher than the box
        (x, y, width, height), (left, top, side) = row['face_box'], row['square']
        assert side == pytest.approx(1.9*height, abs=.02) and left + side/2 == pytest.approx(x + width/2, abs=.02)
        assert top + side/2 == pytest.approx(y + height/2 - .05*height, abs=.02)
        assert abs(left + side/2 - 320) < 30 and abs(top + side/2 - 240) < 60
    assert Image.open(tmp_path/'out'/rows[0]['file']).size == (128, 128)


def test_rafd_is_cut_exactly_where_the_authors_cut(rafd, tmp_path):
    report = prepare_rafd(rafd, tmp_path/'out', quiet=True)
    assert report.held_out == ['15'] and not report.skipped and report.unused == {'pictures of camera 180': 3*3*2}
    assert report.counts == {('train', 0): 2*3, ('train', 1): 2*(3*3*2 - 3), ('test', 0): 3, ('test', 1): 15}
    names = {path.name for path in (tmp_path/'out').rglob('05_*.png')}
    assert names == {f'05_{a}_{g}_{c:02d}.png' for a in ('045', '090', '135') for g in (0, 2) for c in (1, 2, 9)}
    assert {path.name for path in (tmp_path/'out/train/a_n').glob('05*')} == {f'05_{a}_0_01.png' for a in ('045', '090', '135')}
    source = next(path for path in sorted(rafd.iterdir()) if Image.open(path).height == 1024)
    made = next(row for row in json.loads((tmp_path/'out/prepared.json').read_text())['pictures'] if row['source'] == source.name)
    wanted = Image.open(source).convert('RGB').resize((128, 128), Image.Resampling.LANCZOS, box=(30, 90, 651, 711))
    assert Image.open(tmp_path/'out'/made['file']).tobytes() == wanted.tobytes() and made['square'] == [30, 90, 621]


def test_cfd(tmp_path):
    for person, model in {'AF-200': '037', 'BM-7': '051', 'LF-250': '066'}.items():
        for letters, cls in dict(N=1, HO=2, A=5).items():
            photograph(tmp_path/f'CFD/{person}/CFD-{person}-{model}-{letters}.jpg', model, cls)
    report = prepare_cfd(tmp_path/'CFD', tmp_path/'out', size=64, test=['bm-7'], quiet=True)
    assert report.ok and report.held_out == ['BM-7']
    assert sorted(path.name for path in (tmp_path/'out/test').rglob('*.png')) == ['BM-7_051_01.png', 'BM-7_051_02.png', 'BM-7_051_05.png']


def test_folder_of_photographs(tmp_path):
    for person, model in {'Ann_B': '037', 'Zoë': '051'}.items():
        for word, cls in dict(calm=1, happy=2, sad=3).items():
            photograph(tmp_path/f'album/{person}/{word}.jpg', model, cls)
    report = prepare_folder(tmp_path/'album', tmp_path/'out', **FOLDER, quiet=True)
    assert report.ok and len(report.held_out) == 1 and 'classes: 1 neutral, 2 happy, 3 sad' in str(report)
    assert {path.name for path in (tmp_path/'out').rglob('Ann*')} == {'Ann-B_001_01.png', 'Ann-B_002_02.png', 'Ann-B_003_03.png'}


@pytest.mark.parametrize('angle', ['045', '090', '135'])
def test_all_words_of_rafd(angle):
    for (emotion, cls), (gaze, look) in ((a, b) for a in RAFD_CLASSES.items() for b in RAFD_GAZES.items()):
        portrait = rafd_name(f'x/rafd{angle}_07_Moroccan_male_{emotion.upper()}_{gaze}.jpeg')
        assert portrait == ('07', f'{angle}_{look}', cls, 0 if emotion == 'neutral' and gaze == 'frontal' else 1)


def test_all_classes_of_cfee_and_cfd():
    for cls in range(1, 27):
        assert cfee_name(f'{cls:02d}_122_4.jpg').name == f'122_4_{cls:02d}.png' and cfee_name(f'{cls}_1_4.jpg').face_type == (cls > 1)
    assert len(set(CFD_CLASSES.values())) == 5
    assert cfd_name('CFD-AF-200-228-N.jpg').name == 'AF-200_228_01.png' and cfd_name('cfd-mf-300-002-hc.jpg').person == 'MF-300'


@pytest.mark.parametrize('read, name', [(cfee_name, '00_122_7.jpg'), (cfee_name, '27_122_7.jpg'), (cfee_name, 'x_122_7.jpg'), (cfee_name, '05_122.jpg'),
                                        (cfee_name, '05_1_2_3.jpg'), (cfee_name, '05_.._7.jpg'), (cfee_name, '٠٥_122_7.jpg'), (rafd_name, 'Rafd060_1_a_b_sad_left.jpg'),
                                        (rafd_name, 'Rafd090_1_a_b_sad_up.jpg'), (rafd_name, 'Rafd090_1_a_b_sad.jpg'), (cfd_name, 'CFD-AF-200-228-HX.jpg'),
                                        (cfd_name, 'CFD-A-200-228-N.jpg'), (cfd_name, 'N.jpg')])
def test_other_names_are_refused(read, name):
    with pytest.raises(InputError, match='mend'):
        read(name)


# People

def test_padded_numbers_and_capitals_are_the_same_person(tmp_path):
    for seed, name in enumerate(['012/calm', '12/happy', 'Ann/calm', 'ann/happy', 'bob/calm', 'bob/sad']):
        noise(tmp_path/f'album/{name}.png', seed)
    report = quickly(tmp_path/'album', tmp_path/'out', test=['12'])
    assert report.ok and report.held_out == ['012'] and report.counts['test', 1] == 1 and report.counts['train', 0] == 2


@pytest.mark.parametrize('people, held_out, words', [(('0122', '17', '272'), ['0122', '272'], '2 of the 8'), (('1', '2', '3'), None, 'none of those listed')])
def test_the_authors_test_people_or_a_drawn_share(tmp_path, people, held_out, words):
    for seed, person in enumerate(people):
        for cls in (1, 2):
            noise(tmp_path/f'src/{cls:02d}_{person}_1.png', (seed, cls))
    table = ['file,x,y,width,height', *(f'{path.name},4,4,20,20' for path in (tmp_path/'src').iterdir())]
    (tmp_path/'boxes.csv').write_text('\n'.join(table))
    report = prepare_cfee(tmp_path/'src', tmp_path/'out', boxes=tmp_path/'boxes.csv', quiet=True)
    assert words in str(report) and len(report.held_out) == (len(held_out) if held_out else 1)
    assert held_out in (None, report.held_out)
    assert not set(report.dataset.people['train', 0]) & set(report.dataset.people['test', 0])


@pytest.mark.parametrize('test, words', [(0, 'hold out 0'), (4, 'hold out 4'), (['ann', 'nobody'], '1 of them'), ('nobody', '1 of them')])
def test_an_impossible_choice_is_found_before_the_work(tmp_path, monkeypatch, test, words):
    monkeypatch.setattr(data, '_cut_all', None)
    with pytest.raises(InputError, match=f'{words}.*mend'):
        quickly(album(tmp_path/'album'), tmp_path/'out', test=test)
    assert os.listdir(tmp_path) == ['album']


def test_people_without_one_of_the_types_are_skipped_and_nobody_else_moves(tmp_path):
    album(tmp_path/'album')
    (tmp_path/'album/ann/calm.png').write_bytes(b'not a picture')
    for word in ('happy', 'sad'):
        (tmp_path/f'album/bob/{word}.png').unlink()
    report = quickly(tmp_path/'album', tmp_path/'out')
    reasons = dict(report.skipped)
    assert report.ok and reasons.keys() == {'ann/calm.png', 'ann/happy.png', 'ann/sad.png', 'bob/calm.png'}
    assert 'not a readable' in reasons['ann/calm.png'] and 'no neutral' in reasons['ann/sad.png'] and 'no emotional' in reasons['bob/calm.png']
    assert len(report.held_out) == 1 and report.counts['train', 0] == 1


# Files that cannot be used

def test_every_bad_file_is_named(cfee, tmp_path):
    shutil.copytree(cfee, tmp_path/'src')
    good = next((tmp_path/'src').rglob('07_3_*.jpg'))
    bad = {'03_3_1.jpg': 'truncated', '04_3_1.png': 'mode LA', '05_3_1.jpg': 'no face', '99_3_1.jpg': 'class 99', 'party.jpg': 'badly named',
           '06_3_1.png': 'not a readable', '07_3_1.jpg': 'same picture'}
    photograph(tmp_path/'src/03_3_1.jpg', '061', 4)
    (tmp_path/'src/03_3_1.jpg').write_bytes((tmp_path/'src/03_3_1.jpg').read_bytes()[:5000])
    Image.new('LA', (640, 480)).save(tmp_path/'src/04_3_1.png')
    Image.new('RGB', (640, 480), 'grey').save(tmp_path/'src/05_3_1.jpg')
    for name in ('99_3_1.jpg', 'party.jpg', '07_3_1.jpg'):
        shutil.copy(good, tmp_path/'src'/name)
    (tmp_path/'src/06_3_1.png').touch()
    photograph(tmp_path/'src/Z/03_3_32.jpg', '061', 5)  # another picture that would get a name that is taken
    bad['Z/03_3_32.jpg'] = 'would be called'
    (tmp_path/'src/thumbs.db').touch()
    (tmp_path/'src/._03_3_1.jpg').touch()
    report = prepare_cfee(tmp_path/'src', tmp_path/'out', quiet=True)
    reasons = dict(report.skipped)
    twins = {'07_3_1.jpg', good.relative_to(tmp_path/'src').as_posix()} & reasons.keys()
    assert len(twins) == 1, 'of two equal pictures one is used'
    bad.pop('07_3_1.jpg')
    assert reasons.keys() - twins == bad.keys() and 'same picture' in reasons[twins.pop()]
    assert not [name for name, words in bad.items() if words not in reasons[name]]
    assert report.unused == {'files of kind .db': 1, 'hidden files': 1} and report.ok
    assert all(f'- {name}: ' in str(report) for name in reasons) and '8 skipped' in str(report)


def test_enlarged_pictures_are_used_and_counted(tmp_path):
    album(tmp_path/'album', size=(96, 70))
    noise(tmp_path/'album/ann/sad.png', 91, (60, 40))
    noise(tmp_path/'album/zed/calm.png', 92, (16, 16))  # is skipped, so its size does not matter
    report = quickly(tmp_path/'album', tmp_path/'out', size=64)
    line = 'enlarged to 64 px, and so blurred: 1 of 12 pictures, the smallest from 40 px'
    assert sum(report.counts.values()) == 12 and [file for file, _ in report.skipped] == ['zed/calm.png']
    assert line in str(report).splitlines() and line in json.loads((tmp_path/'out/prepared.json').read_text())['notes']
    assert 'enlarged' not in str(quickly(tmp_path/'album', tmp_path/'small', size=40)), '40 of 40 px are enough'


def test_no_reason_tells_a_place_of_this_machine(tmp_path):
    album(tmp_path/'album')
    for name in ('ann/bad.png', 'ann/worse.png'):
        (tmp_path/'album'/name).write_bytes(b'not a picture')
    quickly(tmp_path/'album', tmp_path/'out')
    text = (tmp_path/'out/prepared.json').read_text()
    assert 'ann/worse.png' in text and str(tmp_path) not in text and tmp_path.name not in text


@pytest.mark.skipif(os.name == 'nt', reason='names and links that Windows does not allow')
def test_hostile_trees(tmp_path):
    album(tmp_path/'album')
    noise(tmp_path/'album/ann/calm\n- forged: line.png', 91)
    noise(Path(os.fsdecode(os.fsencode(tmp_path/'album/bob/calm') + b'\xff.png')), 92)
    noise(tmp_path/'album/.._.._evil/calm.png', 93)
    noise(tmp_path/'album/.._.._evil/happy.png', 94)
    os.symlink('..', tmp_path/'album/ann/loop')
    os.symlink('nowhere.png', tmp_path/'album/ann/broken.png')
    os.mkfifo(tmp_path/'album/ann/pipe.png')  # opening it would wait for ever
    report = quickly(tmp_path/'album', tmp_path/'out')
    assert {Path(file).name for file, _ in report.skipped} == {'loop', 'broken.png', 'pipe.png'}
    assert report.ok and report.counts['train', 0] + report.counts['test', 0] == 7
    assert len([path for path in (tmp_path/'out').rglob('------evil_*')]) == 2
    assert sorted(os.listdir(tmp_path)) == ['album', 'out'] and '\n- forged' not in str(report)
    str(report).encode()


@pytest.mark.parametrize('name', ['../../up', 'a/b', 'a\\b', '..', '.', '\0', 'con:', 'x'*100, ''])
def test_no_identity_leaves_the_folder(name):
    try:
        part = data._part(name)
    except InputError:
        return
    assert re.fullmatch(r'[\w-]+', part) and '_' not in part


# Places

@pytest.mark.parametrize('src, out, words', [('missing', 'out', 'no such folder'), ('file', 'out', 'no such folder'), ('empty', 'out', 'nobody with'),
                                             ('album', 'album', 'inside'), ('album', 'album/out', 'inside'), ('album/ann', 'album', 'inside'),
                                             ('album', 'link', 'inside'), ('album', 'full', 'not empty'), ('album', 'file', 'not empty'),
                                             ('album', 'file/out', 'could not be written')])
def test_places_that_cannot_be(tmp_path, src, out, words):
    album(tmp_path/'album')
    (tmp_path/'empty').mkdir()
    (tmp_path/'full').mkdir()
    (tmp_path/'full/mine.txt').write_text('keep me')
    (tmp_path/'file').write_text('keep me')
    (tmp_path/'link').symlink_to('album/ann')
    before = contents(tmp_path), sorted(tmp_path.rglob('*'))
    with pytest.raises(InputError, match=f'{words}.*mend'):
        quickly(tmp_path/src, tmp_path/out)
    assert before == (contents(tmp_path), sorted(tmp_path.rglob('*')))


@pytest.mark.parametrize('size', [0, -1, 15, 4000])
def test_sizes_that_cannot_be(tmp_path, size):
    with pytest.raises(InputError, match='size.*mend'):
        quickly(album(tmp_path/'album'), tmp_path/'out', size=size)


def test_an_empty_folder_may_be_filled_and_parents_are_made(tmp_path):
    (tmp_path/'empty').mkdir()
    for out in ('empty', 'new/deep/out'):
        assert quickly(album(tmp_path/'album'), tmp_path/out).ok
    assert sorted(os.listdir(tmp_path)) == ['album', 'empty', 'new'] and os.listdir(tmp_path/'new/deep') == ['out']


# The same bytes

def test_the_same_bytes_whatever_the_order_of_the_disk(cfee, tmp_path, monkeypatch):
    prepare_cfee(cfee, tmp_path/'one', quiet=True)
    for path in sorted(cfee.rglob('*.jpg'), reverse=True):
        (tmp_path/'elsewhere'/path.relative_to(cfee)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tmp_path/'elsewhere'/path.relative_to(cfee))
    walk = os.walk
    monkeypatch.setattr(os, 'walk', lambda *args, **options: reversed(list(walk(*args, **options))))
    monkeypatch.chdir(tmp_path)
    prepare_cfee('elsewhere', 'two', quiet=True)
    assert contents('one') == contents('two') and len(contents('one')) == 15 + 1


def test_nothing_but_pixels_goes_into_a_picture(tmp_path):
    album(tmp_path/'album', suffix='jpg')
    exif = Image.Exif()
    exif[0x010E] = 'taken at home'
    path = tmp_path/'album/ann/calm.jpg'
    Image.open(path).save(path, exif=exif, icc_profile=b'profile', comment=b'secret')
    quickly(tmp_path/'album', tmp_path/'out')
    made = next((tmp_path/'out').rglob('ann_*_01.png'))
    assert not Image.open(made).info and b'home' not in made.read_bytes()


# Whole or not at all

KILLING = '''
from twocet_nb.data import check_dataset, prepare_folder

root = Path(sys.argv[1])
out = root/'out'

def prepare():
    prepare_folder(root/'album', out, r'^([^/]+)/', 'calm', crop='centre', size=32, quiet=True)

def look():
    assert not out.exists() or len(list(out.rglob('*.png'))) == 12 and (out/'prepared.json').exists() and check_dataset(out).ok

litter, calls = 0, 0
def dying():
    die_at_call(calls)
    prepare()
while True:
    calls += 1
    if out.exists(): out.rename(root/f'whole-{calls}')
    if not trial(dying, look): break
    litter += (root/'.out.preparing').exists()
luck = random.Random(5)
for i in range(8):
    if out.exists(): out.rename(root/f'random-{i}')
    trial(prepare, look, luck.uniform(0, .05))
if out.exists(): out.rename(root/'last')     # killed after the dataset took its name, but before its scratch was swept
prepare()
assert not list(root.glob('.*')), 'the next call sweeps'
print(calls, litter)
'''


def test_a_killed_process_never_leaves_half_a_dataset(forked, tmp_path):
    album(tmp_path/'album')
    calls, litter = forked(KILLING, tmp_path)
    assert calls > 15 and litter > 5, 'killed at every call that changes a name'


def test_a_full_disk_leaves_nothing(full_disk, tmp_path):
    album(tmp_path/'album', size=(256, 256))
    with pytest.raises(InputError, match='out: could not be written .No space left.*mend'):
        quickly(tmp_path/'album', full_disk/'deep/out', size=256)
    assert not os.listdir(full_disk)
    assert quickly(tmp_path/'album', full_disk/'deep/out', size=32).ok, 'what was too large for the disk may fit when it is smaller'


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    album(tmp_path/'album')
    cut, calls = data.cut_square, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 7:
            assert list(tmp_path.glob('new/.out.preparing/crops/*.png')), 'something was there to be removed'
            signal.raise_signal(signal.SIGINT)
        return cut(*args)
    monkeypatch.setattr(data, 'cut_square', interrupted)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            quickly(tmp_path/'album', tmp_path/'new/out')
    finally:
        signal.signal(signal.SIGINT, usual)
    assert os.listdir(tmp_path) == ['album'] and len(calls) == 7


# Boxes, and no detector

def test_boxes_replace_the_detector(cfee, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cv2', None)
    paths = sorted(cfee.rglob('*.jpg'))
    lines = [f'{path.relative_to(cfee).as_posix()},{200 + i},120,200,220,note' for i, path in enumerate(paths)]
    lost, wild = paths[4].relative_to(cfee).as_posix(), paths[5].relative_to(cfee).as_posix()
    lines[4], lines[5] = 'another.jpg,1,1,9,9,', f'{wild},600,10,300,1e9,'
    (tmp_path/'boxes.csv').write_text('\ufefffile,x,y,width,height,more\n' + '\n'.join(lines), encoding='utf-8')
    report = prepare_cfee(cfee, tmp_path/'out', boxes=tmp_path/'boxes.csv', quiet=True)
    reasons = dict(report.skipped)
    assert reasons.keys() >= {lost, wild} and 'not in boxes.csv' in reasons[lost] and 'does not lie' in reasons[wild]
    record = json.loads((tmp_path/'out/prepared.json').read_text())
    assert record['boxes'] == 'boxes.csv' and {tuple(row['face_box'])[1:] for row in record['pictures']} == {(120, 200, 220)}
    assert {row['square'][2] for row in record['pictures']} == {round(1.9*220, 2)}


def test_a_table_is_read_whole_or_not_at_all(tmp_path):
    table = tmp_path/'a.csv'
    table.write_bytes('\ufeffname,note\r\nZoë,"two\r\nlines"\r\n\r\nann,\r\n'.encode())
    assert read_csv(table, ['name']) == [dict(name='Zoë', note='two\r\nlines'), dict(name='ann', note='')]
    for text, words in ((b'name,note\nann', 'line 2'), (b'name\nann,bob', 'line 2'), (b'name\n"ann', 'a.csv: cannot be read'), (b'\xff', 'a.csv: cannot'),
                        (b'', 'no column name')):
        table.write_bytes(text)
        with pytest.raises(InputError, match=f'{words}.*mend'):
            read_csv(table, ['name'])
    with pytest.raises(InputError, match='b.csv: no such table.*mend'):
        read_csv(tmp_path/'b.csv')


@pytest.mark.parametrize('text, words', [('', 'no column'), ('file,x,y,w,h\n', 'no column'), ('file,x,y,width,height\na,1,2,3\n', 'line 2'),
                                         ('file,x,y,width,height\na,1,2,3,4\na,1,2,3,4\n', 'line 3: a for the second time'),
                                         ('file,x,y,width,height\na,1,2,3,tall\n', 'tall'), (b'\xff\xfe\x00', 'cannot be read')])
def test_tables_that_are_none(tmp_path, text, words):
    (tmp_path/'boxes.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f'boxes.csv.*{words}.*mend'):
        data.read_boxes(tmp_path/'boxes.csv')


@pytest.mark.parametrize('box', [(0, 0, 0, 0), (-200, 0, 100, 100), (0, 0, float('nan'), 9), (0, 0, 9, float('inf')), (50, 50, -9, 9), (1e300,)*4])
def test_boxes_that_cannot_be(box):
    with pytest.raises(InputError, match='mend'):
        data._check_box(box, Image.new('RGB', (100, 100)))


def test_without_opencv_the_message_names_the_extra(cfee, rafd, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cv2', None)
    for call in (lambda: prepare_cfee(cfee, tmp_path/'out'), lambda: prepare_folder(cfee, tmp_path/'out', '_(.*)_', '01'), lambda: find_face(Image.new('L', (99, 99)))):
        with pytest.raises(InputError, match=r"pip install 'twocet_nb\[prepare\]'"):
            call()
    assert not (tmp_path/'out').exists()
    assert prepare_rafd(rafd, tmp_path/'out', size=32, quiet=True).ok, 'RaFD needs no detector'


def test_importing_the_package_does_not_import_opencv():
    subprocess.run([sys.executable, '-c', "import sys, twocet_nb.data, twocet_nb.cli; assert 'cv2' not in sys.modules"], check=True)


# What comes after

def test_a_prepared_folder_trains(cfee, tmp_path):
    prepare_cfee(cfee, tmp_path/'faces', quiet=True)
    run = Trainer(preset('tiny', data=str(tmp_path/'faces'), steps=1), tmp_path/'run', quiet=True)
    run.fit()
    assert run.step == 1


# The command line

def test_prepare_commands(twocet, cfee, rafd):
    code, out, err = twocet('prepare', 'cfee', cfee, 'a', '--size', 64, '--test', '3,190')
    assert code == 0 and not err and '2 of the 2 listed): 190, 3' in out and '64 x 64 px' in out
    code, out, err = twocet('prepare', 'rafd', rafd, 'b', '--test', 2, '--seed', 3)
    assert code == 0 and not err and 'pictures of camera 180, not used: 18' in out and check_dataset('b').ok
    code, out, err = twocet('prepare', 'folder', album(Path('album')), 'c', '--crop', 'centre', '--id-pattern', FOLDER['id_pattern'], '--neutral', 'calm')
    assert code == 0 and not err and '2 happy, 3 sad' in out
    assert twocet('check', 'c')[0] == 0


@pytest.mark.parametrize('words, say', [
    ('prepare', 'COLLECTION'), ('prepare imagenet a b', "'imagenet'"), ('prepare cfee nowhere x', 'nowhere'), ('prepare cfee', 'SRC'),
    ('prepare rafd album x --boxes b.csv', '--boxes'), ('prepare cfee album x --boxes none.csv', 'none.csv'), ('prepare cfee album x', 'badly named'),
    ('prepare folder album x', '--id-pattern'), ('prepare folder album x --id-pattern ( --neutral calm', 'no regular expression'),
    ('prepare folder album x --id-pattern (a) --neutral calm --size 5', 'size'), ('prepare rafd album album/x', 'inside')])
def test_wrong_words(twocet, words, say):
    album(Path('album'))
    code, out, err = twocet(*words.split())
    assert code == 2 and not out and re.fullmatch(r'twocet: error: .+\n', err) and say in err, err
    assert os.listdir() == ['album'] and not Path('album/x').exists()


def test_ctrl_c_of_the_command(tmp_path):
    Image.linear_gradient('L').resize((2000, 2000)).save(tmp_path/'one.png', compress_level=1)
    for i in range(300):  # small files that take half a minute
        (tmp_path/f'album/{i}').mkdir(parents=True)
        for word in ('calm', 'sad'): shutil.copy(tmp_path/'one.png', tmp_path/f'album/{i}/{word}.png')
    (tmp_path/'one.png').unlink()
    program = "import sys; from twocet_nb.cli import main; sys.exit(main())"
    words = ['prepare', 'folder', 'album', 'out', '--crop', 'centre', '--id-pattern', '^([^/]+)/', '--neutral', 'calm']
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)    # a shell's background jobs are started deaf to it
    process = subprocess.Popen([sys.executable, '-c', program, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('.out.preparing/crops/*.png')) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, 'twocet: interrupted\n') and os.listdir(tmp_path) == ['album']


# import

def official(name, state):
    """A state dict under the authors' names, written from the facts page."""
    where = dict(generator={}, encoder={'trunk': 'shared.shared', 'head': 'unshared.0'}, discriminator={'trunk': 'main.0.shared', 'head': 'main.1'})[name]
    inner = [('project', 'conv1x1'), ('adain1.affine', 'norm1.fc'), ('adain2.affine', 'norm2.fc')]
    theirs = {}
    for key, value in state.items():
        part, _, rest = key.partition('.')
        for ours, name_there in inner:
            rest = rest.replace(ours, name_there)
        theirs[f'{where.get(part, part)}.{rest}'] = value
    return theirs


def write_official(path, *names):
    """A checkpoint of the authors with these networks; returns ours."""
    networks = {name: network for name, network in build_networks(NetworkConfig.tiny(), seed=11).items() if name in names}
    torch.save({name: official(name, network.state_dict()) for name, network in networks.items()}, path)
    return networks


def test_import(twocet):
    networks = write_official('000500_model.ckpt', 'generator', 'encoder', 'discriminator')
    code, out, err = twocet('import', '000500_model.ckpt', 'new/official.safetensors')
    assert code == 0 and not err and out == 'new/official.safetensors: generator, encoder, discriminator for 16 px\n'
    config, found = load_networks('new/official.safetensors')
    for name, network in networks.items():
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in found[name].state_dict().items())
    card = read_card('new/official.safetensors')
    assert card['extra'] == {'from': '000500_model.ckpt'}
    model, truth = TwoCET.load('new/official.safetensors', 'cpu'), TwoCET.from_official('000500_model.ckpt', 'cpu')
    face, code_there = torch.zeros(1, 3, 16, 16), truth.encode(torch.zeros(1, 3, 16, 16))
    assert torch.equal(model.encode(face), code_there) and torch.equal(model.apply(face, code_there), truth.apply(face, code_there))


def test_an_imported_file_is_of_use_everywhere(twocet):
    write_official('000500_model.ckpt', 'generator', 'encoder', 'discriminator')
    assert twocet('import', '000500_model.ckpt', 'official.safetensors')[0] == 0
    noise(Path('a.png'), 1), noise(Path('b.png'), 2)
    assert twocet('transfer', '--model', 'official.safetensors', '--target', 'a.png', '--reference', 'b.png', '--out', 'c.png')[0] == 0
    config, _ = load_networks('official.safetensors', ['generator'])
    quickly(album(Path('album')), 'faces')
    run = Trainer(preset('tiny', network=config, data='faces', start_from='official.safetensors', steps=1), 'run', quiet=True)
    run.fit()
    assert run.step == 1


def test_averaged_networks_alone(twocet):
    write_official('000500_model_s.ckpt', 'generator', 'encoder')
    assert twocet('import', '000500_model_s.ckpt', 'a.safetensors')[0] == 0
    assert TwoCET.load('a.safetensors', 'cpu').config.image_size == 16
    assert set(load_networks('a.safetensors')[1]) == {'generator', 'encoder'}


class Bomb:
    """Unpickling one runs a command."""
    def __reduce__(self):
        return os.system, ('touch exploded',)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_import_refuses(twocet):
    write_official('good.ckpt', 'generator', 'encoder')
    torch.save({'generator': Bomb()}, 'hostile.ckpt')
    Path('hostile.pkl').write_bytes(pickle.dumps({'generator': Bomb()}))
    torch.save({'generator': {'step': 3}}, 'optims.ckpt')
    Path('cut.ckpt').write_bytes(Path('good.ckpt').read_bytes()[:3000])
    Path('mine.safetensors').write_text('days of training')
    before = contents('.')
    for checkpoint, out, words in [('hostile.ckpt', 'x.safetensors', 'hostile.ckpt: refused'), ('hostile.pkl', 'x.safetensors', 'hostile.pkl'),
                                   ('cut.ckpt', 'x.safetensors', 'cut.ckpt'), ('optims.ckpt', 'x.safetensors', 'no networks'),
                                   ('none.ckpt', 'x.safetensors', 'none.ckpt'), ('good.ckpt', 'x.pt', '.safetensors'),
                                   ('good.ckpt', 'mine.safetensors', 'already there'), ('good.ckpt', 'good.ckpt/x.safetensors', 'good.ckpt')]:
        code, said, err = twocet('import', checkpoint, out)
        assert code == 2 and not said and re.fullmatch(r'twocet: error: .+\n', err) and words in err, err
    assert contents('.') == before, 'nothing was run, nothing was left'


def test_the_lists_of_the_authors():
    assert CFEE_TEST == ('122', '174', '185', '187', '188', '224', '265', '272') and data.RAFD_TEST == ('12', '15', '21', '43', '57', '67')
    assert RAFD_CLASSES == dict(neutral=1, happy=2, sad=3, angry=5, surprised=6, disgusted=7, fearful=8, contemptuous=9)
    assert RAFD_GAZES == dict(frontal=0, left=1, right=2)
