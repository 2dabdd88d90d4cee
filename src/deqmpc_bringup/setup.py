from glob import glob

from setuptools import find_packages, setup

package_name = 'deqmpc_bringup'

setup(
    name=package_name,
    version='0.1.0',
    description='Composition of the nodes into flights: deqmpc fly, launch files, configuration.',
    license='Apache-2.0',
    maintainer='DEQ-MPC flight stack maintainers',
    maintainer_email='maintainers@users.noreply.github.com',
    packages=find_packages(exclude=['test']),
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/' + package_name]),
        ('share/' + package_name, ['package.xml']),
        ('share/' + package_name + '/launch', glob('../../launch/*')),
        ('share/' + package_name + '/config', glob('../../config/*.*')),
        *[('share/' + package_name + '/' + folder[6:], glob(folder + '/*.*'))
          for folder in glob('../../config/*/') + glob('../../models/*/*/')],
    ],
    install_requires=['pyyaml', 'tqdm'],
    extras_require={'test': ['pytest'], 'dask': ['distributed']},
    entry_points={
        'deqmpc.commands': [
            'emergency-stop = deqmpc_bringup.emergency_stop:main',
            'faults = deqmpc_bringup.faults_matrix:main',
            'fly = deqmpc_bringup.fly:main',
            'fuzz = deqmpc_bringup.fuzz:main',
            'preflight = deqmpc_bringup.preflight:main',
            'replay = deqmpc_bringup.replan:main',
            'stream = deqmpc_bringup.stream:main',
            'trial = deqmpc_bringup.trial:main',
        ],
    },
    zip_safe=True,
)
