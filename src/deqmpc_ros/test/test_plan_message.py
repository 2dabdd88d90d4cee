import numpy as np
import pytest
from rclpy.serialization import deserialize_message, serialize_message

from deqmpc import interface
from deqmpc.types import Plan
from deqmpc_ros.messages import TYPES, message_class


def plan(seed, count, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return Plan(1.7e9 + seed, 0.1 * np.arange(count), *(rng.normal(size=(count, k)).astype(dtype)
                                                        for k in (3, 4, 3, 3, 3)))


def sent(message):
    """`message` as a subscriber gets it."""
    return deserialize_message(serialize_message(message), message_class(interface.PLAN.type))


@pytest.mark.parametrize('count', [6, 1, 21])
def test_a_plan_message_filled_again_holds_the_new_plan_and_nothing_of_the_old_one(count):
    message = interface.PlanMessage(TYPES, 'cf1')
    message.filled(plan(0, 6))
    again, fresh = sent(message.filled(plan(1, count))), sent(interface.plan_message(TYPES, plan(1, count), 'cf1'))
    assert again == fresh
    for name, value in vars(interface.read_plan(again)).items():
        np.testing.assert_allclose(value, getattr(plan(1, count), name), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize('dtype', [np.float32, np.int64])
def test_a_plan_of_another_number_type_arrives_as_the_same_numbers(dtype):
    given = plan(2, 6, dtype)
    read = interface.read_plan(sent(interface.plan_message(TYPES, given, 'cf1')))
    for name in ('position', 'quaternion', 'velocity', 'rates', 'acceleration'):
        np.testing.assert_array_equal(getattr(read, name), getattr(given, name))
