import os
import signal
import subprocess
import sys
import threading

import pytest

from exactune.train.stopping import Stopped, StopRequests


def test_outside_of_the_steps_a_signal_raises_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, StopRequests():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.signum == signal.SIGTERM
    assert isinstance(stopped.value, KeyboardInterrupt), "no `except Exception` on the way may swallow it"
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_the_steps_a_signal_is_noted_and_says_what_follows(capfd):
    with StopRequests() as requests:
        requests.in_steps = True
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.signum == signal.SIGINT
    assert "Stopping after this step" in capfd.readouterr().err


def test_the_second_signal_kills_at_once():
    script = (
        "import os, signal\n"
        "from exactune.train.stopping import StopRequests\n"
        "with StopRequests() as requests:\n"
        "    requests.in_steps = True\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('never here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "still here\n"


def test_a_run_in_another_thread_leaves_signals_to_its_owner():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def run():
        with StopRequests() as requests:
            seen.append((signal.getsignal(signal.SIGINT), requests.signum))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
