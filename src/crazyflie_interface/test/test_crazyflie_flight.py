# SPDX-License-Identifier: GPL-3.0-or-later
import numpy as np
from crazyflie_bench import Bench


def test_a_flight_goes_through_every_phase_and_ends_disarmed():
    b = Bench().following()
    assert b.manager.phase == 'following' and b.sent[-1] is not None
    b.ask('disengage').step(1.2)
    b.ask('go_to', [0.5, 0.2, 0.8], 0.3).until('holding')
    assert b.manager.status(b.now)['go_to'] == 'active'
    b.step(4.0)
    assert b.manager.status(b.now)['go_to'] == 'done'
    assert np.linalg.norm(b.position - [0.5, 0.2, 0.8]) < 1e-3
    b.ask('land').until('disarmed')
    handover = ['go_to', 'notify_stop'] * 3  # sent three times, because one lost packet would be silence
    b.step(0.1)
    assert b.commands() == ['arm', 'takeoff', 'full_state', *handover, 'go_to', 'land', *['stop', 'arm'] * 3]
    assert b.log[-1][1:] == ('arm', (False,))
    assert b.position[2] < 0.05
