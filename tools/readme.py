"""Write README.md and its pictures from nbs/index.ipynb; with --check, only say whether they are in step."""
import base64
import posixpath
import sys

from plain import ROOT, plain_notebook, rewrite_links

NOTE = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook, then `make prepare`. -->'


def from_root(link):
    """A link written in nbs/ as it reads from the top of the repository."""
    return posixpath.normpath(posixpath.join('nbs', link))


def render_output(output, name, pictures):
    """Markdown of one output; a picture is added to `pictures` under index_files/`name`.png."""
    if output.output_type == 'stream':
        return f'```text\n{output.text.rstrip()}\n```'
    data = output.get('data', {})
    if 'image/png' in data:
        path = f'index_files/{name}.png'
        pictures[path] = base64.b64decode(data['image/png'])
        return f'![]({path})'
    if 'text/markdown' in data:
        return data['text/markdown']
    return f"```text\n{data['text/plain'].rstrip()}\n```"


def render():
    """All files of the README: {path from the root: bytes}."""
    parts, pictures = [NOTE], {}
    for i, cell in enumerate(plain_notebook(ROOT/'nbs/index.ipynb').cells):
        if cell.cell_type == 'markdown':
            parts.append(rewrite_links(cell.source, from_root))
        elif cell.source:
            parts.append(f'```python\n{cell.source}\n```')
        parts += [render_output(out, f'{i}-{j}', pictures) for j, out in enumerate(cell.get('outputs', []))]
    return {'README.md': ('\n\n'.join(parts) + '\n').encode(), **pictures}


def main():
    wanted = render()
    stale = [path for path in (ROOT/'index_files').glob('*') if f'index_files/{path.name}' not in wanted]
    if '--check' in sys.argv[1:]:
        wrong = [name for name, content in wanted.items()
                 if not (ROOT/name).exists() or (ROOT/name).read_bytes() != content] + [path.name for path in stale]
        if wrong:
            sys.exit(f"README out of step with nbs/index.ipynb: {', '.join(wrong)}. Run: make prepare")
        return print('README in step')
    for path in stale:
        path.unlink()
    for name, content in wanted.items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(content)


if __name__ == '__main__':
    main()
