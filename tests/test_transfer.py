"""A trained model in use: what the notebook 06_transfer does not try, on networks so small that nothing takes long."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from twocet_nb import transfer
from twocet_nb.data import InputError, bundled, card, to_pil, to_tensor
from twocet_nb.networks import OFFICIAL_KEYS, NetworkConfig, build_networks, save_networks
from twocet_nb.runs import SYNTHETIC, SyntheticImage, save_checkpoint, save_picture
from twocet_nb.transfer import CHECKS, CHUNK, TwoCET, codes_like, judge, judgement, print_judgement

CONFIG = NetworkConfig.tiny()
SIZE, DIM = CONFIG.image_size, CONFIG.code_dim
TEST_IDS = card('faces-64')['test_ids']


@pytest.fixture(scope='module')
def networks():
    return build_networks(CONFIG, seed=3)


@pytest.fixture(scope='module')
def model(networks):
    return TwoCET(CONFIG, networks['generator'], networks['encoder'], device='cpu')


@pytest.fixture(scope='module')
def faces():
    return torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def folder(tmp_path, faces):
    """Two neutral and two emotional faces in the folder contract, 24 x 20 px so that they have to be fitted."""
    for name, face in zip(('a_n/001_01', 'a_n/002_01', 'b_e/001_05', 'b_e/002_06'), faces):
        path = tmp_path/'test'/f'{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil(face).resize((24, 20)).save(path)
    return tmp_path


def kinds(path):
    """One picture in every form that is not a tensor."""
    return dict(path=path, text=str(path), pil=Image.open(path), array=np.array(Image.open(path)))


def same(networks, model, atol=0.0):
    ours = {**networks['generator'].state_dict(), **networks['encoder'].state_dict()}
    theirs = {**model.generator.state_dict(), **model.encoder.state_dict()}
    return all(torch.allclose(value, theirs[key], atol=atol) for key, value in ours.items())


# Kinds in, kinds out

@pytest.mark.parametrize('kind', ['path', 'text', 'pil', 'array'])
def test_pictures_give_marked_pictures(model, folder, kind):
    target, reference = (kinds(folder/f'test/{name}.png')[kind] for name in ('a_n/001_01', 'b_e/002_06'))
    for answer in (model.transfer(target, reference), model.neutralise(target), model.apply(target, torch.zeros(DIM)),
                   model.mix(target, reference, reference)):
        assert type(answer) is SyntheticImage and answer.size == (SIZE, SIZE)
    for answer in (model.transfer([target], reference), model.transfer(target, [reference]), model.neutralise([target]),
                   model.random(target, 1)):
        assert isinstance(answer, list) and [type(picture) for picture in answer] == [SyntheticImage]


@pytest.mark.parametrize('kind', ['path', 'text', 'pil', 'array'])
def test_all_kinds_are_the_same_picture(model, folder, kind):
    path = folder/'test/b_e/001_05.png'
    assert torch.equal(model.encode(kinds(path)[kind]), model.encode(to_tensor(path, SIZE)))


def test_tensors_give_tensors(model, faces):
    for answer, n in ((model.transfer(faces[0], faces[1]), 1), (model.transfer(faces[:2], faces[2]), 2),
                      (model.neutralise(faces), 5), (model.random(faces[0], 3), 3), (model.mix(faces[0], faces, faces), 5)):
        assert answer.shape == (n, 3, SIZE, SIZE) and answer.dtype == torch.float32
        assert answer.abs().max() <= 1 and answer.device.type == 'cpu'


def test_the_target_decides_about_the_kind(model, faces, folder):
    path = folder/'test/a_n/001_01.png'
    assert isinstance(model.transfer(path, faces[0]), SyntheticImage)
    assert [type(picture) for picture in model.transfer(path, faces)] == [SyntheticImage] * 5
    assert isinstance(model.transfer(faces[0], path), torch.Tensor)
    assert isinstance(model.transfer([faces[0]], path), list)


def test_results_can_be_learned_from(model, faces):
    code, face = model.encode(faces), model.neutralise(faces)
    assert not code.is_inference() and not face.is_inference()
    (code * torch.ones(DIM, requires_grad=True)).sum().backward()


def test_a_long_list_comes_back_in_order(model, faces):
    many = faces.repeat(CHUNK, 1, 1, 1)[:2 * CHUNK + 3]
    alone = torch.cat([model.encode(face) for face in faces])
    assert torch.allclose(model.encode(many), alone.repeat(CHUNK, 1)[:len(many)], atol=1e-5)
    assert torch.allclose(model.neutralise(many)[-1], model.neutralise(faces)[(len(many) - 1) % 5], atol=1e-4)


def test_a_face_in_a_row_is_looked_at_once(model, faces, monkeypatch):
    looked, look = [], model.generator.look
    monkeypatch.setattr(model.generator, 'look', lambda x: looked.append(len(x)) or look(x))
    drawn = model.apply(faces[[0, 0, 1, 0]], model.encode(faces[:4]))
    assert looked[-1] == 3
    alone = [model.apply(faces[i], code) for i, code in zip([0, 0, 1, 0], model.encode(faces[:4]))]
    assert torch.allclose(drawn, torch.cat(alone), atol=1e-5)


def test_only_a_chunk_is_in_memory(model, faces, monkeypatch):
    seen = []
    monkeypatch.setattr(transfer, 'to_tensor', lambda image, size: seen.append(image) or faces[0])
    monkeypatch.setattr(model.encoder, 'forward', lambda x: seen.append(len(x)) or torch.zeros(len(x), DIM))
    model.encode(['x.png'] * (CHUNK + 1))
    assert seen == ['x.png'] * CHUNK + [CHUNK, 'x.png', 1]


# What is computed

def test_transfer_is_the_equation(model, networks, faces):
    G, E, target, reference = networks['generator'], networks['encoder'], faces[:2], faces[2:4]
    zero = torch.zeros(2, DIM)
    with torch.inference_mode():
        direct, twice = G(target, 0.7 * E(reference)), G(G(target, zero), 0.7 * E(reference))
    assert torch.allclose(model.transfer(target, reference, 0.7), direct.clamp(-1, 1), atol=1e-5)
    assert torch.allclose(model.transfer(target, reference, 0.7, target_type=1), twice.clamp(-1, 1), atol=1e-5)
    assert not torch.allclose(direct.clamp(-1, 1), twice.clamp(-1, 1), atol=1e-2)


def test_auto_goes_by_the_folder(model, folder):
    a_n, b_e = sorted((folder/'test/a_n').iterdir()), sorted((folder/'test/b_e').iterdir())
    reference = b_e[1]
    assert np.array_equal(model.transfer(b_e[0], reference), model.transfer(b_e[0], reference, target_type=1))
    assert np.array_equal(model.transfer(a_n[0], reference), model.transfer(a_n[0], reference, target_type=0))
    assert np.array_equal(model.transfer(Image.open(b_e[0]), reference), model.transfer(b_e[0], reference, target_type=0))
    mixed = model.transfer([a_n[0], str(b_e[0])], reference)
    one_by_one = [model.transfer(path, reference) for path in (a_n[0], b_e[0])]
    assert all(np.abs(np.subtract(a, b, dtype=int)).max() <= 1 for a, b in zip(mixed, one_by_one))


@pytest.mark.parametrize('method', ['transfer', 'mix', 'apply'])
def test_strength_zero_is_the_neutral_face(model, faces, method):
    extra = dict(transfer=[faces[1]], mix=[faces[1], faces[2]], apply=[model.encode(faces[1])])[method]
    assert torch.equal(getattr(model, method)(faces[0], *extra, strength=0), model.neutralise(faces[0]))


def test_strength_may_be_negative_or_large(model, faces):
    code = model.encode(faces[1])
    for strength in (-1, 2.5, np.float32(0.5)):
        assert torch.allclose(model.transfer(faces[0], faces[1], strength), model.apply(faces[0], strength * code), atol=1e-6)


def test_mix_goes_from_one_to_the_other(model, faces):
    first, second = (model.transfer(faces[0], face) for face in faces[1:3])
    assert torch.equal(model.mix(*faces[:3], weight=0), first) and torch.equal(model.mix(*faces[:3], weight=1), second)
    middle = model.apply(faces[0], model.encode(faces[1:3]).mean(0))
    assert torch.allclose(model.mix(*faces[:3]), middle, atol=1e-5)


def test_one_goes_with_many(model, faces):
    by_target, by_reference = model.transfer(faces, faces[0]), model.transfer(faces[0], faces)
    assert by_target.shape == by_reference.shape == faces.shape
    for i, face in enumerate(faces):
        assert torch.allclose(by_target[i], model.transfer(face, faces[0])[0], atol=1e-5)
        assert torch.allclose(by_reference[i], model.transfer(faces[0], face)[0], atol=1e-5)


def test_random_repeats_itself(model, faces):
    assert torch.equal(model.random(faces[0], 3, seed=1), model.random(faces[0], 3, seed=1))
    assert not torch.equal(model.random(faces[0], 3, seed=1), model.random(faces[0], 3, seed=2))
    state = torch.get_rng_state()
    model.random(faces[0], 2)
    model.random(faces[0], 2, like=faces)
    assert torch.equal(state, torch.get_rng_state())


def test_random_codes_are_spread_like_those_of_faces(model, faces):
    known = torch.randn(6, DIM) * torch.arange(1, DIM + 1) + 3
    drawn = codes_like(known, 100_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), known.mean(0), atol=.1, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), known.T.cov(), atol=.02 * known.T.cov().max().item(), rtol=0)
    codes = codes_like(model.encode(faces), 3, torch.Generator().manual_seed(1))
    assert torch.equal(model.random(faces[0], 3, seed=1, like=faces), model.apply(faces[0], codes))


def test_sheets(model, faces):
    sheet, strip = model.matrix(faces[:2], faces[2:]), model.strip(faces[0], faces[1], (0, 1))
    assert type(sheet) is type(strip) is SyntheticImage
    assert sheet.size == (4 * (SIZE + 2) - 2, 3 * (SIZE + 2) - 2) and strip.size == (3 * (SIZE + 2) - 2, SIZE)
    cell = sheet.crop((SIZE + 2, SIZE + 2, 2 * SIZE + 2, 2 * SIZE + 2))
    expected = to_pil(model.transfer(faces[0], faces[2]))
    assert np.abs(np.subtract(cell, expected, dtype=int)).max() <= 1


# What is refused

@pytest.mark.parametrize('method', ['transfer', 'apply', 'mix'])
def test_three_cannot_go_with_two(model, faces, method):
    extra = dict(transfer=[faces[:2]], apply=[torch.zeros(2, DIM)], mix=[faces[:2], faces[0]])[method]
    with pytest.raises(InputError, match='3 and 2.*mend'):
        getattr(model, method)(faces[:3], *extra)


def test_two_references_cannot_be_mixed_with_three(model, faces):
    with pytest.raises(InputError, match='2 and 3.*mend'):
        model.mix(faces[0], faces[:2], faces[:3])


@pytest.mark.parametrize('strength', [float('nan'), float('inf'), '1', None, torch.ones(2)])
def test_strength_must_be_a_finite_number(model, faces, strength):
    for call in (lambda: model.transfer(faces[0], faces[1], strength), lambda: model.mix(*faces[:3], strength=strength),
                 lambda: model.apply(faces[0], torch.zeros(DIM), strength), lambda: model.matrix(faces[:1], faces[1:2], strength),
                 lambda: model.strip(faces[0], faces[1], [strength])):
        with pytest.raises(InputError, match='strength.*mend'):
            call()


@pytest.mark.parametrize('code', [torch.zeros(DIM + 1), torch.zeros(1, 1, DIM), torch.full((DIM,), torch.nan),
                                  torch.zeros(0, DIM), 'happy', [[0.0], [1.0, 2.0]], None])
def test_codes_must_fit(model, faces, code):
    with pytest.raises(InputError, match='mend'):
        model.apply(faces[0], code)


@pytest.mark.parametrize('call', [
    lambda m, f: m.encode([]), lambda m, f: m.neutralise(f[:0]), lambda m, f: m.transfer(f[0], []), lambda m, f: m.matrix([], f),
    lambda m, f: m.random(f[:2]), lambda m, f: m.random(f[0], 0), lambda m, f: m.random(f[0], like=f[0]), lambda m, f: m.random(f[0], like=[]), lambda m, f: m.strip(f[0], f[1], ()),
    lambda m, f: m.strip(f[:2], f[1]), lambda m, f: m.strip(f[0], f[:2]),
    lambda m, f: m.transfer(f[0], f[1], target_type='happy'), lambda m, f: m.transfer(f[0], f[1], target_type=2),
    lambda m, f: m.mix(*f[:3], weight=float('nan')), lambda m, f: m.neutralise(f[0, :2]), lambda m, f: m.neutralise(f[0] * 3),
    lambda m, f: m.encode(Image.new('LA', (8, 8))), lambda m, f: m.encode(np.zeros((8, 8, 3))), lambda m, f: m.encode(None)])
def test_what_cannot_be_used_is_refused(model, faces, call):
    with pytest.raises(InputError):
        call(model, faces)


def test_a_broken_picture_is_named(model, folder):
    good = folder/'test/a_n/001_01.png'
    (folder/'half.png').write_bytes(good.read_bytes()[:80])
    for name in ('half.png', 'gone.png'):
        with pytest.raises(InputError, match=name):
            model.transfer(good, [good, folder/name])


# The mark

@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.webp'])
def test_files_say_that_they_are_synthetic(model, faces, folder, suffix):
    path = folder/'test/a_n/001_01.png'
    answers = [model.transfer(path, path), *model.random(path, 1), model.matrix([path], [path]), model.strip(path, path)]
    for save in (lambda picture, out: picture.save(out), save_picture):
        for picture in answers:
            save(picture, folder/f'out{suffix}')
            with Image.open(folder/f'out{suffix}') as saved:
                assert saved.getexif()[0x010E] == SYNTHETIC
                if suffix == '.png': assert saved.text['Comment'] == SYNTHETIC


# Files

def test_load_prefers_the_averages(networks, tmp_path):
    averages = build_networks(CONFIG, seed=4)
    both = {name: networks[name] for name in ('generator', 'encoder')}
    both |= {f'{name}_ema': averages[name] for name in both}
    save_networks(tmp_path/'both.safetensors', CONFIG, both, extra={'note': 'two of each'})
    loaded = TwoCET.load(tmp_path/'both.safetensors', 'cpu')
    assert same(averages, loaded) and loaded.config == CONFIG and loaded.card['extra'] == {'note': 'two of each'}


def test_save_and_load(model, networks, tmp_path):
    for half, atol in ((False, 0.0), (True, 2e-3)):
        model.save(tmp_path/f'{half}.safetensors', half)
        loaded = TwoCET.load(tmp_path/f'{half}.safetensors', 'cpu')
        assert same(networks, loaded, atol) and next(loaded.generator.parameters()).dtype == torch.float32
    sizes = [(tmp_path/f'{half}.safetensors').stat().st_size for half in (False, True)]
    assert sizes[1] < 0.75 * sizes[0]


def test_the_card_travels_on(tmp_path, networks):
    save_networks(tmp_path/'a.safetensors', CONFIG, {n: networks[n] for n in ('generator', 'encoder')}, extra={'seed': 3})
    TwoCET.load(tmp_path/'a.safetensors', 'cpu').save(tmp_path/'b.safetensors')
    assert TwoCET.load(str(tmp_path/'b.safetensors'), 'cpu').card['extra'] == {'seed': 3}


@pytest.fixture
def run(tmp_path, networks):
    """A run folder with one checkpoint."""
    averages = {f'{name}_ema': networks[name] for name in ('generator', 'encoder')}
    checkpoint = tmp_path/'run/checkpoints/step-000007'
    checkpoint.parent.mkdir(parents=True)
    save_checkpoint(checkpoint, networks | averages, CONFIG, {})
    return tmp_path/'run'


def test_load_a_run_or_a_checkpoint(run, networks):
    assert same(networks, TwoCET.load(run, 'cpu'))
    assert same(networks, TwoCET.load(str(run/'checkpoints/step-000007'), 'cpu'))


def test_a_run_without_an_encoder_is_refused(run):
    (run/'checkpoints/step-000007/encoder_ema.safetensors').unlink()
    with pytest.raises(InputError, match='encoder_ema.safetensors'):
        TwoCET.load(run, 'cpu')
    shutil.rmtree(run/'checkpoints/step-000007')
    with pytest.raises(InputError, match='run'):
        TwoCET.load(run, 'cpu')


def test_broken_files_are_named(model, networks, tmp_path):
    model.save(tmp_path/'whole.safetensors')
    (tmp_path/'half.safetensors').write_bytes((tmp_path/'whole.safetensors').read_bytes()[:-100])
    (tmp_path/'text.safetensors').write_text('not weights')
    torch.save({'generator': {}}, tmp_path/'pickle.safetensors')
    save_networks(tmp_path/'lacking.safetensors', CONFIG, {'generator': networks['generator']})
    for name in ('half', 'text', 'pickle', 'lacking', 'gone'):
        with pytest.raises(InputError, match=f'{name}.safetensors'):
            TwoCET.load(tmp_path/f'{name}.safetensors', 'cpu')


def test_shipped_weights():
    model = TwoCET.pretrained(device='cpu')
    assert model.config == NetworkConfig.course(64, 32, 256) and '64 px' in repr(model) and 'TwoCET' in repr(model)
    with pytest.raises(InputError, match='faces-1024'):
        TwoCET.pretrained('faces-1024')


# The authors' checkpoints

def official(networks, *names):
    """Networks as the authors store them: a dict of state dicts under their names."""
    states = {}
    for name in names:
        states[name] = {}
        for key, value in networks[name].state_dict().items():
            for theirs, ours in OFFICIAL_KEYS[name].items(): key = key.replace(ours, theirs)
            states[name][key] = value
    return states


def test_from_official(model, networks, faces, tmp_path):
    torch.save(official(networks, 'generator', 'encoder', 'discriminator'), tmp_path/'000005_model.ckpt')
    loaded = TwoCET.from_official(tmp_path/'000005_model.ckpt', 'cpu')
    assert torch.equal(loaded.transfer(faces[0], faces[1]), model.transfer(faces[0], faces[1]))
    loaded.save(tmp_path/'ours.safetensors')
    again = TwoCET.load(tmp_path/'ours.safetensors', 'cpu')
    assert same(networks, again) and again.card['extra'] == {'from': '000005_model.ckpt'}


def test_official_files_that_will_not_do(networks, tmp_path):
    torch.save(official(networks, 'generator'), tmp_path/'lacking.ckpt')
    torch.save({'optimizer': 1}, tmp_path/'optims.ckpt')
    (tmp_path/'broken.ckpt').write_bytes((tmp_path/'lacking.ckpt').read_bytes()[:500])
    for name in ('lacking', 'optims', 'broken', 'gone'):
        with pytest.raises(InputError, match=f'{name}.ckpt'):
            TwoCET.from_official(tmp_path/f'{name}.ckpt', 'cpu')


# The judge

def small_dataset(root, people=TEST_IDS[:2], classes=(1, 2, 6)):
    for person in people:
        for cls in classes:
            name = f'test/{"b_e" if cls > 1 else "a_n"}/{person}_{cls:02d}.png'
            (root/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(bundled('faces-64')/name, root/name)
    return root


class Copier(TwoCET):
    """The laziest model: it gives every face back as it was."""
    def apply(self, neutral, code, strength=1.0):
        return neutral


def test_the_judge_sees_through_a_copier(networks, tmp_path, capsys):
    root = small_dataset(tmp_path)
    numbers = judge(Copier(CONFIG, networks['generator'], networks['encoder'], 'cpu'), root)
    assert numbers['faces'] == 4 and numbers['zero_l1'] == 0 == numbers['diversity'] == numbers['cross_wins']
    assert numbers['self_l1'] == numbers['cross_l1'] == numbers['wrong_l1'] == numbers['neutral_l1'] == numbers['copy_l1'] > 0
    verdicts = [row[-1] for row in judgement(numbers)]
    assert len(verdicts) == len(CHECKS) and 'better' not in verdicts and verdicts[3] == 'the code is not used'
    print_judgement(numbers)
    assert capsys.readouterr().out.count('worse than doing nothing') == 3


def test_the_judge_repeats_itself(model, tmp_path):
    root = small_dataset(tmp_path)
    assert judge(model, root) == judge(model, root, seed=0)
    assert judge(model, root)['code_l1'] != judge(model, root, seed=1)['code_l1']


def test_partners_are_what_they_are_called(monkeypatch, tmp_path):
    """Every face is painted with its person (red) and class (green), so that partners can be read off."""
    for person in range(3):
        for cls in range(1, 5):
            path = tmp_path/'test'/('b_e' if cls > 1 else 'a_n')/f'p{person}_{cls:02d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (16, 16), (person, cls, 0)).save(path)
    real = {name: ((x[:, :2, 0, 0] + 1) * 127.5).round().long() for name, x in transfer.judged_faces(tmp_path, 16).items()}
    person, cls = real['face'].T
    assert len(person) == 9 and (cls > 1).all()
    assert (real['neutral'].T[0] == person).all() and (real['neutral'].T[1] == 1).all()
    assert (real['same'].T[0] != person).all() and (real['same'].T[1] == cls).all()
    assert (real['other'].T[0] != person).all() and (real['other'].T[1] != cls).all()
    assert (real['sibling'].T[0] == person).all() and (real['sibling'].T[1] != cls).all()


def test_one_person_cannot_be_judged(model, tmp_path):
    with pytest.raises(InputError, match='two people'):
        judge(model, small_dataset(tmp_path, people=TEST_IDS[:1]))
