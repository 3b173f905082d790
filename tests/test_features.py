"""Features: the face reader on people it never saw, and the networks of the papers with random numbers in them."""
import hashlib
import io
import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twocet_nb import features
from twocet_nb.data import InputError, _asset
from twocet_nb.features import FaceReader, ReaderConfig, WEIGHTS, judge_reader, read_labels

SHIPPED = _asset('reader-faces.safetensors')


@pytest.fixture(scope='module')
def reader():
    return FaceReader.pretrained('cpu')


@pytest.fixture(scope='module')
def test_faces(reader):
    return read_labels('faces-64', 'test', unit_names=reader.unit_names)


@pytest.fixture(scope='module')
def errors(reader, test_faces):
    return judge_reader(reader, test_faces)


class TestReader:
    def test_extractor(self, reader):
        assert (reader.protocol, reader.distance, reader.score) == ('faces (offline)', 'face distance', 'expression score')
        x = torch.rand(3, 3, 40, 50) * 2 - 1
        assert reader(x).shape == (3, reader.dim) and reader(x).dtype == torch.float32
        assert reader.features(x).equal(reader(x)) and reader.units(x).shape == (3, len(reader.unit_names))
        assert reader.identity(x).norm(dim=1).allclose(torch.ones(3))
        p = reader.probabilities(x)
        assert p.shape == (3, len(reader.emotions)) and p.sum(1).allclose(torch.ones(3)) and (p >= 0).all()
        assert not reader(x).requires_grad and not reader.network.training

    def test_same_picture_same_features_whoever_is_beside_it(self, reader, test_faces):
        x = test_faces.images[:features.CHUNK + 3]
        whole = reader(x)
        assert reader(x).equal(whole)
        for rows in ([0], [5, 0, 66], list(range(40))):
            assert reader(x[rows]).allclose(whole[rows], atol=1e-4)
        assert reader(x.float() / 127.5 - 1).equal(whole), '8-bit and float pictures are the same pictures'

    def test_size_of_the_file_hardly_matters(self, reader, test_faces):
        large = read_labels('faces-128', 'test', size=128, unit_names=reader.unit_names)
        assert [Path(r['file']).stem for r in large.rows] == [Path(r['file']).stem for r in test_faces.rows]
        small, large = reader(test_faces.images), reader(large.images)
        others = torch.cdist(small, small) + torch.eye(len(small)) * 1e6
        assert ((small - large).norm(dim=1) < others.min(1).values).float().mean() > .9

    @pytest.mark.parametrize('bad', [torch.full((1, 3, 64, 64), 1.5), torch.full((1, 3, 64, 64), torch.nan), torch.zeros(3, 64, 64),
                                     torch.zeros(0, 3, 64, 64), torch.zeros(1, 1, 64, 64), [1, 2], None])
    @pytest.mark.parametrize('method', ['features', 'identity', 'units', 'probabilities'])
    def test_bad_images(self, reader, bad, method):
        with pytest.raises(InputError, match='mend'):
            getattr(reader, method)(bad)

    def test_leaves_the_random_state_alone(self, reader, test_faces):
        state = torch.get_rng_state()
        reader(test_faces.images[:2])
        assert torch.get_rng_state().equal(state)


class TestReads:
    def test_units_of_unseen_people(self, errors, test_faces):
        """Better than what is known without looking at the face: the mean of everybody's, and of the person's own other faces."""
        people = torch.tensor([sorted(set(test_faces.identities)).index(p) for p in test_faces.identities])
        own_mean = torch.stack([test_faces.units[people == p].mean(0) for p in people])
        bar = features.r_squared(own_mean, test_faces.units).mean().item()
        assert errors['mean_r2'] > max(bar, 0) + .4
        assert min(errors['r2'].values()) > 0 and len(errors['r2']) >= 20

    def test_needs_the_face(self, reader, test_faces, errors):
        """With the faces exchanged between rows, nothing is left of it."""
        shuffled = test_faces.units[torch.randperm(len(test_faces.units), generator=torch.Generator().manual_seed(0))]
        assert features.r_squared(reader.units(test_faces.images), shuffled).mean() < 0 < errors['mean_r2']

    def test_identity_of_unseen_people(self, errors):
        assert errors['auc'] > .97 and errors['equal_error'] < .1 and errors['rank_1'] > .9

    def test_identity_and_expression_are_told_apart(self, reader, test_faces):
        who, units = reader.identity(test_faces.images), reader.units(test_faces.images)
        find = {(p, c): k for k, (p, c) in enumerate(zip(test_faces.identities, test_faces.classes.tolist()))}
        people = sorted(set(test_faces.identities))
        a, same, other = (torch.tensor([find[p, c] for p in ps for c in cs]) for ps, cs in (
            (people, range(2, 26)), (people, range(3, 27)), (people[1:] + people[:1], range(2, 26))))
        assert (who[a] * who[same]).sum(1).mean() > (who[a] * who[other]).sum(1).mean() + .4
        assert (units[a] - units[same]).abs().mean() > 1.3 * (units[a] - units[other]).abs().mean()

    def test_other_pack(self, reader):
        angles = read_labels('angles-64', unit_names=reader.unit_names)
        frontal = angles.choose([k for k, row in enumerate(angles.rows) if float(row['camera_angle']) == 0])
        numbers = judge_reader(reader, frontal)
        assert numbers['people'] == 12 and numbers['mean_r2'] > .4 and numbers['auc'] > .95

    def test_card_tells_the_truth(self, reader, errors):
        card = json.loads(SHIPPED.with_suffix('.json').read_text(encoding='utf-8'))
        assert {key: card[key] for key in reader.card} == reader.card
        assert card['sha256'] == hashlib.sha256(SHIPPED.read_bytes()).hexdigest() and card['licence'] == 'Apache-2.0'
        assert card['sha256'] in (SHIPPED.parent/'README.md').read_text(encoding='utf-8')
        assert card['held_out']['faces-64 test']['mean_r2'] == pytest.approx(errors['mean_r2'], abs=.01)
        assert SHIPPED.stat().st_size <= 5e6


class TestFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match='nowhere'):
            FaceReader.load(tmp_path/'nowhere.safetensors')

    def test_damaged(self, tmp_path):
        path = tmp_path/'half.safetensors'
        path.write_bytes(SHIPPED.read_bytes()[:100_000])
        with pytest.raises(InputError, match='damaged'):
            FaceReader.load(path)

    def test_pickle_is_not_opened(self, tmp_path, capsys):
        torch.save({'a': Innocent()}, tmp_path/'reader.pt')
        with pytest.raises(InputError, match='pickle'):
            FaceReader.load(tmp_path/'reader.pt')
        assert 'was run' not in capsys.readouterr().out

    def test_other_shape(self, reader, tmp_path):
        wide = FaceReader(reader.network, replace(reader.config, width=32), reader.unit_names, reader.emotions, 'cpu')
        wide.save(tmp_path/'wide.safetensors')
        with pytest.raises(InputError, match='do not fit'):
            FaceReader.load(tmp_path/'wide.safetensors')

    def test_other_networks(self, tmp_path):
        with pytest.raises(InputError, match='no reader|no face reader'):
            FaceReader.load(_asset('weights-faces-64.safetensors'))
        save_file({'a': torch.zeros(2)}, tmp_path/'a.safetensors')
        with pytest.raises(InputError, match='mend'):
            FaceReader.load(tmp_path/'a.safetensors')

    def test_no_labels(self, tmp_path):
        with pytest.raises(InputError, match='images.csv'):
            read_labels(tmp_path)
        with pytest.raises(InputError, match='split'):
            read_labels('faces-64', 'validation')
        with pytest.raises(InputError, match='unit_nose'):
            read_labels('faces-64', 'test', unit_names=['unit_nose'])


class TestTraining:
    CONFIG = ReaderConfig(image_size=32, width=4, dim=8, identity_dim=8, steps=3, batch_size=8, bfloat16=False)

    def test_mirror(self, test_faces):
        names = ('unit_smileLeft', 'unit_jaw', 'unit_smileRight', 'unit_dimpleRight')
        units, possible = features.mirror_units(torch.tensor([[1., 2, 3, 0], [1, 2, 3, 4]]), names)
        assert units[0].tolist() == [3, 2, 1, 0] and possible.tolist() == [True, False]

    def test_mirrored_pictures_have_mirrored_labels(self, test_faces, monkeypatch):
        monkeypatch.setattr(features, 'disturb', lambda images, rng: images)
        config, flipped = replace(self.CONFIG, batch_size=64), 0
        mirrored = features.mirror_units(test_faces.units, test_faces.unit_names)[0]
        mean, std = test_faces.units.mean(0), test_faces.units.std(0)
        images, units, rows = features._reader_batch(test_faces, 0, config, torch.Generator().manual_seed(0))
        for image, unit, row in zip(images, units * std + mean, rows):
            original = test_faces.images[row].float() / 127.5 - 1
            wanted = test_faces.units[row] if image.equal(original) else mirrored[row]
            flipped += image.equal(original.flip(-1))
            assert unit.allclose(wanted, atol=1e-5) and (image.equal(original) or image.equal(original.flip(-1)))
        assert 10 < flipped < 54 and len(set(rows.tolist())) > 40 and (test_faces.classes[rows] == 1).sum() == 16

    def test_repeats_and_leaves_no_trace(self):
        faces = read_labels('faces-64', 'test', size=32)    # a test of the loop: what it learns is thrown away
        state, before = torch.get_rng_state(), faces.images.clone()
        first, second = (features.train_reader(faces, self.CONFIG, 'cpu', quiet=True) for _ in range(2))
        assert first(faces.images[:5]).equal(second(faces.images[:5])) and torch.get_rng_state().equal(state)
        assert faces.images.equal(before)
        other = features.train_reader(faces, replace(self.CONFIG, seed=1), 'cpu', quiet=True)
        assert not other(faces.images[:5]).equal(first(faces.images[:5]))


class Innocent:
    def __reduce__(self):
        return print, ('it was run',)


def stand_in(monkeypatch, tmp_path, name, state):
    """A file of `state` under a hash that our table is told: the whole way of the real file, with other numbers."""
    path = tmp_path/WEIGHTS[name].file
    torch.save(state, path)
    monkeypatch.setitem(WEIGHTS, name, replace(WEIGHTS[name], sha256=hashlib.sha256(path.read_bytes()).hexdigest()[:8]))
    return path


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('TWOCET_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    return tmp_path/'cache'/'weights'


def random_inception():
    module = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')

    class Bare(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state): pass

    empty = io.BytesIO()
    torch.save({}, empty), empty.seek(0)
    return awake(Bare('inception-v3-compat', ['2048', 'logits_unbiased'], feature_extractor_weights_path=empty))


def awake(network):
    "Random weights of a size that lets pictures through."
    rng = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(layer.weight, generator=rng)
    return network


class TestPapersNetworks:
    IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def test_known_hashes_begin_as_the_names_say(self):
        for known in WEIGHTS.values():
            assert known.file.endswith(f'-{known.sha256[:8]}.pth') and len(known.sha256) in (8, 64) and known.url.startswith('https://')

    def test_standard(self, monkeypatch, tmp_path):
        network = random_inception()
        path = stand_in(monkeypatch, tmp_path, 'inception-2015', network.state_dict())
        extractor = features.standard_inception(path, 'cpu')
        assert (extractor.protocol, extractor.distance, extractor.dim) == ('standard (Inception 2015)', 'FID', 2048)
        pixels = ((self.IMAGES + 1) * 127.5).round().byte()
        wanted, logits = network(pixels)
        assert wanted.std() > .01 and extractor(self.IMAGES).allclose(wanted, rtol=1e-4) and wanted.shape == (2, 2048)
        assert extractor.probabilities(self.IMAGES).allclose(logits.softmax(1), rtol=1e-3)
        exact = pixels.float() / 127.5 - 1
        assert extractor(exact).equal(extractor((exact + .003).clamp(-1, 1))), 'less than half a step of 8 bits'
        assert not extractor(exact).equal(extractor((exact + .005).clamp(-1, 1)))

    def test_authors(self, monkeypatch, tmp_path):
        from torchvision.models import inception_v3
        with torch.random.fork_rng():
            network = awake(inception_v3(weights=None, init_weights=False, transform_input=True).eval())
        path = stand_in(monkeypatch, tmp_path, 'inception-torchvision', network.state_dict())
        extractor = features.authors_inception(path, 'cpu')
        assert extractor.distance == "authors' FID" and extractor(self.IMAGES).shape == (2, 2048)
        pixels = features.resize(((self.IMAGES + 1) * 127.5).round().byte(), 299).float() / 255
        x = (pixels - torch.tensor([.485, .456, .406])[:, None, None]) / torch.tensor([.229, .224, .225])[:, None, None]
        with torch.no_grad():
            whole = network(x).softmax(1)
            network.transform_input, network.fc = False, torch.nn.Identity()
            pooled = network(x)
        assert pooled.std() > .01 and extractor.probabilities(self.IMAGES).allclose(whole, rtol=1e-3)
        assert extractor(self.IMAGES).allclose(pooled, rtol=1e-3, atol=1e-5), 'after probabilities, features are still the open network\'s'

    def test_lpips(self, monkeypatch, tmp_path):
        lpips = pytest.importorskip('lpips')
        from torchvision.models import alexnet
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.manual_seed(0)
            trunk = alexnet()
            peer = lpips.LPIPS(net='alex', pnet_rand=True, verbose=False)
        for part in peer.net.children():
            for name, layer in part.named_children():
                layer.load_state_dict(trunk.features[int(name)].state_dict())
        state = torch.get_rng_state()
        network = features.lpips_network(stand_in(monkeypatch, tmp_path, 'alexnet', trunk.state_dict()), 'cpu')
        assert torch.get_rng_state().equal(state)
        a, b = self.IMAGES, self.IMAGES.flip(0)
        with torch.no_grad():
            assert features.lpips_distance(a, b, network).allclose(peer(a, b).flatten(), atol=1e-6)
        assert features.lpips_distance(a, a, network).abs().max() < 1e-6 < features.lpips_distance(a, b, network).min()
        with pytest.raises(InputError, match='no pairs'):
            features.lpips_distance(a, b[:1], network)

    def test_weights_of_another_network(self, monkeypatch, tmp_path):
        for name, make in {'inception-2015': features.standard_inception, 'inception-torchvision': features.authors_inception,
                           'alexnet': features.lpips_network}.items():
            with pytest.raises(InputError, match='another network'):
                make(stand_in(monkeypatch, tmp_path, name, {'a': torch.zeros(2)}))

    @pytest.mark.parametrize('make', [features.standard_inception, features.authors_inception, features.lpips_network])
    def test_missing(self, make, empty_cache):
        with pytest.raises(InputError, match='fetch') as error:
            make()
        assert str(empty_cache) in str(error.value) and 'https://' in str(error.value)

    def test_optional_package_missing(self, monkeypatch):
        monkeypatch.setitem(__import__('sys').modules, 'lpips', None)
        with pytest.raises(InputError, match=r'twocet_nb\[metrics\]'):
            features.lpips_network()


class TestFetch:
    def served(self, tmp_path, monkeypatch, content=b'numbers'):
        source = tmp_path/'served.pth'
        source.write_bytes(content)
        monkeypatch.setitem(WEIGHTS, 'alexnet', replace(WEIGHTS['alexnet'], sha256=hashlib.sha256(b'numbers').hexdigest()))
        return source.as_uri()

    def test_once(self, tmp_path, monkeypatch, empty_cache):
        url = self.served(tmp_path, monkeypatch)
        path = features.fetch('alexnet', url)
        assert path == empty_cache/WEIGHTS['alexnet'].file and path.read_bytes() == b'numbers'
        assert features.fetch('alexnet', 'https://not.asked.invalid') == path == features.find_weights('alexnet')
        assert [p.name for p in empty_cache.iterdir()] == [path.name]

    def test_other_content_is_not_kept(self, tmp_path, monkeypatch, empty_cache):
        url = self.served(tmp_path, monkeypatch, b'something else')
        with pytest.raises(InputError, match='SHA-256'):
            features.fetch('alexnet', url)
        assert not list(empty_cache.iterdir())

    def test_no_network(self, tmp_path, monkeypatch, empty_cache):
        with pytest.raises(InputError, match='could not be fetched'):
            features.fetch('alexnet', (tmp_path/'absent').as_uri())
        assert not list(empty_cache.iterdir())

    def test_damaged_in_the_cache(self, tmp_path, monkeypatch, empty_cache):
        path = features.fetch('alexnet', self.served(tmp_path, monkeypatch))
        path.write_bytes(b'number')
        with pytest.raises(InputError, match='damaged'):
            features.find_weights('alexnet')

    def test_the_cache_of_torch_hub_counts(self, tmp_path, monkeypatch, empty_cache):
        self.served(tmp_path, monkeypatch)
        path = tmp_path/'torch'/'hub'/'checkpoints'/WEIGHTS['alexnet'].file
        path.parent.mkdir(parents=True)
        path.write_bytes(b'numbers')
        assert features.find_weights('alexnet') == path

    @pytest.mark.parametrize('protocol', [2, 4])
    def test_hostile_pickle_does_not_run(self, tmp_path, monkeypatch, capsys, protocol):
        hostile = pickle.dumps({'features.0.weight': Innocent()}, protocol)
        path = tmp_path/'alexnet.pth'
        path.write_bytes(hostile)
        with pytest.raises(InputError, match='SHA-256'):
            features.lpips_network(path)
        monkeypatch.setitem(WEIGHTS, 'alexnet', replace(WEIGHTS['alexnet'], sha256=hashlib.sha256(hostile).hexdigest()))
        with pytest.raises(InputError, match='nothing of it'):
            features.lpips_network(path)
        assert 'it was run' not in capsys.readouterr().out

    def test_not_tensors(self, tmp_path, monkeypatch):
        for state in ({'a': 1}, [1, 2], torch.zeros(2)):
            with pytest.raises(InputError, match='nothing of it'):
                features.authors_inception(stand_in(monkeypatch, tmp_path, 'inception-torchvision', state))
