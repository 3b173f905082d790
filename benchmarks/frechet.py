"""How much faster is our Frechet distance than the usual matrix roots, and is it the same number? Ratios within one run.

    python benchmarks/frechet.py [--dim 2048] [--numbers 1000 4000] [--rounds 3] [--seed 0] [--out benchmarks/frechet.json]

Everybody begins with the same features, on one thread, and is timed by the processor's clock, which neighbours disturb least.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ['OMP_NUM_THREADS'] = '1'    # read when numpy and scipy are imported
import numpy as np
import scipy
from scipy.linalg import sqrtm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from twocet_nb.demo import commit
from twocet_nb.metrics import FeatureStats, frechet_distance


def make_features(n, dim, seed):
    """Two sets like those of a network: correlated, never negative, of falling variance, and a little different."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) * np.exp(-3 * np.arange(dim) / dim) / np.sqrt(dim)
    return [np.maximum(rng.normal(size=(n, dim)) @ mix * scale + .1, 0) for scale in (1, 1.1)]


def by_root(a, b, trace_of_root):
    """The formula as printed, with covariances; trace_of_root: of their product."""
    first, second = np.cov(a.T), np.cov(b.T)
    return float(((a.mean(0) - b.mean(0))**2).sum() + np.trace(first) + np.trace(second) - 2 * trace_of_root(first @ second))


def by_moments(a, b):
    """Ours from published statistics: the roots come from covariances."""
    return frechet_distance(*(FeatureStats.from_moments(x.mean(0), np.cov(x.T), len(x)) for x in (a, b)))


CONTENDERS = {
    'scipy.linalg.sqrtm': lambda a, b: by_root(a, b, lambda product: np.trace(sqrtm(product)).real),
    'eigenvalues of the product': lambda a, b: by_root(a, b, lambda product: np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()),
    'ours, from covariances': by_moments,
    'ours, from features': frechet_distance,
}


def compare(a, b, rounds):
    """{name: times faster than sqrtm, and how far the value is from sqrtm's}: ratios within a round, their median over rounds."""
    table, values = [], {}
    for _ in range(rounds):
        row = {}
        for name, distance in CONTENDERS.items():
            began = time.process_time()
            values[name] = distance(a, b)
            row[name] = time.process_time() - began
        table.append(row)
    first = next(iter(CONTENDERS))
    return {name: dict(times_faster=round(median(row[first] / row[name] for row in table), 2),
                       relative_difference=float(f'{abs(values[name] / values[first] - 1):.1e}')) for name in CONTENDERS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dim', type=int, default=2048)
    parser.add_argument('--numbers', type=int, nargs='+', default=[1000, 4000], metavar='N')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.json'))
    args = parser.parse_args()
    tables = {}
    for n in args.numbers:
        tables[f'{n} pictures each, {args.dim} features'] = table = compare(*make_features(n, args.dim, args.seed), args.rounds)
        print(f'{n} pictures each, {args.dim} features', *(f'{name:28}{row["times_faster"]:8.1f} x   {row["relative_difference"]:.0e}'
                                                           for name, row in table.items()), sep='\n', flush=True)
    result = dict(command=' '.join(['python benchmarks/frechet.py', *sys.argv[1:]]), commit=commit(), numpy=np.__version__, scipy=scipy.__version__,
                  seed=args.seed, threads=1, rounds=args.rounds, device='cpu', tables=tables)
    args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
