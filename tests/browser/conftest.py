"""A browser, and JupyterLab as `make lab` starts it, for the tests of what a browser shows."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright import sync_api

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
INSTALL = """
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 chromium
"""
INSTALL_SECONDS = 600  # it takes about one minute
OWN = (
    "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR",
)  # fmt: skip
TOKEN = "a-token-for-the-tests"


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's executable. Where it is missing, root (in a container, in CI) installs it; others are told to."""
    missing = "no browser was found: install Chromium (Debian, Ubuntu: apt-get install chromium), then run this again."
    if not find_chromium() and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        try:
            done = subprocess.run(["sh", "-c", INSTALL], capture_output=True, text=True, timeout=INSTALL_SECONDS)
            missing += f" It could not be installed here: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
        except subprocess.TimeoutExpired:
            missing += f" It could not be installed here within {INSTALL_SECONDS} s."
    found = find_chromium()
    if not found and os.environ.get("CI"):
        pytest.fail(missing)
    return found or pytest.skip(missing)


# The next two end with a file's tests: while Playwright runs, no other asyncio loop can, and other tests need theirs.
@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[sync_api.Browser]:
    """Chromium without a window and without a network: every name but this machine's is unknown to it."""
    flags = ["--disable-quic", "--disable-background-networking"]
    flags.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # which root cannot use
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


def make_lab(flags: str) -> list[str]:
    """The command of `make lab`, with this Python in place of the one in .venv."""
    if not shutil.which("make"):
        pytest.skip("make was not found: install it (Debian, Ubuntu: apt-get install make), then run this again.")
    listing = subprocess.run(
        ["make", "--dry-run", "lab", f"LAB_FLAGS={flags}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in listing.stdout.splitlines() if "-m jupyterlab --" in line]
    return [sys.executable, *shlex.split(line)[1:]]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of JupyterLab, started by `make lab` on a copy of the notebooks, with settings of its own."""
    folder = tmp_path_factory.mktemp("lab")
    home, log = folder / "course", folder / "jupyterlab.log"
    for name in ("chapters", "exercises"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns(".*"))
    for name in ("data", "tests"):  # which some only read
        (home / name).symlink_to(ROOT / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {name: str(folder / name.lower()) for name in OWN}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **own, "JUPYTER_TOKEN": TOKEN, "PYTHONPATH": paths,
                   "MINILLAMA_WORK": str(folder / "work")}  # fmt: skip
    command = make_lab(f"--no-browser --port {port} --port-retries 0 --expose-app-in-browser")
    with open(log, "w") as output:
        server = subprocess.Popen(command, cwd=home, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_it_answers(f"http://localhost:{port}/api?token={TOKEN}", server, log)
        yield f"http://localhost:{port}/?token={TOKEN}"
    finally:
        server.terminate()  # it ends its kernels too
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_until_it_answers(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()}"
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not answer within two minutes:\n{log.read_text()}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[pytest.TestReport]:
    """What the page looked like when a test failed."""
    report = yield
    run = getattr(item, "funcargs", {}).get("run")
    if report.failed and call.when == "call" and run is not None:
        report.sections.append(("The page", str(run.screenshot())))
    return report
