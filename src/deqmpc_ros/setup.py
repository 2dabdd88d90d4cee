from setuptools import find_packages, setup

package_name = 'deqmpc_ros'

setup(
    name=package_name,
    version='0.1.0',
    description='What every node of the stack shares: parameters, QoS, message types, spinning.',
    license='Apache-2.0',
    maintainer='DEQ-MPC flight stack maintainers',
    maintainer_email='maintainers@users.noreply.github.com',
    packages=find_packages(exclude=['test']),
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/' + package_name]),
        ('share/' + package_name, ['package.xml']),
    ],
    install_requires=['numpy'],
    extras_require={'test': ['pytest']},
    zip_safe=True,
)
