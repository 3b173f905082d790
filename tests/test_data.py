"""What the notebook 01_data cannot test: other processes, hostile files, and every fault by name."""
import csv
import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from twocet_nb import data
from twocet_nb.data import FaceBatches, FaceFolder, InputError, check_dataset

REPOSITORY = Path(data.__file__).parent.parent
TEST = data.card('faces-64')['test_ids'][0]
PEOPLE = {'train': ['001', '002', '003'], 'test': [TEST]}


@pytest.fixture(scope='session')
def faces():
    return data.bundled('faces-64')


@pytest.fixture
def small(faces, tmp_path):
    """A healthy dataset of four people with one neutral and four emotional faces each."""
    for split, people in PEOPLE.items():
        for person in people:
            for cls in range(1, 6):
                folder = data.FACE_FOLDERS[cls > 1]
                (tmp_path / 'small' / split / folder).mkdir(parents=True, exist_ok=True)
                shutil.copy(faces / split / folder / f'{person}_{cls:02d}.png', tmp_path / 'small' / split / folder)
    return tmp_path / 'small'


@pytest.fixture
def tiny_pack(tmp_path, monkeypatch):
    """A pack of two faces with its card, in the place of the real one; `seal` writes the hash into the card."""
    archive = tmp_path / 'pack.zip'
    image = tmp_path / 'x.webp'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(image, lossless=True)
    with zipfile.ZipFile(archive, 'w') as pack:
        pack.write(image, 'train/a_n/001_01.webp')
        pack.writestr('images.csv', 'file,id\ntrain/a_n/001_01.webp,001\n')

    def seal():
        files = {'pack.zip': dict(sha256=hashlib.sha256(archive.read_bytes()).hexdigest())}
        packs = {f'p{shrink}': dict(file='pack.zip', size=8 // shrink, shrink=shrink) for shrink in (1, 2)}
        (tmp_path / 'faces.json').write_text(json.dumps({'files': files, 'packs': packs}))

    seal()
    monkeypatch.setattr(data, '_asset', lambda name: tmp_path / name)
    monkeypatch.setenv('TWOCET_CACHE', str(tmp_path / 'cache'))
    return archive, seal


# Reading

def bad_image(kind, path):
    if kind == 'truncated png':
        Image.effect_noise((64, 64), 50).convert('RGB').save(path, format='png')
        path.write_bytes(path.read_bytes()[:700])
    elif kind == 'truncated jpeg':
        Image.effect_noise((64, 64), 50).convert('RGB').save(path, format='jpeg')
        path.write_bytes(path.read_bytes()[:700])
    elif kind == 'truncated webp':
        Image.effect_noise((64, 64), 50).convert('RGB').save(path, format='webp')
        path.write_bytes(path.read_bytes()[:400])
    elif kind == 'bomb':
        Image.new('1', (20000, 20000)).save(path, format='png')
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'text':
        path.write_text('<html>404</html>')
    elif kind == 'folder':
        path.mkdir()
    else:
        Image.new(kind, (64, 64)).save(path, format='tiff' if kind in ('CMYK', 'F') else 'png')


@pytest.mark.parametrize('kind', ['truncated png', 'truncated jpeg', 'truncated webp', 'bomb', 'empty', 'text', 'folder',
                                  'LA', 'I;16', 'CMYK', 'F', '1'])
def test_bad_image_is_refused_by_name(kind, tmp_path):
    path = tmp_path / 'strange face_01.png'
    bad_image(kind, path)
    with pytest.raises(InputError, match='strange face_01.png.*mend'):
        data.to_tensor(path)


def test_grey_is_accepted_and_size_keeps_proportions(tmp_path):
    Image.new('L', (40, 80), 255).save(tmp_path / 'grey.png')
    assert data.to_tensor(tmp_path / 'grey.png', size=16).shape == (3, 16, 16)
    wide = torch.zeros(3, 20, 60)
    wide[:, :, 20:40] = 1  # the central square is white: a crop keeps it whole
    assert (data.to_tensor(wide, size=20) == 1).all()


@pytest.mark.parametrize('kind', ['RGBA', 'P', 'P with a transparent colour', 'P with alpha'])
def test_palette_and_transparent_pictures_are_laid_on_white(kind, tmp_path):
    picture = Image.new('RGBA', (8, 8), (200, 0, 0, 255))
    picture.paste((0, 0, 250, 0), (0, 0, 4, 8))  # the left half is transparent, and black or blue below
    path, options = tmp_path / 'screenshot_01.png', {}
    if kind != 'RGBA':
        picture = picture.convert('RGB').quantize(2)
        clear = picture.getpixel((0, 0))
        options = {'P': {}, 'P with a transparent colour': {'transparency': clear},
                   'P with alpha': {'transparency': bytes(0 if i == clear else 255 for i in range(2))}}[kind]
    picture.save(path, **options)
    face = data.read_face(path)
    assert face.mode == 'RGB' and face.getpixel((7, 7)) == (200, 0, 0)
    assert face.getpixel((0, 0)) == ((0, 0, 250) if kind == 'P' else (255, 255, 255))
    assert torch.equal(data.to_tensor(Image.open(path)), data.to_tensor(path))


def test_orientation_of_a_transparent_picture_is_kept(tmp_path):
    picture, exif = Image.new('RGBA', (8, 4), (0, 0, 0, 255)), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / 'a_01.png', exif=exif)
    assert data.read_face(tmp_path / 'a_01.png').size == (4, 8)


@pytest.mark.parametrize('value', [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), torch.zeros(2, 4, 4),
                                   torch.zeros(2, 3, 4, 4), torch.full((3, 4, 4), 1.5), torch.full((3, 4, 4), torch.nan)])
def test_bad_arrays_are_refused(value):
    with pytest.raises(InputError, match='mend'):
        data.to_tensor(value)


def test_expect_error_fails_without_the_error():
    with pytest.raises(AssertionError, match='nothing was raised'):
        with data.expect_error(InputError):
            pass
    with pytest.raises(AssertionError, match='not in the message'):
        with data.expect_error(InputError, 'left'):
            raise InputError('right')


# Splits and walks

def test_split_properties():
    for trial in range(200):
        rng = random.Random(trial)
        people = [f'p{rng.randrange(1000)}' for _ in range(rng.randrange(3, 40))]
        count = rng.randrange(1, len(set(people))) if len(set(people)) > 1 else 1
        train, test = data.split_identities(people, count, seed=trial)
        assert len(test) == count and not set(train) & set(test) and sorted(train + test) == sorted(set(people))
        rng.shuffle(people)
        assert data.split_identities(people, count, seed=trial) == (train, test)
        assert data.split_identities(people, test) == (train, test)
        moved = set(data.split_identities([*people, 'newcomer'], count, seed=trial)[1]) - set(test)
        assert len(moved) <= 1  # a newcomer pushes out one person at most
    names = [f'{i:03d}' for i in range(50)]
    assert len({tuple(data.split_identities(names, 5, seed)[1]) for seed in range(20)}) == 20


@pytest.mark.parametrize('test', [0, -1, 3, 4, [], ['a', 'b', 'c'], ['d'], 'ab'])
def test_split_refuses(test):
    with pytest.raises(InputError):
        data.split_identities(['a', 'b', 'c'], test)


def test_walk_is_fair_and_random_access():
    walk = data.draw_indices(7, 0, 70, 'seed')
    assert all(sorted(epoch) == list(range(7)) for epoch in walk.view(10, 7).tolist())
    assert len(set(map(tuple, walk.view(10, 7).tolist()))) > 1
    for start in range(60):
        assert torch.equal(data.draw_indices(7, start, 9, 'seed'), walk[start:start + 9])


# Batches

def folders(root, size=16):
    return [FaceFolder(root, 'train', face_type, size=size) for face_type in (0, 1)]


def equal(ours, theirs):
    return len(ours) == len(theirs) == 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize('augmented', [True, False])
def test_memory_files_and_worker_processes_give_the_same_batches(small, augmented):
    make = lambda **where: FaceBatches(*folders(small), batch_size=5, seed=3, augmented=augmented, **where)
    resident, files, workers = make(memory='resident'), make(memory='workers'), make(memory='workers', workers=2)
    for i, a, b, c in zip(range(6), *(batches.iter_from(0) for batches in (resident, files, workers))):
        assert equal(a, b) and equal(a, c) and equal(a, resident[i])
        assert all(x.shape == (5, 3, 16, 16) and x.dtype == torch.float32 and x.abs().max() <= 1 for x in a)
    assert make(limit=10).memory == 'workers' and make().memory == 'resident'


def test_resume_position_and_seeds(small):
    batches = FaceBatches(*folders(small), batch_size=4, seed=0)
    whole = [batch for _, batch in zip(range(8), batches.iter_from(0))]
    rest = [batch for _, batch in zip(range(3), FaceBatches(*folders(small), batch_size=4, seed=0).iter_from(5))]
    assert all(map(equal, whole[5:], rest))
    assert not equal(batches[0], batches[1])
    assert not equal(batches[0], FaceBatches(*folders(small), batch_size=4, seed=1)[0])


def test_global_random_state_is_left_alone(small):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(FaceBatches(*folders(small), memory='workers').iter_from(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_batches_are_the_same_samples(small):
    here, there = (FaceBatches(*folders(small), device=device) for device in ('cpu', 'cuda'))
    assert all(torch.allclose(a, b.cpu(), atol=1e-4) for a, b in zip(here[3], there[3]))


def test_batches_refuse(small):
    with pytest.raises(InputError, match='differ in size'):
        FaceBatches(folders(small, 16)[0], folders(small, 32)[1])
    with pytest.raises(InputError, match='pick'):
        FaceBatches(*folders(small), memory='cloud')
    Image.new('RGB', (32, 32)).save(small / 'train/b_e/003_07.png')
    with pytest.raises(InputError, match='003_07.png.*mend'):
        FaceFolder(small, 'train', 1).load()


def test_each_image_of_a_batch_is_augmented_on_its_own():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    versions = data.augment(image.expand(64, -1, -1, -1), seed=0)
    mirrored = sum(torch.equal(v, image.flip(2)) for v in versions)
    unchanged = sum(torch.equal(v, image) for v in versions)
    assert 6 <= mirrored <= 26 and 6 <= unchanged <= 26 and mirrored + unchanged < 48  # a quarter each; half are cropped


# Checking a dataset

def test_healthy_dataset(small):
    report = check_dataset(small)
    assert report.ok and report.problems == [] and 'no problems' in str(report)
    assert report.counts == {('train', 0): 3, ('train', 1): 12, ('test', 0): 1, ('test', 1): 4}
    assert report.people['test', 1] == {TEST} and report.size == (64, 64)
    assert report.contact_sheet(people=2, expressions=3, size=32).size == (4 * 34 - 2, 2 * 34 - 2)


def cut(path):
    path.write_bytes(path.read_bytes()[:900])


FAULTS = {
    'truncated': (lambda r: cut(r / 'train/b_e/001_03.png'), 'train/b_e/001_03.png: not a readable image'),
    'two channels': (lambda r: Image.new('LA', (64, 64)).save(r / 'train/b_e/001_04.png'), 'train/b_e/001_04.png: 2 channel'),
    'other size': (lambda r: Image.new('RGB', (48, 48)).save(r / f'test/b_e/{TEST}_02.png'), f'test/b_e/{TEST}_02.png: 48 x 48'),
    'not square': (lambda r: Image.new('RGB', (64, 60)).save(r / 'train/a_n/002_01.png'), 'train/a_n/002_01.png: 64 x 60 px is not square'),
    'bad name': (lambda r: (r / 'train/b_e/002_03.png').rename(r / 'train/b_e/smile.png'), 'train/b_e/smile.png: badly named'),
    'strange file': (lambda r: (r / 'train/b_e/notes.txt').write_text('x'), 'train/b_e/notes.txt: not one of'),
    'no neutral': (lambda r: (r / 'train/a_n/003_01.png').unlink(), 'identity 003: no neutral face in train/a_n'),
    'no emotional': (lambda r: [p.unlink() for p in (r / 'test/b_e').iterdir()], f'identity {TEST}: no emotional face in test/b_e'),
    'empty folder': (lambda r: [p.unlink() for p in (r / 'test/b_e').iterdir()], 'test/b_e: no faces'),
    'duplicate': (lambda r: shutil.copy(r / 'train/b_e/001_02.png', r / 'train/b_e/001_09.png'),
                  'train/b_e/001_09.png: the same file as train/b_e/001_02.png'),
    'leak': (lambda r: Image.new('RGB', (64, 64)).save(r / 'test/b_e/001_07.png'), 'identity 001: in both train and test'),
    'missing split': (lambda r: shutil.rmtree(r / 'test'), 'test/a_n: no faces'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_planted_fault_is_found_by_name(small, fault):
    plant, line = FAULTS[fault]
    plant(small)
    report = check_dataset(small)
    assert not report.ok and any(problem.startswith(line) for problem in report.problems), report
    assert line in str(report)


def test_nothing_to_check(tmp_path):
    for root in tmp_path, tmp_path / 'nowhere':
        with pytest.raises(InputError, match='mend'):
            check_dataset(root)


def test_report_stays_short_and_survives_only_bad_images(small):
    for path in small.rglob('*.png'):
        path.write_bytes(path.name.encode())
    report = check_dataset(small)
    assert len(report.problems) == 20 and report.size is None and 'unreadable' in str(report)
    assert 'and 970 more' in str(dataclasses.replace(report, problems=['x'] * 1000))


# The bundled packs

def test_card_pack_and_repository_agree(faces):
    readme = (REPOSITORY / 'data' / 'README.md').read_text(encoding='utf-8')
    for name in data.packs():
        card = data.card(name)
        assert hashlib.sha256((REPOSITORY / 'data' / card['file']).read_bytes()).hexdigest() == card['sha256']
        assert card['licence'] == 'CC0-1.0' and card['sha256'] in readme
    card = data.card('faces-64')
    assert len(card['classes']) == card['expressions']
    report = check_dataset(faces)
    assert report.ok and report.size == (64, 64) and sorted(report.people['test', 0]) == card['test_ids']
    assert sum(report.counts.values()) == card['people'] * card['expressions']
    with open(faces / 'images.csv', encoding='utf-8', newline='') as file:
        assert all((faces / row['file']).is_file() for row in csv.DictReader(file))


def test_two_processes_open_the_same_pack(tmp_path):
    env = {**os.environ, 'TWOCET_CACHE': str(tmp_path / 'cache'), 'PYTHONPATH': str(REPOSITORY), 'OMP_NUM_THREADS': '1'}
    go = tmp_path / 'go'
    code = (f'import time; from pathlib import Path; from twocet_nb.data import bundled\nprint("ready", flush=True)\n'
            f'while not Path({str(go)!r}).exists(): time.sleep(0.001)\nprint(bundled("faces-128"))')
    racers = [subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [racer.stdout.readline() for racer in racers] == ['ready\n'] * 2
    go.touch()
    answers = [racer.communicate(timeout=600)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0] and answers[0] == answers[1]
    assert [str(path) for path in (tmp_path / 'cache').iterdir()] == answers[:1]  # and no leftovers
    assert sum(1 for path in Path(answers[0]).rglob('*.webp')) == len(data.card('faces-128')['classes'])*data.card('faces-128')['people']


def test_loser_of_the_race_discards_its_copy(tiny_pack, monkeypatch):
    replace, cache = os.replace, tiny_pack[0].parent / 'cache'

    def come_second(mine, place):
        shutil.copytree(mine, place)
        (place / 'first').touch()
        replace(mine, place)

    monkeypatch.setattr(os, 'replace', come_second)
    folder = data.bundled('p1')
    assert (folder / 'first').exists() and list(cache.iterdir()) == [folder]


def test_unpacking_that_dies_leaves_no_pack(tiny_pack, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', die)
        with pytest.raises(KeyboardInterrupt):
            data.bundled('p1')
    assert list((tiny_pack[0].parent / 'cache').iterdir()) == []
    assert (data.bundled('p1') / 'train/a_n/001_01.webp').is_file()


def test_small_pack_is_the_average(tiny_pack):
    large = np.array(Image.open(data.bundled('p1') / 'train/a_n/001_01.webp').convert('RGB'), dtype=float)
    small = np.array(Image.open(data.bundled('p2') / 'train/a_n/001_01.png'))
    assert small.shape == (4, 4, 3) and abs(large.reshape(4, 2, 4, 2, 3).mean((1, 3)) - small).max() <= 0.5
    assert '001_01.png' in (data.bundled('p2') / 'images.csv').read_text()


def test_tampered_pack_is_refused(tiny_pack):
    archive, _ = tiny_pack
    archive.write_bytes(archive.read_bytes()[:-1] + b'!')
    with pytest.raises(InputError, match='pack.zip.*the card says'):
        data.bundled('p1')
    assert not (archive.parent / 'cache').exists()


@pytest.mark.parametrize('name', ['../evil.txt', '/evil.txt', 'a/../../evil.txt', '..\\evil.txt', 'C:/evil.txt'])
def test_pack_cannot_write_outside(tiny_pack, name):
    archive, seal = tiny_pack
    with zipfile.ZipFile(archive, 'a') as pack:
        pack.writestr(name, 'x')
    seal()
    with pytest.raises(InputError, match='outside'):
        data.bundled('p1')
    assert not list(archive.parent.rglob('evil.txt')) and not list((archive.parent / 'cache').iterdir())
