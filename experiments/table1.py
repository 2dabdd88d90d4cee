"""Table 1: in flight DEQ-MPC-DEQ has the highest return and no failures.

The paper flies a Crazyflie among 40 virtual spheres, three trials a variant. Here the whole stack flies the same trial
in simulation (`deqmpc trial sim --in-process`: estimator, policy, guard, firmware's controller, 1 kHz physics), every
variant from the same starts, with the models in models/crazyflie_obs/VARIANT; and mpc_only, which learns nothing.
Return is a share of the largest possible one and counts up to the first failure: sphere, crash, fence, guard.

Checks: DEQ-MPC-DEQ never fails; it fails no more often than any other variant; the mean returns of DEQ-MPC-DEQ and of
DEQ-MPC-NN are at least those of both Diff-MPC variants.
"""

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from deqmpc.policies import model
from deqmpc.provenance import commit
from deqmpc.reproduce import MPC_VARIANTS, Check, Column, Plan, Results, bars

X_LABEL = ''
VARIANTS = (*MPC_VARIANTS, 'mpc_only')
SEEDS = {'smoke': 1, 'small': 10, 'medium': 20, 'full': 100}  # trials
MODELS = Path('models/crazyflie_obs')
COLUMNS = (Column('return, of the maximum', 'return'), Column('failures, %', 'failure_share', 100.0),
           Column('clearance, m', 'clearance'), Column('computing a step, ms', 'solve_ms'))


def rows(plan: Plan, out: Path) -> list[dict]:
    """A row a trial. FileNotFoundError names the models that are missing."""
    variants = plan.variants or (VARIANTS if plan.budget.name != 'smoke' else ('mpc_only',))
    missing = [v for v in variants if v != 'mpc_only' and not (MODELS / v).exists()]
    if missing:
        raise FileNotFoundError(f'no models {", ".join(missing)} in {MODELS}: train them with `deqmpc train '
                                f'crazyflie_obs --policy VARIANT`, or name others with --variants')
    return [row for variant in variants for row in trials(variant, plan, out)]


def trials(variant: str, plan: Plan, out: Path) -> list[dict]:
    """The trials of a variant, flown unless they were."""
    settings = {} if variant == 'mpc_only' else {'model': str((MODELS / variant).resolve())}
    known = hashlib.sha256((MODELS / variant / model.SETTINGS).read_bytes() if settings else b'').hexdigest()[:8]
    result = out / f'{variant}-{known}-{plan.seeds}.json'
    if not result.exists():
        result.write_text(json.dumps({'commit': commit(), **fly(variant, settings, plan, out)}, indent=1))
    found = json.loads(result.read_text())
    return [{'task': 'crazyflie_obs', 'variant': variant, 'x': '', 'seed': seed, 'return': t['normalised_return'],
             'failure_share': float(t['failure'] is not None), 'clearance': t['min_clearance'],
             'solve_ms': t['solve_ms_p50'], 'commit': found['commit']} for seed, t in enumerate(found['trials'])]


def fly(variant: str, settings: dict, plan: Plan, out: Path) -> dict:
    """What `deqmpc trial` finds. ValueError with its last words where a trial did not end."""
    folder = Path(tempfile.mkdtemp(prefix=f'{variant}-', dir=out))
    (folder / 'policy.yaml').write_text(yaml.safe_dump(settings))
    policy = [f'policy_file:={folder / "policy.yaml"}', 'policy:=deq_mpc'] if settings else ['policy:=mpc_only']
    done = subprocess.run([sys.executable, '-m', 'deqmpc.cli', 'trial', 'sim', '--in-process', '--json', '--seeds',
                           f'0:{plan.seeds}', '--jobs', str(plan.processes), f'run_dir:={folder}', *policy],
                          capture_output=True, text=True)
    found = json.loads(done.stdout or '{}')
    if len(found.get('trials', ())) != plan.seeds:
        raise ValueError(f'{variant}: {len(found.get("trials", ()))} of {plan.seeds} trials ended; see {folder}: '
                         f'{done.stderr.strip()[-500:]}')
    return found


def draw(figure, results: Results):
    """Returns and failures."""
    bars(figure, results, metrics=('return', 'failure_share'))


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    known, made = results.unique('variant'), []
    fails = {v: results.mean('failure_share', variant=v) for v in known}
    if (ours := 'deq_mpc_deq') in known:
        made.append(Check(f'{ours} fails in {100 * fails[ours]:.1f} % of the trials; 0', fails[ours] == 0.0))
        made += [Check(f'{ours} fails no more often than {v} ({100 * fails[v]:.1f} %)', fails[ours] <= fails[v])
                 for v in known if v != ours]
    for a, b in itertools.product(('deq_mpc_deq', 'deq_mpc_nn'), ('diff_mpc_deq', 'diff_mpc_nn')):
        if {a, b} <= set(known):
            gap = results.gap('return', a, b)
            made.append(Check(f'return, {a} minus {b}: {gap:.3f}, >= 0', gap >= 0))
    return made
