"""What a checkpoint says about text: its tokenizer, chat templates, ends of text and sampling defaults, as a bundle keeps them.

`check` needs no transformers and comes first; `bake` lets transformers read the folder.
"""

from latentrt.export.text.bake import BakedText, EndToken, bake
from latentrt.export.text.tokenizer import check, load, source

__all__ = ["BakedText", "EndToken", "bake", "check", "load", "source"]
