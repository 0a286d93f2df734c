"""LongBench's files, from a folder or the Hugging Face hub, opened by `datasets`."""

import logging
from pathlib import Path
from typing import Any

INSIDE_ARCHIVE = "data/{}.jsonl"


def load_longbench(name: str, folder: Path | None) -> Any:
    """A subset as a `datasets.Dataset`.

    Raises:
        ValueError: in one line, when it cannot be had.
    """
    inside = INSIDE_ARCHIVE.format(name)
    if folder is not None:
        for path in (folder / f"{name}.jsonl", folder / inside):
            if path.is_file():
                return _load(str(path))
        if not (folder / "data.zip").is_file():
            raise ValueError(f"{folder} has neither {name}.jsonl nor data.zip")
    archive = folder / "data.zip" if folder else _fetched("THUDM/LongBench", "data.zip")
    return _load(f"zip://{inside}::{archive}")


def load_longbench_v2(folder: Path | None) -> Any:
    """All of LongBench-v2, as `load_longbench`."""
    if folder is None:
        return _load(str(_fetched("THUDM/LongBench-v2", "data.json")))
    for path in (folder / "data.json", folder / "data.jsonl"):
        if path.is_file():
            return _load(str(path))
    raise ValueError(f"{folder} has neither data.json nor data.jsonl")


def _fetched(repository: str, file: str) -> Path:
    """A file of a data set, from the hub's cache when it was fetched before."""
    import huggingface_hub

    said = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, repo_type="dataset"))
    except OSError:
        raise ValueError(
            f"cannot fetch {file} of {repository} from the Hugging Face hub: "
            "without a network, name the folder it lies in with --longbench-path"
        ) from None
    finally:
        huggingface_hub.logging.set_verbosity(said)


def _load(file: str) -> Any:
    """JSON lines, or one JSON list."""
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # the error below says it
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("json", data_files=file, split="train")
    except StopIteration:
        raise ValueError(f"cannot read {file}: it holds no record") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"cannot read {file}: {reason}") from None
