"""Model soups: the score, the greedy recipe by hand, and which clients it keeps out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.federation import simulation
from fedssl.federation.arrays import to_record
from fedssl.federation.records import Upload, load_state
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import build_strategy
from fedssl.models import evaluating
from fedssl.seeding import generator
from strategies.soup import Soup
from tests.federation_helpers import assert_same, first_round, numpy_of, rows, small

ONE_FAMILY = ("federation.families=[tiny]",)  # four clients of it


# --- the recipe ---
def first(*overrides: str, tmp_path: Path) -> tuple[Soup, list[Message]]:
    _, strategy, _, replies = first_round(small(None, "strategy=soup", *ONE_FAMILY, *overrides), tmp_path)
    assert isinstance(strategy, Soup)
    return strategy, replies


def declare(replies: Sequence[Message], values: Sequence[float]) -> None:
    """Client k sends a model of which every weight is values[k]."""
    for reply, value in zip(replies, values, strict=True):
        arrays = Upload.from_message(reply).arrays
        reply.content["arrays"] = to_record({name: np.full_like(array, value) for name, array in arrays.items()})


def score_by(scores: dict[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The score of an average is what `scores` says of its (common) weight."""

    def score(_self: Soup, _family: str, uploads: Sequence[Upload]) -> float:
        return scores[float(np.mean([float(upload.arrays["tiny/backbone.scale"]) for upload in uploads]))]

    monkeypatch.setattr(Soup, "score", score)


def test_greedy_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone 1, 4, 8, 16 score .2, .7, .5, .6, so the order is 4, 16, 8, 1. The mean of 4 and 16 is 10 and no better
    than 4; that of 4 and 8 is 6 and as good, which is enough; that of 4, 8 and 1 is 13/3 and worse."""
    strategy, replies = first(tmp_path=tmp_path)
    declare(replies, [1, 4, 8, 16])
    score_by({1: 0.2, 4: 0.7, 8: 0.5, 16: 0.6, 10: 0.69, 6: 0.7, 13 / 3: 0.6}, monkeypatch)
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    for array in arrays.values():
        np.testing.assert_array_equal(array.numpy(), np.full_like(array.numpy(), 6))
    expected = {"num_ingredients": 2, "score": 0.7, "score_best_client": 0.7, "score_worst_client": 0.2}
    assert dict(metrics) == {f"tiny/{k}": v for k, v in expected.items()} | {"tiny/score_passes": 7 * 2 * 24}


def test_a_tie_is_broken_by_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All alone alike and no mean any good: the soup is client 0."""
    strategy, replies = first(tmp_path=tmp_path)
    declare(replies, [1, 4, 8, 16])
    score_by({1: 0.5, 4: 0.5, 8: 0.5, 16: 0.5, 2.5: 0.4, 4.5: 0.4, 8.5: 0.4}, monkeypatch)
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert arrays["tiny/backbone.scale"].numpy() == 1


def test_uniform_is_fedavg_with_all_clients_alike(tmp_path: Path) -> None:
    strategy, replies = first("strategy.server.recipe=uniform", tmp_path=tmp_path)
    arrays, metrics = strategy.aggregate_train(1, replies)
    overrides = ("strategy=fedavg", "strategy.server.weighted=false", *ONE_FAMILY)
    _, fedavg, _, the_same = first_round(small(None, *overrides), tmp_path)
    averaged, _ = fedavg.aggregate_train(1, the_same)
    assert arrays is not None
    assert averaged is not None
    assert_same(numpy_of(arrays), numpy_of(averaged))
    assert dict(metrics or {}) == {"tiny/num_ingredients": 4}


# --- what it measures ---
def test_the_score_is_of_one_view_and_the_plain_image(tmp_path: Path) -> None:
    """Written out for a client's model: eval mode, the features of the backbone, views from the round's generator."""
    strategy, replies = first(tmp_path=tmp_path)
    _, metrics = strategy.aggregate_train(1, replies)
    setup = Setup(small(None, "strategy=soup", *ONE_FAMILY))
    pixels = setup.public_set.images.take(np.arange(24))
    view, plain = setup.views(pixels, generator(0, "soup views", 1)), setup.views.plain(pixels)
    scores = []
    for reply in replies:
        upload = Upload.from_message(reply)
        model = setup.build_model(upload.header.family)
        load_state(model, strategy.state(upload))
        with torch.no_grad(), evaluating(model):
            a, b = (torch.nn.functional.normalize(model.backbone(x).double(), dim=1) for x in (view, plain))
        nearest_other = (b @ b.T).fill_diagonal_(-2).amax(dim=1)
        scores.append(float(((a * b).sum(dim=1) > nearest_other).double().mean()))
    assert metrics is not None
    assert metrics["tiny/score_best_client"] == pytest.approx(max(scores))
    assert metrics["tiny/score_worst_client"] == pytest.approx(min(scores))
    assert max(scores) > min(scores)


def test_all_candidates_of_a_round_see_the_same_views_and_the_next_round_others(tmp_path: Path) -> None:
    strategy, replies = first(tmp_path=tmp_path)

    def views(round_num: int) -> Tensor:
        strategy.aggregate_train(round_num, replies)
        return torch.cat([view for view, _ in strategy.pairs])

    strategy.round_num = 1
    one = views(1)
    assert torch.equal(one, views(1))
    for reply in replies:
        upload = Upload.from_message(reply)
        header = dataclasses.replace(upload.header, round_num=2)
        reply.content["header"] = header.to_record()
    strategy.round_num = 2
    assert not torch.equal(one, views(2))


def test_ingredients_are_in_the_servers_rows(tmp_path: Path) -> None:
    simulation.run(small(tmp_path / "run", "strategy=soup"))
    for row in rows(tmp_path / "run", "server"):
        assert 1 <= row["metrics"]["conv4_4/num_ingredients"] <= 2
        assert row["metrics"]["tiny/num_ingredients"] == 1
        assert 0 <= row["metrics"]["tiny/score"] <= 1


def test_an_unknown_recipe() -> None:
    with pytest.raises(ConfigError, match=r"recipe must be one of greedy, uniform, got 'gazpacho'"):
        build_strategy(Setup(small(None, "strategy=soup", "strategy.server.recipe=gazpacho")))
