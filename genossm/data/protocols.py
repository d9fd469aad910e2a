"""How rows are divided into train, val and test: named protocols, which are never mixed in one table."""

from collections.abc import Sequence

import numpy as np

from genossm.data.examples import Example, Labelled

PROTOCOLS = {
    "given": "the data set's own train, val and test",
    "caduceus_cv": "a tenth of train, drawn by the seed, is val; best val epoch, test once (Caduceus, appendix D)",
    "hyenadna": "val is the test split, so the best epoch is chosen on test (HyenaDNA, T4.1; optimistic)",
    "nt_kfold": "ten fixed folds of train, the seed says which is val; best val epoch, test once",
    "chrom_holdout": "whole contigs are val and test, whatever split was published",
}
"""Name and meaning of each protocol."""


def divide(
    data: Labelled,
    protocol: str = "auto",
    seed: int = 0,
    *,
    val: float = 0.1,
    test: float = 0.1,
    val_contigs: Sequence[str] = (),
    test_contigs: Sequence[str] = (),
) -> tuple[dict[str, list[Example]], str]:
    """Divide a data set by a protocol.

    Args:
        data: what to divide.
        protocol: one of `PROTOCOLS`; "auto" is "given" where there is a val split, else "caduceus_cv".
        seed: draws the rows of val, or chooses the fold.
        val: share of train that becomes val under "caduceus_cv".
        test: share of train that becomes test where the data set has none, the same rows under every seed.
        val_contigs, test_contigs: for "chrom_holdout"; empty takes the contigs nearest to a tenth of the rows each.

    Returns:
        The splits and the protocol's name.

    Raises:
        ValueError: no such protocol, or the data set can't be divided so; the message says why.
    """
    if protocol == "auto":
        protocol = "given" if data.splits["val"] else "caduceus_cv"
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be auto or one of {', '.join(PROTOCOLS)}; got {protocol!r}.")
    splits = {name: list(rows) for name, rows in data.splits.items()}
    if protocol == "chrom_holdout":
        return _hold_out(data, val_contigs, test_contigs), protocol
    if not splits["test"]:
        splits["train"], splits["test"] = _draw(splits["train"], test, 0)
    if protocol == "given":
        if not splits["val"]:
            raise ValueError(f"{data.title} has no val split, which protocol=given needs; take caduceus_cv.")
    elif protocol == "hyenadna":
        splits["val"] = list(splits["test"])
    elif protocol == "caduceus_cv":
        splits["train"] += splits["val"]
        splits["train"], splits["val"] = _draw(splits["train"], val, seed + 1)
    else:
        pool = splits["train"] + splits["val"]
        order = np.random.default_rng(0).permutation(len(pool))
        fold = set(order[seed % 10 :: 10].tolist())
        splits["train"] = [e for i, e in enumerate(pool) if i not in fold]
        splits["val"] = [e for i, e in enumerate(pool) if i in fold]
    Labelled(target=data.target, splits=dict(splits), title=data.title)
    return splits, protocol


def _draw(rows: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    if not 0 < share < 1:
        raise ValueError(f"The share of rows held out must be between 0 and 1; got {share}.")
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise ValueError(f"{len(rows)} rows are too few to hold {share:g} of them out.")
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return [e for i, e in enumerate(rows) if i not in chosen], [e for i, e in enumerate(rows) if i in chosen]


def _hold_out(data: Labelled, val: Sequence[str], test: Sequence[str]) -> dict[str, list[Example]]:
    rows = [e for split in data.splits.values() for e in split]
    counts: dict[str, int] = {}
    for example in rows:
        if example.interval is None:
            raise ValueError(f"{data.title} has rows without an interval; chrom_holdout needs one of each.")
        counts[example.interval.chrom] = counts.get(example.interval.chrom, 0) + 1
    if len(counts) < 3:
        raise ValueError(f"{data.title} lies on {len(counts)} contigs; chrom_holdout needs at least 3.")
    unknown = sorted(set(val) | set(test) - set(counts)) if not counts.keys() >= set(val) | set(test) else []
    if unknown:
        raise ValueError(f"{data.title} has no rows on {', '.join(unknown)}; it has: {', '.join(sorted(counts))}.")
    if set(val) & set(test):
        raise ValueError(f"{', '.join(sorted(set(val) & set(test)))} can't be both val and test.")
    chosen: dict[str, set[str]] = {"test": set(test), "val": set(val)}
    for name, other in (("test", "val"), ("val", "test")):
        if not chosen[name]:
            free = [c for c in counts if c not in chosen[other]]
            chosen[name] = {min(free, key=lambda c: (abs(counts[c] - 0.1 * len(rows)), c))}
    splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
    for example in rows:
        assert example.interval is not None
        chrom = example.interval.chrom
        splits["test" if chrom in chosen["test"] else "val" if chrom in chosen["val"] else "train"].append(example)
    return Labelled(target=data.target, splits=splits, title=data.title).splits
