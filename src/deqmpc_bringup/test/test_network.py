"""Where DDS may be heard, and who may do what on the lab network."""

import fnmatch
import xml.etree.ElementTree as ElementTree

import pytest

from deqmpc import interface
from deqmpc_bringup.composition import environment, share_dir
from deqmpc_bringup.network import ENCLAVE, ENCLAVE_FILES, network_environment

CONFIG = share_dir() / 'config'


@pytest.fixture
def keystore(tmp_path):
    folder = tmp_path / 'keystore' / 'enclaves' / ENCLAVE.strip('/')
    folder.mkdir(parents=True)
    for name in ENCLAVE_FILES:
        (folder / name).touch()
    return tmp_path / 'keystore'


def profile(path):
    """Transport ids, whitelisted addresses and peers of a Fast DDS profile file."""
    root = ElementTree.parse(path).getroot()
    def texts(tag):
        return [e.text.strip() for e in root.iter() if e.tag.split('}')[-1] == tag and e.text]
    return {tag: texts(tag) for tag in ('type', 'useBuiltinTransports', 'address')}


def test_without_a_word_from_the_user_dds_is_bound_to_loopback():
    env = environment({})
    assert env['ROS_AUTOMATIC_DISCOVERY_RANGE'] == 'SYSTEM_DEFAULT'
    assert 'ROS_SECURITY_ENABLE' not in env
    assert profile(env['FASTDDS_DEFAULT_PROFILES_FILE']) == {
        'type': ['UDPv4'], 'useBuiltinTransports': ['false'], 'address': ['127.0.0.1', '127.0.0.1']}


def test_on_the_lab_network_security_is_enforced_and_the_transport_open(keystore):
    env = network_environment({'DEQMPC_NETWORK': 'lab', 'ROS_SECURITY_KEYSTORE': str(keystore)}, CONFIG)
    assert env['ROS_SECURITY_ENABLE'] == 'true' and env['ROS_SECURITY_STRATEGY'] == 'Enforce'
    assert env['ROS_SECURITY_ENCLAVE_OVERRIDE'] == ENCLAVE
    assert profile(env['FASTDDS_DEFAULT_PROFILES_FILE']) == {
        'type': ['UDPv4'], 'useBuiltinTransports': ['false'], 'address': []}


@pytest.mark.parametrize(('changes', 'message'), [
    ({'ROS_SECURITY_KEYSTORE': ''}, 'needs ROS_SECURITY_KEYSTORE'),
    ({'ROS_SECURITY_KEYSTORE': '/nowhere'}, 'lacks cert.pem'),
    ({'ROS_SECURITY_ENCLAVE_OVERRIDE': '/other'}, 'enclave /other'),
    ({'ROS_SECURITY_ENABLE': 'false'}, 'ROS_SECURITY_ENABLE=false; expected true'),
    ({'ROS_SECURITY_STRATEGY': 'Permissive'}, 'ROS_SECURITY_STRATEGY=Permissive; expected Enforce'),
    ({'DEQMPC_NETWORK': 'wifi'}, 'DEQMPC_NETWORK=wifi; expected one of loopback, lab')])
def test_the_lab_network_is_refused_without_security(keystore, changes, message):
    base = {'DEQMPC_NETWORK': 'lab', 'ROS_SECURITY_KEYSTORE': str(keystore)}
    with pytest.raises(ValueError, match='.*') as error:
        network_environment({**base, **changes}, CONFIG)
    assert message in str(error.value)


def test_a_refused_network_ends_the_start_with_its_reason():
    with pytest.raises(ValueError, match='needs ROS_SECURITY_KEYSTORE'):
        environment({'DEQMPC_NETWORK': 'lab'})


def test_what_the_user_has_set_stays():
    env = environment({'FASTDDS_DEFAULT_PROFILES_FILE': '/mine.xml', 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'SUBNET'})
    assert env['FASTDDS_DEFAULT_PROFILES_FILE'] == '/mine.xml' and env['ROS_AUTOMATIC_DISCOVERY_RANGE'] == 'SUBNET'


# --- config/security/policy.xml ---------------------------------------------------------------------

def allowed(role, kind, qualifier):
    """Names that `role` may `qualifier` (publish, subscribe, request, reply), as patterns from the root."""
    root = ElementTree.parse(CONFIG / 'security' / 'policy.xml').getroot()
    enclave = next(e for e in root.iter('enclave') if e.get('path') == f'/deqmpc/{role}')
    return ['/' + e.text for group in enclave.iter(f'{kind}s') if group.get(qualifier) == 'ALLOW' for e in group]


def may(role, kind, qualifier, name):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed(role, kind, qualifier))


TOPICS = sorted({t.resolve('cf1') for t in (*interface.RECORDED, *interface.VISUAL)})


@pytest.mark.parametrize('topic', TOPICS)
def test_everybody_sees_every_topic_and_only_the_flight_computer_publishes_those_that_fly(topic):
    for role in ('flight', 'operator', 'viewer'):
        assert may(role, 'topic', 'subscribe', topic)
    assert may('flight', 'topic', 'publish', topic)
    assert may('operator', 'topic', 'publish', topic) == (topic == '/cf1/go_to')
    assert not may('viewer', 'topic', 'publish', topic)


@pytest.mark.parametrize('service', sorted(interface.SERVICES))
def test_only_operator_and_flight_computer_may_ask_for_a_service_and_only_the_latter_answers(service):
    name = f'/cf2/{service}'
    assert may('flight', 'service', 'request', name) and may('flight', 'service', 'reply', name)
    assert may('operator', 'service', 'request', name) and not may('operator', 'service', 'reply', name)
    assert not may('viewer', 'service', 'request', name)


def test_nobody_but_the_flight_computer_may_set_parameters():
    assert may('flight', 'service', 'request', '/cf1/policy/set_parameters')
    for role in ('operator', 'viewer'):
        assert not may(role, 'service', 'request', '/cf1/policy/set_parameters')
