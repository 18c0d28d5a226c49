"""What was recorded, in a file: redrawing a figure needs no models. Knows no models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import torch

from launcher.study.coupling import Rejection, Rule, Variant
from launcher.study.recording import Record
from ssd_runtime.errors import ConfigError
from ssd_runtime.speculation.sampling.ranking import Ranking

FORMAT = 1


def save(path: Path, about: dict[str, Any], records: Sequence[Record]) -> None:
    """Write records, and what they were recorded with."""
    tree = {"format": FORMAT, "about": about, "records": [_to_tree(record) for record in records]}
    path.write_bytes(msgpack.packb(tree))


def load(path: Path, about: dict[str, Any]) -> list[Record]:
    """Read records.

    Raises:
        ConfigError: unreadable, or recorded with something else than `about`; names what differs.
    """
    try:
        tree = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}, not {FORMAT}")
        known = tree["about"]
        records = [_from_tree(one) for one in tree["records"]]
    except OSError as error:
        raise ConfigError(f"cannot read recording {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise ConfigError(f"recording {path} is damaged ({error}); remove it to record anew") from None
    for key, value in about.items():
        if known.get(key) != value:
            remedy = "give it another name, or remove it to record anew"
            raise ConfigError(f"recording {path} was made with {key} = {known.get(key)}, not {value}; {remedy}")
    return records


def _to_tree(record: Record) -> dict[str, Any]:
    rejection = record.rejection
    return {
        "temperature": record.temperature,
        "chosen": record.chosen,
        "rankings": [_ranking_to_tree(ranking) for ranking in record.rankings],
        "ranks": record.ranks,
        "beyond": {place: [_ranking_to_tree(one) for one in rankings] for place, rankings in record.beyond.items()},
        "rejection": rejection
        and {
            "rank": rejection.rank_R.tolist(),
            "variants": [
                [
                    dataclasses.astuple(rule),
                    [getattr(variant, spec.name).tolist() for spec in dataclasses.fields(variant)],
                ]
                for rule, variant in rejection.variants.items()
            ],
        },
    }


def _from_tree(tree: dict[str, Any]) -> Record:
    rejection = tree["rejection"]
    return Record(
        temperature=tree["temperature"],
        chosen=tuple(tree["chosen"]),
        rankings=tuple(_ranking_from_tree(one) for one in tree["rankings"]),
        ranks=tuple(tree["ranks"]),
        beyond={place: tuple(map(_ranking_from_tree, found)) for place, found in tree["beyond"].items()},
        rejection=rejection
        and Rejection(
            torch.tensor(rejection["rank"]),
            {
                Rule(*rule): Variant(*(torch.tensor(values, dtype=torch.float64) for values in columns))
                for rule, columns in rejection["variants"]
            },
        ),
    )


def _ranking_to_tree(ranking: Ranking) -> list[Any]:
    return [ranking.tokens, ranking.margins]


def _ranking_from_tree(tree: Sequence[Any]) -> Ranking:
    return Ranking(tuple(tree[0]), tuple(tree[1]))
