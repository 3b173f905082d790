"""What the notebooks 07d and 07e cannot test: `twocet evaluate`, whole evaluations of models that cheat, and the cache of features."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from twocet_nb import metrics
from twocet_nb.cli import main
from twocet_nb.config import preset
from twocet_nb.data import FaceFolder, InputError, bundled, list_faces
from twocet_nb.features import FaceReader
from twocet_nb.metrics import STRENGTHS, change_of, evaluate, evaluate_run, exposed, new_exam, real_features, some_cross, strength_response
from twocet_nb.runs import SHIPPED
from twocet_nb.trainer import Trainer
from twocet_nb.transfer import TwoCET
from twocet_nb.truth import known_units, read_at, truth_pairs


@pytest.fixture(scope='module')
def model():
    return TwoCET.pretrained('faces-64', device='cpu')


@pytest.fixture(scope='module')
def faces(tmp_path_factory):
    """Three test people with all their faces, in a folder that is no bundled pack."""
    few = tmp_path_factory.mktemp('few')
    for face_type, folder in enumerate(('a_n', 'b_e')):
        for split in ('train', 'test'): (few/split/folder).mkdir(parents=True)
        for path in list_faces(bundled('faces-64'), 'test', face_type):
            if path.name[:3] in ('083', '117', '120'): shutil.copy(path, few/'test'/folder)
            else: shutil.copy(path, few/'train'/folder)
    return few


class Cheat:
    """A model that answers with a function of (target, reference): its code of a face is the number of the face it has seen."""
    def __init__(self, answer):
        self.answer, self.config, self.seen = answer, SimpleNamespace(image_size=64, code_dim=32), torch.zeros(1, 3, 64, 64)

    def encode(self, images):
        images = images if isinstance(images, torch.Tensor) else torch.stack([read_at(path, 64) for path in images])
        start, self.seen = len(self.seen), torch.cat([self.seen, images])
        return torch.arange(start, len(self.seen)).float()[:, None].expand(-1, 32)

    def apply(self, faces, codes):
        codes, count = torch.atleast_2d(codes), max(len(faces), len(torch.atleast_2d(codes)))
        places = codes.expand(count, -1)[:, 0].round().long().clamp(0, len(self.seen) - 1)
        return self.answer(faces.expand(count, -1, -1, -1), self.seen[places])

    def transfer(self, targets, references): return self.apply(targets, self.encode(references))


def other_person(targets, references):
    """Always the same face, whatever was asked."""
    return read_at(truth_pairs('truth-64')[0].answer, 64)[None].expand(len(targets), -1, -1, -1)


@pytest.fixture(scope='module')
def exam():
    return new_exam('faces-64', 64)


@pytest.mark.parametrize('answer, caught', [(lambda targets, references: targets, 0), (other_person, 1), (lambda targets, references: references, 2)],
                         ids=['copies its input', 'ignores its code', 'leaks identity'])
def test_a_cheat_is_exposed(answer, caught, exam):
    report = evaluate(Cheat(answer), 'faces-64', per_class=1, resamples=0, exam=exam)
    assert report['questions'][caught]['cheating'], report['questions']


def test_the_truth_is_no_cheat():
    """Whoever draws exactly what the renderer draws changes the face enough, though people move between two photographs."""
    emotional = FaceFolder(bundled('faces-64'), 'test', 1)
    answers = {pair.reference: pair.answer for pair in truth_pairs('truth-64') if pair.kind == 'self'}
    right = torch.stack([read_at(answers[path], 64) for path in emotional.paths])
    oracle = SimpleNamespace(config=SimpleNamespace(image_size=64), apply=lambda faces, codes: right[codes[:, 0].long()])
    moved = change_of(oracle, 'faces-64', 'test', known=torch.arange(float(len(right)))[:, None])
    assert .5 < moved < 1 and not exposed(moved, 1., 0., None)[0]['cheating']


@pytest.mark.parametrize('name', SHIPPED)
def test_the_shipped_weights_do_not_copy(name):
    moved = change_of(TwoCET.pretrained(name, 'cpu'), name, 'test')
    assert not exposed(moved, 1., 0., None)[0]['cheating']


def test_twice_the_same(model, faces):
    first, second = (evaluate(model, faces, per_class=1, resamples=5) for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert first['truth'] is None and len(first['questions']) == 2    # nobody knows the answers in this folder
    assert evaluate(model, faces, per_class=1, resamples=5, seed=1) != first


def test_each_score_carries_its_protocol(model, faces):
    found = evaluate(model, faces, splits=('test', 'train'), per_class=1, resamples=5)['sets']
    for split in ('test', 'train'):
        for name in ('N', 'E_z', 'E_r'):
            if (split, name) == ('test', 'N'): continue    # three neutral faces
            score = found[split][name]['frechet']
            assert score['protocol'] == 'faces (offline)' and 'FID' not in score['name'] and score['warning']
            assert score['floor'] is not None and score['interval'][0] <= score['interval'][1]
            assert (score['n_real'] == len(list_faces(faces, split, int(name != 'N'))))
    assert found['test']['N'] == dict(frechet=None, reason='3 faces are too few for a distance')
    assert found['test']['E_r']['frechet']['n_fake'] == 3 * 25 and found['test']['E_r']['by_class']['mean'] > 0


def test_features_of_changed_faces_are_measured_anew(faces, tmp_path, monkeypatch):
    monkeypatch.setenv('TWOCET_CACHE', str(tmp_path/'cache'))
    shutil.copytree(bundled_cache := bundled('faces-64'), tmp_path/'faces', ignore=lambda folder, names: [n for n in names if n[:3] not in ('083', '117', 'tes', 'a_n', 'b_e')])
    reader, calls = metrics.FaceReader.pretrained('cpu'), []
    monkeypatch.setattr(metrics, 'measure', lambda *given, measure=metrics.measure: calls.append(1) or measure(*given))
    for _ in range(2): real_features(reader, tmp_path/'faces', 64, 'test', 0)
    assert len(calls) == 1
    (tmp_path/'faces/test/a_n/083_01.png').write_bytes((tmp_path/'faces/test/a_n/117_01.png').read_bytes())
    real_features(reader, tmp_path/'faces', 64, 'test', 0)
    assert len(calls) == 2


def test_the_best_checkpoint_of_a_run(tmp_path, faces, capsys):
    Trainer(preset('tiny', data=str(faces), steps=2, save_every=1, keep=0), tmp_path/'run', quiet=True).fit()
    found = evaluate_run(tmp_path/'run', per_class=1, resamples=0)
    assert list(found['values']) == ['step-000000', 'step-000001', 'step-000002']
    assert found['values'][found['best']] == min(found['values'].values())
    assert main(['evaluate', str(tmp_path/'run'), '--data', str(faces), '--out', str(tmp_path/'out')]) == 0
    page, text = (tmp_path/'out/report.html').read_text(encoding='utf-8'), capsys.readouterr().out
    assert f'{found["best"]}</td>' in page and 'best: shown on this page' in page and 'report.html' in text
    assert json.loads((tmp_path/'out/evaluation.json').read_text())['best'] == found['best']


@pytest.mark.parametrize('words, message', [
    (['evaluate', 'nothing'], 'nothing'), (['evaluate', 'faces-64', '--data', 'nowhere'], 'nowhere'),
    (['evaluate', 'faces-64', '--protocol', 'standard'], 'fetch'), (['evaluate', 'faces-64', '--protocol', 'authors'], 'fetch')])
def test_what_a_person_can_mend(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and 'mend' in error and error.count('\n') == 1


def test_unknown_protocols(model, faces):
    with pytest.raises(InputError, match='pick from'): evaluate(model, faces, protocol='fid')


def test_the_best_checkpoint_by_a_distance(tmp_path, faces):
    run = Trainer(preset('tiny', data=str(faces), steps=3, eval_every=1, best_by='E_r'), tmp_path/'run', quiet=True, evaluate=metrics.score_run).fit()
    best = min(reversed(run.evaluations.records), key=lambda record: record['E_r'])
    assert {'N', 'E_z', 'E_r', 'cross_l1'} <= best.keys() and len(run.evaluations.records) == 3
    assert (tmp_path/'run/checkpoints/best').read_text().strip() == f'step-{best["step"]:06d}'


class Toy:
    """A world in which a picture shows its expression units as its first pixels: a model that draws answer(strength) times what the reference does."""
    def __init__(self, pairs, answer):
        self.unit_names = FaceReader.pretrained('cpu').unit_names
        self.known, self.answer, self.config = known_units(pairs, self.unit_names), answer, SimpleNamespace(image_size=64)

    def units(self, images): return images[:, 0, 0, :len(self.unit_names)]

    def encode(self, images): return self.known

    def apply(self, faces, codes):
        pictures = torch.zeros_like(faces)
        pictures[:, 0, 0, :len(self.unit_names)] = self.answer((codes.norm(dim=1) / self.known.norm(dim=1))[:, None]) * self.known
        return pictures


@pytest.mark.parametrize('answer, monotone, strict', [
    (lambda s: s, 1, 1), (torch.sqrt, 1, 1), (torch.ones_like, 0, 0), (lambda s: -s, 0, 0), (lambda s: torch.minimum(s, 2 - s), 0, 0),
    (lambda s: s - .26 * (s > .9) - .001 * (s > 1.4), 0, 0), (lambda s: s - .2501 * (s > .9), 1, 0)],
    ids=['linear', 'saturates', 'ignores the strength', 'the opposite', 'turns back', 'falls once', 'falls by less than the noise'])
def test_strength(answer, monotone, strict):
    pairs = some_cross(truth_pairs('truth-64'), 16)
    toy = Toy(pairs, answer)
    found = strength_response(toy, pairs, toy)
    assert (found['monotone'], found['strict']) == (dict(value=monotone, se=0), dict(value=strict, se=0)), found
    length = found['curve'][4]['value']
    if monotone and strict and answer is not torch.sqrt:
        assert [x['value'] for x in found['curve']] == pytest.approx([s * length for s in STRENGTHS], abs=1e-5)


def test_strength_is_a_part_of_an_evaluation(model):
    pairs, reader = some_cross(truth_pairs('truth-64'), 8), FaceReader.pretrained('cpu')
    found = strength_response(model, pairs, reader)
    assert found['pairs'] == 8 and 0 < found['tolerance'] < found['perfect']['value'] / 10
    copies = evaluate(Cheat(lambda targets, references: targets), 'faces-64', per_class=1, resamples=0)['strength']
    assert copies['pairs'] == 60 and copies['monotone']['value'] == copies['strict']['value'] == 0


@pytest.mark.parametrize('strengths, count', [((0, 1), 8), ((.5, 1, 1.5), 8), ((0, 1, 1), 8), ((0, .5, 1), 0)])
def test_strengths_that_mean_nothing(model, strengths, count):
    with pytest.raises(InputError, match='increase from 0'): strength_response(model, truth_pairs('truth-64')[:count], None, strengths)
