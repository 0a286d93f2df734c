"""Takes the place of `FLASH_ATTN`, under its name."""

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_kvcompress.engine.device import HeadPathBuilder, HeadPathImpl
from vllm_kvcompress.engine.per_head import PerHeadBackend


class PerHeadFlashBuilder(HeadPathBuilder, FlashAttentionMetadataBuilder):
    pass


class PerHeadFlashImpl(HeadPathImpl, FlashAttentionImpl):
    pass


class PerHeadFlashBackend(PerHeadBackend, FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return PerHeadFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return PerHeadFlashBuilder
