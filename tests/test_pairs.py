"""Pairs, relative codes and a generator that repaints, in whole runs."""
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from twocet_nb.config import find_data, only, preset
from twocet_nb.data import FaceFolder, InputError, to_tensor
from twocet_nb.networks import NetworkConfig
from twocet_nb.pairs import PairBatches, StillPairs, exchanged
from twocet_nb.speed import Recorded, Speed
from twocet_nb.trainer import Trainer, make_batches
from twocet_nb.transfer import TwoCET, averaged_model

NETWORK = NetworkConfig(16, 4, 16, 4, he_init=True, relative=True, repaint=True)


def short(data, steps=6, **changes):
    """The recipe of the shipped weights, small: D joins at step 4 of 6."""
    return preset('course', steps=steps, **dict(data=str(data), network=NETWORK, batch_size=4, precision='fp32', ema_decay=.5,
                                               log_every=1, sample_every=99, save_every=99) | changes)


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.networks.parameters()])


@pytest.fixture(scope='module')
def whole(tmp_path_factory, few_faces):
    return Trainer(short(few_faces), tmp_path_factory.mktemp('pairs')/'run', quiet=True).fit()


def test_a_run_uses_the_losses_of_its_step(whole):
    early, late = whole.history.records[0], whole.history.records[-1]
    assert {'pair_e', 'pair_n'} <= early.keys() and not {'d_e', 'd_n', 'cyc_n'} & early.keys()
    assert {'pair_e', 'pair_n', 'd_e', 'd_n', 'adv_e', 'adv_n', 'cyc_n'} <= late.keys() and 'code' not in late


def test_a_stopped_run_goes_on_to_the_last_bit(whole, tmp_path, few_faces):
    Trainer(short(few_faces), tmp_path/'run', quiet=True).fit(3)
    assert torch.equal(weights(Trainer.resume(tmp_path/'run', quiet=True).fit()), weights(whole))


def test_a_run_that_began_with_weights_registers_what_they_draw(whole, tmp_path, few_faces):
    begun = short(few_faces, start_from=str(whole.run_dir), seed=1)
    run = Trainer(begun, tmp_path/'run', quiet=True).fit()
    x_n, x_e = run.batches[0]
    drawn = run.batches.draw(x_n, x_e)
    assert not torch.equal(drawn, x_n) and not drawn.requires_grad
    Trainer(begun, tmp_path/'two', quiet=True).fit(3)
    again = Trainer.resume(tmp_path/'two', quiet=True)
    assert torch.equal(again.batches.draw(x_n, x_e), drawn), 'a resumed run asks the weights that it began with'
    assert torch.equal(weights(again.fit()), weights(run))


def test_every_network_learned(whole):
    fresh = Trainer(short(whole.config.data), whole.run_dir.parent/'fresh', quiet=True)
    for name in ('generator', 'encoder', 'discriminator'):
        moved = [not torch.equal(p, q) for p, q in zip(whole.networks[name].parameters(), fresh.networks[name].parameters())]
        assert all(moved) if name == 'encoder' else any(moved), name


def test_pairs_are_the_same_from_files_and_from_memory(few_faces):
    folders = find_data(few_faces, 16, 'train')
    resident, workers = (PairBatches(*folders, batch_size=4, memory=memory) for memory in ('resident', 'workers'))
    for number in (0, 3):
        assert all(torch.equal(a, b) for a, b in zip(resident[number], workers[number]))


def test_shares_of_several_processes_make_the_whole_batch(few_faces):
    folders = find_data(few_faces, 16, 'train')
    halves = [PairBatches(*folders, batch_size=4, rank=rank, world=2)[1] for rank in (0, 1)]
    whole = PairBatches(*folders, batch_size=4)[1]
    assert all(torch.allclose(torch.cat(parts), all_, atol=1e-6) for *parts, all_ in zip(*halves, whole))


def test_somebody_without_a_neutral_face_is_named_before_training(tmp_path, few_faces):
    root = shutil.copytree(few_faces, tmp_path/'faces')
    lonely = sorted((root/'train'/'a_n').iterdir())[0]
    person = lonely.name.split('_')[0]
    lonely.unlink()
    with pytest.raises(InputError, match=f'{person}: no neutral face.*mend'):
        Trainer(short(root), tmp_path/'run', quiet=True)


def test_a_relative_code_of_a_neutral_face_is_nearly_zero(whole, few_faces):
    model = averaged_model(whole)
    faces = FaceFolder(few_faces, 'train', 0, size=16)
    neutral = torch.stack([faces[k] for k in range(4)]).float() / 127.5 - 1
    with torch.no_grad():
        absolute = model.encoder(neutral)
    assert model.encode(neutral).abs().mean() < absolute.abs().mean() / 2


def test_a_file_keeps_what_its_codes_are(whole, tmp_path, few_faces):
    model = averaged_model(whole)
    model.save(tmp_path/'model.safetensors')
    loaded = TwoCET.load(tmp_path/'model.safetensors', 'cpu')
    face = sorted((few_faces/'train'/'b_e').iterdir())[0]
    assert loaded.config == NETWORK
    torch.testing.assert_close(loaded.encode(face), model.encode(face))
    assert (loaded.encode(face) - loaded.encoder(to_tensor(face, 16)[None])).abs().max() > .01


@pytest.mark.parametrize('change, words', [
    (dict(paired=False, network=replace(NETWORK, relative=False)), 'two pictures of one person.*mend'),
    (dict(paired=False, losses=preset('unpaired').losses), 'relative codes need.*mend'),
    (dict(cycles='a c'), 'mend: sub-steps such as')])
def test_what_does_not_go_together_is_refused(few_faces, change, words):
    with pytest.raises(InputError, match=words):
        short(few_faces, **change)


@pytest.fixture
def a_mimic(few_faces, tmp_path):
    """The few faces, and somebody who does what the first of them did."""
    root = Path(shutil.copytree(few_faces, tmp_path/'faces'))
    path = sorted((root/'train/b_e').iterdir())[0]
    shutil.copy(path, path.with_name(f'999_{path.name}'))
    shutil.copy(sorted((root/'train/a_n').iterdir())[1], root/f'train/a_n/999_01{path.suffix}')
    return root


def test_twins_are_drawn_with_each_others_codes(a_mimic, tmp_path):
    runs = [Trainer(short(a_mimic, still=True, alike=alike), tmp_path/f'run-{alike}', quiet=True) for alike in (False, True)]
    x_n, x_e = runs[1].batches[0]
    weights_now = runs[1].config.losses.weights(0)
    for run in runs: run.networks.load_state_dict(runs[0].networks.state_dict())
    terms = [run.learn(x_n, x_e, *[torch.zeros(4, 4)] * 2, weights_now, 0.) for run in runs]
    assert terms[0]['pair_n'] == terms[1]['pair_n'] and terms[0]['pair_e'] != terms[1]['pair_e']
    assert torch.equal(exchanged(exchanged(x_e)), x_e)


def test_a_run_of_twins_is_stopped_and_goes_on_to_the_last_bit(a_mimic, tmp_path):
    config = short(a_mimic, still=True, alike=True)
    Trainer(config, tmp_path/'run', quiet=True).fit(3)
    assert torch.equal(weights(Trainer.resume(tmp_path/'run', quiet=True).fit()), weights(Trainer(config, tmp_path/'whole', quiet=True).fit()))


def test_a_mimic_is_found_by_name_and_another_middle_part_is_none(a_mimic):
    folders = find_data(a_mimic, 16, 'train')
    twin = StillPairs(*folders, batch_size=4, alike=True).raw.twin
    changed = [k for k, j in enumerate(twin) if k != j]
    assert {folders[1].identities[k] for k in changed} == {'999', folders[1].identities[0]} and len(changed) == 2


def test_a_run_only_lights_its_pairs_if_told(a_mimic):
    plain, lit = (make_batches(short(a_mimic, still=True, warped=warped), 'cpu')[0] for warped in (True, False))
    assert not torch.allclose(plain[1], lit[1], atol=1e-2)
    alone = StillPairs(*find_data(a_mimic, 16, 'train'), batch_size=4, warped=False)[0]
    assert torch.equal(lit[0], alone[0]) and torch.equal(lit[1], alone[1])


@pytest.mark.parametrize('changes', [dict(alike=True), dict(alike=True, still=True, batch_size=3)])
def test_twins_need_people_who_hold_still_and_even_batches(changes):
    with pytest.raises(InputError, match='mend: still=True and an even batch_size'):
        short('anywhere', **changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='only a GPU records')
def test_a_recorded_run_learns_what_an_unrecorded_one_does(a_mimic, tmp_path):
    run = Trainer(short(a_mimic, still=True, alike=True, device='cuda', speed=Speed(graphs=True)), tmp_path/'run', quiet=True)
    weights_now = only(run.config.losses.weights(0), 'b')
    for _ in range(3): recorded = run.learner(weights_now, 0.)
    assert isinstance(recorded, Recorded)
    tensors = [*run.networks.parameters()] + [x for o in run.optimizers.values() for s in o.state.values() for x in s.values()]
    before, inputs, after = [x.clone() for x in tensors], run.inputs(7), []
    for learn in (recorded, partial(run.learn, weights=weights_now, r1=0.)):
        for x, old in zip(tensors, before): x.data.copy_(old)
        after.append(learn(*inputs) | dict(enumerate(p.detach().clone() for p in run.networks.parameters())))
    torch.testing.assert_close(*after, atol=1e-5, rtol=1e-3)
