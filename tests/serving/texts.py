"""A paged cache beside every sequence's keys and values in one piece: the oracle of the tests beside this file."""

import torch
from torch.nn import functional as F

from minilib.model.config import ModelConfig
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.paged_attention import PagedAttention, Work

PAGE_SIZES = [1, 2, 16, 64]
LAYERS = 2


def config(num_heads=6, num_kv_heads=2, head_dim=8):
    return ModelConfig(31, 48, 80, LAYERS, num_heads, num_kv_heads, head_dim, 512)


class Texts:
    """A paged cache, and beside it every sequence's keys and values in one piece."""

    def __init__(self, page_size, num_pages=400, shape=None, dtype=torch.float64, swap_pages=0, compiled=False):
        self.config, self.compiled = shape or config(), compiled
        dtype = torch.float32 if compiled else dtype
        self.cache = PagedCache(self.config, num_pages, page_size, swap_pages, dtype)
        self.random = torch.Generator().manual_seed(page_size)
        for tensor in (self.cache.k, self.cache.v):
            tensor.fill_(torch.nan)  # what nobody wrote must not be seen
        self.k, self.v = {}, {}

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.random, dtype=self.cache.k.dtype)

    def begin(self):
        table = self.cache.new_table()
        empty = torch.empty(LAYERS, 0, self.config.num_kv_heads, self.config.head_dim, dtype=self.cache.k.dtype)
        self.k[table] = self.v[table] = empty
        return table

    def step(self, work):
        """Append so many tokens to each table; (got, expected) of all layers, and the slots written."""
        for table, count in work:
            self.cache.copy(table.append(count))
        attention = PagedAttention(self.cache, [Work(table, count) for table, count in work], self.compiled)
        self.parts = attention.parts
        shape, total = self.config, sum(count for _, count in work)
        q = self.draw(LAYERS, total, shape.num_heads, shape.head_dim)
        k, v = self.draw(2, LAYERS, total, shape.num_kv_heads, shape.head_dim)
        got = torch.stack([attention(layer, q[layer], k[layer], v[layer]) for layer in range(LAYERS)])
        expected, first = [], 0
        for table, count in work:
            new = slice(first, first + count)
            self.k[table] = torch.cat((self.k[table], k[:, new]), 1)
            self.v[table] = torch.cat((self.v[table], v[:, new]), 1)
            expected.append(contiguous(q[:, new], self.k[table], self.v[table]))
            first += count
        exact = 1e-5 if self.compiled else 1e-9
        torch.testing.assert_close(got, torch.cat(expected, 1), rtol=exact, atol=exact)
        self.check()

    def check(self):
        """Every slot of every sequence holds its own key and value, bit by bit."""
        for table in self.k:
            for kept, tensor in ((self.k, self.cache.k), (self.v, self.cache.v)):
                if table.pool is self.cache.swap_pool:
                    tensor = self.cache.swap_k if kept is self.k else self.cache.swap_v
                for slot in range(table.length):
                    page, place = table.translate(slot)
                    assert torch.equal(tensor[:, page, :, place], kept[table][:, slot])


def contiguous(q, k, v):
    """torch's attention of the last queries over all keys, the heads of a group repeated by hand."""
    repeat = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(repeat, 2).transpose(1, 2) for x in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def scatter(texts, count=7):
    """Free pages in no order, so that tables are permuted."""
    tables = [texts.cache.new_table() for _ in range(count)]
    for round_ in range(4):
        for table in tables:
            table.append(texts.cache.page_size * (1 + round_ % 2))
    for table in tables[::2] + tables[1::2]:
        table.release()
