"""What a run costs at list prices, which are those of a usual region; yours may differ."""

from __future__ import annotations

from dataclasses import dataclass

from live.suites import Asked


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars."""

    store: str
    writing: float
    """A thousand requests that write or list."""
    reading: float
    """A thousand requests that read."""
    month: float
    """A GiB stored for a month."""
    out: float
    """A GiB that leaves the cloud."""

    def requests(self, asked: Asked) -> float:
        """For the requests alone, which is all where the client is in the bucket's region."""
        return (asked.writing * self.writing + asked.reading * self.reading) / 1000

    def outward(self, asked: Asked) -> float:
        """For bytes that leave the cloud, where the client is elsewhere."""
        return asked.down * self.out

    def left_for_a_day(self, asked: Asked) -> float:
        """For all that is sent, were it left for a day; in fact it is taken away at the end."""
        return asked.up * self.month / 30


PRICES = {
    "s3": Prices("Amazon S3, Standard", writing=0.005, reading=0.0004, month=0.023, out=0.09),
    "gs": Prices("Google Cloud Storage, Standard", writing=0.005, reading=0.0004, month=0.02, out=0.12),
}
"""As published for us-east-1 and us-central1, rounded up."""
