"""Small texts for the training examples."""

import numpy as np


def write_text(folder, files=8, words=400):
    """Write text files into a folder, each with words of its own; return the folder's path."""
    rng = np.random.default_rng(0)
    for index in range(files):
        # Each file prefers words of its own, so that the source ranks differ.
        vocabulary = ["def", "return", "self", *(f"word{chr(97 + index)}{i}" for i in range(5))]
        (folder / f"{index}.txt").write_text(" ".join(rng.choice(vocabulary, words)))
    return str(folder)
