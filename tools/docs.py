"""Build the book as a web site in build/site, from the notebooks as saved; any warning is an error."""
import importlib
import inspect
import os
import posixpath
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from textwrap import indent

import nbformat
from plain import ROOT, plain_notebook, rewrite_links

SOURCE, SITE = ROOT/'build/docs', ROOT/'build/site'
REPOSITORY = '{git_url}/blob/{branch}/'


def on_site(link, name, repository):
    """A link in notebook `name` as the site needs it: what lies outside nbs/ is in the repository only."""
    place = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    return repository + place.removeprefix('../') if place.startswith('../') else link


def copy_notebooks():
    """Put plain copies of all notebooks into SOURCE; return their names without suffix, in reading order."""
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    repository = REPOSITORY.format(**settings['DEFAULT'])
    names = []
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        name = path.relative_to(ROOT/'nbs').with_suffix('').as_posix()
        if re.search(r'(^|/)[._]', name):  # checkpoints and the like
            continue
        notebook = plain_notebook(path)
        for cell in notebook.cells:
            if cell.cell_type == 'markdown':
                cell.source = rewrite_links(cell.source, lambda link: on_site(link, name, repository))
        names.append(name)
        (SOURCE/name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, SOURCE/f'{name}.ipynb')
    return names


def entry(name, thing):
    """Signature and docstring of one public function or class, with its public methods, as Markdown."""
    members = vars(thing).items() if inspect.isclass(thing) else ()
    methods = {f'.{key}': getattr(value, '__func__', value) for key, value in members if not key.startswith('_')}
    shown = {f"{'class ' if inspect.isclass(thing) else ''}{name}": thing,
             **{key: method for key, method in methods.items() if inspect.isfunction(method) and method.__doc__}}
    texts = [f"{key}{signature(value)}\n{indent(inspect.getdoc(value) or '', '    ')}" for key, value in shown.items()]
    return f'## {name}\n\n```text\n' + '\n\n'.join(texts) + '\n```'


def signature(thing):
    """The signature of a function or class; (...) where Python knows none."""
    try:
        return str(inspect.signature(thing))
    except (TypeError, ValueError):
        return '(...)'


def write_reference(notebooks):
    """One page with every public name, module by module."""
    sys.path.insert(0, str(ROOT))
    (SOURCE/'reference').mkdir()
    pages = []
    for notebook in notebooks:
        name = re.sub(r'(^|/)\d+[a-z]?_', r'\1', notebook)
        if (ROOT/f'twocet_nb/{name}.py').exists():
            module = importlib.import_module('twocet_nb.' + name.replace('/', '.'))
            public = {key: getattr(module, key) for key in module.__all__}
            entries = [entry(key, thing) for key, thing in public.items() if callable(thing)]
            pages.append('reference/' + name.replace('/', '-'))
            (SOURCE/f'{pages[-1]}.md').write_text('\n\n'.join([f'# {module.__name__}', *entries]), encoding='utf-8')
    return pages


def toctree(caption, pages):
    """A hidden list of pages: the sidebar of the site."""
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *pages, '```'])


def main():
    shutil.rmtree(SOURCE, ignore_errors=True)
    notebooks = copy_notebooks()
    index = nbformat.read(SOURCE/'index.ipynb', as_version=4)
    chapters = [name for name in notebooks if name != 'index']
    for sidebar in (toctree('The book', chapters), toctree('Reference', write_reference(notebooks))):
        index.cells.append(nbformat.v4.new_markdown_cell(sidebar))
    nbformat.write(index, SOURCE/'index.ipynb')
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    shutil.rmtree(SITE, ignore_errors=True)
    sphinx = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-c', ROOT/'docs',
                             '-d', ROOT/'build/doctrees', SOURCE, SITE], env=env)
    if sphinx.returncode:
        sys.exit('The site has warnings, above: mend the notebooks they name.')
    print(f'open {(SITE/"index.html").relative_to(ROOT)}')


if __name__ == '__main__':
    main()
