"""The mean that may be begun where the clients run: its arithmetic, and which uploads may be in it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.config import compose, instantiate
from fedssl.errors import FedSSLError
from fedssl.federation import flower_compat
from fedssl.federation.arrays import to_record
from fedssl.federation.averaging import Adder, ExactSum, Summation, mean_of
from fedssl.federation.flower_compat import noted_sum
from fedssl.federation.per_family import SEE_UPLOADS, Averaging
from fedssl.federation.records import Header, Upload, num_bytes
from fedssl.federation.roster import Member
from fedssl.federation.weights import largest_entries
from strategies.fedavg import FedAvg
from strategies.fedu import FedU

FAMILY = "tiny"
SHAPES = {f"{FAMILY}/w": (8, 8), f"{FAMILY}/b": (3,)}
BEFORE = to_record(
    {f"{FAMILY}/w": np.linspace(-1, 0.5, 64, dtype="f4").reshape(8, 8), f"{FAMILY}/b": np.zeros(3, "f4")}
)
NUM_IMAGES = (40, 7, 1, 25, 300)
SUMMATION = Summation(
    round_num=2,
    public_fingerprint="f",
    weighted=True,
    clients={partition: (FAMILY, images) for partition, images in enumerate(NUM_IMAGES)},
    devices=instantiate(compose([])["federation"]["devices"]),
)


COHORT = [
    Member(node_id=9 - partition, partition_id=partition, family=FAMILY, num_images=images, trains=True)
    for partition, images in enumerate(NUM_IMAGES)
]


@pytest.fixture(autouse=True)
def process() -> None:
    flower_compat.identify_process()


def weights(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Of sizes from 1 down to 1e-20, so that the order of a plain sum shows."""
    rng = np.random.default_rng(seed)
    draws = {name: rng.normal(size=shape) * 10.0 ** rng.uniform(-20, 0, shape) for name, shape in SHAPES.items()}
    return {name: (scale * draw).astype(np.float32) for name, draw in draws.items()}


def upload(partition: int, arrays: dict[str, np.ndarray], **changes: Any) -> Upload:
    header = Header(round_num=2, partition_id=partition, family=FAMILY, codec="weights", public_fingerprint="f")
    num_examples, seconds = changes.pop("num_examples", NUM_IMAGES[partition]), changes.pop("seconds", 0.5)
    metrics = {"num-examples": float(num_examples), "loss": 1.0, "seconds": seconds}
    return Upload(header=replace(header, **changes), arrays=arrays, metrics=metrics)


def exchange(sent: Upload) -> tuple[Message, Message]:
    """What the client was sent, and its reply."""
    message = Message(RecordDict({"arrays": BEFORE, "config": ConfigRecord()}), 1, "train")
    flower_compat.stamp(message, "1")
    return message, Message(sent.to_content(), reply_to=message)


def add_up(exchanged: Sequence[tuple[int, Message, Message]], summation: Summation = SUMMATION) -> None:
    """Leave these replies as somebody does who adds up all that he can."""
    adder = Adder(summation)
    for one in exchanged:
        adder.take(*one)
    replies = {partition: reply for partition, _, reply in exchanged}
    for added_up in adder.all():
        added_up.put_into(replies[added_up.partitions[0]])


def on_workers(groups: Sequence[Sequence[Upload]], summation: Summation = SUMMATION) -> list[Upload]:
    """What reaches the server of these uploads when each group had a worker that added up."""
    found = []
    for group in groups:
        exchanged = [(sent.header.partition_id, *exchange(sent)) for sent in group]
        add_up(exchanged, summation)
        found += [Upload.from_message(reply) for *_, reply in exchanged]
    return sorted(found, key=lambda upload: upload.header.partition_id)


def assert_equal(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].numpy(), b[name].numpy())


# --- arithmetic -------------------------------------------------------------------------------------------------------
def test_a_mean_by_hand() -> None:
    """Shares 1 and 3: (1 * 0 + 3 * 1) / 4 and (1 * -2 + 3 * 2) / 4."""
    summation = replace(SUMMATION, clients={0: (FAMILY, 1), 1: (FAMILY, 3)})
    before = to_record({f"{FAMILY}/w": np.float32([1, 1])})
    first = upload(0, {f"{FAMILY}/w": np.float32([0, -2])}, num_examples=1)
    second = upload(1, {f"{FAMILY}/w": np.float32([1, 2])}, num_examples=3)
    assert mean_of([first, second], summation, before)["w"].tolist() == [0.75, 1.0]
    assert mean_of([first, second], replace(summation, weighted=False), before)["w"].tolist() == [0.5, 0.0]


def test_the_mean_is_the_same_in_every_order_and_grouping() -> None:
    uploads = [upload(partition, weights(partition)) for partition in range(5)]
    whole = mean_of(uploads, SUMMATION, BEFORE)
    doubles = [sent.num_images * sent.arrays[f"{FAMILY}/w"].astype(float) for sent in uploads]
    assert len({sum(order).tobytes() for order in itertools.permutations(doubles)}) > 1  # type: ignore[attr-defined]
    for order in itertools.permutations(uploads):
        assert_equal(mean_of(order, SUMMATION, BEFORE), whole)
        for cut in (1, 2, 4):
            grouped = on_workers([order[:cut], order[cut:]])
            assert sorted(len(upload.summed or ()) for upload in grouped) == sorted([0, 0, 0, cut, 5 - cut])
            assert_equal(mean_of(grouped, SUMMATION, BEFORE), whole)


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=5),
    images=st.lists(st.integers(1, 2**20), min_size=5, max_size=5),
)
def test_a_mean_is_off_by_less_than_a_float32_can_say(values: list[float], images: list[int]) -> None:
    clients = {p: ("f", images[p]) for p in range(len(values))}
    exact = ExactSum(to_record({"f/w": np.float32([1.0])}), replace(SUMMATION, clients=clients).capacity("f"))
    for value, share in zip(values, images, strict=False):
        arrays = {"f/w": np.float32([value])}
        assert exact.holds(largest_entries(arrays))
        exact.add(arrays, share)
    shares = sum(images[: len(values)])
    expected = sum(Fraction(value) * share for value, share in zip(values, images, strict=False)) / shares
    error = abs(Fraction(float(exact.total["f/w"][0])) / shares - expected)
    assert error <= len(values) * Fraction(2) ** -47


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_every_kind_of_array_is_rounded_to_the_spacing(dtype: str) -> None:
    """In an order of its own in memory, of no dimension, without entries, and one that nobody may change."""
    value = np.random.default_rng(0).uniform(-1, 1, size=(30, 25)).astype(dtype)
    frozen = value.copy()
    frozen.flags.writeable = False
    arrays = {
        "f/w": np.asfortranarray(value),
        "f/v": frozen,
        "f/s": np.array(1, dtype),
        "f/none": np.zeros((0, 3), dtype),
    }
    exact = ExactSum(to_record({name: np.ones_like(array) for name, array in arrays.items()}), 4.0)
    exact.add(arrays, 2.5)
    exact.add(arrays, 0.3)
    spacing = 2.0 ** (6 - 51)  # 10 * 1 * 4 is below 2^6
    for name, array in arrays.items():
        rounded = [spacing * np.round(array.astype(np.float64) * share / spacing) for share in (2.5, 0.3)]
        np.testing.assert_array_equal(exact.total[name], sum(rounded))


# --- what may be in a sum ---------------------------------------------------------------------------------------------
def taken(sent: Upload, *, of: int | None = None, summation: Summation = SUMMATION) -> Message:
    """What the client sent, `of` somebody else, when it has been looked at."""
    message, reply = exchange(sent)
    Adder(summation).take(sent.header.partition_id if of is None else of, message, reply)
    return reply


def test_a_reply_that_was_added_keeps_all_but_its_weights() -> None:
    exchanged = [(p, *exchange(upload(p, weights(p)))) for p in (0, 1)]
    sizes = [num_bytes(reply) for *_, reply in exchanged]
    adder = Adder(SUMMATION)
    for one in exchanged:
        adder.take(*one)
    assert [Upload.from_message(reply) for *_, reply in exchanged] == [
        replace(upload(p, {}), summed=()) for p in (0, 1)
    ]
    (added_up,) = adder.all()
    added_up.put_into(exchanged[0][2])
    carried, other = (Upload.from_message(reply) for *_, reply in exchanged)
    assert (carried.summed, other.summed, other.arrays) == ((0, 1), (), {})
    for name in SHAPES:
        total = 40.0 * weights(0)[name].astype(np.float64) + 7.0 * weights(1)[name].astype(np.float64)
        np.testing.assert_allclose(carried.arrays[name], total, rtol=0, atol=2**-38)
    assert [num_bytes(reply) for *_, reply in exchanged] == sizes


@pytest.mark.parametrize("groups", [[(0, 1)], [(0, 1), (2, 3)], [(0, 1), (2,), (3, 4)], [(0,), (1, 2)]])
def test_a_server_adds_up_sums_as_such(groups: list[tuple[int, ...]]) -> None:
    """Not as an upload, even where weights are doubles, as sums are."""
    before = to_record({f"{FAMILY}/w": np.ones(2)})
    everything = []
    for group in groups:
        exchanged = [(p, *exchange(upload(p, {f"{FAMILY}/w": np.full(2, 0.125)}))) for p in group]
        for _, message, _ in exchanged:
            message.content["arrays"] = before
        add_up(exchanged)
        everything += exchanged
    add_up(everything)
    first, *others = (Upload.from_message(reply) for *_, reply in everything)
    assert first.summed == tuple(partition for group in groups for partition in group)
    assert [(other.summed, other.arrays) for other in others] == [((), {})] * len(others)
    np.testing.assert_array_equal(first.arrays[f"{FAMILY}/w"], sum(NUM_IMAGES[p] for p in first.summed) / 8)


def test_what_a_message_carries_cannot_claim_to_be_a_sum() -> None:
    reply = taken(upload(1, weights(1)))
    assert noted_sum(reply) is not None
    content = flower_compat.records_from_bytes(flower_compat.records_to_bytes(reply.content))
    assert noted_sum(Message(content, reply_to=exchange(upload(1, {}))[0])) is None


def test_a_sum_and_its_uploads_belong_together() -> None:
    """Whoever drops one of them would get a wrong mean."""
    uploads = on_workers([[upload(partition, weights(partition)) for partition in range(3)]])
    assert [sent.summed for sent in uploads] == [(0, 1, 2), (), ()]
    for dropped in range(3):
        with pytest.raises(FedSSLError, match="the sums of tiny's weights are not of the clients"):
            mean_of([sent for p, sent in enumerate(uploads) if p != dropped], SUMMATION, BEFORE)
    with pytest.raises(FedSSLError, match="the sums of tiny's weights"):
        mean_of([*uploads, uploads[0]], SUMMATION, BEFORE)


NOT_ASKED_FOR: dict[str, dict[str, Any]] = {
    "another round": {"round_num": 1},
    "another family": {"family": "other"},
    "another codec": {"codec": "factor"},
    "another public set": {"public_fingerprint": "g"},
    "more images than it said": {"num_examples": NUM_IMAGES[1] + 1},
    "no images": {"num_examples": 0},
    "next to none": {"num_examples": 1e-12},
    "negative seconds": {"seconds": -1.0},
    "endless seconds": {"seconds": math.inf},
}


@pytest.mark.parametrize("changes", NOT_ASKED_FOR.values(), ids=NOT_ASKED_FOR.keys())
def test_a_reply_that_was_not_asked_for_stays_whole(changes: dict[str, Any]) -> None:
    sent = upload(1, weights(1), **changes)
    reply = taken(sent)
    assert noted_sum(reply) is None
    assert reply.content == sent.to_content()


def test_a_reply_in_somebody_elses_name_stays_whole() -> None:
    assert noted_sum(taken(upload(2, weights(1)), of=1)) is None
    assert noted_sum(taken(upload(1, weights(1)), summation=replace(SUMMATION, clients={0: (FAMILY, 40)}))) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 11.0])
def test_weights_that_are_none_or_have_grown_stay_whole(value: float) -> None:
    arrays = weights(1)
    arrays[f"{FAMILY}/b"][1] = value
    assert noted_sum(taken(upload(1, arrays))) is None


@pytest.mark.parametrize(
    "arrays",
    [{}, weights(1) | {f"{FAMILY}/more": np.zeros(1, "f4")}, {name: value[:1] for name, value in weights(1).items()}],
)
def test_other_weights_stay_whole(arrays: dict[str, np.ndarray]) -> None:
    assert noted_sum(taken(upload(1, arrays))) is None


def test_errors_and_what_answers_no_weights_are_left_alone() -> None:
    message, reply = exchange(upload(1, weights(1)))
    failed = flower_compat.error_reply(message, flower_compat.CLIENT_RAISED, "ValueError")
    Adder(SUMMATION).take(1, message, failed)
    assert failed.error.reason == "ValueError"
    del message.content["arrays"]
    Adder(SUMMATION).take(1, message, reply)
    assert noted_sum(reply) is None


@pytest.mark.parametrize(("whole_after", "added"), [(None, True), (0.6, True), (0.5, False), (0.0, False)])
def test_what_may_be_kept_stays_whole(whole_after: float | None, added: bool) -> None:
    reply = taken(upload(1, weights(1)), summation=replace(SUMMATION, whole_after=whole_after))
    assert (noted_sum(reply) is not None) == added


def test_what_the_sum_has_no_room_for_counts_beside_it() -> None:
    """One that has grown and one that states more images: the mean is right, and whoever adds up the others."""
    uploads = [upload(partition, weights(partition)) for partition in range(5)]
    uploads[1] = upload(1, weights(1, scale=1e6))
    uploads[4] = upload(4, weights(4), num_examples=10_000)
    whole = mean_of(uploads, SUMMATION, BEFORE)
    shares = [sent.num_images for sent in uploads]
    for name, array in whole.items():
        plain = np.average([sent.arrays[f"{FAMILY}/{name}"].astype(float) for sent in uploads], axis=0, weights=shares)
        np.testing.assert_allclose(array.numpy(), plain, rtol=1e-6, atol=1e-12)
    grouped = on_workers([uploads[3:], uploads[:3]])
    assert [sent.summed for sent in grouped] == [(0, 2), None, (), (3,), None]
    assert_equal(mean_of(grouped, SUMMATION, BEFORE), whole)


def test_families_have_sums_of_their_own() -> None:
    other = {f"other/{name.split('/')[1]}": value for name, value in weights(9).items()}
    clients = {p: ("other" if p % 2 else FAMILY, images) for p, images in enumerate(NUM_IMAGES)}
    exchanged = []
    for partition in range(4):
        arrays, family = (other, "other") if partition % 2 else (weights(partition), FAMILY)
        message, reply = exchange(upload(partition, arrays, family=family))
        message.content["arrays"] = to_record({name: np.ones_like(value) for name, value in arrays.items()})
        exchanged.append((partition, message, reply))
    add_up(exchanged, replace(SUMMATION, clients=clients))
    carried = [{name.split("/")[0] for name in reply.content["arrays"]} for *_, reply in exchanged]
    assert carried == [{FAMILY}, {"other"}, set(), set()]
    assert [Upload.from_message(reply).summed for *_, reply in exchanged] == [(0, 2), (1, 3), (), ()]


@pytest.mark.parametrize("hook", SEE_UPLOADS)
def test_who_looks_at_single_uploads_gets_them_whole(hook: str) -> None:
    looking: Any = type("Looking", (FedAvg,), {hook: lambda self, *given: getattr(FedAvg, hook)(self, *given)})
    server: Any = SimpleNamespace(public_set=SimpleNamespace(fingerprint="f"), devices=SUMMATION.devices)
    own, other = FedAvg.__new__(FedAvg), looking.__new__(looking)
    for strategy in (own, other):
        vars(strategy).update(server=server, weighted=True, round_num=2, cohort=COHORT)
    assert own.summation == SUMMATION
    assert other.summation is None
    setattr(own, hook, lambda *given: None)
    assert own.summation is None
    assert issubclass(FedU, Averaging)
