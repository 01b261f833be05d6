"""Who is there: Flower's node ids are random in every run, partitions are not; asked once, used everywhere."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedssl.errors import FedSSLError, PayloadError


@dataclass(frozen=True, kw_only=True)
class Member:
    """What a node said of itself."""

    node_id: int
    partition_id: int
    family: str
    num_images: int
    trains: bool  # False for the client whose shard is the public set


@dataclass(frozen=True, kw_only=True)
class Introduction:
    """What a node of a deployment says of itself before the first round."""

    partition_id: int
    family: str
    num_images: int
    trains: bool
    public_fingerprint: str
    rehearsal: bool  # its images are a partition of the run's own data set
    version: str

    def to_record(self) -> ConfigRecord:
        """As a Flower record; the number of images as a float, so that no message's length tells it."""
        return ConfigRecord({**vars(self), "num_images": float(self.num_images)})

    @classmethod
    def from_record(cls, record: ConfigRecord) -> "Introduction":
        """`PayloadError` if a field is missing or has another type."""
        values: dict[str, object] = {**record}
        if not isinstance(images := values.get("num_images"), float) or not 0 <= images <= 2**53:
            raise PayloadError(f"it says that it has {images} images")
        values["num_images"] = int(images)
        for name, kind in cls.__annotations__.items():
            if type(values.get(name)) is not kind:
                raise PayloadError(f"its {name} should be of type {kind.__name__}, got {values.get(name)!r}")
        return cls(**values)  # type: ignore[arg-type]


Roster = Mapping[int, Member]  # by partition id, ascending

_rosters: "WeakKeyDictionary[Grid, Roster]" = WeakKeyDictionary()
_by_node: "WeakKeyDictionary[Grid, Mapping[int, Member]]" = WeakKeyDictionary()


def ask_roster(grid: Grid) -> Roster:
    """Ask every node once for its partition and architecture; later calls with the same grid return the answer."""
    if grid not in _rosters:
        question = RecordDict({"config": ConfigRecord()})
        messages = [Message(question, node_id, "query.info") for node_id in grid.get_node_ids()]
        members = [_member(reply) for reply in grid.send_and_receive(messages=messages)]
        if len(members) != len(messages):
            raise FedSSLError(f"{len(messages) - len(members)} of {len(messages)} nodes did not say who they are")
        roster = {member.partition_id: member for member in sorted(members, key=lambda m: m.partition_id)}
        if len(roster) != len(members):
            raise FedSSLError("two nodes claim the same partition: each needs its own partition-id in its node config")
        _rosters[grid] = roster
    return _rosters[grid]


def by_node(grid: Grid) -> Mapping[int, Member]:
    """The same by node id, made once: a round's cost does not depend on how many are registered."""
    if grid not in _by_node:
        _by_node[grid] = {member.node_id: member for member in ask_roster(grid).values()}
    return _by_node[grid]


def known_members(grid: Grid) -> Mapping[int, Member]:
    """The same, of those who are known by now; asks nobody."""
    return by_node(grid) if grid in _rosters else {}


def introduce(grid: Grid, members: Iterable[Member]) -> None:
    """Say who the nodes of `grid` are, where that is known already; `ask_roster` then asks nobody."""
    _rosters[grid] = {member.partition_id: member for member in sorted(members, key=lambda m: m.partition_id)}
    _by_node.pop(grid, None)


def _member(reply: Message) -> Member:
    if reply.has_error():
        raise FedSSLError(f"a node could not say who it is: {reply.error.reason}")
    info = reply.content.config_records["info"]
    return Member(
        node_id=reply.metadata.src_node_id,
        partition_id=int(info["partition_id"]),  # type: ignore[arg-type]
        family=str(info["family"]),
        num_images=int(info["num_images"]),  # type: ignore[arg-type]
        trains=bool(info["trains"]),
    )
