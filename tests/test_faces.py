"""Rendered faces: the same numbers give the same pixels anywhere, and a pack survives whatever happens to its maker."""
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from twocet_nb.cli import main
from twocet_nb.data import InputError, check_dataset, face_name
from twocet_nb.faces import pack
from twocet_nb.faces.plan import PROTOCOLS, Protocol, encode, plan, read_plan, read_row, tables
from twocet_nb.faces.rendering import masks

TINY = Protocol({1: 'neutral', 2: 'happy', 6: 'surprised'}, {'': 0}, {'': 0})
SETTINGS = dict(test=2, size=32, samples=1)
FILES = {'images.csv', 'identities.csv', 'sheet.png', 'card.json'}

needs_mitsuba = pytest.mark.skipif(not find_spec('mitsuba'), reason="needs Mitsuba: pip install 'twocet_nb[faces]'")
needs_unix = pytest.mark.skipif(os.name == 'nt', reason='Windows has no such signals')

# `twocet`, with a protocol of three expressions instead of 26.
TWOCET = f'''
import sys
from twocet_nb.faces.plan import PROTOCOLS, Protocol
PROTOCOLS['cfee'] = {TINY}
from twocet_nb.cli import main
sys.exit(main())
'''


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """In this process, too, 'cfee' is short."""
    monkeypatch.setitem(PROTOCOLS, 'cfee', TINY)


def make_words(out):
    return ['faces', 'make', '--identities', '4', '--test', '2', '--size', '32', '--samples', '1', '--workers', '2', str(out)]


def start(out):
    """Start `twocet faces make` in a process group of its own."""
    return subprocess.Popen([sys.executable, '-c', TWOCET, *make_words(out)], start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def images(out):
    return sorted(Path(out).rglob('*.webp'))


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.01)


def contents(out):
    """{path: bytes} of all files of a pack, hidden ones too."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in Path(out).rglob('*') if path.is_file()}


def assert_whole(out):
    """Every image that has a name can be read to its last pixel."""
    for path in images(out):
        with Image.open(path) as image:
            image.load()


def in_new_process(program, **environment):
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """A pack that nothing happened to: four people x three expressions."""
    if not find_spec('mitsuba'):
        pytest.skip('needs Mitsuba')
    out = tmp_path_factory.mktemp('faces')/'pack'
    done = subprocess.run([sys.executable, '-c', TWOCET, *make_words(out)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f'{out}: complete', done.stderr
    return out


# Numbers

def digest(texts):
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def test_a_plan_is_the_same_in_every_process():
    program = ('import hashlib, json; from twocet_nb.faces.plan import plan, tables;'
               'print(hashlib.sha256(json.dumps(tables(plan("rafd", 3, seed=5))).encode()).hexdigest())')
    assert {in_new_process(program, PYTHONHASHSEED=seed) for seed in '12'} == {digest(tables(plan('rafd', 3, seed=5)))}


@pytest.mark.parametrize('protocol, seed', [('cfee', 0), ('rafd', 3)])
def test_tables_lose_nothing(tmp_path, protocol, seed):
    shots = plan(protocol, 12, seed)
    for name, text in tables(shots).items():
        (tmp_path/name).write_text(text)
    again = read_plan(tmp_path)
    assert again == shots
    for a, b in zip(shots, again):  # sums of floats depend on the order, too
        assert list(a.expression.units) == list(b.expression.units) and list(a.person.shape) == list(b.person.shape)
        assert list(a.person.resting) == list(b.person.resting) and face_name(a.file)[0] == face_name(b.file)[0]


def test_a_longer_pack_begins_with_the_shorter_one():
    short, long = plan('cfee', 5, seed=2), plan('cfee', 9, seed=2)
    assert [replace(shot, file='') for shot in short] == [replace(shot, file='') for shot in long[:len(short)]]


def test_rafd_cameras_fire_at_the_same_moment():
    moments = {}
    for shot in plan('rafd', 2):
        identity, angle, gaze, cls = Path(shot.file).stem.split('_')
        moments.setdefault((identity, gaze, cls), []).append(shot)
        assert shot.camera.angle == {'045': -45, '090': 0, '135': 45}[angle]
        assert abs(shot.expression.gaze[0] - {'0': 0, '1': -24, '2': 24}[gaze]) < 6
    assert len(moments) == 2*3*8 and all(len(shots) == 3 and shots[0].expression == shots[1].expression for shots in moments.values())


@pytest.mark.parametrize('arguments, say', [
    (dict(protocol='film'), 'film'), (dict(identities=1), 'at least one'), (dict(test=0), 'at least one'),
    (dict(size=8), 'size'), (dict(samples=0), 'samples'), (dict(quality=0), 'quality'),
])
def test_what_cannot_be_planned(arguments, say):
    with pytest.raises(InputError, match=say):
        plan(**dict(protocol='cfee', identities=4) | arguments)


# Pixels

def test_without_mitsuba_a_sentence_says_how_to_get_it(tmp_path):
    program = f'''
import sys
sys.modules['mitsuba'] = sys.modules['drjit'] = None
from twocet_nb.cli import main
sys.exit(main({make_words(tmp_path/'out')!r}))'''
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"twocet: error: .*Mitsuba.*pip install 'twocet_nb\[faces\]'.*\n", done.stderr), done.stderr
    assert not (tmp_path/'out').exists()


@needs_mitsuba
def test_same_pixels_in_another_process(undisturbed):
    """The pack was rendered by workers; here in a fresh process, and in this one."""
    shots = read_plan(undisturbed)
    program = ('import sys; from twocet_nb.faces.plan import encode, read_row;'
               f'print(encode(read_row({str(undisturbed)!r}, {shots[4].file!r})).hex())')
    assert bytes.fromhex(in_new_process(program, PYTHONHASHSEED='7')) == (undisturbed/shots[4].file).read_bytes()
    for shot in reversed(shots):  # another order, other people in between
        assert encode(shot) == (undisturbed/shot.file).read_bytes(), shot.file


@needs_mitsuba
def test_a_pack_is_a_dataset(undisturbed):
    assert {path.name for path in undisturbed.iterdir()} == FILES | {'train', 'test'}
    report = check_dataset(undisturbed)
    assert report.ok and report.counts == {('train', 0): 2, ('train', 1): 4, ('test', 0): 2, ('test', 1): 4}
    card = json.loads((undisturbed/'card.json').read_text())
    assert (card['licence'], card['images'], card['people'], card['balance']['sex']) == ('CC0-1.0', 12, 4, {'female': 2, 'male': 2})
    assert card['test_ids'] == sorted(report.people['test', 0])


# Accidents

@needs_unix
@needs_mitsuba
def test_killed_at_random_moments(tmp_path, undisturbed):
    out, rng = tmp_path/'pack', random.Random(3)
    for count in (1, 6):
        process = start(out)
        wait_for(lambda: len(images(out)) >= count or process.poll() is not None)
        time.sleep(rng.uniform(0, .4))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert_whole(out)
        assert not (out/'card.json').exists() or len(images(out)) == 12
    assert main(make_words(out)) == 0
    assert contents(out) == contents(undisturbed)


def children(pid):
    """Process ids of the living children of a process, Linux only."""
    return [int(word) for word in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='looks for processes in /proc')


@needs_proc
@needs_mitsuba
def test_workers_die_with_their_parent(tmp_path):
    out = tmp_path/'pack'
    process = start(out)
    wait_for(lambda: images(out) or process.poll() is not None)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, workers)), 30)
    assert 0 < len(images(out)) < 12 and not (out/'card.json').exists()
    assert_whole(out)


@needs_proc
@needs_mitsuba
def test_the_death_of_a_worker_is_reported(tmp_path, undisturbed):
    out = tmp_path/'pack'
    process = start(out)
    wait_for(lambda: images(out) or process.poll() is not None)
    os.kill(max(children(process.pid)), signal.SIGKILL)  # the last one started; the first is multiprocessing's own helper
    _, err = process.communicate()
    assert process.returncode == 2 and 'worker process died' in err and 'Traceback' not in err, err
    assert_whole(out)
    assert main(make_words(out)) == 0 and contents(out) == contents(undisturbed)


@needs_unix
@needs_mitsuba
@pytest.mark.parametrize('early', [True, False])
def test_ctrl_c(tmp_path, undisturbed, early):
    """Early: while the workers still import."""
    out = tmp_path/'pack'
    process = start(out)
    wait_for(lambda: (len(children(process.pid)) > 2 if early else images(out)) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 130 and 'images are missing' in printed and 'Traceback' not in err, printed + err
    assert_whole(out)
    assert not list(out.rglob('*.tmp')) and len(images(out)) < 12
    if not early:
        assert main(make_words(out)) == 0 and contents(out) == contents(undisturbed)


@needs_unix
@needs_mitsuba
def test_a_full_disk(tmp_path, capsys, undisturbed):
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=512k', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('only root may make a small disk')
    try:
        shutil.copytree(undisturbed, disk/'pack', ignore=lambda *_: ['sheet.png', 'card.json', 'b_e'])
        with open(disk/'filler', 'wb', buffering=0) as filler:
            with pytest.raises(OSError):
                while True:
                    filler.write(bytes(4096))
        assert main(make_words(disk/'pack')) == 2
        error = capsys.readouterr().err
        assert 'No space left' in error and 'Traceback' not in error
        assert_whole(disk/'pack')
        (disk/'filler').unlink()
        assert main(make_words(disk/'pack')) == 0 and contents(disk/'pack') == contents(undisturbed)
    finally:
        subprocess.run(['umount', disk], check=True)


@needs_mitsuba
@pytest.mark.parametrize('changes, say', [(('--seed', '1'), 'identity_seed|render_seed|camera'), (('--quality', '80'), 'quality 92 there, 80 now'),
                                          (('--identities', '5'), '12 rows there, 15 now'), (('--test', '1'), 'file')])
def test_other_arguments_are_refused(capsys, undisturbed, changes, say):
    before = contents(undisturbed)
    assert main([*make_words(undisturbed), *changes]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r'twocet: error: .*images.csv.*\n', error) and re.search(say, error) and 'mend' in error
    assert contents(undisturbed) == before


@needs_mitsuba
def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path/'diary.txt').write_text('dear diary')
    for out in (tmp_path, tmp_path/'diary.txt'):
        assert main(make_words(out)) == 2
        assert 'name a new folder' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['diary.txt']


@needs_mitsuba
def test_other_code_may_not_go_on(tmp_path, capsys, undisturbed):
    out = tmp_path/'pack'
    shutil.copytree(undisturbed, out)
    shots = read_plan(out)
    (out/shots[-1].file).unlink()
    (out/shots[-2].file).write_bytes(encode(replace(shots[-2], samples=2)))  # as code would that draws differently
    assert main(make_words(out)) == 2
    assert 'differently' in capsys.readouterr().err


# Truth

@needs_mitsuba
def test_truth(undisturbed):
    pairs = pack.truth_pairs(undisturbed, 4)
    assert len({(a.file, b.file) for a, b in pairs}) == 4 and pairs == pack.truth_pairs(undisturbed, 4)
    for a, b in pairs:
        shot = pack.truth_shot(undisturbed/a.file, undisturbed/b.file)
        assert (shot.person, shot.camera, shot.expression) == (a.person, a.camera, b.expression) and a.person != b.person
        assert a.file.startswith('test/a_n') and b.file.startswith('test/b_e')
        assert face_name(shot.file) == (face_name(a.file)[0], face_name(b.file)[1])
    same = pack.truth_pairs(undisturbed, 4, own=True)
    assert len({(a.file, b.file) for a, b in same}) == 4 and all(a.person == b.person for a, b in same)
    with pytest.raises(InputError, match='5 pairs'):
        pack.truth_pairs(undisturbed, 5, own=True)
    own = read_row(undisturbed, pairs[0][0].file)
    assert pack.truth(own, own).tobytes() == own.render().tobytes()
    assert pack.truth(own, own, size=48).size == (48, 48)


@needs_mitsuba
def test_an_answer_with_other_noise_and_its_masks(undisturbed):
    """The masks are saved without loss; a part counts where it is before or after."""
    target, reference = pack.truth_pairs(undisturbed, 1)[0]
    answer, again, mask = pack.truth_shots(target, reference)
    assert answer == pack.truth_shot(target, reference) == replace(again, file=answer.file, render_seed=answer.render_seed)
    assert [Path(shot.file).parts for shot in (again, mask)] == [('again', answer.file), ('masks', answer.file)]
    assert again.render().tobytes() != answer.render().tobytes()
    parts = np.array(mask.render())
    with Image.open(io.BytesIO(encode(mask))) as saved:
        assert (np.array(saved) == parts).all()
    for expression in (target.expression, reference.expression):
        alone = masks(target.person, expression, target.camera, size=target.size)
        assert all((parts[..., i] >= np.array(alone[part])).all() and parts[..., i].any() for i, part in enumerate(('face', 'eyes', 'mouth')))


@needs_mitsuba
def test_make_truth_goes_on_and_travels(tmp_path, undisturbed):
    root = tmp_path/'pack'
    shutil.copytree(undisturbed, root)
    assert pack.make_truth(root, root/'truth', 4, 2, workers=1, quiet=True) == 0
    whole = contents(root/'truth')
    assert len(whole) == 3*6 + 2 and json.loads(whole['card.json'])['images'] == 18
    for path in images(root/'truth')[::5]:
        path.unlink()
    assert pack.make_truth(root, root/'truth', 4, 2, workers=1, quiet=True) == 0 and contents(root/'truth') == whole
    for n, own in (3, 2), (4, 1):
        with pytest.raises(InputError, match='there'):
            pack.make_truth(root, root/'truth', n, own, workers=1, quiet=True)
    pack.zip_pack(root, tmp_path/'one.zip')
    shutil.copytree(root, tmp_path/'copy')
    pack.zip_pack(tmp_path/'copy', tmp_path/'two.zip')
    assert (tmp_path/'one.zip').read_bytes() == (tmp_path/'two.zip').read_bytes()
    shutil.unpack_archive(tmp_path/'one.zip', tmp_path/'unpacked')
    assert contents(tmp_path/'unpacked') == {name: content for name, content in contents(root).items() if name != 'sheet.png'}
    assert read_plan(tmp_path/'unpacked') == read_plan(root)


@needs_mitsuba
@pytest.mark.parametrize('words, say', [('faces', 'COMMAND'), ('faces make out', '--identities'), ('faces make --identities 4 --protocol film out', 'film'),
                                        ('faces make --identities 4 --workers 0 out', '0 workers'), ('faces make --identities 1 out', 'at least one')])
def test_wrong_words(tmp_path, monkeypatch, capsys, words, say):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words.split())
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and re.fullmatch(r'twocet: error: .+\n', error) and say in error
    assert not Path('out').exists()


@needs_mitsuba
def test_a_pack_with_a_mimic(tmp_path, capsys):
    assert main([*make_words(tmp_path/'pack'), '--still', '--mimics', '1']) == 0
    shots = read_plan(tmp_path/'pack')
    performed = {shot.file: shot for shot in shots}
    mine = [shot for shot in shots if face_name(shot.file)[0] == '005']
    assert len(shots) == 4 * 3 + 1 + 8 and len(images(tmp_path/'pack')) == 12 + 1 + 4, 'two people and two expressions give four performances'
    for shot in mine[1:]:
        whom = shot.file.replace('005_', '')
        assert shot.expression == performed[whom].expression and shot.camera == mine[0].camera and whom.startswith('train/')
    assert json.loads((tmp_path/'pack/card.json').read_text(encoding='utf-8'))['mimics'] == 1


def test_mimics_need_one_camera(tmp_path):
    with pytest.raises(InputError, match='protocol cfee'):
        pack.make(tmp_path/'pack', 4, 'rafd', copies=1)
