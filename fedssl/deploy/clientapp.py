"""What a node of `fedssl-deploy client` runs in place of Flower's `flwr-clientapp`: the installed fedssl, nothing sent.

A SuperNode starts this for every message, so what it imports is what a message costs beside its work.
"""

from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

from fedssl.deploy.client_app import app
from fedssl.environment import keep_memory
from fedssl.federation import flower_compat


def main() -> None:
    """Entry point."""
    keep_memory(of_threads=True)  # `client_app.within` lets one train
    flower_compat.serve_installed_app(app)
    flwr_clientapp()


if __name__ == "__main__":
    main()
