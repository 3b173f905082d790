"""Put the newest checkpoint of a run into data/ as shipped weights, with a card that says where they come from."""
import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from twocet_nb import data, runs, transfer
from twocet_nb.config import PRESETS, bundled_for, find_data, read_config
from twocet_nb.demo import commit
from twocet_nb.guard import data_hash
from twocet_nb.metrics import codes_of
from twocet_nb.networks import read_card, save_networks
from twocet_nb.pairs import renumber_codes, shared_part, twins

ROOT = Path(__file__).resolve().parents[1]
NAMES = ['generator_ema', 'encoder_ema', 'discriminator']    # all it takes to use them and to train on


def thin(records, most=200):
    "About `most` of the records of a history, evenly spaced, the last among them."
    stride = max(1, len(records) // most)
    return records[len(records) - 1::-stride][::-1]


def command_of(config):
    "A line of Python that trains the same run: the preset with its losses, and what else is changed."
    like = [name for name, make in PRESETS.items() if make(steps=config.steps).losses == config.losses]
    if not like:
        return '(no preset: see the recipe)'
    usual = PRESETS[like[0]](steps=config.steps)
    changes = {name: value for name, value in vars(config).items() if value != getattr(usual, name)} | dict(steps=config.steps)
    return f'Trainer(preset({like[0]!r}, {", ".join(f"{name}={value!r}" for name, value in changes.items())})).fit()'


def ancestor(config):
    "What the card of the weights says that the run began with; None for a run from scratch."
    if not config.start_from:
        return None
    card = read_card(runs.weights_path(config.start_from))['extra']
    return {name: card[name] for name in ('name', 'step', 'sub_steps', 'command', 'commit', 'note', 'begun_with') if name in card}


def tidy_codes(networks, network, root):
    """Let codes say only what twins agree on, if these faces have twins, and their numbers have the variance of uniform random codes. Returns what was done, for the card."""
    model = transfer.TwoCET(network, networks['generator_ema'], networks['encoder_ema'])
    faces = find_data(root, network.image_size, 'train')[1]
    codes, twin, done = codes_of(model, faces), twins(faces), {}
    some = twin != torch.arange(len(twin))
    to = back = torch.eye(network.code_dim)
    if some.any():
        to, back, agreement = shared_part(codes[some], codes[twin[some]])
        done = dict(kept=int(to.any(1).sum()), agreement=[round(value, 3) for value in agreement.tolist()])
    variance = (codes @ to.T).var(0)
    if done: variance = variance.sum().expand(len(variance)) / done['kept']    # the first of them may stay the largest
    spread = (12 * variance).sqrt()
    renumber_codes(networks, to / spread[:, None], back * spread)
    return done


def of_run(run, name, note):
    "(networks, card, curve) of the newest checkpoint of a run."
    config, folder = read_config(run), runs.latest_checkpoint(run)
    begun_with, config = ancestor(config), replace(config, start_from=Path(config.start_from).name)    # no path of one machine in a card
    step = int(folder.name.removeprefix('step-'))
    card = dict(name=name, licence='Apache-2.0', step=step, sub_steps=len(config.cycles.split()) * step, commit=commit(), note=note,
                command=command_of(config), begun_with=begun_with, data=dict(name=Path(config.data).name, sha256=data_hash(config.data), split='train'),
                recipe=json.loads((run/'config.json').read_text()) | dict(start_from=config.start_from))
    return runs.open_networks(folder, NAMES), card, thin(runs.History(run/'history.jsonl', last_step=step).records)


def of_shipped(name, note):
    "The same of shipped weights, to tidy their codes once more."
    file = runs.weights_path(name)
    card = read_card(file)['extra']
    return runs.open_networks(file, NAMES), card | dict(note=f'{card["note"]} {note}'.strip()), json.loads(file.with_suffix('.json').read_text())['curve']


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=Path, help='folder of a run; or the name of shipped weights, whose codes are tidied again')
    parser.add_argument('--name', default='faces-64', choices=runs.SHIPPED)
    parser.add_argument('--note', default='', help='anything a reader of the card should know about the run')
    args = parser.parse_args()
    again = str(args.run) in runs.SHIPPED
    name = str(args.run) if again else args.name
    (network, networks), card, curve = of_shipped(name, args.note) if again else of_run(args.run, name, args.note)
    card |= dict(codes=tidy_codes(networks, network, card['recipe']['data']))
    model = transfer.TwoCET(network, networks['generator_ema'], networks['encoder_ema'])
    card |= dict(judgement=transfer.judge(model, data.bundled(bundled_for('faces', network.image_size))))
    target = ROOT/'data'/runs.SHIPPED[name]
    save_networks(target, network, networks, half=True, extra=card)
    target.with_suffix('.json').write_text(json.dumps(card | dict(curve=curve), indent=1) + '\n')
    print(f'{target.relative_to(ROOT)}: step {card["step"]}, {target.stat().st_size / 2**20:.1f} MiB; {card["codes"]}')
    transfer.print_judgement(card['judgement'])
    print('Now run the notebooks again, so that their pictures show these weights: make outputs')


if __name__ == '__main__':
    main()
