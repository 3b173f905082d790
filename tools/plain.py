"""A notebook as a reader sees it: nbdev's `#|` lines removed, hidden cells left out."""
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r'^#\s*\|\s*(\S+).*\n?', re.MULTILINE)


def plain_notebook(path):
    """Read `path`; drop `#| hide` cells, the code of `#| hide_input` cells, and every directive line."""
    notebook = nbformat.read(path, as_version=4)
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            directives = DIRECTIVE.findall(cell.source)
            if 'hide' in directives:
                continue
            cell.source = '' if 'hide_input' in directives else DIRECTIVE.sub('', cell.source).strip('\n')
        if cell.source or cell.get('outputs'):
            cells.append(cell)
    notebook.cells = cells
    notebook.metadata['language_info'] = {'name': 'python'}  # nbdev_clean drops it; highlighting needs it
    return notebook


def rewrite_links(markdown, change):
    """Apply `change` to the address of every relative link and picture in `markdown`."""
    return re.sub(r'(\]\(|\b(?:src|href)=")(?![a-z]+:|#|/)([^)\s"]+)', lambda m: m[1] + change(m[2]), markdown)
