"""The command line: what it does, its exit codes, and one line for every mistake."""
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from twocet_nb import __version__
from twocet_nb.cli import main
from twocet_nb.data import bundled, face_name, list_faces
from twocet_nb.networks import NetworkConfig, build_networks, save_networks

COMMANDS = 'check', 'prepare', 'train', 'resume', 'transfer', 'import', 'demo'


@pytest.fixture
def fails(twocet):
    """Run a command that must end with exit code 2 and one line on the error stream; return that line."""
    def run(*words):
        code, out, err = twocet(*words)
        assert code == 2, out + err
        assert re.fullmatch(r'twocet: error: .+\n', err), err
        return err
    return run


@pytest.fixture
def faces(here):
    """Two bundled test faces as target.png and reference.png."""
    root = bundled('faces-64')
    shutil.copy(list_faces(root, 'test', 0)[0], 'target.png')
    shutil.copy(list_faces(root, 'test', 1)[30], 'reference.png')


@pytest.fixture
def weights(here):
    """tiny.safetensors: untrained networks of the tiny preset."""
    networks = build_networks(NetworkConfig.tiny())
    save_networks('tiny.safetensors', NetworkConfig.tiny(), {f'{name}_ema': networks[name] for name in ('generator', 'encoder')})


@pytest.fixture
def small(here):
    """A copy of the test split of the bundled faces for three people: the first is in `test`, the others in `train`."""
    root = bundled('faces-64')
    for face_type, folder in enumerate(('a_n', 'b_e')):
        people = sorted({face_name(path)[0] for path in list_faces(root, 'test', face_type)})[:3]
        for path in list_faces(root, 'test', face_type):
            place = here/'small'/('test' if face_name(path)[0] == people[0] else 'train')/folder
            place.mkdir(parents=True, exist_ok=True)
            if face_name(path)[0] in people:
                shutil.copy(path, place)
    return here/'small'


# Help

def test_help_answers_without_pytorch():
    program = "import sys; sys.modules['torch'] = None; from twocet_nb.cli import main; main(['--help'])"
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0 and all(f'\n    {name} ' in done.stdout for name in COMMANDS), done.stderr


@pytest.mark.parametrize('command', COMMANDS)
def test_help_of_a_command(cli, command):
    code, out, err = cli(command, '--help')
    assert code == 0 and not err
    assert out.startswith(f'usage: twocet {command} ') and f'example:\n  twocet {command}' in out


def test_runs_as_a_module(here):
    done = subprocess.run([sys.executable, '-m', 'twocet_nb.cli', '--version'], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f'twocet_nb {__version__}\n')


# check

def test_check_of_bundled_faces(twocet):
    code, out, err = twocet('check', 'faces-64')
    assert code == 0 and not err and 'no problems found' in out


def test_check_of_a_good_folder(cli, small):
    code, out, err = cli('check', small)
    assert code == 0 and not err and re.search(r'train +2 +2 +50', out) and re.search(r'test +1 +1 +25', out)


def test_check_names_each_fault(fails, small, capsys):
    victim, lost = list_faces(small, 'train', 1)[3], list_faces(small, 'test', 0)[0]
    victim.write_bytes(victim.read_bytes()[:200])
    lost.unlink()
    code = main(['check', str(small)])
    out, err = capsys.readouterr()
    assert code == 2 and f'train/b_e/{victim.name}' in out and f'identity {face_name(lost)[0]}: no neutral face' in out
    assert re.fullmatch(r'twocet: error: .+ problem\(s\), listed above\n', err)


def test_check_of_nothing(fails):
    assert 'nowhere' in fails('check', 'nowhere')


# train, resume, transfer: from nothing to a picture

def test_end_to_end(cli, here, small, faces):
    code, out, err = cli('train', '--data', small, '--preset', 'tiny', '--run', 'run', '--steps', 3, '--save-every', 2,
                         '--seed', 5, '--batch-size', 2, '--precision', 'fp32', '--device', 'cpu')
    assert code == 0 and not err and 'step 3 of 3' in out
    config = json.loads((here/'run/config.json').read_text())
    assert (config['seed'], config['batch_size'], config['save_every']) == (5, 2, 2)
    code, out, err = cli('resume', 'run', '--steps', 5)
    assert code == 0 and not err and 'step 5 of 5' in out
    assert [json.loads(line)['step'] for line in (here/'run/history.jsonl').read_text().splitlines()] == [1, 2, 3, 4, 5]
    code, out, err = cli('transfer', '--model', 'run', '--target', 'target.png', '--reference', 'reference.png',
                         '--out', 'new/face.png', '--strength', 1.5)
    assert code == 0 and not err and out.split() == [str(Path('new/face.png'))]
    with Image.open(here/'new/face.png') as picture:
        assert picture.size == (16, 16) and 'synthetic' in picture.text['Comment']


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp'])
def test_transfer_writes_marked_pictures(twocet, faces, weights, suffix):
    code, out, err = twocet('transfer', '--model', 'tiny.safetensors', '--target', 'target.png',
                            '--reference', 'reference.png', '--out', f'out.{suffix}')
    assert code == 0 and not err
    with Image.open(f'out.{suffix}') as picture:
        assert picture.size == (16, 16) and 'synthetic' in picture.getexif()[0x010E]


def test_shipped_weights_are_the_default_and_strength_matters(twocet, faces):
    words = 'transfer', '--target', 'target.png', '--reference', 'reference.png'
    for name, more in dict(one=(), two=('--strength', '1'), zero=('--strength', '0'),
                           emotional=('--target-type', 'emotional')).items():
        assert twocet(*words, '--out', f'{name}.png', *more)[0] == 0
    pixels = {name: Image.open(f'{name}.png').tobytes() for name in ('one', 'two', 'zero', 'emotional')}
    assert pixels['one'] == pixels['two'] and len(set(pixels.values())) == 3


# Mistakes

@pytest.mark.parametrize('words, say', [
    ('', 'COMMAND'),
    ('dance', "'dance'"),
    ('train', '--run'),
    ('train --run r --preset huge', "'huge'"),
    ('train --run r --steps many', "'many'"),
    ('train --run r --preset tiny --steps 0', 'steps'),
    ('train --run r --preset tiny --batch-size -1', 'batch_size'),
    ('train --run r --preset tiny --device toaster', 'toaster'),
    ('train --run r --preset tiny --data nowhere', 'nowhere'),
    ('train --run target.png/r --preset tiny', 'target.png'),
    ('resume nowhere', 'nowhere'),
    ('resume nowhere --steps few', "'few'"),
])
def test_wrong_words(fails, faces, words, say):
    assert say in fails(*words.split())
    assert not Path('r').exists()


def transfer_words(**changes):
    """The words of a transfer that would work, some of them changed."""
    usual = dict(model='tiny.safetensors', target='target.png', reference='reference.png', out='out.png')
    return ['transfer', *(word for name, value in (usual | changes).items() for word in (f'--{name}', str(value)))]


def make_broken_files():
    """Files that somebody might give by mistake, or worse."""
    Image.new('LA', (64, 64)).save('two-channels.png')
    Path('truncated.png').write_bytes(Path('target.png').read_bytes()[:500])
    Path('text.png').write_text('not a picture')
    Path('truncated.safetensors').write_bytes(Path('tiny.safetensors').read_bytes()[:5000])
    Path('empty').mkdir()


@pytest.mark.parametrize('changes, say', [
    (dict(target='absent.png'), 'absent.png'),
    (dict(reference='absent.png'), 'absent.png'),
    (dict(target='two-channels.png'), 'two-channels.png'),
    (dict(reference='truncated.png'), 'truncated.png'),
    (dict(target='text.png'), 'text.png'),
    (dict(target='empty'), 'empty'),
    (dict(model='absent.safetensors'), 'absent.safetensors'),
    (dict(model='truncated.safetensors'), 'truncated.safetensors'),
    (dict(model='target.png'), 'target.png'),
    (dict(model='empty'), 'empty'),
    (dict(strength='strong'), "'strong'"),
    (dict(strength='nan'), 'strength'),
    (dict(strength='inf'), 'strength'),
    ({'target-type': 'sad'}, "'sad'"),
    (dict(out='out.txt'), 'out.txt'),
    (dict(out='out'), 'out'),
    (dict(out='target.png/out.png'), 'target.png'),
    (dict(out='empty'), 'empty'),
])
def test_broken_input(fails, faces, weights, changes, say):
    make_broken_files()
    before = {path: path.is_dir() or path.read_bytes() for path in Path().iterdir()}
    assert say in fails(*transfer_words(**changes))
    assert before == {path: path.is_dir() or path.read_bytes() for path in Path().iterdir()}, 'something was left behind'


class Bomb:
    """Unpickling one runs a command."""
    def __reduce__(self):
        return os.system, ('touch exploded',)


def test_a_hostile_pickle_is_never_run(fails, faces):
    torch.save({'generator': Bomb()}, 'hostile.ckpt')
    Path('hostile.pkl').write_bytes(pickle.dumps(Bomb()))
    for name in ('hostile.ckpt', 'hostile.pkl'):
        assert 'pickle' in fails(*transfer_words(model=name))
        assert not Path('exploded').exists()


def test_weights_of_another_shape(fails, faces):
    tiny = build_networks(NetworkConfig.tiny())
    save_networks('right.safetensors', NetworkConfig.tiny(), {f'{name}_ema': tiny[name] for name in ('generator', 'encoder')})
    content = Path('right.safetensors').read_bytes()
    assert content.count(rb'\"code_dim\": 4') == 1
    Path('other.safetensors').write_bytes(content.replace(rb'\"code_dim\": 4', rb'\"code_dim\": 8'))
    line = fails(*transfer_words(model='other.safetensors'))
    assert 'other.safetensors' in line and 'decode.0.adain1.affine.weight' in line


def test_a_full_disk(twocet, fails, faces, weights, here):
    disk = here/'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', disk], capture_output=True)
    if mounted.returncode:
        pytest.skip('only root may make a small disk')
    try:
        assert twocet(*transfer_words(out='disk/old.png'))[0] == 0
        old = (disk/'old.png').read_bytes()
        with open(disk/'filler', 'wb', buffering=0) as filler:
            filler.write(bytes(20_000))
        for name in ('old.png', 'new.png'):
            assert 'No space left' in fails(*transfer_words(out=f'disk/{name}'))
        assert 'disk' in fails('train', '--preset', 'tiny', '--steps', '1', '--run', 'disk/run')
        assert (disk/'old.png').read_bytes() == old and not (disk/'new.png').exists()
        assert not [path for path in disk.rglob('*') if path.is_file() and path.name not in ('old.png', 'filler', 'config.json', '.lock')]    # an empty .lock takes no space
    finally:
        subprocess.run(['umount', disk], check=True)


def test_a_run_is_not_overwritten(fails, here):
    Path('run/checkpoints/step-000001').mkdir(parents=True)
    Path('run/config.json').write_text('{}')
    assert 'run' in fails('train', '--preset', 'tiny', '--run', 'run')
    assert 'config.json' in fails('resume', 'run')
    assert Path('run/config.json').read_text() == '{}'


# The demo

def test_demo_twice(cli, here):
    for seed in (0, 1):
        code, out, err = cli('demo', '--out', 'show', '--steps', 1)
        assert code == 0 and not err, err
        assert out.startswith('1/5') and out.strip().endswith(str(Path('show/report.html')))
        (here/'show/my-notes.txt').write_text('keep me')
    files = {path.name for path in (here/'show').iterdir()}
    assert files == {'matrix.png', 'strip.png', 'random.png', 'losses.png', 'report.html', 'demo.json', 'training', 'my-notes.txt'}
    page = (here/'show/report.html').read_text(encoding='utf-8')
    assert page.count('data:image/png;base64,') == 4 and not re.search(r'(src|href)="(?!data:)', page)
    for words in ('must not be used', 'synthetic', 'sha256', 'verdict', 'chance: 50%', '1 iteration'):
        assert words in page, words
    for name in ('matrix.png', 'strip.png', 'random.png'):
        with Image.open(here/'show'/name) as picture:
            assert 'synthetic' in picture.text['Comment']


def test_demo_leaves_other_training_alone(fails, here):
    checkpoint = here/'show/training/checkpoints/step-000300'
    checkpoint.mkdir(parents=True)
    assert 'step-000300' in fails('demo', '--out', 'show')
    assert checkpoint.is_dir() and not (here/'show/report.html').exists()


def test_demo_where_nothing_can_be_written(fails, faces):
    assert 'target.png' in fails('demo', '--out', 'target.png/show')
