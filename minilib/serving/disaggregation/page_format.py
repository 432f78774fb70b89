"""What two workers must agree on before a page moves: whose pages they are, and what a page is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.model.decoder import Decoder
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.tiers import fingerprint


class PagesRefused(ValueError):
    """The pages of one worker are of no use to the other; the message says in what they differ."""


@dataclass(frozen=True)
class PageFormat:
    """Whose pages, and what they look like.

    Args:
        model: fingerprint of the configuration and the weights, as `fingerprint` has it.
        dtype: of keys and values.
        page_size: tokens in a page.
        num_layers, num_kv_heads, head_dim: of the model.
    """

    model: str
    dtype: str
    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: Decoder, cache: PagedCache) -> PageFormat:
        """Of a model's cache. Cost: every weight is read once."""
        config, dtype = cache.config, str(cache.k.dtype)
        shape = cache.page_size, config.num_layers, config.num_kv_heads, config.head_dim
        return cls(fingerprint(model), dtype, *shape)

    def check(self, other: dict, name: str) -> None:
        """Refuse pages in another format.

        Args:
            other: `to_dict` of the other worker.
            name: of the other worker.

        Raises:
            PagesRefused: naming all that differs.
        """
        names = [field.name for field in fields(self)]
        differ = [key for key in names if other.get(key) != getattr(self, key)]
        if differ:
            what = ", ".join(f"{key} is {other.get(key)!r} there and {getattr(self, key)!r} here" for key in differ)
            raise PagesRefused(f"pages of {name} are refused: {what}; give both workers the same model and page_size")

    def to_dict(self) -> dict:
        """As JSON values."""
        return asdict(self)


def pages_to_move(num_prompt_tokens: int, page_size: int) -> int:
    """Pages of all tokens of a prompt but its last, which the decode worker computes for the logits behind it."""
    return ceil_div(num_prompt_tokens - 1, page_size)
