"""Put rendered packs into data/: python tools/pack.py runs/faces (the last step of `make faces`).

The folder holds what `twocet faces make` made, `cfee`, `still` and `rafd`; the truth of test pairs of the first, with masks, is rendered beside them.
Each becomes a zip in data/, with its card in data/faces.json and its hash in data/README.md.
"""
import hashlib
import json
import re
import sys
from pathlib import Path

from twocet_nb.faces.pack import make_truth, zip_pack

DATA = Path(__file__).resolve().parents[1]/'data'
CROSS = 208  # pairs of two people: the eight neutral test faces x 26, every class eight or nine times
OWN = 200  # pairs of one person: the eight x 25 emotions, all there are
FILES = {'cfee': 'faces-128.zip', 'still': 'still-128.zip', 'rafd': 'angles-128.zip', 'truth': 'truth-128.zip'}


def add(folder, file):
    "Zip one pack; return what faces.json says about the file."
    card = json.loads((folder/'card.json').read_text(encoding='utf-8'))
    assert card['size'] == 128, f'{folder}: {card["size"]} px'
    zip_pack(folder, DATA/file)
    sha256 = hashlib.sha256((DATA/file).read_bytes()).hexdigest()
    print(f'{file}: {card["images"]} images, {(DATA/file).stat().st_size/2**20:.1f} MiB')
    return {'sha256': sha256, **card}


def main(root):
    if make_truth(root/'cfee', root/'truth', CROSS, OWN): sys.exit('interrupted; the same command goes on')
    files = {file: add(root/name, file) for name, file in FILES.items()}
    packs = {f'{Path(file).stem.removesuffix("-128")}-{size}': dict(file=file, size=size, shrink=128//size)
             for file in files for size in (64, 128)}
    (DATA/'faces.json').write_text(json.dumps({'files': files, 'packs': packs}, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    readme = (DATA/'README.md').read_text(encoding='utf-8')
    for file, card in files.items():
        readme = re.sub(rf'(\| pack \| `{re.escape(file)}`.*?\| sha256 \| `)\w*', rf'\g<1>{card["sha256"]}', readme, count=1, flags=re.DOTALL)
    (DATA/'README.md').write_text(readme, encoding='utf-8')


if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    main(Path(sys.argv[1]))
