"""Trials of all drones of a fleet in one process and simulated time, in lockstep.

Each drone is an InProcessTrial with its own policy, flight manager, conductor and bag. What passes between them is
what passes in the graph: every policy hears the odometry of the others. The cameras' noise and losses are drawn for
each drone by itself, and the drones do not feel each other's air: two that touch fly on, so `distance` is what counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from deqmpc_bringup.composition import Row
from deqmpc_bringup.in_process import LIMIT, InProcessTrial
from flight_log.protocol import Done

AIRBORNE = 0.1  # m: lower than this a drone stands or is about to


class InProcessFleet:
    """The trials from the rows of mode `sim` with a fleet file and trial:=true.

    Attributes to read: `trials` (name -> InProcessTrial), `distance` (m, least between two centres of which at least
    one was in the air), `approach` ((x, y, z) m from one to the other when they were nearest).
    """

    def __init__(self, rows: Sequence[Row]):
        names = list(dict.fromkeys(row.namespace for row in rows if row.name == 'trial'))
        shared = [row for row in rows if row.name in ('sim', 'obstacles')]
        self.trials = {name.strip('/'): InProcessTrial(
            [*(row for row in rows if row.namespace == name and row not in shared), *shared]) for name in names}
        self.distance = np.inf
        self.approach = np.full(3, np.nan)

    def run(self, say: Callable[[str], None] = lambda line: None) -> Done:
        """Fly until every trial is done; all bags are closed whatever happens. RuntimeError when one does not end.

        Returns the trials as one: success of all, their reasons, the fewest steps, the largest distance to a goal."""
        for name, trial in self.trials.items():
            trial.begin(lambda line, name=name: say(f'{name}: {line}'))
        try:
            while any(trial.conductor.done is None for trial in self.trials.values()):
                self._advance()
        finally:
            for trial in self.trials.values():
                trial.close()
        done = {name: trial.conductor.done for name, trial in self.trials.items()}
        return Done(all(d.success for d in done.values()),
                    '; '.join(f'{name}: {d.reason}' for name, d in done.items() if d.reason),
                    min(d.steps for d in done.values()), None, max(d.distance for d in done.values()))

    def _advance(self) -> None:
        """One millisecond of each."""
        heard = {name: trial.state for name, trial in self.trials.items()}
        for trial in self.trials.values():
            trial.advance()
            if trial.crazyflie.time > LIMIT:
                raise RuntimeError(f'trial of {trial.robot} in stage {trial.conductor.stage} after {LIMIT:g} s')
        for name, trial in self.trials.items():
            if trial.state is not heard[name]:
                for other in self.trials.values():
                    if other is not trial:
                        other.on_neighbour(name, trial.state)
        self._measure()

    def _measure(self) -> None:
        places = [trial.crazyflie.truth().position for trial in self.trials.values()]
        for a, b in itertools.combinations(places, 2):
            apart = float(np.linalg.norm(b - a))
            if apart < self.distance and max(a[2], b[2]) > AIRBORNE:
                self.distance, self.approach = apart, b - a
