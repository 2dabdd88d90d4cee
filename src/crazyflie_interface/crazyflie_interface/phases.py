# SPDX-License-Identifier: GPL-3.0-or-later
"""Flight phases as one state machine. The table below is the whole of it.

    disarmed --arm--> armed --takeoff--> taking_off --arrived--> holding --engage--> following
                                                                 holding <--disengage-- following
    taking_off, holding, following --land--> landing --landed--> disarmed
    armed, emergency --disarm--> disarmed
    any phase --cut--> emergency

What the guard's answers (guard.ANSWERS) do to a phase stands in the second table; an answer that is not there
changes nothing, because the phase already is that, or asks for more.
"""

from __future__ import annotations

from deqmpc.interface import PHASES

FLYING = ('taking_off', 'holding', 'following', 'landing')  # motors carry the drone

# event -> (phases it is allowed from, phase it leads to)
TRANSITIONS: dict[str, tuple[tuple[str, ...], str]] = {
    'arm': (('disarmed',), 'armed'),
    'disarm': (('armed', 'emergency'), 'disarmed'),
    'takeoff': (('armed',), 'taking_off'),
    'arrived': (('taking_off',), 'holding'),
    'go_to': (('holding',), 'holding'),
    'engage': (('holding',), 'following'),
    'disengage': (('following',), 'holding'),
    'land': (('taking_off', 'holding', 'following'), 'landing'),
    'landed': (('landing',), 'disarmed'),
    'cut': (PHASES, 'emergency'),
}

# phase -> the guard's answer -> the event it brings about
ON_ANSWER: dict[str, dict[str, str]] = {
    'disarmed': {},
    'armed': {'cut': 'disarm'},  # on the ground disarming is enough, and locks nothing
    'taking_off': {'land': 'land', 'cut': 'cut'},
    'holding': {'land': 'land', 'cut': 'cut'},
    'following': {'hold': 'disengage', 'land': 'land', 'cut': 'cut'},
    'landing': {'cut': 'cut'},
    'emergency': {},
}


def refusal(phase: str, event: str) -> str:
    """Why `event` is not allowed in `phase`; empty when it is. KeyError on an unknown event."""
    allowed, _ = TRANSITIONS[event]
    if phase in allowed:
        return ''
    return f'{event} is refused in phase {phase}; it is allowed in {", ".join(allowed)}'


def after(phase: str, event: str) -> str:
    """The phase that `event` leads to. ValueError where it is not allowed in `phase`."""
    reason = refusal(phase, event)
    if reason:
        raise ValueError(reason)
    return TRANSITIONS[event][1]
