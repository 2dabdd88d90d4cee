"""The tasks by name."""

from deqmpc.tasks.base import Spheres, Task
from deqmpc.tasks.cartpole import Cartpole
from deqmpc.tasks.crazyflie import CrazyflieDynObs, CrazyflieObs, CrazyflieWall
from deqmpc.tasks.pendulum import Pendulum
from deqmpc.tasks.quadrotor import Quadrotor
from deqmpc.tasks.quadrotor_pole import QPole, QPoleDynObs, QPoleObs

TASKS: dict[str, type[Task]] = {cls.name: cls for cls in (
    Pendulum, Cartpole, Quadrotor, QPole, QPoleObs, QPoleDynObs, CrazyflieObs, CrazyflieDynObs, CrazyflieWall)}

__all__ = ['TASKS', 'Spheres', 'Task', 'make']


def make(name: str, **changes) -> Task:
    """The task `name` with some of its numbers changed. ValueError for an unknown name or number."""
    if name not in TASKS:
        raise ValueError(f'unknown task {name!r}; expected one of {", ".join(TASKS)}')
    try:
        return TASKS[name](**changes)
    except TypeError as error:
        raise ValueError(f'task {name}: {error}') from error
