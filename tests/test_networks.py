"""What the notebook 03_networks cannot test: full widths, damaged and hostile files, full disks, the authors' layout."""
import errno
import json
import os
import pickle
from dataclasses import replace

import pytest
import torch

from twocet_nb import networks as nets
from twocet_nb.data import InputError
from twocet_nb.networks import NetworkConfig

TINY = NetworkConfig.tiny()


def inputs(config, n=2):
    rng = torch.Generator().manual_seed(0)
    size = config.image_size
    return torch.randn(n, 3, size, size, generator=rng), torch.rand(n, config.code_dim, generator=rng) - 0.5


def run(name, network, config):
    x, code = inputs(config)
    kind = name.removesuffix('_ema')
    return network(x, code) if kind == 'generator' else network(x) if kind == 'encoder' else network(x, None)


def same(config, networks, others):
    return all(torch.equal(run(name, networks[name], config), run(name, others[name], config)) for name in networks)


@pytest.fixture
def built():
    return nets.build_networks(TINY, seed=3)


@pytest.fixture
def saved(tmp_path, built):
    path = tmp_path / 'model.safetensors'
    nets.save_networks(path, TINY, built)
    return path


# The facts table

FACTS = {'generator': (33.36, 73.3, 33_361_667), 'encoder': (20.75, 24.6, 20_748_192), 'discriminator': (20.74, 24.7, 20_735_106)}


@pytest.mark.parametrize('name', FACTS)
def test_full_width_has_the_papers_parameters_and_cost(name):
    with torch.device('meta'):
        network = nets.network_class(name)(NetworkConfig.paper())
        x, code = torch.empty(1, 3, 128, 128), torch.empty(1, 32)
    arguments = {'generator': (x, code), 'encoder': (x,), 'discriminator': (x, 1)}[name]
    millions, gflops, exactly = FACTS[name]
    assert nets.count_parameters(network) == exactly
    assert round(nets.count_parameters(network) / 1e6, 2) == millions
    assert round(nets.forward_flops(network, *arguments) / 1e9, 1) == gflops


def test_full_width_shapes():
    config = NetworkConfig.paper()
    with torch.device('meta'):
        x, code = torch.empty(3, 3, 128, 128), torch.empty(3, 32)
        built = {name: kind(config) for name, kind in nets.NETWORKS.items()}
    assert built['generator'](x, code).shape == (3, 3, 128, 128)
    assert built['encoder'](x).shape == (3, 32)
    assert built['discriminator'](x, 0).shape == (3,) and built['discriminator'](x, None).shape == (3, 2)
    assert [b.conv2.out_channels for b in built['generator'].encode] == [256, 512, 512, 512, 512]
    assert [b.conv2.out_channels for b in built['generator'].decode] == [512, 512, 512, 256, 128]


@pytest.mark.parametrize('size', [16, 32, 64, 128, 256])
def test_every_image_size_gives_back_its_shape(size):
    config = NetworkConfig(size, 2, 8, 3)
    x, code = inputs(config)
    built = nets.build_networks(config)
    with torch.no_grad():
        assert built['generator'](x, code).shape == x.shape
        assert built['encoder'](x).shape == (2, 3) and built['discriminator'](x, 1).shape == (2,)


@pytest.mark.parametrize('values', [dict(image_size=48), dict(image_size=8), dict(image_size=0), dict(width=0), dict(code_dim=-1),
                                    dict(width=2.5), dict(image_size='64'), dict(width=True), dict(width=64, max_width=32)])
def test_impossible_configurations_are_refused(values):
    with pytest.raises(InputError, match='mend'):
        NetworkConfig(**values)


def test_presets():
    assert NetworkConfig.paper() == NetworkConfig() == NetworkConfig(128, 128, 512, 32, False)
    assert NetworkConfig.paper(256).width == 64 and NetworkConfig.paper(16).width == 512
    assert NetworkConfig.course().he_init and NetworkConfig.tiny().he_init and NetworkConfig.course().image_size == 64


# Behaviour

def test_face_type_picks_its_logit(built):
    x, _ = inputs(TINY, 4)
    discriminator = built['discriminator']
    both = discriminator(x, None)
    assert torch.equal(discriminator(x, 0), both[:, 0]) and torch.equal(discriminator(x, 1), both[:, 1])
    assert torch.equal(discriminator(x, torch.tensor([1, 0, 0, 1])), both[range(4), [1, 0, 0, 1]])
    for wrong in (2, -1, 'happy', torch.tensor([0, 1])):
        with pytest.raises(InputError, match='face type'):
            discriminator(x, wrong)


@pytest.mark.parametrize('shape', [(2, 3, 32, 32), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(built, shape):
    for call in (lambda x: built['generator'](x, torch.zeros(2, 4)), built['encoder'], lambda x: built['discriminator'](x, 0)):
        with pytest.raises(InputError, match=r'\(N, 3, 16, 16\)'):
            call(torch.zeros(shape))


def test_uint8_images_and_wrong_codes_are_refused(built):
    x, code = inputs(TINY)
    with pytest.raises(InputError, match='floats'):
        built['encoder'](x.to(torch.uint8))
    with pytest.raises(InputError, match='one code an image'):
        built['generator'](x, code[:1])


def test_all_weights_get_a_gradient(built):
    x, code = inputs(TINY)
    for name in built:
        run(name, built[name], TINY).pow(2).sum().backward()
        silent = [key for key, p in built[name].named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not silent, name


def test_he_init_sets_every_layer():
    network = nets.Encoder(replace(TINY, width=64, max_width=256, he_init=True))
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            fan_in = layer.weight[0].numel()
            assert layer.bias is None or not layer.bias.any()
            if layer.weight.numel() > 2000:
                assert layer.weight.std().item() == pytest.approx((2 / fan_in)**0.5, rel=0.1)


def test_building_and_loading_leave_the_random_state_alone(saved):
    before = torch.random.get_rng_state()
    nets.build_networks(TINY)
    nets.load_networks(saved)
    assert torch.equal(before, torch.random.get_rng_state())


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert nets.pick_device() == nets.pick_device('cpu') == torch.device('cpu')
    for name in ('cuda', 'cuda:3', 'toaster'):
        with pytest.raises(InputError, match='mend'):
            nets.pick_device(name)


# Files: round trips

@pytest.mark.parametrize('half', [False, True])
def test_round_trip(tmp_path, built, half):
    path = tmp_path / 'sub' / 'model.safetensors'
    networks = built | {'generator_ema': built['generator'], 'encoder_ema': built['encoder'].state_dict()}
    nets.save_networks(path, TINY, networks, half=half, extra={'step': 7})
    config, loaded = nets.load_networks(path)
    assert config == TINY and list(loaded) == list(networks)
    for name, network in loaded.items():
        truth = built[name.removesuffix('_ema')].state_dict()
        for key, value in network.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, truth[key].half().float() if half else truth[key])
        assert all(p.requires_grad for p in network.parameters())
    assert nets.read_card(path) == {'config': TINY.to_dict(), 'networks': list(networks), 'half': half, 'extra': {'step': 7}}
    assert os.listdir(path.parent) == [path.name]


def test_load_some_and_load_into(saved, built):
    _, loaded = nets.load_networks(saved, ['encoder'])
    assert list(loaded) == ['encoder']
    fresh = nets.build_networks(TINY, seed=9)
    assert not same(TINY, fresh, built)
    for name in fresh:
        assert nets.load_into(fresh[name], saved, name) is fresh[name]
    assert same(TINY, fresh, built)


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path):
    """A safetensors file begins with the length of its header, whose first byte may be that of a pickle."""
    path, starts = tmp_path / 'm.safetensors', set()
    for spaces in range(0, 264, 8):
        nets.save_networks(path, TINY, {}, extra={'note': ' ' * spaces})
        assert nets.read_card(path)['extra']['note'] == ' ' * spaces
        starts.add(path.read_bytes()[:1])
    assert b'\x80' in starts


# Files: refusals

def test_other_configuration_is_refused_and_named(saved, built):
    other = nets.build_networks(replace(TINY, width=8))
    before = {key: value.clone() for key, value in other['generator'].state_dict().items()}
    with pytest.raises(InputError, match=r'model\.safetensors, generator.*from_rgb\.weight is \(4, 3, 3, 3\)'):
        nets.load_into(other['generator'], saved, 'generator')
    assert all(torch.equal(before[key], value) for key, value in other['generator'].state_dict().items())
    deeper = nets.build_networks(replace(TINY, image_size=32))
    with pytest.raises(InputError, match='is missing'):
        nets.load_into(deeper['encoder'], saved, 'encoder')


def rewrite(path, change):
    "Change the JSON header of a safetensors file."
    data = path.read_bytes()
    n = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + n])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + n:])


def edit_card(header, **values):
    card = json.loads(header['__metadata__']['twocet'])
    card['config'] |= values
    header['__metadata__']['twocet'] = json.dumps(card)


@pytest.mark.parametrize('values, words', [(dict(code_dim=7), 'adain1'), (dict(width=5), 'from_rgb'), (dict(image_size=48), 'power of two'),
                                           (dict(depth=3), 'no field depth')])
def test_a_card_that_disagrees_with_its_tensors_is_refused(saved, values, words):
    rewrite(saved, lambda header: edit_card(header, **values))
    with pytest.raises(InputError, match=f'model.safetensors.*{words}'):
        nets.load_networks(saved)


def test_safetensors_of_others_are_refused(saved):
    rewrite(saved, lambda header: header.pop('__metadata__'))
    with pytest.raises(InputError, match='model.safetensors: no card'):
        nets.read_card(saved)


@pytest.mark.parametrize('keep', [0, 1, 8, 100, 0.5, -1])
def test_truncated_files_are_refused(saved, keep):
    data = saved.read_bytes()
    saved.write_bytes(data[:int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match='model.safetensors'):
        nets.load_networks(saved)


@pytest.mark.parametrize('junk', [b'hello', b'{}' * 400, bytes(64), b'\xff' * 64])
def test_junk_is_refused(tmp_path, junk):
    path = tmp_path / 'junk.safetensors'
    path.write_bytes(junk)
    for load in (nets.load_networks, nets.load_official):
        with pytest.raises(InputError, match='junk.safetensors'):
            load(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    for load in (nets.load_networks, nets.read_card, nets.load_official):
        for path in (tmp_path / 'nothing', tmp_path):
            with pytest.raises(InputError, match='cannot be read'):
                load(path)


def test_missing_and_unknown_networks_are_refused(tmp_path, built):
    path = tmp_path / 'g.safetensors'
    nets.save_networks(path, TINY, {'generator': built['generator']})
    with pytest.raises(InputError, match='holds no encoder'):
        nets.load_networks(path, ['encoder'])
    with pytest.raises(InputError, match='no network is called'):
        nets.save_networks(path, TINY, {'critic': built['discriminator']})


@pytest.mark.parametrize('write', [lambda value, path: torch.save(value, path),
                                   lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
                                   lambda value, path: path.write_bytes(pickle.dumps(value))], ids=['zip', 'legacy', 'plain'])
def test_load_networks_refuses_every_pickle(tmp_path, built, write):
    path = tmp_path / 'model.safetensors'
    write({'generator': built['generator'].state_dict()}, path)
    with pytest.raises(InputError, match='model.safetensors: this is a pickle'):
        nets.load_networks(path)


# Files: writing fails

def test_full_disk_keeps_the_old_file(saved, built, monkeypatch):
    old = saved.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(InputError, match='model.safetensors: could not be written .No space left'):
        nets.save_networks(saved, TINY, nets.build_networks(TINY, seed=8))
    assert saved.read_bytes() == old and os.listdir(saved.parent) == [saved.name]


def test_a_write_cut_short_by_the_system_keeps_the_old_file(saved, built):
    resource = pytest.importorskip('resource')    # not on Windows
    old, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match='could not be written'):
            nets.save_networks(saved, TINY, nets.build_networks(TINY, seed=8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == old and os.listdir(saved.parent) == [saved.name]


def test_unwritable_places_are_refused(tmp_path, built):
    (tmp_path / 'file').write_text('not a folder')
    (tmp_path / 'folder').mkdir()
    for path in (tmp_path / 'file' / 'model.safetensors', tmp_path / 'folder'):
        with pytest.raises(InputError, match='could not be written'):
            nets.save_networks(path, TINY, built)
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder'] and not os.listdir(tmp_path / 'folder')


def test_overflow_in_half_is_refused(saved, built):
    old = saved.read_bytes()
    with torch.no_grad():
        built['encoder'].head.bias[0] = 1e6
    with pytest.raises(InputError, match='encoder.head.bias is too large for float16'):
        nets.save_networks(saved, TINY, built, half=True)
    assert saved.read_bytes() == old


def test_saving_networks_of_another_configuration_is_refused(tmp_path, built):
    with pytest.raises(InputError, match='should be'):
        nets.save_networks(tmp_path / 'm', NetworkConfig.course(), built)
    assert not os.listdir(tmp_path)


# Checkpoints of the authors: the layout of the facts page, written here a second time and independently

def official(name, state, prefix=''):
    theirs = {}
    for key, value in state.items():
        part, *rest = key.split('.')
        rest = '.'.join(rest).replace('project', 'conv1x1')
        if name == 'generator':
            rest = rest.replace('adain1.affine', 'norm1.fc').replace('adain2.affine', 'norm2.fc')
            theirs[f'{prefix}{part}.{rest}'] = value
        else:
            where = {'encoder': {'trunk': 'shared.shared', 'head': 'unshared.0'},
                     'discriminator': {'trunk': 'main.0.shared', 'head': 'main.1'}}[name][part]
            theirs[f'{prefix}{where}.{rest}'] = value
    return theirs


CONFIGS = [NetworkConfig(16, 4, 8, 3), NetworkConfig(32, 4, 16, 8), NetworkConfig(64, 4, 8, 32), NetworkConfig(128, 2, 8, 16),
           NetworkConfig(256, 2, 8, 1), NetworkConfig(64, 6, 24, 5), NetworkConfig(32, 8, 8, 2)]


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: f'{c.image_size}px-{c.width}-{c.max_width}-d{c.code_dim}')
@pytest.mark.parametrize('file', ['000500_nets_model.ckpt', '000500_model_s.ckpt'])
def test_official_checkpoints_give_identical_outputs(tmp_path, config, prefix, file):
    built = nets.build_networks(config, seed=2)
    if file.endswith('_s.ckpt'):
        del built['discriminator']
    torch.save({name: official(name, network.state_dict(), prefix) for name, network in built.items()}, tmp_path / file)
    found, loaded = nets.load_official(tmp_path / file)
    assert found == config and list(loaded) == list(built)
    with torch.no_grad():
        assert same(config, built, loaded)
    assert nets.load_official(tmp_path / file, image_size=config.image_size)[0] == config
    with pytest.raises(InputError, match=f'made for {config.image_size} px'):
        nets.load_official(tmp_path / file, image_size=2 * config.image_size)


@pytest.mark.parametrize('name', ['generator', 'encoder', 'discriminator'])
def test_official_checkpoint_of_one_network(tmp_path, name):
    config = NetworkConfig(64, 4, 8, 32)
    built = nets.build_networks(config)
    torch.save({name: official(name, built[name].state_dict())}, tmp_path / 'one.ckpt', _use_new_zipfile_serialization=False)
    found, loaded = nets.load_official(tmp_path / 'one.ckpt')
    assert found == config and same(config, {name: built[name]}, loaded)


def test_official_key_names_are_those_of_the_facts_page(tmp_path):
    config = NetworkConfig(64, 4, 16, 3)
    keys = {name: set(official(name, network.state_dict())) for name, network in nets.build_networks(config).items()}
    assert {'from_rgb.weight', 'encode.0.conv1x1.weight', 'encode.3.norm2.bias', 'decode.0.norm1.fc.weight',
            'decode.3.conv1x1.weight', 'to_rgb.0.weight', 'to_rgb.2.bias'} <= keys['generator']
    assert {'shared.shared.0.weight', 'shared.shared.1.conv1x1.weight', 'shared.shared.6.weight', 'unshared.0.bias'} <= keys['encoder']
    assert {'main.0.shared.4.conv2.bias', 'main.0.shared.6.bias', 'main.1.weight'} <= keys['discriminator']


def drop(state):
    del state['encode.1.conv1.bias']


def resize(state):
    state['encode.1.conv1.bias'] = torch.zeros(99)


def add(state):
    state['extra.weight'] = torch.zeros(2)


@pytest.mark.parametrize('damage, words', [(drop, 'encode.1.conv1.bias is missing'), (resize, r'encode.1.conv1.bias is \(99,\)'),
                                           (add, 'extra.weight does not belong')])
def test_official_loading_is_strict(tmp_path, built, damage, words):
    state = official('generator', built['generator'].state_dict())
    damage(state)
    torch.save({'generator': state}, tmp_path / 'odd.ckpt')
    with pytest.raises(InputError, match=f'odd.ckpt, generator.*{words}'):
        nets.load_official(tmp_path / 'odd.ckpt')


@pytest.mark.parametrize('content', [{}, {'optim': {'lr': 1}}, [1, 2], torch.zeros(3), None, {'generator': {}}, {'generator': {'a': 1}},
                                     {'generator': {'a': torch.zeros(2)}}, {'generator': 5}, {'encoder': {3: torch.zeros(1)}}])
def test_checkpoints_of_something_else_are_refused(tmp_path, content):
    torch.save(content, tmp_path / 'other.ckpt')
    with pytest.raises(InputError, match='other.ckpt: no networks of 2CET-GAN'):
        nets.load_official(tmp_path / 'other.ckpt')


class Hostile:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize('form', ['zip', 'legacy', 'plain'])
def test_a_hostile_pickle_is_never_executed(tmp_path, built, form):
    trap, path = tmp_path / 'trap', tmp_path / 'evil.ckpt'
    content = {name: official(name, network.state_dict()) for name, network in built.items()} | {'hook': Hostile(trap)}
    if form == 'plain':
        path.write_bytes(pickle.dumps({'hook': Hostile(trap)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    for load in (nets.load_official, nets.load_networks, nets.read_card):
        with pytest.raises(InputError, match='evil.ckpt'):
            load(path)
    assert not trap.exists()
    if form == 'plain':    # the trap is real: an ordinary unpickler falls into it
        pickle.loads(path.read_bytes())
        assert trap.exists()


def test_truncated_checkpoints_are_refused(tmp_path, built):
    path = tmp_path / 'cut.ckpt'
    torch.save({'generator': official('generator', built['generator'].state_dict())}, path)
    data = path.read_bytes()
    for keep in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(InputError, match='cut.ckpt'):
            nets.load_official(path)


def test_an_averaged_network_stands_in_where_it_is_not_there_itself(tmp_path):
    networks = nets.build_networks(NetworkConfig.tiny(), seed=1)
    nets.save_networks(tmp_path/'a.safetensors', NetworkConfig.tiny(), {'generator_ema': networks['generator'], 'discriminator': networks['discriminator']})
    _, found = nets.load_networks(tmp_path/'a.safetensors', ['generator', 'discriminator'])
    for name in ('generator', 'discriminator'):
        assert all(torch.equal(p, q) for p, q in zip(found[name].parameters(), networks[name].parameters())), name
    with pytest.raises(InputError, match='holds no encoder'):
        nets.load_networks(tmp_path/'a.safetensors', ['encoder'])
