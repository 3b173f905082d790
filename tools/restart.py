"""What does it cost to train on from shipped weights? From one checkpoint a run goes on twice: with all of its state, and from its weights in half precision.

    python tools/restart.py RUN [--steps 150] [--out nbs/studies/restart.json]

The second begins with new moments of Adam and new averages, as `start_from` does. RUN is not changed: its newest checkpoint is copied.
"""
import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from ship import NAMES

from twocet_nb.config import read_config
from twocet_nb.demo import commit
from twocet_nb.features import FaceReader
from twocet_nb.networks import save_networks
from twocet_nb.runs import latest_checkpoint, open_networks
from twocet_nb.trainer import Trainer
from twocet_nb.transfer import averaged_model
from twocet_nb.truth import Exam, judge_truth, truth_pairs

ROOT = Path(__file__).resolve().parents[1]


def numbers(run, exam):
    """Exact truth of the averaged networks of a run: what is left of the error in the face, and R2 of the units."""
    cross = judge_truth(averaged_model(run), exam)['cross']
    return dict(step=run.step, remaining=cross['l1']['face']['remaining'], units=cross['units']['mean']['model'])


def go_on(run, steps, exam):
    """Numbers now and after so many steps."""
    begin = numbers(run, exam)
    for _ in range(steps):
        run.train_step()
    run.check()
    return dict(begin=begin, end=numbers(run, exam))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('run', type=Path)
    parser.add_argument('--steps', type=int, default=150)
    parser.add_argument('--out', type=Path, default=ROOT/'nbs'/'studies'/'restart.json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, checkpoint = replace(read_config(args.run), lr_fall=0.), latest_checkpoint(args.run)    # the same rates for both
    size = config.network.image_size
    exam = Exam(truth_pairs(f'truth-{size}'), size, FaceReader.pretrained())
    with tempfile.TemporaryDirectory() as folder:
        kept, weights = Path(folder)/'kept', Path(folder)/'weights.safetensors'
        shutil.copytree(checkpoint, kept/'checkpoints'/checkpoint.name)
        shutil.copy(args.run/'config.json', kept)
        save_networks(weights, *open_networks(checkpoint, NAMES), half=True)
        whole = Trainer(config, kept, kept/'checkpoints'/checkpoint.name, quiet=True)
        restarted = Trainer(replace(config, start_from=str(weights)), Path(folder)/'new', quiet=True)
        restarted.step = whole.step    # the same batches
        found = {name: go_on(run, args.steps, exam) for name, run in {'all of the state': whole, 'weights in half precision': restarted}.items()}
    found = dict(command=f'python tools/restart.py RUN --steps {args.steps}', commit=commit(), data=config.data, checkpoint=checkpoint.name, rows=found)
    args.out.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    main()
