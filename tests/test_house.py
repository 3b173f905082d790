"""Rules of the house: imports point downwards, and every dependency has its reason."""
import ast
import builtins
import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT/'twocet_nb'
SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']


def module_name(path):
    return path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')


def place(path):
    """Where the last notebook that exports into the module at `path` stands in reading order: '03' or '04a'."""
    return max(re.findall(r'^# %% \S*?(\d+\w?)_\w+\.ipynb', path.read_text(encoding='utf-8'), re.MULTILINE))


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob('*.py')) if not path.name.startswith('_')}


def imports(path):
    """(full name, whether at the top of the module) of everything that the module at `path` imports."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    folder = ['twocet_nb', *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[:len(folder) + 1 - node.level] if node.level else []
            base = '.'.join(base + ([node.module] if node.module else []))
            names = [base, *(f'{base}.{alias.name}' for alias in node.names)]  # a name may be a module, too
        else:
            continue
        for name in names:
            yield name, node in tree.body


def may_import(name, other):
    """Whether module `name` may import module `other` (both without 'twocet_nb.')."""
    package, other_package = name.rpartition('.')[0], other.rpartition('.')[0]
    if package == other_package:
        return place(MODULES[other]) < place(MODULES[name])
    if other_package:
        return name in ('cli', 'answers')  # nothing else builds on a sub-package; answers renders where the extra [faces] is there
    return place(MODULES[other]) < '08'


@pytest.mark.parametrize('name', MODULES)
def test_imports_point_downwards(name):
    own = [full.removeprefix('twocet_nb.') for full, _ in imports(MODULES[name]) if full.startswith('twocet_nb.')]
    assert not [other for other in own if other in MODULES and not may_import(name, other)]


@pytest.mark.parametrize('name', MODULES)
def test_imports_are_runtime_requirements(name):
    """At the top of a module only what every installation has; nbdev and fastcore nowhere."""
    required = {re.split('[<>=]', word)[0] for word in SETTINGS['requirements'].split()}
    distributions = packages_distributions()
    for full, at_top in imports(MODULES[name]):
        top = full.partition('.')[0]
        assert top not in ('fastcore', 'nbdev', 'execnb')
        if at_top and top != 'twocet_nb' and top not in sys.stdlib_module_names:
            assert required & {dist.lower() for dist in distributions.get(top, [])}, f'{full} is no requirement'


@pytest.mark.parametrize('name', MODULES)
def test_names_come_from_somewhere(name):
    """A notebook has imports that its module lacks: what a module uses, it must define or import itself."""
    nodes = list(ast.walk(ast.parse(MODULES[name].read_text(encoding='utf-8'))))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    known = {*dir(builtins), '__file__', *(node.id for node in names if not isinstance(node.ctx, ast.Load)), *(node.arg for node in nodes if isinstance(node, ast.arg))}
    known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler)}
    known |= {(node.asname or node.name).partition('.')[0] for node in nodes if isinstance(node, ast.alias)}
    assert not {node.id for node in names} - known


def test_every_dependency_has_a_reason():
    contributing = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    keys = [key for key in SETTINGS if key == 'requirements' or key.endswith('_requirements')]
    names = [re.split('[<>=]', word)[0] for key in keys for word in SETTINGS[key].split()]
    assert not [name for name in names if f'| {name} |' not in contributing]
