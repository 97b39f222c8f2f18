"""A handle of communication that was started and has to be waited for."""

from __future__ import annotations

from collections.abc import Callable

from lplb_triton.training.rows import ordinary_tensors

__all__ = ["Handle"]


class Handle:
    """Communication under way; the `Replicas` must not be used before `wait`."""

    def __init__(self, call: str, finish: Callable[[], None]) -> None:
        self.call = call
        self._finish: Callable[[], None] | None = finish

    def wait(self) -> None:
        """Finish the work; on a GPU only the current stream waits. A second call does nothing."""
        finish, self._finish = self._finish, None
        if finish is not None:
            with ordinary_tensors():
                finish()

    @property
    def done(self) -> bool:
        """Whether `wait` was called."""
        return self._finish is None

    def __repr__(self) -> str:
        """Name the call, and say whether it is finished."""
        return f"Handle({self.call}, {'done' if self.done else 'under way'})"
