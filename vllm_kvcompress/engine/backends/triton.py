"""Takes the place of `TRITON_ATTN`, under its name."""

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_kvcompress.engine.device import HeadPathBackend, HeadPathBuilder, HeadPathImpl


class PerHeadTritonBuilder(HeadPathBuilder, TritonAttentionMetadataBuilder):
    pass


class PerHeadTritonImpl(HeadPathImpl, TritonAttentionImpl):
    pass


class PerHeadTritonBackend(HeadPathBackend, TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return PerHeadTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return PerHeadTritonBuilder
