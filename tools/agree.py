"""Let the encoder learn alone what twins share; a run with start_from=OUT then teaches the generator what it says now.

    torchrun --nproc_per_node 2 tools/agree.py faces-64 OUT.safetensors

Pictures pay the encoder little for what is small in them, and do not mind if it also says who somebody is. Twins do: they did the same (notebook 03c).
So each number of a code becomes the mean of what was read from a face and from its twin. Beside them stand a few new numbers that make the encoder look
for more: each shall be the same for both twins, and say what no other says, as in Barlow Twins (Zbontar et al., 2021). The generator is deaf to them,
and `tools/ship.py` keeps of them only what twins share and the others lack. A step of an encoder alone sees many more twins than one of a run.
"""
import argparse
import copy
from pathlib import Path

import torch
import torch.distributed as dist
from ship import NAMES
from torch.nn.parallel import DistributedDataParallel

from twocet_nb import runs
from twocet_nb.config import find_data
from twocet_nb.data import InputError
from twocet_nb.demo import commit
from twocet_nb.networks import read_card, save_networks
from twocet_nb.pairs import StillPairs, exchanged
from twocet_nb.speed import speed_up

SPREAD = .3    # standard deviation of a new number, about that of the old ones
APART = .1    # what a product of two numbers counts, beside the agreement of one


def agreement_loss(codes, known):
    """How far twins are from agreeing in all numbers, and numbers from being different ones, (loss, correlations of twins).

    codes: (2 N, d), of which rows 2k and 2k + 1 are twins; the first `known` numbers may resemble each other.
    """
    first, second = ((x - x.mean(0)) / (x.std(0) + 1e-4) for x in (codes[::2], codes[1::2]))
    across, within = first.T @ second / len(first), (first.T @ first + second.T @ second) / 2 / len(first)
    new = 1 - torch.eye(len(across))
    new[:known, :known] = 0
    apart = ((across**2 + within**2) * new).sum()
    spread = ((codes[:, known:].std(0) - SPREAD)**2).sum()
    return ((1 - across.diagonal())**2).sum() + APART * apart + spread, across.diagonal().detach()


def learn(E, G, batches, known, numbers, steps, rate):
    "Train an encoder in place, in steps that share gradients; yields the correlations of twins after each."
    old, G = (speed_up(copy.deepcopy(network)).requires_grad_(False) for network in (E, G))
    new = torch.randn(numbers - known, E.head.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): E.head.weight[known:numbers] = new * E.head.weight[:known].std() / 2
    shared = DistributedDataParallel(speed_up(E).train().requires_grad_(True))
    adam = torch.optim.Adam(E.parameters(), lr=rate, betas=(.9, .99))
    for step in range(steps):
        for group in adam.param_groups: group['lr'] = rate * (1 - step / steps) * min(1, (step + 1) / 30)
        faces = batches[step][1]
        with torch.autocast('cpu', torch.bfloat16):
            neutral = G(faces, torch.zeros(len(faces), G.config.code_dim)).clamp(-1, 1)
            both = torch.cat([faces, neutral])
            codes, was = (first - second for first, second in (network(both).float().chunk(2) for network in (shared, old)))    # as `read_codes`, both of one drawing
        mean = ((was + exchanged(was)) / 2)[:, :known]
        loss, agreement = agreement_loss(codes[:, :numbers], known)
        loss = loss + ((codes[:, :known] - mean).square().mean(0) / mean.var(0)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        yield agreement
    E.eval().requires_grad_(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('weights', help='a shipped name, or a file that tools/ship.py or this wrote')
    parser.add_argument('out', type=Path)
    parser.add_argument('--numbers', type=int, default=16, help='of a code, old and new, that learn')
    parser.add_argument('--steps', type=int, default=320)
    parser.add_argument('--rate', type=float, default=6e-4)
    parser.add_argument('--twins', type=int, default=48, help='pairs of twins in a step of one process')
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    rank, world = dist.get_rank(), dist.get_world_size()
    (network, networks), card = runs.open_networks(args.weights, NAMES), read_card(runs.weights_path(args.weights))['extra']
    E = networks['encoder_ema']
    known = int(E.head.weight.any(1).sum())
    if not known < args.numbers <= network.code_dim: raise InputError(f'{known} numbers are in use, {args.numbers} asked for; mend: more, and at most {network.code_dim}')
    faces = find_data(card['recipe']['data'], network.image_size, 'train')
    batches = StillPairs(*faces, 2 * world * args.twins, alike=True, warped=False, rank=rank, world=world)
    for step, agreement in enumerate(learn(E, networks['generator_ema'], batches, known, args.numbers, args.steps, args.rate), 1):
        if rank == 0 and step % 50 == 0: print(step, 'twins correlate by', *(f'{value:.2f}' for value in agreement), flush=True)
    if rank == 0:
        note = f'The encoder alone: {args.steps} steps of {world * args.twins} pairs of twins, who shall agree in {known} numbers of a code and in {args.numbers - known} new ones.'
        line = f'torchrun --nproc_per_node {world} tools/agree.py {Path(args.weights).name} {args.out.name} --numbers {args.numbers} --steps {args.steps} --rate {args.rate} --twins {args.twins}'
        save_networks(args.out, network, networks, extra=card | dict(step=0, sub_steps=0, command=line, commit=commit(), note=note, begun_with=card))
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
