"""Try the hypotheses of nbs/studies/01_recipe.ipynb, each from the same seed and for the same processor time; results go to nbs/studies/recipe.json.

A row that is there is not computed again, so a stopped study goes on. Several processes may share the rows: `--rows` says which are whose.
Every commit trains the recipe itself first: rows are compared with the recipe of their own commit, since machines and their load differ, too.
"""
import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

from twocet_nb import data, trainer
from twocet_nb.codespace import embed, variance_shares
from twocet_nb.config import preset
from twocet_nb.demo import commit
from twocet_nb.losses import Schedule
from twocet_nb.networks import NetworkConfig
from twocet_nb.pairs import MOVES
from twocet_nb.trainer import Trainer
from twocet_nb.transfer import averaged_model
from twocet_nb.truth import judge_truth

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/'nbs'/'studies'/'recipe.json'
on = Schedule.constant
COURSE, UNPAIRED = preset('course', lr_fall=0., ema_decay=.98), preset('unpaired', ema_decay=.98)    # no row knows its number of steps beforehand,
GOING = preset('refine', steps=50, ema_decay=.9)    # but those that go on from the shipped weights, and are done in time


def course(**losses):
    "The recipe with other losses."
    return replace(COURSE, losses=replace(COURSE.losses, **losses))


def unpaired(**losses):
    "The losses of the paper for a laptop, from the first step (a short study cannot wait for a fade-in)."
    full = replace(UNPAIRED.losses, adv_e=on(1.), adv_n=on(1.), cyc_n=on(5.), cyc_e=on(5.), code=on(3.), ds=on(1.), identity=on(0.))
    return replace(UNPAIRED, losses=replace(full, **losses))


def unregistered(moving, fixed):
    return torch.zeros(len(moving), MOVES)


def no_middle(size):
    return torch.zeros(size, size)


def unlit(images, light):
    return images


def no_texture(images):
    return 0 * images


def equal_weights(asked, answer):
    return torch.ones_like(asked[:, :1])


def whole_photograph(asked, photograph, still=False):
    return photograph.float()


def disturbed(faces, face_type, typed=trainer.typed):
    "What D sees with differentiable augmentation (Zhao et al. 2020): brightness, saturation, contrast, a shift by up to an eighth, a square cut out."
    def chance(width): return width * (torch.rand(len(faces), 1, 1, 1, device=faces.device) - .5)
    x = faces + chance(1.)
    x = (x - x.mean(1, keepdim=True)) * (1 + chance(2.)) + x.mean(1, keepdim=True)
    x = (x - x.mean((1, 2, 3), keepdim=True)) * (1 + chance(1.)) + x.mean((1, 2, 3), keepdim=True)
    size = x.shape[2]
    right, down = (torch.randint(-(size // 8), size // 8 + 1, (2,))).tolist()
    x = F.pad(x, [size // 8] * 4)[..., size // 8 + down:size // 8 + down + size, size // 8 + right:size // 8 + right + size]
    left, top = torch.randint(-(size // 4), 3 * size // 4, (2,)).tolist()
    kept = torch.ones(size, size, device=faces.device)
    kept[max(0, top):max(0, top + size // 2), max(0, left):max(0, left + size // 2)] = 0
    return typed(x * kept, face_type)


# name: (configuration, what is replaced in the code)
HYPOTHESES = {
    'the recipe': (COURSE, None),
    'paper': (preset('paper', data='faces-64', ema_decay=.98, network=NetworkConfig(64, 16)), None),
    'paper, He start': (preset('paper', data='faces-64', ema_decay=.98, network=NetworkConfig(64, 16, he_init=True), lr_generator=6e-4, lr_encoder=6e-4, lr_discriminator=6e-4), None),
    'paper for a laptop': (unpaired(), None),
    'paper for a laptop, repainting': (replace(unpaired(), network=replace(COURSE.network, relative=False)), None),
    'people who hold still': (replace(COURSE, data='still-64', still=True), None),
    'people who hold still, pair_n half': (replace(course(pair_n=on(.5)), data='still-64', still=True), None),
    'people who hold still, twins': (replace(course(pair_n=on(.5)), data='still-64', still=True, alike=True), None),
    'people who hold still, no identity loss': (replace(course(identity=on(0.)), data='still-64', still=True), None),
    'twins, twice the channels': (replace(course(pair_n=on(.5)), data='still-64', still=True, alike=True, network=NetworkConfig.course(64, 32, 256)), None),
    'absolute codes': (replace(COURSE, network=replace(COURSE.network, relative=False)), None),
    'pairs, drawn anew': (replace(COURSE, network=replace(COURSE.network, repaint=False)), None),
    'pairs not registered': (COURSE, ('twocet_nb.pairs.register', unregistered)),
    'registered without the middle': (COURSE, ('twocet_nb.pairs.middle', no_middle)),
    'asked for the whole photograph': (COURSE, ('twocet_nb.trainer.right_answer', whole_photograph)),
    'light not registered': (COURSE, ('twocet_nb.pairs.relit', unlit)),
    'all pixels count alike': (COURSE, ('twocet_nb.trainer.change_weights', equal_weights)),
    'texture does not count': (COURSE, ('twocet_nb.pairs.texture', no_texture)),
    'codes of any size': (course(size=on(0.)), None),
    'no identity loss': (course(identity=on(0.)), None),
    'twice the channels, for 32 px': (replace(COURSE, network=replace(COURSE.network, width=32, shrink=2)), None),
    'half the channels': (replace(COURSE, network=replace(COURSE.network, width=8)), None),
    'code of 8 numbers': (replace(COURSE, network=replace(COURSE.network, code_dim=8)), None),
    'batch of 16': (replace(COURSE, batch_size=16), None),
    'averages that forget faster': (replace(COURSE, ema_decay=.9), None),
    'averages that forget slower': (replace(COURSE, ema_decay=.995), None),
    'twice the learning rate': (replace(COURSE, lr_generator=2e-3, lr_encoder=2e-3), None),
    'half the learning rate': (replace(COURSE, lr_generator=5e-4, lr_encoder=5e-4), None),
    'Muon': (replace(COURSE, optimizer='muon'), None),
    'Muon, a third of the learning rate': (replace(COURSE, optimizer='muon', lr_generator=3e-4, lr_encoder=3e-4), None),
    'D from the first step': (course(adv_e=on(.02), adv_n=on(.02), cyc_n=on(.5)), None),
    'D from the first step, DiffAugment': (course(adv_e=on(.02), adv_n=on(.02), cyc_n=on(.5)), ('twocet_nb.trainer.typed', disturbed)),
    'code loss, random codes': (replace(course(adv_e=on(.02), cyc_n=on(.5), code=on(.2)), borrowed=0.), None),
    'laptop, R1 x 10': (unpaired(r1=1.), None),
    'laptop, no diversity': (unpaired(ds=on(0.)), None),
    'laptop, plain diversity': (unpaired(proportional_diversity=False), None),
    'laptop, Gaussian codes': (replace(unpaired(), codes='gaussian'), None),
    'laptop, half borrowed codes': (replace(unpaired(), borrowed=.5), None),
    'laptop, slower D': (replace(unpaired(), lr_discriminator=2e-4), None),
    'laptop, one sub-step a step': (replace(unpaired(), cycles='ab'), None),
    'laptop, DiffAugment': (unpaired(), ('twocet_nb.trainer.typed', disturbed)),
    'going on': (GOING, None),
    'going on with Adam': (replace(GOING, optimizer='adam'), None),
    'going on with Adam, half the learning rate': (replace(GOING, optimizer='adam', lr_generator=1e-4, lr_encoder=1e-4), None),
    'going on with bent faces': (replace(GOING, warped=True), None),
}


@cache
def moves(root, replaced):
    "The moves of all pairs of a data set; `replaced` says which way of registering them is at work."
    batches = trainer.make_batches(replace(COURSE, data=root), torch.device('cpu'))
    for numbers in torch.arange(len(batches.moves)).split(64):
        places = batches.raw.partner[numbers], numbers
        batches.moves_of(numbers, *(data._to_unit(data._some(faces, some)) for faces, some in zip(batches.raw.raw.faces, places)))
    return batches.moves


def train(config, seconds, folder, replaced=''):
    "A run of so many seconds of processor time, or of all its steps; what comes before the first step, registration too, does not count."
    run = Trainer(replace(config, memory_check=False), folder, quiet=True)
    if config.paired and not config.still: run.batches.moves = moves(config.data, replaced if replaced.startswith('twocet_nb.pairs') else '').clone()
    torch.manual_seed(config.seed)    # of DiffAugment; all else has seeds of its own
    began = time.process_time()
    while time.process_time() - began < seconds and run.step < config.steps:
        run.train_step()
    run.check()
    return run


def numbers(run):
    "What is said about a run: exact truth, other people's expressions, and the shares of the variance of its codes."
    model = averaged_model(run)
    cross = judge_truth(model)['cross']
    shares = {finding.name: finding.value for finding in variance_shares(embed(model, run.config.data, 'test', 1))}
    found = dict(remaining=cross['l1']['face']['remaining'], remaining_mouth=cross['l1']['mouth']['remaining'], wins=cross['wins']['model'],
                 units=cross['units']['mean']['model'], like_target=cross['like_target']['model'])
    return found | dict(between_people=shares['between people'], between_expressions=shares['between expressions'])


def results():
    return json.loads(RESULTS.read_text(encoding='utf-8')) if RESULTS.exists() else dict(rows={}, controls={})


def add(name, config, row):
    "Put a row into the results, where another process may have added some. The recipe is also the control of all rows of its commit."
    found = results()
    found |= dict(command='python tools/study.py', seed=config.seed, exam='truth-64', data={name: data.card(name)['sha256'] for name in ('faces-64', 'still-64')})
    rows = found['rows'] | {name: row}
    found['rows'] = {known: rows[known] for known in HYPOTHESES if known in rows}
    if name == 'the recipe': found['controls'][row['commit']] = row
    RESULTS.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seconds', type=int, default=150, help='processor time of each training (default: 150)')
    parser.add_argument('--rows', nargs='*', default=list(HYPOTHESES), help='which hypotheses (default: all)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    now, begun = commit(), results()
    wanted = [name for name in args.rows if name not in begun['rows']]
    if wanted and now not in begun['controls']: wanted = ['the recipe', *(name for name in wanted if name != 'the recipe')]
    for name in wanted:
        config, replaced = HYPOTHESES[name]
        with tempfile.TemporaryDirectory() as folder, patch(*replaced) if replaced else nullcontext():
            run = train(config, args.seconds, Path(folder)/'run', replaced[0] if replaced else '')
            row = dict(commit=now, seconds=args.seconds, steps=run.step) | numbers(run)
        add(name, config, row)
        print(f'{name}: {row["steps"]} steps, remaining {row["remaining"]["value"]:.2f}, wins {row["wins"]["value"]:.2f}', flush=True)


if __name__ == '__main__':
    main()
