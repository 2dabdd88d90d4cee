"""The state of a training run as one safetensors file: weights, Adam's moments, the generator, the step.

It is written beside its name and renamed onto it, so that a run that is killed at any time resumes from a whole file
and, with the same settings, ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deqmpc.training.imitation import Trainer
from deqmpc.whole_file import replacing

NAME = 'checkpoint.safetensors'
_MOMENTS = ('exp_avg', 'exp_avg_sq')


def save(folder: Path, trainer: Trainer, settings: dict) -> None:
    """Write `trainer` as it is. `settings` say what the run is: `load` compares them."""
    tensors = {f'model.{k}': v.detach().cpu().contiguous() for k, v in trainer.model.state_dict().items()}
    for i, state in trainer.optimizer.state_dict()['state'].items():
        tensors |= {f'adam.{i}.{k}': state[k].detach().cpu().contiguous() for k in _MOMENTS}
    tensors['generator'] = trainer.generator.get_state()
    with replacing(folder / NAME) as part:
        save_file(tensors, part, {'step': str(trainer.done), 'settings': json.dumps(settings, sort_keys=True)})


def load(folder: Path, trainer: Trainer, settings: dict) -> bool:
    """Continue from the folder's checkpoint; False where there is none. ValueError where it is damaged or belongs to
    another run, naming the settings that differ."""
    path = folder / NAME
    if not path.exists():
        return False
    try:
        with safe_open(path, 'pt') as file:
            about = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except SafetensorError as error:
        raise ValueError(f'{path}: {error}') from error
    was, now = json.loads(about['settings']), json.loads(json.dumps(settings))
    differ = [f'{k}: {was.get(k)!r} there, {now.get(k)!r} now' for k in sorted(set(was) | set(now))
              if was.get(k) != now.get(k)]
    if differ:
        raise ValueError(f'{path} is of another run ({"; ".join(differ)}); give another --out, or --restart')
    trainer.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith('model.')})
    state = trainer.optimizer.state_dict()
    step = torch.tensor(float(about['step']))
    count = len(state['param_groups'][0]['params'])
    state['state'] = {i: {'step': step.clone(), **{k: tensors[f'adam.{i}.{k}'] for k in _MOMENTS}}
                      for i in range(count) if f'adam.{i}.exp_avg' in tensors}
    trainer.optimizer.load_state_dict(state)
    trainer.generator.set_state(tensors['generator'])
    trainer.done = int(about['step'])
    return True
