"""Measure the shipped weights for nbs/studies/02_weights.ipynb: one file nbs/studies/weights-NAME.json each, made as `twocet evaluate` does.

--before FILE measures other weights, such as those of the last release, into weights-before.json; they must be of faces the package bundles.
"""
import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from twocet_nb import data
from twocet_nb.codespace import embed, leakage
from twocet_nb.config import bundled_for
from twocet_nb.guard import commit
from twocet_nb.report import write_report
from twocet_nb.runs import SHIPPED
from twocet_nb.transfer import TwoCET

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT/'nbs'/'studies'
SEED = 0


def measure(place, command):
    "All numbers about some weights, with what made them; place: a shipped name or a file."
    model = TwoCET.load(place)
    made = model.card.get('extra', {})
    faces = bundled_for('faces', model.config.image_size)
    with tempfile.TemporaryDirectory() as folder:
        _, report = write_report(place, faces, folder, seed=SEED)
    leak = leakage(embed(model, faces, 'test', 1))
    return dict(command=command, commit=commit(), seed=SEED, data=dict(name=faces, sha256=data.card(faces)['sha256'], split='test'),
                weights={name: made.get(name) for name in ('name', 'step', 'commit', 'command')}, evaluation=report, leakage=asdict(leak))


def write(name, numbers):
    "Put numbers into nbs/studies."
    path = STUDIES/f'weights-{name}.json'
    path.write_text(json.dumps(numbers, indent=1) + '\n', encoding='utf-8')
    print(path.relative_to(ROOT), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='*', help='which shipped weights (default: all)')
    parser.add_argument('--before', type=Path, metavar='FILE', help='a .safetensors file, into weights-before.json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := set(args.names) - SHIPPED.keys():
        parser.error(f'{", ".join(sorted(unknown))}: not shipped; pick from {", ".join(SHIPPED)}')
    wanted = {name: (name, f'python tools/weights.py {name}') for name in args.names or SHIPPED}
    if args.before:
        wanted['before'] = args.before, f'python tools/weights.py --before {args.before.name}'
    # everything is measured before anything is written: a changed file would make the next commit read "dirty"
    for name, numbers in [(name, measure(*how)) for name, how in wanted.items()]:
        write(name, numbers)


if __name__ == '__main__':
    main()
