"""The one Flower `ClientApp`: it turns a message into a `Client` and a `Broadcast` and calls the client half."""

import time

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedssl.errors import BrokenProcessError, ConfigError, FedSSLError
from fedssl.federation.client import Broadcast, Client, ClientUpdate
from fedssl.federation.gpu_memory import measure
from fedssl.federation.model_pool import ModelPool
from fedssl.federation.setup import Setup
from fedssl.federation.store import ClientStore


class ClientError(FedSSLError):
    """A client's work failed; the message says in which phase and with what."""


def make_client_app(
    setup: Setup, update: ClientUpdate | None, store: ClientStore, *, explain: bool = True
) -> ClientApp:
    """A `ClientApp` whose nodes are the partitions of `setup`.

    Args:
        setup: data, models and settings of the run.
        update: the strategy's client half; None where it has none, then clients only say who they are.
        store: the clients' memory between rounds.
        explain: wrap an exception into one line with the phase it happened in. A replay wants the bare exception, and
            models that stay as the client left them.
    """
    app = ClientApp()
    pool = ModelPool(setup.build_model)

    def receive(message: Message, context: Context) -> tuple[Client, Broadcast]:
        config = message.content.config_records["config"]
        round_num = int(config["server-round"])  # type: ignore[arg-type]
        partition_id = int(context.node_config["partition-id"])
        client = setup.client(partition_id, round_num)
        if explain:
            pool.take_back()
            client.build_model = pool
        fingerprint = config.get("public-fingerprint", client.public_set.fingerprint)
        if fingerprint != client.public_set.fingerprint:
            raise ConfigError(
                f"the server's public set ({str(fingerprint)[:12]}) is not this client's "
                f"({client.public_set.fingerprint[:12]}): same images, order and transform are needed, see conf/public"
            )
        arrays = message.content.array_records.get("arrays", ArrayRecord())
        told = {name: value for name, value in config.items() if name not in ("server-round", "public-fingerprint")}
        broadcast = Broadcast(
            round_num=round_num, num_rounds=client.num_rounds, family=client.family, arrays=arrays, config=told
        )
        return client, broadcast

    def explained(client: Client, error: Exception) -> Exception:
        if not explain:
            return error
        kind = BrokenProcessError if isinstance(error, BrokenProcessError) else ClientError
        return kind(f"during {client.phase}: {type(error).__name__}: {error}")

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, broadcast = receive(message, context)
        client.memory = store.read(client.partition_id, before=client.round_num)
        try:
            assert update is not None, "the strategy has no client half"
            started = time.perf_counter()
            upload = update(client, broadcast).measured(time.perf_counter() - started)
            if client.memory:
                with client.doing("writing the client store"):
                    store.write(client.partition_id, client.round_num, client.memory)
        except Exception as error:
            raise explained(client, error) from error
        return Message(upload.to_content(), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client, broadcast = receive(message, context)
        client.memory = store.read(client.partition_id, before=client.round_num + 1)  # what this round's training left
        try:
            metrics = update.evaluate(client, broadcast)  # type: ignore[union-attr]
        except Exception as error:
            raise explained(client, error) from error
        header = ConfigRecord({"partition_id": client.partition_id, "family": client.family})
        return Message(RecordDict({"metrics": MetricRecord(metrics), "header": header}), reply_to=message)

    @app.query("info")
    def info(message: Message, context: Context) -> Message:
        partition_id = int(context.node_config["partition-id"])
        record = ConfigRecord(
            {
                "partition_id": partition_id,
                "family": setup.family(partition_id),
                "num_images": len(setup.data.partitions[partition_id]),
                "trains": partition_id != setup.data.public_partition,
            }
        )
        return Message(RecordDict({"info": record}), reply_to=message)

    @app.query("gpu_memory")
    def gpu_memory(message: Message, context: Context) -> Message:
        pool.take_back()
        record = MetricRecord(dict(measure(setup, pool)))
        return Message(RecordDict({"gpu_memory": record}), reply_to=message)

    return app
