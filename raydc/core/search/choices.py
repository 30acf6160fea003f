"""How a k-means may start: the choices' names, for settings that load no torch."""

from typing import Literal

Start = Literal["auto", "tree", "restarts"]
"""tree: Ward's tree of fine leaves, cut. restarts: the best of some FAISS runs. auto: tree from 50 leaves on."""

Moves = Literal["auto", "separated", "all", "none"]
"""Which merge-and-split moves follow the start: those that split a leaf in two parts apart from each other, all that
lower the squared error, or none. auto: separated after a tree's start, none after restarts."""
