"""Where DDS may be heard: this machine only, or the lab network with SROS 2 (docs/security.md).

The environment variable DEQMPC_NETWORK decides, for `deqmpc fly` and `ros2 launch` alike:

    loopback   the default: UDP bound to 127.0.0.1, so that no other machine can send a setpoint or hear a topic
    lab        UDP on the network, and then only authenticated and encrypted: without a keystore nothing starts

What the user has set in the environment stays, but in `lab` nothing may switch the security off again.
"""

from __future__ import annotations

from pathlib import Path

VARIABLE = 'DEQMPC_NETWORK'
PROFILES = {'loopback': 'fastdds.xml', 'lab': 'fastdds_lab.xml'}  # network -> file in config/
ENCLAVE = '/deqmpc/flight'  # the one of config/security/policy.xml that the stack runs in
# What SROS 2 puts into the folder of an enclave.
ENCLAVE_FILES = ('cert.pem', 'key.pem', 'governance.p7s', 'permissions.p7s', 'identity_ca.cert.pem',
                 'permissions_ca.cert.pem')


def network_environment(base: dict[str, str], config: Path) -> dict[str, str]:
    """What the network asks for beside `base`; `config` is the folder of the profiles.

    Raises ValueError on an unknown network, and on the lab network without a usable keystore.
    """
    network = base.get(VARIABLE, 'loopback')
    if network not in PROFILES:
        raise ValueError(f'{VARIABLE}={network}; expected one of {", ".join(PROFILES)}')
    added = {
        # rmw_fastrtps's own LOCALHOST adds shared memory and a socket on 0.0.0.0, so discovery is left to the profile.
        'ROS_AUTOMATIC_DISCOVERY_RANGE': 'SYSTEM_DEFAULT', 'RMW_IMPLEMENTATION': 'rmw_fastrtps_cpp',
        'FASTDDS_DEFAULT_PROFILES_FILE': str(config / PROFILES[network])}
    if network == 'lab':
        added |= _security(base)
    return {name: value for name, value in added.items() if name not in base}


def _security(base: dict[str, str]) -> dict[str, str]:
    required = {'ROS_SECURITY_ENABLE': 'true', 'ROS_SECURITY_STRATEGY': 'Enforce'}
    for name, value in required.items():
        if base.get(name, value) != value:
            raise ValueError(f'{VARIABLE}=lab with {name}={base[name]}; expected {value} (docs/security.md)')
    keystore = base.get('ROS_SECURITY_KEYSTORE', '')
    if not keystore:
        raise ValueError(f'{VARIABLE}=lab needs ROS_SECURITY_KEYSTORE, the folder of an SROS 2 keystore '
                         '(docs/security.md says how to make one)')
    enclave = base.get('ROS_SECURITY_ENCLAVE_OVERRIDE', ENCLAVE)
    folder = Path(keystore) / 'enclaves' / enclave.strip('/')
    missing = [name for name in ENCLAVE_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f'{VARIABLE}=lab: enclave {enclave} of the keystore {keystore} lacks {", ".join(missing)} in '
                         f'{folder}; make it with `ros2 security create_enclave {keystore} {enclave}`')
    return {**required, 'ROS_SECURITY_ENCLAVE_OVERRIDE': ENCLAVE}
