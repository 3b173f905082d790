"""Every notebook runs from top to bottom, and its saved outputs are fit to be read by somebody else."""
import multiprocessing
import os
import re
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PATHS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT/'nbs').rglob('*.ipynb'))
NOTEBOOKS = [path for path in PATHS if not re.search(r'/[._]', path)]
ABSOLUTE_PATH = re.compile(r'(?<![\w.:/<~])(/[\w.-]+){2,}|\b[A-Z]:\\')


# Each notebook runs in a process of its own, forked from one that has imported what most of them want: that takes as long as a short notebook.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['torch', 'torchvision', 'sklearn.linear_model', 'scipy.stats', 'matplotlib.pyplot', 'execnb.shell', 'nbdev.test'])


def run(notebook, log):
    """nbdev's own runner, as a contributor runs one notebook; what is said goes into the file `log`, from the libraries written in C, too."""
    os.chdir(ROOT)
    with open(log, 'w') as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    from nbdev.test import nbdev_test
    nbdev_test(path=notebook, n_workers=0)


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_runs(notebook, tmp_path):
    if notebook.startswith('nbs/faces/') and not find_spec('mitsuba'):
        pytest.skip("renders: pip install 'twocet_nb[faces]'")
    process = FORKS.Process(target=run, args=(notebook, tmp_path/'log'))
    process.start()
    process.join(900)
    process.kill()
    said = (tmp_path/'log').read_text(encoding='utf-8')
    assert process.exitcode == 0 and 'Success.' in said, said


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_is_fit_to_commit(notebook):
    content = nbformat.read(ROOT/notebook, as_version=4)
    code = [cell for cell in content.cells if cell.cell_type == 'code']
    outputs = [output for cell in code for output in cell.outputs]
    text = '\n'.join(output.get('text') or output.get('data', {}).get('text/plain', '') for output in outputs)
    assert outputs, 'saved without outputs: run it, then save'
    assert not [output for output in outputs if output.output_type == 'error' or output.get('name') == 'stderr']
    assert not ABSOLUTE_PATH.search(text), f'a path of one machine in an output: {ABSOLUTE_PATH.search(text)[0]}'
    assert 'widgets' not in content.metadata, 'widget state saved: it differs at every run'
    assert (ROOT/notebook).stat().st_size < 1_500_000
    lengths = [len(re.findall(r'^(?!#\|).*\S', cell.source, re.MULTILINE)) for cell in code]
    assert max(lengths) <= 25, 'a cell too long for one idea'
    if notebook.startswith(('nbs/index', 'nbs/studies/')): return
    pictures = [output for output in outputs if any(kind.startswith('image/') for kind in output.get('data', {}))]
    assert 25 <= len(code) <= 45 and median(lengths) < 6 and len(pictures) >= 5, 'no lesson: one idea a cell, and something to look at'


@pytest.mark.parametrize('text', ['README.md', 'CONTRIBUTING.md', 'data/README.md', *NOTEBOOKS])
def test_links_lead_somewhere(text):
    """Every relative link and picture of a text stands in the repository."""
    content = (ROOT/text).read_text(encoding='utf-8')
    if text.endswith('.ipynb'):
        content = '\n'.join(cell.source for cell in nbformat.reads(content, as_version=4).cells if cell.cell_type == 'markdown')
    links = re.findall(r'\]\((?!https?:|mailto:|#|attachment:)([^)#\s]+)', re.sub(r'`[^`]*`', '', content))
    assert not [link for link in links if not ((ROOT/text).parent/link).exists()]
