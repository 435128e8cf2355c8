"""Two import packages from two source roots; everything else is in pyproject.toml.

`kernels/` is a source root and must never become a package: Hugging Face ships a package named
`kernels` that diffusers and transformers import, and a top-level `kernels` of ours would replace it.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["mapo_fast*"]) + find_packages("kernels"),
    package_dir={"mapo_kernels": "kernels/mapo_kernels"},
    package_data={
        "mapo_fast": ["py.typed", "demo/assets/**/*", "demo/assets/*", "models/assets/*"],
        "mapo_kernels": ["py.typed"],
    },
)
