"""Put the newest checkpoint of a run into data/ as shipped weights, with a card that says where they come from."""
import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from twocet_nb import data, runs, transfer
from twocet_nb.config import PRESETS, bundled_for, read_config
from twocet_nb.demo import commit
from twocet_nb.codespace import embed
from twocet_nb.guard import data_hash
from twocet_nb.networks import read_card, save_networks
from twocet_nb.pairs import rescale_codes

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


def code_scale(model, config):
    "What the codes of training faces are divided by, so that every number has the variance of a uniform random code."
    values = embed(model, config.data, 'train', 1).values
    return torch.from_numpy(values.std(0) * math.sqrt(12)).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=Path, help='folder of a run')
    parser.add_argument('--name', default='faces-64', choices=runs.SHIPPED)
    parser.add_argument('--note', default='', help='anything a reader of the card should know about the run')
    args = parser.parse_args()
    config, folder = read_config(args.run), runs.latest_checkpoint(args.run)
    begun_with, config = ancestor(config), replace(config, start_from=Path(config.start_from).name)    # no path of one machine in a card
    network, networks = runs.open_networks(folder, NAMES)
    scale = code_scale(transfer.TwoCET.load(folder), config)
    rescale_codes(networks, scale)
    step = int(folder.name.removeprefix('step-'))
    model = transfer.TwoCET(network, networks['generator_ema'], networks['encoder_ema'])
    card = dict(name=args.name, licence='Apache-2.0', step=step, sub_steps=len(config.cycles.split()) * step, commit=commit(), note=args.note,
                command=command_of(config), begun_with=begun_with,
                data=dict(name=Path(config.data).name, sha256=data_hash(config.data), split='train'),
                recipe=json.loads((args.run/'config.json').read_text()) | dict(start_from=config.start_from), judgement=transfer.judge(model, data.bundled(bundled_for('faces', network.image_size))))
    target = ROOT/'data'/runs.SHIPPED[args.name]
    save_networks(target, network, networks, half=True, extra=card)
    history = thin(runs.History(args.run/'history.jsonl', last_step=step).records)
    target.with_suffix('.json').write_text(json.dumps(card | dict(curve=history), indent=1) + '\n')
    print(f'{target.relative_to(ROOT)}: step {step}, {target.stat().st_size / 2**20:.1f} MiB')
    transfer.print_judgement(card['judgement'])
    print('Now run the notebooks again, so that their pictures show these weights: make outputs')


if __name__ == '__main__':
    main()
