"""Run notebooks from top to bottom, in reading order, and save them with their outputs: tools/outputs.py [NAME ...]."""
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).resolve().parents[1]


def run(path):
    "Execute one notebook in a fresh kernel; it is written only if every cell ran."
    notebook = nbformat.read(path, 4)
    # one stream output a cell, however slowly it was printed: the same notebook every time
    ExecutePreprocessor(timeout=900, kernel_name='python3', coalesce_streams=True).preprocess(
        notebook, {'metadata': {'path': str(path.parent)}})
    notebook.metadata.pop('widgets', None)
    for cell in notebook.cells:  # a widget without its state shows nothing, and hides its still picture
        for output in cell.get('outputs', []):
            output.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)
    nbformat.write(notebook, path)
    print(path.relative_to(ROOT), flush=True)


def main():
    os.environ['OMP_NUM_THREADS'] = '1'
    paths = [path for path in sorted((ROOT/'nbs').rglob('[0-9]*.ipynb')) + [ROOT/'nbs/index.ipynb']
             if not sys.argv[1:] or path.stem in sys.argv[1:]]
    for path in paths:
        run(path)
    subprocess.run([Path(sys.executable).with_name('nbdev_clean')], cwd=ROOT, check=True)


if __name__ == '__main__':
    main()
