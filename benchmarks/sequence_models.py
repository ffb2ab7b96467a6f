"""Networks for sequences, and one for clicks: a transformer, an LSTM, GPT-2 and a recommender.

Written for the benchmarks in plain torch, with torch's own initialisation where nothing else is
said, and without dropout, so that every way to train one computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RowTransformer(nn.Module):
    """MNIST's digits, each as a sequence of its 28 rows."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(28, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 28, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2)) + self.positions
        return self.head(self.encoder(x).mean(1))


class RowLstm(nn.Module):
    """MNIST's digits, each as a sequence of its 28 rows."""

    def __init__(self, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        self.rnn = nn.LSTM(28, width, depth, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.flatten(1, 2))[0][:, -1])


# ---- GPT-2 (Radford et al. 2019) ----


class GptBlock(nn.Module):
    """Causal attention and an MLP, each with its norm in front and a shortcut beside it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """The words' embedding is the output layer's weight as well."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(GptBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.words, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        positions = self.positions.weight[: words.shape[1]]
        x = self.norm(self.blocks(self.words(words) + positions))
        return F.linear(x, self.words.weight)


# ---- recommender (in the manner of DLRM, Naumov et al. 2019) ----


class Recommender(nn.Module):
    """Tables of embeddings, a few rows of each added up, and dense layers before and after."""

    def __init__(self, tables: int, entries: int, width: int, dense: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(entries, width, mode="sum") for _ in range(tables)
        )
        self.bottom = nn.Sequential(nn.Linear(dense, 128), nn.ReLU(), nn.Linear(128, width))
        self.top = nn.Sequential(
            nn.Linear((tables + 1) * width, 256), nn.ReLU(),
            nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1),
        )  # fmt: skip
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, dense: Tensor, indices: Tensor) -> Tensor:
        found = [table(indices[:, i]) for i, table in enumerate(self.tables)]
        return self.top(torch.cat([self.bottom(dense), *found], 1)).squeeze(1)
