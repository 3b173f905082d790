"""What the notebook 04d_memory cannot test: memory as the system sees it."""
import os
import subprocess
import sys

import pytest

from twocet_nb.memory import Speedometer

# Where malloc maps every larger block by itself, freed memory leaves the process at once: the peak is what was alive.
# Only anonymous memory counts: code comes and goes with the system's cache. The peak is watched from a thread.
MEASURE = '''
import re, sys, threading, time
from pathlib import Path
from twocet_nb.config import TrainConfig, preset
from twocet_nb.memory import memory_needed
from twocet_nb.networks import NetworkConfig
from twocet_nb.trainer import Trainer

def anonymous(): return int(re.search(r'RssAnon:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024

seen, done = [], threading.Event()
def watch():
    while not done.wait(.002): seen.append(anonymous())

data, folder, name = sys.argv[1:]
few = dict(data=data, memory='workers', device='cpu')
config = dict(course=preset('course', **few), wide=TrainConfig(network=NetworkConfig(32, 64, 128, 32), **few))[name]
Trainer(preset('tiny', precision=config.precision, **few), folder + '/warm', quiet=True).train_step()    # what torch keeps for itself
before = anonymous()
run = Trainer(config, folder + '/run', quiet=True)
run.step = 300    # every loss of the course counts here
threading.Thread(target=watch, daemon=True).start()
run.train_step()
done.set()
print(sum(memory_needed(run.networks, config).parts().values()) / (max(seen) - before))
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='the peak is read as Linux counts it')
@pytest.mark.parametrize('name', ['course', 'wide'])
def test_the_estimate_is_what_the_system_sees(tmp_path, few_faces, name):
    done = subprocess.run([sys.executable, '-c', MEASURE, few_faces, tmp_path, name], capture_output=True, text=True,
                          env=os.environ | dict(MALLOC_MMAP_THRESHOLD_='65536', OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    assert .8 < float(done.stdout) < 1.1, 'the reserve covers the rest'


def test_a_speedometer_with_slow_steps_looks_at_the_last_one():
    now = 0
    meter = Speedometer(6, window=10, clock=lambda: now)
    for now in (100, 130, 150):
        meter.tick()
    assert meter.images_per_second() == 6 / 20 and meter.time_left(3) == 60
    meter.tick()
    assert meter.postfix()['images/s'], 'two ticks at one moment divide by nothing'
