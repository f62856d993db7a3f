"""Rows from documents, through a real HTTP server on this machine: checked, resumed, priced, retried."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from exactune.cli.main import app
from exactune.data.documents import passages
from exactune.data.endpoint import Endpoint
from exactune.data.generate import generate, plan
from exactune.errors import ConfigError, DataError


class Server:
    """An OpenAI-compatible server whose replies are given by a function of the request."""

    def __init__(self, reply):
        self.requests = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                status, said = reply(len(outer.requests), body)
                answer = {"choices": [{"message": {"content": said}}], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}
                data = json.dumps(answer).encode() if status == 200 else said.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def rows(*pairs):
    return json.dumps([{"instruction": question, "response": answer} for question, answer in pairs])


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("\n\n".join(f"Paragraph {i} about rivers." for i in range(20)))
    (folder / "b.txt").write_text("One line about stones.")
    return passages([folder], longest=200)


def test_documents_are_cut_at_paragraphs(documents):
    assert documents[-1].place == "b.txt#1" and documents[0].place == "a.md#1"
    assert all(len(passage.text) <= 200 and passage.text.startswith(("Paragraph", "One")) for passage in documents)
    assert "\n\n".join(passage.text for passage in documents[:-1]).count("Paragraph") == 20


def test_a_paragraph_without_end_is_cut_between_words(tmp_path):
    (tmp_path / "t.txt").write_text("word " * 100)
    assert [passage.text for passage in passages([tmp_path / "t.txt"], 60)] == ["word " * 11 + "word"] * 8 + ["word " * 3 + "word"]


def test_rows_are_checked_and_doubles_left_out(serve, documents, tmp_path):
    def reply(number, body):
        if number == 1:
            return 200, "```json\n" + rows(("What flows?", "A river."), ("what  flows", "Again.")) + "\n```"
        return 200, [rows(("What is hard?", " A stone. ")), "I cannot.", '[{"instruction": "x"}, 3]'][number % 3]

    server, to = serve(reply), tmp_path / "out" / "rows.jsonl"
    made = generate(documents, to, Endpoint(server.url, "m"))
    written = [json.loads(line) for line in to.read_text().splitlines()]
    assert [(row["instruction"], row["response"]) for row in written] == [("What flows?", "A river."), ("What is hard?", "A stone.")]
    assert written[0]["source"] == "a.md#1"
    assert made.requests == len(documents) == len(server.requests) and made.rows == 2
    reasons = {"asked before", "the reply is no JSON list", "not an object with instruction and response"}
    assert set(made.left_out) == reasons
    assert (made.prompt_tokens, made.completion_tokens) == (10 * len(documents), 5 * len(documents))
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers and body["model"] == "m" and body["seed"] == 0


def test_an_interrupted_run_goes_on_with_what_is_missing(serve, documents, tmp_path):
    def reply(number, body):
        return (200, rows((f"Question {number}?", "Yes."))) if number != 3 else (400, "no")

    server, to = serve(reply), tmp_path / "rows.jsonl"
    with pytest.raises(ConfigError, match="answers 400"):
        generate(documents, to, Endpoint(server.url, "m"))
    with to.open("a") as file:
        file.write('{"instruction": "cut sh')  # a kill in the middle of a line
    assert plan(documents, to, per_passage=3, max_tokens=10).requests == len(documents) - 2
    generate(documents, to, Endpoint(server.url, "m"))
    assert len(to.read_text().splitlines()) == len(documents) and len(server.requests) == len(documents) + 1
    assert generate(documents, to, Endpoint(server.url, "m")).requests == 0


def test_overload_is_waited_for_and_an_absent_server_told(serve, documents, tmp_path):
    server = serve(lambda number, body: (503, "busy") if number < 3 else (200, rows(("Q", "A"))))
    made = generate(documents[:1], tmp_path / "rows.jsonl", Endpoint(server.url, "m", "secret", first_wait=0.01))
    assert (made.rows, len(server.requests)) == (1, 3)
    assert server.requests[0][1]["Authorization"] == "Bearer secret"
    with pytest.raises(ConfigError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:9/v1", "m", tries=2, first_wait=0.01).chat([])
    with pytest.raises(ConfigError, match="http:// or https://"):
        Endpoint("localhost:8080", "m").chat([])


def test_the_cost_is_shown_first_and_the_rows_can_be_trained_on(serve, tmp_path):
    (tmp_path / "a.md").write_text("Rivers flow.")
    server = serve(lambda number, body: (200, rows(("What flows?", "A river."))))
    to = tmp_path / "rows.jsonl"
    arguments = ["data", "generate", str(tmp_path / "a.md"), "--to", str(to), "--base-url", server.url, "--model", "m"]
    priced = CliRunner().invoke(app, [*arguments, "--price-in", "1", "--price-out", "10", "--max-tokens", "100000", "--dry-run"])
    assert "1 requests for 1 passages" in priced.output and "about 1.00 at these prices" in priced.output
    assert not server.requests and not to.exists()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "1 rows from 1 requests (10 + 5 tokens)" in done.output
    from exactune.data import detect, read_rows

    assert detect(read_rows(to)).name == "instruction_response"


def test_the_bundled_model_behind_a_server_is_spoken_to(serve, tmp_path):
    """A small model does not follow the request; what it says comes through whole, and is told for what it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from exactune import assets
    from exactune.infer import generate as answers

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(assets.base_model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(assets.base_model())
    server = serve(lambda number, body: (200, answers(model, tokenizer, [body["messages"]], max_new_tokens=body["max_tokens"])[0]))
    (tmp_path / "a.txt").write_text("Rivers flow.")
    to = tmp_path / "rows.jsonl"
    made = generate(passages([tmp_path / "a.txt"]), to, Endpoint(server.url, "bundled"), max_tokens=16)
    (entry,) = [json.loads(line) for line in to.with_suffix(".log.jsonl").read_text().splitlines()]
    assert made.requests == 1 and (entry["rows"] or entry["left_out"])


def test_what_holds_no_text_is_told(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(DataError, match="no field `text`"):
        passages([tmp_path / "rows.jsonl"])
    with pytest.raises(DataError, match="There is no file"):
        passages([tmp_path / "none.txt"])
