"""An event sink that remembers."""

from kmsfs.events import Event


class Recorder:
    """EventSink: keeps every event, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        """Keep `event`."""
        self.events.append(event)

    def of(self, *kinds: type[Event]) -> list[Event]:
        """Those of some kinds."""
        return [event for event in self.events if isinstance(event, kinds)]
