"""replay.launch.py under the real `ros2 launch`, with launch_testing. Its twin that runs without ROS's launch is
test_a_replayed_bag_gives_plans_and_is_recorded_again (test_fly.py)."""

import tempfile
import unittest
from pathlib import Path

import pytest

pytest.importorskip('launch_testing', reason='launch_testing is not installed (it comes with ROS 2)')
import flying  # noqa: E402
import launch_testing  # noqa: E402
import launch_testing.markers  # noqa: E402
from launch_description import launched  # noqa: E402


@pytest.mark.launch_test
@launch_testing.markers.keep_alive
def generate_test_description():
    source = flying.write_hover(Path(tempfile.mkdtemp(prefix='deqmpc_')) / 'source', seconds=3.0)
    description, context = launched('replay', domain=97, bag=str(source))
    return description, {**context, 'source': source}


class TestReplay(unittest.TestCase):

    def test_the_bag_is_played_to_its_end(self, proc_info):
        proc_info.assertWaitForShutdown(process='replay_node', timeout=60)


@launch_testing.post_shutdown_test()
class TestAfterwards(unittest.TestCase):

    def test_every_node_ended_with_status_0(self, proc_info):
        launch_testing.asserts.assertExitCodes(proc_info)

    def test_the_policy_planned_from_the_bag(self, source, bag):
        flying.assert_a_bag_was_replayed(source, bag)
