"""Settings of the model and its training, and the command line made from them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

# The vocabulary starts with the 256 bytes.
BYTES = 256


Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Config:
    """Settings of one run; the command line has an option for each.

    Raises
    ------
    ValueError
        If a setting is out of range or two of them don't fit together.
    """

    steps: int = 3000
    device: str = "auto"
    experts: int = 256
    top_k: int = 8
    layers: int = 4
    hidden: int = 512
    expert_hidden: int = 256
    vocab: int = 4096
    sources: int = 32
    tokens_per_source: int = 128
    seq_len: int = 128
    router: str = "sigmoid"
    bias_rate: float = 1e-3
    aux_loss: float = 0.0
    expert_matmul: str = "auto"
    lr: float = 1e-3
    warmup: int = 100
    seed: int = 0
    time_limit: float = math.inf
    log_every: int = 50
    text: str | None = None
    text_bytes: int = 16_000_000
    record: str | None = None
    record_early: int = 50
    record_late: int = 50
    record_every: int = 1
    record_from: int = 0

    def __post_init__(self) -> None:
        """Check the settings before anything expensive starts."""
        positive = (
            "steps experts top_k layers hidden expert_hidden sources tokens_per_source seq_len "
            "log_every text_bytes record_every"
        )
        for name in positive.split():
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("warmup", "record_early", "record_late", "record_from", "seed"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("bias_rate", "aux_loss"):
            value = getattr(self, name)
            self._require(0 <= value < math.inf, name, "finite and at least 0")
        self._require(0 < self.lr < math.inf, "lr", "finite and above 0")
        self._require(self.time_limit > 0, "time_limit", "above 0 seconds")
        self._require(self.top_k <= self.experts, "top_k", f"at most experts ({self.experts})")
        # The grouped matrix product needs rows of a multiple of 16 bytes in bfloat16.
        self._require(self.hidden % 8 == 0, "hidden", "a multiple of 8")
        self._require(self.expert_hidden % 8 == 0, "expert_hidden", "a multiple of 8")
        self._require(BYTES <= self.vocab <= 65536, "vocab", f"from {BYTES} to 65536")
        self._require(
            self.tokens_per_source % self.seq_len == 0,
            "tokens_per_source",
            f"a multiple of seq_len ({self.seq_len})",
        )
        self._require(self.router in ("sigmoid", "softmax"), "router", "sigmoid or softmax")
        self._require(
            self.expert_matmul in ("auto", "grouped", "loop"),
            "expert_matmul",
            "auto, grouped or loop",
        )
        if self.record is not None:
            self._require(self.record.endswith(".npz"), "record", "a path ending in .npz")
            self._require(
                Path(self.record).parent.is_dir(), "record", "a path in an existing folder"
            )
            self._require(
                self.record_early + self.record_late >= 1,
                "record_early",
                "at least 1 unless record_late is",
            )
            self._require(
                self.record_from < self.steps, "record_from", f"below steps ({self.steps})"
            )

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


HELP = {
    "steps": "training steps at most",
    "device": "auto, cpu, cuda or cuda:N",
    "experts": "logical experts in each layer",
    "top_k": "experts per token",
    "layers": "layers",
    "hidden": "width of the model",
    "expert_hidden": "inner width of an expert",
    "vocab": "size of the vocabulary, 256 for bytes only",
    "sources": "simulated source ranks",
    "tokens_per_source": "tokens of each source rank in each batch",
    "seq_len": "length of a sequence",
    "router": "sigmoid or softmax scores",
    "bias_rate": "step of the selection bias; 0 leaves it alone",
    "aux_loss": "weight of an auxiliary balancing loss",
    "expert_matmul": "grouped (bfloat16), loop, or auto: grouped on a GPU where torch has it",
    "lr": "highest learning rate",
    "warmup": "steps of linear warm-up",
    "seed": "seed of text order, weights and batches",
    "time_limit": "stop after this many seconds, at the next progress line",
    "log_every": "steps between progress lines",
    "text": "file or folder to train on; default: the standard library's sources",
    "text_bytes": "use at most this much text",
    "record": "write the recorded batches to this .npz",
    "record_early": "batches to keep from the start",
    "record_late": "batches to keep from the end",
    "record_every": "record every so many steps",
    "record_from": "first step to record",
}


def parse_arguments(
    arguments: Sequence[str] | None = None,
    kind: type[Settings] = Config,
    help_of: dict[str, str] = HELP,
    summary: str = "",
) -> Settings:
    """Read the command line.

    Parameters
    ----------
    arguments
        Arguments, or None for those of the process.
    kind
        Dataclass of the settings, with an option for each field; one that defaults to None is a
        string.
    help_of
        One line of help for each field.
    summary
        What the program does.

    Returns
    -------
    Settings
        Checked settings. Prints a message and exits with status 2 when they are wrong.
    """
    parser = argparse.ArgumentParser(description=summary)
    for option in fields(kind):
        default = option.default
        flag = "--" + option.name.replace("_", "-")
        text = f"{help_of[option.name]} (default: {default})"
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help=help_of[option.name])
        else:
            reader = str if default is None else type(default)
            parser.add_argument(flag, type=reader, default=default, help=text)
    try:
        return kind(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))
