"""What the trainer promises beyond its notebook: precision, memory modes, starting weights, switches."""
import json

import pytest
import torch
from PIL import Image

from twocet_nb.config import preset, read_config
from twocet_nb.data import InputError
from twocet_nb.losses import LossConfig, Schedule
from twocet_nb.trainer import Trainer

ALL_ON = LossConfig(cyc_e=Schedule.constant(1.0), code=Schedule.constant(1.0), ds=Schedule.constant(1.0))


def trained(folder, steps=2, **changes):
    "A tiny run of a few steps with every loss of the paper on."
    config = preset('tiny', **dict(steps=steps, losses=ALL_ON, sample_every=99, save_every=99) | changes)
    return Trainer(config, folder, quiet=True).fit()


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.networks.parameters()])


def test_same_configuration_same_weights(tmp_path):
    assert torch.equal(weights(trained(tmp_path/'a')), weights(trained(tmp_path/'b')))
    assert not torch.equal(weights(trained(tmp_path/'c', seed=1)), weights(trained(tmp_path/'d')))


def test_global_random_state_neither_read_nor_moved(tmp_path):
    torch.manual_seed(1)
    first, state = weights(trained(tmp_path/'a')), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, weights(trained(tmp_path/'b')))


def test_workers_train_like_resident_memory(tmp_path):
    resident = trained(tmp_path/'a', memory='resident')
    assert torch.equal(weights(resident), weights(trained(tmp_path/'b', memory='workers')))


def test_bfloat16_is_close_to_float32_and_keeps_float32_weights(tmp_path):
    full, half = (trained(tmp_path/p, steps=1, precision=p) for p in ('fp32', 'bf16'))
    a, b = full.history.records[0], half.history.records[0]
    assert a != b, 'bf16 changed nothing: autocast is not in use'
    for name in a.keys() - {'step', 'seconds'}:
        assert a[name] == pytest.approx(b[name], rel=.1, abs=.02), name
    assert {p.dtype for p in half.networks.parameters()} == {torch.float32}


def test_two_precisions_in_one_process(tmp_path):
    for i, precision in enumerate(('bf16', 'fp32', 'bf16')):
        run = trained(tmp_path/str(i), steps=1, precision=precision)
        assert (run.accelerator.mixed_precision == 'bf16') == (precision == 'bf16')


def test_gaussian_codes_are_another_run(tmp_path):
    assert not torch.equal(weights(trained(tmp_path/'a', codes='gaussian')), weights(trained(tmp_path/'b')))


@pytest.mark.parametrize('name', ['adv_e', 'adv_n', 'cyc_n', 'cyc_e', 'code', 'ds', 'r1'])
def test_a_loss_switched_off_is_not_computed(tmp_path, name):
    record = trained(tmp_path, steps=1, losses=ALL_ON.without(name)).history.records[0]
    gone = {'adv_e': {'adv_e', 'd_e', 'r1_e'}, 'adv_n': {'adv_n', 'd_n', 'r1_n'}, 'r1': {'r1_e', 'r1_n'}}.get(name, {name})
    everything = {'d_e', 'd_n', 'r1_e', 'r1_n', 'adv_e', 'adv_n', 'cyc_n', 'cyc_e', 'code', 'ds'}
    assert record.keys() - {'step', 'seconds'} == everything - gone


def test_proportional_diversity_is_a_switch(tmp_path):
    plain = LossConfig(**{**ALL_ON.__dict__, 'proportional_diversity': False})
    assert not torch.equal(weights(trained(tmp_path/'a', losses=plain)), weights(trained(tmp_path/'b')))


def test_lazy_r1_is_computed_every_nth_sub_step(tmp_path):
    run = Trainer(preset('tiny', losses=LossConfig(r1_every=4)), tmp_path, quiet=True)
    counts = [len(run.train_step().get('r1_e', [])) for _ in range(4)]
    assert counts == [1, 1, 1, 0]    # sub-steps 0 | 4 | 8 | none of 9, 10, 11


def test_cycles_stand_three_to_two(tmp_path):
    terms = Trainer(preset('tiny', losses=ALL_ON), tmp_path, quiet=True).train_step()
    assert (len(terms['cyc_n']), len(terms['cyc_e'])) == (3, 2)


def test_starts_from_another_run(tmp_path):
    first = trained(tmp_path/'a')
    second = Trainer(preset('tiny', start_from=str(tmp_path/'a')), tmp_path/'b', quiet=True)
    for name in ('generator', 'encoder', 'discriminator'):
        for a, b in zip(first.networks[name].parameters(), second.networks[name].parameters()):
            assert torch.equal(a, b)
    with pytest.raises(InputError, match='the run asks for.*mend'):
        Trainer(preset('course', start_from=str(tmp_path/'a')), tmp_path/'c', quiet=True)
    with pytest.raises(InputError, match='no such weights'):
        Trainer(preset('tiny', start_from='nowhere'), tmp_path/'d', quiet=True)


def test_resume_with_more_steps_changes_only_that(tmp_path):
    trained(tmp_path, steps=2)
    run = Trainer.resume(tmp_path, quiet=True, steps=4).fit()
    assert run.step == 4 and read_config(tmp_path).steps == 4
    assert [json.loads(line)['step'] for line in (tmp_path/'history.jsonl').read_text().splitlines()] == [1, 2, 3, 4]


def test_samples_say_that_they_are_synthetic(tmp_path):
    trained(tmp_path, steps=1, sample_every=1)
    assert 'synthetic' in Image.open(tmp_path/'samples/step-000001.png').info['Comment']


def test_a_folder_without_test_people_can_be_trained_on(tmp_path):
    from twocet_nb.data import bundled
    for kind in ('a_n', 'b_e'):
        (tmp_path/f'faces/train/{kind}').mkdir(parents=True)
        for face in sorted((bundled('faces-64')/f'train/{kind}').iterdir())[:30]:
            (tmp_path/f'faces/train/{kind}/{face.name}').write_bytes(face.read_bytes())
    run = trained(tmp_path/'run', steps=1, data=str(tmp_path/'faces'), sample_every=1)
    assert (run.run_dir/'samples/step-000001.png').exists()


def test_a_run_without_a_folder_gets_one_named_after_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Trainer(preset('tiny', steps=1), quiet=True).fit()
    assert run.run_dir.parent.name == 'runs' and (tmp_path/run.run_dir/'config.json').exists()


def evaluated(folder, numbers, **changes):
    config = preset('tiny', **dict(steps=6, losses=ALL_ON, save_every=1, keep=1, eval_every=2, best_by='error') | changes)
    return Trainer(config, folder, quiet=True, evaluate=numbers).fit()


def test_the_best_checkpoint_is_kept_and_loads(tmp_path):
    from twocet_nb.transfer import TwoCET
    evaluated(tmp_path, lambda run: dict(error=abs(run.step - 4)))
    assert sorted(path.name for path in (tmp_path/'checkpoints').iterdir()) == ['best', 'latest', 'step-000004', 'step-000006']
    assert (tmp_path/'checkpoints/best').read_text() == 'step-000004'
    best, last = (TwoCET.load(tmp_path/'checkpoints'/name).generator.to_rgb[2].weight for name in ('best', 'latest'))
    assert not torch.equal(best, last)
    run = Trainer.resume(tmp_path, quiet=True, evaluate=lambda run: dict(error=-1.), steps=8).fit()
    assert [record['step'] for record in run.evaluations.records] == [2, 4, 6, 8]
    assert (tmp_path/'checkpoints/best').read_text() == 'step-000008'


@pytest.mark.parametrize('numbers', [dict(other=1.), InputError('judging needs two people')], ids=['no such number', 'no people'])
def test_an_evaluation_that_cannot_be_made_does_not_cost_the_run(tmp_path, capsys, numbers):
    def evaluate(run):
        if isinstance(numbers, Exception): raise numbers
        return numbers
    assert evaluated(tmp_path, evaluate).step == 6
    assert capsys.readouterr().out.count('goes on without evaluations') == 1


def test_judge_run_is_an_evaluation(tmp_path):
    from twocet_nb.transfer import TwoCET, judge, judge_run
    run = evaluated(tmp_path, judge_run, steps=2, best_by='cross_l1')
    numbers = judge(TwoCET.load(tmp_path), 'faces-64')
    assert run.evaluations.records == [dict(step=2) | {name: pytest.approx(value, abs=1e-5) for name, value in numbers.items()}]


def test_a_sitting_says_what_changed(tmp_path, capsys):
    trained(tmp_path, steps=1)
    Trainer.resume(tmp_path, quiet=True, steps=2, batch_size=2).fit()
    said = capsys.readouterr().out
    assert 'batch_size 4 -> 2' in said and 'steps 1 -> 2' in said
    first, second = [json.loads(line) for line in (tmp_path/'sittings.jsonl').read_text().splitlines()]
    assert first['changes'] == [] and any('batch_size 4 -> 2' in line for line in second['changes'])
    assert first['data'] == second['data'] and {'torch', 'commit', 'platform'} <= first.keys()
    from twocet_nb.networks import NetworkConfig
    with pytest.raises(InputError, match='network.width'): Trainer.resume(tmp_path, network=NetworkConfig(16, 8, 16, 4))


def test_faces_that_changed_between_sittings_are_named(tmp_path, capsys):
    from twocet_nb.data import bundled
    for split in ('train', 'test'):
        for kind in ('a_n', 'b_e'):
            (tmp_path/f'faces/{split}/{kind}').mkdir(parents=True)
            for face in sorted((bundled('faces-64')/f'{split}/{kind}').iterdir())[:6]:
                (tmp_path/f'faces/{split}/{kind}/{face.name}').write_bytes(face.read_bytes())
    trained(tmp_path/'run', steps=1, data=str(tmp_path/'faces'))
    next((tmp_path/'faces/train/b_e').iterdir()).unlink()
    Trainer.resume(tmp_path/'run', quiet=True, steps=2).fit()
    assert 'faces were added, removed, renamed or changed' in capsys.readouterr().out


def test_a_run_that_does_not_fit_is_refused_before_its_first_step(tmp_path, monkeypatch):
    from twocet_nb import memory
    monkeypatch.setattr(memory, 'available_memory', lambda device: 2**20)
    with pytest.raises(InputError, match='mend: try'): Trainer(preset('tiny'), tmp_path, quiet=True)
    assert Trainer(preset('tiny', memory_check=False), tmp_path, quiet=True).step == 0


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(InputError, match='pip install no-such-tracker'): Trainer(preset('tiny', trackers='no-such-tracker'), tmp_path, quiet=True)
