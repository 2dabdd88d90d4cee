from setuptools import find_packages, setup

package_name = 'deqmpc'

setup(
    name=package_name,
    version='0.1.0',
    description='ROS-free library of the DEQ-MPC flight stack: dynamics, problems, solvers, policies.',
    license='Apache-2.0',
    maintainer='DEQ-MPC flight stack maintainers',
    maintainer_email='maintainers@users.noreply.github.com',
    packages=find_packages(exclude=['test']),
    package_data={'deqmpc.realtime': ['solver.c', 'batch.c'], 'deqmpc.solvers': ['cone_program.c'],
                  'deqmpc.networks': ['inference.c']},
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/' + package_name]),
        ('share/' + package_name, ['package.xml']),
    ],
    install_requires=['numpy', 'torch', 'pyyaml', 'safetensors', 'tqdm', 'sympy', 'matplotlib'],
    extras_require={'test': ['pytest']},
    entry_points={
        'console_scripts': [
            'deqmpc = deqmpc.cli:main',
        ],
        'deqmpc.commands': [
            'dagger = deqmpc.training.dagger:main',
            'evaluate-policy = deqmpc.evaluation:main',
            'experts = deqmpc.experts:main',
            'reproduce = deqmpc.reproduce:main',
            'train = deqmpc.training.train:main',
            'tune = deqmpc.training.tune:main',
        ],
    },
    zip_safe=True,
)
