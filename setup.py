"""Which folders of the repository become which packages; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# Top-level folders that install inside the package: a top-level module named `kernels`
# would shadow the one that transformers imports.
INSIDE = {"benchmarks": "bench", "configs": "configs", "kernels": "kernels"}

packages = find_packages(include=["vllm_kvcompress", "vllm_kvcompress.*"])
package_dir = {"vllm_kvcompress": "vllm_kvcompress"}
for folder, name in INSIDE.items():
    if Path(folder).is_dir():
        inside = f"vllm_kvcompress.{name}"
        package_dir[inside] = folder
        packages += [inside, *(f"{inside}.{sub}" for sub in find_packages(folder))]

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "vllm_kvcompress": ["demo_model/*"],
        "vllm_kvcompress.bench.peers": ["*.lock"],
        "vllm_kvcompress.bench.report": ["*.jinja"],
        "vllm_kvcompress.configs": ["*.yaml"],
        "vllm_kvcompress.policy": ["*.json"],
    },
)
