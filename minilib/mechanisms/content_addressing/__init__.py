"""Content addressing: blocks named by what they hold and by what comes before them, and two indexes over them."""

from minilib.mechanisms.content_addressing.chain import ORIGIN, Block, HashChain, Root, block_key
from minilib.mechanisms.content_addressing.index import Match, PrefixIndex
from minilib.mechanisms.content_addressing.radix import Place, RadixTree, Run

__all__ = ["ORIGIN", "Block", "HashChain", "Match", "Place", "PrefixIndex", "RadixTree", "Root", "Run", "block_key"]
