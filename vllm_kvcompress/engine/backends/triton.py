"""Takes the place of `TRITON_ATTN`, under its name."""

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_kvcompress.engine.device import HeadPathBuilder, HeadPathImpl
from vllm_kvcompress.engine.per_head import PerHeadBackend


class PerHeadTritonBuilder(HeadPathBuilder, TritonAttentionMetadataBuilder):
    pass


class PerHeadTritonImpl(HeadPathImpl, TritonAttentionImpl):
    pass


class PerHeadTritonBackend(PerHeadBackend, TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return PerHeadTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return PerHeadTritonBuilder
