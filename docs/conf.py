"""The look of the site that tools/docs.py builds from the notebooks."""
import latex2mathml.converter
from docutils import nodes

project = 'twocet_nb'
author = copyright = 'the twocet_nb authors'
extensions = ['myst_nb']
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3  # [text](#a-heading) links work as they do in JupyterLab and on GitHub
nb_execution_mode = 'off'  # the outputs saved in the notebooks are shown
nb_mime_priority_overrides = [('html', 'image/png', 0)]  # a still picture rather than a widget, which needs a kernel
suppress_warnings = ['myst.header']  # a notebook may skip a heading level
html_theme = 'furo'
html_title = 'twocet_nb'
html_static_path = ['site.css']
html_css_files = ['site.css']
html_math_renderer = 'mathml'


def write_formula(self, node, display):
    """Write a formula as MathML, which browsers draw by themselves: no script, no network."""
    self.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer('mathml', (lambda self, node: write_formula(self, node, 'inline'), None),
                               (lambda self, node: write_formula(self, node, 'block'), None))
