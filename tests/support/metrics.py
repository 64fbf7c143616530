"""What `kmsfs status --metrics` wrote, read as Prometheus reads it."""

from dataclasses import dataclass
from typing import Self

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Exposition:
    """Metrics, with their samples.

    Attributes:
        families: by name, that of a counter without its `_total`.
    """

    families: dict[str, Metric]

    @classmethod
    def of(cls, text: str) -> Self:
        """Parse what was written."""
        return cls({family.name: family for family in text_string_to_metric_families(text)})

    @property
    def series(self) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
        """Name and labels of every sample."""
        return [
            (sample.name, tuple(sorted(sample.labels.items())))
            for family in self.families.values()
            for sample in family.samples
        ]

    def value(self, name: str, **labels: str) -> float | None:
        """Of the one series of this name that has these labels among its own; None: there is none.

        Raises:
            AssertionError: there are several.
        """
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) <= 1, f"{len(found)} series {name} with {labels}"
        return found[0] if found else None
