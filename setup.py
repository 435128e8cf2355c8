"""Two import packages from two source roots, and the recipes; everything else is in pyproject.toml.

`kernels/` is a source root and must never become a package: Hugging Face ships a package named
`kernels` that diffusers and transformers import, and a top-level `kernels` of ours would replace it.
`recipes/` becomes data of `mapo_fast` in a wheel (`mapo_fast/settings/presets.py`).
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mapo_fast*"]), "mapo_fast.recipes", *find_packages("kernels")],
    package_dir={"mapo_fast.recipes": "recipes", "mapo_kernels": "kernels/mapo_kernels"},
    package_data={
        "mapo_fast": [
            "py.typed",
            "demo/assets/**/*",
            "demo/assets/*",
            "models/assets/*",
            "planner/plans.json",
            "planner/traces.zip",
            "studio/static/*",
        ],
        "mapo_fast.recipes": ["*.toml"],
        "mapo_kernels": ["py.typed"],
    },
)
