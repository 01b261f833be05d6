"""Shapes and types are checked at run time, in tests only."""

import atexit
import os
import shutil
import signal
import tempfile

signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores Ctrl-C, tests need it
cache = tempfile.mkdtemp(prefix="fedssl-tests-")  # decoded images; processes that tests start share it
atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ["FEDSSL_CACHE"] = cache

import jaxtyping

from tests.typechecker import jaxtyped

jaxtyping.jaxtyped = jaxtyped  # what the hook writes above every function
jaxtyping.install_import_hook(["fedssl", "strategies"], "tests.typechecker.check")

from fedssl.environment import DEFAULTS

os.environ.update(DEFAULTS)
os.environ |= {"RAY_worker_niceness": "0"}  # at Ray's 15 workers get little beside another process that tests
