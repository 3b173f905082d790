"""The space of codes: fakes whose answer is known must be exposed, chance must look like chance, bad input is refused."""
import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twocet_nb import codespace
from twocet_nb.codespace import (Codes, Pixels, class_distances, cluster_silhouette, continuity, dci, distance_ratio, embed, fog, gromov_wasserstein,
                                 leakage, merge_sides, probe, shuffle_labels, silhouette, stolen, tsne, unit_names, unit_probe, untrained,
                                 variance_shares, without_identity)
from twocet_nb.data import FaceFolder, InputError, bundled, to_pil
from twocet_nb.networks import NetworkConfig, build_networks
from twocet_nb.transfer import TwoCET

PEOPLE, CLASSES = np.repeat(np.arange(24), 10), np.tile(np.arange(10), 24)


def rng():
    return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """Three people, four expressions and a neutral face each, 16 px; the brightness is the expression, the redness the person."""
    for k, person in enumerate(('anna', 'bob', 'cem')):
        for cls in range(1, 6):
            face = torch.full((3, 16, 16), cls / 5 - .5)
            face[0] += k / 8
            path = tmp_path/('train' if k else 'test')/('b_e' if cls > 1 else 'a_n')/f'{person}_{cls:02d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil(face).save(path)
    return tmp_path


MEAN_COLOUR = SimpleNamespace(encode=lambda images: images.mean((2, 3)))


# embed

def test_rows_stay_together_without_tables(folder):
    codes = embed(MEAN_COLOUR, folder)
    assert len(codes) == 15 and codes.known == {} and codes.values.dtype == np.float32
    for person, cls, split, face_type, path, value in zip(codes.identities, codes.classes, codes.splits, codes.face_types, codes.paths, codes.values):
        assert path == f'{split}/{"b_e" if face_type else "a_n"}/{person}_{cls:02d}.png'
        assert np.allclose(value[1], cls / 5 - .5, atol=.01) and np.allclose(value[0] - value[1], 'abc'.index(person[0]) / 8, atol=.01)
    assert set(codes.emotions) == {f'class {cls:02d}' for cls in range(1, 6)}


def test_parts_of_a_data_set(folder):
    assert set(embed(MEAN_COLOUR, folder, split='train').identities) == {'bob', 'cem'}
    assert set(embed(MEAN_COLOUR, folder, face_type=0).classes) == {1}
    assert len(embed(MEAN_COLOUR, folder, people=['bob'])) == 5
    shutil.rmtree(folder/'test')
    assert len(embed(MEAN_COLOUR, folder)) == 10
    with pytest.raises(InputError, match='no images'):
        embed(MEAN_COLOUR, folder, split='test', face_type=1)


def test_tables_are_joined_by_file_and_person(folder):
    names = [f'{split}/{t}/{p.name}' for split in ('train', 'test') for t in ('a_n', 'b_e') for p in (folder/split/t).iterdir()]
    rows = '\n'.join(f'{name},fun,{len(name)},' for name in reversed(names))
    (folder/'images.csv').write_text(f'file,emotion,length,light\n{rows}\n', encoding='utf-8-sig')
    (folder/'identities.csv').write_text('identity,sex,age\ncem,male,20\nanna,female,30\nbob,male,\n')
    codes = embed(MEAN_COLOUR, folder)
    assert codes.known['length'].tolist() == [len(path) for path in codes.paths] and set(codes.emotions) == {'fun'}
    assert np.isnan(codes.known['light']).all() and np.isnan(codes.known['age'][codes.identities == 'bob']).all()
    assert set(codes.known['sex'][codes.identities == 'anna']) == {'female'}
    with pytest.raises(InputError, match='unit_'):
        unit_names(codes)


@pytest.mark.parametrize('table, words', [('images.csv', 'no row for train/a_n/bob_01.png'), ('identities.csv', 'no row for bob')])
def test_tables_that_lack_somebody(folder, table, words):
    (folder/table).write_text('file,identity\nnothing,nobody\n')
    with pytest.raises(InputError, match=words):
        embed(MEAN_COLOUR, folder)
    (folder/table).write_text('something\nelse\n')
    with pytest.raises(InputError, match=f'{table}: has no column'):
        embed(MEAN_COLOUR, folder)


def test_models_that_cannot_encode(folder):
    for encode in (lambda images: images, lambda images: torch.zeros(1, 3), lambda images: torch.full((len(images), 2), math.nan)):
        with pytest.raises(InputError, match='finite'):
            embed(SimpleNamespace(encode=encode), folder)
    for model in (object(), None, SimpleNamespace(encode=3)):
        with pytest.raises(InputError, match='no encode'):
            embed(model, folder)
    for kwargs in (dict(split='dev'), dict(face_type=2)):
        with pytest.raises(InputError):
            embed(MEAN_COLOUR, folder, **kwargs)
    with pytest.raises(InputError, match='no faces to encode'):
        embed(MEAN_COLOUR, folder/'nowhere')


def test_a_damaged_face_is_named(folder):
    (folder/'train/b_e/bob_03.png').write_bytes(b'half a')
    with pytest.raises(InputError, match='bob_03.png'):
        embed(MEAN_COLOUR, folder)


def test_codes_are_those_of_the_model():
    config = NetworkConfig.tiny()
    networks = build_networks(config, 0)
    model = TwoCET(config, networks['generator'], networks['encoder'], 'cpu')
    codes = embed(model, 'faces-64', split='test', people=['083', '117'])
    assert len(codes) == 52 and codes.units.shape == (52, 33)
    assert np.allclose(codes.values, model.encode([codes.root/path for path in codes.paths]), atol=1e-5)
    assert np.array_equal(codes.intensity == 0, codes.face_types == 0)
    assert np.allclose(embed(untrained(model), 'faces-64', 'test', 1, ['083']).values, embed(untrained(model), 'faces-64', 'test', 1, ['083']).values)
    half = codes[codes.identities == '083']
    assert len(half) == 26 and set(half.known['sex']) == {'female'} and len(codes[:3]) == 3 and len(codes[5]) == 1


def test_pixels_are_the_picture():
    faces = FaceFolder(bundled('faces-64'), 'test', 0).load()[:3].float() / 127.5 - 1
    seen = Pixels(8).encode(faces)
    assert seen.shape == (3, 64) and torch.allclose(seen.mean(1), faces.mean((1, 2, 3)), atol=1e-5)


# Geometry

def test_distances_of_classes():
    means = rng().normal(size=(10, 5))
    found = class_distances(means[CLASSES], CLASSES)
    assert np.allclose(found.matrix, np.linalg.norm(means[:, None] - means, axis=2)) and np.allclose(found.spread, 0)
    pairs = found.pairs()
    assert len(pairs) == 45 and pairs == sorted(pairs) and pairs[-1][0] == pytest.approx(found.matrix.max())
    ordered = found.ordered()
    place = [found.names.index(name) for name in ordered.names]
    assert sorted(place) == list(range(10)) and np.array_equal(ordered.matrix, found.matrix[np.ix_(place, place)])
    noise = class_distances(rng().normal(size=(240, 5)), CLASSES)
    assert abs(noise.matrix[np.triu_indices(10, 1)].mean() / noise.chance - 1) < .25


def test_silhouette_of_blobs_and_of_permuted_labels():
    blobs = rng().normal(size=(240, 5)) + 9 * rng().normal(size=(10, 5))[CLASSES]
    real, permuted = silhouette(blobs, CLASSES), silhouette(blobs, rng().permutation(CLASSES))
    assert real.value > .5 and real.p == .05 and real.chance < 0
    assert permuted.value < .05 and permuted.p > .05
    assert cluster_silhouette(blobs, 10).p == .1 and cluster_silhouette(fog(blobs, rng()), 10).p > .1


def test_silhouette_equals_its_definition():
    values, labels = np.array([[0.], [1], [5], [7]]), np.array(list('aabb'))
    a, b = [1, 1, 2, 2], [6, 5, 4.5, 6.5]
    assert silhouette(values, labels).value == pytest.approx(np.mean([(y - x) / max(x, y) for x, y in zip(a, b)]))


def test_without_identity_leaves_expressions():
    codes = made_codes(3 * np.eye(24)[PEOPLE] @ rng().normal(size=(24, 10)) + np.eye(10)[CLASSES])
    assert silhouette(codes).value < .1 and silhouette(without_identity(codes)).value > .99


def test_tsne_keeps_neighbours_and_repeats():
    blobs = rng().normal(size=(90, 5)) + 20 * np.repeat(np.eye(5)[:3], 30, axis=0)
    points = tsne(blobs, perplexity=10)
    assert points.shape == (90, 2) and silhouette(points, np.repeat(range(3), 30)).value > .6
    assert np.array_equal(points, tsne(blobs, perplexity=10))
    with pytest.raises(InputError, match='perplexity'):
        tsne(blobs[:9], perplexity=9)


def test_gromov_wasserstein():
    points = rng().normal(size=(25, 6))
    turn = np.linalg.qr(rng().normal(size=(6, 6)))[0]
    copy = 7 * rng().permutation(points @ turn) - 3
    assert gromov_wasserstein(points, copy) < 1e-4
    assert gromov_wasserstein(points, np.hstack([copy, np.zeros((25, 4))])) < 1e-4  # another dimension
    other = rng().normal(size=(25, 6)) ** 3
    assert gromov_wasserstein(points, other) > .05
    assert gromov_wasserstein(points, other) == pytest.approx(gromov_wasserstein(other, points), abs=.02)
    assert gromov_wasserstein(points, np.repeat(points, 2, axis=0)) < .15  # other numbers of points


def test_gromov_wasserstein_of_triangles():
    """Two triangles with sides 1, 1, 1 and 3/4, 3/4, 3/2: the best matching is one to one, and the same for all."""
    equal = np.array([[0, 0], [1, 0], [.5, math.sqrt(.75)]])
    flat = np.array([[0.], [1], [2]])
    expected = math.sqrt(2 * (2 * .25**2 + .5**2) / 9)
    assert gromov_wasserstein(equal, flat) <= expected + 1e-6


def test_gromov_wasserstein_without_pot(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ot', None)
    with pytest.raises(InputError, match=r'twocet_nb\[metrics\]'):
        gromov_wasserstein(np.eye(4), np.eye(4))


def made_codes(values, **known):
    """`Codes` of 24 people x 10 classes, of which class 0 is neutral and the last six people are in the test split."""
    text = PEOPLE.astype(str)
    return Codes(values.astype(np.float32), text, CLASSES, np.char.add('class ', CLASSES.astype(str)), np.where(PEOPLE >= 18, 'test', 'train'),
                 (CLASSES > 0).astype(int), text, known, None)


def test_distance_ratio_tells_expressions_from_people():
    expressions, people = (distance_ratio(made_codes(values)) for values in (np.eye(10)[CLASSES], np.eye(24)[PEOPLE]))
    assert expressions['identity_to_identity'] == 0 and expressions['ratio'] == math.inf
    assert people['emotional_to_neutral'] == people['expression_to_expression'] == 0 and people['ratio'] == 0
    with pytest.raises(InputError, match='neutral and emotional'):
        distance_ratio(made_codes(np.eye(10)[CLASSES])[CLASSES > 0])


# Probes

def test_one_hot_identity_leaks_everything():
    found = leakage(np.eye(24)[PEOPLE], PEOPLE, CLASSES)
    assert found.value == 1 and found.p == .05 and found.chance < .1 and found.error == 0
    people, expressions = variance_shares(np.eye(24)[PEOPLE], PEOPLE, CLASSES)
    assert people.value == pytest.approx(1) and expressions.value == pytest.approx(0)


@pytest.mark.parametrize('noise', [0, .1])
def test_pure_expression_leaks_nothing(noise):
    values = rng().normal(size=(10, 6))[CLASSES] + noise * rng().normal(size=(240, 6))
    assert leakage(values, PEOPLE, CLASSES).value < .1
    people, expressions = variance_shares(values, PEOPLE, CLASSES)
    assert expressions.value > .98 and people.p > .05 and people.value + expressions.value <= 1 + 1e-9


def test_random_codes_know_nothing():
    for seed in range(3):
        values = np.random.default_rng(seed).normal(size=(240, 8))
        assert abs(leakage(values, PEOPLE, CLASSES).value - 1 / 24) < .05
        assert unit_mean(values) < .05
    assert min(f.p for f in variance_shares(values, PEOPLE, CLASSES)) > .05


def unit_mean(values, units=None):
    """Mean R2 of three units that every person shows in a slightly different way."""
    units = (rng().normal(size=(10, 3))[CLASSES] + .3 * rng().normal(size=(240, 3))) if units is None else units
    return np.mean([f.value for f in unit_probe(values, units, list('abc'), PEOPLE >= 18, PEOPLE)])


def test_unit_probe_reads_turned_units_of_new_people():
    units = rng().normal(size=(240, 3))
    turned = np.hstack([units, rng().normal(size=(240, 3))]) @ np.linalg.qr(rng().normal(size=(6, 6)))[0]
    assert unit_mean(turned, units) > .99
    permuted = rng().permutation(units)
    assert unit_mean(turned, permuted) < .05


def test_unit_probe_of_codes():
    units = {f'unit_{name}': rng().normal(size=240) for name in ('smileLeft', 'smileRight')} | dict(unit_frown=np.zeros(240))
    found = unit_probe(made_codes(np.stack(list(units.values()), 1), **units))
    assert [f.name for f in found] == ['smileLeft', 'smileRight'] and min(f.value for f in found) > .99 and found[0].n == 60


def test_people_are_not_looked_up():
    """An attribute of a person that is independent of the codes cannot be read, however well the person can be."""
    luck = np.random.default_rng(5).normal(size=24)[PEOPLE]
    values = np.hstack([np.eye(24)[PEOPLE], rng().normal(size=(240, 2))])
    assert probe(values, luck, PEOPLE).value < .1 and probe(values, np.where(luck > 0, 'a', 'b'), PEOPLE).value < .7


def test_probe_of_people_and_of_faces():
    tone = np.random.default_rng(1).normal(size=24)[PEOPLE]
    light = np.random.default_rng(2).normal(size=240)
    codes = made_codes(np.stack([tone, light, *rng().normal(size=(4, 240))], 1), skin_tone=tone, sex=np.where(tone > 0, 'f', 'm'),
                       camera_light=light, camera_yaw=np.zeros(240), gaze_yaw=np.where(PEOPLE == 3, math.nan, rng().permutation(light)))
    found = {f.name: f for f in stolen(codes)}
    assert list(found) == ['skin_tone', 'sex', 'camera_light', 'gaze_yaw']    # what never varies is left out
    assert found['skin_tone'].value > .9 and found['sex'].value > .8 and found['camera_light'].value > .9 and found['gaze_yaw'].p > .05
    assert found['gaze_yaw'].n == 230    # NaN left out
    assert found['skin_tone'].error > 0 and found['skin_tone'].p == .05


def test_labels_are_shuffled_by_the_unit_they_belong_to():
    person = shuffle_labels(PEOPLE * 1.5, PEOPLE, rng())
    assert len(set(zip(PEOPLE, person))) == 24 and sorted(set(person)) == sorted(set(PEOPLE * 1.5)) and not np.array_equal(person, PEOPLE * 1.5)
    within = shuffle_labels(np.arange(240), PEOPLE, rng())
    assert np.array_equal(within // 10, PEOPLE) and not np.array_equal(within, np.arange(240))


def test_the_same_seed_gives_the_same_finding():
    values = rng().normal(size=(240, 4))
    assert leakage(values, PEOPLE, CLASSES, seed=4) == leakage(values, PEOPLE, CLASSES, seed=4)
    found = leakage(values, PEOPLE, CLASSES)
    assert json.loads(json.dumps(found.to_dict()))['name'] == 'identity' and float(found) == found.value
    assert json.loads(json.dumps(silhouette(values, CLASSES).to_dict()))['error'] is None


def test_chance_is_chance():
    """Of many random targets few reach p = 0.05."""
    values = rng().normal(size=(240, 4))
    small = [probe(values, np.random.default_rng(seed).normal(size=24)[PEOPLE], PEOPLE).p <= .05 for seed in range(20)]
    assert sum(small) <= 4


# Disentanglement

def test_dci_of_axes_and_of_a_turned_copy():
    factors = rng().normal(size=(240, 5))
    axes = dci(np.hstack([factors, np.random.default_rng(3).normal(size=(240, 2))]), factors, list('abcde'), PEOPLE)
    assert min(axes.disentanglement.value, axes.completeness.value, axes.informativeness.value) > .95 and axes.disentanglement.p == .1
    assert axes.importance.shape == (7, 5) and (axes.importance.argmax(0) == range(5)).all()
    turned = dci(factors @ np.linalg.qr(rng().normal(size=(5, 5)))[0], factors, identities=PEOPLE)
    assert turned.disentanglement.value < .5 and turned.disentanglement.p > .1 and turned.informativeness.value > .95
    assert dci(rng().permutation(factors), factors, identities=PEOPLE).informativeness.value < .1


def test_dci_tells_disentangled_from_complete():
    """Two numbers for one factor: each is about one factor only, but the factor is spread over both."""
    factors = rng().normal(size=(240, 2))
    double = np.repeat(factors, 2, axis=1) + .3 * np.random.default_rng(1).normal(size=(240, 4))
    found = dci(double, factors, identities=PEOPLE)
    assert found.disentanglement.value > .9 and .3 < found.completeness.value < .7


def test_sides_are_merged():
    units, names = merge_sides(np.arange(8.).reshape(2, 4), ['xLeft', 'y', 'xRight', 'zLeft'])
    assert names == ['x', 'y', 'z'] and units.tolist() == [[1, 1, 3], [5, 5, 7]]


# Continuity: who copies, who ignores the code, who obeys

def neutral():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - .5


def brighten(faces, codes):
    """A model that does what it is told: the code's three numbers are added to the channels."""
    return faces + codes[:, :, None, None] / 4


@pytest.mark.parametrize('apply, slope, monotone', [(brighten, 1, 1), (lambda faces, codes: faces, 0, 0),
                                                    (lambda faces, codes: faces + .1, 0, 0), (lambda faces, codes: brighten(faces, -codes), -1, 0)])
def test_copying_and_ignoring_are_exposed(apply, slope, monotone):
    codes, read = rng().normal(size=(4, 3)), lambda faces: 4 * faces.mean((2, 3))
    found = continuity(SimpleNamespace(apply=apply, encode=read), neutral(), codes, wanted=codes + read(neutral()).numpy())
    assert found.monotone == monotone and (found.moved[:, -1].max() > 0) == (slope != 0)
    if apply(neutral(), torch.zeros(4, 3)).equal(neutral()):
        assert found.slope == pytest.approx(slope, abs=1e-4)


def test_continuity_refuses_what_does_not_fit():
    model, codes = SimpleNamespace(apply=brighten, encode=lambda faces: faces.mean((2, 3))), rng().normal(size=(4, 3))
    for strengths in ([0, 1], [0, 1, 1], [.5, 1, 2]):
        with pytest.raises(InputError, match='strengths'):
            continuity(model, neutral(), codes, strengths)
    with pytest.raises(InputError, match='one code for each'):
        continuity(model, neutral(), codes[:2])
    with pytest.raises(InputError, match='strength 0 already'):
        continuity(model, torch.zeros(4, 3, 16, 16), 0 * codes)


# Bad input

@pytest.mark.parametrize('call, words', [
    (lambda: leakage(np.eye(24)[PEOPLE], np.zeros(240), CLASSES), 'identities: all are'),
    (lambda: leakage(np.eye(24)[PEOPLE], PEOPLE, np.zeros(240)), 'classes: all are'),
    (lambda: leakage(np.eye(24)[PEOPLE]), '0 identities'),
    (lambda: leakage(np.full((240, 2), math.nan), PEOPLE, CLASSES), 'finite'),
    (lambda: leakage('codes', PEOPLE, CLASSES), 'mend'),
    (lambda: silhouette(np.zeros((4, 2)), [1, 1, 1, 1]), 'all are'),
    (lambda: silhouette(np.zeros((4, 2)), [1, 2, 3, 4]), '4 labels for 4 codes'),
    (lambda: class_distances(np.zeros((3, 2)), [1, 2]), '2 emotions for 3 codes'),
    (lambda: variance_shares(np.zeros((240, 2)), PEOPLE, CLASSES), 'constant'),
    (lambda: probe(np.zeros((240, 2)), 'age', PEOPLE), 'not known'),
    (lambda: stolen(np.zeros((240, 2))), 'nothing is known'),
    (lambda: unit_probe(np.zeros((240, 2)), np.zeros((240, 2)), ['a', 'b'], PEOPLE >= 23, PEOPLE), 'too few people'),
    (lambda: unit_probe(np.zeros((240, 2)), np.zeros((24, 2)), ['a', 'b'], PEOPLE >= 18, PEOPLE), '24 rows of units'),
    (lambda: dci(np.zeros((240, 1)), np.ones((240, 3)), identities=PEOPLE), 'at least two'),
    (lambda: gromov_wasserstein(np.eye(2), np.eye(3)), 'three'),
    (lambda: gromov_wasserstein(np.zeros((5, 2)), np.eye(3)), 'not all in one place'),
    (lambda: cluster_silhouette(np.eye(5), 5), 'clusters'),
])
def test_input_errors_are_one_line_with_a_mend(call, words):
    with pytest.raises(InputError, match=words) as error:
        call()
    assert 'mend: ' in str(error.value) and '\n' not in str(error.value)


def test_public_names_of_the_design():
    assert {'embed', 'tsne', 'class_distances', 'silhouette', 'leakage'} <= set(codespace.__all__)
    assert replace(made_codes(np.eye(10)[CLASSES]), root='x').root == 'x'
