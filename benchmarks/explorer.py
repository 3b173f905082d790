"""How long does a slider's movement take to become a picture in the page? Measured in JupyterLab and Chromium, as a user has it.

    python benchmarks/explorer.py [--model faces-128] [--presses 60] [--out benchmarks/explorer.json]

Every press of a key moves the strength slider; the time runs until the frame after the canvas was drawn. A drag then moves it sixty times
a second for two seconds: how many pictures appear, and how long after the last movement comes the last of them? Milliseconds of one
machine on one day; the goal is a 95th percentile of at most 80 for a press.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]
from browser import chromium, lab, run_all, write_notebook

from twocet_nb.demo import commit
from twocet_nb.runs import SHIPPED
from twocet_nb.transfer import TwoCET

RESULT = '[...document.querySelectorAll(".twocet-picture canvas")].find(canvas => canvas.getAttribute("aria-label") == "Result")'
PRESS = f'''async steps => {{
    const canvas = {RESULT}, knob = document.querySelector('input[type=range]'), serial = canvas.dataset.serial, begun = performance.now();
    knob.stepUp(steps), knob.dispatchEvent(new Event('input'));     // as an arrow key does
    while (canvas.dataset.serial == serial && performance.now() - begun < 5000) await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    return [performance.now() - begun, canvas.dataset.drawn - begun];
}}'''
WATCH = f'''() => {{ const canvas = {RESULT}; window.drawn = [];
    new MutationObserver(() => window.drawn.push(performance.now())).observe(canvas, {{ attributes: true, attributeFilter: ['data-serial'] }}); }}'''


def presses(page, count):
    """Milliseconds from each press to the frame with its picture; the first ten warm up."""
    times = []
    for k in range(count + 10):
        times.append(page.evaluate(PRESS, -1 if k % 2 else 1)[0])
        page.wait_for_timeout(60)
    return times[10:]


def drag(page, seconds=2):
    """(pictures a second, milliseconds from the last movement to the last picture) while the slider is dragged up and down."""
    box = page.get_by_role('slider').first.bounding_box()
    x, y = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
    page.evaluate(WATCH)
    page.mouse.move(x, y)
    page.mouse.down()
    begun = page.evaluate('performance.now()')
    moves = int(seconds * 60)
    for k in range(moves):
        page.mouse.move(x - 80 * abs((k % 40) / 20 - 1), y)
        page.wait_for_timeout(1000 / 60)
    last = page.evaluate('performance.now()')
    page.mouse.up()
    page.wait_for_timeout(1500)
    drawn = page.evaluate('window.drawn')
    during = [time for time in drawn if time <= last]
    return len(during) / (last - begun) * 1000, max(drawn) - last


def measure(model, count):
    """The numbers of one explorer in one page."""
    with tempfile.TemporaryDirectory() as folder:
        write_notebook(Path(folder)/'explorer.ipynb', f'from twocet_nb.explorer import Explorer\nExplorer({model!r})')
        with lab(Path(folder)) as address, chromium(1300, 1200) as page:
            run_all(page, f'{address}/doc/tree/explorer.ipynb')
            page.wait_for_function(f'() => +({RESULT})?.dataset.serial > 0', timeout=120_000)
            page.wait_for_timeout(3000)
            times = presses(page, count)
            pictures, lag = drag(page)
    cut = statistics.quantiles(times, n=20, method='inclusive')
    return dict(median=round(cut[9]), p95=round(cut[18]), pictures_a_second=round(pictures, 1), lag_after_a_drag=round(lag))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--models', nargs='+', default=list(SHIPPED), help='what TwoCET.load opens (default: all shipped weights)')
    parser.add_argument('--presses', type=int, default=60)
    parser.add_argument('--out', type=Path, default=ROOT/'benchmarks'/'explorer.json')
    args = parser.parse_args()
    found = dict(command='python benchmarks/explorer.py ' + ' '.join(sys.argv[1:]), commit=commit(), presses=args.presses, unit='ms', goal_p95=80)
    found['models'] = {Path(model).name: dict(size=TwoCET.load(model).config.image_size) | measure(model, args.presses) for model in args.models}
    args.out.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    main()
