"""Distances, scores and what stands beside them: against SciPy, torch-fidelity and torchmetrics, and where the answer is known."""
import json
import math
import multiprocessing

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from twocet_nb.data import InputError
from twocet_nb.metrics import (Estimate, FeatureStats, Score, bootstrap, floor, frechet_distance, frechet_infinity, inception_score,
                               kernel_distance, score, size_curve, small_sample, square_root)

SHAPES = [(500, 400, 20), (300, 300, 64), (40, 60, 128), (1000, 30, 64)]    # real, fake, features: also fewer rows than columns


def features(n, d, seed=0, shift=0., scale=1.):
    """Like those of a network: correlated, never negative, of falling variance."""
    mix = np.random.default_rng(d).normal(size=(d, d)) * np.exp(-3 * np.arange(d) / d)
    return np.maximum(np.random.default_rng(seed).normal(size=(n, d)) @ mix * scale / np.sqrt(d) + .1 + shift, 0)


def by_the_book(a, b):
    root = sqrtm(np.cov(a.T) @ np.cov(b.T))
    return ((a.mean(0) - b.mean(0))**2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * np.trace(root).real


class AsTheyAre(torch.nn.Module):
    """Lets torchmetrics take features for images."""
    def __init__(self, d):
        super().__init__()
        self.num_features = d

    def forward(self, x): return x


# --- Frechet distance

@pytest.mark.parametrize('n, m, d', SHAPES)
def test_frechet_equals_sqrtm(n, m, d):
    a, b = features(n, d), features(m, d, 1, .05, 1.2)
    expected = by_the_book(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(FeatureStats(a), FeatureStats(b)) == frechet_distance(a, FeatureStats(b)) == frechet_distance(a, b)
    moments = [FeatureStats.from_moments(x.mean(0), np.cov(x.T), len(x)) for x in (a, b)]
    assert frechet_distance(*moments) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-10)


@pytest.mark.parametrize('n, m, d', SHAPES)
def test_frechet_equals_its_peers(n, m, d):
    fidelity = pytest.importorskip('torch_fidelity.metric_fid')
    torchmetrics = pytest.importorskip('torchmetrics.image.fid')
    a, b = (torch.from_numpy(x) for x in (features(n, d), features(m, d, 1, .05, 1.2)))
    stats = [fidelity.fid_features_to_statistics(x) for x in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(fidelity.fid_statistics_to_metric(*stats, False)[fidelity.KEY_METRIC_FID], rel=1e-6)
    peer = torchmetrics.FrechetInceptionDistance(feature=AsTheyAre(d)).set_dtype(torch.float64)
    peer.update(a, real=True), peer.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(peer.compute()), rel=1e-6)


def test_frechet_of_known_gaussians():
    moments = FeatureStats.from_moments
    assert frechet_distance(moments([0, 0], np.eye(2), 9), moments([3, 4], np.eye(2), 9)) == pytest.approx(25, rel=1e-12)
    deviations = np.array([[1, 2, 3.], [2, 2, 0]])    # one variance is zero
    assert frechet_distance(*(moments(np.zeros(3), np.diag(s**2), 9) for s in deviations)) == pytest.approx(1 + 9, rel=1e-12)
    x = features(50, 6)
    assert frechet_distance(x, x + 2) == pytest.approx(24, rel=1e-10)
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * (x.mean(0)**2).sum() + 4 * x.var(0, ddof=1).sum(), rel=1e-10)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    y = features(70, 6, 1)
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(frechet_distance(x, y), rel=1e-10)


@pytest.mark.parametrize('n, d', [(2, 64), (50, 64), (64, 64), (65, 64), (500, 64)])
def test_equal_sets_have_distance_zero(n, d):
    x = features(n, d)
    assert frechet_distance(x, x) < 1e-12 * np.trace(np.cov(x.T)) + 1e-12
    assert frechet_distance(x, x[::-1]) < 1e-10 * np.trace(np.cov(x.T))


def test_two_pictures_in_fifty_dimensions():
    """Covariances of rank one, whose root is a vector: an answer by hand, more exact than any general root."""
    a, b = features(2, 50), features(2, 50, 1)
    u, v = (a[0] - a[1]) / np.sqrt(2), (b[0] - b[1]) / np.sqrt(2)
    assert frechet_distance(a, b) == pytest.approx(((a.mean(0) - b.mean(0))**2).sum() + u @ u + v @ v - 2 * abs(u @ v), rel=1e-13)


def test_dead_features_and_singular_covariances():
    x, y = features(200, 30), features(200, 30, 1, .1)
    x[:, 10:20], y[:, 5:15] = 0., .7
    a, b = np.cov(x.T), np.cov(y.T)
    cross = np.linalg.norm(square_root(a) @ square_root(b), 'nuc')
    expected = ((x.mean(0) - y.mean(0))**2).sum() + np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(x, y) == pytest.approx(by_the_book(x, y), rel=1e-6)
    dead = np.full((50, 3), .1)
    assert frechet_distance(dead, dead) == 0 and frechet_distance(dead, dead + 1) == pytest.approx(3)
    assert not FeatureStats(dead).add(dead).covariance.any()


def test_huge_means_cost_no_precision():
    x, y = features(300, 20), features(200, 20, 1, .1)
    expected = frechet_distance(x, y)
    assert frechet_distance(x + 1e6, y + 1e6) == pytest.approx(expected, rel=1e-6)
    streamed = FeatureStats()
    for part in np.array_split(x + 1e6, 50): streamed.add(part)
    assert frechet_distance(streamed, y + 1e6) == pytest.approx(expected, rel=1e-6)
    assert np.allclose(streamed.covariance, np.cov(x.T), rtol=1e-6, atol=1e-9)


def test_single_precision_in():
    x, y = (torch.from_numpy(features(300, 40, seed)).float() for seed in (0, 1))
    assert frechet_distance(x, y) == frechet_distance(x.double(), y.numpy().astype(float))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(features(300, 40), features(300, 40, 1)), rel=1e-5)
    assert FeatureStats(x).mean.dtype == np.float64
    assert frechet_distance(x.requires_grad_(), y.half()) == pytest.approx(frechet_distance(x, y), rel=.01)


@pytest.mark.parametrize('call', [frechet_distance, kernel_distance, lambda a, b: score(a, b, 'test')])
def test_bad_features_are_refused(call):
    good = features(20, 4)
    for bad, words in [(np.where(good == good[3, 0], math.nan, good), 'row 3'), (np.full_like(good, math.inf), 'infinity'), (good[0], 'shape'),
                       (good[:, :3], 'same extractor'), (good[:1], None), (good[:0], None), ('faces', 'not numbers'), (good[:, :0], 'shape')]:
        with pytest.raises(InputError, match=words): call(good, bad)
        with pytest.raises(InputError): call(bad, good)


# --- statistics that come in portions

@pytest.mark.parametrize('n, d', [(5, 40), (90, 40), (1000, 8)])
@pytest.mark.parametrize('portion', [1, 7, 400])
def test_portions_and_order_do_not_matter(n, d, portion):
    x = features(n, d) + 5
    parts = [FeatureStats(x[i:i + portion]) for i in range(0, n, portion)]
    streamed = FeatureStats()
    for i in range(0, n, portion): streamed.add(x[i:i + portion])
    tree = parts
    while len(tree) > 1: tree = [sum(tree[i:i + 2]) for i in range(0, len(tree), 2)]
    for stats in (streamed, sum(parts), sum(parts[::-1]), tree[0]):
        assert stats.n == n and np.allclose(stats.mean, x.mean(0), rtol=1e-13)
        assert np.allclose(stats.covariance, np.cov(x.T), rtol=1e-10, atol=1e-13)
        assert len(stats.factor) <= d
        assert frechet_distance(stats, x) < 1e-10


def test_merging_leaves_the_parts_alone():
    a, b = FeatureStats(features(30, 4)), FeatureStats(features(20, 4, 1))
    before = a.covariance.copy()
    both = a + b
    both.add(features(10, 4, 2))
    assert (a.n, b.n, both.n) == (30, 20, 60) and np.array_equal(a.covariance, before)
    assert (FeatureStats() + a).n == 30 and (a + FeatureStats()).n == 30 and FeatureStats().add(np.zeros((0, 4))).n == 0
    with pytest.raises(InputError, match='one extractor'): a + FeatureStats(features(3, 5))
    with pytest.raises(InputError, match='at least two'): FeatureStats(features(1, 4)).covariance


def _one_process(part): return FeatureStats(part)


def test_two_processes_merge():
    x = features(101, 12)
    with multiprocessing.get_context('spawn').Pool(2) as pool: parts = pool.map(_one_process, [x[0::2], x[1::2]])
    assert np.allclose(sum(parts).covariance, np.cov(x.T), rtol=1e-11)


def test_statistics_on_disk(tmp_path):
    path = tmp_path/'deep'/'real.npz'
    for x in (features(200, 12), features(5, 12), features(1, 12)):
        FeatureStats(x).save(path)
        assert (FeatureStats.load(path) + FeatureStats(x)).n == 2 * len(x)
        assert np.allclose((FeatureStats.load(path) + FeatureStats(x)).covariance, np.cov(np.concatenate([x, x]).T))
    FeatureStats().save(path)
    assert (FeatureStats.load(path) + FeatureStats(x)).n == 1
    np.savez(tmp_path/'foreign.npz', mu=x)
    np.savez(tmp_path/'evil.npz', n=np.array([print], dtype=object), mean=x, root=x)
    (tmp_path/'half.npz').write_bytes(path.read_bytes()[:200])
    (tmp_path/'text.npz').write_text('no')
    np.save(tmp_path/'array.npy', x)
    for name in ('foreign.npz', 'evil.npz', 'half.npz', 'text.npz', 'missing.npz', 'array.npy'):
        with pytest.raises(InputError, match=name): FeatureStats.load(tmp_path/name)


def test_what_is_no_covariance():
    for bad in (np.eye(3)[:2], -np.eye(3), np.triu(np.ones((3, 3))), np.full((3, 3), math.nan)):
        with pytest.raises(InputError): square_root(bad)
    with pytest.raises(InputError, match='give'): FeatureStats.from_moments(np.zeros(2), np.eye(3), 9)
    noisy = np.cov(features(10, 40).T).astype(np.float32)    # eigenvalues of -1e-8 are rounding
    assert np.allclose(square_root(noisy) @ square_root(noisy), noisy, atol=1e-6)


# --- kernel distance

def test_kernel_equals_its_peers():
    fidelity = pytest.importorskip('torch_fidelity.metric_kid')
    torchmetrics = pytest.importorskip('torchmetrics.image.kid')
    a, b = (torch.from_numpy(x) for x in (features(300, 32), features(250, 32, 1, .05)))
    peer = fidelity.kid_features_to_metric(a, b, kid_subsets=20, kid_subset_size=100, rng_seed=2020, kid_kernel='poly', kid_kernel_poly_degree=3,
                                           kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, verbose=False)
    ours = kernel_distance(a, b, subset_size=100, subsets=20)
    assert ours == pytest.approx(peer[fidelity.KEY_METRIC_KID_MEAN], rel=1e-6, abs=1e-12)
    assert ours.std == pytest.approx(peer[fidelity.KEY_METRIC_KID_STD], rel=1e-6)
    everything = torchmetrics.KernelInceptionDistance(feature=AsTheyAre(32), subsets=1, subset_size=250)
    everything.update(a[:250], real=True), everything.update(b, real=False)
    assert kernel_distance(a[:250], b) == pytest.approx(float(everything.compute()[0]), rel=1e-6)
    assert kernel_distance(a[:250], b, subset_size=250, subsets=2) == pytest.approx(kernel_distance(a[:250], b), rel=1e-9)


def test_kernel_blocks_add_up():
    a, b = features(2500, 3), features(1030, 3, 1)    # more rows than a block has
    def pairs(x, y): return (x @ y.T / 3 + 1)**3
    def others(x): return (pairs(x, x).sum() - np.trace(pairs(x, x))) / (len(x) * (len(x) - 1))
    assert kernel_distance(a, b) == pytest.approx(others(a) + others(b) - 2 * pairs(a, b).mean(), rel=1e-9)


def test_kernel_distance_is_unbiased_and_may_be_negative():
    rng = np.random.default_rng(0)
    values = np.array([kernel_distance(rng.normal(size=(20, 4)), rng.normal(size=(30, 4))) for _ in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20 and values.min() < 0


# --- Inception Score

def test_inception_score_equals_its_peers():
    fidelity = pytest.importorskip('torch_fidelity.metric_isc')
    torchmetrics = pytest.importorskip('torchmetrics.image.inception')
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(103, 12)) * 3)
    mean, std = inception_score(logits.softmax(1))
    peer = fidelity.isc_features_to_metric(logits)
    assert mean == pytest.approx(peer[fidelity.KEY_METRIC_ISC_MEAN], rel=1e-9)
    assert std == pytest.approx(peer[fidelity.KEY_METRIC_ISC_STD], rel=1e-9)
    other = torchmetrics.InceptionScore(feature=AsTheyAre(12), splits=1)
    other.update(logits)
    assert inception_score(logits.softmax(1), splits=1) == pytest.approx(float(other.compute()[0]), rel=1e-6)


def test_inception_score_known_answers():
    one_hot = np.repeat(np.eye(10), 100, 0)    # sorted by class: without a shuffle every split would hold a single one
    assert inception_score(one_hot, splits=1) == pytest.approx(10) and inception_score(one_hot) > 9
    assert inception_score(one_hot, seed=None) == pytest.approx(1)
    assert inception_score(np.full((50, 7), 1 / 7)) == pytest.approx(1) and inception_score(one_hot[:50]) == pytest.approx(1)
    by_hand = [np.exp((p * np.log(p / p.mean(0))).sum(1).mean()) for p in (np.array([[.9, .1], [.2, .8]]), np.array([[.5, .5]]))]
    ours = inception_score([[.9, .1], [.2, .8], [.5, .5]], batch_size=2)
    assert inception_score(one_hot, batch_size=5000) == inception_score(one_hot, splits=1, seed=None)
    assert ours == pytest.approx(np.mean(by_hand)) and ours.std == pytest.approx(np.std(by_hand))
    for bad in ([[.5, .6]] * 20, [[1.5, -.5]] * 20, np.zeros((20, 3)), np.zeros((0, 3)), one_hot[:5]):
        with pytest.raises(InputError): inception_score(bad)


# --- what stands beside a number

def test_frechet_infinity_finds_the_truth():
    rng, found, plain = np.random.default_rng(0), [], []
    for _ in range(10):
        a, b = rng.normal(size=(600, 24)), 1.2 * rng.normal(size=(500, 24)) + .1
        found.append(frechet_infinity(a, b)), plain.append(frechet_distance(a, b))
    truth = 24 * (.1**2 + .2**2)
    assert abs(np.mean(found) - truth) < .03 < np.mean(plain) - truth
    sizes, values = size_curve(FeatureStats(a), b, parts=4)
    assert np.allclose(sizes, 500 / np.arange(1, 5)) and (np.diff(values) > 0).all()
    with pytest.raises(InputError): frechet_infinity(a[:5], b)


def test_nobody_stands_on_both_sides_of_the_floor():
    people = np.repeat([f'{i:03d}' for i in range(13)], 9)
    x = np.concatenate([np.full((9, 1), i) for i in range(13)]) + .01 * features(117, 1)    # feature = person
    seen = []
    def distance(a, b):
        seen.append((set(a.round().ravel()), set(b.round().ravel()), len(a), len(b)))
        return 0.
    assert floor(x, groups=people, distance=distance).n == 54
    assert all(not a & b and n == m for a, b, n, m in seen)
    assert floor(x, most=20, groups=list(people)).n == 20 and floor(x).n == 58
    assert floor(x, groups=torch.arange(117) // 9, seed=1) == floor(x, groups=people, seed=1) != floor(x, groups=people, seed=2)
    for bad in (dict(groups=['one'] * 117), dict(groups=people[:5]), dict(most=1)):
        with pytest.raises(InputError): floor(x, **bad)


def test_floor_is_what_a_perfect_fake_gets():
    x = np.random.default_rng(0).normal(size=(800, 8))
    perfect = np.mean([frechet_distance(*np.random.default_rng(seed).normal(size=(2, 400, 8))) for seed in range(20)])
    assert floor(x, repeats=20) == pytest.approx(perfect, rel=.15) and floor(x).n == 400 and floor(x).std > 0


def test_bootstrap_holds_the_value_it_speaks_of():
    rng = np.random.default_rng(0)
    def draw(): return rng.normal(size=(120, 16)), rng.normal(size=(120, 16)) + .2
    expected = np.mean([frechet_distance(*draw()) for _ in range(300)])
    intervals = [bootstrap(*draw(), resamples=60) for _ in range(40)]
    assert sum(low < expected < high for low, high in intervals) >= 34
    x, y = draw()
    assert bootstrap(x, y, resamples=20) == bootstrap(x, y, resamples=20) != bootstrap(x, y, resamples=20, seed=1)


def test_few_people_mean_a_wide_interval():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(20), 15)
    a, b = ((rng.normal(size=(20, 4))[people] + .2 * rng.normal(size=(300, 4))) for _ in range(2))
    def width(**groups): return np.ptp(bootstrap(a, b, resamples=80, **groups))
    assert width(groups_a=people, groups_b=people + 100) > 2 * width()
    # fakes of the same people: drawn together, what they share cancels
    same = a + .01 * rng.normal(size=a.shape)
    assert np.ptp(bootstrap(a, same, kernel_distance, people, people)) < np.ptp(bootstrap(a, same, kernel_distance, people, people + 100))


def test_score_says_what_it_takes():
    real, fake = features(400, 16), features(150, 16, 1, .1)
    ours = score(real, fake, 'faces (offline)', 'face distance', resamples=30)
    assert ours.value == frechet_distance(real, fake) and (ours.n_real, ours.n_fake, ours.floor_n) == (400, 150, 150)
    assert ours.interval[0] < ours.value < ours.interval[1] and 0 < ours.floor < ours.at_floor_n
    line = str(ours)
    assert all(word in line for word in ('face distance', 'faces (offline)', '400 real', '150 fake', 'floor', 'warning')) and '\n' not in line
    assert json.loads(json.dumps(ours.to_dict()))['interval'] == list(ours.interval)
    assert score(real, fake, 'faces (offline)', 'face distance', resamples=30) == ours
    assert not score(real, fake, 'test', distance=kernel_distance, resamples=0).warning
    assert str(Score('IS', 3.2, "authors' way", 0, 100, floor=3.5)).count('floor') == 1


def test_small_samples_are_named():
    assert '2048' in small_sample(1000, 2048) and '1000' in small_sample(1000, 2048)
    assert small_sample(1000, 64) and not small_sample(2048, 64) and small_sample(2048, 2048)


def test_an_estimate_is_a_number():
    estimate = Estimate(2.5, .5, 10)
    mean, std = estimate
    assert (mean, std, estimate.n) == (2.5, .5, 10) and estimate > 2 and f'{estimate:.1f}' == '2.5'
    assert json.dumps(estimate) == '2.5' and np.isclose(estimate, 2.5) and np.asarray([estimate]).shape == (1,)
