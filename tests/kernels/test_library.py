"""The CUDA library is built once, by whoever comes first, into a folder of the user's own."""

import ctypes
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from typer.testing import CliRunner

from vllm_kvcompress.cli import app
from vllm_kvcompress.kernels import library
from vllm_kvcompress.kernels.library import CannotBuild, build, cuda_library, find

NVCC = shutil.which("nvcc")
FAKE = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
  --list-gpu-code) echo sm_80; echo sm_90 ;;
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  *) {then}
     while [ "$1" != -o ]; do shift; done
     echo made > "$2" ;;
esac
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Stands for nvcc and a user's cache; returns what nvcc was asked to compile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "IN_PACKAGE", tmp_path / "in the package")
    log = tmp_path / "log"
    put_nvcc(tmp_path, monkeypatch, "sleep 0.1")
    return lambda: [line for line in log.read_text().splitlines() if " -c " in line]


def put_nvcc(tmp_path, monkeypatch, then):
    script = tmp_path / "nvcc"
    script.write_text(FAKE.format(log=tmp_path / "log", then=then))
    script.chmod(0o700)
    monkeypatch.setattr(library, "find_nvcc", lambda: str(script))


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cuda_library.cache_clear()
    yield
    cuda_library.cache_clear()


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_nvcc_builds_for_a_gpu_that_is_not_here(tmp_path):
    made = build("sm_90", tmp_path, ("pages/compact.cu",))
    assert ctypes.CDLL(str(made)).kvc_compact
    assert {path.suffix for path in tmp_path.iterdir()} == {".so", ".lock"}
    with pytest.raises(CannotBuild, match=r"sm_90.* not for 'sm_12'"):
        build("sm_12", tmp_path)


def test_all_who_start_at_once_get_one_library(calls):
    with ThreadPoolExecutor(4) as ranks:
        (made,) = set(ranks.map(build, ["sm_90"] * 4))
    assert len(calls()) == len(library.SOURCES)
    assert made.parent.stat().st_mode & 0o777 == 0o700
    assert find("sm_90") == made and find("sm_80") is None


def test_the_library_of_this_gpu_is_built_where_none_is_and_found_without_nvcc(
    calls, a_gpu, monkeypatch
):
    made = cuda_library()
    assert made.name.endswith("-sm_90-cuda13.0.88.so")
    cuda_library.cache_clear()
    monkeypatch.setattr(library, "find_nvcc", lambda: None)
    assert cuda_library() == made


def test_a_library_of_other_sources_is_not_taken(calls, monkeypatch):
    build("sm_90")
    monkeypatch.setattr(library, "_digest", lambda sources=None: "0" * 16)
    assert find("sm_90") is None


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_folder_that_is_open_to_others_is_refused(calls, tmp_path, mode):
    (tmp_path / "cache/vllm-kvcompress").mkdir(parents=True)
    (tmp_path / "cache/vllm-kvcompress").chmod(mode)
    for use in (build, find):
        with pytest.raises(CannotBuild, match="this user's with mode 0700"):
            use("sm_90")


def test_an_images_library_is_taken_whatever_the_users_folder_is(calls, tmp_path):
    made = build("sm_90", library.IN_PACKAGE)
    (tmp_path / "cache").write_text("no folder can be made here")
    assert find("sm_90") == made
    with pytest.raises(CannotBuild, match="cannot be made"):
        find("sm_80")


def test_a_link_to_a_folder_is_refused(calls, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache/vllm-kvcompress").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CannotBuild, match="this user's with mode 0700"):
        build("sm_90")


def test_a_failed_build_says_why_in_one_line_and_leaves_nothing(
    calls, a_gpu, tmp_path, monkeypatch, caplog
):
    put_nvcc(tmp_path, monkeypatch, "echo 'no host compiler' >&2; exit 1")
    with caplog.at_level(logging.WARNING):
        assert cuda_library() is None and cuda_library() is None
    (line,) = caplog.messages
    assert "no host compiler" in line and "\n" not in line
    assert not list((tmp_path / "cache/vllm-kvcompress").glob("*.so"))


def test_without_nvcc_there_is_none_and_one_line_says_so(calls, a_gpu, monkeypatch, caplog):
    monkeypatch.setattr(library, "find_nvcc", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert cuda_library() is None and cuda_library() is None
    (line,) = caplog.messages
    assert "there is no nvcc" in line


def test_without_a_gpu_there_is_none_and_nothing_is_said(calls, caplog):
    cuda_library.cache_clear()
    assert cuda_library() is None and not caplog.messages


def command(*arguments):
    return CliRunner().invoke(app, ["build-cuda", *arguments], env={"COLUMNS": "160"})


def test_images_are_built_with_a_library_for_all_their_users(calls, a_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "IN_PACKAGE", tmp_path / "csrc/built")
    ran = command("--in-package", "--arch", "sm_80", "--arch", "sm_90")
    assert ran.exit_code == 0 and len(calls()) == 2 * len(library.SOURCES)
    assert str(cuda_library()) in ran.output and cuda_library().parent == tmp_path / "csrc/built"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 1, "no NVIDIA GPU here: name one with --arch"),
        (["--arch", "sm_70"], 1, "builds for sm_80, sm_90, not for 'sm_70'"),
        (["--arch", "sm_90;ls"], 2, "such as sm_90"),
        (["--arch", "sm_90"] * 17, 2, "at most 16"),
    ],
)
def test_a_build_that_cannot_be_says_why(calls, arguments, code, says):
    ran = command(*arguments)
    assert ran.exit_code == code and says in ran.output
    assert "Traceback" not in ran.output
