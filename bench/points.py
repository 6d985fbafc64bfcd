"""What is measured: the points of the grid and how their work is counted."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
DIRECTIONS = ("forward", "backward")
MASKS = ("causal", "full")


@dataclass(frozen=True)
class Point:
    """One measurement: q, k, v of shape (batch, heads, length, head_dim), forward or backward."""

    dtype: str
    direction: str
    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.length, self.head_dim

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def flops(self) -> float:
        """The usual count: two matrix products forward, five backward; a causal mask leaves half of each."""
        forward = 4 * self.batch * self.heads * self.length**2 * self.head_dim
        return forward * (0.5 if self.causal else 1.0) * (2.5 if self.direction == "backward" else 1.0)

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.dtype} {self.mask} {self.direction}, batch {self.batch}, heads {self.heads}, length {self.length:,}, head dim {self.head_dim}"


def grid(
    dtypes: Iterable[str],
    head_dims: Iterable[int] = HEAD_DIMS,
    lengths: Iterable[int] = LENGTHS,
    directions: Iterable[str] = DIRECTIONS,
    masks: Iterable[str] = MASKS,
    *,
    tokens: int,
    width: int,
) -> Iterator[Point]:
    """Points of the same number of tokens (batch × length) and the same width (heads × head_dim), so that inputs have one size throughout."""
    for dtype, head_dim, length, mask, direction in product(dtypes, head_dims, lengths, masks, directions):
        yield Point(dtype, direction, max(1, tokens // length), max(1, width // head_dim), length, head_dim, mask == "causal")
