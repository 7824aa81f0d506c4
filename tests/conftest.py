"""Settings for all tests."""

import contextlib
import os
import signal

import hypothesis
import pytest

# Tests bring all they need: no library looks for anything on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A script that was started in the background ignores Ctrl-C, and hands that down; what is tested must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples for everyone and no time limit for each, so that a slow machine sees what a fast one sees.
hypothesis.settings.register_profile("minillama", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("minillama")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # here, because it takes seconds and most runs do without

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
