"""`deqmpc fuzz`: mutated packets and settings files against everything in the stack that reads them.

    natnet_client   a server's datagrams, NatNet 3.0 to 4.1 -> Session of mocap_bridge (both parsers), then Bridge
    natnet_server   a client's requests                     -> the simulated OptiTrack
    crtp_peer       a PC's packets                          -> the simulated Crazyflie, whose physics runs on
    cflib_radio     a drone's packets                       -> CflibRadio connected over cflib's UDP link
    config          ROS parameter, fleet, policy, airframe and obstacle files, model folders -> their readers

Each case is a true packet or file, changed by a few random edits. A packet's reader takes it or counts it; a file's
reader takes it or raises the one error it documents. Anything else is a crash. The readers must work afterwards: a
true packet still gets through. Equal seeds give equal cases.

Bounds: CPU time of one case, and growth of the process's peak memory over all cases of a target.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import resource
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

TIME_LIMIT = 2.0  # s of CPU for one case
MEMORY_LIMIT = 64.0  # MB by which the peak may grow over a target's cases
SHOWN = 5  # crashes that are kept with their input
WARM_UP = 20  # cases before memory is measured: what is imported and cached once is no leak

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-45, 33.0, 1e5)


@dataclass
class Outcome:
    """What happened to one target."""

    target: str
    cases: int = 0
    taken: int = 0  # read, or ignored as the reader documents
    refused: int = 0  # counted as malformed, or ended in the documented error
    crashes: int = 0
    slowest_s: float = 0.0  # CPU
    memory_mb: float = 0.0  # growth of the peak
    shown: list[str] = field(default_factory=list)  # the first crashes: input and error
    faults: list[str] = field(default_factory=list)  # bounds that were passed, readers that died

    @property
    def passed(self) -> bool:
        """No crash, no bound passed."""
        return not self.crashes and not self.faults


# --- mutation -------------------------------------------------------------------------------------

def mutate(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """`data` after one to four random edits; `others` are true packets of the same kind to splice with."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        edit, at = rng.randrange(8), rng.randrange(len(out) + 1)
        if edit == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif edit == 1 and out:
            out[at % len(out)] = rng.randrange(256)
        elif edit == 2:
            layout = rng.choice(('<B', '<H', '<I'))
            value = rng.choice(NUMBERS) & (1 << 8 * struct.calcsize(layout)) - 1
            out[at:at + struct.calcsize(layout)] = struct.pack(layout, value)
        elif edit == 3:
            out[at:at + 4] = struct.pack('<f', rng.choice(FLOATS))
        elif edit == 4:
            del out[at:]
        elif edit == 5:
            out[at:at] = rng.randbytes(rng.randint(1, 64))
        elif edit == 6:
            del out[at:at + rng.randint(1, 16)]
        else:
            other = rng.choice(others)
            out[at:] = other[rng.randrange(len(other) + 1):]
    return bytes(out)


VALUES = (None, True, False, 0, -1, 1, 10**400, 0.5, -1e9, 1e308, math.nan, math.inf, '', 'x' * 5000, 'ü\u2028',
          '../..', '/dev/null', [], {}, [None], [1.0, 'a'], {'a': {'b': []}}, [[[[1]]]], {1: 2})


def mutate_data(rng: random.Random, data):
    """A copy of plain data (lists, mappings, scalars) with one value, key or length changed."""
    places = list(_places(data))
    if not places:
        return rng.choice(VALUES)
    copy = yaml.safe_load(yaml.safe_dump(data))
    path, key = rng.choice(places)
    parent = copy
    for step in path:
        parent = parent[step]
    edit = rng.randrange(5)
    if edit == 0:
        del parent[key]
    elif edit == 1 and isinstance(parent, dict):
        parent[rng.choice((f'{key}_', '', 7, None))] = parent.pop(key)
    elif edit == 2 and isinstance(parent, list):
        parent.append(rng.choice(VALUES))
    else:
        parent[key] = rng.choice(VALUES)
    return copy


def _places(data, path=()) -> Iterator[tuple[tuple, object]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield path, key
        yield from _places(value, (*path, key))


def mutate_text(rng: random.Random, text: str) -> str:
    """Settings as text: a value changed in the data, or edits of the characters."""
    if rng.random() < 0.6:
        return yaml.safe_dump(mutate_data(rng, yaml.safe_load(text)), sort_keys=False)
    pieces = ['&a', '*a', '<<: *a', '!!python/object:x', '{', '[', '[' * 200, ']', '}', ': ', '- ', '\t', '"', '\0',
              '2021-13-45', '1' * 5000, '!!int ""', '---\n', '%', '\n', '  ', 'ü', '.nan', text]
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        end = at + rng.choice((0, 0, 1, 8))
        text = text[:at] + rng.choice(pieces) + text[end:]
    return text


# --- one target -----------------------------------------------------------------------------------

def peak_memory() -> float:
    """Highest resident memory of this process so far (MB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def run_cases(target: str, cases: Iterator, take: Callable[[object], bool], count: int) -> Outcome:
    """Give `count` of `cases` to `take`, which returns whether the reader took it, or raises: a crash."""
    outcome, memory = Outcome(target), peak_memory()
    for case, _ in zip(cases, tqdm(range(count), target, unit='case', disable=not sys.stderr.isatty()), strict=False):
        begin = time.thread_time()
        try:
            taken = take(case)
        except Exception as error:  # whatever it is, it is what this command looks for
            outcome.crashes += 1
            if len(outcome.shown) < SHOWN:
                place = traceback.extract_tb(error.__traceback__)[-1]
                outcome.shown.append(f'{type(error).__name__}: {str(error)[:200]} at {place.filename}:{place.lineno}, '
                                     f'of {_short(case)}')
        else:
            outcome.taken += taken
            outcome.refused += not taken
        outcome.cases += 1
        outcome.slowest_s = max(outcome.slowest_s, time.thread_time() - begin)
        if outcome.cases == WARM_UP:
            memory = peak_memory()
    outcome.memory_mb = peak_memory() - memory
    if outcome.slowest_s > TIME_LIMIT:
        outcome.faults.append(f'one case took {outcome.slowest_s:.1f} s of CPU (limit {TIME_LIMIT} s)')
    if outcome.memory_mb > MEMORY_LIMIT:
        outcome.faults.append(f'peak memory grew by {outcome.memory_mb:.0f} MB (limit {MEMORY_LIMIT:.0f} MB)')
    return outcome


def _short(case) -> str:
    text = case.hex() if isinstance(case, bytes) else repr(case)
    return text if len(text) <= 400 else f'{text[:400]}... ({len(text)} characters)'


def packets(rng: random.Random, true: list[bytes], every: int = 20) -> Iterator[bytes]:
    """Mutated packets for ever, each `every`-th one unchanged, so that the conversation goes on."""
    while True:
        data = rng.choice(true)
        yield data if rng.randrange(every) == 0 else mutate(rng, data, true)


# --- NatNet ---------------------------------------------------------------------------------------

def _natnet_server_says(version) -> list[bytes]:
    from sim_env import natnet_packets as natnet
    bodies = [natnet.Body('cf1', 1, ((0.03, 0.0, 0.0), (0.0, 0.03, 0.0), (0.0, 0.0, 0.03))), natnet.Body('wand', 2)]
    samples = [natnet.BodySample(b, (0.1, 0.2, 0.9), (0.0, 0.0, 0.0, 1.0), True, b.markers) for b in bodies]
    ticks = [int(1e7 * (5.0 + dt)) for dt in (0.0, 0.004, 0.006)]
    return [natnet.server_info(version, 'Motive', 10_000_000, 1511, None), natnet.model_definitions(version, bodies),
            natnet.frame(version, 7, samples, 5.0, *ticks), natnet.frame(version, 8, [], 5.01, *ticks),
            natnet.message(natnet.RESPONSE, struct.pack('<i', 2)),
            natnet.message(natnet.ECHO_RESPONSE, struct.pack('<QQ', 1, ticks[0])), natnet.message(natnet.UNRECOGNIZED)]


def fuzz_natnet_client(count: int, seed: int) -> Outcome:
    """A server's datagrams into mocap_bridge, a quarter of the cases for each NatNet version and client."""
    from mocap_bridge.bridge import Bridge, HealthSettings
    from mocap_bridge.odometry import OdometrySettings
    from mocap_bridge.session import ClientSettings, Session
    from sim_env.natnet_packets import VERSIONS
    rng = random.Random(seed)
    listeners = []
    for client in ('native', 'natnet'):
        for version in VERSIONS:
            true = _natnet_server_says(version)
            listeners.append((Session(ClientSettings(client=client)), true, packets(rng, true),
                              Bridge('cf1', 'auto', OdometrySettings(), HealthSettings(), 0.0)))
    now = [0.0]

    def cases():
        while True:
            listener = rng.choice(listeners)
            yield listener, next(listener[2])

    def take(case):
        (session, _, _, bridge), data = case
        now[0] += 0.01
        session.outgoing(now[0], now[0])
        malformed = session.counters.malformed
        frame = session.datagram(data, now[0], now[0])
        if frame is not None:
            bridge.frame(frame)
        if rng.randrange(100) == 0:
            bridge.report(session, now[0])
        return session.counters.malformed == malformed

    outcome = run_cases('natnet_client', cases(), take, count)
    for session, true, _, bridge in listeners:
        seen = None
        for k in range(400):  # a jump must be confirmed, a connection begun again: at most 4 s
            now[0] += 0.01
            session.outgoing(now[0], now[0])
            for data in (true[0], true[1], true[4], _moving_frame(session, k)):
                frame = session.datagram(data, now[0], now[0])
                seen = (frame and bridge.frame(frame)) or seen
        if seen is None:
            outcome.faults.append(f'{session.settings.client} no longer gives poses after the cases')
    return outcome


def _moving_frame(session, k: int) -> bytes:
    """A true frame of the version that the session has been told last."""
    from sim_env import natnet_packets as natnet
    version = max(v for v in natnet.VERSIONS if v <= max(session.server.version, (3, 0)))
    body = natnet.Body('cf1', 1)
    sample = natnet.BodySample(body, (1e-4 * math.sin(k), 0.0, 0.5), (0.0, 0.0, 0.0, 1.0), True)
    return natnet.frame(version, k, [sample], 5.0, 0, 0, 0)


def fuzz_natnet_server(count: int, seed: int) -> Outcome:
    """A client's requests into the simulated OptiTrack, over a socket."""
    from mocap_bridge import protocol
    from sim_env.natnet_packets import Body
    from sim_env.natnet_server import NatNetServer, NatNetSettings
    true = [protocol.connect_request(), protocol.models_request(True), protocol.models_request(False),
            protocol.keep_alive(), protocol.up_axis_request(), protocol.echo_request(3),
            protocol.message(protocol.REQUEST, b'Bitstream,4.0\0'), protocol.message(6), protocol.message(9)]
    server = NatNetServer([Body('cf1', 1)], NatNetSettings(command_port=0), warn=lambda text: None)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(server.address)
            client.setblocking(False)

            def take(data):
                malformed = server.counts['malformed']
                client.send(data)
                server.poll(0.0)
                server.send_frame(1, 0.0, {})
                _drain(client)
                return server.counts['malformed'] == malformed
            outcome = run_cases('natnet_server', packets(random.Random(seed), true), take, count)
            client.send(protocol.connect_request())
            server.poll(0.0)
            if not _drain(client):
                outcome.faults.append('the server no longer answers after the cases')
    finally:
        server.close()
    return outcome


def _drain(sock: socket.socket) -> int:
    """Take what waits in a non-blocking socket; how many datagrams."""
    count = 0
    while True:
        try:
            sock.recv(65536)
        except BlockingIOError:
            return count
        count += 1


# --- CRTP -----------------------------------------------------------------------------------------

def _crtp_pc_says() -> list[bytes]:
    """What cflib sends: connection, tables, log blocks, parameters, setpoints, high level, supervisor."""
    def packet(port, channel, data=b''):
        return bytes([port << 4 | 0x0C | channel]) + data
    full_state = struct.pack('<B9hI3h', 6, 0, 0, 500, *[0] * 6, 3 << 30, 0, 0, 0)
    pose = struct.pack('<B7f', 8, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0)
    return [b'\xff', packet(15, 1, b'\0'), packet(15, 0, b'ping'), packet(13, 1, b'\0'), packet(5, 1, b'\5'),
            packet(5, 0, b'\3'), packet(5, 0, b'\2\1\0'), packet(2, 0, b'\3'), packet(2, 0, b'\2\1\0'),
            packet(4, 0, b'\1'), packet(4, 1, struct.pack('<BIB', 0, 0, 20)), packet(2, 1, b'\0\0'),
            packet(2, 2, b'\0\0\2'), packet(2, 3, b'\0stabilizer\0controller\0\x08\2'),
            packet(5, 1, b'\6\1\7\0\0\7\1\0'), packet(5, 1, b'\3\1\1'), packet(5, 1, b'\4\1'), packet(5, 1, b'\2\1'),
            packet(3, 0, struct.pack('<fffH', 0.0, 0.0, 0.0, 30000)), packet(7, 0, full_state),
            packet(7, 0, struct.pack('<B4f', 7, 0.0, 0.0, 0.5, 0.0)), packet(7, 1, struct.pack('<BI', 0, 0)),
            packet(8, 0, struct.pack('<BBff?f', 7, 0, 0.5, 0.0, True, 2.0)),
            packet(8, 0, struct.pack('<BBff?f', 8, 0, 0.0, 0.0, True, 2.0)),
            packet(8, 0, struct.pack('<BBBBfffff', 12, 0, 0, 0, 0.1, 0.1, 0.5, 0.0, 2.0)), packet(8, 0, b'\3\0'),
            packet(6, 0, struct.pack('<fff', 0.0, 0.0, 0.5)), packet(6, 1, pose), packet(9, 1, b'\1\1'),
            packet(9, 1, b'\2'), packet(9, 1, b'\4'), packet(9, 0, b'\x0c')]


def fuzz_crtp_peer(count: int, seed: int) -> Outcome:
    """A PC's packets into the simulated Crazyflie, over a socket; its physics runs 1 ms every tenth packet."""
    from sim_env.crtp_peer import CrtpPeer
    from sim_env.simulated_crazyflie import SimulatedCrazyflie
    crazyflie = SimulatedCrazyflie(seed=seed)
    peer = CrtpPeer(crazyflie, ('127.0.0.1', 0), warn=lambda text: None)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as pc:
            pc.connect(peer.address)
            pc.setblocking(False)

            def take(data):
                malformed = peer.counts['malformed']
                pc.send(data)
                if peer.counts['received'] % 10 == 0:
                    crazyflie.step()
                peer.poll()
                _drain(pc)
                return peer.counts['malformed'] == malformed
            outcome = run_cases('crtp_peer', packets(random.Random(seed), _crtp_pc_says()), take, count)
            pc.send(b'\xfd\0')
            peer.poll()
            if not _drain(pc):
                outcome.faults.append('the drone no longer answers after the cases')
            if not np.isfinite(crazyflie.truth().position).all():
                outcome.faults.append(f'the drone is at {crazyflie.truth().position.tolist()} after the cases')
    finally:
        peer.close()
    return outcome


class _Relay:
    """A UDP relay between cflib and the peer that says more to cflib than the peer does."""

    def __init__(self, peer: tuple[str, int]):
        self._near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._near.bind(('127.0.0.1', 0))
        self._far.connect(peer)
        for s in (self._near, self._far):
            s.setblocking(False)
        self.address = self._near.getsockname()
        self.heard: list[bytes] = []  # packets of the peer, one of each header and first byte
        self._client = None

    def pump(self) -> None:
        """Pass on what waits, both ways."""
        while (got := _receive(self._near)) is not None:
            data, self._client = got
            self._far.send(data)
        while (got := _receive(self._far)) is not None:
            if not any(h[:2] == got[0][:2] for h in self.heard):
                self.heard.append(got[0])
            self.say(got[0])

    def say(self, data: bytes) -> None:
        """A packet to cflib."""
        if self._client is not None:
            self._near.sendto(data, self._client)

    def close(self) -> None:
        """Release both ports."""
        self._near.close()
        self._far.close()


def _receive(sock):
    try:
        return sock.recvfrom(2048)
    except (BlockingIOError, ConnectionError):
        return None


def fuzz_cflib_radio(count: int, seed: int) -> Outcome:
    """A drone's packets into a connected CflibRadio: its threads must live and its telemetry go on."""
    from crazyflie_interface.cflib_radio import CflibRadio
    from crazyflie_interface.radio import LOCKED
    from crazyflie_interface.settings import RadioSettings
    from sim_env.crtp_peer import CrtpPeer
    from sim_env.simulated_crazyflie import SimulatedCrazyflie
    rng, crazyflie = random.Random(seed), SimulatedCrazyflie(seed=seed)
    peer = CrtpPeer(crazyflie, ('127.0.0.1', 0), warn=lambda text: None)
    relay, stop, lock = _Relay(peer.address), threading.Event(), threading.Lock()

    def simulate():
        begin = time.monotonic()
        while not stop.wait(0.005):
            with lock:
                crazyflie.step(max(0, min(50, int(1000 * (time.monotonic() - begin - crazyflie.time)))))
                peer.poll()
                relay.pump()
    died = []
    thread, hook = threading.Thread(target=simulate, daemon=True), threading.excepthook
    threading.excepthook = lambda args: died.append(f'thread {args.thread.name}: {args.exc_value!r}')
    radio = CflibRadio(RadioSettings(uri=f'udp://127.0.0.1:{relay.address[1]}', connect_timeout=30.0))
    logging.getLogger('cflib').setLevel(logging.CRITICAL)  # it logs a stack trace for each packet it cannot use
    thread.start()
    try:
        radio.connect()
        _within(10.0, lambda: radio.telemetry().battery_v is not None)  # its log blocks are then made

        def take(data):
            with lock:
                relay.say(data)
            if rng.randrange(200) == 0:
                time.sleep(0.02)  # cflib's threads read on; their queue stays short
                radio.telemetry()
            if died:
                raise RuntimeError(died.pop())
            return True
        outcome = run_cases('cflib_radio', packets(rng, list(relay.heard)), take, count)
        _check_radio(radio, crazyflie, LOCKED, outcome)
        outcome.faults += died
    finally:
        threading.excepthook = hook
        radio.close()
        stop.set()
        thread.join()
        logging.getLogger('cflib').setLevel(logging.NOTSET)
        relay.close()
        peer.close()
    return outcome


def _check_radio(radio, crazyflie, locked: int, outcome: Outcome) -> None:
    """After the cases telemetry goes on, or the link is said to be lost (a drone that answers "log block deleted" sends
    none any more), and either way an emergency stop still reaches the drone."""
    begin = time.monotonic()
    if not _within(10.0, lambda: radio.telemetry().link == 'lost' or radio.telemetry().stamp > begin + 0.5):
        outcome.faults.append(f'no telemetry, and the link is not said to be lost: {radio.telemetry()}')
    radio.emergency_stop()
    if not _within(5.0, lambda: bool(crazyflie.supervisor_info & locked)):
        outcome.faults.append('an emergency stop no longer reaches the drone')


def _within(limit: float, condition: Callable[[], bool]) -> bool:
    """True as soon as `condition` is, False after `limit` s."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# --- settings files -------------------------------------------------------------------------------

def config_readers(folder: Path) -> dict[str, tuple[str, Callable[[Path], None], tuple[type, ...]]]:
    """kind -> (a true file, what reads it, the errors that it documents). Work is done in `folder`."""
    from crazyflie_interface.settings import Settings as FlightSettings
    from deqmpc import obstacles
    from deqmpc.airframe import Airframe
    from deqmpc.policies import model
    from deqmpc_bringup.composition import CompositionError, compose, share_dir
    from deqmpc_controller.node import Settings as PolicySettings
    from deqmpc_controller.node import policy_from
    from deqmpc_ros.settings import SettingsError
    share = share_dir()
    trained = share / 'models' / 'crazyflie_obs' / 'deq_mpc_nn'
    (folder / model.WEIGHTS).write_bytes((trained / model.WEIGHTS).read_bytes())

    def parameters(path):
        compose('hardware', {'params': str(path)})
        _declare_from(path, 'crazyflie_interface', FlightSettings)
        _declare_from(path, 'policy', PolicySettings)

    def policy(path):
        policy_from(PolicySettings(policy='mpc_only', policy_file=str(path)), 'fuzz')

    airframe = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(Airframe()).items()}
    field_of_spheres = {'spheres': [{'position': [0.5, 0.0, 1.0], 'radius': 0.1, 'velocity': [0.1, 0.0, 0.0]},
                                    {'position': [0.0, 0.5, 1.0], 'radius': 0.2}],
                        'low': [-1.5, -1.5, 0.3], 'high': [1.5, 1.5, 1.8]}
    flight = (share / 'config' / 'hardware.yaml').read_text()
    return {
        'parameters': (flight, parameters, (CompositionError, SettingsError)),
        'fleet': ((share / 'config' / 'fleet' / 'two.yaml').read_text(),
                  lambda path: compose('sim', {'fleet': str(path), 'trial': 'true'}), (CompositionError,)),
        'policy': ((share / 'config' / 'policies' / 'mpc_only.yaml').read_text(), policy, (SettingsError,)),
        'airframe': (yaml.safe_dump(airframe), Airframe.load, (ValueError,)),
        'obstacles': (yaml.safe_dump(field_of_spheres), obstacles.load, (ValueError,)),
        'model': ((trained / model.SETTINGS).read_text(), lambda path: model.load(path.parent), (ValueError,)),
    }


def _declare_from(path: Path, node_name: str, settings: type) -> None:
    """The parameters of a real node: rcl reads the file, the node declares them."""
    import rclpy
    from rclpy.node import Node

    from deqmpc_ros.node import declare
    context = rclpy.Context()
    rclpy.init(args=['--ros-args', '--params-file', str(path), '-r', '__ns:=/cf1'], context=context)
    try:
        node = Node(node_name, context=context)
        try:
            declare(node, settings)
        finally:
            node.destroy_node()
    finally:
        rclpy.shutdown(context=context)


def fuzz_config(count: int, seed: int) -> Outcome:
    """Settings files into their readers, one kind after the other."""
    from deqmpc.policies import model
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        readers = config_readers(folder)

        def cases():
            while True:
                kind = rng.choice(list(readers))
                yield kind, mutate_text(rng, readers[kind][0])

        def take(case):
            kind, text = case
            _, read, errors = readers[kind]
            path = folder / (model.SETTINGS if kind == 'model' else f'{kind}.yaml')
            path.write_text(text)
            try:
                read(path)
            except errors as error:
                if type(error) not in errors:  # UnicodeError and the like are ValueErrors, but say nothing of a file
                    raise
                if str(folder) not in str(error) and 'fuzz' not in str(error) and '/cf1' not in str(error):
                    raise RuntimeError(f'the error does not say where: {error}') from error
                return False
            return True
        outcome = run_cases('config', cases(), take, count)
        for kind, (text, read, _) in readers.items():
            path = folder / (model.SETTINGS if kind == 'model' else f'{kind}.yaml')
            path.write_text(text)
            read(path)
    return outcome


# --- command --------------------------------------------------------------------------------------

PACKET_TARGETS = {  # name -> (share of the packets, function of count and seed)
    'natnet_client': (0.4, fuzz_natnet_client), 'natnet_server': (0.1, fuzz_natnet_server),
    'crtp_peer': (0.3, fuzz_crtp_peer), 'cflib_radio': (0.2, fuzz_cflib_radio)}


def fuzz(packet_count: int, config_count: int, seed: int, only: str = '') -> list[Outcome]:
    """Run the targets; `packet_count` is shared out among those that read packets."""
    outcomes = [function(round(share * packet_count), seed) for name, (share, function) in PACKET_TARGETS.items()
                if only in ('', name) and packet_count]
    if only in ('', 'config') and config_count:
        outcomes.append(fuzz_config(config_count, seed))
    return outcomes


def main(argv: list[str]) -> int:
    """Give mutated packets and settings files to everything that reads them; 0 when nothing crashes."""
    parser = argparse.ArgumentParser(
        prog='deqmpc fuzz', description=main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='exit status: 0 no crash and all bounds kept, 1 a crash or a bound passed, 2 wrong usage')
    parser.add_argument('--packets', type=int, default=100_000, metavar='N', help='mutated packets (default 100000)')
    parser.add_argument('--configs', type=int, default=1_000, metavar='N', help='mutated files (default 1000)')
    parser.add_argument('--seed', type=int, default=0, help='of the mutations (default 0)')
    parser.add_argument('--only', default='', choices=[*PACKET_TARGETS, 'config'], help='one target')
    parser.add_argument('--json', action='store_true', help='print the outcomes as JSON')
    options = parser.parse_args(argv)
    if min(options.packets, options.configs) < 0:
        parser.error(f'--packets {options.packets} --configs {options.configs}; expected numbers >= 0')
    outcomes = fuzz(options.packets, options.configs, options.seed, options.only)
    if options.json:
        print(json.dumps({'seed': options.seed, 'outcomes': [asdict(o) for o in outcomes]}, indent=2))
    else:
        report(outcomes)
    return 0 if all(o.passed for o in outcomes) else 1


def report(outcomes: list[Outcome]) -> None:
    """A table, then crashes and faults."""
    print(f'{"target":<15}{"cases":>8}{"taken":>8}{"refused":>9}{"crashes":>9}{"slowest":>10}{"memory":>10}')
    for o in outcomes:
        print(f'{o.target:<15}{o.cases:>8}{o.taken:>8}{o.refused:>9}{o.crashes:>9}{1e3 * o.slowest_s:>7.0f} ms'
              f'{o.memory_mb:>7.1f} MB')
    for o in outcomes:
        for line in (*o.shown, *o.faults):
            print(f'{o.target}: {line}')
    total = Counter({'cases': sum(o.cases for o in outcomes), 'crashes': sum(o.crashes for o in outcomes)})
    print(f'{total["crashes"]} crashes in {total["cases"]} cases')


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
