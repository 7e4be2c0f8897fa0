"""What pyproject.toml cannot say beside a search for packages: `configs/` enters the wheel as `tokmat_jax.configs`."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["tokmat_jax*"]), "tokmat_jax.configs"],
    package_dir={"tokmat_jax.configs": "configs"},
)
