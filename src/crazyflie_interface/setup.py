from setuptools import find_packages, setup

package_name = 'crazyflie_interface'

setup(
    name=package_name,
    version='0.1.0',
    description='Plan to Crazyradio over cflib: arming, take-off, setpoint guard, landing.',
    license='GPL-3.0-or-later',
    maintainer='DEQ-MPC flight stack maintainers',
    maintainer_email='maintainers@users.noreply.github.com',
    packages=find_packages(exclude=['test']),
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/' + package_name]),
        ('share/' + package_name, ['package.xml']),
    ],
    install_requires=['numpy', 'cflib', 'pyusb'],
    extras_require={'test': ['pytest']},
    entry_points={
        'console_scripts': [
            'crazyflie_interface_node = crazyflie_interface.node:main',
            'crazyswarm2_interface_node = crazyflie_interface.crazyswarm2:main',
        ],
    },
    zip_safe=True,
)
