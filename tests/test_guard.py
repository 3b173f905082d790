"""What the notebook 04c_guard cannot test: locks between processes that are killed and forked, and runs that are damaged."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from twocet_nb import guard
from twocet_nb.cli import main
from twocet_nb.config import TrainConfig, preset, write_config
from twocet_nb.data import InputError
from twocet_nb.guard import RunLock, data_hash, differences, is_locked, list_runs, print_runs, record_sitting
from twocet_nb.losses import LossConfig, Schedule
from twocet_nb.networks import NetworkConfig

posix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')


# A holder that forks two workers, as a DataLoader does: one ends, the other lets go of what it inherited and lives on.
HOLDER = '''
import os, sys, time
from twocet_nb.guard import RunLock
lock = RunLock(sys.argv[1]).acquire()
ending = os.fork()
if not ending: sys.exit()
os.waitpid(ending, 0)
living = os.fork()
if not living: lock.release()
else: print(living, flush=True)
time.sleep(600)
'''


@posix
def test_a_lock_belongs_to_one_process_and_not_to_its_workers(tmp_path):
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        assert is_locked(tmp_path), 'whatever its workers do'
        with pytest.raises(InputError, match=rf'another process \(pid {holder.pid} on .* since .*\) is training here; mend'):
            RunLock(tmp_path).acquire()
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # is still alive
        assert not is_locked(tmp_path)
        with RunLock(tmp_path):
            assert f'pid {os.getpid()} ' in (tmp_path/'.holder').read_text()
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
        holder.communicate()


@pytest.mark.parametrize('error', [PermissionError(errno.EACCES, 'Permission denied'), OSError(errno.EROFS, 'Read-only file system'),
                                   OSError(errno.ENOLCK, 'No locks available'), NotImplementedError('no flock')])
def test_a_folder_that_takes_no_lock_is_named(tmp_path, monkeypatch, error):
    (tmp_path/'.lock').touch()
    monkeypatch.setattr(guard.FileLock, 'acquire', lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match='cannot be locked.*mend: choose a folder on a local disk'):
        RunLock(tmp_path).acquire()
    assert not is_locked(tmp_path)


def test_a_full_disk_takes_the_name_but_not_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device')))
    with RunLock(tmp_path), pytest.raises(InputError, match='another process is training here'):
        RunLock(tmp_path).acquire()


def test_looking_leaves_nothing_behind(tmp_path):
    assert not is_locked(tmp_path) and list(tmp_path.iterdir()) == []


def wait_for(path, process):
    end = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, f'{path} did not appear'
        time.sleep(.01)


@posix
def test_two_trainings_in_one_folder(tmp_path, few_faces, capsys):
    run = tmp_path/'runs/mine'
    words = ['train', '--data', str(few_faces), '--preset', 'tiny', '--device', 'cpu', '--save-every', '1', '--run', str(run)]
    first = subprocess.Popen([sys.executable, '-m', 'twocet_nb.cli', *words, '--steps', '100000'])
    try:
        wait_for(run/'checkpoints/step-000001', first)
        assert main(words) == 2
        error = capsys.readouterr().err
        assert ('another process (pid' in error or 'lives here already' in error) and error.count('\n') == 1
        assert main(['resume', str(run)]) == 2
        error = capsys.readouterr().err
        assert f'another process (pid {first.pid} on ' in error and error.count('\n') == 1
        assert first.poll() is None, 'the first trains on'
        assert [info.state for info in list_runs(run.parent)] == ['training']
    finally:
        first.kill()
        first.communicate()
    step = list_runs(run.parent)[0].step
    assert main(['resume', str(run), '--steps', str(step + 2)]) == 0
    assert [(info.state, info.step) for info in list_runs(run.parent)] == [('finished', step + 2)]


CHANGES = dict(precision='bf16', device='cpu', memory='workers', workers=2, log_every=1, sample_every=7, save_every=7, keep=0, data='faces-64',
               losses=replace(LossConfig.paper(), ds=Schedule.constant(2.)), steps=7, batch_size=4, lr_generator=1., lr_encoder=1.,
               lr_discriminator=1., lr_fall=.5, beta1=.5, weight_decay=0., ema_decay=.5, codes='gaussian', seed=7, start_from='faces-64')


@pytest.mark.parametrize('name', CHANGES)
def test_every_change_is_one_line(name):
    line, = differences(TrainConfig(), TrainConfig(**{name: CHANGES[name]}))
    assert line.startswith(name) and ' -> ' in line and ': ' in line and '\n' not in line


def test_other_networks_are_refused_with_both_values():
    with pytest.raises(InputError, match=r'network.image_size 128 -> 64; network.width 128 -> 16; network.he_init False -> True: .*mend'):
        differences(TrainConfig(), TrainConfig(network=NetworkConfig(64, 16, he_init=True)))


def test_another_optimizer_is_refused():
    with pytest.raises(InputError, match='optimizer adam -> muon: .*moments its own optimizer; mend'):
        differences(TrainConfig(), TrainConfig(optimizer='muon'))


def test_the_hash_sees_names_types_and_contents(tmp_path, few_faces):
    def changed(what):
        shutil.rmtree(tmp_path/'copy', ignore_errors=True)
        copy = Path(shutil.copytree(few_faces, tmp_path/'copy'))
        what(copy/'train/a_n', copy/'train/b_e')
        return data_hash(copy)

    def swap(folder, _):
        one, two = sorted(folder.iterdir())[:2]
        content = one.read_bytes()
        shutil.copy(two, one), two.write_bytes(content)

    def move(neutral, emotional):
        path = sorted(neutral.iterdir())[0]
        path.rename(emotional/path.name)
    unseen = [lambda a, b: None, lambda a, b: (a/'Thumbs.db').write_bytes(b'x'), lambda a, b: (a.parent/'images.csv').write_text('x'),
              lambda a, b: os.utime(next(a.iterdir()), (0, 0))]
    seen = [swap, move, lambda a, b: next(b.iterdir()).unlink(), lambda a, b: shutil.rmtree(a.parents[1]/'test')]
    assert {changed(what) for what in unseen} == {data_hash(few_faces)}
    assert len({data_hash(few_faces), *map(changed, seen)}) == 1 + len(seen)


def test_sittings_survive_a_crash_in_the_middle_of_a_line(tmp_path):
    record_sitting(tmp_path, 0)
    with open(tmp_path/'sittings.jsonl', 'a') as file:
        file.write('{"step": 5, "wh')
    record_sitting(tmp_path, 7, data='abc', changes=['steps 1 -> 2: the run ends there'])
    lines = [json.loads(line) for line in (tmp_path/'sittings.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [0, 7] and lines[1]['data'] == 'abc' and len(lines[1]['changes']) == 1


def test_a_damaged_run_does_not_hide_the_others(tmp_path, capsys):
    for name in ('a', 'b', 'c', 'd'):
        write_config(preset('tiny'), tmp_path/name)
    (tmp_path/'b/config.json').write_bytes(b'\xff\x00')
    (tmp_path/'c/history.jsonl').write_text('{"step": 1\n')
    (tmp_path/'d/config.json').unlink()
    (tmp_path/'d/checkpoints/step-000004').mkdir(parents=True)
    os.utime(tmp_path/'d/checkpoints/step-000004', (100, 100))
    (tmp_path/'.hidden').mkdir(), (tmp_path/'file').touch()
    runs = list_runs(tmp_path, now=160)
    assert [(run.name, run.state, run.step, run.age) for run in runs] == [
        ('a', 'new', 0, None), ('b', 'damaged', 0, None), ('c', 'damaged', 0, None), ('d', 'damaged', 4, 60)]
    print_runs(runs)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and 'config.json' in lines[5] and 'line 1' in lines[6] and 'no run here' in lines[7]


def test_a_run_that_got_over_its_divergence_is_not_diverged(tmp_path):
    write_config(preset('tiny', steps=20), tmp_path/'a')
    (tmp_path/'a/diverged-000012').mkdir()
    for step, state in ((10, 'diverged'), (11, 'stopped'), (20, 'finished')):
        folder = tmp_path/f'a/checkpoints/step-{step:06d}'
        folder.mkdir(parents=True)
        os.utime(folder, (1000 + step,) * 2), os.utime(tmp_path/'a/diverged-000012', (1010.5,) * 2)
        assert list_runs(tmp_path)[0].state == state
