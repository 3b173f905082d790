"""Give codes new numbers, so that a run can go on from weights whose codes were tidied when they were shipped.

A number that is zero for everybody stays zero: E gains nothing by it as long as G does not heed it, and G nothing as long as E does not use it.
So E is told where to look: in what the last layer before the codes sees of an expression, at the directions that the codes leave out and twins share most.
G does not heed the new numbers yet, so pictures are as they were, and training goes on with `start_from=OUT`.
"""
import argparse
from pathlib import Path

import scipy.linalg
import torch

from ship import of_run, of_shipped
from twocet_nb import runs
from twocet_nb.config import find_data
from twocet_nb.data import InputError
from twocet_nb.metrics import face_chunks
from twocet_nb.networks import save_networks, shrunken
from twocet_nb.pairs import twins

SPREAD = .2    # standard deviation of a new number, somewhat less than that of a random code


@torch.inference_mode()
def seen_before_codes(G, E, faces):
    "What the layer before the codes sees in faces (N, 3, S, S), less what it sees in their neutral faces: (N, C), as with `read_codes` for relative codes."
    def see(x): return E.trunk(shrunken(x, E.config).mean(1, keepdim=True)).flatten(1)
    return see(faces) - see(G(faces, torch.zeros(len(faces), E.config.code_dim)).clamp(-1, 1))


def left_out(first, second, head, numbers):
    """Rows (numbers, C) for the layer that makes codes, along which twins correlate most; and how much they do.

    first, second: what is seen of faces and of their twins, (N, C); head: that layer's weights (d, C). What it says already is
    taken out by regression. A ridge keeps away from directions in which next to nothing is seen.
    """
    first, second, head = (x.double() for x in (first, second, head))
    known = torch.linalg.lstsq(torch.cat([first, second]) @ head.T, torch.cat([first, second]), driver='gelsd').solution    # (d, C)
    new_first, new_second = (x - x @ head.T @ known for x in (first, second))
    common, whole = new_first.T @ new_second, new_first.T @ new_first + new_second.T @ new_second
    whole += .01 * whole.diagonal().mean() * torch.eye(len(whole))
    agreement, directions = scipy.linalg.eigh((common + common.T).numpy(), whole.numpy())
    best = torch.from_numpy(directions[:, ::-1][:, :numbers].copy())
    rows = (best - head.T @ (known @ best)).T
    return (SPREAD * rows / (torch.cat([first, second]) @ rows.T).std(0)[:, None]).float(), agreement[::-1][:numbers]


def regrow(networks, faces, numbers=8, most=2600, seed=0):
    "Give the codes of averaged networks new numbers where theirs are zero, in place; learned from `most` twins among faces, a `FaceFolder`. Returns how much twins agree."
    G, E = networks['generator_ema'], networks['encoder_ema']
    twin, free = twins(faces), (~E.head.weight.any(1)).nonzero()[:, 0]
    if not E.config.relative or len(free) < numbers:
        raise InputError(f'{len(free)} numbers of a code are always zero; mend: relative codes that tools/ship.py has tidied, or --numbers {len(free)}')
    some = (twin != torch.arange(len(twin))).nonzero()[:, 0]
    some = some[torch.randperm(len(some), generator=torch.Generator().manual_seed(seed))[:most]]
    pairs = [torch.cat([seen_before_codes(G, E, chunk) for chunk in face_chunks(faces, rows)]) for rows in (some, twin[some])]
    rows, agreement = left_out(*pairs, E.head.weight.detach(), numbers)
    with torch.no_grad(): E.head.weight[free[:numbers]] = rows
    return agreement


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('weights', type=Path, help='folder of a run, whose newest checkpoint is taken; or the name of shipped weights')
    parser.add_argument('out', type=Path, help='the file to write, .safetensors')
    parser.add_argument('--numbers', type=int, default=8, help='how many (default: 8)')
    args = parser.parse_args()
    name = str(args.weights)
    (network, networks), card, _ = of_shipped(name, '') if name in runs.SHIPPED else of_run(args.weights, args.out.stem, 'Regrown codes.')
    agreement = regrow(networks, find_data(card['recipe']['data'], network.image_size, 'train')[1], args.numbers)
    save_networks(args.out, network, networks, extra=card | dict(regrown=[round(value, 3) for value in agreement.tolist()]))
    print(f'{args.out}: twins agree by', *(f'{value:.2f}' for value in agreement), '- in the new numbers, before any training')


if __name__ == '__main__':
    main()
