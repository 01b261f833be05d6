"""What a SuperNode starts for a message: hands it to the warm process (`fedssl.deploy.warm`), or does it itself.

It imports nothing but the standard library, so that it costs hundredths of a second.
"""

import json
import os
import socket
import sys


def main() -> int:
    """`front SOCKET ARGUMENTS...`; the exit code of the task."""
    path, *arguments = sys.argv[1:]
    sys.stdout.flush()
    try:
        with socket.socket(socket.AF_UNIX) as warm:
            warm.connect(path)
            socket.send_fds(warm, [json.dumps(arguments).encode()], [1, 2])
            return int(warm.recv(16) or b"1")  # nothing: it was killed
    except OSError:
        os.execv(sys.executable, [sys.executable, "-m", "fedssl.deploy.clientapp", *arguments])


if __name__ == "__main__":
    sys.exit(main())
