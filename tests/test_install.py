"""The wheel installs and works where nothing but its own requirements can be imported."""
import os
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKED = ('setup.py', 'pyproject.toml', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE', 'twocet_nb', 'data')
DEVELOPMENT_ONLY = ('nbdev', 'fastcore', 'execnb', 'jupyterlab', 'nbclient', 'playwright', 'pytest', 'mitsuba', 'cv2')

PROBE = '''
import importlib, importlib.util, pkgutil, sys
import twocet_nb
from pathlib import Path
assert Path(sys.prefix) in Path(twocet_nb.__file__).parents, twocet_nb.__file__
found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
assert not found, f'not an empty environment: {found}'
for module in pkgutil.walk_packages(twocet_nb.__path__, 'twocet_nb.'):
    importlib.import_module(module.name)
from twocet_nb.data import bundled
print(len(list(bundled('faces-64').rglob('*.png'))))
'''


def run(*command, **options):
    """Run a command that must succeed; return what it printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, encoding='utf-8', **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder):
    """Build the wheel from a copy of the sources, so that nothing is written into the repository."""
    sources = folder/'sources'
    sources.mkdir()
    for name in PACKED:
        copy = shutil.copytree if (ROOT/name).is_dir() else shutil.copy2
        copy(ROOT/name, sources/name)
    run(sys.executable, '-c', f'from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})', cwd=sources)
    return next(folder.glob('*.whl'))


def runtime_distributions(requirements):
    """The installed distributions that `requirements` need, and what those need, and so on."""
    found, asked, waiting = {}, set(), list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        extras = ('', *requirement.extras)
        dist = distribution(requirement.name)
        if (dist.name, extras) in asked:
            continue
        asked.add((dist.name, extras))
        found[dist.name] = dist
        for text in dist.requires or ():
            marker = Requirement(text).marker
            if marker is None or any(marker.evaluate({'extra': extra}) for extra in extras):
                waiting.append(text)
    return found.values()


def link_distributions(distributions, folder):
    """Fill `folder` with links to the files of these distributions and of no other."""
    folder.mkdir()
    for dist in distributions:
        for name in {file.parts[0] for file in dist.files} - {'..', '__pycache__'}:
            if not (folder/name).exists():
                (folder/name).symlink_to(dist.locate_file(name))


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """An environment with the wheel and its requirements: (folder with its programs, variables to run them with).

    Installing PyTorch again would take minutes and gigabytes. So the new environment, otherwise empty,
    sees links to exactly the distributions that the wheel's metadata ask for, in this environment.
    """
    folder = tmp_path_factory.mktemp('install')
    wheel = build_wheel(folder)
    run(sys.executable, '-m', 'venv', folder/'env')
    programs = folder/'env'/('Scripts' if os.name == 'nt' else 'bin')
    variables = {key: value for key, value in os.environ.items() if not key.startswith('PYTHON')}
    variables['TWOCET_CACHE'] = str(folder/'cache')
    run(programs/'python', '-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps', wheel, env=variables)
    packages = Path(run(programs/'python', '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    requires = PathDistribution(next(packages.glob('twocet_nb-*.dist-info'))).requires
    runtime = runtime_distributions(text for text in requires if 'extra ==' not in text)
    link_distributions(runtime, folder/'runtime')
    (packages/'runtime.pth').write_text(str(folder/'runtime'))
    return programs, variables


def test_modules_and_bundled_faces(installed, tmp_path):
    programs, variables = installed
    pictures = run(programs/'python', '-c', PROBE, *DEVELOPMENT_ONLY, cwd=tmp_path, env=variables)
    assert int(pictures) > 100


def test_without_mitsuba_all_but_rendering_works(installed, tmp_path):
    programs, variables = installed
    program = ('from twocet_nb.faces import Expression, Identity, render\n'
               'person = Identity.sample(1).mix(Identity.sample(2), .5); print((Expression.sample("happy", 1)*.5).emotion)\n'
               'try: render(person)\nexcept ValueError as error: print(error)')
    said = run(programs/'python', '-c', program, cwd=tmp_path, env=variables)
    assert said.startswith('happy') and "pip install 'twocet_nb[faces]'" in said


def test_command_line(installed, tmp_path):
    programs, variables = installed
    assert 'demo' in run(programs/'twocet', '--help', cwd=tmp_path, env=variables)
