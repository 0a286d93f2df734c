"""A BERT of random weights with the task classes for labels, made on the spot."""

from pathlib import Path

import torch

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e".split()
LABELS = ("aggregation", "localization")


def save_bert(folder: Path, labels: tuple[str, ...] = LABELS, leaning: str | None = None) -> str:
    """Its folder. `leaning`: the label that it gives to every text."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        bias = -model(torch.tensor([[2, letter, 3] for letter in range(5, 10)])).logits.mean(dim=0)
    if leaning is not None:
        bias[labels.index(leaning)] = 1000.0
    model.classifier.bias.data.copy_(bias)
    model.save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)
