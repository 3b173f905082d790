"""What the notebook 04a_runs cannot test: processes that are really killed, a disk that is really full, every kind of damage."""
import errno
import io
import json
import os
import pickle
import shutil
import signal
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from twocet_nb import runs
from twocet_nb.data import InputError
from twocet_nb.networks import NetworkConfig, build_networks
from twocet_nb.runs import (History, LiveView, SyntheticImage, best_checkpoint, finish_on_interrupt, latest_checkpoint,
                            load_checkpoint, mark_best, open_networks, prune_checkpoints, save_checkpoint, save_picture)
from twocet_nb.transfer import TwoCET

TINY = NetworkConfig.tiny()
PARTS = {'generator.safetensors', 'encoder.safetensors', 'discriminator.safetensors', 'training.pt'}


@pytest.fixture(scope='module')
def networks():
    return build_networks(TINY)


@pytest.fixture
def run_dir(tmp_path, networks):
    """A run with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path/f'run/checkpoints/step-{step:06d}', networks, TINY, dict(step=step))
    return tmp_path/'run'


def contents(folder):
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


# A child saves and prunes until it is killed.
KILLING = '''
from twocet_nb.networks import NetworkConfig, build_networks
from twocet_nb.runs import *
from twocet_nb.runs import _checkpoints

run, config = Path(sys.argv[1]), NetworkConfig.tiny()
networks = build_networks(config)
parts = {f'{name}.safetensors' for name in networks} | {'training.pt'}

def train(first, last=None):
    for step in itertools.count(first):
        save_checkpoint(run/f'checkpoints/step-{step:06d}', networks, config, dict(step=step))
        prune_checkpoints(run, 2)
        if step == last: return

def look():
    for folder in _checkpoints(run/'checkpoints'):
        assert {path.name for path in folder.iterdir()} == parts, sorted(folder.iterdir())
        assert load_checkpoint(folder, networks)['step'] == int(folder.name[5:])

train(1, 2)
calls = 0
def one_save_dying_at():
    die_at_call(calls)
    train(newest + 1, newest + 1)
while True:
    calls, newest = calls + 1, int(latest_checkpoint(run).name[5:])
    if not trial(one_save_dying_at, look): break
litter, luck = 0, random.Random(0)
for _ in range(10):
    newest = int(latest_checkpoint(run).name[5:])
    assert trial(lambda: train(newest + 1), look, luck.uniform(0, .06))
    litter += any((run/'checkpoints').glob('.*'))
train(newest + 10, newest + 10)
assert not any((run/'checkpoints').glob('.*')), 'the next save sweeps'
print(calls, litter)
'''


def test_a_killed_process_never_leaves_half_a_checkpoint(forked, tmp_path):
    calls, litter = forked(KILLING, tmp_path/'run')
    assert calls > 15, 'killed at every call of a save and a prune'
    assert litter, 'some of the random moments were in the middle'


def test_a_full_disk_leaves_earlier_checkpoints_and_no_scratch(full_disk, networks):
    checkpoints = full_disk/'run/checkpoints'
    save_checkpoint(checkpoints/'step-000001', networks, TINY, dict(step=1))
    before = contents(full_disk)
    with pytest.raises(InputError, match='step-000002: not saved, and earlier checkpoints are untouched.*No space.*mend'):
        save_checkpoint(checkpoints/'step-000002', networks, TINY, dict(step=2, moments=torch.zeros(100_000)))
    assert contents(full_disk) == before and sorted(os.listdir(checkpoints)) == ['latest', 'step-000001']
    assert load_checkpoint(latest_checkpoint(full_disk/'run'), networks) == dict(step=1)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_stops_the_history_and_does_not_glue_lines(tmp_path):
    history = History(tmp_path/'history.jsonl')
    history.append(dict(step=1))
    history.path.rename(tmp_path/'aside')
    history.path.symlink_to('/dev/full')
    with pytest.raises(InputError, match='history.jsonl: no line could be added.*No space.*mend'):
        history.append(dict(step=2))
    history.path.unlink()
    history.path.write_text('{"step": 1}\n{"st')  # the part of the line that still had room
    history.append(dict(step=3))
    assert history.path.read_text() == '{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize('part', sorted(PARTS))
@pytest.mark.parametrize('keep', [0, 1, .5, -1, None])
def test_a_damaged_checkpoint_is_named_with_the_one_to_fall_back_to(run_dir, part, keep):
    damaged = run_dir/'checkpoints/step-000002'/part
    whole = damaged.read_bytes()
    if keep is None:
        damaged.unlink()
    else:
        damaged.write_bytes(whole[:int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(InputError) as caught:
        load_checkpoint(latest_checkpoint(run_dir), build_networks(TINY, seed=1))
    message = str(caught.value)
    assert str(damaged) in message and 'delete step-000002 and resume from step-000001' in message and '\n' not in message


def test_the_only_checkpoint_has_none_to_fall_back_to(run_dir, networks):
    shutil.rmtree(run_dir/'checkpoints/step-000001')
    (run_dir/'checkpoints/step-000002/training.pt').write_bytes(b'')
    with pytest.raises(InputError, match='delete step-000002 and start anew'):
        load_checkpoint(latest_checkpoint(run_dir), networks)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('write', [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_hostile_checkpoint_runs_nothing(run_dir, networks, tmp_path, write):
    for name in ('training.pt', 'encoder.safetensors'):
        path = run_dir/'checkpoints/step-000002'/name
        whole = path.read_bytes()
        write({'step': Hostile(tmp_path/'owned')}, path)
        with pytest.raises(InputError, match=name):
            load_checkpoint(run_dir/'checkpoints/step-000002', networks)
        path.write_bytes(whole)
    assert not (tmp_path/'owned').exists()


def test_networks_of_another_size_are_refused(run_dir):
    other = build_networks(NetworkConfig(image_size=16, width=8, max_width=16, code_dim=4))
    with pytest.raises(InputError, match='do not fit'):
        load_checkpoint(latest_checkpoint(run_dir), other)


def test_optimisers_come_back_to_the_last_bit(tmp_path, networks):
    network = networks['encoder']
    adam = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0., .99))
    network(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).sum().backward()
    adam.step()
    save_checkpoint(tmp_path/'run/checkpoints/step-000001', {'encoder': network}, TINY, dict(optimizer=adam.state_dict()))
    back = load_checkpoint(tmp_path/'run/checkpoints/step-000001', {'encoder': network})['optimizer']
    for index, state in adam.state_dict()['state'].items():
        assert all(torch.equal(state[name], back['state'][index][name]) for name in ('step', 'exp_avg', 'exp_avg_sq'))


def test_only_whole_checkpoints_count_and_by_number(run_dir):
    checkpoints = run_dir/'checkpoints'
    for name in ('step-1000000', 'step-999999', '.step-2000000.tmp', 'step-3000000 (copy)', 'step-', 'step-x'):
        (checkpoints/name).mkdir()
    (checkpoints/'step-4000000').write_text('a file')
    assert latest_checkpoint(run_dir).name == 'step-1000000'
    prune_checkpoints(run_dir, keep=1)
    assert {path.name for path in checkpoints.glob('step-*')} == {'step-1000000', 'step-3000000 (copy)', 'step-', 'step-x',
                                                                  'step-4000000'}


@pytest.mark.parametrize('missing', ['', 'nowhere'])
def test_no_checkpoint(tmp_path, missing):
    with pytest.raises(InputError, match='no checkpoint here; mend'):
        latest_checkpoint(tmp_path/missing)
    prune_checkpoints(tmp_path/missing, keep=1)


def test_the_best_checkpoint_is_never_pruned(run_dir, networks):
    mark_best(run_dir, 'step-000001')
    for step in (3, 4):
        save_checkpoint(run_dir/f'checkpoints/step-{step:06d}', networks, TINY, dict(step=step))
        prune_checkpoints(run_dir, keep=1)
        names = {path.name for path in (run_dir/'checkpoints').glob('step-*')}
        assert names == {'step-000001', f'step-{step:06d}'}
    mark_best(run_dir, run_dir/'checkpoints/step-000004')
    prune_checkpoints(run_dir, keep=1)
    assert [path.name for path in (run_dir/'checkpoints').glob('step-*')] == ['step-000004'], 'no longer the best'


def test_a_mark_is_whole_or_not_there(run_dir, monkeypatch):
    mark_best(run_dir, 'step-000001')
    monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device')))
    with pytest.raises(InputError, match='best.*untouched'):
        mark_best(run_dir, 'step-000002')
    assert best_checkpoint(run_dir) == run_dir/'checkpoints/step-000001'


@pytest.mark.parametrize('content', [b'', b'step-000009', b'.step-000001.tmp', b'../checkpoints/step-000001', b'\xff\xfe'])
def test_a_pointer_to_nothing_is_no_best_checkpoint(run_dir, content):
    (run_dir/'checkpoints/best').write_bytes(content)
    assert best_checkpoint(run_dir) is None
    with pytest.raises(InputError, match='best.*mend'):
        open_networks(run_dir/'checkpoints/best', ['generator'])
    prune_checkpoints(run_dir, keep=1)
    assert latest_checkpoint(run_dir).name == 'step-000002'


def test_pointers_open_what_they_name(run_dir, networks):
    changed = build_networks(TINY, seed=1)
    changed |= {f'{name}_ema': changed[name] for name in ('generator', 'encoder')}
    save_checkpoint(run_dir/'checkpoints/step-000003', changed, TINY, dict(step=3))
    assert TwoCET.load(run_dir/'checkpoints/latest', 'cpu').config == TINY
    mark_best(run_dir, 'step-000001')
    for pointer, wanted in dict(best=networks, latest=changed).items():
        found = open_networks(str(run_dir/'checkpoints'/pointer), ['encoder'])[1]['encoder']
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted['encoder'].parameters()))


def test_saving_again_changes_nothing_but_mends_latest(run_dir, networks):
    before = contents(run_dir)
    (run_dir/'checkpoints/latest').unlink()
    save_checkpoint(run_dir/'checkpoints/step-000002', networks, TINY, dict(step='other'))
    assert contents(run_dir) == before


def test_the_name_is_on_disk_before_an_older_checkpoint_goes(run_dir, networks, monkeypatch):
    if not os.path.isdir('/proc/self/fd'):
        pytest.skip('needs /proc to tell which file is synced')
    events, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (events.append(('sync', Path(os.readlink(f'/proc/self/fd/{fd}')).name)), sync(fd)))
    monkeypatch.setattr(os, 'replace', lambda old, new: (events.append(('rename', Path(new).name)), rename(old, new)))
    save_checkpoint(run_dir/'checkpoints/step-000003', networks, TINY, dict(step=3))
    prune_checkpoints(run_dir, keep=2)
    order = [events.index(event) for event in (('rename', 'training.pt'), ('sync', '.step-000003.tmp'), ('rename', 'step-000003'),
                                               ('sync', 'checkpoints'), ('rename', '.step-000001.tmp'))]
    assert order == sorted(order)


def test_an_interrupt_while_saving_leaves_no_scratch(run_dir, networks, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    before = contents(run_dir)
    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(run_dir/'checkpoints/step-000003', networks, TINY, dict(step=3))
    assert contents(run_dir) == before and not list((run_dir/'checkpoints').glob('.*'))


@pytest.mark.parametrize('tail', [b'{"step": 3, "d_', b'{"step": 3}', b'\0' * 50, b'\xff\xfe\x0b\x1c"'])
def test_what_a_crash_leaves_after_the_last_newline_is_dropped(tmp_path, tail):
    path = tmp_path/'history.jsonl'
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    history = History(path)
    assert history.records == [dict(step=1), dict(step=2)] and path.read_bytes().endswith(tail), 'reading changes nothing'
    history.append(dict(step=3))
    assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize('line', ['{"step": 2', '5', '[]', 'null', '{"d_e": 1}', '{"step": "two"}', '', '<<<<<<< HEAD'])
def test_an_edited_line_is_named(tmp_path, line):
    (tmp_path/'history.jsonl').write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match='history.jsonl, line 2: .*mend'):
        History(tmp_path/'history.jsonl')


def test_a_history_draws_itself_with_and_without_records(tmp_path):
    history = History(tmp_path/'new/history.jsonl')
    empty = Image.open(io.BytesIO(history._repr_png_())).size
    history.append(dict(step=1, seconds=.5, identity=.3))
    assert Image.open(io.BytesIO(history._repr_png_())).size == empty, 'a live view must not jump'


@pytest.mark.parametrize('place', ['', 'checkpoints/step-000001', 'file'])
def test_networks_are_found_anywhere(run_dir, networks, place):
    runs.save_networks(run_dir/'file', TINY, {'generator': networks['generator'], 'encoder': networks['encoder']})
    config, found = open_networks(str(run_dir/place), ['encoder', 'generator'])
    assert config == TINY and list(found) == ['encoder', 'generator']
    assert all(torch.equal(a, b) for a, b in zip(found['encoder'].parameters(), networks['encoder'].parameters()))
    with pytest.raises(InputError, match='encoder_ema'):
        open_networks(run_dir/place, ['encoder_ema'])


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'jpeg', 'webp', 'PNG'])
def test_the_mark_is_in_every_file_however_it_is_saved(tmp_path, suffix):
    picture = SyntheticImage.mark(Image.new('RGB', (8, 8), 'red'))
    picture.save(tmp_path/f'a.{suffix}', exif=Image.Exif())  # not even an empty exif of one's own takes it away
    save_picture(Image.new('RGB', (8, 8)), tmp_path/f'new/b.{suffix}')
    buffer = io.BytesIO()
    picture.save(buffer, {'JPG': 'JPEG'}.get(suffix.upper(), suffix.upper()))
    for file in (tmp_path/f'a.{suffix}', tmp_path/f'new/b.{suffix}', buffer):
        assert Image.open(file).getexif()[0x010E] == runs.SYNTHETIC


def test_pictures_without_a_mark_are_refused(tmp_path):
    picture = SyntheticImage.mark(Image.new('RGB', (8, 8)))
    for save in (lambda: picture.save(tmp_path/'a.bmp'), lambda: picture.save(tmp_path/'a.png', 'BMP'),
                 lambda: picture.save(io.BytesIO(), 'GIF'), lambda: save_picture(picture, tmp_path/'a.gif'),
                 lambda: save_picture(picture, tmp_path/'a')):
        with pytest.raises(InputError, match='mend'):
            save()
    assert not list(tmp_path.iterdir())
    assert 'synthetic' in Image.open(io.BytesIO(picture._repr_png_())).text['Comment'], 'what Jupyter shows, too'


def test_the_second_interrupt_interrupts():
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), finish_on_interrupt() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.is_set()
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)


def test_a_run_in_a_thread_is_just_not_stopped():
    seen = []

    def work():
        with finish_on_interrupt() as stop:
            seen.append(stop.is_set())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_live_view_draws_once_and_then_redraws(monkeypatch):
    shown = []
    handle = types.SimpleNamespace(update=lambda picture: shown.append(('update', picture)))

    def display(picture, display_id):
        shown.append(('display', picture))
        return handle
    notebook = types.SimpleNamespace(kernel='a kernel')
    ipython = types.SimpleNamespace(get_ipython=lambda: notebook, display=types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, 'IPython', ipython)
    view = LiveView()
    view.show(1), view.show(2)
    notebook.kernel = None  # a terminal
    view.show(3)
    assert shown == [('display', 1), ('update', 2)]
