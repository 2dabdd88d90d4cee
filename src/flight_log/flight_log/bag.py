"""rosbag2 bags without a ROS installation: writing that survives SIGKILL, reading, repair.

A bag is a folder `NAME/` with `NAME.mcap` (MCAP, profile `ros2`), after every further `SPLIT_SECONDS`
`NAME_1.mcap`, `NAME_2.mcap`, ..., and, once closed, `metadata.yaml` (rosbag2 bag metadata version 9). A
writer keeps the index of its file in memory until it closes it: splitting bounds that. Messages are
gathered in lz4 chunks that are handed to the operating system after at most `FLUSH_SECONDS` of recording
or `CHUNK_BYTES`; a process killed in between loses that one chunk, and a reader can walk the file up to
the tear. A machine that loses power may lose more: nothing is fsynced while flying.

Layout of the records: https://mcap.dev/spec and https://mcap.dev/spec/registry#ros2; channel metadata
and metadata.yaml as rosbag2_storage_mcap writes them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import sqlite3
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mcap.exceptions import McapError, UnsupportedCompressionError
from mcap.records import Channel, Chunk, Message, Metadata, Schema
from mcap.stream_reader import StreamReader, breakup_chunk
from mcap.writer import CompressionType, Writer
from rosbags.interfaces import Nodetype
from rosbags.rosbag2 import Reader, ReaderError
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_typestore

from deqmpc import whole_file
from deqmpc.interface import Topic

FLUSH_SECONDS = 0.25  # s of log time in one chunk at most
CHUNK_BYTES = 64 * 1024
SPLIT_SECONDS = 600.0  # s of log time in one file; about 2.5 MB of index for one robot at 100 Hz
METADATA_NAME = 'deqmpc'  # the MCAP metadata record that holds the run's settings

# What decoders raise on bytes that were cut or overwritten.
_CORRUPT = (ValueError, RuntimeError, EOFError, IndexError, KeyError, AssertionError, TypeError, struct.error)
_UNREADABLE = (ReaderError, OSError, sqlite3.Error, *_CORRUPT)
_MAGIC = b'\x89MCAP0\r\n'
_BAG_VERSION = 9
_STORE = get_typestore(Stores.ROS2_KILTED)


class BagError(ValueError):
    """A bag cannot be read or written; the message names the file and what was expected."""


# --- messages -----------------------------------------------------------------------------------

# Defaults that a .msg file gives and rosbags' definitions do not keep (geometry_msgs/Quaternion.msg).
_MSG_DEFAULTS = {'geometry_msgs/msg/Quaternion': {'w': 1.0}}


def _default(description: Any) -> Callable[[], Any]:
    """A function that makes the default of one field of rosbags' field description."""
    kind, detail = description
    if kind == Nodetype.BASE:
        name = detail[0]
        value = {'string': '', 'bool': False}.get(name, 0.0 if name.startswith('float') else 0)
        return lambda: value
    if kind == Nodetype.NAME:
        return lambda: _make(detail, {})
    element, length = detail
    length = length if kind == Nodetype.ARRAY else 0
    if element[0] == Nodetype.BASE and element[1][0] != 'string':
        dtype = np.uint8 if element[1][0] in ('octet', 'byte', 'char') else element[1][0]
        return lambda: np.zeros(length, dtype=dtype)
    one = _default(element)
    return lambda: [one() for _ in range(length)]


@functools.cache
def _fields(type_name: str) -> dict[str, Callable[[], Any]]:
    if type_name not in _STORE.fielddefs:
        raise BagError(f'message type {type_name!r} is not a standard ROS 2 (Kilted) message')
    defaults = {name: _default(description) for name, description in _STORE.fielddefs[type_name][1]}
    for name, value in _MSG_DEFAULTS.get(type_name, {}).items():
        defaults[name] = functools.partial(float, value)
    return defaults


def _make(type_name: str, given: dict[str, Any]) -> Any:
    defaults = _fields(type_name)
    if given.keys() == defaults.keys():  # most messages, and this is where a simulated flight spends its time
        return _STORE.types[type_name](**given)
    unknown = given.keys() - defaults.keys()
    if unknown:
        raise BagError(f'{type_name} has no field {sorted(unknown)}; expected some of {list(defaults)}')
    return _STORE.types[type_name](**{k: given[k] if k in given else make() for k, make in defaults.items()})


class BagTypes:
    """The rosbags side of `deqmpc.interface.MessageTypes`."""

    def make(self, type_name: str, **fields: Any) -> Any:
        """A message of `type_name`; fields not given have their default. BagError on a wrong name."""
        return _make(type_name, fields)

    def octet(self, value: int) -> int:
        """rosbags keeps a `byte` field as an int."""
        return int(value)


TYPES = BagTypes()


def serialize(message: Any, type_name: str) -> bytes:
    """CDR bytes of a message that `BagTypes` made."""
    return bytes(_STORE.serialize_cdr(message, type_name))


def deserialize(data: bytes, type_name: str) -> Any:
    """The message in CDR bytes. BagError when the bytes are not such a message."""
    if type_name not in _STORE.fielddefs:
        raise BagError(f'message type {type_name!r} is not a standard ROS 2 (Kilted) message')
    try:
        return _STORE.deserialize_cdr(data, type_name)
    except (SerdeError, AssertionError, IndexError) as error:
        raise BagError(f'{len(data)} bytes are no {type_name}: {error}') from error


# --- writing ------------------------------------------------------------------------------------

def _qos_profile(topic: Topic | None) -> list[dict[str, Any]]:
    """Offered QoS in the form of rosbag2 metadata version 9; empty when it is not known."""
    if topic is None:
        return []
    infinite = {'sec': 9223372036, 'nsec': 854775807}  # RMW_DURATION_INFINITE
    return [{
        'history': 'keep_last', 'depth': topic.depth,
        'reliability': 'reliable' if topic.reliable else 'best_effort',
        'durability': 'transient_local' if topic.latched else 'volatile',
        'deadline': dict(infinite), 'lifespan': dict(infinite), 'liveliness': 'automatic',
        'liveliness_lease_duration': dict(infinite), 'avoid_ros_namespace_conventions': False}]


@dataclass
class _Recorded:
    """What the metadata of the bag says of one topic."""

    type: str
    qos: list[dict[str, Any]]
    count: int = 0


class _Span:
    """First and last log time (ns) and number of messages of a bag or of one of its files."""

    def __init__(self):
        self.first, self.last, self.count = 2**63 - 1, 0, 0

    def add(self, log_time: int) -> None:
        self.first, self.last = min(self.first, log_time), max(self.last, log_time)
        self.count += 1

    def information(self) -> dict[str, Any]:
        """As rosbag2's metadata spells it."""
        start = self.first if self.count else 0
        return {'duration': {'nanoseconds': max(0, self.last - start)},
                'starting_time': {'nanoseconds_since_epoch': start}, 'message_count': self.count}


class _Part:
    """One MCAP file of a bag, open for writing."""

    def __init__(self, path: Path, metadata: dict[str, str]):
        self.path, self.span = path, _Span()
        self._file = open(path, 'xb')
        self._schemas: dict[str, int] = {}
        self._channels: dict[str, int] = {}
        self._writer = Writer(self._file, chunk_size=2**31, compression=CompressionType.LZ4)
        self._writer.start(profile='ros2', library='deqmpc flight_log')
        if metadata:
            self._writer.add_metadata(METADATA_NAME, metadata)
        self._file.flush()

    def write(self, topic: str, recorded: _Recorded, log_time: int, data: bytes) -> None:
        if topic not in self._channels:
            self.open_channel(topic, recorded)
        self._writer.add_message(self._channels[topic], log_time, data, log_time, recorded.count)
        self.span.add(log_time)

    def open_channel(self, topic: str, recorded: _Recorded) -> None:
        kind = recorded.type
        if kind not in self._schemas:
            text, _ = _STORE.generate_msgdef(kind, ros_version=2)
            self._schemas[kind] = self._writer.register_schema(kind, 'ros2msg', text.encode())
        self._channels[topic] = self._writer.register_channel(topic, 'cdr', self._schemas[kind], {
            'offered_qos_profiles': yaml.safe_dump(recorded.qos).strip() if recorded.qos else '',
            'topic_type_hash': _STORE.hash_rihs01(kind)})

    def flush(self) -> None:
        self._writer.flush()

    def close(self, information: dict[str, Any]) -> None:
        self._writer.add_metadata('rosbag2', {'serialized_metadata': yaml.safe_dump(information)})
        self._writer.finish()
        self._file.close()

    def information(self) -> dict[str, Any]:
        return {'path': self.path.name, **self.span.information()}


class BagWriter:
    """Writes one bag folder.

    path: the folder, which must not exist. metadata: strings kept with the bag (settings, seed,
    versions), as an MCAP metadata record and as rosbag2's `custom_data`. flush_seconds: longest span of
    log time that a kill may lose. split_seconds: longest span of log time in one file. Raises BagError
    when the path exists or cannot be made.

    Log times are integer nanoseconds of the ROS clock. Use as a context manager, or call `close()`: only
    then do readers other than this module's accept the bag.
    """

    def __init__(self, path: str | Path, metadata: dict[str, str] | None = None,
                 flush_seconds: float = FLUSH_SECONDS, split_seconds: float = SPLIT_SECONDS):
        self.path = Path(path)
        self.metadata = {str(k): str(v) for k, v in (metadata or {}).items()}
        self.topics: dict[str, _Recorded] = {}
        self._flush_ns, self._split_ns = round(flush_seconds * 1e9), round(split_seconds * 1e9)
        self._chunk_start: int | None = None
        self._chunk_bytes = 0
        self._span = _Span()
        self._finished: list[dict[str, Any]] = []  # files that are closed, as metadata.yaml lists them
        self._finished_bytes = 0
        self._closed = False
        if self.path.exists():
            raise BagError(f'{self.path} exists; expected a new path for the bag (nothing is overwritten)')
        try:
            self.path.mkdir(parents=True)
            self._part = self._next_part(0)
        except OSError as error:
            raise BagError(f'cannot make the bag {self.path}: {error.strerror}') from error

    @property
    def messages(self) -> int:
        """Number of messages written."""
        return self._span.count

    @property
    def bytes_written(self) -> int:
        """Size of the files so far, without the chunk being gathered."""
        return self._finished_bytes + self._part.path.stat().st_size

    def write(self, topic: str, type_name: str, log_time: int, data: bytes, qos: Topic | None = None) -> None:
        """Append the CDR bytes `data`, received at `log_time` (ns). `qos`: the table's row, read on the
        first message of a topic. OSError when the disk refuses."""
        if topic not in self.topics:
            self.register(topic, type_name, _qos_profile(qos))
        if self._part.span.count and log_time - self._part.span.first >= self._split_ns:
            self._split()
        recorded = self.topics[topic]
        self._part.write(topic, recorded, log_time, data)
        self._span.add(log_time)
        recorded.count += 1
        self._chunk_bytes += len(data)
        if self._chunk_start is None:
            self._chunk_start = log_time
        elif self._chunk_bytes > CHUNK_BYTES or log_time - self._chunk_start >= self._flush_ns:
            self.flush()

    def write_message(self, topic: Topic, robot: str, stamp: float, message: Any) -> None:
        """Append a message made with `BagTypes`, received at `stamp` (s)."""
        data = serialize(message, topic.type)
        self.write(topic.resolve(robot), topic.type, round(stamp * 1e9), data, topic)

    def flush(self) -> None:
        """Hand everything to the operating system, so that a kill from now on loses none of it."""
        self._part.flush()
        self._chunk_start, self._chunk_bytes = None, 0

    def close(self) -> None:
        """Write the index and metadata.yaml. A second call does nothing."""
        if self._closed:
            return
        self._finish_part()
        self._closed = True
        text = yaml.safe_dump({'rosbag2_bagfile_information': self._information(self._finished)}, sort_keys=False)
        whole_file.write_text(self.path / 'metadata.yaml', text)

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def register(self, topic: str, type_name: str, profile: list[dict[str, Any]]) -> None:
        """Open a channel; `profile`: offered QoS as rosbag2's metadata spells it, empty when unknown."""
        if type_name not in _STORE.fielddefs:
            raise BagError(f'topic {topic}: message type {type_name!r} is not a standard ROS 2 message')
        self.topics[topic] = _Recorded(type_name, profile)
        self._part.open_channel(topic, self.topics[topic])

    def _next_part(self, number: int) -> _Part:
        return _Part(self.path / f'{self.path.name}{f"_{number}" if number else ""}.mcap', self.metadata)

    def _finish_part(self) -> None:
        files = [*self._finished, self._part.information()]
        self._part.close(self._information(files))
        self._finished = files
        self._finished_bytes += self._part.path.stat().st_size

    def _split(self) -> None:
        # The next file is opened first: where that fails, the one being written can still be closed whole.
        following = self._next_part(len(self._finished) + 1)
        self._finish_part()
        self._part, self._chunk_start, self._chunk_bytes = following, None, 0

    def _information(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            'version': _BAG_VERSION, 'storage_identifier': 'mcap', **self._span.information(),
            'topics_with_message_count': [
                {'topic_metadata': {
                    'name': topic, 'type': r.type, 'serialization_format': 'cdr',
                    'offered_qos_profiles': r.qos, 'type_description_hash': _STORE.hash_rihs01(r.type)},
                 'message_count': r.count}
                for topic, r in self.topics.items()],
            'compression_format': '', 'compression_mode': '',
            'relative_file_paths': [f['path'] for f in files], 'files': files,
            'custom_data': self.metadata or None, 'ros_distro': 'kilted'}


# --- reading ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class BagInfo:
    """What can be said of a bag before its messages are read."""

    path: Path
    torn: bool  # the recording was cut: no index; readable up to the tear
    topics: dict[str, str]  # topic -> type; of a torn bag those met so far on the way to the tear
    metadata: dict[str, str] = field(default_factory=dict)  # as given to BagWriter


def _is_whole(path: Path) -> bool:
    """True when the MCAP file ends as a finished one does."""
    if path.stat().st_size < 2 * len(_MAGIC):
        return False
    with open(path, 'rb') as f:
        f.seek(-len(_MAGIC), io.SEEK_END)
        return f.read() == _MAGIC


def _mcap_files(folder: Path) -> list[Path]:
    """The MCAP files of a bag in the order of their numbers: b, b_1, b_2, ..., b_10."""
    def order(path: Path) -> tuple[str, int]:
        name, _, number = path.stem.rpartition('_')
        return (name, int(number)) if name and number.isdecimal() else (path.stem, -1)
    return sorted(folder.glob('*.mcap'), key=order)


def _storage(path: Path) -> tuple[Path | None, list[Path]]:
    """(what a normal reader opens, []) or (None, torn MCAP files in order). BagError when neither."""
    if not path.exists():
        raise BagError(f'{path}: no such file; expected a bag folder or a .mcap file')
    if path.is_dir():
        if (path / 'metadata.yaml').exists():
            return path, []
        files = _mcap_files(path)
        if not files:
            databases = sorted(path.glob('*.db3'))
            if len(databases) == 1:  # sqlite3 needs no metadata.yaml
                return databases[0], []
            raise BagError(f'{path}: no metadata.yaml and no .mcap file; expected a rosbag2 bag folder')
        if len(files) == 1 and _is_whole(files[0]):
            return files[0], []
        return None, files
    if path.suffix == '.mcap' and not _is_whole(path):
        return None, [path]
    if path.suffix not in ('.mcap', '.db3'):
        raise BagError(f'{path}: expected a bag folder, a .mcap or a .db3 file')
    return path, []


def _torn_records(path: Path) -> Iterator[Any]:
    """Schemas, channels, metadata and messages of an MCAP file up to where it is torn."""
    with open(path, 'rb') as f:
        if f.read(len(_MAGIC)) != _MAGIC:
            raise BagError(f'{path}: not an MCAP file (its first 8 bytes are wrong)')
        f.seek(0)
        records = iter(StreamReader(f, emit_chunks=True).records)
        while True:
            try:
                record = next(records)
                parts = breakup_chunk(record, validate_crc=True) if isinstance(record, Chunk) else [record]
            except StopIteration:
                return
            except UnsupportedCompressionError as error:
                raise BagError(f'{path}: the codec of its chunks is not installed: {error}') from error
            except (McapError, *_CORRUPT):
                return
            yield from parts


def _torn_messages(files: list[Path]) -> Iterator[tuple[Channel, str, int, bytes]]:
    """(channel, type, log time in ns, CDR bytes)."""
    for path in files:
        schemas: dict[int, Schema] = {}
        channels: dict[int, Channel] = {}
        for record in _torn_records(path):
            if isinstance(record, Schema):
                schemas[record.id] = record
            elif isinstance(record, Channel):
                channels[record.id] = record
            elif isinstance(record, Message):
                channel = channels[record.channel_id]
                yield channel, schemas[channel.schema_id].name, record.log_time, record.data


def _metadata_records(path: Path) -> dict[str, str]:
    """The run's settings from an MCAP file: BagWriter writes that record first."""
    for record in _torn_records(path):
        if isinstance(record, Metadata) and record.name == METADATA_NAME:
            return dict(record.metadata)
        if isinstance(record, Message):
            break
    return {}


Messages = Callable[[Collection[str] | None], Iterator[tuple[str, str, int, bytes]]]


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[tuple[BagInfo, Messages]]:
    """A bag, opened once: what `bag_info` says of it, and a function that gives its messages as `read_raw` does."""
    path = Path(path)
    whole, torn = _storage(path)
    if whole is None:
        topics = {channel.topic: kind for channel, kind, _, _ in _torn_messages(torn)}

        def up_to_the_tear(wanted):
            for channel, kind, log_time, data in _torn_messages(torn):
                if wanted is None or channel.topic in wanted:
                    yield channel.topic, kind, log_time, data
        yield BagInfo(path, True, topics, _metadata_records(torn[0])), up_to_the_tear
        return
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(Reader(whole))
            topics = {c.topic: c.msgtype for c in reader.connections}
        except _UNREADABLE as error:
            raise BagError(f'{path}: not a readable rosbag2 bag: {error}') from error

        def messages(wanted):
            connections = [c for c in reader.connections if wanted is None or c.topic in wanted]
            try:
                for connection, log_time, data in reader.messages(connections) if connections else ():
                    yield connection.topic, connection.msgtype, log_time, data
            except _UNREADABLE as error:
                raise BagError(f'{path}: not a readable rosbag2 bag: {error}') from error
        yield BagInfo(path, False, topics, _settings(whole)), messages


def _settings(whole: Path) -> dict[str, str]:
    """What BagWriter was given, from a whole bag: the MCAP record, which is quicker to read, or metadata.yaml."""
    files = _mcap_files(whole)[:1] if whole.is_dir() else [whole] if whole.suffix == '.mcap' else []
    found = _metadata_records(files[0]) if files else {}
    if not found and whole.is_dir():
        document = yaml.safe_load((whole / 'metadata.yaml').read_text())
        found = document['rosbag2_bagfile_information'].get('custom_data') or {}
    return {str(k): str(v) for k, v in found.items()}


def bag_info(path: str | Path) -> BagInfo:
    """Look at a bag. BagError when it is none, or when nothing in it can be read."""
    with opened(path) as (info, _):
        return info


def read_raw(path: str | Path,
             topics: Collection[str] | None = None) -> Iterator[tuple[str, str, int, bytes]]:
    """(topic, type, log time in ns, CDR bytes) in the order of log times; of a torn bag in the order of
    recording, up to the tear. `topics`: those to read, all when None. BagError when unreadable."""
    with opened(path) as (_, messages):
        yield from messages(topics)


def read_bag(path: str | Path,
             topics: Collection[str] | None = None) -> Iterator[tuple[str, str, float, Any]]:
    """(topic, type, log time in s, message): `read_raw` with the messages decoded. BagError names the
    topic and the time of a message that cannot be decoded."""
    for topic, kind, log_time, data in read_raw(path, topics):
        try:
            message = deserialize(data, kind)
        except BagError as error:
            raise BagError(f'{path}: {topic} at {1e-9 * log_time:.3f} s: {error}') from error
        yield topic, kind, 1e-9 * log_time, message


# --- repair -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recovered:
    """What `recover` saved."""

    path: Path  # the repaired bag
    messages: int
    seconds: float  # from the first to the last message saved


def recover(path: str | Path, output: str | Path | None = None) -> Recovered:
    """Write what can be read of a torn bag to a new bag, `<path>_recovered` unless `output` is given.

    The original is not touched. BagError when the bag is whole, holds no message or `output` exists.
    """
    path = Path(path)
    _, torn = _storage(path)
    if not torn:
        raise BagError(f'{path} is whole; expected a torn recording to recover')
    messages = _torn_messages(torn)
    first = next(messages, None)
    if first is None:
        raise BagError(f'{path}: no complete chunk of messages before the tear; nothing to recover')
    output = Path(output) if output is not None else path.with_name(path.stem + '_recovered')
    last = first[2]
    with BagWriter(output, metadata=_metadata_records(torn[0])) as writer:
        for channel, kind, log_time, data in itertools.chain([first], messages):
            if channel.topic not in writer.topics:
                profile = yaml.safe_load(channel.metadata.get('offered_qos_profiles') or '[]')
                writer.register(channel.topic, kind, profile)
            writer.write(channel.topic, kind, log_time, data)
            last = max(last, log_time)
    return Recovered(output, writer.messages, 1e-9 * (last - first[2]))
