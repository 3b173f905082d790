"""Measure the shipped weights on people whom nobody has seen, not even those who chose the recipe: rendered from a new seed, with an exam of their own.

The numbers go into nbs/studies/strangers.json, the pictures into the folder given: some hundreds, a second each. The same command goes on after a stop.
"""
import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from twocet_nb.codespace import embed, leakage
from twocet_nb.faces.pack import make, make_truth
from twocet_nb.features import FaceReader
from twocet_nb.guard import commit
from twocet_nb.metrics import model_hash
from twocet_nb.runs import SHIPPED
from twocet_nb.transfer import TwoCET
from twocet_nb.truth import Exam, judge_truth, truth_pairs

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'studies'/'strangers.json'
PEOPLE, CROSS, OWN = 8, 104, 52    # as many people as the bundled exam has; pairs of two people, and of one person


def measure(name, folder):
    "Exact truth and leakage of shipped weights."
    model = TwoCET.pretrained(name)
    exam = Exam(truth_pairs(folder/'truth', folder/'faces'), model.config.image_size, FaceReader.pretrained())
    return dict(model=model_hash(model), truth=judge_truth(model, exam), leakage=asdict(leakage(embed(model, folder/'faces', 'test', 1))))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, help='where the pictures go')
    parser.add_argument('--seed', type=int, default=20261128, help='other people for another seed (default: 20261128)')
    parser.add_argument('--workers', type=int, default=2, help='processes that render (default: 2)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    missing = make(args.folder/'faces', PEOPLE + 1, workers=args.workers, seed=args.seed, test=PEOPLE)    # a pack needs somebody to train with, too
    if missing or make_truth(args.folder/'faces', args.folder/'truth', CROSS, OWN, args.seed, args.workers):
        sys.exit('interrupted; the same command goes on')
    found = dict(command=f'python tools/strangers.py FOLDER --seed {args.seed}', commit=commit(), people=PEOPLE,
                 weights={name: measure(name, args.folder) for name in SHIPPED})
    RESULTS.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
    for name, numbers in found['weights'].items():
        face = numbers['truth']['cross']['l1']['face']
        print(f'{name}: error of the face over that of copying {face["model"]["value"] / face["copy"]["value"]:.3f}')


if __name__ == '__main__':
    main()
