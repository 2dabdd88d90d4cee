from setuptools import find_packages, setup

package_name = 'mocap_bridge'

setup(
    name=package_name,
    version='0.1.0',
    description='NatNet (OptiTrack) rigid body to pose and odometry.',
    license='Apache-2.0',
    maintainer='DEQ-MPC flight stack maintainers',
    maintainer_email='maintainers@users.noreply.github.com',
    packages=find_packages(exclude=['test']),
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/' + package_name]),
        ('share/' + package_name, ['package.xml']),
    ],
    install_requires=['numpy', 'natnet>=0.3,<0.4'],
    extras_require={'test': ['pytest', 'scipy', 'NatNetClient==0.8.3']},
    entry_points={
        'console_scripts': [
            'mocap_bridge_node = mocap_bridge.node:main',
        ],
    },
    zip_safe=True,
)
