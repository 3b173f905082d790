"""What all tests share: one thread a process, one cache for the session, a few faces, a full disk, and the command line."""
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
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


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A folder on a disk of 300 kB where mounting is allowed; else `os.fsync` and `Path.write_bytes` fail in it as on a full disk."""
    place = tmp_path/'disk'
    place.mkdir()
    mount = shutil.which('mount')
    if mount and subprocess.run([mount, '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', place], capture_output=True).returncode == 0:
        yield place
        subprocess.run(['umount', '-l', place], check=True)
        return
    sync, write = os.fsync, Path.write_bytes

    def need(more):
        if sum(path.stat().st_size for path in place.rglob('*') if path.is_file()) + more > 300_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fsync(handle):
        need(0)
        sync(handle)

    def write_bytes(path, content):
        if place in path.parents:
            need(len(content))
        return write(path, content)
    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(Path, 'write_bytes', write_bytes)
    yield place


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


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def twocet(here, capsys):
    """code, out, err of a command in this process: seconds cheaper than the `cli` fixture, which starts a new one."""
    from twocet_nb.cli import main

    def run(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


# The beginning of programs about killed processes: torch is imported once, and a child is forked per trial. It dies by itself, just before
# the n-th system call that changes or syncs a name, or it is killed from outside, after a while.
FORKING = '''
import itertools, os, random, signal, sys, time
from pathlib import Path

def die_at_call(n):
    calls = itertools.count(1)
    def deadly(call):
        def wrapped(*args, **options):
            if next(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)
        return wrapped
    for name in ('replace', 'fsync', 'unlink', 'rmdir', 'mkdir'): setattr(os, name, deadly(getattr(os, name)))

def trial(child, look, kill_after=None):
    "Run `child` in a fork, then `look` at what it left; returns whether it was killed."
    pid = os.fork()
    if not pid:
        try: child()
        finally: os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    look()
    return killed
'''


@pytest.fixture
def forked():
    """The numbers that a program printed which begins with `FORKING`: calls, litter = forked(program, folder)."""
    if not hasattr(os, 'fork'):
        pytest.skip('needs fork and SIGKILL')

    def run(program, *args):
        done = subprocess.run([sys.executable, '-c', FORKING + program, *args], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return map(int, done.stdout.split())
    return run
