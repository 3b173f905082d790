"""Exact truth: errors in regions, and whether the judge tells honest candidates from cheats."""
import csv
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from twocet_nb import truth
from twocet_nb.data import InputError, bundled, card
from twocet_nb.features import FaceReader
from twocet_nb.transfer import TwoCET, l1
from twocet_nb.truth import (CANDIDATES, KINDS, REGIONS, Exam, comparison, error_map, jackknife, judge_truth, known_units, masked_l1, masked_psnr,
                             masked_ssim, mean_by_person, print_truth, read_pictures, remaining, ssim_map, transfer_errors, truth_pairs, unit_r2, varying_units, wins)


@pytest.fixture(scope='module')
def reader():
    return FaceReader.pretrained()


@pytest.fixture(scope='module')
def pairs():
    return truth_pairs('truth-64')


@pytest.fixture(scope='module')
def exam(pairs):
    """Eight cross pairs of every target: few enough to be quick."""
    return [pair for person in sorted({pair.person for pair in pairs})
            for pair in [pair for pair in pairs if pair.person == person and pair.kind == 'cross'][::2][:8]]


@pytest.fixture(scope='module')
def sheet(exam):
    return read_pictures(exam, 64)


def crib(pictures, answers):
    """A 'model' that knows by heart which answer to give to which target and reference."""
    def key(*images):
        return b''.join(image.numpy().tobytes() for image in images)
    book = {key(a, b): answer for a, b, answer in zip(pictures.target, pictures.reference, answers)}
    return SimpleNamespace(config=SimpleNamespace(image_size=answers.shape[-1]),
                           transfer=lambda targets, references: torch.stack([book[key(*pair)] for pair in zip(targets, references)]))


def images(n, size, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))*2 - 1


# Errors in regions

@pytest.mark.parametrize('size', [16, 64, 97])
def test_whole_pictures_as_torchmetrics_has_them(size):
    a = images(3, size)
    b = (a + .3*images(3, size, 1)).clamp(-1, 1)
    whole = torch.ones(3, 1, size, size)
    mean, theirs = structural_similarity_index_measure(b.double(), a.double(), data_range=2., reduction='none', return_full_image=True)
    torch.testing.assert_close(ssim_map(b.double(), a.double()), theirs)
    torch.testing.assert_close(masked_ssim(b, a, whole)[:, 0].double(), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(masked_psnr(b, a, whole)[:, 0], torch.stack([peak_signal_noise_ratio(x, y, data_range=2.) for x, y in zip(b, a)]))
    torch.testing.assert_close(masked_l1(b, a, whole)[:, 0], l1(b, a))


def test_only_what_is_inside_a_region_counts():
    a, masks = images(2, 32), torch.zeros(2, 2, 32, 32)
    masks[:, 0, 8:24, 8:24] = masks[:, 1, :, :16] = 1
    b = a.clone()
    b[:, :, 8:24, 8:24] += .25
    assert torch.allclose(masked_l1(a, b, masks)[:, 0], torch.tensor(.25)) and torch.allclose(masked_l1(a, b, masks)[:, 1], torch.tensor(.25*128/512))
    assert torch.allclose(masked_psnr(a, b, masks)[:, 0], torch.tensor(10*math.log10(4/.0625)))
    by_hand = ssim_map(a, b)[:, :, 8:24, 8:24].mean((1, 2, 3))
    torch.testing.assert_close(masked_ssim(a, b, masks)[:, 0], by_hand)
    b[:, :, :2] = 9  # outside of the first region, and too far away for any window in it
    assert torch.allclose(masked_l1(a, b, masks)[:, 0], torch.tensor(.25))
    torch.testing.assert_close(masked_ssim(a, b, masks)[:, 0], by_hand)


def test_weights_at_the_edge_and_empty_regions():
    a, b, masks = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), torch.zeros(1, 2, 16, 16)
    b[..., 0], b[..., 1] = .5, 1
    masks[:, 0, :, 0], masks[:, 0, :, 1] = 1, .5
    found = masked_l1(a, b, masks)
    assert math.isclose(found[0, 0], (.5 + .5)/1.5, rel_tol=1e-6) and found[0, 1].isnan() and masked_psnr(a, b, masks)[0, 1].isnan()
    assert masked_psnr(a, a, masks)[0, 0] == 100


def test_the_error_map_has_a_sign():
    right = torch.zeros(3, 3, 1, 1)
    drawn = torch.tensor([0, .25, -1]).view(3, 1, 1, 1).expand(3, 3, 1, 1)
    assert error_map(drawn, right).flatten(1).tolist() == [[0, 0, 0], [.5, .5, -.5], [-1, -1, 1]]


# Numbers of rows

def test_jackknife_of_a_mean_is_the_textbook_error():
    rows = [dict(person=str(i % 7), x=float(x)) for i, x in enumerate(np.random.default_rng(0).normal(size=70))]
    of_person = [np.mean([row['x'] for row in rows if row['person'] == str(i)]) for i in range(7)]
    found = jackknife(lambda rows: mean_by_person(rows, 'x'), rows)
    assert math.isclose(found['value'], np.mean(of_person)) and math.isclose(found['se'], np.std(of_person, ddof=1)/math.sqrt(7))
    assert math.isnan(jackknife(lambda rows: mean_by_person(rows, 'x'), rows[:1])['se'])
    assert mean_by_person([dict(person='a', x=math.nan), dict(person='b', x=2.)], 'x') == 2


def test_r_squared_of_units():
    rng = np.random.default_rng(0)
    known = rng.random((50, 2))*[1, .01]

    def rows(read):
        return [{f'{who}_unit_{i}': x for who, values in (('known', k), ('model', r)) for i, x in enumerate(values)} for k, r in zip(known, read)]
    names = ['unit_0', 'unit_1']
    assert unit_r2(rows(known), 'model', names).tolist() == [1, 1] and varying_units(rows(known), names) == ['unit_0']
    torch.testing.assert_close(unit_r2(rows(0*known + known.mean(0)), 'model', names).float(), torch.zeros(2), atol=1e-6, rtol=0)
    noisy = known + rng.normal(size=known.shape)*[.1, .1]
    one, two = unit_r2(rows(noisy), 'model', names).tolist()
    assert math.isclose(one, 1 - ((noisy - known)**2)[:, 0].sum()/(50*known[:, 0].var()), rel_tol=1e-4) and two < 0 < one < 1


def test_wins_are_one_half_without_the_reference():
    right = images(9, 16)
    for drawn in (images(1, 16, 1), right[:1]):
        assert math.isclose(wins(drawn.expand_as(right), right).mean(), .5, rel_tol=1e-6)
    assert wins(right, right).eq(1).all() and wins(right.roll(1, 0), right).lt(1).all() and wins(right[:1], right[:1]).isnan().all()


# The exam

def test_the_bundled_exam(pairs):
    kinds = {kind: [pair for pair in pairs if pair.kind == kind] for kind in KINDS}
    assert {kind: len(some) for kind, some in kinds.items()} == {'cross': card('truth-64')['cross_pairs'], 'self': card('truth-64')['own_pairs']}
    for kind, some in kinds.items():
        assert {pair.person for pair in some} == set(card('faces-64')['test_ids']) and len({pair.cls for pair in some}) == 25
        assert len({pair.answer for pair in some}) == len({(pair.target, pair.reference) for pair in some}) == len(some)
        assert all((pair.reference.stem[:3] == pair.person) == (kind == 'self') for pair in some)
    larger = truth_pairs('truth-128')
    assert [(a.target.stem, a.reference.stem) for a in larger] == [(a.target.stem, a.reference.stem) for a in pairs]


def test_masks_and_noise_of_the_exam(sheet):
    _, face, eyes, mouth = sheet.masks.unbind(1)
    assert ((0 <= sheet.masks) & (sheet.masks <= 1)).all() and all((part.sum((1, 2)) > 5).all() for part in (face, eyes, mouth))
    assert (torch.maximum(eyes, mouth) <= face + .02).all()
    outside = 1 - face[:, None]
    copied, stranger, floor = (masked_l1(a, b, outside).mean() for a, b in
                               [(sheet.target, sheet.answer), (sheet.target, sheet.again), (sheet.answer, sheet.again)])
    assert 0 < copied < .8*floor < floor and abs(stranger/floor - 1) < .3  # the answer has its target's noise, `again` has its own


def test_smaller_models_sit_the_same_exam(exam, sheet):
    small = read_pictures(exam, 32)
    torch.testing.assert_close(small.answer[0, 0, 0, 0], sheet.answer[0, 0, :2, :2].mean())
    rows = transfer_errors(crib(small, small.answer), exam)
    assert abs(remaining(rows, 'l1_face')) < 1e-6


# Candidates

@pytest.fixture(scope='module')
def judged(exam, sheet, reader):
    """What the judge says of candidates who are as sharp as any render."""
    first = [next(j for j, other in enumerate(exam) if other.target == pair.target) for pair in exam]
    answers = dict(oracle=sheet.answer, copies=sheet.target, constant=sheet.answer[first], leaks=sheet.reference, half=(sheet.answer + sheet.target)/2)
    return {name: judge_truth(crib(sheet, answer), exam, reader)['cross'] for name, answer in answers.items()}


def values(judged, *path):
    """{candidate: value} of one number."""
    def of(found):
        for key in path:
            found = found[key]
        return found['value']
    return {name: of(found) for name, found in judged.items()}


@pytest.mark.parametrize('region', REGIONS)
def test_the_oracle_is_right_everywhere(judged, region):
    for measure in ('l1', 'psnr', 'ssim'):
        left = values(judged, measure, region, 'remaining')
        assert abs(left['oracle']) < 1e-6 and abs(left['copies'] - 1) < 1e-6 and 0 < left['half'] < 1 < left['leaks'], measure
    found = values(judged, 'l1', region, 'model')
    assert found['oracle'] < found['half'] < found['copies'] < found['leaks']
    assert found['oracle'] < .035  # noise alone


def test_ignoring_the_reference_is_seen(judged):
    won = values(judged, 'wins', 'model')
    assert abs(won['copies'] - .5) < 1e-6 and abs(won['constant'] - .5) < 1e-6 and won['oracle'] > .95 and won['half'] > .6


def test_movements_are_seen(judged):
    r2 = values(judged, 'units', 'mean', 'model')
    own = judged['oracle']['units']['mean']['perfect']['value']
    assert r2['oracle'] == own > .5 and r2['leaks'] > own - .25 and max(r2['copies'], r2['constant']) < .1 and r2['copies'] < r2['half'] < r2['oracle']


def test_a_leaking_identity_is_seen(judged):
    target, reference = values(judged, 'like_target', 'model'), values(judged, 'like_reference', 'model')
    assert target['copies'] > .999 and reference['leaks'] > .999
    assert target['oracle'] - target['leaks'] > .3 and reference['leaks'] - reference['oracle'] > .3
    assert abs(reference['oracle'] - reference['copies']) < .2


def test_anchors_do_not_depend_on_the_model(judged):
    for who in set(CANDIDATES) - {'model'}:
        assert len({json.dumps([found['l1'][region][who] for region in REGIONS]) for found in judged.values()}) == 1
        assert len(set(values(judged, 'units', 'mean', who).values())) == 1


def test_twice_the_same_json(pairs, reader, capsys):
    model, some = TwoCET.pretrained('faces-64', 'cpu'), [pair for pair in pairs if pair.person in ('083', '117')][::6]
    first, second = (judge_truth(model, some, reader) for _ in range(2))
    assert json.dumps(first) == json.dumps(second) and reader.protocol in first['protocol'] and '64 px' in first['protocol']
    print_truth(first)
    assert all(f'{kind}: {first[kind]["pairs"]} pairs, 2 people' in capsys.readouterr().out or kind == 'self' for kind in KINDS)
    assert len(comparison(model, some[:2])) == 2


def test_an_exam_marks_its_anchors_once_for_all_models(exam, sheet, reader, monkeypatch):
    shared, sheets, mark = Exam(exam, 64, reader), [], truth._anchors
    for answers in (sheet.target, sheet.answer):
        model = crib(sheet, answers)
        alone = judge_truth(model, exam, reader)
        with monkeypatch.context() as patch:
            patch.setattr(truth, '_anchors', lambda pairs, *rest: (sheets.append(pairs), mark(pairs, *rest))[1])
            assert json.dumps(judge_truth(model, shared)) == json.dumps(alone)
    assert sheets == shared.sheets and len(sheets) == len({pair.target for pair in exam})


def test_exams_that_do_not_fit(exam, sheet):
    model = crib(sheet, sheet.target)
    with pytest.raises(InputError, match='128 px for a model of 64.*mend'):
        transfer_errors(model, Exam(exam, 128))
    with pytest.raises(InputError, match='without a reader.*mend'):
        judge_truth(model, Exam(exam, 64))
    with pytest.raises(InputError, match='no pairs.*mend'):
        Exam([], 64)


def test_the_order_of_the_questions_does_not_matter(exam, sheet):
    model, backwards = crib(sheet, sheet.target), exam[::-1]
    a, b = transfer_errors(model, exam), transfer_errors(model, backwards)[::-1]
    assert [row['reference'] for row in a] == [row['reference'] for row in b] == [pair.reference.stem for pair in exam]
    for x, y in zip(a, b):
        assert all(x[name] == y[name] if isinstance(x[name], str) else math.isclose(x[name], y[name], rel_tol=1e-4) for name in x)


# What cannot be judged

@pytest.fixture
def folder(tmp_path):
    """An exam of two questions in a folder inside its pack, as `make_truth` lays it out."""
    faces, truth = tmp_path/'pack', tmp_path/'pack'/'truth'
    picture = Image.fromarray(np.full((16, 16, 3), 99, np.uint8))
    for name in ('test/a_n/001_01', 'test/b_e/002_05', 'test/b_e/001_05', *[f'truth/{place}{name}' for place in ('', 'again/', 'masks/') for name in 'ab']):
        (faces/name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(faces/f'{name}.png')
    (truth/'pairs.csv').write_text('file,target,reference,class,emotion\na.png,test/a_n/001_01.png,test/b_e/002_05.png,5,angry\n'
                                   'b.png,test/a_n/001_01.png,test/b_e/001_05.png,5,angry\n')
    (faces/'images.csv').write_text('file,unit_jawOpen\ntest/b_e/002_05.png,0.25\ntest/b_e/001_05.png,0.75\n')
    return truth


def test_an_exam_in_a_folder(folder, tmp_path):
    pairs = truth_pairs(folder)
    assert [pair.kind for pair in pairs] == ['cross', 'self'] and known_units(pairs, ['unit_jawOpen']).flatten().tolist() == [.25, .75]
    shutil.move(folder, tmp_path/'elsewhere')
    assert [pair.target for pair in truth_pairs(tmp_path/'elsewhere', folder.parent)] == [pair.target for pair in pairs]


def drop(path): path.unlink()


@pytest.mark.parametrize('harm, say', [
    (lambda folder: drop(folder/'pairs.csv'), 'no exam'), (lambda folder: drop(folder/'a.png'), 'a.png: missing'),
    (lambda folder: drop(folder/'again'/'b.png'), 'b.png: missing'), (lambda folder: drop(folder/'masks'/'a.png'), 'a.png: missing'),
    (lambda folder: drop(folder.parent/'test'/'b_e'/'002_05.png'), '002_05.png: missing'),
    (lambda folder: (folder/'a.png').write_bytes(b'no image'), 'a.png: not a readable image'),
    (lambda folder: drop(folder.parent/'images.csv'), 'images.csv: missing'),
    (lambda folder: (folder.parent/'images.csv').write_text('file,unit_x\ntest/b_e/002_05.png,1\ntest/b_e/001_05.png,1\n'), 'unit_'),
    (lambda folder: (folder/'pairs.csv').write_text('file,target\na.png,b.png\n'), 'pairs.csv'),
])
def test_what_is_missing_is_named(folder, reader, harm, say):
    harm(folder)
    model = SimpleNamespace(config=SimpleNamespace(image_size=16), transfer=lambda targets, references: targets)
    with pytest.raises(InputError, match=say) as error:
        judge_truth(model, truth_pairs(folder), reader)
    assert 'mend' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('size', [24, 128, 256])
def test_another_size_is_refused(exam, size):
    model = SimpleNamespace(config=SimpleNamespace(image_size=size), transfer=lambda targets, references: targets)
    with pytest.raises(InputError, match=f'64 x 64 px cannot be averaged to {size} x {size}; mend'):
        transfer_errors(model, exam[:1])


@pytest.mark.parametrize('answer', [lambda targets, references: None, lambda targets, references: targets[:1], lambda targets, references: targets*math.nan,
                                    lambda targets, references: list(targets)])
def test_what_is_no_drawing_is_refused(exam, answer):
    with pytest.raises(InputError, match='transfer gave.*mend'):
        transfer_errors(SimpleNamespace(config=SimpleNamespace(image_size=64), transfer=answer), exam[:3])


def test_no_pairs(reader):
    with pytest.raises(InputError, match='no pairs'):
        judge_truth(SimpleNamespace(config=SimpleNamespace(image_size=64)), [], reader)
