"""Train the small face reader on the training people of a rendered pack and put it into data/ with a card (`make reader`).

It takes about twenty minutes on one core and is done before anything in data/ is touched.
"""
import argparse
import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from twocet_nb import data, features
from twocet_nb.demo import commit

DATA = Path(__file__).resolve().parents[1]/'data'
TARGET = DATA/'reader-faces.safetensors'


def held_out(reader):
    "Errors on the people that the reader has never seen: the test split, and the other pack from the front and from each side."
    def read(*pack): return features.read_labels(*pack, size=reader.config.image_size, unit_names=reader.unit_names)
    errors, angles = {'faces-64 test': features.judge_reader(reader, read('faces-64', 'test'))}, read('angles-64')
    for camera in ('045', '090', '135'):
        errors[f'angles-64, camera {camera}'] = features.judge_reader(reader, angles.choose(
            [k for k, row in enumerate(angles.rows) if row['file'].split('_')[-3] == camera]))
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--steps', type=int, default=features.ReaderConfig.steps)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    config, log = features.ReaderConfig(steps=args.steps, seed=args.seed), []
    reader = features.train_reader(features.read_labels('faces-64', 'train', config.image_size), config, log=log)
    every = max(1, len(log) // 100)
    curve = [{'step': k + 1} | {name: round(value, 4) for name, value in losses.items()} for k, losses in enumerate(log) if (k + 1) % every == 0]
    reader.card = dict(name='reader-faces', licence='Apache-2.0', steps=args.steps, seed=args.seed, commit=commit(), command=f'python tools/reader.py --steps {args.steps} --seed {args.seed}',
                       data=dict(name='faces-64', sha256=data.card('faces-64')['sha256'], split='train'), recipe=asdict(config))
    reader.save(TARGET)
    reader.card['held_out'] = held_out(features.FaceReader.load(TARGET, 'cpu'))     # of the 16-bit numbers that are shipped
    reader.save(TARGET)
    sha256 = hashlib.sha256(TARGET.read_bytes()).hexdigest()
    TARGET.with_suffix('.json').write_text(json.dumps(reader.card | dict(sha256=sha256, curve=curve), indent=1) + '\n', encoding='utf-8')
    readme = (DATA/'README.md').read_text(encoding='utf-8')
    (DATA/'README.md').write_text(re.sub(r'(`reader-faces.safetensors`.*?\| sha256 \| `)\w*', rf'\g<1>{sha256}', readme, count=1, flags=re.DOTALL), encoding='utf-8')
    print(f'{TARGET.name}: {TARGET.stat().st_size / 1e6:.1f} MB')
    for name, errors in reader.card['held_out'].items():
        print(name), features.print_reader(errors)


if __name__ == '__main__':
    main()
