"""The web page: what stands in it, and what a real browser draws."""

import json
import re
import shutil
import subprocess

import matplotlib.pyplot as plt
import numpy as np
import pytest
from flight_log_synthetic import SyntheticTrial, static_field, write_trial

from flight_log import page, report
from flight_log.evaluation import evaluate
from flight_log.flight import load_flight
from flight_log.scene import scene

BROWSER = next((b for b in ('chromium', 'chromium-browser', 'google-chrome') if shutil.which(b)), None)
FIELD = static_field([[1.0, -1.0, 1.0], [-1.0, 0.0, 1.0], [0.9, 0.9, 1.2]])


@pytest.fixture(scope='module')
def flights(tmp_path_factory):
    folder = tmp_path_factory.mktemp('flights')
    made = []
    for name, trial in (('good', SyntheticTrial(seconds=4.0, lead=0.5, obstacles=FIELD, metadata={'max_steps': '40'})),
                        ('bad', SyntheticTrial(seconds=4.0, lead=0.5, obstacles=static_field([[0.5, 0.25, 1.1]]),
                                               after=('landing', 'land', 'no mocap pose for 0.50 s'),
                                               metadata={'max_steps': '40', 'policy': '</script><b>x'}))):
        flight = load_flight(write_trial(folder / name, trial))
        made.append((flight, evaluate(flight)))
    return made


@pytest.fixture(scope='module')
def text(flights):
    return page.page([e for _, e in flights], {e.bag: scene(f, e) for f, e in flights})


def test_the_page_needs_nothing_from_elsewhere_and_markup_in_a_bag_stays_text(text):
    assert not re.findall(r'(?:src|href)="(?!data:)', re.sub(r'<script>.*?</script>', '', text, flags=re.S))
    assert '<b>x' not in text and '{{' not in text.split('<script>')[0]
    numbers = re.search(r'id="flights">(.*?)</script>', text, re.S)[1]
    assert json.loads(numbers)[1]['metadata']['policy'] == '</script><b>x'


def test_the_scene_has_the_numbers_of_the_flight(flights):
    flight, e = flights[0]
    s = scene(flight, e)
    t, position = np.array(s['t']), np.array(s['position']).T
    start = flight.status[next(i for i, x in enumerate(flight.status) if x.phase == 'following')].t
    i = np.searchsorted(flight.odom.t - start, t + 1e-3) - 1
    np.testing.assert_allclose(position, flight.odom.position[i], atol=1e-4)
    assert len(s['spheres']['centers']) == 1 and len(s['spheres']['radius']) == 3
    assert np.min(np.array(s['clearance'])[t >= 0]) == pytest.approx(e.min_clearance, abs=1e-3)
    assert [p[0] for p in s['phases']][-2:] == ['following', 'landing'] and s['end'] == pytest.approx(4.0, abs=0.11)
    assert len(s['plans']['t']) == len(s['plans']['path']) and np.shape(s['plans']['path'])[1] == 3
    assert scene(*flights[1])['events'][0][1:] == ['land', 'no mocap pose for 0.50 s']


def test_a_long_recording_stays_small(tmp_path):
    flight = load_flight(write_trial(tmp_path / 'long', SyntheticTrial(seconds=60.0, obstacles=FIELD, moving=True)))
    s = scene(flight, evaluate(flight))
    assert len(s['t']) <= 1500 and len(s['plans']['t']) <= 400 and len(s['spheres']['centers']) <= 1
    assert len(json.dumps(s)) < 1_000_000


def test_an_animation_is_written_and_another_kind_refused(flights, tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'FRAMES', 3)
    path = report.animate(*flights[0], tmp_path / 'a.gif')
    assert path.read_bytes().startswith(b'GIF89a')
    with pytest.raises(ValueError, match='expected a name that ends in .gif or .mp4'):
        report.animate(*flights[0], tmp_path / 'a.avi')


def shot(html, folder):
    """What the browser says on its console, and the picture (H, W, 3) in 0..1."""
    (folder / 'report.html').write_text(html)
    done = subprocess.run(
        [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync', '--use-angle=swiftshader',
         '--enable-unsafe-swiftshader', f'--user-data-dir={folder / "profile"}', '--enable-logging=stderr',
         '--window-size=1400,1100', '--virtual-time-budget=4000', f'--screenshot={folder / "shot.png"}',
         (folder / 'report.html').as_uri()], capture_output=True, text=True, timeout=180)
    said = re.findall(r':CONSOLE[:(]\d+\)?\] "(.*?)", source', done.stderr, re.S)
    return said, plt.imread(folder / 'shot.png')[:, :, :3]


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine (Debian: apt install chromium)')
def test_a_browser_draws_the_scene_and_the_curves_without_an_error(text, tmp_path):
    said, picture = shot(text, tmp_path)
    assert not [line for line in said if re.search(r'error|uncaught|failed', line, re.I)], said
    assert [line for line in said if line.startswith('flight report: 2 flights, 8 traces in the scene, 9 curves')], said
    left = picture[:, :picture.shape[1] // 2]
    def pixels(colour, where):
        return int((np.abs(where - np.array(colour)).max(axis=2) < 0.12).sum())
    assert pixels((0.09, 0.64, 0.29), left) > 20  # the goal, which only WebGL draws
    assert pixels((0.66, 0.71, 0.78), left) > 500  # spheres
    right = picture[:, picture.shape[1] // 2:]
    assert pixels((0.11, 0.31, 0.85), right) > 100  # a curve in blue


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine (Debian: apt install chromium)')
def test_the_browser_test_would_see_a_broken_script(text, tmp_path):
    said, _ = shot(text.replace('drawScene(f); drawSeries(f);', 'drawNothing(f);'), tmp_path)
    assert [line for line in said if re.search(r'error|uncaught', line, re.I)]
