"""How a k-means may start: the choices' names, for settings that load no torch."""

from typing import Literal

Start = Literal["auto", "tree", "restarts"]
"""tree: Ward's tree of fine leaves, cut. restarts: the best of some FAISS runs. auto: tree from 50 leaves on."""

Moves = Literal["auto", "merge_split", "none"]
"""Whether merge-and-split moves follow the start; auto: where it is a tree's."""
