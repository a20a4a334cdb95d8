"""Which experts rows choose, drawn from a seed: how many rows and weights the fullest rank has, and how far a row has to go."""

import numpy as np

from latentrt.export.models.base import Config

LAYERS, ROWS = 4, 8192  # drawn once; steps of all layers take rows of these


class Routing:
    """Choices of rows whose scores are a matter of chance, as the model's own limits allow them.

    skew: the n-th most popular expert of a layer is chosen by n^-skew (Zipf); 0: all are equally likely. Every layer has its
    own order. With groups (n_group, topk_group) a row chooses among those whose best expert is best.
    """

    def __init__(self, config: Config, ranks: int, skew: float = 0.0, seed: int = 0):
        self.ranks, self.experts, self.seed = ranks, config.n_routed_experts, seed
        random = np.random.default_rng(seed)
        self.choices = np.stack([_draw(config, skew, random) for _ in range(LAYERS)])  # [LAYERS, ROWS, top_k]

    @property
    def reached(self) -> float:
        """Other ranks that hold an expert of a row, on average over rows and over the ranks that they may come from."""
        ranks = np.sort(self.choices // (self.experts // self.ranks), -1)
        distinct = 1 + (np.diff(ranks, axis=-1) > 0).sum(-1)
        return float(distinct.mean()) * (self.ranks - 1) / self.ranks

    def loads(self, rows: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Of so many rows of all ranks, those from `start` on: experts that they choose, and choices, [LAYERS, ranks] each."""
        taken = self.choices[:, np.arange(start, start + rows) % ROWS].reshape(LAYERS, -1)
        counts = np.stack([np.bincount(layer, minlength=self.experts) for layer in taken])
        counts = counts.reshape(LAYERS, self.ranks, -1)
        return (counts > 0).sum(-1), counts.sum(-1)


def _draw(config: Config, skew: float, random: np.random.Generator) -> np.ndarray:
    """Of a layer, [ROWS, top_k]. The largest of log p + Gumbel noise are drawn without replacement by p."""
    experts, groups, kept = config.n_routed_experts, config.n_group or 1, config.topk_group or 1
    popularity = -skew * np.log(1 + random.permutation(experts))
    scores = popularity + random.gumbel(size=(ROWS, experts))
    if kept < groups:
        best = scores.reshape(ROWS, groups, -1).max(-1)
        limit = np.partition(best, groups - kept, -1)[:, groups - kept, None]
        scores = np.where(np.repeat(best >= limit, experts // groups, -1), scores, -np.inf)
    return np.argpartition(scores, -config.num_experts_per_tok, -1)[:, -config.num_experts_per_tok :]
