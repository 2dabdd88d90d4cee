"""sim.launch.py under the real `ros2 launch`: one trial, with launch_testing. Its twin that runs without ROS's launch
is test_one_trial_through_the_real_graph_reaches_the_goal_and_lands (test_fly.py)."""

import unittest

import pytest

pytest.importorskip('launch_testing', reason='launch_testing is not installed (it comes with ROS 2)')
import flying  # noqa: E402
import launch_testing  # noqa: E402
import launch_testing.markers  # noqa: E402
from launch_description import launched  # noqa: E402

NODES = ('sim', 'mocap_bridge', 'obstacles', 'policy', 'crazyflie_interface', 'recorder', 'visual', 'trial')


@pytest.mark.launch_test
@launch_testing.markers.keep_alive
def generate_test_description():
    return launched('sim', domain=96, trial='true', visual='true', seed='3', max_steps=str(flying.STEPS),
                    **flying.sim_ports())


class TestFlight(unittest.TestCase):

    def test_the_trial_flies_to_its_end(self, proc_info, proc_output):
        proc_output.assertWaitFor('engage: following', timeout=120)
        proc_info.assertWaitForShutdown(process='trial_node', timeout=120)


@launch_testing.post_shutdown_test()
class TestAfterwards(unittest.TestCase):

    def test_every_node_ran_and_ended_with_status_0(self, proc_info):
        launch_testing.asserts.assertExitCodes(proc_info)
        started = {name.rsplit('-', 1)[0] for name in proc_info.process_names()}
        self.assertEqual(started, {f'{node}_node' if node != 'obstacles' else 'obstacle_node' for node in NODES})

    def test_the_bag_holds_a_whole_trial(self, bag):
        flying.assert_a_trial_was_flown(bag, steps=flying.STEPS)
