"""Several processes train like one: two gloo processes on the CPU against a single one at the same total batch."""
import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

from twocet_nb.config import preset
from twocet_nb.data import InputError, share_of
from twocet_nb.networks import load_networks
from twocet_nb.trainer import make_batches

STEPS = 4
PROGRAM = textwrap.dedent('''
    import sys
    from twocet_nb.config import preset
    from twocet_nb.losses import LossConfig, Schedule
    from twocet_nb.trainer import Trainer
    on = Schedule.constant(1.)
    losses = LossConfig(cyc_e=on, code=on, ds=Schedule(((0, 1.), (1, 1.), (2, 0.))), r1=.3)
    folder, steps, resume = sys.argv[1], int(sys.argv[2]), len(sys.argv) > 3
    quick = dict(lr_generator=1e-4, lr_encoder=1e-4, lr_discriminator=1e-4, eval_every=2, best_by='number')
    numbers = lambda run: dict(number=abs(run.step - 2))
    if resume: run = Trainer.resume(folder, quiet=True, evaluate=numbers, steps=steps)
    else: run = Trainer(preset('tiny', steps=steps, losses=losses, device='cpu', **quick), folder, quiet=True, evaluate=numbers)
    run.fit()
''')


@pytest.fixture(scope='module')
def train(tmp_path_factory):
    """Run the program in one process or in two."""
    script = tmp_path_factory.mktemp('program')/'train.py'
    script.write_text(PROGRAM)
    def run(processes, *words):
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
        done = subprocess.run([sys.executable, *launcher, str(script), *map(str, words)], capture_output=True, text=True,
                              timeout=600, env=os.environ | dict(OMP_NUM_THREADS='1'))
        assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture(scope='module')
def runs(tmp_path_factory, train):
    folder = tmp_path_factory.mktemp('runs')
    for processes in (1, 2): train(processes, folder/str(processes), STEPS)
    return folder


def records(run, name='history'):
    return [json.loads(line) for line in (run/f'{name}.jsonl').read_text().splitlines()]


def test_losses_are_those_of_one_process(runs):
    one, two = records(runs/'1'), records(runs/'2')
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and {'d_e', 'd_n', 'cyc_e'} <= a.keys()
        for name in a.keys() - {'seconds'}: assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), (a['step'], name)
    assert {'r1_e', 'r1_n'} <= set().union(*one)


def answers(run, name, step=STEPS):
    """What a network makes of fixed inputs. (Weights differ a little more: biases before a norm have a gradient of
    rounding errors alone, which Adam turns into full steps that change no picture.)"""
    config, networks = load_networks(run/f'checkpoints/step-{step:06d}/{name}.safetensors')
    faces = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    more = dict(generator=(torch.ones(4, config.code_dim) / 4,), discriminator=(None,)).get(name.removesuffix('_ema'), ())
    with torch.no_grad(): return networks[name](faces, *more)


@pytest.mark.parametrize('name', ['generator', 'encoder', 'discriminator', 'generator_ema', 'encoder_ema'])
def test_networks_are_those_of_one_process(runs, name):
    one, two, start = answers(runs/'1', name), answers(runs/'2', name), answers(runs/'1', name, 0)
    assert (one - start).norm() > 0 and (one - two).norm() < .02 * (one - start).norm()


def test_two_processes_resume_what_one_began_and_the_other_way_round(tmp_path, train, runs):
    for first, then in ((1, 2), (2, 1)):
        run = tmp_path/f'{first}{then}'
        train(first, run, STEPS // 2)
        train(then, run, STEPS, 'resume')
        for a, b in zip(records(runs/'1'), records(run), strict=True):
            assert a['d_e'] == pytest.approx(b['d_e'], rel=2e-3) and a['cyc_n'] == pytest.approx(b['cyc_n'], rel=2e-3)


def test_only_the_first_process_writes(runs):
    assert [r['step'] for r in records(runs/'2', 'evaluations')] == [2, 4]
    assert (runs/'2/checkpoints/best').read_text() == 'step-000002'


LAUNCHER = textwrap.dedent('''
    import sys
    from accelerate import notebook_launcher
    def train(folder):
        from twocet_nb.config import preset
        from twocet_nb.trainer import Trainer
        Trainer(preset('tiny', steps=2, device='cpu'), folder, quiet=True).fit()
    if __name__ == '__main__': notebook_launcher(train, (sys.argv[1],), num_processes=2, use_port=sys.argv[2])
''')


def test_notebook_launcher(tmp_path):
    (tmp_path/'launch.py').write_text(LAUNCHER)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    done = subprocess.run([sys.executable, tmp_path/'launch.py', tmp_path/'run', str(port)], capture_output=True, text=True, timeout=600,
                          env=os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r['step'] for r in records(tmp_path/'run')] == [1, 2]


def test_shares_never_overlap_and_miss_nothing():
    config = preset('tiny', batch_size=6)
    whole = make_batches(config, 'cpu')
    parts = [make_batches(config, 'cpu', rank, 3) for rank in range(3)]
    for number in (0, 1, 40):
        for face_type in (0, 1):
            assert torch.equal(torch.cat([part[number][face_type] for part in parts]), whole[number][face_type])
    taken = [set(range(6)[share_of(6, rank, 3)]) for rank in range(3)]
    assert set.union(*taken) == set(range(6)) and sum(map(len, taken)) == 6


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(InputError, match='multiple of 3'): make_batches(preset('tiny', batch_size=4), 'cpu', 0, 3)
