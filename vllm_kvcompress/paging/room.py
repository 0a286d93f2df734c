"""Memory of the workers that requests share, as the scheduler counts it."""


class Room:
    """Tokens that requests occupy for some steps; who finds no room waits.

    capacity_tokens: all that may be occupied at once; what one request needs must fit in it.
    """

    def __init__(self, capacity_tokens: int = 0) -> None:
        self.capacity_tokens = capacity_tokens
        self._occupied: dict[str, int] = {}
        self._leaving: list[str] = []

    @property
    def occupied_tokens(self) -> int:
        return sum(self._occupied.values())

    def fits(self, request_id: str, tokens: int) -> bool:
        """Whether the request is in, or may come in."""
        if request_id in self._occupied:
            return True
        return self.occupied_tokens + tokens <= self.capacity_tokens

    def enter(self, request_id: str, tokens: int) -> None:
        self._occupied[request_id] = tokens

    def leave_after_step(self, request_id: str) -> None:
        """The step being scheduled is the last that needs the request's tokens."""
        self._leaving.append(request_id)

    def new_step_starts(self) -> None:
        for request_id in self._leaving:
            self._occupied.pop(request_id, None)
        self._leaving.clear()

    def leave(self, request_id: str) -> None:
        """The request was preempted or has ended: the next step begins by dropping its tokens."""
        self._occupied.pop(request_id, None)
        if request_id in self._leaving:
            self._leaving.remove(request_id)

    def check_integrity(self) -> None:
        """Raise unless all fit.

        Raises:
            RuntimeError: with both numbers.
        """
        if self.occupied_tokens > self.capacity_tokens:
            raise RuntimeError(
                f"{self.occupied_tokens} tokens occupy room for {self.capacity_tokens}"
            )
