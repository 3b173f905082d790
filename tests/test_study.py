"""The study of the recipe: its hypotheses can be trained, and its results say where they come from."""
import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import study  # noqa: E402

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
    assert {'command', 'commit', 'seed', 'data', 'exam', 'rows'} <= RESULTS.keys()
    assert RESULTS['rows'].keys() <= study.HYPOTHESES.keys() and {'the recipe', 'paper'} <= RESULTS['rows'].keys()


def test_a_row_is_trained_and_judged(tmp_path, monkeypatch, few_faces):
    from dataclasses import replace
    config = replace(study.COURSE, data=str(few_faces), batch_size=2)
    run = study.train(config, .01, tmp_path/'run')
    assert run.step == 1 and run.config.ema_decay == .98
    monkeypatch.setattr(study, 'RESULTS', tmp_path/'recipe.json')
    monkeypatch.setattr(study, 'train', lambda *given: run)
    monkeypatch.setattr(study, 'numbers', lambda run: dict(remaining=dict(value=1.), wins=dict(value=.5)))
    monkeypatch.setattr(sys, 'argv', ['study.py', '--rows', 'the recipe'])
    study.main()
    assert json.loads((tmp_path/'recipe.json').read_text())['rows']['the recipe']['steps'] == 1
    monkeypatch.setattr(study, 'train', lambda *given: pytest.fail('a row that is there is not computed again'))
    study.main()
