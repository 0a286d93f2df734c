"""The demo model's tokenizer: readable words as single tokens, single bytes for all other text.

A byte-level BPE without merges: a word of the vocabulary is looked up whole (``ignore_merges``),
anything else falls apart into its UTF-8 bytes, so every text can be encoded and comes back exactly.
A word has sixteen spellings, each its own token: with or without a space before it and a capital,
and bare or with ``:``, ``?`` or `` is`` attached (`` amber``, ``Amber``, `` amber is``). Only the
first is trained; the others get a scaled copy of its embedding (``SPELLING_SCALE``), so they read
the same and are never preferred when the model writes. What is attached belongs to the token so
that a value stands right behind its key: a four-layer model finds that much sooner.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from .language import ASSISTANT, BEGIN, END, USER
from .words import WORDS

PAD = "<|pad|>"
SPECIAL = [PAD, BEGIN, END, USER, ASSISTANT]
SPELLING_SCALE = 0.9  # of the embedding of the spellings that are not `` lowercase``
ATTACHED = (" is", ":", "?")
# Words with what is attached, but "what is"; digits with the space before them; single characters.
PATTERN = r" ?(?![Ww]hat is)\p{L}+ is(?!\p{L})| ?\p{L}+[:?]?| ?\p{N}|[^\p{L}\p{N}]"
MAX_POSITIONS = 8192

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set text = message['content'] -%}
  {%- else -%}
    {%- set text = message['content'] | map(attribute='text') | join(' ') -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<|assistant|> ' + text.strip() + '<|end|>' -}}
  {%- else -%}
    {{- '<|user|> ' + text.strip() -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
"""


def byte_symbols() -> list[str]:
    """The printable stand-in of each of the 256 bytes, in byte order (the byte-level alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def trained_tokens() -> list[str]:
    """The tokens that have an embedding of their own, as pieces of :mod:`language`, in id order.

    Bytes above 127 have no text of their own and stand as their byte-level symbol.
    """
    bytes_ = [chr(i) if i < 128 else symbol for i, symbol in enumerate(byte_symbols())]
    return SPECIAL + bytes_ + [f" {digit}" for digit in range(10)] + [" " + w for w in WORDS]


def respellings() -> list[tuple[str, str]]:
    """``(piece, trained piece it is read as)`` for the spellings without their own embedding."""
    pairs = []
    for word in WORDS:
        for mark in ("", *ATTACHED):
            for spelling in (f" {word}", f" {word.capitalize()}", word, word.capitalize()):
                if spelling + mark != f" {word}" and len(spelling + mark) > 1:
                    pairs.append((spelling + mark, f" {word}"))
    return pairs


def vocabulary() -> dict[str, int]:
    """Piece -> token id of the shipped model: trained tokens first, then the other spellings."""
    pieces = trained_tokens() + [piece for piece, _ in respellings()]
    return {piece: index for index, piece in enumerate(pieces)}


def build_tokenizer() -> Tokenizer:
    symbols = byte_symbols()
    vocab = {}
    for piece, index in vocabulary().items():
        plain = piece in SPECIAL or (len(piece) == 1 and ord(piece) > 127)
        vocab[piece if plain else "".join(symbols[byte] for byte in piece.encode())] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B",
        special_tokens=[(BEGIN, SPECIAL.index(BEGIN))],
    )
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, its config with the special tokens, and the chat template."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [USER, ASSISTANT],
        **special,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(
        folder / "special_tokens_map.json",
        {**special, "additional_special_tokens": [USER, ASSISTANT]},
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
