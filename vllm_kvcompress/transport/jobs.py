"""What the scheduler's side of the connector asks of the workers."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass
class Load:
    """Chunks to bring into a request's blocks."""

    request_id: str
    space: str
    first_chunk: int
    digests: list[str]  # from the first chunk on
    levels: list[tuple[int, ...]]  # that are stored, of each
    first_token: int  # where the blocks that vLLM found by itself end
    block_ids: list[int]  # of the whole prefix
    prompt_tokens: int
    arrived: float  # time.time()
    level: int | None
    ttft_s: float | None


@dataclass
class Save:
    """A full chunk, computed by the end of this step."""

    space: str
    digest: str
    block_ids: list[int]


@dataclass
class Compute:
    """Prompt tokens `first` to `last` (not included) that are computed in this step."""

    request_id: str
    first: int
    last: int
    prompt_tokens: int


@dataclass
class Jobs(KVConnectorMetadata):
    """One step's."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    computes: list[Compute] = field(default_factory=list)
