"""A trained model as a folder: `weights.safetensors` and `settings.yaml`.

settings.yaml holds `network` (deqmpc.networks.temporal.Settings), `method` (deqmpc.policies.deq_mpc.Settings; empty
for a network alone), `problem` (what the policy that flies it builds its problem from), `card` (free text: data, seed,
commit, scores) and `weights_sha256`, the hash of the weights that belong to it; a model that predicts the motion of
spheres has `motion` too (settings of deqmpc.networks.obstacle_motion, weights named `motion.*`). Neither file can run
code.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensors_to_bytes

from deqmpc import yaml_file
from deqmpc.networks.obstacle_motion import ObstacleMotion
from deqmpc.networks.temporal import Settings, TemporalNetwork
from deqmpc.solvers import anderson
from deqmpc.whole_file import replacing

S = TypeVar('S')
WEIGHTS, SETTINGS = 'weights.safetensors', 'settings.yaml'
_MOTION = 'motion.'  # begins the names of the motion network's weights
_KEYS = ('network', 'method', 'problem', 'card', 'weights_sha256')


@dataclass(frozen=True)
class Model:
    """What a folder holds."""

    network: TemporalNetwork
    method: dict[str, Any]
    problem: dict[str, Any]
    card: dict[str, Any]
    motion: ObstacleMotion | None = None


def save(folder: str | Path, model: Model) -> None:
    """Write the folder. The settings are written last, onto their name: a reader meets a whole model or none."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, parts = dict(model.network.state_dict()), {'network': model.network.settings}
    if model.motion is not None:
        tensors |= {_MOTION + k: v for k, v in model.motion.state_dict().items()}
        parts['motion'] = model.motion.settings
    weights = tensors_to_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    text = yaml.safe_dump({
        **{k: _plain(dataclasses.asdict(v)) for k, v in parts.items()},
        'method': _plain(model.method), 'problem': _plain(model.problem),
        'card': _plain(model.card), 'weights_sha256': hashlib.sha256(weights).hexdigest()}, sort_keys=False)
    for name, content in ((WEIGHTS, weights), (SETTINGS, text.encode())):
        with replacing(folder / name) as part:
            part.write_bytes(content)


def load(folder: str | Path) -> Model:
    """Read a folder. FileNotFoundError where a file is missing; ValueError, with the file's name, where one is
    damaged, has an unknown setting, or does not belong to the other."""
    folder = Path(folder)
    for path in (folder, folder / SETTINGS, folder / WEIGHTS):
        if not path.exists():
            raise FileNotFoundError(f'model {folder}: {path} does not exist; expected a folder with {SETTINGS} and '
                                    f'{WEIGHTS}')
    values = yaml_file.load(folder / SETTINGS)
    if not isinstance(values, dict) or set(values) - {'motion'} != set(_KEYS):
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f'{folder / SETTINGS}: has {got}; expected exactly {", ".join(_KEYS)}, and '
                         f'motion where the model predicts it')
    weights = (folder / WEIGHTS).read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != values['weights_sha256']:
        raise ValueError(f'{folder / WEIGHTS}: sha256 {found}, but {SETTINGS} belongs to weights with '
                         f'{values["weights_sha256"]}; copy both files of one model')
    for key in sorted(set(values) - {'weights_sha256'}):
        if not isinstance(values[key], dict):
            raise ValueError(f'{folder / SETTINGS}: {key} = {values[key]!r}; expected a mapping')
    network = TemporalNetwork(_network_settings(values['network'], f'{folder / SETTINGS}: network'))
    motion = None
    if 'motion' in values:
        where = f'{folder / SETTINGS}: motion'
        settings = _network_settings(values['motion'], where)
        try:
            motion = ObstacleMotion(settings).eval()
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error
    try:
        tensors = read_tensors(weights)
        own = {k[len(_MOTION):]: tensors.pop(k) for k in list(tensors) if motion is not None and k.startswith(_MOTION)}
        network.load_state_dict(tensors)
        if motion is not None:
            motion.load_state_dict(own)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f'{folder / WEIGHTS}: {error}') from error
    return Model(network.eval(), values['method'], values['problem'], values['card'], motion)


def _network_settings(values: dict[str, Any], where: str) -> Settings:
    made = dict(values)
    if 'fixed_point' in made:
        made['fixed_point'] = settings_of(anderson.Settings, made['fixed_point'], f'{where}.fixed_point')
    return settings_of(Settings, made, where)


def settings_of(cls: type[S], values: Any, where: str) -> S:
    """A dataclass from a mapping; lists become tuples. ValueError says where, which key and what was expected."""
    known = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise ValueError(f'{where} = {values!r}; expected a mapping')
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f'{where}: unknown setting {name!r}{f", did you mean {close[0]!r}?" if close else ""}; '
                             f'expected some of: {", ".join(sorted(known))}')
    try:
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f'{where}: {error}') from error


def _plain(value):
    """`value` with tuples as lists, as YAML has it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
