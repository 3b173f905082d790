"""How much faster is a training iteration with each trick? All contenders in one process, in turn, as ratios.

    python benchmarks/step.py [--shapes 64,32,8 128,16,8] [--rounds 5] [--threads 1] [--device cpu] [--out benchmarks/step.json]

A shape is image size, channels at full size, batch size. On a GPU the paper's shape is used, compiled contenders are added, and
the paper preset is timed over --steady iterations, with its share of the card's measured bfloat16 ceiling.
"""
import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from naive import Naive

from twocet_nb.config import TrainConfig
from twocet_nb.demo import commit
from twocet_nb.losses import LossConfig, Schedule
from twocet_nb.networks import NetworkConfig
from twocet_nb.speed import Speed
from twocet_nb.trainer import Trainer

ALL_ON = LossConfig(cyc_e=Schedule.constant(1.), code=Schedule.constant(1.), ds=Schedule.constant(1.))
CUMULATIVE = {  # name: what it adds to the one before, in the configuration
    'share, freeze, no graph': dict(speed=dict(share_fakes=True, freeze=True, no_graph=True, late_checks=True)),
    '+ one pass': dict(speed=dict(one_pass=True)),
    '+ folded': dict(speed=dict(folded=True)),
    '+ fewer kernels': dict(speed=dict(fewer_kernels=True)),
    '+ fused': dict(speed=dict(fused=True)),
    '+ bfloat16': dict(precision='bf16'),
    '+ lazy R1': dict(losses=replace(ALL_ON, r1_every=4)),
    '+ channels last': dict(speed=dict(channels_last=True)),
}
ON_GPU = {'+ compile': dict(speed=dict(compile='default')), '+ CUDA graphs': dict(speed=dict(compile='reduce-overhead'))}


def base_config(shape, device):
    size, width, batch = shape
    network = NetworkConfig(size, width, max(width, 512))
    return TrainConfig(data='faces-128' if size >= 128 else 'faces-64', network=network, losses=ALL_ON, batch_size=batch,
                       device=device, speed=Speed.off())


def contenders(shape, device, folder):
    """{name: an iteration}: the plain transcription, then one trick more each."""
    config = base_config(shape, device)
    yield 'plain transcription', Naive(config, device).train_step
    for number, (name, change) in enumerate((CUMULATIVE | (ON_GPU if device != 'cpu' else {})).items()):
        config = replace(config, **change | dict(speed=replace(config.speed, **change.get('speed', {}))))
        yield name, Trainer(config, Path(folder)/str(number), quiet=True).train_step


def seconds(iteration, device):
    """Time of one iteration: of the processor on a CPU, which neighbours disturb least; by the clock on a GPU."""
    clock = time.process_time if device == 'cpu' else time.perf_counter
    if device != 'cpu': torch.cuda.synchronize()
    began = clock()
    iteration()
    if device != 'cpu': torch.cuda.synchronize()
    return clock() - began


def ratios(shape, device, rounds):
    """{name: how many times faster than the plain transcription}: the median over rounds of ratios within a round."""
    with tempfile.TemporaryDirectory() as folder:
        runs = dict(contenders(shape, device, folder))
        for iteration in runs.values(): iteration()    # warm-up: allocation, compilation
        # four iterations a round, so that lazy R1 is counted fairly
        table = [{name: sum(seconds(iteration, device) for _ in range(4)) for name, iteration in runs.items()} for _ in range(rounds)]
    return {name: round(median(row['plain transcription'] / row[name] for row in table), 2) for name in table[0]}


def ceiling(device, n=8192, repeats=20):
    """Measured bfloat16 operations per second of a large matrix product."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    a @ a
    return repeats * 2 * n**3 / seconds(lambda: [a @ a for _ in range(repeats)], device)


def steady(device, iterations):
    """The paper preset in bfloat16 with every trick: seconds per iteration once it runs evenly, and hours for all of it."""
    config = TrainConfig(precision='bf16', device=device, speed=Speed(channels_last=True, compile='default'))
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(config, folder, quiet=True)
        for _ in range(20): run.train_step()
        each = seconds(lambda: [run.train_step() for _ in range(iterations)], device) / iterations
    share = 37e12 / each / ceiling(device)    # 37 TFLOP: the paper's iteration, written plainly
    return dict(iterations=iterations, seconds=round(each, 4), hours_for_all=round(each * config.steps / 3600, 2), share_of_bf16_ceiling=round(share, 3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--shapes', nargs='+', metavar='SIZE,WIDTH,BATCH')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--steady', type=int, default=500, metavar='N', help='iterations of the paper preset on a GPU')
    parser.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.json'))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = args.shapes or (['64,32,8', '128,16,8'] if args.device == 'cpu' else ['128,128,8'])
    tables = {}
    for text in shapes:
        size, width, batch = shape = [int(part) for part in text.split(',')]
        tables[f'{size} px, {width} channels, batch {batch}'] = table = ratios(shape, args.device, args.rounds)
        print(text, *(f'{name:28}{ratio:6.2f}' for name, ratio in table.items()), sep='\n', flush=True)
    result = dict(command=' '.join(['python benchmarks/step.py', *sys.argv[1:]]), commit=commit(), torch=torch.__version__, seed=0,
                  data='faces-64 and faces-128', threads=args.threads, rounds=args.rounds, device=args.device, tables=tables)
    if args.device != 'cpu':
        result |= dict(device=torch.cuda.get_device_name(), paper=steady(args.device, args.steady))
        print(result['paper'])
    args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
