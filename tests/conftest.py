"""What all tests share: one thread a process, one cache for the session, the command line as a fixture."""
import os
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

import pytest

# Before anything imports torch, and inherited by every process the tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')


def pytest_configure(config):
    """Open the bundled faces once, in a folder that all test processes share, not in the user's cache."""
    if 'TWOCET_CACHE' not in os.environ:  # already set by the user, or by the process that started this one
        config.twocet_cache = os.environ['TWOCET_CACHE'] = tempfile.mkdtemp(prefix='twocet-cache-')


def pytest_unconfigure(config):
    if hasattr(config, 'twocet_cache'):
        shutil.rmtree(config.twocet_cache, ignore_errors=True)


@pytest.fixture(scope='session')
def few_faces(tmp_path_factory):
    """Four faces of each type and split: opening thousands of files would take most of the time."""
    from twocet_nb.data import bundled, list_faces
    few = tmp_path_factory.mktemp('few')
    for split in ('train', 'test'):
        for face_type, folder in enumerate(('a_n', 'b_e')):
            (few/split/folder).mkdir(parents=True)
            for path in list_faces(bundled('faces-64'), split, face_type)[:4]:
                shutil.copy(path, few/split/folder)
    return few


class Result(NamedTuple):
    code: int
    out: str
    err: str


# What the installed `twocet` script does, whether or not its folder is on PATH.
TWOCET = "import sys; from twocet_nb.cli import main; sys.argv[0] = 'twocet'; sys.exit(main())"


@pytest.fixture
def cli(tmp_path):
    """Run `twocet` in an empty folder: code, out, err = cli('check', root)."""
    def run(*args, cwd=tmp_path, timeout=600):
        done = subprocess.run([sys.executable, '-c', TWOCET, *map(str, args)], cwd=cwd, timeout=timeout,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding='utf-8')
        return Result(done.returncode, done.stdout, done.stderr)
    return run
