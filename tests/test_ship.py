"""What happens to weights on their way into the package, and between two runs."""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import ship  # noqa: E402
from agree import agreement_loss  # noqa: E402

from twocet_nb import runs  # noqa: E402
from twocet_nb.config import find_data, preset  # noqa: E402
from twocet_nb.data import bundled  # noqa: E402
from twocet_nb.metrics import codes_of  # noqa: E402
from twocet_nb.networks import build_networks, read_card, save_networks  # noqa: E402
from twocet_nb.trainer import Trainer, with_averages  # noqa: E402
from twocet_nb.transfer import TwoCET  # noqa: E402

TINY = preset('tiny').network


@pytest.fixture(scope='module')
def performers(tmp_path_factory):
    "Two dozen performances, each by a mimic and by whom they copy, and the neutral faces of all."
    still, few = bundled('still-64')/'train', tmp_path_factory.mktemp('performers')
    copied = [path.stem.split('_') for path in sorted((still/'b_e').glob('2[3-9]*_*_*.png'))[:24]]
    for folder in ('a_n', 'b_e'): (few/'train'/folder).mkdir(parents=True)
    for who, whom, what in copied:
        for name in (f'{whom}_{what}.png', f'{who}_{whom}_{what}.png'): shutil.copy(still/'b_e'/name, few/'train'/'b_e')
        for person in (who, whom): shutil.copy(still/'a_n'/f'{person}_01.png', few/'train'/'a_n')
    return few


def tidied(root):
    "A model with codes that were tidied for these faces, what was said of it, and its codes of them and before."
    networks = dict(with_averages(build_networks(TINY, 0)))
    faces = find_data(str(root), TINY.image_size, 'train')[1]
    def model(): return TwoCET(TINY, networks['generator_ema'], networks['encoder_ema'], 'cpu')
    before, drawn = codes_of(model(), faces), model().transfer(torch.zeros(1, 3, 16, 16), faces.paths[:2])
    done = ship.tidy_codes(networks, TINY, str(root))
    return model(), done, codes_of(model(), faces), before, drawn, faces


def test_without_twins_codes_are_scaled_and_pictures_stay(few_faces):
    model, done, codes, before, drawn, faces = tidied(few_faces)
    assert done == {} and torch.allclose(codes.std(0), torch.full((TINY.code_dim,), 1 / math.sqrt(12)), rtol=1e-3)
    assert torch.linalg.matrix_rank(codes) == torch.linalg.matrix_rank(before)
    torch.testing.assert_close(model.transfer(torch.zeros(1, 3, 16, 16), faces.paths[:2]), torch.stack(list(drawn)), rtol=0, atol=1e-4)


def test_with_twins_codes_lose_directions(performers):
    _, done, codes, before, *_ = tidied(performers)
    assert len(done['agreement']) == TINY.code_dim and sorted(done['agreement'], reverse=True) == done['agreement']
    assert 0 < done['kept'] == sum(value > .55 for value in done['agreement']) and not codes[:, done['kept']:].any()
    assert codes[:, :done['kept']].var(0).mean().item() == pytest.approx(1 / 12, rel=1e-3)
    assert torch.linalg.matrix_rank(before, rtol=1e-3) == TINY.code_dim


def test_a_run_is_shipped_with_its_card_and_tidied_again(few_faces, tmp_path, monkeypatch, capsys):
    run = Trainer(preset('tiny', data=str(few_faces), steps=1, save_every=1), tmp_path/'run', quiet=True).fit()
    (tmp_path/'data').mkdir()
    monkeypatch.setattr(ship, 'ROOT', tmp_path)
    monkeypatch.setattr(ship.transfer, 'judge', lambda model, root: dict(root=str(root)))
    monkeypatch.setattr(ship.transfer, 'print_judgement', print)
    monkeypatch.setattr(ship, 'bundled_for', lambda kind, size: 'faces-64')
    monkeypatch.setattr(sys, 'argv', ['ship.py', str(run.run_dir), '--note', 'a test'])
    ship.main()
    file = tmp_path/'data'/runs.SHIPPED['faces-64']
    card = json.loads(file.with_suffix('.json').read_text())
    assert card['note'] == 'a test' and card['step'] == 1 and card['codes'] == {} and card['curve'] and str(tmp_path) not in card['command']
    monkeypatch.setattr(ship.runs, 'weights_path', lambda name: file)
    monkeypatch.setattr(sys, 'argv', ['ship.py', 'faces-64', '--note', 'twice'])
    ship.main()
    again = json.loads(file.with_suffix('.json').read_text())
    assert again['note'] == 'a test twice' and again['command'] == card['command'] and 'step 1' in capsys.readouterr().out


def test_agreement_counts_what_twins_share_and_no_number_twice():
    shared, own = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (400, 800))
    alike = .3 * shared.repeat_interleave(2, 0)
    loss, correlations = agreement_loss(alike, 1)
    assert loss < .1 and torch.allclose(correlations, torch.ones(3), atol=.01)
    less, halves = agreement_loss((alike + .3 * own) / 2**.5, 1)
    assert less > .5 and (halves - .5).abs().max() < .15
    assert agreement_loss(alike[:, [0, 1, 1]], 2)[0] > loss + .1, 'a new number must not repeat another'
    assert agreement_loss(alike[:, [0, 0, 1]], 2)[0] < .1, 'old numbers may'


def agree(weights, out, numbers):
    "Two processes of tools/agree.py, three short steps: the completed process."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', ROOT/'tools'/'agree.py', weights, out,
               '--numbers', numbers, '--steps', '3', '--twins', '4']
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_the_encoder_learns_alone_and_pictures_stay(performers, tmp_path):
    networks, known = dict(with_averages(build_networks(TINY, 0))), TINY.code_dim // 2
    with torch.no_grad():
        for part in (networks['encoder_ema'].head.weight, networks['encoder_ema'].head.bias): part[known:] = 0
    card = dict(name='tiny', step=7, sub_steps=21, recipe=dict(data=str(performers)))
    save_networks(tmp_path/'old.safetensors', TINY, networks, extra=card)
    done = agree(tmp_path/'old.safetensors', tmp_path/'new.safetensors', known + 1)
    assert done.returncode == 0, done.stderr
    _, found = runs.open_networks(tmp_path/'new.safetensors', ship.NAMES)
    head = found['encoder_ema'].head.weight
    assert head[:known + 1].any(1).all() and not head[known + 1:].any() and not torch.equal(head[:known], networks['encoder_ema'].head.weight[:known])
    for name in ('generator_ema', 'discriminator'):
        for key, value in networks[name].state_dict().items(): assert torch.equal(found[name].state_dict()[key], value), key
    written = read_card(tmp_path/'new.safetensors')['extra']
    assert written['begun_with'] == card and written['sub_steps'] == 0 and 'agree.py old.safetensors' in written['command']
    refused = agree(tmp_path/'old.safetensors', tmp_path/'no.safetensors', known)
    assert refused.returncode != 0 and f'{known} numbers are in use' in refused.stderr and not (tmp_path/'no.safetensors').exists()
