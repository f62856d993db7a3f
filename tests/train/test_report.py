import pytest

from exactune.evaluate import Sample, Scores
from exactune.train.config import TrainConfig
from exactune.train.plot import loss_png
from exactune.train.report import Facts, card, markdown, page


def scores(loss, answers, **shares):
    samples = [Sample("Ask `it`\n| now", "a|b", answer) for answer in answers]
    return Scores(loss=loss, perplexity=2.0, tokens=9, rows=3, generated=len(samples), samples=samples, **shares)


@pytest.fixture
def facts():
    return Facts(
        run="runs/a",
        config=TrainConfig(model_name="some/model", dataset="d.jsonl"),
        environment={"python": "3.12", "gpu": None},
        data={"train": {"rows": 3, "skipped": [[4, "empty"]]}},
        result={"result": "runs/a/adapter", "steps": "7", "time": "3 s"},
        before=scores(2.5, ["```no``` <script>", ""], valid_json=0.5, exact_match=0.0),
        after=scores(1.5, ["a|b", "x\ny"], valid_json=1.0, exact_match=0.5),
        has_plot=True,
    )


def test_the_markdown_has_the_gain_the_answers_and_how_to_use_it(facts):
    text = markdown(facts)
    for part in (
        "| loss (nats per trained token) | 2.5000 | 1.5000 |",
        "| valid JSON (of 2 answers) | 50.0% | 100.0% |",
        "| reference | before (wrong) | after (right) |",
        "exactune chat runs/a",
        "FastLanguageModel.from_pretrained(",
        "| train.skipped | 1 |",
        "learning_rate: 0.0002",
        "python: '3.12'",
    ):
        assert part in text, part


def test_the_page_holds_the_plot_and_no_foreign_markup(facts):
    html = page(markdown(facts), "a <run>", b"\x89PNG")
    assert 'src="data:image/png;base64,iVBORw=="' in html and "loss.png" not in html
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "<title>a &lt;run&gt;</title>" in html
    # bars and backticks of the answers stay inside their cells
    assert "<td><code>a|b</code></td>" in html and "<code>```no``` &lt;script&gt;</code>" in html
    assert "(nothing)" in html and "x ↵ y" in html


def test_without_held_out_rows_the_report_says_how_to_get_the_gain(facts):
    text = markdown(Facts(**{**vars(facts), "before": None, "after": None, "has_plot": False}))
    assert "val_size" in text and "loss.png" not in text


def test_the_card_names_the_base_for_the_hub(facts):
    text = card(facts)
    assert text.startswith("---\nbase_model: some/model\nlibrary_name: peft\n")
    assert "loss.png" not in text


def test_the_plot_is_a_png_and_the_same_twice():
    metrics = [{"step": step, "loss": 3 / step} for step in range(1, 30)] + [{"step": 30, "loss": None}, {"step": 31, "eval_loss": 0.2}]
    png = loss_png(metrics, before=3.0, after=0.1)
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 5000
    assert png == loss_png(metrics, before=3.0, after=0.1)
    assert png != loss_png(metrics)
    assert loss_png([]) is None
