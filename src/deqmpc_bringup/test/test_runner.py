import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from deqmpc_bringup.composition import CompositionError, Row
from deqmpc_bringup.runner import Runner

# A process that writes its pid, says a line, and on SIGINT takes `landing` seconds to stop with `status`.
CHILD = textwrap.dedent('''\
    #!{python}
    import os, pathlib, signal, sys, time
    name = sys.argv[sys.argv.index('-r') + 1].split(':=')[1]
    here = pathlib.Path(__file__).parent
    stop = []
    if name != 'deaf':
        for n in (signal.SIGINT, signal.SIGTERM):
            signal.signal(n, lambda n, f: stop.append(n))
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (here / (name + '.pid')).write_text(str(os.getpid()))
    print('hello from', name, flush=True)
    end = time.time() + (0.5 if name in ('short', 'failing') else 60)
    while not stop and time.time() < end:
        time.sleep(0.02)
    if name == 'landing':
        time.sleep(0.5)
        (here / 'landed').write_text('yes')
    sys.exit(3 if name == 'failing' else 0)
''')


@pytest.fixture
def prefix(tmp_path, monkeypatch):
    folder = tmp_path / 'ament' / 'lib' / 'pkg'
    folder.mkdir(parents=True)
    exe = folder / 'child'
    exe.write_text(CHILD.format(python=sys.executable))
    exe.chmod(exe.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path / 'ament'))
    return folder


def row(name, ends=False):
    return Row(name, '/cf1', 'pkg', 'child', (), ends)


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, 'condition did not become true'
        time.sleep(0.02)


def test_the_end_of_an_ending_row_ends_all_with_its_status(prefix, tmp_path):
    lines = []
    runner = Runner([row('quiet'), row('short', ends=True)], tmp_path / 'log', dict(os.environ),
                    write=lines.append)
    assert runner.run() == 0
    assert not alive(int((prefix / 'quiet.pid').read_text()))
    assert '[quiet] hello from quiet' in lines
    assert (tmp_path / 'log' / 'short.log').read_text() == 'hello from short\n'


def test_a_failing_row_ends_the_flight_with_its_status(prefix, tmp_path):
    lines = []
    runner = Runner([row('quiet'), row('failing')], tmp_path / 'log', dict(os.environ), write=lines.append)
    assert runner.run() == 3
    assert any('[failing] exited with status 3' in line for line in lines)


def test_an_optional_row_that_fails_is_named_and_the_flight_goes_on(prefix, tmp_path):
    lines = []

    def write(line):
        lines.append(line)
        if 'exited' in line:
            runner.stop()
    optional = Row('failing', '/cf1', 'pkg', 'child', (), False, optional=True)
    runner = Runner([row('quiet'), optional], tmp_path / 'log', dict(os.environ), write=write)
    assert runner.run(time_limit=60.0) == 0
    assert '[failing] exited with status 3; the flight goes on without it' in lines


def test_a_process_that_ignores_signals_is_killed_and_named(prefix, tmp_path):
    lines = []
    runner = Runner([row('deaf'), row('short', ends=True)], tmp_path / 'log', dict(os.environ), patience=0.3,
                    write=lines.append)
    assert runner.run() == 137
    assert not alive(int((prefix / 'deaf.pid').read_text()))
    assert any('SIGKILL' in line for line in lines)


def test_a_missing_executable_is_reported_before_anything_starts(prefix, tmp_path):
    runner = Runner([row('quiet'), Row('x', '/cf1', 'pkg', 'not_there', (), False)], tmp_path / 'log',
                    dict(os.environ))
    with pytest.raises(CompositionError, match='pkg/not_there is not installed'):
        runner.run()
    assert not (prefix / 'quiet.pid').exists()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_the_runner_by_any_signal_lets_the_drone_land_and_leaves_no_process(prefix, tmp_path,
                                                                                     number):
    code = textwrap.dedent('''
        import os, pathlib, signal, sys
        from deqmpc_bringup.composition import Row
        from deqmpc_bringup.runner import Runner
        runner = Runner([Row(n, '/cf1', 'pkg', 'child', (), False) for n in ('quiet', 'landing')],
                        pathlib.Path(sys.argv[1]), dict(os.environ))
        signal.signal(signal.SIGINT, runner.stop)
        signal.signal(signal.SIGTERM, runner.stop)
        sys.exit(runner.run())
    ''')
    parent = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'log')], stdout=subprocess.PIPE)
    pids = [prefix / 'quiet.pid', prefix / 'landing.pid']
    wait_for(lambda: all(p.exists() and p.read_text() for p in pids))
    parent.send_signal(number)
    parent.stdout.close()
    assert parent.wait(timeout=20) == (-9 if number == signal.SIGKILL else 0)
    wait_for(lambda: not any(alive(int(p.read_text())) for p in pids))
    assert (prefix / 'landed').read_text() == 'yes'


def test_a_flight_with_several_ends_goes_on_until_the_last_and_ends_with_the_first_that_fails(prefix, tmp_path):
    lines = []
    rows = [row('short', ends=True), row('landing', ends=True)]
    assert Runner(rows, tmp_path / 'log', dict(os.environ), write=lines.append).run(3.0) == 124  # one still runs
    assert any('[short] finished with exit status 0' in line for line in lines)
    rows = [row('failing', ends=True), row('landing', ends=True)]
    assert Runner(rows, tmp_path / 'log', dict(os.environ), write=lines.append).run(30.0) == 3
