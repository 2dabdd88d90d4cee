from setuptools import find_packages, setup

package_name = 'sim_env'

setup(
    name=package_name,
    version='0.1.0',
    description='Simulated Crazyflie and OptiTrack that speak the real wire protocols; virtual obstacles.',
    license='Apache-2.0',
    maintainer='DEQ-MPC flight stack maintainers',
    maintainer_email='maintainers@users.noreply.github.com',
    packages=find_packages(exclude=['test']),
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/' + package_name]),
        ('share/' + package_name, ['package.xml']),
    ],
    install_requires=['numpy', 'pyyaml', 'rosbags>=0.11'],
    extras_require={'test': ['pytest', 'cflib', 'natnet', 'NatNetClient']},
    entry_points={
        'console_scripts': [
            'sim_node = sim_env.sim_node:main',
            'obstacle_node = sim_env.obstacle_node:main',
            'stream_node = sim_env.stream_node:main',
        ],
        'deqmpc.commands': [
            'compare-flights = sim_env.flight_comparison:main',
        ],
    },
    zip_safe=True,
)
