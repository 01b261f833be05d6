"""Who is there: Flower's node ids are random in every run, partitions are not; asked once, used everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedssl.errors import FedSSLError


@dataclass(frozen=True, kw_only=True)
class Member:
    """What a node said of itself."""

    node_id: int
    partition_id: int
    family: str
    num_images: int
    trains: bool  # False for the client whose shard is the public set


Roster = Mapping[int, Member]  # by partition id, ascending

_rosters: "WeakKeyDictionary[Grid, Roster]" = WeakKeyDictionary()


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
