"""Which folders of the repository become which packages, and the codec's C++; all else is in
pyproject.toml."""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

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

# What nvcc reads on the user's machine (kernels/library.py); no Python in it.
package_dir["vllm_kvcompress.csrc"] = "csrc"
packages.append("vllm_kvcompress.csrc")
CUDA_SOURCES = ["launch.cuh", "pages/*.[ch]*", "codec/*.cu", "codec/*.cuh", "codec/*.h"]

CODEC = "vllm_kvcompress.transport._codec"


class BuildCodec(build_ext):
    """The codec is optional: without a C++17 compiler everything else installs and works."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            print(f"vllm-kvcompress: CacheGen's codec was not built: {error}", file=sys.stderr)

    def build_extension(self, extension):
        import nanobind

        robin_map = Path(nanobind.__file__).parent / "ext/robin_map/include"
        extension.include_dirs += [nanobind.include_dir(), str(robin_map), "csrc"]
        extension.sources.append(os.path.relpath(Path(nanobind.source_dir()) / "nb_combined.cpp"))
        super().build_extension(extension)


extension = Extension(
    CODEC,
    optional=True,
    sources=["csrc/bindings.cpp", *map(str, sorted(Path("csrc/codec").glob("*.cpp")))],
    depends=[str(path) for path in sorted(Path("csrc").rglob("*.[hi]*"))],
    language="c++",
    # No fused multiply-adds: every instruction set has to give the same bytes.
    extra_compile_args=[
        *("-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off"),
        *("-fno-strict-aliasing", "-Wno-psabi", "-Wno-maybe-uninitialized"),
    ],
    extra_link_args=["-pthread"] if platform.system() == "Linux" else [],
)

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "vllm_kvcompress": ["demo_model/*"],
        "vllm_kvcompress.bench.peers": ["*.lock"],
        "vllm_kvcompress.bench.report": ["*.jinja"],
        "vllm_kvcompress.configs": ["*.yaml"],
        "vllm_kvcompress.csrc": [*CUDA_SOURCES, "codec/tables.cpp"],
        "vllm_kvcompress.policy": ["*.json"],
        "vllm_kvcompress.transport": ["codebook.safetensors"],
    },
    ext_modules=[extension],
    cmdclass={"build_ext": BuildCodec},
)
