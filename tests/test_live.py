"""In a notebook with a kernel, a training run shows a progress bar and redraws one picture in place."""
import base64
import io
import os

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor
from PIL import Image

CODE = """
from twocet_nb.trainer import Trainer, preset
run = Trainer(preset('tiny', steps=4, sample_every=2), 'run').fit()
"""


def test_losses_and_samples_are_drawn_live(tmp_path, monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('PYTHONPATH', os.getcwd())
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    runner = ExecutePreprocessor(timeout=600, kernel_name='python3')
    shown = []
    on_output = runner.process_message

    def remember(message, cell, index):
        shown.append((message['msg_type'], message['content']))
        return on_output(message, cell, index)
    runner.process_message = remember
    runner.preprocess(notebook, {'metadata': {'path': str(tmp_path)}})

    pictures = [(kind, content['data']['image/png']) for kind, content in shown if 'image/png' in content.get('data', {})]
    assert [kind for kind, _ in pictures] == ['display_data', 'update_display_data']
    before, after = (Image.open(io.BytesIO(base64.b64decode(png))) for _, png in pictures)
    assert before.size == after.size and before.tobytes() != after.tobytes()
    text = str([content for kind, content in shown if kind in ('stream', 'display_data')])
    assert 'step/s' in text or 'FloatProgress' in text or 'HBox' in text, 'no progress bar'
    assert not [content for kind, content in shown if kind == 'error']
