import io
from types import SimpleNamespace

from rich.console import Console

from exactune.train.progress import ProgressCallback, show_example

LOGS = {"loss": 1.25, "learning_rate": 2e-4}


def shown(console, steps, **logs):
    callback = ProgressCallback(console)
    state = SimpleNamespace(max_steps=steps, global_step=0, num_input_tokens_seen=0)
    callback.on_train_begin(None, state, None)
    for state.global_step in range(1, steps + 1):
        state.num_input_tokens_seen += 100
        callback.on_log(None, state, None, logs={**LOGS, **logs})
    callback.on_log(None, state, None, logs={"train_runtime": 3.0})
    callback.on_train_end(None, state, None)
    return console.file.getvalue()


def test_a_terminal_gets_a_live_bar():
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=140), 40)
    for part in ("training", "40/40", "loss 1.2500", "lr 2.00e-04", "tok/s", "GiB", "━"):
        assert part in text, part
    assert "\x1b[?25h" in text, "the cursor is shown again at the end"


def test_a_file_gets_plain_lines_and_not_too_many():
    text = shown(Console(file=io.StringIO(), width=140), 400)
    lines = text.splitlines()
    assert len(lines) == 21  # the first, and every twentieth of the run
    assert lines[0].startswith("step 1/400  loss 1.2500  lr 2.00e-04") and lines[-1].startswith("step 400/400")
    assert "\x1b" not in text


def test_held_out_losses_are_always_shown():
    assert shown(Console(file=io.StringIO(), width=140), 3, eval_loss=0.5).count("held-out 0.5000") == 3


def example(console, spans):
    show_example(console, spans)
    return console.file.getvalue()


def test_the_example_tells_what_is_learned():
    spans = [("<user>[/bold] 2+2\n", False), ("4<end>", True)]
    plain = example(Console(file=io.StringIO(), width=80), spans)
    assert "<user>[/bold] 2+2\n⟦4<end>⟧" in plain, "and markup in the data is only text"
    coloured = example(Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80), spans)
    assert "\x1b[32m4<end>\x1b[0m" in coloured and "⟦" not in coloured


def test_a_long_example_is_cut():
    text = example(Console(file=io.StringIO(), width=80), [("a" * 5000, False), ("never", True)])
    assert text.count("a") < 1300 and "…" in text and "never" not in text
