from setuptools import find_packages, setup

package_name = 'flight_log'

setup(
    name=package_name,
    version='0.1.0',
    description='Recorder, bag replay, trial protocol, evaluation and report.',
    license='Apache-2.0',
    maintainer='DEQ-MPC flight stack maintainers',
    maintainer_email='maintainers@users.noreply.github.com',
    packages=find_packages(exclude=['test']),
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/' + package_name]),
        ('share/' + package_name, ['package.xml']),
    ],
    package_data={'flight_log': ['web/*']},
    install_requires=['numpy', 'pyyaml', 'rosbags>=0.11', 'mcap>=1.6', 'lz4', 'matplotlib', 'tqdm', 'plotly>=6'],
    extras_require={'test': ['pytest'], 'table': ['pyarrow'], 'view': ['rerun-sdk~=0.41.0']},
    entry_points={
        'console_scripts': [
            'recorder_node = flight_log.recorder_node:main',
            'replay_node = flight_log.replay_node:main',
            'trial_node = flight_log.trial_node:main',
            'visual_node = flight_log.visual_node:main',
        ],
        'deqmpc.commands': [
            'evaluate = flight_log.evaluate:main',
            'import-flight = flight_log.importer:main',
            'recover = flight_log.evaluate:recover_main',
            'view = flight_log.view:main',
        ],
        'deqmpc.recordings': [
            'bag = flight_log.episodes:read',
        ],
    },
    zip_safe=True,
)
