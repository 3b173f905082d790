"""The study of the recipe: its hypotheses can be trained, and its results say where they come from."""
import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import strangers  # noqa: E402
import study  # noqa: E402
import weights  # noqa: E402

RESULTS = json.loads((ROOT/'nbs'/'studies'/'recipe.json').read_text(encoding='utf-8'))


def test_what_is_replaced_is_there():
    for name, (config, replaced) in study.HYPOTHESES.items():
        assert config.network.image_size == 64 and config.seed == 0, name
        if replaced:
            with patch(*replaced):
                pass


def test_hypotheses_differ_from_the_recipe():
    recipe = study.HYPOTHESES['the recipe']
    assert [name for name, other in study.HYPOTHESES.items() if other == recipe] == ['the recipe']


def test_results_name_their_making():
    assert {'command', 'seed', 'data', 'exam', 'rows'} <= RESULTS.keys() and all(row['commit'] for row in RESULTS['rows'].values())
    assert RESULTS['rows'].keys() <= study.HYPOTHESES.keys() and {'the recipe', 'paper'} <= RESULTS['rows'].keys()
    assert {row['commit'] for row in RESULTS['rows'].values()} <= RESULTS['controls'].keys(), 'every row has a recipe to be compared with'


def test_a_row_is_trained_and_judged(tmp_path, monkeypatch, few_faces):
    from dataclasses import replace
    config = replace(study.COURSE, data=str(few_faces), batch_size=2)
    run = study.train(config, .01, tmp_path/'run')
    assert run.step == 1 and run.config.ema_decay == .98
    monkeypatch.setattr(study, 'RESULTS', tmp_path/'recipe.json')
    monkeypatch.setattr(study, 'train', lambda *given: run)
    monkeypatch.setattr(study, 'numbers', lambda run: dict(remaining=dict(value=1.), wins=dict(value=.5)))
    monkeypatch.setattr(study, 'commit', lambda: 'abc')
    monkeypatch.setattr(sys, 'argv', ['study.py', '--rows', 'paper'])
    study.main()
    found = json.loads((tmp_path/'recipe.json').read_text())
    assert list(found['rows']) == ['the recipe', 'paper'] and found['controls'] == {'abc': found['rows']['the recipe']}
    assert found['rows']['paper']['steps'] == 1 and found['rows']['paper']['commit'] == 'abc'
    monkeypatch.setattr(study, 'train', lambda *given: pytest.fail('a row that is there is not computed again'))
    study.main()


def weights_results():
    return {path.stem.removeprefix('weights-'): json.loads(path.read_text(encoding='utf-8')) for path in (ROOT/'nbs'/'studies').glob('weights-*.json')}


def test_results_of_weights_are_those_of_the_shipped_ones():
    from twocet_nb.metrics import model_hash
    from twocet_nb.transfer import TwoCET
    found = weights_results()
    assert found.keys() == {'before', *weights.SHIPPED}, 'make them: python tools/weights.py'
    for name, numbers in found.items():
        assert numbers['command'].startswith('python tools/weights.py') and {'commit', 'seed', 'data', 'weights', 'evaluation', 'leakage'} <= numbers.keys()
        if name != 'before':
            assert numbers['evaluation']['about']['model'] == model_hash(TwoCET.pretrained(name, 'cpu')), f'other weights now: python tools/weights.py {name}'


@pytest.mark.parametrize('name', weights.SHIPPED)
def test_shipped_codes_say_what_twins_share(name):
    from twocet_nb.blocks import AdaIN
    from twocet_nb.transfer import TwoCET
    model = TwoCET.pretrained(name, 'cpu')
    kept, heard = model.card['extra']['codes']['kept'], [layer.affine.weight for layer in model.generator.modules() if isinstance(layer, AdaIN)]
    assert 0 < kept < model.config.code_dim and all(weight[:, :kept].any(0).all() and not weight[:, kept:].any() for weight in heard)
    assert model.encoder.head.weight[:kept].any(1).all() and not model.encoder.head.weight[kept:].any()


def test_strangers_met_the_shipped_weights():
    from twocet_nb.metrics import model_hash
    from twocet_nb.transfer import TwoCET
    found = json.loads((ROOT/'nbs'/'studies'/'strangers.json').read_text(encoding='utf-8'))
    assert found['command'].startswith('python tools/strangers.py') and found['commit'] and found['weights'].keys() == weights.SHIPPED.keys()
    for name, numbers in found['weights'].items():
        assert numbers['model'] == model_hash(TwoCET.pretrained(name, 'cpu')), 'other weights now: python tools/strangers.py FOLDER'


def test_strangers_are_rendered_before_they_are_met(tmp_path, monkeypatch, capsys):
    rendered = []
    face = dict(model=dict(value=1.), copy=dict(value=2.))
    monkeypatch.setattr(strangers, 'RESULTS', tmp_path/'strangers.json')
    monkeypatch.setattr(strangers, 'make', lambda *given, **named: rendered.append('faces') or 0)
    monkeypatch.setattr(strangers, 'make_truth', lambda *given: rendered.append('truth') or len(rendered) < 4)    # Ctrl-C ends the first call
    monkeypatch.setattr(strangers, 'measure', lambda name, folder: dict(truth=dict(cross=dict(l1=dict(face=face)))))
    monkeypatch.setattr(sys, 'argv', ['strangers.py', 'somewhere', '--seed', '3'])
    with pytest.raises(SystemExit, match='goes on'): strangers.main()
    assert not list(tmp_path.iterdir())
    strangers.main()
    found = json.loads((tmp_path/'strangers.json').read_text())
    assert rendered == ['faces', 'truth'] * 2 and found['command'].endswith('--seed 3') and found['weights'].keys() == weights.SHIPPED.keys()
    assert 'copying 0.500' in capsys.readouterr().out


def test_weights_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights, 'ROOT', tmp_path)
    monkeypatch.setattr(weights, 'STUDIES', tmp_path)
    monkeypatch.setattr(weights, 'measure', lambda place, command: dict(command=command))
    monkeypatch.setattr(sys, 'argv', ['weights.py', '--before', 'somewhere/old.safetensors'])
    weights.main()
    assert {path.name for path in tmp_path.iterdir()} == {'weights-before.json', *(f'weights-{name}.json' for name in weights.SHIPPED)}
    assert json.loads((tmp_path/'weights-before.json').read_text())['command'] == 'python tools/weights.py --before old.safetensors'
    monkeypatch.setattr(sys, 'argv', ['weights.py', 'nothing'])
    with pytest.raises(SystemExit): weights.main()
    assert 'nothing: not shipped' in capsys.readouterr().err
