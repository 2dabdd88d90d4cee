import os
import subprocess
import sys
import textwrap

import pytest

NODE = textwrap.dedent('''
    import gc, os, sys, threading
    from rclpy.node import Node
    from deqmpc_ros.node import run

    def refuse(*_):
        raise PermissionError(1, 'Operation not permitted')

    if '--refuse' in sys.argv:
        os.sched_setscheduler = refuse

    if '--ended' in sys.argv:  # a thread that ends between the listing and the scheduling
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        everything = os.listdir
        os.listdir = lambda path: [str(thread.native_id), *everything(path)]

    class Probe(Node):
        priority = 7

        def __init__(self):
            super().__init__('probe')
            self.timer = self.create_timer(0.05, self._tick)

        def _tick(self):
            self.finished = True
            threads = [int(t) for t in os.listdir('/proc/self/task')]
            print('scheduled', {(os.sched_getscheduler(t) & ~os.SCHED_RESET_ON_FORK,
                                 os.sched_getparam(t).sched_priority)
                                for t in threads if os.path.exists(f'/proc/self/task/{t}')})
            print('frozen', gc.get_freeze_count() > 10_000)

    sys.exit(run(Probe))
''')


def start(tmp_path, *words):
    script = tmp_path / 'probe.py'
    script.write_text(NODE)
    return subprocess.run([sys.executable, str(script), *words], env={**os.environ, 'ROS_DOMAIN_ID': '41'},
                          capture_output=True, text=True, timeout=60)


def real_time_is_permitted():
    code = 'import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(7))'
    return subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


def test_where_real_time_priority_is_not_permitted_a_node_says_so_once_and_runs(tmp_path):
    done = start(tmp_path, '--refuse')
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count('real-time priority 7 is not permitted') == 1
    assert f'scheduled {{({os.SCHED_OTHER}, 0)}}' in done.stdout


@pytest.mark.skipif(not real_time_is_permitted(), reason='real-time priority is not permitted here')
def test_every_thread_of_a_node_has_the_priority_that_it_asks_for(tmp_path):
    done = start(tmp_path)
    assert f'scheduled {{({os.SCHED_FIFO}, 7)}}' in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not real_time_is_permitted(), reason='real-time priority is not permitted here')
def test_a_thread_that_ends_while_threads_are_scheduled_ends_nothing_else(tmp_path):
    done = start(tmp_path, '--ended')
    assert done.returncode == 0, done.stderr
    assert f'scheduled {{({os.SCHED_FIFO}, 7)}}' in done.stdout, done.stdout


def test_what_start_up_leaves_is_kept_from_the_garbage_collector(tmp_path):
    assert 'frozen True' in start(tmp_path).stdout
