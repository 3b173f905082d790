"""A training run survives what happens to training runs: SIGKILL, Ctrl-C, damaged files, losses that are not finite."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from twocet_nb.cli import main
from twocet_nb.data import FACE_FOLDERS, SPLITS, InputError, bundled, list_faces
from twocet_nb.trainer import Trainer, TrainingDiverged, preset

STEPS = 12
NETWORKS = {'generator', 'encoder', 'discriminator', 'generator_ema', 'encoder_ema'}
FILES = {'training.pt', *(f'{name}.safetensors' for name in NETWORKS)}

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Bundled faces of two people, one to train on: opening thousands of files would take most of the time here."""
    root, few = bundled('faces-64'), tmp_path_factory.mktemp('few')
    for split in SPLITS:
        for face_type, folder in enumerate(FACE_FOLDERS):
            (few/split/folder).mkdir(parents=True)
            for path in list_faces(root, split, face_type)[:8]:
                shutil.copy(path, few/split/folder)
    return few


@pytest.fixture(scope='module')
def train(data):
    """The words of a training command, but for the folder of the run."""
    return ['train', '--data', str(data), '--preset', 'tiny', '--steps', str(STEPS), '--save-every', '1', '--device', 'cpu', '--run']


def start(*words):
    """Start `twocet` in a process of its own."""
    return subprocess.Popen([sys.executable, '-m', 'twocet_nb.cli', *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def wait_for(path, process, seconds=600):
    """Wait until `path` exists or the process has ended."""
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < end, f'{path} did not appear'
        time.sleep(.002)


def checkpoints(run):
    return sorted((run/'checkpoints').glob('step-*'))


def assert_whole(run):
    """No file or folder that stands under a final name is half written."""
    for folder in checkpoints(run):
        assert {path.name for path in folder.iterdir()} == FILES, folder
        for name in NETWORKS:
            load_file(folder/f'{name}.safetensors')
        assert torch.load(folder/'training.pt', weights_only=True)['step'] == int(folder.name[-6:])
    if (run/'config.json').exists():
        json.loads((run/'config.json').read_text())
    if (run/'checkpoints/latest').exists():
        assert (run/'checkpoints'/(run/'checkpoints/latest').read_text()).is_dir()


def result(run):
    """All that the last step of a run left, as bytes and tensors."""
    folder = run/f'checkpoints/step-{STEPS:06d}'
    networks = {name: (folder/f'{name}.safetensors').read_bytes() for name in NETWORKS}
    training = torch.load(folder/'training.pt', weights_only=True)
    moments = [value for optimizer in training['optimizers'].values() for state in optimizer['state'].values()
               for value in state.values()]
    return networks, torch.cat([torch.as_tensor(value).flatten().float() for value in moments])


def assert_same_result(run, undisturbed):
    (networks, moments), (wanted, wanted_moments) = result(run), result(undisturbed)
    assert [name for name in wanted if networks[name] != wanted[name]] == []
    assert torch.equal(moments, wanted_moments)
    history = [[json.loads(line) for line in (path/'history.jsonl').read_text().splitlines()] for path in (run, undisturbed)]
    for record in history[0] + history[1]:
        del record['seconds']
    assert history[0] == history[1]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, train):
    """A run of `STEPS` steps that nothing happened to."""
    run = tmp_path_factory.mktemp('undisturbed')/'run'
    assert main([*train, str(run)]) == 0
    assert len(list((run/'samples').iterdir())) == STEPS // 10
    return run


def test_killed_at_random_moments(tmp_path, train, undisturbed):
    """With a checkpoint at every step, a good part of the moments fall into the writing of one."""
    run, rng, words, killed = tmp_path/'run', random.Random(2), [*train, tmp_path/'run'], 0
    for step in (1, 4, 7, 9):
        process = start(*words)
        wait_for(run/f'checkpoints/step-{step:06d}', process)
        time.sleep(rng.uniform(0, .25))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        assert_whole(run)
        words = ['resume', run]
    assert killed >= 3
    assert main(['resume', str(run)]) == 0
    assert_whole(run)
    assert_same_result(run, undisturbed)


# Trains in a child for every k and kills it just before its k-th change of a name on the disk. The parent imports PyTorch
# once, and never computes anything: a process that has may not fork.
KILLER = '''
import os, sys
from pathlib import Path
import twocet_nb.trainer
from twocet_nb.cli import main
run, words = Path(sys.argv[1]), sys.argv[2:]
WATCHED = {'rename', 'replace', 'unlink', 'remove', 'rmdir', 'mkdir'}

def killed_at(k, words):
    child = os.fork()
    if child == 0:
        left = [k]
        for name in WATCHED:
            def dying(*args, real=getattr(os, name), **options):
                left[0] -= 1
                if not left[0]: os.kill(os.getpid(), 9)
                return real(*args, **options)
            setattr(os, name, dying)
        os._exit(main(words))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for k in range(1, 100):
    begun = (run/'config.json').exists() and list(run.glob('checkpoints/step-*'))
    code = killed_at(k, ['resume', str(run)] if begun else [*words, str(run), '--steps', '3'])
    print(code, k, *sorted(path.relative_to(run).as_posix() for path in run.rglob('*')), sep='|', flush=True)
    if code != -9: break
sys.exit(code)
'''


def test_killed_before_every_change_on_disk(tmp_path, train):
    """Killed at its first change, resumed and killed at its second, and so on: whole at every point, and done in the end."""
    run = tmp_path/'run'
    done = subprocess.run([sys.executable, '-c', KILLER, run, *train], capture_output=True, text=True)
    lines = [line.split('|') for line in done.stdout.splitlines() if '|' in line]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [code for code, *_ in lines] == ['-9'] * (len(lines) - 1) + ['0'] and len(lines) > 20
    for _, k, *paths in lines:
        folders = [path for path in paths if re.fullmatch(r'checkpoints/step-\d+', path)]
        for folder in folders:
            found = {path.removeprefix(f'{folder}/') for path in paths if path.startswith(f'{folder}/')}
            assert found == FILES, f'{folder} is half there after death {k}'
    assert_whole(run)
    assert not list((run/'checkpoints').glob('.*')), 'rubbish of dead processes'


def test_ctrl_c_saves_and_resume_goes_on(tmp_path, train, undisturbed):
    run = tmp_path/'run'
    process = start(*train, run)
    wait_for(run/'checkpoints/step-000003', process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    stopped = re.search(r'Stopped at step (\d+) of 12; go on with: twocet resume', out)
    assert process.returncode == 130 and stopped and 'Traceback' not in err, out + err
    assert int(checkpoints(run)[-1].name[-6:]) == int(stopped[1]) < STEPS
    assert_whole(run)
    assert main(['resume', str(run)]) == 0
    assert_same_result(run, undisturbed)


@pytest.mark.parametrize('name', ['generator_ema.safetensors', 'training.pt'])
def test_a_damaged_checkpoint_names_the_one_to_fall_back_to(tmp_path, capsys, undisturbed, name):
    run = tmp_path/'run'
    shutil.copytree(undisturbed, run)
    before, newest = checkpoints(run)[-2:]
    (newest/name).write_bytes((newest/name).read_bytes()[:-500])
    assert main(['resume', str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and name in error and newest.name in error and before.name in error, error
    shutil.rmtree(newest)
    assert main(['resume', str(run)]) == 0
    assert_same_result(run, undisturbed)


def test_a_lost_file_counts_as_damage(tmp_path, capsys, undisturbed):
    run = tmp_path/'run'
    shutil.copytree(undisturbed, run)
    (checkpoints(run)[-1]/'encoder.safetensors').unlink()
    assert main(['resume', str(run)]) == 2
    assert 'encoder.safetensors' in capsys.readouterr().err


def test_half_a_line_of_history_is_forgotten(tmp_path, undisturbed):
    run = tmp_path/'run'
    shutil.copytree(undisturbed, run)
    shutil.rmtree(checkpoints(run)[-1])
    lines = (run/'history.jsonl').read_text().splitlines(keepends=True)
    (run/'history.jsonl').write_text(''.join(lines) + lines[-1][:20])
    assert main(['resume', str(run)]) == 0
    assert_same_result(run, undisturbed)


def diverging(run, data, **changes):
    """A run whose first update throws the weights out of all bounds."""
    rates = dict(lr_generator=1e30, lr_discriminator=1e30)
    return Trainer(preset('tiny', data=str(data), steps=STEPS, device='cpu', **rates | changes), run, quiet=True)


def test_divergence_stops_with_a_dump(tmp_path, capsys, data):
    run = tmp_path/'run'
    with pytest.raises(TrainingDiverged, match='not finite') as stopped:
        diverging(run, data).fit()
    dump, = run.glob('diverged-*')
    assert dump.name in str(stopped.value)
    assert {path.name for path in dump.iterdir()} == {'batch.png', 'terms.json'}
    assert_whole(run)
    for folder in checkpoints(run):
        assert all(value.isfinite().all() for value in load_file(folder/'generator.safetensors').values()), folder
    assert main(['resume', str(run)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r'twocet: error: .*not finite.*\n', error), error


def test_a_lower_learning_rate_saves_a_diverged_run(tmp_path, data):
    """What the message about divergence advises must work."""
    run = tmp_path/'run'
    with pytest.raises(TrainingDiverged):
        diverging(run, data, save_every=100).fit()
    assert Trainer.resume(run, quiet=True, lr_generator=1e-4, lr_discriminator=1e-4).fit().step == STEPS


def test_resume_of_a_finished_run_changes_nothing(tmp_path, undisturbed):
    run = tmp_path/'run'
    shutil.copytree(undisturbed, run)
    assert main(['resume', str(run)]) == 0
    assert_same_result(run, undisturbed)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(InputError, match='no run here'):
        Trainer.resume(tmp_path)
    assert not list(Path(tmp_path).iterdir())
