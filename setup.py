"""Which folders of the repository become which packages, and what is C++ in them; all else is in
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

FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-psabi"]
LINKED = ["-pthread", "-ldl"] if platform.system() == "Linux" else []


def compiled(name, bindings, folder, *flags):
    sources = map(str, sorted(Path(folder).glob("*.cpp")))
    return Extension(
        f"vllm_kvcompress.{name}",
        optional=True,
        sources=[bindings, *(source for source in sources if source != bindings)],
        depends=[str(path) for path in sorted(Path("csrc").rglob("*.[hi]*"))],
        language="c++",
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=LINKED,
    )


class BuildOptional(build_ext):
    """The C++ is optional: without a C++17 compiler everything else installs and works."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            print(f"vllm-kvcompress: the C++ parts were not built: {error}", file=sys.stderr)

    def build_extension(self, extension):
        import nanobind

        robin_map = Path(nanobind.__file__).parent / "ext/robin_map/include"
        extension.include_dirs += [nanobind.include_dir(), str(robin_map), "csrc"]
        extension.sources.append(os.path.relpath(Path(nanobind.source_dir()) / "nb_combined.cpp"))
        super().build_extension(extension)


EXTENSIONS = [
    # No fused multiply-adds: every instruction set has to give the same bytes.
    compiled(
        *("transport._codec", "csrc/bindings.cpp", "csrc/codec"),
        *("-ffp-contract=off", "-Wno-maybe-uninitialized"),
    ),
    compiled("engine._cpu", "csrc/cpu/bindings.cpp", "csrc/cpu", "-ffp-contract=fast"),
]

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
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildOptional},
)
