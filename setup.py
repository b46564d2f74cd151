"""Two packages from two folders; everything else about the project stands in pyproject.toml.

`kernels/` is a container without `__init__.py`: Hugging Face publishes a package named `kernels`,
which a package of that name at the root of the repository would shadow.
"""

from setuptools import setup

setup(
    packages=["distilfast", "distilfast.recipes", "distilfast_kernels"],
    package_dir={
        "distilfast": "distilfast",
        "distilfast.recipes": "configs",
        "distilfast_kernels": "kernels/distilfast_kernels",
    },
    package_data={
        "distilfast": ["py.typed", "*.j2"],
        "distilfast.recipes": ["*.yaml"],
        "distilfast_kernels": ["py.typed"],
    },
)
