"""A net whose parameters no number of processes divides."""

from torch import nn


class Net(nn.Module):
    """Odd widths: 7 and 10 rows over 2 or 3 ranks leave uneven shards, 1 row empty ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.mlp = nn.Sequential(nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 7))
        self.last = nn.Linear(7, 1)

    def forward(self, x):
        return self.last(self.mlp(self.first(x))).squeeze(-1)
